"""Metis-SPECS: layouts, corruptions, pairs, the task that asks for a layout, the factor."""

import collections
import random
from pathlib import Path

import pytest

from jaxrl_reason.config import load_yaml, validate
from jaxrl_reason.errors import InputError
from jaxrl_reason.papers.metis_specs import (
    InstructedLayout,
    answer_right,
    format_pairs,
    generalization_factor,
    inconsistent_traces,
    layout_reward,
    standard_layout,
    supports,
)
from jaxrl_reason.papers.metis_specs_layouts import (
    CORRUPTIONS,
    LAYOUTS,
    corrupt,
    lay_out,
    read_layout,
    relaid,
)
from jaxrl_reason.stages.config import RunConfig, problems_of
from jaxrl_reason.stages.groups import Group, Sampled
from jaxrl_reason.tasks import (
    TASKS,
    make_task,
    read_completion,
    write_completion,
)

CONFIGS = Path(__file__).parents[2] / "configs" / "papers" / "metis_specs"
STEPS = {"modulus": 10, "max_constant": 9, "min_steps": 2, "max_steps": 3}
EVERY = dict.fromkeys(LAYOUTS, 1.0)
SHORT = "<think> b = 3 + 4 = 7 ; </think> <answer> 7 </answer>"


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_layout_is_read_as_it_was_written(layout):
    for thought in ("a = 3 ;", ""):
        text = lay_out(layout, thought, "4")
        assert read_layout(text) == (layout, thought, "4")
    first, second = layout.split()
    assert lay_out(layout, "t", "a").startswith(f"<{first}>")
    assert read_layout(f"<{second}> 4 </{second}> <{first}> 4 </{first}>").layout != layout


def test_the_standard_layout_is_the_one_of_all_tasks():
    assert lay_out("think answer", "t", "4") == write_completion("t", "4")
    assert len(LAYOUTS) == len(set(LAYOUTS)) == 18


@pytest.mark.parametrize(
    "text",
    [
        "",
        "<think> t </think> 4",
        "<think> t </think> <answer> </answer>",
        "<think> t </think> so <answer> 4 </answer>",
        "<think> t </work> <answer> 4 </answer>",
        "<think> t </think> <answer> 4 </answer> <answer> 4 </answer>",
        "<think> t <work> </think> <answer> 4 </answer>",
        "<think> t </think> <work> t </work>",
        "<answer> 4 </answer> <final> 4 </final>",
        "<thought> t </thought> <answer> 4 </answer>",
    ],
)
def test_other_texts_have_no_layout(text):
    assert read_layout(text) is None


def test_a_text_in_another_layout():
    assert relaid(SHORT, "final work") == "<final> 7 </final> <work> b = 3 + 4 = 7 ; </work>"
    with pytest.raises(InputError, match="'no layout' must have one of the layouts"):
        relaid("no layout", "final work")


def test_the_five_corruptions():
    assert {
        kind: corrupt("<think> t u </think> <answer> 4 </answer>", kind) for kind in CORRUPTIONS
    } == {
        "no_tags": "t u 4",
        "no_answer_tags": "<think> t u </think> 4",
        "no_think_tags": "t u <answer> 4 </answer>",
        "thought_to_the_end": "<think> t u 4 </think>",
        "answer_in_words": "<think> t u </think> Answer: 4",
    }
    assert corrupt("<final> 4 </final> <work> t </work>", "no_answer_tags") == "4 <work> t </work>"


@pytest.mark.parametrize("name", TASKS)
def test_no_corruption_of_a_trace_of_any_task_is_well_formed(name):
    task = make_task(name, {})
    for index in range(5):
        for style in ("long", "short", "answer"):
            trace = task.trace(task.generate("train", index), style)
            laid = read_layout(trace)
            for layout in LAYOUTS:
                for kind in CORRUPTIONS:
                    text = corrupt(lay_out(layout, laid.thought, laid.answer), kind)
                    assert read_layout(text) is None
                    assert read_completion(text).answer is None
                    assert laid.answer in text


@pytest.mark.parametrize(("text", "kind"), [(SHORT, "e"), ("no layout", "no_tags")])
def test_what_cannot_be_corrupted(text, kind):
    with pytest.raises(InputError, match="thought_to_the_end"):
        corrupt(text, kind)


# The task


