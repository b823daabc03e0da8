import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_reason import objectives
from jaxrl_reason.objectives import AGGREGATORS, lagrangian_weights

G, PROMPTS, M = 4, 3, 4
WEIGHTS = np.asarray([1.0, 1.25, 0.75, 1.0], np.float32)
SUM = {"weights": WEIGHTS}
CHEBYSHEV = {**SUM, "ideal": np.full(M, 1.25, np.float32), "rho": 0.1}
LAGRANGIAN = {**SUM, "multipliers": np.asarray([0.0, 1.0, 2.0, 0.0], np.float32)}
HYPER = {
    "weighted_sum": SUM,
    "gdpo": SUM,
    "pfab": {"min_std": 1e-3},
    "mgda": {},
    "pcgrad": {},
    "cagrad": {"c": 0.5},
    "chebyshev": CHEBYSHEV,
    "lagrangian": LAGRANGIAN,
}


@pytest.fixture(scope="module")
def data():
    """Rewards with gaps: objective 0 does not apply to the first prompt, one reward is missing."""
    rewards = np.random.default_rng(0).random((PROMPTS * G, M)).astype(np.float32)
    mask = np.ones(rewards.shape, bool)
    mask[:G, 0] = False
    mask[2 * G + 1, 3] = False
    return rewards, mask


def run(name, rewards, mask, **options):
    return AGGREGATORS[name](rewards, mask, num_generations=G, **HYPER[name], **options)


def test_every_aggregator_has_an_example():
    assert set(HYPER) == set(AGGREGATORS)


@pytest.mark.parametrize("name", AGGREGATORS)
def test_shapes_gaps_and_order(name, data):
    rewards, mask = data
    advantages, weights = run(name, rewards, mask)
    assert advantages.shape == (PROMPTS * G,)
    assert weights.shape in ((1, M), (PROMPTS, M))
    assert advantages.dtype == weights.dtype == jnp.float32
    assert np.std(advantages) > 0.5

    dirty, dirty_weights = run(name, np.where(mask, rewards, np.nan), mask)
    np.testing.assert_array_equal(dirty, advantages)
    np.testing.assert_array_equal(dirty_weights, weights)

    # A shift of one objective changes nothing, except where it moves away from the ideal point.
    shift = np.asarray([0.0, 0.0, 0.0, 0.25], np.float32)
    if name != "chebyshev":
        np.testing.assert_allclose(run(name, rewards + shift, mask)[0], advantages, atol=2e-3)
    order = np.arange(PROMPTS * G).reshape(-1, G)[::-1].reshape(-1)
    shuffled, _ = run(name, rewards[order], mask[order])
    np.testing.assert_allclose(shuffled, advantages[order], atol=2e-4)


@pytest.mark.parametrize("name", AGGREGATORS)
def test_is_the_function_of_that_name(name, data):
    function = getattr(objectives, f"{name}_advantages")
    own, named = (inspect.signature(x).parameters for x in (function, AGGREGATORS[name]))
    assert {k: v.default for k, v in own.items()} == {k: v.default for k, v in named.items()}
    result = function(*data, num_generations=G, **HYPER[name])
    advantages = result[0] if isinstance(result, tuple) else result
    np.testing.assert_array_equal(run(name, *data)[0], advantages)


@pytest.mark.parametrize("name", ["weighted_sum", "gdpo", "chebyshev", "lagrangian"])
def test_results_are_detached(name, data):
    rewards, mask = data
    hyper = {k: v for k, v in HYPER[name].items() if isinstance(v, np.ndarray)}
    rest = {k: v for k, v in HYPER[name].items() if k not in hyper}

    def total(rewards, hyper):
        results = AGGREGATORS[name](rewards, mask, num_generations=G, **hyper, **rest)
        return sum(jnp.sum(result * result) for result in results)

    gradients = jax.grad(total, argnums=(0, 1))(jnp.asarray(rewards), hyper)
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(gradients))


def test_weights_that_are_given_come_back(data):
    for name in ("weighted_sum", "gdpo"):
        np.testing.assert_array_equal(run(name, *data)[1], WEIGHTS[None])
    effective = lagrangian_weights(WEIGHTS, LAGRANGIAN["multipliers"])
    np.testing.assert_array_equal(run("lagrangian", *data)[1], effective[None])


def test_chebyshev_counts_who_decides(data):
    rewards, _ = data
    mask = np.ones(rewards.shape, bool)
    mask[:G, 0] = mask[G : 2 * G] = False
    _, decided = run("chebyshev", rewards, mask)
    deficits = np.where(mask, WEIGHTS * (CHEBYSHEV["ideal"] - rewards), -np.inf)
    worst = np.eye(M)[np.argmax(deficits, axis=1)] * mask.any(axis=1, keepdims=True)
    np.testing.assert_allclose(decided, worst.reshape(PROMPTS, G, M).mean(axis=1))
    assert np.count_nonzero(decided) > 3
