"""Layouts of a completion, and the ways in which Metis-SPECS (arXiv 2510.25801) spoils one.

A layout is written as the names of its two blocks in their order: `think answer` means
`<think> ... </think> <answer> ... </answer>`, and `answer think` the same two the other way round.
"""

import re
from collections.abc import Callable
from typing import NamedTuple

from jaxrl_reason.errors import InputError

STANDARD = "think answer"
THOUGHTS, ANSWERS = ("think", "work", "scratch"), ("answer", "final", "result")
LAYOUTS = (
    *(f"{thought} {answer}" for thought in THOUGHTS for answer in ANSWERS),
    *(f"{answer} {thought}" for thought in THOUGHTS for answer in ANSWERS),
)
TAG = re.compile(rf"</?(?:{'|'.join(THOUGHTS + ANSWERS)})>")
_BLOCKS = re.compile(r"\s*<(\w+)>(.*?)</\1>\s*<(\w+)>(.*?)</\3>\s*", re.DOTALL)


class Laid(NamedTuple):
    """A text taken apart."""

    layout: str
    thought: str
    answer: str


def lay_out(layout: str, thought: str, answer: str) -> str:
    """A thought (possibly empty) and an answer in a layout."""
    inside = {name: thought.strip() if name in THOUGHTS else answer for name in layout.split()}
    return " ".join(f"<{name}> {text} </{name}>" for name, text in inside.items())


def read_layout(text: str) -> Laid | None:
    """The parts of a text that has one of `LAYOUTS` and an answer; None for any other text."""
    match = _BLOCKS.fullmatch(text)
    if match is None or len(TAG.findall(text)) != 4:
        return None
    layout, first, second = f"{match[1]} {match[3]}", match[2].strip(), match[4].strip()
    if layout not in LAYOUTS:
        return None
    thought, answer = (first, second) if match[1] in THOUGHTS else (second, first)
    return Laid(layout, thought, answer) if answer else None


def relaid(text: str, layout: str) -> str:
    """A well laid out text in another layout.

    Raises:
        InputError: it has none.
    """
    laid = read_layout(text)
    if laid is None:
        raise InputError(f"{text!r} must have one of the layouts {list(LAYOUTS)}")
    return lay_out(layout, laid.thought, laid.answer)


# Corruptions a to e of the paper: each takes a text and its thought's and answer's opening and
# closing tags, and leaves a text that has no layout.

CORRUPTIONS: dict[str, Callable[[str, str, str, str, str], str]] = {
    "no_tags": lambda text, *tags: _without(text, *tags),
    "no_answer_tags": lambda text, think, end, answer, close: _without(text, answer, close),
    "no_think_tags": lambda text, think, end, answer, close: _without(text, think, end),
    "thought_to_the_end": lambda text, think, end, answer, close: (
        f"{_without(text, end, answer, close)} {end}"
    ),
    "answer_in_words": lambda text, think, end, answer, close: _without(text, close).replace(
        answer, "Answer:"
    ),
}


def corrupt(text: str, kind: str) -> str:
    """A well laid out text in one of the five ways in which a layout is missed.

    Raises:
        InputError: there is no such kind, or the text has no layout that could be corrupted.
    """
    laid = read_layout(text)
    if kind not in CORRUPTIONS or laid is None:
        raise InputError(
            f"corrupt({text!r}, {kind!r}): kinds are {list(CORRUPTIONS)}, and the text must "
            f"have one of the layouts {list(LAYOUTS)}"
        )
    names = sorted(laid.layout.split(), key=ANSWERS.__contains__)
    return CORRUPTIONS[kind](text, *(tag for name in names for tag in (f"<{name}>", f"</{name}>")))


def _without(text: str, *tags: str) -> str:
    return re.sub(rf"(?:\s*(?:{'|'.join(tags)})\s*)+", " ", text).strip()
