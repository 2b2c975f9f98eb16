"""`lens-jax bench text`: the features of one prompt by GPT-OSS with random weights."""

import dataclasses
import functools
from typing import Literal

import jax
import jax.numpy as jnp

from lens_jax import flops
from lens_jax.bench import measure
from lens_jax.bench.sizes import SIZES, Size
from lens_jax.errors import LensError
from lens_jax.models import gpt_oss


@dataclasses.dataclass(frozen=True)
class TextBench:
    """The features of one batch of prompts by GPT-OSS with random weights, experts packed in 4 bits."""

    # GPT-OSS-20B (12.6 GB of weights), one of eight layers and width 1024, or one for tests.
    size: Size = "tiny"
    # Random weights of --size: the only ones there are, so this only says it.
    random_weights: bool = False
    # Layers; 0 is as many as the size has.
    layers: int = 0
    # Tokens of a prompt.
    tokens: int = 128
    # Tokens of the shared beginning, whose keys and values are computed once and not timed; 97 in the release.
    prefix: int = 0
    # Prompts at a time.
    batch_size: int = 1
    # What is computed in.
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    # Timed passes; the median is reported.
    repeats: int = 10
    # Time transformers' eager model of the same sizes in turn (needs the extra: parity). It unpacks its experts, so
    # the full model takes 84 GB in float32: give --layers 2.
    against: Literal["none", "torch"] = "none"
    # Also write the result as JSON here.
    json: str = ""

    def __post_init__(self):
        measure.check_positive(self, "tokens", "batch_size", "repeats")
        for name in ("layers", "prefix"):
            if getattr(self, name) < 0:
                raise LensError(f"--{name} is {getattr(self, name)}; it must be at least 0")
        if self.against == "torch" and self.prefix:
            raise LensError(f"--prefix is {self.prefix}; with --against torch it must be 0, so that both do the same")


def bench_text(bench: TextBench) -> dict:
    """Compile the layers up to the last one that is read, time them, print and return the figures."""
    model = SIZES[bench.size].text
    model = dataclasses.replace(model, layers=bench.layers or model.layers, dtype=bench.dtype, param_dtype=bench.dtype)
    params = jax.jit(functools.partial(gpt_oss.init, model, head=False))(jax.random.key(0))
    ids = jax.random.randint(jax.random.key(1), (bench.batch_size, bench.tokens), 0, model.vocab)
    lengths = jnp.full(bench.batch_size, bench.tokens, jnp.int32)
    past = None
    if bench.prefix:
        past = jax.jit(functools.partial(gpt_oss.prefill, model))(params, jnp.zeros(bench.prefix, jnp.int32))
    taps = (model.layers - 1,)
    features = lambda params, ids, lengths, past: gpt_oss.hidden_states(model, params, ids, lengths, taps, past)
    program, figures = measure.compiled(features, params, ids, lengths, past)
    result = {
        "parameters": gpt_oss.parameter_count(model),
        "layers": model.layers,
        "tokens": bench.tokens,
        "prefix": bench.prefix,
        "batch_size": bench.batch_size,
        "dtype": bench.dtype,
        **figures,
    }
    runs = {"jax": lambda: program(params, ids, lengths, past)}
    if bench.against == "torch":
        from lens_jax.bench import against

        runs["torch"] = against.text(model, ids)
        result["against"] = against.versions("torch", "transformers")
    seconds = measure.medians(runs, bench.repeats)
    operations = bench.batch_size * flops.gpt_oss_forward(model, bench.tokens, bench.prefix)
    result["seconds"] = seconds["jax"]
    result |= measure.rate(operations, seconds["jax"], bench.dtype) | measure.peak_memory()
    if "torch" in seconds:
        result |= {"torch_seconds": seconds["torch"], "ratio_to_torch": seconds["jax"] / seconds["torch"]}
    return measure.report(bench, result)
