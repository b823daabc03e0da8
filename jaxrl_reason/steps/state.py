"""The state of training, its optimiser, and one guarded update."""

import dataclasses
from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int

from jaxrl_reason.models import Params
from jaxrl_reason.steps.trained import Trains, combine, everything, partition

Metrics = dict[str, Array]


class Optimizer(NamedTuple):
    """An Optax transformation of the parameters that are trained; it sees no others."""

    init: optax.TransformInitFn
    update: optax.TransformUpdateFn
    trains: Trains = everything
    """Which they are."""


AnyOptimizer = Optimizer | optax.GradientTransformation
"""A plain Optax transformation trains every parameter."""


def trains_of(optimizer: AnyOptimizer) -> Trains:
    """Which parameters an optimiser trains."""
    return optimizer.trains if isinstance(optimizer, Optimizer) else everything


class TrainState(NamedTuple):
    """All that an update reads and writes; random draws derive from a run key and the step."""

    params: Params
    """All of them, also those that are not trained."""
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
    """Decoupled decay of matrices; norms' scales and biases are exempt."""
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


def make_optimizer(
    config: OptimizerConfig, total_steps: int, trains: Trains = everything
) -> Optimizer:
    """AdamW as configured for a run of `total_steps` updates of the parameters that `trains` names.

    Norm, clipping and moments are those of the trained parameters alone.
    """

    def decayed(params: Params):
        # The vectors, stacked over layers or not; everything else is a matrix.
        is_vector = lambda path: path[-1].key in ("scale", "bias")
        return jax.tree_util.tree_map_with_path(lambda path, _: not is_vector(path), params)

    adamw = optax.chain(
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
    return Optimizer(adamw.init, adamw.update, trains)


def init_state(params: Params, optimizer: AnyOptimizer) -> TrainState:
    """A state before its first update. Run under `jax.jit` with `state_shardings`.

    Raises:
        ValueError: the optimiser trains none of the parameters.
    """
    trained, _ = partition(params, trains_of(optimizer))
    if not jax.tree.leaves(trained):
        raise ValueError(
            "no parameter is trained: those that the optimiser names, such as adapters, are not in "
            f"the tree; its parts are {', '.join(sorted(params))}"
        )
    return TrainState(params, optimizer.init(trained), jnp.zeros((), jnp.int32))


def state_shardings(
    params_shapes, optimizer: AnyOptimizer, params_shardings, replicated
) -> TrainState:
    """Shardings of a state: moments lie as their parameters do, scalars are replicated."""
    trained, _ = partition(params_shapes, trains_of(optimizer))
    places, _ = partition(params_shardings, trains_of(optimizer))
    shapes = jax.eval_shape(optimizer.init, trained)
    moments = optax.tree_map_params(
        optimizer,
        lambda _, sharding: sharding,
        shapes,
        places,
        transform_non_params=lambda _: replicated,
    )
    return TrainState(params_shardings, moments, replicated)


def apply_gradients(
    state: TrainState, loss: Array, gradients: Params, optimizer: AnyOptimizer
) -> tuple[TrainState, Metrics]:
    """One update; a non-finite loss or gradient leaves parameters and moments as they were.

    Parameters that are not trained are those of the old state, so that under donation they stay
    where they are.

    Args:
        state: before the update.
        loss: to be checked and reported.
        gradients: of the trained parameters, as `value_and_grad` gives them.
        optimizer: that the state was made for.

    Returns:
        The new state and `loss`, `grad_norm` (before clipping), `nonfinite_steps` (0 or 1).
    """
    old, frozen = partition(state.params, trains_of(optimizer))
    norm = optax.tree.norm(gradients)
    finite = jnp.isfinite(norm) & jnp.isfinite(loss)
    # Optax raises decays to an integer count, which strict dtype promotion would refuse.
    with jax.numpy_dtype_promotion("standard"):
        updates, opt_state = optimizer.update(gradients, state.opt_state, old)
    new = optax.apply_updates(old, updates)
    keep = lambda new, old: jnp.where(finite, new, old)
    new, opt_state = jax.tree.map(keep, (new, opt_state), (old, state.opt_state))
    skipped = 1.0 - finite.astype(jnp.float32)
    metrics = {"loss": loss, "grad_norm": norm, "nonfinite_steps": skipped}
    return TrainState(combine(new, frozen), opt_state, state.step + 1), metrics


Step = Callable[[TrainState, dict[str, Array]], tuple[TrainState, Metrics]]
