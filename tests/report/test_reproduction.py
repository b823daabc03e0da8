"""Plots of reproductions: what is drawn where, and that labels keep apart."""

import itertools

import numpy as np
import pytest
from matplotlib.colors import to_hex

from jaxrl_reason.report.plots import PALETTE
from jaxrl_reason.report.reproduction import (
    VERDICT_COLORS,
    ArmBar,
    ArmCurve,
    TestRow,
    _ratio_ticks,
    arms_figure,
    claims_figure,
    training_figure,
)
from jaxrl_reason.report.verdicts import VerdictLine, verdict_table

BARS = [
    ArmBar("first", [0.5, 0.7], 0.6, (-0.1, 1.3)),
    ArmBar("second, with a label that is rather long", [0.2], 0.2, None),
]
ROW = TestRow(
    name="C1",
    what="accuracy, first minus second",
    direction="higher",
    margin=0.1,
    verdict="supported",
    values=[0.2, 0.3, 0.4],
    mean=0.3,
    interval=(0.15, 0.45),
    is_ratio=False,
)


def overlaps(figure):
    """Pairs of texts that lie upon each other."""
    figure.canvas.draw()
    texts = [t for axes in figure.axes for t in (*axes.texts, *axes.get_yticklabels(), axes.title)]
    boxes = [t.get_window_extent() for t in [*figure.texts, *texts] if t.get_text()]
    return [(a, b) for a, b in itertools.combinations(boxes, 2) if a.overlaps(b)]


def test_bars_have_means_seeds_intervals_and_baselines():
    panels = {"all": (BARS, {"chance": 0.1}), "hard": (BARS[:1], {})}
    figure = arms_figure(panels)
    axes, hard = figure.axes
    assert [patch.get_width() for patch in axes.patches] == pytest.approx([60, 20])
    seeds = [c.get_offsets()[:, 0] for c in axes.collections]
    np.testing.assert_allclose(np.concatenate(seeds), [50, 70, 20])
    # The interval ends where an accuracy does; one seed has none.
    interval, baseline = axes.get_lines()
    np.testing.assert_allclose(interval.get_xdata(), [0, 100])
    assert baseline.get_xdata()[0] == pytest.approx(10)
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["chance 10.0"]
    assert [text.get_text() for text in axes.texts] == ["60.0", "20.0"]
    assert [text.get_text() for text in axes.get_yticklabels()] == [bar.label for bar in BARS]
    assert hard.get_legend() is None
    assert overlaps(figure) == []


def test_curves_are_means_over_seeds_with_their_range():
    curve = ArmCurve("one", [([1, 2, 3], [0.0, 1.0, 2.0]), ([1, 2], [1.0, 2.0])])
    other = ArmCurve("two", [([1], [5.0])])
    figure = training_figure({"reward": [curve, other], "length": [other]})
    reward, length = figure.axes
    first, second = reward.get_lines()
    np.testing.assert_allclose(first.get_xydata(), [(1, 0.5), (2, 1.5)])
    assert (second.get_marker(), first.get_marker()) == ("o", "")
    # An arm has one colour everywhere.
    assert length.get_lines()[0].get_color() == second.get_color() == PALETTE[1]
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["one", "two"]


def test_many_arms_differ_in_colour_or_dashes():
    curves = [ArmCurve(str(i), [([1, 2], [0.0, float(i)])]) for i in range(9)]
    (axes,) = training_figure({"reward": curves}).axes
    styles = [(line.get_color(), str(line.get_linestyle())) for line in axes.get_lines()]
    assert len(set(styles)) == 9


@pytest.mark.parametrize(
    ("row", "margins", "side"),
    [
        (ROW, [0.1], (0.1, None)),
        (ROW._replace(direction="lower"), [0.1], (None, 0.1)),
        (ROW._replace(direction="within"), [-0.1, 0.1], (-0.1, 0.1)),
        (ROW._replace(direction="within", margin=2.0, is_ratio=True), [0.5, 2.0], (0.5, 2.0)),
    ],
)
def test_a_test_has_its_margin_and_its_claimed_side(row, margins, side):
    (axes,) = claims_figure([row]).axes
    *lines, interval, mean = axes.get_lines()
    assert [line.get_xdata()[0] for line in lines] == margins
    np.testing.assert_allclose(interval.get_xdata(), row.interval)
    np.testing.assert_allclose(mean.get_xdata(), row.mean)
    assert to_hex(mean.get_color()) == VERDICT_COLORS["supported"].lower()
    np.testing.assert_allclose(axes.collections[-1].get_offsets()[:, 0], row.values)
    (span,) = axes.patches
    low, high = span.get_x(), span.get_x() + span.get_width()
    limits = axes.get_xlim()
    expected = [limits[i] if bound is None else bound for i, bound in enumerate(side)]
    np.testing.assert_allclose([low, high], expected)


def test_tests_are_labelled_with_numbers_and_verdicts():
    one = ROW._replace(name="C2", verdict="undecided", values=[0.3], interval=None)
    same = ROW._replace(name="C3", values=[0.1, 0.1], mean=0.1, interval=(0.1, 0.1))
    long = ROW._replace(name="C4", what="a rather long path to a number, " * 4)
    figure = claims_figure([ROW, one, same, long])
    texts = [text.get_text() for text in figure.texts]
    assert "0.3  [0.15, 0.45]" in texts
    assert "0.3" in texts
    assert texts.count("supported") == 3
    assert any("\n" in text and text.endswith("…") for text in texts)
    assert len(figure.axes) == 4
    assert overlaps(figure) == []


@pytest.mark.parametrize(("low", "high"), [(0.97, 1.02), (0.5, 1.1), (0.01, 3.0), (1.0, 4000.0)])
def test_ratios_have_a_few_round_ticks(low, high):
    ticks = _ratio_ticks(low, high)
    assert 2 <= len(ticks) <= 6
    assert all(low <= tick <= high for tick in ticks)


def test_the_table_of_verdicts_shows_text_as_it_is():
    claim = VerdictLine("C1", "refuted", "[red]a[/red]")
    table = verdict_table([claim, VerdictLine("", "supported", "b > 0", "0.3 [0.1, 0.5]", 5)])
    columns = [[cell.plain for cell in column.cells] for column in table.columns]
    assert columns == [
        ["C1", ""],
        ["refuted", "supported"],
        ["[red]a[/red]", "b > 0"],
        ["", "0.3 [0.1, 0.5]"],
        ["", "5"],
    ]
    assert [cell.style for cell in table.columns[1].cells] == ["bold red", "green"]
