"""Attention of whole rows by the splash kernel of JAX (Pallas), for TPUs.

The kernel takes the mask as an array and passes over the blocks in which it is empty. Its tables
hold a byte for every pair of slots of a row, not of a head; they are made once for all layers.
"""

from typing import NamedTuple, cast

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import (
    splash_attention_kernel,
    splash_attention_mask_info,
)
from jaxtyping import Array, Float, Int

from jaxrl_reason.models.attention import Window, row_mask
from jaxrl_reason.models.layers import PRODUCT

LANES = 128
"""Rows are padded to a multiple of it: the kernel's blocks have at least so many slots."""
BLOCKS = (512, 256, LANES)
"""Slots of a block, the first that divides the row."""


class SplashPlan(NamedTuple):
    """What the kernel has to know of the mask, by queries and by keys; leaves are [B, ...]."""

    by_query: splash_attention_mask_info.MaskInfo
    by_key: splash_attention_mask_info.MaskInfo


def plan_splash(
    segment_ids: Int[Array, "B T"],
    branch_ids: Int[Array, "B T"] | None,
    window: Window | None = None,
) -> SplashPlan:
    """Tables of the kernel for these rows."""
    padding = ((0, 0), (0, -segment_ids.shape[1] % LANES))
    branch_ids = None if branch_ids is None else jnp.pad(branch_ids, padding)
    if window is not None:
        window = window._replace(positions=jnp.pad(window.positions, padding))
    mask = row_mask(jnp.pad(segment_ids, padding), branch_ids, window)
    size = _block(mask.shape[1])

    def tables(mask):
        of_queries, _ = splash_attention_mask_info.process_dynamic_mask(mask[None], (size, size))
        of_keys, _ = splash_attention_mask_info.process_dynamic_mask_dkv(mask[None], (size, size))
        # The flag is static, and has to stay out of what vmap returns.
        return SplashPlan(*(x._replace(is_dynamic_mask=None) for x in (of_queries, of_keys)))

    return jax.vmap(tables)(mask)


def attend_splash(
    queries: Float[Array, "B T N H"],
    keys: Float[Array, "B T K H"],
    values: Float[Array, "B T K H"],
    plan: SplashPlan,
    *,
    interpret: bool = False,
) -> Float[Array, "B T N H"]:
    """`attend` with `row_mask`; `interpret` runs the kernel without a TPU, slowly."""
    length, width = queries.shape[1], queries.shape[-1]
    padding = -length % LANES
    sizes = _block_sizes(_block(length + padding))

    def heads_first(x):
        return jnp.pad(x, ((0, 0), (0, padding), (0, 0), (0, 0))).swapaxes(1, 2)

    def attend_row(queries, keys, values, plan):
        by_query, by_key = (x._replace(is_dynamic_mask=True) for x in plan)
        kernel = splash_attention_kernel.SplashAttentionKernel(
            by_query,
            by_query,
            by_key,
            block_sizes=sizes,
            is_mqa=False,
            save_residuals=False,
            mask_value=splash_attention_kernel.DEFAULT_MASK_VALUE,
            attn_logits_soft_cap=None,
            residual_checkpoint_name=PRODUCT,
            mask_function=None,
            interpret=interpret,
        )
        return cast(Array, kernel(queries, keys, values))

    scaled = heads_first(queries * jnp.asarray(width**-0.5, queries.dtype))
    mixed = jax.vmap(attend_row)(scaled, heads_first(keys), heads_first(values), plan)
    return mixed.swapaxes(1, 2)[:, :length]


def _block(length: int) -> int:
    return next(size for size in BLOCKS if length % size == 0)


def _block_sizes(size: int) -> splash_attention_kernel.BlockSizes:
    return splash_attention_kernel.BlockSizes(
        block_q=size,
        block_kv=size,
        block_q_dkv=size,
        block_kv_dkv=size,
        block_q_dq=size,
        block_kv_dq=size,
    )
