"""Countdown against Python's own expression grammar with fractions."""

import ast
import operator
import random
import re
from collections import Counter
from fractions import Fraction

import pytest

from jaxrl_reason.tasks import Countdown, Problem
from jaxrl_reason.tasks.expressions import ExpressionError, evaluate
from jaxrl_reason.tasks.problem import write_completion

SIGNS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul}
TASKS = [Countdown(max_numbers=6), Countdown(max_numbers=6, use_all=True, search_width=3)]


def oracle(text: str) -> tuple[Fraction, list[int], bool]:
    """Value, numbers used, and whether every division is exact."""
    used, exact = [], True

    def value(node: ast.expr) -> Fraction:
        nonlocal exact
        if isinstance(node, ast.Constant):
            used.append(node.value)
            return Fraction(node.value)
        assert isinstance(node, ast.BinOp)
        left, right = value(node.left), value(node.right)
        if isinstance(node.op, ast.Div):
            exact &= (left / right).denominator == 1
            return left / right
        return SIGNS[type(node.op)](left, right)

    result = value(ast.parse(text, mode="eval").body)
    return result, used, exact


def given(numbers, target, use_all=False):
    columns = {"numbers": numbers, "target": target, "use_all": use_all, "difficulty": len(numbers)}
    return Problem(prompt="", answer="", columns=columns)


def judge(problem, expression):
    return TASKS[0].verify(problem, write_completion("", expression))


@pytest.mark.parametrize("task", TASKS, ids=["at most once", "exactly once"])
def test_answers_hit_the_target(task):
    for index in range(300):
        problem = task.generate("train", index)
        for style in ("long", "answer"):
            answer = task.verify(problem, task.trace(problem, style)).answer
            value, used, exact = oracle(answer)
            assert exact
            assert value == problem.columns["target"]
            assert not Counter(used) - Counter(problem.columns["numbers"])
            if task.use_all or style == "answer":
                assert sorted(used) == sorted(problem.columns["numbers"])


def test_prompts_state_the_facts():
    for task, how_often in zip(TASKS, ("at most", "exactly"), strict=True):
        for index in range(100):
            problem = task.generate("train", index)
            target, *numbers = map(int, re.findall(r"\d+", problem.prompt))
            assert (target, numbers) == (problem.columns["target"], problem.columns["numbers"])
            assert task.min_target <= target <= task.max_target
            assert target not in numbers
            assert all(1 <= number <= task.largest for number in numbers)
            assert f"{how_often} once" in problem.prompt


@pytest.mark.parametrize("task", TASKS, ids=["at most once", "exactly once"])
def test_search_traces_are_true_line_by_line(task):
    dead_ends = 0
    for index in range(200):
        problem = task.generate("train", index)
        thought = re.search(r"<think> (.*) ; </think>", task.trace(problem, "long")).group(1)
        stack = [sorted(problem.columns["numbers"])]
        *lines, last = thought.split(" ; ")
        for line in lines:
            if line.startswith("back to "):
                stack.pop()
                assert stack[-1] == [int(word) for word in line.split()[2:]]
                continue
            left, sign, right, _, result, mark, *rest = line.split()
            value, _, exact = oracle(f"{left} {sign} {right}")
            assert exact
            assert value == int(result) <= task.max_value
            pool = Counter(stack[-1]) - Counter([int(left), int(right)])
            assert pool.total() == len(stack[-1]) - 2
            if mark == "left":
                stack.append([int(word) for word in rest])
                assert stack[-1] == sorted([*pool.elements(), int(result)])
            else:
                assert mark == "no"
                assert int(result) != problem.columns["target"]
                dead_ends += 1
        assert last.endswith(f"= {problem.columns['target']} yes")
    assert dead_ends > 200


def test_search_keeps_to_its_width():
    task = Countdown(search_width=2)
    for index in range(100):
        problem = task.generate("train", index, 4)
        # 2 + 4 + 8 moves at most.
        assert task.trace(problem, "long").count("=") <= 14


