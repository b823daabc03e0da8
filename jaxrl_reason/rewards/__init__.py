"""Reward functions with TRL's signature, and scoring a batch with several of them."""

from jaxrl_reason.rewards.answers import (
    extract_answer,
    gold_answer,
    math_accuracy,
    verify_math,
)
from jaxrl_reason.rewards.judged import make_judge_reward
from jaxrl_reason.rewards.openai_client import OpenAIClient, OpenAIServer
from jaxrl_reason.rewards.overlong import make_overlong_reward
from jaxrl_reason.rewards.replies import Ask, Replies, Reply
from jaxrl_reason.rewards.rubric import Rubric, When
from jaxrl_reason.rewards.scoring import (
    RewardFunction,
    Scores,
    load_function,
    score,
    score_async,
)
from jaxrl_reason.rewards.verified import accuracy, format_followed, graded, make_length_reward

__all__ = [
    "Ask",
    "OpenAIClient",
    "OpenAIServer",
    "Replies",
    "Reply",
    "RewardFunction",
    "Rubric",
    "Scores",
    "When",
    "accuracy",
    "extract_answer",
    "format_followed",
    "gold_answer",
    "graded",
    "load_function",
    "make_judge_reward",
    "make_length_reward",
    "make_overlong_reward",
    "math_accuracy",
    "score",
    "score_async",
    "verify_math",
]
