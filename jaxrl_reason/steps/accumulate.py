"""Gradients over microbatches, equal to those of the whole batch.

A mean of microbatch means weighs a token by how empty its microbatch is. Here a loss leaves as
(total, weight); totals and weights are summed over microbatches and divided once.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array

from jaxrl_reason.arrays import WeightedMean
from jaxrl_reason.models import Params
from jaxrl_reason.steps.state import Metrics

Batch = dict[str, Array]
LossFn = Callable[[Params, Batch], tuple[WeightedMean, dict[str, WeightedMean]]]


def value_and_grad(loss_fn: LossFn, params: Params, batch: Batch) -> tuple[Array, Params, Metrics]:
    """Loss, gradient and metrics of a batch cut into microbatches.

    Args:
        loss_fn: `(params, microbatch) -> (loss, metrics)`, each a `WeightedMean`; the weights may
            not depend on the parameters.
        params: where to differentiate.
        batch: arrays with a leading axis of microbatches, `[k, rows, ...]`, among them
            `completion_mask`. Trailing microbatches whose mask is all false cost nothing, so one
            compiled step serves batches of different fill.

    Returns:
        `(loss, gradient, metrics)`, the means over all microbatches together.
    """

    def total(params, microbatch):
        loss, metrics = loss_fn(params, microbatch)
        return loss.total, (loss.weight, metrics)

    gradient_of_total = jax.value_and_grad(total, has_aux=True)

    def one(microbatch):
        (loss, (weight, metrics)), gradient = gradient_of_total(params, microbatch)
        return WeightedMean(loss, weight), metrics, gradient

    at = lambda i: jax.tree.map(lambda x: x[i], batch)
    mask = batch["completion_mask"]
    if mask.shape[0] == 1:
        loss, metrics, gradient = one(at(0))
    else:
        zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), jax.eval_shape(one, at(0)))
        counts = jnp.any(mask, axis=tuple(range(1, mask.ndim))).astype(jnp.int32)
        used = jnp.max(counts * jnp.arange(1, mask.shape[0] + 1, dtype=jnp.int32))
        add = lambda i, sums: jax.tree.map(jnp.add, sums, one(at(i)))
        loss, metrics, gradient = jax.lax.fori_loop(0, used, add, zeros)
    # An empty batch has weight 0 and total 0: its gradient is 0, not NaN.
    scale = 1.0 / jnp.where(loss.weight == 0, 1, loss.weight)
    gradient = jax.tree.map(lambda g: g * scale.astype(g.dtype), gradient)
    is_mean = lambda x: isinstance(x, WeightedMean)
    means = jax.tree.map(lambda m: m.mean(), metrics, is_leaf=is_mean)
    return loss.mean(), gradient, means
