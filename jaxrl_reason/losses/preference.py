"""Losses on pairs of completions, from sequence log-probabilities ``[B]``; unreduced, ``[B]``.

A sequence log-probability is the sum over completion tokens, and the mean for ``ipo_loss`` and
``dpo_norm_loss``. Below, c = log(p / p_ref) of the chosen completion, r that of the rejected one,
and h = c - r the margin of the policy over the reference. No gradient reaches the reference.

Losses that read h alone take ``f_divergence``, which replaces c and r by the scores f'(p / p_ref)
of another divergence from the reference; ``margins.f_score`` has the formulas. In the other losses
the normaliser of the f-divergence does not cancel, or log-probabilities are means.
"""

import jax
import jax.numpy as jnp

from jaxrl_reason.arrays import bounded_exp, check_number, guard_nonfinite
from jaxrl_reason.losses.margins import Rows, check_smoothing, log_ratios, logistic, score_margin


def dpo_loss(
    chosen: Rows,
    rejected: Rows,
    ref_chosen: Rows,
    ref_rejected: Rows,
    *,
    beta: float,
    label_smoothing: float = 0.0,
    f_divergence: str = "reverse_kl",
    f_alpha: float | None = None,
) -> Rows:
    """-(1 - s) log sigmoid(beta h) - s log sigmoid(-beta h) (DPO, arXiv 2305.18290, eq. 7).

    ``label_smoothing`` s > 0, the share of flipped labels, is conservative DPO (Mitchell 2023);
    TRL's ``sigmoid`` has s = 0.
    """
    check_smoothing(label_smoothing)
    arrays = (chosen, rejected, ref_chosen, ref_rejected)
    margin = score_margin(arrays, beta=beta, f_divergence=f_divergence, f_alpha=f_alpha)
    return guard_nonfinite(lambda h: logistic(beta * h, label_smoothing=label_smoothing), margin)


def dpo_norm_loss(
    chosen: Rows, rejected: Rows, ref_chosen: Rows, ref_rejected: Rows, *, beta: float
) -> Rows:
    """-log sigmoid(beta h) of log-probabilities that are means over completion tokens.

    Length-normalised DPO (Tulu 3, arXiv 2411.15124), TRL's ``sigmoid_norm``.
    """
    margin = score_margin((chosen, rejected, ref_chosen, ref_rejected), beta=beta)
    return guard_nonfinite(lambda h: -jax.nn.log_sigmoid(beta * h), margin)


def ipo_loss(
    chosen: Rows, rejected: Rows, ref_chosen: Rows, ref_rejected: Rows, *, beta: float
) -> Rows:
    """(h - 1 / (2 beta))^2 (IPO, arXiv 2310.12036, eq. 17, whose tau is ``beta``).

    As its authors advise, and as TRL does, pass log-probabilities averaged over completion tokens
    instead of summed.
    """
    margin = score_margin((chosen, rejected, ref_chosen, ref_rejected), beta=beta)
    return guard_nonfinite(lambda h: jnp.square(h - 1 / (2 * beta)), margin)


def hinge_dpo_loss(
    chosen: Rows,
    rejected: Rows,
    ref_chosen: Rows,
    ref_rejected: Rows,
    *,
    beta: float,
    f_divergence: str = "reverse_kl",
    f_alpha: float | None = None,
) -> Rows:
    """max(0, 1 - beta h) (SLiC's hinge on DPO's margin, arXiv 2309.06657)."""
    arrays = (chosen, rejected, ref_chosen, ref_rejected)
    margin = score_margin(arrays, beta=beta, f_divergence=f_divergence, f_alpha=f_alpha)
    return guard_nonfinite(lambda h: jax.nn.relu(1 - beta * h), margin)


