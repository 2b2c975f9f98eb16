"""The options of `lens-jax evaluate`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from lens_jax.errors import LensError


@dataclass(frozen=True)
class EvaluateConfig:
    """Measure a model of the pictogram world: by its concepts, or by what its scenes are asked to show."""

    # A run folder, one of its checkpoints, a packed run, or "small", the model that comes with the package. Empty is
    # "small" for scenes and runs/quickstart for concepts.
    checkpoint: str = ""
    # Of "small" or a release: which of the variants it is.
    variant: Literal["lens", "turbo", "base"] | None = None
    # Of a run: the moving average of the parameters (--no-ema: the parameters themselves).
    ema: bool = True
    # concepts: is every pictogram, drawn by its name, nearest to its own reference image? scenes: objects, counts,
    # places, colours, sizes and words of prompts that training never saw, read back from the pixels by an exact
    # checker.
    bench: Literal["concepts", "scenes"] = "concepts"
    # The pictogram data set the run was trained on: its concepts, sizes and languages. Empty is data/openmoji for
    # concepts; for scenes all 128 concepts, the five sizes of the small model, and English.
    data: str = ""
    # Languages of the prompts; by default those of training and those held out.
    languages: tuple[str, ...] = ()
    # For scenes, sizes as HEIGHTxWIDTH, also ones that training never saw ("64x80"); by default those of the data set.
    sizes: tuple[str, ...] = ()
    # For scenes, types of prompts; by default all: single, two, count_2, count_3, count_4, colours, position,
    # attribution, many, size, text_3, text_4, text_5, text_6.
    tasks: tuple[str, ...] = ()
    # For scenes, prompts of each type and size.
    count: int = 8
    # Euler steps; by default the model's own, as `lens-jax sample` draws it. The report says which were used.
    num_inference_steps: int | None = None
    # Guidance, likewise; at 1 there is none, and a step is one pass through the network.
    guidance_scale: float | None = None
    # For scenes, prompts that are drawn several times to see how much their images differ; 0 leaves that out.
    diversity_prompts: int = 16
    # Images of each of them.
    diversity_images: int = 8
    # Seed of the noise, and of the prompts of scenes.
    seed: int = 0
    # Images drawn at a time.
    batch_size: int = 64
    # Folder for the figures and the sheet; empty is the folder of the checkpoint's run, and "evaluation" for what is no
    # run.
    out: str = ""
    # Measure nothing, but set reports of --bench scenes side by side: their scenes.json, or the folders of these. The
    # first is what the others are compared with; all must have asked for the same.
    compare: tuple[str, ...] = ()

    def __post_init__(self):
        if not self.checkpoint:
            # The field stays what is read everywhere; a report then says which model it is of.
            object.__setattr__(self, "checkpoint", "small" if self.bench == "scenes" else "runs/quickstart")
        if not 0 <= self.seed < 1 << 64:
            raise LensError(f"--seed is {self.seed}; it must be a whole number from 0 to 2^64 - 1")
        if self.diversity_prompts < 0:
            raise LensError(f"--diversity-prompts is {self.diversity_prompts}; it must be at least 0")
        if self.diversity_images < 2:
            raise LensError(f"--diversity-images is {self.diversity_images}; images differ from each other, at least 2")

    @property
    def folder(self) -> str:
        """Where results are written."""
        return self.out or (self.checkpoint if Path(self.checkpoint).is_dir() else "evaluation")
