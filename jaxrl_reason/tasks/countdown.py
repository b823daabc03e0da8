"""Countdown: make a target from given numbers with + - * / and exact division.

Problems are built from a solution, so each can be solved. Difficulty is how many numbers are
given. Every value on the way is a positive whole number of at most `max_value`, which keeps the
vocabulary closed; a verified answer may pass through other whole numbers.
"""

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from jaxrl_reason.errors import InputError
from jaxrl_reason.tasks import problem as shared
from jaxrl_reason.tasks.expressions import ExpressionError, evaluate
from jaxrl_reason.tasks.problem import Problem, Split, Style, Verdict

_MAX_NUMBERS = 6
# A move: larger value, sign, smaller value. A pool is a sorted tuple of values.
_Move = tuple[int, str, int]
_Pool = tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Countdown:
    """Options of the task; every number in a text is a single word 1..max_value."""

    seed: int = 0
    """Seed of the streams of problems; the split of a problem does not depend on it."""
    min_numbers: int = 3
    """Fewest numbers when difficulties are mixed."""
    max_numbers: int = 4
    """Most numbers when difficulties are mixed."""
    largest: int = 20
    """Largest given number."""
    min_target: int = 10
    """Smallest target."""
    max_target: int = 99
    """Largest target."""
    max_value: int = 200
    """Largest value on the way in solutions and traces."""
    use_all: bool = False
    """Whether each number must be used exactly once instead of at most once."""
    search_width: int = 2
    """How many moves a long trace considers in each state."""
    test_fraction: float = 0.1
    """Share of all problems that is held out."""

    name = "countdown"

    def __post_init__(self) -> None:
        """Check ranges."""
        shared.check_whole("seed", self.seed, low=0, high=2**63 - 1)
        shared.check_whole("min_numbers", self.min_numbers, low=2, high=_MAX_NUMBERS)
        shared.check_whole("max_numbers", self.max_numbers, low=self.min_numbers, high=_MAX_NUMBERS)
        shared.check_whole("max_value", self.max_value, low=4, high=10_000)
        shared.check_whole("largest", self.largest, low=2, high=self.max_value)
        shared.check_whole("max_target", self.max_target, low=2, high=self.max_value)
        shared.check_whole("min_target", self.min_target, low=1, high=self.max_target)
        shared.check_whole("search_width", self.search_width, low=2, high=10)
        shared.check_rate("test_fraction", self.test_fraction, low=0.001, high=0.9)
        if not isinstance(self.use_all, bool):
            raise InputError(f"use_all={self.use_all!r} must be true or false")

    def difficulties(self) -> tuple[int, ...]:
        """How many numbers, mixed."""
        return tuple(range(self.min_numbers, self.max_numbers + 1))

    def words(self) -> tuple[str, ...]:
        """Numbers, signs and the words of prompts and traces."""
        numbers = tuple(str(value) for value in range(1, self.max_value + 1))
        text = "Make from using each number at most exactly once . left yes no back to"
        return (*numbers, *"+-*/()=;", *text.split())

    def generate(self, split: Split, index: int, difficulty: int | None = None) -> Problem:
        """Problem `index` of a split with `difficulty` numbers (2 to 6)."""
        if difficulty is not None:
            shared.check_whole("difficulty", difficulty, low=2, high=_MAX_NUMBERS)
        numbers, target, solution = shared.draw(self, split, index, difficulty)
        answer = _expression(numbers, solution)
        columns = {
            "difficulty": len(numbers),
            "answer_class": answer,
            "numbers": list(numbers),
            "target": target,
            "use_all": self.use_all,
            "solution": [list(move) for move in solution],
        }
        listing = " ".join(str(number) for number in numbers)
        how_often = "exactly" if self.use_all else "at most"
        prompt = f"Make {target} from {listing} using each number {how_often} once ."
        return Problem(prompt=prompt, answer=answer, columns=columns)

    def propose(self, rng: random.Random, difficulty: int) -> shared.Candidate | None:
        """Draw numbers and combine them at random; the canonical form ignores their order."""
        numbers = tuple(rng.randint(1, self.largest) for _ in range(difficulty))
        pool: _Pool = tuple(sorted(numbers))
        solution: list[_Move] = []
        while len(pool) > 1:
            first, second = sorted(rng.sample(range(len(pool)), 2))
            moves = _moves_of(pool[second], pool[first], self.max_value)
            if not moves:
                return None
            move = rng.choice(moves)
            solution.append(move)
            pool = _after(pool, move)
        target = _result(solution[-1])
        on_the_way = [_result(move) for move in solution[:-1]]
        if not self.min_target <= target <= self.max_target or target in (*numbers, *on_the_way):
            return None
        canonical = f"{sorted(numbers)} {target}"
        split = shared.hash_split(self.name, canonical, self.test_fraction)
        content = (numbers, target, solution)
        return shared.Candidate(canonical=canonical, split=split, content=content)

    def trace(self, problem: Problem, style: Style) -> str:
        """A correct completion; `long` is a depth-first search with its dead ends.

        The search considers the `search_width` moves of a state whose results are nearest to the
        target. Among them is always the next move of the known solution, as long as the search
        is on its path, so a trace is short and always ends at the target.
        """
        shared.check_style(style)
        facts = problem.columns
        solution = [tuple(move) for move in facts["solution"]]
        if style == "answer":
            return shared.write_completion("", problem.answer)
        if style == "short":
            thought = " ".join(f"{_line(move)} ;" for move in solution)
            return shared.write_completion(thought, problem.answer)
        lines: list[str] = []
        found = self._explore(tuple(sorted(facts["numbers"])), solution, facts["target"], lines)
        assert found is not None
        return shared.write_completion(" ".join(lines), _expression(facts["numbers"], found))

    def _explore(
        self, pool: _Pool, path: Sequence[_Move], target: int, lines: list[str]
    ) -> list[_Move] | None:
        """Search below a state; `path` is what is left of the known solution, empty when off it."""
        moves = sorted(
            _moves(pool, self.max_value), key=lambda move: (abs(_result(move) - target), move)
        )
        best = moves[: self.search_width]
        if path and path[0] not in best:
            best[-1] = path[0]
        for move in best:
            rest = _after(pool, move)
            if _result(move) == target and (not self.use_all or len(rest) == 1):
                lines.append(f"{_line(move)} yes ;")
                return [move]
            if len(rest) == 1:
                lines.append(f"{_line(move)} no ;")
                continue
            lines.append(f"{_line(move)} left {_listing(rest)} ;")
            onward = path[1:] if path and move == path[0] else ()
            found = self._explore(rest, onward, target, lines)
            if found is not None:
                return [move, *found]
            lines.append(f"back to {_listing(pool)} ;")
        return None

    def verify(self, problem: Problem, text: str) -> Verdict:
        """Correct when the answer is an expression over the given numbers that hits the target."""
        read = shared.read_completion(text)
        if read.answer is None:
            return Verdict(correct=False, formatted=False, answer=None, reason=read.reason)
        try:
            value, used = evaluate(read.answer)
        except ExpressionError as error:
            reason = f"unusable: {error}"
            return Verdict(correct=False, formatted=True, answer=None, reason=reason)
        given, spent = Counter(problem.columns["numbers"]), Counter(used)
        if spent - given:
            reason = f"{sorted((spent - given).elements())} used more often than given"
        elif problem.columns["use_all"] and given - spent:
            reason = f"{sorted((given - spent).elements())} given but not used"
        elif value != problem.columns["target"]:
            reason = f"gives {value}, not {problem.columns['target']}"
        else:
            return Verdict(correct=True, formatted=True, answer=read.answer, reason="right")
        return Verdict(correct=False, formatted=True, answer=read.answer, reason=reason)


