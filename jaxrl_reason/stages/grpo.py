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

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import jax
import numpy as np

from jaxrl_reason.models import Params
from jaxrl_reason.objectives import weighted_sum_advantages
from jaxrl_reason.stages.breakdown import Times
from jaxrl_reason.stages.context import Stage
from jaxrl_reason.stages.other_logprobs import OtherLogprobs
from jaxrl_reason.stages.policy_config import GRPOConfig, PolicyConfig, reward_weights
from jaxrl_reason.stages.policy_rows import PolicyRows, may_drop
from jaxrl_reason.stages.rollouts import Batch, open_rollouts
from jaxrl_reason.stages.scoring import Scored
from jaxrl_reason.stages.training import StepResult, compile_step, resume, stage_optimizer, train
from jaxrl_reason.steps import (
    PolicyObjective,
    Step,
    make_policy_step,
)

AdvantagesOf = Callable[[Scored], tuple[np.ndarray, dict[str, Any]]]
"""Rewards to one advantage per completion [B], and metrics of how that was done."""
Look = Callable[[Params, int, Batch, np.ndarray], dict[str, float]]
"""What else is measured of a step: `(params, step, batch, advantages)` to metrics."""


class Memory(Protocol):
    """What advantages depend on besides the rewards of their batch; checkpoints keep it."""

    def load(self, saved: Any) -> None:
        """Go on from what `state` gave when the checkpoint was written."""
        ...

    def state(self) -> Any:
        """All there is to keep, as JSON values."""
        ...


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


def train_policy(
    stage: Stage,
    advantages_of: AdvantagesOf,
    look: Look | None = None,
    *,
    memory: Memory | None = None,
) -> None:
    """The loop above, for any way of turning rewards into advantages.

    Args:
        stage: the stage.
        advantages_of: that way.
        look: called before each update.
        memory: what `advantages_of` remembers from step to step.
    """
    config: PolicyConfig = stage.config
    optimizer = stage_optimizer(stage)
    begin = resume(stage, optimizer, data_hash=stage.context.root_hash)
    update = policy_update(stage)
    rows = policy_rows(stage)
    others = OtherLogprobs(stage, begin.meta.get("mismatch"))
    if memory is not None and "advantages" in begin.meta:
        memory.load(begin.meta["advantages"])
    with open_rollouts(stage, begin) as rollouts:

        def one_step(state, step):
            times = Times()
            batch = rollouts.next(state.params, step, times)
            advantages, how = advantages_of(batch.scored)
            seen = look(state.params, step, batch, advantages) if look else {}
            with times.phase("update"):
                placed, packing = rows.place(batch.rollout, advantages, batch.counts, batch.sights)
            with times.phase("logprobs"):
                placed, weights = others.add(state.params, placed)
            updates = []
            with times.phase("update"):
                for _ in range(config.num_iterations):
                    state, metrics = update(state, placed)
                    updates.append(metrics)
                updates = jax.device_get(updates)
            times.count("update", config.num_iterations * int(packing["tokens"]))
            others.look(step + 1, updates[0], is_stale=batch.is_stale)
            metrics = how | seen | batch.metrics | weights | _shares(packing) | times.metrics()
            return StepResult(
                state,
                updates,
                metrics,
                num_tokens=batch.num_tokens,
                counted_tokens=batch.counted_tokens,
                batch=placed,
                advantages=advantages,
            )

        train(
            stage,
            begin,
            one_step,
            show=("reward", "rewards/accuracy/mean", "completions/mean_length"),
            data_hash=stage.context.root_hash,
            more_meta=lambda done: {
                "cursor": {"step": done, **rollouts.state()},
                "mismatch": others.state(),
                "advantages": memory.state() if memory else None,
            },
        )


def policy_update(stage: Stage) -> Step:
    """The compiled update of a stage."""
    config: PolicyConfig = stage.config
    return compile_step(
        stage,
        make_policy_step,
        objective=policy_objective(config),
        logprob_chunk_size=config.logprob_chunk_size,
    )


def policy_objective(config: PolicyConfig) -> PolicyObjective:
    """What the updates of a stage minimise."""
    return PolicyObjective(
        loss_type=config.loss_type,
        options=config.options,
        beta=config.beta,
        temperature=config.sampling.temperature,
        max_completion_length=config.max_completion_length,
    )


def policy_rows(stage: Stage) -> PolicyRows:
    """What packs the completions of a stage."""
    config: PolicyConfig = stage.config
    context = stage.context
    return PolicyRows(
        mesh=context.mesh,
        pad_id=context.pad_id,
        max_prompt_length=context.config.max_prompt_length,
        max_completion_length=config.max_completion_length,
        completions=config.prompts_per_step * config.num_generations,
        num_generations=config.num_generations,
        row_length=config.row_length,
        microbatch_tokens=config.microbatch_tokens,
        visual_tokens=context.visual_tokens,
        patches_per_token=context.patches_per_token,
        drop=may_drop(config.loss_type, beta=config.beta),
    )


def _shares(packing: Mapping[str, float]) -> dict[str, float]:
    names = ("padding_share", "dropped_completions", "dropped_groups")
    return {name: packing[name] for name in names}
