"""LensPipeline on an untrained tiny model: what an image depends on, and what it must not."""

import dataclasses

import jax
import numpy as np
import pytest

from lens_jax.diffusion import draw as drawing
from lens_jax.encoders.sentence import SentenceEncoder
from lens_jax.errors import LensError
from lens_jax.inference import pipeline
from lens_jax.inference.pipeline import LensPipeline
from lens_jax.models import denoiser


@pytest.fixture(scope="module")
def pipe(tiny_config):
    leaves, tree = jax.tree.flatten(denoiser.init(tiny_config.model, jax.random.key(0)))
    keys = jax.random.split(jax.random.key(1), len(leaves))
    # Every leaf non-zero, or the prompt would not matter.
    params = tree.unflatten([x + 0.1 * jax.random.normal(k, x.shape) for k, x in zip(keys, leaves)])
    stats = {"basis": np.eye(48, dtype=np.float32), "mean": np.zeros(48, np.float32), "scale": np.ones(1, np.float32)}
    return LensPipeline(
        tiny_config.model, tiny_config.codec, SentenceEncoder(tiny_config.text), params, stats, (16, 16), batch_size=4
    )


def draw(pipe, *args, **options):
    return pipe(*args, **{"num_inference_steps": 3, "output_type": "latent", **options}).images


def test_an_image_does_not_depend_on_its_neighbours(pipe):
    """Image i of a seed is the same alone, in a full batch, and in batches of another size."""
    prompts = ["cat", "red apple, blue background", "", "dog", "car", "sun"]
    together = draw(pipe, prompts, seed=7)
    other_neighbours = draw(pipe, ["fish", prompts[1], "tree", "owl"], seed=7)
    # float32: other batch sizes sum in another order.
    np.testing.assert_allclose(together[1], other_neighbours[1], atol=2e-5)
    pipe.batch_size = 6
    np.testing.assert_allclose(together, draw(pipe, prompts, seed=7), atol=2e-5)
    pipe.batch_size = 4
    assert np.abs(together[1] - draw(pipe, prompts, seed=8)[1]).max() > 0.1


def test_given_latents_are_the_noise(pipe):
    noise = drawing.seed_noise(3, 2, 16, 48)
    np.testing.assert_array_equal(draw(pipe, ["cat", "dog"], seed=3), draw(pipe, ["cat", "dog"], latents=noise))
    with pytest.raises(LensError, match=r"latents are \[1, 16, 48\]; this call needs \[2, 16, 48\]"):
        draw(pipe, ["cat", "dog"], latents=noise[:1])


def test_guidance_of_one_runs_no_second_branch(pipe, monkeypatch):
    calls = []
    apply = denoiser.apply
    monkeypatch.setattr(denoiser, "apply", lambda *a, **k: calls.append(a[3][0].shape[1]) or apply(*a, **k))
    for guidance_scale, text_tokens in {1.0: [4], 3.0: [4, 0]}.items():
        calls.clear()
        drawing.draw_program.clear_cache()
        draw(pipe, ["cat"], guidance_scale=guidance_scale)
        assert calls == text_tokens
    drawing.draw_program.clear_cache()


def test_negative_prompt(pipe):
    plain = draw(pipe, ["cat"])
    np.testing.assert_array_equal(plain, draw(pipe, ["cat"], negative_prompt="  "))
    assert np.abs(plain - draw(pipe, ["cat"], negative_prompt="dog")).max() > 1e-3
    both = draw(pipe, ["cat", "sun"], negative_prompt="dog")
    np.testing.assert_array_equal(both, draw(pipe, ["cat", "sun"], negative_prompt=["dog"]))
    np.testing.assert_array_equal(both, draw(pipe, ["cat", "sun"], negative_prompt=("dog", "dog")))
    embeds = pipe.text_encoder.encode(["dog"])
    np.testing.assert_array_equal(both, draw(pipe, ["cat", "sun"], negative_prompt_embeds=embeds))
    with pytest.raises(LensError, match="2 negative prompts for 1 prompts"):
        draw(pipe, ["cat"], negative_prompt=["a", "b"])


def test_sizes_the_release_offers():
    sizes = {(1024, "1:2"): (1472, 736), (1024, "16:9"): (768, 1376), (1440, "3:4"): (1616, 1216),
             (1440, "2:1"): (1040, 2080)}  # fmt: skip
    for arguments, size in sizes.items():
        assert pipeline.offered_size(*arguments) == size


