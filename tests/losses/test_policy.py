import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_reason.arrays import aggregate
from jaxrl_reason.losses import (
    LOSS_TYPES,
    cispo_clip_metrics,
    cispo_loss,
    clip_metrics,
    clipped_policy_loss,
    reinforce_loss,
)

B, T = 4, 12


@pytest.fixture
def batch(rng):
    """Log-probs whose ratios reach far beyond every clip, on both sides and for both signs of A."""
    old = -rng.exponential(size=(B, T))
    return old + 0.8 * rng.normal(size=(B, T)), old, rng.normal(size=(B, T))


def clipped_oracle(logprobs, old, advantages, low, high, delta=np.inf):
    ratio = np.exp(logprobs - old)
    free = np.minimum(ratio, delta) * advantages
    return -np.minimum(free, np.clip(ratio, 1 - low, 1 + high) * advantages)


def cispo_oracle(logprobs, old, advantages, low, high, at=None):
    ratio = np.exp((logprobs if at is None else at) - old)
    return -np.clip(ratio, low, high) * advantages * logprobs


def options(name):
    return {"epsilon": 0.2, "epsilon_high": 3.0 if name == "cispo" else 0.3}


def test_reinforce(agrees, batch):
    agrees(reinforce_loss, lambda logprobs, a: -a * logprobs, batch[0], batch[2])


@pytest.mark.parametrize(
    ("given", "oracle"),
    [
        ({"epsilon": 0.2}, {"low": 0.2, "high": 0.2}),
        ({"epsilon": 0.2, "epsilon_high": 0.4}, {"low": 0.2, "high": 0.4}),
        ({"epsilon": 0.2, "delta": 1.5}, {"low": 0.2, "high": 0.2, "delta": 1.5}),
    ],
)
def test_clipped_matches_oracle(given, oracle, agrees, batch):
    agrees(
        functools.partial(clipped_policy_loss, **given),
        functools.partial(clipped_oracle, **oracle),
        *batch,
    )


def test_cispo_matches_oracle(agrees, batch):
    for given, low in (({}, 0.0), ({"epsilon": 0.3}, 0.7)):
        bounds = {"low": low, "high": 1.5}
        agrees(
            functools.partial(cispo_loss, epsilon_high=1.5, **given),
            functools.partial(cispo_oracle, **bounds),
            *batch,
            frozen=functools.partial(cispo_oracle, **bounds, at=batch[0]),
        )


def test_advantages_of_a_sequence_spread_over_its_tokens(batch):
    logprobs, old, _ = batch
    a = np.asarray([1.0, -1.0, 0.5, 2.0], np.float32)
    spread = np.repeat(a[:, None], T, axis=1)
    for loss in (
        lambda a: clipped_policy_loss(logprobs, old, a, epsilon=0.2),
        lambda a: cispo_loss(logprobs, old, a, epsilon_high=2.0),
        lambda a: reinforce_loss(logprobs, a),
    ):
        np.testing.assert_array_equal(loss(a), loss(spread))


@pytest.mark.parametrize("name", ["grpo", "cispo"])
def test_at_ratio_1_the_gradient_is_reinforce(name, batch):
    logprobs, _, advantages = (jnp.asarray(array, jnp.float32) for array in batch)
    variant = LOSS_TYPES[name]

    def total(logprobs, loss):
        return jnp.sum(loss(logprobs))

    # old_logprobs is the very array that is differentiated, so this also shows it is detached.
    ours = lambda x: variant.loss(x, x, advantages, **options(name))
    plain = lambda x: reinforce_loss(x, advantages)
    np.testing.assert_allclose(
        jax.grad(total)(logprobs, ours), jax.grad(total)(logprobs, plain), rtol=1e-6
    )


@pytest.mark.parametrize("name", ["grpo", "dapo", "cispo"])
def test_masked_garbage_reaches_neither_value_nor_gradient(name, batch):
    logprobs, old, _ = (jnp.asarray(array, jnp.float32) for array in batch)
    advantages = jnp.asarray([1.0, -1.0, 0.5, 2.0])
    mask = jnp.ones((B, T), jnp.bool_).at[:, 3:].set(False).at[3].set(False)
    variant = LOSS_TYPES[name]

    def mean(logprobs, old, advantages):
        values = variant.loss(logprobs, old, advantages, **options(name))
        return aggregate(values, mask, how=variant.aggregation, max_length=T).mean()

    clean = jax.value_and_grad(mean)(logprobs, old, advantages)
    for bad in (jnp.nan, jnp.inf, -jnp.inf, 1e30):
        dirty = jax.value_and_grad(mean)(
            jnp.where(mask, logprobs, bad),
            jnp.where(mask, old, -bad).at[0, 4].set(bad),
            advantages.at[3].set(bad),
        )
        jax.tree.map(np.testing.assert_array_equal, dirty, clean)


