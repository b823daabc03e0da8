"""Statements of knights and knaves: grammar, truth tables, unique solutions and a search.

Statement grammar and search order follow Xie et al., arXiv 2410.23123. A statement about n people
is a nested tuple: a leaf `("knight", j)` or `("knave", j)`, `("not", leaf)`, or one of "and", "or",
"implies", "iff" over two different leaves. Its truth table is one integer: bit m is its value
under assignment m, in which person j is a knight when bit j of m is set.
"""

import functools
import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

Statement = tuple[Any, ...]
Puzzle = tuple[Statement, ...]

BINARY = ("and", "or", "implies", "iff")
_FORMS = ("leaf", "not", *BINARY)
_TWO_PEOPLE_TEST = 100  # held-out puzzles among the 399 with two people


def leaves(people: int, speaker: int) -> tuple[Statement, ...]:
    """Every leaf a speaker may use; nobody says of themselves that they are a knave."""
    knights = tuple(("knight", person) for person in range(people))
    return knights + tuple(("knave", person) for person in range(people) if person != speaker)


@functools.lru_cache(maxsize=64)
def statements(people: int, speaker: int) -> tuple[Statement, ...]:
    """Every statement a speaker can make: 30 with two people, 90 with three."""
    atoms = leaves(people, speaker)
    pairs = [(first, second) for first in atoms for second in atoms if first != second]
    negations = tuple(("not", leaf) for leaf in atoms)
    return atoms + negations + tuple((form, *pair) for form in BINARY for pair in pairs)


def draw_leaf(rng: random.Random, people: int, speaker: int) -> Statement:
    """A uniform role of a uniform person; `speaker is a knave` is drawn again."""
    while True:
        leaf = (rng.choice(("knight", "knave")), rng.randrange(people))
        if leaf != ("knave", speaker):
            return leaf


def draw_statement(rng: random.Random, people: int, speaker: int) -> Statement:
    """One of the six forms with equal probability, filled with random leaves."""
    form = rng.choice(_FORMS)
    first = draw_leaf(rng, people, speaker)
    if form == "leaf":
        return first
    if form == "not":
        return ("not", first)
    second = first
    while second == first:
        second = draw_leaf(rng, people, speaker)
    return (form, first, second)


def mentioned(statement: Statement) -> tuple[int, ...]:
    """People named in a statement, in order of mention, with repeats."""
    if statement[0] in ("knight", "knave"):
        return (statement[1],)
    return tuple(leaf[1] for leaf in statement[1:])


@functools.lru_cache(maxsize=16384)
def truth_table(statement: Statement, people: int) -> int:
    """Truth table of a statement as the bits of an integer."""
    full = (1 << (1 << people)) - 1
    if statement[0] in ("knight", "knave"):
        # Bits m with bit j set: blocks of 2^j ones that begin every 2^(j+1) bits.
        block = 1 << statement[1]
        knight = full // ((1 << 2 * block) - 1) * (((1 << block) - 1) << block)
        return knight if statement[0] == "knight" else full ^ knight
    operands = [truth_table(leaf, people) for leaf in statement[1:]]
    if statement[0] == "not":
        return full ^ operands[0]
    first, second = operands
    if statement[0] == "and":
        return first & second
    if statement[0] == "or":
        return first | second
    if statement[0] == "implies":
        return (full ^ first) | second
    return full ^ first ^ second


def consistent(puzzle: Puzzle) -> int:
    """The assignments under which each person is a knight exactly when their statement is true."""
    people = len(puzzle)
    full = remaining = (1 << (1 << people)) - 1
    for person, statement in enumerate(puzzle):
        remaining &= full ^ truth_table(("knight", person), people) ^ truth_table(statement, people)
    return remaining


def unique_solution(puzzle: Puzzle) -> tuple[bool, ...] | None:
    """Who is a knight, when exactly one assignment is consistent; else None."""
    remaining = consistent(puzzle)
    if remaining == 0 or remaining & (remaining - 1):
        return None
    assignment = remaining.bit_length() - 1
    return tuple(bool(assignment >> person & 1) for person in range(len(puzzle)))


