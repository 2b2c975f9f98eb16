"""`lens-jax info`: what a checkpoint or a data set holds, from its metadata alone."""

import math
from pathlib import Path

from rich.table import Table

from lens_jax.console import make_console
from lens_jax.convert import native, release
from lens_jax.convert.folder import open_component
from lens_jax.data.manifest import NAME, fingerprint, load_manifest
from lens_jax.errors import LensError


def describe(path: str) -> None:
    """Print what is at `path`: a run, one of its checkpoints, a release folder or a prepared data set."""
    if "://" in path:
        _describe_checkpoint(path)
        return
    folder = Path(path)
    if not folder.exists():
        raise LensError(f"{path}: no such file or folder; give a run, a checkpoint or a data set")
    if (folder / NAME).is_file():
        _describe_data(folder)
    elif release.is_release(folder) or release.is_native(folder) or (folder / "transformer" / "config.json").is_file():
        _describe_release(folder)
    else:
        _describe_checkpoint(folder)


def _describe_data(folder: Path) -> None:
    manifest = load_manifest(folder)
    console = make_console()
    console.print(f"data set {folder}: source {manifest.source}, licence {manifest.licence}")
    if made := manifest.features:
        console.print(
            f"latents of {made['codec']['kind']}; {made['layers']} text layers of {made['text_width']} channels, at "
            f"most {made['max_tokens']} tokens, of {made['text']['kind']}; {made['dtype']}"
        )
    console.print(f"fingerprint {fingerprint(manifest)}")
    console.print(
        f"captions in {', '.join(manifest.languages)}; held out: {', '.join(manifest.holdout_languages) or '-'}"
    )
    table = Table("bucket", "train", "validation")
    for i, bucket in enumerate(manifest.buckets):
        table.add_row(str(bucket), *(f"{manifest.counts(split)[i]:,}" for split in ("train", "validation")))
    console.print(table)
    if manifest.dropped:
        console.print("left out: " + ", ".join(f"{count:,} {reason}" for reason, count in manifest.dropped.items()))


def _describe_release(path: Path) -> None:
    console = make_console()
    converted = release.is_native(path)
    guessed = release.variant_of(path)
    name, defaults = release.read_metadata(path) if converted else (guessed, release.VARIANTS[guessed])
    kind = "release in our layout" if converted else "release folder"
    console.print(
        f"{kind} {path}: variant {name}{'' if converted else ' (guessed from its name)'}, "
        f"{defaults.num_inference_steps} steps at guidance {defaults.guidance_scale:g}"
    )
    table = Table("part", "arrays", "numbers", "bytes", "dtypes")
    for component in native.COMPONENTS:
        folder = path / (component.ours if converted else component.theirs)
        if folder.is_dir():
            specs = open_component(folder).specs.values()
            numbers = sum(math.prod(spec.shape) for spec in specs)
            dtypes = ", ".join(sorted({str(spec.dtype) for spec in specs}))
            size = sum(spec.bytes for spec in specs)
            table.add_row(component.ours, str(len(specs)), f"{numbers:,}", f"{size:,}", dtypes)
    console.print(table)


def _describe_checkpoint(path: str | Path) -> None:
    from lens_jax.inference.load import run_parts
    from lens_jax.run import store as checkpoint

    folder = checkpoint.find(path)
    metadata = checkpoint.read_metadata(folder)
    config, shapes = metadata["config"], checkpoint.saved_shapes(folder)
    model, codec, _ = run_parts(config, str(folder))
    console = make_console()
    console.print(f"checkpoint {folder}: {folder.name} of {config.get('steps', 'an unknown number of')} steps")
    console.print(
        f"denoiser: {model.layers} blocks, width {model.width}, {model.heads} heads; "
        f"tokens of {codec.tile} x {codec.tile} pixels; "
        f"sizes {', '.join(f'{h}x{w}' for h, w in metadata['sizes'])}"
    )
    console.print(f"data: {config.get('data', {}).get('path', '-')}, fingerprint {metadata['position'].fingerprint}")
    table = Table("part", "arrays", "numbers", "bytes")
    for part in sorted({name.split("/")[0] for name in shapes}):
        arrays = [value for name, value in shapes.items() if name.split("/")[0] == part]
        numbers = sum(math.prod(shape) for shape, _ in arrays)
        size = sum(math.prod(shape) * _item_size(dtype) for shape, dtype in arrays)
        table.add_row(part, str(len(arrays)), f"{numbers:,}", f"{size:,}")
    console.print(table)


def _item_size(dtype: str) -> int:
    import jax.numpy as jnp

    return jnp.dtype(dtype).itemsize
