"""Caption lengths: counted as the release's tokenizer does, or estimated from above."""

import numpy as np
import pytest

from lens_jax import cli
from lens_jax.data import caption_length, captions, phrases, scene_sampler
from lens_jax.data.buckets import Bucket
from lens_jax.data.index import load_index
from lens_jax.data.sources import openmoji
from lens_jax.encoders import harmony


def test_what_stands_behind_a_prompt_is_counted():
    assert caption_length.BEHIND == harmony.SUFFIX_TOKENS
    assert caption_length.longest([("a",), ("abc", "ab")], len) == 25
    assert [caption_length.text_class(n, (64, 128)) for n in (1, 64, 65, 128, 129)] == [64, 64, 128, 128, 0]


def test_estimates_are_seldom_too_short(release_tokenizer):
    """Captions of scenes in twelve languages: none too short in English, a few where words are long."""
    concepts, rng = openmoji.load_concepts(128), np.random.default_rng(0)
    drawn = [scene_sampler.sample_scene(rng, concepts, Bucket(32, 32)) for _ in range(300)]
    for language in phrases.LANGUAGES:
        texts = [captions.caption(scene, language) for scene in drawn]
        counted = np.array([len(release_tokenizer.encode(text)) for text in texts])
        estimated = np.array([caption_length.estimate(text) for text in texts])
        assert (estimated < counted).mean() <= {"tr": 0.3, "it": 0.15, "pt": 0.05}.get(language, 0), language
        assert estimated.sum() < 2.7 * counted.sum()


def test_the_tokenizer_of_a_release_counts(release_tokenizer, release_tokenizer_folder, tmp_path):
    from PIL import Image

    root = tmp_path / "images"
    root.mkdir()
    captions = ["a red apple", "a red apple on a wooden table " * 6, "苹果" * 40]
    for number, text in enumerate(captions):
        Image.new("RGB", (40, 40), (number, 0, 0)).save(root / f"{number}.png")
        (root / f"{number}.txt").write_text(text, encoding="utf-8")
    flags = ["--path", str(root), "--out", str(tmp_path / "out"), "--buckets", "32x32", "--min-side", "8",
             "--validation", "0", "--caption-classes", "32", "64", "128"]  # fmt: skip
    with pytest.raises(SystemExit) as stop:
        cli.main(["prepare", "folder", *flags, "--tokenizer", str(release_tokenizer_folder)])
    assert stop.value.code == 0
    index = load_index(tmp_path / "out")
    assert index.caption_count == "tokenizer"
    lengths = sorted(22 + len(release_tokenizer.encode(text.strip())) for text in captions)
    expected = [caption_length.text_class(length, (32, 64, 128)) for length in lengths]
    assert [stream.text_class for stream in index.streams for _ in range(stream.records)] == expected
