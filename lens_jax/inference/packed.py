"""A trained pipeline as one safetensors file, its configs in the metadata: what a run is passed on as.

    denoiser/blocks/image/qkv/kernel   the moving average of the parameters, in the dtype it was packed in
    codec/basis                        what the codec was fitted to, float32

The small models that come with the package are such files, with a digest each.
"""

import dataclasses
import hashlib
import json
import os
from pathlib import Path
from typing import Any, Literal

import jax
import ml_dtypes
import numpy as np

from lens_jax import config as config_files
from lens_jax import parallel
from lens_jax.convert import writer
from lens_jax.convert.safetensors import SafetensorsFile
from lens_jax.errors import LensError

KEY = "lens_jax"
FORMAT = 1
# The folder of the shipped models, with their digests.
SHIPPED = Path(__file__).parent.parent / "small"
# What `from_pretrained` and --checkpoint take for them.
NAMES = {"small": "base.safetensors"}


@dataclasses.dataclass(frozen=True)
class Defaults:
    """How a packed pipeline draws unless told otherwise."""

    # (height, width).
    default_size: tuple[int, int] = (64, 64)
    num_inference_steps: int = 20
    guidance_scale: float = 5.0


def write(
    run: str | os.PathLike,
    path: str | os.PathLike,
    dtype: Literal["float32", "bfloat16"] = "bfloat16",
    num_inference_steps: int = 20,
    guidance_scale: float = 5.0,
) -> Path:
    """Pack the moving average of a run's newest checkpoint; a file that is there is replaced when all is written."""
    from lens_jax.inference import load

    pipe = load.from_run(run, param_dtype="float32")
    parts = load.run_config(run)
    kind = np.dtype(ml_dtypes.bfloat16 if dtype == "bfloat16" else np.float32)
    tensors = {f"denoiser/{name}": np.asarray(leaf).astype(kind) for name, leaf in _flat(pipe.params)}
    if parts.codec.abstract_fitted():
        tensors |= {f"codec/{name}": np.asarray(leaf) for name, leaf in _flat(pipe.codec_params)}
    defaults = Defaults(pipe.default_size, num_inference_steps, guidance_scale)
    described = {"format": FORMAT, **{name: config_files.to_dict(part) for name, part in parts._asdict().items()}}
    described["defaults"] = config_files.to_dict(defaults)
    writer.write_file(path, tensors, metadata={KEY: json.dumps(described, sort_keys=True)})
    return Path(path)


def is_packed(path: Path) -> bool:
    """Whether a file is a packed pipeline; by its header alone."""
    return path.is_file() and path.suffix == ".safetensors" and KEY in SafetensorsFile(path).metadata


def shipped(name: str) -> Path:
    """The file of a model that comes with the package; LensError where it is not the one that was shipped."""
    path = SHIPPED / NAMES[name]
    try:
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise LensError(f"{path}: the model that comes with the package: {error.strerror}; install it again") from None
    if digest != json.loads((SHIPPED / "digests.json").read_text())[path.name]:
        raise LensError(f"{path}: is damaged, its SHA-256 is {digest}; install the package again")
    return path


def read(path: Path, **options: Any):
    """The pipeline of a file; `options` are fields of the model to replace, e.g. dtype."""
    from lens_jax.inference import load
    from lens_jax.inference.pipeline import LensPipeline

    file = SafetensorsFile(path)
    described = _described(path, file.metadata[KEY])
    parts = load.run_parts(described, str(path))
    defaults = config_files.read(Defaults, described.get("defaults", {}), str(path), "defaults")
    model = dataclasses.replace(parts.model, **options)
    denoiser = _tree(path, file, "denoiser", load.abstract_denoiser(model))
    fitted = parts.codec.abstract_fitted()
    codec = _tree(path, file, "codec", parallel.abstract_params(fitted, parallel.AUTOENCODER_RULES, None))
    return LensPipeline(
        model,
        parts.codec,
        parts.text.load(),
        jax.tree.map(lambda x: x.astype(model.param_dtype), denoiser),
        codec if fitted else parts.codec.load().params,
        default_size=defaults.default_size,
        num_inference_steps=defaults.num_inference_steps,
        guidance_scale=defaults.guidance_scale,
    )


def _described(path: Path, text: str) -> dict:
    try:
        described = json.loads(text)
    except (ValueError, RecursionError):
        described = None
    if not isinstance(described, dict):
        raise LensError(f"{path}: {KEY} of its metadata is not a JSON object")
    if described.get("format") != FORMAT:
        raise LensError(f"{path}: packed in format {described.get('format')!r:.40}; this version reads {FORMAT}")
    return described


def _flat(tree: dict) -> list[tuple[str, Any]]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return [("/".join(key.key for key in path), leaf) for path, leaf in leaves]


def _tree(path: Path, file: SafetensorsFile, name: str, wanted: dict) -> dict:
    """The tensors under `name/` as the tree that is wanted; LensError lists what does not fit."""
    named = {f"{name}/{leaf}": like for leaf, like in _flat(wanted)}
    have = {tensor for tensor in file if tensor.startswith(f"{name}/")}
    faults = [f"{tensor} is missing" for tensor in named if tensor not in have]
    faults += [f"{tensor} is not of this model" for tensor in sorted(have - named.keys())]
    faults += [
        f"{tensor} is {list(file.shape(tensor))} and should be {list(like.shape)}"
        for tensor, like in named.items()
        if tensor in have and file.shape(tensor) != like.shape
    ]
    if faults:
        more = f" and {len(faults) - 3} more" if len(faults) > 3 else ""
        raise LensError(f"{path}: {'; '.join(faults[:3])}{more}")
    values = iter([jax.numpy.asarray(file[tensor]) for tensor in named])
    return jax.tree.map(lambda _: next(values), wanted)
