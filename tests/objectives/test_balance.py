import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_reason.objectives import mgda_advantages, min_norm_weights, pfab_advantages

G = 8
PROMPTS = 8  # one shape for most tests, so that one compilation serves them


@functools.cache
def compiled(rule, options):
    return jax.jit(functools.partial(rule, **dict(options)))


def run(rule, rewards, mask, **options):
    options = tuple(sorted({"num_generations": G, **options}.items()))
    return compiled(rule, options)(rewards, np.asarray(mask, bool))


pfab = functools.partial(run, pfab_advantages, min_std=1e-3)


def mixed(prompts=PROMPTS, seed=0, group=G):
    """Two binary and two continuous rewards, with an all-true mask."""
    rng = np.random.default_rng(seed)
    binary = rng.random((prompts * group, 2)) < 0.5
    rewards = np.concatenate([binary, rng.random((prompts * group, 2))], axis=1)
    return rewards.astype(np.float32), np.ones(rewards.shape, bool)


def standardise(rewards, group=G):
    groups = rewards.reshape(-1, group, rewards.shape[1]).astype(np.float64)
    deviation = groups.std(1, keepdims=True)
    live = deviation > 1e-3
    return np.where(
        live, (groups - groups.mean(1, keepdims=True)) / np.where(live, deviation, 1), 0
    )


def test_no_objective_is_worked_against():
    rewards, mask = mixed()
    advantages, weights = pfab(rewards, mask, renormalize="none")
    assert advantages.dtype == weights.dtype == jnp.float32
    assert weights.shape == (PROMPTS, 4)
    z, a = standardise(rewards), np.asarray(advantages).reshape(-1, G)
    inner, square = np.einsum("ngm,ng->nm", z, a) / G, np.sum(a**2, 1, keepdims=True) / G
    live = np.any(z != 0, axis=1)
    assert np.all((inner >= square - 1e-4)[live])
    np.testing.assert_allclose(
        np.where(weights > 1e-3, inner, 0), np.where(weights > 1e-3, square, 0), atol=1e-4
    )
    np.testing.assert_allclose(np.sum(weights, 1), 1, rtol=1e-5)


def test_two_live_objectives_share_equally():
    rng = np.random.default_rng(1)
    base = rng.normal(size=(PROMPTS * G, 1))
    for correlation in (-0.9, 0.0, 0.9):
        other = correlation * base + 0.4 * rng.normal(size=base.shape)
        rewards = np.concatenate([base, other], axis=1).astype(np.float32)
        _, weights = pfab(rewards, np.ones_like(rewards))
        np.testing.assert_allclose(weights, 0.5, atol=1e-3)


def test_uncorrelated_objectives_share_equally():
    contrasts = np.array([[1]])
    for _ in range(3):
        contrasts = np.block([[contrasts, contrasts], [contrasts, -contrasts]])
    rewards = contrasts[:, [1, 2, 4, 7]].astype(np.float32)  # orthogonal and centred
    rewards = np.tile(rewards, (PROMPTS, 1))
    _, weights = pfab(rewards, np.ones_like(rewards))
    np.testing.assert_allclose(weights, 0.25, atol=1e-5)


@pytest.mark.parametrize("scope", ["group", "batch"])
def test_clones_change_nothing(scope):
    rewards, mask = mixed()
    solve = functools.partial(pfab, scope=scope, renormalize="none")
    alone, _ = solve(rewards, mask)
    cloned, _ = solve(rewards[:, [0, 1, 2, 3, 3, 3]], mask[:, [0, 1, 2, 3, 3, 3]])
    np.testing.assert_allclose(cloned, alone, atol=2e-4)
    # Averaging the objectives is not invariant, so the test can fail.
    z = standardise(rewards)
    assert np.abs(z.mean(-1) - z[..., [0, 1, 2, 3, 3, 3]].mean(-1)).max() > 0.1


def test_a_saturated_objective_must_be_left_out():
    rewards, mask = mixed()
    rewards[:, 0] = 0.1  # every completion has it
    advantages, weights = pfab(rewards, mask, renormalize="none")
    np.testing.assert_array_equal(weights[:, 0], 0)
    fewer, _ = pfab(rewards[:, [1, 2, 3, 3]], mask, renormalize="none")  # a clone adds nothing
    np.testing.assert_allclose(advantages, fewer, atol=2e-4)
    assert np.abs(advantages).max() > 0.1
    # min_std decides for rewards that hardly vary, and may differ between objectives.
    rewards[:, 0] += 1e-4 * np.random.default_rng(0).normal(size=len(rewards)).astype(np.float32)
    for min_std, left_out in ((1e-3, True), ((1e-6, 1.0, 0.0, 0.0), False)):
        _, weights = pfab(rewards, mask, min_std=min_std)
        assert np.all(np.asarray(weights[:, 0]) == 0) == left_out


def test_all_dead_gives_zero():
    rewards, mask = mixed()
    advantages, weights = pfab(np.full_like(rewards, 0.1), mask)
    np.testing.assert_array_equal(advantages, 0)
    np.testing.assert_array_equal(weights, 0)


