"""Batches of scored completions: sampling, rewards that start as completions end, refills.

A batch is a function of (seed, step, parameters) and of how many problems were read before it, and
never of which completion ended first or when a reward was known.

With `dynamic_sampling`, the problems of a step are numbered candidates. The first
`prompts_per_step` of them start at once, and each group found dead starts the next candidate in the
running session. So candidates are started in order, and as many as there must be until
`prompts_per_step` live ones are among them: which groups are used, and how many problems are read,
depends on their rewards alone.

With `max_staleness=1`, the next batch is sampled by the parameters before this batch's update,
while the rewards of this one are computed. A batch right after a checkpoint is sampled by that
checkpoint's parameters, so that a resumed run samples what an uninterrupted one does; a checkpoint
that is written before its time holds the batch that was sampled ahead.
"""

import contextlib
import dataclasses
from collections import deque
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool

from jaxrl_reason.models import Params
from jaxrl_reason.rewards.workers import Workers
from jaxrl_reason.sampling import Completion, Engine, Request, Rollout, group_requests
from jaxrl_reason.stages.breakdown import Times
from jaxrl_reason.stages.completions import completion_metrics
from jaxrl_reason.stages.context import Stage
from jaxrl_reason.stages.judge import Judge
from jaxrl_reason.stages.packed import pack, unpack
from jaxrl_reason.stages.policy_config import PolicyConfig
from jaxrl_reason.stages.policy_rows import Sight
from jaxrl_reason.stages.scoring import Scored, Scoring
from jaxrl_reason.stages.training import Start
from jaxrl_reason.tasks import Problem


class Batch(NamedTuple):
    """Completions of `prompts_per_step` groups and their rewards."""

    rollout: Rollout
    scored: Scored
    counts: Bool[np.ndarray, " B"]
    """Completions that count in the loss."""
    sights: list[Sight] | None
    """What the prompts show, where they show something."""
    is_stale: bool
    """Whether an earlier policy sampled it than the one that its update begins with."""
    metrics: dict[str, float]

    @property
    def num_tokens(self) -> int:
        """Tokens of all completions."""
        return int(self.rollout.lengths.sum())

    @property
    def counted_tokens(self) -> int:
        """Tokens that count in the loss."""
        return int(self.rollout.sampled[self.counts].sum())


@dataclasses.dataclass
class _Sampled:
    """A batch whose rewards may still be on their way."""

    scoring: Scoring
    problems: list[Problem]
    """The candidates that were started."""
    prompts: list[list[int]]
    sights: list[Sight]
    """What they show, where they show something."""
    completions: dict[tuple[int, int], Completion]
    ended: deque[tuple[int, int]]
    """Candidates all of whose completions have ended, and how many completions had ended then."""
    live: dict[int, bool]
    """Of each candidate that was looked at; only filled with `dynamic_sampling`."""
    metrics: dict[str, float]
    step: int


def _saved(batch: _Sampled) -> dict[str, Any]:
    """A batch as JSON values, but what follows from the configuration."""
    return {
        "step": batch.step,
        "problems": len(batch.problems),
        "metrics": {name: float(value) for name, value in batch.metrics.items()},
        "completions": pack([(*place, made) for place, made in batch.completions.items()]),
    }


