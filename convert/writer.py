"""Safetensors files, written a tensor at a time and never seen half-written.

The bytes are those the safetensors library itself writes: tensors ordered by dtype, widest first, then by name, so that
every offset is a multiple of its element size, and the header padded to a multiple of eight. Shards follow the rule of
diffusers and transformers, so a folder written here has the file names theirs would have.
"""

import collections
import contextlib
import itertools
import json
import os
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from lens_jax.convert.folder import INDEX_SUFFIX
from lens_jax.convert.safetensors import DTYPES
from lens_jax.convert.table import Spec, Tensors, specs_of
from lens_jax.errors import LensError

MAX_SHARD_BYTES = 10**10
STEM = "diffusion_pytorch_model"

_NAMES = {dtype: name for name, dtype in DTYPES.items()}
# Parts are transposed and cast by this many threads while one before them is written; a part more is kept ready.
_THREADS = 2
# The order of the library: descending width, ties as listed there.
_ORDER = (
    "U64", "I64", "F64", "F32", "U32", "I32", "BF16", "F16", "U16", "I16", "F8_E8M0", "F8_E4M3", "F8_E5M2",
    "I8", "U8", "BOOL",
)  # fmt: skip


def write_folder(
    folder: str | os.PathLike,
    tensors: Mapping[str, np.ndarray],
    *,
    stem: str = STEM,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    progress: Callable[[str, int], None] | None = None,
) -> list[str]:
    """Write the weights of a component: `<stem>.safetensors`, or shards `<stem>-0000i-of-0000n.safetensors` + index.

    Everything is written aside first; the files appear when all are complete, the index last.

    Args:
      folder: made if it is not there; LensError when it already holds weights of that stem.
      tensors: in the order they are assigned to shards, that of the PyTorch model's state dict.
      progress: called with (name, bytes) after each tensor.

    Returns the names of the files written.
    """
    folder = Path(folder)
    specs = specs_of(tensors)
    shards = plan_shards(specs, max_shard_bytes)
    names = [f"{stem}.safetensors"]
    if len(shards) > 1:
        names = [f"{stem}-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
    with as_lens_error(folder):
        folder.mkdir(parents=True, exist_ok=True)
        # A stale shard or index beside the new files would be read in their place.
        there = sorted(p.name for p in folder.iterdir() if p.name.startswith(stem) and ".safetensors" in p.name)
        if there:
            raise LensError(f"{folder}: already holds {', '.join(there[:4])}; choose another folder")
        with contextlib.ExitStack() as stack:
            aside = [stack.enter_context(_aside(folder / name)) for name in names]
            for place, shard in zip(aside, shards):
                _write(place, {name: specs[name] for name in shard}, tensors, progress)
            if len(shards) > 1:
                weight_map = {tensor: name for name, shard in zip(names, shards) for tensor in shard}
                total = sum(spec.bytes for spec in specs.values())
                index = {"metadata": {"total_size": total}, "weight_map": weight_map}
                names.append(stem + INDEX_SUFFIX)
                place = stack.enter_context(_aside(folder / names[-1]))
                place.write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")
                aside.append(place)
            for place, name in zip(aside, names):
                os.replace(place, folder / name)
    return names


def write_file(
    path: str | os.PathLike,
    tensors: Mapping[str, np.ndarray],
    progress: Callable[[str, int], None] | None = None,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write one file, replacing one that is there; it appears when it is complete. `metadata` goes into its header."""
    path = Path(path)
    with as_lens_error(path), _aside(path) as place:
        _write(place, specs_of(tensors), tensors, progress, metadata)
        os.replace(place, path)


def plan_shards(specs: Mapping[str, Spec], max_shard_bytes: int = MAX_SHARD_BYTES) -> list[list[str]]:
    """Names of the tensors of each shard, by the rule of huggingface_hub: fill in order, never over the limit.

    A tensor over the limit is a shard of its own, and goes before the shard that was being filled.
    """
    shards, current, size = [], [], 0
    for name, spec in specs.items():
        if spec.bytes > max_shard_bytes:
            shards.append([name])
            continue
        if size + spec.bytes > max_shard_bytes:
            shards.append(current)
            current, size = [], 0
        current.append(name)
        size += spec.bytes
    if current or not shards:
        shards.append(current)
    return shards


def header(specs: Mapping[str, Spec], metadata: Mapping[str, str]) -> tuple[bytes, list[str]]:
    """The start of a file with these tensors, and their order in it."""
    unknown = [f"{name} is {spec.dtype}" for name, spec in specs.items() if spec.dtype not in _NAMES]
    if unknown:
        raise LensError(f"safetensors cannot hold {unknown[0]}; accepted: {', '.join(DTYPES)}")
    order = sorted(specs, key=lambda name: (_ORDER.index(_NAMES[specs[name].dtype]), name.encode()))
    entries, offset = {"__metadata__": dict(sorted(metadata.items()))}, 0
    for name in order:
        spec = specs[name]
        entries[name] = {
            "dtype": _NAMES[spec.dtype],
            "shape": list(spec.shape),
            "data_offsets": [offset, offset + spec.bytes],
        }
        offset += spec.bytes
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, order


def _write(place: Path, specs, tensors, progress, metadata=None) -> None:
    # "pt" is what transformers and diffusers insist on before they load a file.
    start, order = header(specs, {"format": "pt", **(metadata or {})})
    with place.open("wb") as file, ThreadPoolExecutor(_THREADS) as pool:
        # A full disk is known before the work is done, and writing is up to five times faster (57 MB on ext4: 10 ms
        # and not 14 to 50).
        os.posix_fallocate(file.fileno(), 0, len(start) + sum(spec.bytes for spec in specs.values()))
        file.write(start)
        makers = ((name, make) for name in order for make in _parts(tensors, name))
        ahead = collections.deque()
        written = dict.fromkeys(order, 0)
        while True:
            for name, make in itertools.islice(makers, _THREADS + 1 - len(ahead)):
                ahead.append((name, pool.submit(_bytes, name, make, specs[name])))
            if not ahead:
                break
            name, part = ahead.popleft()
            data = part.result()
            file.write(data)
            written[name] += data.nbytes
            if progress:
                progress(name, data.nbytes)
        wrong = [name for name, count in written.items() if count != specs[name].bytes]
        if wrong:
            raise ValueError(f"{wrong[0]} has {written[wrong[0]]} bytes, announced as {specs[wrong[0]]}")
        file.flush()
        os.fsync(file.fileno())  # before the rename: a crash must not leave a whole name with half a file


def _parts(tensors: Mapping[str, np.ndarray], name: str) -> list[Callable[[], np.ndarray]]:
    return tensors.parts(name) if isinstance(tensors, Tensors) else [lambda: tensors[name]]


def _bytes(name: str, make: Callable[[], np.ndarray], spec: Spec) -> np.ndarray:
    """A part as bytes: bfloat16 and fp8 have no buffer protocol of their own."""
    array = np.asarray(make())
    whole = array.shape == spec.shape
    if array.dtype != spec.dtype or not (whole or array.shape == spec.shape[1:]):
        raise ValueError(f"{name} gave {array.dtype} {array.shape}, announced as {spec}")
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)


@contextlib.contextmanager
def _aside(path: Path):
    """A name beside `path`, gone at the end unless it was renamed."""
    place = path.with_name(f".{path.name}.partial-{os.getpid()}")
    try:
        yield place
    finally:
        place.unlink(missing_ok=True)


@contextlib.contextmanager
def as_lens_error(path: Path):
    """A failed write, a full disk most often, as one line."""
    try:
        yield
    except OSError as error:
        raise LensError(f"{path}: cannot be written: {error.strerror or error}") from error
