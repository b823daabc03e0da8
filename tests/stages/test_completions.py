"""Completions on their way to an update: scored by problem, measured, each value at its token."""

import json

import numpy as np
import pytest

from jaxrl_reason.config import validate
from jaxrl_reason.errors import InputError
from jaxrl_reason.sampling import Rollout
from jaxrl_reason.stages.completions import (
    PolicyRows,
    Scored,
    completion_metrics,
    reward_functions,
    score_completions,
)
from jaxrl_reason.stages.pipeline import plan
from jaxrl_reason.stages.stage_config import MORLConfig

PROMPTS, GROUP, LONGEST = 16, 2, 12


@pytest.fixture
def stage(make_context, tiny, tmp_path):
    """A stage whose batch is 16 problems with two completions each."""
    changed = tiny["stages"]["balance"] | {"parent": "init", "num_generations": GROUP}
    return plan(make_context(tmp_path, stages={"balance": changed}))[0]


def make_rollout(lengths, *, finished=True) -> Rollout:
    """Completions of given lengths whose tokens and log-probs are all different."""
    count = len(lengths)
    lengths = np.asarray(lengths)
    mask = np.arange(LONGEST) < lengths[:, None]
    numbers = np.arange(1, count * LONGEST + 1).reshape(count, LONGEST)
    prompts = [[10_000 + i] * (1 + i % 5) for i in range(count // GROUP)]
    return Rollout(
        prompts=prompts,
        num_generations=GROUP,
        tokens=np.where(mask, 100 + numbers, 0).astype(np.int32),
        completion_mask=mask,
        sampling_logprobs=np.where(mask, -numbers / 256, 0).astype(np.float32),
        kept_logmass=np.where(mask, -numbers / 1024, 0).astype(np.float32),
        finished=np.full(count, finished),
    )


@pytest.mark.parametrize("seed", range(3))
def test_every_value_lies_at_its_token_whatever_the_packing(stage, seed):
    rng = np.random.default_rng(seed)
    rollout = make_rollout(rng.integers(1, LONGEST + 1, PROMPTS * GROUP))
    advantages = rng.normal(size=PROMPTS * GROUP).astype(np.float32)
    batch = {k: np.asarray(v) for k, v in PolicyRows(stage).place(rollout, advantages).items()}
    assert batch["tokens"].shape == (2, 16, 20 + LONGEST)

    flat = {name: x.reshape(-1, x.shape[-1]) for name, x in batch.items()}
    found = []
    for row, segments in enumerate(flat["segment_ids"]):
        for segment in range(1, segments.max() + 1):
            document = {name: x[row][segments == segment] for name, x in flat.items()}
            inside = document["completion_mask"]
            ids = document["tokens"][inside]
            which = int((ids[0] - 101) // LONGEST)  # tokens say whose they are
            found.append(which)
            length = rollout.lengths[which]
            np.testing.assert_array_equal(ids, rollout.tokens[which, :length])
            np.testing.assert_array_equal(
                document["tokens"][~inside], rollout.prompts[which // GROUP]
            )
            np.testing.assert_array_equal(document["positions"], np.arange(len(inside)))
            np.testing.assert_array_equal(document["advantages"][inside], advantages[which])
            expected = rollout.sampling_logprobs + rollout.kept_logmass
            np.testing.assert_array_equal(
                document["old_logprobs"][inside], expected[which, :length]
            )
            assert not document["advantages"][~inside].any()
            assert not document["old_logprobs"][~inside].any()
    assert sorted(found) == list(range(PROMPTS * GROUP))


def test_short_completions_leave_whole_microbatches_empty(stage):
    batch = PolicyRows(stage).place(make_rollout([2] * 32), np.ones(32, np.float32))
    filled = np.asarray(batch["segment_ids"]).any(axis=-1)
    assert 0 < filled.sum() <= 16
    assert not filled[1].any()


def test_rows_must_divide_over_the_devices(make_context, tiny, tmp_path):
    changed = tiny["stages"]["balance"] | {"parent": "init", "microbatch_rows": 12}
    (stage,) = plan(make_context(tmp_path, stages={"balance": changed}))
    with pytest.raises(InputError, match=r"stages.balance.microbatch_rows=12 must be a multiple"):
        PolicyRows(stage)


def test_completions_are_scored_with_their_own_problem(stage):
    """Right answers to problem i, given for problems i and i + 1, are right for i alone."""
    problems = stage.problems(0, PROMPTS)
    answer = lambda problem: f"<think> </think> <answer> {problem.answer} </answer>"
    follow = [*problems[1:], problems[0]]
    texts = [answer(p) for pair in zip(problems, follow, strict=True) for p in pair]
    texts[0] = "no format"
    rollout = make_rollout([4] * 30 + [12, 4])
    functions = reward_functions(stage.config)
    scored = score_completions(stage, functions, problems, texts, rollout)
    assert list(functions) == ["accuracy", "format", "length", "ones"]
    accuracy, form, length, ones = scored.rewards.T
    own = [p.answer == q.answer for p, q in zip(problems, follow, strict=True)]
    assert 0 < sum(own) < PROMPTS
    expected = np.asarray([right for same in own for right in (True, same)])
    expected[0] = False
    np.testing.assert_array_equal(accuracy, expected)
    np.testing.assert_array_equal(form, np.arange(32) > 0)
    # Only right answers have a length reward: 1 up to 4 tokens, 0 from 12.
    np.testing.assert_array_equal(length, expected * (np.arange(32) != 30))
    # The user's reward says nothing about problems of one step.
    applies = np.repeat([p.columns["difficulty"] > 1 for p in problems], GROUP)
    np.testing.assert_array_equal(scored.mask[:, 3], applies)
    assert scored.mask[:, :3].all()
    counts = np.asarray([text.split().count("1") / 8 for text in texts])
    np.testing.assert_allclose(ones, np.where(applies, counts, 0))


def test_metrics_leave_out_what_does_not_apply(tiny):
    raw = {"stages": {"s": tiny["stages"]["balance"]}}["stages"]["s"]
    raw = json.loads(json.dumps(raw)) | {"num_generations": GROUP}
    raw["rewards"] = [{"kind": "accuracy"}, {"kind": "format"}]
    config = validate(MORLConfig, raw, "test")
    rewards = np.asarray([[1, 5], [0, 0], [1, 0.5], [1, 0.5], [0, 1], [0, 2]], np.float32)
    mask = np.asarray([[1, 0], [1, 0], [1, 1], [1, 1], [1, 1], [1, 1]], bool)
    metrics = completion_metrics(config, Scored(rewards, mask), make_rollout([1, 3, 2, 2, 4, 12]))
    assert metrics["rewards/accuracy/mean"] == pytest.approx(0.5)
    assert metrics["rewards/accuracy/std"] == pytest.approx(0.5)
    assert metrics["rewards/format/mean"] == pytest.approx(1.0)
    assert metrics["rewards/format/std"] == pytest.approx(np.std([0.5, 0.5, 1, 2]))
    # The first group differs in accuracy, the last in format; the middle one teaches nothing.
    assert metrics["dead_groups"] == 1
    assert metrics["frac_reward_zero_std"] == pytest.approx(1 / 3)
    lengths = {name: metrics[f"completions/{name}_length"] for name in ("mean", "min", "max")}
    assert lengths == {"mean": 4, "min": 1, "max": 12}
    assert metrics["num_tokens"] == 24
    assert metrics["completions/clipped_ratio"] == 0


def test_cut_completions_are_counted(tiny):
    config = validate(MORLConfig, tiny["stages"]["balance"], "test")
    scored = Scored(np.ones((4, 4), np.float32), np.ones((4, 4), bool))
    rollout = make_rollout([1, 2, 3, 4], finished=[True, False, True, True])
    assert completion_metrics(config, scored, rollout)["completions/clipped_ratio"] == 0.25
