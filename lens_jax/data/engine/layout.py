"""Where the results of a run lie: names say what they are of, so that what is there need not be made again.

work/<stage>/<fingerprint>/<unit>.parquet        the table of a unit
work/<stage>/<fingerprint>/attempts/<unit>/<n>   a run of the unit that has not ended with a table, or not yet
work/<stage>/<fingerprint>/failed/<unit>.txt     why a unit has no table and is not tried again
work/<stage>/<fingerprint>/log/<worker>.jsonl    what units took, one a line
work/running/<host>-<process>.json               what a process of the engine is doing now
"""

import contextlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from lens_jax.atomic import write_text
from lens_jax.errors import LensError


@dataclass(frozen=True)
class Layout:
    """The folders of a run."""

    work: Path
    # By the name of the stage.
    fingerprints: Mapping[str, str]

    def folder(self, stage: str) -> Path:
        """All results of a stage at its present settings."""
        return self.work / stage / self.fingerprints[stage]

    def table(self, stage: str, unit: str) -> Path:
        """The table of a unit."""
        return self.folder(stage) / f"{unit}.parquet"

    def attempts(self, stage: str, unit: str) -> Path:
        """A folder with a file for every run of a unit without a result."""
        return self.folder(stage) / "attempts" / unit

    def failed(self, stage: str, unit: str) -> Path:
        """Why a unit is not tried again; there only if so."""
        return self.folder(stage) / "failed" / f"{unit}.txt"

    def logs(self, stage: str) -> Path:
        """The folder of what units took."""
        return self.folder(stage) / "log"

    def save(self, config: Mapping[str, object]) -> None:
        """Note the fingerprints, and the config that they are of, in work/engine.json."""
        content = {"config": config, "fingerprints": dict(self.fingerprints)}
        path = self.work / "engine.json"
        text = json.dumps(content, indent=1, default=str)
        # Several machines may start at once; and what is the same is not touched.
        if not path.is_file() or path.read_text(encoding="utf-8", errors="replace") != text:
            write_text(path, text)

    @property
    def running(self) -> Path:
        """The folder of signs of life."""
        return self.work / "running"

    def finished(self, stage: str) -> set[str]:
        """Ids of the units that have a table: one listing, not a look for each of a million."""
        return {name[: -len(".parquet")] for name in names(self.folder(stage)) if name.endswith(".parquet")}

    def given_up(self, stage: str) -> dict[str, str]:
        """Units that have failed for good, and why."""
        folder = self.folder(stage) / "failed"
        return {name[: -len(".txt")]: (folder / name).read_text(errors="replace").strip() for name in names(folder)}


def load_layout(work: str | os.PathLike, config: Mapping[str, object] | None = None) -> Layout:
    """The layout that a run noted last; LensError where there was none, or it was of another `config`."""
    path = Path(work) / "engine.json"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        found, noted = content["fingerprints"], content["config"]
        if not all(isinstance(word, str) and word.isalnum() for pair in found.items() for word in pair):
            raise ValueError("fingerprints")
    except OSError:
        raise LensError(f"{path}: no run of the data engine there yet; start one: lens-jax data build CONFIG") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise LensError(f"{path}: damaged ({error}); run `lens-jax data build CONFIG` again") from None
    if config is not None:
        ours = json.loads(json.dumps(config, default=str))
        other = sorted(name for name in ours.keys() | noted.keys() if ours.get(name) != noted.get(name))
        if other:
            raise LensError(
                f"{path}: the last run was of another config ({', '.join(other[:3])}): look with that one, or run "
                "`lens-jax data build CONFIG` with this one first"
            )
    return Layout(Path(work), found)


def names(folder: Path) -> list[str]:
    """The files of a folder, sorted, hidden ones left out; none where there is no folder."""
    with contextlib.suppress(FileNotFoundError, NotADirectoryError), os.scandir(folder) as entries:
        return sorted(e.name for e in entries if not e.name.startswith(".") and e.is_file())
    return []
