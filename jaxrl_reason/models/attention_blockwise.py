"""Attention of whole rows by blocks, leaving out pairs of blocks that see nothing of each other.

A row is cut into blocks of 64 slots. A plan lists, row by row, the pairs (block of queries, block
of keys) in which some query may see some key: of a prompt with eight completions about a seventh of
all pairs. One loop goes through the list with a running softmax, as in FlashAttention (arXiv
2205.14135, 2307.08691); a second loop computes the gradient and recomputes the weights from the
stored log-sums. Memory grows with the number of tokens, not with its square.

The trip count of the loops is a run-time value, so one compiled program serves all layouts. Outputs
and gradients of padding are 0. Forward-mode differentiation is not defined.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

from jaxrl_reason.models.attention import Window, wide_dtype
from jaxrl_reason.models.layers import PRODUCT

BLOCK = 64
"""Slots of a block. Larger blocks compute more of what they then mask, smaller ones loop more."""

# Below every score, and below every running maximum, so that their exponential is exactly 0.
MASKED = -1e30
FLOOR = -1e29

_read = functools.partial(jax.lax.dynamic_index_in_dim, axis=0, keepdims=False)
_write = functools.partial(jax.lax.dynamic_update_index_in_dim, axis=0)


class Plan(NamedTuple):
    """Who sees whom in rows of n blocks of b slots; at most P = n (n + 1) / 2 pairs."""

    pairs: Int[Array, "B P 2"]
    """Blocks of queries and keys, in the order of the queries; a row needs its first `count`."""
    count: Int[Array, "B"]
    segment_ids: Int[Array, "B n b"]
    branch_ids: Int[Array, "B n b"]
    positions: Int[Array, "B n b"] | None
    """In sliding layers."""
    reach: Int[Array, " B"] | None
    """In sliding layers: their window."""


def plan_blocks(
    segment_ids: Int[Array, "B T"],
    branch_ids: Int[Array, "B T"] | None,
    window: Window | None = None,
) -> Plan:
    """The pairs of blocks that attention of these rows has to visit."""
    branch_ids = jnp.zeros_like(segment_ids) if branch_ids is None else branch_ids
    segments, branches = (_cut(x.astype(jnp.int32)) for x in (segment_ids, branch_ids))
    first, last = _range(segments, segments > 0)
    low, high = _range(branches, segments > 0)
    q, k = np.tril_indices(segments.shape[1])
    # Where a block holds several documents, ranges overlap a little too often, never too rarely.
    needed = (first[:, q] <= last[:, k]) & (first[:, k] <= last[:, q])
    needed &= (low[:, k] == 0) | ((low[:, q] <= high[:, k]) & (low[:, k] <= high[:, q]))
    positions = reach = None
    if window is not None:
        positions = _cut(window.positions.astype(jnp.int32))
        reach = jnp.full(positions.shape[:1], window.size, jnp.int32)
        earliest, latest = _range(positions, segments > 0)
        needed &= earliest[:, q] - latest[:, k] < window.size
    order = jnp.argsort(~needed, axis=1, stable=True)
    pairs = jnp.asarray(np.stack([q, k], axis=-1), jnp.int32)[order]
    count = jnp.sum(needed, axis=1, dtype=jnp.int32)
    return Plan(pairs, count, segments, branches, positions, reach)


def attend_blocks(
    queries: Float[Array, "B T N H"],
    keys: Float[Array, "B T K H"],
    values: Float[Array, "B T K H"],
    plan: Plan,
) -> Float[Array, "B T N H"]:
    """`attend` with `row_mask`, except that padding attends to nothing.

    A loop runs on one core. Heads are dealt to two loops, which XLA's CPU backend runs at the same
    time as each other and as the projections around them.
    """
    if keys.shape[2] % 2:
        return _attend(queries, keys, values, plan)
    halves = zip(*(jnp.split(x, 2, axis=2) for x in (queries, keys, values)), strict=True)
    return jnp.concatenate([_attend(*half, plan) for half in halves], axis=2)


@jax.custom_vjp
def _attend(queries, keys, values, plan):
    return _forward(queries, keys, values, plan)[0]


def _forward(queries, keys, values, plan):
    made = jax.lax.map(lambda row: _forward_row(*row), (queries, keys, values, plan))
    mixed, log_sums = (checkpoint_name(x, PRODUCT) for x in made)
    return mixed, (queries, keys, values, plan, mixed, log_sums)


def _backward(residuals, gradient):
    gradients = jax.lax.map(lambda row: _backward_row(*row), (*residuals, gradient))
    return (*gradients, None)


_attend.defvjp(_forward, _backward)


def _forward_row(
    queries: Float[Array, "T N H"],
    keys: Float[Array, "T K H"],
    values: Float[Array, "T K H"],
    plan: Plan,
) -> tuple[Float[Array, "T N H"], Float[Array, "n K Gb"]]:
    """Mixed values, and the logs of the sums of exponentials of the scores."""
    (blocks, size), kv_heads = plan.segment_ids.shape, keys.shape[1]
    q, k, v = (_by_head(x, blocks, size, kv_heads) for x in (queries, keys, values))
    wide = wide_dtype(q)

    def visit(i, state):
        at_q, at_k = plan.pairs[i, 0], plan.pairs[i, 1]
        mixed, top, total = (_read(x, at_q) for x in state)
        scores = _scores(_read(q, at_q), _read(k, at_k), wide)
        scores = jnp.where(_visible(plan, at_q, at_k, scores), scores, MASKED)
        new_top = jnp.maximum(top, jnp.max(scores, axis=-1))
        weights = jnp.exp(scores - new_top[..., None])
        shrink = jnp.exp(top - new_top)
        added = _dot("kqs,ksh->kqh", weights.astype(v.dtype), _read(v, at_k), wide)
        new = (
            mixed * shrink[..., None] + added,
            new_top,
            total * shrink + jnp.sum(weights, axis=-1),
        )
        return tuple(_write(x, y, at_q) for x, y in zip(state, new, strict=True))

    zeros = jnp.zeros(q.shape, wide)
    start = (zeros, jnp.full_like(zeros[..., 0], FLOOR), zeros[..., 0])
    with jax.named_scope(f"at_most_{len(plan.pairs)}"):
        mixed, top, total = jax.lax.fori_loop(0, plan.count, visit, start)
    total = jnp.maximum(total, jnp.finfo(wide).tiny)
    mixed = _by_slot(mixed / total[..., None], queries)
    return mixed, top + jnp.log(total)


def _backward_row(queries, keys, values, plan: Plan, mixed, log_sums, gradient):
    """Gradients of one row's queries, keys and values; algorithm 2 of arXiv 2307.08691."""
    (blocks, size), kv_heads = plan.segment_ids.shape, keys.shape[1]
    wide = log_sums.dtype
    inner = jnp.sum(gradient.astype(wide) * mixed.astype(wide), axis=-1, keepdims=True)
    inner = _by_head(inner, blocks, size, kv_heads)[..., 0]
    rows = (queries, keys, values, gradient)
    q, k, v, g = (_by_head(x, blocks, size, kv_heads) for x in rows)

    def visit(i, state):
        at_q, at_k = plan.pairs[i, 0], plan.pairs[i, 1]
        q_, g_, log_sums_, inner_ = (_read(x, at_q) for x in (q, g, log_sums, inner))
        k_, v_ = _read(k, at_k), _read(v, at_k)
        scores = _scores(q_, k_, wide)
        seen = _visible(plan, at_q, at_k, scores)
        weights = jnp.where(seen, jnp.exp(scores - log_sums_[..., None]), 0)
        dscores = weights * (_dot("kqh,ksh->kqs", g_, v_, wide) - inner_[..., None])
        dscores, weights = dscores.astype(q.dtype), weights.astype(q.dtype)
        new = (
            _dot("kqs,ksh->kqh", dscores, k_, wide),
            _dot("kqs,kqh->ksh", dscores, q_, wide),
            _dot("kqs,kqh->ksh", weights, g_, wide),
        )
        return tuple(
            _write(x, _read(x, at) + y, at)
            for x, y, at in zip(state, new, (at_q, at_k, at_k), strict=True)
        )

    start = tuple(jnp.zeros(x.shape, wide) for x in (q, k, v))
    with jax.named_scope(f"at_most_{len(plan.pairs)}"):
        dq, dk, dv = jax.lax.fori_loop(0, plan.count, visit, start)
    scale = jnp.asarray(q.shape[-1] ** -0.5, wide)
    return _by_slot(dq * scale, queries), _by_slot(dk * scale, keys), _by_slot(dv, values)


