"""The parts of a block that see one token at a time: projection, RMSNorm, gated MLP.

Einsum alphabet, here and in `attention.py`: B batch, T query position, S key position, D width,
F MLP width, N query heads, K key/value heads, G = N / K, H head size.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from jaxrl_reason.models.config import ModelConfig, RematPolicy

PRODUCT = "product"
"""Name of the results that `remat="dots"` keeps for the backward pass; the rest is cheap."""

_SCALED = nn.initializers.variance_scaling


class Projection(nn.Module):
    """A linear map written as an einsum; `axes` are its logical axis names.

    An adapter, x A B scaled, is added where its parameters `lora_a` and `lora_b` are among those
    given (LoRA, arXiv 2106.09685). A tree without them is the model with the adapter off.
    """

    config: ModelConfig
    einsum: str
    shape: tuple[int, ...]
    axes: tuple[str, ...]
    num_inputs: int = 1
    """How many leading dimensions of the kernel are contracted; they fix the initial scale."""
    use_bias: bool = False
    """Add a vector."""

    @nn.compact
    def __call__(self, x: Array) -> Array:
        dtype = jnp.dtype(self.config.dtype)
        inputs, outputs = self.shape[: self.num_inputs], self.shape[self.num_inputs :]
        into, out_of = self.axes[: self.num_inputs], self.axes[self.num_inputs :]
        kernel = self._param("kernel", _fan_in(len(inputs), len(outputs)), self.axes, self.shape)
        x = x.astype(dtype)
        out = project(self.einsum, x, kernel.astype(dtype))
        if self.use_bias:
            bias = self._param("bias", nn.initializers.zeros, out_of, outputs)
            out = out + _lift(bias.astype(dtype), out.ndim)
        lora = self.config.lora
        wanted = lora is not None and lora.targets(self.name)
        if lora is not None and (wanted if self.is_initializing() else self._has_adapter()):
            into_rank, out_of_rank = self._adapter_einsums()
            # Float32 at least: in bfloat16 most updates of an adapter would round to nothing.
            stored = jnp.dtype(self.config.param_dtype)
            wide = jnp.dtype(jnp.float32) if stored.itemsize < 4 else stored
            init = _fan_in(len(inputs), 1, 1 / 3, "uniform")
            a = self._param("lora_a", init, (*into, "rank"), (*inputs, lora.r), wide)
            zeros = nn.initializers.zeros
            b = self._param("lora_b", zeros, ("rank", *out_of), (lora.r, *outputs), wide)
            inner = project(into_rank, x, a.astype(dtype))
            added = project(out_of_rank, inner, b.astype(dtype)).astype(wide)
            out = out + (added * jnp.asarray(lora.scale, wide)).astype(dtype)
        return checkpoint_name(out, PRODUCT)

    def _param(
        self, name: str, init, axes: tuple[str, ...], shape: tuple[int, ...], dtype=None
    ) -> Array:
        init = nn.with_partitioning(init, axes)
        return self.param(name, init, shape, jnp.dtype(dtype or self.config.param_dtype))

    def _has_adapter(self) -> bool:
        return self.has_variable("params", "lora_a")

    def _adapter_einsums(self) -> tuple[str, str]:
        """By way of r numbers: "btd,dnh->btnh" becomes "btd,dr->btr", then "btr,rnh->btnh"."""
        names, result = self.einsum.split("->")
        of_x, of_kernel = names.split(",")
        inputs, outputs = of_kernel[: self.num_inputs], of_kernel[self.num_inputs :]
        inner = of_x.removesuffix(inputs) + "r"
        return f"{of_x},{inputs}r->{inner}", f"{inner},r{outputs}->{result}"


def _fan_in(
    num_inputs: int, num_outputs: int, variance: float = 1.0, distribution: str = "truncated_normal"
):
    dimensions = tuple(range(num_inputs + num_outputs))
    return _SCALED(
        variance,
        "fan_in",
        distribution,
        in_axis=dimensions[:num_inputs],
        out_axis=dimensions[num_inputs:],
    )


def _lift(x: Array, ndim: int) -> Array:
    """With leading axes of size 1."""
    return jnp.expand_dims(x, tuple(range(ndim - x.ndim)))


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
    """x / rms(x) * scale over the last axis, computed in float32. arXiv 1910.07467.

    With `rms_norm_offset` the factor is 1 + scale, and the scale starts at 0.
    """

    config: ModelConfig
    axis: str = "embed_vector"

    @nn.compact
    def __call__(self, x: Array) -> Array:
        offset = self.config.rms_norm_offset
        init = nn.initializers.zeros if offset else nn.initializers.ones
        scale = self.param(
            "scale",
            nn.with_partitioning(init, (self.axis,)),
            (x.shape[-1],),
            jnp.dtype(self.config.param_dtype),
        )
        wide = x.astype(jnp.float32)
        mean_square = jnp.mean(jnp.square(wide), axis=-1, keepdims=True)
        normed = wide * jax.lax.rsqrt(mean_square + self.config.rms_norm_eps)
        scale = _lift(scale.astype(jnp.float32), x.ndim)
        return (normed * (scale + 1 if offset else scale)).astype(x.dtype)


class GatedMLP(nn.Module):
    """down(act(gate(x)) * up(x)). arXiv 2002.05202."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        c = self.config
        into, out = (c.hidden_size, c.intermediate_size), (c.intermediate_size, c.hidden_size)
        gate = Projection(c, "btd,df->btf", into, ("embed", "mlp"), name="gate")(x)
        up = Projection(c, "btd,df->btf", into, ("embed", "mlp"), name="up")(x)
        return Projection(c, "btf,fd->btd", out, ("mlp", "embed"), name="down")(
            activation(c)(gate) * up
        )


def activation(config: ModelConfig) -> Callable[[Array], Array]:
    """`hidden_act` as a function."""
    return {"silu": nn.silu, "gelu_tanh": nn.gelu}[config.hidden_act]


def remat(function: Callable, policy: RematPolicy) -> Callable:
    """A function of one layer, of which the backward pass keeps what the policy says."""
    if policy == "none":
        return function
    # The barriers against common subexpressions are for code that no loop separates.
    checkpoint = functools.partial(jax.checkpoint, prevent_cse=False)
    return checkpoint(function) if policy == "full" else checkpoint(function, policy=_products)


_by_name = jax.checkpoint_policies.save_only_these_names(PRODUCT)


def _products(primitive, *args, **params) -> bool:
    """Whether the backward pass keeps a result: of projections and of attention kernels."""
    cudnn = primitive.name.startswith("dot_product_attention_fwd")
    return cudnn or _by_name(primitive, *args, **params)
