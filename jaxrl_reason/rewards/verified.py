"""Rewards that read the verdict of a task's verifier, passed as the column `verdict`.

A verdict has the booleans `correct` and `formatted`, and a `score` from 0 to 1. Lengths are counted
in tokens.
"""

from collections.abc import Sequence
from typing import Any, Protocol

from jaxrl_reason.rewards.scoring import RewardFunction


class Verdict(Protocol):
    """What these rewards read of a verdict."""

    correct: bool
    formatted: bool

    @property
    def score(self) -> float:
        """1 for correct and 0 for wrong, or a grade between them."""
        ...


def accuracy(
    prompts: Sequence[str], completions: Sequence[str], *, verdict: Sequence[Verdict], **_: Any
) -> list[float]:
    """1 if the verifier accepts the answer, else 0."""
    return [float(v.correct) for v in verdict]


def format_followed(
    prompts: Sequence[str], completions: Sequence[str], *, verdict: Sequence[Verdict], **_: Any
) -> list[float]:
    """1 if the completion has the task's layout, else 0."""
    return [float(v.formatted) for v in verdict]


def graded(
    prompts: Sequence[str], completions: Sequence[str], *, verdict: Sequence[Verdict], **_: Any
) -> list[float]:
    """The verifier's score, such as the overlap of two intervals; `accuracy` where it has none."""
    return [float(v.score) for v in verdict]


def make_length_reward(low: int, high: int) -> RewardFunction:
    """1 up to `low` tokens, falling linearly to 0 at `high`; 0 for a wrong answer.

    Without the gate, an empty answer would be a point of the Pareto front.
    """

    def length(prompts, completions, *, completion_ids, verdict, **_) -> list[float]:
        return [
            float(v.correct) * min(1.0, max(0.0, (high - len(ids)) / (high - low)))
            for v, ids in zip(verdict, completion_ids, strict=True)
        ]

    return length
