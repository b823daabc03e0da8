"""Two numbers of the arms against each other: points, front, hypervolumes, and their errors."""

import numpy as np
import pytest

from jaxrl_reason.errors import InputError
from jaxrl_reason.report.arms_pareto import arms_pareto_figure
from jaxrl_reason.reproduce import Results
from jaxrl_reason.reproduce.pareto import arm_points, pareto_table
from jaxrl_reason.reproduce.section import Section

PLOT = {"x": "accuracy", "y": "mean_length"}


@pytest.fixture
def section(raw, load, tmp_path, fake_entry):
    """A section with plots and the accuracies of `short` and `plain` of some seeds.

    The mean length is ten times the accuracy, or what `lengths` has for a stage.
    """

    def of(*seeds, pareto=(PLOT,), lengths=(), **options):
        experiment = load(raw | {"pareto": list(pareto)}, **options)
        results = Results(tmp_path / f"{len(list(tmp_path.iterdir()))}.json", experiment)
        for seed, (short, plain) in enumerate(seeds):
            entry = fake_entry({"init": 0.0, "cold": 0.2, "short": short, "plain": plain})
            for stage, length in dict(lengths).items():
                entry["stages"][stage]["mean_length"] = length
            results.add(seed, entry)
        return Section(experiment=experiment, results=results)

    return of


def test_points_have_means_intervals_and_hypervolumes(section):
    here = section((0.5, 0.2), (0.7, 0.2))
    (plot,) = here.experiment.config.pareto
    short, plain = arm_points(here, plot)
    assert short.label == "rewarded for brevity"
    assert short.values == [(0.5, 5.0), (0.7, 7.0)]
    assert short.mean == pytest.approx((0.6, 6.0))
    # Deviation 0.1 sqrt 2, so the half width is 12.706 * 0.1.
    assert short.intervals is not None
    assert short.intervals[0] == pytest.approx((0.6 - 1.2706, 0.6 + 1.2706), abs=1e-3)
    # 0.5 * 5 and 0.7 * 7: mean 3.7.
    assert short.hypervolume.startswith("3.7 ± ")
    assert plain.intervals == ((0.2, 0.2), (2.0, 2.0))
    assert (short.on_front, plain.on_front) == (True, False)


def test_the_reference_point_is_the_corner_of_the_hypervolume(section):
    here = section((0.5, 0.2), pareto=[PLOT | {"reference": [0.25, 1.0]}])
    (plot,) = here.experiment.config.pareto
    short, plain = arm_points(here, plot)
    assert (short.hypervolume, plain.hypervolume) == ("1", "0")
    assert short.intervals is None


def test_arms_that_no_other_beats_are_all_on_the_front(section):
    here = section((0.5, 0.2), lengths={"plain": 8.0})
    (plot,) = here.experiment.config.pareto
    points = arm_points(here, plot)
    assert [point.on_front for point in points] == [True, True]
    lines = pareto_table(points, plot).splitlines()
    assert lines[0] == "| arm | accuracy | mean_length | hypervolume | on the front |"
    assert lines[2] == "| rewarded for brevity | 0.5 | 5 | 2.5 | yes |"
    # 0.2 * 8 + 0.3 * 5.
    assert lines[-1] == "| *all means together* | - | - | 3.1 | - |"


def test_a_plot_may_show_some_arms_and_derived_metrics(section):
    plots = [{"x": "accuracy", "y": "derived.gain", "arms": ["plain"]}]
    here = section((0.5, 0.2), pareto=plots)
    (plot,) = here.experiment.config.pareto
    assert [point.label for point in arm_points(here, plot)] == ["plain"]
    assert arm_points(here, plot)[0].values == [(0.2, 0.0)]
    assert arm_points(Section(experiment=here.experiment), plot) == []


def test_a_missing_number_is_an_error_except_in_a_smoke_test(section):
    plots = [PLOT | {"x": "train.reward@last2", "y": "measures.none"}]
    here = section((0.5, 0.2), pareto=plots)
    (plot,) = here.experiment.config.pareto
    assert here.experiment.series() >= {"reward"}
    with pytest.raises(InputError, match=r"pareto, seed 0: stage short, metric 'measures.none'"):
        arm_points(here, plot)
    assert arm_points(section((0.5, 0.2), pareto=plots, smoke=True), plot) == []


@pytest.mark.parametrize(
    ("plot", "message"),
    [
        (PLOT | {"arms": ["long"]}, r"pareto.0.arms='long' is unknown"),
        (PLOT | {"y": "derived.loss"}, r"pareto.0.y='loss' is unknown"),
        (PLOT | {"z": 1}, "z"),
    ],
)
def test_mistakes_are_named(section, plot, message):
    with pytest.raises(InputError, match=message):
        section(pareto=[plot])


def test_plots_are_no_part_of_the_hash(section):
    assert section(pareto=[]).experiment.hash == section().experiment.hash


def test_the_figure_has_a_mark_for_each_arm_and_the_front(section):
    here = section((0.5, 0.2), (0.6, 0.2), lengths={"plain": 8.0})
    (plot,) = here.experiment.config.pareto
    points = arm_points(here, plot)
    figure = arms_pareto_figure(points, labels=("accuracy", "length"), reference=(0.0, 0.0))
    (axes,) = figure.axes
    marks = [line.get_xydata()[0].tolist() for line in axes.lines if line.get_marker() in "os"]
    np.testing.assert_allclose(marks, [[0.55, 5.5], [0.2, 8.0]])
    texts = [text.get_text() for text in figure.legends[0].get_texts()]
    assert texts[1] == "plain (1.6 ± 0)"
    (front,) = [line for line in axes.lines if line.get_linestyle() == "--"]
    corners = front.get_xydata().tolist()
    assert [0.2, 8.0] in corners
    assert [0.55, 5.5] in corners
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("accuracy", "length")
