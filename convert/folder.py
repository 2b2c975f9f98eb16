"""One component of a release on disk: a safetensors or GGUF file, or a folder of one or of several with an index.

An index is an untrusted file: the names in it are believed only when they are plain names of files of its folder.
"""

import collections
import json
import os
import stat
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np

from lens_jax.convert import gguf
from lens_jax.convert.gguf import GgufFile
from lens_jax.convert.pages import let_go
from lens_jax.convert.safetensors import SafetensorsFile
from lens_jax.convert.table import Spec, Tensors, shown, specs_of
from lens_jax.errors import LensError

INDEX_SUFFIX = ".safetensors.index.json"
MAX_JSON_BYTES = 100_000_000
MAX_SIZE = 1 << 24

# What other programs put in front of the names of a component (release 6.1).
PREFIXES = (
    "model.diffusion_model.",
    "diffusion_model.",
    "transformer.",
    "model.",
    "module.",
    "net.",
    "first_stage_model.",
    "vae.",
)
# How the other components of a bundle begin; text encoders are never stripped here.
BUNDLED = (*PREFIXES, "text_encoders.", "text_encoder.", "cond_stage_model.", "conditioner.")

_SUFFIXES = (".safetensors", gguf.SUFFIX)
# Tensors whose pages stay mapped.
_KEPT = 8
_LFS_POINTER = b"version https://git-lfs.github.com/spec/"


def open_component(path: str | os.PathLike) -> Tensors:
    """The tensors of a component by name; values are read-only views of the files.

    Args:
      path: a safetensors or GGUF file, or a folder with one, or with `*.safetensors.index.json` and its shards.

    Raises LensError when there is nothing to read, when the index and the files disagree, or when a file is damaged.
    MXFP4 tensors of a GGUF file are two each: see `gguf.GgufFile`.
    """
    path = Path(path)
    if not path.is_dir():
        return _join({path.name: _open(path)}, None, path)
    try:
        names = sorted(p.name for p in path.iterdir() if not p.name.startswith("."))
    except OSError as error:
        raise LensError(f"{path}: cannot be read: {error.strerror}") from None
    indices = [name for name in names if name.endswith(INDEX_SUFFIX)]
    files = [name for name in names if name.endswith(_SUFFIXES)]
    if len(indices) > 1 or (not indices and len(files) > 1):
        found = ", ".join(indices or files)
        raise LensError(f"{path}: {found}: a component has one index, or one file; name the file that is meant")
    if not indices and not files:
        raise LensError(f"{path}: no *.safetensors and no *{INDEX_SUFFIX} in it, nor a *{gguf.SUFFIX}")
    if not indices:
        return _join({files[0]: _open(inside(path, files[0], path, _SUFFIXES))}, None, path)

    index = path / indices[0]
    weight_map = _read_index(inside(path, indices[0], path, INDEX_SUFFIX))
    shards = sorted(set(weight_map.values()))
    located = {name: inside(path, name, index) for name in shards}
    missing = [name for name, place in located.items() if not place.exists()]
    if missing:
        raise LensError(f"{index}: {len(missing)} of its {len(shards)} files are missing: {_some(missing)}")
    return _join({name: _open(place) for name, place in located.items()}, weight_map, index)


def read_json(path: str | os.PathLike) -> dict:
    """A JSON object from a file; LensError when it is anything else."""
    path = Path(path)
    try:
        if not stat.S_ISREG(path.stat().st_mode) or path.stat().st_size > MAX_JSON_BYTES:
            raise LensError(f"{path}: not a file of JSON of at most {MAX_JSON_BYTES} bytes")
        content = path.read_bytes()
        if content.startswith(_LFS_POINTER):
            raise _pointer(path)
        values = json.loads(content)
    except (OSError, ValueError, RecursionError) as error:
        raise LensError(f"{path}: cannot be read as JSON: {str(error)[:200]}") from None
    if not isinstance(values, dict):
        raise LensError(f"{path}: must hold a JSON object")
    return values


def read_size(values: Mapping, key: str, where: str, limit: int = MAX_SIZE) -> int:
    """A positive integer of a config; a limit, since a table or a model of 10⁹ layers would not fail but hang."""
    if key not in values:
        raise LensError(f"{where}: the key {key!r} is missing")
    return check_size(values[key], key, where, limit)


def check_size(value, key: str, where: str, limit: int = MAX_SIZE) -> int:
    """`read_size` for a value at hand."""
    if type(value) is not int or not 1 <= value <= limit:
        raise LensError(f"{where}: {key} is {value!r:.80}; accepted: a whole number from 1 to {limit}")
    return value


