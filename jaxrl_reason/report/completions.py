"""A completion as a reader wants it: reasoning and answer set apart, verdict and rewards below."""

import math
import re
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

from jaxrl_reason.report.markup import Html, element, join

_BLOCK = re.compile(r"<(think|answer)>(.*?)(</\1>|(?=<(?:think|answer)>)|\Z)", re.DOTALL)
_LABELS = {"think": "reasoning", "answer": "answer", "outside": "text outside of the blocks"}
_LONG = 700  # characters of a text that is folded; what is before them stands in the fold's line
_SHOWN = 90


class Block(NamedTuple):
    """A part of a completion."""

    kind: Literal["think", "answer", "outside"]
    text: str
    closed: bool
    """Whether the end tag is there."""


def blocks(text: str) -> list[Block]:
    """The think and answer blocks of a completion and the text outside of them, in order.

    A block without an end tag goes on to the next block or to the end. Outside is also an end tag
    that nothing has opened. White space around the parts is dropped, and empty text outside.
    """
    found, end = [], 0
    for match in _BLOCK.finditer(text):
        found.append(Block("outside", text[end : match.start()].strip(), True))
        found.append(Block(match[1], match[2].strip(), bool(match[3])))  # type: ignore[arg-type]
        end = match.end()
    found.append(Block("outside", text[end:].strip(), True))
    return [block for block in found if block.kind != "outside" or block.text]


def show_text(text: str) -> Html:
    """A text with its line breaks; a long one is folded."""
    body = element("div", text, class_="text")
    if len(text) <= _LONG:
        return body
    start = " ".join(text[:_SHOWN].split())
    summary = element("summary", f"{start} … ({len(text):,} characters)")
    return element("details", summary, body)


def show_completion(text: str) -> Html:
    """The blocks of a completion; one without blocks is shown whole, and marked."""
    parts = blocks(text)
    if not any(part.kind != "outside" for part in parts):
        whole = show_text(text) if text else element("div", "nothing", class_="note")
        label = element("div", "no think or answer block", class_="label warn")
        return element("div", label, whole, class_="block outside")
    return join([_show_block(part) for part in parts])


def _show_block(block: Block) -> Html:
    warn = None if block.closed else element("span", f" without </{block.kind}>", class_="warn")
    label = element("div", _LABELS[block.kind], warn, class_="label")
    body = show_text(block.text) if block.text else element("div", "empty", class_="note")
    return element("div", label, body, class_=f"block {block.kind}")


def show_sample(name: str, row: Mapping[str, Any]) -> Html:
    """What a stage wrote for a problem, and what was made of it.

    Args:
        name: of the stage.
        row: of its samples.jsonl.
    """
    verdict = "right" if row["correct"] else "wrong"
    head = element("header", element("b", name), element("span", verdict, class_="verdict"))
    ended = "ended by itself" if row["finished"] else "cut off at the longest length"
    facts = [
        element("span", f"{row['length']} tokens, {ended}"),
        _reason(row),
        _read(row),
        None if row["formatted"] else element("span", "layout missing", class_="warn"),
    ]
    numbers = [_numbers("rewards", row), _numbers("measures", row)]
    body = show_completion(row["completion"])
    foot = element("footer", element("div", facts, class_="facts"), numbers)
    return element("article", head, body, foot, class_=f"sample {verdict}")


def _reason(row: Mapping[str, Any]) -> Html | None:
    """What the verifier says, where that is more than `right`."""
    if row["correct"] and row["reason"] in ("", "right"):
        return None
    return element("span", f"verifier: {row['reason']}")


def _read(row: Mapping[str, Any]) -> Html | None:
    """The answer as the verifier read it, where that is not what stands in the answer block."""
    written = [block.text for block in blocks(row["completion"]) if block.kind == "answer"]
    given = row["given"]
    return None if given is None or given in written else element("span", f"read as: {given}")


def _numbers(name: str, row: Mapping[str, Any]) -> Html | None:
    """The rewards or measures of a row, nothing where it has none; null means: does not apply."""
    numbers = row.get(name) or {}
    if not numbers:
        return None
    cells = [
        element("span", f"{key} ", element("b", number(value))) for key, value in numbers.items()
    ]
    return element("div", element("span", f"{name}:", class_="label"), cells, class_="facts")


def number(value: Any) -> str:
    """A number in four digits, a truth as yes or no, None as `does not apply`."""
    if value is None:
        return "does not apply"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.4g}" if math.isfinite(value) else str(value)
