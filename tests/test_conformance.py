"""The conformance suite itself: it is complete, notices mistakes, and runs on other modules."""

import functools
import importlib.metadata
import inspect
import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

from jaxrl_reason import advantages, logprobs, losses, objectives
from jaxrl_reason.conformance import checks
from jaxrl_reason.conformance.cases import CASES, FUNCTIONS
from jaxrl_reason.conformance.implementation import own, public_functions
from jaxrl_reason.conformance.masking import check_masked
from jaxrl_reason.conformance.test_golden import FILES, contents
from jaxrl_reason.losses import clipped_policy_loss

PUBLIC = {
    name: function
    for module in (advantages, logprobs, losses, objectives)
    for name, function in public_functions(module).items()
}
# Options without a knob, and why.
EXEMPT = {
    "chunk_size": "decides memory and not the result, which has a case for several sizes",
    "key": "decides which tokens are drawn, and another key may draw the same",
}


def test_every_function_has_a_case():
    assert PUBLIC.keys() <= FUNCTIONS <= own().functions.keys()


@pytest.mark.parametrize("name", PUBLIC)
def test_every_option_has_a_knob(name):
    """Or is an input of a case, whose gradient or mask is checked."""
    cases = [case for case in CASES if case.function == name]
    turned = {option for case in cases for option in (*case.knobs, *case.keywords)}
    parameters = inspect.signature(PUBLIC[name]).parameters.values()
    options = {each.name for each in parameters if each.kind is each.KEYWORD_ONLY}
    assert options - EXEMPT.keys() <= turned


def test_cases_have_names_of_their_own():
    names = [case.name for case in CASES]
    assert len(names) == len(set(names))


def test_golden_vectors_are_of_functions_that_have_cases():
    assert len(FILES) >= 2
    for file in FILES:
        meta = json.loads(str(contents(file)["meta"]))
        assert {record["function"] for record in meta["records"]} <= FUNCTIONS


def case_of(name):
    return next(case for case in CASES if case.name == name)


PPO = case_of("clipped_policy_loss")
MEAN = case_of("aggregate-sequence_mean")


def leaking(logprobs, old_logprobs, a, **options):
    loss = clipped_policy_loss(logprobs, old_logprobs, a, **options)
    return loss + 1e-3 * (old_logprobs - jax.lax.stop_gradient(old_logprobs))


def unguarded(logprobs, old_logprobs, a, *, epsilon):
    ratio, a = jnp.exp(logprobs - jax.lax.stop_gradient(old_logprobs)), a[:, None]
    return -jnp.minimum(ratio * a, jnp.clip(ratio, 1 - epsilon, 1 + epsilon) * a)


def changed(change):
    return lambda *arrays, **options: change(clipped_policy_loss(*arrays, **options))


