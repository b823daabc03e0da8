"""What RL with Cold Start adds: teachers, constructions, measures, two statistics."""

import collections
import random
import re
from pathlib import Path

import pytest

from jaxrl_reason.config import load_yaml
from jaxrl_reason.data.tokenizer import build_tokenizer
from jaxrl_reason.errors import InputError
from jaxrl_reason.papers import rl_cold_start as cold
from jaxrl_reason.papers.rl_cold_start_teachers import attempt, caption
from jaxrl_reason.stages.groups import Group, Sampled
from jaxrl_reason.tasks import ModularArithmetic, Problem, Verdict

SMALL = Path(__file__).parents[2] / "configs" / "papers" / "rl_cold_start" / "small.yaml"
TASK = ModularArithmetic(modulus=53, max_constant=9, min_steps=2, max_steps=3)
PROBLEMS = [TASK.generate("train", i) for i in range(600)]
CHAIN = Problem(
    prompt="a = 50 ; d = a + 9 ; b = d * d ; b ?",
    answer="36",
    columns={
        "difficulty": 2,
        "answer_class": "36",
        "modulus": 53,
        "first": ["a", 50],
        "steps": [["d", "a", "+", 9], ["b", "d", "*", "d"]],
    },
)
STEP = re.compile(r"\b[a-h] (?:=|is) (\d+) ([-+*]) (\d+) = (\d+)")


def rows(construction: str, seed: int = 0, **options) -> list[dict]:
    rng = random.Random(seed)
    return list(cold.cold_start(TASK, PROBLEMS, rng, construction=construction, **options))


def share(made: list[dict], holds) -> float:
    return sum(holds(PROBLEMS[row["problem"]], row["completion"]) for row in made) / len(made)


def is_right(problem: Problem, text: str) -> bool:
    return TASK.verify(problem, text).correct


def errors(text: str) -> list[int]:
    """By how much each step of a text is off, modulo 53."""
    apply = {"+": int.__add__, "-": int.__sub__, "*": int.__mul__}
    steps = STEP.findall(text)
    return [(int(v) - apply[sign](int(a), int(b))) % 53 for a, sign, b, v in steps]


# Teachers


def test_an_exact_attempt_in_its_three_wordings():
    texts = {attempt(CHAIN, random.Random(i), noise=0.0) for i in range(50)}
    assert {(found.answer, found.slip) for found in texts} == {("36", None)}
    assert {found.thought for found in texts} == {
        "d = 50 + 9 = 6 ; b = 6 * 6 = 36 ;",
        "a is 50 so d = 50 + 9 = 6 ; d is 6 so b = 6 * 6 = 36 ;",
        "then d is 50 + 9 = 6 ; then b is 6 * 6 = 36 ;",
    }


def test_wrong_steps_are_near_misses_from_which_the_rest_goes_on():
    rng, off, steps = random.Random(0), 0, 0
    for problem in PROBLEMS:
        found = attempt(problem, rng, noise=0.4)
        missed = errors(found.thought)
        assert set(missed) <= {0, 1, 2, 51, 52}
        names = [step[0] for step in problem.columns["steps"]]
        wrong = [name for name, by in zip(names, missed, strict=True) if by]
        assert found.slip == (wrong[0] if wrong else None)
        assert bool(wrong) or found.answer == problem.answer
        off, steps = off + len(wrong), steps + len(missed)
    assert 0.36 < off / steps < 0.44  # deviation 0.013


def test_a_caption_gives_what_the_prompt_gives():
    assert caption(CHAIN) == "image : a is 50 , d is a + 9 , b is d * d ."


def test_the_base_model_learns_captions_steps_and_answers_without_a_thought():
    options = {"captions": 0.3, "facts": 0.5}
    made = list(cold.base_rows(TASK, [CHAIN] * 2000, random.Random(0), **options))
    assert [row["problem"] for row in made] == list(range(2000))
    found = collections.Counter((row.get("prompt"), row["completion"]) for row in made)
    expected = {
        ("a = 50 ; d = a + 9 ; b = d * d ; describe", caption(CHAIN)): 600,
        ("50 + 9 ?", "50 + 9 = 6"): 500,
        ("6 * 6 ?", "6 * 6 = 36"): 500,
        (None, "<think> </think> <answer> 36 </answer>"): 400,
    }
    assert found.keys() == expected.keys()
    assert all(abs(found[row] - count) < 80 for row, count in expected.items())  # deviation 21
    with pytest.raises(InputError, match=r"facts=0.8 must be a number from 0.0 to 0.7"):
        list(cold.base_rows(TASK, [CHAIN], random.Random(0), captions=0.3, facts=0.8))


# Constructions


