"""Rewards to advantages: each image against the others of its prompt, in units of the epoch (report section 4)."""

from typing import NamedTuple

import numpy as np

# Added to the standard deviation, as in the reference code of DiffusionNFT and Flow-GRPO.
_EPS = 1e-4


class Advantages(NamedTuple):
    """Of the images of an epoch, float32 [groups, members], and what of them is worth a line in the log."""

    # 0 where a reward is missing, and in groups that give no signal.
    values: np.ndarray
    # Whether the image has a reward: only then it takes part in the update.
    valid: np.ndarray
    # Groups whose rewards are all alike, of all groups.
    zero_variance: float
    # Images without a reward, of all.
    missing: float


def group_advantages(rewards: np.ndarray) -> Advantages:
    """(R - mean of its group) / (standard deviation of all + 1e-4) of rewards [groups, members]; NaN is missing.

    The deviation is that of the whole epoch, not of the group: a group of nearly equal images must not count as much as
    one that tells good from bad. A missing reward takes no part in either. A group whose rewards are all the same, or
    that has one alone, has advantages of exactly 0, whatever their mean is rounded to.
    """
    rewards = np.asarray(rewards, np.float64)
    valid = np.isfinite(rewards)
    counts = valid.sum(1, keepdims=True)
    filled = np.where(valid, rewards, 0)
    means = filled.sum(1, keepdims=True) / np.maximum(counts, 1)
    alike = _ends(rewards, valid, np.max) <= _ends(rewards, valid, np.min)
    deviation = float(np.std(rewards[valid])) if valid.any() else 0.0
    values = np.where(valid & ~alike, (filled - means) / (deviation + _EPS), 0)
    return Advantages(values.astype(np.float32), valid, float(alike.mean()), float((~valid).mean()))


def _ends(rewards: np.ndarray, valid: np.ndarray, which) -> np.ndarray:
    """The largest or smallest reward of each group [groups, 1]; of an empty one the value that makes it all alike."""
    start = -np.inf if which is np.max else np.inf
    ends = which(rewards, axis=1, keepdims=True, where=valid, initial=start)
    return np.where(valid.any(1, keepdims=True), ends, 0)


def goodness(advantages: np.ndarray, z_c: float) -> np.ndarray:
    """DiffusionNFT's r in [0, 1]: 1/2 + 1/2 clip(A / z_c, -1, 1); the report's Z_c is so many standard deviations."""
    return (0.5 + 0.5 * np.clip(np.asarray(advantages, np.float64) / z_c, -1, 1)).astype(np.float32)
