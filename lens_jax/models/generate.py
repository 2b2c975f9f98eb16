"""Text from the language model: one compiled program reads the prompt and writes token after token."""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lens_jax.errors import LensError
from lens_jax.models import gpt_oss
from lens_jax.models.gpt_oss import GptOssConfig


class Opening(NamedTuple):
    """What brings a row that thinks first to its answer, and limits both."""

    # Tokens that open the answer when the row writes them.
    header: tuple[int, ...]
    # Tokens that are put in where a row has not opened it in time; they end with the header.
    forced: tuple[int, ...]
    # Tokens that a row may write before it opens the answer.
    before: int
    # Tokens of the answer, its stop token included.
    limit: int

    @property
    def longest(self) -> int:
        """Tokens of a row at most."""
        return self.before + len(self.forced) + self.limit


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
    past: tuple[jax.Array, jax.Array] | None = None,
    rows: Sequence[int] | None = None,
    opening: Opening | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Continue B prompts.

    Args:
      ids: int [B, T], right padded.
      lengths: int [B] tokens of each prompt; a row of none is idle, and writes nothing.
      key: decides every draw; row i of step s draws from (key, s, rows[i]), whatever else is in the batch.
      max_new_tokens: where a row ends that meets no stop token. Part of the program's shape, like B and T.
      temperature: 0 always takes the likeliest token.
      stop_tokens: a row ends with the first of these.
      pad_token: what fills a row behind its end.
      past: keys and values of a shared beginning from `gpt_oss.prefill`, of all layers, as if its P tokens stood before
        every row.
      rows: numbers of the rows, 0 to B - 1 by default.
      opening: how a row comes to its answer; `max_new_tokens` must hold `opening.longest`.

    Returns new tokens int32 [B, max_new_tokens] and how many of each row count, the stop token included.
    """
    ids, lengths = np.asarray(ids, np.int32), np.asarray(lengths, np.int32)
    if ids.ndim != 2 or lengths.shape != ids.shape[:1] or not ids.size:
        raise LensError(
            f"prompts are {list(ids.shape)} tokens and {list(lengths.shape)} lengths; [B, T] and [B] needed"
        )
    if lengths.min() < 0 or lengths.max() > ids.shape[1]:
        raise LensError(f"prompt lengths {lengths.tolist()} must lie in 0..{ids.shape[1]}")
    if max_new_tokens < 1 or not temperature >= 0:
        raise LensError(f"max_new_tokens {max_new_tokens} must be at least 1 and temperature {temperature} at least 0")
    if past is not None and len(past[0]) != config.layers:
        raise LensError(f"the shared beginning is of {len(past[0])} layers; text needs all {config.layers}")
    if opening is not None:
        _check_opening(opening, max_new_tokens)
    # Filled up with -1, which is no token, so that lists of different lengths share a program.
    stop = np.full(-(-(len(stop_tokens) + 1) // 8) * 8, -1, np.int32)
    stop[: len(stop_tokens)] = stop_tokens
    rows = np.arange(len(ids), dtype=np.int32) if rows is None else np.asarray(rows, np.int32)
    if rows.shape != lengths.shape:
        raise LensError(f"numbers of rows are {list(rows.shape)}; one for each of the {len(ids)} prompts is needed")
    led = opening and tuple(map(np.int32, opening))
    warmth = jnp.float32(temperature)
    tokens, counts = _generate(
        config, max_new_tokens, params, ids, lengths, key, warmth, stop, pad_token, past, rows, led
    )
    return np.asarray(tokens), np.asarray(counts)


def _check_opening(opening: Opening, max_new_tokens: int) -> None:
    header, forced = opening.header, opening.forced
    if not header or forced[-len(header) :] != header:
        raise LensError(f"an answer's header {header} must end what is forced, {forced}")
    if opening.before < 1 or opening.limit < 1 or opening.longest > max_new_tokens:
        raise LensError(
            f"{opening.before} tokens before an answer, {len(forced)} that open it and {opening.limit} of it must be "
            f"at least 1 each, and {max_new_tokens} at most together"
        )


@functools.partial(jax.jit, static_argnums=(0, 1))
def _generate(config: GptOssConfig, limit: int, params, ids, lengths, key, temperature, stop, pad, past, rows, opening):
    batch, width = ids.shape
    last = (config.layers - 1,)
    start = past[0].shape[2] if past else 0

    def choose(logits, step):
        """The next token of each row [B] from float32 logits [B, vocab]."""
        draw = lambda row, x: jax.random.categorical(jax.random.fold_in(jax.random.fold_in(key, step), row), x)
        drawn = jax.vmap(draw)(rows, logits / jnp.maximum(temperature, 1e-6))
        return jnp.where(temperature > 0, drawn, logits.argmax(-1)).astype(jnp.int32)

    def run(ids, positions, valid, cache):
        x = gpt_oss.embed(config, params, ids)
        (x,), cache = gpt_oss.run(config, params, x, positions, valid, last, gpt_oss.write_cache(positions), cache)
        return x, cache

    with jax.named_scope("prefill"):
        index = jnp.broadcast_to(jnp.arange(width), ids.shape)
        # Padding is cached too, at positions that the row's new tokens overwrite before they come into sight.
        cache = gpt_oss.empty_cache(config, batch, start + width + limit)
        if past:
            cache = tuple(whole.at[:, :, :start].set(part) for whole, part in zip(cache, past))
        x, cache = run(ids, start + index, index < lengths[:, None], cache)
        first = choose(gpt_oss.unembed(config, params, x[jnp.arange(batch), lengths - 1]), 0)

    def body(carry):
        step, latest, done, tokens, counts, progress, cache = carry
        tokens = tokens.at[:, step].set(jnp.where(done, pad, latest))
        counts = counts + ~done
        done = done | jnp.isin(latest, stop)
        x, cache = run(latest[:, None], (start + lengths + step)[:, None], ~done[:, None], cache)
        following = choose(gpt_oss.unembed(config, params, x[:, 0]), step + 1)
        if opening is not None:
            following, over, progress = _led(opening, step, latest, following, progress)
            done = done | over
        return step + 1, following, done, tokens, counts, progress, cache

    def unfinished(carry):
        step, _, done, *_ = carry
        return (step < limit) & ~done.all()

    with jax.named_scope("decode"):
        tokens = jnp.full((batch, limit), pad, jnp.int32)
        progress = _no_progress(opening, batch) if opening is not None else ()
        carry = (0, first, lengths == 0, tokens, jnp.zeros(batch, jnp.int32), progress, cache)
        _, _, _, tokens, counts, _, _ = jax.lax.while_loop(unfinished, body, carry)
    return tokens, counts


def _no_progress(opening, batch: int):
    """(the latest tokens of each row, where its answer begins or -1, how many tokens were forced or -1)."""
    none = jnp.full(batch, -1, jnp.int32)
    return jnp.full((batch, len(opening[0])), -1, jnp.int32), none, none


def _led(opening, step, latest, following, progress):
    """(next token, whether the answer has reached its limit, progress), each [B], behind the token of this step."""
    header, forced, before, limit = opening
    recent, begins, at = progress
    recent = jnp.concatenate([recent[:, 1:], latest[:, None]], 1)
    begins = jnp.where((begins < 0) & (recent == header).all(1), step + 1, begins)
    at = jnp.where((begins < 0) & (at < 0) & (step + 1 >= before), 0, at)
    forcing = (begins < 0) & (at >= 0)
    following = jnp.where(forcing, forced[jnp.clip(at, 0, len(forced) - 1)], following)
    at = jnp.where(forcing, at + 1, at)
    return following, (begins >= 0) & (step + 1 - begins >= limit), (recent, begins, at)