@pytest.fixture
def task() -> InstructedLayout:
    return InstructedLayout(options=STEPS, layouts=EVERY)


def test_prompts_name_the_layout_and_traces_have_it(task):
    seen = set()
    for index in range(200):
        problem = task.generate("train", index)
        layout = problem.columns["layout"]
        first, second = layout.split()
        assert problem.prompt.endswith(f" ? write <{first}> <{second}>")
        for style in ("long", "short", "answer"):
            text = task.trace(problem, style)
            assert task.verify(problem, text).correct
            assert read_layout(text).layout == layout
            assert set(text.split()) <= set(task.words())
        assert set(problem.prompt.split()) <= set(task.words())
        seen.add(layout)
    assert seen == set(LAYOUTS)
    # Without the instruction the problems are those of the task, and no split has another's.
    plain = make_task("arithmetic", STEPS)
    assert task.generate("test", 3).prompt.startswith(plain.generate("test", 3).prompt)


def test_shares_of_layouts():
    task = InstructedLayout(options=STEPS, layouts={"think answer": 3.0, "final work": 1.0})
    drawn = [task.generate("train", i).columns["layout"] for i in range(1000)]
    assert abs(drawn.count("final work") / 1000 - 0.25) < 0.05  # deviation 0.014


def test_verdicts_judge_the_layout_asked_for():
    task = InstructedLayout(options=STEPS, layouts={"work final": 1.0})
    problem = task.generate("train", 0)
    wrong = str((int(problem.answer) + 1) % 10)
    verdict = task.verify(problem, lay_out("work final", "", wrong))
    assert (verdict.formatted, verdict.correct, verdict.answer) == (True, False, wrong)
    verdict = task.verify(problem, lay_out("work final", "", "x"))
    assert (verdict.formatted, verdict.correct, verdict.answer) == (True, False, None)
    verdict = task.verify(problem, lay_out("think answer", "", problem.answer))
    assert (verdict.formatted, verdict.correct, verdict.answer) == (False, False, None)
    assert verdict.reason == "asked for 'work final', got 'think answer'"
    assert task.verify(problem, problem.answer).reason == "no layout"


@pytest.mark.parametrize("layouts", [{}, {"think work": 1.0}, {"think answer": 0.0}])
def test_layouts_that_there_are_not(layouts):
    with pytest.raises(InputError, match="must give a share above 0"):
        InstructedLayout(options=STEPS, layouts=layouts)


def test_demonstrations_obey_as_often_as_asked(task):
    problems = [task.generate("train", i) for i in range(2000)]
    options = {"obey": 0.4, "other": 0.2, "styles": {"short": 0.7, "answer": 0.3}}
    rows = list(inconsistent_traces(task, problems, random.Random(0), **options))
    counts = collections.Counter()
    for row, problem in zip(rows, problems, strict=True):
        text = row["completion"]
        laid = read_layout(text)
        counts["obey"] += task.verify(problem, text).correct
        counts["other"] += laid is not None and laid.layout != problem.columns["layout"]
        counts["none"] += laid is None
        counts["answer"] += "=" not in text
        assert set(text.replace("Answer:", "Answer :").split()) <= set(task.words())
    assert [row["problem"] for row in rows] == list(range(2000))
    shares = {name: count / 2000 for name, count in counts.items()}
    # Deviations are at most 0.011.
    assert shares == pytest.approx(
        {"obey": 0.4, "other": 0.2, "none": 0.4, "answer": 0.3}, abs=0.04
    )


# Pairs


ASKED = InstructedLayout(options=STEPS)


def group_of(number: int, chosen: list[str], rejected: list[str]) -> Group:
    """Completions of a problem whose answer stands in them as A, a wrong one as W."""
    problem = ASKED.generate("train", number)
    wrong = str((int(problem.answer) + 1) % 10)

    def sampled(text: str) -> Sampled:
        text = text.replace("A", problem.answer).replace("W", wrong)
        return Sampled(text, [], ASKED.verify(problem, text), True)

    return Group(number, problem, [sampled(t) for t in chosen], [sampled(t) for t in rejected])


GOOD = "<think> b = 3 + 4 = A ; </think> <answer> A </answer>"
UNSUPPORTED = "<think> </think> <answer> A </answer>"
CONTRADICTED = "<think> b = 3 + 4 = W ; </think> <answer> A </answer>"
WRONG = "<think> b = 3 + 4 = W ; </think> <answer> W </answer>"
BARE = "b = 3 + 4 = A ; A"


