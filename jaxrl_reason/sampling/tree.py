"""Sums over a row of the vocabulary, and one draw from it, as a tree of fan-out 16.

A row of V entries is read as up to 16 pieces of L entries, laid below each other; their columns are
added up, which leaves L sums; and so on until few are left. To draw, a cumulative sum over the few
finds one of them and then, level by level, one of its 16 parts. No cumulative sum and no noise
over V entries is needed, V may have any size, and reading and adding whole pieces is as fast as
the memory.

Every addition is written out, elementwise: a compiler is free to reorder a reduction according to
the number of rows, but not these. What comes out for a row is therefore the same to the last bit
in a batch of any size, and a sum over fewer of the same non-negative numbers is never the larger.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Shaped

FAN_OUT = 16
WHOLE = 128
"""Rows up to this long are cumulated whole."""

Value = Callable[[Array], Array]
"""The numbers to be summed, elementwise from entries [B, N] of the table."""


def row_totals(table: Float[Array, "B V"], value: Value) -> Float[Array, "B 1"]:
    """The sum of `value(table)` over each row."""
    sums = _column_sums(table, value)
    while sums.shape[-1] > 1:
        sums = _column_sums(sums)
    return sums


def invert_cdf(
    table: Float[Array, "B V"], value: Value, uniforms: Float[Array, " B"]
) -> tuple[Int[Array, " B"], Float[Array, " B"]]:
    """The entry of each row at which the cumulative sum of `value(table)` passes uniform * total.

    The order in which entries are cumulated is fixed, but is not that of the vocabulary. An entry
    of value 0 is never chosen, whatever the rounding, unless all of the row are 0.

    Returns:
        `(indices, totals)`.
    """
    levels = [table]
    if table.shape[-1] > WHOLE:
        levels.append(_column_sums(table, value))
    while levels[-1].shape[-1] > WHOLE:
        levels.append(_column_sums(levels[-1]))
    top = levels.pop()
    totals = row_totals(top, _same if levels else value)
    index, rest = _pass(top if levels else value(top), uniforms[:, None] * totals)
    while levels:
        table = levels.pop()
        starts, firsts = _pieces(table.shape[-1])
        at = jnp.asarray(firsts, jnp.int32)[None] + index
        parts = jnp.take_along_axis(table, at, axis=-1)
        parts = parts if levels else value(parts)
        parts = jnp.where(at >= jnp.asarray(starts, jnp.int32)[None], parts, 0)
        choice, rest = _pass(parts, rest)
        index = jnp.take_along_axis(at, choice, axis=-1)
    return index[:, 0], totals[:, 0]


def first_where(
    table: Float[Array, "B N"], condition: Callable[[Array], Array]
) -> Int[Array, "B 1"]:
    """The first entry of each row that meets an elementwise condition, N where none does."""
    size = table.shape[-1]

    def candidates(start: int, piece: Array) -> Array:
        at = start + jax.lax.broadcasted_iota(jnp.int32, piece.shape, 1)
        return jnp.where(condition(piece), at, size)

    found = _fold(table, candidates, jnp.minimum, size)
    return jnp.min(found, axis=-1, keepdims=True)


def _same(values: Array) -> Array:
    return values


def _pieces(size: int) -> tuple[list[int], list[int]]:
    """`(starts, firsts)` of the pieces that a row of so many entries is read as, of equal length.

    Piece j is read from entry firsts[j] on and counts from entry starts[j] on. They differ where
    the last piece reaches back into the one before, because the row is no multiple.
    """
    length = -(-size // FAN_OUT)
    starts = list(range(0, size, length))
    return starts, [min(start, size - length) for start in starts]


def _column_sums(table: Float[Array, "B N"], value: Value = _same) -> Float[Array, "B L"]:
    """The sums of `value` over the columns of the pieces laid below each other."""
    return _fold(table, lambda _, piece: value(piece), jnp.add, 0)


def _fold(
    table: Float[Array, "B N"],
    value: Callable[[int, Array], Array],
    join: Callable[[Array, Array], Array],
    neutral: int,
) -> Shaped[Array, "B L"]:
    """`value(first, piece)` of the pieces of each row, joined in pairs."""
    starts, firsts = _pieces(table.shape[-1])
    length = table.shape[-1] - firsts[-1]
    pieces = []
    for start, first in zip(starts, firsts, strict=True):
        piece = value(first, table[:, first : first + length])
        if first < start:
            at = jax.lax.broadcasted_iota(jnp.int32, piece.shape, 1)
            piece = jnp.where(at >= start - first, piece, neutral)
        pieces.append(piece)
    while len(pieces) > 1:
        pairs = [join(a, b) for a, b in zip(pieces[::2], pieces[1::2], strict=False)]
        pieces = pairs + pieces[2 * len(pairs) :]
    return pieces[0]


def _pass(
    weights: Float[Array, "B N"], targets: Float[Array, "B 1"]
) -> tuple[Int[Array, "B 1"], Float[Array, "B 1"]]:
    """Where the cumulative sum of a short row passes its target, and what of the target is left."""
    cumulative, shift = weights, 1
    while shift < weights.shape[-1]:
        cumulative += jnp.pad(cumulative[:, :-shift], ((0, 0), (shift, 0)))
        shift *= 2
    at = jax.lax.broadcasted_iota(jnp.int32, weights.shape, 1)
    passed = (cumulative > targets) & (weights > 0)
    first = jnp.min(jnp.where(passed, at, weights.shape[-1]), axis=-1, keepdims=True)
    # Rounding can put the target on the total; the last entry that is not 0 is then the right one.
    last = jnp.max(jnp.where(weights > 0, at, 0), axis=-1, keepdims=True)
    index = jnp.minimum(first, last)
    before = jnp.max(jnp.where(at == index - 1, cumulative, 0), axis=-1, keepdims=True)
    return index, targets - before
