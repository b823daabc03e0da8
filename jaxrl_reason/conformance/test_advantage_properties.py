"""Laws of advantages and of objectives, which no oracle states."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

B, G, M = 16, 4, 3
N = B // G


def normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


@pytest.fixture
def rewards():
    return normal(B)


@pytest.fixture
def vectors():
    """Rewards of M objectives, all of which apply everywhere."""
    return normal(B, M, seed=1), jnp.ones((B, M), jnp.bool_)


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
@pytest.mark.parametrize("baseline", ["mean", "leave_one_out"])
def test_a_shift_of_rewards_changes_no_advantage(baseline, scale, offered_jitted, rewards):
    advantages = offered_jitted("group_advantages")
    # At batch scale the deviation is that of all rewards, so all must shift together there.
    shift = 10.0 if scale == "batch" else jnp.repeat(jnp.arange(float(N)), G)
    kind = {"num_generations": G, "baseline": baseline, "scale": scale}
    np.testing.assert_allclose(
        advantages(rewards + shift, **kind), advantages(rewards, **kind), atol=2e-5
    )


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
@pytest.mark.parametrize("baseline", ["mean", "leave_one_out"])
def test_equal_rewards_give_exactly_0(baseline, scale, offered_jitted):
    # The float32 mean of 7 x 0.1 is not 0.1, and rounding over eps must not look like a signal.
    rewards = jnp.concatenate(
        [jnp.repeat(jnp.asarray([0.1, 1 / 3, 1000.1, 0.0]), 7), jnp.arange(7.0)]
    )
    for eps in (1e-4, 0.0):
        kind = {"num_generations": 7, "baseline": baseline, "scale": scale, "eps": eps}
        advantages = np.asarray(offered_jitted("group_advantages")(rewards, **kind))
        np.testing.assert_array_equal(advantages[:28], 0)
        assert np.count_nonzero(advantages[28:]) >= 6
    dead = offered_jitted("dead_groups")(rewards, num_generations=7)
    np.testing.assert_array_equal(dead, [True] * 4 + [False])


def test_advantages_of_a_group_add_up_to_0(offered_jitted, rewards):
    advantages = offered_jitted("group_advantages")(rewards, num_generations=G)
    np.testing.assert_allclose(advantages.reshape(N, G).sum(axis=1), np.zeros(N), atol=1e-5)


def test_a_nan_stays_in_its_group_and_is_seen(offered_jitted, rewards):
    advantages = offered_jitted("group_advantages")(rewards.at[1].set(jnp.nan), num_generations=G)
    np.testing.assert_array_equal(np.isnan(advantages), np.arange(B) < G)


def test_equal_rewards_of_a_batch_give_exactly_0(offered_jitted):
    np.testing.assert_array_equal(offered_jitted("global_advantages")(jnp.full(7, 0.1), eps=0.0), 0)


def test_gae_between_monte_carlo_and_one_step(offered_jitted):
    gae, mask = offered_jitted("gae"), jnp.ones((2, 6), jnp.bool_)
    rewards, values = normal(2, 2, 6)
    _, returns = gae(rewards, values, mask, gamma=1.0, lam=1.0)
    np.testing.assert_allclose(returns, jnp.cumsum(rewards[:, ::-1], 1)[:, ::-1], atol=1e-5)
    advantages, _ = gae(rewards, values, mask, gamma=0.9, lam=0.0)
    later = jnp.pad(values[:, 1:], ((0, 0), (0, 1)))
    np.testing.assert_allclose(advantages, rewards + 0.9 * later - values, atol=1e-5)


def test_gae_skips_what_is_masked(offered_jitted):
    """As if the masked tokens were not there."""
    gae, kept = offered_jitted("gae"), np.asarray([0, 2, 3, 6])
    rewards, values = normal(2, 3, 7)
    mask = jnp.zeros((3, 7), jnp.bool_).at[:, kept].set(True)
    whole = gae(rewards, values, mask, gamma=0.9, lam=0.8)
    short = gae(rewards[:, kept], values[:, kept], mask[:, kept], gamma=0.9, lam=0.8)
    for a, b in zip(whole, short, strict=True):
        np.testing.assert_allclose(a[:, kept], b, atol=1e-5)


ONE = np.ones(1, np.float32)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("weighted_sum_advantages", {"weights": ONE}),
        ("lagrangian_advantages", {"weights": ONE, "multipliers": 2 * ONE}),
        ("chebyshev_advantages", {"weights": ONE, "ideal": 5 * ONE}),
        ("chebyshev_advantages", {"weights": ONE, "ideal": 5 * ONE, "rho": 0.5}),
    ],
)
@pytest.mark.parametrize("scale", ["group", "none"])
def test_one_objective_is_grpo(name, options, scale, offered_jitted, rewards):
    given = {"num_generations": G, "scale": scale}
    advantages = offered_jitted(name)(
        rewards[:, None], jnp.ones((B, 1), jnp.bool_), **options, **given
    )
    factor = 1.5 if scale == "none" and "rho" in options else 1.0
    wanted = factor * offered_jitted("group_advantages")(rewards, **given)
    np.testing.assert_allclose(advantages, wanted, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("gdpo_advantages", {"weights": ONE}),
        ("pfab_advantages", {"min_std": 0.0}),
        ("mgda_advantages", {}),
        ("pcgrad_advantages", {}),
        ("cagrad_advantages", {"c": 0.5}),
    ],
)
def test_one_objective_is_grpo_up_to_scale(name, options, offered_jitted, rewards):
    """They divide by the deviation of a group and by that of the batch, which scales them."""
    result = offered_jitted(name)(
        rewards[:, None], jnp.ones((B, 1), jnp.bool_), num_generations=G, **options
    )
    advantages = np.asarray(result[0] if isinstance(result, tuple) else result)
    wanted = offered_jitted("group_advantages")(rewards, num_generations=G)
    ratio = np.dot(advantages, wanted) / np.dot(wanted, wanted)
    assert ratio > 0.5
    np.testing.assert_allclose(advantages, ratio * wanted, rtol=1e-3, atol=1e-3)


def test_an_objective_that_applies_nowhere_changes_nothing(offered_jitted, vectors):
    rewards, mask = vectors
    more = jnp.pad(rewards, ((0, 0), (0, 1)), constant_values=jnp.nan)
    wider, weights = jnp.pad(mask, ((0, 0), (0, 1))), jnp.asarray([0.5, 0.3, 0.2, 0.7])
    for name in ("weighted_sum_advantages", "gdpo_advantages"):
        function = offered_jitted(name)
        np.testing.assert_allclose(
            function(more, wider, weights=weights, num_generations=G),
            function(rewards, mask, weights=weights[:M], num_generations=G),
            atol=1e-5,
        )


def test_no_live_objective_is_worked_against(offered_jitted, vectors):
    """The promise of P-FAB's weights, in each group."""
    rewards, mask = vectors
    advantages, weights = offered_jitted("pfab_advantages")(
        rewards, mask, num_generations=G, min_std=0.0, renormalize="none"
    )
    np.testing.assert_allclose(jnp.sum(weights, axis=1), np.ones(N), atol=1e-5)
    groups = rewards.reshape(N, G, M)
    scores = (groups - groups.mean(1, keepdims=True)) / groups.std(1, keepdims=True)
    products = jnp.einsum("ngm,ng->nm", scores, advantages.reshape(N, G))
    lengths = jnp.sum(jnp.square(advantages.reshape(N, G)), axis=1)
    assert np.all(products >= lengths[:, None] - 1e-4)


