"""Many rewards or gradients to one: scalarisation, P-FAB, MGDA and relatives; Pareto fronts."""

from jaxrl_reason.objectives.aggregators import AGGREGATORS
from jaxrl_reason.objectives.balance import (
    cagrad_advantages,
    mgda_advantages,
    pcgrad_advantages,
    pfab_advantages,
)
from jaxrl_reason.objectives.dynamic import dynamic_weights_gradient, dynamic_weights_hypervolume
from jaxrl_reason.objectives.gradients import cagrad, combine, gram_matrix, mgda, pcgrad
from jaxrl_reason.objectives.pareto import hypervolume, pareto_front
from jaxrl_reason.objectives.scalarize import (
    chebyshev_advantages,
    gdpo_advantages,
    lagrangian_advantages,
    lagrangian_weights,
    update_multipliers,
    weighted_sum_advantages,
)
from jaxrl_reason.objectives.simplex import (
    cagrad_weights,
    capped_weights,
    min_norm_weights,
    pcgrad_weights,
)

__all__ = [
    "AGGREGATORS",
    "cagrad",
    "cagrad_advantages",
    "cagrad_weights",
    "capped_weights",
    "chebyshev_advantages",
    "combine",
    "dynamic_weights_gradient",
    "dynamic_weights_hypervolume",
    "gdpo_advantages",
    "gram_matrix",
    "hypervolume",
    "lagrangian_advantages",
    "lagrangian_weights",
    "mgda",
    "mgda_advantages",
    "min_norm_weights",
    "pareto_front",
    "pcgrad",
    "pcgrad_advantages",
    "pcgrad_weights",
    "pfab_advantages",
    "update_multipliers",
    "weighted_sum_advantages",
]
