import json
import subprocess
import sys

import numpy as np
import pytest
from matplotlib.colors import to_hex
from PIL import Image

from jaxrl_reason.errors import InputError
from jaxrl_reason.metrics import MetricLog
from jaxrl_reason.report import (
    accuracy_length_figure,
    curves_figure,
    make_plots,
    pareto_figure,
)

SFT = [{"step": i, "loss": 3 / i, "grad_norm": 1.0, "step_time": 0.1} for i in range(1, 41)]
MORL = [
    {
        "step": i,
        "loss": 0.0,
        "reward": i / 10,
        "rewards/accuracy/mean": i / 20,
        "rewards/brevity/mean": 0.5,
        "rewards/accuracy/std": 99.0,
        "objectives/weights/accuracy": 0.25,
        "objectives/weights/brevity": 0.75,
        "completions/mean_length": 50.0 - i,
        "entropy": 1.0,
    }
    for i in range(1, 11)
]
EVALUATIONS = [
    {"stage": "init", "accuracy": 0.0, "accuracy_ci95": [0.0, 0.0075], "mean_length": 96.0},
    {"stage": "sft", "accuracy": 0.44, "accuracy_ci95": [0.4, 0.48], "mean_length": 40.0},
    {"stage": "dpo", "accuracy": 0.445, "accuracy_ci95": [0.4, 0.49], "mean_length": 41.0},
    {"stage": "grpo", "accuracy": 0.63, "accuracy_ci95": [0.59, 0.67], "mean_length": 41.5},
    {"stage": "morl", "accuracy": 0.62, "accuracy_ci95": [0.58, 0.66], "mean_length": 30.0},
]


def panels(figure):
    """Axis label, in one line -> axes."""
    return {axes.get_ylabel().replace("\n", " "): axes for axes in figure.axes}


def raw_and_smooth(axes):
    lines = axes.get_lines()
    return [line.get_xydata() for line in lines[0::2]], [line.get_xydata() for line in lines[1::2]]


# Curves


def test_curves_have_a_column_per_stage_and_the_logged_values():
    figure = curves_figure([("cold", "sft", SFT), ("morl", "morl", MORL)])
    titles = [axes.get_title() for axes in figure.axes if axes.get_title()]
    assert titles == ["cold (sft)", "morl"]
    assert len(figure.axes) == 2 + 4  # no empty panels
    ((raw,), (smooth,)) = raw_and_smooth(figure.axes[0])
    np.testing.assert_array_equal(raw, [(r["step"], r["loss"]) for r in SFT])
    # 40 values: a window of five, shrinking to three at the ends.
    np.testing.assert_allclose(smooth[10, 1], np.mean([3 / i for i in range(9, 14)]))
    np.testing.assert_allclose(smooth[0, 1], np.mean([3 / i for i in range(1, 4)]))
    assert "training step" in figure.get_supxlabel()


def test_rewards_and_weights_are_named_lines_of_one_panel():
    axes = panels(curves_figure([("morl", "morl", MORL)]))
    assert list(axes) == ["loss", "reward", "completion length (tokens)", "objective weight"]
    for label, names in (
        ("reward", ["reward", "accuracy", "brevity"]),
        ("objective weight", ["accuracy", "brevity"]),
    ):
        legend = axes[label].get_legend()
        assert [text.get_text() for text in legend.get_texts()] == names
    raw, _ = raw_and_smooth(axes["reward"])
    np.testing.assert_allclose([line[-1] for line in raw], [(10, 1.0), (10, 0.5), (10, 0.5)])
    assert axes["loss"].get_legend() is None
    colors = {
        label: {line.get_label(): line.get_color() for line in axes[label].get_lines()[1::2]}
        for label in ("reward", "objective weight")
    }
    assert colors["reward"]["brevity"] == colors["objective weight"]["brevity"]
    assert len(set(colors["reward"].values())) == 3


