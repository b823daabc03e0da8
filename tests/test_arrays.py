"""What the conformance suite does not state: hand values, moments, guards, errors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_reason.arrays import (
    WeightedMean,
    aggregate,
    bounded_exp,
    masked_moments,
    split_groups,
)

VALUES = np.asarray([[1.0, 2.0, 4.0], [8.0, 16.0, 32.0], [64.0, 128.0, 256.0]], np.float32)
MASK = np.asarray([[1, 1, 0], [0, 1, 0], [0, 0, 0]])


@pytest.mark.parametrize(
    ("how", "total", "weight"),
    [
        ("token_mean", 1 + 2 + 16, 3),
        ("sequence_mean", 1.5 + 16, 2),
        ("constant", 1 + 2 + 16, 3 * 10),
        ("sequence_sum", 3 + 16, 2),
    ],
)
@pytest.mark.parametrize("dtype", [np.bool_, np.int32, np.float32])
def test_aggregate(how, total, weight, dtype):
    mean = aggregate(VALUES, MASK.astype(dtype), how=how, max_length=10)
    assert (mean.total, mean.weight) == (total, weight)
    assert mean.mean() == np.float32(total) / np.float32(weight)


def test_weighted_mean_is_a_pytree_and_guards_empty():
    empty = WeightedMean(jnp.zeros(()), jnp.zeros(()))
    assert empty.mean() == 0
    assert jax.grad(lambda t: WeightedMean(t, jnp.zeros(())).mean())(jnp.ones(())) == 0
    doubled = jax.jit(lambda m: jax.tree.map(lambda x: 2 * x, m))(WeightedMean(jnp.ones(()), 4.0))
    assert (doubled.total, doubled.weight, doubled.mean()) == (2, 8, 0.25)


def test_moments():
    rng = np.random.default_rng(0)
    values, mask = rng.normal(size=(3, 8)).astype(np.float32), rng.random((3, 8)) < 0.7
    for ddof in (0, 1):
        mean, std, differ = masked_moments(values, mask, axis=1, ddof=ddof)
        for row in range(3):
            kept = values[row][mask[row]]
            np.testing.assert_allclose(mean[row, 0], kept.mean(), rtol=1e-5)
            np.testing.assert_allclose(std[row, 0], kept.std(ddof=ddof), rtol=1e-5)
        assert differ.all()


@pytest.mark.parametrize(
    ("row", "differ"),
    [
        ([0.1] * 7, False),
        ([1e6 + 0.1] * 7, False),
        ([0.3, 0.1 + 0.2, 0.3], False),
        ([0.1, 0.1, 0.1 + 1e-5], True),
        ([0.0, 1e-30], True),
        ([1.0, np.nan], True),
        ([np.inf, np.inf], True),
    ],
)
def test_equal_values_are_recognised(row, differ):
    row = np.asarray(row, np.float32)
    assert masked_moments(row, np.ones_like(row, bool), axis=0, ddof=1)[2][0] == differ


def test_bounded_exp():
    x = jnp.asarray([-100.0, 0.0, 19.0])
    np.testing.assert_array_equal(bounded_exp(x), jnp.exp(x))
    assert np.isfinite(jax.grad(bounded_exp)(1e4))
    assert bounded_exp(jnp.asarray(1e4)) > bounded_exp(jnp.asarray(21.0))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: aggregate(VALUES, MASK, how="mean"), "how='mean' is unknown"),
        (lambda: aggregate(VALUES, MASK, how="constant"), "needs a positive max_length; got None"),
        (lambda: aggregate(VALUES, MASK[:1], how="token_mean"), r"mask has shape \(1, 3\)"),
        (lambda: aggregate(VALUES[0], MASK[0], how="token_mean"), r"expected \[B, T\]"),
        (lambda: split_groups(VALUES, 2), "3 rows do not split into groups of num_generations=2"),
    ],
)
def test_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call()
