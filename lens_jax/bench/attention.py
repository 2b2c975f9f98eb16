"""`lens-jax bench attention`: how far a kernel is from a plain softmax, forward and backward, and how fast it is."""

import dataclasses
import functools
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from lens_jax.bench import measure
from lens_jax.bench.distance import relative_distance
from lens_jax.errors import LensError
from lens_jax.models import attention
from lens_jax.models.attention import Kernel

# A kernel may be so many times as far from the exact result as XLA's own attention in the same dtype.
_TIMES = 2.0


@dataclasses.dataclass(frozen=True)
class AttentionBench:
    """A kernel of joint attention beside XLA's in the same dtype, both beside a float32 softmax of the same inputs."""

    # The kernel; auto is cuDNN on a GPU in half precision, splash on a TPU, blocked on a CPU and XLA elsewhere.
    kernel: Kernel = "auto"
    # Image and text tokens.
    image_tokens: int = 4096
    text_tokens: int = 150
    # Valid text tokens, one number a row; empty is one row of nothing but valid keys, without lengths.
    lengths: tuple[int, ...] = (150, 0)
    # Image tokens that are no padding, where the program serves several shapes; 0 is all, as a constant.
    valid_image: int = 0
    # Heads and their channels.
    heads: int = 24
    head_dim: int = 64
    # What it computes in.
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    # Timed passes; the median is reported.
    repeats: int = 10
    # Also write the result as JSON here.
    json: str = ""

    def __post_init__(self):
        measure.check_positive(self, "image_tokens", "heads", "head_dim", "repeats")
        if not all(0 <= length <= self.text_tokens for length in self.lengths):
            raise LensError(f"--lengths {self.lengths} must lie in 0..{self.text_tokens}, the --text-tokens")
        if not 0 <= self.valid_image <= self.image_tokens:
            raise LensError(f"--valid-image is {self.valid_image}; accepted: 0 to {self.image_tokens}")


def bench_attention(bench: AttentionBench) -> dict:
    """Run the kernel and XLA's, forward and backward, print and return errors and times.

    Errors are |a - b| / |b| over what is valid: of the result, and of the gradients of queries, keys and values.
    `equal` says whether none of the kernel's is more than twice XLA's.
    """
    kernel = attention.resolve(bench.kernel, bench.dtype, jax.default_backend())
    parts, cotangents = _inputs(bench)
    result = {"kernel": kernel, "rows": max(1, len(bench.lengths)), "dtype": bench.dtype}
    exact = _as_arrays(_plain_gradients(bench)(_to(jnp.float32, parts), cotangents))
    errors, runs = {}, {}
    for name in dict.fromkeys((kernel, "xla")):
        options = functools.partial(_mix, bench, name)
        gradients, figures = measure.compiled(_with_gradients(options), parts, cotangents)
        if name == kernel:
            result |= figures
            forward = jax.jit(options)
            runs = {"forward": lambda f=forward: f(parts), "gradient": lambda f=gradients: f(parts, cotangents)}
        found = _as_arrays(gradients(parts, cotangents))
        errors[name] = {part: relative_distance(found[part], value) for part, value in exact.items() if value.size}
    result |= {f"{part}_error": value for part, value in errors[kernel].items()}
    result |= {f"xla_{part}_error": value for part, value in errors["xla"].items()}
    rounding = float(jnp.finfo(bench.dtype).eps)
    result["equal"] = all(value <= _TIMES * errors["xla"][part] + rounding for part, value in errors[kernel].items())
    seconds = measure.medians(runs, bench.repeats)
    result |= {f"{name}_seconds": value for name, value in seconds.items()}
    return measure.report(bench, result | measure.peak_memory())


def _inputs(bench: AttentionBench):
    """((image q, k, v), (text q, k, v)) and what the gradients are taken along: zero where a query is padding."""
    rows, valid = max(1, len(bench.lengths)), bench.valid_image or bench.image_tokens
    rng = np.random.default_rng(0)
    counts = bench.image_tokens, bench.text_tokens
    draw = lambda n: rng.standard_normal((rows, n, bench.heads, bench.head_dim), np.float32)
    parts = _to(bench.dtype, tuple(tuple(draw(n) for _ in range(3)) for n in counts))
    cotangents = [draw(n) for n in counts]
    cotangents[0][:, valid:] = 0
    if bench.lengths:
        cotangents[1][np.arange(bench.text_tokens) >= np.array(bench.lengths)[:, None]] = 0
    return parts, tuple(map(jnp.asarray, cotangents))


def _to(dtype, parts):
    return jax.tree.map(lambda x: jnp.asarray(x, dtype), parts)


def _mix(bench: AttentionBench, kernel: Kernel, parts):
    valid = bench.valid_image or bench.image_tokens
    lengths = jnp.array(bench.lengths, jnp.int32) + valid if bench.lengths else None
    return attention.attend(*parts, lengths, jnp.int32(valid) if bench.valid_image else None, kernel)


def _plain_gradients(bench: AttentionBench):
    """The reference: every row by itself with its valid keys alone, in float32 without rounded products."""
    valid = bench.valid_image or bench.image_tokens

    def row(image, text, length):
        q, k, v = (jnp.concatenate([x[:valid], y[:length]]) for x, y in zip(image, text))
        scores = jnp.einsum("qhd,khd->hqk", q, k, precision="highest") * bench.head_dim**-0.5
        mixed = jnp.einsum("hqk,khd->qhd", jax.nn.softmax(scores), v, precision="highest")
        pad = lambda x, n: jnp.pad(x, ((0, n - len(x)), (0, 0), (0, 0)))
        return pad(mixed[:valid], bench.image_tokens), pad(mixed[valid:], bench.text_tokens)

    def mix(parts):
        image, text = parts
        lengths = bench.lengths or (bench.text_tokens,)
        pick = lambda part, i: tuple(x[i] for x in part)
        mixed = [row(pick(image, i), pick(text, i), length) for i, length in enumerate(lengths)]
        return tuple(jnp.stack(part) for part in zip(*mixed))

    return jax.jit(_with_gradients(mix))


def _with_gradients(mix):
    """(parts, cotangents) -> (result, gradients), the result zeroed where its cotangent is: padding."""

    def run(parts, cotangents):
        mixed, back = jax.vjp(mix, parts)
        (gradients,) = back(tuple(c.astype(m.dtype) for m, c in zip(mixed, cotangents)))
        return tuple(jnp.where(c == 0, 0, m) for m, c in zip(mixed, cotangents)), gradients

    return run


def _as_arrays(outputs) -> dict[str, np.ndarray]:
    """By name, image and text joined: the result, and the gradients of queries, keys and values."""
    mixed, (image, text) = outputs
    join = lambda *pair: np.concatenate([np.asarray(x, np.float32).ravel() for x in pair])
    gradients = {name: join(x, y) for name, x, y in zip(("query", "key", "value"), image, text)}
    return {"forward": join(*mixed), **gradients}
