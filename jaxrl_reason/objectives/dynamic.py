"""Weights that follow training (Dynamic reward weighting, arXiv 2509.11452)."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike
from jaxtyping import Float, PyTree

from jaxrl_reason.arrays import check_number, check_shape, to_floats
from jaxrl_reason.objectives.gradients import gram_matrix
from jaxrl_reason.objectives.pareto import hypervolume


def dynamic_weights_hypervolume(
    history: ArrayLike,
    current: ArrayLike,
    *,
    floor: float = 0.5,
    gain: float = 1.5,
) -> tuple[float, Float[np.ndarray, "N M"]]:
    """A factor for the scalarised reward, larger while the Pareto front still moves outward.

    factor = floor + gain tanh(max(dHV, 0)), where dHV is the hypervolume that ``current`` adds to
    ``history``; 0.5 and 1.5 are the authors' numbers. Host code (NumPy), once per evaluation.

    Args:
        history: rewards at earlier evaluations, ``[N, M]``. The first row is the reference point.
        current: mean validation reward of each objective now, ``[M]``.

    Returns:
        The factor, and the history, with ``current`` appended if it adds volume.
    """
    rows, point = np.asarray(history), np.asarray(current)
    if rows.ndim != 2 or len(rows) == 0:
        raise ValueError(f"history has shape {rows.shape}; expected [N, M] with N >= 1")
    if point.shape != rows.shape[1:]:
        raise ValueError(f"current has shape {point.shape}; expected {rows.shape[1:]}")
    longer = np.concatenate([rows, point[None]])
    added = hypervolume(longer, rows[0]) - hypervolume(rows, rows[0])
    factor = floor + gain * float(np.tanh(max(added, 0.0)))
    return factor, longer if added > 0 else rows


def dynamic_weights_gradient(
    weights: Float[Array, " M"],
    gradients: PyTree[Float[Array, "M ..."]],
    *,
    learning_rate: float,
    mu: float = 1e-5,
) -> Float[Array, " M"]:
    """Raises the weight of objectives whose gradients help all of them: mirror ascent.

    w <- softmax(log w + learning_rate s / mu), s_k = sum_l <g_k, g_l>. A weight of 0 stays 0.

    Args:
        gradients: an array ``[M, P]`` or a pytree of ``[M, ...]``.
        mu: the authors' regulariser, 1e-5 with their learning rate of 1e-6.
    """
    check_number("learning_rate", learning_rate, above=0)
    check_number("mu", mu, above=0)
    gram = gram_matrix(gradients)
    weights, gram = to_floats(weights, gram)
    check_shape("weights", weights, gram.shape[:1])
    help_all = jnp.sum(gram, axis=1)
    positive = weights > 0
    logits = jnp.log(jnp.where(positive, weights, 1)) + (learning_rate / mu) * help_all
    return jax.lax.stop_gradient(jax.nn.softmax(jnp.where(positive, logits, -jnp.inf)))
