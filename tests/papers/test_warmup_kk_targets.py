"""The two target domains of the K&K warm-up: their answers, searches, splits and words."""

import itertools
import random

import pytest

from jaxrl_reason.data.tokenizer import build_tokenizer
from jaxrl_reason.errors import InputError
from jaxrl_reason.papers.warmup_kk_targets import COLOURS, Colouring, Equations, _shape
from jaxrl_reason.tasks import Problem, write_completion

GRAPHS, SYSTEMS = Colouring(), Equations()
TASKS = pytest.mark.parametrize("task", [GRAPHS, SYSTEMS], ids=["colouring", "equations"])
# A triangle P Q R, and S at P.
GRAPH = Problem(
    prompt="",
    answer="P red, Q green, R blue, S green",
    columns={
        "difficulty": 4,
        "answer_class": "red green blue green",
        "names": ["P", "Q", "R", "S"],
        "edges": [[0, 1], [1, 2], [0, 2], [0, 3]],
    },
)
# 2 x + 3 y = 1 and 4 x + 2 y = 2 modulo 5: x = 3, y = 0.
SYSTEM = Problem(
    prompt="",
    answer="x is 3, y is 0",
    columns={"difficulty": 5, "answer_class": "3 0", "rows": [[2, 3, 1], [4, 2, 2]]},
)


def drawn(task, split: str = "train", count: int = 300) -> list[Problem]:
    return [task.generate(split, i) for i in range(count)]


def judged(task, problem: Problem, answer: str):
    return task.verify(problem, write_completion("", answer))


@TASKS
@pytest.mark.parametrize("style", ["long", "short", "answer"])
def test_every_trace_is_right_and_has_known_words(task, style):
    tokenizer = build_tokenizer(task.words())
    for problem in [*drawn(task), *drawn(task, "test", 100)]:
        text = task.trace(problem, style)
        assert task.verify(problem, text).correct
        ids = tokenizer(f"{problem.prompt} {text}")["input_ids"]
        assert tokenizer.unk_token_id not in ids or tokenizer.unk_token_id is None


@TASKS
def test_problems_follow_from_their_place_and_test_problems_are_held_out(task):
    assert drawn(task) == drawn(type(task)())
    train = {task.generate("train", i).prompt for i in range(2000)}
    assert not train & {problem.prompt for problem in drawn(task, "test")}


@TASKS
def test_what_no_completion_may_lack(task):
    problem = task.generate("train", 0)
    assert not task.verify(problem, problem.answer).formatted
    unusable = judged(task, problem, "none")
    assert (unusable.formatted, unusable.answer, unusable.correct) == (True, None, False)


@pytest.mark.parametrize(
    ("answer", "usable", "correct"),
    [
        ("P red, Q green, R blue, S green", True, True),
        ("S blue , R red , Q blue , P green", True, True),
        ("P red, Q green, R blue, S red", True, False),
        ("P red, Q green, R green, S blue", True, False),
        ("P red, Q green, R blue", False, False),
        ("P red, Q green, R blue, S green, S blue", False, False),
        ("P red, Q green, R blue, T green", False, False),
        ("P red, Q green, R blue, S pink", False, False),
        ("P red Q green R blue S green", False, False),
    ],
)
def test_any_proper_colouring_of_all_vertices_is_right(answer, usable, correct):
    verdict = judged(GRAPHS, GRAPH, answer)
    assert (verdict.answer is not None, verdict.correct) == (usable, correct)


@pytest.mark.parametrize(
    ("answer", "usable", "correct"),
    [
        ("x is 3, y is 0", True, True),
        ("x is 3 , y is 0", True, True),
        ("x is 2, y is 4", True, False),  # the first equation only
        ("x is 3, y is 5", True, False),  # not below the prime
        ("y is 0, x is 3", False, False),
        ("x is 3", False, False),
    ],
)
def test_both_equations_must_hold(answer, usable, correct):
    verdict = judged(SYSTEMS, SYSTEM, answer)
    assert (verdict.answer is not None, verdict.correct) == (usable, correct)


