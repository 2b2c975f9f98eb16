"""`lens-jax sample`: prompts to PNG files and a contact sheet."""

import dataclasses
from pathlib import Path
from typing import Literal

import numpy as np
import tyro
from rich.progress import Progress

from lens_jax import __version__
from lens_jax.console import make_console
from lens_jax.contact_sheet import contact_sheet, save_png, slug
from lens_jax.errors import LensError
from lens_jax.inference.pipeline import LensPipeline


@dataclasses.dataclass(frozen=True)
class SampleConfig:
    """Draw images from a run's checkpoint, as PNGs that say how they were made, and a contact sheet."""

    # What to draw; several prompts are drawn in batches.
    prompts: tyro.conf.Positional[tuple[str, ...]]
    # A run folder, one of its checkpoints, or a release folder (model_index.json, transformer/, vae/, text_encoder/).
    checkpoint: str = "runs/quickstart"
    # Folder for the images.
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
    # Euler steps; by default what suits the checkpoint: 20, or 4 for Lens-Turbo and 50 for Lens-Base.
    num_inference_steps: int | None = None
    # Guidance; 1 turns it off and saves half the time. By default 5, or 1 for Lens-Turbo.
    guidance_scale: float | None = None
    # Images of each prompt.
    num_images_per_prompt: int = 1
    # Image i starts from noise that depends on the seed and i alone.
    seed: int = 0
    # Images drawn at a time; 0 is what suits the checkpoint.
    batch_size: int = 0
    # What is computed in; by default what a run was trained in, and of a release bfloat16 on accelerators, float32 on a
    # CPU.
    dtype: Literal["float32", "bfloat16"] | None = None
    # Of a release: which of the three it is, where its folder's name does not say so.
    variant: Literal["lens", "turbo", "base"] | None = None
    # Of a release: the day the conversation around a prompt claims to be, YYYY-MM-DD; by default 2026-05-23.
    date: str | None = None
    # Of a release: cut a prompt that is too long as the original does, with the tokens that belong behind it.
    original_truncation: bool = False

    def __post_init__(self):
        if not self.prompts:
            raise LensError('give at least one prompt: lens-jax sample "red apple" --checkpoint RUN')
        if self.num_images_per_prompt < 1:
            raise LensError(f"--num-images-per-prompt is {self.num_images_per_prompt}; it must be at least 1")
        if self.batch_size < 0:
            raise LensError(f"--batch-size is {self.batch_size}; it must be at least 0")


def sample_to_folder(args: SampleConfig) -> list[Path]:
    """Draw `args.prompts` and write `NNNN-prompt.png` files and `sheet.png`; returns their paths."""
    options = {name: getattr(args, name) for name in ("dtype", "variant", "date", "original_truncation")}
    options = {name: value for name, value in options.items() if value}
    pipe = LensPipeline.from_pretrained(args.checkpoint, **options)
    pipe.batch_size = args.batch_size or pipe.batch_size
    console = make_console()
    settings = {
        "negative_prompt": args.negative_prompt,
        "num_inference_steps": args.num_inference_steps or pipe.num_inference_steps,
        "guidance_scale": pipe.guidance_scale if args.guidance_scale is None else args.guidance_scale,
        "seed": args.seed,
        "checkpoint": str(args.checkpoint),
        "software": f"lens-jax {__version__}",
        **options,
    }
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("sampling", total=None)
        output = pipe(
            list(args.prompts),
            negative_prompt=args.negative_prompt,
            height=args.height,
            width=args.width,
            base_resolution=args.base_resolution,
            aspect_ratio=args.aspect_ratio,
            num_inference_steps=args.num_inference_steps,
            guidance_scale=args.guidance_scale,
            num_images_per_prompt=args.num_images_per_prompt,
            seed=args.seed,
            progress=lambda done, total: progress.update(task, completed=done, total=total),
        )
    images = output.images
    if output.date:
        settings["date"] = output.date
    prompts = [prompt for prompt in args.prompts for _ in range(args.num_images_per_prompt)]
    out = Path(args.out)
    paths = []
    try:
        out.mkdir(parents=True, exist_ok=True)
        for index, (prompt, image) in enumerate(zip(prompts, images)):
            path = out / f"{index:04d}-{slug(prompt)}.png"
            size = {"height": image.height, "width": image.width}
            save_png(path, image, {"prompt": prompt, "index": index, **size, **settings})
            paths.append(path)
        sheet = out / "sheet.png"
        per_prompt = args.num_images_per_prompt
        rows = [[np.asarray(i) for i in images[k : k + per_prompt]] for k in range(0, len(images), per_prompt)]
        contact_sheet(rows, args.prompts).save(sheet)
    except OSError as error:
        raise LensError(f"{out}: cannot be written: {error.strerror}") from None
    console.print(f"{len(paths)} images in {out}, all on {sheet}")
    return [*paths, sheet]
