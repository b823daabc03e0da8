"""Many rewards to one advantage through one score per completion.

Rewards and mask are ``[B, M]``, false where an objective does not apply; results are detached.
"""

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Shaped

from jaxrl_reason.arrays import check_number, check_shape, masked_mean, to_floats, to_mask
from jaxrl_reason.objectives.groups import (
    EPS,
    centered,
    grouped,
    imputed,
    per_objective,
    renormalized,
    standardized,
)


def weighted_sum_advantages(
    rewards: Float[Array, "B M"],
    mask: Shaped[Array, "B M"],
    *,
    weights: Float[Array, " M"],
    num_generations: int,
    scale: str = "group",
) -> Float[Array, " B"]:
    """GRPO's advantage of sum_k w_k r_k (linear scalarisation; arXiv 2402.03300).

    Args:
        scale: divide by the deviation of the ``group``, of the ``batch``, or not (``none``).
    """
    # An objective that does not apply to a prompt is 0 in each of its completions.
    groups, _ = imputed(*grouped(rewards, mask, num_generations))
    weights = per_objective("weights", weights, groups)
    scores = jnp.sum(groups * weights[None, None, :], axis=-1)
    return jax.lax.stop_gradient(centered(scores, scale=scale))


def gdpo_advantages(
    rewards: Float[Array, "B M"],
    mask: Shaped[Array, "B M"],
    *,
    weights: Float[Array, " M"],
    num_generations: int,
) -> Float[Array, " B"]:
    """Normalises each objective in its group, then the weighted sum over the batch.

    A' = sum_k w_k (r_k - mean_G) / (std_G + eps), A = (A' - mean_B) / (std_B + eps), deviations
    with n - 1, eps 1e-4 (GDPO, arXiv 2601.05242).
    """
    groups, applies = grouped(rewards, mask, num_generations)
    weights = per_objective("weights", weights, groups)
    scores, _ = standardized(groups, applies, ddof=1, eps=EPS)
    total = jnp.sum(scores * weights[None, None, :], axis=-1)
    return jax.lax.stop_gradient(renormalized(total, over="batch"))


def chebyshev_scores(
    rewards: Float[Array, "B M"],
    mask: Shaped[Array, "B M"],
    *,
    weights: Float[Array, " M"],
    ideal: Float[Array, " M"],
    num_generations: int,
    rho: float,
) -> tuple[Float[Array, "N G"], Float[Array, "N M"]]:
    """The augmented Chebyshev score of each completion and who decided it.

    Returns:
        Scores ``[N, G]``, and the share of a prompt's completions whose worst objective is k.
    """
    check_number("rho", rho, at_least=0)
    groups, applies = imputed(*grouped(rewards, mask, num_generations))
    weights = per_objective("weights", weights, groups)
    ideal = per_objective("ideal", ideal, groups)
    deficits = weights[None, None, :] * (ideal[None, None, :] - groups)
    applies = jnp.broadcast_to(applies[:, None, :], deficits.shape)
    some = jnp.any(applies, axis=-1)
    worst = jnp.max(jnp.where(applies, deficits, -jnp.inf), axis=-1)
    total = jnp.sum(jnp.where(applies, deficits, 0), axis=-1)
    scores = -jnp.where(some, worst, 0) - rho * total
    first = jnp.argmax(jnp.where(applies, deficits, -jnp.inf), axis=-1)
    decided = jax.nn.one_hot(first, deficits.shape[-1], dtype=scores.dtype)
    return scores, jnp.mean(jnp.where(some[..., None], decided, 0), axis=1)


def chebyshev_advantages(
    rewards: Float[Array, "B M"],
    mask: Shaped[Array, "B M"],
    *,
    weights: Float[Array, " M"],
    ideal: Float[Array, " M"],
    num_generations: int,
    rho: float = 0.0,
    scale: str = "group",
) -> Float[Array, " B"]:
    """GRPO's advantage of -max_k w_k (z_k - r_k) - rho sum_k w_k (z_k - r_k), with ideal point z.

    The worst objective decides, so that other than with a sum every Pareto-optimal point is the
    best one for some weights; rho > 0 rules out weakly optimal ones (Steuer and Choo 1983; in
    reinforcement learning Van Moffaert et al. 2013). Only objectives that apply are compared.

    Args:
        ideal: the best reward of each objective, at least as large as any reward.
        scale: divide by the deviation of the ``group``, of the ``batch``, or not (``none``).
    """
    scores, _ = chebyshev_scores(
        rewards, mask, weights=weights, ideal=ideal, num_generations=num_generations, rho=rho
    )
    return jax.lax.stop_gradient(centered(scores, scale=scale))


def lagrangian_weights(
    weights: Float[Array, " M"], multipliers: Float[Array, " M"]
) -> Float[Array, " M"]:
    """(w + lambda) / sum(w + lambda): what the Lagrangian gives each objective, at constant scale.

    With sum(w) = 1 the divisor is the 1 + lambda of Stooke et al. (arXiv 2007.03964).
    """
    weights, multipliers = to_floats(weights, multipliers)
    check_shape("multipliers", multipliers, weights.shape)
    total = weights + multipliers
    return total / jnp.sum(total, axis=-1, keepdims=True)


def lagrangian_advantages(
    rewards: Float[Array, "B M"],
    mask: Shaped[Array, "B M"],
    *,
    weights: Float[Array, " M"],
    multipliers: Float[Array, " M"],
    num_generations: int,
    scale: str = "group",
) -> Float[Array, " B"]:
    """Maximises sum_k w_k E r_k subject to E r_k >= threshold_k, at the present multipliers.

    GRPO's advantage of sum_k (w_k + lambda_k) r_k / sum_k (w_k + lambda_k); the thresholds do not
    depend on the completion and act through ``update_multipliers`` only (Altman 1999; for language
    models Safe RLHF, arXiv 2310.12773). A pure constraint has weight 0, a pure objective
    multiplier 0.
    """
    return weighted_sum_advantages(
        rewards,
        mask,
        weights=lagrangian_weights(weights, multipliers),
        num_generations=num_generations,
        scale=scale,
    )


def update_multipliers(
    multipliers: Float[Array, " M"],
    rewards: Float[Array, "B M"],
    mask: Shaped[Array, "B M"],
    *,
    thresholds: Float[Array, " M"],
    learning_rate: float,
    max_multiplier: float | None = None,
) -> Float[Array, " M"]:
    """Dual ascent: lambda_k <- clip(lambda_k + learning_rate (threshold_k - mean r_k), 0, max).

    An objective that applies nowhere in the batch keeps its multiplier. A threshold of -inf is no
    constraint and gives multiplier 0.
    """
    check_number("learning_rate", learning_rate, above=0)
    if max_multiplier is not None:
        check_number("max_multiplier", max_multiplier, above=0)
    multipliers, rewards, thresholds = to_floats(multipliers, rewards, thresholds)
    check_shape("multipliers", multipliers, rewards.shape[1:])
    check_shape("thresholds", thresholds, rewards.shape[1:])
    missing = thresholds - masked_mean(rewards, mask, axis=0)
    moved = jnp.clip(multipliers + learning_rate * missing, 0, max_multiplier)
    seen = jnp.any(to_mask(mask), axis=0)
    return jax.lax.stop_gradient(jnp.where(seen, moved, multipliers))
