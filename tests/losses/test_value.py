import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_reason.losses import (
    calql_penalty,
    clipped_value_loss,
    cql_penalty,
    expectile_loss,
    td_loss,
    td_targets,
)


@pytest.fixture
def actions():
    """Values [E, B] of the data and [E, B, N] of samples, their log-densities, and returns."""
    rng = np.random.default_rng(0)
    shapes = ((2, 3), (2, 3, 4), (3, 4), (3,))
    return [jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes]


FROM_POLICY = np.asarray([False, True, True, True])


def test_no_range_is_half_the_squared_error():
    values, old, returns = np.random.default_rng(1).normal(size=(3, 2, 5))
    loss = clipped_value_loss(values, old, returns, clip_range=math.inf)
    np.testing.assert_allclose(loss, (values - returns) ** 2 / 2, rtol=1e-5)


def test_the_expectile_of_a_coin_is_tau():
    # Half of the targets 0, half 1: tau (1 - m) = (1 - tau) m at the minimum.
    for tau in (0.2, 0.5, 0.9):
        loss = lambda m, tau=tau: jnp.sum(
            expectile_loss(jnp.asarray([0.0, 1.0]) - m, expectile=tau)
        )
        np.testing.assert_allclose(jax.grad(loss)(jnp.asarray(tau)), 0, atol=1e-6)


def test_a_terminal_step_never_reads_the_next_value():
    next_q = np.asarray([[1.0, np.nan], [2.0, np.inf]])
    targets = td_targets(np.asarray([0.5, 0.7]), np.asarray([1, 0]), next_q, discount=0.9)
    np.testing.assert_allclose(targets, [0.5 + 0.9, 0.7], rtol=1e-6)


def test_max_backup_takes_the_largest_of_the_minima():
    next_q = np.asarray([[[0.0, 3.0]], [[1.0, -2.0]]])  # 2 critics, 1 transition, 2 actions
    ones = np.ones(1, np.float32)
    assert td_targets(ones, ones, next_q, discount=1.0) == 1.0  # not 2, the smallest maximum


def test_one_critic_needs_no_ensemble_axis():
    q, y = np.random.default_rng(2).normal(size=(2, 6))
    np.testing.assert_array_equal(td_loss(q, y), td_loss(q[None], y)[0])
    np.testing.assert_array_equal(
        cql_penalty(q, q[:, None]), cql_penalty(q[None], q[None, :, None])[0]
    )


def test_a_constant_critic_has_no_penalty(actions):
    q, samples, _, _ = (jnp.full(x.shape, 2.5) for x in actions)
    np.testing.assert_allclose(cql_penalty(q, samples, temperature=0.3), 0, atol=1e-6)


def test_importance_weights_estimate_the_integral():
    # Each of N actions once, drawn from a density that is uniform on them: sum_j exp(Q_j).
    samples = jnp.asarray(np.random.default_rng(3).normal(size=(1, 1, 5)), jnp.float32)
    logprobs = jnp.full((1, 5), -math.log(5))
    ours = cql_penalty(jnp.zeros((1, 1)), samples, logprobs) - math.log(5)  # the constant T log N
    np.testing.assert_allclose(ours, jax.nn.logsumexp(samples, axis=-1), rtol=1e-5)


def test_calql_without_returns_is_cql(actions):
    q, samples, logprobs, returns = actions
    unknown = jnp.full_like(returns, -jnp.inf)
    both = lambda q, samples: (
        cql_penalty(q, samples, logprobs),
        calql_penalty(q, samples, unknown, FROM_POLICY, logprobs),
    )
    np.testing.assert_array_equal(*both(q, samples))
    gradients = [
        jax.grad(lambda q, s, i=i: jnp.sum(both(q, s)[i]), argnums=(0, 1))(q, samples)
        for i in range(2)
    ]
    jax.tree.map(np.testing.assert_array_equal, *gradients)


def test_calql_does_not_push_below_the_return(actions):
    q, samples, logprobs, returns = actions
    total = lambda s: jnp.sum(calql_penalty(q, s, returns + 100, FROM_POLICY, logprobs))
    gradient = jax.grad(total)(samples)
    np.testing.assert_array_equal(gradient[..., 1:], 0)
    assert (jax.grad(lambda s: jnp.sum(cql_penalty(q, s, logprobs)))(samples) > 0).all()


@pytest.mark.parametrize("place", ["data", "sample", "density", "return"])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_bad_number_stays_with_its_transition(place, bad, actions):
    # A density of inf or a return of NaN reaches both critics of transition 1, the others one.
    places = {"data": (0, 1), "sample": (0, 1, 2), "density": (1, 2), "return": (1,)}
    index = list(places).index(place)
    bad = -bad if place == "density" else bad  # at log q = inf the sample only drops out
    broken = [x.at[places[place]].set(bad) if i == index else x for i, x in enumerate(actions)]
    counts = np.ones((2, 3), bool)
    counts[:, 1] = False

    def penalties(q, samples, logprobs, returns):
        return calql_penalty(q, samples, returns, FROM_POLICY, logprobs)

    def total(*arrays):
        return jnp.sum(jnp.where(counts, penalties(*arrays), 0))

    assert not np.isfinite(penalties(*broken)[0, 1])
    value, gradients = jax.value_and_grad(total, argnums=(0, 1))(*broken)
    clean, clean_gradients = jax.value_and_grad(total, argnums=(0, 1))(*actions)
    np.testing.assert_array_equal(value, clean)
    jax.tree.map(np.testing.assert_array_equal, gradients, clean_gradients)


X, Q = jnp.zeros(3), jnp.zeros((2, 3))
SAMPLES = jnp.zeros((2, 3, 4))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: clipped_value_loss(Q, Q, X, clip_range=0.2), "returns has shape"),
        (lambda: clipped_value_loss(Q, Q, Q, clip_range=-0.2), "clip_range=-0.2 is out of range"),
        (lambda: expectile_loss(X, expectile=1.0), "expectile=1.0 .* must be > 0 and < 1"),
        (lambda: td_loss(Q, jnp.zeros(2)), r"targets has shape \(2,\); expected \(3,\)"),
        (lambda: td_targets(X, X, X, discount=0.9), r"next_q_values has shape \(3,\)"),
        (lambda: td_targets(X[:2], X, Q, discount=0.9), "rewards has shape"),
        (lambda: td_targets(X, X[:2], Q, discount=0.9), "continues has shape"),
        (lambda: td_targets(X, X, Q, discount=1.5), "discount=1.5 is out of range"),
        (lambda: cql_penalty(Q, Q), r"sampled_q_values has shape \(2, 3\); expected \(2, 3\) and"),
        (lambda: cql_penalty(Q, SAMPLES[:1]), r"expected \(2, 3\) and an axis of samples"),
        (
            lambda: cql_penalty(Q, SAMPLES, X),
            r"sample_logprobs has shape \(3,\); expected \(3, 4\)",
        ),
        (lambda: cql_penalty(Q, SAMPLES, temperature=0.0), "temperature=0.0 is out of range"),
        (lambda: calql_penalty(Q, SAMPLES, Q, X), "mc_returns has shape"),
        (lambda: calql_penalty(Q, SAMPLES, X, X), r"from_policy has shape \(3,\); expected \(4,\)"),
    ],
)
def test_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_members_are_indices():
    for members in (np.asarray([0.5]), np.asarray(1)):
        with pytest.raises(TypeError, match=r"members is .*; expected integers \[K\]"):
            td_targets(X, X, Q, discount=0.9, members=members)
