"""`lens-jax bench student`: prompts to images by a distilled model and by its teacher, in turn."""

import dataclasses
import itertools
from typing import Literal

from lens_jax.bench import measure
from lens_jax.inference.pipeline import LensPipeline

Variant = Literal["lens", "turbo", "base"]


@dataclasses.dataclass(frozen=True)
class StudentBench:
    """Prompts to images, end to end: a student and its teacher, each drawn as suits it unless told otherwise.

    A prompt is a new one each time, so that no text is found encoded already.
    """

    # The student: a run, a packed run, a release folder, or "small", which comes with the package.
    checkpoint: str = "small"
    # Of "small" or a release: which variant it is.
    variant: Variant | None = None
    # The teacher, likewise.
    teacher: str = "small"
    teacher_variant: Variant | None = None
    # Its steps and guidance; by default its own.
    teacher_steps: int | None = None
    teacher_guidance: float | None = None
    # Pixels of the image; by default what suits the student.
    height: int | None = None
    width: int | None = None
    # Images at a time, each of a prompt of its own.
    batch_size: int = 1
    # Timed calls of each; the medians are reported.
    repeats: int = 5
    # Also write the result as JSON here.
    json: str = ""

    def __post_init__(self):
        measure.check_positive(self, "batch_size", "repeats")


def bench_student(bench: StudentBench) -> dict:
    """Draw, print and return the figures: seconds of each, their ratio, and the passes through the network."""
    student = _open(bench.checkpoint, bench.variant, bench.batch_size)
    teacher = _open(bench.teacher, bench.teacher_variant, bench.batch_size)
    if bench.teacher_steps is not None:
        teacher.num_inference_steps = bench.teacher_steps
    if bench.teacher_guidance is not None:
        teacher.guidance_scale = bench.teacher_guidance
    size = {"height": bench.height or student.default_size[0], "width": bench.width or student.default_size[1]}
    numbers = itertools.count()
    prompts = lambda: [f"red apple number {next(numbers)}" for _ in range(bench.batch_size)]
    runs = {
        "student": lambda: student(prompts(), **size).images and None,
        "teacher": lambda: teacher(prompts(), **size).images and None,
    }
    seconds = measure.medians(runs, bench.repeats)
    result = {"pixels": f"{size['height']} x {size['width']}", "batch_size": bench.batch_size}
    for name, pipe in (("student", student), ("teacher", teacher)):
        result |= {
            f"{name}_steps": pipe.num_inference_steps,
            f"{name}_guidance": pipe.guidance_scale,
            f"{name}_passes": pipe.num_inference_steps * (1 if pipe.guidance_scale == 1 else 2),
            f"{name}_seconds": seconds[name],
        }
    result["student_over_teacher"] = seconds["student"] / seconds["teacher"]
    return measure.report(bench, result)


def _open(checkpoint: str, variant: Variant | None, batch_size: int) -> LensPipeline:
    pipe = LensPipeline.from_pretrained(checkpoint, **({"variant": variant} if variant else {}))
    pipe.batch_size = batch_size
    return pipe
