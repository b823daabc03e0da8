"""Many rewards to one advantage by resolving their conflicts: P-FAB and its family.

Each objective's rewards, standardised in their groups, are a vector z_k over completions. A rule
that combines gradients combines these vectors instead, which costs no backward pass: the gradient
of objective k is J^T z_k for one matrix J of scores, so this takes J J^T for the identity.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Shaped

from jaxrl_reason.arrays import check_choice, check_number
from jaxrl_reason.objectives.groups import (
    SCALES,
    grouped,
    per_objective,
    renormalized,
    standardized,
)
from jaxrl_reason.objectives.simplex import (
    cagrad_weights,
    capped_weights,
    mean_pcgrad_weights,
    min_norm_weights,
)

SCOPES = ("group", "batch")
MIN_LIVE_FRACTION = 0.02
"""At batch scope, P-FAB leaves out an objective that is live in a smaller share of the groups."""

Balanced = tuple[Float[Array, " B"], Float[Array, "N M"]]


def pfab_advantages(
    rewards: Float[Array, "B M"],
    mask: Shaped[Array, "B M"],
    *,
    num_generations: int,
    scope: str = "group",
    renormalize: str = "batch",
    min_std: float | Float[Array, " M"] | None,
    max_weight: float | None = None,
    frank_wolfe_steps: int | None = None,
) -> Balanced:
    """P-FAB, Pareto-frontier guided advantage balancing (arXiv 2604.04415).

    z_k = (r_k - mean_G) / std_G with the population deviation; C = Z^T Z / G;
    w = argmin over the simplex of w^T C w; A = sum_k w_k z_k. Then <z_k, A> >= |A|^2 for every live
    objective: none is worked against. The paper leaves the wiring open. This is our reading of it.

    Args:
        scope: ``group`` finds weights for each prompt. ``batch`` finds one set for all, from
            vectors over the whole batch, where an objective that is live in few groups is short and
            so weighs more: for uncorrelated ones, w_k is proportional to 1 / (live share).
        renormalize: standardise A over the ``batch`` as GDPO does, over each ``group`` (which
            amplifies noise where objectives cancel), or leave it (``none``).
        min_std: an objective with a smaller deviation in a group is left out there. Needed: one
            that does not vary is the shortest vector, and would take all weight and stop learning.
            ``None`` lets it do so, as an ablation.
        max_weight: no weight above this; ours, meant for batch scope. See ``capped_weights``.
        frank_wolfe_steps: solve by that many steps of Frank-Wolfe, as the paper does, instead of
            exactly.

    Returns:
        Advantages ``[B]`` and weights: ``[B / num_generations, M]`` at group scope, ``[1, M]`` at
        batch scope; 0 for objectives left out. Detached.
    """
    if max_weight is not None:
        check_number("max_weight", max_weight, above=0, at_most=1)

    def weigh(gram, live):
        if frank_wolfe_steps is None:
            weights = min_norm_weights(gram, live, method="faces")
        else:
            weights = min_norm_weights(gram, live, method="frank_wolfe", steps=frank_wolfe_steps)
        return (
            weights if max_weight is None else capped_weights(weights, live, max_weight=max_weight)
        )

    return _balance(
        rewards,
        mask,
        weigh,
        num_generations=num_generations,
        scope=scope,
        renormalize=renormalize,
        min_std=min_std,
        min_live=MIN_LIVE_FRACTION,
    )


def mgda_advantages(
    rewards: Float[Array, "B M"],
    mask: Shaped[Array, "B M"],
    *,
    num_generations: int,
    scope: str = "batch",
    renormalize: str = "batch",
    min_std: float | Float[Array, " M"] = 0.0,
) -> Balanced:
    """MGDA (arXiv 1810.04650) on the vectors z_k: P-FAB without its guards on weights.

    Arguments and results are those of ``pfab_advantages``.
    """
    return _balance(
        rewards,
        mask,
        min_norm_weights,
        num_generations=num_generations,
        scope=scope,
        renormalize=renormalize,
        min_std=min_std,
    )


def pcgrad_advantages(
    rewards: Float[Array, "B M"],
    mask: Shaped[Array, "B M"],
    *,
    num_generations: int,
    scope: str = "batch",
    renormalize: str = "batch",
    min_std: float | Float[Array, " M"] = 0.0,
) -> Balanced:
    """PCGrad (arXiv 2001.06782) on the vectors z_k, averaged over its random orders; M <= 6.

    Arguments and results are those of ``pfab_advantages``, but weights need not sum to 1.
    """
    return _balance(
        rewards,
        mask,
        mean_pcgrad_weights,
        num_generations=num_generations,
        scope=scope,
        renormalize=renormalize,
        min_std=min_std,
    )


def cagrad_advantages(
    rewards: Float[Array, "B M"],
    mask: Shaped[Array, "B M"],
    *,
    num_generations: int,
    c: float,
    scope: str = "batch",
    renormalize: str = "batch",
    min_std: float | Float[Array, " M"] = 0.0,
) -> Balanced:
    """CAGrad (arXiv 2110.14048) on the vectors z_k.

    Arguments and results are those of ``pfab_advantages``, but weights need not sum to 1; ``c`` is
    that of ``cagrad``.
    """
    return _balance(
        rewards,
        mask,
        lambda gram, live: cagrad_weights(gram, live, c=c),
        num_generations=num_generations,
        scope=scope,
        renormalize=renormalize,
        min_std=min_std,
    )


def _balance(
    rewards,
    mask,
    weigh: Callable[[Array, Array], Array],
    *,
    num_generations: int,
    scope: str,
    renormalize: str,
    min_std,
    min_live: float = 0.0,
) -> Balanced:
    check_choice("scope", scope, SCOPES)
    check_choice("renormalize", renormalize, SCALES)
    groups, applies = grouped(rewards, mask, num_generations)
    if min_std is not None:
        check_number("min_std", min_std, at_least=0)
        min_std = per_objective("min_std", min_std, groups)
    vectors, live = standardized(groups, applies, ddof=0, eps=0.0, min_std=min_std)
    live = jnp.any(applies, axis=1) if min_std is None else live
    grams = jnp.einsum("ngi,ngj->nij", vectors, vectors, precision=jax.lax.Precision.HIGHEST)
    grams = grams / num_generations
    if scope == "group":
        weights = jax.vmap(weigh)(grams, live)  # [N, M]
    else:
        share = jnp.mean(live, axis=0, dtype=grams.dtype)
        weights = weigh(jnp.mean(grams, axis=0), (share > 0) & (share >= min_live))[None]  # [1, M]
    spread = jnp.broadcast_to(weights, live.shape)
    advantages = jnp.sum(vectors * spread[:, None, :], axis=-1)  # [N, G]
    return jax.lax.stop_gradient((renormalized(advantages, over=renormalize), weights))
