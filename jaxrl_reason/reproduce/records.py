"""What is kept of a seed: the evaluation of each stage, its training series, a few completions.

The record of a stage is its `eval.json` without hashes, or `data`, the counts of what a stage of
kind `reject` kept, and

    train   {metric: [values by step]}, None where a step has none
    points  the step of each value of series that were thinned; absent where none was
    used    {steps, tokens}, of training

Numbers have six significant digits.
"""

import json
import math
import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxrl_reason.metrics import read_metrics

Record = Mapping[str, Any]

_KEPT = re.compile(r"reward|loss|entropy|completions/mean_length|rewards/.+/mean")
_POINTS = 200
_OWN = ("stage", "hash", "seconds")
_EXAMPLES = 3


def stage_record(directory: Path, series: Collection[str]) -> dict[str, Any]:
    """The record of a finished stage.

    Args:
        directory: its folder.
        series: training metrics to be kept whole.
    """
    record: dict[str, Any] = {}
    if (path := directory / "eval.json").exists():
        result = json.loads(path.read_text(encoding="utf-8"))
        record |= {name: value for name, value in result.items() if name not in _OWN}
    if (path := directory / "data.json").exists():
        meta = json.loads(path.read_text(encoding="utf-8"))
        record |= {"kind": meta["kind"], "data": meta["counts"]}
    rows = read_metrics(path) if (path := directory / "metrics.jsonl").exists() else []
    record["used"] = {
        "steps": len(rows),
        "tokens": int(sum(row.get("num_tokens", 0) for row in rows)),
    }
    return rounded(record | _training(rows, series))


def examples(folder: Path, before: str, after: str) -> list[dict[str, Any]]:
    """What two stages wrote for the first held-out problems, which nobody chose.

    Args:
        folder: of the run.
        before: name of the earlier stage.
        after: name of the later one.
    """
    sides = {"before": before, "after": after}
    lines = {
        side: (folder / stage / "samples.jsonl").read_text(encoding="utf-8").splitlines()
        for side, stage in sides.items()
    }
    found = []
    for one, other in list(zip(lines["before"], lines["after"], strict=True))[:_EXAMPLES]:
        rows = {"before": json.loads(one), "after": json.loads(other)}
        completions = {
            side: {name: row[name] for name in ("completion", "correct", "length")}
            for side, row in rows.items()
        }
        problem = {name: rows["after"][name] for name in ("prompt", "answer")}
        found.append({**problem, "stages": sides, **completions})
    return found


def series_of(record: Record, metric: str) -> tuple[list[int], list[float]]:
    """Steps and values of a training series, those steps left out that have none."""
    if metric not in record["train"]:
        return [], []
    values = record["train"][metric]
    steps = record["points"] if is_thinned(record, metric) else range(1, len(values) + 1)
    pairs = [(step, v) for step, v in zip(steps, values, strict=True) if v is not None]
    return [step for step, _ in pairs], [value for _, value in pairs]


def is_thinned(record: Record, metric: str) -> bool:
    """Whether not every step of a series was kept."""
    return len(record["train"][metric]) != record["used"]["steps"]


def rounded(value: Any) -> Any:
    """A JSON value with six significant digits; None for what is no finite number."""
    if isinstance(value, Mapping):
        return {name: rounded(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(item) for item in value]
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    return value


def _training(rows: Sequence[Mapping[str, float]], series: Collection[str]) -> dict[str, Any]:
    names = dict.fromkeys(name for row in rows for name in row)
    wanted = [name for name in names if name in series or _KEPT.fullmatch(name)]
    thinned = np.unique(np.linspace(0, len(rows) - 1, min(len(rows), _POINTS)).round().astype(int))
    train = {
        name: [
            rows[i].get(name) for i in (range(len(rows)) if name in series else thinned.tolist())
        ]
        for name in wanted
    }
    points = {} if len(thinned) == len(rows) else {"points": (thinned + 1).tolist()}
    return {"train": train, **points}
