"""One component of a release on disk: a safetensors or GGUF file, or a folder of one or of several with an index.

An index is an untrusted file: the names in it are believed only when they are plain names of files of its folder.
"""

import collections
import json
import os
import stat
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from lens_jax.convert import gguf
from lens_jax.convert.gguf import GgufFile
from lens_jax.convert.pages import let_go
from lens_jax.convert.safetensors import SafetensorsFile
from lens_jax.convert.table import Spec, Tensors, shown
from lens_jax.errors import LensError

INDEX_SUFFIX = ".safetensors.index.json"
MAX_JSON_BYTES = 100_000_000
MAX_SIZE = 1 << 24

_SUFFIXES = (".safetensors", gguf.SUFFIX)
# Tensors whose pages stay mapped.
_KEPT = 8
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
# Where ComfyUI's newer files say of each layer how it is quantised.
_QUANTIZATION = "_quantization_metadata"
LFS_POINTER = b"version https://git-lfs.github.com/spec/"


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
        for name in names:
            if name.endswith(_PICKLES):
                raise _pickle(path / name)
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


def files_of(path: Path) -> list[Path]:
    """The files that `open_component` reads of a folder, its index among them."""
    indices = [p for p in path.iterdir() if p.name.endswith(INDEX_SUFFIX) and not p.name.startswith(".")]
    if not indices:
        return [p for p in path.iterdir() if p.name.endswith(_SUFFIXES) and not p.name.startswith(".")]
    return [*indices, *(path / name for name in _read_index(indices[0]).values())]


def read_json(path: str | os.PathLike) -> dict:
    """A JSON object from a file; LensError when it is anything else."""
    path = Path(path)
    try:
        if not stat.S_ISREG(path.stat().st_mode) or path.stat().st_size > MAX_JSON_BYTES:
            raise LensError(f"{path}: not a file of JSON of at most {MAX_JSON_BYTES} bytes")
        content = path.read_bytes()
        if content.startswith(LFS_POINTER):
            raise pointer(path)
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


class _File(SafetensorsFile):
    """A safetensors file that can let go of the memory its pages take.

    What ComfyUI's newer files say of quantised layers in the header, X.comfy_quant says here too, as in the older ones.
    """

    def __init__(self, path: Path):
        super().__init__(path)
        self._said = _header_quantization(self.metadata, path)

    def specs(self) -> dict[str, Spec]:
        specs = {name: Spec(dtype, shape) for name, (dtype, shape, _) in self._entries.items()}
        for name, spec in specs.items():
            # Such a tensor has no bytes, so no offset limits its sizes, and numpy refuses a product over 2⁶³.
            if 0 in spec.shape and max(spec.shape) > MAX_SIZE:
                raise LensError(f"{self.path}: tensor {name!r} has shape {list(spec.shape)}: it is empty and too long")
        said = {name: Spec(raw.dtype, raw.shape) for name, raw in self._said.items() if name not in specs}
        return {**specs, **said}

    def __getitem__(self, name: str) -> np.ndarray:
        return super().__getitem__(name) if name in self._entries else self._said[name]

    def release(self, name: str) -> None:
        """Unmap the pages of a tensor; they are read again if it is used again."""
        if name in self._entries:
            dtype, shape, offset = self._entries[name]
            let_go(self._map, offset, Spec(dtype, shape).bytes)


def _header_quantization(metadata: Mapping[str, str], path: Path) -> dict[str, np.ndarray]:
    if _QUANTIZATION not in metadata:
        return {}
    try:
        layers = json.loads(metadata[_QUANTIZATION])["layers"]
        return {f"{name}.comfy_quant": _json_bytes(values) for name, values in layers.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise LensError(f"{path}: {_QUANTIZATION} of its header is not what ComfyUI writes") from None


def _json_bytes(values) -> np.ndarray:
    return np.frombuffer(json.dumps(values).encode(), np.uint8)


def _open(path: Path) -> _File | GgufFile:
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise LensError(f"{path}: not a file")  # opening a pipe would wait for ever
        with path.open("rb") as file:
            head = file.read(len(LFS_POINTER))
    except (OSError, ValueError) as error:
        raise LensError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from None
    if head == LFS_POINTER:
        raise pointer(path)
    if head.startswith((b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")):
        raise _pickle(path)
    if head.lstrip().lower().startswith((b"<!doctype", b"<html")):
        raise LensError(f"{path}: a web page, not weights (was it saved from a site that asks for a login?)")
    return GgufFile(path) if head.startswith(gguf.MAGIC) or path.suffix == gguf.SUFFIX else _File(path)


def open_file(path: Path) -> SafetensorsFile:
    """One safetensors file with what its header says besides, `metadata`; LensError for another kind of file."""
    file = _open(path)
    if not isinstance(file, SafetensorsFile):
        raise LensError(f"{path}: a GGUF file; accepted: safetensors")
    return file


def _pickle(path: Path) -> LensError:
    return LensError(
        f"{path}: a pickle of PyTorch, which can run code when it is read, and is not read here; take the safetensors "
        "files, or convert it: safetensors.torch.save_file(torch.load(FILE, weights_only=True), NEW)"
    )


def pointer(path: Path) -> LensError:
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
    """Whether a file of a folder is one that `open_component` reads, an index of such, or a pickle, which it names."""
    return path.name.endswith((INDEX_SUFFIX, *_SUFFIXES, *_PICKLES)) and not path.name.startswith(".")
