"""Whose shards lie in the folder of a data set: of one set of images and settings at a time.

Groups of another run would write shards of the same names, and the tables of those that were there would still say that
all is well. So whoever writes leaves a note first, and forgets what was written under another.
"""

from collections.abc import Sequence
from pathlib import Path

from lens_jax.atomic import write_text
from lens_jax.data.engine import attempts, manifest
from lens_jax.data.engine.config import EngineConfig, Source
from lens_jax.data.engine.groups import Group
from lens_jax.data.engine.layout import Layout, names
from lens_jax.data.index import NAME, load_index
from lens_jax.errors import LensError

_NOTE = "writing.txt"


def claim(config: EngineConfig, source: Source, groups: Sequence[Group], layout: Layout, overwrite: bool) -> bool:
    """Make the folder of a source ready for its groups to be written into; False where the data set is there already.

    LensError where another data set is there, unless `overwrite`.
    """
    folder = Path(config.out) / source.name
    made_of = manifest.made_of(layout, groups)
    if (folder / NAME).is_file():
        index = load_index(folder)
        if index.source == manifest.SOURCE and index.config.get("made_of") == made_of:
            index.check()
            return False
        if index.source != manifest.SOURCE:
            raise LensError(f"{folder}: holds a data set of another kind ({index.source}); choose another `out`")
        if not overwrite:
            raise LensError(
                f"{folder}: holds a data set of other images or settings; pass --overwrite to replace it, or choose "
                "another `out`"
            )
    note = folder / _NOTE
    if not note.is_file() or note.read_text(encoding="utf-8", errors="replace").strip() != made_of:
        _forget(layout, source)
        (folder / NAME).unlink(missing_ok=True)
        write_text(note, made_of + "\n")
    return True


def _forget(layout: Layout, source: Source) -> None:
    """Remove the tables of all groups of a source, of whatever settings: their shards are about to be replaced."""
    stage = layout.work / "write"
    for results in stage.iterdir() if stage.is_dir() else ():
        for name in names(results):
            if name.endswith(".parquet") and name.rpartition("-")[0] == source.name:
                (results / name).unlink(missing_ok=True)
                attempts.clear(results / "attempts" / name.removesuffix(".parquet"))
