"""What happens in a video, as records of text.

Records have the layout of arXiv 2604.04415, of whose fields we keep the ones that a world of moving
shapes has:

    <facts>
    [time] 0-3 [object] red square [action] rests [scene] top left [cause] none
    [time] 3-7 [object] red square [action] moves right [scene] top right [cause] none
    [time] 6-7 [object] red square [action] hits blue circle [scene] top right [cause] none
    [time] 7-8 [object] blue circle [action] turns green [scene] top right [cause] hit by red square
    </facts>

A record says what changes between what is seen at its start and what is seen at its end, both in
seconds. The object has the name it has at the start, the scene is where it is at the end.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from jaxrl_reason.tasks.intervals import Interval, read_interval, write_interval

FIELDS = ("time", "object", "action", "scene", "cause")
NO_CAUSE = "none"

_BLOCK = re.compile(r"\s*<\s*facts\s*>(.*)<\s*/\s*facts\s*>\s*", re.DOTALL)
_TAG = re.compile(r"\[\s*(\w+)\s*\]")


@dataclass(frozen=True, kw_only=True)
class Fact:
    """One event: when, of what, what, where, and why (`none`, `hit by ...` or `hits ...`)."""

    time: Interval
    object: str
    action: str
    scene: str
    cause: str

    @classmethod
    def from_json(cls, value: Sequence[Any]) -> "Fact":
        """What `to_json` wrote."""
        start, end, *rest = value
        return cls(time=(start, end), **dict(zip(FIELDS[1:], rest, strict=True)))

    def to_json(self) -> list[Any]:
        """Start, end and the other fields."""
        return [*self.time, self.object, self.action, self.scene, self.cause]

    @property
    def span(self) -> str:
        """The time as in `3-7.5`."""
        return write_interval(self.time).replace(" ", "-")

    @property
    def verb(self) -> str:
        """The first word of the action."""
        return self.action.split()[0]


def write_facts(facts: Iterable[Fact], fields: Sequence[str] = FIELDS) -> str:
    """Records in the given order, one a line, between the tags; `fields` may leave some out."""
    lines = []
    for fact in facts:
        values = (fact.span, fact.object, fact.action, fact.scene, fact.cause)
        known = dict(zip(FIELDS, values, strict=True))
        lines.append(" ".join(f"[{field}] {known[field]}" for field in fields))
    return "\n".join(["<facts>", *lines, "</facts>"])


def read_facts(text: str, fields: Sequence[str] = FIELDS) -> tuple[Fact, ...] | None:
    """The records of a block; None unless the text is one block of whole records.

    Args:
        text: of the block.
        fields: that each record has, of `FIELDS` and `time` among them; the others are empty.
    """
    records = read_records(text, fields)
    if records is None:
        return None
    facts = []
    for record in records:
        time = read_interval(record.pop("time"))
        assert time is not None
        facts.append(Fact(time=time, **{**dict.fromkeys(FIELDS[1:], ""), **record}))
    return tuple(facts)


def read_records(text: str, fields: Sequence[str]) -> list[dict[str, str]] | None:
    """The records of a block by field; None unless the text is one block of whole records.

    White space carries no meaning, so it also reads what a word-level tokenizer decodes.

    Args:
        text: of the block.
        fields: that each record has, in this order; `time`, an interval, is among them.
    """
    block = _BLOCK.fullmatch(text)
    if block is None or "<" in block[1] or ">" in block[1]:
        return None
    before, *parts = _TAG.split(block[1])
    if before.strip() or len(parts) % (2 * len(fields)):
        return None
    records = []
    for first in range(0, len(parts), 2 * len(fields)):
        record = parts[first : first + 2 * len(fields)]
        values = [" ".join(value.split()) for value in record[1::2]]
        found = dict(zip(record[::2], values, strict=True))
        if list(found) != list(fields) or not all(values) or read_interval(found["time"]) is None:
            return None
        records.append(found)
    return records


def opening(facts: Iterable[Fact]) -> str:
    """Which shapes there are and where each is first seen, in any order."""
    first = (fact for fact in facts if fact.verb in ("rests", "appears"))
    return " ; ".join(sorted(f"{fact.object} {fact.scene}" for fact in first))
