"""The list of images that were taken down: it stays with the data sets, and later builds honour it."""

import re
from pathlib import Path

from lens_jax.atomic import write_text
from lens_jax.errors import LensError

NAME = "removed.txt"
_ID = re.compile(r"[0-9a-f]{32}")
_HEAD = "# Images that were taken down, by id. They stay out of whatever is built here later.\n"


def read(out: Path) -> frozenset[bytes]:
    """The ids taken down from the data sets in `out`."""
    path = out / NAME
    return read_ids(path) if path.is_file() else frozenset()


def read_ids(path: Path) -> frozenset[bytes]:
    """Ids in a text file, 32 hexadecimal digits a line; what follows a `#` is a comment."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise LensError(f"{path}: not a text file that can be read ({error})") from None
    ids = set()
    for number, line in enumerate(lines, 1):
        word = line.partition("#")[0].strip().lower()
        if not word:
            continue
        if not _ID.fullmatch(word):
            raise LensError(
                f"{path}:{number}: {word!r:.80} is no id of an image: 32 hexadecimal digits, as `meta.id` of a record "
                "and `lens-jax data why` give it"
            )
        ids.add(bytes.fromhex(word))
    return frozenset(ids)


def add(out: Path, ids: frozenset[bytes]) -> int:
    """Put ids on the list; how many are new."""
    before = read(out)
    write_text(out / NAME, _HEAD + "".join(f"{name.hex()}\n" for name in sorted(before | ids)))
    return len(ids - before)
