"""The benchmarks of the cleaning and of the text encoder run and report what they promise. No speed is judged here."""

import numpy as np
import pytest
from PIL import Image

from lens_jax.bench.clean import CleanBench, bench_clean
from lens_jax.bench.filters import FiltersBench, bench_filters
from lens_jax.bench.languages import LanguagesBench, bench_languages
from lens_jax.errors import LensError


def test_clean(tmp_path):
    result = bench_clean(CleanBench(count=1, side=96, repeats=1))
    ratio = result["pillow_numpy_milliseconds"] / result["engine_milliseconds"]
    assert result["ratio_to_pillow_numpy"] == pytest.approx(ratio)
    assert result["luminance_differs_by"] < 1e-12  # the same pixels and the same definition
    with pytest.raises(LensError, match=r"no \.jpg"):
        bench_clean(CleanBench(images=str(tmp_path)))


def test_filters(tmp_path):
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 256, (24, 24, 3), np.uint8)).resize((400, 400), Image.Resampling.BICUBIC)
    image.save(tmp_path / "picture [1].png")
    image.resize((40, 40)).save(tmp_path / "small.png")
    result = bench_filters(FiltersBench(images=str(tmp_path), damages=2))
    assert result["photographs"] == 1
    assert result["corrupt, JPEG, whole"] == "0 of 1"
    assert result["corrupt, PNG, ends early"] == "2 of 2"
    assert result["corrupt recall"] >= result["corrupt recall of Pillow"]
    assert result["entropy, one colour"] == "1 of 1"
    assert result["luminance, exposed by -7 stops"] == result["luminance, lens cap with noise"] == "1 of 1"
    with pytest.raises(LensError, match="of at least 384"):
        bench_filters(FiltersBench(images=str(tmp_path / "none")))


def test_languages():
    """What was trained on is carried over whole; of a language that was not, less."""
    result = bench_languages(LanguagesBench(languages=("de", "ko"), trained=("en", "de"), count=1))
    assert result["de"].startswith("10 of 10 prompts")
    assert int(result["ko"].split()[0]) < 10
    with pytest.raises(LensError, match=r"'jp' .*; accepted: en, de"):
        LanguagesBench(languages=("jp",))
