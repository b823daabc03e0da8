"""Metric paths, reductions of training series, and derived metrics."""

import pytest

from jaxrl_reason.config import validate
from jaxrl_reason.errors import InputError
from jaxrl_reason.reproduce import ExperimentConfig
from jaxrl_reason.reproduce.measure import MissingStageError, measure

RECORD = {
    "accuracy": 0.5,
    "mean_length_correct": None,
    "sets": {"renamed": {"format_rate": 0.25}, "a.b": {"accuracy": 0.125}},
    "measures_by_difficulty": {"skip": {"1": 0.75}},
    "train": {
        "completions/mean_length": [10.0, 20.0, 30.0, 40.0, 50.0, 60.0, 70.0],
        "reward": [None, 1.0, 3.0, None, 5.0, 7.0, 9.0],
        "loss": [None] * 7,
        "entropy": [1.0, 7.0],
    },
    "points": [1, 7],
    "used": {"steps": 7, "tokens": 70},
}


@pytest.fixture(scope="module")
def config(make_raw, metrics_folder):
    raw = make_raw()
    raw["metrics"] |= {
        "broken": {"function": "metrics_of_tests:broken", "stages": ["short"]},
        "text": {"function": "metrics_of_tests:not_a_number", "stages": ["short"]},
    }
    return validate(ExperimentConfig, raw, "test")


@pytest.fixture(scope="module")
def value(config):
    return lambda metric, record=RECORD: measure(config, {"short": record}, "short", metric)


@pytest.mark.parametrize(
    ("metric", "expected"),
    [
        ("accuracy", 0.5),
        ("sets.renamed.format_rate", 0.25),
        ("sets.a.b.accuracy", 0.125),
        ("measures_by_difficulty.skip.1", 0.75),
        ("used.tokens", 70.0),
        ("train.completions/mean_length@last5", 50.0),
        ("train.completions/mean_length@last1", 70.0),
        ("train.completions/mean_length@first5", 30.0),
        ("train.completions/mean_length@last50", 40.0),
        ("train.completions/mean_length@min", 10.0),
        ("train.completions/mean_length@max", 70.0),
        ("train.completions/mean_length@mean", 40.0),
        ("train.completions/mean_length@std", 20.0),
        # Means of five: 30, 40, 50 at the steps 5, 6, 7.
        ("train.completions/mean_length@step_above_0.8", 5.0),
        ("train.completions/mean_length@step_above_30", 6.0),
        ("train.completions/mean_length@step_above_49.5", 7.0),
        ("train.completions/mean_length@step_above_50", 8.0),
        ("train.completions/mean_length@step_above_-1", 5.0),
        # Steps without a value are left out: 1, 3, 5, 7, 9 of the steps 2, 3, 5, 6, 7.
        ("train.reward@first2", 2.0),
        ("train.reward@last2", 8.0),
        ("train.reward@step_above_4", 7.0),
    ],
)
def test_paths(value, metric, expected):
    assert value(metric) == pytest.approx(expected)


def test_a_series_shorter_than_the_window_has_one_mean(value):
    record = RECORD | {"train": {"reward": [1.0, 2.0]}, "used": {"steps": 2}}
    assert value("train.reward@step_above_1.4", record) == 2.0
    assert value("train.reward@step_above_1.5", record) == 3.0


@pytest.mark.parametrize(
    ("metric", "message"),
    [
        (
            "acuracy",
            "stage short, metric 'acuracy': there is no 'acuracy'; did you mean 'accuracy'",
        ),
        ("sets.other.accuracy", "there is no 'other.accuracy'; "),
        ("accuracy.deep", "nothing has a part 'deep'"),
        ("mean_length_correct", "is None, and no finite number"),
        ("sets.renamed", "is a dict, and no finite number"),
        ("train.reward", "a training series is written train.NAME@REDUCTION"),
        ("accuracy@mean", "a training series is written"),
        ("train.reward@median", "@median is no reduction"),
        ("train.reward@last0", "@last0 is no reduction"),
        ("train.rewards@mean", "there is no 'rewards'; did you mean 'reward'"),
        ("train.loss@mean", "the series has no finite number"),
        ("train.entropy@mean", "only some steps were kept"),
        ("derived.broken", "ZeroDivisionError in metrics_of_tests:broken"),
        ("derived.text", "is a str, and no finite number"),
        ("derived.gain", "finds no 'format_rate'"),
    ],
)
def test_a_number_that_is_not_there_is_refused(value, metric, message):
    with pytest.raises(InputError) as caught:
        value(metric)
    assert message in str(caught.value)


def test_derived_metrics_read_other_stages(config):
    records = {"short": {"format_rate": 0.75}, "cold": {"format_rate": 0.5}}
    assert measure(config, records, "short", "derived.gain") == 0.25


def test_a_stage_that_was_not_run_is_another_matter(config):
    with pytest.raises(MissingStageError):
        measure(config, {"short": RECORD}, "plain", "accuracy")
    with pytest.raises(MissingStageError, match="cold"):
        measure(config, {"short": {"format_rate": 1.0}}, "short", "derived.gain")
