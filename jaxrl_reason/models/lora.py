"""Low-rank adapters (arXiv 2106.09685): which projections have one, and what is trained.

An adapter is two leaves beside a kernel, `lora_a` [*inputs, r] and `lora_b` [r, *outputs], both
behind the kernel's leading axes (layers, experts). A projection applies it if and only if the
leaves are there: y = x W + (lora_alpha / r) x A B. So a model without its adapter is the same
arrays in a smaller tree.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jaxtyping import Array, Float

if TYPE_CHECKING:
    from jaxrl_reason.models.config import ModelConfig

Params = dict[str, Any]
Path = tuple[str, ...]
"""Names on the way from the root of a tree to a leaf."""

ADAPTER = ("lora_a", "lora_b")
"""Names of the leaves of an adapter."""
MODULES = {
    "q": "q_proj",
    "k": "k_proj",
    "v": "v_proj",
    "o": "o_proj",
    "gate": "gate_proj",
    "up": "up_proj",
    "down": "down_proj",
}
"""Hugging Face's name of each projection that can have an adapter."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoRAConfig:
    """Size and place of the adapters; names and meaning are PEFT's."""

    r: int
    """Rank of every adapter."""
    lora_alpha: float
    """Adapters are scaled by `lora_alpha / r`."""
    target_modules: tuple[str, ...] | Literal["all-linear"] = "all-linear"
    """Projections with an adapter by Hugging Face's names, such as q_proj; or all of them."""

    def __post_init__(self):
        if self.r < 1:
            raise ValueError(f"r={self.r} must be at least 1")
        if not 0 < self.lora_alpha < math.inf:  # refuses NaN as well
            raise ValueError(f"lora_alpha={self.lora_alpha} must be positive and finite")
        if self.target_modules == "all-linear":
            return
        allowed = f"{', '.join(MODULES.values())}, or 'all-linear' for all of them"
        if isinstance(self.target_modules, str):
            raise ValueError(
                f"target_modules={self.target_modules!r} must be a list of names: {allowed}"
            )
        # Lists come from JSON; a configuration must be hashable.
        object.__setattr__(self, "target_modules", tuple(self.target_modules))
        unknown = [name for name in self.target_modules if name not in MODULES.values()]
        if unknown:
            raise ValueError(f"target_modules has unknown names {unknown}; allowed are {allowed}")
        if not self.target_modules:
            raise ValueError(f"target_modules is empty; name some of {allowed}")

    @property
    def scale(self) -> float:
        """The factor of x A B."""
        return self.lora_alpha / self.r

    def targets(self, name: str) -> bool:
        """Whether the projection of that name (ours, such as `q`) has an adapter."""
        return name in MODULES and (
            self.target_modules == "all-linear" or MODULES[name] in self.target_modules
        )


def trainable(config: "ModelConfig") -> Callable[[Path], bool]:
    """Whether a run trains the leaf at a path: with adapters those alone, but never what is frozen.

    Raises:
        ValueError: `freeze` names something that is no part of the model, or leaves nothing.
    """
    parts = {"embedding", "final_norm", "layers"}
    parts |= set() if config.tie_word_embeddings else {"head"}
    parts |= set() if config.vision is None else {"vision"}
    frozen = frozenset(config.freeze)
    if unknown := sorted(frozen - parts):
        raise ValueError(
            f"freeze names {unknown}; the parts of this model are {', '.join(sorted(parts))}"
        )
    if config.lora is not None and "layers" in frozen:
        raise ValueError("nothing is trained: adapters are in the layers, which freeze names")
    if frozen == parts:
        raise ValueError(f"nothing is trained: freeze names all parts, {sorted(parts)}; remove one")
    if config.lora is None:
        return lambda path: path[0] not in frozen
    return lambda path: path[-1] in ADAPTER and path[0] not in frozen


# Adapters in a tree of parameters


def has_adapter(params: Params) -> bool:
    """Whether any projection has an adapter."""
    return bool(jax.tree.leaves(_adapter(params)))


def without_adapter(params: Params) -> Params:
    """The same arrays in a tree without those of adapters; nothing is copied."""
    return _without_adapter(params)


def _without_adapter(tree: Any) -> Any:
    if isinstance(tree, tuple):
        return tuple(map(_without_adapter, tree))
    if not isinstance(tree, dict):
        return tree
    return {name: _without_adapter(x) for name, x in tree.items() if name not in ADAPTER}


def merge_lora(params: Params, config: LoRAConfig, *, donate: bool = False) -> Params:
    """Parameters without adapters that compute the same: kernel + (lora_alpha / r) A B.

    Added in float32 and rounded once to the kernel's dtype. Arrays stay where they lie.

    Args:
        params: the parameters; those of projections without an adapter are given back.
        config: of the adapters.
        donate: write into the memory of `params`, whose kernels are then gone.
    """
    base, adapter = without_adapter(params), _adapter(params)
    if any(isinstance(x, Tracer) for x in jax.tree.leaves(params)):
        return _merge(base, adapter, config.scale)
    places = jax.tree.map(lambda x: getattr(x, "sharding", None), base)
    merge = jax.jit(
        functools.partial(_merge, scale=config.scale),
        out_shardings=places,
        donate_argnums=(0,) if donate else (),
    )
    return merge(base, adapter)


def _merge(base: Any, adapter: Any, scale: float) -> Any:
    if isinstance(base, tuple):
        return tuple(_merge(x, y, scale) for x, y in zip(base, adapter, strict=True))
    if not isinstance(base, dict):
        return base
    merged = {name: _merge(x, adapter[name], scale) for name, x in base.items()}
    if "lora_a" in adapter:
        merged["kernel"] = _merged(base["kernel"], adapter["lora_a"], adapter["lora_b"], scale)
    return merged


def _merged(
    kernel: Float[Array, "..."], a: Float[Array, "... r"], b: Float[Array, "..."], scale: float
) -> Float[Array, "..."]:
    # The axes of layers and experts come first in all three; A goes on with the inputs, B with the
    # rank and the outputs.
    stack = a.ndim + b.ndim - 2 - kernel.ndim
    rank, letters = "r", iter("abcdefgh")
    shared = "".join(next(letters) for _ in range(stack))
    inputs = "".join(next(letters) for _ in range(a.ndim - 1 - stack))
    outputs = "".join(next(letters) for _ in range(b.ndim - 1 - stack))
    wide = jnp.float64 if kernel.dtype == jnp.float64 else jnp.float32
    change = jnp.einsum(
        f"{shared}{inputs}{rank},{shared}{rank}{outputs}->{shared}{inputs}{outputs}",
        a.astype(wide),
        b.astype(wide),
        precision=jax.lax.Precision.HIGHEST,
    )
    return (kernel.astype(wide) + scale * change).astype(kernel.dtype)


def _adapter(params: Params) -> Params:
    """The tree with None in place of all that belongs to no adapter."""
    is_adapter = lambda path: jax.tree_util.keystr(path[-1:], simple=True) in ADAPTER
    return jax.tree_util.tree_map_with_path(lambda path, x: x if is_adapter(path) else None, params)
