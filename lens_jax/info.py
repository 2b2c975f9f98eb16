"""`lens-jax info`: what a checkpoint or a data set holds, from its metadata alone."""

import math
import warnings
from collections import defaultdict
from pathlib import Path

from rich.table import Table

from lens_jax.console import make_console
from lens_jax.convert import packed as packed_files
from lens_jax.convert import release, source
from lens_jax.data.index import NAME, SPLITS, load_index
from lens_jax.errors import LensWarning


def describe(path: str, check: bool = False) -> None:
    """Print what is at `path`: a run, one of its checkpoints, anything that `convert` takes, a packed run, the name of
    a model that comes with the package, or a prepared data set.

    With `check` every shard of a data set is looked at: whether it is there, and how long it is.
    """
    if "://" in path:
        _describe_checkpoint(path)
        return
    if packed := packed_files.find(path):
        _describe_packed(packed)
        return
    folder = Path(path)
    source.check_exists(folder)
    if (folder / NAME).is_file():
        _describe_data(folder, check)
    elif source.holds_weights(folder):
        _describe_weights(folder)
    else:
        _describe_checkpoint(folder)


def _describe_data(folder: Path, check: bool) -> None:
    index = load_index(folder)
    console = make_console()
    console.print(f"data set {folder}: source {index.source}, licence {index.licence}")
    if index.subset:
        console.print(f"a subset of {index.subset.whole.directory}, without a copy of its records", markup=False)
    if made := index.features:
        console.print(
            f"latents of {made['codec']['kind']}; {made['layers']} text layers of {made['text_width']} channels, at "
            f"most {made['max_tokens']} tokens, of {made['text']['kind']}; {made['dtype']}"
        )
    console.print(f"fingerprint {index.fingerprint}")
    console.print(f"captions in {', '.join(index.languages)}; held out: {', '.join(index.holdout_languages) or '-'}")
    table = Table("bucket", "captions up to", "train", "validation")
    found = defaultdict(dict)
    for stream in index.streams:
        found[stream.bucket, stream.text_class][stream.split] = stream.records
    for (bucket, most), counts in found.items():
        tokens = f"{most} tokens" if most else "any length"
        table.add_row(str(bucket), tokens, *(f"{counts.get(split, 0):,}" for split in SPLITS))
    console.print(table)
    if index.caption_classes:
        console.print(f"caption lengths counted by: {index.caption_count}")
    if index.dropped:
        console.print("left out: " + ", ".join(f"{count:,} {reason}" for reason, count in index.dropped.items()))
    if check:
        console.print(f"all {index.check():,} shards are there, as long as the index says")


def _describe_packed(path: Path) -> None:
    packed, console = packed_files.PackedFile(path), make_console()
    kind = f"adapter beside {packed.beside.path.name}" if packed.beside else "packed run"
    console.print(f"{kind} {path}: {path.stat().st_size:,} bytes, SHA-256 {packed_files.file_digest(path)}")
    shown = lambda values: ", ".join(f"{name} {value}" for name, value in values.items() if name != "kind")
    for part in ("model", "codec", "text", "defaults"):
        if isinstance(values := packed.described.get(part), dict):
            console.print(f"{part}: {shown(values)}")
    table = Table("part", "arrays", "numbers")
    for part in ("denoiser", "codec"):
        shapes = packed.shapes(part)
        table.add_row(part, str(len(shapes)), f"{sum(math.prod(shape) for shape in shapes.values()):,}")
    console.print(table)


def _describe_weights(path: Path) -> None:
    found = source.find(path)
    console = make_console()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", LensWarning)  # said in the line below
        name, defaults = source.variant_of(found)
    if found.converted:
        kind, known = "release in our layout", ""
    else:
        kind = "release folder" if found.release else "weights"
        known = " (guessed from its name)" if release.variant_of(path) else " (for want of a name that says it)"
    if "denoiser" in found.parts:
        steps, guidance = defaults.num_inference_steps, defaults.guidance_scale
        console.print(f"{kind} {path}: variant {name}{known}, {steps} steps at guidance {guidance:g}")
    else:
        console.print(f"{kind} {path}")
    table = Table("part", "arrays", "numbers", "bytes", "dtypes")
    for part in found.parts.values():
        specs = part.tensors.specs.values()
        numbers = sum(math.prod(spec.shape) for spec in specs)
        dtypes = ", ".join(sorted({str(spec.dtype) for spec in specs}))
        size = sum(spec.bytes for spec in specs)
        table.add_row(part.component.ours, str(len(specs)), f"{numbers:,}", f"{size:,}", dtypes)
    console.print(table)
    if part := found.parts.get("denoiser"):
        console.print(f"reads layers {', '.join(map(str, part.values['selected_layer_index']))} of the text encoder")


def _describe_checkpoint(path: str | Path) -> None:
    from lens_jax.inference.load import run_parts
    from lens_jax.posttraining import adapters
    from lens_jax.run import store

    folder = store.find(path)
    metadata = store.read_metadata(folder)
    config, shapes = metadata["config"], store.saved_shapes(folder)
    model, codec, _ = run_parts(config, str(folder))
    console = make_console()
    console.print(f"checkpoint {folder}: {folder.name} of {config.get('steps', 'an unknown number of')} steps")
    console.print(
        f"denoiser: {model.layers} blocks, width {model.width}, {model.heads} heads; "
        f"tokens of {codec.tile} x {codec.tile} pixels; "
        f"sizes {', '.join(f'{h}x{w}' for h, w in metadata['sizes'])}"
    )
    if (adapter := adapters.run_config(config, str(folder))).rank:
        console.print(
            f"adapter: rank {adapter.rank}, times {adapter.scale:g}, of {', '.join(adapter.targets)}, "
            f"beside {config.get('init_from')}"
        )
    for print_, place in metadata.get("position", {}).get("data", {}).items():
        console.print(f"data: {place}, fingerprint {print_}")
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
