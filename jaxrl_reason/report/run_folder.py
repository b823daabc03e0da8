"""What the folder of a run, or of one of its stages, has so far.

Read are the JSON files that a run leaves, and neither checkpoints nor the run's Python code, so a
report can be made of an unfinished run, of one that was moved, and on a machine without the model.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxrl_reason.data.sources import Row, read_lines
from jaxrl_reason.errors import InputError
from jaxrl_reason.metrics import read_metrics

_MEASURED = ("accuracy", "accuracy_ci95", "mean_length")  # not of stages that train nothing
INIT = "init"  # the untrained model: stage 0 of every run


@dataclass(frozen=True, kw_only=True)
class StageRecord:
    """What a stage has left.

    Attributes:
        name: its name.
        kind: its kind; `init` for the untrained model.
        parent: the stage whose model it started from, None for the untrained model.
        missing: what is not there, as a phrase; empty when nothing is.
        result: `eval.json`, None where there is none.
        summary: its row of `summary.json`, None where it has not finished.
        samples: `samples.jsonl`, a row a held-out problem.
        metrics: `metrics.jsonl`, a row a step.
        counts: what a stage that makes data says about it in `data.json`, None for others.
        rows: `rows.jsonl` of such a stage.
        pairs: `pairs.jsonl` of such a stage.
    """

    name: str
    kind: str
    parent: str | None
    missing: str
    result: Mapping[str, Any] | None
    summary: Mapping[str, Any] | None
    samples: Sequence[Row]
    metrics: Sequence[Mapping[str, float]]
    counts: Mapping[str, Any] | None
    rows: Sequence[Row]
    pairs: Sequence[Row]


@dataclass(frozen=True, kw_only=True)
class RunRecord:
    """What a run has left.

    Attributes:
        folder: of the run.
        config: `config.json`.
        stages: in order, the untrained model first; of a single stage, its parent and itself.
        only: the stage that was asked for, None for the whole run.
        versions: of the package that wrote the checkpoints, without repetition.
    """

    folder: Path
    config: Mapping[str, Any]
    stages: Sequence[StageRecord]
    only: str | None
    versions: Sequence[str]


def read_run(folder: str | Path) -> RunRecord:
    """Read the folder of a run (all stages) or of a stage (its parent and itself).

    Raises:
        InputError: it is neither, or a file in it is damaged.
    """
    folder = Path(folder).resolve()
    config = _config(folder.parent)
    if config is not None and folder.name in (INIT, *config["stages"]):
        run, only = folder.parent, folder.name
        parent = _parent(config, only)
        names = [only] if parent is None else [parent, only]
    else:
        config = _config(folder)
        if config is None or (folder / "checkpoints").exists():
            raise InputError(_advice(folder))
        run, only, names = folder, None, [INIT, *config["stages"]]
    summary = {row["stage"]: row for row in read_json(run / "summary.json") or []}
    versions = (_version(run / name / "checkpoints") for name in [INIT, *config["stages"]])
    return RunRecord(
        folder=run,
        config=config,
        stages=[_stage(run / name, config, summary.get(name)) for name in names],
        only=only,
        versions=list(dict.fromkeys(version for version in versions if version is not None)),
    )


def evaluations(run: Path, names: Sequence[str]) -> list[dict[str, Any]]:
    """The results of the stages of a run that were evaluated, each with its `stage`.

    Args:
        run: its folder.
        names: of stages in order. Other stages of `summary.json` stand before them.
    """
    rows = {row["stage"]: row for row in read_json(run / "summary.json") or []}
    first = [name for name in rows if name not in names]
    found = []
    for name in [*first, *names]:
        row = read_json(run / name / "eval.json") or rows.get(name)
        if row is not None and None not in [row[key] for key in _MEASURED]:
            found.append({**row, "stage": name})
    return found


def read_json(path: Path) -> Any:
    """The value of a JSON file, None if there is no file.

    Raises:
        InputError: it is not JSON.
    """
    if not path.exists():
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(
            f"{path} is not JSON ({error}); run or evaluate the stage again to rewrite it"
        ) from error


def _stage(
    folder: Path, config: Mapping[str, Any], summary: Mapping[str, Any] | None
) -> StageRecord:
    name = folder.name
    kind = INIT if name == INIT else config["stages"][name]["kind"]
    result = read_json(folder / "eval.json")
    data = read_json(folder / "data.json")
    metrics = folder / "metrics.jsonl"
    metrics = read_metrics(metrics) if metrics.exists() else []
    samples = _rows(folder / "samples.jsonl")
    missing = ""
    if kind == "reject":
        missing = "" if data is not None else "has not finished"
    elif result is None:
        steps = config["stages"].get(name, {}).get("steps")
        trained = f"has trained {metrics[-1]['step']} of {steps} steps, and " if metrics else ""
        missing = f"{trained}has not been evaluated"
    elif not samples:
        missing = "has no samples.jsonl; delete its eval.json and run again to have it evaluated"
    return StageRecord(
        name=name,
        kind=kind,
        parent=_parent(config, name),
        missing=missing if folder.exists() else "has not begun",
        result=result,
        summary=summary,
        samples=samples,
        metrics=metrics,
        counts=None if data is None else data["counts"],
        rows=_rows(folder / "rows.jsonl") if kind == "reject" else [],
        pairs=_rows(folder / "pairs.jsonl") if kind == "reject" else [],
    )


def _rows(path: Path) -> list[Row]:
    return [record.row for record in read_lines(path)] if path.exists() else []


def _config(folder: Path) -> Mapping[str, Any] | None:
    """The configuration of the run in a folder, None if there is none."""
    found = read_json(folder / "config.json")
    is_run = isinstance(found, dict) and isinstance(found.get("stages"), dict) and "name" in found
    return found if is_run else None


def _parent(config: Mapping[str, Any], name: str) -> str | None:
    return None if name == INIT else config["stages"][name]["parent"]


def _version(checkpoints: Path) -> str | None:
    """The version of the package that wrote the newest checkpoint."""
    steps = [int(path.name) for path in checkpoints.glob("*") if path.name.isdecimal()]
    if not steps:
        return None
    meta = read_json(checkpoints / str(max(steps)) / "meta" / "meta.json") or {}
    return meta.get("code_version")


def _advice(folder: Path) -> str:
    wanted = "give the folder of a run, such as runs/quickstart, or of a stage of it"
    if not folder.is_dir():
        return f"{folder}: no such folder; {wanted}"
    runs = sorted(path.parent.name for path in folder.glob("*/config.json") if _config(path.parent))
    if (folder / "checkpoints").exists():
        return f"{folder} is a stage outside its run; put it back, or {wanted}"
    inside = f"; runs in it: {', '.join(runs)}" if runs else ""
    return f"{folder} is no run (it has no config.json of one){inside}; {wanted}"
