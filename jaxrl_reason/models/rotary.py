"""Rotary positions: the angles of a row's tokens, made once for all layers, and the rotation."""

import math
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxrl_reason.models.config import ModelConfig, RopeScaling


class Rotation(NamedTuple):
    """Cosines and sines of the angles by which tokens are turned, float32."""

    cos: Float[Array, "B T h"]
    sin: Float[Array, "B T h"]


def rotation(
    config: ModelConfig,
    positions: Int[Array, "B T"] | Int[Array, "B T 3"],
    *,
    sliding: bool = False,
) -> Rotation:
    """The rotation of tokens at these positions, in sliding or in full layers.

    Args:
        config: of the model.
        positions: of each token; with `mrope_section` possibly three, its time, row and column in
            an image or a video (arXiv 2409.12191).
        sliding: for sliding layers, where those differ (`rope_local_theta`).

    Raises:
        ValueError: three positions, and the model has no `mrope_section`.
    """
    turns = jnp.asarray(frequencies(config, sliding=sliding))
    wide = positions.astype(jnp.float32)
    if positions.ndim == 2:
        angles = wide[..., None] * turns[None, None]
    elif config.mrope_section:
        angles = wide[..., mrope_axes(config)] * turns[None, None]
    else:
        raise ValueError("tokens have three positions each, and the model has no mrope_section")
    return Rotation(jnp.cos(angles), jnp.sin(angles))


def frequencies(config: ModelConfig, *, sliding: bool = False) -> Float[np.ndarray, " h"]:
    """Radians per position of each pair of channels, float32."""
    half = config.head_dim // 2
    local = sliding and config.rope_local_theta is not None
    theta = config.rope_local_theta if local else config.rope_theta
    turns = float(theta) ** (-np.arange(half) / half)
    if config.rope_scaling is not None and not local:
        turns = _stretched(turns, config.rope_scaling)
    return turns.astype(np.float32)


def _stretched(turns: np.ndarray, scaling: RopeScaling) -> np.ndarray:
    if scaling.rope_type == "linear":
        return turns / scaling.factor
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    waves = scaling.original_max_position_embeddings * turns / (2 * math.pi)
    kept = np.clip((waves - low) / (high - low), 0, 1)  # 1 for short waves, 0 for long ones
    return turns * (kept + (1 - kept) / scaling.factor)


def mrope_axes(config: ModelConfig) -> Int[np.ndarray, " h"]:
    """Which of a token's three positions turns each pair of channels."""
    sections = config.mrope_section
    if not config.mrope_interleaved:
        return np.repeat(np.arange(3), sections)
    axes = np.zeros(config.head_dim // 2, np.int64)
    for axis in (1, 2):
        axes[axis : 3 * sections[axis] : 3] = axis
    return axes


def rotate(x: Float[Array, "B T heads H"], by: Rotation) -> Float[Array, "B T heads H"]:
    """Rotary position embedding on halves (the Hugging Face layout), float32. arXiv 2104.09864."""
    cos, sin = by.cos[:, :, None, None], by.sin[:, :, None, None]
    # Not split and concatenated: XLA's CPU backend writes a concatenation number by number.
    halves = x.astype(jnp.float32).reshape(*x.shape[:-1], 2, x.shape[-1] // 2)
    signed = jnp.concatenate([-sin, sin], axis=-2)
    turned = (halves * cos + jnp.flip(halves, axis=-2) * signed).reshape(x.shape)
    return turned.astype(x.dtype)
