"""What the gradients of objectives say: against hand-made vectors, and in a stage that trains."""

import json

import numpy as np
import pytest
import yaml

from jaxrl_reason.cli import main
from jaxrl_reason.stages.conflict import agreement, objective_vectors

MORL = """
  balance:
    kind: morl
    steps: 3
    prompts_per_step: 8
    num_generations: 8
    max_completion_length: 12
    conflict_steps: 2
    aggregator: mgda
    aggregator_options: {renormalize: none}
    rewards:
      - {kind: format}
      - {kind: python, name: variety, function: "rewards_of_tests:variety"}
    optimizer: {learning_rate: 1.0e-3}
"""


def test_vectors_are_standardised_in_groups_and_0_where_nothing_varies():
    rewards = np.array([[1, 3], [0, 3], [1, 5], [0, 7], [1, 1], [1, 1]], np.float32)
    mask = np.array([[1, 1]] * 4 + [[1, 0], [1, 1]], bool)
    found = objective_vectors(rewards, mask, 2)
    np.testing.assert_allclose(found, [[1, -1, 1, -1, 0, 0], [0, 0, -1, 1, 0, 0]], atol=1e-6)
    assert found.dtype == np.float32


def gram_of(*vectors: list[float]) -> np.ndarray:
    rows = np.array(vectors, np.float64)
    return rows @ rows.T


def test_agreement_is_that_of_the_vectors():
    # The shortest vector between (3, 0) and (0, 1) is (0.3, 0.9).
    found = agreement(gram_of([3, 0], [0, 1], [1, 1]))
    expected = {
        "objectives/cosine_mgda": 1.2 / np.sqrt(0.9 * 2),
        "objectives/least_progress": np.sqrt(0.5),
        "objectives/least_cosine": 0.0,
    }
    assert found == pytest.approx(expected, abs=1e-5)
    along = agreement(gram_of([3, 0], [0, 1], [0.1, 0.3]))
    assert along["objectives/cosine_mgda"] == pytest.approx(1, abs=1e-5)
    # Scale says nothing, however small gradients are.
    small = agreement(1e-12 * gram_of([3, 0], [0, 1], [1, 1]))
    assert small == pytest.approx(found, abs=1e-5)


def test_dead_objectives_are_left_out():
    found = agreement(gram_of([3, 0], [0, 0], [-1, 1]))
    assert found == pytest.approx(
        {"objectives/cosine_mgda": -np.sqrt(0.5), "objectives/least_progress": -np.sqrt(0.5)}
    )
    assert agreement(gram_of([0, 0], [0, 0], [0, 0])) == {}
    assert set(agreement(gram_of([1, 0], [1, 1], [0, 0]))) == {"objectives/least_cosine"}


def test_a_stage_logs_it_every_so_many_steps(tiny, tmp_path, rewards_folder):
    path = tmp_path / "run.yaml"
    stages = yaml.safe_load(f"stages:\n{MORL}")["stages"]
    path.write_text(json.dumps(tiny | {"stages": stages}), encoding="utf-8")
    assert main(["run", str(path), f"output_dir={tmp_path}", "name=seen"]) == 0
    lines = (tmp_path / "seen" / "balance" / "metrics.jsonl").read_text().splitlines()
    seen = [{k: v for k, v in json.loads(line).items() if k.endswith("mgda")} for line in lines]
    assert [bool(found) for found in seen] == [True, False, True]
    assert all(-1 <= value <= 1 for found in seen for value in found.values())
    # An untrained model never writes the format: MGDA is the gradient of the other objective.
    assert seen[0]["objectives/cosine_mgda"] == pytest.approx(1, abs=1e-4)
