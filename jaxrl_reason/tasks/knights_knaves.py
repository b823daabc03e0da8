"""Knights and knaves: who tells the truth, given what everybody says about everybody.

Puzzles, wording and search traces after Xie et al., arXiv 2410.23123; the format and the parsing
of answers after Logic-RL, arXiv 2502.14768. Difficulty is the number of people. Only puzzles with
exactly one solution are kept.
"""

import functools
import random
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from jaxrl_reason.errors import InputError, nearest
from jaxrl_reason.tasks import knights_knaves_logic as logic
from jaxrl_reason.tasks import knights_knaves_text as wording
from jaxrl_reason.tasks import problem as shared
from jaxrl_reason.tasks.problem import Problem, Split, Style, Verdict

Perturbation = Literal["statement", "leaf", "uncommon_names", "roles", "order", "swapped_roles"]


@dataclass(frozen=True, kw_only=True)
class KnightsKnaves:
    """Options of the task."""

    seed: int = 0
    """Seed of the streams of problems; the split of a problem does not depend on it."""
    min_people: int = 3
    """Fewest people when difficulties are mixed."""
    max_people: int = 5
    """Most people when difficulties are mixed."""
    test_fraction: float = 0.1
    """Share of all puzzles that is held out; with two people it is always 100 of the 399."""

    name = "knights_knaves"

    def __post_init__(self) -> None:
        """Check ranges."""
        shared.check_whole("seed", self.seed, low=0, high=2**63 - 1)
        shared.check_whole("min_people", self.min_people, low=2, high=wording.MAX_PEOPLE)
        shared.check_whole(
            "max_people", self.max_people, low=self.min_people, high=wording.MAX_PEOPLE
        )
        shared.check_rate("test_fraction", self.test_fraction, low=0.001, high=0.9)

    def difficulties(self) -> tuple[int, ...]:
        """Numbers of people that are mixed."""
        return tuple(range(self.min_people, self.max_people + 1))

    def words(self) -> tuple[str, ...]:
        """Words of the sentences, all names and role words, and numbers up to eight."""
        numbers = " ".join(str(number) for number in range(1, wording.MAX_PEOPLE + 1))
        names = (*wording.COMMON_NAMES, *wording.UNCOMMON_NAMES)
        return shared.split_words((*wording.templates(), *names, numbers))

    def generate(self, split: Split, index: int, difficulty: int | None = None) -> Problem:
        """Puzzle `index` of a split with `difficulty` people (2 to 8).

        With two people the split is a fixed list, walked in an order that depends on the seed;
        past its end it starts again in another order.
        """
        if difficulty is not None:
            shared.check_whole("difficulty", difficulty, low=2, high=wording.MAX_PEOPLE)
        if difficulty == 2:
            shared.check_place(split, index)
            puzzles = _two_people_order(self.seed, split, index)
            rng = random.Random(f"{self.name}|{self.seed}|{split}|{index}|two")
            return _problem(_columns(rng, puzzles[index % len(puzzles)], split))
        return _problem(shared.draw(self, split, index, difficulty))

    def propose(self, rng: random.Random, difficulty: int) -> shared.Candidate | None:
        """Draw a puzzle; its canonical form does not depend on the order of the people."""
        puzzle = tuple(
            logic.draw_statement(rng, difficulty, speaker) for speaker in range(difficulty)
        )
        if logic.unique_solution(puzzle) is None:
            return None
        split = self.split_of(puzzle)
        canonical = f"{difficulty} {logic.orbit_key(puzzle)}"
        content = _columns(rng, puzzle, split)
        return shared.Candidate(canonical=canonical, split=split, content=content)

    def split_of(self, puzzle: logic.Puzzle) -> Split:
        """Which split a puzzle with one solution belongs to."""
        if len(puzzle) == 2:
            return "test" if puzzle in logic.two_people_puzzles()["test"] else "train"
        canonical = f"{len(puzzle)} {logic.orbit_key(puzzle)}"
        return shared.hash_split(self.name, canonical, self.test_fraction)

    def trace(self, problem: Problem, style: Style) -> str:
        """A correct completion; `long` is a depth-first search with its dead ends."""
        shared.check_style(style)
        puzzle = _puzzle(problem.columns)
        if style == "long":
            steps, _ = logic.search(puzzle)
            thought = wording.write_search(problem.columns, puzzle, steps)
        else:
            thought = wording.write_check(problem.columns, puzzle) if style == "short" else ""
        return shared.write_completion(thought, problem.answer)

    def verify(self, problem: Problem, text: str) -> Verdict:
        """Correct when every person's role is right.

        The answer can be used when it names as many roles as there are people and says of each
        person `Name is a role` (case is ignored).
        """
        read = shared.read_completion(text)
        if read.answer is None:
            return Verdict(correct=False, formatted=False, answer=None, reason=read.reason)
        truthful, lying = problem.columns["roles"]
        roles = f"({truthful}|{lying})"
        found = {}
        for name in problem.columns["people"]:
            match = re.search(rf"\b{name}\s+is\s+a\s+{roles}\b", read.answer, re.IGNORECASE)
            if match is None:
                reason = f"unusable: no role for {name}"
                return Verdict(correct=False, formatted=True, answer=None, reason=reason)
            found[name] = match.group(1).lower() == truthful
        named = len(re.findall(rf"\b{roles}\b", read.answer, re.IGNORECASE))
        if named != len(found):
            reason = f"unusable: {named} roles for {len(found)} people"
            return Verdict(correct=False, formatted=True, answer=None, reason=reason)
        truth = zip(problem.columns["people"], problem.columns["solution"], strict=True)
        wrong = [name for name, knight in truth if found[name] != knight]
        reason = f"wrong about {', '.join(wrong)}" if wrong else "right"
        return Verdict(correct=not wrong, formatted=True, answer=read.answer, reason=reason)

    def perturb(self, problem: Problem, kind: Perturbation) -> Problem:
        """A changed copy of a problem: another puzzle, or the same puzzle in other words.

        "statement" and "leaf" replace one whole statement or one leaf so that the solution is
        again unique, but different; a result of the same split is preferred, and
        `columns["split"]` says which split it belongs to. "uncommon_names", "roles" (another pair
        of role words), "order" (of the statements) and "swapped_roles" (knights lie) keep the
        puzzle. Deterministic in (seed, problem, kind).

        Raises:
            InputError: for an unknown kind, or when no such change of this puzzle exists.
        """
        if kind not in get_args(Perturbation):
            hint = nearest(kind, get_args(Perturbation))
            raise InputError(f"perturbation {kind!r} is unknown; {hint}")
        rng = random.Random(f"{kind}|{self.seed}|{problem.prompt}")
        columns = dict(problem.columns)
        people = len(columns["people"])
        if kind in ("statement", "leaf"):
            puzzle = self._changed(rng, _puzzle(columns), kind, columns["split"])
            columns |= _facts(puzzle, self.split_of(puzzle))
        elif kind == "uncommon_names":
            columns["people"] = rng.sample(wording.UNCOMMON_NAMES, people)
        elif kind == "roles":
            columns["roles"] = list(rng.choice(wording.ROLE_PAIRS[1:]))
        elif kind == "swapped_roles":
            columns["roles"] = columns["roles"][::-1]
        else:
            while columns["order"] == problem.columns["order"]:
                columns["order"] = rng.sample(range(people), people)
        return _problem(columns)

    def _changed(
        self, rng: random.Random, puzzle: logic.Puzzle, kind: str, split: Split
    ) -> logic.Puzzle:
        solution = logic.unique_solution(puzzle)
        elsewhere = None
        changes = list(_replacements(puzzle, kind))
        rng.shuffle(changes)
        for speaker, statement in changes:
            changed = (*puzzle[:speaker], statement, *puzzle[speaker + 1 :])
            if logic.unique_solution(changed) in (None, solution):
                continue
            if self.split_of(changed) == split:
                return changed
            elsewhere = elsewhere or changed
        if elsewhere is None:
            raise InputError(f"no other {kind} gives this puzzle another unique solution; skip it")
        return elsewhere


