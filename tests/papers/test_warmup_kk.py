"""What the K&K warm-up adds: base rows, warm-ups, rewards, two numbers."""

import collections
import random
import re

import pytest

from jaxrl_reason.errors import InputError
from jaxrl_reason.papers import warmup_kk as kk
from jaxrl_reason.papers.warmup_kk_targets import Colouring
from jaxrl_reason.tasks import KnightsKnaves, Verdict

COLOURING = Colouring()
GRAPHS = [COLOURING.generate("train", i) for i in range(1200)]
TASK = KnightsKnaves(min_people=2, max_people=3)
PUZZLES = [TASK.generate("train", i) for i in range(600)]
PEOPLE = {"name": "knights_knaves", "options": {"min_people": 2, "max_people": 3}}
RIGHT = Verdict(correct=True, formatted=True, answer="4", reason="")
WRONG = Verdict(correct=False, formatted=True, answer="5", reason="")
UNREAD = Verdict(correct=False, formatted=True, answer=None, reason="")
NO_LAYOUT = Verdict(correct=False, formatted=False, answer=None, reason="")


def base(seed: int = 0, aloud: float = 0.3, longest: int = 128, **shares: float) -> list[dict]:
    rng = random.Random(seed)
    options = {"aloud": aloud, "longest": longest, "people": PEOPLE}
    return list(kk.base_rows(COLOURING, GRAPHS, rng, shares=shares, **options))


def warm(style: str = "long", longest: int = 232, seed: int = 0, **options) -> list[dict]:
    rng = random.Random(seed)
    return list(kk.warm_up(TASK, PUZZLES, rng, style=style, longest=longest, **options))


def is_right(row: dict) -> bool:
    return TASK.verify(PUZZLES[row["problem"]], row["completion"]).correct


def lines(row: dict) -> list[str]:
    return re.fullmatch(r"<think>(.*)</think>.*", row["completion"], re.DOTALL)[1].split("\n")


# The base model


def test_rows_of_the_base_model_come_in_their_shares():
    made = base(people=0.25, logic=0.25, sums=0.25, edges=0.25)
    assert [row["problem"] for row in made] == list(range(1200))
    assert made == base(people=0.25, logic=0.25, sums=0.25, edges=0.25)
    kinds = collections.Counter(
        "people"
        if "inhabitants" in row["prompt"]
        else "edges"
        if "Can" in row["prompt"]
        else "sums"
        if "modulo" in row["prompt"]
        else "logic"
        for row in made
    )
    assert all(240 <= count <= 360 for count in kinds.values())  # deviation 15
    with pytest.raises(InputError, match="has other kinds than people, logic"):
        base(persons=1.0)
    with pytest.raises(InputError, match=r"aloud=1.5 must be a number"):
        base(aloud=1.5, people=1.0)


def test_puzzles_of_the_base_model_are_answered_without_a_thought():
    for row in base(people=1.0)[:100]:
        assert row["completion"].startswith("<think> </think> <answer> (1) ")
        assert row["prompt"].startswith("An island")


def test_facts_are_true():
    for row in base(logic=0.5, sums=0.5):
        asked = row["prompt"].removesuffix("?").removesuffix(" modulo 5")
        value = eval(asked.replace("true", "True").replace("false", "False"))
        shown = str(value).lower() if isinstance(value, bool) else str(value % 5)
        assert row["completion"] == shown


def pairs_of(unlike):
    """The edges of `Q unlike P; R unlike P Q`."""
    clauses = (clause.split(" unlike ") for clause in unlike.split("; "))
    return [{vertex, other} for vertex, others in clauses for other in others.split()]


def test_a_prompt_says_every_edge_once():
    for problem in GRAPHS[:50]:
        names, edges = problem.columns["names"], problem.columns["edges"]
        said = pairs_of(problem.prompt.removesuffix(".").split("blue: ")[1])
        assert sorted(map(sorted, said)) == sorted(sorted(names[v] for v in e) for e in edges)


def test_a_colour_is_refused_if_and_only_if_a_neighbour_has_it():
    said = collections.Counter()
    pattern = re.compile(r"blue: (.*)\. (\w) is (\w+)\. Can (\w) be (\w+)\?")
    for row in base(edges=1.0):
        edges, u, colour, v, other = pattern.search(row["prompt"]).groups()
        pairs = pairs_of(edges)
        refused = {u, v} in pairs and colour == other
        assert u != v
        assert row["completion"] == ("no" if refused else "yes")
        said[row["completion"]] += 1
    assert 0.4 < said["no"] / said.total() < 0.75


@pytest.mark.parametrize("kind", ["colouring", "equations"])
def test_attempts_search_or_guess(kind):
    known = {p.prompt: p for p in GRAPHS}
    made = base(**{kind: 1.0})
    aloud = [row for row in made if not row["completion"].startswith("<think> </think>")]
    assert 0.24 < len(aloud) / len(made) < 0.36
    assert all(row["completion"].count("Assume") for row in aloud)
    if kind == "colouring":
        right = lambda row: COLOURING.verify(known[row["prompt"]], row["completion"])
        assert all(right(row).correct for row in aloud)
        guesses = [right(row) for row in base(aloud=0.0, colouring=1.0)]
        assert all(v.formatted and v.answer for v in guesses)
        assert 0.04 < sum(v.correct for v in guesses) / len(guesses) < 0.1
    assert all(
        row["completion"].startswith("<think> </think>") for row in base(longest=20, **{kind: 1.0})
    )


# Warm-ups


