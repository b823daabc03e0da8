"""GRPO and MORL: what becomes of rewards, and what their metrics must show."""

import json

import numpy as np
import pytest

from jaxrl_reason.advantages import group_advantages
from jaxrl_reason.config import validate
from jaxrl_reason.metrics import read_metrics
from jaxrl_reason.objectives import AGGREGATORS
from jaxrl_reason.stages import grpo, morl
from jaxrl_reason.stages.completions import Scored
from jaxrl_reason.stages.config import RunConfig
from jaxrl_reason.stages.pareto import pareto_points
from jaxrl_reason.stages.pipeline import plan

GROUP = 4


@pytest.fixture
def advantages_of(make_context, tiny, tmp_path, monkeypatch):
    """The function from rewards to advantages that a stage trains on."""

    def of(kind, **changes):
        raw = dict(tiny["stages"]["reason" if kind == "grpo" else "balance"])
        raw.pop("hypervolume_weighting", None)
        raw |= {"parent": "init", "num_generations": GROUP} | changes
        (stage,) = plan(make_context(tmp_path, stages={"s": raw}))
        module = {"grpo": grpo, "morl": morl}[kind]
        taken = []
        take = lambda stage, function, *rest, **more: taken.append(function)
        monkeypatch.setattr(module, "train_policy", take)
        getattr(module, f"run_{kind}")(stage)
        return taken[0]

    return of


def scored(seed=0, groups=6, objectives=3):
    rewards = np.random.default_rng(seed).random((groups * GROUP, objectives)).astype(np.float32)
    return Scored(rewards, np.ones(rewards.shape, bool))


def two(first=None, second=None):
    kinds = {"accuracy": first, "format": second}
    return {"rewards": [{"kind": kind, "weight": weight} for kind, weight in kinds.items()]}


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_grpo_takes_the_weighted_sum(advantages_of, scale):
    function = advantages_of("grpo", scale_rewards=scale, **two(2.0, 0.5))
    given = scored(objectives=2)
    advantages, metrics = function(given)
    reward = given.rewards @ np.asarray([2.0, 0.5], np.float32)
    expected = group_advantages(reward, num_generations=GROUP, scale=scale)
    np.testing.assert_allclose(advantages, expected, rtol=1e-5, atol=1e-5)
    assert metrics["reward"] == pytest.approx(reward.mean())
    assert metrics["reward_std"] == pytest.approx(reward.std())


@pytest.mark.parametrize(("loss_type", "scale"), [("dapo", "group"), ("dr_grpo", "none")])
def test_grpo_scales_as_the_paper_of_its_loss_unless_told(advantages_of, loss_type, scale):
    given = scored(objectives=2)
    default, _ = advantages_of("grpo", loss_type=loss_type, **two())(given)
    named, _ = advantages_of("grpo", loss_type=loss_type, scale_rewards=scale, **two())(given)
    other, _ = advantages_of("grpo", loss_type=loss_type, scale_rewards="batch", **two())(given)
    np.testing.assert_array_equal(default, named)
    assert not np.allclose(default, other)


def test_grpo_gives_nothing_for_a_reward_that_does_not_apply(advantages_of):
    function = advantages_of("grpo", **two())
    given = scored(objectives=2)
    mask = given.mask.copy()
    mask[:, 1] = False
    other = given.rewards.copy()
    other[:, 1] = 7
    np.testing.assert_allclose(
        function(Scored(other, mask))[0],
        function(Scored(given.rewards * np.asarray([1, 0], np.float32), given.mask))[0],
        atol=1e-6,
    )


THREE = [{"kind": "accuracy"}, {"kind": "format"}, {"kind": "length", "low": 4, "high": 12}]
WEIGHTED = [reward | {"weight": w} for reward, w in zip(THREE, (1.0, 0.5, 0.25), strict=True)]
OPTIONS = {
    "weighted_sum": {"scale": "batch"},
    "gdpo": {},
    "pfab": {"scope": "group", "min_std": 0.01},
    "pfab over the batch": {"scope": "batch", "min_std": [0.01, 0.02, 0.03]},
    "mgda": {},
    "pcgrad": {},
    "cagrad": {"c": 0.5},
    "chebyshev": {"ideal": [1.0, 1.0, 1.0], "rho": 0.1},
    "lagrangian": {"multipliers": [0.0, 0.5, 1.0]},
}


