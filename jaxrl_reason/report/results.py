"""The numbers of a run's stages as tables: main set, further sets, measures, by difficulty."""

from collections.abc import Mapping, Sequence
from typing import Any

from jaxrl_reason.report.completions import number
from jaxrl_reason.report.markup import Html, element, join, table
from jaxrl_reason.report.run_folder import StageRecord
from jaxrl_reason.report.tables import (
    STAGE_HEADERS,
    TEXT_COLUMNS,
    interval,
    percent,
    stage_cells,
)

Results = Mapping[str, Mapping[str, Any]]
"""Stage -> its eval.json, or one of the sets in it."""

_NUMBERS = ("accuracy", "accuracy_ci95", "format_rate", "mean_length", "problems")


def show_results(stages: Sequence[StageRecord]) -> Html:
    """The table of stages, what is missing, and the further sets and measures of `eval.json`."""
    rows = [
        dict.fromkeys(("seconds", *_NUMBERS))
        | dict(stage.summary or {})
        | {"stage": stage.name, "kind": stage.kind}
        | {key: stage.result[key] for key in _NUMBERS if stage.result is not None}
        for stage in stages
    ]
    notes = [
        f"{stage.name}: measured on what its parent wrote for training problems."
        for stage in stages
        if stage.counts is not None
    ]
    notes += [f"{stage.name} {stage.missing}." for stage in stages if stage.missing]
    results = {stage.name: stage.result for stage in stages if stage.result is not None}
    sets = dict.fromkeys(name for result in results.values() for name in result.get("sets", {}))
    return join(
        table(STAGE_HEADERS, stage_cells(rows), TEXT_COLUMNS),
        [element("p", text, class_="note") for text in notes],
        _show_details(results),
        [_show_set(name, results) for name in sets],
    )


def _show_set(name: str, results: Results) -> Html:
    """A further set of held-out problems, after the stages that were evaluated on it."""
    own = {
        stage: result["sets"][name] for stage, result in results.items() if name in _sets(result)
    }
    headers = ["stage", "accuracy", "95% interval", "format", "tokens", "problems"]
    rows = [
        [
            stage,
            percent(result["accuracy"]),
            interval(result["accuracy_ci95"]),
            percent(result["format_rate"]),
            f"{result['mean_length']:.1f}",
            str(result["problems"]),
        ]
        for stage, result in own.items()
    ]
    title = element("h3", f"Set {name}")
    return join(title, table(headers, rows, words=1), _show_details(own))


def _sets(result: Mapping[str, Any]) -> Mapping[str, Any]:
    return result.get("sets", {})


def _show_details(results: Results) -> Html:
    """Measures, and accuracy and measures by difficulty where there are several difficulties."""
    measures = {stage: result.get("measures", {}) for stage, result in results.items()}
    tables: list[Html | None] = []
    if any(measures.values()):
        tables.append(_wide("Measures", measures, number))
    accuracy = {stage: result["accuracy_by_difficulty"] for stage, result in results.items()}
    tables.append(_by_difficulty("Accuracy by difficulty", accuracy, percent))
    for name in dict.fromkeys(name for values in measures.values() for name in values):
        found = {
            stage: result.get("measures_by_difficulty", {}).get(name, {})
            for stage, result in results.items()
        }
        tables.append(_by_difficulty(f"{name} by difficulty", found, number))
    return join(tables)


def _by_difficulty(title: str, values: Mapping[str, Mapping[str, Any]], show) -> Html | None:
    several = len({name for row in values.values() for name in row}) > 1
    return _wide(title, values, show) if several else None


def _wide(title: str, values: Mapping[str, Mapping[str, Any]], show) -> Html:
    """A row a stage, a column a name; empty where a stage has no such number."""
    names = list(dict.fromkeys(name for row in values.values() for name in row))
    if all(name.lstrip("-").isdecimal() for name in names):
        names.sort(key=int)
    rows = [
        [stage, *(show(row[name]) if name in row else "" for name in names)]
        for stage, row in values.items()
    ]
    body = table(["stage", *names], rows, words=1)
    return element("details", element("summary", title), body, open=True)
