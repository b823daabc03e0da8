"""Completions of a batch on their way to an update: scored, measured, packed into rows."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np

from jaxrl_reason.advantages import dead_groups
from jaxrl_reason.data.batching import Batch, fill_rows, pack
from jaxrl_reason.rewards import (
    RewardFunction,
    accuracy,
    format_followed,
    load_function,
    make_length_reward,
    score,
)
from jaxrl_reason.sampling import Rollout
from jaxrl_reason.sharding import place_batch
from jaxrl_reason.stages.context import Stage
from jaxrl_reason.stages.reward_config import PythonReward, reward_name
from jaxrl_reason.stages.stage_config import PolicyConfig
from jaxrl_reason.tasks import Problem


class Scored(NamedTuple):
    """Rewards of a batch of completions; column m belongs to the m-th reward."""

    rewards: np.ndarray  # [B, M]
    mask: np.ndarray  # [B, M], false where a reward does not apply


def reward_functions(config: PolicyConfig) -> dict[str, RewardFunction]:
    """The configured rewards by name, in order."""

    def function(reward) -> RewardFunction:
        if isinstance(reward, PythonReward):
            return load_function(reward.function)
        if reward.kind == "length":
            return make_length_reward(reward.low, reward.high)
        return {"accuracy": accuracy, "format": format_followed}[reward.kind]

    return {reward_name(reward): function(reward) for reward in config.rewards}


def score_completions(
    stage: Stage,
    functions: dict[str, RewardFunction],
    problems: Sequence[Problem],
    texts: Sequence[str],
    rollout: Rollout,
) -> Scored:
    """Every reward of every completion, whose texts are given; those of a problem together."""
    repeated = [problem for problem in problems for _ in range(rollout.num_generations)]
    verify = stage.context.task.verify
    columns = {
        "verdict": [verify(problem, text) for problem, text in zip(repeated, texts, strict=True)],
        "problem": repeated,
        "answer": [problem.answer for problem in repeated],
    }
    rewards, mask = score(
        functions,
        prompts=[problem.prompt for problem in repeated],
        completions=texts,
        completion_ids=rollout.completions(),
        columns=columns,
    )
    return Scored(rewards, mask)


class PolicyRows:
    """Packs the completions of a rollout into rows of a closed set of shapes."""

    def __init__(self, stage: Stage):
        config: PolicyConfig = stage.config
        stage.check_rows("microbatch_rows", config.microbatch_rows)
        completions = config.prompts_per_step * config.num_generations
        self._stage = stage
        self._length = stage.context.config.max_prompt_length + config.max_completion_length
        # One row for each completion is enough whatever the lengths; packing fills fewer.
        self._shape = (-(-completions // config.microbatch_rows), config.microbatch_rows)

    def place(self, rollout: Rollout, advantages: np.ndarray) -> dict[str, jax.Array]:
        """Arrays [k, rows, T] on the mesh, as `make_policy_step` reads them.

        Every batch has one shape, whatever its lengths; rows that packing leaves empty are in
        trailing microbatches, which cost nothing.
        """
        group = rollout.num_generations
        prompts = [prompt for prompt in rollout.prompts for _ in range(group)]
        examples = list(zip(prompts, rollout.completions(), strict=True))
        packed = pack([len(p) + len(c) for p, c in examples], self._length)
        batch = fill_rows(
            [[examples[i] for i in row] for row in packed],
            self._length,
            pad_id=self._stage.context.tokenizer.pad_token_id,
            num_rows=self._shape[0] * self._shape[1],
        )
        old = rollout.sampling_logprobs + rollout.kept_logmass
        lengths = rollout.lengths
        order = np.asarray([i for row in packed for i in row])
        # The mask runs over rows, then positions: exactly the completions in packed order.
        batch["old_logprobs"] = _scatter(
            batch, np.concatenate([old[i, : lengths[i]] for i in order])
        )
        batch["advantages"] = _scatter(batch, np.repeat(advantages[order], lengths[order]))
        cut = {name: x.reshape(*self._shape, self._length) for name, x in batch.items()}
        return place_batch(cut, self._stage.context.mesh, batch_axis=1)


def completion_metrics(config: PolicyConfig, scored: Scored, rollout: Rollout) -> dict[str, float]:
    """TRL's metrics of a batch of completions."""
    lengths = rollout.lengths
    metrics = {
        "completions/mean_length": lengths.mean(),
        "completions/min_length": lengths.min(),
        "completions/max_length": lengths.max(),
        "completions/clipped_ratio": 1 - rollout.finished.mean(),
        "num_tokens": lengths.sum(),
    }
    dead = np.ones(len(rollout.prompts), bool)
    for m, reward in enumerate(config.rewards):
        name = reward_name(reward)
        values = scored.rewards[scored.mask[:, m], m]
        metrics[f"rewards/{name}/mean"] = values.mean() if values.size else 0.0
        metrics[f"rewards/{name}/std"] = values.std() if values.size else 0.0
        column = np.where(scored.mask[:, m], scored.rewards[:, m], 0)
        dead &= np.asarray(dead_groups(column, num_generations=rollout.num_generations))
    return metrics | {"frac_reward_zero_std": dead.mean(), "dead_groups": dead.sum()}


def _scatter(batch: Batch, values: np.ndarray) -> np.ndarray:
    filled = np.zeros(batch["completion_mask"].shape, np.float32)
    filled[batch["completion_mask"]] = values
    return filled
