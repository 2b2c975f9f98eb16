"""GGUF files, read through a memory map and checked before anything is allocated (release 6.3).

What the types mean and how they are dequantised is left to the package `gguf`. Its reader is not used: for the 850,000
tokens and merges in the header of GPT-OSS it makes as many arrays (two minutes, 1 GB), and a header that claims 2⁶⁰
numbers keeps it busy for ever. Here the header is walked once, and every count compared with the bytes that are left.
"""

import functools
import itertools
import mmap
import os
from pathlib import Path

import ml_dtypes
import numpy as np

from lens_jax.convert.pages import let_go
from lens_jax.convert.table import Spec, shown
from lens_jax.errors import LensError

SUFFIX = ".gguf"
# Parts of a tensor that stays packed in MXFP4, behind its name.
BLOCKS, SCALES = ".blocks", ".scales"

MAGIC = b"GGUF"
_VERSIONS = (2, 3)
# Of ggml itself: the rank, and the number of the array type; of a tensor's or a key's name, much more than any has.
_MAX_RANK, _ARRAY, _MAX_NAME = 4, 9, 1024
_STRING, _MAX_STRINGS = 8, 1 << 24
# Bytes of the scalar types of metadata by their number.
_SCALARS = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
_ALIGNMENT, _SPLIT = "general.alignment", "split.count"
_MAX_ALIGNMENT = 1 << 20

# Types that are numbers as they lie there; all others are dequantised.
_PLAIN = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F64": np.dtype(np.float64),
    "I8": np.dtype(np.int8),
    "I16": np.dtype(np.int16),
    "I32": np.dtype(np.int32),
    "I64": np.dtype(np.int64),
}