def test_curves_leave_out_what_was_not_logged_or_not_finite():
    nan, inf = float("nan"), float("inf")
    rows = [
        {"step": 1, "loss": nan, "kl": nan},
        {"step": 2, "loss": 2.0},
        {"step": 3, "accuracy": 0.5},
        {"step": 4, "loss": inf},
        {"step": 5, "loss": 1.0},
    ]
    axes = panels(curves_figure([("grpo", "grpo", rows)]))
    assert list(axes) == ["loss"]
    ((raw,), _) = raw_and_smooth(axes["loss"])
    np.testing.assert_array_equal(raw, [(2, 2.0), (5, 1.0)])


def test_dpo_rewards_of_pairs_are_not_taken_for_reward_functions():
    rows = [
        {"step": i, "rewards/chosen": 1.0, "rewards/margins": 2.0, "rewards/accuracies": 0.5}
        for i in (1, 2)
    ]
    labels = list(panels(curves_figure([("dpo", "dpo", rows)])))
    assert labels == ["preference accuracy (fraction)", "reward margin (nats)"]


def test_titles_stand_clear_of_legends():
    rows = [
        {"step": i, "reward": 1.0, **{f"rewards/a_rather_long_name_{k}/mean": k for k in range(5)}}
        for i in (1, 2)
    ]
    figure = curves_figure([("morl", "morl", rows)])
    figure.draw_without_rendering()
    (axes,) = figure.axes
    legend = axes.get_legend().get_window_extent()
    assert not legend.overlaps(axes.title.get_window_extent())
    assert not legend.overlaps(axes.bbox)


# Accuracy against length


def test_accuracy_length_has_each_stage_with_its_interval():
    figure = accuracy_length_figure(EVALUATIONS)
    (axes,) = figure.axes
    assert axes.get_xlabel() == "mean completion length (tokens)"
    assert "(%)" in axes.get_ylabel()
    assert len(axes.containers) == len(EVALUATIONS)
    for container, row in zip(axes.containers, EVALUATIONS, strict=True):
        point, _, (bars,) = container.lines
        np.testing.assert_allclose(
            point.get_xydata(), [(row["mean_length"], 100 * row["accuracy"])]
        )
        (segment,) = bars.get_segments()
        np.testing.assert_allclose(segment[:, 1], 100 * np.array(row["accuracy_ci95"]))
    texts = [text.get_text() for text in axes.texts if text.get_text()]
    assert texts == ["init  0.0 %", "sft  44.0 %", "dpo  44.5 %", "grpo  63.0 %", "morl  62.0 %"]


def test_arrows_follow_the_stages_where_there_is_room():
    (axes,) = accuracy_length_figure(EVALUATIONS).axes
    arrows = [(text.xyann, text.xy) for text in axes.texts if text.arrow_patch is not None]
    at = {row["stage"]: (row["mean_length"], 100 * row["accuracy"]) for row in EVALUATIONS}
    want = [("init", "sft"), ("dpo", "grpo"), ("grpo", "morl")]  # sft and dpo touch
    np.testing.assert_allclose(arrows, [(at[start], at[end]) for start, end in want])


@pytest.mark.parametrize("seed", range(6))
def test_labels_overlap_nothing_and_stay_inside(seed):
    rng = np.random.default_rng(seed)
    rows = [
        {
            "stage": f"stage {index}",
            "accuracy": accuracy,
            "accuracy_ci95": [accuracy - 0.03, accuracy + 0.03],
            "mean_length": length,
        }
        for index, (accuracy, length) in enumerate(
            zip(rng.uniform(0.5, 0.7, 6), rng.uniform(30, 50, 6), strict=True)
        )
    ]
    figure = accuracy_length_figure(rows)
    figure.draw_without_rendering()
    (axes,) = figure.axes
    boxes = [text.get_window_extent() for text in axes.texts if text.get_text()]
    for index, box in enumerate(boxes):
        assert axes.bbox.x0 <= box.x0 < box.x1 <= axes.bbox.x1
        assert axes.bbox.y0 <= box.y0 < box.y1 <= axes.bbox.y1
        assert not any(box.overlaps(other) for other in boxes[:index])


