"""Two target domains of the K&K warm-up: colouring a graph, and two equations modulo a prime.

Their surface and rules are not those of knights and knaves. Long traces are searches that return
from dead ends, in words that knights and knaves has too, as one language has them for all domains.
"""

import functools
import itertools
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxrl_reason.errors import InputError
from jaxrl_reason.tasks import problem as shared
from jaxrl_reason.tasks.problem import Problem, Split, Style, Verdict

COLOURS = ("red", "green", "blue")
_NAMES = "PQRSTUVW"
_MOST = 7
_PRIMES = (3, 5, 7, 11, 13)
_FEASIBLE = "This assignment is feasible."
_PAIR = re.compile(r"\s*(\w+) (\w+)\s*")
_SOLUTION = re.compile(r"x is (\d{1,4})\s*, y is (\d{1,4})")


@dataclass(frozen=True, kw_only=True)
class Colouring:
    """Colour a graph with three colours; any proper colouring is right.

    Difficulty is the number of vertices (4 to 7). Graphs of one shape, which differ in the names
    of their vertices only, are in the same split. Since several answers are right, the accuracy of
    an answer that ignores the question is above what `answer_class`, the first colouring that the
    search finds, says.
    """

    seed: int = 0
    """Seed of the streams of problems; the split of a problem does not depend on it."""
    min_vertices: int = 5
    """Fewest vertices when difficulties are mixed."""
    max_vertices: int = 6
    """Most vertices when difficulties are mixed."""
    min_extra: int = 0
    """Fewest edges beyond the number of vertices."""
    max_extra: int = 2
    """Most edges beyond the number of vertices; at most 2 fit four vertices."""
    test_fraction: float = 0.2
    """Share of all shapes that is held out."""

    name = "colouring"

    def __post_init__(self) -> None:
        """Check ranges."""
        shared.check_whole("seed", self.seed, low=0, high=2**63 - 1)
        shared.check_whole("min_vertices", self.min_vertices, low=4, high=_MOST)
        shared.check_whole("max_vertices", self.max_vertices, low=self.min_vertices, high=_MOST)
        shared.check_whole("min_extra", self.min_extra, low=-1, high=2)
        shared.check_whole("max_extra", self.max_extra, low=self.min_extra, high=5)
        shared.check_rate("test_fraction", self.test_fraction, low=0.001, high=0.9)

    def difficulties(self) -> tuple[int, ...]:
        """Numbers of vertices that are mixed."""
        return tuple(range(self.min_vertices, self.max_vertices + 1))

    def words(self) -> tuple[str, ...]:
        """Names, colours and the words of the sentences."""
        text = "Colour, with red, green or blue unlike: ;."
        search = "Assume is Options for are used up return to and reset"
        return shared.split_words((*_NAMES, text, search, _FEASIBLE))

    def generate(self, split: Split, index: int, difficulty: int | None = None) -> Problem:
        """Problem `index` of a split with `difficulty` vertices."""
        if difficulty is not None:
            shared.check_whole("difficulty", difficulty, low=4, high=_MOST)
        names, edges = shared.draw(self, split, index, difficulty)
        _, found = _search(names, edges)
        unlike = "; ".join(
            f"{names[v]} unlike {' '.join(names[u] for u in _before(edges, v))}"
            for v in sorted({max(edge) for edge in edges})
        )
        return Problem(
            prompt=f"Colour {' '.join(names)} with red, green or blue: {unlike}.",
            answer=_coloured(names, found),
            columns={
                "difficulty": len(names),
                "answer_class": " ".join(found),
                "names": names,
                "edges": [list(edge) for edge in edges],
            },
        )

    def propose(self, rng: random.Random, difficulty: int) -> shared.Candidate | None:
        """Draw a graph; its canonical form is its shape."""
        pairs = list(itertools.combinations(range(difficulty), 2))
        count = difficulty + rng.randint(self.min_extra, self.max_extra)
        if count > len(pairs):
            return None
        edges = tuple(sorted(rng.sample(pairs, count)))
        names = rng.sample(_NAMES, difficulty)
        if not _search(names, edges)[1]:
            return None
        canonical = f"{difficulty} {_shape(difficulty, edges)}"
        split = shared.hash_split(self.name, canonical, self.test_fraction)
        listed = rng.sample(edges, count)
        return shared.Candidate(canonical=canonical, split=split, content=(names, listed))

    def trace(self, problem: Problem, style: Style) -> str:
        """A correct completion; `long` is a depth-first search, `short` looks at every edge."""
        shared.check_style(style)
        names, edges = problem.columns["names"], problem.columns["edges"]
        lines, found = _search(names, edges)
        short = [f"{names[u]} {found[u]} {names[v]} {found[v]};" for u, v in edges]
        thought = {"long": lines, "short": short, "answer": []}[style]
        return shared.write_completion("\n".join(thought), problem.answer)

    def guess(self, problem: Problem, rng: random.Random) -> str:
        """An answer without a thought: every colour drawn by itself."""
        names = problem.columns["names"]
        return _coloured(names, [rng.choice(COLOURS) for _ in names])

    def verify(self, problem: Problem, text: str) -> Verdict:
        """Correct if all vertices have a colour and no edge has one colour at both ends."""
        return _judge(problem, text, self._colours, self._is_proper)

    def _colours(self, problem: Problem, answer: str) -> list[str] | None:
        parts, names = answer.split(","), problem.columns["names"]
        found = {match[1]: match[2] for match in map(_PAIR.fullmatch, parts) if match}
        whole = len(parts) == len(names) and found.keys() == set(names)
        fits = whole and set(found.values()) <= set(COLOURS)
        return [found[name] for name in names] if fits else None

    def _is_proper(self, problem: Problem, colours: list[str]) -> bool:
        return all(colours[u] != colours[v] for u, v in problem.columns["edges"])


