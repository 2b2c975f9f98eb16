"""`lens-jax sample`: prompts to PNG files and a contact sheet."""

import contextlib
import dataclasses
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import jax
import numpy as np
import tyro
from rich.console import Console
from rich.progress import Progress

from lens_jax import __version__, parallel
from lens_jax.atomic import check_writable
from lens_jax.console import make_console
from lens_jax.contact_sheet import contact_sheet, save_png, slug
from lens_jax.diffusion.sampler import Solver
from lens_jax.errors import LensError
from lens_jax.inference import lora
from lens_jax.inference.pipeline import LensPipeline
from lens_jax.inference.rewrite_command import tell
from lens_jax.parallel import MeshConfig
from lens_jax.reasoner.options import ReasonerOptions
from lens_jax.reasoner.rewrite import ONE_DEVICE, Reasoner, Rewrite


@dataclasses.dataclass(frozen=True)
class SampleCommand(ReasonerOptions):
    """Draw images from a run's checkpoint, as PNGs that say how they were made, and a contact sheet."""

    # What to draw; several prompts are drawn in batches.
    prompts: tyro.conf.Positional[tuple[str, ...]]
    # A run folder, one of its checkpoints, a packed run, or a release folder (model_index.json, transformer/, vae/,
    # text_encoder/). The default is the small model that comes with the package (docs/small_world.md).
    checkpoint: str = "small"
    # Folder for the images; those that are there already are kept, and numbers go on behind theirs.
    out: str = "samples"
    # What guidance moves away from; empty is no text at all.
    negative_prompt: str = ""
    # Pixels; both or neither. The default is the squarest size the run was trained on.
    height: int | None = None
    # Pixels; both or neither.
    width: int | None = None
    # Instead of a size, one the release offers: 1024 or 1440 pixels,
    base_resolution: int | None = None
    # and a ratio W:H from 1:2 to 2:1.
    aspect_ratio: str | None = None
    # An adapter: a file (ComfyUI, PEFT, diffusers, kohya), a PEFT folder or a run that trained one, and how much of it
    # counts, FILE:0.8; the default is 1. Several are added up: --lora A --lora B:0.5.
    lora: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    # Merge the adapters into the weights before drawing, which is faster, instead of applying them beside.
    fuse_lora: bool = False
    # Euler steps; by default what suits the checkpoint: 20, or 4 for Lens-Turbo and 50 for Lens-Base.
    num_inference_steps: int | None = None
    # Guidance; 1 turns it off and saves half the time. By default what suits the checkpoint: 5, 1 for Lens-Turbo, 1.5
    # for the small model.
    guidance_scale: float | None = None
    # euler as in the release, or dpm2: of second order, as fast a step.
    solver: Solver = "euler"
    # Images of each prompt.
    num_images_per_prompt: int = 1
    # Image i starts from noise that depends on the seed, 0 to 2^64 - 1, and i alone.
    seed: int = 0
    # Images drawn at a time; 0 is what suits the checkpoint.
    batch_size: int = 0
    # What is computed in; by default what a run was trained in, and of a release bfloat16 on accelerators, float32 on a
    # CPU.
    dtype: Literal["float32", "bfloat16"] | None = None
    # Of "small": which of its files to draw with, where there are several. Of a release: which of the three it is,
    # where its folder's name does not say so.
    variant: Literal["lens", "turbo", "base"] | None = None
    # Of a run: the moving average of the parameters (--no-ema: the parameters themselves).
    ema: bool = True
    # The day the conversation around a prompt claims to be, YYYY-MM-DD; by default that of training, 2026-05-23.
    date: str | None = None
    # Of a release: cut a prompt that is too long as the original does, with the tokens that belong behind it.
    original_truncation: bool = False
    # Where the denoiser is: of a run that trained an adapter what that was trained beside, if it is elsewhere now; of a
    # release other weights.
    denoiser: str | None = None
    # Where the autoencoder is, if not in the checkpoint or where the run had it: a release folder or weights.
    autoencoder: str | None = None
    # Where the text encoder is, likewise.
    text_encoder: str | None = None
    # Where the tokenizer is: its folder, its tokenizer.json, or a release folder.
    tokenizer: str | None = None
    # Decode more than 4.3 megapixels at a time in parts, in a third of the memory; --no-tiling decodes whole.
    tiling: bool = True
    # Devices that share the work: weights are sharded over fsdp and tensor, images over data and fsdp. -1 is what is
    # left; the default is one device.
    mesh: MeshConfig = MeshConfig(fsdp=1)

    def __post_init__(self):
        if not self.prompts:
            raise LensError('give at least one prompt: lens-jax sample "red apple"')
        if self.num_images_per_prompt < 1:
            raise LensError(f"--num-images-per-prompt is {self.num_images_per_prompt}; it must be at least 1")
        if self.batch_size < 0:
            raise LensError(f"--batch-size is {self.batch_size}; it must be at least 0")


