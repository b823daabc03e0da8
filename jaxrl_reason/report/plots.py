"""A run's plots: training curves, accuracy against length, and the Pareto front of a MORL stage.

`make_plots` reads a run directory and writes PNG files; the `*_figure` functions build the figures
from numbers. Figures are made without pyplot and with a style of their own, so neither an open
window nor a caller's matplotlib settings matter. Colours are those of Okabe and Ito (2008), which
colour-blind readers can tell apart.
"""

import io
import itertools
import math
import os
import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NotRequired, TypedDict

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Annotation
from matplotlib.ticker import MaxNLocator
from matplotlib.transforms import Bbox

from jaxrl_reason import files
from jaxrl_reason.metrics import read_metrics
from jaxrl_reason.report.run_folder import evaluations

PALETTE = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9")
GREY = "#6E6E6E"
BLACK = "#222222"
_DPI = 150
_ARROW_PIXELS = 24  # two markers closer than this leave no room for an arrow
_LEGEND_LETTERS = 44  # that fit over a panel of the curves
STYLE: dict[Any, Any] = {
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#E6E6E6",
    "legend.frameon": False,
    "legend.fontsize": 8,
    "figure.constrained_layout.use": True,
    "figure.facecolor": "white",
}
_ROWS_OF_CURVES = 4
# (what the metric is called in metrics.jsonl, label and unit). A stage shows the first four it has;
# a group, where there is one, is the name of one of several lines.
_PANELS = (
    (r"loss", "loss"),
    (r"reward|rewards/(?P<group>.+)/mean", "reward"),
    (r"mean_token_accuracy", "token accuracy\n(fraction)"),
    (r"rewards/accuracies", "preference accuracy\n(fraction)"),
    (r"rewards/margins", "reward margin (nats)"),
    (r"completions/mean_length", "completion length\n(tokens)"),
    (r"objectives/weights/(?P<group>.+)", "objective weight"),
    (r"entropy", "entropy\n(nats per token)"),
    (r"kl", "KL to reference\n(nats per token)"),
    (r"grad_norm", "gradient norm"),
)


class Pareto(TypedDict):
    """The points of a MORL stage; the arguments of `pareto_figure`."""

    stage: str
    points: Any
    """[N, 2] accuracy and brevity, one row an evaluation or a training step."""
    steps: Any
    """[N] training step of each point."""
    hypervolume: float
    reference: Sequence[float]
    """The corner [2] above which the hypervolume was measured."""
    labels: NotRequired[tuple[str, str]]


def make_plots(
    run_dir: str | os.PathLike, stages: Sequence[tuple[str, str]], pareto: Pareto | None
) -> list[Path]:
    """Write `curves.png`, `accuracy_length.png` and `pareto.png` into `run_dir`.

    Args:
        stages: (name, kind) in the order they ran. Read are `<name>/metrics.jsonl` and
            `<name>/eval.json`, or else the stage's row in `summary.json`; from there come also the
            stages that have no entry here, such as the untrained model.
        pareto: points of the MORL stage, or None when there was none.

    Returns:
        The files written; a plot for which the run has no numbers is left out.
    """
    run_dir = Path(run_dir)
    curves = []
    for name, kind in stages:
        path = run_dir / name / "metrics.jsonl"
        curves.append((name, kind, read_metrics(path) if path.exists() else []))
    measured = evaluations(run_dir, [name for name, _ in stages])
    images = draw_plots(curves, measured, pareto)
    for name, image in images.items():
        with files.chosen(run_dir / name, "let the folder be written to"):
            (run_dir / name).write_bytes(image)
    return [run_dir / name for name in images]


def draw_plots(
    curves: Sequence[tuple[str, str, Sequence[Mapping[str, float]]]],
    measured: Sequence[Mapping[str, Any]],
    pareto: Pareto | None,
) -> dict[str, bytes]:
    """The plots of a run as PNG images by file name, those without numbers left out.

    Args:
        curves: (name, kind, rows of its metrics.jsonl) of the stages in order.
        measured: as in `accuracy_length_figure`; rows without an interval are no evaluations.
        pareto: as in `make_plots`.
    """
    figures: dict[str, Figure] = {}
    curves = [curve for curve in curves if any(_panels_of(curve[2]))]
    if curves:
        figures["curves.png"] = curves_figure(curves)
    measured = [row for row in measured if row["accuracy_ci95"] is not None]
    if measured:
        figures["accuracy_length.png"] = accuracy_length_figure(measured)
    if pareto is not None and len(pareto["points"]):
        figures["pareto.png"] = pareto_figure(**pareto)
    return {name: png(figure) for name, figure in figures.items()}


