"""Plots of a reproduction: accuracy of its arms, their training, and the tests of its claims.

All show seeds: as dots, as bands, or as marks on an interval. Intervals are Student's over seeds.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from jaxrl_reason.report.plots import BLACK, GREY, PALETTE, STYLE, running_mean

Interval = tuple[float, float]

VERDICT_COLORS: Mapping[str, str] = {
    "supported": "#009E73",
    "refuted": "#D55E00",
    "undecided": "#6E6E6E",
    "not run": "#B5B5B5",
}
_MARKERS = {"supported": "o", "refuted": "X", "undecided": "D", "not run": "D"}
_MOST_PANELS = 4
_DASHES = ("-", (0, (5, 1.5)), (0, (1.5, 1.2)))
_ROW = 0.62  # inches of a test in the plot of claims


class ArmBar(NamedTuple):
    """An arm on one set of problems."""

    label: str
    values: Sequence[float]
    """Accuracy of each seed as a fraction."""
    mean: float
    interval: Interval | None


class ArmCurve(NamedTuple):
    """A training metric of an arm's last stage."""

    label: str
    seeds: Sequence[tuple[Sequence[float], Sequence[float]]]
    """Steps and values of each seed."""


class TestRow(NamedTuple):
    """A test of a claim."""

    __test__ = False  # for pytest: it begins with Test and is none

    name: str
    what: str
    """The number that is looked at."""
    direction: str
    """`higher`, `lower` or `within`."""
    margin: float
    verdict: str
    values: Sequence[float]
    mean: float
    interval: Interval | None
    is_ratio: bool


# Arms


@matplotlib.rc_context(STYLE)
def arms_figure(
    panels: Mapping[str, tuple[Sequence[ArmBar], Mapping[str, float]]],
) -> Figure:
    """Accuracy of every arm as a bar with its interval, the seeds as dots.

    Args:
        panels: for each set of problems, by title, the arms in order and baselines by name.
    """
    shown = dict(itertools.islice(panels.items(), _MOST_PANELS))
    labels = list(dict.fromkeys(bar.label for bars, _ in shown.values() for bar in bars))
    longest = max(map(len, labels))
    width = 3.0 * max(len(shown), 1.6) + min(0.075 * longest, 3.0)
    figure = Figure(figsize=(width, 0.46 * len(labels) + 1.25))
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, len(shown), sharey=True, squeeze=False)[0]
    for index, (title, (bars, baselines)) in enumerate(shown.items()):
        _draw_bars(axes[index], bars, labels)
        _draw_baselines(axes[index], baselines, figure.get_figheight())
        axes[index].set_title(title, loc="left")
        axes[index].set_xlabel("accuracy (%)")
        axes[index].tick_params(axis="y", length=0)
    return figure


def _draw_bars(axes: Axes, bars: Sequence[ArmBar], labels: Sequence[str]) -> None:
    for bar in bars:
        row = labels.index(bar.label)
        color = PALETTE[row % len(PALETTE)]
        mean, values = 100 * bar.mean, 100 * np.asarray(bar.values, np.float64)
        axes.barh(row, mean, height=0.62, color=color, alpha=0.35, zorder=2)
        ends = [mean, *values]
        if bar.interval is not None:
            low, high = (100 * bound for bound in bar.interval)
            # Beyond 0 and 100 an interval says nothing about an accuracy.
            low, high = max(low, 0.0), min(high, 100.0)
            axes.plot([low, high], [row, row], color=color, linewidth=2.2, zorder=3)
            ends += [low, high]
        # Seeds that agree would hide each other on one line.
        shift = 0.18 * np.linspace(-1, 1, len(values)) if len(values) > 1 else np.zeros(1)
        axes.scatter(
            values, row + shift, s=13, color="white", edgecolor=BLACK, linewidth=0.8, zorder=4
        )
        axes.annotate(
            f"{mean:.1f}",
            (max(ends), row),
            (5, 0),
            textcoords="offset points",
            va="center",
            fontsize=8,
            color=BLACK,
            zorder=5,
            bbox={"facecolor": "white", "alpha": 0.8, "edgecolor": "none", "pad": 0.8},
        )
    axes.set_yticks(range(len(labels)), labels)
    axes.set_ylim(len(labels) - 0.4, -0.6)
    axes.set_xlim(0, 113)
    axes.set_xticks(range(0, 101, 25))
    axes.grid(axis="y", visible=False)