def test_the_search_for_a_colouring():
    assert GRAPHS.trace(GRAPH, "long") == (
        "<think> Assume P is red.\nQ unlike P red. Assume Q is green.\n"
        "R unlike P red, Q green. Assume R is blue.\nS unlike P red. Assume S is green.\n"
        "This assignment is feasible. </think> <answer> P red, Q green, R blue, S green </answer>"
    )
    assert GRAPHS.trace(GRAPH, "short").startswith("<think> P red Q green;\nQ green R blue;\n")


def test_the_search_returns_from_a_dead_end():
    # With Q red as P is, R and S have the other two colours, and T is at P, R and S.
    columns = {
        "difficulty": 5,
        "answer_class": "",
        "names": ["P", "Q", "R", "S", "T"],
        "edges": [[1, 2], [1, 3], [2, 3], [0, 4], [2, 4], [3, 4]],
    }
    answer = "P red, Q green, R red, S blue, T green"
    text = GRAPHS.trace(Problem(prompt="", answer=answer, columns=columns), "long")
    assert text.count("Options for T are used up: return to S and reset T.") == 2
    assert "Options for R are used up: return to Q and reset R." in text
    assert text[text.index("Assume Q is green") :].startswith(
        "Assume Q is green.\n"
        "R unlike Q green. Assume R is red.\n"
        "S unlike Q green, R red. Assume S is blue.\n"
        "T unlike P red, R red, S blue. Assume T is green.\n"
        "This assignment is feasible."
    )


def test_the_search_for_a_solution():
    # 2 x + 3 y = 1 gives y = 2, 3, 4, 0 for x = 0, 1, 2, 3.
    assert SYSTEMS.trace(SYSTEM, "long") == (
        "<think> Assume x is 0: y is 2, contradiction in 4 x + 2 y = 2.\n"
        "Assume x is 1: y is 3, contradiction in 4 x + 2 y = 2.\n"
        "Assume x is 2: y is 4, contradiction in 4 x + 2 y = 2.\n"
        "Assume x is 3: y is 0, no contradiction.\n"
        "This assignment is feasible. </think> <answer> x is 3, y is 0 </answer>"
    )


def test_splits_keep_graphs_of_one_shape_together():
    def shapes(split: str) -> set[tuple[int, int]]:
        found = set()
        for problem in drawn(GRAPHS, split, 400):
            edges = tuple(sorted(map(tuple, problem.columns["edges"])))
            found.add((len(problem.columns["names"]), _shape(problem.columns["difficulty"], edges)))
        return found

    assert not shapes("train") & shapes("test")
    assert len(shapes("test")) >= 8


def test_a_shape_is_the_same_under_every_numbering_and_no_other():
    path, star = ((0, 1), (1, 2), (2, 3)), ((0, 1), (0, 2), (0, 3))
    for order in itertools.permutations(range(4)):
        moved = tuple(sorted(tuple(sorted((order[u], order[v]))) for u, v in path))
        assert _shape(4, moved) == _shape(4, path) != _shape(4, star)


def test_equations_in_the_other_order_are_the_same_system():
    found = {"train": set(), "test": set()}
    for split, systems in found.items():
        for problem in drawn(SYSTEMS, split, 1000):
            systems.add(tuple(sorted(map(tuple, problem.columns["rows"]))))
    assert not found["train"] & found["test"]


def test_guesses_can_be_read_and_are_seldom_right():
    rng = random.Random(0)
    for task, low, high in ((GRAPHS, 0.03, 0.12), (SYSTEMS, 0.02, 0.07)):
        verdicts = [judged(task, p, task.guess(p, rng)) for p in drawn(task, count=1500)]
        assert all(verdict.answer for verdict in verdicts)
        assert low < sum(verdict.correct for verdict in verdicts) / 1500 < high
    assert set(GRAPHS.guess(GRAPH, rng).replace(",", "").split()[1::2]) <= set(COLOURS)


def test_options_out_of_range_are_refused():
    with pytest.raises(InputError, match=r"max_vertices=9 must be a whole number from 5 to 7"):
        Colouring(max_vertices=9)
    with pytest.raises(InputError, match=r"moduli=\(4,\) must be a list of some of \(3, 5"):
        Equations(moduli=(4,))
    with pytest.raises(InputError, match=r"difficulty=7 is none of moduli=\(5,\)"):
        SYSTEMS.generate("train", 0, 7)
    with pytest.raises(InputError, match=r"difficulty=8 must be"):
        GRAPHS.generate("train", 0, 8)
