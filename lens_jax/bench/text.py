"""`lens-jax bench text`: the features of one prompt by GPT-OSS with random weights."""

import dataclasses
import functools
import time
from typing import Literal

import jax
import jax.numpy as jnp

from lens_jax import flops
from lens_jax.bench import measure
from lens_jax.bench.sizes import SIZES, Size
from lens_jax.errors import LensError
from lens_jax.models import gpt_oss
from lens_jax.models.generate import generate
from lens_jax.models.gpt_oss import GptOssConfig


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
    # Instead, write so many tokens behind each prompt, the likeliest one each, with a cache of keys and values.
    new_tokens: int = 0
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
        for name in ("layers", "prefix", "new_tokens"):
            if getattr(self, name) < 0:
                raise LensError(f"--{name.replace('_', '-')} is {getattr(self, name)}; it must be at least 0")
        if self.against == "torch" and self.prefix:
            raise LensError(f"--prefix is {self.prefix}; with --against torch it must be 0, so that both do the same")
        if self.new_tokens and (self.prefix or self.against != "none"):
            raise LensError(f"--new-tokens is {self.new_tokens}; it goes neither with --prefix nor with --against")


def text_config(bench: TextBench) -> GptOssConfig:
    """The model of a benchmark."""
    model = SIZES[bench.size].text
    return dataclasses.replace(model, layers=bench.layers or model.layers, dtype=bench.dtype, param_dtype=bench.dtype)


def random_params(model: GptOssConfig, head: bool) -> dict:
    """Weights of a language model, drawn on the device; `head` as in `gpt_oss.init`."""
    return jax.jit(functools.partial(gpt_oss.init, model, head=head))(jax.random.key(0))


def bench_text(bench: TextBench, params: dict | None = None) -> dict:
    """Compile the layers up to the last one that is read, time them, print and return the figures.

    `params`: of `text_config(bench)`, where a caller has them already; else random ones.
    """
    model = text_config(bench)
    params = random_params(model, head=bench.new_tokens > 0) if params is None else params
    ids = jax.random.randint(jax.random.key(1), (bench.batch_size, bench.tokens), 0, model.vocab)
    lengths = jnp.full(bench.batch_size, bench.tokens, jnp.int32)
    if bench.new_tokens:
        return measure.report(bench, _write(bench, model, params, ids, lengths) | measure.peak_memory())
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
    result["seconds_per_prompt"] = seconds["jax"] / bench.batch_size
    result["tokens_per_second"] = bench.batch_size * bench.tokens / seconds["jax"]
    result |= measure.rate(operations, seconds["jax"], bench.dtype) | measure.peak_memory()
    if "torch" in seconds:
        result |= {"torch_seconds": seconds["torch"], "ratio_to_torch": seconds["jax"] / seconds["torch"]}
    return measure.report(bench, result)


def _write(bench: TextBench, model: GptOssConfig, params: dict, ids, lengths) -> dict:
    """How fast tokens are written.

    One program is timed twice: to the end, and stopped at its first token, by a stop token, which is an input. The rate
    is that of the tokens in between, so the prompts are left out.
    """

    def run(stop=()):
        options = {"max_new_tokens": bench.new_tokens, "temperature": 0, "stop_tokens": stop}
        return generate(model, params, ids, lengths, jax.random.key(2), **options)

    started = time.perf_counter()
    tokens, _ = run()
    first = time.perf_counter() - started
    firsts = tuple(tokens[:, 0].tolist())
    seconds = measure.medians({"all": run, "first": lambda: run(firsts)}, max(1, bench.repeats // 2))
    between = bench.batch_size * (bench.new_tokens - 1)
    result = {
        "tokens": bench.tokens,
        "batch_size": bench.batch_size,
        "new_tokens": bench.new_tokens,
        # With compiling.
        "first_call_seconds": first,
        "first_token_seconds": seconds["first"],
        "seconds": seconds["all"],
    }
    if seconds["all"] > seconds["first"] and between:
        result["new_tokens_per_second"] = between / (seconds["all"] - seconds["first"])
    return result
