"""Where the networks of a pipeline come from: a release folder, a folder in our layout, single files, or a mix of them.

What a file holds is seen by its tensors and not by its name.
"""

import dataclasses
import os
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lens_jax.convert import folder, prefixes, release, text_layouts
from lens_jax.convert.component import COMPONENTS, Component
from lens_jax.convert.release import Variant
from lens_jax.convert.table import Tensors, digest
from lens_jax.errors import LensError, LensWarning, nearest

TOKENIZER = "tokenizer"
_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}")
# What may be given beside a source.
PLACES = (*(component.ours for component in COMPONENTS), TOKENIZER)


@dataclasses.dataclass(frozen=True)
class Part:
    """One network of a source."""

    component: Component
    # The file or folder it was found in.
    path: Path
    # What its config.json says; that of the released model where it came without.
    values: dict
    # Of the release, by name and in plain numbers or packed MXFP4; or leaves of our tree by path.
    tensors: Tensors
    # Whether they are leaves of our tree.
    converted: bool = False

    def config(self, **options):
        """The config of the network; `options` replace fields."""
        return self.component.module.config_from_release(self.values, str(self.path), **options)

    def stored_config(self):
        """The config whose parameters keep the floats as they are; the text encoder's says itself what they are."""
        if self.component.ours == "text_encoder":
            return self.config()
        return self.config(param_dtype=self.float_dtype())

    def float_dtype(self) -> str:
        """The widest float it holds: float32 unless all are half precision."""
        return _float_dtype(self.tensors)

    def digest(self) -> str:
        """Tells these weights from others, by `table.digest`."""
        return digest(self.tensors)

    def leaves(self, config, **options) -> Tensors:
        """Leaves of our tree by path for a `config`; `options` are those of `leaves` of the component's module."""
        if not self.converted:
            return self.component.module.leaves(config, self.tensors, str(self.path), **options)
        wrong = [
            path
            for path, like in self.component.module.template(config, **options).items()
            if path not in self.tensors or self.tensors.shape(path) != tuple(like.shape)
        ]
        if wrong:
            raise LensError(f"{self.path}: {len(wrong)} arrays are missing or misshapen: {', '.join(wrong[:8])}")
        return self.tensors


@dataclasses.dataclass(frozen=True)
class Source:
    """What was found, by `find`."""

    path: Path
    # By the name of the component.
    parts: dict[str, Part]
    # The release folder with configs and tokenizer, if there is one.
    release: Path | None
    # A tokenizer.json, or the bytes of one; None where only `release` may have one.
    tokenizer: Path | bytes | None
    # Whether `path` is in our layout.
    converted: bool

    def recognised(self) -> list[str]:
        """A line on each network that lies outside a release folder."""
        homes = (self.release, self.path)
        return [
            f"{part.path}: the {part.component.title}, {len(part.tensors)} tensors"
            for part in self.parts.values()
            if part.path.parent not in homes
        ]


def find(path: Path, given: Mapping[str, Path | str | None] | None = None) -> Source:
    """Open a source; nothing but headers is read.

    Args:
      path: a release folder, a folder in our layout, or weights (a file or a folder of shards) of one network or more.
      given: by the names of `PLACES` what is taken instead of what `path` holds, or beside it: weights, or a release
        folder that has them; of the tokenizer its folder or its tokenizer.json.

    A network's config is the config.json beside its weights, else that of the release folder, else that of the released
    model. Raises LensError for what is not there, not recognised, or does not fit.
    """
    given = {name: as_path(place, name) for name, place in (given or {}).items() if place}
    for name in given:
        if name not in PLACES:
            raise LensError(f"{name!r}{nearest(name, PLACES)} is no part of a pipeline; accepted: {', '.join(PLACES)}")
    path = _snapshot(as_path(path, "a checkpoint"))
    check_exists(path)
    converted = release.is_native(path)
    home = path / "release" if converted else path if release.is_release(path) else None
    if home and (home / release.INDEX).is_file():
        _check_index(home)
    opened: dict[Path, Tensors] = {}
    parts, embedded = {}, None
    for component in COMPONENTS:
        place = given.get(component.ours)
        if place is None and converted:
            if (path / component.ours).is_dir():
                values = folder.read_json(home / component.theirs / "config.json")
                lazy = folder.open_component(path / component.ours)
                parts[component.ours] = Part(component, path / component.ours, values, lazy, converted=True)
            continue
        own = place is None and home is not None
        place = home / component.theirs if own else _snapshot(place) if place else path
        check_exists(place if not own else home)
        if own and not place.is_dir():
            continue
        if not own and (place / component.theirs).is_dir():
            place = place / component.theirs
        if place not in opened:
            opened[place] = _open(place)
        raw = opened[place]
        if not own and not component.is_in(raw):
            if component.ours in given:
                raise LensError(f"{place}: no {component.title} in it; looked for {' or '.join(component.marks)}")
            continue
        parts[component.ours] = _part(component, place, raw, home)
        if component.ours == "text_encoder":
            embedded = text_layouts.tokenizer_json(raw)
    if not parts:
        marks = "; ".join(f"the {component.title} has {component.marks[0]}" for component in COMPONENTS)
        raise LensError(f"{path}: holds no network of Lens ({marks})")
    tokenizer = tokenizer_file(given[TOKENIZER]) if TOKENIZER in given else embedded
    if tokenizer is None and "text_encoder" in parts and not converted:
        tokenizer = _tokenizer_beside(parts["text_encoder"].path, home)
    return Source(path, parts, home, tokenizer, converted)