def orbit_key(puzzle: Puzzle) -> str:
    """A digest that does not depend on the numbering of the people.

    Two puzzles that differ only in the order of their people always agree (the converse nearly
    always holds), so a split by this key cannot put mirror images into both halves.
    """
    colours = [""] * len(puzzle)
    for _ in range(min(len(puzzle), 3)):
        colours = [
            _digest(_coloured(statement, speaker, colours))
            for speaker, statement in enumerate(puzzle)
        ]
    return " ".join(sorted(colours))


def _coloured(statement: Statement, speaker: int, colours: Sequence[str]) -> str:
    if statement[0] in ("knight", "knave"):
        person = statement[1]
        return statement[0] + (":self" if person == speaker else f":{colours[person]}")
    parts = [_coloured(leaf, speaker, colours) for leaf in statement[1:]]
    # A pair of leaves about one person differs from the same pair about two people.
    same = "same" if len(set(mentioned(statement))) == 1 else "different"
    return f"{statement[0]}({' '.join(parts)}){same}"


def _digest(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


@functools.cache
def two_people_puzzles() -> dict[str, tuple[Puzzle, ...]]:
    """All 399 puzzles with two people and one solution, as a fixed train (299) and test (100)."""
    orbits: dict[str, list[Puzzle]] = {}
    for first in statements(2, 0):
        for second in statements(2, 1):
            if unique_solution((first, second)) is not None:
                orbits.setdefault(orbit_key((first, second)), []).append((first, second))
    halves: dict[str, list[Puzzle]] = {"train": [], "test": []}
    for _, orbit in sorted(orbits.items()):
        fits = len(halves["test"]) + len(orbit) <= _TWO_PEOPLE_TEST
        halves["test" if fits else "train"].extend(orbit)
    return {split: tuple(puzzles) for split, puzzles in halves.items()}


@dataclass(frozen=True, kw_only=True)
class Step:
    """One line of a search.

    Attributes:
        kind: "accept" or "reject" a role, "back" up from a person, or "done".
        person: who is being decided; -1 when done.
        knight: the role tried ("accept", "reject").
        other: whose statement conflicts ("reject"), or to whom the search returns ("back").
        truthful: whether the statement in question (of `person` when accepting, of `other` when
            rejecting) would have to be true.
    """

    kind: Literal["accept", "reject", "back", "done"]
    person: int = -1
    knight: bool = False
    other: int = -1
    truthful: bool = False


def search(puzzle: Puzzle) -> tuple[list[Step], dict[int, bool]]:
    """Depth-first search: its steps and the assignment (person to is-a-knight) it ends with.

    Knight is tried before knave. A role is rejected when some assigned person's statement cannot
    take the truth value it must have, whoever the unassigned people are (tested person by person).
    After an accepted role the people named in that statement are decided next.

    Raises:
        ValueError: when the puzzle has no solution.
    """
    people = len(puzzle)
    order = list(range(people))
    options = {person: [True, False] for person in order}
    roles: dict[int, bool] = {}
    steps: list[Step] = []
    depth = 0
    while depth < people:
        person = order[depth]
        if not options[person]:
            if depth == 0:
                raise ValueError(f"the puzzle {puzzle} has no solution")
            depth -= 1
            options[person] = [True, False]
            del roles[order[depth]]
            steps.append(Step(kind="back", person=person, other=order[depth]))
            continue
        roles[person] = options[person].pop(0)
        conflict = _conflict(puzzle, roles)
        knight = roles[person]
        if conflict is not None:
            about = {"other": conflict, "truthful": roles[conflict]}
            steps.append(Step(kind="reject", person=person, knight=knight, **about))
            del roles[person]
            continue
        steps.append(Step(kind="accept", person=person, knight=knight, truthful=knight))
        depth += 1
        named = mentioned(puzzle[person])
        order[depth:] = sorted(order[depth:], key=lambda other: other not in named)
    return [*steps, Step(kind="done")], roles


def _conflict(puzzle: Puzzle, roles: dict[int, bool]) -> int | None:
    """The first assigned person whose statement cannot have the truth value it must have."""
    people = len(puzzle)
    possible = (1 << (1 << people)) - 1
    for person, knight in roles.items():
        possible &= truth_table(("knight" if knight else "knave", person), people)
    for person in sorted(roles):
        table = truth_table(puzzle[person], people)
        agrees = possible & table if roles[person] else possible & ~table
        if not agrees:
            return person
    return None
