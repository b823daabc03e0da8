"""Pareto fronts and hypervolumes; every objective is maximised."""

import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike
from jaxtyping import Bool, Float

from jaxrl_reason.arrays import to_floats


def pareto_front(points: Float[Array, "N M"]) -> Bool[Array, " N"]:
    """True for points that no other point dominates.

    One point dominates another when it is nowhere smaller and somewhere larger, so equal points are
    both on the front. A point with a NaN is not on the front and dominates nothing.
    """
    (points,) = to_floats(points)
    if points.ndim != 2:
        raise ValueError(f"points has shape {points.shape}; expected [N, M]")
    other, own = points[:, None, :], points[None, :, :]
    dominates = jnp.all(other >= own, axis=-1) & jnp.any(other > own, axis=-1)  # [other, own]
    return ~jnp.any(dominates, axis=0) & ~jnp.any(jnp.isnan(points), axis=-1)


def hypervolume(points: ArrayLike, reference: ArrayLike) -> float:
    """Volume of the union of the boxes between ``reference [M]`` and ``points [N, M]``.

    The S-metric of Zitzler (1999). Exact, by slicing along the last objective, in float64 on the
    host (NumPy: not for jit). Points that do not exceed the reference everywhere add nothing. The
    time grows like N^(M-1): fine for hundreds of points up to M = 4.
    """
    rows, corner = np.asarray(points, np.float64), np.asarray(reference, np.float64)
    if rows.ndim != 2 or corner.shape != rows.shape[1:]:
        raise ValueError(
            f"points has shape {rows.shape} and reference {corner.shape}; expected [N, M], [M]"
        )
    if not (np.isfinite(rows).all() and np.isfinite(corner).all()):
        raise ValueError("points and reference must be finite; got NaN or inf")
    sides = rows - corner
    return float(_volume(sides[(sides > 0).all(axis=1)]))


def _volume(sides: np.ndarray) -> float:
    """Volume of the union of the boxes from the origin to each row."""
    if len(sides) == 0:
        return 0.0
    if sides.shape[1] == 1:
        return float(sides.max())
    sides = sides[np.argsort(-sides[:, -1], kind="stable")]
    heights = sides[:, -1] - np.append(sides[1:, -1], 0.0)
    if sides.shape[1] == 2:
        return float(np.dot(heights, np.maximum.accumulate(sides[:, 0])))
    volume, front = 0.0, sides[:0, :-1]
    for side, height in zip(sides[:, :-1], heights, strict=True):
        if not (front >= side).all(axis=1).any():
            front = np.vstack([front[~(side >= front).all(axis=1)], side])
        volume += height * _volume(front) if height > 0 else 0.0
    return volume
