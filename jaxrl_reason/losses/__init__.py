"""Loss functions: pure, unreduced, of arrays only; importing them loads nothing but jax."""

from jaxrl_reason.losses.divergence import kl_estimate
from jaxrl_reason.losses.policy import (
    LOSS_TYPES,
    LossType,
    cispo_clip_metrics,
    cispo_loss,
    clip_metrics,
    clipped_policy_loss,
    reinforce_loss,
)
from jaxrl_reason.losses.preference import (
    PREFERENCE_LOSSES,
    SMOOTHED_LOSSES,
    dpo_loss,
    hinge_dpo_loss,
    ipo_loss,
    preference_metrics,
    robust_dpo_loss,
)
from jaxrl_reason.losses.sft import nll_loss, z_loss

__all__ = [
    "LOSS_TYPES",
    "PREFERENCE_LOSSES",
    "SMOOTHED_LOSSES",
    "LossType",
    "cispo_clip_metrics",
    "cispo_loss",
    "clip_metrics",
    "clipped_policy_loss",
    "dpo_loss",
    "hinge_dpo_loss",
    "ipo_loss",
    "kl_estimate",
    "nll_loss",
    "preference_metrics",
    "reinforce_loss",
    "robust_dpo_loss",
    "z_loss",
]
