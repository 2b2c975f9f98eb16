"""Text from the language model: one compiled program reads the prompt and writes token after token."""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from lens_jax.errors import LensError
from lens_jax.models import gpt_oss
from lens_jax.models.gpt_oss import GptOssConfig


def generate(
    config: GptOssConfig,
    params: dict,
    ids: np.ndarray,
    lengths: np.ndarray,
    key: jax.Array,
    *,
    max_new_tokens: int,
    temperature: float = 0.7,
    stop_tokens: Sequence[int] = (),
    pad_token: int = 0,
) -> tuple[np.ndarray, np.ndarray]:
    """Continue B prompts.

    Args:
      ids: int [B, T], right padded.
      lengths: int [B] tokens of each prompt, at least 1.
      key: decides every draw; row i of step s draws from (key, s, i), whatever else is in the batch.
      max_new_tokens: where a row ends that meets no stop token. Part of the program's shape, like B and T.
      temperature: 0 always takes the likeliest token.
      stop_tokens: a row ends with the first of these.
      pad_token: what fills a row behind its end.

    Returns new tokens int32 [B, max_new_tokens] and how many of each row count, the stop token included.
    """
    ids, lengths = np.asarray(ids, np.int32), np.asarray(lengths, np.int32)
    if ids.ndim != 2 or lengths.shape != ids.shape[:1] or not ids.size:
        raise LensError(
            f"prompts are {list(ids.shape)} tokens and {list(lengths.shape)} lengths; [B, T] and [B] needed"
        )
    if lengths.min() < 1 or lengths.max() > ids.shape[1]:
        raise LensError(f"prompt lengths {lengths.tolist()} must lie in 1..{ids.shape[1]}")
    if max_new_tokens < 1 or not temperature >= 0:
        raise LensError(f"max_new_tokens {max_new_tokens} must be at least 1 and temperature {temperature} at least 0")
    # Filled up with -1, which is no token, so that lists of different lengths share a program.
    stop = np.full(-(-(len(stop_tokens) + 1) // 8) * 8, -1, np.int32)
    stop[: len(stop_tokens)] = stop_tokens
    tokens, counts = _generate(
        config, max_new_tokens, params, ids, lengths, key, jnp.float32(temperature), stop, pad_token
    )
    return np.asarray(tokens), np.asarray(counts)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _generate(config: GptOssConfig, limit: int, params, ids, lengths, key, temperature, stop, pad):
    batch, width = ids.shape
    last = (config.layers - 1,)

    def choose(logits, step):
        """The next token of each row [B] from float32 logits [B, vocab]."""
        draw = lambda row, x: jax.random.categorical(jax.random.fold_in(jax.random.fold_in(key, step), row), x)
        drawn = jax.vmap(draw)(jnp.arange(batch), logits / jnp.maximum(temperature, 1e-6))
        return jnp.where(temperature > 0, drawn, logits.argmax(-1)).astype(jnp.int32)

    def run(ids, positions, valid, cache):
        x = gpt_oss.embed(config, params, ids)
        (x,), cache = gpt_oss.run(config, params, x, positions, valid, last, gpt_oss.write_cache(positions), cache)
        return x, cache

    with jax.named_scope("prefill"):
        positions = jnp.broadcast_to(jnp.arange(width), ids.shape)
        # Padding is cached too, at positions that the row's new tokens overwrite before they come into sight.
        cache = gpt_oss.empty_cache(config, batch, width + limit)
        x, cache = run(ids, positions, positions < lengths[:, None], cache)
        first = choose(gpt_oss.unembed(config, params, x[jnp.arange(batch), lengths - 1]), 0)

    def body(carry):
        step, latest, done, tokens, counts, cache = carry
        tokens = tokens.at[:, step].set(jnp.where(done, pad, latest))
        counts = counts + ~done
        done = done | jnp.isin(latest, stop)
        x, cache = run(latest[:, None], (lengths + step)[:, None], ~done[:, None], cache)
        return step + 1, choose(gpt_oss.unembed(config, params, x[:, 0]), step + 1), done, tokens, counts, cache

    def unfinished(carry):
        step, _, done, *_ = carry
        return (step < limit) & ~done.all()

    with jax.named_scope("decode"):
        none = jnp.zeros(batch, bool)
        tokens = jnp.full((batch, limit), pad, jnp.int32)
        carry = (0, first, none, tokens, jnp.zeros(batch, jnp.int32), cache)
        _, _, _, tokens, counts, _ = jax.lax.while_loop(unfinished, body, carry)
    return tokens, counts
