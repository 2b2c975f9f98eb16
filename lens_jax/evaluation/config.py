"""The options of `lens-jax evaluate`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal


@dataclass(frozen=True)
class EvaluateConfig:
    """Measure a model of the pictogram world: by its concepts, or by what its scenes are asked to show."""

    # A run folder, one of its checkpoints, a packed run, or "small", the model that comes with the package.
    checkpoint: str = "runs/quickstart"
    # concepts: is every pictogram, drawn by its name, nearest to its own reference image? scenes: objects, counts,
    # places, colours, sizes and words of prompts that training never saw, read back from the pixels by an exact
    # checker.
    bench: Literal["concepts", "scenes"] = "concepts"
    # The pictogram data set the run was trained on: its concepts, sizes and languages. Empty is data/openmoji for
    # concepts; for scenes all 128 concepts, the five sizes of the small model, and English.
    data: str = ""
    # Languages of the prompts; () takes those of training and those held out.
    languages: tuple[str, ...] = ()
    # For scenes, sizes as HEIGHTxWIDTH, also ones that training never saw ("64x80"); () takes those of the data set.
    sizes: tuple[str, ...] = ()
    # For scenes, types of prompts; () takes all: single, two, count_2, count_3, count_4, colours, position,
    # attribution, many, size, text_3, text_4, text_5, text_6.
    tasks: tuple[str, ...] = ()
    # For scenes, prompts of each type and size.
    count: int = 8
    # Euler steps.
    num_inference_steps: int = 20
    # Guidance.
    guidance_scale: float = 5.0
    # Seed of the noise, and of the prompts of scenes.
    seed: int = 0
    # Images drawn at a time.
    batch_size: int = 64
    # Folder for the figures and the sheet; empty is the folder of the checkpoint's run, and "evaluation" for what is no
    # run.
    out: str = ""

    @property
    def folder(self) -> str:
        """Where results are written."""
        return self.out or (self.checkpoint if Path(self.checkpoint).is_dir() else "evaluation")
