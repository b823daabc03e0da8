"""The number that a metric path names in the records of a seed.

A path has dots between keys, which may themselves contain dots and slashes: `accuracy`,
`measures_by_difficulty.skip.1`, `train.completions/mean_length@last5`. What follows `@` reduces a
series: `lastN`, `firstN`, `mean`, `min`, `max`, `std`, and `step_above_X`, the first step at which
the mean of five values in a row exceeds X, or one more than the number of steps if none does.
"""

import math
import re
import statistics
from collections.abc import Mapping
from typing import Any

from jaxrl_reason.errors import InputError, nearest
from jaxrl_reason.plugins import load_object
from jaxrl_reason.reproduce.experiment_config import DERIVED, ExperimentConfig
from jaxrl_reason.reproduce.records import Record, is_thinned, series_of

_TRAIN = "train."
_WINDOW = 5
_REDUCTION = re.compile(r"(last|first)([1-9]\d*)|mean|min|max|std|step_above_(-?\d+(?:\.\d+)?)")


class MissingStageError(Exception):
    """A stage that a number depends on has no record."""


def measure(
    config: ExperimentConfig, records: Mapping[str, Record], stage: str, metric: str
) -> float:
    """The number at a path.

    Args:
        config: has the derived metrics.
        records: of a seed, by stage.
        stage: whose number it is.
        metric: its path.

    Raises:
        InputError: there is no such metric, or it is no finite number.
        MissingStageError: the stage was not run.
    """
    if stage not in records:
        raise MissingStageError(stage)
    where = f"stage {stage}, metric {metric!r}"
    path, _, reduction = metric.partition("@")
    if metric.startswith(DERIVED):
        value = _derived(config, records, stage, metric.removeprefix(DERIVED), where)
    elif path.startswith(_TRAIN) and reduction:
        value = _reduced(records[stage], path.removeprefix(_TRAIN), reduction, where)
    elif path.startswith(_TRAIN) or reduction:
        raise InputError(
            f"{where}: a training series is written train.NAME@REDUCTION with one of "
            "last5, first5, mean, min, max, std, step_above_0.8"
        )
    else:
        value = _at(records[stage], path, where)
    number = isinstance(value, int | float)
    if not number or not math.isfinite(value):
        found = value if number or value is None else f"a {type(value).__name__}"
        raise InputError(f"{where} is {found}, and no finite number")
    return float(value)


def _at(container: Any, path: str, where: str) -> Any:
    """The value below a dotted path, of which the longest key that fits is taken first."""
    if not isinstance(container, Mapping):
        raise InputError(f"{where}: nothing has a part {path!r}")
    parts = path.split(".")
    for count in range(len(parts), 0, -1):
        key, rest = ".".join(parts[:count]), ".".join(parts[count:])
        if key in container:
            return _at(container[key], rest, where) if rest else container[key]
    raise InputError(f"{where}: there is no {path!r}; {nearest(path, container)}")


def _derived(
    config: ExperimentConfig, records: Mapping[str, Record], stage: str, name: str, where: str
) -> Any:
    metric = config.metrics[name]
    function = load_object(metric.function, "metric function")
    try:
        return function(records, stage, **metric.options)
    except KeyError as error:
        missing = error.args[0] if error.args else None
        if missing in config.run.stages and missing not in records:
            raise MissingStageError(missing) from error
        raise InputError(f"{where}: {metric.function} finds no {missing!r}") from error
    except (ArithmeticError, TypeError, ValueError) as error:
        raise InputError(
            f"{where}: {type(error).__name__} in {metric.function}: {error}"
        ) from error


def _reduced(record: Record, name: str, reduction: str, where: str) -> float:
    match = _REDUCTION.fullmatch(reduction)
    if match is None:
        raise InputError(
            f"{where}: @{reduction} is no reduction; use last5, first5, mean, min, max, std or "
            "step_above_0.8"
        )
    if name not in record["train"]:
        raise InputError(f"{where}: there is no {name!r}; {nearest(name, record['train'])}")
    if is_thinned(record, name):
        raise InputError(
            f"{where}: of this series only some steps were kept, because no test read it when the "
            "seed ran; run the seed again with --discard, which trains nothing anew while its "
            "folder is there"
        )
    steps, values = series_of(record, name)
    if not values:
        raise InputError(f"{where}: the series has no finite number")
    if match[1]:
        count = int(match[2])
        return statistics.fmean(values[-count:] if match[1] == "last" else values[:count])
    if match[3]:
        return _step_above(steps, values, float(match[3]), record["used"]["steps"])
    simple = {"mean": statistics.fmean, "min": min, "max": max, "std": statistics.pstdev}
    return simple[reduction](values)


def _step_above(steps: list[int], values: list[float], bound: float, last: int) -> float:
    window = min(_WINDOW, len(values))
    for end in range(window, len(values) + 1):
        if statistics.fmean(values[end - window : end]) > bound:
            return steps[end - 1]
    return last + 1