def test_train_and_test_share_no_problem_in_any_order_of_numbers():
    def identity(problem):
        return tuple(sorted(problem.columns["numbers"])), problem.columns["target"]

    task = Countdown()
    train = {identity(task.generate("train", index)) for index in range(5000)}
    test = [identity(task.generate("test", index)) for index in range(1000)]
    assert len(set(test)) == 1000
    assert not train & set(test)
    used_up = Countdown(use_all=True)
    assert not {identity(used_up.generate("train", index)) for index in range(3000)} & set(test)


def random_expression(rng: random.Random, depth: int) -> str:
    if depth == 0 or rng.random() < 0.2:
        return str(rng.randint(0, 12))
    left, right = random_expression(rng, depth - 1), random_expression(rng, depth - 1)
    text = f"{left} {rng.choice('+-*/')} {right}"
    return f"({text})" if rng.random() < 0.6 else text


def test_parser_agrees_with_python():
    rng = random.Random(0)
    exact_seen = refused = 0
    for _ in range(3000):
        text = random_expression(rng, 4)
        try:
            value, used, exact = oracle(text)
        except ZeroDivisionError:
            exact = False
        if exact:
            assert evaluate(text) == (value, used)
            assert evaluate(text.replace(" ", "")) == (value, used)
            exact_seen += 1
        else:
            with pytest.raises(ExpressionError):
                evaluate(text)
            refused += 1
    assert min(exact_seen, refused) > 300


@pytest.mark.parametrize(
    "text",
    [
        "",
        "3 5",
        "3 +",
        "* 3",
        "-3",
        "3 + -5",
        "(3",
        "3)",
        "()",
        "3 ** 2",
        "3 // 2",
        "3.0 + 5",
        "3 + x",
        "3 + 5 = 8",
        "٣ + 5",
        "1234567890",
        "__import__('os')",
        "(" * 60 + "3" + ")" * 60,
        "7 / 2",
        "7 / (2 - 2)",
    ],
)
def test_parser_refuses(text):
    with pytest.raises(ExpressionError):
        evaluate(text)


def test_verdicts():
    problem = given([3, 5, 5, 20], 28)
    assert judge(problem, "20 + 5 + 3").correct
    assert judge(problem, "3+5+20").correct
    assert judge(problem, "( 5 * 5 ) + 3").correct
    assert judge(problem, "20 + 5 + 5").reason == "gives 30, not 28"
    assert judge(problem, "20 + 3 + 3 + 2").reason == "[2, 3] used more often than given"
    assert judge(given([4, 20], 28), "20 + 4 + 4").reason == "[4] used more often than given"
    assert judge(problem, "28").reason == "[28] used more often than given"
    assert judge(given([3, 5, 5, 20], 28, True), "20 + 5 + 3").reason == "[5] given but not used"
    assert judge(given([3, 5, 20], 28, True), "20 + 5 + 3").correct
    # A detour through a negative number is still arithmetic.
    assert judge(given([3, 5, 20], 18), "3 - 5 + 20").correct
    unusable = judge(problem, "20 / 3 + 5")
    assert (unusable.formatted, unusable.answer) == (True, None)
    assert "20 / 3 is not exact" in unusable.reason


def test_a_known_problem_and_its_traces():
    """Streams and traces written down once: they must not change from release to release."""
    problem = Countdown().generate("train", 3, 4)
    assert problem.prompt == "Make 69 from 4 20 15 11 using each number at most once ."
    assert Countdown().trace(problem, "short") == (
        "<think> 15 * 4 = 60 ; 60 - 11 = 49 ; 49 + 20 = 69 ; </think> "
        "<answer> ( ( 15 * 4 ) - 11 ) + 20 </answer>"
    )
    assert Countdown().trace(problem, "long") == (
        "<think> 15 * 4 = 60 left 11 20 60 ; 60 + 11 = 71 left 20 71 ; 71 - 20 = 51 no ; "
        "71 + 20 = 91 no ; back to 11 20 60 ; 60 - 11 = 49 left 20 49 ; 49 + 20 = 69 yes ; "
        "</think> <answer> ( ( 15 * 4 ) - 11 ) + 20 </answer>"
    )