def png(figure: Figure) -> bytes:
    """A figure as a PNG image."""
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=_DPI)
    return file.getvalue()


@matplotlib.rc_context(STYLE)
def curves_figure(stages: Sequence[tuple[str, str, Sequence[Mapping[str, float]]]]) -> Figure:
    """Small multiples: a column per stage, loss, rewards and what else it logged.

    Args:
        stages: (name, kind, rows of its metrics.jsonl), in order.
    """
    columns = [_panels_of(rows) for _, _, rows in stages]
    height = max(map(len, columns))
    figure = Figure(figsize=(3.1 * len(stages) + 0.4, 2.0 * height + 0.6))
    FigureCanvasAgg(figure)
    axes = figure.subplots(height, len(stages), squeeze=False)
    groups = sorted({g for panels in columns for lines in panels.values() for g in lines if g})
    line_colors = dict(zip(groups, itertools.cycle(PALETTE), strict=False))
    stage_colors = _stage_colors([name for name, _, _ in stages])
    for column, (name, kind, rows) in enumerate(stages):
        title = name if name == kind else f"{name} ({kind})"
        panels = columns[column]
        for row, (label, lines) in enumerate(panels.items()):
            main = stage_colors[name] if len(lines) == 1 else BLACK
            _draw_panel(axes[row, column], rows, lines, {"": main, **line_colors})
            axes[row, column].set_ylabel(label)
        above_legend = 8 + 12 * _legend_shape(next(iter(panels.values())))[0]
        axes[0, column].set_title(title, color=stage_colors[name], weight="bold", pad=above_legend)
        for row in range(len(panels), height):
            figure.delaxes(axes[row, column])
        figure.align_ylabels(axes[: len(panels), column])
    figure.supxlabel("training step   (faint: as logged, line: running mean)", fontsize=9)
    return figure


def _panels_of(rows: Sequence[Mapping[str, float]]) -> dict[str, dict[str, str]]:
    """Label of a panel -> {name of a line, "" for the main one: metric}."""
    names = dict.fromkeys(name for row in rows for name in row)
    panels: dict[str, dict[str, str]] = {}
    for pattern, label in _PANELS:
        matches = [match for name in names if (match := re.fullmatch(pattern, name))]
        lines = {match.groupdict().get("group") or "": match.string for match in matches}
        if any(len(_series(rows, metric)[0]) for metric in lines.values()):
            panels[label] = dict(sorted(lines.items()))
    return dict(itertools.islice(panels.items(), _ROWS_OF_CURVES))


def _draw_panel(
    axes: Axes,
    rows: Sequence[Mapping[str, float]],
    lines: Mapping[str, str],
    colors: Mapping[str, str],
) -> None:
    for group, metric in lines.items():
        steps, values = _series(rows, metric)
        main = not group
        axes.plot(steps, values, color=colors[group], alpha=0.25, linewidth=0.8)
        axes.plot(
            steps,
            running_mean(values),
            color=colors[group],
            linewidth=1.8 if main else 1.2,
            marker="o" if len(steps) == 1 else "",
            markersize=3,
            label=group or "reward",
            zorder=3 if main else 2.5,
        )
    if len(lines) > 1:
        # Above the axes: inside, it would cover the curves.
        axes.legend(
            loc="lower left",
            bbox_to_anchor=(-0.02, 0.98),
            ncols=_legend_shape(lines)[1],
            handlelength=0.8,
            handletextpad=0.3,
            columnspacing=0.7,
            borderpad=0.1,
        )
    first, last = rows[0]["step"], rows[-1]["step"]
    margin = max(0.02 * (last - first), 0.5)
    axes.set_xlim(first - margin, last + margin)
    axes.locator_params(axis="x", nbins=5, integer=True)
    axes.locator_params(axis="y", nbins=5)


