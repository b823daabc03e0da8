"""The state of training, its optimiser, and one guarded update."""

import dataclasses
from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int

from jaxrl_reason.models import Params

Metrics = dict[str, Array]
Optimizer = optax.GradientTransformation


class TrainState(NamedTuple):
    """All that an update reads and writes; random draws derive from a run key and the step."""

    params: Params
    opt_state: optax.OptState
    step: Int[Array, ""]
    """Updates so far, skipped ones included."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW with a warm-up, a schedule, and clipping of the global gradient norm."""

    learning_rate: float
    """Highest learning rate."""
    lr_scheduler_type: Literal["constant", "linear", "cosine"] = "constant"
    """Course of the learning rate after the warm-up, down to `min_lr_ratio`."""
    warmup_ratio: float = 0.0
    """Share of the updates over which the learning rate rises from 0."""
    min_lr_ratio: float = 0.0
    """Last learning rate as a share of the highest; for linear and cosine."""
    adam_beta1: float = 0.9
    """Decay of the first moment."""
    adam_beta2: float = 0.95
    """Decay of the second moment."""
    adam_epsilon: float = 1e-8
    """Added to the root of the second moment."""
    weight_decay: float = 0.0
    """Decoupled decay of matrices; norms' scales are exempt."""
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this global norm."""

    def __post_init__(self):
        if not self.learning_rate > 0:  # refuses NaN as well
            raise ValueError(f"learning_rate={self.learning_rate} must be positive")
        if not 0 <= self.warmup_ratio < 1:
            raise ValueError(f"warmup_ratio={self.warmup_ratio} must lie in [0, 1)")
        if not 0 <= self.min_lr_ratio <= 1:
            raise ValueError(f"min_lr_ratio={self.min_lr_ratio} must lie in [0, 1]")
        if self.max_grad_norm <= 0:
            raise ValueError(f"max_grad_norm={self.max_grad_norm} must be positive")
        if self.lr_scheduler_type == "constant" and self.min_lr_ratio > 0:
            raise ValueError(
                "min_lr_ratio cannot act with lr_scheduler_type=constant; choose linear or cosine"
            )


def learning_rate_schedule(config: OptimizerConfig, total_steps: int) -> optax.Schedule:
    """Learning rate as a function of the update, from 0."""
    peak, end = config.learning_rate, config.learning_rate * config.min_lr_ratio
    warmup = round(config.warmup_ratio * total_steps)
    rest = max(1, total_steps - warmup)
    course = {
        "constant": lambda: optax.constant_schedule(peak),
        "linear": lambda: optax.linear_schedule(peak, end, rest),
        "cosine": lambda: optax.cosine_decay_schedule(peak, rest, config.min_lr_ratio),
    }[config.lr_scheduler_type]()
    if not warmup:
        return course
    # The first update would otherwise have rate 0 and be wasted.
    rise = optax.linear_schedule(peak / (warmup + 1), peak, warmup)
    return optax.join_schedules([rise, course], [warmup])


def make_optimizer(config: OptimizerConfig, total_steps: int) -> Optimizer:
    """AdamW as configured for a run of `total_steps` updates."""

    def decayed(params: Params):
        # Norms' scales are the vectors, stacked over layers or not; everything else is a matrix.
        is_scale = lambda path, _: path[-1].key == "scale"
        return jax.tree_util.tree_map_with_path(lambda path, p: not is_scale(path, p), params)

    return optax.chain(
        optax.clip_by_global_norm(config.max_grad_norm),
        optax.adamw(
            learning_rate_schedule(config, total_steps),
            b1=config.adam_beta1,
            b2=config.adam_beta2,
            eps=config.adam_epsilon,
            weight_decay=config.weight_decay,
            mask=decayed,
        ),
    )


def init_state(params: Params, optimizer: Optimizer) -> TrainState:
    """A state before its first update. Run under `jax.jit` with `state_shardings`."""
    return TrainState(params, optimizer.init(params), jnp.zeros((), jnp.int32))


def state_shardings(
    params_shapes, optimizer: Optimizer, params_shardings, replicated
) -> TrainState:
    """Shardings of a state: moments lie as their parameters do, scalars are replicated."""
    shapes = jax.eval_shape(optimizer.init, params_shapes)
    moments = optax.tree_map_params(
        optimizer,
        lambda _, sharding: sharding,
        shapes,
        params_shardings,
        transform_non_params=lambda _: replicated,
    )
    return TrainState(params_shardings, moments, replicated)


def apply_gradients(
    state: TrainState, loss: Array, gradients: Params, optimizer: Optimizer
) -> tuple[TrainState, Metrics]:
    """One update; a non-finite loss or gradient leaves parameters and moments as they were.

    Returns:
        The new state and `loss`, `grad_norm` (before clipping), `nonfinite_steps` (0 or 1).
    """
    norm = optax.tree.norm(gradients)
    finite = jnp.isfinite(norm) & jnp.isfinite(loss)
    # Optax raises decays to an integer count, which strict dtype promotion would refuse.
    with jax.numpy_dtype_promotion("standard"):
        updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    keep = lambda new, old: jnp.where(finite, new, old)
    params, opt_state = jax.tree.map(keep, (params, opt_state), (state.params, state.opt_state))
    skipped = 1.0 - finite.astype(jnp.float32)
    metrics = {"loss": loss, "grad_norm": norm, "nonfinite_steps": skipped}
    return TrainState(params, opt_state, state.step + 1), metrics


Step = Callable[[TrainState, dict[str, Array]], tuple[TrainState, Metrics]]
