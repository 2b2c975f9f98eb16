"""A release in our own layout: the same tensors under the paths of our parameter trees, and back.

    DST/lens.json                      format, variant
    DST/denoiser/model.safetensors     (or shards with an index) leaves by path; autoencoder/, text_encoder/ alike
    DST/release/                       configs and tokenizer of the release, byte for byte

Safetensors because leaves then load through a memory map, whole or in slices, and never run code.
"""

import dataclasses
import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from flax import traverse_util

from lens_jax.atomic import new_directory
from lens_jax.convert import autoencoder, denoiser, folder, gpt_oss, table, writer
from lens_jax.convert.release import INDEX, is_release, variant_of
from lens_jax.convert.table import Tensors
from lens_jax.errors import LensError

MARK = "lens.json"
FORMAT = 1
# Small files of a release that are copied as they are; the tokenizer's is 28 MB.
_MAX_SMALL = 64_000_000
_SMALL = (".json", ".jinja", ".txt", ".model")

Progress = Callable[[str, int], None]


@dataclasses.dataclass(frozen=True)
class Component:
    """One network of a release."""

    # Its folder in our layout and in the release.
    ours: str
    theirs: str
    # Names of its files there, before `.safetensors`.
    stem: str
    # The module with its table.
    module: Any

    def config(self, release: Path, param_dtype: str | None = None):
        """Its config, from the release's config.json in `release`."""
        options = {} if param_dtype is None or self.module is gpt_oss else {"param_dtype": param_dtype}
        return self.module.read_config(release / self.theirs / "config.json", **options)


COMPONENTS = (
    Component("denoiser", "transformer", "diffusion_pytorch_model", denoiser),
    Component("autoencoder", "vae", "diffusion_pytorch_model", autoencoder),
    Component("text_encoder", "text_encoder", "model", gpt_oss),
)


def is_native(path: Path) -> bool:
    """Whether `path` is a folder in our layout."""
    return (path / MARK).is_file()


def to_jax(source: Path, target: Path, variant: str | None = None, progress: Progress | None = None) -> list[Component]:
    """Convert a release folder to our layout; returns the components that were there.

    A tensor at a time, in the memory of the largest leaf. Floats keep the dtype they have. `target` appears when all
    is complete.
    """
    if not is_release(source):
        raise LensError(f"{source}: no release folder (no {INDEX})")
    found = [c for c in COMPONENTS if (source / c.theirs / "config.json").is_file()]
    if not found:
        raise LensError(f"{source}: holds none of {', '.join(c.theirs for c in COMPONENTS)}")
    with new_directory(target, False, MARK) as aside:
        _copy_small(source, aside / "release")
        for component in found:
            tensors = folder.open_component(source / component.theirs)
            config = component.config(source, _float_dtype(tensors))
            lazy = component.module.leaves(config, tensors, str(source / component.theirs))
            writer.write_folder(aside / component.ours, lazy, stem="model", progress=progress)
        mark = {"format": FORMAT, "variant": variant_of(source, variant)}
        (aside / MARK).write_text(json.dumps(mark, indent=2) + "\n", encoding="utf-8")
    return found


def to_torch(
    source: Path,
    target: Path,
    dtype: str | None = None,
    ema: bool = True,
    single_file: bool = False,
    progress: Progress | None = None,
) -> list[str]:
    """Write a release folder from our layout, or the `transformer/` of one from a training run.

    dtype: of the denoiser's floats, "f32" or "bf16"; by default what it has. ema: of a run, the moving average and not
    the parameters themselves. single_file: never shard. Returns the folders written.
    """
    numpy_dtype = _DTYPES[dtype] if dtype else None
    limit = {"max_shard_bytes": 1 << 62} if single_file else {}
    if not is_native(source):
        with new_directory(target, False, MARK) as aside:
            _run_to_torch(source, aside, numpy_dtype, ema, limit, progress)
        return ["transformer"]
    found = [c for c in COMPONENTS if (source / c.ours).is_dir()]
    with new_directory(target, False, MARK) as aside:
        _copy_small(source / "release", aside)
        for component in found:
            lazy = folder.open_component(source / component.ours)
            config = component.config(source / "release")
            rules = component.module.rules(config)
            _check_leaves(rules, lazy, source / component.ours)
            cast = numpy_dtype if component.module is denoiser else None
            tensors = table.to_release(rules, _Views(lazy), cast)
            writer.write_folder(aside / component.theirs, tensors, stem=component.stem, progress=progress, **limit)
    return [c.theirs for c in found]