def _dot(subscripts: str, a: Array, b: Array, dtype) -> Array:
    return jnp.einsum(subscripts, a, b, preferred_element_type=dtype)


def _scores(q: Float[Array, "K Gb H"], k: Float[Array, "K b H"], dtype) -> Float[Array, "K Gb b"]:
    return _dot("kqh,ksh->kqs", q, k, dtype) * jnp.asarray(q.shape[-1] ** -0.5, dtype)


def _visible(plan: Plan, at_q, at_k, scores: Float[Array, "K Gb b"]) -> Bool[Array, "K Gb b"]:
    """`row_mask` of a pair of blocks, without padding, for all heads."""
    size = plan.segment_ids.shape[1]
    slots = jnp.arange(size, dtype=jnp.int32)
    q_segments, k_segments = (_read(plan.segment_ids, at) for at in (at_q, at_k))
    q_branches, k_branches = (_read(plan.branch_ids, at) for at in (at_q, at_k))
    seen = (at_q * size + slots)[:, None] >= (at_k * size + slots)[None]
    seen &= (q_segments[:, None] == k_segments[None]) & (q_segments > 0)[:, None]
    seen &= (k_branches == 0)[None] | (q_branches[:, None] == k_branches[None])
    if plan.positions is not None:
        q_at, k_at = (_read(plan.positions, at) for at in (at_q, at_k))
        seen &= q_at[:, None] - k_at[None] < plan.reach
    shape = (scores.shape[0], scores.shape[1] // size, size, size)
    return jnp.broadcast_to(seen[None, None], shape).reshape(scores.shape)


def _cut(ids: Int[Array, "B T"]) -> Int[Array, "B n b"]:
    """Ids by blocks, zeros added at the end; a short row is one block."""
    rows, length = ids.shape
    size = min(BLOCK, length)
    blocks = math.ceil(length / size)
    return jnp.pad(ids, ((0, 0), (0, blocks * size - length))).reshape(rows, blocks, size)


def _range(ids: Int[Array, "B n b"], counted: Bool[Array, "B n b"]):
    """Lowest and highest id of each block; an empty range where nothing counts."""
    limits = jnp.iinfo(ids.dtype)
    low = jnp.min(ids, axis=-1, initial=limits.max, where=counted)
    return low, jnp.max(ids, axis=-1, initial=limits.min, where=counted)


def _by_head(
    x: Float[Array, "T N H"], blocks: int, size: int, kv_heads: int
) -> Float[Array, "n K Gb H"]:
    """Slots to blocks, with the query heads of a key head beside each other."""
    length, heads, width = x.shape
    x = jnp.pad(x, ((0, blocks * size - length), (0, 0), (0, 0)))
    x = x.reshape(blocks, size, kv_heads, heads // kv_heads, width).transpose(0, 2, 3, 1, 4)
    return x.reshape(blocks, kv_heads, -1, width)


def _by_slot(x: Float[Array, "n K Gb H"], like: Float[Array, "T N H"]) -> Float[Array, "T N H"]:
    """The inverse of `_by_head`, in the dtype of `like`."""
    length, heads, width = like.shape
    blocks, kv_heads, _, _ = x.shape
    groups = heads // kv_heads
    x = x.reshape(blocks, kv_heads, groups, -1, width).transpose(0, 3, 1, 2, 4)
    return x.reshape(-1, heads, width)[:length].astype(like.dtype)
