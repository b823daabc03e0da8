"""What the stages that make data have kept: counts, and some rows and pairs to look at."""

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from jaxrl_reason.report.completions import number, show_completion, show_text
from jaxrl_reason.report.markup import Html, element, join, table
from jaxrl_reason.report.run_folder import StageRecord

_COMPLETIONS = ("completion", "chosen", "rejected")
_KNOWN = ("prompt", *_COMPLETIONS, *(f"{name}_ids" for name in _COMPLETIONS))


def show_made_data(stages: Sequence[StageRecord]) -> Html:
    """A part for each stage that makes data and has finished; nothing where there is none."""
    return join([_show_stage(stage) for stage in stages if stage.counts is not None])


def _show_stage(stage: StageRecord) -> Html:
    return join(
        element("h3", f"{stage.name}: {len(stage.rows)} rows, {len(stage.pairs)} pairs"),
        table(["", "count"], _flat(stage.counts or {}), words=1),
        [_show_row(row) for row in _some(stage.rows)],
        [_show_row(row) for row in _some(stage.pairs)],
    )


def _show_row(row: Mapping[str, Any]) -> Html:
    """A row or a pair; columns that are neither prompt nor completion stand above it."""
    others = _flat({key: value for key, value in row.items() if key not in _KNOWN})
    facts = [element("span", f"{key} ", element("b", text)) for key, text in others]
    sides = [
        element(
            "article",
            element("header", element("b", key)),
            show_completion(_text(row[key])),
            class_="sample plain",
        )
        for key in _COMPLETIONS
        if key in row
    ]
    return element(
        "article",
        element("div", facts, class_="facts"),
        show_text(_text(row["prompt"])) if "prompt" in row else None,
        element("div", sides, class_="stages"),
        class_="problem",
    )


def _some(rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The first, the middle one and the last."""
    last = len(rows) - 1
    return [rows[i] for i in sorted({0, last // 2, last})] if rows else []


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Names, with those above them in front, and values as text; null is left out."""
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        elif value is not None:
            plain = isinstance(value, float | bool)
            yield f"{prefix}{name}", number(value) if plain else _text(value)


def _text(value: Any) -> str:
    """Text, or a conversation or list as JSON."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
