"""Rewards that read verdicts: accuracy, format, and length among right answers."""

from typing import NamedTuple

import pytest

from jaxrl_reason.rewards import accuracy, format_followed, graded, make_length_reward
from jaxrl_reason.tasks import Verdict as TaskVerdict


class Verdict(NamedTuple):
    correct: bool
    formatted: bool


RIGHT, WRONG, BROKEN = Verdict(True, True), Verdict(False, True), Verdict(False, False)


def test_accuracy_and_format_follow_the_verdict():
    verdicts = [RIGHT, WRONG, BROKEN]
    given = {"verdict": verdicts, "completion_ids": [[1]] * 3, "answer": ["4"] * 3}
    assert accuracy(["p"] * 3, ["c"] * 3, **given) == [1.0, 0.0, 0.0]
    assert format_followed(["p"] * 3, ["c"] * 3, **given) == [1.0, 1.0, 0.0]


def test_the_grade_is_the_verifiers_score():
    verdict = {"formatted": True, "answer": "2 - 4", "reason": ""}
    partly = TaskVerdict(correct=False, grade=0.25, **verdict)
    plain = TaskVerdict(correct=True, **verdict)
    assert graded(["p"] * 2, ["c"] * 2, verdict=[partly, plain]) == [0.25, 1.0]


@pytest.mark.parametrize(
    ("tokens", "reward"),
    [(0, 1), (9, 1), (10, 1), (11, 0.9), (15, 0.5), (19, 0.1), (20, 0), (21, 0), (500, 0)],
)
def test_the_length_reward_is_a_line_between_low_and_high(tokens, reward):
    length = make_length_reward(10, 20)
    (got,) = length(["p"], ["c"], completion_ids=[[7] * tokens], verdict=[RIGHT])
    assert got == pytest.approx(reward)


def test_a_short_wrong_answer_gets_no_length_reward():
    length = make_length_reward(10, 20)
    ids = [[7]] * 3
    rewards = length(["p"] * 3, ["c"] * 3, completion_ids=ids, verdict=[WRONG, RIGHT, BROKEN])
    assert rewards == [0.0, 1.0, 0.0]