def _legend_shape(lines: Collection[str]) -> tuple[int, int]:
    """Rows and columns of the legend over a panel; none for a single line."""
    if len(lines) == 1:
        return 0, 0
    columns = max(1, _LEGEND_LETTERS // (3 + max(len(name or "reward") for name in lines)))
    return math.ceil(len(lines) / columns), columns


def _series(rows: Sequence[Mapping[str, float]], metric: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps [N] and values [N] of the rows in which the metric is a finite number."""
    pairs = [(r["step"], r[metric]) for r in rows if metric in r and np.isfinite(r[metric])]
    table = np.asarray(pairs, dtype=np.float64).reshape(-1, 2)
    return table[:, 0], table[:, 1]


def running_mean(values: np.ndarray) -> np.ndarray:
    """Centred mean over a tenth of the curve; the window shrinks at both ends. [N] -> [N]."""
    size = len(values)
    half = size // 20
    sums = np.concatenate([np.zeros(1), np.cumsum(values)])
    low = np.maximum(np.arange(size) - half, 0)
    high = np.minimum(np.arange(size) + half + 1, size)
    return (sums[high] - sums[low]) / (high - low)


def _stage_colors(names: Sequence[str]) -> dict[str, str]:
    trained = [name for name in names if name != "init"]
    return {"init": GREY, **dict(zip(trained, itertools.cycle(PALETTE), strict=False))}


@matplotlib.rc_context(STYLE)
def accuracy_length_figure(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """Accuracy against mean completion length, one point a stage, arrows in the order given.

    Args:
        rows: each with `stage`, `accuracy` and `accuracy_ci95` as fractions, and `mean_length`.
    """
    names = [row["stage"] for row in rows]
    points = np.asarray([(row["mean_length"], 100 * row["accuracy"]) for row in rows], np.float64)
    bounds = 100 * np.asarray([row["accuracy_ci95"] for row in rows], np.float64)
    colors = _stage_colors(names)
    figure = Figure(figsize=(6.4, 4.4))
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for name, (x, y), (low, high) in zip(names, points, bounds, strict=True):
        # The interval is about the estimate, but rounding may leave it on the wrong side by 1e-16.
        error = [[max(y - low, 0.0)], [max(high - y, 0.0)]]
        axes.errorbar(x, y, error, fmt="o", color=colors[name], markersize=7, capsize=3, zorder=3)
    axes.margins(0.14)
    low, high = axes.get_ylim()
    axes.set_ylim(max(low, -6), min(high, 106))
    axes.set_xlabel("mean completion length (tokens)")
    axes.set_ylabel("accuracy on held-out problems (%), 95% interval")
    axes.set_title("Accuracy against length, stage by stage", loc="left")
    figure.draw_without_rendering()  # fixes the scale between data and pixels
    pixels = axes.transData.transform(points)
    for index, gap in enumerate(np.linalg.norm(np.diff(pixels, axis=0), axis=1)):
        if gap > _ARROW_PIXELS:
            arrow = {"arrowstyle": "-|>", "color": "#9A9A9A", "shrinkA": 8, "shrinkB": 8, "lw": 1.2}
            axes.annotate("", tuple(points[index + 1]), tuple(points[index]), arrowprops=arrow)
    labels = [f"{name}  {y:.1f} %" for name, (_, y) in zip(names, points, strict=True)]
    _place_labels(figure, points, bounds, labels, [colors[name] for name in names])
    return figure


def _place_labels(
    figure: Figure,
    points: np.ndarray,
    bounds: np.ndarray,
    labels: Sequence[str],
    colors: Sequence[str],
) -> None:
    """Put each label beside its point where it covers least: intervals, arrows, other labels."""
    (axes,) = figure.axes
    to_pixels = axes.transData.transform
    lines = [[(x, low), (x, high)] for (x, _), (low, high) in zip(points, bounds, strict=True)]
    lines += list(itertools.pairwise(map(tuple, points)))
    along = np.linspace(0.0, 1.0, 60)[:, None]
    drawn = np.concatenate(
        [to_pixels(np.asarray(a) * (1 - along) + np.asarray(b) * along) for a, b in lines]
    )
    places = list(itertools.product((10, 18, 28, 40), np.linspace(0, 2, 16, endpoint=False)))
    placed: list[Bbox] = []
    for index, (label, color) in enumerate(zip(labels, colors, strict=True)):
        text = axes.annotate(
            label,
            tuple(points[index]),
            (0, 0),
            textcoords="offset points",
            color=color,
            weight="bold",
        )
        text.set_in_layout(False)

        def cost(place: tuple[int, float], text: Annotation = text, index: int = index) -> float:
            box = _move(text, *place)
            gaps = _distances(box, to_pixels(points))
            outside = box.x0 < axes.bbox.x0 or box.x1 > axes.bbox.x1
            outside = outside or box.y0 < axes.bbox.y0 or box.y1 > axes.bbox.y1
            return (
                3000 * outside
                + 1000 * sum(box.overlaps(other) for other in placed)
                + 200 * (gaps[index] > gaps.min())  # it would read as another point's label
                + 20 * box.count_contains(drawn)
                + place[0]
            )

        placed.append(_move(text, *min(places, key=cost)))


def _move(text: Annotation, radius: float, angle: float) -> Bbox:
    """Move a label `radius` points from its point at `angle` half turns; its box in pixels."""
    cosine, sine = np.cos(np.pi * angle), np.sin(np.pi * angle)
    # The side of the label that faces the point: left, middle or right third of the circle.
    across, up = (int(value > -0.34) + int(value > 0.34) for value in (cosine, sine))
    text.set(
        position=(radius * cosine, radius * sine),
        horizontalalignment=("right", "center", "left")[across],
        verticalalignment=("top", "center", "bottom")[up],
    )
    return text.get_window_extent().padded(2)


def _distances(box: Bbox, points: np.ndarray) -> np.ndarray:
    """Pixels from a box to each point; 0 inside. [N, 2] -> [N]."""
    nearest = np.clip(points, np.asarray(box.min)[None, :], np.asarray(box.max)[None, :])
    return np.linalg.norm(points - nearest, axis=1)


@matplotlib.rc_context(STYLE)
def pareto_figure(
    points: Any,
    steps: Any,
    *,
    stage: str,
    hypervolume: float,
    reference: Sequence[float],
    labels: tuple[str, str] = ("accuracy (fraction)", "brevity (fraction, 1 = shortest)"),
) -> Figure:
    """Points of two objectives coloured by step, the non-dominated ones joined by a staircase.

    Shaded is the region whose area above `reference` is the hypervolume.

    Args:
        points: [N, 2], larger is better in both.
        steps: [N] training step of each point.
    """
    points, steps = np.asarray(points, np.float64), np.asarray(steps)
    if points.ndim != 2 or points.shape[1] != 2 or steps.shape != points.shape[:1]:
        raise ValueError(f"want points [N, 2] and steps [N], got {points.shape} and {steps.shape}")
    figure = Figure(figsize=(6.4, 4.6))
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    front = _front(points)
    corners = np.maximum(front, np.asarray(reference, np.float64)[None, :])
    x = np.concatenate([[reference[0]], corners[:, 0], corners[-1:, 0]])
    y = np.concatenate([corners[:1, 1], corners[:, 1], [reference[1]]])
    axes.fill_between(x, y, reference[1], step="pre", color="#D55E00", alpha=0.08, linewidth=0)
    axes.step(x, y, where="pre", color="#D55E00", linewidth=1.5, zorder=2, label="Pareto front")
    shown = axes.scatter(*points.T, c=steps, cmap="viridis", s=22, zorder=3, linewidth=0)
    axes.scatter(*front.T, s=64, facecolor="none", edgecolor="#D55E00", linewidth=1.5, zorder=4)
    low, high = points.min(axis=0), points.max(axis=0)
    margin = np.maximum(0.08 * (high - low), 0.01)
    axes.set_xlim(low[0] - margin[0], high[0] + margin[0])
    axes.set_ylim(low[1] - margin[1], high[1] + margin[1])
    axes.set_xlabel(labels[0])
    axes.set_ylabel(labels[1])
    corner = ", ".join(f"{value:g}" for value in reference)
    axes.set_title(
        f"Pareto front of {stage}: hypervolume {hypervolume:.4f}, reference point ({corner})",
        loc="left",
    )
    axes.locator_params(nbins=7)
    figure.colorbar(shown, ax=axes, label="training step", ticks=MaxNLocator(8, integer=True))
    return figure


def _front(points: np.ndarray) -> np.ndarray:
    """The points [F, 2] that no other one beats in both objectives, by growing first objective."""
    best_first = points[np.lexsort((-points[:, 1], -points[:, 0]))]
    best_before = np.maximum.accumulate(np.concatenate([[-np.inf], best_first[:-1, 1]]))
    return best_first[best_first[:, 1] > best_before][::-1]
