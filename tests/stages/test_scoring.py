"""Rewards on their way: who is called with what, and that no order and no process changes them."""

import itertools
import os
import random

import numpy as np
import pytest

from jaxrl_reason.errors import InputError
from jaxrl_reason.rewards.workers import Workers
from jaxrl_reason.stages.judge import Judge
from jaxrl_reason.stages.pipeline import plan
from jaxrl_reason.stages.policy_config import PolicyConfig
from jaxrl_reason.stages.scoring import Scored, Scoring

PROMPTS, GROUP = 4, 3
BUILT_IN = {"length": {"low": 8, "high": 12}}
REWARDS = '''
"""Rewards that tell what they were given."""

import asyncio
import os
import sys


def count(prompts, completions, **_):
    """How many completions a call has."""
    return [len(completions)] * len(completions)


def place(prompts, completions, **_):
    """The place of a completion within its call."""
    return range(len(completions))


def tokens(prompts, completions, *, completion_ids, problem, answer, verdict, **_):
    """None for short completions; fails if columns do not belong together."""
    assert all(p.answer == a and p.prompt == q for p, a, q in zip(problem, answer, prompts))
    assert len(verdict) == len(completions)
    return [sum(ids) if len(ids) > 2 else None for ids in completion_ids]


async def asked(prompts, completions, *, completion_ids, **_):
    """As `place`, from a server."""
    await asyncio.sleep(0.001 * len(completion_ids[0]))
    return [len(ids) + 0.5 for ids in completion_ids]


def process(prompts, completions, **_):
    return [os.getpid()] * len(completions)


def jax_loaded(prompts, completions, **_):
    return ["jax" in sys.modules] * len(completions)


def bad(prompts, completions, *, completion_ids, **_):
    return [float("nan") if len(ids) == 7 else 0.0 for ids in completion_ids]


def raises(prompts, completions, *, completion_ids, **_):
    if any(len(ids) == 7 for ids in completion_ids):
        raise KeyError("column")
    return [0.0] * len(completions)


async def raises_late(prompts, completions, **given):
    await asyncio.sleep(0.001)
    return raises(prompts, completions, **given)


def dies(prompts, completions, **_):
    os._exit(7)
'''


@pytest.fixture
def stage(make_context, tiny, tmp_path, monkeypatch):
    """A stage with the rewards given as `name: scope`; built-in ones without a scope."""
    (tmp_path / "rewards_of_scoring.py").write_text(REWARDS, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)

    def make(**scopes):
        rewards = [
            {"kind": name, **BUILT_IN.get(name, {})}
            if scope is None
            else {
                "kind": "python",
                "name": name,
                "function": f"rewards_of_scoring:{name.rstrip('_')}",
                "scope": scope,
            }
            for name, scope in scopes.items()
        ]
        changes = {"parent": "init", "num_generations": GROUP, "prompts_per_step": PROMPTS}
        raw = tiny["stages"]["reason"] | changes | {"rewards": rewards}
        return plan(make_context(tmp_path, stages={"s": raw}))[0]

    return make


def judge_of(stage) -> Judge:
    config: PolicyConfig = stage.config
    return Judge(
        stage.context.task,
        stage.context.tokenizer,
        config.rewards,
        stop_ids=stage.context.stop_ids,
        max_completion_length=config.max_completion_length,
    )


def scored(stage, *, count=0, seed=None, length=lambda row: 1 + row % 5) -> Scored:
    """The rewards of completions of given lengths, which end in the order of the seed."""
    problems = stage.problems(0, PROMPTS)
    order = list(itertools.product(range(PROMPTS), range(GROUP)))
    if seed is not None:
        random.Random(seed).shuffle(order)
    judge = judge_of(stage)
    with Workers(judge, count) as workers:
        scoring = Scoring(judge, workers, num_generations=GROUP, num_groups=PROMPTS)
        for number, index in order:
            row = number * GROUP + index
            scoring.add(number, index, problems[number], [5 + row] * length(row))
            scoring.poll()
        return scoring.finish(range(PROMPTS))


SCOPES = {
    "accuracy": None,
    "place": "completion",
    "place_": "group",
    "place__": "batch",
    "count": "group",
    "tokens": "completion",
    "tokens_": "batch",
    "asked": "completion",
    "asked_": "group",
    "asked__": "batch",
}


def test_a_function_is_given_what_its_scope_says(stage):
    rewards, mask = scored(stage(**SCOPES))
    rows = np.arange(PROMPTS * GROUP)
    column = dict(zip(SCOPES, rewards.T, strict=True))
    applies = dict(zip(SCOPES, mask.T, strict=True))
    np.testing.assert_array_equal(column["place"], 0 * rows)
    np.testing.assert_array_equal(column["place_"], rows % GROUP)
    np.testing.assert_array_equal(column["place__"], rows)
    np.testing.assert_array_equal(column["count"], GROUP)
    lengths = 1 + rows % 5
    for name in ("tokens", "tokens_"):
        np.testing.assert_array_equal(applies[name], lengths > 2)
        np.testing.assert_array_equal(column[name], np.where(lengths > 2, lengths * (5 + rows), 0))
    for name in ("asked", "asked_", "asked__"):
        np.testing.assert_array_equal(column[name], lengths + 0.5)