def test_a_label_is_nearest_to_its_own_point():
    figure = accuracy_length_figure(EVALUATIONS)
    figure.draw_without_rendering()
    (axes,) = figure.axes
    points = [
        axes.transData.transform((r["mean_length"], 100 * r["accuracy"])) for r in EVALUATIONS
    ]
    labels = [text for text in axes.texts if text.get_text()]
    for index, label in enumerate(labels):
        box = label.get_window_extent()
        gaps = [np.linalg.norm(point - np.clip(point, box.min, box.max)) for point in points]
        assert np.argmin(gaps) == index, label.get_text()


# Pareto front


def test_pareto_marks_the_front_and_names_volume_and_reference():
    points = [(0.2, 0.9), (0.5, 0.5), (0.5, 0.4), (0.1, 0.1), (0.8, 0.3), (0.5, 0.5)]
    figure = pareto_figure(
        points, [1, 2, 3, 4, 5, 6], stage="morl", hypervolume=0.41, reference=(0.0, 0.0)
    )
    axes, colorbar = figure.axes
    everything, front = axes.collections[1:]
    np.testing.assert_allclose(everything.get_offsets(), points)
    np.testing.assert_array_equal(everything.get_array(), [1, 2, 3, 4, 5, 6])
    np.testing.assert_allclose(front.get_offsets(), [(0.2, 0.9), (0.5, 0.5), (0.8, 0.3)])
    assert axes.get_title(loc="left") == (
        "Pareto front of morl: hypervolume 0.4100, reference point (0, 0)"
    )
    assert colorbar.get_ylabel() == "training step"
    assert axes.get_xlabel() == "accuracy (fraction)"


@pytest.mark.parametrize("reference", [(0.0, 0.0), (0.3, 0.35), (0.6, 0.6)])
def test_the_shaded_area_is_the_hypervolume(reference):
    points = np.array([(0.2, 0.9), (0.5, 0.5), (0.8, 0.3), (0.4, 0.4)])
    figure = pareto_figure(points, range(4), stage="m", hypervolume=0.0, reference=reference)
    vertices = figure.axes[0].collections[0].get_paths()[0].vertices
    x, y = vertices.T
    area = 0.5 * abs(np.dot(x, np.roll(y, 1)) - np.dot(y, np.roll(x, 1)))
    grid = np.linspace(0.0005, 0.9995, 1000)
    covered = np.zeros((1000, 1000), dtype=bool)
    for a, b in points:
        covered |= np.logical_and.outer(
            (grid > reference[0]) & (grid < a), (grid > reference[1]) & (grid < b)
        )
    np.testing.assert_allclose(area, covered.mean(), atol=1e-9)


def test_pareto_refuses_other_shapes():
    for points, steps in (([[1.0, 2.0]], [1, 2]), ([[1.0, 2.0, 3.0]], [1]), ([1.0, 2.0], [1, 2])):
        with pytest.raises(ValueError, match=r"want points \[N, 2\]"):
            pareto_figure(points, steps, stage="m", hypervolume=0.0, reference=(0, 0))


# From a run directory


def make_run(run_dir):
    for name, rows in (("sft", SFT), ("morl", MORL)):
        with MetricLog(run_dir / name, tensorboard=False) as log:
            for row in rows:
                log.log(row["step"], {k: v for k, v in row.items() if k != "step"})
    for row in EVALUATIONS:
        if row["stage"] in ("sft", "morl"):
            (run_dir / row["stage"] / "eval.json").write_text(json.dumps(row))


PARETO = {
    "stage": "morl",
    "points": np.array([[0.1, 0.2], [0.3, 0.1]]),
    "steps": np.array([1, 2]),
    "hypervolume": 0.04,
    "reference": (0.0, 0.0),
}