class GgufFile:
    """The tensors of one file by name, each with its axes in the order of numpy and PyTorch.

    F32, F16 and BF16 are read-only views of the map. MXFP4 stays packed, in the layout of the release: a tensor X
    [..., in] is X.blocks uint8 [..., in / 32, 16] and X.scales uint8 [..., in / 32]. All other types are dequantised to
    float32 when they are read.
    """

    def __init__(self, path: str | os.PathLike):
        """LensError for a file that is damaged, of another version or byte order, or one part of several."""
        self.path = Path(path)
        self._library = _library(self.path)
        try:
            with self.path.open("rb") as file:
                if os.fstat(file.fileno()).st_size < 24:
                    raise LensError(f"{self.path}: too short for a GGUF file (is it a truncated download?)")
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except OSError as error:
            raise LensError(f"{self.path}: cannot be read: {error.strerror}") from None
        self._entries = self._read_header()

    def specs(self) -> dict[str, Spec]:
        """What is known of every tensor without reading it."""
        result = {}
        for name, (kind, shape, _, _) in self._entries.items():
            if kind == "MXFP4":
                groups = (*shape[:-1], shape[-1] // 32)
                result[name + BLOCKS] = Spec(np.dtype(np.uint8), (*groups, 16))
                result[name + SCALES] = Spec(np.dtype(np.uint8), groups)
            else:
                result[name] = Spec(_PLAIN.get(kind, _PLAIN["F32"]), shape)
        return result

    def __getitem__(self, name: str) -> np.ndarray:
        kind, shape, offset, count = self._entries[self._entry(name)]
        raw = np.frombuffer(self._map, np.uint8, count, offset)
        if kind in _PLAIN:
            return raw.view(_PLAIN[kind]).reshape(shape)
        if kind == "MXFP4":
            packed = raw.reshape(*shape[:-1], shape[-1] // 32, 17)
            return packed[..., 0] if name.endswith(SCALES) else repack(packed[..., 1:])
        with np.errstate(all="ignore"):  # a damaged scale may be infinite
            return self._dequantize(raw.reshape(*shape[:-1], -1), kind)

    def release(self, name: str) -> None:
        """Unmap the pages of a tensor; they are read again if it is used again."""
        _, _, offset, count = self._entries[self._entry(name)]
        let_go(self._map, offset, count)

    def _entry(self, name: str) -> str:
        return name if name in self._entries else name.removesuffix(BLOCKS).removesuffix(SCALES)

    def _dequantize(self, blocks: np.ndarray, kind: str) -> np.ndarray:
        return self._library.quants.dequantize(blocks, self._library.GGMLQuantizationType[kind])

    def _read_header(self) -> dict[str, tuple[str, tuple[int, ...], int, int]]:
        """(type, shape, offset in the file, bytes) of each tensor."""
        cursor = _Cursor(self._map, self.path)
        if cursor.bytes(4) != MAGIC:
            raise LensError(f"{self.path}: no GGUF file")
        version, tensors, keys = cursor.number(4), cursor.number(8), cursor.number(8)
        if version not in _VERSIONS:
            raise LensError(f"{self.path}: GGUF version {version}; accepted: 2 or 3, lowest byte first")
        metadata = cursor.metadata(keys)
        if metadata.get(_SPLIT, 1) > 1:
            raise LensError(f"{self.path}: one of {metadata[_SPLIT]} parts; join them with llama-gguf-split --merge")
        alignment = metadata.get(_ALIGNMENT, 32)
        if not 0 < alignment <= _MAX_ALIGNMENT or alignment & (alignment - 1):
            raise LensError(f"{self.path}: {_ALIGNMENT} is {alignment}; accepted: a power of two")
        infos = [cursor.tensor() for _ in range(cursor.checked(tensors, 32, "tensors"))]
        start = cursor.at + -cursor.at % alignment
        entries = {}
        for name, sizes, kind, offset in infos:
            if name in entries or name.endswith((BLOCKS, SCALES)):
                raise LensError(f"{self.path}: tensor {shown(name)} is there twice, or ends in {BLOCKS} or {SCALES}")
            entries[name] = self._check_tensor(name, sizes, kind, start + offset)
        spans = sorted((offset, offset + count, name) for name, (_, _, offset, count) in entries.items())
        for (_, end, name), (begin, _, following) in itertools.pairwise(spans):
            if begin < end:
                raise LensError(f"{self.path}: tensors {shown(name)} and {shown(following)} overlap")
        return entries

    def _check_tensor(self, name: str, sizes: tuple[int, ...], number: int, offset: int):
        where = f"{self.path}: tensor {shown(name)}"
        kind, group, group_bytes = _types(self._library).get(number, (None, 0, 0))
        if kind is None:
            accepted = ", ".join(kind for kind, _, _ in _types(self._library).values())
            raise LensError(f"{where} is of type {number}; accepted: {accepted}")
        count = 1  # Python integers: a product of hostile sizes does not wrap around
        for size in sizes:
            count *= size
        # ggml counts axes from the fastest, along which it quantises.
        if count == 0 or (sizes or (1,))[0] % group:
            raise LensError(f"{where} has sizes {list(sizes)}; {kind} needs a multiple of {group}, and none that is 0")
        count = count // group * group_bytes
        if offset + count > len(self._map):
            raise LensError(
                f"{where} ends at byte {offset + count} of a file of {len(self._map)} (is it a truncated download?)"
            )
        return kind, sizes[::-1], offset, count


def repack(blocks: np.ndarray) -> np.ndarray:
    """MXFP4 blocks [..., 16] in the order of ggml -> in that of the release.

    ggml keeps inputs 0 to 15 in the low nibbles and 16 to 31 in the high ones; the release keeps inputs 2k and 2k + 1
    in the low and high nibble of byte k.
    """
    codes = np.concatenate([blocks & 15, blocks >> 4], -1)
    return codes[..., 0::2] | codes[..., 1::2] << 4


class _Cursor:
    """Reads a header from its start, never past the end of the file."""

    def __init__(self, data: mmap.mmap, path: Path):
        self._data, self._path, self.at = data, path, 0

    def bytes(self, count: int) -> bytes:
        start = self.at
        self.skip(count)
        return self._data[start : self.at]

    def skip(self, count: int) -> None:
        if count > len(self._data) - self.at:
            raise LensError(f"{self._path}: ends within its header (is it a truncated download?)")
        self.at += count

    def number(self, size: int) -> int:
        return int.from_bytes(self.bytes(size), "little")

    def checked(self, count: int, smallest: int, what: str) -> int:
        """A count of things of at least `smallest` bytes each; LensError when the file cannot hold them."""
        if count > (len(self._data) - self.at) // smallest:
            raise LensError(f"{self._path}: claims {count} {what}, more than its {len(self._data)} bytes can hold")
        return count

    def name(self) -> str:
        length = self.number(8)
        if length > _MAX_NAME:
            raise LensError(f"{self._path}: a name of {length} bytes; accepted: up to {_MAX_NAME}")
        try:
            return self.bytes(length).decode("utf-8")
        except UnicodeDecodeError:
            raise LensError(f"{self._path}: a name that is not UTF-8") from None

    def metadata(self, count: int) -> dict[str, int]:
        """The whole numbers among the metadata; what else there is, is passed over."""
        result = {}
        for _ in range(self.checked(count, 13, "keys")):
            key, kind = self.name(), self.number(4)
            if kind == _ARRAY:
                self._skip_array(key)
            elif kind == _STRING:
                self.skip(self.number(8))
            elif kind not in _SCALARS:
                raise LensError(f"{self._path}: {shown(key)} is of unknown type {kind}")
            else:
                result[key] = self.number(_SCALARS[kind])
        return result

    def _skip_array(self, key: str) -> None:
        kind, count = self.number(4), self.number(8)
        if kind in _SCALARS:
            self.skip(count * _SCALARS[kind])
        elif kind == _STRING and count <= _MAX_STRINGS:
            for _ in range(self.checked(count, 8, "strings")):
                self.skip(self.number(8))
        else:
            raise LensError(f"{self._path}: {shown(key)} is a list of {count} of type {kind}, which is not accepted")

    def tensor(self) -> tuple[str, tuple[int, ...], int, int]:
        """(name, sizes from the fastest axis, number of the type, offset)."""
        name, rank = self.name(), self.number(4)
        if rank > _MAX_RANK:
            raise LensError(f"{self._path}: tensor {shown(name)} has {rank} axes; accepted: up to {_MAX_RANK}")
        return name, tuple(self.number(8) for _ in range(rank)), self.number(4), self.number(8)


def _library(path: Path):
    """The package `gguf`; LensError that says how to get it."""
    try:
        import gguf
    except ImportError:
        raise LensError(f"{path}: reading GGUF needs one more package: pip install 'lens-jax[gguf]'") from None
    return gguf


@functools.cache
def _types(library) -> dict[int, tuple[str, int, int]]:
    """(name, elements of a block, bytes of a block) of every type that can be read, by its number."""
    result = {}
    for kind in library.GGMLQuantizationType:
        group, count = library.GGML_QUANT_SIZES[kind]
        try:
            if kind.name not in _PLAIN:
                with np.errstate(all="ignore"):
                    library.quants.dequantize(np.zeros((1, count), np.uint8), kind)
        except NotImplementedError:  # raised by the package, for types that it lists but cannot dequantise
            continue
        result[int(kind)] = (kind.name, group, count)
    return result
