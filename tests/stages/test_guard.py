"""The guard: each sign is found when it is provoked, told once, counted on, and never made up."""

import json
import logging
import math

import numpy as np
import pytest

from jaxrl_reason.config import validate
from jaxrl_reason.metrics import read_metrics
from jaxrl_reason.stages import grpo, pipeline
from jaxrl_reason.stages.guard import Guard
from jaxrl_reason.stages.policy_config import GRPOConfig
from jaxrl_reason.stages.stage_config import SFTConfig

LOGGER = "jaxrl_reason.stages.guard"
ALL = ["empty_mask", "nonfinite_loss", "zero_advantages", "off_policy", "unit_ratio"]
HEALTHY = {
    "loss": 0.5,
    "grad_norm": 1.0,
    "nonfinite_steps": 0.0,
    "sampling/sampling_logp_difference/mean": 1e-7,
    "sampling/importance_sampling_ratio/outside_share": 0.0,
}
MOVED = HEALTHY | {"sampling/sampling_logp_difference/mean": 0.01}
SOME = np.asarray([0.5, -0.5])
NONE = np.zeros(2)


@pytest.fixture
def guard(tiny):
    """A guard of the GRPO stage, whose batches are updated on twice."""

    def make(saved=None, **changes):
        config = validate(
            GRPOConfig, tiny["stages"]["reason"] | {"guard_steps": 3} | changes, "test"
        )
        return Guard("reason", config, saved)

    return make


def look(guard, step=1, *, updates=(HEALTHY, MOVED), counted_tokens=8, advantages=SOME):
    """The kinds of signs of a step, with how often they were seen so far."""
    counts = guard.look(step, updates=updates, counted_tokens=counted_tokens, advantages=advantages)
    return {name.removeprefix("guard/"): count for name, count in counts.items() if count}


def test_a_healthy_step_shows_no_sign(guard, caplog):
    healthy = guard()
    for step in range(1, 20):
        assert look(healthy, step) == {}
    assert not caplog.records


PROVOKED = {
    "unit_ratio": {"updates": [HEALTHY, HEALTHY]},
    "empty_mask": {"counted_tokens": 0},
    "nonfinite_loss": {"updates": [HEALTHY | {"loss": math.nan, "nonfinite_steps": 1.0}, MOVED]},
    "off_policy": {
        "updates": [HEALTHY, MOVED | {"sampling/importance_sampling_ratio/outside_share": 0.06}]
    },
}


@pytest.mark.parametrize("kind", PROVOKED)
def test_a_sign_is_counted_every_time_and_told_once(guard, caplog, kind):
    provoked = guard()
    for count in (1, 2, 3):
        assert look(provoked, count, **PROVOKED[kind]) == {kind: count}
    assert look(provoked, 4) == {kind: 3}
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert record.getMessage().startswith("reason, step 1: ")
    assert record.getMessage().endswith(f"guard/{kind}.")


def test_what_is_told_says_what_was_seen(guard, caplog):
    look(guard(), 7, **PROVOKED["off_policy"])
    assert "step 7: 6% of the tokens in update 2 of 2 had a ratio outside" in caplog.text
    look(guard(), 8, **PROVOKED["unit_ratio"])
    assert (
        "step 8: the ratio was still 1 in update 2 of 2, after a gradient of norm 1." in caplog.text
    )
    look(guard(), 9, **PROVOKED["nonfinite_loss"])
    assert "step 9: update 1 of 2 had loss nan and gradient norm 1." in caplog.text


def test_disagreement_and_a_policy_that_moves_far_are_told_apart(guard, caplog):
    far = {"sampling/importance_sampling_ratio/outside_share": 0.5}
    look(guard(), updates=[HEALTHY | far, MOVED])
    assert "Sampling and training disagree" in caplog.text
    caplog.clear()
    look(guard(), updates=[HEALTHY, MOVED | far])
    assert "The policy moves far" in caplog.text


def test_a_policy_that_moved_since_it_sampled_is_no_disagreement(guard, caplog):
    far = {"sampling/importance_sampling_ratio/outside_share": 0.5}
    look(guard(max_staleness=1, reward_workers=1), updates=[HEALTHY | far, MOVED])
    assert "sampled before the last update, which moved the policy far" in caplog.text


def test_log_probs_that_are_not_numbers_are_off_policy(guard):
    bad = MOVED | {"sampling/importance_sampling_ratio/outside_share": math.nan}
    assert look(guard(), updates=[HEALTHY, bad]) == {"off_policy": 1}


def test_a_few_tokens_may_be_far(guard):
    some = MOVED | {"sampling/importance_sampling_ratio/outside_share": 0.05}
    assert look(guard(), updates=[HEALTHY, some]) == {}