class Rollouts:
    """The batches of a stage, in order.

    Args:
        stage: the stage.
        engine: samples its completions.
        judge: reads and rewards them.
        workers: of the judge.
        begin: where the stage goes on.
    """

    def __init__(
        self,
        stage: Stage,
        engine: Engine,
        judge: Judge,
        workers: Workers,
        begin: Start,
    ):
        saved = begin.meta.get("cursor", {})
        self._stage, self._engine, self._judge, self._workers = stage, engine, judge, workers
        self._config: PolicyConfig = stage.config
        self._problems_read = saved.get("problems", 0)
        ahead = saved.get("ahead")
        self._ahead = None if ahead is None else self._restored(ahead, begin.state.params)

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps, as JSON values: where the next problem is read.

        And, where a checkpoint is written before its time, the batch that was sampled ahead.
        """
        kept: dict[str, Any] = {"problems": self._problems_read}
        if self._ahead is not None:
            kept["ahead"] = _saved(self._ahead)
        return kept

    def _restored(self, saved: Mapping[str, Any], params: Params) -> _Sampled:
        """The batch that `_saved` is made of; its rewards are computed again."""
        completions, count, step = unpack(saved["completions"]), saved["problems"], saved["step"]
        first = self._problems_read - count
        problems = self._stage.problems(first, count, self._config.difficulties(step))
        prompts = self._stage.context.prompts(problems)
        _, sights = self._stage.context.look(params, prompts)
        batch = _Sampled(
            scoring=self._scoring(),
            problems=problems,
            prompts=[prompt.tokens for prompt in prompts],
            sights=sights or [],
            completions={},
            ended=deque(),
            live={},  # only looked at with dynamic sampling, which samples nothing ahead
            metrics=dict(saved["metrics"]),
            step=step,
        )
        for number, index, completion in completions:
            request = Request(prompt=batch.prompts[number], id=number, index=index)
            batch.completions[number, index] = dataclasses.replace(completion, request=request)
            batch.scoring.add(number, index, problems[number], completion.tokens.tolist())
        return batch

    def next(self, params: Params, step: int, times: Times) -> Batch:
        """The batch of a step, sampled by `params` or, where the stage samples ahead, already.

        Args:
            params: the policy before the step's update.
            step: counted from 0.
            times: receives the seconds that were spent.
        """
        sampled = self._ahead or self._sample(params, step, step, times, None)
        self._ahead = None
        if self._samples_ahead(step):
            self._ahead = self._sample(params, step + 1, step, times, sampled.scoring)
        return self._finish(sampled, step, times)

    def _samples_ahead(self, step: int) -> bool:
        config, done = self._config, step + 1
        return config.max_staleness > 0 and done < config.steps and done % config.save_steps > 0

    def _sample(
        self, params: Params, step: int, version: int, times: Times, before: Scoring | None
    ) -> _Sampled:
        """Sample the batch of a step and start its rewards, while those of `before` go on."""
        config = self._config
        batch = _Sampled(self._scoring(), [], [], [], {}, deque(), {}, {}, step)
        with times.phase("sync"):
            session = self._engine.session(params, self._stage.key(step), version=version)
        with times.phase("rollout"):
            session.submit(self._requests(params, batch, config.prompts_per_step))
            while True:
                for completion in session:
                    with times.phase("rewards"):
                        self._ended(batch, completion)
                        if before is not None:
                            before.poll()
                        refill = self._refill(params, batch, config.num_generations)
                    session.submit(refill)
                with times.phase("rewards"):
                    refill = self._refill(params, batch, 0)
                if not refill:
                    break
                session.submit(refill)
        stats = session.stats
        times.count("rollout", int(stats["tokens"]))
        batch.metrics["wasted_share"] = stats["wasted_tokens"] / max(stats["row_steps"], 1)
        if config.dynamic_sampling is not None:
            batch.metrics["num_gen_batches"] = len(batch.problems) / config.prompts_per_step
        self._problems_read += len(batch.problems)
        return batch

    def _scoring(self) -> Scoring:
        config = self._config
        return Scoring(
            self._judge,
            self._workers,
            num_generations=config.num_generations,
            num_groups=config.prompts_per_step,
        )

    def _requests(self, params: Params, batch: _Sampled, count: int) -> list[Request]:
        """Requests for the next `count` candidates of a batch."""
        first, context = len(batch.problems), self._stage.context
        difficulties = self._config.difficulties(batch.step)
        problems = self._stage.problems(self._problems_read + first, count, difficulties)
        prompts = context.prompts(problems)
        shown, sights = context.look(params, prompts)
        batch.problems += problems
        batch.sights += sights or []
        tokens = [prompt.tokens for prompt in prompts]
        batch.prompts += tokens
        size = self._config.num_generations
        return group_requests(tokens, shown, num_generations=size, first=first)

    def _ended(self, batch: _Sampled, completion: Completion) -> None:
        number, index = completion.request.id, completion.request.index
        batch.completions[number, index] = completion
        batch.scoring.add(number, index, batch.problems[number], completion.tokens.tolist())
        batch.scoring.poll()
        size = self._config.num_generations
        if all((number, index) in batch.completions for index in range(size)):
            batch.ended.append((number, len(batch.completions)))

    # Dynamic sampling

    def _refill(self, params: Params, batch: _Sampled, lag: int) -> list[Request]:
        """Requests for one more candidate for each group that has turned out dead.

        A group is looked at when `lag` further completions have ended, and then waited for. Looked
        at as soon as its rewards are there, it would be replaced at a moment that chance decides,
        and what a completion is sampled together with may change its last bits.
        """
        dynamic = self._config.dynamic_sampling
        if dynamic is None:
            return []
        names, metric = self._judge.names, dynamic.metric
        columns = None if metric is None else [names.index(metric)]
        while batch.ended and len(batch.completions) - batch.ended[0][1] >= lag:
            number, _ = batch.ended.popleft()
            batch.live[number] = batch.scoring.group(number).varies(columns)
        per_step = self._config.prompts_per_step
        wanted = per_step + sum(not live for live in batch.live.values())
        started = len(batch.problems)
        return self._requests(params, batch, min(wanted, dynamic.max_batches * per_step) - started)

    def _used(self, batch: _Sampled) -> list[int]:
        """The first live candidates; dead ones fill up where there are too few."""
        numbers = range(len(batch.problems))
        order = sorted(numbers, key=lambda number: not batch.live.get(number, True))
        return sorted(order[: self._config.prompts_per_step])

    # Putting a batch together

    def _finish(self, batch: _Sampled, version: int, times: Times) -> Batch:
        used, config = self._used(batch), self._config
        with times.phase("rewards"):
            scored = batch.scoring.finish(used)
        rollout = Rollout.of(
            [batch.prompts[number] for number in used],
            config.num_generations,
            [
                batch.completions[number, index]
                for number in used
                for index in range(config.num_generations)
            ],
            pad_id=self._stage.context.pad_id,
            max_completion_length=config.max_completion_length,
        )
        age = version - rollout.versions[rollout.sampled]
        metrics = completion_metrics(config, scored, rollout)
        metrics["sampling/staleness/mean"] = age.mean() if age.size else 0.0
        metrics |= batch.metrics
        counts = np.ones(len(rollout.finished), bool)
        if config.mask_truncated_completions:
            counts = rollout.finished
        sights = [batch.sights[number] for number in used] if batch.sights else None
        return Batch(rollout, scored, counts, sights, bool(age.any()), metrics)


@contextlib.contextmanager
def open_rollouts(stage: Stage, begin: Start) -> Iterator[Rollouts]:
    """The batches of a stage, with the processes that reward them as long as they are used."""
    config: PolicyConfig = stage.config
    context = stage.context
    completions = config.prompts_per_step * config.num_generations
    engine = context.engine(
        config.sampling,
        config.max_completion_length,
        max_rows=min(config.max_num_seqs or completions, completions),
        group_size=config.num_generations,
    )
    judge = Judge(
        context.tasks,
        context.tokenizer,
        config.rewards,
        stop_ids=context.stop_ids,
        max_completion_length=config.max_completion_length,
    )
    with Workers(judge, config.reward_workers) as workers:
        if config.precompile:
            engine.precompile(begin.state.params)
        yield Rollouts(stage, engine, judge, workers, begin)