def test_output_types_and_sizes(pipe):
    arrays = pipe("cat", height=8, width=24, num_inference_steps=2, num_images_per_prompt=2, output_type="np").images
    assert arrays.shape == (2, 8, 24, 3)
    assert 0 <= arrays.min() <= arrays.max() <= 1
    images = pipe("cat", height=8, width=24, num_inference_steps=2, num_images_per_prompt=2).images
    assert images[0].size == (24, 8)
    np.testing.assert_allclose(np.asarray(images[1]) / 255, arrays[1], atol=1 / 255 + 1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"height": 10, "width": 16}, "size 10x16 cannot be tiled"),
        ({"height": 16}, "give both height and width"),
        ({"height": 16, "width": 16, "aspect_ratio": "1:1"}, "give either height and width, or base_resolution"),
        (
            {"height": 4_000_000, "width": 4_000_000},
            r"has 1,000,000,000,000 tokens and needs at least .* GB",
        ),
        ({"base_resolution": 512}, "accepted: 1024, 1440"),
        ({"aspect_ratio": "5:4"}, "accepted: 1:2, 9:16"),
        ({"num_images_per_prompt": 0}, "num_images_per_prompt is 0"),
        ({"num_inference_steps": 0}, "num_inference_steps is 0"),
        ({"output_type": "jpg"}, "accepted: pil, np, latent"),
        ({"output_type": ["np"]}, "accepted: pil, np, latent"),
        ({"height": "8", "width": "8"}, "height is '8'; it must be a whole number"),
        ({"height": 8, "width": 8.0}, "width is 8.0; it must be a whole number"),
        ({"base_resolution": [1024]}, "accepted: 1024, 1440"),
        ({"aspect_ratio": 1}, "aspect_ratio is 1; accepted: 1:2"),
        ({"num_inference_steps": 2.5}, "num_inference_steps is 2.5; it must be a whole number"),
        ({"num_inference_steps": True}, "num_inference_steps is True; it must be a whole number"),
        ({"num_images_per_prompt": None}, "num_images_per_prompt is None; it must be a whole number"),
        ({"guidance_scale": float("nan")}, "guidance_scale is nan; it must be a finite number"),
        ({"guidance_scale": float("inf")}, "guidance_scale is inf; it must be a finite number"),
        ({"guidance_scale": "5"}, "guidance_scale is '5'; it must be a finite number"),
        ({"solver": None}, "solver is None; accepted: euler, dpm2"),
        ({"seed": -1}, "seed is -1; it must be a whole number from 0"),
        ({"seed": 1 << 64}, "seed is 18446744073709551616; it must be a whole number from 0"),
        ({"seed": 0.5}, "seed is 0.5; it must be a whole number from 0"),
        ({"latents": "noise"}, "latents is str; it must be an array of numbers"),
        ({"latents": np.full((1, 16, 48), np.nan)}, "latents: 768 of the numbers are not finite"),
        ({"negative_prompt": 3}, "negative_prompt must be text or a list of texts"),
        ({"negative_prompt": [None]}, "negative_prompt must be text or a list of texts"),
        ({"negative_prompt_embeds": np.zeros(3)}, "prompt_embeds is ndarray; it must be a TextFeatures"),
        ({"progress": 1}, "progress is 1; it must be a function"),
        ({"generator": object()}, "generator is no argument here: .*give seed="),
        ({"max_sequence_length": 512}, "max_sequence_length is no argument here: "),
        ({"callback_on_step_end": print}, "callback_on_step_end is no argument here: .*progress="),
        ({"guidence_scale": 3}, r"guidence_scale \(did you mean 'guidance_scale'\?\) is no argument; accepted: prompt"),
    ],
)
def test_bad_arguments(pipe, options, message):
    with pytest.raises(LensError, match=message):
        pipe("cat", **options)
    for prompt in ([1], b"cat", [None]):
        with pytest.raises(LensError, match="prompt 0 is"):
            pipe(prompt)
    for prompt in (None, 3, [], {"cat"}):
        with pytest.raises(LensError, match="prompt"):
            pipe(prompt)


def test_arguments_of_diffusers_that_change_nothing(pipe):
    (images,) = draw_call(pipe, "cat", generator=None, sigmas=None, return_dict=False)
    np.testing.assert_array_equal(images, draw(pipe, "cat"))


def draw_call(pipe, *args, **options):
    return pipe(*args, **{"num_inference_steps": 3, "output_type": "latent", **options})


def test_seeds_have_64_bits():
    """All differ, and those below 2^31 are what `jax.random.key` makes of them."""
    for seed in (0, 1, 2**31 - 1):
        np.testing.assert_array_equal(
            jax.random.key_data(drawing.seed_key(seed)), jax.random.key_data(jax.random.key(seed))
        )
    noises = {drawing.seed_noise(seed, 1, 4, 2).tobytes() for seed in (0, 1, 2**32, 2**32 + 1, 2**63, 2**64 - 1)}
    assert len(noises) == 6
    assert drawing.seed_noise(np.int64(5), 1, 2, 2).tobytes() == drawing.seed_noise(5, 1, 2, 2).tobytes()


@pytest.mark.parametrize("output_type", ["pil", "np", "latent"])
@pytest.mark.parametrize("part", ["params", "codec_params"])
def test_what_is_not_finite_is_not_drawn(pipe, part, output_type):
    broken = dataclasses.replace(pipe, **{part: jax.tree.map(lambda x: x * np.float32(np.nan), getattr(pipe, part))})
    if (part, output_type) == ("codec_params", "latent"):
        return  # no codec is run
    with pytest.raises(LensError, match="2 of 2 images are not finite"):
        draw(broken, ["cat", "dog"], output_type=output_type)
