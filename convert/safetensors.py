"""Safetensors files, read through a memory map and checked before anything is allocated.

Our own because the library reads neither fp8 nor bfloat16 into numpy without help, and because a checkpoint is an
untrusted file: a size in the header is believed only after it has been compared with the file.
"""

import itertools
import json
import mmap
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

import ml_dtypes
import numpy as np

from lens_jax.errors import LensError

DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E8M0": np.dtype(ml_dtypes.float8_e8m0fnu),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U64": np.dtype(np.uint64),
    "U32": np.dtype(np.uint32),
    "U16": np.dtype(np.uint16),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}

# The format's own limit on the JSON header.
MAX_HEADER_BYTES = 100_000_000
MAX_RANK = 16


class SafetensorsFile(Mapping[str, np.ndarray]):
    """The tensors of one file by name. Values are read-only views of the map: nothing is copied until it is used."""

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)
        try:
            with self.path.open("rb") as file:
                size = os.fstat(file.fileno()).st_size
                if size < 8:
                    raise LensError(f"{self.path}: {size} bytes is no safetensors file (is it a truncated download?)")
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except OSError as error:
            raise LensError(f"{self.path}: cannot be read: {error.strerror}") from None
        self.metadata, self._entries = self._read_header(size)

    def _read_header(self, size: int) -> tuple[dict[str, str], dict[str, tuple[np.dtype, tuple[int, ...], int]]]:
        length = int.from_bytes(self._map[:8], "little")
        if length > min(size - 8, MAX_HEADER_BYTES):
            raise LensError(
                f"{self.path}: its header claims {length} bytes of a file of {size}: truncated, or not safetensors"
            )
        try:
            header = json.loads(self._map[8 : 8 + length].decode("utf-8"))
        except (UnicodeDecodeError, ValueError, RecursionError):
            raise LensError(f"{self.path}: its header is not valid JSON") from None
        if not isinstance(header, dict):
            raise LensError(f"{self.path}: its header is not a JSON object")
        metadata = header.pop("__metadata__", {})
        if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
            raise LensError(f"{self.path}: __metadata__ must map strings to strings")

        data = 8 + length
        entries, spans = {}, []
        for name, entry in header.items():
            dtype, shape, begin, end = self._check_entry(name, entry, size - data)
            entries[name] = (dtype, shape, data + begin)
            spans.append((begin, end, name))
        spans.sort()
        for (_, end, name), (begin, _, following) in itertools.pairwise(spans):
            if begin < end:
                raise LensError(f"{self.path}: tensors {name!r} and {following!r} overlap")
        return metadata, entries

    def _check_entry(self, name: str, entry, available: int):
        where = f"{self.path}: tensor {name!r}"
        if not isinstance(entry, dict) or not {"dtype", "shape", "data_offsets"} <= entry.keys():
            raise LensError(f"{where} needs dtype, shape and data_offsets")
        dtype = DTYPES.get(entry["dtype"]) if isinstance(entry["dtype"], str) else None
        if dtype is None:
            raise LensError(f"{where} has dtype {entry['dtype']!r}; accepted: {', '.join(DTYPES)}")
        shape, offsets = entry["shape"], entry["data_offsets"]
        if not _are_sizes(shape) or len(shape) > MAX_RANK:
            raise LensError(f"{where} has shape {str(shape)[:80]}; a list of sizes is needed")
        if not _are_sizes(offsets) or len(offsets) != 2 or not offsets[0] <= offsets[1] <= available:
            raise LensError(f"{where} has offsets {str(offsets)[:80]} outside the {available} bytes of data")
        count = 1  # Python integers: a product of hostile sizes does not wrap around
        for dim in shape:
            count *= dim
        if count * dtype.itemsize != offsets[1] - offsets[0]:
            raise LensError(
                f"{where}: {entry['dtype']} {list(shape)} needs {count * dtype.itemsize} bytes, its offsets hold "
                f"{offsets[1] - offsets[0]}"
            )
        return dtype, tuple(shape), *offsets

    def __getitem__(self, name: str) -> np.ndarray:
        dtype, shape, offset = self._entries[name]
        count = int(np.prod(shape, dtype=np.int64))
        return np.frombuffer(self._map, dtype, count, offset).reshape(shape)

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor without touching its data."""
        return self._entries[name][1]


def _are_sizes(values) -> bool:
    # 2**48 is more than any file; a larger size beside a zero would pass the byte count and overflow in numpy.
    return isinstance(values, list) and all(type(v) is int and 0 <= v < 2**48 for v in values)
