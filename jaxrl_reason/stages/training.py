"""The loop around the steps of a stage: start or resume, log, save."""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxrl_reason.checkpoint import Checkpoints, latest_valid
from jaxrl_reason.errors import InputError
from jaxrl_reason.metrics import MetricLog, Progress
from jaxrl_reason.models import Params
from jaxrl_reason.sharding import batch_sharding, replicated
from jaxrl_reason.stages.context import Stage
from jaxrl_reason.stages.guard import Guard
from jaxrl_reason.steps import (
    Optimizer,
    Step,
    TrainState,
    init_state,
    learning_rate_schedule,
    state_shardings,
)


class StepResult(NamedTuple):
    """What a stage's step returns."""

    state: TrainState
    updates: Sequence[Mapping[str, Any]]
    """Metrics of each update of the step; those of the last are logged."""
    metrics: Mapping[str, Any]
    """Other scalars to log."""
    num_tokens: int
    """Tokens that the step worked on."""
    counted_tokens: int
    """Tokens under the mask of the loss."""
    advantages: np.ndarray | None = None
    """Of the step's completions, in reinforcement learning."""


OneStep = Callable[[TrainState, int], StepResult]


def compile_step(stage: Stage, step: Step, optimizer: Optimizer) -> Step:
    """Jit a step with the state's shardings and its memory donated; batches are [k, rows, ...]."""
    context = stage.context
    states = _shardings(stage, optimizer)
    return jax.jit(
        step,
        in_shardings=(states, batch_sharding(context.mesh, batch_axis=1)),
        out_shardings=(states, replicated(context.mesh)),
        donate_argnums=0,
    )


def fresh_state(stage: Stage, optimizer: Optimizer, params: Params) -> TrainState:
    """The state before the first update, each array where it lies for training."""
    create = jax.jit(
        lambda params: init_state(params, optimizer), out_shardings=_shardings(stage, optimizer)
    )
    return create(params)


def train(
    stage: Stage,
    optimizer: Optimizer,
    one_step: OneStep,
    *,
    show: tuple[str, ...],
    data_hash: str,
    updates_per_step: int = 1,
) -> None:
    """Run the steps that are left, from the last checkpoint or from the parent.

    Everything that a step draws or reads follows from (seed, step), so a run that was killed and
    started again computes what an uninterrupted one would have computed, bit for bit.

    Args:
        stage: the stage.
        optimizer: as configured for all of the stage's updates.
        one_step: `(state, step) -> StepResult`, steps counted from 0.
        show: names of metrics for the progress bar.
        data_hash: identifies the stage's data.
        updates_per_step: updates of the optimiser in one step, for the logged learning rate.
    """
    config = stage.config
    state, start, meta = _start(stage, optimizer, data_hash)
    seconds = meta["seconds"]
    guard = Guard(stage.name, config, meta.get("guard"))  # none in checkpoints older than the guard
    tracking = stage.context.config.tracking
    rate = learning_rate_schedule(config.optimizer, config.steps * updates_per_step)
    began = time.monotonic()
    with (
        Checkpoints(stage.checkpoints, keep=config.save_total_limit) as checkpoints,
        MetricLog(
            stage.directory,
            tensorboard=tracking.tensorboard,
            wandb_project=tracking.wandb_project,
            from_step=start,
            aliases="verl" if tracking.verl_names else None,
        ) as log,
        Progress(f"{stage.name} ({config.kind})", total=config.steps, start=start) as bar,
    ):
        for step in range(start, config.steps):
            step_began = time.monotonic()
            done = step + 1
            result = one_step(state, step)
            state = result.state
            metrics = {**result.updates[-1], **result.metrics}
            metrics |= guard.look(
                done,
                updates=result.updates,
                counted_tokens=result.counted_tokens,
                advantages=result.advantages,
            )
            metrics = {name: float(value) for name, value in metrics.items()}
            metrics["learning_rate"] = float(rate(step * updates_per_step))
            metrics["step_time"] = time.monotonic() - step_began
            log.log(done, metrics)
            shown = {name: metrics[name] for name in show if name in metrics}
            bar.update(done, tokens=result.num_tokens, **shown)
            if done % config.save_steps == 0 or done == config.steps:
                meta = stage.meta(
                    step=done,
                    complete=done == config.steps,
                    data_hash=data_hash,
                    cursor={"step": done},
                    seconds=seconds + time.monotonic() - began,
                    guard=guard.state(),
                )
                rest = {"opt_state": state.opt_state, "step": state.step}
                checkpoints.save(done, params=state.params, state=rest, meta=meta)


def _start(
    stage: Stage, optimizer: Optimizer, data_hash: str
) -> tuple[TrainState, int, Mapping[str, Any]]:
    """The state to go on from, the steps already done, and what their checkpoint says of them."""
    context = stage.context
    shapes = jax.eval_shape(lambda p: init_state(p, optimizer), context.params_shapes)
    like = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
        shapes,
        _shardings(stage, optimizer),
    )
    rest = {"opt_state": like.opt_state, "step": like.step}
    restored = latest_valid(stage.checkpoints, params=like.params, state=rest)
    if restored is None:
        return fresh_state(stage, optimizer, stage.parent_params()), 0, {"seconds": 0.0}
    if restored.meta["data_hash"] != data_hash:
        raise InputError(
            f"stages.{stage.name}: its data has changed since {restored.path} was written; put the "
            "old data back, or give the run another name (name=...); nothing was overwritten"
        )
    state = TrainState(restored.params, restored.state["opt_state"], restored.state["step"])
    return state, restored.step, restored.meta


def _shardings(stage: Stage, optimizer: Optimizer) -> TrainState:
    context = stage.context
    return state_shardings(
        context.params_shapes, optimizer, context.params_shardings, replicated(context.mesh)
    )
