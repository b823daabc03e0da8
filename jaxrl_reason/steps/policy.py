"""Policy optimisation: one update on completions with advantages, for GRPO and its family."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from jaxrl_reason.arrays import aggregate
from jaxrl_reason.losses import LOSS_TYPES, kl_estimate
from jaxrl_reason.models import Model, Params
from jaxrl_reason.steps.accumulate import Largest, value_and_grad
from jaxrl_reason.steps.forward import target_logprobs
from jaxrl_reason.steps.state import (
    AnyOptimizer,
    Metrics,
    Step,
    TrainState,
    apply_gradients,
    trains_of,
)
from jaxrl_reason.steps.trained import Trains, everything


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


PolicyGradient = Callable[[Params, Int[Array, ""], dict[str, Array]], tuple[Array, Params, Metrics]]
"""`(params, number of the update, batch) -> (loss, gradient, metrics)`."""


def make_policy_step(
    model: Model,
    optimizer: AnyOptimizer,
    objective: PolicyObjective,
    *,
    logprob_chunk_size: int | None,
) -> Step:
    """One policy-gradient update with the loss of `loss_type` and an optional KL term.

    The batch holds k microbatches of prefix-shared rows, as `data.groups` shows them:

        tokens, positions, segment_ids, branch_ids           [k, rows, T]
        targets, sources, completion_mask, sequence_ids      [k, rows, M]
        advantages           the same along a completion     [k, rows, M]
        sampling_logprobs    of the policy that sampled, at the sampling temperature, before
                             truncation                      [k, rows, M]
        old_logprobs         the same, or those of training  [k, rows, M]
        importance_weights   policy of `old_logprobs` / policy that sampled, a factor of the loss;
                             1 where the two are the same    [k, rows, M]
        ref_logprobs         with `beta > 0` only            [k, rows, M]
        dropped_tokens, dropped_sequences                    [k, rows]

    The last two count what was left out because its advantage is 0, of losses that are `separable`
    and without KL term. It counts in the divisor, so loss and gradient are those of all
    completions. Metrics cover the tokens that are there; an entropy is then that of the completions
    which teach something.

    Metrics carry TRL's names. `sampling/*` compare the policy with the one that sampled:
    `importance_sampling_ratio/outside_share` is the share of tokens with a ratio outside [0.5, 2].

    The number of microbatches changes no result, but for `clip_cov` and `kl_cov`, which choose
    their tokens in each microbatch by itself.
    """
    gradient_of = make_policy_gradient(
        model, objective, trains=trains_of(optimizer), logprob_chunk_size=logprob_chunk_size
    )

    def step(state: TrainState, batch: dict[str, Array]):
        loss, gradient, metrics = gradient_of(state.params, state.step, batch)
        state, update = apply_gradients(state, loss, gradient, optimizer)
        return state, {**metrics, **update}

    return step


def make_policy_gradient(
    model: Model,
    objective: PolicyObjective,
    *,
    trains: Trains = everything,
    logprob_chunk_size: int | None,
) -> PolicyGradient:
    """The gradient of an update by `make_policy_step`, of the parameters that are trained."""
    variant = LOSS_TYPES[objective.loss_type]

    def loss_fn(params, batch: dict[str, Array], options: dict[str, Any]):
        mask = batch["completion_mask"]
        mean = lambda values: aggregate(values, mask, how="token_mean")
        logprobs, entropy = target_logprobs(
            model,
            params,
            batch,
            temperature=objective.temperature,
            chunk_size=logprob_chunk_size,
        )
        arrays = {name: batch[name] for name in ("old_logprobs", "advantages", "key")}
        arrays |= {"logprobs": logprobs, "mask": mask, "segment_ids": batch["sequence_ids"]}
        weights = batch["importance_weights"]
        values = variant(**arrays, importance_weights=weights, **options)
        clipped = variant.clipped(**arrays, **options)
        distance = jnp.abs(logprobs - batch["sampling_logprobs"])
        metrics = {
            **{f"clip_ratio/{side}_mean": mean(where) for side, where in clipped.items()},
            "entropy": mean(entropy),
            "sampling/sampling_logp_difference/mean": mean(distance),
            "sampling/sampling_logp_difference/max": Largest(
                jnp.max(jnp.where(mask, jax.lax.stop_gradient(distance), 0))
            ),
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
            segment_ids=batch["sequence_ids"],
        )
        return loss, metrics

    def gradient_of(params: Params, number: Int[Array, ""], batch: dict[str, Array]):
        options = _options(objective, batch)
        keys = _microbatch_keys(number, batch["tokens"].shape[0])
        return value_and_grad(
            lambda params, microbatch: loss_fn(params, microbatch, options),
            params,
            {**batch, "key": keys},
            trains=trains,
            extra_weight=_dropped_weight(objective, batch),
        )

    return gradient_of


def _options(objective: PolicyObjective, batch: dict[str, Array]) -> dict[str, Any]:
    """Arguments of the loss, with those that must be taken from the whole batch."""
    options: dict[str, Any] = dict(objective.options)
    if "alpha" not in LOSS_TYPES[objective.loss_type].options or "alpha" in options:
        return options
    flat = lambda name: batch[name].reshape(-1, batch[name].shape[-1])
    advantages = flat("advantages")
    live = aggregate(
        (advantages != 0).astype(advantages.dtype),
        flat("completion_mask"),
        how="sequence_mean",
        segment_ids=flat("sequence_ids"),
    )
    sequences = live.weight + _total(batch["dropped_sequences"]).astype(live.weight.dtype)
    return options | {"alpha": sequences / jnp.maximum(live.total, 1)}


def _dropped_weight(objective: PolicyObjective, batch: dict[str, Array]) -> Float[Array, ""]:
    """What `aggregate` would have added to the divisor for the completions left out."""
    how = LOSS_TYPES[objective.loss_type].aggregation
    if how == "token_mean":
        return _total(batch["dropped_tokens"])
    sequences = _total(batch["dropped_sequences"])
    return sequences * objective.max_completion_length if how == "constant" else sequences


def _total(counts: Int[Array, "k R"]) -> Float[Array, ""]:
    return jnp.sum(counts).astype(jnp.float32)


def _microbatch_keys(step: Int[Array, ""], count: int) -> Key[Array, " k"]:
    """A key for each microbatch of an update, for losses that draw tokens."""
    key = jax.random.fold_in(jax.random.key(0), step)
    return jax.vmap(lambda i: jax.random.fold_in(key, i))(jnp.arange(count))