@pytest.mark.parametrize(("count", "seed"), [(0, 1), (0, 2), (2, 3)])
def test_neither_order_nor_processes_change_rewards(stage, count, seed):
    expected = scored(stage(**SCOPES))
    for want, got in zip(expected, scored(stage(**SCOPES), count=count, seed=seed), strict=True):
        np.testing.assert_array_equal(want, got)


def test_rewards_of_workers_are_computed_there(stage):
    scopes = {"process": "completion", "process_": "group", "process__": "batch"}
    (own,) = np.unique(scored(stage(**scopes)).rewards)
    assert own == os.getpid()
    scopes["jax_loaded"] = "completion"
    rewards, _ = scored(stage(**scopes), count=1)
    assert os.getpid() not in rewards
    assert not rewards[:, 3].any()


def test_rewards_start_when_a_completion_ends(stage):
    """Those of a group are known while other groups have not even begun."""
    made = stage(accuracy=None, place="group", asked="completion")
    judge, problems = judge_of(made), made.problems(0, PROMPTS)
    with Workers(judge, 0) as workers:
        scoring = Scoring(judge, workers, num_generations=GROUP, num_groups=PROMPTS)
        for index in range(GROUP):
            scoring.add(2, index, problems[2], [5])
            scoring.poll()
        known = scoring.group(2)
        np.testing.assert_array_equal(known.rewards[:, 1:], [[0, 1.5], [1, 1.5], [2, 1.5]])


NAN = "reward 'bad' returned nan for completion 8; return a finite"


@pytest.mark.parametrize(
    ("count", "name", "scope", "message"),
    [
        (0, "bad", "completion", NAN),
        (1, "bad", "completion", NAN),
        (0, "bad", "group", NAN),
        (0, "bad", "batch", NAN),
        (0, "raises", "completion", "reward 'raises' raised KeyError for completion 8: 'column'"),
        (0, "raises", "group", "'raises' raised KeyError for completions 6 to 8: 'column'"),
        (1, "raises", "batch", "reward 'raises' raised KeyError: 'column'"),
        (0, "raises_late", "completion", "'raises_late' raised KeyError for completion 8: 'colu"),
    ],
)
def test_an_error_names_the_reward_and_the_row(stage, count, name, scope, message):
    scopes = {name: scope}
    with pytest.raises(InputError, match=message):
        scored(stage(**scopes), count=count, length=lambda row: 7 if row == 8 else 3)


def test_a_worker_that_dies_is_one_error(stage):
    with pytest.raises(InputError, match="a process of reward_workers died"):
        scored(stage(dies="completion"), count=1)


def test_a_group_varies_where_a_reward_differs_between_completions_it_applies_to():
    def group(rewards, mask):
        return Scored(np.asarray(rewards, np.float32), np.asarray(mask, bool))

    every = [[1, 1]] * 3
    assert not group([[1, 5]] * 3, every).varies()
    assert group([[1, 5], [1, 5], [0, 5]], every).varies()
    assert group([[1, 5], [1, 5], [0, 5]], every).varies([0])
    assert not group([[1, 5], [1, 5], [0, 5]], every).varies([1])
    # None is no 0: it says nothing.
    assert not group([[1, 5], [1, 0], [1, 5]], [[1, 1], [1, 0], [1, 1]]).varies()
    assert not group([[0, 0]] * 3, [[0, 0]] * 3).varies()


def test_completions_are_scored_with_their_own_problem(stage):
    """Right answers to problem i, given for problems i and i + 1, are right for i alone."""
    made = stage(accuracy=None, format=None, length=None)
    problems, encoder = made.problems(0, 16), made.context.encoder
    answer = lambda problem: f"<think> </think> <answer> {problem.answer} </answer>"
    follow = [*problems[1:], problems[0]]
    ids = [
        encoder.demonstration(problem, answer(other)).completion
        for problem, next in zip(problems, follow, strict=True)
        for other in (problem, next, problem)
    ]
    ids[0] = ids[0][1:]  # no format
    ids[2] = [*ids[2], 0, 0, 0, 0, 0]  # padding is no text, but counts as length
    judge = judge_of(made)
    with Workers(judge, 0) as workers:
        scoring = Scoring(judge, workers, num_generations=GROUP, num_groups=16)
        for row, completion in enumerate(ids):
            scoring.add(row // GROUP, row % GROUP, problems[row // GROUP], completion)
        rewards, mask = scoring.finish(range(16))
    own = [p.answer == q.answer for p, q in zip(problems, follow, strict=True)]
    assert 0 < sum(own) < 16
    expected = np.asarray([right for same in own for right in (True, same, True)])
    expected[0] = False
    np.testing.assert_array_equal(rewards[:, 0], expected)
    np.testing.assert_array_equal(rewards[:, 1], np.arange(48) > 0)
    # Only right answers have a length reward: 1 up to 8 tokens, 0 from 12.
    lengths = np.asarray(list(map(len, ids)))
    np.testing.assert_allclose(rewards[:, 2], expected * np.clip((12 - lengths) / 4, 0, 1))
    assert 0 < rewards[2, 2] < 1
    assert mask.all()