@dataclass(frozen=True, kw_only=True)
class Equations:
    """`2 x + 3 y = 1, 4 x + y = 2` modulo a prime; difficulty is the prime."""

    seed: int = 0
    """Seed of the streams of problems; the split of a problem does not depend on it."""
    moduli: tuple[int, ...] = (5,)
    """Primes that are mixed."""
    test_fraction: float = 0.2
    """Share of all systems that is held out."""

    name = "equations"

    def __post_init__(self) -> None:
        """Check the primes."""
        shared.check_whole("seed", self.seed, low=0, high=2**63 - 1)
        if not isinstance(self.moduli, tuple) or not self.moduli or {*self.moduli} - {*_PRIMES}:
            raise InputError(f"moduli={self.moduli!r} must be a list of some of {_PRIMES}")
        shared.check_rate("test_fraction", self.test_fraction, low=0.001, high=0.9)

    def difficulties(self) -> tuple[int, ...]:
        """Primes that are mixed."""
        return self.moduli

    def words(self) -> tuple[str, ...]:
        """Numbers, signs and the words of the sentences."""
        numbers = " ".join(map(str, range(max(*self.moduli, 5) + 1)))
        text = "Solve modulo: x + y =, . Assume is no contradiction in check"
        return shared.split_words((numbers, text, _FEASIBLE))

    def generate(self, split: Split, index: int, difficulty: int | None = None) -> Problem:
        """Problem `index` of a split, modulo `difficulty`."""
        if difficulty is not None and difficulty not in self.moduli:
            raise InputError(f"difficulty={difficulty} is none of moduli={self.moduli}")
        p, rows, (x, y) = shared.draw(self, split, index, difficulty)
        columns = {"difficulty": p, "answer_class": f"{x} {y}", "rows": [list(r) for r in rows]}
        system = ", ".join(map(_equation, rows))
        return Problem(
            prompt=f"Solve modulo {p}: {system}.", answer=f"x is {x}, y is {y}", columns=columns
        )

    def propose(self, rng: random.Random, difficulty: int) -> shared.Candidate | None:
        """Draw a solution and coefficients other than 0 with one solution only."""
        p = difficulty
        a, b, c, d = (rng.randrange(1, p) for _ in range(4))
        x, y = rng.randrange(p), rng.randrange(p)
        if (a * d - b * c) % p == 0:
            return None
        rows = ((a, b, (a * x + b * y) % p), (c, d, (c * x + d * y) % p))
        canonical = f"{p} {sorted(rows)}"  # the order makes no other system
        split = shared.hash_split(self.name, canonical, self.test_fraction)
        return shared.Candidate(canonical=canonical, split=split, content=(p, rows, (x, y)))

    def trace(self, problem: Problem, style: Style) -> str:
        """A correct completion; `long` tries values of x, `short` checks the second equation."""
        shared.check_style(style)
        p, (first, second) = problem.columns["difficulty"], problem.columns["rows"]
        lines = []
        for x in range(p):
            y = next(y for y in range(p) if _holds(first, x, y, p))
            right = _holds(second, x, y, p)
            fault = "no contradiction" if right else f"contradiction in {_equation(second)}"
            lines.append(f"Assume x is {x}: y is {y}, {fault}.")
            if right:
                break
        short = [f"check {_equation(second)}, {problem.answer}."]
        thought = {"long": [*lines, _FEASIBLE], "short": short, "answer": []}[style]
        return shared.write_completion("\n".join(thought), problem.answer)

    def guess(self, problem: Problem, rng: random.Random) -> str:
        """An answer without a thought: both numbers drawn by themselves."""
        p = problem.columns["difficulty"]
        return f"x is {rng.randrange(p)}, y is {rng.randrange(p)}"

    def verify(self, problem: Problem, text: str) -> Verdict:
        """Correct if both equations hold for numbers below the prime."""
        return _judge(problem, text, self._numbers, self._solves)

    def _numbers(self, problem: Problem, answer: str) -> tuple[int, int] | None:
        match = _SOLUTION.fullmatch(answer)
        return (int(match[1]), int(match[2])) if match else None

    def _solves(self, problem: Problem, found: tuple[int, int]) -> bool:
        p = problem.columns["difficulty"]
        return max(found) < p and all(_holds(row, *found, p) for row in problem.columns["rows"])


