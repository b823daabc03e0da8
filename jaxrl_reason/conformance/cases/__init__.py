"""All cases, by family; `CASES` is what the tests run over."""

from jaxrl_reason.conformance.cases import (
    advantages,
    basics,
    correction,
    divergence,
    objectives,
    policy,
    preference,
    value,
)

CASES = (
    *policy.CASES,
    *preference.CASES,
    *divergence.CASES,
    *correction.CASES,
    *value.CASES,
    *basics.CASES,
    *advantages.CASES,
    *objectives.CASES,
)
FUNCTIONS = frozenset(case.function for case in CASES)
"""Names of all functions that are checked."""
