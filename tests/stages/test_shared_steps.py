"""Stages with equal settings share a jitted function; stages that differ do not."""

import jax
import numpy as np
import pytest

from jaxrl_reason.checkpoint import restore_params
from jaxrl_reason.stages import pipeline
from jaxrl_reason.stages.context import Stage
from jaxrl_reason.stages.grpo import policy_update
from jaxrl_reason.stages.other_logprobs import OtherLogprobs
from jaxrl_reason.stages.pipeline import plan
from jaxrl_reason.stages.shared_steps import SharedSteps


def test_a_function_is_made_once_for_equal_values():
    shared, made = SharedSteps(), []
    make = lambda: made.append(len(made)) or (lambda: None)
    first = shared.get(make, "a", {"x": 0.1})
    assert shared.get(make, "a", {"x": 0.1}) is first
    assert shared.get(make, "a", {"x": 0.1000000001}) is not first
    assert shared.get(make, "b", {"x": 0.1}) is not first
    assert len(made) == 3


def test_the_one_used_longest_ago_is_dropped():
    shared, made = SharedSteps(), []

    def get(name):
        return shared.get(lambda: made.append(name) or (lambda: None), name)

    for name in "abcdefgh":
        get(name)
    get("a")
    get("i")  # in place of b
    get("a")
    assert made == list("abcdefghi")
    get("b")
    assert made == list("abcdefghib")


OTHERS = {
    "steps": 7,
    "num_iterations": 3,
    "beta": 0.25,
    "loss_type": "grpo",
    "logprob_chunk_size": 8,
    "max_completion_length": 11,
    "sampling": {"temperature": 0.5},
    "optimizer": {"learning_rate": 0.125},
    "epsilon_high": 0.125,
}


@pytest.mark.parametrize("name", OTHERS)
def test_what_an_update_follows_from_tells_stages_apart(make_context, tiny, tmp_path, name):
    one = tiny["stages"]["reason"] | {"parent": "init", "beta": 0.0}
    stages = {
        "a": one,
        "b": one | {"parent": "a", "rewards": [{"kind": "accuracy"}], "save_steps": 3},
        "c": one | {name: OTHERS[name]},
    }
    a, b, c = plan(make_context(tmp_path, stages=stages))
    assert policy_update(a) is policy_update(b)
    assert policy_update(a) is not policy_update(c)


def test_references_are_asked_by_one_function(make_context, tiny, tmp_path, monkeypatch):
    one = tiny["stages"]["reason"] | {"parent": "init", "beta": 0.1}
    stages = {"a": one, "b": one | {"beta": 0.2}, "c": one | {"sampling": {"temperature": 0.5}}}
    context, made = make_context(tmp_path, stages=stages), []
    monkeypatch.setattr(Stage, "parent_params", lambda self: context.init_params())
    monkeypatch.setattr(SharedSteps, "get", lambda self, make, *of: made.append(repr(of)))
    for stage in plan(context):
        OtherLogprobs(stage, None)
    for a, b, c in (made[::2], made[1::2]):  # those of the reference, and those that correct
        assert a == b != c


@pytest.mark.slow
def test_sharing_changes_no_parameter(make_context, tiny, tmp_path, monkeypatch):
    one = tiny["stages"]["reason"] | {"parent": "init", "beta": 0.1, "steps": 2}
    stages = {"a": one, "b": one | {"parent": "a"}}

    def final(folder):
        context = make_context(tmp_path / folder, stages=stages)
        pipeline.run(context.config, say=lambda line: None)
        stage = plan(context)[-1]
        return jax.device_get(restore_params(stage.directory, context.params_like))

    shared = final("shared")
    monkeypatch.setattr(SharedSteps, "get", lambda self, make, *of: make())
    for x, y in zip(jax.tree.leaves(shared), jax.tree.leaves(final("own")), strict=True):
        np.testing.assert_array_equal(x, y)
