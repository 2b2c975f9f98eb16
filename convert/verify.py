"""Whether a conversion gives back what it was made of: tensors, configs, tokenizer, and what the networks compute.

Tensors alone do not say it: a denoiser whose config names other layers of the text encoder has all its tensors and
draws other images.
"""

import dataclasses
import functools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import jax
import numpy as np

from lens_jax.convert import folder, load, native, source, table
from lens_jax.convert.lora import Adapter
from lens_jax.convert.native import Progress, Trained
from lens_jax.convert.source import Part, Source
from lens_jax.convert.table import Tensors
from lens_jax.errors import LensError
from lens_jax.models import autoencoder, denoiser, gpt_oss
from lens_jax.models.layers import joint_positions


@dataclasses.dataclass(frozen=True)
class Compared:
    """What was found to be equal to the bit."""

    tensors: int = 0
    # Configs, tokenizer and other small files.
    files: int = 0
    # Networks that answered the same in a forward pass.
    networks: int = 0

    def __str__(self) -> str:
        return f"{self.tensors:,} tensors, {self.files} files and a forward pass of {self.networks} networks"


def to_jax(origin: Source, target: Path, progress: Progress | None = None) -> Compared:
    """Compare what `native.to_jax` wrote with its source; LensError names the first thing that differs in a bit.

    The forward passes need the memory of the largest network, one at a time.
    """
    written = source.find(target)
    tensors = 0
    for part in origin.parts.values():
        stored = native.Views(folder.open_component(target / part.component.ours))
        rules = part.component.module.rules(part.component.config(target / "release"))
        back = table.to_release([rule for rule in rules if rule.path in stored], stored)
        tensors += _compare(part.tensors, back, target / part.component.ours, part.path, progress)
    files = _tokenizer(origin, target / "release")
    for place in native.small_files(origin.release) if origin.release else ():
        name = place.relative_to(origin.release)
        if name.name == "config.json" and any(name.parent.name == p.component.theirs for p in origin.parts.values()):
            continue  # compared by what it says, below: experts may have become dense
        if origin.tokenizer and name.parent.name == source.TOKENIZER:
            continue
        files += _same_bytes(place, target / "release" / name)
    return Compared(tensors, files + _configs(origin, written), _networks(origin, written))


def to_torch(
    origin: Path | Trained,
    target: Path,
    dtype: str | None = None,
    progress: Progress | None = None,
    adapters: Sequence[tuple[Adapter, float]] = (),
) -> Compared:
    """Compare what `native.to_torch` wrote with what it was made of, in the `dtype` it was asked for.

    With `adapters` merged into it, it computes something else than its source, so networks are not compared.
    """
    tensors = 0
    for component, wanted, values in native.for_release(origin, dtype, adapters):
        place = target / component.theirs
        found = folder.open_component(place)
        if found.specs != wanted.specs:
            raise LensError(f"{place}: names, shapes or dtypes are not those of {native.name_of(origin)}")
        tensors += _compare(wanted, found, place, native.name_of(origin), progress)
        if values and folder.read_json(place / "config.json") != values:
            raise LensError(f"{place / 'config.json'}: says something else than {native.name_of(origin)}")
    if adapters:
        return Compared(tensors, 1 if isinstance(origin, Trained) else 0, 0)
    written = source.find(target)
    if isinstance(origin, Trained):
        part = written.parts["denoiser"]
        options = {"dtype": "float32", "param_dtype": part.float_dtype()}
        ours, theirs = dataclasses.replace(origin.config, **options), part.config(**options)
        for field in ("remat", "unroll", "attention"):
            ours = dataclasses.replace(ours, **{field: getattr(theirs, field)})
        selected = part.values["selected_layer_index"]
        if ours != theirs or tuple(selected) != origin.selected:
            raise LensError(f"{part.path}: its config does not read as that of the run")
        cast = jax.tree.map(lambda x: np.asarray(x).astype(ours.param_dtype), origin.params)
        same = np.array_equal(velocity(ours, cast), velocity(theirs, load.params(part, theirs, {})), equal_nan=True)
        if not same:
            raise LensError(f"{part.path}: computes another velocity than the run")
        return Compared(tensors, 1, 1)
    home = origin / "release"
    files = sum(_same_bytes(place, target / place.relative_to(home)) for place in native.small_files(home))
    ours = source.find(origin)
    _configs(ours, written)
    return Compared(tensors, files, _networks(ours, written))


