"""Intervals by hand and against scipy, and every branch of the verdicts."""

import math

import numpy as np
import pytest
from scipy import stats

from jaxrl_reason.errors import InputError
from jaxrl_reason.reproduce.claims import claim_verdicts, judge, t_interval
from jaxrl_reason.reproduce.experiment_config import ClaimTest


def make_test(direction, margin, **more) -> ClaimTest:
    given = {"metric": "accuracy", "arm": "a", "direction": direction, "margin": margin}
    return ClaimTest(**given, **more)


def outcome(direction, margin, *values, **more):
    named = {str(seed): value for seed, value in enumerate(values)}
    return judge(make_test(direction, margin, **more), named)


# Intervals


def test_the_interval_of_three_numbers_by_hand():
    # Mean 2, deviation 1, standard error 1 / sqrt 3; the table of t has 4.303 for two degrees.
    low, high = t_interval([1.0, 2.0, 3.0])
    assert (low, high) == pytest.approx((2 - 4.3027 / 3**0.5, 2 + 4.3027 / 3**0.5), abs=1e-4)


def test_the_interval_of_two_numbers_by_hand():
    # Mean 0.5, standard error 0.5; t is 12.706 with one degree of freedom.
    assert t_interval([0.0, 1.0]) == pytest.approx((0.5 - 6.3531, 0.5 + 6.3531), abs=1e-4)


@pytest.mark.parametrize("n", [2, 3, 5, 10])
def test_intervals_and_p_values_are_those_of_scipy(n):
    values = np.random.default_rng(n).normal(0.3, 0.2, n)
    expected = stats.t.interval(0.95, n - 1, loc=values.mean(), scale=stats.sem(values))
    got = outcome("higher", 0.1, *values)
    assert got.interval == pytest.approx(expected, rel=1e-9)
    assert got.mean == pytest.approx(values.mean())
    assert got.p == pytest.approx(stats.ttest_1samp(values, 0.1).pvalue, rel=1e-9)


def test_a_ratio_is_judged_on_a_logarithmic_scale():
    values = [0.5, 0.6, 0.55, 0.52]
    got = outcome("lower", 0.8, *values, against="b", ratio=True)
    logs = np.log(values)
    expected = stats.t.interval(0.95, 3, loc=logs.mean(), scale=stats.sem(logs))
    assert got.interval == pytest.approx(np.exp(expected), rel=1e-9)
    assert got.mean == pytest.approx(math.exp(logs.mean()))
    assert got.p == pytest.approx(stats.ttest_1samp(logs, math.log(0.8)).pvalue, rel=1e-9)
    assert got.verdict == "supported"


# Verdicts


@pytest.mark.parametrize(
    ("direction", "margin", "values", "verdict"),
    [
        # An interval wholly above, wholly below, and across the margin: 0.3 -+ 0.0497.
        ("higher", 0.2, (0.28, 0.3, 0.32), "supported"),
        ("higher", 0.4, (0.28, 0.3, 0.32), "refuted"),
        ("higher", 0.3, (0.28, 0.3, 0.32), "undecided"),
        ("higher", 0.26, (0.28, 0.3, 0.32), "undecided"),
        ("higher", 0.34, (0.28, 0.3, 0.32), "undecided"),
        ("lower", 0.2, (0.28, 0.3, 0.32), "refuted"),
        ("lower", 0.4, (0.28, 0.3, 0.32), "supported"),
        ("lower", 0.26, (0.28, 0.3, 0.32), "undecided"),
        ("lower", 0.34, (0.28, 0.3, 0.32), "undecided"),
        ("within", 0.4, (0.28, 0.3, 0.32), "supported"),
        ("within", 0.2, (0.28, 0.3, 0.32), "refuted"),
        ("within", 0.2, (-0.28, -0.3, -0.32), "refuted"),
        ("within", 0.4, (-0.28, -0.3, -0.32), "supported"),
        ("within", 0.3, (0.28, 0.3, 0.32), "undecided"),
        ("within", 0.01, (-0.02, 0.0, 0.02), "undecided"),
        # A negative margin: at most so much worse.
        ("higher", -0.1, (-0.01, 0.0, 0.01), "supported"),
        # All seeds agree: the interval is a point.
        ("higher", 0.1, (0.2, 0.2), "supported"),
        ("higher", 0.3, (0.2, 0.2), "refuted"),
        ("higher", 0.2, (0.2, 0.2), "undecided"),
        ("lower", 0.3, (0.2, 0.2), "supported"),
        ("lower", 0.1, (0.2, 0.2), "refuted"),
        ("lower", 0.2, (0.2, 0.2), "undecided"),
        ("within", 0.3, (0.2, 0.2), "supported"),
        ("within", 0.1, (0.2, 0.2), "refuted"),
        ("within", 0.2, (-0.2, -0.2), "undecided"),
        # On the margin but for rounding.
        ("higher", 0.3, (0.1 + 0.2, 0.3, 0.5 - 0.2), "undecided"),
        ("lower", 0.2, (0.3 - 0.1, 0.3 - 0.1), "undecided"),
    ],
)
def test_every_verdict(direction, margin, values, verdict):
    got = outcome(direction, margin, *values)
    assert got.verdict == verdict
    assert got.interval[0] <= got.mean <= got.interval[1]


