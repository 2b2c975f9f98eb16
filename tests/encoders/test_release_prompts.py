"""Prompts, and not features, into a release folder with the real vocabulary and a small everything else."""

import numpy as np
import pytest

from lens_jax import cli
from lens_jax.contact_sheet import read_png_metadata
from lens_jax.encoders import harmony
from lens_jax.encoders.tokenizer import encode_prompt
from lens_jax.errors import LensWarning
from lens_jax.inference.pipeline import LensPipeline


@pytest.fixture(scope="module")
def release(release_with_vocabulary):
    return release_with_vocabulary


@pytest.fixture(scope="module")
def pipe(release):
    return LensPipeline.from_pretrained(release)


def sample(capsys, *argv) -> tuple[int, str]:
    with pytest.raises(SystemExit) as stop:
        cli.main(["sample", *map(str, argv)])
    return stop.value.code, capsys.readouterr().err


@pytest.mark.slow
def test_sample_from_the_command_line(capsys, release, tmp_path):
    """Default steps and guidance are the variant's; images say the date; a long prompt is told of, in one line."""
    prompt = "a red fox " * 200
    flags = ("--checkpoint", release, "--out", tmp_path, "--height", 32, "--width", 32, "--date", "2025-01-01")
    flags += ("--negative-prompt", "rain", "--guidance-scale", "2", "--original-truncation")
    code, err = sample(capsys, "a red fox", prompt, *flags)
    assert code == 0
    assert err.startswith("lens-jax: warning: the prompt is 601 tokens, 208 more than the model reads; its end is cut")
    assert err.count("\n") == 1
    said = read_png_metadata(tmp_path / "0000-a-red-fox.png")
    assert (said["num_inference_steps"], said["guidance_scale"], said["date"]) == (4, 2.0, "2025-01-01")
    assert said["original_truncation"] is True
    code, err = sample(capsys, "cat", "--checkpoint", release, "--date", "today")
    assert (code, err.count("\n")) == (2, 1)
    assert "YYYY-MM-DD" in err


@pytest.mark.slow
def test_prompts_are_encoded_once_and_can_be_given_as_features(pipe, monkeypatch):
    calls = []
    run = type(pipe.text_encoder)._run
    monkeypatch.setattr(type(pipe.text_encoder), "_run", lambda *a: calls.append(len(a[1])) or run(*a))
    options = {"height": 32, "width": 32, "num_inference_steps": 2, "guidance_scale": 3.0, "output_type": "latent"}
    first = pipe(["a cat", "a dog"], negative_prompt="fog", **options)
    again = pipe(["a cat", "a dog"], negative_prompt="fog", **options)
    # Two prompts of one length class together, then the negative one.
    assert calls == [2, 1]
    np.testing.assert_array_equal(first.images, again.images)
    assert first.date == harmony.DEFAULT_DATE
    features, negative = pipe.text_encoder.encode(["a cat", "a dog"]), pipe.text_encoder.encode(["fog", "fog"])
    assert features.date == harmony.DEFAULT_DATE
    given = pipe(prompt_embeds=features, negative_prompt_embeds=negative, **options)
    np.testing.assert_array_equal(first.images, given.images)
    assert given.date == harmony.DEFAULT_DATE


def test_long_prompts_by_our_rule_and_by_the_original(release, pipe):
    """393 tokens of the prompt and the 22 behind it, or 415 of the prompt."""
    prompt = "cat" + 499 * " cat"
    original = LensPipeline.from_pretrained(release, original_truncation=True)
    frame = harmony.image_frame(harmony.DEFAULT_DATE)
    suffix = pipe.text_encoder.tokenizer.encode_pieces(frame.suffix)
    with pytest.warns(LensWarning, match="its end is cut"):
        ours, theirs = (p.text_encoder._ids(prompt) for p in (pipe, original))
    assert len(ours) == len(theirs) == 415
    assert ours[:393] == theirs[:393]
    assert ours[393:] == suffix
    assert theirs[393:] == [ours[392]] * 22
    whole = encode_prompt(pipe.text_encoder.tokenizer, frame, "a cat")
    assert pipe.text_encoder._ids("a cat") == whole[harmony.PREFIX_TOKENS :]
