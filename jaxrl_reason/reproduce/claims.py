"""Verdicts on claims, from intervals over seeds.

A test looks at one number a seed: a metric of a stage, its difference to that of another stage of
the same seed, or the logarithm of their ratio. The 95 % interval of its mean is Student's with
n - 1 degrees of freedom: mean -+ t s / sqrt(n). Where it lies wholly on the claimed side of the
margin, the test is supported; wholly on the other, refuted; else undecided.
"""

import dataclasses
import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from scipy.special import stdtr, stdtrit

from jaxrl_reason.errors import InputError
from jaxrl_reason.reproduce.experiment_config import ClaimTest, ExperimentConfig
from jaxrl_reason.reproduce.measure import MissingStageError, measure
from jaxrl_reason.reproduce.records import Record, rounded

Word = Literal["supported", "refuted", "undecided", "not run"]
_LEVEL = 0.95


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outcome:
    """What the seeds say about a test."""

    test: ClaimTest
    verdict: Word
    values: Mapping[str, float]
    """The number of each seed: value, difference or ratio."""
    mean: float | None = None
    """Their mean; of ratios the geometric one."""
    interval: tuple[float, float] | None = None
    """95 % interval of the mean; none with a single seed."""
    p: float | None = None
    """Two-sided p-value of the mean being on the margin; of `within`, on the nearer margin."""
    note: str = ""
    """Why there is no number, where there is none."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Verdict:
    """A claim with the outcomes of its tests."""

    name: str
    claim: str
    verdict: Word
    outcomes: tuple[Outcome, ...]

    def to_json(self) -> dict[str, Any]:
        """For the file of results."""
        tests = []
        for outcome in self.outcomes:
            found = {name: value for name, value in vars(outcome).items() if name != "test"}
            tests.append(
                {**outcome.test.model_dump(mode="json"), "n": len(outcome.values), **found}
            )
        return {"claim": self.claim, "verdict": self.verdict, "tests": rounded(tests)}


def claim_verdicts(
    config: ExperimentConfig,
    seeds: Mapping[str, Mapping[str, Record]],
    *,
    strict: bool = True,
) -> list[Verdict]:
    """The verdicts on all claims of an experiment.

    Args:
        config: the experiment.
        seeds: the records of each seed, by stage.
        strict: raise where a number is missing; else the test is undecided, with a note.

    Raises:
        InputError: a metric that a stage lacks or that is no number, by seed, stage and metric.
    """
    verdicts = []
    for name, claim in config.claims.items():
        outcomes = []
        for number, test in enumerate(claim.tests):
            try:
                outcomes.append(judge(test, _values(config, seeds, test)))
            except InputError as error:
                if strict:
                    raise InputError(f"claims.{name}.tests.{number}: {error}") from error
                missing = Outcome(test=test, verdict="undecided", values={}, note=str(error))
                outcomes.append(missing)
        words = [outcome.verdict for outcome in outcomes]
        verdict = Verdict(
            name=name, claim=claim.claim, verdict=_together(words), outcomes=tuple(outcomes)
        )
        verdicts.append(verdict)
    return verdicts


def judge(test: ClaimTest, values: Mapping[str, float]) -> Outcome:
    """The outcome of a test.

    Args:
        test: the claim.
        values: one number a seed, ratios as they are.
    """
    if not values:
        return Outcome(test=test, verdict="not run", values={})
    shown, hidden = (math.exp, math.log) if test.ratio else (float, float)
    numbers, margin = [hidden(value) for value in values.values()], hidden(test.margin)
    mean = statistics.fmean(numbers)
    if len(numbers) == 1:
        return Outcome(test=test, verdict="undecided", values=values, mean=shown(mean))
    low, high = t_interval(numbers)
    return Outcome(
        test=test,
        verdict=_verdict(test.direction, low, high, margin),
        values=values,
        mean=shown(mean),
        interval=(shown(low), shown(high)),
        p=_p_value(numbers, math.copysign(margin, mean) if test.direction == "within" else margin),
    )


def t_interval(values: Sequence[float], level: float = _LEVEL) -> tuple[float, float]:
    """Student's interval of the mean of at least two values; a point where they are all equal."""
    mean, error = statistics.fmean(values), _standard_error(values)
    spread = float(stdtrit(len(values) - 1, (1 + level) / 2)) * error
    return mean - spread, mean + spread


def _p_value(values: Sequence[float], margin: float) -> float:
    """Two-sided p-value of the t test that the mean is `margin`."""
    distance, error = statistics.fmean(values) - margin, _standard_error(values)
    if error == 0:
        return 1.0 if _side(distance, 0.0) == 0 else 0.0
    return float(2 * stdtr(len(values) - 1, -abs(distance) / error))


def _standard_error(values: Sequence[float]) -> float:
    # Of equal values: without the rounding that makes 0.1 + 0.2 and 0.3 differ.
    if all(_side(value, values[0]) == 0 for value in values):
        return 0.0
    return statistics.stdev(values) / math.sqrt(len(values))


def _verdict(direction: str, low: float, high: float, margin: float) -> Word:
    if direction == "within":
        if _side(low, -margin) > 0 and _side(high, margin) < 0:
            return "supported"
        outside = _side(low, margin) > 0 or _side(high, -margin) < 0
        return "refuted" if outside else "undecided"
    if direction == "lower":
        low, high, margin = -high, -low, -margin
    if _side(low, margin) > 0:
        return "supported"
    return "refuted" if _side(high, margin) < 0 else "undecided"


def _side(value: float, bound: float) -> int:
    """1 above, -1 below, 0 where only rounding keeps them apart."""
    if math.isclose(value, bound, rel_tol=1e-9, abs_tol=1e-12):
        return 0
    return 1 if value > bound else -1


def _together(words: Sequence[Word]) -> Word:
    if "refuted" in words:
        return "refuted"
    if "not run" in words:
        return "not run"
    return "supported" if set(words) == {"supported"} else "undecided"


def _values(
    config: ExperimentConfig, seeds: Mapping[str, Mapping[str, Record]], test: ClaimTest
) -> dict[str, float]:
    """The number of every seed that has the stages of a test."""
    values = {}
    for seed, records in seeds.items():
        try:
            values[seed] = _value(config, records, test)
        except MissingStageError:
            continue
        except InputError as error:
            raise InputError(f"seed {seed}, {error}") from error
    return values


def _value(config: ExperimentConfig, records: Mapping[str, Record], test: ClaimTest) -> float:
    value = measure(config, records, test.arm, test.metric)
    if test.against is None:
        return value
    other = measure(config, records, test.against, test.metric)
    if not test.ratio:
        return value - other
    for stage, number in ((test.arm, value), (test.against, other)):
        if number <= 0:
            raise InputError(
                f"stage {stage}, metric {test.metric!r} is {number:g}, and a ratio needs numbers "
                "> 0; compare differences (ratio: false)"
            )
    return value / other
