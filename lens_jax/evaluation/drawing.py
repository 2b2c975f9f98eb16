"""With how many steps and what guidance a benchmark draws: what it is told, else what suits the model."""

from lens_jax.evaluation.config import EvaluateConfig
from lens_jax.inference import arguments
from lens_jax.inference.pipeline import LensPipeline


def open_pipeline(config: EvaluateConfig) -> LensPipeline:
    """The model, set to draw with the steps and the guidance of the config, or as it is where that says neither."""
    options = {"variant": config.variant} if config.variant else {}
    options |= {} if config.ema else {"part": "params"}
    pipe = LensPipeline.from_pretrained(config.checkpoint, **options)
    pipe.batch_size = config.batch_size
    if config.num_inference_steps is not None:
        pipe.num_inference_steps = arguments.whole("num_inference_steps", config.num_inference_steps)
    if config.guidance_scale is not None:
        pipe.guidance_scale = arguments.number("guidance_scale", config.guidance_scale)
    return pipe


def drawn_with(pipe: LensPipeline) -> dict[str, int | float]:
    """Steps, guidance, and passes through the network that an image takes with them."""
    steps, guidance = pipe.num_inference_steps, pipe.guidance_scale
    passes = steps if guidance == 1 else 2 * steps
    return {"num_inference_steps": steps, "guidance_scale": guidance, "network_passes": passes}
