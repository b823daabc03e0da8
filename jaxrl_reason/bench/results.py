"""Measurements side by side: ratios of neighbouring repeats, and tables of them in Markdown."""

import dataclasses
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

Row = Mapping[str, Any]
"""A `Measurement` with `workload`, `shape`, `contestant`, `repeat` and `others`."""

OURS = "ours"


@dataclasses.dataclass(frozen=True)
class Spread:
    """Median and range of the ratios of neighbouring repeats."""

    median: float
    low: float
    high: float
    count: int

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        """Of at least one value."""
        return cls(statistics.median(values), min(values), max(values), len(values))

    def __str__(self) -> str:
        return f"{self.median:.2f} ({self.low:.2f} to {self.high:.2f})"


def rate(row: Row) -> float:
    """Useful tokens per second of the whole repeat."""
    return row["useful_tokens"] / row["seconds"]


def rollout_rate(row: Row) -> float:
    """Useful tokens per second of sampling alone."""
    return row["useful_tokens"] / row["parts"]["rollout"]


def by_repeat(rows: Iterable[Row], contestant: str) -> dict[int, Row]:
    """The rows of a contestant by repeat."""
    return {row["repeat"]: row for row in rows if row["contestant"] == contestant}


def ratios(rows: Sequence[Row], peer: str, value=rate) -> Spread | None:
    """Ours over a peer's, repeat by repeat; None where no repeat has both."""
    ours, theirs = by_repeat(rows, OURS), by_repeat(rows, peer)
    both = sorted(ours.keys() & theirs.keys())
    return Spread.of([value(ours[n]) / value(theirs[n]) for n in both]) if both else None


def memory_ratio(rows: Sequence[Row], peer: str) -> float | None:
    """Our highest resident memory over a peer's, each over all its repeats."""
    peaks = [
        [row["peak_rss_mb"] for row in by_repeat(rows, name).values()] for name in (OURS, peer)
    ]
    return max(peaks[0]) / max(peaks[1]) if all(peaks) else None


def summaries(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """For each workload, shape and contestant: medians, and the ratio of ours to it."""
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row["workload"], row["shape"]), []).append(row)
    return [
        _summary(workload, shape, group, contestant)
        for (workload, shape), group in groups.items()
        for contestant in dict.fromkeys(row["contestant"] for row in group)
    ]


def _summary(workload: str, shape: str, group: list[Row], contestant: str) -> dict[str, Any]:
    own = list(by_repeat(group, contestant).values())
    median = lambda value: statistics.median(map(value, own))
    names = sorted(set.intersection(*(set(row["parts"]) for row in own)))
    peer = contestant != OURS
    speed = ratios(group, contestant) if peer else None
    has_rollout = all("rollout" in row["parts"] for row in group)
    rollout = ratios(group, contestant, rollout_rate) if peer and has_rollout else None
    return {
        "workload": workload,
        "shape": shape,
        "contestant": contestant,
        "repeats": len(own),
        "seconds": median(lambda row: row["seconds"]),
        "tokens_per_second": median(rate),
        "useful_share": median(lambda row: row["useful_tokens"] / row["computed_tokens"]),
        "peak_rss_mb": max(row["peak_rss_mb"] for row in own),
        "parts": {name: median(lambda row, name=name: row["parts"][name]) for name in names},
        "others": max(row["others"] for row in own),
        "speed_ratio": dataclasses.asdict(speed) if speed else None,
        "rollout_ratio": dataclasses.asdict(rollout) if rollout else None,
        "memory_ratio": memory_ratio(group, contestant) if peer else None,
    }


_HEAD = """\
| workload | shape | contestant | seconds | tokens/s | useful | peak MB | ours / it, tokens/s \
| of it rollout | ours / it, memory | others |
|---|---|---|---:|---:|---:|---:|---|---|---:|---:|"""


def markdown(summary: Sequence[Mapping[str, Any]]) -> str:
    """A table with a line for each workload, shape and contestant."""
    return "\n".join([_HEAD, *map(_line, summary)])


def _line(row: Mapping[str, Any]) -> str:
    spread = lambda name: str(Spread(*row[name].values())) if row[name] else ""
    memory = "" if row["memory_ratio"] is None else f"{row['memory_ratio']:.2f}"
    cells = (
        row["workload"],
        row["shape"],
        row["contestant"],
        f"{row['seconds']:.2f}",
        f"{row['tokens_per_second']:.0f}",
        f"{row['useful_share']:.0%}",
        f"{row['peak_rss_mb']:.0f}",
        spread("speed_ratio"),
        spread("rollout_ratio"),
        memory,
        f"{row['others']:.0%}",
    )
    return f"| {' | '.join(cells)} |"
