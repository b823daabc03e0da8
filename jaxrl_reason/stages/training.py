"""The loop around the steps of a stage: start or resume, log, save."""

import functools
import io
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils

from jaxrl_reason import files, processes
from jaxrl_reason.checkpoint import Checkpoints, latest_valid, read_meta
from jaxrl_reason.errors import InputError, Preemption
from jaxrl_reason.metrics import MetricLog, NoLog, Progress, Silence
from jaxrl_reason.models import Params
from jaxrl_reason.models.lora import trainable
from jaxrl_reason.sharding import batch_sharding, jit_on_mesh, replicated
from jaxrl_reason.stages.breakdown import table
from jaxrl_reason.stages.compiles import CompileWatch
from jaxrl_reason.stages.context import Stage
from jaxrl_reason.stages.deadline import COMPILING, deadline
from jaxrl_reason.stages.guard import Guard
from jaxrl_reason.stages.preemption import after_a_step
from jaxrl_reason.stages.profiling import Profile
from jaxrl_reason.steps import (
    Optimizer,
    Step,
    TrainState,
    init_state,
    learning_rate_schedule,
    make_optimizer,
    state_shardings,
)

_logger = logging.getLogger(__name__)


class Start(NamedTuple):
    """Where a stage goes on: after its last checkpoint, or at its parent."""

    state: TrainState
    step: int
    """Steps already done."""
    meta: Mapping[str, Any]
    """What the checkpoint says; empty at the parent."""


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
    batch: Mapping[str, jax.Array]
    """What the updates read, [k, rows, ...]."""
    advantages: np.ndarray | None = None
    """Of the step's completions, in reinforcement learning."""


OneStep = Callable[[TrainState, int], StepResult]


def stage_optimizer(stage: Stage) -> Optimizer:
    """The optimiser of all updates of a stage, for the parameters that the run trains."""
    trains = trainable(stage.context.model.config)
    return make_optimizer(stage.config.optimizer, stage.config.updates, trains)


def compile_step(stage: Stage, make_step: Callable[..., Step], **options: Any) -> Step:
    """Jit a step with the state's shardings and its memory donated; batches are [k, rows, ...].

    Args:
        stage: the stage; those with an equal optimiser and equal options share the step.
        make_step: `(model, optimizer, **options) -> step`.
        options: numbers, strings, and tuples, mappings and dataclasses of them.
    """
    context = stage.context

    def make() -> Step:
        optimizer = stage_optimizer(stage)
        states = _shardings(stage, optimizer)
        return jit_on_mesh(
            make_step(context.model, optimizer, **options),
            context.mesh,
            in_shardings=(states, batch_sharding(context.mesh, batch_axis=1)),
            out_shardings=(states, replicated(context.mesh)),
            donate_argnums=0,
        )

    of = (make_step.__qualname__, options, stage.config.optimizer, stage.config.updates)
    return context.shared.get(make, *of)


def fresh_state(stage: Stage, optimizer: Optimizer, params: Params) -> TrainState:
    """The state before the first update, each array where it lies for training."""
    create = jax.jit(
        lambda params: init_state(params, optimizer), out_shardings=_shardings(stage, optimizer)
    )
    return create(params)


def state_like(stage: Stage, optimizer: Optimizer) -> TrainState:
    """Shapes of the state with where they lie."""
    shapes = jax.eval_shape(lambda p: init_state(p, optimizer), stage.context.params_shapes)
    of = lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
    return jax.tree.map(of, shapes, _shardings(stage, optimizer))


def resume(stage: Stage, optimizer: Optimizer, *, data_hash: str) -> Start:
    """The last valid checkpoint of a stage, or its parent's parameters.

    Args:
        stage: the stage.
        optimizer: as configured for all of the stage's updates.
        data_hash: identifies the stage's data.

    Raises:
        InputError: the data has changed since the checkpoint was written.
    """
    like = state_like(stage, optimizer)
    rest = {"opt_state": like.opt_state, "step": like.step}
    with deadline(stage.context.config.step_timeout, times=COMPILING):
        restored = latest_valid(stage.checkpoints, params=like.params, state=rest)
    if restored is None:
        _compare_devices(stage, read_meta(stage.parent), f"{stage.parent.name}, its parent,")
        return Start(fresh_state(stage, optimizer, stage.parent_params()), 0, {})
    if restored.meta["data_hash"] != data_hash:
        raise InputError(
            f"stages.{stage.name}: its data has changed since {restored.path} was written; put the "
            "old data back, or give the run another name (name=...); nothing was overwritten"
        )
    _compare_devices(stage, restored.meta, "its checkpoint")
    state = TrainState(restored.params, restored.state["opt_state"], restored.state["step"])
    return Start(state, restored.step, restored.meta)


def _compare_devices(stage: Stage, meta: Mapping[str, Any], what: str) -> None:
    """Say so if a checkpoint was made by other devices; the untrained model follows from none."""
    before, now = meta.get("devices"), stage.devices()
    if before not in (None, now):
        _logger.warning(
            "%s: %s was made by %s, and it goes on with %s; results equal those of an "
            "uninterrupted run to rounding, not to the bit",
            stage.name,
            what,
            before,
            now,
        )


