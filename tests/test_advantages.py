import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_reason.advantages import dead_groups, gae, global_advantages, group_advantages

G = 4


@pytest.fixture
def rewards():
    return np.random.default_rng(0).normal(size=(5, G)).reshape(-1)


def oracle(rewards, baseline, scale, ddof, eps):
    groups = rewards.reshape(-1, G)
    out = np.zeros_like(groups)
    for n, group in enumerate(groups):
        for i, reward in enumerate(group):
            others = np.delete(group, i)
            base = {"mean": group.mean(), "leave_one_out": others.mean(), "none": 0.0}[baseline]
            std = {"group": group.std(ddof=ddof), "batch": rewards.std(ddof=ddof), "none": None}
            out[n, i] = reward - base
            if scale != "none":
                out[n, i] /= std[scale] + eps
    return out.reshape(-1)


@pytest.mark.parametrize("baseline", ["mean", "leave_one_out", "none"])
@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_group_advantages_match_oracle(baseline, scale, rewards):
    # Each option once per dtype; the two pairs differ, so a knob that does nothing is found.
    for ddof, eps, wide in ((1, 1e-4, False), (0, 0.1, True)):
        expected = oracle(rewards, baseline, scale, ddof, eps)
        kind = {"baseline": baseline, "scale": scale, "ddof": ddof, "eps": eps}
        with jax.enable_x64(wide):
            ours = jax.jit(lambda r, kind=kind: group_advantages(r, num_generations=G, **kind))(
                jnp.asarray(rewards)
            )
        assert ours.dtype == (np.float64 if wide else np.float32)
        np.testing.assert_allclose(ours, expected, rtol=1e-12 if wide else 3e-5)


@pytest.mark.parametrize("baseline", ["mean", "leave_one_out"])
@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_advantages_ignore_a_shift_of_a_groups_rewards(baseline, scale, rewards):
    # At batch scale the deviation is that of the raw rewards, so there all must shift together.
    shift = 10.0 if scale == "batch" else np.repeat(np.arange(5.0), G)
    kind = {"num_generations": G, "baseline": baseline, "scale": scale}
    np.testing.assert_allclose(
        group_advantages(rewards + shift, **kind), group_advantages(rewards, **kind), atol=2e-5
    )


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_equal_rewards_give_exactly_zero(scale):
    # The float32 mean of 7 x 0.1 is not 0.1, and rounding over eps must not look like a signal.
    values = (0.1, 1 / 3, 1e3 + 0.1, 0.0)
    rewards = np.concatenate([np.repeat(values, 7), np.arange(7)]).astype(np.float32)
    for baseline, eps in (("mean", 1e-4), ("leave_one_out", 0.0)):
        ours = group_advantages(rewards, num_generations=7, baseline=baseline, scale=scale, eps=eps)
        np.testing.assert_array_equal(ours[:28], 0)
        assert (ours[28:] != 0).sum() == 6
    np.testing.assert_array_equal(dead_groups(rewards, 7), [True] * 4 + [False])


def test_a_nan_reward_is_seen(rewards):
    rewards[1] = np.nan
    ours = group_advantages(rewards, num_generations=G)
    np.testing.assert_array_equal(np.isnan(ours), np.arange(20) < G)


def test_global_advantages(rewards):
    expected = (rewards - rewards.mean()) / (rewards.std(ddof=1) + 0.01)
    np.testing.assert_allclose(global_advantages(rewards, eps=0.01), expected, rtol=1e-4)
    assert not np.allclose(global_advantages(rewards, eps=1.0), expected)
    np.testing.assert_array_equal(global_advantages(np.full(7, 0.1), eps=1e-8), 0)


def gae_oracle(rewards, values, mask, gamma, lam):
    advantages = np.zeros_like(rewards)
    for row in range(len(rewards)):
        later_value = later_advantage = 0.0
        for t in reversed(np.flatnonzero(mask[row])):
            delta = rewards[row, t] + gamma * later_value - values[row, t]
            advantages[row, t] = delta + gamma * lam * later_advantage
            later_value, later_advantage = values[row, t], advantages[row, t]
    return advantages, np.where(mask, advantages + values, 0)


def test_gae_matches_oracle_and_skips_masked_tokens():
    rng = np.random.default_rng(1)
    rewards, values = rng.normal(size=(2, 3, 9))
    mask = rng.random((3, 9)) < 0.6
    expected = gae_oracle(rewards, values, mask, 0.9, 0.8)
    dirty = np.where(mask, rewards, np.nan), np.where(mask, values, np.inf)
    ours = jax.jit(lambda *x: gae(*x, gamma=0.9, lam=0.8))(*dirty, mask)
    for ours_part, expected_part in zip(ours, expected, strict=True):
        np.testing.assert_allclose(ours_part, expected_part, rtol=1e-4, atol=1e-5)
    for other in ({"gamma": 0.5, "lam": 0.8}, {"gamma": 0.9, "lam": 0.5}):
        assert not np.allclose(gae(rewards, values, mask, **other)[0], expected[0])


def test_gae_with_lambda_1_is_the_monte_carlo_return():
    rewards, values = np.random.default_rng(2).normal(size=(2, 2, 6))
    _, returns = gae(rewards, values, np.ones((2, 6)), gamma=1.0, lam=1.0)
    np.testing.assert_allclose(returns, rewards[:, ::-1].cumsum(1)[:, ::-1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_generations": 3}, "20 rows do not split into groups of num_generations=3"),
        ({"num_generations": 1}, "leaves nothing to compare"),
        (
            {"num_generations": 4, "baseline": "median"},
            "use one of 'mean', 'leave_one_out', 'none'",
        ),
        ({"num_generations": 4, "scale": True}, "scale=True is unknown"),
        ({"num_generations": 4, "ddof": 2}, "ddof=2 is unknown"),
    ],
)
def test_errors(options, message, rewards):
    with pytest.raises(ValueError, match=message):
        group_advantages(rewards, **options)


def test_shape_errors():
    with pytest.raises(ValueError, match=r"expected \[B\]"):
        group_advantages(jnp.zeros((4, 2)), num_generations=2)
    with pytest.raises(ValueError, match="values has shape"):
        gae(jnp.zeros((4, 2)), jnp.zeros((4, 3)), jnp.zeros((4, 2)), gamma=1.0, lam=1.0)
