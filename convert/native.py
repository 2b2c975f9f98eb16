"""A release in our own layout: the same tensors under the paths of our parameter trees, and back.

    DST/lens.json                      format, variant, its default steps and guidance
    DST/denoiser/model.safetensors     (or shards with an index) leaves by path; autoencoder/, text_encoder/ alike
    DST/release/                       configs and tokenizer of the release, byte for byte

Safetensors because leaves then load through a memory map, whole or in slices, and never run code.
"""

import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from flax import traverse_util

from lens_jax.atomic import new_directory
from lens_jax.convert import denoiser, folder, lora, source, table, writer
from lens_jax.convert.component import COMPONENTS, Component
from lens_jax.convert.lora import Adapter
from lens_jax.convert.release import INDEX, MARK, MODEL_INDEX, SCHEDULER, metadata
from lens_jax.convert.source import Source
from lens_jax.convert.table import Tensors
from lens_jax.errors import LensError
from lens_jax.models.denoiser import DenoiserConfig

# Small files of a release that are copied as they are; the tokenizer's is 28 MB.
_MAX_SMALL = 64_000_000
_SMALL = (".json", ".jinja", ".txt", ".model", ".md")
_OF_TOKENIZER = ("tokenizer", "special_tokens", "vocab", "merges", "added_tokens")
_PAPERS = ("LICENSE", "LICENCE", "NOTICE")

Progress = Callable[[str, int], None]


def to_jax(
    origin: Source, target: Path, variant: str | None = None, progress: Progress | None = None
) -> list[Component]:
    """Convert a source to our layout; returns the components that were there.

    A tensor at a time, in the memory of the largest leaf. Floats keep the dtype they have; what was dequantised becomes
    float32, experts of the text encoder what its config says. What the source lacks of configs is that of the released
    model. `target` appears when all is complete.
    """
    if origin.converted:
        raise LensError(f"{origin.path}: is in our layout already; give a release folder or weights")
    variant, _ = source.variant_of(origin, variant, ask=True)
    with writer.as_lens_error(target), new_directory(target, False, MARK) as aside:
        release = aside / "release"
        if origin.release:
            _copy_small(origin.release, release)
        for name, values in ((INDEX, MODEL_INDEX), ("scheduler/scheduler_config.json", SCHEDULER)):
            if not (release / name).is_file():
                _write_json(release / name, values)
        if origin.tokenizer:
            _write_tokenizer(origin.tokenizer, release / source.TOKENIZER)
        for part in origin.parts.values():
            _copy_beside(part, origin, release / part.component.theirs)
            config = release / part.component.theirs / "config.json"
            if not config.is_file() or folder.read_json(config) != part.values:
                _write_json(config, part.values)
            lazy = part.leaves(part.stored_config())
            writer.write_folder(aside / part.component.ours, lazy, stem="model", progress=progress)
        _write_json(aside / MARK, metadata(variant))
    return [part.component for part in origin.parts.values()]


class Trained(NamedTuple):
    """A denoiser that a run has trained."""

    config: DenoiserConfig
    # Parameters as a nested dict.
    params: dict
    # The layers of the text encoder that it reads, counted from 0, in their order.
    selected: tuple[int, ...]
    # What its config says it is, which also tells the variant when the export is read back.
    origin: str = "Lens, trained by lens-jax"


def to_torch(
    source: Path | Trained,
    target: Path,
    dtype: str | None = None,
    single_file: bool = False,
    progress: Progress | None = None,
    adapters: Sequence[tuple[Adapter, float]] = (),
) -> list[str]:
    """Write a release folder from our layout, or the `transformer/` of one from what a run has trained, with its index.

    dtype: of the denoiser's floats, "f32" or "bf16"; by default what it has. single_file: never shard. adapters: merged
    into the denoiser, each times its factor. Returns the folders written.
    """
    limit = {"max_shard_bytes": 1 << 62} if single_file else {}
    written = []
    with writer.as_lens_error(target), new_directory(target, False, MARK) as aside:
        if isinstance(source, Trained):
            # Those of all three variants, so that only the networks that no run trains are missing.
            _write_json(aside / INDEX, MODEL_INDEX)
            _write_json(aside / "scheduler" / "scheduler_config.json", SCHEDULER)
        else:
            _copy_small(source / "release", aside)
        for component, tensors, values in for_release(source, dtype, adapters):
            place = aside / component.theirs
            writer.write_folder(place, tensors, stem=component.stem, progress=progress, **limit)
            if values:
                _write_json(place / "config.json", values)
            written.append(component.theirs)
    return written


def name_of(source: Path | Trained) -> Path | str:
    """What a message calls it."""
    return "the run" if isinstance(source, Trained) else source