@pytest.mark.parametrize("construction", cold.CONSTRUCTIONS)
def test_every_construction_is_of_the_same_questions_in_the_right_layout(construction):
    made = rows(construction, tries=200)
    assert [row["problem"] for row in made] == list(range(len(PROBLEMS)))
    assert share(made, lambda p, text: TASK.verify(p, text).formatted) == 1
    assert made == rows(construction, tries=200) != rows(construction, seed=1, tries=200)


@pytest.mark.parametrize(
    ("construction", "low", "high"),
    [
        ("distilled_strong", 1, 1),
        ("distilled_weak", 1, 1),
        ("reflection", 1, 1),
        ("caption", 1, 1),
        ("self_critic", 1, 1),
        # 0.36 of the chains of two steps and 0.22 of three have none wrong; some errors cancel.
        ("unfiltered_weak", 0.26, 0.42),
        ("wrong_only", 0, 0),
    ],
)
def test_how_many_answers_are_right(construction, low, high):
    assert low <= share(rows(construction), is_right) <= high


def test_a_right_answer_of_the_weak_teacher_can_have_wrong_steps():
    flawed = lambda problem, text: any(errors(text))
    assert share(rows("distilled_strong"), flawed) < 0.02
    assert 0.03 < share(rows("distilled_weak"), flawed) < 0.25


def test_reflection_has_a_wrong_attempt_and_a_right_one():
    for row in rows("reflection"):
        problem = PROBLEMS[row["problem"]]
        wrong, _, right = row["completion"].partition(cold.TURN)
        given = re.fullmatch(r"<think> .* so (\d+) ; ", wrong)
        assert given[1] != problem.answer
        assert is_right(problem, f"<think> {right}")
    mixed = rows("reflection", plain=0.5)
    assert 0.43 < share(mixed, lambda p, text: cold.TURN in text) < 0.57
    assert share(mixed, is_right) == 1


def test_a_caption_comes_before_its_reasons():
    for row in rows("caption"):
        head = f"<think> {caption(PROBLEMS[row['problem']])} reasoning : "
        assert row["completion"].startswith(head)


def test_the_critique_names_the_first_wrong_step():
    layout = re.compile(r"<think> draft : (.*) critique : (.*) ; revised : (.*) </think> .*")
    verdicts = set()
    for row in rows("self_critic"):
        problem = PROBLEMS[row["problem"]]
        draft, critique, revised = layout.fullmatch(row["completion"]).groups()
        missed = errors(draft)
        names = [step[0] for step in problem.columns["steps"]]
        wrong = [name for name, by in zip(names, missed, strict=True) if by]
        assert critique == (f"{wrong[0]} is wrong" if wrong else "no error")
        assert len(errors(revised)) == len(names)
        verdicts.add(bool(wrong))
    assert verdicts == {True, False}