def robust_dpo_loss(
    chosen: Rows,
    rejected: Rows,
    ref_chosen: Rows,
    ref_rejected: Rows,
    *,
    beta: float,
    label_smoothing: float,
    f_divergence: str = "reverse_kl",
    f_alpha: float | None = None,
) -> Rows:
    """(-(1 - s) log sigmoid(beta h) + s log sigmoid(-beta h)) / (1 - 2 s).

    Robust DPO (arXiv 2403.00409): an unbiased estimate of the DPO loss when a share
    s < 1/2 of the labels is flipped.
    """
    check_smoothing(label_smoothing)
    arrays = (chosen, rejected, ref_chosen, ref_rejected)
    margin = score_margin(arrays, beta=beta, f_divergence=f_divergence, f_alpha=f_alpha)

    def loss(h):
        agree, disagree = jax.nn.log_sigmoid(beta * h), jax.nn.log_sigmoid(-beta * h)
        return (-(1 - label_smoothing) * agree + label_smoothing * disagree) / (
            1 - 2 * label_smoothing
        )

    return guard_nonfinite(loss, margin)


def exo_loss(
    chosen: Rows,
    rejected: Rows,
    ref_chosen: Rows,
    ref_rejected: Rows,
    *,
    beta: float,
    label_smoothing: float,
    f_divergence: str = "reverse_kl",
    f_alpha: float | None = None,
) -> Rows:
    """KL(q || (1 - s, s)) of q = (sigmoid(beta h), sigmoid(-beta h)).

    EXO on pairs (arXiv 2402.00856, eq. 16). From a hard label that KL is infinite, so
    ``label_smoothing`` s must be above 0; 1e-3 is recommended.
    """
    check_number("label_smoothing", label_smoothing, above=0, below=0.5)
    arrays = (chosen, rejected, ref_chosen, ref_rejected)
    margin = score_margin(arrays, beta=beta, f_divergence=f_divergence, f_alpha=f_alpha)

    def loss(h):
        agree, disagree = jax.nn.log_sigmoid(beta * h), jax.nn.log_sigmoid(-beta * h)
        first = jnp.exp(agree) * (agree - jnp.log1p(-label_smoothing))
        return first + jnp.exp(disagree) * (disagree - jnp.log(label_smoothing))

    return guard_nonfinite(loss, margin)


def discopop_loss(
    chosen: Rows,
    rejected: Rows,
    ref_chosen: Rows,
    ref_rejected: Rows,
    *,
    beta: float,
    discopop_tau: float = 0.05,
    f_divergence: str = "reverse_kl",
    f_alpha: float | None = None,
) -> Rows:
    """-(1 - m) log sigmoid(z) + m exp(-z), z = beta h, m = sigmoid(z / tau).

    The log-ratio modulated loss that DiscoPOP found (arXiv 2406.08414, eq. 5); its tau is 0.05.
    The exponential is continued by its tangent above exp(20), which only tau > 1 can reach.
    """
    check_number("discopop_tau", discopop_tau, above=0)
    arrays = (chosen, rejected, ref_chosen, ref_rejected)
    margin = score_margin(arrays, beta=beta, f_divergence=f_divergence, f_alpha=f_alpha)

    def loss(h):
        z = beta * h
        # As a sum of logarithms: the product would be 0 x inf where z is very negative.
        exponential = bounded_exp(jax.nn.log_sigmoid(z / discopop_tau) - z)
        return exponential - jax.nn.sigmoid(-z / discopop_tau) * jax.nn.log_sigmoid(z)

    return guard_nonfinite(loss, margin)


def nca_loss(
    chosen: Rows, rejected: Rows, ref_chosen: Rows, ref_rejected: Rows, *, beta: float
) -> Rows:
    """-log sigmoid(beta c) - (log sigmoid(-beta c) + log sigmoid(-beta r)) / 2.

    Noise contrastive alignment on pairs (NCA, arXiv 2402.05369): it keeps the likelihood of the
    chosen completion from falling.
    """
    arrays = log_ratios(chosen, rejected, ref_chosen, ref_rejected, beta=beta)

    def loss(c, r):
        noise = jax.nn.log_sigmoid(-beta * c) + jax.nn.log_sigmoid(-beta * r)
        return -jax.nn.log_sigmoid(beta * c) - 0.5 * noise

    return guard_nonfinite(loss, *arrays)