def _judge(
    problem: Problem,
    text: str,
    parse: Callable[[Problem, str], Any],
    check: Callable[[Problem, Any], bool],
) -> Verdict:
    """Read the layout, then what the answer says, then whether it is right."""
    read = shared.read_completion(text)
    if read.answer is None:
        return Verdict(correct=False, formatted=False, answer=None, reason=read.reason)
    found = parse(problem, read.answer)
    if found is None:
        reason = "unusable: not all unknowns have one of the allowed values"
        return Verdict(correct=False, formatted=True, answer=None, reason=reason)
    correct = check(problem, found)
    reason = "right" if correct else "a condition does not hold"
    return Verdict(correct=correct, formatted=True, answer=read.answer, reason=reason)


def _coloured(names: list[str], colours: list[str]) -> str:
    return ", ".join(f"{name} {colour}" for name, colour in zip(names, colours, strict=True))


def _search(names: Sequence[str], edges: Sequence[tuple[int, int]]) -> tuple[list[str], list[str]]:
    """The lines of a depth-first search and the colours it finds; none if there is no colouring."""
    lines: list[str] = []
    options = {0: list(COLOURS)}
    chosen: list[str] = []
    while len(chosen) < len(names):
        at, name = len(chosen), names[len(chosen)]
        nearby = _before(edges, at)
        taken = {chosen[u] for u in nearby}
        seen = f"{name} unlike {', '.join(f'{names[u]} {chosen[u]}' for u in nearby)}. "
        left = [colour for colour in options[at] if colour not in taken]
        if left:
            lines.append(f"{seen if nearby else ''}Assume {name} is {left[0]}.")
            options[at] = left[1:]
            chosen.append(left[0])
            options[at + 1] = list(COLOURS)
        elif at == 0:
            return lines, []
        else:
            chosen.pop()
            back = f"return to {names[at - 1]} and reset {name}"
            lines.append(f"{seen if nearby else ''}Options for {name} are used up: {back}.")
    return [*lines, _FEASIBLE], chosen


def _before(edges: Sequence[tuple[int, int]], vertex: int) -> list[int]:
    """The neighbours of a vertex that come before it."""
    return sorted(min(edge) for edge in edges if max(edge) == vertex)


@functools.lru_cache(maxsize=65536)
def _shape(vertices: int, edges: tuple[tuple[int, int], ...]) -> int:
    """A number that graphs share if and only if they differ in the numbering of vertices alone."""
    joined = np.zeros((vertices, vertices), np.int64)
    for u, v in edges:
        joined[u, v] = joined[v, u] = 1
    orders = _orders(vertices)
    all_ = joined[orders[:, :, None], orders[:, None, :]].reshape(len(orders), -1)
    return int((all_ @ (1 << np.arange(vertices * vertices))).min())


@functools.cache
def _orders(vertices: int) -> np.ndarray:
    return np.array(list(itertools.permutations(range(vertices))))


def _equation(row: tuple[int, int, int]) -> str:
    a, b, c = row
    return f"{a} x + {b} y = {c}"


def _holds(row: tuple[int, int, int], x: int, y: int, p: int) -> bool:
    a, b, c = row
    return (a * x + b * y) % p == c
