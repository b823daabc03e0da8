"""Two numbers of the arms against each other: points, the front, hypervolumes with intervals."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from jaxrl_reason.errors import InputError
from jaxrl_reason.objectives import hypervolume, pareto_front
from jaxrl_reason.report.arms_pareto import ArmPoint, arms_pareto_figure
from jaxrl_reason.report.plots import png
from jaxrl_reason.reproduce.experiment_config import Pareto
from jaxrl_reason.reproduce.markdown import table
from jaxrl_reason.reproduce.measure import MissingStageError, measure
from jaxrl_reason.reproduce.section import Section, spread
from jaxrl_reason.reproduce.words import number


def arm_points(section: Section, plot: Pareto) -> list[ArmPoint]:
    """The arms of a plot that were run.

    The front is that of the means. The hypervolume of an arm is that of its point, seed by seed.

    Raises:
        InputError: a number is missing; in a smoke test the seed is left out instead.
    """
    config = section.experiment.config
    found = {arm: _values(section, plot, arm) for arm in plot.arms or config.arms}
    found = {arm: values for arm, values in found.items() if values}
    if not found:
        return []
    means = np.asarray([np.mean(values, axis=0) for values in found.values()])
    front = np.asarray(pareto_front(means))
    points = []
    for (arm, values), mean, on_front in zip(found.items(), means, front, strict=True):
        intervals = [spread(side)[1] for side in zip(*values, strict=True)]
        volumes = [hypervolume([value], plot.reference) for value in values]
        points.append(
            ArmPoint(
                label=section.experiment.label(arm),
                values=values,
                mean=(float(mean[0]), float(mean[1])),
                intervals=None if None in intervals else (intervals[0], intervals[1]),
                hypervolume=_with_interval(volumes),
                on_front=bool(on_front),
            )
        )
    return points


def _values(section: Section, plot: Pareto, arm: str) -> list[tuple[float, float]]:
    """Both numbers of each seed that has the arm."""
    config = section.experiment.config
    stage, values = config.arms[arm].stage, []
    for seed, records in (section.results.seeds if section.results else {}).items():
        try:
            x, y = (measure(config, records, stage, path) for path in (plot.x, plot.y))
        except MissingStageError:
            continue
        except InputError as error:
            if section.experiment.is_smoke:
                continue
            raise InputError(f"pareto, seed {seed}: {error}") from error
        values.append((x, y))
    return values


def write_pareto(section: Section, folder: Path) -> dict[str, Path]:
    """Write the plots for which there are numbers; their files by `pareto_1`, `pareto_2` and so on.

    Raises:
        InputError: as for `arm_points`.
    """
    paths = {}
    for count, plot in enumerate(section.experiment.config.pareto, start=1):
        if points := arm_points(section, plot):
            name = f"pareto_{count}"
            figure = arms_pareto_figure(points, labels=(plot.x, plot.y), reference=plot.reference)
            paths[name] = folder / f"{section.experiment.scale}_{name}.png"
            paths[name].write_bytes(png(figure))
    return paths


def pareto_tables(section: Section) -> list[str]:
    """The tables of all plots, in order; empty text for one without numbers."""
    plots = section.experiment.config.pareto
    found = [(arm_points(section, plot), plot) for plot in plots]
    return [pareto_table(points, plot) if points else "" for points, plot in found]


def pareto_table(points: Sequence[ArmPoint], plot: Pareto) -> str:
    """A row for each arm, and one for the front of the means."""
    rows = []
    for point in points:
        sides = [_with_interval(side) for side in zip(*point.values, strict=True)]
        rows.append([point.label, *sides, point.hypervolume, "yes" if point.on_front else "no"])
    all_means = hypervolume([point.mean for point in points], plot.reference)
    rows.append(["*all means together*", "-", "-", number(all_means), "-"])
    return table(["arm", plot.x, plot.y, "hypervolume", "on the front"], rows)


def _with_interval(values: Sequence[float]) -> str:
    mean, interval = spread(values)
    half = "" if interval is None else f" ± {number((interval[1] - interval[0]) / 2)}"
    return f"{number(mean)}{half}"
