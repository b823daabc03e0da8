"""Group-relative policy optimisation (DeepSeekMath, arXiv 2402.03300), one page.

    for each step:
        sample G completions o_1..o_G for each prompt from the policy
        r_i  <- reward of o_i
        A_i  <- (r_i - mean of the group) / std of the group
        do num_iterations times:
            maximise  mean of  min(w A, clip(w, 1 - epsilon, 1 + epsilon) A) - beta KL(policy, ref)
            over the tokens of all completions, where w = policy / policy that sampled

Where this departs from the paper: the default average is over all tokens of the batch (DAPO) and
not per completion first; `loss_type` chooses. The log-probs of the policy that sampled are those
recorded while sampling, with the mass that truncation kept added back, so no extra forward pass is
run. `beta` is 0 by default, and the KL gradient is that of the k3 estimate. Completions of a batch
are packed into rows, which changes no value.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxrl_reason.advantages import dead_groups, group_advantages
from jaxrl_reason.data.batching import Batch, fill_rows, pack
from jaxrl_reason.logprobs import model_logprobs
from jaxrl_reason.metrics import Stopwatch
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
from jaxrl_reason.stages.config import (
    GRPOConfig,
    PolicyConfig,
    PythonReward,
    reward_name,
    reward_weights,
)
from jaxrl_reason.stages.context import Stage
from jaxrl_reason.stages.training import StepResult, compile_step, train
from jaxrl_reason.steps import PolicyObjective, make_optimizer, make_policy_step
from jaxrl_reason.tasks import Problem


class Scored(NamedTuple):
    """Rewards of a batch of completions; column m belongs to the m-th reward."""

    rewards: np.ndarray  # [B, M]
    mask: np.ndarray  # [B, M], false where a reward does not apply


AdvantagesOf = Callable[[Scored], tuple[np.ndarray, dict[str, Any]]]
"""Rewards to one advantage per completion [B], and metrics of how that was done."""


def run_grpo(stage: Stage) -> None:
    """Train on one scalar reward, the weighted sum of the configured ones."""
    config: GRPOConfig = stage.config
    weights = np.asarray(reward_weights(config), np.float32)

    def advantages_of(scored: Scored):
        reward = np.sum(scored.rewards * scored.mask * weights, axis=1)
        advantages = group_advantages(
            reward, num_generations=config.num_generations, scale=config.scale_rewards
        )
        return np.asarray(advantages), {"reward": reward.mean(), "reward_std": reward.std()}

    train_policy(stage, advantages_of)


def train_policy(stage: Stage, advantages_of: AdvantagesOf) -> None:
    """The loop above, for any way of turning rewards into advantages."""
    config: PolicyConfig = stage.config
    context = stage.context
    sampler = context.sampler(config.sampling, config.max_completion_length)
    functions = reward_functions(config)
    rows = PolicyRows(stage)
    optimizer = make_optimizer(config.optimizer, config.steps * config.num_iterations)
    update = compile_step(
        stage,
        make_policy_step(
            context.model,
            optimizer,
            PolicyObjective(
                loss_type=config.loss_type,
                options=config.clipping,
                beta=config.beta,
                temperature=config.sampling.temperature,
                max_completion_length=config.max_completion_length,
            ),
            logprob_chunk_size=config.logprob_chunk_size,
        ),
        optimizer,
    )
    reference = _reference(stage) if config.beta > 0 else None

    def one_step(state, step):
        seconds: dict[str, float] = {}
        problems = stage.problems(step * config.prompts_per_step, config.prompts_per_step)
        with Stopwatch(seconds, "time/rollout"):
            rollout = sampler.sample(
                state.params,
                context.encode_prompts(problems),
                stage.key(step),
                num_generations=config.num_generations,
            )
        with Stopwatch(seconds, "time/rewards"):
            texts = context.decode(rollout.completions())
            scored = score_completions(stage, functions, problems, texts, rollout)
            advantages, how = advantages_of(scored)
        with Stopwatch(seconds, "time/update"):
            batch = rows.place(rollout, advantages)
            if reference is not None:
                batch["ref_logprobs"] = reference(batch)
            for _ in range(config.num_iterations):
                state, metrics = update(state, batch)
            metrics = jax.device_get(metrics)
        metrics = {**metrics, **how, **completion_metrics(config, scored, rollout), **seconds}
        return StepResult(state, metrics, int(rollout.lengths.sum()))

    show = ("reward", "rewards/accuracy/mean", "completions/mean_length")
    train(stage, optimizer, one_step, show=show, data_hash=stage.context.root_hash)


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


def _reference(stage: Stage):
    """Log-probs under the parent, as a function of a placed batch."""
    context, config = stage.context, stage.config
    params = stage.parent_params()

    @jax.jit
    def logprobs(params, batch):
        one = lambda rows: model_logprobs(
            context.model,
            params,
            rows["tokens"],
            positions=rows["positions"],
            segment_ids=rows["segment_ids"],
            temperature=config.sampling.temperature,
            chunk_size=config.logprob_chunk_size,
        )[0]
        return jax.lax.map(one, batch)

    names = ("tokens", "positions", "segment_ids")
    return lambda batch: logprobs(params, {name: batch[name] for name in names})