def variant_of(source: Source, variant: str | None = None, ask: bool = False) -> tuple[str, Variant]:
    """The variant asked for, else that of a converted folder, else the one the denoiser's file or folder speaks of.

    Where none of these says it, it is Lens itself, with a warning; with `ask`, for what is written down, a LensError.
    Returns its name, and its default steps and guidance.
    """
    part = source.parts.get("denoiser")
    if variant is None and source.converted and (part is None or part.converted):
        return release.read_metadata(source.path)
    inside = part is None or part.path.parent in (source.release, source.path)
    where = source.path if inside else part.path
    said = part and part.values.get("_name_or_path")
    name = release.variant_of(where, variant, said if isinstance(said, str) else None)
    if name is None and part is not None:
        unknown = f"{where}: its path does not say which of the three it is (Lens, Lens-Turbo, Lens-Base)"
        if ask:
            raise LensError(
                f"{unknown}; give --variant {'|'.join(release.VARIANTS)}, for the default steps and guidance"
            )
        warnings.warn(f"{unknown}: taken for Lens; give variant=...", LensWarning, stacklevel=2)
    name = name or "lens"
    return name, release.VARIANTS[name]


def check_exists(path: Path) -> None:
    """LensError for a path that is not there; it knows the name of a repository when it sees one."""
    if path.exists():
        return
    if path.parts[:1] == ("runs",):
        raise LensError(f"{path}: no such run; `lens-jax train CONFIG` makes one")
    if _REPOSITORY.fullmatch(str(path)) and not path.parent.exists():
        raise LensError(
            f"{path}: no such file or folder. If it is a repository, nothing is downloaded here: "
            f"`hf download {path} --local-dir {path.name}`, then give {path.name}"
        )
    raise LensError(f"{path}: no such file or folder")


def as_path(place: Any, what: str) -> Path:
    """A path out of what a caller gave; LensError for what cannot be one."""
    if isinstance(place, str | os.PathLike) and "\0" not in str(place):
        return Path(place)
    raise LensError(f"{what} is {place!r:.80}; accepted: a path")


def _tokenizer_beside(weights: Path, home: Path | None) -> Path | None:
    """The tokenizer.json beside a text encoder or in its folder, where a release folder has none."""
    if home and ((home / TOKENIZER).is_dir() or weights.parent == home):
        return None
    place = weights if weights.is_dir() else weights.parent
    folders = place / TOKENIZER, place, place.parent / TOKENIZER, place.parent
    return next((path for path in (at / "tokenizer.json" for at in folders) if path.is_file()), None)


def _snapshot(path: Path) -> Path:
    """The snapshot that the hub's cache of a repository (models--OWNER--NAME) means; any other path as it is."""
    if not (path / "snapshots").is_dir() or not (path / "refs").is_dir():
        return path
    held = sorted(place.name for place in (path / "snapshots").iterdir() if place.is_dir())
    main = path / "refs" / "main"
    name = main.read_text(encoding="utf-8", errors="replace").strip()[:80] if main.is_file() else ""
    if name not in held and len(held) != 1:
        raise LensError(
            f"{path}: the hub's cache of a repository with snapshots {', '.join(held) or '(none)'}; give one"
        )
    return path / "snapshots" / (name if name in held else held[0])


def holds_weights(path: Path) -> bool:
    """Whether `find` takes a path, and not a run or a data set."""
    if path.is_file() or release.is_native(path) or release.is_release(path) or _snapshot(path) != path:
        return True
    if not path.is_dir() or (path / "checkpoints").is_dir():  # a run, whatever else somebody has put into it
        return False
    return any(folder.is_weights(name) for name in path.iterdir())


def tokenizer_file(place: Path) -> Path:
    """The tokenizer.json that a file, a folder or a release folder stands for; LensError where there is none."""
    for path in (place, place / "tokenizer.json", place / TOKENIZER / "tokenizer.json"):
        if path.name == "tokenizer.json" and path.is_file():
            return path
    raise LensError(f"{place}: no tokenizer.json; give the folder `tokenizer` of a release, or the file")


def _part(component: Component, place: Path, raw: Tensors, home: Path | None) -> Part:
    module, where = component.module, str(place)
    values = _values(component, place, home)
    if component.ours == "text_encoder":
        raw = text_layouts.as_transformers(raw, where)
        values = module.with_experts(values, text_layouts.is_packed(raw))
    return Part(component, place, values, module.read(module.config_from_release(values, where), raw, where))


def _values(component: Component, place: Path, home: Path | None) -> dict:
    own = (place if place.is_dir() else place.parent) / "config.json"
    if own.is_file():
        values = folder.read_json(own)
        if component.ours == "text_encoder":
            values = component.module.from_openai(values)
        key, kind = component.kind
        # One beside a single file may be of something else.
        if place.is_dir() or values.get(key) == kind:
            return values
    if home and (home / component.theirs / "config.json").is_file():
        return folder.read_json(home / component.theirs / "config.json")
    return component.module.config_to_release(component.released)


def _open(place: Path) -> Tensors:
    if place.is_dir() and not any(folder.is_weights(name) for name in place.iterdir()):
        raise LensError(f"{place}: no release folder (no {release.INDEX}), and no weights")
    found = prefixes.unwrapped(folder.open_component(place))
    prefixes.refuse_lora(found, str(place))
    return found


def _check_index(home: Path) -> None:
    index = folder.read_json(home / release.INDEX)
    if index.get("_class_name") != "LensPipeline":
        raise LensError(
            f"{home / release.INDEX}: _class_name is {index.get('_class_name')!r:.80}; accepted: 'LensPipeline'"
        )


def _float_dtype(tensors: Tensors) -> str:
    """The widest float a component holds: float32 unless all are half precision."""
    names = {str(spec.dtype) for spec in tensors.specs.values()}
    halves = names & {"bfloat16", "float16"}
    wide = names - {"bfloat16", "float16", "int64", "uint8"}
    return "float32" if wide or len(halves) != 1 else halves.pop()
