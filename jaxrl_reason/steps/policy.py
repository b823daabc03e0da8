"""Policy optimisation: one update on completions with advantages, for GRPO and its family."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, Key

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
    """Arguments of the loss by name, such as `epsilon`; those without a default are required."""
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
    logprob_chunk_size: int | None,
) -> Step:
    """One policy-gradient update with the loss of `loss_type` and an optional KL term.

    The batch holds arrays [k, rows, T], k microbatches of rows into which completions are packed:
    `tokens, positions, segment_ids, completion_mask`, `advantages` (the same along a completion),
    `old_logprobs` (of the policy that sampled, at the sampling temperature, before truncation), and
    with `beta > 0` also `ref_logprobs`. Metrics carry TRL's names;
    `sampling/importance_sampling_ratio/outside_share` is the share of tokens whose ratio to the
    policy that sampled lies outside [0.5, 2].

    The number of microbatches changes no result, but for `clip_cov` and `kl_cov`, which choose
    their tokens in each microbatch by itself.
    """
    variant = LOSS_TYPES[objective.loss_type]

    def loss_fn(params, batch: dict[str, Array], options: dict[str, Any]):
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
        arrays = {
            name: batch[name] for name in ("old_logprobs", "advantages", "segment_ids", "key")
        }
        arrays |= {"logprobs": logprobs, "mask": mask}
        values = variant(**arrays, **options)
        clipped = variant.clipped(**arrays, **options)
        distance = jnp.abs(logprobs - batch["old_logprobs"])
        metrics = {
            **{f"clip_ratio/{side}_mean": mean(where) for side, where in clipped.items()},
            "entropy": mean(entropy),
            "sampling/sampling_logp_difference/mean": mean(distance),
            # Written so that NaN counts as outside.
            "sampling/importance_sampling_ratio/outside_share": mean(~(distance <= math.log(2))),
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
        options = _options(objective, batch)
        keys = _microbatch_keys(state.step, batch["tokens"].shape[0])
        loss, gradient, metrics = value_and_grad(
            lambda params, microbatch: loss_fn(params, microbatch, options),
            state.params,
            {**batch, "key": keys},
        )
        state, update = apply_gradients(state, loss, gradient, optimizer)
        return state, {**metrics, **update}

    return step


def _options(objective: PolicyObjective, batch: dict[str, Array]) -> dict[str, Any]:
    """Arguments of the loss, with those that must be taken from the whole batch."""
    options: dict[str, Any] = dict(objective.options)
    if "alpha" not in LOSS_TYPES[objective.loss_type].options or "alpha" in options:
        return options
    flat = {name: x.reshape(-1, x.shape[-1]) for name, x in batch.items()}
    live = aggregate(
        flat["advantages"] != 0,
        flat["completion_mask"],
        how="sequence_mean",
        segment_ids=flat["segment_ids"],
    )
    return options | {"alpha": live.weight / jnp.maximum(live.total, 1)}


def _microbatch_keys(step: Int[Array, ""], count: int) -> Key[Array, " k"]:
    """A key for each microbatch of an update, for losses that draw tokens."""
    key = jax.random.fold_in(jax.random.key(0), step)
    return jax.vmap(lambda i: jax.random.fold_in(key, i))(jnp.arange(count))
