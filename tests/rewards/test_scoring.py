"""`score` and `load_function`: what users' reward functions may return, and what they may not."""

import asyncio
import math
import sys

import numpy as np
import pytest

from jaxrl_reason.errors import InputError
from jaxrl_reason.rewards import load_function, score

COMPLETIONS = ["a", "b b", "c"]


def call(**functions):
    return score(
        functions,
        prompts=["p", "p", "q"],
        completions=COMPLETIONS,
        completion_ids=[[1], [2, 2], [3]],
        columns={"answer": ["a", "x", "c"]},
    )


def fixed(values):
    return lambda prompts, completions, **_: values


def test_arguments_are_those_of_trl():
    seen = {}

    def reward(prompts, completions, completion_ids, answer, **columns):
        seen.update(locals())
        return [0.0] * len(completions)

    call(reward=reward)
    assert seen == {
        "prompts": ["p", "p", "q"],
        "completions": COMPLETIONS,
        "completion_ids": [[1], [2, 2], [3]],
        "answer": ["a", "x", "c"],
        "columns": {},
        "seen": seen,
    }


def test_each_reward_has_its_column():
    lengths = lambda prompts, completions, *, completion_ids, **_: map(len, completion_ids)
    rewards, mask = call(one=fixed([1, 0.5, -2.0]), two=lengths, three=fixed(np.asarray([1, 2, 3])))
    np.testing.assert_array_equal(rewards, [[1, 1, 1], [0.5, 2, 2], [-2, 1, 3]])
    assert rewards.dtype == np.float32
    assert mask.all()


def test_none_is_masked_and_not_zero():
    rewards, mask = call(some=fixed([None, 0.0, 3.0]), none=fixed([None] * 3))
    np.testing.assert_array_equal(mask, [[False, False], [True, False], [True, False]])
    np.testing.assert_array_equal(rewards, [[0, 0], [0, 0], [3, 0]])


@pytest.mark.parametrize("count", [0, 2, 4])
def test_a_wrong_number_of_values_is_refused(count):
    with pytest.raises(InputError, match=rf"'bad' returned {count} values for 3 completions"):
        call(good=fixed([1.0] * 3), bad=fixed([1.0] * count))


@pytest.mark.parametrize(
    "value", [math.nan, math.inf, -math.inf, 1e39, 10**400, "0.5", "high", [1.0], {}, 1j]
)
def test_what_is_no_finite_number_is_refused_by_row(value):
    with pytest.raises(InputError, match=r"'bad' returned .* for completion 1; return a finite"):
        call(bad=fixed([1.0, value, 1.0]))


@pytest.mark.parametrize("value", [True, np.float32(1), np.int64(1), np.asarray(1.0)])
def test_numbers_of_other_types_are_accepted(value):
    rewards, mask = call(good=fixed([value] * 3))
    assert mask.all()
    np.testing.assert_array_equal(rewards, np.ones((3, 1)))


@pytest.mark.parametrize("value", [1.0, None])
def test_a_value_that_is_no_list_is_refused(value):
    with pytest.raises(InputError, match=r"'bad' returned (float|NoneType); return a list"):
        call(bad=fixed(value))


def test_an_exception_names_the_reward():
    def bad(prompts, completions, **_):
        raise KeyError("column")

    async def waiting(prompts, completions, **_):
        return [0.0] * 3

    # The coroutine of `waiting` was made and is closed: a warning would be an error here.
    with pytest.raises(InputError, match=r"reward 'bad' raised KeyError: 'column'"):
        call(waiting=waiting, bad=bad)


def test_async_rewards_run_at_the_same_time():
    arrived = []

    def meeting(value):
        async def reward(prompts, completions, **_):
            arrived.append(value)
            for _ in range(1000):  # one after the other, the first would wait in vain
                if len(arrived) == 2:
                    return [value] * 3
                await asyncio.sleep(0.001)
            raise TimeoutError

        return reward

    rewards, _ = call(one=meeting(1.0), plain=fixed([2.0] * 3), three=meeting(3.0))
    np.testing.assert_array_equal(rewards, [[1, 2, 3]] * 3)


def test_async_rewards_are_checked_too():
    async def raises(prompts, completions, **_):
        await asyncio.sleep(0)
        raise OSError("no server")

    async def short(prompts, completions, **_):
        return [1.0]

    with pytest.raises(InputError, match=r"reward 'one' raised OSError: no server"):
        call(one=raises)
    with pytest.raises(InputError, match=r"'one' returned 1 values for 3 completions"):
        call(one=short)


def test_async_rewards_run_where_a_loop_runs_already():
    async def reward(prompts, completions, **_):
        return [1.0] * 3

    async def notebook_cell():
        return call(one=reward)

    rewards, _ = asyncio.run(notebook_cell())
    np.testing.assert_array_equal(rewards, np.ones((3, 1)))


@pytest.fixture
def module(tmp_path, monkeypatch):
    """Write a module of the user's."""
    monkeypatch.syspath_prepend(tmp_path)
    names = []

    def write(name, text):
        (tmp_path / f"{name}.py").write_text(text, encoding="utf-8")
        names.append(name)

    yield write
    for name in names:
        sys.modules.pop(name, None)


def test_a_function_is_found(module):
    module("found_rewards", "def seven(prompts, completions, **_):\n    return [7] * 3\n")
    rewards, _ = call(seven=load_function("found_rewards:seven"))
    assert rewards[0, 0] == 7


@pytest.mark.parametrize(
    ("text", "where", "message"),
    [
        ("", "no_such_rewards:f", "No module named 'no_such_rewards'.*PYTHONPATH"),
        ("def seven(): ...", "broken_rewards:sevn", "no function 'sevn'; did you mean 'seven'"),
        ("seven = 7", "broken_rewards:seven", "no function 'seven'"),
        ("1 / 0", "broken_rewards:f", "ZeroDivisionError on import"),
        ("def f(:", "broken_rewards:f", "SyntaxError on import"),
    ],
)
def test_what_cannot_be_loaded_is_an_input_error(module, text, where, message):
    module("broken_rewards", text)
    with pytest.raises(InputError, match=message):
        load_function(where)