def test_every_aggregator_is_tested():
    assert {name.split()[0] for name in OPTIONS} == AGGREGATORS.keys()


@pytest.mark.parametrize("name", OPTIONS)
def test_every_aggregator_makes_advantages_of_rewards(advantages_of, name):
    aggregator = name.split()[0]
    weighs = aggregator in ("weighted_sum", "gdpo", "chebyshev", "lagrangian")
    function = advantages_of(
        "morl",
        aggregator=aggregator,
        aggregator_options=OPTIONS[name],
        rewards=WEIGHTED if weighs else THREE,
    )
    given = scored()
    advantages, metrics = function(given)
    options = {k: np.asarray(v) if isinstance(v, list) else v for k, v in OPTIONS[name].items()}
    if weighs:
        options["weights"] = np.asarray([1.0, 0.5, 0.25], np.float32)
    expected, weights = AGGREGATORS[aggregator](
        given.rewards, given.mask, num_generations=GROUP, **options
    )
    np.testing.assert_allclose(advantages, expected, rtol=1e-4, atol=1e-5)
    assert np.abs(advantages).max() > 0.1
    np.testing.assert_allclose(advantages.reshape(-1, GROUP).mean(axis=1), 0, atol=0.5)
    np.testing.assert_allclose(
        [metrics[f"objectives/weights/{name}"] for name in ("accuracy", "format", "length")],
        np.mean(weights, axis=0),
        rtol=1e-4,
        atol=1e-5,
    )


def points(*means: list[float]) -> list[Scored]:
    """Batches of two groups whose rewards have these means."""
    spread = np.tile([[-0.125], [0.125]], (GROUP, 1))
    batches = [np.asarray(mean, np.float32) + spread for mean in means]
    return [Scored(batch.astype(np.float32), np.ones(batch.shape, bool)) for batch in batches]


def test_steps_count_more_while_the_front_moves_outward():
    factor = morl.FrontFactor()
    given = points([0.25, 0.25], [0.5, 0.75], [0.5, 0.75], [0.375, 0.5], [0.75, 0.5], [1.25, 0.125])
    # Above the first point the boxes are 1/4 x 1/2, nothing, nothing, and 1/4 x 1/4 more.
    added = [0, 0.125, 0, 0, 0.0625, 0]
    found = [factor.next(batch) for batch in given]
    assert found == pytest.approx([0.5 + 1.5 * np.tanh(volume) for volume in added])
    assert factor.state() == [[0.25, 0.25], [0.5, 0.75], [0.75, 0.5]]


def test_the_front_goes_on_from_a_checkpoint():
    given = points([0.25, 0.25], [0.5, 0.75], [0.75, 0.5])
    whole, first, second = (morl.FrontFactor() for _ in range(3))
    expected = [whole.next(batch) for batch in given]
    found = [first.next(batch) for batch in given[:2]]
    second.load(json.loads(json.dumps(first.state())))
    assert [*found, second.next(given[2])] == expected


def test_a_batch_to_which_a_reward_does_not_apply_is_no_point():
    factor = morl.FrontFactor()
    start, high, _ = points([0.25, 0.25], [0.75, 0.75], [0.5, 0.5])
    mask = high.mask.copy()
    mask[:, 0] = False
    assert factor.next(Scored(high.rewards, mask)) == 0.5
    assert factor.state() == []
    assert [factor.next(start), factor.next(Scored(high.rewards, mask))] == [0.5, 0.5]
    # Where it applies to some, its mean is over these.
    mask[0, 0] = True
    assert factor.next(Scored(high.rewards, mask)) == pytest.approx(
        0.5 + 1.5 * np.tanh(0.375 * 0.5)
    )


def test_the_factor_multiplies_what_the_aggregator_makes(advantages_of):
    options = {"aggregator": "weighted_sum", "aggregator_options": {"scale": "none"}, **two()}
    plain = advantages_of("morl", **options)
    weighted = advantages_of("morl", hypervolume_weighting=True, **options)
    for batch in points([0.25, 0.25], [0.5, 0.75]):
        advantages, metrics = weighted(batch)
        factor = metrics.pop("objectives/hypervolume_factor")
        expected, others = plain(batch)
        np.testing.assert_allclose(advantages, factor * expected, rtol=1e-6)
        assert metrics == others
    assert factor > 0.6
    assert np.abs(expected).max() > 0.05