def test_pairs_of_right_answers_differ_in_their_layout():
    groups = [
        group_of(i, [WRONG, UNSUPPORTED, GOOD, CONTRADICTED], [BARE, WRONG, GOOD])
        for i in range(300)
    ]
    rows = list(format_pairs(groups, random.Random(0)))
    pairs = [row for row in rows if "chosen" in row]
    assert [row["problem"] for row in pairs] == list(range(300))
    for row, group in zip(pairs, groups, strict=True):
        good = GOOD.replace("A", group.problem.answer)
        assert row["chosen"] == good
        assert row["rejected"] == corrupt(good, row["corruption"])
    kinds = collections.Counter(row["corruption"] for row in pairs)
    assert set(kinds) == set(CORRUPTIONS)
    assert min(kinds.values()) > 30  # 60 expected, deviation 7
    demonstrations = [row for row in rows if "completion" in row]
    assert [row["completion"] for row in demonstrations] == [row["chosen"] for row in pairs]


def test_coupled_pairs_reject_wrong_answers():
    rows = list(
        format_pairs([group_of(0, [GOOD], [GOOD, BARE, WRONG])], random.Random(0), coupled=True)
    )
    problem = ASKED.generate("train", 0)
    wrong = WRONG.replace("W", str((int(problem.answer) + 1) % 10))
    assert rows[0]["rejected"] == corrupt(wrong, rows[0]["corruption"])
    assert rows[1] == {"problem": 0, "completion": GOOD.replace("A", problem.answer)}


def test_coupled_pairs_need_a_second_policy():
    with pytest.raises(InputError, match="set rejected_from"):
        list(format_pairs([group_of(0, [GOOD], [])], random.Random(0), coupled=True))


def test_without_a_judge_unsupported_answers_are_kept():
    group = group_of(0, [UNSUPPORTED], [GOOD])
    assert list(format_pairs([group], random.Random(0))) == []
    assert len(list(format_pairs([group], random.Random(0), judge=None))) == 2


def test_the_teacher_writes_the_chosen_side():
    options = {
        "name": "jaxrl_reason.papers.metis_specs:InstructedLayout",
        "options": {"options": STEPS},
    }
    (pair, _) = format_pairs([group_of(0, [], [GOOD])], random.Random(0), teacher=options)
    assert pair["chosen"] == ASKED.trace(ASKED.generate("train", 0), "short")


def test_without_a_second_policy_the_chosen_text_is_corrupted():
    group = group_of(0, [GOOD, GOOD.replace("3", "5")], [])
    rows = list(format_pairs([group], random.Random(0), pairs_per_prompt=2))
    pairs = [row for row in rows if "chosen" in row]
    assert {row["chosen"] for row in pairs} == {c.text for c in group.completions}
    assert all(row["rejected"] == corrupt(row["chosen"], row["corruption"]) for row in pairs)


def test_several_pairs_of_a_problem_share_no_completion():
    chosen = [GOOD.replace("3", str(i)) for i in range(3)]
    rejected = [GOOD.replace("3", str(i)) for i in range(5, 9)]
    rows = list(format_pairs([group_of(0, chosen, rejected)], random.Random(0), pairs_per_prompt=4))
    pairs = [row for row in rows if "chosen" in row]
    assert len({row["chosen"] for row in pairs}) == len({row["rejected"] for row in pairs}) == 3


def test_unfinished_completions_are_in_no_pair():
    group = group_of(0, [GOOD], [GOOD])
    cut = group.others[0]._replace(finished=False)
    assert list(format_pairs([group._replace(others=[cut])], random.Random(0))) == []
    assert list(format_pairs([group._replace(completions=[cut])], random.Random(0))) == []


def test_the_judge_reads_the_last_derived_value():
    for style, supported in (("long", True), ("short", True), ("answer", False)):
        for index in range(100):
            problem = ASKED.generate("train", index)
            assert supports(problem, ASKED.trace(problem, style)) == supported
    problem = ASKED.generate("train", 0)
    assert not supports(problem, SHORT.replace("<answer> 7", "<answer> 8"))
    assert not supports(problem, "b = 3 + 4 = 7 ; 7")


# Reward, measures, factor


