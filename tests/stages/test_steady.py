"""A steady state compiles nothing, however uneven the lengths."""

import logging
from pathlib import Path

import pytest

from jaxrl_reason.cli import main
from jaxrl_reason.metrics import read_metrics
from jaxrl_reason.stages.breakdown import WARM_UP_STEPS

TINY = (Path(__file__).parents[1] / "tiny_run.yaml").read_text(encoding="utf-8")
CONFIG = (
    TINY
    + """
name: steady
stages:
  reason:
    kind: grpo
    steps: 52
    prompts_per_step: 8
    num_generations: 4
    max_completion_length: 24
    precompile: true
    rewards: [{kind: python, name: even, function: "rewards_of_steady:even"}]
    optimizer: {learning_rate: 1.0e-3}
"""
)
REWARDS = """
def even(prompts, completions, *, completion_ids, **_):
    return [sum(token % 2 == 0 for token in ids) / len(ids) for ids in completion_ids]
"""


@pytest.mark.slow
def test_fifty_steps_of_ragged_completions_compile_nothing(tmp_path, caplog, monkeypatch):
    (tmp_path / "rewards_of_steady.py").write_text(REWARDS, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    path = tmp_path / "steady.yaml"
    path.write_text(CONFIG, encoding="utf-8")
    with caplog.at_level(logging.WARNING):
        assert main(["run", str(path), f"output_dir={tmp_path}"]) == 0
    rows = read_metrics(tmp_path / "steady" / "reason" / "metrics.jsonl")
    lengths = {(row["completions/min_length"], row["completions/mean_length"]) for row in rows}
    assert len(lengths) > 40
    assert len({row["padding_share"] for row in rows}) > 20
    assert sum(row["compiles"] for row in rows[:WARM_UP_STEPS]) > 0
    assert [row["compiles"] for row in rows[WARM_UP_STEPS:]] == [0] * 50
    assert "compiled" not in caplog.text