def bco_pair_loss(
    chosen: Rows, rejected: Rows, ref_chosen: Rows, ref_rejected: Rows, *, beta: float
) -> Rows:
    """-log sigmoid(beta c) - log sigmoid(-beta r) (BCO, arXiv 2404.04656).

    The paper's reward shift is 0, as in TRL; ``bco_loss`` has it.
    """
    arrays = log_ratios(chosen, rejected, ref_chosen, ref_rejected, beta=beta)
    return guard_nonfinite(
        lambda c, r: -jax.nn.log_sigmoid(beta * c) - jax.nn.log_sigmoid(-beta * r), *arrays
    )


def sppo_hard_loss(
    chosen: Rows, rejected: Rows, ref_chosen: Rows, ref_rejected: Rows, *, beta: float
) -> Rows:
    """(c - 1 / (2 beta))^2 + (r + 1 / (2 beta))^2 (SPPO, arXiv 2405.00675, eq. 4.7).

    The paper's eta is 1 / beta, and its win probabilities are 1 for chosen and 0 for rejected.
    """
    arrays = log_ratios(chosen, rejected, ref_chosen, ref_rejected, beta=beta)
    target = 0.5 / beta
    return guard_nonfinite(lambda c, r: jnp.square(c - target) + jnp.square(r + target), *arrays)


def apo_zero_loss(
    chosen: Rows, rejected: Rows, ref_chosen: Rows, ref_rejected: Rows, *, beta: float
) -> Rows:
    """1 - sigmoid(beta c) + sigmoid(beta r) (APO-zero, arXiv 2408.06266, eq. 7).

    Raises chosen and lowers rejected completions: for chosen ones better than the policy's own.
    TRL's 1 makes the loss 0 at best; the paper has none.
    """
    arrays = log_ratios(chosen, rejected, ref_chosen, ref_rejected, beta=beta)
    return guard_nonfinite(
        lambda c, r: jax.nn.sigmoid(-beta * c) + jax.nn.sigmoid(beta * r), *arrays
    )


def apo_down_loss(
    chosen: Rows, rejected: Rows, ref_chosen: Rows, ref_rejected: Rows, *, beta: float
) -> Rows:
    """sigmoid(beta c) + 1 - sigmoid(beta h) (APO-down, arXiv 2408.06266, eq. 8).

    Lowers both completions, rejected more: for chosen ones worse than the policy's own. TRL's 1
    makes the loss 0 at best; the paper has none.
    """
    arrays = log_ratios(chosen, rejected, ref_chosen, ref_rejected, beta=beta)
    return guard_nonfinite(
        lambda c, r: jax.nn.sigmoid(beta * c) + jax.nn.sigmoid(-beta * (c - r)), *arrays
    )


def preference_metrics(
    chosen: Rows, rejected: Rows, ref_chosen: Rows, ref_rejected: Rows, *, beta: float
) -> dict[str, Rows]:
    """TRL's reward metrics, one value per pair, detached.

    The implicit reward is beta log(p / p_ref) (DPO, arXiv 2305.18290), whatever the divergence.

    Returns:
        ``rewards/chosen``, ``rewards/rejected``, ``rewards/margins``, and ``rewards/accuracies``
        (1 where chosen > rejected), each ``[B]``.
    """
    ratios = log_ratios(chosen, rejected, ref_chosen, ref_rejected, beta=beta)
    chosen_rewards, rejected_rewards = (jax.lax.stop_gradient(beta * ratio) for ratio in ratios)
    return {
        "rewards/chosen": chosen_rewards,
        "rewards/rejected": rejected_rewards,
        "rewards/margins": chosen_rewards - rejected_rewards,
        "rewards/accuracies": (chosen_rewards > rejected_rewards).astype(chosen_rewards.dtype),
    }
