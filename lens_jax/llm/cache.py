"""Answers on disk, by the hash of the question: one small file each.

Written aside and renamed, so a reader finds a whole answer or none, whatever process is killed when; of two that write
the same answer at once the later one wins. A damaged file counts as no answer. A file takes a block of the disk, 4 KiB
on most: the report's RL run asks 2.28 million questions (180 steps of 1,152 images and 11 rubrics), 9.3 GB.
"""

import json
import os
import secrets
from pathlib import Path
from typing import Any

from lens_jax.atomic import check_writable
from lens_jax.errors import LensError


class DiskCache:
    """Plain JSON values by a hex key of at least 8 digits."""

    def __init__(self, folder: str | os.PathLike):
        self.folder = Path(folder)
        self._mine = f"{os.getpid()}-{secrets.token_hex(4)}"  # process ids of two machines may be the same

    def check(self) -> None:
        """LensError where nothing can be written."""
        check_writable(self.folder)

    def path(self, key: str) -> Path:
        """4,096 folders: some 550 files in each of the report's run."""
        return self.folder / key[:3] / f"{key[3:]}.json"

    def get(self, key: str) -> Any | None:
        """The value that was put there, or None."""
        try:
            values = json.loads(self.path(key).read_bytes())
        except FileNotFoundError:
            return None
        except (ValueError, RecursionError):
            return None
        except OSError as error:
            raise LensError(f"{self.path(key)}: cannot be read: {error.strerror}") from None
        # The key within shows a file that was copied to the wrong name.
        return values.get("value") if isinstance(values, dict) and values.get("key") == key else None

    def put(self, key: str, value: Any) -> None:
        path = self.path(key)
        partial = path.with_name(f".{path.stem[:12]}-{self._mine}-{secrets.token_hex(4)}.partial")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            partial.write_text(json.dumps({"key": key, "value": value}), encoding="utf-8")
            partial.replace(path)
        except OSError as error:
            partial.unlink(missing_ok=True)
            raise LensError(f"{path}: cannot be written: {error.strerror}") from None
