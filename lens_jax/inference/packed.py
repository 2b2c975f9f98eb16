"""A trained pipeline as one file (`convert/packed.py` has its format): written from a run, and read to draw from."""

import dataclasses
import json
import math
import os
from pathlib import Path
from typing import Any, Literal

import jax
import ml_dtypes
import numpy as np
from flax.traverse_util import flatten_dict

from lens_jax import config as config_files
from lens_jax import parallel
from lens_jax.convert import writer
from lens_jax.convert.packed import FORMAT, FORMAT_BESIDE, KEY, PackedFile, file_digest
from lens_jax.errors import LensError
from lens_jax.inference import arguments
from lens_jax.posttraining import adapters


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
    num_inference_steps: int | None = None,
    guidance_scale: float | None = None,
    beside: str | os.PathLike | None = None,
) -> Path:
    """Pack the moving average of a run's newest checkpoint; a file that is there is replaced when all is written.

    The adapter of a run that trained one is merged into what it was trained beside; or, with `beside`, it alone is
    written, of a run that was trained beside that packed file, into the same folder. Steps and guidance are by default
    what the run is drawn with: of one that was distilled its few steps, and no guidance.
    """
    from lens_jax.inference import load

    pipe = load.from_run(run, param_dtype="float32")
    kind = np.dtype(ml_dtypes.bfloat16 if dtype == "bfloat16" else np.float32)
    if beside is not None:
        described, tensors = _adapter(pipe, Path(run), Path(beside), Path(path), kind)
    else:
        pipe.fuse_lora()
        described, tensors = _whole(pipe, load.run_config(run), kind)
    steps = pipe.num_inference_steps if num_inference_steps is None else num_inference_steps
    guidance = pipe.guidance_scale if guidance_scale is None else guidance_scale
    defaults = Defaults(
        pipe.default_size,
        arguments.whole("num_inference_steps", steps),
        arguments.number("guidance_scale", guidance),
    )
    described["defaults"] = config_files.to_dict(defaults)
    writer.write_file(path, tensors, metadata={KEY: json.dumps(described, sort_keys=True)})
    return Path(path)


def _whole(pipe, parts, kind: np.dtype) -> tuple[dict, dict[str, np.ndarray]]:
    """(what the metadata say, the tensors) of denoiser and codec."""
    tensors = {f"denoiser/{name}": np.asarray(leaf).astype(kind) for name, leaf in _flat(pipe.params).items()}
    if parts.codec.abstract_fitted():
        tensors |= {f"codec/{name}": np.asarray(leaf) for name, leaf in _flat(pipe.codec_params).items()}
    return {"format": FORMAT, **{name: config_files.to_dict(part) for name, part in parts._asdict().items()}}, tensors


def _adapter(pipe, run: Path, beside: Path, path: Path, kind: np.dtype) -> tuple[dict, dict[str, np.ndarray]]:
    """(what the metadata say, the tensors) of the adapter alone."""
    if not pipe.adapters:
        raise LensError(f"{run}: trained a denoiser and no adapter, which is nothing beside {beside}")
    if beside.resolve().parent != path.resolve().parent:
        raise LensError(f"{path}: must be in the folder of {beside}, which it is read beside")
    base = PackedFile(beside)
    kept = _flat(base.tree("denoiser", pipe.params))
    # Its codec belongs to what it was trained beside, too.
    kept |= _flat(base.tree("codec", pipe.codec_params)) if base.shapes("codec") else {}
    ours = _flat(pipe.params) | (_flat(pipe.codec_params) if base.shapes("codec") else {})
    other = [name for name, leaf in ours.items() if not np.array_equal(leaf, kept[name])]
    if other:
        more = f" and {len(other) - 1} more" if len(other) > 1 else ""
        raise LensError(f"{run}: was not trained beside {beside}: {other[0]}{more} differ")
    tree = adapters.joined(pipe.adapters, None)
    tensors = {f"lora/{name}": np.asarray(leaf).astype(kind) for name, leaf in _flat(tree).items()}
    return {"format": FORMAT_BESIDE, "beside": {"file": beside.name, "sha256": file_digest(beside)}}, tensors


def _flat(tree: dict) -> dict:
    return flatten_dict(tree, sep="/")


def read(path: Path, **options: Any):
    """The pipeline of a file; `options` are fields of the model to replace, e.g. dtype."""
    from lens_jax.inference import load
    from lens_jax.inference.pipeline import LensPipeline

    file = PackedFile(path)
    parts = load.run_parts(file.described, str(path))
    defaults = config_files.read(Defaults, file.described.get("defaults", {}), str(path), "defaults")
    model = dataclasses.replace(parts.model, **options)
    denoiser = file.tree("denoiser", load.abstract_denoiser(model))
    fitted = parts.codec.abstract_fitted()
    codec = file.tree("codec", parallel.abstract_params(fitted, parallel.AUTOENCODER_RULES, None))
    return LensPipeline(
        model,
        parts.codec,
        parts.text.load(),
        jax.tree.map(lambda x: x.astype(model.param_dtype), denoiser),
        codec if fitted else parts.codec.load().params,
        default_size=defaults.default_size,
        num_inference_steps=defaults.num_inference_steps,
        guidance_scale=defaults.guidance_scale,
        # A file says no other size; a run's buckets of one area are about that of its squarest.
        trained_areas=(math.prod(defaults.default_size),) * 2,
    )
