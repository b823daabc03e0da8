"""Knights and knaves against a reader of the English prompt that tries every assignment."""

import itertools
import random
import re

import pytest

from jaxrl_reason.errors import InputError
from jaxrl_reason.tasks import KnightsKnaves, Problem, constant_answer_accuracy
from jaxrl_reason.tasks import knights_knaves as kk
from jaxrl_reason.tasks import knights_knaves_text as wording
from jaxrl_reason.tasks.problem import write_completion

TASK = KnightsKnaves(max_people=8)
ROLES = ("knight", "knave")


def read_prompt(prompt: str, roles=ROLES) -> tuple[list[str], dict[str, str]]:
    """The people in the order of their introduction, and what each of them claims."""
    opening, rest = prompt.split(" inhabitants: ")
    listing, rest = rest.split(". ", 1)
    rest, _ = rest.split(" Who is a ")
    people = listing.replace(", and ", ", ").split(", ")
    assert opening.endswith(f" {len(people)}")
    leaf = rf"[A-Z]\w+ is (?:not )?a (?:{roles[0]}|{roles[1]})"
    pattern = rf"If {leaf} then {leaf}|{leaf}(?: (?:and|or|if and only if) {leaf})?"
    claims = re.findall(pattern, rest)
    carriers = re.sub(pattern, "...", rest)
    speakers = [word for word in re.findall(r"\w+", carriers) if word in people]
    return people, dict(zip(speakers, claims, strict=True))


def holds(claim: str, knights: set[str], roles=ROLES) -> bool:
    """Truth of an English claim."""

    def leaf(text):
        name, negated, role = re.fullmatch(r"(\w+) is (not )?a (\w+)", text).groups()
        return ((name in knights) == (role == roles[0])) != bool(negated)

    if claim.startswith("If "):
        first, second = claim[3:].split(" then ")
        return not leaf(first) or leaf(second)
    for joint, combine in (
        (" if and only if ", lambda a, b: a == b),
        (" and ", lambda a, b: a and b),
        (" or ", lambda a, b: a or b),
    ):
        if joint in claim:
            return combine(*map(leaf, claim.split(joint)))
    return leaf(claim)


def all_solutions(prompt: str, roles=ROLES) -> list[list[bool]]:
    people, claims = read_prompt(prompt, roles)
    found = []
    for values in itertools.product((False, True), repeat=len(people)):
        knights = {name for name, knight in zip(people, values, strict=True) if knight}
        if all(holds(claims[name], knights, roles) == (name in knights) for name in people):
            found.append(list(values))
    return found


def puzzle_of(problem):
    return kk._as_tuples(problem.columns["statements"])


def write(puzzle, names=("Anna", "Ben", "Clara")) -> Problem:
    columns = kk._columns(random.Random(0), puzzle, "train")
    return kk._problem(columns | {"people": list(names[: len(puzzle)])})


@pytest.mark.parametrize("people", range(2, 9))
def test_the_prompt_has_exactly_the_stated_solution(people):
    for index in range(60 if people < 6 else 15):
        problem = TASK.generate("train", index, people)
        assert all_solutions(problem.prompt) == [problem.columns["solution"]]


def test_wording():
    names = ("Anna", "Ben")
    leaf, other = ("knight", 0), ("knave", 1)
    phrases = {
        leaf: "Anna is a knight",
        ("not", other): "Ben is not a knave",
        ("and", leaf, other): "Anna is a knight and Ben is a knave",
        ("or", leaf, other): "Anna is a knight or Ben is a knave",
        ("implies", leaf, other): "If Anna is a knight then Ben is a knave",
        ("iff", leaf, other): "Anna is a knight if and only if Ben is a knave",
    }
    for statement, text in phrases.items():
        assert wording.phrase(statement, names, ROLES) == text
    assert len(set(wording.CARRIERS)) == 18
    used = {
        carrier
        for index in range(200)
        for carrier in TASK.generate("train", index, 3).columns["carriers"]
    }
    assert used == set(range(18))
    common, uncommon = set(wording.COMMON_NAMES), set(wording.UNCOMMON_NAMES)
    assert (len(common), len(uncommon), len(common & uncommon)) == (51, 50, 0)
    assert len(wording.ROLE_PAIRS) == 7


def test_search_without_back_tracking():
    problem = write((("knave", 1), ("and", ("knight", 0), ("knight", 1))))
    assert TASK.trace(problem, "long") == (
        "<think> Assume Anna is a knight: no contradiction in Anna's claim Ben is a knave.\n"
        "Ben cannot be a knight: contradiction in Anna's claim Ben is a knave.\n"
        "Assume Ben is a knave: no contradiction in Ben's false claim "
        "Anna is a knight and Ben is a knight.\n"
        "This assignment is feasible. </think> "
        "<answer> (1) Anna is a knight\n(2) Ben is a knave </answer>"
    )


