"""The file format of a packed pipeline: safetensors, with its configs in the metadata.

    denoiser/blocks/image/qkv/kernel   the moving average of the parameters, in the dtype it was packed in
    codec/basis                        what the codec was fitted to, float32

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

KEY = "lens_jax"
FORMAT = 1
# The folder of the shipped models, a file VARIANT.safetensors each, with their digests.
SHIPPED = Path(lens_jax.__file__).parent / "small"
DIGESTS = "digests.json"
# What is taken for them wherever a path to a model is given, and no file has that name: the file where no variant is
# asked for.
NAMES = {"small": "base.safetensors"}


def find(path: str | os.PathLike, variant: str | None = None) -> Path | None:
    """The packed file that a path, or the name of a shipped model, means; None where it means something else.

    `variant` is of a shipped model: another one of its files, "turbo".
    """
    if "://" in str(path):
        return None
    local = Path(path)
    if not local.exists():
        return shipped(str(path), variant) if str(path) in NAMES else None
    return local if is_packed(local) else None


def is_shipped(path: str | os.PathLike) -> bool:
    """Whether a path is the name of a model that comes with the package, and of nothing that is there."""
    return str(path) in NAMES and not Path(path).exists()


def is_packed(path: Path) -> bool:
    """Whether a file is a packed pipeline; by its header alone."""
    try:
        return path.is_file() and path.suffix == ".safetensors" and KEY in SafetensorsFile(path).metadata
    except LensError:  # whoever reads it as what it is says what is wrong with it
        return False


def shipped(name: str, variant: str | None = None) -> Path:
    """The file of a model that comes with the package; LensError where it is not the one that was shipped.

    `variant` None is the one that its name alone means. LensError says which variants come with it.
    """
    file = NAMES[name] if variant is None else f"{variant}.safetensors"
    path = SHIPPED / file
    try:
        known = json.loads((SHIPPED / DIGESTS).read_text(encoding="utf-8"))
        # By all of it: a variant may be given as a path to somewhere else.
        if file not in known:
            variants = ", ".join(sorted(str(one).removesuffix(".safetensors") for one in known))
            raise LensError(f"{name}: comes without a variant {variant!r:.40}; accepted: {variants}")
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
    except (OSError, ValueError) as error:
        problem = getattr(error, "strerror", None) or "its digests are damaged"
        raise LensError(f"{path}: the model that comes with the package: {problem}; install it again") from None
    if digest != known[file]:
        raise LensError(f"{path}: is damaged, its SHA-256 is {digest}; install the package again")
    return path


class PackedFile:
    """A packed pipeline that is read. LensError for a file of another format."""

    def __init__(self, path: Path):
        self.path = path
        self._file = SafetensorsFile(path)
        # The configs of its parts as plain values: "model", "codec", "text", and its "defaults".
        self.described = self._read_described()

    def shapes(self, name: str) -> dict[str, tuple[int, ...]]:
        """The arrays of a part ("denoiser", "codec") by their paths in it."""
        prefix = f"{name}/"
        return {key.removeprefix(prefix): self._file.shape(key) for key in self._file if key.startswith(prefix)}

    def take(self, name: str, wanted: Mapping[str, Any]) -> dict[str, jax.Array]:
        """Arrays of a part by path, all of them there: in the dtypes and layouts of `wanted`."""
        return {path: _place(self._file[f"{name}/{path}"], like) for path, like in wanted.items()}

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
        if described.get("format") != FORMAT:
            raise LensError(
                f"{self.path}: packed in format {described.get('format')!r:.40}; this version reads {FORMAT}"
            )
        return described


def _place(value: np.ndarray, like: Any) -> jax.Array:
    value = value.astype(like.dtype)
    if getattr(like, "sharding", None) is None:
        return jax.numpy.asarray(value)
    return jax.make_array_from_callback(value.shape, like.sharding, lambda index: value[index])
