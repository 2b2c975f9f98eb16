"""Asking for rewards beside the drawing, and a journal of every answer, so that none is asked for twice.

    OUT/rewards/<sitting>.jsonl    a line for each reward of each group, as it arrives

A sitting is an epoch or an evaluation. An image is known by its digest: a resumed run draws the same images again and
finds their rewards here. Only the first of several processes judges.
"""

import hashlib
import json
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lens_jax.errors import LensError
from lens_jax.posttraining.prompts.prompt import Prompt
from lens_jax.posttraining.rewards.reward import Reward, Score

FOLDER = "rewards"
# What an image that is no image is said to be wrong with.
NOT_FINITE = "the image is not finite"


class Judged(NamedTuple):
    """What a sitting came to."""

    # By name, of rewards and of what they log besides: float64 [groups, members], NaN where it is missing.
    values: dict[str, np.ndarray]
    # Errors by their text, how often each.
    errors: dict[str, int]
    # Of each reward: images that it was asked about, and seconds of its calls an image.
    asked: dict[str, int]
    latency: dict[str, float]


class Judge:
    """Threads that ask rewards about groups of images."""

    def __init__(self, rewards: Sequence[Reward], out: str | Path, workers: int, waiting: int, described: Any = None):
        """Args:
        waiting: groups that may wait for an answer before `Sitting.add` waits too.
        described: what the rewards are, as plain JSON: answers of others do not count.
        """
        self.rewards, self._folder = tuple(rewards), Path(out) / FOLDER
        self.mark = hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()[:16]
        self._pool = ThreadPoolExecutor(workers * max(1, len(self.rewards)), thread_name_prefix="judge")
        self._waiting = waiting

    def sit(self, name: str, groups: int, members: int) -> "Sitting":
        """Begin, or go on with, the judging of so many groups of so many images."""
        return Sitting(self, name, groups, members, self._folder / f"{name}.jsonl", self._waiting)

    def submit(self, function, *args) -> Future:
        return self._pool.submit(function, *args)

    def close(self) -> None:
        """Nothing more is asked; answers that are under way are not waited for."""
        self._pool.shutdown(wait=False, cancel_futures=True)
        for reward in self.rewards:
            reward.close()


class Sitting:
    """The rewards of one epoch, as they come."""

    def __init__(self, judge: Judge, name: str, groups: int, members: int, path: Path, waiting: int):
        self._judge, self.name, self._shape, self._path = judge, name, (groups, members), path
        self._known = _read(path, judge.mark)
        self._lock, self._room = threading.Lock(), threading.Semaphore(waiting)
        self._file = None
        self._futures: list[Future] = []
        self._lines: dict[tuple[str, int], dict[str, Any]] = {}
        self._failed = threading.Event()

    def add(self, group: int, prompt: Prompt, images: Sequence[np.ndarray | None]) -> None:
        """Ask about a group that is complete; None is an image that is not finite. Waits while too many are waiting."""
        self._room.acquire()
        digests = [None if image is None else _digest(image) for image in images]
        todo = [reward for reward in self._judge.rewards if not self._answered(reward.name, group, digests)]
        if not todo:
            self._room.release()
            return
        left = [len(todo)]

        def ask(reward: Reward) -> None:
            try:
                if not self._failed.is_set():
                    self._ask(reward, group, prompt, images, digests)
            except BaseException:
                self._failed.set()
                raise
            finally:
                with self._lock:
                    left[0] -= 1
                    done = not left[0]
                if done:
                    self._room.release()

        self._futures += [self._judge.submit(ask, reward) for reward in todo]

    def _answered(self, reward: str, group: int, digests: list[str | None]) -> bool:
        line = self._known.get((reward, group))
        if line is None or line["digests"] != digests:
            return False
        self._lines[reward, group] = line
        return True

    def _ask(self, reward: Reward, group: int, prompt: Prompt, images, digests) -> None:
        shown = [image for image in images if image is not None]
        started = time.perf_counter()
        try:
            scores = iter(reward.score(shown, [prompt] * len(shown)) if shown else ())
            scores = [Score({}, NOT_FINITE) if image is None else next(scores) for image in images]
        except LensError:
            raise
        except Exception as error:  # a reward of the user's own: whatever it raises is theirs to see
            raise LensError(f"reward {reward.name}: {type(error).__name__}: {' '.join(str(error).split())}") from error
        line = {
            "reward": reward.name,
            "mark": self._judge.mark,
            "group": group,
            "prompt": prompt.id,
            "digests": digests,
            "scores": [dict(score.values) for score in scores],
            "errors": [score.error for score in scores],
            "seconds": round(time.perf_counter() - started, 4),
        }
        with self._lock:
            self._write(line)
            self._lines[reward.name, group] = line

    def _write(self, line: dict[str, Any]) -> None:
        try:
            if self._file is None:
                self._path.parent.mkdir(parents=True, exist_ok=True)
                self._file = self._path.open("a", encoding="utf-8")
                if self._file.tell():
                    self._file.write("\n")  # after a line that a kill may have cut
            self._file.write(json.dumps(line, allow_nan=False) + "\n")
            self._file.flush()
        except OSError as error:
            raise LensError(f"{self._path}: cannot be written: {error.strerror or error}") from None

    def end(self) -> Judged:
        """Wait for all answers. LensError where one failed for good, which ends the run."""
        failure = None
        for future in self._futures:
            try:
                future.result()
            except LensError as error:
                failure = failure or error
        if self._file is not None:
            self._file.close()
        if failure is not None:
            raise failure
        return self._collect()

    def _collect(self) -> Judged:
        values: dict[str, np.ndarray] = {}
        errors: dict[str, int] = {}
        seconds: dict[str, float] = {}
        asked: dict[str, int] = {}
        for (reward, group), line in sorted(self._lines.items()):
            for member, (score, error) in enumerate(zip(line["scores"], line["errors"])):
                for name, value in score.items():
                    values.setdefault(name, np.full(self._shape, np.nan))[group, member] = value
                if error is not None:
                    errors[error] = errors.get(error, 0) + 1
            seconds[reward] = seconds.get(reward, 0.0) + line["seconds"]
            asked[reward] = asked.get(reward, 0) + len(line["scores"])
        return Judged(values, errors, asked, {name: seconds[name] / asked[name] for name in asked})


def _digest(image: np.ndarray) -> str:
    return hashlib.sha256(repr(image.shape).encode() + np.ascontiguousarray(image).tobytes()).hexdigest()[:32]


def _read(path: Path, mark: str) -> dict[tuple[str, int], dict[str, Any]]:
    """The answers of a journal by reward and group, the last of each; a line that a kill cut is none."""
    found = {}
    try:
        lines = path.read_bytes().splitlines()
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise LensError(f"{path}: cannot be read: {error.strerror}") from None
    for text in lines:
        try:
            line = json.loads(text)
            if line["mark"] != mark:
                continue
            count = len(line["digests"])
            parts = [line[name] for name in ("digests", "scores", "errors")]
            if any(type(part) is not list or len(part) != count for part in parts):
                continue
            line["scores"] = [{str(k): float(v) for k, v in score.items()} for score in line["scores"]]
            line["seconds"] = float(line["seconds"])
            found[str(line["reward"]), int(line["group"])] = line
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            continue
    return found


def total(judged: Judged, weights: dict[str, float], shape: tuple[int, int]) -> np.ndarray:
    """The weighted sum of rewards, float64 [groups, members]; NaN where one of them is missing."""
    found = np.zeros(shape)
    for name, weight in weights.items():
        found = found + weight * judged.values.get(name, np.full(shape, np.nan))
    return found