def sample_to_folder(args: SampleCommand) -> list[Path]:
    """Draw `args.prompts` and write `NNNN-prompt.png` files and `sheet.png`; returns their paths."""
    out = Path(args.out)
    check_writable(out)
    adapters = [lora.parse(place) for place in args.lora]
    mesh = _mesh(args.mesh)
    if mesh and args.reasoner == "local":
        raise LensError(ONE_DEVICE)
    args.check_reasoner()
    places = ("denoiser", "autoencoder", "text_encoder", "tokenizer")
    names = ("dtype", "variant", "date", "original_truncation", *places)
    options = {name: getattr(args, name) for name in names if getattr(args, name)}
    options |= {} if args.tiling else {"tiling": False}
    options |= {} if args.ema else {"part": "params"}
    # What writes needs the head of the vocabulary, and an image does not say whether it was loaded.
    head = {"head": True} if args.reasoner == "local" else {}
    pipe = LensPipeline.from_pretrained(args.checkpoint, **options, **mesh, **head)
    for path, scale in adapters:
        pipe.load_lora_weights(path, scale)
    if args.fuse_lora:
        pipe.fuse_lora()
    pipe.batch_size = args.batch_size or pipe.batch_size
    console = make_console()
    reasoner = args.make_reasoner(pipe.text_encoder, str(args.checkpoint))
    pipe.reasoner = reasoner and _Telling(reasoner, args, console)
    settings = {
        "negative_prompt": args.negative_prompt,
        "num_inference_steps": args.num_inference_steps or pipe.num_inference_steps,
        "guidance_scale": pipe.guidance_scale if args.guidance_scale is None else args.guidance_scale,
        "solver": args.solver,
        "seed": args.seed,
        "checkpoint": str(args.checkpoint),
        "software": f"lens-jax {__version__}",
        **options,
        **({"lora": " ".join(args.lora)} if args.lora else {}),
    }
    with contextlib.ExitStack() as stack:
        if reasoner:
            stack.callback(reasoner.close)
        progress = stack.enter_context(Progress(console=console, transient=True, disable=not console.is_terminal))
        task = progress.add_task("rewriting prompts" if reasoner else "sampling", total=None)
        output = pipe(
            list(args.prompts),
            negative_prompt=args.negative_prompt,
            height=args.height,
            width=args.width,
            base_resolution=args.base_resolution,
            aspect_ratio=args.aspect_ratio,
            num_inference_steps=args.num_inference_steps,
            guidance_scale=args.guidance_scale,
            solver=args.solver,
            num_images_per_prompt=args.num_images_per_prompt,
            seed=args.seed,
            progress=lambda done, total: progress.update(task, completed=done, total=total, description="sampling"),
        )
    images = output.images
    if output.date:
        settings["date"] = output.date
    rewrites = output.rewrites or [Rewrite(prompt, prompt, "kept") for prompt in args.prompts]
    rewrites = [rewrite for rewrite in rewrites for _ in range(args.num_images_per_prompt)]
    paths = []
    try:
        out.mkdir(parents=True, exist_ok=True)
        first = _first_free(out)
        for index, (rewrite, image) in enumerate(zip(rewrites, images)):
            path = out / f"{first + index:04d}-{slug(rewrite.prompt)}.png"
            size = {"height": image.height, "width": image.width}
            said = {} if args.reasoner == "off" else _said(rewrite)
            save_png(path, image, {"prompt": rewrite.prompt, **said, "index": index, **size, **settings})
            paths.append(path)
        sheet = out / (f"sheet-{first:04d}.png" if first else "sheet.png")
        per_prompt = args.num_images_per_prompt
        rows = [[np.asarray(i) for i in images[k : k + per_prompt]] for k in range(0, len(images), per_prompt)]
        contact_sheet(rows, args.prompts).save(sheet)
    except OSError as error:
        raise LensError(f"{out}: cannot be written: {error.strerror}") from None
    console.print(f"{len(paths)} image{'s' * (len(paths) > 1)} in {out}, all on {sheet}")
    return [*paths, sheet]


class _Telling:
    """A reasoner whose rewrites are printed before they are drawn, and stop everything where they are to."""

    def __init__(self, reasoner: Reasoner, args: SampleCommand, console: Console):
        self._reasoner, self._args, self._console = reasoner, args, console

    def rewrite(self, prompts: Sequence[str], seed: int = 0) -> list[Rewrite]:
        rewrites = self._reasoner.rewrite(prompts, seed)
        self._args.check_refusals(rewrites)
        tell(self._console, rewrites, texts=True)
        return rewrites

    def close(self) -> None:
        self._reasoner.close()


def _said(rewrite: Rewrite) -> dict[str, str]:
    """What an image says of its prompt's rewrite: the text that was drawn, where that is another, or why it is not."""
    revised = {"revised_prompt": rewrite.text} if rewrite.status == "used" else {}
    why = {"reasoner_reason": rewrite.reason} if rewrite.reason else {}
    of = {"reasoner_model": rewrite.model, "reasoner_instructions": rewrite.instructions} if rewrite.model else {}
    return {**revised, "reasoner": rewrite.status, **why, **of}


def _first_free(folder: Path) -> int:
    """The number after the last that a file of the folder begins with: nothing that was drawn is overwritten."""
    taken = [re.match(r"(?:sheet-)?(\d{4,})[-.]", path.name) for path in folder.iterdir()]
    after = max((int(match[1]) + 1 for match in taken if match), default=0)
    return max(after, 1) if (folder / "sheet.png").exists() else after


def _mesh(config: MeshConfig) -> dict:
    """The option `mesh` of a pipeline; none for one device, which is faster without."""
    sizes = [getattr(config, axis) for axis in parallel.AXES]
    count = jax.device_count() if -1 in sizes else math.prod(sizes)
    if count > jax.device_count():
        raise LensError(f"--mesh is of {count} devices; there are {jax.device_count()}")
    return {"mesh": parallel.make_mesh(config, jax.devices()[:count])} if count > 1 else {}