def test_a_problem_at_which_a_teacher_never_succeeds_is_left_out():
    assert rows("distilled_strong", strong=1.0, tries=1) != []  # errors that cancel
    assert rows("wrong_only", weak=0.0) == []
    assert len(rows("distilled_weak", tries=1)) < len(PROBLEMS) / 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"construction": "reflexion"}, "construction='reflexion' is unknown; did you mean"),
        ({"construction": "caption", "plain": 2}, "plain=2 must be a number"),
        ({"construction": "caption", "weak": -1}, "weak=-1 must be a number"),
        ({"construction": "caption", "tries": 0}, "tries=0 must be a whole number"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(InputError, match=message):
        rows(**options)


def test_the_vocabulary_of_the_configuration_has_all_words_and_rows_have_room():
    run = load_yaml(SMALL)["run"]
    task = ModularArithmetic(**run["task"]["options"])
    problems = [task.generate("train", i) for i in range(300)]
    tokenizer = build_tokenizer([*task.words(), *run["words"]])
    texts = [
        row["completion"]
        for construction in cold.CONSTRUCTIONS
        for row in cold.cold_start(task, problems, random.Random(0), construction=construction)
    ]
    for row in cold.base_rows(task, problems, random.Random(0), captions=0.4, facts=0.3):
        texts += [row["completion"], row.get("prompt", "")]
    ids = tokenizer(texts)["input_ids"]
    assert tokenizer.unk_token_id not in {token for text in ids for token in text}
    longest = run["stages"]["rl_only"]["max_completion_length"]
    assert max(map(len, ids)) < longest
    assert cold.turn_back(CHAIN, tokenizer.decode(tokenizer(cold.TURN)["input_ids"]), None, 0)


# From samples


def sampled(*texts: str, finished: bool = True) -> Group:
    verdicts = [
        Verdict(correct="{4}" in text, formatted=True, answer="4", reason="") for text in texts
    ]
    written = [Sampled(t, [], v, finished) for t, v in zip(texts, verdicts, strict=True)]
    return Group(3, CHAIN, written, [])


GOOD, BAD = r" So \boxed{4} ", r"So \boxed{5}"


@pytest.mark.parametrize(
    ("construction", "text"),
    [
        ("distilled", r"So \boxed{4}"),
        ("reflection", "So \\boxed{5}\n\nWait, let me re-check.\n\nSo \\boxed{4}"),
        ("wrong_only", r"So \boxed{5}"),
    ],
)
def test_one_row_of_what_was_sampled(construction, text):
    for seed in range(5):
        made = cold.sampled_rows(
            [sampled(GOOD, BAD)], random.Random(seed), construction=construction
        )
        assert list(made) == [{"problem": 3, "completion": text}]


def test_samples_without_what_is_needed_give_no_row():
    def count(construction, *groups):
        return len(list(cold.sampled_rows(groups, random.Random(0), construction=construction)))

    assert count("distilled", sampled(BAD)) == count("wrong_only", sampled(GOOD)) == 0
    assert count("reflection", sampled(BAD), sampled(GOOD), sampled(GOOD, BAD)) == 1
    assert count("unfiltered", sampled(BAD), sampled(GOOD)) == 2
    assert count("unfiltered", sampled(GOOD, finished=False)) == 0


def test_a_share_of_the_samples_stays_plain():
    groups = [sampled(GOOD, BAD)] * 400
    made = cold.sampled_rows(groups, random.Random(0), construction="reflection", plain=0.5)
    assert 160 < sum("Wait" in row["completion"] for row in made) < 240
    with pytest.raises(InputError, match="construction='caption' is unknown"):
        list(cold.sampled_rows(groups, random.Random(0), construction="caption"))


# Measures


@pytest.mark.parametrize(
    ("text", "turns"),
    [
        ("so 4 ; wait , no", True),
        ("Wait, that is wrong.", True),
        ("Let me re-evaluate this", True),
        ("re - check : d = 4", True),
        ("We must reexamine it", True),
        ("re-examining the figure", True),
        ("let me check", True),
        ("awaiting the result, check b", False),
        ("draft : d = 4 critique : d is wrong ; revised :", False),
        ("", False),
    ],
)
def test_phrases_of_turning_back(text, turns):
    assert cold.turn_back(CHAIN, text, None, 0) is turns


@pytest.mark.parametrize("correct", [True, False])
def test_accuracy_is_measured_with_and_without_a_phrase(correct):
    verdict = Verdict(correct=correct, formatted=True, answer="4", reason="")
    after = lambda text: cold.right_after_turning(CHAIN, text, verdict, 1)
    without = lambda text: cold.right_without_turning(CHAIN, text, verdict, 1)
    assert (after("wait"), without("wait")) == (correct, None)
    assert (after("so"), without("so")) == (None, correct)


def test_an_answer_of_the_wrong_kind_is_none():
    found = lambda text: cold.answer_present(CHAIN, text, TASK.verify(CHAIN, text), 1)
    assert found("<think> </think> <answer> 4 </answer>")
    assert not found("<think> </think> <answer> so </answer>")
    assert not found("4")


def test_the_gain_of_turning_is_weighted_within_difficulties():
    by = {
        "turn_back": {"2": 0.5, "3": 0.1, "4": 0.0, "5": 1.0},
        "right_after_turning": {"2": 0.6, "3": 0.2, "4": None, "5": 0.3},
        "right_without_turning": {"2": 0.8, "3": 0.7, "4": 0.9, "5": None},
    }
    records = {"rl": {"measures_by_difficulty": by}}
    expected = (0.25 * -0.2 + 0.09 * -0.5) / 0.34
    assert cold.turning_gain(records, "rl") == pytest.approx(expected)
    records["rl"]["measures_by_difficulty"]["turn_back"] = dict.fromkeys("2345", 0.0)
    assert cold.turning_gain(records, "rl") == 0.0


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        ([0.1, 0.2, 0.3, 0.9], [0.5, 0.6, 0.7, 0.71], 1.0),
        ([0.1, 0.2, 0.3, 0.9], [0.8, 0.6, 0.4, 0.1], -1.0),
        ([0.1, 0.2, 0.3, 0.4, 0.5], [0.2, 0.1, 0.4, 0.3, 0.5], 0.8),
        # Ranks 0.5 0.5 2 3 and 0 1 2 3: covariance 4.5, squares 4.5 and 5.
        ([0.1, 0.1, 0.3, 0.4], [0.1, 0.2, 0.3, 0.4], 4.5 / (4.5 * 5) ** 0.5),
        ([0.2, 0.2], [0.1, 0.3], 0.0),
    ],
)
def test_rank_correlation_over_constructions(before, after, expected):
    first, second = ([f"{side}{i}" for i in range(len(before))] for side in "ab")
    values = zip(first + second, before + after, strict=True)
    records = {name: {"sets": {"hard": {"accuracy": value}}} for name, value in values}
    found = cold.spearman(records, "b0", first=first, second=second, metric="sets.hard.accuracy")
    assert found == pytest.approx(expected)
