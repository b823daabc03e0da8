"""All cases, by family; `CASES` is what the tests run over."""

import importlib.util
import sys
import traceback

from jaxrl_reason.conformance.case import Case

_FAMILIES = (
    "policy",
    "preference",
    "divergence",
    "correction",
    "value",
    "basics",
    "advantages",
    "objectives",
)


def _family(name):
    # Interim: families are being written.
    if importlib.util.find_spec(f"{__name__}.{name}") is None:
        return ()
    try:
        return importlib.import_module(f"{__name__}.{name}").CASES
    except Exception:
        sys.stderr.write(f"left out the family {name}: {traceback.format_exc(limit=-2)}\n")
        return ()


CASES: tuple[Case, ...] = tuple(case for family in _FAMILIES for case in _family(family))
FUNCTIONS = frozenset(case.function for case in CASES)
"""Names of all functions that are checked."""
