"""Supervised fine-tuning: one update on packed rows of demonstrations."""

import jax.numpy as jnp
from jaxtyping import Array

from jaxrl_reason.arrays import WeightedMean, aggregate
from jaxrl_reason.losses import nll_loss
from jaxrl_reason.models import Model
from jaxrl_reason.models.moe import load_balancing_loss
from jaxrl_reason.steps.accumulate import value_and_grad
from jaxrl_reason.steps.forward import hidden_logprobs, visual_of
from jaxrl_reason.steps.state import AnyOptimizer, Step, TrainState, apply_gradients, trains_of


def make_sft_step(model: Model, optimizer: AnyOptimizer, *, logprob_chunk_size: int | None) -> Step:
    """The SFT update: mean negative log-likelihood over the tokens under `completion_mask`.

    The batch holds `tokens, positions, segment_ids, completion_mask`, each `[k, rows, T]` with k
    microbatches, and what `Model.forward` reads of images. Metrics: `loss`, `entropy` (nats),
    `mean_token_probability`, and of a mixture of experts `aux_loss`, the load-balancing loss of
    each microbatch, which is added with the weight `router_aux_loss_coef`.
    """
    config = model.config

    def loss_fn(params, batch: dict[str, Array]):
        hidden, stats = model.forward_with_stats(
            params,
            batch["tokens"],
            positions=batch["positions"],
            segment_ids=batch["segment_ids"],
            visual=visual_of(batch),
        )
        logprobs, entropy = hidden_logprobs(
            model,
            params,
            hidden,
            batch["tokens"],
            temperature=1.0,
            chunk_size=logprob_chunk_size,
        )
        mean = lambda values: aggregate(values, batch["completion_mask"], how="token_mean")
        metrics = {
            "entropy": mean(entropy),
            "mean_token_probability": mean(jnp.exp(logprobs)),
        }
        loss = mean(nll_loss(logprobs))
        if stats is not None:
            aux = load_balancing_loss(stats)
            metrics["aux_loss"] = WeightedMean(aux * loss.weight, loss.weight)
            added = aux * loss.weight * jnp.asarray(config.router_aux_loss_coef, aux.dtype)
            loss = WeightedMean(loss.total + added, loss.weight)
        return loss, metrics

    def step(state: TrainState, batch: dict[str, Array]):
        loss, gradient, metrics = value_and_grad(
            loss_fn, state.params, batch, trains=trains_of(optimizer)
        )
        state, update = apply_gradients(state, loss, gradient, optimizer)
        return state, {**metrics, **update}

    return step
