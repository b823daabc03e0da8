"""Prefill and decoding as pure functions of (params, prompts, keys).

Prompts lie right-padded in slots 0..P-1 of the cache; completion token t of every row lies in slot
P + t, whatever the prompt's own length, so that one scalar slot serves the whole batch. Positions
count real tokens only. The draws of a row depend on its key and the token's index, not on its
neighbours.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from jaxrl_reason.models import KVCache, Model, Params, repeat_cache
from jaxrl_reason.sampling.filters import SamplingConfig, draw


class DecodeState(NamedTuple):
    """Rows being completed. C is the longest completion that was asked for."""

    cache: KVCache
    logits: Float[Array, "B V"]
    """Logits of the next token."""
    prompt_lengths: Int[Array, " B"]
    tokens: Int[Array, "B C"]
    """Completion tokens so far, the stop token included; `pad_id` beyond."""
    logprobs: Float[Array, "B C"]
    """log q(token) under the sampling distribution."""
    kept_logmass: Float[Array, "B C"]
    """Log of the probability mass that truncation kept."""
    done: Bool[Array, " B"]
    """A stop token was drawn."""
    num_tokens: Int[Array, ""]
    """Tokens drawn so far, the same for all rows."""


def prefill(
    model: Model,
    params: Params,
    prompts: Int[Array, "P S"],
    prompt_mask: Bool[Array, "P S"],
    *,
    num_generations: int,
    max_completion_length: int,
    pad_id: int,
) -> DecodeState:
    """Run right-padded prompts once and make `num_generations` consecutive rows of each."""
    num_prompts, length = prompts.shape
    lengths = jnp.sum(prompt_mask.astype(jnp.int32), axis=-1)
    cache = model.init_cache(num_prompts, length + max_completion_length)
    positions = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32)[None], prompts.shape)
    hidden, cache = model.forward(
        params,
        prompts,
        positions=positions,
        segment_ids=prompt_mask.astype(jnp.int32),
        cache=cache,
    )
    last = jnp.take_along_axis(hidden, (lengths - 1)[:, None, None], axis=1)[:, 0]
    repeat = lambda x: jnp.repeat(x, num_generations, axis=0)
    rows = num_prompts * num_generations
    zeros = jnp.zeros((rows, max_completion_length), jnp.float32)
    return DecodeState(
        cache=repeat_cache(cache, num_generations),
        logits=repeat(model.unembed(params, last)),
        prompt_lengths=repeat(lengths),
        tokens=jnp.full((rows, max_completion_length), pad_id, jnp.int32),
        logprobs=zeros,
        kept_logmass=zeros,
        done=jnp.zeros((rows,), bool),
        num_tokens=jnp.zeros((), jnp.int32),
    )


def decode(
    model: Model,
    params: Params,
    state: DecodeState,
    row_keys: Key[Array, " B"],
    *,
    steps: int,
    sampling: SamplingConfig,
    stop_ids: tuple[int, ...],
    pad_id: int,
) -> DecodeState:
    """Up to `steps` more tokens for every row; stops early when all rows are done or full."""
    limit = jnp.minimum(state.num_tokens + steps, state.tokens.shape[1])
    uniforms = _uniforms(row_keys, state.num_tokens, steps)
    start = state.num_tokens

    def unfinished(state: DecodeState):
        return (state.num_tokens < limit) & ~jnp.all(state.done)

    def body(state: DecodeState):
        t = state.num_tokens
        u = jax.lax.dynamic_index_in_dim(uniforms, t - start, axis=1, keepdims=False)
        drawn, logprobs, kept_logmass = draw(state.logits, u, sampling)
        live = ~state.done
        tokens = jnp.where(live, drawn, pad_id)
        stops = jnp.isin(tokens, jnp.asarray(stop_ids, jnp.int32)) & live
        hidden, cache = model.forward(
            params,
            tokens[:, None],
            positions=(state.prompt_lengths + t)[:, None],
            segment_ids=live.astype(jnp.int32)[:, None],
            cache=state.cache,
        )
        return DecodeState(
            cache=cache,
            logits=model.unembed(params, hidden[:, 0]),
            prompt_lengths=state.prompt_lengths,
            tokens=_write(state.tokens, tokens, t),
            logprobs=_write(state.logprobs, jnp.where(live, logprobs, 0), t),
            kept_logmass=_write(state.kept_logmass, jnp.where(live, kept_logmass, 0), t),
            done=state.done | stops,
            num_tokens=t + 1,
        )

    return jax.lax.while_loop(unfinished, body, state)


def _uniforms(row_keys: Array, start: Array, steps: int) -> Float[Array, "B steps"]:
    """One number in [0, 1) for every row and step, a function of the row's key and the index."""
    at = start + jnp.arange(steps)

    def of_row(key):
        return jax.vmap(lambda t: jax.random.uniform(jax.random.fold_in(key, t)))(at)

    return jax.vmap(of_row)(row_keys)


def _write(array: Array, column: Array, index: Array) -> Array:
    return jax.lax.dynamic_update_slice_in_dim(
        array, column[:, None].astype(array.dtype), index, axis=1
    )
