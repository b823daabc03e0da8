"""An experiment at one scale with its results: what the page and the plots show of it."""

import dataclasses
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxrl_reason.report.plots import png
from jaxrl_reason.report.reproduction import (
    ArmBar,
    ArmCurve,
    TestRow,
    arms_figure,
    claims_figure,
    training_figure,
)
from jaxrl_reason.reproduce.claims import Verdict, t_interval
from jaxrl_reason.reproduce.experiment import Experiment
from jaxrl_reason.reproduce.records import Record, series_of
from jaxrl_reason.reproduce.results import Results
from jaxrl_reason.reproduce.words import what

Interval = tuple[float, float]

MAIN = "held-out problems"
"""Name of the main evaluation among the sets."""
_PANELS = {
    "reward": "reward",
    "rewards/accuracy/mean": "accuracy reward",
    "completions/mean_length": "mean length (tokens)",
}
_LOSS = {"loss": "loss"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Section:
    """One scale of an experiment; without results it is only described."""

    experiment: Experiment
    results: Results | None = None
    verdicts: Sequence[Verdict] = ()

    @property
    def has_results(self) -> bool:
        """Whether any seed was run."""
        return self.results is not None and bool(self.results.entries)

    def records_of(self, arm: str) -> dict[str, Record]:
        """The record of an arm's last stage, of every seed that has it."""
        stage = self.experiment.config.arms[arm].stage
        seeds = self.results.seeds if self.results else {}
        return {seed: records[stage] for seed, records in seeds.items() if stage in records}

    def sets(self) -> list[str]:
        """The evaluation sets, the main one first."""
        return [MAIN, *self.experiment.config.run.evaluation.sets]

    def baselines(self, name: str) -> Mapping[str, float]:
        """`constant_answer` and `chance` on a set."""
        known = self.results.baselines if self.results else {}
        return known.get("" if name == MAIN else name, {})


def part(record: Record, name: str) -> Mapping[str, Any]:
    """The part of a stage's record that is about an evaluation set."""
    return record if name == MAIN else record["sets"][name]


def spread(values: Sequence[float]) -> tuple[float, Interval | None]:
    """Mean and 95 % interval; none of a single value."""
    mean = statistics.fmean(values)
    return mean, t_interval(values) if len(values) > 1 else None


def write_plots(section: Section, folder: Path) -> dict[str, Path]:
    """Write the plots for which there are numbers; their files by what they show."""
    scale = section.experiment.scale
    figures = {}
    if panels := _arm_panels(section):
        figures["arms"] = arms_figure(panels)
    if curves := _training_panels(section):
        figures["training"] = training_figure(curves)
    if rows := _test_rows(section):
        figures["claims"] = claims_figure(rows)
    paths = {}
    for name, figure in figures.items():
        paths[name] = folder / f"{scale}_{name}.png"
        paths[name].write_bytes(png(figure))
    return paths


def _arm_panels(section: Section):
    panels = {}
    for name in section.sets():
        bars = []
        for arm in section.experiment.config.arms:
            values = [part(record, name)["accuracy"] for record in section.records_of(arm).values()]
            if values:
                bars.append(ArmBar(section.experiment.label(arm), values, *spread(values)))
        if bars:
            known = section.baselines(name)
            panels[name] = (bars, {key.replace("_", " "): value for key, value in known.items()})
    return panels


def _training_panels(section: Section) -> dict[str, list[ArmCurve]]:
    """Rewards and lengths; the loss where no arm ends in reinforcement learning."""
    panels = {label: _curves(section, metric) for metric, label in _PANELS.items()}
    if not any(panels.values()):
        panels = {label: _curves(section, metric) for metric, label in _LOSS.items()}
    if panels.get("accuracy reward") == panels.get("reward"):
        panels.pop("accuracy reward", None)
    return {label: curves for label, curves in panels.items() if curves}


def _curves(section: Section, metric: str) -> list[ArmCurve]:
    curves = []
    for arm in section.experiment.config.arms:
        seeds = [series_of(record, metric) for record in section.records_of(arm).values()]
        seeds = [series for series in seeds if series[0]]
        if seeds:
            curves.append(ArmCurve(section.experiment.label(arm), seeds))
    return curves


def _test_rows(section: Section) -> list[TestRow]:
    rows = []
    for verdict in section.verdicts:
        for outcome in verdict.outcomes:
            if outcome.mean is None:
                continue
            row = TestRow(
                name=verdict.name,
                what=what(section.experiment, outcome.test),
                direction=outcome.test.direction,
                margin=outcome.test.margin,
                verdict=outcome.verdict,
                values=list(outcome.values.values()),
                mean=outcome.mean,
                interval=outcome.interval,
                is_ratio=outcome.test.ratio,
            )
            rows.append(row)
    return rows
