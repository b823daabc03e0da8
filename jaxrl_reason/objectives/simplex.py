"""Weights of M vectors from their Gram matrix: min-norm points and their relatives.

Everything here is ``[M, M]`` algebra on ``gram[i, j] = <v_i, v_j>`` with a mask ``[M]``, false for
vectors to leave out; vmap over groups. Vectors may be clones of each other, zero, or dependent.
The weights are detached: where they are not unique an argmin has no derivative.
"""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Bool, Float, Int, Shaped

from jaxrl_reason.arrays import check_choice, check_number, check_shape, to_floats, to_mask

MAX_FACES = 8
"""M vertices make 2^M - 1 faces; more than 255 systems for each group are no longer cheap."""


def min_norm_weights(
    gram: Float[Array, "M M"], mask: Shaped[Array, " M"], *, method: str = "faces", steps: int = 200
) -> Float[Array, " M"]:
    """argmin of w^T gram w over the simplex {w >= 0, sum w = 1, w_k = 0 where the mask is false}.

    The problem of MGDA (Desideri 2012; Sener and Koltun, arXiv 1810.04650). The weights need
    not be unique, the point sum_k w_k v_k is. All weights are 0 when the mask is.

    Args:
        method: ``faces`` solves each face of the simplex and keeps the best: exact, M <= 8.
            ``frank_wolfe`` iterates from uniform weights with an exact line search.
        steps: iterations of ``frank_wolfe``; ``faces`` does not read it.
    """
    check_choice("method", method, ("faces", "frank_wolfe"))
    gram, mask = _masked_gram(gram, mask)
    weights = _faces(gram, mask) if method == "faces" else _frank_wolfe(gram, mask, steps)
    return jax.lax.stop_gradient(weights)


def capped_weights(
    weights: Float[Array, " M"], mask: Shaped[Array, " M"], *, max_weight: float
) -> Float[Array, " M"]:
    """The closest weights on the simplex with none above ``max_weight`` (Euclidean projection).

    With too few live vectors for the cap, it is relaxed to 1 / their number.
    """
    check_number("max_weight", max_weight, above=0, at_most=1)
    (weights,), mask = to_floats(weights), to_mask(mask)
    check_shape("mask", mask, weights.shape)
    weights = jnp.where(mask, weights, 0)
    count = jnp.sum(mask, dtype=weights.dtype)
    cap = jnp.maximum(max_weight, 1 / jnp.maximum(count, 1))

    def shifted(shift):
        return jnp.where(mask, jnp.clip(weights + shift, 0, cap), 0)

    # The sum is piecewise linear and increasing in the shift, with corners where a weight meets a
    # bound, so interpolating between corners is exact.
    corners = jnp.sort(jnp.concatenate([-weights, cap - weights]))
    sums = jax.vmap(lambda shift: jnp.sum(shifted(shift)))(corners)
    projected = shifted(jnp.interp(jnp.ones_like(cap), sums, corners))
    return jax.lax.stop_gradient(jnp.where(jnp.max(weights) <= cap, weights, projected))


def pcgrad_weights(
    gram: Float[Array, "M M"], mask: Shaped[Array, " M"], orders: Int[Array, "M M"]
) -> Float[Array, " M"]:
    """Coefficients of PCGrad's sum (arXiv 2001.06782, algorithm 1); they need not sum to 1.

    Each v_i loses its component along every v_j, j in the order ``orders[i]``, against which it
    still points.
    """
    gram, mask = _masked_gram(gram, mask)
    orders = jnp.asarray(orders)
    check_shape("orders", orders, gram.shape)

    def project(i, order):
        def along(k, coefficients):
            j = order[k]
            inner = jnp.dot(coefficients, gram[:, j], precision=jax.lax.Precision.HIGHEST)
            square = gram[j, j]
            conflict = (inner < 0) & (j != i) & (square > 0)
            step = jnp.where(conflict, inner / jnp.where(square > 0, square, 1), 0)
            return coefficients.at[j].add(-step)

        start = jax.nn.one_hot(i, gram.shape[0], dtype=gram.dtype)
        return jax.lax.fori_loop(0, gram.shape[0], along, start)

    coefficients = jax.vmap(project)(
        jnp.arange(gram.shape[0], dtype=orders.dtype), orders
    )  # [M, M]
    return jax.lax.stop_gradient(jnp.sum(jnp.where(mask[:, None], coefficients, 0), axis=0))


def mean_pcgrad_weights(gram: Float[Array, "M M"], mask: Shaped[Array, " M"]) -> Float[Array, " M"]:
    """``pcgrad_weights`` averaged over all M! orders: no randomness; M <= 6."""
    size = gram.shape[-1]
    if size > 6:
        raise ValueError(f"{size} objectives have too many orders to average over; use at most 6")
    orders = jnp.asarray(list(itertools.permutations(range(size))), jnp.int32)
    over_orders = jax.vmap(lambda order: pcgrad_weights(gram, mask, jnp.tile(order, (size, 1))))
    return jnp.mean(over_orders(orders), axis=0)


