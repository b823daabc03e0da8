"""Grouped-query attention, its masks, and the key/value cache as a value.

Who may look at whom is decided by two things only: the slot (a query sees slots at or before its
own) and the segment (a query sees its own document). Segment 0 is padding, seen by nobody else. For
a row holding documents 1 and 2, and one slot of padding,

    segment_ids  1 1 2 0      query 0:  x . . .
                              query 1:  x x . .
                              query 2:  . . x .
                              query 3:  . . . x   (so that its softmax is finite; nobody reads it)
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Bool, Float, Int

from jaxrl_reason.models.config import ModelConfig
from jaxrl_reason.models.layers import Projection, RMSNorm, rotate


class KVCache(NamedTuple):
    """Keys and values of past tokens, one array per layer.

    Separate arrays, not one stacked over layers: a step of decoding then updates each in place
    instead of copying the stack. `segment_ids` says which slots are filled.
    """

    keys: tuple[Float[Array, "B S K H"], ...]
    values: tuple[Float[Array, "B S K H"], ...]
    segment_ids: Int[Array, "B S"]
    length: Int[Array, ""]
    """Slots written so far; the next tokens go to slots length, length + 1, ..."""


def empty_cache(config: ModelConfig, batch_size: int, length: int) -> KVCache:
    """A cache of `length` empty slots for `batch_size` rows."""
    shape = (batch_size, length, config.num_key_value_heads, config.head_dim)
    zeros = tuple(
        jnp.zeros(shape, jnp.dtype(config.dtype)) for _ in range(config.num_hidden_layers)
    )
    return KVCache(
        keys=zeros,
        values=tuple(jnp.zeros_like(z) for z in zeros),
        segment_ids=jnp.zeros((batch_size, length), jnp.int32),
        length=jnp.zeros((), jnp.int32),
    )


def repeat_cache(cache: KVCache, repeats: int) -> KVCache:
    """Every row `repeats` times, copies consecutive: one prefill serves a group of completions."""
    keys, values, segment_ids = jax.tree.map(
        lambda x: jnp.repeat(x, repeats, axis=0), (cache.keys, cache.values, cache.segment_ids)
    )
    return KVCache(keys, values, segment_ids, cache.length)


def attention_mask(
    query_segments: Int[Array, "B T"], key_segments: Int[Array, "B S"], offset: Int[Array, ""] | int
) -> Bool[Array, "B T S"]:
    """True where query t, at slot offset + t, may look at key slot s."""
    query_slots = offset + jnp.arange(query_segments.shape[1])
    causal = query_slots[:, None] >= jnp.arange(key_segments.shape[1])[None, :]
    same = query_segments[:, :, None] == key_segments[:, None, :]
    return causal[None] & same


def attend(
    queries: Float[Array, "B T N H"],
    keys: Float[Array, "B S K H"],
    values: Float[Array, "B S K H"],
    mask: Bool[Array, "B T S"],
) -> Float[Array, "B T N H"]:
    """softmax(q k / sqrt(H)) v, scores and softmax in float32."""
    batch, length, num_heads, head_dim = queries.shape
    groups = num_heads // keys.shape[2]
    grouped = queries.reshape(batch, length, keys.shape[2], groups, head_dim)
    scores = jnp.einsum(
        "btkgh,bskh->bkgts", grouped, keys, preferred_element_type=jnp.float32
    ) * jnp.float32(head_dim**-0.5)
    scores = jnp.where(mask[:, None, None], scores, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(values.dtype)
    return jnp.einsum("bkgts,bskh->btkgh", weights, values).reshape(queries.shape)


class Attention(nn.Module):
    """Grouped-query self-attention with rotary positions. arXiv 2305.13245."""

    config: ModelConfig

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B T D"],
        positions: Int[Array, "B T"],
        mask: Bool[Array, "B T S"],
        past: tuple[Array, Array] | None,
        slot: Int[Array, ""] | None,
    ) -> tuple[Float[Array, "B T D"], tuple[Array, Array]]:
        """`past` holds this layer's keys and values; the new ones are written from `slot` on."""
        c = self.config
        d, h = c.hidden_size, c.head_dim
        heads, kv = (d, c.num_attention_heads, h), (d, c.num_key_value_heads, h)
        q = Projection(c, "btd,dnh->btnh", heads, ("embed", "heads", "head"), name="q")(x)
        k = Projection(c, "btd,dkh->btkh", kv, ("embed", "kv_heads", "head"), name="k")(x)
        v = Projection(c, "btd,dkh->btkh", kv, ("embed", "kv_heads", "head"), name="v")(x)
        if c.qk_norm:
            q = RMSNorm(c, "head", name="q_norm")(q)
            k = RMSNorm(c, "head", name="k_norm")(k)
        q = rotate(q, positions, theta=c.rope_theta)
        k = rotate(k, positions, theta=c.rope_theta)
        if past is not None:
            k = jax.lax.dynamic_update_slice_in_dim(past[0], k.astype(past[0].dtype), slot, axis=1)
            v = jax.lax.dynamic_update_slice_in_dim(past[1], v.astype(past[1].dtype), slot, axis=1)
        mixed = attend(q, k, v, mask)
        shape = (c.num_attention_heads, h, d)
        out = Projection(c, "btnh,nhd->btd", shape, ("heads", "head", "embed"), 2, name="o")
        return out(mixed), (k, v)
