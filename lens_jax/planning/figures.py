"""`lens-jax plan --report`: the compute figures of the report, each derived anew from its inputs.

The report states hours and a ratio; operations and shares of the peak are not in it. They follow from its table of
stages and from the exact count of one forward pass.
"""

import dataclasses

from lens_jax import flops
from lens_jax.atomic import write_json
from lens_jax.console import make_console
from lens_jax.encoders.harmony import PREFIX_TOKENS
from lens_jax.models.autoencoder import AutoencoderConfig
from lens_jax.models.denoiser import LENS
from lens_jax.models.gpt_oss import GPT_OSS_20B

# Report, section 3: two stages of 400,000 steps; in the first a global batch of 3,072 images of 512², in the second
# 128 ranks with 24, 10 or 6 images of 512², 768² or 1024² each.
STEPS, BATCH, RANKS = 400_000, 3072, 128
RANK_BATCHES = {32: 24, 48: 10, 64: 6}
# Report: 192,000 hours of A100; Z-Image's own report: 314,000 hours of H800.
LENS_HOURS, Z_IMAGE_HOURS = 192_000, 314_000
# Not in the report: captions of 109 words are about 150 tokens.
CAPTION_TOKENS = 150


@dataclasses.dataclass(frozen=True)
class ReportConfig:
    """The compute figures of the report, derived from its inputs."""

    # Also write them as JSON here.
    json: str = ""


@dataclasses.dataclass(frozen=True)
class Figure:
    """One figure, with all it takes to check it by hand."""

    name: str
    value: float
    shown: str
    inputs: str
    formula: str
    caveat: str


def figures() -> list[Figure]:
    """The figures in the order in which they build on each other."""
    forward = {side: flops.denoiser_forward(LENS, side**2, CAPTION_TOKENS) for side in RANK_BATCHES}
    first = STEPS * BATCH * 3 * forward[32]
    by_area = [count * forward[side] for side, count in RANK_BATCHES.items()]
    second = STEPS * RANKS * 3 * sum(by_area) / len(by_area)
    total = first + second
    a100, h800 = flops.peak("a100"), flops.peak("h800")
    budget = LENS_HOURS * 3600 * a100
    images = {32: STEPS * BATCH + STEPS * RANKS * 24 / 3, 48: STEPS * RANKS * 10 / 3, 64: STEPS * RANKS * 6 / 3}
    encode = sum(n * flops.autoencoder_encode(AutoencoderConfig(), side, side) for side, n in images.items())
    text = sum(images.values()) * flops.gpt_oss_forward(GPT_OSS_20B, PREFIX_TOKENS + CAPTION_TOKENS)
    tera = lambda x: f"{x / 1e12:,.2f}e12"
    return [
        Figure(
            "stage 1, 512²", first, f"{first:.3g} FLOP",
            f"{STEPS:,} steps, {BATCH:,} images; {tera(forward[32])} for 1,024 + {CAPTION_TOKENS} tokens",
            "steps x images x 3 x forward",
            "150 text tokens an image are our estimate; the report states neither tokens nor FLOP",
        ),
        Figure(
            "stage 2, mixed areas", second, f"{second:.3g} FLOP",
            f"{STEPS:,} steps, {RANKS} ranks with 24, 10 or 6 images; {', '.join(map(tera, forward.values()))}",
            "steps x ranks x 3 x mean over areas of (images x forward)",
            "areas taken as equally likely and as squares; the report states no probabilities",
        ),
        Figure(
            "pre-training", total, f"{total:.3g} FLOP", "the two stages", "stage 1 + stage 2",
            f"the denoiser alone; frozen encoders add {encode:.2g} (autoencoder) and {text:.2g} (GPT-OSS)",
        ),
        Figure(
            "MFU", total / budget, f"{total / budget:.1%}",
            f"{LENS_HOURS:,} A100 hours, {a100 / 1e12:.0f}e12 FLOP/s",
            "pre-training / (hours x 3600 x peak)",
            "whether the hours hold pre-training alone is not said; they fit 800,000 steps of 6.75 s on 128 devices",
        ),
        Figure(
            "HFU", 4 / 3 * total / budget, f"{4 / 3 * total / budget:.1%}", "as MFU", "MFU x 4 / 3",
            "gradient checkpointing taken as one more forward pass; padding and encoders not counted",
        ),
        Figure(
            "MFU with encoders", (total + encode + text) / budget, f"{(total + encode + text) / budget:.1%}",
            "as MFU; every image and caption encoded while training",
            "(pre-training + encoders) / (hours x 3600 x peak)",
            "whether features were cached is not said",
        ),
        Figure(
            "share of Z-Image", LENS_HOURS * a100 / (Z_IMAGE_HOURS * h800),
            f"{LENS_HOURS * a100 / (Z_IMAGE_HOURS * h800):.1%}",
            f"{LENS_HOURS:,} h x {a100 / 1e12:.0f}e12, {Z_IMAGE_HOURS:,} h x {h800 / 1e12:.1f}e12",
            "(hours x peak) / (hours x peak)",
            "a ratio of peak budgets, no FLOP in it; Z-Image's hours are its whole training, Lens's leave out "
            "captioning, RL and distillation",
        ),
        Figure(
            "at 40 % MFU", total / (0.4 * a100 * 3600), f"{total / (0.4 * a100 * 3600):,.0f} A100 h",
            "pre-training", "pre-training / (0.4 x peak x 3600)",
            f"or {total / (0.4 * flops.peak('h100') * 3600):,.0f} H100 h; the denoiser alone",
        ),
    ]  # fmt: skip


def report(options: ReportConfig) -> None:
    """Print the figures, one after the other, and write them where `--json` says."""
    found = figures()
    console = make_console()
    for figure in found:
        console.print(f"{figure.name}: {figure.shown}")
        for name in ("formula", "inputs", "caveat"):
            console.print(f"  {name:8} {getattr(figure, name)}")
    if options.json:
        write_json(options.json, [dataclasses.asdict(figure) for figure in found])
