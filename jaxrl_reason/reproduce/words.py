"""Tests and numbers in words, for tables on a terminal and on a page."""

from jaxrl_reason.reproduce.claims import Outcome
from jaxrl_reason.reproduce.experiment import Experiment
from jaxrl_reason.reproduce.experiment_config import ClaimTest

MINUS = "\N{MINUS SIGN}"


def number(value: float | None, *, signed: bool = False) -> str:
    """Three significant digits, without an exponent where that is short."""
    if value is None:
        return "-"
    if abs(value) < 1e-12:
        return "0"
    text = f"{value:{'+' if signed else ''}.3g}"
    return text.replace("-", MINUS) if "e" not in text else text


def outcome_number(outcome: Outcome) -> str:
    """The mean with its interval, or why there is none."""
    if outcome.mean is None:
        return outcome.note or "-"
    signed = outcome.test.against is not None and not outcome.test.ratio
    text = number(outcome.mean, signed=signed)
    if outcome.interval is None:
        return text
    low, high = (number(bound, signed=signed) for bound in outcome.interval)
    return f"{text} [{low}, {high}]"


def what(experiment: Experiment, test: ClaimTest) -> str:
    """The number that a test looks at; arms by their labels, other stages by name."""
    labels = {arm.stage: experiment.label(name) for name, arm in experiment.config.arms.items()}
    first = labels.get(test.arm, test.arm)
    if test.against is None:
        return f"{test.metric}: {first}"
    between = "over" if test.ratio else "minus"
    return f"{test.metric}: {first} {between} {labels.get(test.against, test.against)}"


def bound(test: ClaimTest) -> str:
    """What a test claims about the number."""
    if test.direction != "within":
        return f"{'>' if test.direction == 'higher' else '<'} {number(test.margin)}"
    if test.ratio:
        return f"from {number(1 / test.margin)} to {number(test.margin)}"
    return f"within ±{number(test.margin)}"