def train(
    stage: Stage,
    begin: Start,
    one_step: OneStep,
    *,
    show: tuple[str, ...],
    data_hash: str,
    more_meta: Callable[[int], Mapping[str, Any]] = lambda done: {"cursor": {"step": done}},
) -> None:
    """Run the steps that are left.

    Everything that a step draws or reads follows from (seed, step) and what the checkpoint holds,
    so a run that was killed and started again computes what an uninterrupted one would have
    computed, bit for bit.

    Args:
        stage: the stage.
        begin: what `resume` gave.
        one_step: `(state, step) -> StepResult`, steps counted from 0.
        show: names of metrics for the progress bar.
        data_hash: identifies the stage's data.
        more_meta: what else a checkpoint after so many steps says, as JSON values.

    Raises:
        InputError: too many updates in a row were not finite.
        StorageError: a checkpoint, metrics or such a batch could not be written.
        Preemption: SIGTERM has come; the step that it came in is saved.
    """
    config = stage.config
    state, meta = begin.state, begin.meta
    guard = Guard(stage.name, config, meta.get("guard"))  # none in checkpoints older than the guard
    rate = learning_rate_schedule(config.optimizer, config.updates)
    seconds, began = meta.get("seconds", 0.0), time.monotonic()
    compiles = CompileWatch(stage.name)
    timeout = stage.context.config.step_timeout
    saving = functools.partial(deadline, timeout, times=COMPILING)
    rows: list[dict[str, float]] = []
    with (
        Checkpoints(stage.checkpoints, keep=config.save_total_limit, within=saving) as checkpoints,
        _open_log(stage, begin.step) as log,
        Progress(
            f"{stage.name} ({config.kind})",
            total=config.steps,
            start=begin.step,
            stream=None if processes.is_first() else Silence(),
        ) as bar,
        Profile(
            stage.name, stage.directory / "profile", stage.context.config.tracking.profiled
        ) as profile,
        after_a_step() as is_to_end,
    ):
        for step in range(begin.step, config.steps):
            done, step_began = step + 1, time.monotonic()
            compiles.start()
            profile.begin(done)
            with deadline(timeout, times=COMPILING if step == begin.step else 1):
                result = one_step(state, step)
                state, metrics = result.state, _numbers(result, step_began)
            profile.end(done)
            metrics["compiles"] = compiles.look(done, result.batch["tokens"].shape)
            metrics |= guard.look(
                done,
                updates=result.updates,
                counted_tokens=result.counted_tokens,
                advantages=result.advantages,
            )
            if guard.nonfinite_in_a_row >= stage.context.config.nonfinite_limit:
                raise _stopped(stage, done, guard.nonfinite_in_a_row, result.batch)
            metrics["learning_rate"] = float(rate(step * (config.updates // config.steps)))
            rows.append(metrics)
            log.log(done, metrics)
            shown = {name: metrics[name] for name in show if name in metrics}
            bar.update(done, tokens=result.num_tokens, **shown)
            ends = is_to_end()
            if done % config.save_steps == 0 or done == config.steps or ends:
                meta = stage.meta(
                    step=done,
                    complete=done == config.steps,
                    data_hash=data_hash,
                    seconds=seconds + time.monotonic() - began,
                    guard=guard.state(),
                    **more_meta(done),
                )
                rest = {"opt_state": state.opt_state, "step": state.step}
                checkpoints.save(done, params=state.params, state=rest, meta=meta)
            if ends:
                checkpoints.wait()
                raise Preemption(f"{stage.name} is saved after step {done}")
        if rows:
            bar.conclude(table(stage.name, rows))


def _open_log(stage: Stage, step: int) -> "MetricLog | NoLog":
    """Where the metrics of the steps after this one go; one process writes them."""
    if not processes.is_first():
        return NoLog()
    tracking = stage.context.config.tracking
    return MetricLog(
        stage.directory,
        tensorboard=tracking.tensorboard,
        wandb_project=tracking.wandb_project,
        from_step=step,
        aliases="verl" if tracking.verl_names else None,
    )


def _stopped(stage: Stage, step: int, updates: int, batch: Mapping[str, jax.Array]) -> InputError:
    """The end of a stage that has stopped learning; its last batch is written for a look at it."""
    arrays = batch
    if processes.count() > 1:
        arrays = multihost_utils.process_allgather(batch, tiled=True)
    path = stage.directory / f"nonfinite_step_{step}.npz"
    if processes.is_first():
        packed = io.BytesIO()
        np.savez_compressed(packed, **{name: np.asarray(x) for name, x in arrays.items()})
        with files.storing(f"{path}, the last of {updates} batches whose loss was not finite,"):
            files.replace(path, packed.getvalue())
    return InputError(
        f"stages.{stage.name}: the loss or the gradient of {updates} updates in a row, the last in "
        f"step {step}, was not finite; they were skipped. The batch is in {path}, and the last "
        "checkpoint is sound. Look at grad_norm of the steps before, lower "
        "optimizer.learning_rate, or mend the data or the reward (nonfinite_limit is the number "
        "that is put up with)"
    )


def _numbers(result: StepResult, began: float) -> dict[str, float]:
    """The metrics of a step that began then; reading them waits for the device."""
    metrics = {**result.updates[-1], **result.metrics}
    metrics = {name: float(value) for name, value in metrics.items()}
    seconds = time.monotonic() - began
    return metrics | {"step_time": seconds, "tokens_per_second": result.num_tokens / seconds}


def _shardings(stage: Stage, optimizer: Optimizer) -> TrainState:
    context = stage.context
    return state_shardings(
        context.params_shapes, optimizer, context.params_shardings, replicated(context.mesh)
    )
