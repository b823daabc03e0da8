import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_reason.arrays import (
    WeightedMean,
    aggregate,
    bounded_exp,
    masked_mean,
    masked_moments,
    masked_sum,
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


@pytest.mark.parametrize("how", ["token_mean", "sequence_mean", "constant", "sequence_sum"])
def test_microbatches_order_and_padding_change_nothing(how):
    rng = np.random.default_rng(0)
    values = rng.normal(size=(6, 4)).astype(np.float32)
    mask = rng.random((6, 4)) < 0.5
    reduce = lambda v, m: aggregate(v, m, how=how, max_length=4)
    whole = reduce(values, mask).mean()
    parts = [reduce(values[i : i + 2], mask[i : i + 2]) for i in (0, 2, 4)]
    np.testing.assert_allclose((parts[0] + parts[1] + parts[2]).mean(), whole, rtol=1e-5)
    order = rng.permutation(6)
    np.testing.assert_allclose(reduce(values[order], mask[order]).mean(), whole, rtol=1e-5)
    wide = [np.pad(array, ((0, 0), (0, 3))) for array in (values, mask)]
    np.testing.assert_allclose(reduce(*wide).mean(), whole, rtol=1e-5)


@pytest.mark.parametrize("how", ["token_mean", "sequence_mean", "constant", "sequence_sum"])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_masked_garbage_reaches_neither_value_nor_gradient(how, bad):
    mean = jax.value_and_grad(lambda v: aggregate(v, MASK, how=how, max_length=3).mean())
    dirty = jnp.where(MASK == 1, VALUES, bad)
    jax.tree.map(np.testing.assert_array_equal, mean(dirty), mean(VALUES))
    average = jax.value_and_grad(lambda v: masked_mean(v, MASK))
    jax.tree.map(np.testing.assert_array_equal, average(dirty), average(VALUES))


@pytest.mark.parametrize("how", ["token_mean", "sequence_mean", "constant", "sequence_sum"])
def test_packed_equals_unpacked(how):
    rng = np.random.default_rng(0)
    values, mask = rng.normal(size=(4, 3)).astype(np.float32), rng.random((4, 3)) < 0.7
    mask[:, 0] = True  # every sequence has a token
    plain = aggregate(values, mask, how=how, max_length=3)
    # Two sequences to a row, and padding of segment 0 at its end.
    pack = lambda rows: np.pad(rows.reshape(2, 6), ((0, 0), (0, 2)))
    segments = np.asarray([[1, 1, 1, 2, 2, 2, 0, 0]] * 2, np.int32)
    packed = aggregate(pack(values), pack(mask), how=how, max_length=3, segment_ids=segments)
    np.testing.assert_allclose(packed.total, plain.total, rtol=1e-5)
    np.testing.assert_allclose(packed.weight, plain.weight, rtol=1e-6)


def test_masked_reductions():
    np.testing.assert_array_equal(masked_sum(VALUES, MASK, axis=1), [3, 16, 0])
    np.testing.assert_array_equal(masked_mean(VALUES, MASK, axis=1), [1.5, 16, 0])
    assert masked_sum(VALUES, MASK) == 19
    assert masked_mean(VALUES.astype(jnp.bfloat16), MASK).dtype == jnp.float32


def test_weighted_mean_is_a_pytree_and_guards_empty():
    empty = WeightedMean(jnp.zeros(()), jnp.zeros(()))
    assert empty.mean() == 0
    assert jax.grad(lambda t: WeightedMean(t, jnp.zeros(())).mean())(jnp.ones(())) == 0
    doubled = jax.jit(lambda m: jax.tree.map(lambda x: 2 * x, m))(WeightedMean(jnp.ones(()), 4.0))
    assert (doubled.total, doubled.weight, doubled.mean()) == (2, 8, 0.25)


def test_float64_stays_float64():
    with jax.enable_x64(True):
        mean = aggregate(VALUES.astype(np.float64), MASK, how="token_mean")
        assert mean.total.dtype == mean.weight.dtype == np.float64


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