def test_advantages_must_vanish_in_steps_in_a_row(guard, caplog):
    waiting = guard()
    seen = [
        look(waiting, 1 + i, advantages=a) for i, a in enumerate([NONE, NONE, SOME, NONE, NONE])
    ]
    assert seen == [{}] * 5
    assert not caplog.records
    assert look(waiting, 6, advantages=NONE) == {"zero_advantages": 1}
    assert look(waiting, 7, advantages=NONE) == {"zero_advantages": 2}
    assert look(waiting, 8) == {"zero_advantages": 2}
    assert "step 6: all advantages were 0 in 3 steps in a row" in caplog.text
    assert len(caplog.records) == 1


@pytest.mark.parametrize(
    "before", [{"grad_norm": 0.0}, {"grad_norm": math.nan, "nonfinite_steps": 1.0}]
)
def test_a_policy_that_had_no_reason_to_move_is_not_told(guard, before):
    assert "unit_ratio" not in look(guard(), updates=[HEALTHY | before, HEALTHY])


def test_the_kinds_are_those_that_a_stage_can_show(guard, tiny):
    sft = Guard("cold", validate(SFTConfig, tiny["stages"]["cold"], "test"))
    kinds = lambda guard: list(guard.state()["counts"])
    assert kinds(sft) == ALL[:2]
    assert kinds(guard()) == ALL
    assert kinds(guard(num_iterations=1)) == ALL[:4]


def test_a_guard_goes_on_where_it_was_saved(guard, caplog):
    """Also in the middle of steps without advantage, and without telling again."""
    whole = guard()
    steps = [{}, PROVOKED["off_policy"], {"advantages": NONE}, {"advantages": NONE}]
    for number, step in enumerate(steps, start=1):
        look(whole, number, **step)
    saved = json.loads(json.dumps(whole.state()))
    caplog.clear()
    resumed = guard(saved)
    last = [{"advantages": NONE}, PROVOKED["off_policy"]]
    seen = [look(whole, 5 + i, **step) for i, step in enumerate(last)]
    assert [look(resumed, 5 + i, **step) for i, step in enumerate(last)] == seen
    assert seen == [
        {"off_policy": 1, "zero_advantages": 1},
        {"off_policy": 2, "zero_advantages": 1},
    ]
    assert resumed.state() == whole.state()
    assert "off_policy" not in caplog.text


# In a run


def test_a_healthy_run_shows_no_sign(four):
    for stage, config in four.config.stages.items():
        rows = read_metrics(four.directory / stage / "metrics.jsonl")
        signs = {name: value for name, value in rows[-1].items() if name.startswith("guard/")}
        several = getattr(config, "num_iterations", 1) > 1
        policy = isinstance(config, GRPOConfig) or config.kind == "morl"
        assert list(signs) == [
            f"guard/{kind}" for kind in ALL[: 5 if several else 4 if policy else 2]
        ]
        # A large learning rate moves the second update of `reason` far indeed.
        signs.pop("guard/off_policy" if several else "", None)
        assert set(signs.values()) == {0.0}


REWARDS = """
def constant(prompts, completions, **_):
    return [1.0] * len(completions)

def huge(prompts, completions, **_):
    return [(-1) ** i * 3e38 for i in range(len(completions))]
"""


@pytest.fixture
def run_stage(make_context, tiny, tmp_path, monkeypatch, caplog):
    """Run a GRPO stage of the untrained model; returns its last metrics and what was told."""
    (tmp_path / "rewards_of_guard.py").write_text(REWARDS)
    monkeypatch.syspath_prepend(tmp_path)

    def run(reward=None, **changes):
        raw = tiny["stages"]["reason"] | {"parent": "init", "steps": 2, "beta": 0.0} | changes
        if reward is not None:
            function = f"rewards_of_guard:{reward}"
            raw["rewards"] = [{"kind": "python", "name": reward, "function": function}]
        context = make_context(tmp_path, stages={"s": raw})
        (stage,) = pipeline.plan(context)
        pipeline._prepare_folder(context)
        grpo.run_grpo(stage)
        row = read_metrics(stage.directory / "metrics.jsonl")[-1]
        told = [r.getMessage() for r in caplog.records if r.name == LOGGER]
        return {name: v for name, v in row.items() if name.startswith("guard/") and v}, told

    return run


ONES = [{"kind": "python", "name": "ones", "function": "rewards_of_tests:ones"}]


@pytest.mark.parametrize(
    ("kind", "count", "changes"),
    [
        ("zero_advantages", 1, {"reward": "constant", "guard_steps": 2}),
        ("nonfinite_loss", 4, {"reward": "huge", "scale_rewards": "none"}),
        # Smaller than float32 resolves beside any weight.
        ("unit_ratio", 2, {"rewards": ONES, "optimizer": {"learning_rate": 1e-30}}),
        ("off_policy", 2, {"rewards": ONES, "optimizer": {"learning_rate": 0.3}}),
    ],
)
@pytest.mark.filterwarnings("ignore:.* encountered in reduce")  # the mean of huge rewards
def test_a_run_tells_what_is_wrong_once(run_stage, kind, count, changes):
    signs, told = run_stage(**changes)
    assert signs == {f"guard/{kind}": count}
    assert len(told) == 1
    assert f"guard/{kind}" in told[0]