def test_bad_numbers_that_count_are_seen(batch):
    logprobs, old, advantages = (jnp.asarray(array, jnp.float32) for array in batch)
    loss = clipped_policy_loss(logprobs.at[0, 0].set(jnp.nan), old, advantages, epsilon=0.2)
    assert np.isnan(loss[0, 0])
    assert np.isfinite(loss).sum() == loss.size - 1


def test_an_overflowing_ratio_has_a_finite_gradient():
    logprobs, old = jnp.full((1, 2), -1.0), jnp.full((1, 2), -200.0)
    total = lambda x: jnp.sum(clipped_policy_loss(x, old, jnp.asarray([[1.0, -1.0]]), epsilon=0.2))
    gradient = jax.grad(total)(logprobs)
    assert gradient[0, 0] == 0  # clipped
    assert np.isfinite(gradient[0, 1])
    assert gradient[0, 1] > 0  # still pushed down


def test_clip_metrics_count_where_the_gradient_stops(batch):
    logprobs, old, advantages = (jnp.asarray(array, jnp.float32) for array in batch)
    metrics = clip_metrics(logprobs, old, advantages, epsilon=0.2, epsilon_high=0.4)
    ratio = np.exp(logprobs - old)
    np.testing.assert_array_equal(metrics["low"], (ratio < 0.8) & (advantages < 0))
    np.testing.assert_array_equal(metrics["high"], (ratio > 1.4) & (advantages > 0))
    assert metrics["low"].any()
    assert metrics["high"].any()
    gradient = jax.grad(
        lambda x: jnp.sum(clipped_policy_loss(x, old, advantages, epsilon=0.2, epsilon_high=0.4))
    )(logprobs)
    np.testing.assert_array_equal(metrics["region"], gradient == 0)

    metrics = cispo_clip_metrics(logprobs, old, advantages, epsilon_high=1.5, epsilon=0.3)
    np.testing.assert_array_equal(metrics["low"], (ratio < 0.7) & (advantages < 0))
    np.testing.assert_array_equal(metrics["high"], (ratio > 1.5) & (advantages > 0))
    metrics = cispo_clip_metrics(logprobs, old, advantages, epsilon_high=1.5)
    assert not metrics["low"].any()


@pytest.mark.parametrize(
    ("loss", "base", "knob"),
    [
        (clipped_policy_loss, {"epsilon": 0.2, "epsilon_high": 0.3}, {"epsilon": 0.1}),
        (clipped_policy_loss, {"epsilon": 0.2}, {"epsilon_high": 0.4}),
        (clipped_policy_loss, {"epsilon": 0.2}, {"delta": 1.5}),
        (cispo_loss, {"epsilon_high": 2.0}, {"epsilon_high": 1.2}),
        (cispo_loss, {"epsilon_high": 2.0}, {"epsilon": 0.1}),
    ],
)
def test_no_dead_knob(loss, base, knob, batch):
    assert not np.allclose(
        loss(*batch, **base),
        loss(*batch, **base, **knob)
        if not base.keys() & knob.keys()
        else loss(*batch, **{**base, **knob}),
    )


@pytest.mark.parametrize("name", LOSS_TYPES)
def test_loss_types_are_usable(name, batch):
    variant = LOSS_TYPES[name]
    assert set(options(name)) <= set(variant.options)
    values = jax.jit(functools.partial(variant.loss, **options(name)))(*batch)
    mean = aggregate(values, np.ones((B, T), bool), how=variant.aggregation, max_length=T)
    assert np.isfinite(mean.mean())
    assert variant.clip_metrics(*batch, **options(name))["region"].shape == (B, T)


def test_vmap_equals_the_batch(batch):
    loss = functools.partial(clipped_policy_loss, epsilon=0.2)
    logprobs, old, advantages = (jnp.asarray(array, jnp.float32) for array in batch)
    rows = jax.vmap(loss)(logprobs, old, advantages[:, 0])
    np.testing.assert_array_equal(rows, loss(logprobs, old, advantages[:, 0]))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: clipped_policy_loss(x, x[:1], x, epsilon=0.2), "old_logprobs has shape"),
        (lambda x: clipped_policy_loss(x, x, x[0], epsilon=0.2), r"expected \(2,\)"),
        (lambda x: clipped_policy_loss(x, x, x, epsilon=-0.1), "epsilon=-0.1"),
        (lambda x: clipped_policy_loss(x, x, x, epsilon=0.2, delta=1.1), "delta=1.1"),
        (lambda x: cispo_loss(x, x, x, epsilon_high=0.28), "the largest weight itself"),
    ],
)
def test_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call(jnp.zeros((2, 3)))