@pytest.mark.parametrize("name", ["mgda", "cagrad", "pcgrad"])
def test_a_pytree_of_gradients_is_one_long_vector(name, offered_jitted):
    function, gradients = offered_jitted(name), normal(M, 12)
    arguments = [jax.random.key(0)] if name == "pcgrad" else []
    options = {"c": 0.5} if name == "cagrad" else {}
    tree = {"a": gradients[:, :5], "b": gradients[:, 5:].reshape(M, 7, 1)}
    got = function(tree, *arguments, **options)
    flat = jnp.concatenate([got["a"], got["b"][:, 0]])
    np.testing.assert_allclose(flat, function(gradients, *arguments, **options), atol=1e-5)


def test_directions_of_conflicting_gradients(offered_jitted):
    """MGDA works against none, and where there is no conflict PCGrad is the sum."""
    gradients = normal(M, 12)
    direction = offered_jitted("mgda")(gradients)
    assert np.all(gradients @ direction >= jnp.sum(jnp.square(direction)) - 1e-4)
    agreeing = jnp.eye(M, 12)
    summed = offered_jitted("pcgrad")(agreeing, jax.random.key(0))
    np.testing.assert_allclose(summed, jnp.sum(agreeing, axis=0), atol=1e-6)
    mean = offered_jitted("cagrad")(gradients, c=0.0)
    np.testing.assert_allclose(mean, jnp.mean(gradients, axis=0), atol=1e-5)


def test_what_is_dominated_adds_no_volume(offered):
    points, reference = np.abs(np.random.default_rng(0).normal(size=(12, M))), np.zeros(M)
    front = np.asarray(offered("pareto_front")(jnp.asarray(points, jnp.float32)))
    hypervolume = offered("hypervolume")
    assert 0 < front.sum() < 12
    assert hypervolume(points, reference) == pytest.approx(hypervolume(points[front], reference))
    assert hypervolume(points[:1], reference) == pytest.approx(np.prod(points[0]))