def _draw_baselines(axes: Axes, baselines: Mapping[str, float], height: float) -> None:
    """Lines of a figure of some inches, explained below the axes."""
    styles = ("--", ":")
    for (name, value), style in zip(baselines.items(), itertools.cycle(styles), strict=False):
        label = f"{name} {100 * value:.1f}"
        axes.axvline(
            100 * value, color=GREY, linestyle=style, linewidth=1.1, zorder=2.5, label=label
        )
    if baselines:
        axes.legend(
            loc="upper left",
            bbox_to_anchor=(-0.03, -0.24 * 3.2 / height),
            ncols=2,
            handlelength=1.6,
            columnspacing=1.0,
            borderpad=0.0,
        )


# Training


@matplotlib.rc_context(STYLE)
def training_figure(panels: Mapping[str, Sequence[ArmCurve]]) -> Figure:
    """Training of the arms' last stages: the mean over seeds, and a band from lowest to highest.

    Args:
        panels: for each metric, by the label of its axis, a curve of each arm that has it.
    """
    labels = list(dict.fromkeys(curve.label for curves in panels.values() for curve in curves))
    figure = Figure(figsize=(3.7 * len(panels) + 0.5, 3.3 + 0.17 * math.ceil(len(labels) / 3)))
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    handles = {}
    for panel, (title, curves) in zip(axes, panels.items(), strict=True):
        for curve in curves:
            number = labels.index(curve.label)
            handles[curve.label] = _draw_curve(panel, curve, number)
        panel.set_title(title, loc="left")
        panel.set_xlabel("training step")
        panel.locator_params(axis="x", nbins=6, integer=True)
    figure.legend(
        [handles[label] for label in labels],
        labels,
        loc="outside lower center",
        ncols=min(len(labels), 3 if len(panels) > 1 else 2),
    )
    return figure


