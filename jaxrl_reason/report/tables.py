"""A run's results as tables: for the terminal (rich), for plain logs and for Markdown pages.

`stage_table`, `stage_text` and `stage_markdown` show the rows of a run's `summary.json`;
`completions_table` shows samples in TRL's habit, one completion a row with its rewards.
"""

import io
import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from jaxrl_reason.errors import InputError
from jaxrl_reason.metrics import format_seconds

_KEYS = (
    "stage",
    "kind",
    "accuracy",
    "accuracy_ci95",
    "format_rate",
    "mean_length",
    "problems",
    "seconds",
)
STAGE_HEADERS = (
    "stage",
    "kind",
    "accuracy",
    "95% interval",
    "format",
    "tokens",
    "problems",
    "time",
)
TEXT_COLUMNS = 2
"""The first columns of a table of stages are words, the rest are numbers."""
_NOT_MEASURED = "-"


def stage_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """The stages of a run in order, with accuracy, format rate, mean length and time.

    Args:
        rows: of `summary.json`: `stage`, `kind`, `accuracy` and `format_rate` as fractions,
            `accuracy_ci95` as [low, high], `mean_length` in tokens, `problems`, `seconds`. None
            where a stage has no such number.

    Raises:
        InputError: a row lacks a key.
    """
    return _table(rows, box.SIMPLE_HEAD)


def stage_text(rows: Sequence[Mapping[str, Any]]) -> str:
    """`stage_table` as ASCII without colours, for logs and files."""
    stream = io.StringIO()
    Console(file=stream, width=160, color_system=None).print(_table(rows, box.ASCII2))
    return "\n".join(line.rstrip() for line in stream.getvalue().splitlines()) + "\n"


def stage_markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """`stage_table` as a GitHub-flavoured Markdown table."""
    rules = ["---"] * TEXT_COLUMNS + ["---:"] * (len(STAGE_HEADERS) - TEXT_COLUMNS)
    lines = [STAGE_HEADERS, rules, *(map(_escape_markdown, cells) for cells in stage_cells(rows))]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def _table(rows: Sequence[Mapping[str, Any]], frame: box.Box) -> Table:
    # The names of stages must survive on a terminal of 80 columns.
    table = Table(box=frame, collapse_padding=True, pad_edge=False)
    for index, header in enumerate(STAGE_HEADERS):
        justify = "left" if index < TEXT_COLUMNS else "right"
        table.add_column(header, justify=justify, no_wrap=index >= TEXT_COLUMNS)
    for cells in stage_cells(rows):
        table.add_row(*map(_literal, cells))
    return table


def stage_cells(rows: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """The cells of `stage_table`, in the order of `STAGE_HEADERS`."""
    for number, row in enumerate(rows):
        missing = [key for key in _KEYS if key not in row]
        if missing:
            raise InputError(
                f"summary row {number} lacks {', '.join(missing)}; a row has {', '.join(_KEYS)} "
                "(null where a stage has no such number)"
            )
    return [
        [
            str(row["stage"]),
            str(row["kind"]),
            percent(row["accuracy"]),
            interval(row["accuracy_ci95"]),
            percent(row["format_rate"]),
            _NOT_MEASURED if row["mean_length"] is None else f"{row['mean_length']:.1f}",
            _NOT_MEASURED if row["problems"] is None else f"{row['problems']:d}",
            _NOT_MEASURED if row["seconds"] is None else format_seconds(row["seconds"]),
        ]
        for row in rows
    ]


def completions_table(samples: Sequence[Mapping[str, Any]], n: int) -> Table:
    """The first `n` samples in three columns: prompt, completion, rewards.

    Rewards stand below each other, `name value`, so that any number of objectives leaves room for
    the text.

    Args:
        samples: lines of a `samples.jsonl`, each with `prompt` and `completion`. Listed as rewards
            are the entries of `rewards` (a mapping; None where a reward does not apply) and every
            other number of the row but `step`, such as `advantage` or `correct`.

    Raises:
        InputError: a sample has no prompt or no completion.
    """
    shown = samples[:n]
    steps = {sample["step"] for sample in shown if "step" in sample}
    title = _literal(f"step {min(steps)}") if len(steps) == 1 else None
    table = Table(box=box.ROUNDED, show_lines=True, title=title)
    table.add_column("prompt", overflow="fold", ratio=2)
    table.add_column("completion", overflow="fold", ratio=3)
    table.add_column("rewards", no_wrap=True, overflow="ellipsis")
    for index, sample in enumerate(shown):
        numbers = _numbers(sample, index)
        width = max(map(len, numbers), default=0)
        lines = [f"{name:<{width}} {_number(value):>6}" for name, value in numbers.items()]
        texts = (sample["prompt"], sample["completion"], "\n".join(lines))
        table.add_row(*map(_literal, texts))
    return table


def _numbers(sample: Mapping[str, Any], index: int) -> dict[str, float | None]:
    for key in ("prompt", "completion"):
        if not isinstance(sample.get(key), str):
            raise InputError(
                f"sample {index} has no text under {key!r}; a sample is an object with 'prompt', "
                "'completion' and, for example, 'rewards': {name: number}"
            )
    own = {k: v for k, v in sample.items() if isinstance(v, int | float) and k != "step"}
    return {**sample.get("rewards", {}), **own}


def _literal(text: str) -> Text:
    """Text shown as it is: no markup is read in it, and control characters become visible."""
    return Text(visible(text))


def visible(text: str) -> str:
    """Text with control characters, but line breaks, as Python writes them in a string."""
    return "".join(c if c == "\n" or _printable(c) else repr(c)[1:-1] for c in text)


def _printable(character: str) -> bool:
    # Cc, Cf, Cs, Co, Cn: terminals act on the first two and cannot encode lone surrogates.
    return not unicodedata.category(character).startswith("C")


def _escape_markdown(cell: str) -> str:
    return cell.replace("\\", "\\\\").replace("|", "\\|").replace("\n", " ")


def _number(value: float | None) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return _NOT_MEASURED if value is None else f"{float(value):.2f}"


def percent(fraction: float | None) -> str:
    """A fraction as percent, `-` for None."""
    return _NOT_MEASURED if fraction is None else f"{100 * fraction:.1f} %"


def interval(bounds: Sequence[float] | None) -> str:
    """Fractions [low, high] as percent, `-` for None."""
    return _NOT_MEASURED if bounds is None else f"{100 * bounds[0]:.1f} - {100 * bounds[1]:.1f} %"
