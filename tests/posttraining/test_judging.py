"""The journal of rewards: what is written as it comes, what counts of it later, and failures."""

import json
import threading

import numpy as np
import pytest

from lens_jax.errors import LensError
from lens_jax.posttraining.judging import Sitting, mark_of
from lens_jax.posttraining.prompts.prompt import Prompt
from lens_jax.posttraining.rewards.combine import Judging
from lens_jax.posttraining.rewards.reward import Score

PROMPT = Prompt("p", "a cat")


def images(seed: int, count: int = 2) -> list[np.ndarray]:
    return list(np.random.default_rng(seed).integers(0, 256, (count, 4, 4, 3), np.uint8))


class Mean:
    """The mean of an image; `gate` holds answers back."""

    name = "mean"

    def __init__(self, gate: threading.Event | None = None):
        self.gate, self.asked = gate, 0

    def check(self):
        pass

    def close(self):
        pass

    def score(self, images, prompts):
        self.asked += len(images)
        if self.gate is not None:
            assert self.gate.wait(30)
        return [Score({"mean": float(image.mean())}) for image in images]


def sitting(reward, path, mark="m", waiting=4):
    return Sitting(Judging([(reward, 1.0)], [], 0.1, 2), path, (3, 2), waiting, mark)


def test_answers_are_asked_for_once(tmp_path):
    path, first = tmp_path / "rewards" / "epoch.jsonl", Mean()
    one = sitting(first, path)
    for group in range(2):
        one.add(group, PROMPT, images(group))
    judged = one.end()
    np.testing.assert_allclose(judged.values["mean"][:2], [[x.mean() for x in images(g)] for g in range(2)])
    assert np.isnan(judged.values["mean"][2]).all()
    np.testing.assert_array_equal(judged.values["reward"], judged.values["mean"])
    assert {"dark_share", "diversity"} <= judged.guards.keys()
    # Cut as a kill would: the second line ends in the middle.
    text = path.read_text()
    path.write_text(text[: text.rindex("digests")])
    second = Mean()
    two = sitting(second, path)
    for group in range(2):
        two.add(group, PROMPT, images(group))
    again = two.end()
    assert second.asked == 2
    np.testing.assert_array_equal(again.values["mean"], judged.values["mean"])
    # Now both are there; but not for other images, or other rewards.
    for seed, mark, asked in ((0, "m", 0), (5, "m", 2), (0, "other", 2)):
        third = Mean()
        three = sitting(third, path, mark)
        three.add(0, PROMPT, images(seed))
        three.end()
        assert third.asked == asked


def test_an_image_that_is_not_finite_is_missing(tmp_path):
    reward = Mean()
    one = sitting(reward, tmp_path / "epoch.jsonl")
    one.add(0, PROMPT, [None, images(0)[1]])
    one.add(1, PROMPT, [None, None])
    judged = one.end()
    assert reward.asked == 1
    np.testing.assert_array_equal(np.isnan(judged.values["mean"]), [[True, False], [True, True], [True, True]])
    assert judged.errors == {"the image is not finite": 3}


def test_drawing_waits_where_too_many_wait(tmp_path):
    """One group may wait; the second one is taken when the first has been answered."""
    gate = threading.Event()
    one = sitting(Mean(gate), tmp_path / "epoch.jsonl", waiting=1)
    one.add(0, PROMPT, images(0))
    added = threading.Event()
    thread = threading.Thread(target=lambda: (one.add(1, PROMPT, images(1)), added.set()))
    thread.start()
    assert not added.wait(0.2)
    gate.set()
    assert added.wait(30)
    thread.join()
    assert np.isfinite(one.end().values["mean"][:2]).all()


def test_a_failure_for_good_keeps_what_was_answered(tmp_path):
    class Failing(Mean):
        def score(self, images, prompts):
            if self.asked:
                raise LensError("the endpoint is gone")
            return super().score(images, prompts)

    path = tmp_path / "epoch.jsonl"
    one = sitting(Failing(), path, waiting=1)
    for group in range(3):
        one.add(group, PROMPT, images(group))
    with pytest.raises(LensError, match="the endpoint is gone"):
        one.end()
    assert [json.loads(line)["group"] for line in path.read_text().split("\n") if line] == [0]


def test_marks():
    assert mark_of({"a": 1, "b": [2]}) == mark_of({"b": [2], "a": 1})
    assert mark_of({"a": 1}) != mark_of({"a": 2})
