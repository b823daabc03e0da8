"""The logic of knights and knaves against brute force, and the split of its puzzles."""

import itertools
import random
from collections import Counter

import pytest

from jaxrl_reason.tasks import KnightsKnaves
from jaxrl_reason.tasks import knights_knaves as kk
from jaxrl_reason.tasks import knights_knaves_logic as logic

TASK = KnightsKnaves(max_people=8)
ROLES = ("knight", "knave")


def puzzle_of(problem):
    return kk._as_tuples(problem.columns["statements"])


def relabelled(puzzle, permutation):
    """The same puzzle with person i renamed to permutation[i]."""

    def rename(statement):
        if statement[0] in ROLES:
            return (statement[0], permutation[statement[1]])
        return (statement[0], *map(rename, statement[1:]))

    renamed = dict(zip(permutation, map(rename, puzzle), strict=True))
    return tuple(renamed[person] for person in range(len(puzzle)))


def identity(puzzle):
    """The smallest of all renumberings of a puzzle."""
    return min(relabelled(puzzle, order) for order in itertools.permutations(range(len(puzzle))))


def test_counts_of_the_grammar():
    """Counts of statements and of puzzles with one solution that the literature notes give."""
    sizes = [len(logic.statements(people, 0)) for people in (2, 3, 8)]
    assert sizes == [30, 90, 870]
    assert all(len(set(logic.statements(4, speaker))) == 182 for speaker in range(4))
    for people, count in ((2, 399), (3, 304_276)):
        agree = [
            [logic.truth_table(s, people) ^ ~logic.truth_table(("knight", who), people)
             for s in logic.statements(people, who)]
            for who in range(people)
        ]  # fmt: skip
        full = (1 << (1 << people)) - 1
        tables = Counter({full: 1})
        for choices in agree:
            merged: Counter[int] = Counter()
            for table, ways in tables.items():
                for choice in choices:
                    merged[table & choice] += ways
            tables = merged
        assert sum(ways for table, ways in tables.items() if table.bit_count() == 1) == count


def test_drawn_statements_follow_the_grammar():
    rng = random.Random(0)
    draws = [logic.draw_statement(rng, 3, 1) for _ in range(20_000)]
    assert set(draws) == set(logic.statements(3, 1))
    forms = Counter("leaf" if draw[0] in ROLES else draw[0] for draw in draws)
    # One sixth each, with a standard deviation of 53.
    assert all(abs(count - 20_000 / 6) < 250 for count in forms.values())
    kept = sum(
        logic.unique_solution(tuple(logic.draw_statement(rng, 3, i) for i in range(3))) is not None
        for _ in range(5000)
    )
    # 0.37 according to the notes on the grammar; the standard deviation is 0.007.
    assert abs(kept / 5000 - 0.37) < 0.03


def test_truth_tables():
    # Assignments in order: nobody, person 0, person 1, both are knights.
    tables = {
        ("knight", 0): "0101",
        ("knave", 1): "1100",
        ("not", ("knight", 1)): "1100",
        ("and", ("knight", 0), ("knave", 1)): "0100",
        ("or", ("knight", 0), ("knave", 1)): "1101",
        ("implies", ("knight", 0), ("knight", 1)): "1011",
        ("iff", ("knight", 0), ("knight", 1)): "1001",
    }
    for statement, bits in tables.items():
        assert logic.truth_table(statement, 2) == int(bits[::-1], 2), statement


def test_orbit_key_ignores_the_numbering_and_little_else():
    rng = random.Random(1)
    for _ in range(100):
        puzzle = tuple(logic.draw_statement(rng, 4, speaker) for speaker in range(4))
        order = rng.sample(range(4), 4)
        assert logic.orbit_key(relabelled(puzzle, order)) == logic.orbit_key(puzzle)
    drawn = [tuple(logic.draw_statement(rng, 3, i) for i in range(3)) for _ in range(3000)]
    keys: dict[str, set] = {}
    for puzzle in drawn:
        keys.setdefault(logic.orbit_key(puzzle), set()).add(identity(puzzle))
    assert sum(len(found) > 1 for found in keys.values()) < 0.01 * len(keys)


def test_train_and_test_share_no_puzzle_in_any_numbering():
    train = {identity(puzzle_of(TASK.generate("train", index, 3))) for index in range(4000)}
    test = [identity(puzzle_of(TASK.generate("test", index, 3))) for index in range(1000)]
    assert len(set(test)) == 1000
    assert not train & set(test)
    other = KnightsKnaves(seed=5)
    more = {identity(puzzle_of(other.generate("train", index, 3))) for index in range(2000)}
    assert not more & set(test)


def test_two_people_are_a_fixed_list():
    halves = {
        split: [puzzle_of(TASK.generate(split, index, 2)) for index in range(count)]
        for split, count in (("train", 299), ("test", 100))
    }
    every = {
        (first, second)
        for first in logic.statements(2, 0)
        for second in logic.statements(2, 1)
        if logic.unique_solution((first, second))
    }
    assert len(every) == 399
    assert set(halves["train"]) | set(halves["test"]) == every
    mirrored = {identity(puzzle) for puzzle in halves["train"]}
    assert not mirrored & {identity(puzzle) for puzzle in halves["test"]}
    again = [puzzle_of(TASK.generate("test", index, 2)) for index in range(100, 200)]
    assert set(again) == set(halves["test"])
    assert again != halves["test"]
    mixed = KnightsKnaves(min_people=2, max_people=2)
    assert puzzle_of(mixed.generate("test", 0)) in set(halves["test"])
    assert puzzle_of(mixed.generate("train", 0)) in set(halves["train"])


@pytest.mark.parametrize("people", [2, 4, 6])
def test_search_is_sound(people):
    """Replays every step and tests each rejection by trying all completions."""
    for index in range(60):
        problem = TASK.generate("train", index, people)
        puzzle = puzzle_of(problem)
        steps, roles = logic.search(puzzle)
        assert [roles[person] for person in range(people)] == problem.columns["solution"]
        assert steps[-1].kind == "done"
        assigned: dict[int, bool] = {}
        for step in steps[:-1]:
            if step.kind == "back":
                assert list(assigned)[-1] == step.other
                del assigned[step.other]
                continue
            trial = assigned | {step.person: step.knight}
            blocked = [
                person
                for person in sorted(trial)
                if not any(
                    bool(logic.truth_table(puzzle[person], people) >> world & 1) == trial[person]
                    for world in range(1 << people)
                    if all(bool(world >> who & 1) == knight for who, knight in trial.items())
                )
            ]
            assert bool(blocked) == (step.kind == "reject")
            if blocked:
                assert (step.other, step.truthful) == (blocked[0], trial[blocked[0]])
            else:
                assigned = trial
        assert assigned == roles


def test_search_decides_mentioned_people_next():
    puzzle = (("knight", 3), ("knight", 0), ("knight", 0), ("knight", 0))
    steps, _ = logic.search(puzzle)
    assert [step.person for step in steps] == [0, 3, 1, 2, -1]
    with pytest.raises(ValueError, match="no solution"):
        logic.search((("knight", 1), ("knave", 0)))
