"""Chained modular arithmetic against an evaluation of the prompt with unbounded integers."""

import itertools
import re

import pytest

from jaxrl_reason.tasks import ModularArithmetic, constant_answer_accuracy
from jaxrl_reason.tasks.problem import write_completion

TASK = ModularArithmetic()


def evaluate(prompt: str, modulus: int) -> int:
    """The value asked for, reduced only at the end."""
    *lines, question = [line.split() for line in prompt.split(" ; ")]
    values = {}
    for name, equals, first, *rest in lines:
        assert equals == "="
        value = values[first] if first in values else int(first)
        if rest:
            sign, word = rest
            second = values[word] if word in values else int(word)
            value = {"+": value + second, "-": value - second, "*": value * second}[sign]
        values[name] = value
    assert question[1] == "?"
    return values[question[0]] % modulus


def canonical(prompt: str) -> str:
    """The prompt with its variables renamed in order of appearance."""
    names: dict[str, str] = {}
    rename = lambda match: names.setdefault(match.group(), f"v{len(names)}")
    return re.sub(r"[a-h]", rename, prompt)


def equations(text: str) -> list[tuple[list[str], str, bool]]:
    """Computed equations of a trace as (left, right, true?)."""
    found = []
    for left, sign, right, value in re.findall(r"(\d+) ([-+*]) (\d+) = (\d+)", text):
        a, b = int(left), int(right)
        true = {"+": a + b, "-": a - b, "*": a * b}[sign] % TASK.modulus == int(value)
        found.append(([left, sign, right], value, true))
    return found


@pytest.mark.parametrize("modulus", [5, 23, 30, 97])
def test_answers_are_right(modulus):
    task = ModularArithmetic(modulus=modulus, max_steps=7, max_constant=modulus - 1)
    for index in range(300):
        problem = task.generate("train", index)
        assert int(problem.answer) == evaluate(problem.prompt, modulus)


def test_each_step_needs_the_one_before():
    for index in range(500):
        problem = TASK.generate("train", index)
        *lines, _ = [line.split() for line in problem.prompt.split(" ; ")]
        assert len(lines) == problem.columns["difficulty"] + 1
        for before, line in itertools.pairwise(lines):
            assert line[2] == before[0]
            assert (line[3], line[4]) not in {("*", "0"), ("*", "1"), ("+", "0"), ("-", "0")}


def test_names_carry_no_meaning():
    firsts = {TASK.generate("train", index, 2).prompt[0] for index in range(200)}
    asked = {TASK.generate("train", index, 2).prompt[-3] for index in range(200)}
    assert firsts == asked == set("abcdefgh")


def test_train_and_test_share_no_problem_up_to_renaming():
    train = {canonical(TASK.generate("train", index).prompt) for index in range(8000)}
    test = [canonical(TASK.generate("test", index).prompt) for index in range(1000)]
    assert len(set(test)) == 1000
    assert not train & set(test)
    other_seed = ModularArithmetic(seed=7)
    assert not {canonical(other_seed.generate("train", i).prompt) for i in range(8000)} & set(test)


def test_one_step_problems_are_disjoint_too():
    # 23 * (22 + 22 + 21) = 1,495 problems in all: the train stream meets nearly every one of its.
    train = {canonical(TASK.generate("train", index, 1).prompt) for index in range(8000)}
    test = [canonical(TASK.generate("test", index, 1).prompt) for index in range(1000)]
    assert not train & set(test)
    assert 1400 < len(train | set(test)) <= 1495
    assert len(set(test[:100])) == 100


def test_short_traces_state_true_equations_only():
    for index in range(300):
        problem = TASK.generate("train", index)
        found = equations(TASK.trace(problem, "short"))
        assert len(found) == problem.columns["difficulty"]
        assert all(true for _, _, true in found)


def test_checks_pass_exactly_for_right_values():
    slips = steps = 0
    for index in range(600):
        problem = TASK.generate("train", index)
        thought = TASK.trace(problem, "long").split("</think>")[0]
        blocks = re.findall(r"[a-h] = \d+ [-+*] .*? (?:ok|no) ;", thought)
        steps += problem.columns["difficulty"]
        for block in blocks:
            computed, checks = equations(block)[0], equations(block)[1:]
            left, sign, _ = computed[0]
            # The check is computed right even when the value under test is wrong.
            assert checks
            assert all(true for _, _, true in checks)
            agrees = checks[-1][1] == (computed[1] if sign == "*" else left)
            assert agrees == computed[2] == block.endswith("ok ;")
            slips += block.endswith("no ;")
        assert len(blocks) == problem.columns["difficulty"] + thought.count("no ; wait")
    # 1,800 steps or so: the standard deviation of the rate is 0.009.
    assert abs(slips / steps - TASK.slip_rate) < 0.04


@pytest.mark.parametrize("rate", [0.0, 1.0])
def test_slip_rate_extremes(rate):
    task = ModularArithmetic(slip_rate=rate)
    for index in range(50):
        problem = task.generate("train", index)
        text = task.trace(problem, "long")
        assert text.count("wait") == rate * problem.columns["difficulty"]
        assert task.verify(problem, text).correct


def test_long_traces_are_two_to_three_times_as_long():
    problems = [TASK.generate("train", index) for index in range(500)]
    long, short = (
        sum(len(TASK.trace(problem, style).split()) + 1 for problem in problems)
        for style in ("long", "short")
    )
    assert 2.0 < long / short < 3.0


@pytest.mark.parametrize(
    ("answer", "usable"),
    [("-1", False), ("4 4", False), ("4.0", False), ("four", False), ("²", False), ("123", True)],
)
def test_unusable_answers(answer, usable):
    verdict = TASK.verify(TASK.generate("train", 0), write_completion("", answer))
    assert verdict.formatted
    assert not verdict.correct
    assert (verdict.answer is not None) == usable


def test_constant_answers_are_near_chance():
    # One answer in 23 would be 0.043; 0 is commoner because products keep it.
    assert 0.02 < constant_answer_accuracy(TASK, 1000) < 0.09


def test_a_known_problem_and_its_traces():
    """Streams and traces written down once: they must not change from release to release."""
    problem = TASK.generate("train", 2)
    assert problem.prompt == "f = 9 ; h = f + 11 ; c = h - f ; c ?"
    assert TASK.trace(problem, "short") == (
        "<think> h = 9 + 11 = 20 ; c = 20 - 9 = 11 ; </think> <answer> 11 </answer>"
    )
    assert TASK.trace(problem, "long") == (
        "<think> f = 9 ; h = 9 + 11 = 20 ; check 20 - 11 = 9 ok ; "
        "h = 20 ; f = 9 ; c = 20 - 9 = 11 ; check 11 + 9 = 20 ok ; </think> <answer> 11 </answer>"
    )
