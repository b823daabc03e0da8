"""Preference optimisation: one update on pairs of completions."""

import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxrl_reason.arrays import WeightedMean, masked_sum
from jaxrl_reason.losses import LENGTH_NORMALIZED, PREFERENCE_LOSSES, preference_metrics
from jaxrl_reason.models import Model, Params
from jaxrl_reason.steps.accumulate import value_and_grad
from jaxrl_reason.steps.forward import VISUAL, model_logprobs, visual_of
from jaxrl_reason.steps.state import AnyOptimizer, Step, TrainState, apply_gradients, trains_of


def pair_logprobs(
    model: Model, params: Params, batch: dict[str, Array], *, logprob_chunk_size: int | None
) -> tuple[Float[Array, "B 2"], Int[Array, "B 2"]]:
    """Sequence log-probs of chosen and rejected completions, and their lengths in tokens.

    The batch holds `tokens, positions, segment_ids, completion_mask`, each `[B, 2, T]` with the
    chosen row first, and likewise what `Model.forward` reads of images.
    """
    rows = {name: x.reshape(-1, *x.shape[2:]) for name, x in batch.items() if name in _ROWS}
    logprobs, _ = model_logprobs(
        model,
        params,
        rows["tokens"],
        positions=rows["positions"],
        segment_ids=rows["segment_ids"],
        temperature=1.0,
        chunk_size=logprob_chunk_size,
        visual=visual_of(rows),
    )
    mask: Bool[Array, "R T"] = rows["completion_mask"]
    pairs = batch["tokens"].shape[:2]
    sums = masked_sum(logprobs, mask, axis=-1).reshape(pairs)
    return sums, jnp.sum(mask.astype(jnp.int32), axis=-1).reshape(pairs)


_ROWS = ("tokens", "positions", "segment_ids", "completion_mask", *VISUAL)


def needs_reference(loss_type: Iterable[str]) -> bool:
    """Whether any term of a preference loss reads the log-probs of a reference."""
    return any("ref_chosen" in _parameters(name) for name in loss_type)


def make_preference_step(
    model: Model,
    optimizer: AnyOptimizer,
    *,
    loss_type: tuple[str, ...],
    loss_weights: tuple[float, ...],
    beta: float,
    options: Mapping[str, Any],
    logprob_chunk_size: int | None,
) -> Step:
    """The DPO update, or a weighted sum of paired losses named as in TRL.

    The batch holds what `pair_logprobs` reads, each [k, B, 2, T], and if `needs_reference` also
    `ref_logprobs [k, B, 2]`, computed once for the whole data set. Metrics are TRL's: `rewards/*`
    and `logps/*`. The implied reward is beta log(p / p_ref); without a reference beta log p, per
    token where the first term reads it so.

    The number of microbatches changes no result, but for `aot` and `aot_unpaired`, which sort the
    pairs of each microbatch by themselves.

    Args:
        model: the model.
        optimizer: its optimiser.
        loss_type: names of `PREFERENCE_LOSSES`; or `sft`, the mean negative log-likelihood per
            token of the chosen completion.
        loss_weights: a factor for each term.
        beta: of all terms.
        options: other arguments of the losses by name; each term takes those it has.
        logprob_chunk_size: tokens whose logits may exist at once.
    """
    with_reference = needs_reference(loss_type)
    first = next(name for name in loss_type if name != "sft")

    def loss_fn(params, batch: dict[str, Array]):
        sums, lengths = pair_logprobs(model, params, batch, logprob_chunk_size=logprob_chunk_size)
        means = sums / _divisor(lengths, sums)
        ref = batch["ref_logprobs"] if with_reference else jnp.zeros_like(sums)
        losses = jnp.zeros(sums.shape[0])
        for name, weight in zip(loss_type, loss_weights, strict=True):
            if name == "sft":
                losses += weight * -means[:, 0]
            else:
                given = {**_arrays(name, sums, ref, lengths), "beta": beta, **options}
                losses += weight * PREFERENCE_LOSSES[name](**_taken(name, given))
        count = jnp.asarray(sums.shape[0], jnp.float32)
        read = means if not with_reference and _is_per_token(first) else sums
        of_pairs = preference_metrics(read[:, 0], read[:, 1], ref[:, 0], ref[:, 1], beta=beta)
        of_pairs |= {"logps/chosen": sums[:, 0], "logps/rejected": sums[:, 1]}
        metrics = {name: WeightedMean(jnp.sum(x), count) for name, x in of_pairs.items()}
        return WeightedMean(jnp.sum(losses), count), metrics

    def step(state: TrainState, batch: dict[str, Array]):
        loss, gradient, metrics = value_and_grad(
            loss_fn, state.params, batch, trains=trains_of(optimizer)
        )
        state, update = apply_gradients(state, loss, gradient, optimizer)
        return state, {**metrics, **update}

    return step


def _arrays(
    name: str, sums: Float[Array, "B 2"], ref: Float[Array, "B 2"], lengths: Int[Array, "B 2"]
) -> dict[str, Array]:
    """What a loss may read, by the names of its parameters."""
    divisor = _divisor(lengths, sums)
    means = sums / divisor
    if name in LENGTH_NORMALIZED:
        sums, ref = means, ref / divisor
    of_pair = {"": sums, "_lengths": lengths, "_mean": means}
    named = {f"{side}{what}": x[:, i] for what, x in of_pair.items() for i, side in _SIDES}
    return named | {f"ref_{side}": ref[:, i] for i, side in _SIDES}


def _divisor(lengths: Int[Array, "B 2"], sums: Float[Array, "B 2"]) -> Float[Array, "B 2"]:
    return jnp.maximum(lengths, 1).astype(sums.dtype)


_SIDES = ((0, "chosen"), (1, "rejected"))


def _taken(name: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """Those of the given arguments that a loss has."""
    return {argument: x for argument, x in given.items() if argument in _parameters(name)}


def _is_per_token(name: str) -> bool:
    """Whether a loss reads log-probs per token."""
    return not {"chosen_lengths", "chosen_mean"}.isdisjoint(_parameters(name))


def _parameters(name: str) -> Mapping[str, inspect.Parameter]:
    loss: Callable[..., Array] | None = PREFERENCE_LOSSES.get(name)
    return {} if loss is None else inspect.signature(loss).parameters
