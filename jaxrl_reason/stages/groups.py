"""Groups of completions that a policy wrote, outside of an update."""

from collections.abc import Sequence
from typing import NamedTuple

from jaxtyping import Key

from jaxrl_reason.models import Params
from jaxrl_reason.sampling import SamplingConfig, sample
from jaxrl_reason.stages.context import Context
from jaxrl_reason.tasks import Problem, Verdict

GROUP_ROWS = 512
"""Completions sampled at once."""


class Sampled(NamedTuple):
    """A completion and the verdict on it."""

    text: str
    ids: list[int]
    verdict: Verdict
    finished: bool
    """Whether it ended by itself; one that was cut has no end to learn from."""

    @property
    def is_right(self) -> bool:
        """Whether it ended and the verifier accepts it."""
        return self.finished and self.verdict.correct

    @property
    def is_wrong(self) -> bool:
        """Whether it ended and the verifier rejects it."""
        return self.finished and not self.verdict.correct


class Group(NamedTuple):
    """What was written for one problem."""

    number: int
    problem: Problem
    completions: list[Sampled]
    others: list[Sampled]
    """Of a second policy, where one was asked."""


def sample_groups(
    context: Context,
    params: Params,
    problems: Sequence[Problem],
    key: Key,
    *,
    num_generations: int,
    sampling: SamplingConfig,
    max_completion_length: int,
) -> list[list[Sampled]]:
    """`num_generations` completions of each problem, in the order of the problems."""
    engine = context.engine(
        sampling,
        max_completion_length,
        max_rows=min(GROUP_ROWS, len(problems) * num_generations),
        group_size=num_generations,
    )
    prompts = context.prompts(problems)
    rollout = sample(
        engine,
        params,
        [prompt.tokens for prompt in prompts],
        key,
        num_generations=num_generations,
        pad_id=context.pad_id,
        shown=context.look(params, prompts)[0],
    )
    completions = rollout.completions()
    texts = context.decode(completions)
    return [
        [
            Sampled(
                texts[i],
                completions[i],
                context.tasks.verify(problem, texts[i]),
                bool(rollout.finished[i]),
            )
            for i in range(number * num_generations, (number + 1) * num_generations)
        ]
        for number, problem in enumerate(problems)
    ]
