"""Masked reductions shared by losses, advantages and objectives.

Masks are bool or 0/1 and true means "counts". A value under a false mask never reaches a result or
a gradient, not even as NaN or inf. A mean leaves as ``WeightedMean(total, weight)`` and is divided
once, after microbatches and devices are summed.
"""

import dataclasses
import operator
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float, Int, Shaped

AGGREGATIONS = ("token_mean", "sequence_mean", "constant", "sequence_sum")


@dataclasses.dataclass(frozen=True)
class WeightedMean:
    """A mean that is not divided yet, so that parts of a batch can be added exactly. A pytree."""

    total: Float[Array, ""]
    """Weighted sum of the values."""
    weight: Float[Array, ""]
    """Sum of the weights."""

    def mean(self) -> Float[Array, ""]:
        """The quotient, and 0 (with gradient 0) where weight is 0."""
        empty = self.weight == 0
        return jnp.where(empty, 0, self.total) / jnp.where(empty, 1, self.weight)

    def __add__(self, other: "WeightedMean") -> "WeightedMean":
        return WeightedMean(self.total + other.total, self.weight + other.weight)


jax.tree_util.register_dataclass(WeightedMean, data_fields=["total", "weight"], meta_fields=[])


def to_floats(*arrays: Shaped[Array, "..."]) -> tuple[Float[Array, "..."], ...]:
    """The arrays in one dtype: float64 if any of them is float64, float32 otherwise."""
    converted = [jnp.asarray(array) for array in arrays]
    wide = any(array.dtype == jnp.float64 for array in converted)
    dtype = jnp.float64 if wide else jnp.float32
    return tuple(array.astype(dtype) for array in converted)


def to_mask(mask: Shaped[Array, "..."]) -> Bool[Array, "..."]:
    """A bool mask from a bool or 0/1 mask."""
    mask = jnp.asarray(mask)
    return mask if mask.dtype == jnp.bool_ else mask != 0


def check_shape(name: str, array: Shaped[Array, "..."], shape: tuple[int, ...]) -> None:
    """Raises ValueError unless ``array`` has exactly ``shape``."""
    if jnp.shape(array) != tuple(shape):
        raise ValueError(f"{name} has shape {jnp.shape(array)}; expected {tuple(shape)}")


def check_choice(name: str, value: object, allowed: tuple[object, ...]) -> None:
    """Raises ValueError unless ``value`` is one of ``allowed``."""
    if value not in allowed:
        raise ValueError(f"{name}={value!r} is unknown; use one of {', '.join(map(repr, allowed))}")


def check_number(
    name: str,
    value: float | Array,
    *,
    above: float | None = None,
    at_least: float | None = None,
    below: float | None = None,
    at_most: float | None = None,
) -> None:
    """Raises ValueError when a Python number is outside its range; traced values pass."""
    if not isinstance(value, (int, float)):
        return
    checks = (
        (above, ">", operator.gt),
        (at_least, ">=", operator.ge),
        (below, "<", operator.lt),
        (at_most, "<=", operator.le),
    )
    checks = [check for check in checks if check[0] is not None]
    if not all(holds(value, bound) for bound, _, holds in checks):
        allowed = " and ".join(f"{sign} {bound}" for bound, sign, _ in checks)
        raise ValueError(f"{name}={value} is out of range; it must be {allowed}")


def guard_nonfinite(
    function: Callable[..., Float[Array, "..."]], *arrays: Float[Array, "..."]
) -> Float[Array, "..."]:
    """Applies an elementwise function, with gradient 0 where an input is NaN or infinite.

    The value stays as it is, so a bad number that counts is still seen in the loss. Without this a
    bad number under a false mask would turn the gradient of everything before it into NaN, because
    0 x inf is NaN in the backward pass.
    """
    finite = jnp.all(jnp.stack([jnp.isfinite(array) for array in arrays]), axis=0)
    clean = [jnp.where(finite, array, 0) for array in arrays]
    return jnp.where(finite, function(*clean), jax.lax.stop_gradient(function(*arrays)))


def bounded_exp(x: Float[Array, "..."], *, limit: float = 20.0) -> Float[Array, "..."]:
    """The exponential, continued by its tangent above ``limit``, so that it never overflows."""
    return jnp.exp(jnp.minimum(x, limit)) * (1 + jnp.maximum(x - limit, 0))


def masked_sum(
    values: Float[Array, "..."],
    mask: Shaped[Array, "..."],
    axis: int | tuple[int, ...] | None = None,
) -> Float[Array, "..."]:
    """Sum of the values under a true mask; shapes must agree."""
    (values,), mask = to_floats(values), to_mask(mask)
    check_shape("mask", mask, values.shape)
    return jnp.sum(jnp.where(mask, values, 0), axis=axis)


def masked_mean(
    values: Float[Array, "..."],
    mask: Shaped[Array, "..."],
    axis: int | tuple[int, ...] | None = None,
) -> Float[Array, "..."]:
    """Mean of the values under a true mask, and 0 where none is; shapes must agree."""
    total = masked_sum(values, mask, axis)
    count = jnp.sum(to_mask(mask), axis=axis, dtype=total.dtype)
    return total / jnp.maximum(count, 1)


