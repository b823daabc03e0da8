"""Reward functions with TRL's signature, and scoring a batch with several of them."""

from jaxrl_reason.rewards.scoring import RewardFunction, load_function, score
from jaxrl_reason.rewards.verified import accuracy, format_followed, make_length_reward

__all__ = [
    "RewardFunction",
    "accuracy",
    "format_followed",
    "load_function",
    "make_length_reward",
    "score",
]
