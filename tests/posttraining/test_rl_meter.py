"""What an evaluation says: means over prompts, with intervals, by reward and by category."""

import numpy as np
import pytest

from lens_jax.posttraining.judging import Judged
from lens_jax.posttraining.rl_meter import evaluated


def test_means_and_intervals_are_of_prompts():
    """Four prompts of two images each; one image has no answer, one prompt none at all of the second reward."""
    passes = np.array([[1, 1], [0, np.nan], [1, 0], [0, 0]])
    other = np.array([[0.5, 0.5], [np.nan, np.nan], [1, 0], [0, 0]])
    found = evaluated(Judged({"passes": passes, "other/part": other}, {}, {}, 0.0), ["a", "a", "b", ""])
    # Prompts' means 1, 0, 1/2, 0: their mean is 3/8, their variance 11/48.
    half = lambda values: 1.96 * np.std(values, ddof=1) / np.sqrt(len(values))
    assert found["by_name"] == pytest.approx({"passes": 3 / 8, "other/part": 1 / 3})
    assert found["interval_by_name"]["passes"] == pytest.approx(1.96 * np.sqrt(11 / 48 / 4))
    assert found["interval_by_name"]["other/part"] == pytest.approx(half([0.5, 0.5, 0]))
    # A part of a reward by category too: of the scene checker's, `scene/all` is what counts in the end.
    assert found["by_category"] == {"passes": {"a": 0.5, "b": 0.5}, "other/part": {"a": 0.5, "b": 0.5}}
    assert found["interval_by_category"]["passes"]["a"] == pytest.approx(half([1, 0]))
    assert np.isnan(found["interval_by_category"]["passes"]["b"])
    assert found["missing"] == pytest.approx((1 / 8 + 2 / 8) / 2)