def _replacements(puzzle: logic.Puzzle, kind: str) -> Iterator[tuple[int, logic.Statement]]:
    """Every other statement of every speaker, or every statement with one other leaf."""
    for speaker, statement in enumerate(puzzle):
        if kind == "statement":
            choices = logic.statements(len(puzzle), speaker)
            yield from ((speaker, choice) for choice in choices if choice != statement)
            continue
        atoms = logic.leaves(len(puzzle), speaker)
        if statement[0] in ("knight", "knave"):
            yield from ((speaker, leaf) for leaf in atoms if leaf != statement)
            continue
        for place in range(1, len(statement)):
            for leaf in atoms:
                if leaf not in statement[1:]:
                    yield speaker, (*statement[:place], leaf, *statement[place + 1 :])


@functools.lru_cache(maxsize=64)
def _shuffled(seed: int, split: Split, epoch: int) -> tuple[logic.Puzzle, ...]:
    puzzles = list(logic.two_people_puzzles()[split])
    random.Random(f"two people|{seed}|{split}|{epoch}").shuffle(puzzles)
    return tuple(puzzles)


def _two_people_order(seed: int, split: Split, index: int) -> tuple[logic.Puzzle, ...]:
    return _shuffled(seed, split, index // len(logic.two_people_puzzles()[split]))


def _facts(puzzle: logic.Puzzle, split: Split) -> dict[str, Any]:
    solution = logic.unique_solution(puzzle)
    assert solution is not None
    return {
        "statements": _as_lists(puzzle),
        "solution": list(solution),
        "answer_class": "".join("K" if knight else "N" for knight in solution),
        "split": split,
    }


def _columns(rng: random.Random, puzzle: logic.Puzzle, split: Split) -> dict[str, Any]:
    people = len(puzzle)
    return {
        "difficulty": people,
        "people": rng.sample(wording.COMMON_NAMES, people),
        "roles": list(wording.ROLE_PAIRS[0]),
        "carriers": [rng.randrange(len(wording.CARRIERS)) for _ in range(people)],
        "order": list(range(people)),
        **_facts(puzzle, split),
    }


def _problem(columns: Mapping[str, Any]) -> Problem:
    puzzle = _puzzle(columns)
    answer = wording.write_answer(columns["people"], columns["roles"], columns["solution"])
    prompt = wording.write_prompt(columns, puzzle)
    return Problem(prompt=prompt, answer=answer, columns=dict(columns))


def _as_lists(value: Any) -> Any:
    return [_as_lists(part) for part in value] if isinstance(value, tuple) else value


def _as_tuples(value: Any) -> Any:
    return tuple(_as_tuples(part) for part in value) if isinstance(value, list | tuple) else value


def _puzzle(columns: Mapping[str, Any]) -> logic.Puzzle:
    return _as_tuples(columns["statements"])