def test_conflict_shrinks_the_advantage_and_large_groups_have_less_of_it():
    x = np.random.default_rng(0).normal(size=G)
    other = np.random.default_rng(1).normal(size=G)
    lengths = []
    for mix in (0.0, 0.5, 1.0):
        rewards = np.stack([x, mix * -x + (1 - mix) * other, x, x], 1).astype(np.float32)
        rewards = np.tile(rewards, (PROMPTS, 1))
        advantages, _ = pfab(rewards, np.ones_like(rewards, bool), renormalize="none")
        lengths.append(np.linalg.norm(advantages))
    assert lengths[0] > lengths[1] > lengths[2]
    assert lengths[2] < 1e-3

    shares = []
    solve = jax.jit(jax.vmap(min_norm_weights))
    for group in (4, 8, 16):
        z = standardise(mixed(400, group=group)[0], group)
        live = np.any(z != 0, axis=1)
        grams = (np.einsum("ngi,ngj->nij", z, z) / group).astype(np.float32)
        weights = np.asarray(solve(grams, live))
        square = np.einsum("ni,nij,nj->n", weights, grams, weights)
        shares.append(np.mean(square[live.any(1)] < 0.05))
    assert shares[0] > 0.3
    assert 0.01 < shares[1] < 0.15
    assert shares[2] < 0.01


def rare_signal(prompts=256, share=0.125):
    """Uncorrelated objectives of which the last is live for ``share`` of the prompts."""
    rng = np.random.default_rng(0)
    rewards = rng.normal(size=(prompts, G, 3)).astype(np.float32)
    rewards[int(share * prompts) :, :, 2] = 0.0
    return rewards.reshape(-1, 3), np.ones((prompts * G, 3))


def test_batch_scope_raises_rare_signals():
    rewards, mask = rare_signal()
    _, weights = pfab(rewards, mask, scope="batch")
    assert weights.shape == (1, 3)
    expected = np.asarray([1, 1, 8]) / 10  # proportional to 1 / (live share)
    np.testing.assert_allclose(weights[0], expected, atol=0.03)
    _, capped = pfab(rewards, mask, scope="batch", max_weight=0.7)
    np.testing.assert_allclose(capped[0], [0.15, 0.15, 0.7], atol=0.03)
    # Too rare to be trusted: 2 of 256 prompts.
    rewards, mask = rare_signal(share=2 / 256)
    _, weights = pfab(rewards, mask, scope="batch")
    np.testing.assert_allclose(weights[0], [0.5, 0.5, 0], atol=0.03)


def test_max_weight_at_group_scope():
    rewards, mask = mixed()
    _, free = pfab(rewards, mask)
    _, capped = pfab(rewards, mask, max_weight=0.3)
    assert np.max(free) > 0.35
    assert np.max(capped) < 0.3 + 1e-5
    np.testing.assert_allclose(np.sum(capped, 1), 1, rtol=1e-5)


def test_without_a_mask_an_objective_that_does_not_vary_takes_all():
    rewards, mask = mixed()
    rewards[:G, 0] = 1.0
    advantages, weights = run(pfab_advantages, rewards, mask, min_std=None, renormalize="none")
    np.testing.assert_allclose(advantages[:G], 0, atol=1e-6)
    np.testing.assert_allclose(weights[0], [1, 0, 0, 0], atol=1e-5)
    masked, others = pfab(rewards, mask, renormalize="none")
    assert np.abs(masked[:G]).max() > 0.1
    assert others[0, 0] == 0
    np.testing.assert_allclose(advantages[G:], masked[G:], atol=1e-6)


def test_frank_wolfe_is_near_the_exact_solution():
    rewards, mask = mixed()
    exact, _ = pfab(rewards, mask, renormalize="none")
    near, _ = pfab(rewards, mask, renormalize="none", frank_wolfe_steps=200)
    rough, _ = pfab(rewards, mask, renormalize="none", frank_wolfe_steps=2)
    errors = [np.sqrt(np.mean(np.square(a - exact))) for a in (near, rough)]
    assert errors[0] < 0.03 < errors[1]


def test_mgda_is_pfab_of_the_batch_without_guards():
    rewards, mask = mixed()
    options = {"scope": "batch", "renormalize": "none"}
    plain, _ = run(mgda_advantages, rewards, mask, **options)
    np.testing.assert_allclose(plain, pfab(rewards, mask, **options)[0], atol=1e-5)


def test_one_objective_is_grpo_with_population_deviation():
    rewards, mask = mixed()
    advantages, weights = pfab(rewards[:, 2:3], mask[:, 2:3], renormalize="none")
    np.testing.assert_allclose(advantages, standardise(rewards[:, 2:3]).reshape(-1), atol=1e-5)
    np.testing.assert_array_equal(weights, 1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scope": "token"}, "scope='token' is unknown; use one of 'group', 'batch'"),
        ({"renormalize": "all"}, "renormalize='all' is unknown"),
        ({"max_weight": 1.5}, "max_weight=1.5"),
        ({"min_std": -1.0}, "min_std=-1.0"),
        ({"min_std": (0.1, 0.1)}, r"min_std has shape \(2,\); expected \(4,\)"),
        ({"num_generations": 7}, "64 rows do not split into groups of num_generations=7"),
        ({"num_generations": 1}, "needs at least 2 completions"),
        ({"frank_wolfe_steps": 0}, "steps=0"),
    ],
)
def test_errors(options, message):
    rewards, mask = mixed()
    with pytest.raises(ValueError, match=message):
        pfab(rewards, mask, **options)


def test_shape_errors():
    rewards, mask = mixed()
    with pytest.raises(ValueError, match=r"expected \[B, M\]"):
        pfab(rewards[:, 0], mask[:, 0])
    with pytest.raises(ValueError, match="mask has shape"):
        pfab(rewards, mask[:, :2])
