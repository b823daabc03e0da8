"""The parts of a block that see one position at a time: projection, RMSNorm, rotation, gated MLP.

Einsum alphabet, here and in `attention.py`: B batch, T query position, S key position, D width,
F MLP width, N query heads, K key/value heads, G = N / K, H head size.
"""

import functools

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from jaxrl_reason.models.config import ModelConfig

PRODUCT = "product"
"""Name of the results that `remat="dots"` keeps for the backward pass; the rest is cheap."""

_SCALED = nn.initializers.variance_scaling


class Projection(nn.Module):
    """A linear map written as an einsum, without bias; `axes` are its logical axis names."""

    config: ModelConfig
    einsum: str
    shape: tuple[int, ...]
    axes: tuple[str, ...]
    num_inputs: int = 1
    """How many leading dimensions of the kernel are contracted; they fix the initial scale."""

    @nn.compact
    def __call__(self, x: Array) -> Array:
        init = _SCALED(
            1.0,
            "fan_in",
            "truncated_normal",
            in_axis=tuple(range(self.num_inputs)),
            out_axis=tuple(range(self.num_inputs, len(self.shape))),
        )
        kernel = self.param(
            "kernel",
            nn.with_partitioning(init, self.axes),
            self.shape,
            jnp.dtype(self.config.param_dtype),
        )
        dtype = jnp.dtype(self.config.dtype)
        out = project(self.einsum, x.astype(dtype), kernel.astype(dtype))
        return checkpoint_name(out, PRODUCT)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def project(einsum: str, x: Array, kernel: Array) -> Array:
    """`jnp.einsum`, with a gradient of the kernel that copies little.

    XLA's CPU backend transposes the left side of the product that this gradient is, and computes
    what it is made of in that order, entry by entry; left to autodiff, this took a tenth of a
    training step. Here the left side is the smaller of the two.
    """
    return jnp.einsum(einsum, x, kernel)


def _project(einsum, x, kernel):
    return jnp.einsum(einsum, x, kernel), (x, kernel)


def _project_gradients(einsum, saved, gradient):
    x, kernel = saved
    names, result = einsum.split("->")
    of_x, of_kernel = names.split(",")
    back = jnp.einsum(f"{result},{of_kernel}->{of_x}", gradient, kernel)
    if x.size <= gradient.size:
        return back, jnp.einsum(f"{of_x},{result}->{of_kernel}", x, gradient)
    flipped = "".join(sorted(of_kernel, key=of_x.__contains__))
    product = jnp.einsum(f"{result},{of_x}->{flipped}", gradient, x)
    # Without the barrier the compiler swaps the sides to save itself the last transposition.
    return back, jnp.einsum(f"{flipped}->{of_kernel}", jax.lax.optimization_barrier(product))


project.defvjp(_project, _project_gradients)


class RMSNorm(nn.Module):
    """x / rms(x) * scale over the last axis, computed in float32. arXiv 1910.07467."""

    config: ModelConfig
    axis: str = "embed_vector"

    @nn.compact
    def __call__(self, x: Array) -> Array:
        scale = self.param(
            "scale",
            nn.with_partitioning(nn.initializers.ones, (self.axis,)),
            (x.shape[-1],),
            jnp.dtype(self.config.param_dtype),
        )
        wide = x.astype(jnp.float32)
        mean_square = jnp.mean(jnp.square(wide), axis=-1, keepdims=True)
        normed = wide * jax.lax.rsqrt(mean_square + self.config.rms_norm_eps)
        scale = jnp.expand_dims(scale.astype(jnp.float32), tuple(range(x.ndim - 1)))
        return (normed * scale).astype(x.dtype)


class GatedMLP(nn.Module):
    """down(silu(gate(x)) * up(x)). arXiv 2002.05202."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        c = self.config
        into, out = (c.hidden_size, c.intermediate_size), (c.intermediate_size, c.hidden_size)
        gate = Projection(c, "btd,df->btf", into, ("embed", "mlp"), name="gate")(x)
        up = Projection(c, "btd,df->btf", into, ("embed", "mlp"), name="up")(x)
        return Projection(c, "btf,fd->btd", out, ("mlp", "embed"), name="down")(nn.silu(gate) * up)


def rotate(
    x: Float[Array, "B T heads H"], positions: Int[Array, "B T"], *, theta: float
) -> Float[Array, "B T heads H"]:
    """Rotary position embedding on halves (the Hugging Face layout), float32. arXiv 2104.09864."""
    half = x.shape[-1] // 2
    frequencies = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angles = positions.astype(jnp.float32)[:, :, None, None] * frequencies[None, None, None, :]
    cos, sin = jnp.cos(angles)[..., None, :], jnp.sin(angles)[..., None, :]
    # Not split and concatenated: XLA's CPU backend writes a concatenation number by number.
    halves = x.astype(jnp.float32).reshape(*x.shape[:-1], 2, half)
    signed = jnp.concatenate([-sin, sin], axis=-2)
    turned = (halves * cos + jnp.flip(halves, axis=-2) * signed).reshape(x.shape)
    return turned.astype(x.dtype)
