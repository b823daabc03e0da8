"""Other meshes, remat policies and batches at once of a run: which of them fit, and are fastest.

One after the other: first the mesh, then on the best one what the backward pass computes again,
then into how many microbatches an update is cut, and how many completions are sampled at once. How
many rows a step has stays as it is, since what is learned follows from it. Every trial compiles the
programs of its stages, so their number has a limit; meshes that cannot hold the parameters and
their optimiser state, and those over which something does not divide, cost none.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from jaxrl_reason.errors import InputError
from jaxrl_reason.planner.described import load_described
from jaxrl_reason.planner.plan import StagePlan, bytes_per_device, plan_stages
from jaxrl_reason.planner.topology import Topology
from jaxrl_reason.stages.config import RunConfig
from jaxrl_reason.stages.context import Context
from jaxrl_reason.stages.pipeline import plan as stages_of
from jaxrl_reason.stages.policy_config import PolicyConfig
from jaxrl_reason.stages.training import stage_optimizer, state_like

_REMATS = ("none", "dots", "full")
"""From what takes the most memory to what takes the least."""
_SPLITS = (1, 2, 4, 8)
_MOST_TOKENS = 32768
"""Tokens of a device's microbatch that an update in reinforcement learning begins with."""

Changes = Mapping[str, Any]
"""Fields of a run by their path."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Trial:
    """One choice, and what it leads to."""

    changes: Changes
    mesh: Mapping[str, int]
    """Sizes by axis."""
    remat: str
    stages: Sequence[StagePlan]
    memory: float
    """Bytes of a chip at the fullest moment of all stages."""
    fits: bool

    @property
    def overrides(self) -> list[str]:
        """The choice as words of a command line."""
        return [f"{path}={value}" for path, value in self.changes.items()]

    @property
    def seconds(self) -> float:
        """Of a step of each stage, added up; a bound."""
        return sum(stage.seconds for stage in self.stages)

    @property
    def is_full_sampling(self) -> bool:
        """Whether the fullest moment of all stages is one of sampling."""
        fullest = max((stage.fullest for stage in self.stages), key=lambda p: p.memory.total)
        return fullest.work in ("prefill", "decode")

    @property
    def rank(self) -> tuple[bool, float, float]:
        """What fits comes first, then what is faster, then what needs less."""
        seconds = self.seconds if math.isfinite(self.seconds) else math.inf
        return (not self.fits, seconds, self.memory)


def search(
    path: str,
    overrides: Sequence[str],
    topology: Topology,
    *,
    names: Sequence[str] | None = None,
    most: int = 12,
    say: Callable[[str], None] = lambda line: None,
) -> list[Trial]:
    """Choices for a run, the best first.

    Args:
        path: of its configuration.
        overrides: fields that stay as they are given here.
        topology: to compile for.
        names: of the stages that count; all by default.
        most: trials that are compiled.
        say: receives a line about each.

    Raises:
        InputError: a mistake in the configuration, `most` below 1, no mesh has room for the
            parameters, or every one was left out for another reason.
    """
    if most < 1:
        raise InputError(f"most={most} must be 1 or more: the most choices that are compiled")
    config = load_described(path, overrides)
    tried: dict[tuple[tuple[str, Any], ...], Trial] = {}
    refused: list[InputError] = []

    def attempt(changes: Changes) -> None:
        key = tuple(sorted(changes.items()))
        if key in tried or len(tried) >= most:
            return
        words = [f"{path}={value}" for path, value in changes.items()]
        try:
            context = Context.describe(load_described(path, [*overrides, *words]), topology.devices)
            chosen = [stage.name for stage in stages_of(context)] if names is None else names
            stages = plan_stages(context, topology, names=chosen)
        except InputError as error:
            say(f"left out {' '.join(words)}: {error}")
            refused.append(error)
            return
        memory = max(stage.memory for stage in stages)
        fits = memory <= topology.chip.memory
        tried[key] = Trial(
            changes=changes,
            mesh=dict(context.mesh.shape),
            remat=context.model.config.remat,
            stages=stages,
            memory=memory,
            fits=fits,
        )
        say(f"tried {len(tried)} of at most {most}: {' '.join(words)}")

    for mesh in _meshes(config, path, overrides, topology):
        attempt(mesh)
        if len(tried) >= max(1, most // 2):  # the others are for what follows
            break
    if not tried and refused:
        raise InputError(f"every mesh was left out; the last because {refused[-1]}")
    if not tried:
        raise InputError(
            f"no mesh of {len(topology.devices)} chips holds the parameters and the optimiser's "
            "state; take a larger slice, an adapter (model.lora) or a smaller model"
        )
    for options_of in (_rows_at_once, _remats, _splits, _rows_at_once):
        best = min(tried.values(), key=lambda trial: trial.rank)
        # Where nothing fits, what is not full needs no room.
        if not best.fits and best.is_full_sampling != (options_of is _rows_at_once):
            continue
        for option in options_of(config, names, len(topology.devices), fits=best.fits):
            attempt({**best.changes, **option})
    return sorted(tried.values(), key=lambda trial: trial.rank)


def _meshes(
    config: RunConfig, path: str, overrides: Sequence[str], topology: Topology
) -> Iterator[Changes]:
    """Meshes with room for the state of training, those that send least first."""
    count = len(topology.devices)
    shape = config.model.resolve(vocab_size=8)
    sizes = [n for n in range(1, count + 1) if count % n == 0]
    parts = max(1, config.mesh.context)
    tensors = [n for n in sizes if n <= 8 and shape.num_key_value_heads % n == 0]
    experts = [n for n in sizes if shape.num_experts and shape.num_experts % n == 0] or [1]
    for tensor in tensors:
        for expert in experts:
            for fsdp in (n for n in sizes if count % (tensor * expert * parts * n) == 0):
                data = count // (tensor * expert * fsdp * parts)
                mesh = {"data": data, "fsdp": fsdp, "expert": expert, "tensor": tensor}
                mesh |= {"context": parts} if config.mesh.context != 1 else {}
                changes = {f"mesh.{axis}": size for axis, size in mesh.items()}
                words = [f"{name}={value}" for name, value in changes.items()]
                try:
                    described = load_described(path, [*overrides, *words])
                    context = Context.describe(described, topology.devices)
                    if _state(context) < topology.chip.memory:
                        yield changes
                except InputError:
                    continue


def _state(context: Context) -> float:
    """Bytes of a device for parameters and the optimiser's state."""
    training = [stage for stage in stages_of(context) if hasattr(stage.config, "optimizer")]
    return max(
        (bytes_per_device(state_like(stage, stage_optimizer(stage))) for stage in training),
        default=bytes_per_device(context.params_like),
    )


