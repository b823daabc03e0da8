"""Devices and settings of the suite, and the functions that it checks."""

import contextlib
from pathlib import Path

from jaxrl_reason.conformance.implementation import OWN, load, prepare_devices

prepare_devices()

import jax
import pytest

from jaxrl_reason.conformance.cases import CASES, FUNCTIONS
from jaxrl_reason.conformance.evaluation import jitted
from jaxrl_reason.conformance.plugin import CHECKED, MISSING


@pytest.fixture(scope="session")
def implementation(pytestconfig):
    """The implementation under test."""
    return load(pytestconfig.getoption("--impl", default=None) or OWN, FUNCTIONS)


@pytest.fixture
def offered(implementation, request):
    """Function by name; where the implementation does not have it, the test is skipped."""

    def function(name):
        found = implementation.functions.get(name)
        request.node.user_properties.append((MISSING if found is None else CHECKED, name))
        if found is None:
            pytest.skip(f"{implementation.name} has no {name}")
        return found

    return function


@pytest.fixture
def offered_jitted(offered):
    """Likewise, under `jit`, which is quicker than compiling one operation after the other."""
    return lambda name: jitted(offered(name))


@pytest.fixture(autouse=True)
def settings(implementation):
    """Full precision of products; for this package also strict promotion of dtypes and ranks."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(jax.default_matmul_precision("highest"))
        if implementation.is_own:
            stack.enter_context(jax.numpy_dtype_promotion("strict"))
            stack.enter_context(jax.numpy_rank_promotion("raise"))
        yield


def pytest_collection_modifyitems(items):
    """Puts the tests of a case next to each other, since they share compiled programs."""
    order = {case.name: place for place, case in enumerate(CASES)}
    folder = Path(__file__).parent
    ranks = {}
    for place, item in enumerate(items):
        spec = getattr(item, "callspec", None)
        if item.path.parent == folder and spec is not None and "case" in spec.params:
            ranks[place] = order[spec.params["case"].name]
    ranked = [items[place] for place in sorted(ranks, key=ranks.__getitem__)]
    for place, item in zip(ranks, ranked, strict=True):
        items[place] = item
