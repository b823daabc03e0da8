"""Intervals of time: how well two of them agree, and how they are written and read."""

import re

from jaxrl_reason.errors import InputError

Interval = tuple[float, float]

# A word-level tokenizer writes 7.5 as `7 . 5`.
_SECONDS = r"\d{1,6}(?: ?\. ?\d{1,6})?"
_INTERVAL = re.compile(rf"({_SECONDS})\s*(?:-|to|,|\s)\s*({_SECONDS})")


def temporal_iou(first: Interval, second: Interval) -> float:
    """Length of the intersection over length of the union: 1 for equal intervals, 0 if disjoint.

    |P ∩ T| / |P ∪ T| with |P ∪ T| = |P| + |T| - |P ∩ T|, so a gap between them is not counted.

    Raises:
        InputError: an interval does not end after its start.
    """
    for interval in (first, second):
        if not interval[0] < interval[1]:
            raise InputError(f"interval {interval} must end after its start")
    common = max(0.0, min(first[1], second[1]) - max(first[0], second[0]))
    return common / (first[1] - first[0] + second[1] - second[0] - common)


def write_interval(interval: Interval) -> str:
    """Start and end, as in `3 7.5`."""
    return " ".join(write_seconds(seconds) for seconds in interval)


def write_seconds(seconds: float) -> str:
    """A time without needless decimals."""
    return f"{seconds:.6f}".rstrip("0").rstrip(".")


def read_seconds(text: str) -> float:
    """A time as written, with or without spaces around the point."""
    return float(text.replace(" ", ""))


def read_interval(text: str) -> Interval | None:
    """Start and end from `3 7.5`, `3 - 7.5`, `3 , 7.5` or `3 to 7.5`; None for anything else.

    An interval that does not end after its start is none.
    """
    match = _INTERVAL.fullmatch(text.strip())
    if match is None:
        return None
    start, end = map(read_seconds, match.groups())
    return (start, end) if start < end else None
