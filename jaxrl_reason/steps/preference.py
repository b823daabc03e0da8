"""Preference optimisation: one update on pairs of completions."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxrl_reason.arrays import WeightedMean, masked_sum
from jaxrl_reason.losses import PREFERENCE_LOSSES, SMOOTHED_LOSSES, preference_metrics
from jaxrl_reason.models import Model, Params
from jaxrl_reason.steps.accumulate import value_and_grad
from jaxrl_reason.steps.forward import model_logprobs
from jaxrl_reason.steps.state import Optimizer, Step, TrainState, apply_gradients


def pair_logprobs(
    model: Model, params: Params, batch: dict[str, Array], *, logprob_chunk_size: int
) -> tuple[Float[Array, "B 2"], Int[Array, "B 2"]]:
    """Sequence log-probs of chosen and rejected completions, and their lengths in tokens.

    The batch holds `tokens, positions, segment_ids, completion_mask`, each `[B, 2, T]` with the
    chosen row first.
    """
    rows = {name: batch[name].reshape(-1, batch[name].shape[-1]) for name in _ROWS}
    logprobs, _ = model_logprobs(
        model,
        params,
        rows["tokens"],
        positions=rows["positions"],
        segment_ids=rows["segment_ids"],
        temperature=1.0,
        chunk_size=logprob_chunk_size,
    )
    mask: Bool[Array, "R T"] = rows["completion_mask"]
    pairs = batch["tokens"].shape[:2]
    sums = masked_sum(logprobs, mask, axis=-1).reshape(pairs)
    return sums, jnp.sum(mask.astype(jnp.int32), axis=-1).reshape(pairs)


_ROWS = ("tokens", "positions", "segment_ids", "completion_mask")


def make_preference_step(
    model: Model,
    optimizer: Optimizer,
    *,
    beta: float,
    label_smoothing: float,
    loss_type: tuple[str, ...],
    loss_weights: tuple[float, ...],
    logprob_chunk_size: int,
) -> Step:
    """The DPO update, or a weighted sum of paired losses named as in TRL.

    `sft` in `loss_type` is the mean negative log-likelihood per token of the chosen completion. The
    batch adds `ref_logprobs [k, B, 2]`, computed once for the whole data set, to what
    `pair_logprobs` reads. Metrics are TRL's: `rewards/*` (in units of beta) and `logps/*`.
    """

    def loss_fn(params, batch: dict[str, Array]):
        sums, lengths = pair_logprobs(model, params, batch, logprob_chunk_size=logprob_chunk_size)
        ref = batch["ref_logprobs"]
        arrays = (sums[:, 0], sums[:, 1], ref[:, 0], ref[:, 1])
        losses = jnp.zeros(sums.shape[0])
        for name, weight in zip(loss_type, loss_weights, strict=True):
            if name == "sft":
                term = -sums[:, 0] / jnp.maximum(lengths[:, 0], 1).astype(jnp.float32)
            else:
                smooths = name in SMOOTHED_LOSSES
                smoothing = {"label_smoothing": label_smoothing} if smooths else {}
                term = PREFERENCE_LOSSES[name](*arrays, beta=beta, **smoothing)
            losses += weight * term
        count = jnp.asarray(sums.shape[0], jnp.float32)
        of_pairs = preference_metrics(*arrays, beta=beta)
        of_pairs |= {"logps/chosen": sums[:, 0], "logps/rejected": sums[:, 1]}
        metrics = {name: WeightedMean(jnp.sum(x), count) for name, x in of_pairs.items()}
        return WeightedMean(jnp.sum(losses), count), metrics

    def step(state: TrainState, batch: dict[str, Array]):
        loss, gradient, metrics = value_and_grad(loss_fn, state.params, batch)
        state, update = apply_gradients(state, loss, gradient, optimizer)
        return state, {**metrics, **update}

    return step
