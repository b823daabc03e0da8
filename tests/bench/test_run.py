"""`jaxrl-reason bench` on a model of two layers: what it measures, prints and writes."""

import json

import numpy as np
import pytest

from jaxrl_reason.bench import ceilings
from jaxrl_reason.bench.workloads import SHAPES
from jaxrl_reason.cli import main

CHANGES = {
    "num_prompts": 2,
    "num_generations": 4,
    "prompt_length": [4, 8],
    "max_new_tokens": 8,
    "num_rows": 2,
    "row_length": 64,
    "mean_document": 8,
}


@pytest.fixture
def small_ceilings(monkeypatch):
    tops = {"matmul_flops": 1e12, "memory_bytes": 1e12}
    monkeypatch.setattr(ceilings, "measure", lambda dtype: tops)


def test_bench_times_a_step_of_each_kind(small_ceilings, tmp_path, capsys):
    out = tmp_path / "bench.json"
    argv = ["bench", "--workloads", "W2", "W3", "--shapes", "nano", "--repeats", "2"]
    assert main([*argv, "--changes", json.dumps(CHANGES), "--out", str(out)]) == 0
    result = json.loads(out.read_text())
    rows = result["rows"]
    assert [(row["workload"], row["repeat"]) for row in rows] == [
        ("W2", 1),
        ("W2", 2),
        ("W3", 1),
        ("W3", 2),
    ]
    grpo, sft = rows[1], rows[3]
    assert {"rollout", "rewards", "update"} <= grpo["parts"].keys()
    assert sum(grpo["parts"].values()) == pytest.approx(grpo["seconds"], rel=0.1)
    assert 8 <= grpo["useful_tokens"] <= 64
    assert grpo["computed_tokens"] - grpo["useful_tokens"] == grpo["counts"]["wasted_tokens"]
    assert [row["counts"]["compiles"] for row in rows] == [0, 0, 0, 0]
    assert 0.8 * 128 < sft["useful_tokens"] <= 128
    assert sft["counts"]["padding_share"] == 1 - sft["useful_tokens"] / sft["computed_tokens"]
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 4
    assert printed[2].startswith("| W2 | nano |")
    assert len({line.count("|") for line in printed}) == 1


def test_an_unknown_name_is_an_error_in_one_line(capsys):
    assert main(["bench", "--workloads", "W9"]) == 2
    assert "W9 is none of W1" in capsys.readouterr().err


def test_ceilings_are_those_of_real_work():
    got = ceilings.measure("float32")
    assert 1e8 < got["matmul_flops"] < 1e16
    assert 1e8 < got["memory_bytes"] < 1e14


def test_flops_and_bytes_by_hand():
    shape = SHAPES["nano"]
    one = ceilings.update_flops(shape, [1])
    # Per layer queries times keys and weights times values: 4 H N flops for each pair seen, half of
    # the square.
    assert one == 3 * (2 * shape.num_parameters + 2 * 2 * 2 * 16)
    pairs = ceilings.update_flops(shape, [10]) - 10 * 6 * shape.num_parameters
    assert pairs == 3 * 2 * 2 * (2 * 16) * 100
    # Two layers of one key and one value head of size 16, in 4 bytes.
    read = ceilings.decode_bytes(shape, 3, [(5, 2)])
    assert read == 4 * (3 * shape.num_parameters + 2 * 2 * 16 * (5 * 2 + 2))
    assert np.isclose(ceilings.decode_bytes(shape, 0, [(0, 0)]), 0)