def _remats(
    config: RunConfig, names: Sequence[str] | None, devices: int, *, fits: bool
) -> list[Changes]:
    """What else the backward pass may compute again: where nothing fits, only more than now."""
    present = config.model.resolve(vocab_size=8).remat
    first = 0 if fits else _REMATS.index(present) + 1
    return [{"model.changes.remat": remat} for remat in _REMATS[first:] if remat != present]


def _splits(
    config: RunConfig, names: Sequence[str] | None, devices: int, *, fits: bool
) -> list[Changes]:
    """Into how many microbatches updates may be cut: where nothing fits, the most first."""
    order = _SPLITS if fits else _SPLITS[::-1]
    return [_split(config, names, devices, split) for split in order]


def _split(config: RunConfig, names: Sequence[str] | None, devices: int, split: int) -> Changes:
    """The fields that cut updates into more microbatches."""
    changes: dict[str, Any] = {}
    for name, stage in config.stages.items():
        if names is not None and name not in names:
            continue
        if isinstance(stage, PolicyConfig):
            changes[f"stages.{name}.microbatch_tokens"] = devices * _MOST_TOKENS // split
        elif hasattr(stage, "gradient_accumulation_steps"):
            changes[f"stages.{name}.gradient_accumulation_steps"] = split
    return changes


def _rows_at_once(
    config: RunConfig, names: Sequence[str] | None, devices: int, *, fits: bool
) -> list[Changes]:
    """How many completions of a step may be decoded at once: where nothing fits, the fewest first.

    Where something fits, all of a step: fewer read the parameters more often for as many tokens.
    """
    options = []
    for share in (1,) if fits else (8, 4, 2):
        changes: dict[str, Any] = {}
        for name, stage in config.stages.items():
            if not isinstance(stage, PolicyConfig) or (names is not None and name not in names):
                continue
            every = stage.prompts_per_step * stage.num_generations
            present = min(stage.max_num_seqs or every, every)
            rows = every if fits else max(present // share, stage.num_generations)
            if rows != present:
                changes[f"stages.{name}.max_num_seqs"] = rows
        if changes and changes not in options:
            options.append(changes)
    return options
