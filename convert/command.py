"""`lens-jax convert`: releases and single files to our layout, and back."""

import contextlib
import dataclasses
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal

import tyro
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from lens_jax.console import make_console
from lens_jax.convert import lora_files, native, release, source, verify
from lens_jax.convert.component import COMPONENTS
from lens_jax.convert.lora import Adapter
from lens_jax.convert.lora_names import Style
from lens_jax.errors import LensError, LensWarning
from lens_jax.inference.lora import parse
from lens_jax.posttraining.adapters import read, read_run, run_config


@dataclasses.dataclass(frozen=True)
class ToJax:
    """Convert a release, or weights of its networks, to our layout: the numbers under the paths of our parameter trees.

    Files are recognised by their tensors: safetensors of ComfyUI (bfloat16, MXFP8, NVFP4, bundles) and GGUF.
    """

    # A release folder (model_index.json, transformer/, vae/, text_encoder/), or a file of one network or several.
    src: tyro.conf.Positional[str]
    # The folder to write; it must not be there.
    dst: tyro.conf.Positional[str]
    # Weights used instead of those in SRC, or beside them: a file, a folder, or a release folder that has them.
    denoiser: str | None = None
    autoencoder: str | None = None
    text_encoder: str | None = None
    # The tokenizer: a tokenizer.json or a folder that has one. Without it the result takes prompt_embeds only.
    tokenizer: str | None = None
    # Which of the three it is, for default steps and guidance; guessed from the name of SRC or of the denoiser.
    variant: Literal["lens", "turbo", "base"] | None = None
    # Read everything back and compare it, bit for bit, with the source: tensors, configs, tokenizer, a forward pass.
    verify: bool = False


@dataclasses.dataclass(frozen=True)
class ToTorch:
    """Write a release folder from our layout, or the `transformer/` of one from a training run.

    A run's has the index and the schedule of a release too; vae, text_encoder and tokenizer of one beside them make it
    whole. Of a run that trained an adapter, the denoiser that it was trained beside with the adapter merged into it.
    """

    # A folder in our layout, or a run or one of its checkpoints.
    src: tyro.conf.Positional[str]
    # The folder to write, or the file of an adapter; it must not be there.
    dst: tyro.conf.Positional[str]
    # An adapter to merge into the denoiser: a file (ComfyUI, PEFT, diffusers, kohya), a PEFT folder or a run that
    # trained one, and how much of it counts, FILE:0.8; the default is 1. Several: --lora A --lora B:0.5.
    lora: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    # Of a run that trained an adapter: write that alone.
    lora_only: bool = False
    # With --lora-only, for which program: comfy, diffusers and kohya are a file (DST ends in .safetensors), peft is a
    # folder.
    style: Style = "comfy"
    # With --lora-only, what a prompt must say to mean it; it is written beside rank, alpha and base model.
    trigger: str = ""
    # Of a run that trained an adapter: what it was trained beside, where it is elsewhere now.
    denoiser: str | None = None
    # Of the denoiser; by default what it has.
    dtype: Literal["f32", "bf16"] | None = None
    # Of a run: the moving average of the parameters (--no-ema: the parameters themselves).
    ema: bool = True
    # One file a component, whatever its size.
    single_file: bool = False
    # Read everything back and compare it, bit for bit, with the source in the dtype that was asked for: tensors,
    # configs, tokenizer, a forward pass of each network.
    verify: bool = False


@dataclasses.dataclass(frozen=True)
class Pack:
    """Write the denoiser of a run, the codec that was fitted for it and its configs as one file to draw from.

    Of a run that trained an adapter, the denoiser that it was trained beside with the adapter merged into it; or, with
    --beside, the adapter alone, which is drawn with as the whole while that file is in the same folder.

    lens-jax sample "red apple" --checkpoint FILE
    """

    # A run or one of its checkpoints.
    src: tyro.conf.Positional[str]
    # The .safetensors file to write; it must not be there.
    dst: tyro.conf.Positional[str]
    # Of the denoiser.
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    # How the file is drawn from unless told otherwise; by default as the run is: in 20 steps at guidance 5, or one that
    # was distilled in its few steps without guidance.
    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    # Of a run that trained an adapter: the packed file that it was trained beside (its --init-from).
    beside: str | None = None


def pack(config: Pack) -> None:
    """Run the command."""
    from lens_jax.inference import packed

    path = Path(config.dst)
    if path.suffix != ".safetensors":
        raise LensError(f"{path}: the name of the file must end in .safetensors")
    if path.exists():
        raise LensError(f"{path}: is there already; choose another name")
    packed.write(config.src, path, config.dtype, config.num_inference_steps, config.guidance_scale, config.beside)
    make_console().print(f"{path}: {path.stat().st_size / 1e6:.1f} MB, {config.dtype}")


