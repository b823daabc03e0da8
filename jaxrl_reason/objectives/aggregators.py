"""Every way from many rewards to one advantage, by name and with one signature."""

from collections.abc import Callable, Mapping
from types import MappingProxyType

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Shaped

from jaxrl_reason.arrays import to_floats
from jaxrl_reason.objectives.balance import (
    Balanced,
    cagrad_advantages,
    mgda_advantages,
    pcgrad_advantages,
    pfab_advantages,
)
from jaxrl_reason.objectives.groups import centered
from jaxrl_reason.objectives.scalarize import (
    chebyshev_scores,
    gdpo_advantages,
    lagrangian_advantages,
    lagrangian_weights,
    weighted_sum_advantages,
)


def _weighted_sum(rewards, mask, *, num_generations: int, weights, scale: str = "group"):
    advantages = weighted_sum_advantages(
        rewards, mask, weights=weights, num_generations=num_generations, scale=scale
    )
    return advantages, _row(weights)


def _gdpo(rewards, mask, *, num_generations: int, weights):
    advantages = gdpo_advantages(rewards, mask, weights=weights, num_generations=num_generations)
    return advantages, _row(weights)


def _chebyshev(
    rewards: Float[Array, "B M"],
    mask: Shaped[Array, "B M"],
    *,
    num_generations: int,
    weights: Float[Array, " M"],
    ideal: Float[Array, " M"],
    rho: float = 0.0,
    scale: str = "group",
) -> Balanced:
    scores, decided = chebyshev_scores(
        rewards, mask, weights=weights, ideal=ideal, num_generations=num_generations, rho=rho
    )
    return jax.lax.stop_gradient((centered(scores, scale=scale), decided))


def _lagrangian(
    rewards: Float[Array, "B M"],
    mask: Shaped[Array, "B M"],
    *,
    num_generations: int,
    weights: Float[Array, " M"],
    multipliers: Float[Array, " M"],
    scale: str = "group",
) -> Balanced:
    advantages = lagrangian_advantages(
        rewards,
        mask,
        weights=weights,
        multipliers=multipliers,
        num_generations=num_generations,
        scale=scale,
    )
    return advantages, _row(lagrangian_weights(jnp.asarray(weights), jnp.asarray(multipliers)))


def _row(weights):
    (weights,) = to_floats(weights)
    return jax.lax.stop_gradient(weights[None])


AGGREGATORS: Mapping[str, Callable[..., Balanced]] = MappingProxyType(
    {
        "weighted_sum": _weighted_sum,
        "gdpo": _gdpo,
        "pfab": pfab_advantages,
        "mgda": mgda_advantages,
        "pcgrad": pcgrad_advantages,
        "cagrad": cagrad_advantages,
        "chebyshev": _chebyshev,
        "lagrangian": _lagrangian,
    }
)
"""Name to ``f(rewards[B, M], mask[B, M], *, num_generations, **hyperparameters)``.

The hyperparameters are those of the ``*_advantages`` function of that name. All return advantages
``[B]`` and weights ``[N, M]`` or ``[1, M]``: one row for each of the B / num_generations prompts,
or a single row that held for the whole batch. ``weights`` rows are the given ones for
``weighted_sum`` and ``gdpo``, the effective ones for ``lagrangian``, the share of completions that
an objective decided for ``chebyshev``, and the solution for the others.
"""
