r"""Answers of mathematics: where a text states one, and whether it equals the right one.

A text states its answer in `<answer>...</answer>`, in `\boxed{...}` or after `####`, behind its
thoughts; the last one counts and nothing is guessed from other text. Equality of numbers is decided
here, that of other expressions by math-verify in a process of its own (`math_process`), so that
this may be called from any thread and an expression that takes for ever only costs its time.
"""

import atexit
import functools
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

_LONGEST = 1000  # characters of an answer; what is longer only takes time
_THOUGHT, _THOUGHT_ENDS = "<think>", "</think>"
_TAGGED = re.compile(r"<answer>((?:(?!<answer>).)*?)</answer>", re.DOTALL)
_HASHED = re.compile(r"####[ \t]*(\S[^\n]*)")
_WRAPPERS = (("$$", "$$"), ("$", "$"), (r"\(", r"\)"), (r"\[", r"\]"), ("**", "**"))
_NUMBER = re.compile(r"[-+]?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|[-+]?\.\d+")
_CURRENCY = re.compile(r"^([-+]?)\s*\\?[$€£¥]\s*")
_UNIT = re.compile(r"(?<=\d)(?:\s+|\s*\\text\{\s*)([A-Za-z]{3,}(?:\s+[A-Za-z]+)*)\s*\}?$")
_NO_UNITS = {
    "hundred",
    "thousand",
    "million",
    "billion",
    "trillion",
    "dozen",
    "percent",
    "percentage",
}
_WORDS = re.compile(r"[^\W\d_]{2,}(?:[\s-]+[^\W\d_]+)*")


def extract_answer(text: str) -> str | None:
    """The answer that a text states, or None.

    A thought that does not end states none, and neither does a box that does not close.
    """
    if _THOUGHT_ENDS in text:
        text = text.rpartition(_THOUGHT_ENDS)[2]
    elif _THOUGHT in text:
        return None
    tagged = _TAGGED.findall(text)
    if tagged:
        text = tagged[-1]
    if r"\boxed{" in text:
        return _clean(_boxed(text)) or None
    if tagged:
        return _clean(text) or None
    hashed = _HASHED.findall(text)
    return (_clean(hashed[-1]) or None) if hashed else None


def gold_answer(text: str) -> str:
    """The answer of a data set's column: what the text states, or else the text itself."""
    return extract_answer(text) or _clean(text)


def answers_match(answer: str, gold: str, *, timeout: float = 5.0) -> bool | None:
    """Whether two answers are equal; None if the gold one cannot be parsed.

    Args:
        answer: what was extracted from a completion.
        gold: the right answer, from `gold_answer`.
        timeout: seconds after which the answer counts as wrong.
    """
    numbers = _number(answer), _number(gold)
    if None not in numbers:
        whole = all(n.denominator == 1 for n in numbers if n is not None)
        if numbers[0] == numbers[1] or whole:
            return numbers[0] == numbers[1]
    words = _words(answer), _words(gold)
    if words[1] is not None:
        return words[0] == words[1]  # to math-verify words are products of their letters
    if not gold:
        return None
    if len(answer) > _LONGEST:
        return False
    return _math_verify(answer, gold, timeout)


def verify_math(text: str, answer: str, *, timeout: float = 5.0) -> bool:
    """Whether a text states the right answer.

    Args:
        text: a completion.
        answer: the right answer, by itself or as a data set has it, such as `... #### 18`.
        timeout: seconds after which the answer counts as wrong.
    """
    found = extract_answer(text)
    return found is not None and answers_match(found, gold_answer(answer), timeout=timeout) is True


def math_accuracy(
    prompts: Sequence[str], completions: Sequence[str], *, answer: Sequence[str], **_: Any
) -> list[float | None]:
    """1 if the completion states the right answer, else 0; None if that cannot be parsed."""
    return [
        float(verify_math(text, gold)) if _is_parsed(gold_answer(gold)) else None
        for text, gold in zip(completions, answer, strict=True)
    ]


@functools.lru_cache(maxsize=65536)
def _is_parsed(gold: str) -> bool:
    return answers_match(gold, gold) is True


def _boxed(text: str) -> str:
    """What the last box holds; nothing if it does not close."""
    inner = text.rpartition(r"\boxed{")[2]
    depth = 1
    for at, character in enumerate(inner):
        depth += (character == "{") - (character == "}")
        if depth == 0:
            return inner[:at]
    return ""


def _clean(answer: str) -> str:
    """An answer without the signs of mathematics, bold type or the end of a sentence around it."""
    before = None
    while answer != before:
        before, answer = answer, answer.strip()
        if answer.endswith(".") and not answer.endswith(".."):
            answer = answer[:-1]
        for begin, end in _WRAPPERS:
            if answer.startswith(begin) and answer.endswith(end) and len(answer) > len(begin + end):
                inner = answer[len(begin) : -len(end)]
                answer = answer if begin in inner else inner
    return answer


def _number(answer: str) -> Fraction | None:
    """A plain number, whatever its currency, thousands separators and unit."""
    for separator in ("{,}", r"\,", r"\!"):
        answer = answer.replace(separator, "," if separator == "{,}" else "")
    answer = _CURRENCY.sub(r"\1", answer.replace("−", "-"))
    unit = _UNIT.search(answer)
    if unit and not _NO_UNITS & set(unit[1].lower().split()):
        answer = answer[: unit.start()]
    return Fraction(answer.replace(",", "")) if _NUMBER.fullmatch(answer) else None


def _words(answer: str) -> str | None:
    """Plain words, such as a name, in small letters."""
    inner = re.fullmatch(r"\\text(?:bf|rm)?\{([^{}]*)\}", answer)
    words = (inner[1] if inner else answer).strip()
    return " ".join(words.casefold().split()) if _WORDS.fullmatch(words) else None


class _MathVerify:
    """A process that answers one question at a time; started when it is needed."""

    def __init__(self):
        self._lock = threading.Lock()
        self._process: subprocess.Popen | None = None
        self._owner = 0

    def __call__(self, answer: str, gold: str, timeout: float) -> bool | None:
        question = json.dumps({"answer": answer, "gold": gold, "timeout": timeout})
        with self._lock:
            if not self._runs():
                self._end()
                self._process, self._owner = self._start(), os.getpid()
            assert self._process is not None
            try:
                line = self._exchange(self._process, question)
            except BaseException:  # an interrupt: the answer may come yet, to the next question
                self._end()
                raise
            if not line:  # the alarm
                self._end()
                return False
            return json.loads(line)

    def close(self) -> None:
        """End the process."""
        with self._lock:
            self._end()

    def _runs(self) -> bool:
        mine = self._owner == os.getpid()  # a fork has its parent's, whose answers are not for it
        return mine and self._process is not None and self._process.poll() is None

    def _start(self) -> subprocess.Popen:
        search = os.pathsep.join(filter(None, sys.path))
        process = subprocess.Popen(
            [sys.executable, "-m", "jaxrl_reason.rewards.math_process"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": search, "OPENBLAS_NUM_THREADS": "1"},
        )
        assert process.stdout is not None
        if process.stdout.readline() != "true\n":
            process.kill()
            raise RuntimeError("the process that checks answers did not start; see its message")
        return process

    def _exchange(self, process: subprocess.Popen, question: str) -> str:
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            process.stdin.write(question + "\n")
            process.stdin.flush()
        except BrokenPipeError:
            return ""
        return process.stdout.readline()

    def _end(self) -> None:
        if self._process is not None and self._owner == os.getpid():
            self._process.kill()
            self._process.communicate()
        self._process = None


_math_verify = _MathVerify()
atexit.register(_math_verify.close)
