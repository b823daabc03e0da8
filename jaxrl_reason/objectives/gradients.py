"""M gradients to one update direction: MGDA, PCGrad, CAGrad.

``gradients`` is an array ``[M, P]`` or a pytree whose leaves are ``[M, ...]``. Only inner products
of whole gradients decide, so the methods see an ``[M, M]`` matrix and the tree is read twice. To
whoever differentiates a direction, the weights in it are constants.
"""

import functools

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, PyTree, Shaped

from jaxrl_reason.arrays import check_choice, check_shape, to_floats, to_mask
from jaxrl_reason.objectives.simplex import cagrad_weights, min_norm_weights, pcgrad_weights


def gram_matrix(gradients: PyTree[Float[Array, "M ..."]]) -> Float[Array, "M M"]:
    """Inner products of the M gradients over all leaves, in full precision.

    A product of each pair: one of all with all would first lay out every leaf anew, which takes as
    much memory again, and on TPUs minutes to compile.
    """
    leaves = jax.tree.leaves(gradients)
    count = _count(leaves)

    pairs = [(i, j) for i in range(count) for j in range(i, count)]

    def inner(leaf):
        (leaf,) = to_floats(leaf)
        # tensordot keeps the leaf's sharding, which a reshape to [M, P] would not.
        axes = (tuple(range(leaf.ndim - 1)),) * 2
        product = functools.partial(jnp.tensordot, axes=axes, precision=jax.lax.Precision.HIGHEST)
        return jnp.stack([product(leaf[i], leaf[j]) for i, j in pairs])

    of_pairs = jnp.sum(jnp.stack(to_floats(*[inner(leaf) for leaf in leaves])), axis=0)
    number = {pair: place for place, pair in enumerate(pairs)}
    every = range(count)
    places = [[number[min(i, j), max(i, j)] for j in every] for i in every]
    return of_pairs[jnp.asarray(places)]


def combine(
    gradients: PyTree[Float[Array, "M ..."]], weights: Float[Array, " M"]
) -> PyTree[Float[Array, "..."]]:
    """sum_k weights[k] gradients[k], leaf by leaf."""

    def mix(leaf):
        (leaf,) = to_floats(leaf)
        precision = jax.lax.Precision.HIGHEST
        return jnp.tensordot(weights.astype(leaf.dtype), leaf, axes=(0, 0), precision=precision)

    return jax.tree.map(mix, gradients)


def mgda(
    gradients: PyTree[Float[Array, "M ..."]],
    *,
    mask: Shaped[Array, " M"] | None = None,
    normalize: str = "none",
    method: str = "faces",
    steps: int = 200,
) -> PyTree[Float[Array, "..."]]:
    """The shortest vector in the convex hull of the gradients (arXiv 1810.04650).

    Its inner product with every gradient is at least its squared length, so that no objective is
    worked against; it is 0 at a Pareto-stationary point.

    Args:
        mask: false for gradients to leave out.
        normalize: ``l2`` finds the weights for gradients of unit length, as the authors' code does,
            and applies them to the gradients as they are.
        method: see ``min_norm_weights``, as for ``steps``.
    """
    check_choice("normalize", normalize, ("none", "l2"))
    gradients, mask = _live(gradients, mask)
    gram = gram_matrix(gradients)
    if normalize == "l2":
        squares = jnp.diagonal(gram)
        inverse = jax.lax.rsqrt(jnp.where(squares > 0, squares, 1))
        scaled = gram * inverse[:, None] * inverse[None, :]
    else:
        scaled = gram
    weights = min_norm_weights(scaled, mask, method=method, steps=steps)
    return combine(gradients, weights)


def pcgrad(
    gradients: PyTree[Float[Array, "M ..."]],
    key: Array,
    *,
    mask: Shaped[Array, " M"] | None = None,
) -> PyTree[Float[Array, "..."]]:
    """Sum of the gradients, each first projected off those it conflicts with, in random order.

    If <g_i, g_j> < 0 then g_i <- g_i - <g_i, g_j> / |g_j|^2 g_j, with the original g_j
    (arXiv 2001.06782, algorithm 1).

    Args:
        key: decides the order, drawn anew for each gradient.
        mask: false for gradients to leave out.
    """
    gradients, mask = _live(gradients, mask)
    gram = gram_matrix(gradients)
    size = gram.shape[0]
    keys = jax.random.split(key, size)
    orders = jax.vmap(lambda one: jax.random.permutation(one, size))(keys)
    return combine(gradients, pcgrad_weights(gram, mask, orders))


def cagrad(
    gradients: PyTree[Float[Array, "M ..."]],
    *,
    c: float,
    mask: Shaped[Array, " M"] | None = None,
) -> PyTree[Float[Array, "..."]]:
    """The direction within c |g_0| of the mean gradient g_0 that helps the worst objective most.

    CAGrad, arXiv 2110.14048, algorithm 1, without the later division by 1 + c of its toy code.
    c = 0 is the mean gradient, and a large c turns to MGDA's direction.
    """
    gradients, mask = _live(gradients, mask)
    gram = gram_matrix(gradients)
    return combine(gradients, cagrad_weights(gram, mask, c=c))


def _count(gradients) -> int:
    sizes = {jnp.shape(leaf)[:1] for leaf in jax.tree.leaves(gradients)}
    if len(sizes) != 1 or () in sizes:
        raise ValueError(f"leaves have leading sizes {sizes}; expected one M, the objectives")
    return sizes.pop()[0]


def _live(gradients, mask):
    """Gradients with 0 for those that are left out, and the mask as an array."""
    size = _count(gradients)
    if mask is None:
        return gradients, jnp.ones(size, jnp.bool_)
    mask = to_mask(mask)
    check_shape("mask", mask, (size,))

    def keep(leaf):
        return jnp.where(mask.reshape(size, *[1] * (jnp.ndim(leaf) - 1)), leaf, 0)

    # A weight of 0 would not take away a NaN.
    return jax.tree.map(keep, gradients), mask
