"""Reward functions with TRL's signature, and scoring a batch with several of them."""

from jaxrl_reason.rewards.overlong import make_overlong_reward
from jaxrl_reason.rewards.scoring import (
    RewardFunction,
    Scores,
    load_function,
    score,
    score_async,
)
from jaxrl_reason.rewards.verified import accuracy, format_followed, make_length_reward

__all__ = [
    "RewardFunction",
    "Scores",
    "accuracy",
    "format_followed",
    "load_function",
    "make_length_reward",
    "make_overlong_reward",
    "score",
    "score_async",
]
