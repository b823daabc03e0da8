"""Supervised fine-tuning: one update on packed rows of demonstrations."""

import jax.numpy as jnp
from jaxtyping import Array

from jaxrl_reason.arrays import aggregate
from jaxrl_reason.losses import nll_loss
from jaxrl_reason.models import Model
from jaxrl_reason.steps.accumulate import value_and_grad
from jaxrl_reason.steps.forward import model_logprobs
from jaxrl_reason.steps.state import Optimizer, Step, TrainState, apply_gradients


def make_sft_step(model: Model, optimizer: Optimizer, *, logprob_chunk_size: int | None) -> Step:
    """The SFT update: mean negative log-likelihood over the tokens under `completion_mask`.

    The batch holds `tokens, positions, segment_ids, completion_mask`, each `[k, rows, T]` with k
    microbatches. Metrics: `loss`, `entropy` (nats), `mean_token_probability`.
    """

    def loss_fn(params, batch: dict[str, Array]):
        logprobs, entropy = model_logprobs(
            model,
            params,
            batch["tokens"],
            positions=batch["positions"],
            segment_ids=batch["segment_ids"],
            temperature=1.0,
            chunk_size=logprob_chunk_size,
        )
        mean = lambda values: aggregate(values, batch["completion_mask"], how="token_mean")
        metrics = {
            "entropy": mean(entropy),
            "mean_token_probability": mean(jnp.exp(logprobs)),
        }
        return mean(nll_loss(logprobs)), metrics

    def step(state: TrainState, batch: dict[str, Array]):
        loss, gradient, metrics = value_and_grad(loss_fn, state.params, batch)
        state, update = apply_gradients(state, loss, gradient, optimizer)
        return state, {**metrics, **update}

    return step