# What a run must show


def rows(four, stage):
    return read_metrics(four.directory / stage / "metrics.jsonl")


def test_log_probs_of_sampling_are_those_of_training_until_the_first_update(four):
    name = "sampling/sampling_logp_difference/mean"
    once = [row[name] for row in rows(four, "balance")]
    assert four.config.stages["balance"].num_iterations == 1
    assert 0 <= max(once) < 1e-5
    # The second update on a batch sees a policy that has moved.
    again = [row[name] for row in rows(four, "reason")]
    assert four.config.stages["reason"].num_iterations == 2
    assert min(again) > 1e-3


def test_clipping_acts_from_the_second_update_on(four):
    assert all(row["clip_ratio/region_mean"] == 0 for row in rows(four, "balance"))
    assert any(row["clip_ratio/region_mean"] > 0 for row in rows(four, "reason"))


def test_a_batch_sampled_ahead_is_one_update_old_but_after_a_checkpoint(four):
    assert four.config.stages["ahead"].save_steps == 2
    ages = [row["sampling/staleness/mean"] for row in rows(four, "ahead")]
    assert ages == [0, 1, 0, 1, 0]
    # The policy has moved since, and the ratio says so.
    moved = [row["sampling/sampling_logp_difference/mean"] for row in rows(four, "ahead")]
    assert [distance > 1e-4 for distance in moved] == [age > 0 for age in ages]
    for stage in ("reason", "balance", "refill"):
        assert all(row["sampling/staleness/mean"] == 0 for row in rows(four, stage))


def test_dead_groups_are_replaced_while_problems_last(four):
    assert four.config.stages["refill"].dynamic_sampling.max_batches == 3
    tried = [row["num_gen_batches"] for row in rows(four, "refill")]
    assert all(1 <= batches <= 3 and batches * 8 == int(batches * 8) for batches in tried)
    assert max(tried) > 1
    assert all(
        row["dead_groups"] == 0 for row in rows(four, "refill") if row["num_gen_batches"] < 3
    )


def test_phases_add_up_to_the_step(four):
    for stage in ("reason", "balance", "refill"):
        for row in rows(four, stage):
            phases = {name: value for name, value in row.items() if name.startswith("time/")}
            assert len(phases) == 5
            assert 0 < sum(phases.values()) <= row["step_time"]
            assert row["tokens_per_second/rollout"] > 0
            tokens = row["tokens_per_second"] * row["step_time"]
            assert tokens == pytest.approx(row["num_tokens"])
            assert 0 <= row["padding_share"] < 1
    extra = lambda stage: sum(row["time/logprobs"] for row in rows(four, stage))
    assert extra("reason") > 10 * max(extra("balance"), extra("refill"))


def test_the_distance_from_the_parent_is_measured_where_beta_asks(four):
    assert all(row["kl"] > 0 for row in rows(four, "reason"))
    assert all("kl" not in row for row in rows(four, "balance"))


def test_rewards_of_a_step_are_those_of_its_completions(four):
    for row in rows(four, "reason"):
        total = row["rewards/accuracy/mean"] + 0.5 * row["rewards/format/mean"]
        assert row["reward"] == pytest.approx(total)
        assert row["completions/mean_length"] * 128 == pytest.approx(row["num_tokens"])
        assert 1 <= row["completions/min_length"] <= row["completions/max_length"] <= 12
        assert row["frac_reward_zero_std"] * 16 == pytest.approx(row["dead_groups"])


def test_the_front_is_made_of_the_last_stage_with_several_rewards(four):
    front = pareto_points(four.config)
    assert front["stage"] == "balance"
    row = rows(four, "balance")
    accuracy = np.mean([r["rewards/accuracy/mean"] for r in row])
    length = np.mean([r["completions/mean_length"] for r in row])
    np.testing.assert_allclose(front["points"], [[accuracy, 1 - length / 12]])
    assert front["steps"].tolist() == [5]
    assert front["hypervolume"] == pytest.approx(np.prod(front["points"][0]))


def test_without_such_a_stage_there_is_no_front(tiny):
    first = {"cold": tiny["stages"]["cold"]}
    assert pareto_points(validate(RunConfig, tiny | {"stages": first}, "test")) is None
