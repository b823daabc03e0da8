"""Every case: the oracle, then what no transformation and no number out of bounds may change."""

import jax
import pytest

from jaxrl_reason.conformance import checks
from jaxrl_reason.conformance.cases import CASES
from jaxrl_reason.conformance.masking import check_masked

FIRST = {case.function: case for case in reversed(CASES)}


def over(keep=lambda case: True):
    """Runs a test for the cases that are kept, all tests of a case next to each other."""
    kept = [case for case in CASES if keep(case)]
    return pytest.mark.parametrize("case", kept, ids=lambda case: case.name, scope="module")


def transformed(name):
    return over(lambda case: name in case.transforms)


@over()
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_oracle(case, dtype, offered):
    checks.check_oracle(offered(case.function), case, dtype)


# One case of a function, because without jit operations are compiled one by one, which takes long.
@over(lambda case: "jit" in case.transforms and case is FIRST[case.function])
def test_eager(case, offered):
    checks.check_eager(offered(case.function), case)


@transformed("jit")
def test_dtypes(case, offered):
    checks.check_dtypes(offered(case.function), case)


@over(lambda case: {"vmap", "devices"} & set(case.transforms))
def test_vmap_and_devices(case, offered):
    function = offered(case.function)
    if jax.device_count() < checks.DEVICES and "devices" in case.transforms:
        pytest.skip(f"needs {checks.DEVICES} devices; jax was started with {jax.device_count()}")
    if "devices" not in case.transforms:
        checks.check_vmap(function, case)
    elif "vmap" not in case.transforms:
        checks.check_devices(function, case)
    else:
        checks.check_vmap_on_devices(function, case)


@over(lambda case: case.masked)
def test_masked(case, offered):
    check_masked(offered(case.function), case)


@over(lambda case: case.rowwise and "jit" in case.transforms)
def test_rows(case, offered):
    checks.check_rows(offered(case.function), case)


@over(checks.has_columns)
def test_padding(case, offered):
    checks.check_padding(offered(case.function), case)


@pytest.mark.parametrize(
    ("case", "knob"),
    [pytest.param(case, knob, id=f"{case.name}-{knob}") for case in CASES for knob in case.knobs],
)
def test_knob(case, knob, offered):
    checks.check_knob(offered(case.function), case, knob)
