"""How the objectives of a stage conflict, and how its update agrees with MGDA on their gradients.

Aggregators combine vectors of advantages; MGDA (arXiv 1810.04650) combines gradients. Here the
gradient of every objective is computed, that of the loss with the objective's own standardised
rewards as advantages, and that of the update the stage makes. Nothing of it is used for training.
"""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl_reason.models import Params
from jaxrl_reason.models.lora import trainable
from jaxrl_reason.objectives import gram_matrix, min_norm_weights
from jaxrl_reason.sharding import jit_on_mesh, replicated
from jaxrl_reason.stages.context import Stage
from jaxrl_reason.stages.grpo import policy_objective, policy_rows
from jaxrl_reason.stages.policy_config import MORLConfig
from jaxrl_reason.stages.rollouts import Batch
from jaxrl_reason.steps import make_policy_gradient, partition

_weights = jax.jit(min_norm_weights)


class Conflict:
    """Looks at the gradients of a stage every `conflict_steps` steps.

    Without the KL term, which is no objective.

    Attributes:
        gradient_of: compiled, `(params, batch)` to the gradient of what is trained.
        gram_of: compiled, of some gradients the products of each with each.
    """

    def __init__(self, stage: Stage):
        config: MORLConfig = stage.config
        context = stage.context
        self._every, self._size = config.conflict_steps, config.num_generations
        self._rows = policy_rows(stage)
        options = {
            "objective": dataclasses.replace(policy_objective(config), beta=0.0),
            "logprob_chunk_size": config.logprob_chunk_size,
        }

        def make():
            trains = trainable(context.model.config)
            gradient_of = make_policy_gradient(context.model, trains=trains, **options)
            number = jnp.zeros((), jnp.int32)
            return jit_on_mesh(
                lambda params, batch: gradient_of(params, number, batch)[1],
                context.mesh,
                out_shardings=partition(context.params_shardings, trains)[0],
            )

        self.gradient_of = context.shared.get(make, "policy_gradient", options)
        self.gram_of = jax.jit(
            lambda *trees: gram_matrix(jax.tree.map(_stacked, *trees)),
            out_shardings=replicated(context.mesh),
        )

    def look(
        self, params: Params, step: int, batch: Batch, advantages: np.ndarray
    ) -> dict[str, float]:
        """Metrics of a step, counted from 0; none of most steps."""
        if self._every is None or step % self._every:
            return {}
        vectors = [*objective_vectors(batch.scored.rewards, batch.scored.mask, self._size)]
        gradients = []
        for vector in [*vectors, advantages]:
            placed, _ = self._rows.place(batch.rollout, vector, batch.counts, batch.sights)
            gradients.append(self.gradient_of(params, placed))
        return agreement(np.asarray(self.gram_of(*gradients), np.float64))


def objective_vectors(rewards: np.ndarray, mask: np.ndarray, size: int) -> np.ndarray:
    """Every objective's rewards `[B, M]`, standardised in groups of `size`: `[M, B]`.

    0 where an objective does not apply and in groups in which it does not vary.
    """
    vectors = np.zeros(rewards.T.shape, np.float32)
    for start, m in itertools.product(range(0, len(rewards), size), range(rewards.shape[1])):
        rows = np.flatnonzero(mask[start : start + size, m]) + start
        values = rewards[rows, m]
        if values.size and np.ptp(values) > 0:
            vectors[m, rows] = (values - values.mean()) / values.std()
    return vectors


def agreement(gram: np.ndarray) -> dict[str, float]:
    """What the inner products of M gradients and the update's, the last one, say.

    `cosine_mgda` is the cosine of the update with the shortest vector in the convex hull of the
    gradients, `least_cosine` that of the two objectives that conflict most, `least_progress` that
    of the update with the objective it helps least. Objectives without a gradient are left out, and
    numbers that need more than there are.
    """
    lengths = np.sqrt(np.diagonal(gram))
    live = lengths[:-1] > 0
    ours, theirs = gram[-1, :-1], gram[:-1, :-1]
    found = {}
    if lengths[-1] > 0 and live.any():
        found["least_progress"] = min(ours[live] / (lengths[:-1][live] * lengths[-1]))
        weights = np.asarray(_weights((theirs / theirs.max()).astype(np.float32), live))
        shortest = float(np.sqrt(max(weights @ theirs @ weights, 0.0)))
        if shortest > 0:
            found["cosine_mgda"] = weights @ ours / (shortest * lengths[-1])
    if live.sum() > 1:
        scaled = theirs[np.ix_(live, live)] / np.outer(lengths[:-1][live], lengths[:-1][live])
        found["least_cosine"] = scaled.min()
    # All are cosines, which rounding may carry beyond 1.
    return {f"objectives/{name}": float(np.clip(value, -1, 1)) for name, value in found.items()}


def _stacked(*leaves: jax.Array) -> jax.Array:
    return jnp.stack(leaves)