def test_the_reward_is_for_the_standard_layout():
    texts = [SHORT, lay_out("work final", "t", "7"), "7"]
    assert layout_reward(["?"] * 3, texts, verdict=[None] * 3) == [1.0, 0.0, 0.0]


@pytest.mark.parametrize(
    ("text", "right", "standard"),
    [
        ("<think> t </think> <answer> A </answer>", True, True),
        ("<think> t </think> <answer> W </answer>", False, True),
        ("<final> A </final> <work> W </work>", True, False),
        ("t A", True, False),
        ("<think> t A </think>", True, False),
        ("<think> t </think> Answer: A", True, False),
        ("A t W", False, False),
        ("", False, False),
    ],
)
def test_measures_see_answer_and_layout_apart(text, right, standard):
    problem = ASKED.generate("test", 0)
    wrong = str((int(problem.answer) + 1) % 10)
    text = text.replace("Answer", "answer").replace("A", problem.answer).replace("W", wrong)
    verdict = ASKED.verify(problem, text)
    assert answer_right(problem, text, verdict, 5) == right
    assert standard_layout(problem, text, verdict, 5) == standard


def records(base: float, in_layout: float, shifted: list[float]) -> dict:
    """A base with one score everywhere, and a stage."""
    result = lambda first, others: {
        "format_rate": first,
        "sets": {name: {"format_rate": rate} for name, rate in zip("ab", others, strict=True)},
    }
    return {"base": result(base, [base] * 2), "warm": result(in_layout, shifted)}


FACTOR = {
    "id_metric": "format_rate",
    "ood_metrics": ["sets.a.format_rate", "sets.b.format_rate"],
}


@pytest.mark.parametrize(
    ("in_layout", "shifted", "factor"), [(98.5, 94.5, 95.3), (98, 69, 73.3), (98.5, 89.7, 91.3)]
)
def test_the_factor_is_that_of_the_figure(in_layout, shifted, factor):
    found = records(0.0, in_layout / 100, [shifted / 100] * 2)
    assert generalization_factor(found, "warm", base="base", **FACTOR) == pytest.approx(
        factor, abs=0.05
    )


def test_the_factor_counts_gains():
    # Gains of 50 and 25 points: 5 * 50 * 25 / (4 * 50 + 25).
    found = records(0.4, 0.9, [0.6, 0.7])
    assert generalization_factor(found, "warm", base="base", **FACTOR) == pytest.approx(6250 / 225)
    # Weights 3 : 1 of gains of 20 and 30 points.
    weighted = generalization_factor(found, "warm", base="base", weights=[3, 1], **FACTOR)
    assert weighted == pytest.approx(5 * 50 * 22.5 / (4 * 50 + 22.5))
    # b = 1 is the harmonic mean.
    assert generalization_factor(found, "warm", base="base", b=1, **FACTOR) == pytest.approx(
        100 / 3
    )
    scores = generalization_factor(found, "warm", base=None, **FACTOR)
    assert scores == pytest.approx(5 * 90 * 65 / (4 * 90 + 65))


@pytest.mark.parametrize(("in_layout", "shifted"), [(0.4, 0.9), (0.9, 0.4), (0.2, 0.2)])
def test_without_a_gain_the_factor_is_0(in_layout, shifted):
    found = records(0.4, in_layout, [shifted] * 2)
    assert generalization_factor(found, "warm", base="base", **FACTOR) == 0.0


# The experiment


def test_the_run_asks_for_the_standard_layout_where_it_trains():
    given = load_yaml(CONFIGS / "small.yaml")["run"]
    run = validate(RunConfig, given, "small.yaml")
    tasks = run.make_tasks()
    layouts = {
        name: {tasks.generate("test", i, task=name).columns["layout"] for i in range(300)}
        for name in (None, "every", "renamed", "swapped")
    }
    assert layouts[None] == {"think answer"}
    assert layouts["renamed"] == {"work final", "scratch result"}
    assert layouts["swapped"] == {"answer think"}
    # The base model has seen all of them, so that it could follow any.
    assert set().union(*layouts.values()) == layouts["every"]
    trained = {problems.task for s in run.stages.values() if (problems := problems_of(s))}
    assert trained == {"every", None}
    assert run.stages["base"].data.problems.task == "every"
    # The teacher is the solver of the task that is trained on.
    assert given["stages"]["teacher_pairs"]["options"]["teacher"] == given["task"]
