"""Reading completions and rewarding them: what runs in the processes of `reward_workers`.

Nothing here loads JAX, so that a worker starts fast and takes no device.
"""

import functools
import inspect
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol, get_args

import numpy as np

from jaxrl_reason.data.chat import decode
from jaxrl_reason.data.tokenizer import PreTrainedTokenizerFast
from jaxrl_reason.rewards import (
    RewardFunction,
    Scores,
    accuracy,
    format_followed,
    graded,
    load_function,
    make_length_reward,
    make_overlong_reward,
    score,
    score_async,
)
from jaxrl_reason.stages.judge_backends import judge_function
from jaxrl_reason.stages.reward_config import (
    AnyReward,
    JudgeReward,
    PythonReward,
    Scope,
    reward_name,
    reward_scope,
    uses_device,
)
from jaxrl_reason.tasks import Problem, Verdict


class Verifier(Protocol):
    """A task, or several."""

    def verify(self, problem: Problem, text: str) -> Verdict:
        """Judge a completion."""
        ...


class Read(NamedTuple):
    """A completion as rewards see it."""

    problem: Problem
    ids: list[int]
    text: str
    verdict: Verdict


class Judge:
    """Rewards of completions, by what a reward function is given at once.

    Has no state that a result depends on: the same completion gets the same rewards in any process.
    """

    def __init__(
        self,
        task: Verifier,
        tokenizer: PreTrainedTokenizerFast,
        rewards: Sequence[AnyReward],
        *,
        stop_ids: Sequence[int],
        max_completion_length: int,
    ):
        self._task = task
        self._tokenizer = tokenizer
        self._stop_ids = tuple(stop_ids)
        self._rewards = tuple(rewards)
        self._longest = max_completion_length

    @property
    def names(self) -> list[str]:
        """The rewards in order."""
        return [reward_name(reward) for reward in self._rewards]

    @property
    def on_devices(self) -> list[int]:
        """Which rewards a model on the devices of the run gives."""
        return [m for m, reward in enumerate(self._rewards) if uses_device(reward)]

    def columns(self, scope: Scope, *, is_async: bool) -> list[int]:
        """Which of the other rewards have a scope and are coroutines or are not."""
        names = self.names
        return [names.index(name) for name in self._functions[scope, is_async]]

    def read_and_score(self, number: int, problem: Problem, ids: list[int]) -> tuple[Read, Scores]:
        """A completion's text, the verdict on it, and its plain rewards of scope `completion`.

        Args:
            number: of the completion in messages.
            problem: what it answers.
            ids: its token ids, the stop token included.
        """
        read = self.read(problem, ids)
        return read, self.score("completion", [read], number)

    def read(self, problem: Problem, ids: list[int]) -> Read:
        """A completion's text and the verdict on it."""
        text = decode(self._tokenizer, ids, self._stop_ids)
        return Read(problem, ids, text, self._task.verify(problem, text))

    def score(self, scope: Scope, reads: Sequence[Read], first: int | None) -> Scores:
        """The plain rewards of a scope; `first` is the number of the first completion."""
        return score(self._functions[scope, False], **_arguments(reads), first=first)

    async def score_async(self, scope: Scope, reads: Sequence[Read], first: int | None) -> Scores:
        """The async rewards of a scope."""
        return await score_async(self._functions[scope, True], **_arguments(reads), first=first)

    def score_on_devices(self, reads: Sequence[Read]) -> Scores:
        """The rewards `on_devices`: all processes of a run call it, with the same completions."""
        names = self.names
        functions = {names[m]: self._made[names[m]] for m in self.on_devices}
        if not functions:
            return np.zeros((len(reads), 0), np.float32), np.zeros((len(reads), 0), bool)
        return score(functions, **_arguments(reads), first=None)

    def score_alone(self, reads: Sequence[Read], on_devices: Scores) -> Scores:
        """All rewards of completions of different problems: a group is a single completion.

        Args:
            reads: the completions.
            on_devices: what `score_on_devices` gave them.
        """
        rewards = np.zeros((len(reads), len(self._rewards)), np.float32)
        mask = np.zeros(rewards.shape, bool)
        rewards[:, self.on_devices], mask[:, self.on_devices] = on_devices
        for scope in get_args(Scope):
            size = 1 if scope == "group" else max(len(reads), 1)
            for is_async in (False, True):
                columns = self.columns(scope, is_async=is_async)
                for start in range(0, len(reads) if columns else 0, size):
                    here = slice(start, start + size)
                    functions = self._functions[scope, is_async]
                    found = score(functions, **_arguments(reads[here]), first=start)
                    rewards[here, columns], mask[here, columns] = found
        return rewards, mask

    @functools.cached_property
    def _functions(self) -> dict[tuple[Scope, bool], dict[str, RewardFunction]]:
        table = {(scope, mode): {} for scope in get_args(Scope) for mode in (False, True)}
        for reward, (name, function) in zip(self._rewards, self._made.items(), strict=True):
            if not uses_device(reward):
                is_async = inspect.iscoroutinefunction(function)
                table[reward_scope(reward), is_async][name] = function
        return table

    @functools.cached_property
    def _made(self) -> dict[str, RewardFunction]:
        return reward_functions(
            self._rewards, max_completion_length=self._longest, check_judges=False
        )

    def __getstate__(self) -> dict[str, Any]:
        # Functions may be of any kind; a worker imports them by name.
        made = ("_functions", "_made")
        return {name: value for name, value in vars(self).items() if name not in made}


def reward_functions(
    rewards: Sequence[AnyReward], *, max_completion_length: int, check_judges: bool = True
) -> dict[str, RewardFunction]:
    """The configured rewards by name, in order.

    Args:
        rewards: their configurations.
        max_completion_length: in tokens.
        check_judges: ask each language model that judges once, so that a mistake shows here.

    Raises:
        InputError: there is no such module or function, or a judge that does not answer.
    """

    def function(reward: AnyReward) -> RewardFunction:
        if isinstance(reward, PythonReward):
            return load_function(reward.function)
        if isinstance(reward, JudgeReward):
            return judge_function(reward, check=check_judges)
        if reward.kind == "length":
            return make_length_reward(reward.low, reward.high)
        if reward.kind == "overlong":
            return make_overlong_reward(reward.cache, max_completion_length)
        return {"accuracy": accuracy, "format": format_followed, "grade": graded}[reward.kind]

    return {reward_name(reward): function(reward) for reward in rewards}


def _arguments(reads: Sequence[Read]) -> Mapping[str, Any]:
    """What `score` passes on to a function."""
    return {
        "prompts": [read.problem.prompt for read in reads],
        "completions": [read.text for read in reads],
        "completion_ids": [read.ids for read in reads],
        "columns": {
            "verdict": [read.verdict for read in reads],
            "problem": [read.problem for read in reads],
            "answer": [read.problem.answer for read in reads],
        },
    }