def _draw_curve(axes: Axes, curve: ArmCurve, number: int):
    color = PALETTE[number % len(PALETTE)]
    # Seeds of a run cut short may have fewer steps.
    count = min(len(steps) for steps, _ in curve.seeds)
    steps = np.asarray(curve.seeds[0][0][:count], np.float64)
    smooth = np.stack(
        [running_mean(np.asarray(values[:count], np.float64)) for _, values in curve.seeds]
    )
    axes.fill_between(steps, smooth.min(axis=0), smooth.max(axis=0), color=color, alpha=0.18, lw=0)
    (line,) = axes.plot(
        steps,
        smooth.mean(axis=0),
        color=color,
        linewidth=1.8,
        linestyle=_DASHES[number // len(PALETTE) % len(_DASHES)],
        marker="o" if count == 1 else "",
    )
    return line


# Claims


@matplotlib.rc_context({**STYLE, "figure.constrained_layout.use": False})
def claims_figure(rows: Sequence[TestRow]) -> Figure:
    """A row for every test: seeds and interval against the margin, the claimed side shaded.

    Every row has a scale of its own, because tests are about numbers of different kinds.
    """
    top, bottom, width = 0.55, 0.12, 9.0
    height = _ROW * len(rows) + top + bottom
    figure = Figure(figsize=(width, height))
    FigureCanvasAgg(figure)
    for index, row in enumerate(rows):
        base = (height - top - _ROW * (index + 1)) / height
        axes = figure.add_axes((0.40, base + 0.26 / height, 0.34, 0.28 / height))
        _draw_test(axes, row)
        middle = base + 0.40 / height
        figure.text(0.012, middle, row.name, va="center", weight="bold")
        figure.text(0.065, middle, _wrapped(row.what, 44), va="center", fontsize=8, linespacing=1.1)
        number = _written(row.mean)
        if row.interval is not None:
            number += f"  [{_written(row.interval[0])}, {_written(row.interval[1])}]"
        figure.text(0.755, middle + 0.07 / height, number, va="center", fontsize=8)
        color = VERDICT_COLORS[row.verdict]
        place = (0.755, middle - 0.09 / height)
        figure.text(*place, row.verdict, va="center", fontsize=8, color=color, weight="bold")
    figure.text(
        0.012,
        1 - 0.2 / height,
        "dots: seeds    line: 95 % interval    dashed: margin    shaded: the claimed side",
        fontsize=8,
        color=GREY,
        va="center",
    )
    return figure


def _draw_test(axes: Axes, row: TestRow) -> None:
    color = VERDICT_COLORS[row.verdict]
    margins = [row.margin]
    if row.direction == "within":
        margins = [1 / row.margin if row.is_ratio else -row.margin, row.margin]
    points = [*row.values, *(row.interval or ()), *margins]
    if row.is_ratio:
        axes.set_xscale("log")
    low, high = _limits(points, log=row.is_ratio)
    axes.set_xlim(low, high)
    sides = {"higher": (row.margin, high), "lower": (low, row.margin)}
    axes.axvspan(*sides.get(row.direction, tuple(margins)), color="#0072B2", alpha=0.09, lw=0)
    for margin in margins:
        axes.axvline(margin, color=BLACK, linestyle="--", linewidth=1.0)
    if row.interval is not None:
        axes.plot(row.interval, [0, 0], color=color, linewidth=2.4, solid_capstyle="butt")
    axes.plot(row.mean, 0, marker=_MARKERS[row.verdict], color=color, markersize=7, zorder=4)
    axes.scatter(row.values, [-0.62] * len(row.values), s=9, color=BLACK, alpha=0.65, lw=0)
    axes.set_ylim(-1, 0.9)
    axes.set_yticks([])
    axes.grid(visible=False)
    axes.spines["left"].set_visible(False)
    axes.tick_params(axis="x", labelsize=7, pad=1.5, length=2)
    if row.is_ratio:
        ticks = _ratio_ticks(low, high)
        axes.set_xticks(ticks, [_written(tick) for tick in ticks])
        axes.set_xticks([], minor=True)
    else:
        axes.locator_params(axis="x", nbins=5)


def _limits(points: Sequence[float], *, log: bool) -> tuple[float, float]:
    """A little more than the range of some points."""
    hidden, shown = (math.log, math.exp) if log else (float, float)
    low, high = (hidden(bound) for bound in (min(points), max(points)))
    room = 0.08 * (high - low) or 0.1 * abs(high) or 0.1
    return shown(low - room), shown(high + room)


def _ratio_ticks(low: float, high: float) -> list[float]:
    """Round numbers between two bounds of a logarithmic scale: even steps where it is short."""
    if high / low < 5:
        ticks = MaxNLocator(5).tick_values(low, high)
    else:
        decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        ticks = [step * 10.0**decade for decade in decades for step in (1, 2, 5)]
    inside = [float(tick) for tick in ticks if low <= tick <= high]
    return inside[:: math.ceil(len(inside) / 6)]


def _written(number: float) -> str:
    """Three digits, and as few zeros as possible."""
    return f"{0.0 if abs(number) < 1e-12 else number:.3g}".replace("-", "\N{MINUS SIGN}")


def _wrapped(text: str, letters: int) -> str:
    """Two lines where one is too long; the second ends in dots where that is not enough."""
    if len(text) <= letters:
        return text
    cut = text.rfind(" ", 0, letters + 1)
    cut = cut if cut > 0 else letters
    rest = text[cut:].strip()
    return f"{text[:cut]}\n{rest if len(rest) <= letters else rest[: letters - 1] + '…'}"
