"""Grouped-query attention and the mask of whole rows.

Who may look at whom is decided by the slot (a query sees slots at or before its own), the segment
(a query sees its own document) and the branch (a document may hold several continuations of one
prompt; a query sees the prompt and its own continuation); in sliding layers also by the position (a
query sees the last ones only). Segment 0 is padding, seen by nobody else. For a row holding
document 1, a prompt with two continuations, then document 2, and one slot of padding,

    segment_ids  1 1 1 2 0      query 0:  x . . . .
    branch_ids   0 1 2 0 0      query 1:  x x . . .
                                query 2:  x . x . .
                                query 3:  . . . x .
                                query 4:  . . . . x   (its softmax is finite; nobody reads it)
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Bool, Float, Int

from jaxrl_reason.models.config import ModelConfig
from jaxrl_reason.models.layers import Projection, RMSNorm
from jaxrl_reason.models.rotary import Rotation, rotate

MixRows = Callable[[Array, Array, Array], Array]
"""Of whole rows: queries [B T N H], keys and values [B T K H] -> mixed values [B T N H]."""
Mix = Callable[[Array, Array, Array], tuple[Array, tuple[Array, Array]]]
"""The same, and what is kept of keys and values."""


class Window(NamedTuple):
    """How far back a query sees."""

    positions: Int[Array, "B T"]
    """Of every slot in its document."""
    size: int
    """A query at position p sees keys at positions above p - size."""


def row_mask(
    segment_ids: Int[Array, "B T"],
    branch_ids: Int[Array, "B T"] | None = None,
    window: Window | None = None,
) -> Bool[Array, "B T T"]:
    """True where query t may look at key s."""
    slots = jnp.arange(segment_ids.shape[1])
    causal = slots[:, None] >= slots[None, :]
    mask = causal[None] & (segment_ids[:, :, None] == segment_ids[:, None, :])
    if window is not None:
        distance = window.positions[:, :, None] - window.positions[:, None, :]
        mask &= distance < window.size
    if branch_ids is None:
        return mask
    keys = branch_ids[:, None, :]
    return mask & ((keys == 0) | (branch_ids[:, :, None] == keys))


def wide_dtype(x: Array) -> jnp.dtype:
    """The dtype of scores and sums over keys: float32, or float64 if that of `x` is."""
    return jnp.dtype(jnp.float64 if x.dtype == jnp.float64 else jnp.float32)


def attend(
    queries: Float[Array, "B T N H"],
    keys: Float[Array, "B S K H"],
    values: Float[Array, "B S K H"],
    mask: Bool[Array, "B T S"],
) -> Float[Array, "B T N H"]:
    """softmax(q k / sqrt(H)) v, scores and softmax in `wide_dtype`."""
    batch, length, num_heads, head_dim = queries.shape
    groups = num_heads // keys.shape[2]
    grouped = queries.reshape(batch, length, keys.shape[2], groups, head_dim)
    wide = wide_dtype(queries)
    scores = jnp.einsum("btkgh,bskh->bkgts", grouped, keys, preferred_element_type=wide)
    scores = scores * jnp.asarray(head_dim**-0.5, wide)
    scores = jnp.where(mask[:, None, None], scores, jnp.finfo(wide).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(values.dtype)
    return jnp.einsum("bkgts,bskh->btkgh", weights, values).reshape(queries.shape)


class Attention(nn.Module):
    """Grouped-query self-attention with rotary positions. arXiv 2305.13245."""

    config: ModelConfig

    @nn.compact
    def __call__(
        self, x: Float[Array, "B T D"], rotation: Rotation, mix: Mix
    ) -> tuple[Float[Array, "B T D"], tuple[Array, Array]]:
        """`mix` knows who sees whom; what it keeps of keys and values is passed on."""
        c = self.config
        d, h = c.hidden_size, c.head_dim
        heads, kv = (d, c.num_attention_heads, h), (d, c.num_key_value_heads, h)

        def project(name, einsum, shape, axes):
            make = Projection(c, einsum, shape, ("embed", *axes), use_bias=c.qkv_bias, name=name)
            return make(x)

        q = project("q", "btd,dnh->btnh", heads, ("heads", "head"))
        k = project("k", "btd,dkh->btkh", kv, ("kv_heads", "head"))
        v = project("v", "btd,dkh->btkh", kv, ("kv_heads", "head"))
        if c.qk_norm:
            q = RMSNorm(c, "head", name="q_norm")(q)
            k = RMSNorm(c, "head", name="k_norm")(k)
        q, k = rotate(q, rotation), rotate(k, rotation)
        if c.query_pre_attn_scalar is not None:
            # Every backend divides by the root of the head size.
            q = q * jnp.asarray((h / c.query_pre_attn_scalar) ** 0.5, q.dtype)
        mixed, kept = mix(q, k, v)
        shape = (c.num_attention_heads, h, d)
        out = Projection(c, "btnh,nhd->btd", shape, ("heads", "head", "embed"), 2, name="o")
        return out(mixed), kept
