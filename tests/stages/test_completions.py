"""Metrics of completions."""

import json

import numpy as np
import pytest

from jaxrl_reason.config import validate
from jaxrl_reason.sampling import Rollout
from jaxrl_reason.stages.completions import completion_metrics
from jaxrl_reason.stages.policy_config import MORLConfig
from jaxrl_reason.stages.scoring import Scored

GROUP, LONGEST = 2, 12


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
        sampled=mask,
        versions=np.zeros(mask.shape, np.int32),
        sampling_logprobs=np.where(mask, -numbers / 256, 0).astype(np.float32),
        kept_logmass=np.where(mask, -numbers / 1024, 0).astype(np.float32),
        finished=np.full(count, finished),
    )


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
