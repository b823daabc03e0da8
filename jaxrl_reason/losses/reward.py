"""Losses of reward models."""

import jax
import jax.numpy as jnp

from jaxrl_reason.arrays import check_number, guard_nonfinite
from jaxrl_reason.losses.margins import Level, Rows, to_level, to_rows


def bradley_terry_loss(
    chosen_rewards: Rows,
    rejected_rewards: Rows,
    *,
    margin: Level | None = None,
    center: float = 0.0,
) -> Rows:
    """-log sigmoid(r_c - r_r - margin) + center (r_c + r_r)^2, ``[B]``.

    The negative log-likelihood of the Bradley-Terry model (InstructGPT, arXiv 2203.02155, eq. 1).

    Args:
        margin: how far apart the rewards should be, for all pairs or for each (Llama 2, arXiv
            2307.09288, eq. 2); 0 when None. No gradient flows through it.
        center: weight of the square that pulls rewards towards mean 0 (arXiv 2312.09244, eq. 2);
            TRL's ``center_rewards_coefficient``, recommended 0.01.
    """
    check_number("center", center, at_least=0)
    chosen, rejected = to_rows(chosen_rewards=chosen_rewards, rejected_rewards=rejected_rewards)
    margins = to_level("margin", 0.0 if margin is None else margin, chosen)

    def loss(chosen, rejected, margin):
        likelihood = jax.nn.log_sigmoid(chosen - rejected - margin)
        return center * jnp.square(chosen + rejected) - likelihood

    return guard_nonfinite(loss, chosen, rejected, margins)
