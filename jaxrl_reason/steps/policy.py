"""Policy optimisation: one update on completions with advantages, for GRPO and its family."""

import dataclasses

import jax.numpy as jnp
import optax
from jaxtyping import Array

from jaxrl_reason.arrays import aggregate
from jaxrl_reason.logprobs import model_logprobs
from jaxrl_reason.losses import LOSS_TYPES, kl_estimate
from jaxrl_reason.models import Model
from jaxrl_reason.steps.accumulate import value_and_grad
from jaxrl_reason.steps.state import Step, TrainState, apply_gradients


@dataclasses.dataclass(frozen=True, kw_only=True)
class PolicyObjective:
    """What a policy update minimises; the stage fills it from its configuration."""

    loss_type: str
    """One of `LOSS_TYPES`: the per-token loss and how it is averaged."""
    epsilon: float
    """The ratio is clipped below at 1 - epsilon."""
    epsilon_high: float
    """The ratio is clipped above at 1 + epsilon_high."""
    beta: float
    """Weight of the k3 estimate of KL(policy || reference); 0 needs no `ref_logprobs`."""
    temperature: float
    """Log-probs are taken at the sampling temperature."""
    max_completion_length: int
    """The constant divisor of `dr_grpo`, in tokens."""


def make_policy_step(
    model: Model,
    optimizer: optax.GradientTransformation,
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
    bounds = {"epsilon": objective.epsilon, "epsilon_high": objective.epsilon_high}
    options = {name: bounds[name] for name in variant.options}

    def loss_fn(params, batch: dict[str, Array]):
        mask = batch["completion_mask"]
        mean = lambda values: aggregate(values, mask, how="token_mean")  # noqa: E731
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
        clipped = variant.clip_metrics(logprobs, old, advantages, **options)
        metrics = {
            "clip_ratio/low_mean": mean(clipped.low),
            "clip_ratio/high_mean": mean(clipped.high),
            "clip_ratio/region_mean": mean(clipped.region),
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
        state, update = apply_gradients(state, gradient, optimizer)
        return state, {"loss": loss, **metrics, **update}

    return step
