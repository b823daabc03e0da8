"""Cases of `jaxrl_reason.objectives`, in files named as there."""

from jaxrl_reason.conformance.cases.objectives import (
    balance,
    gradients,
    pareto,
    scalarize,
    simplex,
)

CASES = balance.CASES + gradients.CASES + pareto.CASES + scalarize.CASES + simplex.CASES
