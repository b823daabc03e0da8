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

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from jaxrl_reason.metrics import Stopwatch
from jaxrl_reason.objectives import weighted_sum_advantages
from jaxrl_reason.stages.completions import (
    PolicyRows,
    Scored,
    completion_metrics,
    reward_functions,
    score_completions,
)
from jaxrl_reason.stages.context import Stage
from jaxrl_reason.stages.stage_config import GRPOConfig, PolicyConfig, reward_weights
from jaxrl_reason.stages.training import StepResult, compile_step, train
from jaxrl_reason.steps import (
    Optimizer,
    PolicyObjective,
    Step,
    make_optimizer,
    make_policy_step,
    model_logprobs,
)

AdvantagesOf = Callable[[Scored], tuple[np.ndarray, dict[str, Any]]]
"""Rewards to one advantage per completion [B], and metrics of how that was done."""


def run_grpo(stage: Stage) -> None:
    """Train on one scalar reward, the weighted sum of the configured ones."""
    config: GRPOConfig = stage.config
    weights = np.asarray(reward_weights(config), np.float32)

    def advantages_of(scored: Scored):
        # Of the weighted sum r_i: (r_i - mean of the group) / std, as `scale_rewards` has it. A
        # reward that does not apply to a completion counts as the group's mean of it, not as 0.
        advantages = weighted_sum_advantages(
            scored.rewards,
            scored.mask,
            weights=weights,
            num_generations=config.num_generations,
            scale=config.advantage_scale,
        )
        reward = np.sum(scored.rewards * scored.mask * weights, axis=1)
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
    update = policy_update(stage, optimizer)
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
            updates = []
            for _ in range(config.num_iterations):
                state, metrics = update(state, batch)
                updates.append(metrics)
            updates = jax.device_get(updates)
        metrics = {**how, **completion_metrics(config, scored, rollout), **seconds}
        num_tokens = int(rollout.lengths.sum())
        return StepResult(state, updates, metrics, num_tokens, num_tokens, advantages)

    show = ("reward", "rewards/accuracy/mean", "completions/mean_length")
    train(
        stage,
        optimizer,
        one_step,
        show=show,
        data_hash=stage.context.root_hash,
        updates_per_step=config.num_iterations,
    )


def policy_update(stage: Stage, optimizer: Optimizer) -> Step:
    """The compiled update of a stage."""
    config: PolicyConfig = stage.config
    objective = PolicyObjective(
        loss_type=config.loss_type,
        options=config.options,
        beta=config.beta,
        temperature=config.sampling.temperature,
        max_completion_length=config.max_completion_length,
    )
    step = make_policy_step(
        stage.context.model, optimizer, objective, logprob_chunk_size=config.logprob_chunk_size
    )
    return compile_step(stage, step, optimizer)


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
