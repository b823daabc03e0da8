"""Losses on single completions with a yes-or-no label; unreduced, ``[B]``."""

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool

from jaxrl_reason.arrays import check_number, check_shape, guard_nonfinite, to_mask
from jaxrl_reason.losses.margins import Level, Rows, to_level, to_rows


def kto_loss(
    logprobs: Rows,
    ref_logprobs: Rows,
    desirable: Bool[Array, " B"],
    kl: Level,
    *,
    beta: float,
    desirable_weight: float,
    undesirable_weight: float,
) -> Rows:
    """w_D (1 - sigmoid(beta (l - z))) where desirable, w_U (1 - sigmoid(beta (z - l))) elsewhere.

    KTO (arXiv 2402.01306, eq. 7), l = log(p / p_ref) of the summed log-probabilities and
    z = max(0, ``kl``). With kl = 0 and weights 1 it is the unpaired APO-zero, TRL's
    ``apo_zero_unpaired``.

    Args:
        desirable: label of the completion.
        kl: estimate of KL(p || p_ref), for the batch or for each row; no gradient flows through
            it. The paper's is the mean of l over prompts paired with completions of other prompts
            of the batch, taken over all microbatches and devices.
        desirable_weight: w_D, 1 where both labels are as frequent. Otherwise choose the weights so
            that weight x number of completions is about the same for both labels.
    """
    check_number("desirable_weight", desirable_weight, at_least=0)
    check_number("undesirable_weight", undesirable_weight, at_least=0)
    log_ratio, desirable, kl = _prepare(logprobs, ref_logprobs, desirable, kl, "kl", beta)

    def loss(log_ratio, kl):
        gain = beta * (log_ratio - jnp.maximum(kl, 0))
        return jnp.where(
            desirable,
            desirable_weight * jax.nn.sigmoid(-gain),
            undesirable_weight * jax.nn.sigmoid(gain),
        )

    return guard_nonfinite(loss, log_ratio, kl)


def bco_loss(
    logprobs: Rows,
    ref_logprobs: Rows,
    desirable: Bool[Array, " B"],
    shift: Level,
    *,
    beta: float,
) -> Rows:
    """-log sigmoid(beta l - d) where desirable, -log sigmoid(d - beta l) elsewhere, d = ``shift``.

    Binary classifier optimisation (BCO, arXiv 2404.04656), l = log(p / p_ref) of the summed
    log-probabilities. Weights of undesirable completions, where their prompts come from another
    distribution, are the caller's to multiply.

    Args:
        desirable: label of the completion.
        shift: a mean of rewards beta l over desirable and undesirable completions, usually a
            moving one; for the batch or for each row. No gradient flows through it.
    """
    log_ratio, desirable, shift = _prepare(logprobs, ref_logprobs, desirable, shift, "shift", beta)

    def loss(log_ratio, shift):
        logit = beta * log_ratio - shift
        return -jax.nn.log_sigmoid(jnp.where(desirable, logit, -logit))

    return guard_nonfinite(loss, log_ratio, shift)


def _prepare(logprobs, ref_logprobs, desirable, level, level_name, beta):
    """Log-ratios, labels, and the detached level for every row."""
    check_number("beta", beta, above=0)
    logprobs, ref_logprobs = to_rows(logprobs=logprobs, ref_logprobs=ref_logprobs)
    desirable = to_mask(desirable)
    check_shape("desirable", desirable, logprobs.shape)
    level = to_level(level_name, level, logprobs)
    return logprobs - jax.lax.stop_gradient(ref_logprobs), desirable, level
