"""Gradients over microbatches, equal to those of the whole batch.

A mean of microbatch means weighs a token by how empty its microbatch is. Here a loss leaves as
(total, weight); totals and weights are summed over microbatches and divided once.
"""

import dataclasses
import operator
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxrl_reason.arrays import WeightedMean
from jaxrl_reason.models import Params
from jaxrl_reason.steps.state import Metrics
from jaxrl_reason.steps.trained import Trains, combine, everything, partition

Batch = dict[str, Array]


@dataclasses.dataclass(frozen=True)
class Largest:
    """The largest of values that are at least 0; 0 where there is none. A pytree."""

    value: Float[Array, ""]

    def mean(self) -> Float[Array, ""]:
        """The value itself, so that it is finished as a `WeightedMean` is."""
        return self.value

    def __add__(self, other: "Largest") -> "Largest":
        return Largest(jnp.maximum(self.value, other.value))


jax.tree_util.register_dataclass(Largest, data_fields=["value"], meta_fields=[])

LossFn = Callable[[Params, Batch], tuple[WeightedMean, Mapping[str, WeightedMean | Largest]]]


def used_microbatches(mask: Bool[Array, "k ..."]) -> Int[Array, ""]:
    """How many microbatches there are up to the last one with a true entry."""
    numbers = jnp.arange(1, mask.shape[0] + 1, dtype=jnp.int32)
    used = jnp.any(mask, axis=tuple(range(1, mask.ndim)))
    return jnp.max(jnp.where(used, numbers, 0))


def value_and_grad(
    loss_fn: LossFn,
    params: Params,
    batch: Batch,
    *,
    trains: Trains = everything,
    extra_weight: Float[Array, ""] | float = 0.0,
) -> tuple[Array, Params, Metrics]:
    """Loss, gradient and metrics of a batch cut into microbatches.

    Args:
        loss_fn: `(params, microbatch) -> (loss, metrics)`, each a `WeightedMean`, or a metric a
            `Largest`; the weights may not depend on the parameters.
        params: where to differentiate.
        trains: in which of them; no gradient of the others is computed.
        batch: arrays with a leading axis of microbatches, `[k, rows, ...]`, among them
            `completion_mask`. Trailing microbatches whose mask is all false cost nothing, so one
            compiled step serves batches of different fill.
        extra_weight: weight of what the loss counts as 0 and the batch leaves out.

    Returns:
        `(loss, gradient, metrics)`, the means over all microbatches together. The gradient has None
        where nothing is trained.
    """
    trained, frozen = partition(params, trains)

    def total(trained, microbatch):
        loss, metrics = loss_fn(combine(trained, frozen), microbatch)
        return loss.total, (loss.weight, metrics)

    gradient_of_total = jax.value_and_grad(total, has_aux=True)

    def one(microbatch):
        (loss, (weight, metrics)), gradient = gradient_of_total(trained, microbatch)
        return WeightedMean(loss, weight), metrics, gradient

    at = lambda i: jax.tree.map(lambda x: x[i], batch)
    is_sum = lambda x: isinstance(x, (WeightedMean, Largest))
    mask = batch["completion_mask"]
    if mask.shape[0] == 1:
        loss, metrics, gradient = one(at(0))
    else:
        zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), jax.eval_shape(one, at(0)))
        add = lambda i, sums: jax.tree.map(operator.add, sums, one(at(i)), is_leaf=is_sum)
        with jax.named_scope(f"at_most_{mask.shape[0]}"):  # read by the planner
            loss, metrics, gradient = jax.lax.fori_loop(0, used_microbatches(mask), add, zeros)
    extra = jnp.asarray(extra_weight, loss.weight.dtype)
    loss = WeightedMean(loss.total, loss.weight + extra)
    # An empty batch has weight 0 and total 0: its gradient is 0, not NaN.
    scale = 1.0 / jnp.where(loss.weight == 0, 1, loss.weight)
    gradient = jax.tree.map(lambda g: g * scale.astype(g.dtype), gradient)
    means = jax.tree.map(lambda m: m.mean(), metrics, is_leaf=is_sum)
    return loss.mean(), gradient, means
