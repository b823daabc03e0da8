"""Groups of completions that a policy wrote, outside of an update."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from jaxtyping import Key

from jaxrl_reason.models import Params
from jaxrl_reason.sampling import Completion, SamplingConfig, Session, group_requests
from jaxrl_reason.sharding import batch_multiple
from jaxrl_reason.stages.context import Context
from jaxrl_reason.stages.deadline import COMPILING, deadline, progress
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
    max_rows: int = GROUP_ROWS,
) -> list[list[Sampled]]:
    """`num_generations` completions of each problem, in the order of the problems.

    Images and videos are read as their prompts come next, so that memory is needed for those of a
    few more completions than the `max_rows` that are sampled at once, and not for all. Between two
    dispatches no more than the run's `step_timeout` may pass.
    """
    rows = min(max_rows, len(problems) * num_generations)
    engine = context.engine(
        sampling, max_completion_length, max_rows=rows, group_size=num_generations
    )
    groups: list[dict[int, Sampled]] = [{} for _ in problems]
    with deadline(context.config.step_timeout, before_progress=COMPILING):
        session = engine.session(params, key, on_tokens=lambda request, tokens: progress())
        for completion in _sampled(context, params, problems, session, rows, num_generations):
            number, ids = completion.request.id, completion.tokens.tolist()
            (text,) = context.decode([ids])
            verdict = context.tasks.verify(problems[number], text)
            finished = completion.finish_reason == "stop"
            groups[number][completion.request.index] = Sampled(text, ids, verdict, finished)
            progress()
    return [[group[index] for index in range(num_generations)] for group in groups]


def _sampled(
    context: Context,
    params: Params,
    problems: Sequence[Problem],
    session: Session,
    rows: int,
    num_generations: int,
) -> Iterator[Completion]:
    """Completions as they end, while as many requests are in the session as keep it full."""
    devices = batch_multiple(context.mesh)
    part = max(1, rows // (4 * num_generations * devices)) * devices
    read = going = 0
    while True:
        while read < len(problems) and going < rows + part * num_generations:
            prompts = context.prompts(problems[read : read + part])
            shown, _ = context.look(params, prompts)
            tokens = [prompt.tokens for prompt in prompts]
            requests = group_requests(tokens, shown, num_generations=num_generations, first=read)
            session.submit(requests)
            read, going = read + len(prompts), going + len(requests)
        completion = next(session, None)
        if completion is None:
            return
        going -= 1
        yield completion
