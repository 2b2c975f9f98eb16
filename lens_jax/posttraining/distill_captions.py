"""Batches of captions alone, for a distillation without a discriminator: no image is read.

A batch is of one size, and of captions in an order that no two passes over them share. Which ones follows from how many
captions and batches were taken, so a run goes on exactly, with another batch size too.
"""

import unicodedata
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lens_jax.data.buckets import Bucket
from lens_jax.data.permutation import mix, permute
from lens_jax.errors import LensError
from lens_jax.posttraining.prompts.prompt import read_prompts

# Separate the uses of one seed.
_ORDER, _SIZE = 21, 22
# Bytes of a text file that are read; ten million captions have less.
_MOST = 1 << 32


def read_captions(path: str) -> list[str]:
    """Of a text file the lines that are not blank; of a JSON lines file, or a folder with one, its prompts."""
    file = Path(path)
    if file.suffix == ".jsonl" or file.is_dir():
        return [prompt.prompt for prompt in read_prompts(file)]
    try:
        if file.stat().st_size > _MOST:
            raise LensError(f"captions {path}: more than {_MOST:,} bytes; split it")
        lines = [line.strip() for line in file.read_text("utf-8-sig").splitlines()]
    except FileNotFoundError:
        raise LensError(f"captions {path}: no such file") from None
    except UnicodeDecodeError:
        raise LensError(f"captions {path}: not UTF-8; expected a caption a line, or JSON lines in a .jsonl") from None
    except OSError as error:
        raise LensError(f"captions {path}: cannot be read: {error.strerror}") from None
    captions = [line for line in lines if line]
    if not captions:
        raise LensError(f"captions {path}: no captions in it; expected one a line")
    # Not all that `isprintable` refuses: French and Japanese have spaces of their own.
    if found := next((line for line in captions if any(map(_controls, line))), None):
        raise LensError(f"captions {path}: control characters in {found!r:.60}")
    return captions


def _controls(character: str) -> bool:
    return unicodedata.category(character) == "Cc" and character != "\t"


class CaptionBatches:
    """The `Batches` of a run on captions alone."""

    def __init__(
        self,
        captions: Sequence[str],
        buckets: Sequence[Bucket],
        text_class: int,
        batch_size: int,
        seed: int,
        rows: Callable[[int], np.ndarray],
        transform: Callable[[dict], dict],
        position: dict[str, Any] | None,
    ):
        """
        Args:
          text_class: bound on the tokens of a caption.
          rows: batch size -> the rows of this host.
          transform: what is done to a batch: its captions to what a text encoder reads.
          position: where the run stands; None is the start. LensError where it is in other captions.
        """
        self._captions, self._buckets, self._class = captions, buckets, text_class
        self._size, self._seed, self._transform = batch_size, seed, transform
        self._rows = rows(batch_size)
        self._mark = zlib.crc32("\n".join(captions).encode())
        self._batches, self._taken = 0, 0
        if position is not None:
            if position.get("captions") != self._mark:
                raise LensError("captions: not those that the run began with; give them, or another `out`")
            self._batches, self._taken = int(position["batches"]), int(position["taken"])

    def __next__(self) -> dict:
        passes, places = np.divmod(self._taken + np.arange(self._size), len(self._captions))
        chosen = np.array(
            [permute(place, len(self._captions), self._seed, _ORDER, int(turn)) for turn, place in zip(passes, places)]
        )
        bucket = self._buckets[int(mix(self._seed, _SIZE, self._batches)) % len(self._buckets)]
        batch = {
            "bucket": (bucket.height, bucket.width),
            "text_class": self._class,
            "captions": [self._captions[number] for number in chosen[self._rows]],
            "step": self._batches,
        }
        self._taken, self._batches = self._taken + self._size, self._batches + 1
        return self._transform(batch)

    @property
    def position(self) -> dict[str, Any]:
        return {"batches": self._batches, "taken": self._taken, "captions": self._mark}

    def close(self) -> None:
        """Nothing is read ahead."""
