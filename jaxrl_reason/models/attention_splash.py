"""Attention of whole rows by the splash kernel of JAX (Pallas), for TPUs.

The kernel passes over the blocks in which the mask is empty. Of the others it makes the mask
itself, from a number of each query, the slot of the key, and ids that have to be equal. To say with
these that a branch sees its trunk and itself, keys are given to it twice: first those of trunks,
then those of branches, of which a query sees the slots from the beginning of its own branch on.
Where a window has a say too, or a row is longer than such numbers can tell, the mask is in tables
that hold every pair of slots of a row, not of a head. All is planned once for all layers.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple, cast

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import (
    splash_attention_kernel,
    splash_attention_mask_info,
)
from jaxtyping import Array, Bool, Float, Int

from jaxrl_reason.models.attention import Window, row_mask
from jaxrl_reason.models.layers import PRODUCT

LANES = 128
"""Rows are padded to a multiple of it: the kernel's blocks have at least so many slots."""
BLOCKS = (512, 256, LANES)
"""Slots of a block, the first that divides the row."""
_SLOT_BITS = 15
"""Of a slot, two of which are in the number of a query."""


class SplashPlan(NamedTuple):
    """What the kernel has to know of the mask, by queries and by keys; leaves are [B, ...]."""

    by_query: splash_attention_mask_info.MaskInfo
    by_key: splash_attention_mask_info.MaskInfo
    segments: splash_attention_kernel.SegmentIds | None = None
    """Of queries [B, T] and of keys [B, T] or [B, 2 T]; None where the mask is in the tables."""


def plan_splash(
    segment_ids: Int[Array, "B T"],
    branch_ids: Int[Array, "B T"] | None,
    window: Window | None = None,
) -> SplashPlan:
    """Tables of the kernel for these rows, in which the slots of a branch are neighbours."""
    padding = ((0, 0), (0, -segment_ids.shape[1] % LANES))
    segment_ids = jnp.pad(segment_ids, padding)
    branch_ids = None if branch_ids is None else jnp.pad(branch_ids, padding)
    if window is None and segment_ids.shape[1] < 2**_SLOT_BITS:
        if branch_ids is None:
            return jax.vmap(_of_segments)(segment_ids)
        return jax.vmap(_of_branches)(segment_ids, branch_ids)
    if window is not None:
        window = window._replace(positions=jnp.pad(window.positions, padding))
    mask = row_mask(segment_ids, branch_ids, window)
    size = _block(mask.shape[1])

    def tables(mask):
        of_queries, _ = splash_attention_mask_info.process_dynamic_mask(mask[None], (size, size))
        of_keys, _ = splash_attention_mask_info.process_dynamic_mask_dkv(mask[None], (size, size))
        # The flag is static, and has to stay out of what vmap returns.
        return SplashPlan(*(x._replace(is_dynamic_mask=None) for x in (of_queries, of_keys)))

    return jax.vmap(tables)(mask)


def _of_segments(segment_ids: Int[Array, " T"]) -> SplashPlan:
    """The plan of a row without branches."""
    met = jnp.tril(_meet(segment_ids, segment_ids, segment_ids != segment_ids))
    slots = jnp.arange(len(segment_ids), dtype=jnp.int32)
    segments = splash_attention_kernel.SegmentIds(segment_ids, segment_ids)
    return _planned(met, _number(len(slots), slots), segments)


def _of_branches(segment_ids: Int[Array, " T"], branch_ids: Int[Array, " T"]) -> SplashPlan:
    """The plan of a row with branches."""
    length, size = len(segment_ids), _block(len(segment_ids))
    slots, in_branch = jnp.arange(length, dtype=jnp.int32), branch_ids != 0
    trunks = jnp.tril(_meet(segment_ids, segment_ids, in_branch))
    before = lambda ids: jnp.concatenate([ids[:1] - 1, ids[:-1]])
    begins = (segment_ids != before(segment_ids)) | (branch_ids != before(branch_ids))
    begin = jax.lax.cummax(jnp.where(begins, slots, 0))
    begin = jnp.where(in_branch, begin, length)
    first = jnp.min(begin.reshape(-1, size), axis=1)
    ends = jnp.arange(size, length + size, size, dtype=jnp.int32)
    branches = jnp.tril(ends[None, :] > first[:, None])
    segments = splash_attention_kernel.SegmentIds(
        segment_ids, jnp.concatenate([jnp.where(in_branch, -1, segment_ids), segment_ids])
    )
    return _planned(jnp.concatenate([trunks, branches], axis=1), _number(begin, slots), segments)


def _meet(
    queries: Int[Array, " T"], keys: Int[Array, " T"], left_out: Bool[Array, " T"]
) -> Bool[Array, "Q K"]:
    """Which blocks of queries and keys have ids in common; some more may be said to."""
    size = _block(len(queries))
    most = jnp.iinfo(queries.dtype).max
    # Padding, of id 0, stands behind the segments.
    queries, keys = (jnp.where(ids == 0, most, ids).reshape(-1, size) for ids in (queries, keys))
    left_out = left_out.reshape(-1, size)
    low = jnp.min(jnp.where(left_out, most, keys), axis=1)
    high = jnp.max(jnp.where(left_out, -1, keys), axis=1)
    after = jnp.min(queries, axis=1)[:, None] <= high[None, :]
    return after & (jnp.max(queries, axis=1)[:, None] >= low[None, :])


def _number(begin: Int[Array, " T"] | int, slots: Int[Array, " T"]) -> Int[Array, " T"]:
    """Of a query: where its branch begins, the row's length if it is in none; and its slot."""
    return slots + (jnp.asarray(begin, jnp.int32) << _SLOT_BITS)


@functools.lru_cache
def _sees(length: int) -> Callable[[Array, Array], Array]:
    """The mask of numbers of queries and slots of keys, those of branches behind the others."""

    def mask(queries, keys):
        slots = queries & (2**_SLOT_BITS - 1)
        begin = length + (queries >> _SLOT_BITS)
        is_trunk = keys < length
        return (is_trunk & (keys <= slots)) | ((keys >= begin) & (keys <= length + slots))

    return mask


def _planned(
    met: Bool[Array, "Q K"],
    numbers: Int[Array, " T"],
    segments: splash_attention_kernel.SegmentIds,
) -> SplashPlan:
    """The plan that visits these blocks."""

    def info(blocks: Int[Array, "..."]) -> splash_attention_mask_info.MaskInfo:
        return splash_attention_mask_info.MaskInfo(
            # What the kernel fetches; where there is nothing to do, what it may have anyway.
            data_next=jnp.where(met, jnp.broadcast_to(blocks, met.shape), 0)[None],
            mask_next=None,
            block_mask=met.astype(jnp.int8)[None],
            partial_mask_blocks=None,
            q_sequence=numbers,
        )

    queries, keys = (jnp.arange(count, dtype=jnp.int16) for count in met.shape)
    return SplashPlan(info(keys[None, :]), info(queries[:, None]), segments)


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
        by_query, by_key = (x._replace(is_dynamic_mask=True) for x in plan[:2])
        if plan.segments is not None and len(plan.segments.kv) > keys.shape[1]:
            keys, values = (jnp.concatenate([x, x], axis=1) for x in (keys, values))
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
            mask_function=None if plan.segments is None else _sees(length + padding),
            interpret=interpret,
        )
        return cast(Array, kernel(queries, keys, values, plan.segments))

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