single = functools.partial(checks.check_oracle, dtype="float32")
double = functools.partial(checks.check_oracle, dtype="float64")
BROKEN = {
    "a wrong constant": (changed(lambda x: 1.001 * x), single, "value"),
    "an error of 1e-7": (changed(lambda x: (1 + 1e-7) * x), double, "value"),
    "float32 for float64": (changed(lambda x: x.astype(jnp.float32)), double, "value"),
    "a gradient to the old policy": (leaking, single, "gradient in old_logprobs"),
    "a stopped gradient": (changed(jax.lax.stop_gradient), single, "gradient in logprobs"),
    "half precision": (
        lambda x, *rest, **options: clipped_policy_loss(x, *rest, **options).astype(x.dtype),
        checks.check_dtypes,
        "bfloat16 gives bfloat16",
    ),
    "a NaN that spreads": (unguarded, check_masked, "with nan in .*: gradient"),
    "rows that differ": (
        changed(lambda x: x * jnp.arange(1.0, 9.0)[:, None]),
        checks.check_rows,
        "in another order",
    ),
    "rows that mix": (
        changed(lambda x: x - jnp.mean(x, keepdims=True)),
        checks.check_rows,
        "in two parts",
    ),
    "a dead knob": (
        lambda *arrays, epsilon: clipped_policy_loss(*arrays, epsilon=0.2),
        functools.partial(checks.check_knob, name="epsilon"),
        "neither value nor gradient",
    ),
    "a result of jit alone": (
        lambda x, *rest, **options: (
            1.0 + isinstance(x, jax.core.Tracer) + clipped_policy_loss(x, *rest, **options)
        ),
        checks.check_eager,
        "without jit",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_mistake_is_noticed(name):
    function, check, message = BROKEN[name]
    case = next(case for case in CASES if case.name == "clipped_policy_loss")
    with pytest.raises(AssertionError, match=message):
        check(function, case)


def test_padding_that_counts_is_noticed():
    case = next(case for case in CASES if case.name == "aggregate-token_mean")
    function = lambda values, mask, **options: (jnp.sum(values * 0), jnp.ones(()) * values.size)
    with pytest.raises(AssertionError, match="padded: value"):
        checks.check_padding(function, case)


IMPLEMENTATION = """
import jax
import jax.numpy as jnp
import numpy as np


def reinforce_loss(logprobs, advantages):
    arrays = [x.astype(jnp.promote_types(x.dtype, jnp.float32)) for x in (logprobs, advantages)]
    logprobs, advantages = arrays[0], jax.lax.stop_gradient(arrays[1])
    advantages = advantages.reshape(*advantages.shape, *[1] * (logprobs.ndim - advantages.ndim))
    # A foreign module need not promote by hand: an array of int32 times one of float32.
    minus = jnp.asarray(np.full(logprobs.shape[-1:], -1))
    finite = jnp.isfinite(logprobs) & jnp.isfinite(advantages)
    return minus * jnp.where(finite, advantages, 0) * jnp.where(finite, logprobs, 0)


def z_loss(log_normalizers, *, coefficient):
    return -coefficient * log_normalizers**2
"""


def suite(folder, *arguments):
    """Runs the suite in a folder of its own, as a user does."""
    (folder / "their_losses.py").write_text(IMPLEMENTATION, encoding="utf-8")
    command = [sys.executable, "-m", "pytest", "--pyargs", "jaxrl_reason.conformance", "-q"]
    # By name too, which must not clash with the entry point of the same plugin.
    command += ["-p", "jaxrl_reason.conformance.plugin", "-p", "no:cacheprovider", *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300)


def test_the_plugin_is_found():
    assert "jaxrl_reason_conformance" in importlib.metadata.entry_points(group="pytest11").names


def test_their_module(tmp_path):
    done = suite(tmp_path, "--impl", "their_losses", "-k", "reinforce_loss or k2")
    assert done.returncode == 0, done.stdout
    summary = "conformance of their_losses: 1 functions checked, 1 missing (kl_estimate)\n"
    assert summary in done.stdout


def test_their_mistake(tmp_path):
    done = suite(tmp_path, "--impl", "their_losses", "-k", "z_loss", "-n", "1")
    assert done.returncode == 1
    assert "z_loss in float32: value" in done.stdout
    assert "conformance of their_losses: 1 functions checked, 0 missing\n" in done.stdout
    assert "not conforming: z_loss\n" in done.stdout


@pytest.mark.parametrize(
    ("module", "message"),
    [
        ("no_such_module", "cannot be imported (ModuleNotFoundError"),
        ("string", "has none of the functions that are checked; it should offer some of aggregate"),
    ],
)
def test_modules_that_cannot_be_checked(module, message, tmp_path):
    done = suite(tmp_path, "--impl", module)
    assert done.returncode == pytest.ExitCode.USAGE_ERROR
    assert f"ERROR: --impl {module}: " in done.stderr
    assert message in done.stderr
    assert "Traceback" not in done.stderr
