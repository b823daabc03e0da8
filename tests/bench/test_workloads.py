"""The workloads are what the documents say, the same for everybody and for every process."""

import subprocess
import sys

import numpy as np
import pytest

from jaxrl_reason.bench import workloads
from jaxrl_reason.bench.workloads import (
    PAD_ID,
    SHAPES,
    WORKLOADS,
    changed,
    documents,
    kept_length,
    prompts,
    reward,
    stop_ids,
)
from jaxrl_reason.models import ModelConfig

SMALL = SHAPES["small"]


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_parameters_are_those_of_the_model(shape):
    config = ModelConfig(**shape.fields, dtype=shape.dtype)
    assert shape.num_parameters == config.num_parameters


def test_sizes_of_the_documents():
    assert SHAPES["tiny"].num_parameters == 3_672_576
    assert SMALL.num_parameters == 41_559_552
    assert 1.0e9 < SHAPES["1b"].num_parameters < 1.2e9


@pytest.mark.parametrize("name", ["W1", "W2", "W4"])
def test_prompts_have_the_lengths_of_the_workload_and_only_ordinary_tokens(name):
    workload = WORKLOADS[name]
    made = [prompt for repeat in range(20) for prompt in prompts(workload, SMALL, repeat)]
    lengths = [len(prompt) for prompt in made]
    low, high = workload.prompt_length
    assert (min(lengths) - low, high - max(lengths)) <= (8, 8)
    assert low <= min(lengths) <= max(lengths) <= high
    tokens = {token for prompt in made for token in prompt}
    assert not tokens & {PAD_ID, *range(63, SMALL.vocab_size, 64)}
    assert max(tokens) < SMALL.vocab_size
    assert len(tokens) > SMALL.vocab_size / 4


def test_repeats_and_shapes_have_prompts_of_their_own():
    workload = WORKLOADS["W2"]
    first = prompts(workload, SMALL, 0)
    assert first == prompts(workload, SMALL, 0)
    assert first != prompts(workload, SMALL, 1)
    assert first != prompts(workload, SHAPES["tiny"], 0)


def test_prompts_do_not_depend_on_the_process():
    code = """
from jaxrl_reason.bench.workloads import SHAPES, WORKLOADS, prompts
print(prompts(WORKLOADS["W2"], SHAPES["tiny"], 3))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(prompts(WORKLOADS["W2"], SHAPES["tiny"], 3))


def test_one_token_in_64_stops_where_any_does():
    assert len(stop_ids(WORKLOADS["W2"], SMALL)) == SMALL.vocab_size / 64
    assert stop_ids(WORKLOADS["W1"], SMALL) == []
    assert workloads.MEAN_COMPLETION == 64


def test_documents_fill_the_steps_and_have_the_mean():
    workload = WORKLOADS["W3"]
    lengths = np.asarray([len(text) for text in documents(workload, SMALL, steps=64)])
    assert abs(lengths.mean() - workload.mean_document) < 3
    assert lengths.max() == workload.row_length
    assert np.median(lengths) < 0.7 * lengths.mean()
    rows = lengths.sum() / workload.row_length
    assert abs(rows - 64 * workload.num_rows) < 8


def test_kept_length_counts_the_stop_token():
    stops = frozenset([63])
    assert kept_length([1, 2, 63, 5, 63], stops) == 3
    assert kept_length([1, 2], stops) == 2
    assert kept_length([63], stops) == 1


def test_reward_is_the_share_of_even_ids():
    assert reward([2, 3, 4, 6]) == 0.75
    assert reward([]) == 0


def test_a_changed_workload_says_so():
    made = changed(WORKLOADS["W2"], {"max_new_tokens": 8, "prompt_length": [2, 4]})
    assert (made.max_new_tokens, made.prompt_length) == (8, (2, 4))
    assert made.name == "W2 (max_new_tokens=8 prompt_length=[2, 4])"
    assert changed(WORKLOADS["W2"], {}) is WORKLOADS["W2"]
    with pytest.raises(TypeError, match="mex_new_tokens"):
        changed(WORKLOADS["W2"], {"mex_new_tokens": 8})
