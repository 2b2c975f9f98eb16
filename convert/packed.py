"""The file format of a packed pipeline: safetensors, with its configs in the metadata.

    denoiser/blocks/image/qkv/kernel   the moving average of the parameters, in the dtype it was packed in
    codec/basis                        what the codec was fitted to, float32

A variant of a packed pipeline may be its adapter alone, beside that file in the same folder:

    lora/blocks/image/qkv/a            its scale is in b

The small models that come with the package are such files, with a digest each.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

import lens_jax
from lens_jax.convert.safetensors import SafetensorsFile
from lens_jax.errors import LensError
from lens_jax.models import lora

KEY = "lens_jax"
FORMAT = 1
# Of an adapter alone; what does not know of it must not read it as a whole model.
FORMAT_BESIDE = 2
# The folder of the shipped models, a file VARIANT.safetensors each, with their digests.
SHIPPED = Path(lens_jax.__file__).parent / "small"
DIGESTS = "digests.json"
# What is taken for them wherever a path to a model is given, and nothing has that name: the variant that a name alone
# means. NAME/VARIANT means another one.
NAMES = {"small": "base"}


def find(path: str | os.PathLike, variant: str | None = None) -> Path | None:
    """The packed file that a path, or the name of a shipped model, means; None where it means something else.

    `variant` is of a shipped model: another one of its files, "turbo".
    """
    if "://" in str(path):
        return None
    if is_shipped(path):
        return shipped(str(path), variant)
    return Path(path) if is_packed(Path(path)) else None


def is_shipped(path: str | os.PathLike) -> bool:
    """Whether a path is the name of a model that comes with the package, and of nothing that is there."""
    return str(path).partition("/")[0] in NAMES and not Path(path).exists()


def is_packed(path: Path) -> bool:
    """Whether a file is a packed pipeline; by its header alone."""
    try:
        return path.is_file() and path.suffix == ".safetensors" and KEY in SafetensorsFile(path).metadata
    except LensError:  # whoever reads it as what it is says what is wrong with it
        return False


def shipped(name: str, variant: str | None = None) -> Path:
    """The file of a model that comes with the package; LensError where it is not the one that was shipped.

    name: "small" or, with a variant in it, "small/turbo". `variant` None is the one that the name means. LensError says
    which variants come with it.
    """
    name, slash, named = name.partition("/")
    if variant is None:
        variant = named if slash else NAMES[name]
    elif slash and variant != named:
        raise LensError(f"{name}/{named}: its variant is {named!r:.40}, and {variant!r:.40} is asked for; give one")
    file = f"{variant}.safetensors"
    path = SHIPPED / file
    try:
        known = json.loads((SHIPPED / DIGESTS).read_text(encoding="utf-8"))
        # By all of it: a variant may be given as a path to somewhere else.
        if file not in known:
            variants = ", ".join(sorted(str(one).removesuffix(".safetensors") for one in known))
            raise LensError(f"{name}: comes without a variant {variant!r:.40}; accepted: {variants}")
        digest = file_digest(path)
    except (OSError, ValueError) as error:
        problem = getattr(error, "strerror", None) or "its digests are damaged"
        raise LensError(f"{path}: the model that comes with the package: {problem}; install it again") from None
    if digest != known[file]:
        raise LensError(f"{path}: is damaged, its SHA-256 is {digest}; install the package again")
    return path


class PackedFile:
    """A packed pipeline that is read. LensError for a file of another format.

    An adapter alone is read as the whole: what it stands beside, with it merged into the kernels.
    """

    def __init__(self, path: Path):
        self.path = path
        self._file = SafetensorsFile(path)
        # The configs of its parts as plain values: "model", "codec", "text", and its "defaults".
        self.described = self._read_described()
        # What an adapter alone stands beside.
        self.beside: PackedFile | None = None
        if self.described["format"] == FORMAT_BESIDE:
            self.beside = self._find_beside()
            self.described = {**self.beside.described, **self.described}
            self._check_adapter()

    def shapes(self, name: str) -> dict[str, tuple[int, ...]]:
        """The arrays of a part ("denoiser", "codec") by their paths in it."""
        return self.beside.shapes(name) if self.beside else self._shapes(name)

    def take(self, name: str, wanted: Mapping[str, Any]) -> dict[str, jax.Array]:
        """Arrays of a part by path, all of them there: in the dtypes and layouts of `wanted`."""
        return {path: _place(self._value(name, path), like) for path, like in wanted.items()}

    def tree(self, name: str, wanted: dict) -> dict:
        """The part as the tree that is wanted, with its layouts; LensError lists what does not fit."""
        likes, shapes = flatten_dict(wanted, sep="/"), self.shapes(name)
        faults = [f"{name}/{path} is missing" for path in likes if path not in shapes]
        faults += [f"{name}/{path} is not of this model" for path in sorted(shapes.keys() - likes.keys())]
        faults += [
            f"{name}/{path} is {list(shapes[path])} and should be {list(like.shape)}"
            for path, like in likes.items()
            if path in shapes and shapes[path] != like.shape
        ]
        if faults:
            more = f" and {len(faults) - 3} more" if len(faults) > 3 else ""
            raise LensError(f"{self.path}: {'; '.join(faults[:3])}{more}")
        return unflatten_dict(self.take(name, likes), sep="/")

    def _read_described(self) -> dict[str, Any]:
        try:
            described = json.loads(self._file.metadata.get(KEY, ""))
        except (ValueError, RecursionError):
            described = None
        if not isinstance(described, dict):
            raise LensError(f"{self.path}: {KEY} of its metadata is not a JSON object")
        if described.get("format") not in (FORMAT, FORMAT_BESIDE):
            raise LensError(
                f"{self.path}: packed in format {described.get('format')!r:.40}; this version reads {FORMAT} and "
                f"{FORMAT_BESIDE}"
            )
        return described

    def _find_beside(self) -> "PackedFile":
        described = self.described.get("beside")
        name, digest = (
            (described.get(key) for key in ("file", "sha256")) if isinstance(described, dict) else (None,) * 2
        )
        if not isinstance(name, str) or not isinstance(digest, str) or not name or Path(name).name != name:
            raise LensError(
                f"{self.path}: does not say which file of its folder the adapter stands beside, and its digest"
            )
        path = self.path.with_name(name)
        if not path.is_file():
            raise LensError(f"{path}: is not there, and the adapter {self.path.name} stands beside it")
        if (found := file_digest(path)) != digest:
            raise LensError(f"{path}: another model than the adapter {self.path.name} is for: its SHA-256 is {found}")
        # It may be an adapter alone itself. No chain of them is endless: each has the digest of the next.
        return PackedFile(path)

    def _check_adapter(self) -> None:
        """LensError where the factors are not those of kernels of the denoiser."""
        kernels, factors = self.beside.shapes("denoiser"), self._shapes("lora")
        for path, shape in factors.items():
            of, _, factor = path.rpartition("/")
            kernel, other = kernels.get(f"{of}/kernel"), factors.get(f"{of}/{'ba'[factor == 'b']}")
            if factor not in ("a", "b") or kernel is None or not other or not shape:
                raise LensError(f"{self.path}: lora/{path} is no half of an adapter of this model")
            # The rank of A decides for both.
            rank = factors[f"{of}/a"][lora.rank_axis(f"{of}/a")]
            wanted = lora.shapes(of, kernel, rank)["ab".index(factor)]
            if shape != wanted:
                raise LensError(f"{self.path}: lora/{path} is {list(shape)} and should be {list(wanted)}")

    def _shapes(self, name: str) -> dict[str, tuple[int, ...]]:
        prefix = f"{name}/"
        return {key.removeprefix(prefix): self._file.shape(key) for key in self._file if key.startswith(prefix)}

    def _value(self, name: str, path: str) -> np.ndarray:
        if self.beside is None:
            return self._file[f"{name}/{path}"]
        value, of = self.beside._value(name, path), path.removesuffix("/kernel")
        if name != "denoiser" or f"lora/{of}/a" not in self._file:
            return value
        nested = lambda values: unflatten_dict(values, sep="/")
        factors = nested({f"{of}/{factor}": self._file[f"lora/{of}/{factor}"] for factor in "ab"})
        return np.asarray(flatten_dict(lora.merged(nested({path: value.astype(np.float32)}), factors), sep="/")[path])


def file_digest(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _place(value: np.ndarray, like: Any) -> jax.Array:
    value = value.astype(like.dtype)
    if getattr(like, "sharding", None) is None:
        return jax.numpy.asarray(value)
    return jax.make_array_from_callback(value.shape, like.sharding, lambda index: value[index])