def _moves_of(larger: int, smaller: int, max_value: int) -> list[_Move]:
    """Moves on two values, without times and divided by one, which change nothing."""
    signs = []
    if larger + smaller <= max_value:
        signs.append("+")
    if larger > smaller:
        signs.append("-")
    if smaller > 1 and larger * smaller <= max_value:
        signs.append("*")
    if smaller > 1 and larger % smaller == 0:
        signs.append("/")
    return [(larger, sign, smaller) for sign in signs]


def _moves(pool: _Pool, max_value: int) -> set[_Move]:
    pairs = {(pool[j], pool[i]) for j in range(len(pool)) for i in range(j)}
    return {move for larger, smaller in pairs for move in _moves_of(larger, smaller, max_value)}


def _result(move: _Move) -> int:
    larger, sign, smaller = move
    if sign == "+":
        return larger + smaller
    if sign == "-":
        return larger - smaller
    return larger * smaller if sign == "*" else larger // smaller


def _after(pool: _Pool, move: _Move) -> _Pool:
    rest = list(pool)
    rest.remove(move[0])
    rest.remove(move[2])
    return tuple(sorted([*rest, _result(move)]))


def _line(move: _Move) -> str:
    return f"{move[0]} {move[1]} {move[2]} = {_result(move)}"


def _listing(pool: _Pool) -> str:
    return " ".join(str(value) for value in pool)


def _expression(numbers: Sequence[int], solution: Sequence[_Move]) -> str:
    """The moves of a solution as one expression, inner ones in parentheses."""
    parts = [(number, str(number)) for number in numbers]
    for move in solution:
        texts = []
        for operand in (move[0], move[2]):
            part = next(part for part in parts if part[0] == operand)
            parts.remove(part)
            texts.append(part[1] if part[1].isdigit() else f"( {part[1]} )")
        parts.append((_result(move), f"{texts[0]} {move[1]} {texts[1]}"))
    return parts[-1][1]