def test_search_with_back_tracking():
    problem = write((("and", ("knave", 1), ("knight", 2)), ("knave", 0), ("knave", 0)))
    about = "claim Ben is a knave and Clara is a knight."
    assert TASK.trace(problem, "long") == (
        f"<think> Assume Anna is a knight: no contradiction in Anna's {about}\n"
        f"Ben cannot be a knight: contradiction in Anna's {about}\n"
        "Assume Ben is a knave: no contradiction in Ben's false claim Anna is a knave.\n"
        "Clara cannot be a knight: contradiction in Clara's claim Anna is a knave.\n"
        f"Clara cannot be a knave: contradiction in Anna's {about}\n"
        "Options for Clara are used up: return to Ben and reset Clara.\n"
        "Options for Ben are used up: return to Anna and reset Ben.\n"
        f"Assume Anna is a knave: no contradiction in Anna's false {about}\n"
        "Assume Ben is a knight: no contradiction in Ben's claim Anna is a knave.\n"
        "Assume Clara is a knight: no contradiction in Clara's claim Anna is a knave.\n"
        "This assignment is feasible. </think> <answer> (1) Anna is a knave\n"
        "(2) Ben is a knight\n(3) Clara is a knight </answer>"
    )
    assert TASK.trace(problem, "short") == (
        "<think> Anna is a knave and claims Ben is a knave and Clara is a knight: false.\n"
        "Ben is a knight and claims Anna is a knave: true.\n"
        "Clara is a knight and claims Anna is a knave: true. </think> <answer> (1) Anna is a knave"
        "\n(2) Ben is a knight\n(3) Clara is a knight </answer>"
    )


def test_answers_are_read_leniently_but_completely():
    problem = write((("knave", 1), ("and", ("knight", 0), ("knight", 1))))

    def verdict(answer):
        return TASK.verify(problem, write_completion("", answer))

    assert verdict("(1) Anna is a knight\n(2) Ben is a knave").correct
    assert verdict("( 1 ) Anna is a knight ( 2 ) Ben is a knave").correct
    assert verdict("ben is a KNAVE, anna is  a Knight").correct
    wrong = verdict("(1) Anna is a knave (2) Ben is a knave")
    assert (wrong.correct, wrong.formatted) == (False, True)
    assert wrong.answer is not None
    assert wrong.reason == "wrong about Anna"
    for unusable in (
        "(1) Anna is a knight",
        "(1) Anna is a knight (2) Clara is a knave",
        "(1) Anna is a knight (2) Ben is a liar",
        "(1) Anna is a knight (2) Ben is a knave (3) Clara is a knave",
        "(1) Anna is a knight (2) Ben is a knave or a knight",
        "(1) Joanna is a knight (2) Ben is a knave",
    ):
        verdict_ = verdict(unusable)
        assert (verdict_.formatted, verdict_.correct, verdict_.answer) == (True, False, None)


@pytest.mark.parametrize("kind", ["statement", "leaf"])
def test_perturbed_puzzles_have_another_unique_solution(kind):
    skipped = 0
    for index in range(60):
        problem = TASK.generate("test", index, 4)
        try:
            changed = TASK.perturb(problem, kind)
        except InputError:
            skipped += 1
            continue
        assert changed == TASK.perturb(problem, kind)
        solution = changed.columns["solution"]
        assert all_solutions(changed.prompt) == [solution]
        assert solution != problem.columns["solution"]
        pairs = list(zip(puzzle_of(problem), puzzle_of(changed), strict=True))
        different = [(old, new) for old, new in pairs if old != new]
        assert len(different) == 1
        if kind == "leaf":
            (old, new) = different[0]
            if old[0] not in ROLES:
                assert old[0] == new[0]
                assert sum(a != b for a, b in zip(old[1:], new[1:], strict=True)) == 1
        assert TASK.verify(changed, TASK.trace(changed, "long")).correct
        assert not TASK.verify(changed, TASK.trace(problem, "long")).correct
        assert changed.columns["split"] == TASK.split_of(puzzle_of(changed))
    assert skipped < 10


def test_rewordings_keep_the_puzzle():
    for index in range(30):
        problem = TASK.generate("test", index, 3)
        for kind in ("uncommon_names", "roles", "order", "swapped_roles"):
            changed = TASK.perturb(problem, kind)
            roles = changed.columns["roles"]
            assert puzzle_of(changed) == puzzle_of(problem)
            assert all_solutions(changed.prompt, roles) == [problem.columns["solution"]]
            assert TASK.verify(changed, TASK.trace(changed, "long")).correct
            assert changed.prompt != problem.prompt
            people, claims = read_prompt(changed.prompt, roles)
            assert set(people) == set(claims)
            if kind == "uncommon_names":
                assert set(people) <= set(wording.UNCOMMON_NAMES)
            elif kind == "roles":
                assert not set(roles) & set(ROLES)
            elif kind == "order":
                assert list(claims) != people
            else:
                assert roles == ["knave", "knight"]
                assert "only by knaves, who always tell the truth" in changed.prompt
                assert not TASK.verify(changed, TASK.trace(problem, "answer")).correct
    with pytest.raises(InputError, match="did you mean 'leaf'"):
        TASK.perturb(problem, "leef")


def test_constant_answers():
    # "Everyone is a knight" is 16 % of puzzles with three people.
    assert 0.10 < constant_answer_accuracy(KnightsKnaves(max_people=3), 600) < 0.22


def test_a_known_problem():
    """A stream written down once: it must not change from release to release."""
    assert KnightsKnaves().generate("train", 1, 3).prompt == (
        "An island is inhabited only by knights, who always tell the truth, and knaves, who always "
        'lie. You meet 3 inhabitants: Henry, Grace, and Irene. Henry said, "Grace is a knight if '
        'and only if Henry is a knight." "Henry is a knight," Grace mentioned. In a statement by '
        'Irene: "Grace is not a knave". Who is a knight and who is a knave?'
    )
