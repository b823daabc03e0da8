"""Attention of whole rows by cuDNN's fused kernel, for NVIDIA GPUs and 16-bit compute."""

from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxrl_reason.models.attention import Window, row_mask

MULTIPLE = 8
"""Rows are padded to a multiple of it: the gradient with a mask needs an even length."""


def plan_cudnn(
    segment_ids: Int[Array, "B T"],
    branch_ids: Int[Array, "B T"] | None,
    window: Window | None = None,
) -> Bool[Array, "B 1 T T"]:
    """The mask of these rows, padded."""
    padding = ((0, 0), (0, -segment_ids.shape[1] % MULTIPLE))
    branch_ids = None if branch_ids is None else jnp.pad(branch_ids, padding)
    if window is not None:
        window = window._replace(positions=jnp.pad(window.positions, padding))
    return row_mask(jnp.pad(segment_ids, padding), branch_ids, window)[:, None]


def attend_cudnn(
    queries: Float[Array, "B T N H"],
    keys: Float[Array, "B T K H"],
    values: Float[Array, "B T K H"],
    mask: Bool[Array, "B 1 T T"],
    *,
    implementation: Literal["cudnn", "xla"] = "cudnn",
) -> Float[Array, "B T N H"]:
    """`attend` with `row_mask`; `implementation="xla"` makes the same call without a GPU."""
    length = queries.shape[1]
    padding = ((0, 0), (0, mask.shape[-1] - length), (0, 0), (0, 0))
    q, k, v = (jnp.pad(x, padding) for x in (queries, keys, values))
    mixed = jax.nn.dot_product_attention(q, k, v, mask=mask, implementation=implementation)
    return mixed[:, :length]
