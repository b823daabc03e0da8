"""Judges of the configuration: from who is asked to the reward function.

Nothing here loads JAX, except for a judge that needs it.
"""

import functools
import json

from jaxrl_reason.config import to_json
from jaxrl_reason.rewards import (
    Ask,
    OpenAIClient,
    OpenAIServer,
    Replies,
    RewardFunction,
    load_function,
    make_judge_reward,
)
from jaxrl_reason.stages.reward_config import JudgeReward, PythonJudge


def judge_function(reward: JudgeReward, *, check: bool) -> RewardFunction:
    """The reward function of a configured judge.

    Args:
        reward: its configuration.
        check: find out now whether the server answers, and whether the model can read the template.

    Raises:
        InputError: there is no such function or checkpoint, no key, or the check failed.
    """
    ask, source = _ask(reward, check=check)
    return make_judge_reward(
        ask,
        reward.rubric,
        name=reward.name,
        replies=_replies(source),
        asks_again=reward.backend.kind != "checkpoint",  # it would reply the same
    )


def _ask(reward: JudgeReward, *, check: bool) -> tuple[Ask, str]:
    """Who is asked, and a text that is the same for those whose replies are."""
    backend = reward.backend
    source = json.dumps(to_json(reward)["backend"], sort_keys=True)
    if isinstance(backend, PythonJudge):
        return load_function(backend.function), source
    if isinstance(backend, OpenAIServer):
        client = OpenAIClient(backend)
        if check:
            client.check()
        return client.replies, source
    from jaxrl_reason.stages.judge_model import judge_model

    model = judge_model(backend)
    if check:
        model.check(reward.rubric)
    return model.replies, f"{source} {model.identity}"


@functools.lru_cache(maxsize=64)
def _replies(source: str) -> Replies:
    """What a judge has replied in this process, in all stages and evaluations."""
    return Replies()
