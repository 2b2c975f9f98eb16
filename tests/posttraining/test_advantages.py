"""Advantages by hand: two groups, a group without variance, a reward that is missing."""

import numpy as np

from lens_jax.posttraining.advantages import goodness, group_advantages


def test_two_groups_by_hand():
    """Means 2 and 6; all six deviate by sqrt((9 + 4 + 1 + 1 + 0 + 25) / 6) from 4."""
    found = group_advantages([[1, 2, 3], [5, 4, 9]])
    deviation = np.sqrt(40 / 6) + 1e-4
    np.testing.assert_allclose(found.values, np.array([[-1, 0, 1], [-1, -2, 3]]) / deviation, rtol=1e-6)
    assert found.values.dtype == np.float32
    assert (found.zero_variance, found.missing) == (0, 0)
    r = goodness(found.values, z_c=1)
    np.testing.assert_allclose(r, 0.5 + 0.5 * np.clip(found.values, -1, 1))
    assert r[1, 2] == 1
    # The report's clip at Z_c = 5 stds is the reference code's clip(A, -5, 5) / 10 + 1/2.
    np.testing.assert_allclose(goodness([-7, -5, 2.5, 4, 9], z_c=5), np.clip([-7, -5, 2.5, 4, 9], -5, 5) / 10 + 0.5)


def test_a_group_without_variance_gives_exactly_nothing():
    """Three times 0.1 has a mean that is rounded to something else."""
    assert np.mean([0.1, 0.1, 0.1]) != 0.1
    found = group_advantages([[0.1, 0.1, 0.1], [0, 1, 0.5]])
    assert (found.values[0] == 0).all()
    assert (goodness(found.values[0], 5) == 0.5).all()
    assert found.zero_variance == 0.5
    # All of them alike: nothing is divided by zero.
    assert (group_advantages(np.ones((2, 3))).values == 0).all()


def test_what_is_missing_takes_no_part():
    """Not in the mean of its group, not in the deviation; and it is no zero."""
    found = group_advantages([[1, np.nan, 3], [5, 4, 9]])
    whole = np.array([1, 3, 5, 4, 9])
    np.testing.assert_allclose(found.values[0, [0, 2]], np.array([-1, 1]) / (whole.std() + 1e-4), rtol=1e-6)
    assert found.values[0, 1] == 0
    np.testing.assert_array_equal(found.valid, [[True, False, True], [True, True, True]])
    assert found.missing == 1 / 6
    alone = group_advantages([[np.nan, 2, np.nan], [np.nan] * 3, [1, 2, 3]])
    assert (alone.values[:2] == 0).all()
    np.testing.assert_allclose(alone.zero_variance, 2 / 3)