def test_a_long_warm_up_is_the_solvers_search_of_puzzles_that_are_not_too_long():
    made = warm()
    assert all(row["completion"] == TASK.trace(PUZZLES[row["problem"]], "long") for row in made)
    kept = {row["problem"] for row in made}
    length = lambda n: kk._length(PUZZLES[n].prompt + TASK.trace(PUZZLES[n], "long"))
    assert kept == {n for n in range(600) if length(n) <= 232}
    assert any("used up" in row["completion"] for row in made)


def test_answers_alone_are_of_the_same_puzzles():
    made = warm("answer")
    assert [row["problem"] for row in made] == [row["problem"] for row in warm()]
    assert all(row["completion"].startswith("<think> </think>") for row in made)
    assert all(map(is_right, made))


def test_shuffled_searches_have_the_same_lines_and_the_right_answer():
    moved = 0
    for row, whole in zip(warm(shuffled=True), warm(), strict=True):
        strip = lambda r: [line.strip() for line in lines(r)]
        assert sorted(strip(row)) == sorted(strip(whole))
        assert is_right(row)
        moved += strip(row) != strip(whole)
    assert moved / len(warm()) > 0.95


def test_spoilt_answers_turn_one_role_and_leave_the_search():
    made, whole = warm(wrong=0.3), warm()
    spoilt = [(a, b) for a, b in zip(made, whole, strict=True) if a != b]
    assert 0.24 < len(spoilt) / len(made) < 0.36
    for row, right in spoilt:
        assert lines(row) == lines(right)
        verdict = TASK.verify(PUZZLES[row["problem"]], row["completion"])
        assert re.fullmatch(r"wrong about \w+", verdict.reason)
    assert all(is_right(row) for row in made if row in whole)
    with pytest.raises(InputError, match=r"wrong=2 must be a number"):
        warm(wrong=2)


def test_a_prompt_that_opens_the_thought_takes_the_tag_from_the_completion():
    made = warm(prompt="User: {prompt} Assistant: <think>")
    for row, whole in zip(made, warm(), strict=True):
        assert row["prompt"] == f"User: {PUZZLES[row['problem']].prompt} Assistant: <think>"
        assert "<think> " + row["completion"] == whole["completion"]


# Rewards and numbers


def test_the_papers_rewards_are_a_sum_less_two():
    verdicts = [NO_LAYOUT, UNREAD, WRONG, RIGHT]
    parts = kk.usable(["?"] * 4, ["."] * 4, verdict=verdicts)
    assert parts == [0.0, 0.0, 1.0, 1.0]
    total = [
        v.formatted + 0.5 * part + 2.5 * v.correct - 2
        for v, part in zip(verdicts, parts, strict=True)
    ]
    assert total == [-2.0, -1.0, -0.5, 2.0]


@pytest.mark.parametrize(
    ("text", "verdict", "expected"),
    [
        (r"so 4 </think> <answer> \boxed{4} </answer>", RIGHT, 2.0),
        (r"so 5 </think> <answer> \boxed{5} </answer>", WRONG, -0.5),
        ("so 4 </think> <answer> 4 </answer>", RIGHT, -1.0),
        (r" </think> <answer> \boxed{4} </answer>", RIGHT, -2.0),
        (r"so </think> <answer> </answer>", NO_LAYOUT, -2.0),
        (r"so </think> then <answer> \boxed{4} </answer>", RIGHT, -2.0),
        (r"so </think> <answer> \boxed{4} </answer> so", RIGHT, -2.0),
        (r"a </think> b </think> <answer> \boxed{4} </answer>", RIGHT, -2.0),
        (r"\boxed{4}", RIGHT, -2.0),
    ],
)
def test_levels_of_mathematics(text, verdict, expected):
    assert kk.math_rule(["?"], [text], verdict=[verdict]) == [expected]


def test_right_aloud_is_about_completions_that_think():
    thinks = "<think> so </think> <answer> 4 </answer>"
    assert kk.right_aloud(GRAPHS[0], thinks, RIGHT, 8) == 1.0
    assert kk.right_aloud(GRAPHS[0], thinks, WRONG, 8) == 0.0
    assert kk.right_aloud(GRAPHS[0], "<think> </think> <answer> 4 </answer>", RIGHT, 7) is None


def record(*values: float) -> dict:
    return {"train": {"right": list(values)}}


def test_steps_to_reach_what_another_ends_with():
    records = {"a": record(*[0.0] * 5, *[0.5] * 5), "b": record(*[0.25] * 4, *[0.5] * 6)}
    records["c"] = record(*[0.4] * 10)
    options = {"goal": "a", "series": "right"}
    assert kk.steps_to_reach(records, "a", **options) == 1.0
    assert kk.steps_to_reach(records, "b", **options) == 0.9  # steps 5 to 9
    assert kk.steps_to_reach(records, "c", **options) == 1.1  # never
    assert kk.steps_to_reach({**records, "a": record(*[0.2] * 10)}, "b", **options) == 0.5


def test_change_is_counted_from_the_stage_before():
    accuracy = {"base": 0.3, "warm": 0.5, "base_rl": 0.1, "warm_rl": 0.45}
    records = {name: {"sets": {"other": {"accuracy": a}}} for name, a in accuracy.items()}
    since = {"base_rl": "base", "warm_rl": "warm"}
    assert kk.change(records, "base_rl", since=since, name="other") == pytest.approx(-0.2)
    assert kk.change(records, "warm_rl", since=since, name="other") == pytest.approx(-0.05)