def cagrad_weights(
    gram: Float[Array, "M M"], mask: Shaped[Array, " M"], *, c: float
) -> Float[Array, " M"]:
    """Coefficients of CAGrad's direction v_0 + c |v_0| v_w / |v_w| (arXiv 2110.14048).

    v_0 is the mean vector and w minimises <v_w, v_0> + c |v_0| |v_w| over the simplex, found
    exactly by solving each face (M <= 8). Where v_w = 0, the direction is v_0.
    """
    check_number("c", c, at_least=0)
    gram, mask = _masked_gram(gram, mask)
    count = jnp.maximum(jnp.sum(mask, dtype=gram.dtype), 1)
    mean = mask.astype(gram.dtype) / count
    inner = _apply(gram, mean)  # <v_k, v_0>
    radius = c * jnp.sqrt(jnp.maximum(jnp.sum(inner * mean), 0))

    faces, systems = _face_systems(gram)
    # On a face the minimum has gram w proportional to x - inner, where the multiplier x solves a
    # quadratic whose larger root makes the weights sum to a positive number.
    sides = jnp.stack([faces, faces * inner[None, :]], axis=-1)
    ones, inners = jnp.moveaxis(jnp.linalg.solve(systems, sides), -1, 0)  # [F, M] each
    p, q = jnp.sum(ones, axis=-1), jnp.sum(inners, axis=-1)
    rest = jnp.sum(inners * inner[None, :], axis=-1) - jnp.square(radius)
    root = (q + jnp.sqrt(jnp.maximum(jnp.square(q) - p * rest, 0))) / p
    candidates = _feasible(root[:, None] * ones - inners, faces)
    candidates = jnp.concatenate([candidates, _faces(gram, mask)[None]])
    lengths = jnp.sqrt(jnp.maximum(_squared_norms(gram, candidates), 0))
    values = jnp.sum(candidates * inner[None, :], axis=-1) + radius * lengths
    best = _best(candidates, values, mask)
    length = lengths[best]
    # Where the parts of v_w cancel to this, its direction is rounding noise.
    parts = jnp.sum(candidates[best] * jnp.sqrt(jnp.diagonal(gram)))
    vanishes = jnp.square(length) <= 8 * jnp.finfo(gram.dtype).eps * jnp.square(parts)
    pull = jnp.where(vanishes, 0, radius / jnp.where(vanishes, 1, length))
    return jax.lax.stop_gradient(mean + pull * candidates[best])


def _masked_gram(gram, mask) -> tuple[Float[Array, "M M"], Bool[Array, " M"]]:
    (gram,), mask = to_floats(gram), to_mask(mask)
    if gram.ndim != 2 or gram.shape[0] != gram.shape[1]:
        raise ValueError(f"gram has shape {gram.shape}; expected [M, M]")
    check_shape("mask", mask, gram.shape[:1])
    return jnp.where(mask[:, None] & mask[None, :], gram, 0), mask


def _apply(gram, weights):
    return jnp.einsum("ij,...j->...i", gram, weights, precision=jax.lax.Precision.HIGHEST)


def _squared_norms(gram, weights):
    return jnp.sum(weights * _apply(gram, weights), axis=-1)


def _face_systems(gram) -> tuple[Float[Array, "F M"], Float[Array, "F M M"]]:
    """Each face as a 0/1 row, and the Gram matrix of its vectors (identity elsewhere)."""
    size = gram.shape[0]
    if size > MAX_FACES:
        raise ValueError(
            f"{size} objectives have {2**size - 1} faces, and method='faces' allows at most "
            f"{MAX_FACES} objectives; use method='frank_wolfe'"
        )
    corners = [face for face in itertools.product((0, 1), repeat=size) if any(face)]
    faces = np.asarray(sorted(corners, key=sum), np.bool_)  # small faces first, so they win ties
    both = faces[:, :, None] & faces[:, None, :]
    systems = jnp.where(both, gram[None], jnp.eye(size, dtype=gram.dtype)[None])
    return jnp.asarray(faces, gram.dtype), systems


def _feasible(candidates, faces):
    """Moves candidates into the simplex; one for which that is impossible becomes 0.

    Solutions of singular systems are noise. Made feasible they are harmless, because the best
    feasible candidate is kept, and an optimum always lies on a face of independent vectors.
    """
    candidates = jnp.maximum(candidates, 0) * faces
    total = jnp.sum(candidates, axis=-1, keepdims=True)
    useful = (total > 0) & jnp.isfinite(total)
    return jnp.where(useful, candidates / jnp.where(useful, total, 1), 0)


def _best(candidates, values, mask):
    """Index of the smallest value among candidates that are on the simplex of the mask."""
    inside = jnp.all((candidates == 0) | mask[None, :], axis=-1) & jnp.any(candidates != 0, axis=-1)
    return jnp.argmin(jnp.where(inside, values, jnp.inf))


def _faces(gram, mask):
    faces, systems = _face_systems(gram)
    # [gram 1; 1^T 0] [w; x] = [0; 1] on each face.
    border = jnp.concatenate([faces, jnp.zeros_like(faces[:, :1])], axis=-1)
    systems = jnp.concatenate([systems, faces[:, None, :]], axis=1)
    systems = jnp.concatenate([systems, border[:, :, None]], axis=2)
    side = jnp.zeros_like(border).at[:, -1].set(1)
    solutions = jnp.linalg.solve(systems, side[:, :, None])[:, :-1, 0]
    candidates = _feasible(solutions, faces)
    best = _best(candidates, _squared_norms(gram, candidates), mask)
    return jnp.where(mask, candidates[best], 0)


def _frank_wolfe(gram, mask, steps):
    check_number("steps", steps, at_least=1)
    count = jnp.maximum(jnp.sum(mask, dtype=gram.dtype), 1)

    def improve(_, weights):
        slope = _apply(gram, weights)
        corner = jnp.argmin(jnp.where(mask, slope, jnp.inf))
        here = jnp.sum(weights * slope)
        gain = here - slope[corner]
        curvature = gain - slope[corner] + gram[corner, corner]
        step = jnp.clip(
            jnp.where(curvature > 0, gain / jnp.where(curvature > 0, curvature, 1), 0), 0, 1
        )
        moved = (1 - step) * weights + step * jax.nn.one_hot(
            corner, weights.size, dtype=weights.dtype
        )
        return jnp.where(mask, moved, 0)

    return jax.lax.fori_loop(0, steps, improve, mask.astype(gram.dtype) / count)