def test_make_plots_writes_images_that_are_not_blank(tmp_path):
    make_run(tmp_path)
    (tmp_path / "summary.json").write_text(json.dumps(EVALUATIONS[:2]))
    paths = make_plots(tmp_path, [("sft", "sft"), ("morl", "morl")], PARETO)
    assert paths == [
        tmp_path / name for name in ("curves.png", "accuracy_length.png", "pareto.png")
    ]
    for path in paths:
        with Image.open(path) as image:
            assert min(image.size) >= 600
            assert round(image.info["dpi"][0]) == 150
            colors = image.convert("RGB").getcolors(maxcolors=1 << 20)
            assert len(colors) > 50


def test_neither_pyplot_nor_the_caller_s_settings_are_touched(tmp_path):
    program = (
        "import sys, matplotlib; matplotlib.rcParams['axes.grid'] = False\n"
        "before = dict(matplotlib.rcParams)\n"
        "from jaxrl_reason.report import pareto_figure\n"
        "figure = pareto_figure([[1, 2]], [1], stage='m', hypervolume=2.0, reference=(0, 0))\n"
        "figure.savefig(sys.argv[1])\n"
        "assert dict(matplotlib.rcParams) == before\n"
        "assert 'matplotlib.pyplot' not in sys.modules\n"
    )
    path = tmp_path / "pareto.png"
    done = subprocess.run(
        [sys.executable, "-c", program, str(path)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert path.stat().st_size > 0


def test_evaluations_come_from_eval_json_first_and_from_the_summary_else(tmp_path, monkeypatch):
    make_run(tmp_path)
    summary = [{**row, "mean_length": 1.0} for row in EVALUATIONS]
    summary.append({"stage": "merge", "accuracy": None, "accuracy_ci95": None, "mean_length": None})
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    drawn = []

    def record(rows):
        drawn.extend((row["stage"], row["mean_length"]) for row in rows)
        return accuracy_length_figure(rows)

    monkeypatch.setattr("jaxrl_reason.report.plots.accuracy_length_figure", record)
    stages = [(name, name) for name in ("sft", "dpo", "grpo", "merge", "morl")]
    make_plots(tmp_path, stages, None)
    assert drawn == [("init", 1.0), ("sft", 40.0), ("dpo", 1.0), ("grpo", 1.0), ("morl", 30.0)]


def test_make_plots_leaves_out_what_the_run_has_no_numbers_for(tmp_path):
    empty = {**PARETO, "points": np.zeros((0, 2)), "steps": np.zeros(0)}
    (tmp_path / "merge").mkdir()
    assert make_plots(tmp_path, [("merge", "merge")], None) == []
    assert make_plots(tmp_path, [("merge", "merge")], empty) == []
    make_run(tmp_path)
    paths = make_plots(tmp_path, [("merge", "merge"), ("sft", "sft")], None)
    assert [path.name for path in paths] == ["curves.png", "accuracy_length.png"]


def test_a_damaged_evaluation_is_named(tmp_path):
    make_run(tmp_path)
    (tmp_path / "sft" / "eval.json").write_text("{")
    with pytest.raises(InputError, match=r"sft/eval\.json is not JSON"):
        make_plots(tmp_path, [("sft", "sft")], None)


def test_a_stage_has_one_colour_in_every_plot():
    names = ["sft", "dpo", "grpo", "morl"]
    curves = curves_figure([(name, name, SFT) for name in names])
    (axes,) = accuracy_length_figure(EVALUATIONS).axes
    in_curves = [axes.title.get_color() for axes in curves.axes if axes.get_title()]
    in_points = [to_hex(container.lines[0].get_color()) for container in axes.containers[1:]]
    assert [color.lower() for color in in_curves] == in_points
    assert len(set(in_points)) == 4