def to_jax(config: ToJax) -> None:
    """Convert, and verify if asked to; says what was written."""
    target = Path(config.dst)
    origin = source.find(Path(config.src), {place: getattr(config, place) for place in source.PLACES})
    console = make_console()
    for line in origin.recognised():
        console.print(f"recognised {line}", soft_wrap=True)
    total = sum(spec.bytes for part in origin.parts.values() for spec in part.tensors.specs.values())
    with _progress("converting", total) as advance:
        found = native.to_jax(origin, target, config.variant, advance)
    console.print(f"{', '.join(c.ours for c in found)} in {target}")
    if others := native.left_out(origin):
        more = f" and {len(others) - 6} more" if len(others) > 6 else ""
        console.print(f"not part of it, and not copied: {', '.join(others[:6])}{more}", soft_wrap=True, markup=False)
    if config.verify:
        with _progress("verifying", total) as advance:
            compared = verify.to_jax(origin, target, advance)
        console.print(f"{compared} compared with {origin.path}: all equal to the bit")


def to_torch(config: ToTorch) -> None:
    """Convert; says what was written."""
    origin, target = Path(config.src), Path(config.dst)
    source.check_exists(origin)
    if not origin.is_dir():
        raise LensError(f"{origin}: not a folder; give one in our layout (lens.json), or a run")
    if config.lora_only:
        _write_adapter(config)
        return
    if config.trigger or config.style != "comfy":
        raise LensError("--style and --trigger are of an adapter alone; give --lora-only too")
    adapters: list[tuple[Adapter, float]] = []
    if release.is_native(origin):
        weights, model = origin, COMPONENTS[0].config(origin / "release")
    else:
        weights, adapters = _trained(origin, config)
        model = weights.config
    adapters += [(read(path, model), scale) for path, scale in map(parse, config.lora)]
    with _progress("converting", None) as advance:
        written = native.to_torch(weights, target, config.dtype, config.single_file, advance, adapters)
    console = make_console()
    console.print(f"{', '.join(written)} in {target}")
    if config.verify:
        with _progress("verifying", None) as advance:
            compared = verify.to_torch(weights, target, config.dtype, advance, adapters)
        console.print(f"{compared} compared with {origin}: all equal to the bit")


def _write_adapter(config: ToTorch) -> None:
    """The adapter of a run in some style; says what was written."""
    if config.lora or config.single_file or config.verify:
        raise LensError("--lora-only writes the adapter of a run as it is; --lora, --single-file and --verify are not "
                        "for it")  # fmt: skip
    adapter, _ = read_run(config.src, "ema" if config.ema else "params")
    adapter = dataclasses.replace(adapter, trigger=config.trigger)
    lora_files.write(Path(config.dst), adapter, config.style, native.DTYPES[config.dtype] if config.dtype else None)
    make_console().print(
        f"an adapter of rank {adapter.rank}, alpha {adapter.alpha:g}, of {len(adapter.factors)} modules in {config.dst}"
    )


def _trained(run: Path, options: ToTorch) -> tuple[native.Trained, list[tuple[Adapter, float]]]:
    """The denoiser of a run's newest checkpoint: its moving average, or the parameters themselves.

    Of one that trained an adapter what that was trained beside, and the adapter.
    """
    from lens_jax.inference.load import abstract_denoiser, base_of, run_parts
    from lens_jax.run import store

    folder = store.find(run)
    metadata = store.read_metadata(folder)
    config = metadata["config"]
    model, _, text = run_parts(config, str(folder))
    selected = getattr(text, "selected", None)
    if selected is None:
        # The release knows no other encoder than GPT-OSS; the numbers are right all the same.
        selected = tuple(range(text.num_layers))
        message = f"{run}: trained on {type(text).__name__}, which no release has; selected_layer_index means nothing"
        warnings.warn(message, LensWarning, stacklevel=2)
    part, adapters = "ema" if options.ema else "params", []
    start = str(config.get("init_from") or "")
    variant = release.variant_of(Path(start)) if start and "://" not in start else None
    if metadata.get("sampling") is not None:
        # It was distilled: what it began with is drawn in other steps.
        variant = "turbo"
    title = {"turbo": "Lens-Turbo", "base": "Lens-Base"}.get(variant, "Lens")
    if run_config(config, str(folder)).rank:
        params = base_of(config, str(folder), options.denoiser)
        adapters = [(read_run(run, part)[0], 1.0)]
    elif options.denoiser:
        raise LensError(f"{run}: --denoiser is not for this run: it has trained its own")
    else:
        params = store.load(folder, {part: {"denoiser": abstract_denoiser(model)}}, partial=True)[part]["denoiser"]
    return native.Trained(model, params, selected, f"{title}, trained by lens-jax"), adapters


@contextlib.contextmanager
def _progress(title: str, total: int | None) -> Iterator[native.Progress]:
    columns = TextColumn(title), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn()
    console = make_console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(title, total=total)
        yield lambda name, count: progress.advance(task, count)