DTYPES = {"f32": np.dtype(np.float32), "bf16": table.FLOATS[1]}


def for_release(
    source: Path | Trained, dtype: str | None, adapters: Sequence[tuple[Adapter, float]] = ()
) -> Iterator[tuple[Component, Tensors, dict | None]]:
    """Each network with its tensors by the names of the release, and its config where none lies beside it."""
    numpy_dtype = DTYPES[dtype] if dtype else None
    if isinstance(source, Trained):
        yield _run_for_release(source, numpy_dtype, adapters)
        return
    for component in COMPONENTS:
        if (source / component.ours).is_dir():
            lazy = folder.open_component(source / component.ours)
            rules = component.module.rules(component.config(source / "release"))
            _check_leaves(rules, lazy, source / component.ours)
            if component.module is denoiser:
                # Not cast before, or it would be rounded twice.
                whole = table.to_release(rules, Views(lazy), None if adapters else numpy_dtype)
                yield component, lora.merged(whole, adapters, numpy_dtype) if adapters else whole, None
            else:
                yield component, table.to_release(rules, Views(lazy)), None


def _run_for_release(
    trained: Trained, dtype: np.dtype | None, adapters: Sequence[tuple[Adapter, float]]
) -> tuple[Component, Tensors, dict]:
    values = denoiser.config_to_release(trained.config, trained.selected)
    values["_name_or_path"] = trained.origin
    tensors = denoiser.to_release(trained.config, trained.params, None if adapters else dtype)
    return COMPONENTS[0], lora.merged(tensors, adapters, dtype) if adapters else tensors, values


def load_params(source: Path, component: str) -> dict:
    """The parameter tree of a component in our layout, as read-only views of its files."""
    lazy = folder.open_component(source / component)
    return traverse_util.unflatten_dict({path: lazy[path] for path in lazy}, sep="/")


class Views(Mapping[str, np.ndarray]):
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


def _write_tokenizer(tokenizer: Path | bytes, target: Path) -> None:
    """The tokenizer.json and, out of a folder, what belongs to it."""
    target.mkdir(parents=True, exist_ok=True)
    if isinstance(tokenizer, bytes):
        (target / "tokenizer.json").write_bytes(tokenizer)
        return
    for path in tokenizer.parent.iterdir():
        if path == tokenizer or path.name in (
            "tokenizer_config.json",
            "special_tokens_map.json",
            "chat_template.jinja",
        ):
            shutil.copyfile(path, target / path.name)


def _write_json(path: Path, values: Mapping) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def small_files(source: Path) -> list[Path]:
    """Configs, tokenizer, licence and such of a release folder; weights and their indices are written anew.

    A hub's cache keeps them as links, which are followed where `folder.inside` allows it. LensError for a
    link to nothing.
    """
    found = []
    for path in sorted(source.glob("*")) + sorted(source.glob("*/*")):
        small = path.suffix in _SMALL or path.name.startswith(_PAPERS)
        if not small or path.name.endswith(folder.INDEX_SUFFIX) or path.name.startswith(".") or path.is_dir():
            continue
        if path.is_symlink():
            folder.inside(path.parent, path.name, path.parent, "")
        if not path.exists():
            raise LensError(f"{path}: a link to nothing; its download has not ended, fetch the folder again")
        if not path.is_file() or path.stat().st_size > _MAX_SMALL:
            continue
        with path.open("rb") as file:
            if file.read(len(folder.LFS_POINTER)) == folder.LFS_POINTER:
                raise folder.pointer(path)
        found.append(path)
    return found


def _copy_beside(part: source.Part, origin: Source, target: Path) -> None:
    """What lies beside weights from elsewhere, a generation_config.json, where the release folder has none."""
    if not part.path.is_dir() or (origin.release and part.path.is_relative_to(origin.release)):
        return
    for path in small_files(part.path):
        ours = path.suffix == ".json" and path.parent == part.path and not path.name.startswith(_OF_TOKENIZER)
        if ours and path.name != "config.json" and not (target / path.name).exists():
            target.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target / path.name)


def left_out(origin: Source) -> list[str]:
    """Files of a release folder that are neither copied nor read as weights, by name."""
    if origin.release is None or origin.converted:
        return []
    home, kept = origin.release, set(small_files(origin.release))
    read = {file for part in origin.parts.values() if part.path.is_dir() for file in folder.files_of(part.path)}
    read |= {part.path for part in origin.parts.values()}
    files = (path for path in home.rglob("*") if path.is_file() and path not in kept and path not in read)
    return sorted(str(path.relative_to(home)) for path in files if ".cache" not in path.parts)


def _copy_small(source: Path, target: Path) -> None:
    for path in small_files(source):
        place = target / path.relative_to(source)
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, place)