@pytest.mark.parametrize(
    ("direction", "margin", "values", "verdict"),
    [
        ("within", 1.25, (0.98, 1.0, 1.02), "supported"),
        ("within", 1.25, (1.98, 2.0, 2.02), "refuted"),
        ("within", 1.25, (0.49, 0.5, 0.51), "refuted"),
        ("within", 1.25, (1.0, 1.2, 1.4), "undecided"),
        ("within", 1.25, (0.8, 0.8), "undecided"),  # 1 / 1.25
        ("higher", 2.0, (2.0, 2.0), "undecided"),
        ("higher", 1.9, (2.0, 2.0), "supported"),
    ],
)
def test_every_verdict_on_ratios(direction, margin, values, verdict):
    assert outcome(direction, margin, *values, against="b", ratio=True).verdict == verdict


def test_p_values_of_seeds_that_agree():
    assert outcome("higher", 0.1, 0.2, 0.2).p == 0.0
    assert outcome("higher", 0.2, 0.2, 0.2).p == 1.0
    assert outcome("higher", 0.1, 0.2, 0.2).interval == (0.2, 0.2)


def test_p_of_within_is_that_of_the_nearer_margin():
    values = [-0.11, -0.08, -0.1]
    expected = stats.ttest_1samp(values, -0.3).pvalue
    assert outcome("within", 0.3, *values).p == pytest.approx(expected)


@pytest.mark.parametrize("direction", ["higher", "lower", "within"])
def test_one_seed_decides_nothing(direction):
    got = outcome(direction, 0.1, 5.0)
    assert (got.verdict, got.mean, got.interval, got.p) == ("undecided", 5.0, None, None)


def test_no_seed_is_not_run():
    assert outcome("higher", 0.1).verdict == "not run"


# Claims


@pytest.fixture
def verdict_of(raw, load, fake_entry):
    """The verdict on a claim, of given accuracies of `short` by seed against 0.5 of `plain`."""

    def of(*tests, seeds=((0.7, 0.5), (0.72, 0.5), (0.68, 0.5)), strict=True):
        raw["claims"] = {"C": {"claim": "c", "tests": list(tests)}}
        config = load(raw).config
        records = {
            str(i): fake_entry({"short": a, "plain": b, "cold": 0.1})["stages"]
            for i, (a, b) in enumerate(seeds)
        }
        (verdict,) = claim_verdicts(config, records, strict=strict)
        return verdict

    return of


BETTER = {"metric": "accuracy", "arm": "short", "against": "plain", "direction": "higher"}
WORSE = BETTER | {"direction": "lower"}
MUCH_BETTER = BETTER | {"margin": 0.2}


def test_differences_are_taken_seed_by_seed(verdict_of):
    (got,) = verdict_of(BETTER, seeds=((0.7, 0.5), (0.9, 0.8), (0.3, 0.0))).outcomes
    assert got.values == pytest.approx({"0": 0.2, "1": 0.1, "2": 0.3})
    assert got.mean == pytest.approx(0.2)
    assert got.interval == pytest.approx((0.2 - 0.24841, 0.2 + 0.24841), abs=1e-4)


@pytest.mark.parametrize(
    ("tests", "verdict"),
    [
        ([BETTER], "supported"),
        ([BETTER, BETTER], "supported"),
        ([BETTER, MUCH_BETTER], "undecided"),
        ([MUCH_BETTER, WORSE, BETTER], "refuted"),
    ],
)
def test_a_claim_is_refuted_by_one_test_and_supported_by_all(verdict_of, tests, verdict):
    assert verdict_of(*tests).verdict == verdict


def test_seeds_without_a_stage_are_left_out(raw, load, fake_entry):
    raw["claims"] = {"C": {"claim": "c", "tests": [BETTER]}}
    config = load(raw).config
    both, one = fake_entry({"short": 0.6, "plain": 0.5}), fake_entry({"short": 0.9})
    seeds = {"0": both["stages"], "1": one["stages"]}
    (verdict,) = claim_verdicts(config, seeds)
    assert list(verdict.outcomes[0].values) == ["0"]
    (verdict,) = claim_verdicts(config, {"1": one["stages"]})
    assert verdict.verdict == "not run"


def test_a_claim_of_which_a_test_was_not_run_is_refuted_or_not_run(raw, load, fake_entry):
    value = {"metric": "accuracy", "arm": "short", "direction": "lower", "margin": 0.5}
    raw["claims"] = {"C": {"claim": "c", "tests": [BETTER, value]}}
    config = load(raw).config
    for accuracy, verdict in ((0.9, "refuted"), (0.1, "not run")):
        entry = fake_entry({"short": accuracy})["stages"]
        (got,) = claim_verdicts(config, {"0": entry, "1": entry})
        assert got.verdict == verdict


@pytest.mark.parametrize("zero", [0.0, -0.1])
def test_a_ratio_of_what_is_not_positive_is_refused(verdict_of, zero):
    ratio = BETTER | {"ratio": True, "margin": 1.0}
    expected = f"claims.C.tests.0: seed 0, stage plain, metric 'accuracy' is {zero:g}, and a ratio"
    with pytest.raises(InputError, match=expected):
        verdict_of(ratio, seeds=((0.5, zero), (0.5, 0.5)))
    got = verdict_of(ratio, seeds=((0.5, zero), (0.5, 0.5)), strict=False)
    assert got.verdict == "undecided"
    assert "a ratio needs numbers > 0" in got.outcomes[0].note


def test_a_verdict_records_everything(verdict_of):
    written = verdict_of(BETTER | {"margin": 0.1}).to_json()
    (test,) = written["tests"]
    assert written["verdict"] == test["verdict"] == "supported"
    assert test["n"] == 3
    assert test["values"] == {"0": 0.2, "1": 0.22, "2": 0.18}
    assert (test["mean"], test["margin"], test["direction"]) == (0.2, 0.1, "higher")
    assert test["interval"] == pytest.approx([0.150317, 0.249683], abs=1e-6)
    assert 0 < test["p"] < 0.05
