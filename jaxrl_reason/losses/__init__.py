"""Loss functions: pure, unreduced, of arrays only; importing them loads nothing but jax."""

from jaxrl_reason.losses.correction import effective_sample_share, importance_weights
from jaxrl_reason.losses.covariance import clip_cov_loss, clip_cov_metrics, kl_cov_loss
from jaxrl_reason.losses.divergence import kl_estimate
from jaxrl_reason.losses.loss_types import LOSS_TYPES, LossType
from jaxrl_reason.losses.policy import (
    cispo_clip_metrics,
    cispo_loss,
    clip_metrics,
    clipped_policy_loss,
    gpg_loss,
    reinforce_loss,
    sapo_loss,
    triplet_clip_metrics,
    triplet_clipped_policy_loss,
)
from jaxrl_reason.losses.preference import (
    apo_down_loss,
    apo_zero_loss,
    bco_pair_loss,
    discopop_loss,
    dpo_loss,
    dpo_norm_loss,
    exo_loss,
    hinge_dpo_loss,
    ipo_loss,
    nca_loss,
    preference_metrics,
    robust_dpo_loss,
    sppo_hard_loss,
)
from jaxrl_reason.losses.preference_types import (
    LENGTH_NORMALIZED,
    PREFERENCE_LOSSES,
    SMOOTHED_LOSSES,
)
from jaxrl_reason.losses.reference_free import cpo_loss, orpo_loss, simpo_loss
from jaxrl_reason.losses.reward import bradley_terry_loss
from jaxrl_reason.losses.sequence import (
    gmpo_clip_metrics,
    gmpo_loss,
    gspo_clip_metrics,
    gspo_loss,
    gspo_token_loss,
    vespo_loss,
)
from jaxrl_reason.losses.sft import nll_loss, z_loss
from jaxrl_reason.losses.transport import aot_loss, aot_unpaired_loss
from jaxrl_reason.losses.unpaired import bco_loss, kto_loss
from jaxrl_reason.losses.value import (
    calql_penalty,
    clipped_value_loss,
    cql_penalty,
    expectile_loss,
    td_loss,
    td_targets,
)

__all__ = [
    "LENGTH_NORMALIZED",
    "LOSS_TYPES",
    "PREFERENCE_LOSSES",
    "SMOOTHED_LOSSES",
    "LossType",
    "aot_loss",
    "aot_unpaired_loss",
    "apo_down_loss",
    "apo_zero_loss",
    "bco_loss",
    "bco_pair_loss",
    "bradley_terry_loss",
    "calql_penalty",
    "cispo_clip_metrics",
    "cispo_loss",
    "clip_cov_loss",
    "clip_cov_metrics",
    "clip_metrics",
    "clipped_policy_loss",
    "clipped_value_loss",
    "cpo_loss",
    "cql_penalty",
    "discopop_loss",
    "dpo_loss",
    "dpo_norm_loss",
    "effective_sample_share",
    "exo_loss",
    "expectile_loss",
    "gmpo_clip_metrics",
    "gmpo_loss",
    "gpg_loss",
    "gspo_clip_metrics",
    "gspo_loss",
    "gspo_token_loss",
    "hinge_dpo_loss",
    "importance_weights",
    "ipo_loss",
    "kl_cov_loss",
    "kl_estimate",
    "kto_loss",
    "nca_loss",
    "nll_loss",
    "orpo_loss",
    "preference_metrics",
    "reinforce_loss",
    "robust_dpo_loss",
    "sapo_loss",
    "simpo_loss",
    "sppo_hard_loss",
    "td_loss",
    "td_targets",
    "triplet_clip_metrics",
    "triplet_clipped_policy_loss",
    "vespo_loss",
    "z_loss",
]