def strip_prefixes(tensors: Mapping[str, np.ndarray], wanted: Iterable[str]) -> Tensors:
    """The tensors of one component without the prefix that another program has put before their names.

    The prefix (or two, one inside the other) is the one under which most of `wanted` is found; none when none helps.
    Tensors of other components beside it, as in a checkpoint bundle, are left out; anything else stays, to be reported.
    """
    specs, wanted = specs_of(tensors), list(wanted)
    candidates = ["", *PREFIXES, *(a + b for a in PREFIXES for b in PREFIXES)]
    heads = [p for p in candidates if not p or any(name.startswith(p) for name in specs)]
    prefix = max(heads, key=lambda p: sum(p + name in specs for name in wanted))
    if not prefix or not any(prefix + name in specs for name in wanted):
        return Tensors(specs, tensors.__getitem__)
    origin = {}
    for name in specs:
        if name.startswith(prefix):
            origin[name[len(prefix) :]] = name
        elif not name.startswith(BUNDLED):
            origin.setdefault(name, name)
    return Tensors({name: specs[old] for name, old in origin.items()}, lambda name: tensors[origin[name]])


class _File(SafetensorsFile):
    """A safetensors file that can let go of the memory its pages take."""

    def specs(self) -> dict[str, Spec]:
        specs = {name: Spec(dtype, shape) for name, (dtype, shape, _) in self._entries.items()}
        for name, spec in specs.items():
            # Such a tensor has no bytes, so no offset limits its sizes, and numpy refuses a product over 2⁶³.
            if 0 in spec.shape and max(spec.shape) > MAX_SIZE:
                raise LensError(f"{self.path}: tensor {name!r} has shape {list(spec.shape)}: it is empty and too long")
        return specs

    def release(self, name: str) -> None:
        """Unmap the pages of a tensor; they are read again if it is used again."""
        dtype, shape, offset = self._entries[name]
        let_go(self._map, offset, Spec(dtype, shape).bytes)


def _open(path: Path) -> _File | GgufFile:
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise LensError(f"{path}: not a file")  # opening a pipe would wait for ever
        with path.open("rb") as file:
            head = file.read(len(_LFS_POINTER))
    except (OSError, ValueError) as error:
        raise LensError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from None
    if head == _LFS_POINTER:
        raise _pointer(path)
    return GgufFile(path) if head.startswith(gguf.MAGIC) or path.suffix == gguf.SUFFIX else _File(path)


def _pointer(path: Path) -> LensError:
    return LensError(f"{path}: a Git LFS pointer, not the file itself; fetch it with `git lfs pull`")


def _read_index(path: Path) -> dict[str, str]:
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(v, str) for v in weight_map.values()):
        raise LensError(f"{path}: weight_map must map names of tensors to names of files")
    return weight_map


def inside(folder: Path, name: str, where: Path, suffix: str | tuple[str, ...] = ".safetensors") -> Path:
    """`folder / name`, which must be a plain name and, links followed, lie in the folder."""
    bad = any(c in name for c in "/\\:\0") or name in ("", ".", "..") or len(name) > 255 or not name.isprintable()
    if bad or not name.endswith(suffix):
        raise LensError(f"{where}: {name[:200]!r} is no name of a safetensors file in its folder")
    try:
        real, home = Path(os.path.realpath(folder / name)), Path(os.path.realpath(folder))
    except (OSError, ValueError) as error:
        raise LensError(f"{where}: {name!r} cannot be followed: {error}") from None
    homes = [home]
    parents = home.parents
    # The hub's cache keeps .../snapshots/<revision>/transformer/x as a link to .../blobs/<hash>.
    homes += [p.parent / "blobs" for p in parents if p.name == "snapshots"]
    if not any(real.is_relative_to(h) for h in homes):
        raise LensError(f"{where}: {name!r} is a link to {real}, outside its folder")
    return folder / name


def _join(files: dict[str, _File | GgufFile], weight_map: dict[str, str] | None, where: Path) -> Tensors:
    """One mapping over all shards; every tensor in one shard, the one that the index names."""
    specs, owner, problems = {}, {}, []
    for name, file in files.items():
        for tensor, spec in file.specs().items():
            if tensor in owner:
                problems.append(f"{shown(tensor)} is in {owner[tensor]} and in {name}")
            elif weight_map is not None and weight_map.get(tensor) != name:
                said = weight_map.get(tensor, "nothing of it")
                problems.append(f"{shown(tensor)} is in {name}, the index says {said}")
            specs[tensor], owner[tensor] = spec, name
    problems += [f"{shown(t)} is not in {shard}" for t, shard in (weight_map or {}).items() if t not in owner]
    if problems:
        raise LensError(f"{where}: its files do not agree with it: {_some(problems)}")
    if weight_map is not None:
        specs = {tensor: specs[tensor] for tensor in weight_map}

    recent: collections.deque[tuple[_File | GgufFile, str]] = collections.deque()

    def read(tensor: str) -> np.ndarray:
        # Some are in use by the threads of the writer. A view of one that was let go stays right, and reads the disk.
        recent.append((files[owner[tensor]], tensor))
        if len(recent) > _KEPT:
            file, name = recent.popleft()
            file.release(name)
        return files[owner[tensor]][tensor]

    return Tensors(specs, read)


def _some(items: list[str]) -> str:
    return "; ".join(items[:8]) + (f"; and {len(items) - 8} more" if len(items) > 8 else "")


def is_weights(path: Path) -> bool:
    """Whether a file of a folder is one that `open_component` reads, or an index of such."""
    return path.name.endswith((INDEX_SUFFIX, *_SUFFIXES)) and not path.name.startswith(".")
