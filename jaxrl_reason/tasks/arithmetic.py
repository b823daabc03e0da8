"""Chained modular arithmetic: `c = 7 ; a = c * 3 ; f = a + c ; f ?`, everything modulo a fixed m.

Each variable is computed from the one before it and from a constant or an earlier variable, so
the last value needs the whole chain. Difficulty is the number of operations. Variable names are a
random subset of a..h in random order and carry no meaning.
"""

import random
import re
from dataclasses import dataclass

from jaxrl_reason.errors import InputError
from jaxrl_reason.tasks import problem as shared
from jaxrl_reason.tasks.problem import Problem, Split, Style, Verdict

_LETTERS = "abcdefgh"
_MAX_STEPS = len(_LETTERS) - 1
_NUMBER = re.compile(r"[0-9]{1,9}")
# An operand is a constant or the position of an earlier variable.
_Operand = tuple[str, int]


@dataclass(frozen=True, kw_only=True)
class ModularArithmetic:
    """Options of the task; every number in a text is a single word 0..modulus-1."""

    seed: int = 0
    """Seed of the streams of problems; the split of a problem does not depend on it."""
    modulus: int = 23
    """Everything is computed modulo this number."""
    min_steps: int = 2
    """Fewest operations when difficulties are mixed."""
    max_steps: int = 4
    """Most operations when difficulties are mixed."""
    operations: tuple[str, ...] = ("+", "-", "*")
    """Operations to draw from."""
    max_constant: int = 22
    """Largest constant operand; smaller means fewer facts to learn."""
    variable_rate: float = 0.3
    """How often the second operand is an earlier variable instead of a constant."""
    slip_rate: float = 0.15
    """How often a step of a long trace first gets a wrong value, which its check exposes."""
    test_fraction: float = 0.1
    """Share of all problems that is held out."""

    name = "arithmetic"

    def __post_init__(self) -> None:
        """Check ranges."""
        shared.check_whole("seed", self.seed, low=0, high=2**63 - 1)
        shared.check_whole("modulus", self.modulus, low=3, high=1000)
        shared.check_whole("min_steps", self.min_steps, low=1, high=_MAX_STEPS)
        shared.check_whole("max_steps", self.max_steps, low=self.min_steps, high=_MAX_STEPS)
        shared.check_whole("max_constant", self.max_constant, low=2, high=self.modulus - 1)
        shared.check_rate("variable_rate", self.variable_rate)
        shared.check_rate("slip_rate", self.slip_rate)
        shared.check_rate("test_fraction", self.test_fraction, low=0.001, high=0.9)
        unknown = set(self.operations) - {"+", "-", "*"}
        if unknown or not self.operations or not isinstance(self.operations, tuple):
            raise InputError(f"operations={self.operations!r} must be a tuple of '+', '-', '*'")

    def difficulties(self) -> tuple[int, ...]:
        """Numbers of operations that are mixed."""
        return tuple(range(self.min_steps, self.max_steps + 1))

    def words(self) -> tuple[str, ...]:
        """Numbers, variables, signs and the words of long traces."""
        numbers = tuple(str(value) for value in range(self.modulus))
        return (*numbers, *_LETTERS, "+", "-", "*", "=", ";", "?", "check", "ok", "no", "wait")

    def generate(self, split: Split, index: int, difficulty: int | None = None) -> Problem:
        """Problem `index` of a split with `difficulty` operations (1 to 7)."""
        if difficulty is not None:
            shared.check_whole("difficulty", difficulty, low=1, high=_MAX_STEPS)
        names, start, chain = shared.draw(self, split, index, difficulty)
        steps = []
        for position, (operation, operand) in enumerate(chain):
            second = operand[1] if operand[0] == "constant" else names[operand[1]]
            steps.append([names[position + 1], names[position], operation, second])
        answer = str(_values(start, chain, self.modulus)[-1])
        lines = [f"{names[0]} = {start}"]
        lines += [f"{name} = {first} {sign} {second}" for name, first, sign, second in steps]
        columns = {
            "difficulty": len(chain),
            "answer_class": answer,
            "modulus": self.modulus,
            "first": [names[0], start],
            "steps": steps,
        }
        prompt = " ; ".join([*lines, f"{steps[-1][0]} ?"])
        return Problem(prompt=prompt, answer=answer, columns=columns)

    def propose(self, rng: random.Random, difficulty: int) -> shared.Candidate | None:
        """Draw a chain; its canonical form leaves the variable names out."""
        start = rng.randrange(self.modulus)
        chain: list[tuple[str, _Operand]] = []
        values = [start]
        for position in range(difficulty):
            operation = rng.choice(self.operations)
            if position > 0 and rng.random() < self.variable_rate:
                operand = ("variable", rng.randrange(position))
                second = values[operand[1]]
            else:
                # Multiplying by 1 or adding 0 would be a step without work.
                second = rng.randint(2 if operation == "*" else 1, self.max_constant)
                operand = ("constant", second)
            if operation == "*" and second == 0:
                return None  # the value before would not matter
            chain.append((operation, operand))
            values.append(_apply(operation, values[-1], second, self.modulus))
        canonical = f"{self.modulus} {start} {chain}"
        names = "".join(rng.sample(_LETTERS, difficulty + 1))
        split = shared.hash_split(self.name, canonical, self.test_fraction)
        return shared.Candidate(canonical=canonical, split=split, content=(names, start, chain))

    def trace(self, problem: Problem, style: Style) -> str:
        """A correct completion; `long` looks values up, checks them and corrects slips."""
        shared.check_style(style)
        if style == "answer":
            return shared.write_completion("", problem.answer)
        name, start = problem.columns["first"]
        values = {name: start}
        rng = random.Random(f"slips|{self.seed}|{problem.prompt}")
        lines = []
        for name, first, operation, second in problem.columns["steps"]:
            left, right = values[first], values[second] if isinstance(second, str) else second
            values[name] = _apply(operation, left, right, self.modulus)
            if style == "short":
                lines.append(f"{name} = {left} {operation} {right} = {values[name]} ;")
                continue
            lines.append(f"{first} = {left} ;")
            if isinstance(second, str):
                lines.append(f"{second} = {right} ;")
            if rng.random() < self.slip_rate:
                wrong = (values[name] + rng.randrange(1, self.modulus)) % self.modulus
                lines.append(self._attempt(name, left, operation, right, wrong) + " no ; wait")
            lines.append(self._attempt(name, left, operation, right, values[name]) + " ok ;")
        return shared.write_completion(" ".join(lines), problem.answer)

    def _attempt(self, name: str, left: int, operation: str, right: int, value: int) -> str:
        """One computed value and its check by another route."""
        if operation == "+":
            check = f"{value} - {right} = {_apply('-', value, right, self.modulus)}"
        elif operation == "-":
            check = f"{value} + {right} = {_apply('+', value, right, self.modulus)}"
        else:
            # left * right = left * (right - 1) + left; the residue keeps it a single word.
            less = (right - 1) % self.modulus
            part = _apply("*", left, less, self.modulus)
            total = _apply("+", part, left, self.modulus)
            check = f"{left} * {less} = {part} ; {part} + {left} = {total}"
        return f"{name} = {left} {operation} {right} = {value} ; check {check}"

    def verify(self, problem: Problem, text: str) -> Verdict:
        """Correct when the format is right and the answer is the number asked for."""
        read = shared.read_completion(text)
        if read.answer is None:
            return Verdict(correct=False, formatted=False, answer=None, reason=read.reason)
        if _NUMBER.fullmatch(read.answer) is None:
            reason = "unusable: the answer is not a number"
            return Verdict(correct=False, formatted=True, answer=None, reason=reason)
        correct = int(read.answer) == int(problem.answer)
        reason = "right" if correct else f"expected {problem.answer}"
        return Verdict(correct=correct, formatted=True, answer=read.answer, reason=reason)


def _apply(operation: str, left: int, right: int, modulus: int) -> int:
    if operation == "+":
        return (left + right) % modulus
    if operation == "-":
        return (left - right) % modulus
    return (left * right) % modulus


def _values(start: int, chain: list[tuple[str, _Operand]], modulus: int) -> list[int]:
    values = [start]
    for operation, (kind, operand) in chain:
        second = operand if kind == "constant" else values[operand]
        values.append(_apply(operation, values[-1], second, modulus))
    return values
