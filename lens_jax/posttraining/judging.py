"""Rewards of an epoch's groups as they are drawn, and a journal of every answer, so that none is asked for twice.

    OUT/rewards/<name>.jsonl    a line a group, written when its rewards are there

An image is known by its digest: a resumed run draws the same images again and finds their rewards in the journal. Only
the first of several processes judges.
"""

import hashlib
import json
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lens_jax.errors import LensError
from lens_jax.posttraining import guards
from lens_jax.posttraining.prompts.prompt import Prompt
from lens_jax.posttraining.rewards.combine import Judging, Pending
from lens_jax.posttraining.rewards.reward import Score

FOLDER = "rewards"
# What an image that is no image is said to be wrong with.
_NOT_FINITE = "the image is not finite"


class Judged(NamedTuple):
    """What the groups of an epoch were worth."""

    # By name, of rewards and of what they log besides: float64 [groups, members], NaN where it is missing.
    values: dict[str, np.ndarray]
    # Errors by their text, how often each.
    errors: dict[str, int]
    # Measures of the images alone (`posttraining.guards`), means over groups.
    guards: dict[str, float]
    # From the moment a group was drawn until its rewards were there, mean.
    seconds: float


class Sitting:
    """The judging of the groups of one epoch, or of one evaluation."""

    def __init__(
        self,
        judging: Judging,
        path: Path,
        shape: tuple[int, int],
        waiting: int,
        mark: str,
        held_out: bool = False,
    ):
        """
        Args:
          path: of the journal.
          shape: groups, and members of each.
          waiting: groups that may wait for their rewards before `add` waits too.
          mark: tells these rewards from others: answers of others do not count.
          held_out: ask the rewards that are only measured too.
        """
        self._judging, self._path, self._shape, self._mark, self._held_out = judging, path, shape, mark, held_out
        self._known = read_journal(path, mark)
        self._lines: dict[int, dict[str, Any]] = {}
        self._lock, self._room, self._failed = threading.Lock(), threading.Semaphore(waiting), threading.Event()
        # Threads that only wait: for the rewards of a group, to write them down.
        self._pool = ThreadPoolExecutor(waiting, "journal")
        self._futures: list[Future] = []
        self._file = None

    def add(self, group: int, prompt: Prompt, images: Sequence[np.ndarray | None]) -> None:
        """Ask about a group that is complete; None is an image that is not finite. Waits while too many are waiting."""
        digests = [None if image is None else _digest(image) for image in images]
        known = self._known.get(group)
        if known is not None and known["digests"] == digests:
            self._lines[group] = known
            return
        self._room.acquire()
        if self._failed.is_set():  # `end` says so
            self._room.release()
            return
        shown = [image for image in images if image is not None]
        pending = self._judging.submit(shown, [prompt] * len(shown), self._held_out) if shown else None
        self._futures.append(self._pool.submit(self._wait, group, prompt, digests, shown, pending, time.perf_counter()))

    def _wait(
        self,
        group: int,
        prompt: Prompt,
        digests: list[str | None],
        shown: list,
        pending: Pending | None,
        started: float,
    ) -> None:
        try:
            found = iter(pending.result() if pending else ())
            scores = [Score({}, _NOT_FINITE) if digest is None else next(found) for digest in digests]
            line = {
                "mark": self._mark,
                "group": group,
                "prompt": prompt.id,
                "digests": digests,
                "scores": [dict(score.values) for score in scores],
                "errors": [score.error for score in scores],
                "guards": guards.measure(shown) if shown else {},
                "seconds": round(time.perf_counter() - started, 4),
            }
            with self._lock:
                self._write(line)
                self._lines[group] = line
        except BaseException:
            self._failed.set()
            raise
        finally:
            self._room.release()

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
        self.settle()
        for future in self._futures:
            future.result()
        return collect([self._lines[group] for group in sorted(self._lines)], self._shape)

    def settle(self) -> None:
        """Wait until what was asked is written down or has failed; nothing more can be added."""
        wait(self._futures)
        self._pool.shutdown()
        if self._file is not None:
            self._file.close()


def collect(lines: Sequence[dict[str, Any]], shape: tuple[int, int]) -> Judged:
    """The lines of a journal as arrays."""
    values: dict[str, np.ndarray] = {}
    errors: dict[str, int] = {}
    for line in lines:
        for member, (score, error) in enumerate(zip(line["scores"], line["errors"])):
            for name, value in score.items():
                values.setdefault(name, np.full(shape, np.nan))[line["group"], member] = value
            if error is not None:
                errors[error] = errors.get(error, 0) + 1
    measures = {name: [] for line in lines for name in line["guards"]}
    for line in lines:
        for name, value in line["guards"].items():
            measures[name].append(value)
    mean = {name: float(np.mean(found)) for name, found in measures.items()}
    return Judged(values, errors, mean, float(np.mean([line["seconds"] for line in lines])) if lines else 0.0)


def mark_of(described: Any) -> str:
    """A short digest of what rewards are, as plain JSON."""
    return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()[:16]


def _digest(image: np.ndarray) -> str:
    return hashlib.sha256(repr(image.shape).encode() + np.ascontiguousarray(image).tobytes()).hexdigest()[:32]


def read_journal(path: Path, mark: str) -> dict[int, dict[str, Any]]:
    """The lines of a journal with this mark by group, the last of each; one that a kill cut is none."""
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
            parts = [line[name] for name in ("digests", "scores", "errors")]
            if any(type(part) is not list or len(part) != len(parts[0]) for part in parts):
                continue
            line["scores"] = [{str(name): float(value) for name, value in score.items()} for score in line["scores"]]
            line["guards"] = {str(name): float(value) for name, value in line["guards"].items()}
            line["seconds"] = float(line["seconds"])
            found[int(line["group"])] = line
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            continue
    return found
