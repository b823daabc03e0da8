"""The verdicts on claims as a table for the terminal."""

from collections.abc import Sequence
from typing import NamedTuple

from rich import box
from rich.table import Table
from rich.text import Text

from jaxrl_reason.report.tables import visible

_STYLES = {"supported": "green", "refuted": "red", "undecided": "yellow", "not run": "dim"}


class VerdictLine(NamedTuple):
    """A claim, or below it one of its tests."""

    name: str
    """Of a claim; empty for a test."""
    verdict: str
    text: str
    number: str = ""
    """Of a test, with its interval."""
    seeds: int | None = None


def verdict_table(lines: Sequence[VerdictLine]) -> Table:
    """Claims, each followed by its tests."""
    table = Table(box=box.SIMPLE_HEAD, collapse_padding=True, pad_edge=False)
    for header in ("claim", "verdict"):
        table.add_column(header, no_wrap=True)
    table.add_column("what it says, and its tests", overflow="fold")
    table.add_column("number [95 % interval]", justify="right", overflow="fold", min_width=20)
    table.add_column("seeds", justify="right", no_wrap=True)
    for line in lines:
        style = _STYLES.get(line.verdict, "")
        table.add_row(
            Text(line.name, style="bold"),
            Text(line.verdict, style=f"bold {style}" if line.name else style),
            Text(visible(line.text), style="bold" if line.name else ""),
            Text(visible(line.number)),
            Text("" if line.seeds is None else str(line.seeds)),
        )
    return table
