"""Losses on pairs of completions that need no reference model; unreduced, ``[B]``."""

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Int

from jaxrl_reason.arrays import check_number, check_shape, guard_nonfinite
from jaxrl_reason.losses.margins import Rows, check_smoothing, logistic, to_rows


def simpo_loss(
    chosen: Rows,
    rejected: Rows,
    chosen_lengths: Int[Array, " B"],
    rejected_lengths: Int[Array, " B"],
    *,
    beta: float,
    gamma: float,
) -> Rows:
    """-log sigmoid(beta (chosen / n_chosen - rejected / n_rejected) - gamma).

    SimPO (arXiv 2405.14734, eq. 6): the margin of log-probabilities per token must exceed
    ``gamma``, which is in units of beta x log-probability here, in the paper, and in TRL.

    Args:
        chosen: summed over completion tokens, like ``rejected``.
        chosen_lengths: completion tokens; 0 counts as 1.
    """
    check_number("beta", beta, above=0)
    check_number("gamma", gamma, at_least=0)
    chosen, rejected = to_rows(chosen=chosen, rejected=rejected)
    means = (_mean(chosen, chosen_lengths, "chosen_lengths"),)
    means += (_mean(rejected, rejected_lengths, "rejected_lengths"),)
    return guard_nonfinite(lambda c, r: -jax.nn.log_sigmoid(beta * (c - r) - gamma), *means)


def orpo_loss(chosen_mean: Rows, rejected_mean: Rows, *, beta: float) -> Rows:
    """-log p_c - beta log sigmoid(log odds(p_c) - log odds(p_r)), odds(p) = p / (1 - p).

    ORPO (arXiv 2403.07691, eq. 6, whose lambda is ``beta``), where p is the geometric mean of the
    token probabilities of a completion. This is the whole loss: the likelihood of the chosen
    completion comes first, and takes the place of the reference. TRL takes that term as a mean
    over all tokens of the batch, prompts included.

    Args:
        chosen_mean: log-probabilities averaged over completion tokens, like ``rejected_mean``.
            The odds of one that rounds to 0 are bounded by the precision of the dtype.
    """
    check_number("beta", beta, above=0)
    chosen_mean, rejected_mean = to_rows(chosen_mean=chosen_mean, rejected_mean=rejected_mean)

    def loss(c, r):
        return -c - beta * jax.nn.log_sigmoid(_log_odds(c) - _log_odds(r))

    return guard_nonfinite(loss, chosen_mean, rejected_mean)


def cpo_loss(chosen: Rows, rejected: Rows, *, beta: float, label_smoothing: float = 0.0) -> Rows:
    """-(1 - s) log sigmoid(beta d) - s log sigmoid(-beta d), d = chosen - rejected.

    The preference term of CPO (arXiv 2401.08417, eq. 3): DPO against a uniform reference.
    ``label_smoothing`` s is TRL's. The paper adds the negative log-likelihood of the chosen
    completion, which has a weight of its own in TRL (``cpo_alpha``): add it as ``sft``.

    Args:
        chosen: summed over completion tokens, like ``rejected``.
    """
    check_number("beta", beta, above=0)
    check_smoothing(label_smoothing)
    chosen, rejected = to_rows(chosen=chosen, rejected=rejected)
    return guard_nonfinite(
        lambda d: logistic(beta * d, label_smoothing=label_smoothing), chosen - rejected
    )


def _mean(sums, lengths, name):
    lengths = jnp.asarray(lengths).astype(sums.dtype)
    check_shape(name, lengths, sums.shape)
    return sums / jax.lax.stop_gradient(jnp.maximum(lengths, 1))


def _log_odds(mean):
    """log(p / (1 - p)) of a log-probability."""
    mean = jnp.minimum(mean, -jnp.finfo(mean.dtype).eps)
    # expm1 keeps the digits of 1 - p near p = 1; the ones lost near p = 0 are nothing beside log p.
    return mean - jnp.log(-jnp.expm1(mean))
