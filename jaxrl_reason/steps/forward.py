"""Log-probabilities of a model on rows of tokens: where `models` meets `logprobs`."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxrl_reason.logprobs import chunked_target_logprobs, chunked_token_logprobs
from jaxrl_reason.models import Model, Params
from jaxrl_reason.models.mesh import LENGTH_AXIS, ROW_AXES, along_length, row_axes, size_of
from jaxrl_reason.steps.accumulate import used_microbatches

_WHOLE_LOGITS = 2**27
_BLOCK_LOGITS = 2**25


VISUAL = (
    "visual_index",
    "patches",
    "patch_coords",
    "patch_grids",
    "patch_segments",
    "patch_windows",
    "features",
    "deep_features",
)
"""Arrays of a batch that are about images and videos; see `Model.forward`."""


def visual_of(rows: dict[str, Array]) -> dict[str, Array] | None:
    """What rows show; None for text alone."""
    return {name: rows[name] for name in VISUAL if name in rows} or None


def model_logprobs(
    model: Model,
    params: Params,
    tokens: Int[Array, "B T"],
    *,
    positions: Int[Array, "B T"] | Int[Array, "B T 3"],
    segment_ids: Int[Array, "B T"],
    temperature: float,
    chunk_size: int | None,
    visual: dict[str, Array] | None = None,
) -> tuple[Float[Array, "B T"], Float[Array, "B T"]]:
    """`chunked_token_logprobs` of a model on rows of tokens: `(logprobs, entropy)`.

    Without a `chunk_size` all logits exist at once if that takes no more than 512 MiB in float32,
    and otherwise as many as make 128 MiB.
    """
    hidden = model.forward(
        params, tokens, positions=positions, segment_ids=segment_ids, visual=visual
    )
    return hidden_logprobs(
        model, params, hidden, tokens, temperature=temperature, chunk_size=chunk_size
    )


def hidden_logprobs(
    model: Model,
    params: Params,
    hidden: Float[Array, "B T D"],
    tokens: Int[Array, "B T"],
    *,
    temperature: float,
    chunk_size: int | None,
) -> tuple[Float[Array, "B T"], Float[Array, "B T"]]:
    """`model_logprobs` from hidden states."""
    head = model.unembedding(params)
    chunk_size = _chunk_size(chunk_size, tokens, head)
    return chunked_token_logprobs(
        hidden, head, tokens, temperature=temperature, chunk_size=chunk_size
    )


def target_logprobs(
    model: Model,
    params: Params,
    rows: dict[str, Array],
    *,
    temperature: float,
    chunk_size: int | None,
) -> tuple[Float[Array, "R M"], Float[Array, "R M"]]:
    """Log-probs and entropies of the targets of prefix-shared rows; `data.groups` shows them.

    The output head sees the completions' hidden states alone, and of the columns of targets those
    that some row uses.

    Args:
        model: the model.
        params: its parameters.
        rows: `tokens, positions, segment_ids, branch_ids` [R, T] and `targets, sources,
            completion_mask` [R, M]; for a model that sees, also what `Model.forward` reads.
        temperature: logits are divided by it.
        chunk_size: as in `model_logprobs`.
    """
    hidden = model.forward(
        params,
        rows["tokens"],
        positions=rows["positions"],
        segment_ids=rows["segment_ids"],
        branch_ids=rows["branch_ids"],
        visual=visual_of(rows),
    )
    states = along_length(jnp.take_along_axis(hidden, rows["sources"][..., None], axis=1))
    head, targets = model.unembedding(params), rows["targets"]
    return chunked_target_logprobs(
        states,
        head,
        targets,
        temperature=temperature,
        chunk_size=_chunk_size(chunk_size, targets, head),
        count=used_microbatches(rows["completion_mask"].T),
    )


def make_batch_logprobs(
    model: Model, *, temperature: float, logprob_chunk_size: int | None
) -> Callable[[Params, dict[str, Array]], Float[Array, "k R M"]]:
    """A function of parameters and a batch of microbatches that gives `target_logprobs`.

    For the log-probs of another policy than the one that is updated: `ref_logprobs`, or those of
    training where sampling had others. Microbatches that hold nothing cost nothing.
    """
    names = ("tokens", "positions", "segment_ids", "branch_ids")
    names = (*names, "targets", "sources", "completion_mask", *VISUAL)

    def batch_logprobs(params, batch):
        def one(i, found):
            logprobs, _ = target_logprobs(
                model,
                params,
                {name: batch[name][i] for name in names if name in batch},
                temperature=temperature,
                chunk_size=logprob_chunk_size,
            )
            return found.at[i].set(logprobs)

        mask = batch["completion_mask"]
        zeros = jnp.zeros(mask.shape, batch["old_logprobs"].dtype)
        with jax.named_scope(f"at_most_{mask.shape[0]}"):
            return jax.lax.fori_loop(0, used_microbatches(mask), one, zeros)

    return batch_logprobs


def _chunk_size(given: int | None, tokens: Int[Array, "B T"], head: Float[Array, "D V"]) -> int:
    """Tokens of all devices together, from those of one, which has a part of them."""
    mesh = jax.sharding.get_abstract_mesh()
    over_rows = [axis for axis in row_axes(mesh, tokens.shape[0]) if axis in ROW_AXES]
    parts = math.prod(mesh.shape[axis] for axis in over_rows) * size_of(mesh, (LENGTH_AXIS,))
    if given is not None:
        return parts * given
    if tokens.size * head.shape[1] <= parts * _WHOLE_LOGITS:
        return max(1, tokens.size)
    return parts * max(1, _BLOCK_LOGITS // head.shape[1])
