"""The plot of two numbers of a paper's arms of which neither may be bought with the other."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from jaxrl_reason.report.plots import BLACK, GREY, PALETTE, STYLE

Interval = tuple[float, float]

_MARKERS = "osD^vP*X"


class ArmPoint(NamedTuple):
    """An arm in the plane of two numbers, of which larger is better."""

    label: str
    values: Sequence[tuple[float, float]]
    """Both numbers of each seed."""
    mean: tuple[float, float]
    intervals: tuple[Interval, Interval] | None
    """Of the two means; none of a single seed."""
    hypervolume: str
    """What the legend says of it: mean and interval."""
    on_front: bool
    """Whether no other arm's mean is better in both."""


@matplotlib.rc_context(STYLE)
def arms_pareto_figure(
    points: Sequence[ArmPoint], *, labels: tuple[str, str], reference: tuple[float, float]
) -> Figure:
    """A cross for every arm, its seeds as dots, and a staircase through the best means.

    Args:
        points: of the arms, in order.
        labels: of the axes.
        reference: corner above which hypervolumes were measured.
    """
    figure = Figure(figsize=(6.4, 4.2 + 0.17 * math.ceil(len(points) / 2)))
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for number, point in enumerate(points):
        _draw(axes, point, number)
    axes.autoscale_view()
    _draw_front(axes, np.asarray([point.mean for point in points if point.on_front]))
    axes.set_xlabel(labels[0])
    axes.set_ylabel(labels[1])
    corner = ", ".join(f"{value:g}" for value in reference)
    axes.set_title(f"In brackets: hypervolume above ({corner})", loc="left", color=GREY, fontsize=8)
    handles, texts = axes.get_legend_handles_labels()
    figure.legend(handles, texts, loc="outside lower center", ncols=2)
    return figure


def _draw(axes: Axes, point: ArmPoint, number: int) -> None:
    color = PALETTE[number % len(PALETTE)]
    marker = _MARKERS[number // len(PALETTE) % len(_MARKERS)]
    x, y = point.mean
    axes.scatter(*np.asarray(point.values).T, s=8, color=color, alpha=0.45, lw=0, zorder=2)
    if point.intervals is not None:
        axes.plot(point.intervals[0], [y, y], color=color, linewidth=1.2, zorder=3)
        axes.plot([x, x], point.intervals[1], color=color, linewidth=1.2, zorder=3)
    axes.plot(
        x,
        y,
        marker=marker,
        color=color,
        markeredgecolor=BLACK if point.on_front else "white",
        markersize=7,
        linestyle="",
        zorder=4,
        label=f"{point.label} ({point.hypervolume})",
    )


def _draw_front(axes: Axes, front: np.ndarray) -> None:
    """A staircase through means [F, 2], from the left edge of the axes to the lower one."""
    front = front[np.argsort(front[:, 0])]
    (left, right), (low, high) = axes.get_xlim(), axes.get_ylim()
    x = np.concatenate([[left], front[:, 0], front[-1:, 0]])
    y = np.concatenate([front[:1, 1], front[:, 1], [low]])
    axes.step(x, y, where="pre", color=GREY, linewidth=1.2, linestyle="--", zorder=1)
    axes.set_xlim(left, right)
    axes.set_ylim(low, high)