def masked_moments(
    values: Float[Array, "..."],
    mask: Shaped[Array, "..."],
    *,
    axis: int | tuple[int, ...],
    ddof: int,
) -> tuple[Float[Array, "..."], Float[Array, "..."], Bool[Array, "..."]]:
    """Mean, standard deviation, and whether the values differ, over ``axis`` (kept with size 1).

    "Differ" is decided from the largest and the smallest value, because the deviation of equal
    floats is rounding noise rather than 0 (the float32 mean of seven times 0.1 is not 0.1).
    """
    (values,), mask = to_floats(values), to_mask(mask)
    check_shape("mask", mask, values.shape)
    values = jnp.where(mask, values, 0)
    count = jnp.sum(mask, axis=axis, keepdims=True, dtype=values.dtype)
    mean = jnp.sum(values, axis=axis, keepdims=True) / jnp.maximum(count, 1)
    squares = jnp.where(mask, jnp.square(values - mean), 0)
    variance = jnp.sum(squares, axis=axis, keepdims=True) / jnp.maximum(count - ddof, 1)
    std = jnp.where(variance > 0, jnp.sqrt(jnp.where(variance > 0, variance, 1)), variance)

    low = jnp.min(jnp.where(mask, values, jnp.inf), axis=axis, keepdims=True)
    high = jnp.max(jnp.where(mask, values, -jnp.inf), axis=axis, keepdims=True)
    noise = 4 * jnp.finfo(values.dtype).eps * jnp.maximum(jnp.abs(low), jnp.abs(high))
    # NaN and inf count as differing, so that they show in the result instead of becoming 0.
    equal = (count == 0) | ((high - low <= noise) & jnp.isfinite(high - low))
    return mean, std, ~equal


def sequence_sum(
    values: Float[Array, "B T"],
    mask: Shaped[Array, "B T"],
    segment_ids: Int[Array, "B T"] | None = None,
) -> Float[Array, "B T"]:
    """For every token the sum over the counted tokens of its own sequence.

    Values [1, 2, 4, 8] that all count give [3, 3, 12, 12] in the segments [1, 1, 2, 2]. A NaN that
    counts stays in its own sequence, in value and gradient.

    Args:
        segment_ids: which sequence of its row a token belongs to, from 0 to T; a row is one
            sequence without it.
    """
    (values,), mask = to_floats(values), to_mask(mask)
    check_shape("mask", mask, values.shape)
    values = jnp.where(mask, values, 0)
    if segment_ids is None:
        return jnp.broadcast_to(jnp.sum(values, axis=-1, keepdims=True), values.shape)
    check_shape("segment_ids", segment_ids, values.shape)

    def of_row(values, ids):
        return jnp.zeros(values.size + 1, values.dtype).at[ids].add(values)[ids]

    return jnp.vectorize(of_row, signature="(t),(t)->(t)")(values, segment_ids)


def split_groups(rows: Shaped[Array, "B ..."], num_generations: int) -> Shaped[Array, "N G ..."]:
    """``[B, ...]`` to ``[B / num_generations, num_generations, ...]``."""
    if num_generations < 1 or rows.shape[0] % num_generations:
        raise ValueError(
            f"{rows.shape[0]} rows do not split into groups of num_generations={num_generations}; "
            "the number of rows must be a multiple of num_generations"
        )
    return rows.reshape(-1, num_generations, *rows.shape[1:])


def aggregate(
    values: Float[Array, "B T"],
    mask: Shaped[Array, "B T"],
    *,
    how: str,
    max_length: int | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
) -> WeightedMean:
    """Reduces per-token values to a mean.

    ``token_mean``: one mean over all tokens (DAPO, arXiv 2503.14476). ``sequence_mean``: mean in
    each sequence, then over the sequences that have a token (GRPO, arXiv 2402.03300). ``constant``:
    sum / (B x max_length), padding rows included (Dr. GRPO, arXiv 2503.20783). ``sequence_sum``:
    sum in each sequence, mean over the sequences that have a token.

    Args:
        max_length: read by ``constant`` only, and required there.
        segment_ids: which sequence of its row a token belongs to, where several are packed into a
            row; a row is one sequence without it. ``constant`` then counts the sequences that have
            a token instead of rows.

    Raises:
        ValueError: on an unknown ``how``, on shapes that differ, or when ``constant`` has no
            positive ``max_length``.
    """
    check_choice("how", how, AGGREGATIONS)
    (values,), mask = to_floats(values), to_mask(mask)
    if values.ndim != 2:
        raise ValueError(f"values has shape {values.shape}; expected [B, T]")
    check_shape("mask", mask, values.shape)
    longest = 0 if max_length is None else max_length
    if how == "constant" and longest <= 0:
        raise ValueError(f"how='constant' needs a positive max_length; got {max_length}")
    if how == "token_mean":
        return WeightedMean(masked_sum(values, mask), jnp.sum(mask, dtype=values.dtype))
    lengths = sequence_sum(jnp.ones_like(values), mask, segment_ids)
    if how == "constant" and segment_ids is None:
        weight = jnp.asarray(values.shape[0] * longest, values.dtype)
        return WeightedMean(masked_sum(values, mask), weight)
    # Every token of a sequence of n tokens contributes 1/n of a sequence.
    sequences = jnp.sum(jnp.where(mask, 1 / jnp.maximum(lengths, 1), 0))
    if how == "constant":
        return WeightedMean(masked_sum(values, mask), sequences * longest)
    if how == "sequence_mean":
        values = jnp.where(mask, values, 0) / jnp.maximum(lengths, 1)
    return WeightedMean(masked_sum(values, mask), sequences)
