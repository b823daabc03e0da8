"""Policy optimisation: one update on completions with advantages, for GRPO and its family."""

import dataclasses
from collections.abc import Mapping

import jax.numpy as jnp
from jaxtyping import Array

from jaxrl_reason.arrays import aggregate
from jaxrl_reason.losses import LOSS_TYPES, kl_estimate
from jaxrl_reason.models import Model
from jaxrl_reason.steps.accumulate import value_and_grad
from jaxrl_reason.steps.forward import model_logprobs
from jaxrl_reason.steps.state import Optimizer, Step, TrainState, apply_gradients


@dataclasses.dataclass(frozen=True, kw_only=True)
class PolicyObjective:
    """What a policy update minimises; the stage fills it from its configuration."""

    loss_type: str
    """One of `LOSS_TYPES`: the per-token loss and how it is averaged."""
    options: Mapping[str, float]
    """Those of `epsilon`, `epsilon_high` and `delta` that are set."""
    beta: float
    """Weight of the k3 estimate of KL(policy || reference); 0 needs no `ref_logprobs`."""
    temperature: float
    """Log-probs are taken at the sampling temperature."""
    max_completion_length: int
    """The constant divisor of `dr_grpo`, in tokens."""


def make_policy_step(
    model: Model,
    optimizer: Optimizer,
    objective: PolicyObjective,
    *,
    logprob_chunk_size: int,
) -> Step:
    """One clipped policy-gradient update (arXiv 2402.03300, eq. 3) with an optional KL term.

    The batch holds arrays [k, rows, T], k microbatches of rows into which completions are packed:
    `tokens, positions, segment_ids, completion_mask`, `advantages` (the same along a completion),
    `old_logprobs` (of the policy that sampled, at the sampling temperature, before truncation), and
    with `beta > 0` also `ref_logprobs`. Metrics carry TRL's names.
    """
    variant = LOSS_TYPES[objective.loss_type]
    options = dict(objective.options)
    clipping = {name: bound for name, bound in options.items() if name != "delta"}

    def loss_fn(params, batch: dict[str, Array]):
        mask = batch["completion_mask"]
        mean = lambda values: aggregate(values, mask, how="token_mean")
        logprobs, entropy = model_logprobs(
            model,
            params,
            batch["tokens"],
            positions=batch["positions"],
            segment_ids=batch["segment_ids"],
            temperature=objective.temperature,
            chunk_size=logprob_chunk_size,
        )
        old, advantages = batch["old_logprobs"], batch["advantages"]
        values = variant.loss(logprobs, old, advantages, **options)
        clipped = variant.clip_metrics(logprobs, old, advantages, **clipping)
        metrics = {
            **{f"clip_ratio/{side}_mean": mean(where) for side, where in clipped.items()},
            "entropy": mean(entropy),
            "sampling/sampling_logp_difference/mean": mean(jnp.abs(logprobs - old)),
        }
        if objective.beta > 0:
            kl = kl_estimate(logprobs, batch["ref_logprobs"], estimator="k3")
            values += objective.beta * kl
            metrics["kl"] = mean(kl)
        loss = aggregate(
            values,
            mask,
            how=variant.aggregation,
            max_length=objective.max_completion_length,
            segment_ids=batch["segment_ids"],
        )
        return loss, metrics

    def step(state: TrainState, batch: dict[str, Array]):
        loss, gradient, metrics = value_and_grad(loss_fn, state.params, batch)
        state, update = apply_gradients(state, loss, gradient, optimizer)
        return state, {**metrics, **update}

    return step
