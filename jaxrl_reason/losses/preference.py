"""Losses on pairs of completions, from sequence log-probabilities ``[B]``; unreduced, ``[B]``.

A sequence log-probability is the sum over completion tokens (for IPO the mean: see ``ipo_loss``).
Below, h is the policy's margin over the reference,
h = (log p(chosen) - log p_ref(chosen)) - (log p(rejected) - log p_ref(rejected)).
No gradient reaches the reference.
"""

from collections.abc import Callable, Mapping
from types import MappingProxyType

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from jaxrl_reason.arrays import check_number, check_shape, guard_nonfinite, to_floats


def dpo_loss(
    chosen: Float[Array, " B"],
    rejected: Float[Array, " B"],
    ref_chosen: Float[Array, " B"],
    ref_rejected: Float[Array, " B"],
    *,
    beta: float,
    label_smoothing: float = 0.0,
) -> Float[Array, " B"]:
    """-(1 - s) log sigmoid(beta h) - s log sigmoid(-beta h) (DPO, arXiv 2305.18290, eq. 7).

    ``label_smoothing`` s > 0, the share of flipped labels, is conservative DPO (Mitchell 2023).
    """
    check_number("label_smoothing", label_smoothing, at_least=0, below=0.5)
    margin = _margin(chosen, rejected, ref_chosen, ref_rejected, beta)

    def loss(h):
        agree, disagree = jax.nn.log_sigmoid(beta * h), jax.nn.log_sigmoid(-beta * h)
        return -(1 - label_smoothing) * agree - label_smoothing * disagree

    return guard_nonfinite(loss, margin)


def ipo_loss(
    chosen: Float[Array, " B"],
    rejected: Float[Array, " B"],
    ref_chosen: Float[Array, " B"],
    ref_rejected: Float[Array, " B"],
    *,
    beta: float,
) -> Float[Array, " B"]:
    """(h - 1 / (2 beta))^2 (IPO, arXiv 2310.12036, eq. 17, whose tau is ``beta``).

    As its authors advise, and as TRL does, pass log-probabilities averaged over completion tokens
    instead of summed.
    """
    margin = _margin(chosen, rejected, ref_chosen, ref_rejected, beta)
    return guard_nonfinite(lambda h: jnp.square(h - 1 / (2 * beta)), margin)


def hinge_dpo_loss(
    chosen: Float[Array, " B"],
    rejected: Float[Array, " B"],
    ref_chosen: Float[Array, " B"],
    ref_rejected: Float[Array, " B"],
    *,
    beta: float,
) -> Float[Array, " B"]:
    """max(0, 1 - beta h) (SLiC's hinge on DPO's margin, arXiv 2309.06657)."""
    margin = _margin(chosen, rejected, ref_chosen, ref_rejected, beta)
    return guard_nonfinite(lambda h: jax.nn.relu(1 - beta * h), margin)


def robust_dpo_loss(
    chosen: Float[Array, " B"],
    rejected: Float[Array, " B"],
    ref_chosen: Float[Array, " B"],
    ref_rejected: Float[Array, " B"],
    *,
    beta: float,
    label_smoothing: float,
) -> Float[Array, " B"]:
    """(-(1 - s) log sigmoid(beta h) + s log sigmoid(-beta h)) / (1 - 2 s).

    Robust DPO (arXiv 2403.00409): an unbiased estimate of the DPO loss when a share
    s < 1/2 of the labels is flipped.
    """
    check_number("label_smoothing", label_smoothing, at_least=0, below=0.5)
    margin = _margin(chosen, rejected, ref_chosen, ref_rejected, beta)

    def loss(h):
        agree, disagree = jax.nn.log_sigmoid(beta * h), jax.nn.log_sigmoid(-beta * h)
        return (-(1 - label_smoothing) * agree + label_smoothing * disagree) / (
            1 - 2 * label_smoothing
        )

    return guard_nonfinite(loss, margin)


def preference_metrics(
    chosen: Float[Array, " B"],
    rejected: Float[Array, " B"],
    ref_chosen: Float[Array, " B"],
    ref_rejected: Float[Array, " B"],
    *,
    beta: float,
) -> dict[str, Float[Array, " B"]]:
    """TRL's reward metrics, one value per pair, detached.

    The implicit reward is beta log(p / p_ref) (DPO, arXiv 2305.18290).

    Returns:
        ``rewards/chosen``, ``rewards/rejected``, ``rewards/margins``, and ``rewards/accuracies``
        (1 where chosen > rejected), each ``[B]``.
    """
    chosen, rejected, ref_chosen, ref_rejected = _pair(
        chosen, rejected, ref_chosen, ref_rejected, beta
    )
    chosen_rewards = jax.lax.stop_gradient(beta * (chosen - ref_chosen))
    rejected_rewards = jax.lax.stop_gradient(beta * (rejected - ref_rejected))
    return {
        "rewards/chosen": chosen_rewards,
        "rewards/rejected": rejected_rewards,
        "rewards/margins": chosen_rewards - rejected_rewards,
        "rewards/accuracies": (chosen_rewards > rejected_rewards).astype(chosen_rewards.dtype),
    }


def _pair(chosen, rejected, ref_chosen, ref_rejected, beta):
    check_number("beta", beta, above=0)
    arrays = to_floats(chosen, rejected, ref_chosen, ref_rejected)
    for name, array in zip(("rejected", "ref_chosen", "ref_rejected"), arrays[1:], strict=True):
        check_shape(name, array, arrays[0].shape)
    return arrays


def _margin(chosen, rejected, ref_chosen, ref_rejected, beta):
    chosen, rejected, ref_chosen, ref_rejected = _pair(
        chosen, rejected, ref_chosen, ref_rejected, beta
    )
    return (chosen - rejected) - jax.lax.stop_gradient(ref_chosen - ref_rejected)


PREFERENCE_LOSSES: Mapping[str, Callable[..., Float[Array, " B"]]] = MappingProxyType(
    {"sigmoid": dpo_loss, "ipo": ipo_loss, "hinge": hinge_dpo_loss, "robust": robust_dpo_loss}
)
"""TRL's ``loss_type`` names. All take the four arrays and ``beta``; ``SMOOTHED_LOSSES`` also take
``label_smoothing``."""

SMOOTHED_LOSSES = frozenset({"sigmoid", "robust"})