def velocity(config: denoiser.DenoiserConfig, params: dict) -> np.ndarray:
    """Of a denoiser for a fixed input of four latents and three text tokens."""
    draw = np.random.default_rng(0).standard_normal
    latents = draw((1, 4, config.latent_channels), np.float32)
    text = tuple(draw((1, 3, config.text_width), np.float32) for _ in range(config.text_layers))
    arrays = (latents, text, np.full(1, 3, np.int32), np.full(1, 0.5, np.float32), joint_positions(2, 2, 3))
    return np.asarray(_velocity(dataclasses.replace(config, remat="none"), params, *arrays))


@functools.partial(jax.jit, static_argnums=0)
def _velocity(config, params, *arrays):
    return denoiser.apply(config, params, *arrays)


@functools.partial(jax.jit, static_argnums=0)
def _decode(config, params, latents):
    return autoencoder.decode(config, params, latents, (2, 2))


@functools.partial(jax.jit, static_argnums=(0, 1))
def _features(config, taps, params, ids):
    return gpt_oss.hidden_states(config, params, ids, np.full(1, ids.shape[1], np.int32), taps)


def _networks(origin: Source, written: Source) -> int:
    """How many networks of a source answer the same from both; LensError names one that does not."""
    for name, part in origin.parts.items():
        other = written.parts[name]
        answers = [_answer(p, other.float_dtype(), _taps(s, p)) for s, p in ((origin, part), (written, other))]
        if not np.array_equal(*answers, equal_nan=True):
            raise LensError(f"{other.path}: computes something else than {part.path}, from the same input")
    return len(origin.parts)


def _answer(part: Part, dtype: str, taps: tuple[int, ...]) -> np.ndarray:
    if part.component.ours == "text_encoder":
        config = part.config(dtype="float32")
        ids = np.arange(8, dtype=np.int32)[None] % config.vocab
        return np.asarray(_features(config, taps, load.params(part, config, {}, head=False), ids))
    config = part.config(dtype="float32", param_dtype=dtype)
    params = load.params(part, config, {})
    if part.component.ours == "denoiser":
        return velocity(config, params)
    latents = np.random.default_rng(0).standard_normal((1, 4, config.latent_channels), np.float32)
    return np.asarray(_decode(config, params, latents))


def _taps(found: Source, part: Part) -> tuple[int, ...]:
    """The layers whose features the denoiser beside a text encoder reads; its last where that is not known."""
    if part.component.ours != "text_encoder":
        return ()
    layers = part.config().layers
    beside = found.parts.get("denoiser")
    taps = tuple(beside.values["selected_layer_index"]) if beside else ()
    return taps if taps and max(taps) < layers else (layers - 1,)


def _configs(origin: Source, written: Source) -> int:
    """How many configs read the same from both."""
    for name, part in origin.parts.items():
        other = written.parts[name]
        read, had = (p.values.get("selected_layer_index") for p in (other, part))
        if read != had:
            raise LensError(f"{other.path}: selected_layer_index is {read}, in {part.path} it is {had}")
        if part.config() != other.config():
            raise LensError(f"{other.path}: its config does not read as that of {part.path}")
    return len(origin.parts)


def _tokenizer(origin: Source, release: Path) -> int:
    if origin.tokenizer is None:
        return 0
    place = release / source.TOKENIZER / "tokenizer.json"
    wanted = origin.tokenizer if isinstance(origin.tokenizer, bytes) else origin.tokenizer.read_bytes()
    if not place.is_file() or place.read_bytes() != wanted:
        raise LensError(f"{place}: is not the tokenizer of {origin.path}")
    return 1


def _same_bytes(one: Path, other: Path) -> int:
    if not other.is_file() or one.read_bytes() != other.read_bytes():
        raise LensError(f"{other}: is not, byte for byte, {one}")
    return 1


def _compare(
    wanted: Tensors, written: Mapping[str, np.ndarray], where: Path, origin: Path | str, progress: Progress | None
) -> int:
    for name, array in _items(wanted):
        one, other = array.astype(written.dtype(name), copy=False), written[name]
        if one.shape != other.shape or one.tobytes() != other.tobytes():
            raise LensError(f"{where}: {name} differs from {origin}")
        if progress:
            progress(name, array.nbytes)
    return len(wanted)


def _items(tensors: Tensors) -> Iterator[tuple[str, np.ndarray]]:
    for name in tensors:
        yield name, tensors[name]
