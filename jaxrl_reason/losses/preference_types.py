"""The paired preference losses by the names of TRL."""

import inspect
from collections.abc import Callable, Mapping
from types import MappingProxyType

from jaxrl_reason.losses.margins import Rows
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
    robust_dpo_loss,
    sppo_hard_loss,
)
from jaxrl_reason.losses.reference_free import cpo_loss, orpo_loss, simpo_loss
from jaxrl_reason.losses.transport import aot_loss, aot_unpaired_loss

PREFERENCE_LOSSES: Mapping[str, Callable[..., Rows]] = MappingProxyType(
    {
        "sigmoid": dpo_loss,
        "sigmoid_norm": dpo_norm_loss,
        "hinge": hinge_dpo_loss,
        "ipo": ipo_loss,
        "exo_pair": exo_loss,
        "nca_pair": nca_loss,
        "robust": robust_dpo_loss,
        "bco_pair": bco_pair_loss,
        "sppo_hard": sppo_hard_loss,
        "aot": aot_loss,
        "aot_unpaired": aot_unpaired_loss,
        "apo_zero": apo_zero_loss,
        "apo_down": apo_down_loss,
        "discopop": discopop_loss,
        "simpo": simpo_loss,
        "orpo": orpo_loss,
        "cpo": cpo_loss,
    }
)
"""TRL's ``loss_type`` names.

Positional parameters are arrays and are named after what they hold: log-probabilities ``chosen,
rejected, ref_chosen, ref_rejected`` of whole completions, ``chosen_lengths, rejected_lengths`` in
tokens, and log-probabilities per token ``chosen_mean, rejected_mean``. All take ``beta``.
"""

SMOOTHED_LOSSES = frozenset(
    name
    for name, loss in PREFERENCE_LOSSES.items()
    if "label_smoothing" in inspect.signature(loss).parameters
)
"""Those that take ``label_smoothing``."""

LENGTH_NORMALIZED = frozenset({"ipo", "sigmoid_norm"})
"""Those whose four log-probabilities are to be divided by the completion's length first."""
