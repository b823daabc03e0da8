import functools

import jax
import numpy as np
import pytest

from jaxrl_reason.advantages import group_advantages
from jaxrl_reason.objectives import (
    chebyshev_advantages,
    gdpo_advantages,
    lagrangian_advantages,
    lagrangian_weights,
    update_multipliers,
    weighted_sum_advantages,
)

G, N, M = 4, 5, 3
WEIGHTS = np.asarray([1.0, 0.5, 2.0], np.float32)
EVERYTHING = np.ones((N * G, M), bool)


@pytest.fixture
def rewards():
    return np.random.default_rng(0).normal(size=(N * G, M)).astype(np.float32)


def weighted(scale, weights):
    options = {"weights": weights, "num_generations": G, "scale": scale}
    return jax.jit(functools.partial(weighted_sum_advantages, **options))


@functools.cache
def grpo_of(scale):
    return jax.jit(functools.partial(group_advantages, num_generations=G, scale=scale))


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_one_objective_is_grpo(scale, rewards):
    ours = weighted(scale, [1.0])(rewards[:, :1], EVERYTHING[:, :1])
    grpo = grpo_of(scale)(rewards[:, 0])
    np.testing.assert_allclose(ours, grpo, rtol=1e-6)


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_weighted_sum_is_grpo_of_the_sum(scale, rewards):
    ours = weighted(scale, WEIGHTS)(rewards, EVERYTHING)
    grpo = grpo_of(scale)(rewards @ WEIGHTS)
    np.testing.assert_allclose(ours, grpo, rtol=1e-4, atol=1e-5)


def test_a_missing_reward_is_not_a_zero(rewards):
    mask = EVERYTHING.copy()
    mask[0, 1] = False
    options = {"weights": WEIGHTS, "num_generations": G, "scale": "none"}
    ours = weighted_sum_advantages(rewards + 100, mask, **options)
    # It stands at the mean of the others in its group.
    filled = rewards.copy()
    filled[0, 1] = rewards[1:G, 1].mean()
    expected = weighted_sum_advantages(filled, EVERYTHING, **options)
    np.testing.assert_allclose(ours, expected, atol=1e-3)


def test_gdpo_does_not_care_about_the_scale_of_rewards(rewards):
    ours = gdpo_advantages(rewards, EVERYTHING, weights=WEIGHTS, num_generations=G)
    scaled = rewards * np.asarray([1, 10, 100], np.float32)
    again = gdpo_advantages(scaled, EVERYTHING, weights=WEIGHTS, num_generations=G)
    np.testing.assert_allclose(again, ours, atol=1e-3)


def test_chebyshev_prefers_balance_where_a_sum_does_not():
    # Concave front: no weights make a sum prefer the middle point.
    points = np.asarray([[1, 0, 0], [0.4, 0.4, 0], [0, 1, 0], [0, 0, 0]], np.float32)
    points = np.tile(points, (N, 1))
    options = {"weights": [1.0, 1.0, 0.0], "num_generations": G}
    chebyshev = chebyshev_advantages(points, EVERYTHING, ideal=[1.0, 1.0, 0.0], **options)
    assert np.argmax(chebyshev[:G]) == 1
    assert np.argmax(weighted_sum_advantages(points, EVERYTHING, **options)[:G]) != 1


def test_lagrangian(rewards):
    weights, multipliers = np.asarray([1.0, 0, 0]), np.asarray([0, 3.0, 0])
    np.testing.assert_allclose(lagrangian_weights(weights, multipliers), [0.25, 0.75, 0])
    options = {"num_generations": G, "scale": "none"}
    ours = lagrangian_advantages(
        rewards, EVERYTHING, weights=weights, multipliers=multipliers, **options
    )
    by_hand = weighted_sum_advantages(rewards, EVERYTHING, weights=[0.25, 0.75, 0], **options)
    np.testing.assert_array_equal(ours, by_hand)
    off = lagrangian_advantages(
        rewards, EVERYTHING, weights=weights, multipliers=np.zeros(3), **options
    )
    only = weighted_sum_advantages(rewards, EVERYTHING, weights=[1.0, 0, 0], **options)
    np.testing.assert_array_equal(off, only)


def test_errors(rewards):
    options = {"num_generations": G}
    with pytest.raises(ValueError, match=r"weights has shape \(2,\); expected \(3,\)"):
        weighted_sum_advantages(rewards, EVERYTHING, weights=[1.0, 1.0], **options)
    with pytest.raises(ValueError, match="scale='std' is unknown"):
        weighted_sum_advantages(rewards, EVERYTHING, weights=WEIGHTS, scale="std", **options)
    with pytest.raises(ValueError, match="rho=-1"):
        chebyshev_advantages(rewards, EVERYTHING, weights=WEIGHTS, ideal=WEIGHTS, rho=-1, **options)
    with pytest.raises(ValueError, match="multipliers has shape"):
        lagrangian_advantages(
            rewards, EVERYTHING, weights=WEIGHTS, multipliers=np.ones(2), **options
        )
    with pytest.raises(ValueError, match="learning_rate=0"):
        update_multipliers(WEIGHTS, rewards, EVERYTHING, thresholds=WEIGHTS, learning_rate=0)