_DTYPES = {"f32": np.dtype(np.float32), "bf16": table.FLOATS[1]}


def _run_to_torch(source: Path, target: Path, dtype, ema: bool, limit: dict, progress: Progress | None) -> None:
    from lens_jax.training import checkpoint

    place = checkpoint.find(source)
    config = checkpoint.read_metadata(place)["config"].model
    part = "ema" if ema else "params"
    params = checkpoint.load_parts(place, {part: checkpoint.abstract_params(config, part)})[part]
    tensors = denoiser.to_release(config, params, dtype)
    writer.write_folder(target / "transformer", tensors, stem=COMPONENTS[0].stem, progress=progress, **limit)
    # Which layers of which encoder the features came from is not the denoiser's to know; a run counts them from 0.
    values = json.dumps(denoiser.config_to_release(config, tuple(range(config.text_layers))), indent=2) + "\n"
    (target / "transformer" / "config.json").write_text(values, encoding="utf-8")


def verify(source: Path, target: Path, progress: Progress | None = None) -> int:
    """Compare every tensor of a release folder with what our layout gives back; returns how many were compared.

    LensError names the first that differs in a bit.
    """
    compared = 0
    for component in COMPONENTS:
        if not (target / component.ours).is_dir():
            continue
        original = folder.open_component(source / component.theirs)
        rules = component.module.rules(component.config(target / "release"))
        back = table.to_release(rules, _Views(folder.open_component(target / component.ours)))
        for name in back:
            if name not in original:
                continue  # a tensor that the release may leave out
            one, other = original[name], back[name]
            if one.dtype != other.dtype or one.shape != other.shape or one.tobytes() != other.tobytes():
                raise LensError(f"{target / component.ours}: {name} differs from {source / component.theirs}")
            compared += 1
            if progress:
                progress(name, one.nbytes)
    return compared


def load_params(source: Path, component: str) -> dict:
    """The parameter tree of a component in our layout, as read-only views of its files."""
    lazy = folder.open_component(source / component)
    return traverse_util.unflatten_dict({path: lazy[path] for path in lazy}, sep="/")


class _Views(Mapping[str, np.ndarray]):
    """Leaves that are opened once: each access to a memory-mapped tensor is a view, but making it costs a look-up."""

    def __init__(self, tensors: Tensors):
        self._views = {path: tensors[path] for path in tensors}

    def __getitem__(self, path: str) -> np.ndarray:
        return self._views[path]

    def __iter__(self):
        return iter(self._views)

    def __len__(self) -> int:
        return len(self._views)


def _check_leaves(rules: list[table.Rule], lazy: Tensors, where: Path) -> None:
    missing = sorted({rule.path for rule in rules} - set(lazy))
    if missing:
        raise LensError(f"{where}: {len(missing)} arrays are missing: {', '.join(missing[:8])}")


def _float_dtype(tensors: Tensors) -> str:
    """The widest float a component holds: float32 unless all are half precision. MXFP8 becomes float32."""
    names = {str(spec.dtype) for spec in tensors.specs.values()}
    halves = names & {"bfloat16", "float16"}
    wide = names - {"bfloat16", "float16", "int64", "uint8"}
    return "float32" if wide or len(halves) != 1 else halves.pop()


def _copy_small(source: Path, target: Path) -> None:
    """Configs, tokenizer and chat template, byte for byte; weights and their indices are written anew."""
    for path in sorted(source.glob("*")) + sorted(source.glob("*/*")):
        small = path.suffix in _SMALL and not path.name.endswith(folder.INDEX_SUFFIX)
        if small and path.is_file() and not path.is_symlink() and path.stat().st_size <= _MAX_SMALL:
            place = target / path.relative_to(source)
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, place)
