"""A plan for people to read, and as JSON."""

import math
from collections.abc import Sequence
from typing import Any

from rich import box
from rich.table import Table

from jaxrl_reason.planner.plan import EVALUATION, ProgramPlan, StagePlan
from jaxrl_reason.planner.search import Trial
from jaxrl_reason.planner.topology import Topology


def headline(stage: StagePlan, topology: Topology) -> str:
    """Whether a stage fits, and how long a step takes at least."""
    limit = topology.chip.memory
    spare = limit - stage.memory
    fits = f"fits, {_size(spare)} to spare" if spare >= 0 else f"DOES NOT FIT by {_size(-spare)}"
    is_evaluation = stage.kind == EVALUATION
    title = stage.name if is_evaluation else f"{stage.name} ({stage.kind})"
    text = f"{title}: {_size(stage.memory)} of {_size(limit)} a chip, {fits}"
    if not math.isfinite(stage.seconds):
        return text
    text += f"; {'one' if is_evaluation else 'a step'} takes {_seconds(stage.seconds)} or more"
    rate = _rate(stage, topology)
    return text if rate is None else f"{text}, {rate:,.0f} tokens/s a chip"


def _rate(stage: StagePlan, topology: Topology) -> float | None:
    """Tokens a second and chip that a stage updates on at most; None where it updates nothing."""
    if not stage.tokens or not math.isfinite(stage.seconds):
        return None
    return stage.tokens / stage.seconds / len(topology.devices)


def memory_table(stages: Sequence[StagePlan]) -> Table:
    """What fills a chip's memory at the fullest moment of each stage."""
    fullest = [stage.fullest for stage in stages]
    names = list(dict.fromkeys(name for p in fullest for name in p.memory.arrays))
    table = _table("stage", "fullest in", left=2)
    for name in (*names, "activations", "total"):
        table.add_column(name, justify="right")
    for stage, program in zip(stages, fullest, strict=True):
        arrays = program.memory.arrays
        held = [_size(arrays[name]) if name in arrays else "-" for name in names]
        last = (_size(program.memory.temporary), _size(program.memory.total))
        table.add_row(stage.name, program.name, *held, *last)
    return table


def program_table(stage: StagePlan) -> Table:
    """The programs of a stage, per chip and execution."""
    table = _table("program", left=1)
    for header in (
        "a step",
        "memory",
        "FLOP",
        "moved",
        "sent",
        "least",
        "limit",
        "MFU",
        "compiled in",
    ):
        table.add_column(header, justify="right", no_wrap=True)
    for program in stage.programs:
        table.add_row(*program_cells(program))
    return table


def program_cells(program: ProgramPlan) -> list[str]:
    """The cells of a program in that table."""
    often = f"{program.per_step:.3g}"
    head = [program.name, often, _size(program.memory.total)]
    compiled = f"{program.compile_seconds:.1f} s"
    if program.cost is None or program.times is None:
        return [*head, *["-"] * 6, compiled]
    mfu = "-" if not program.mfu else f"{program.mfu:.0%}"
    return [
        *head,
        _size(program.cost.flops, ""),
        _size(program.cost.memory_bytes),
        _size(program.cost.collective_bytes),
        _seconds(program.times.total),
        program.times.limit,
        mfu,
        compiled,
    ]


def bill(stages: Sequence[StagePlan], topology: Topology, price: float | None) -> str:
    """How long the stages take at least, and what that costs.

    Args:
        stages: of the run.
        topology: of its chips.
        price: of an hour of a chip; None leaves the sum out.
    """
    hours = sum(stage.hours for stage in stages)
    if not math.isfinite(hours):
        return "What does not fit takes no time: see above."
    parts = ", ".join(f"{stage.name} {_hours(stage.hours)}" for stage in stages)
    chip_hours = hours * len(topology.devices)
    text = f"All steps take {_hours(hours)} or more ({parts}): {chip_hours:,.3g} chip-hours"
    return text if price is None else f"{text}, {chip_hours * price:,.2f} at {price:g} each"


def _hours(value: float) -> str:
    return f"{value:.1f} h" if value >= 1 else f"{60 * value:.1f} min"


def search_table(trials: Sequence[Trial], topology: Topology) -> Table:
    """Choices of a search, the best first."""
    table = _table("choice", "fits", left=2)
    for header in ("memory", "step", "limit", "MFU of the update"):
        table.add_column(header, justify="right", no_wrap=True)
    table.columns[0].no_wrap = False
    for trial in trials:
        spare = topology.chip.memory - trial.memory
        fits = f"{_size(spare)} to spare" if spare >= 0 else f"{_size(-spare)} too much"
        last = ("-", "-", "-")
        if math.isfinite(trial.seconds):
            slowest = max(
                (program for stage in trial.stages for program in stage.programs),
                key=lambda program: program.per_step * program.seconds,
            )
            updates = [p.mfu for s in trial.stages for p in s.programs if p.work == "update"]
            shares = ", ".join(f"{mfu:.0%}" for mfu in updates if mfu)
            limit = f"{slowest.times.limit} ({slowest.work})" if slowest.times else "-"
            last = (_seconds(trial.seconds), limit, shares or "-")
        table.add_row("\n".join(trial.overrides), fits, _size(trial.memory), *last)
    return table


def notes(stages: Sequence[StagePlan]) -> list[str]:
    """What the numbers leave out."""
    costs = [p.cost for stage in stages for p in stage.programs if p.cost is not None]
    found = []
    if any(cost.endless for cost in costs):
        found.append("Loops whose end is not in the program were counted once.")
    names = [name for cost in costs for name in cost.kernels]
    if any(kernel in name for kernel in ("splash", "ragged_dot") for name in names):
        found.append("Products inside of kernels (attention, experts) are those of theory.")
    for path in sorted({path for stage in stages for path in stage.missing_judges}):
        found.append(
            f"The judge at {path} is not here and was not planned: its parameters and a cache "
            "are on the chips too."
        )
    return found


def as_json(stages: Sequence[StagePlan], topology: Topology) -> dict[str, Any]:
    """The plan as JSON values, per chip, in bytes, seconds and FLOP."""
    return _described(topology) | {"stages": [_stage(stage, topology) for stage in stages]}


def search_json(trials: Sequence[Trial], topology: Topology) -> dict[str, Any]:
    """The choices of a search as JSON values, the best first, each with its plan."""
    return _described(topology) | {"candidates": [_trial(trial, topology) for trial in trials]}


def _trial(trial: Trial, topology: Topology) -> dict[str, Any]:
    mfu = {s.name: p.mfu for s in trial.stages for p in s.programs if p.work == "update"}
    return {
        "overrides": trial.overrides,
        "mesh": dict(trial.mesh),
        "remat": trial.remat,
        "microbatches": {s.name: s.microbatches for s in trial.stages if s.microbatches},
        "rows_sampled": {s.name: s.rows_sampled for s in trial.stages if s.rows_sampled},
        "fits": trial.fits,
        "memory": trial.memory,
        "seconds": trial.seconds if math.isfinite(trial.seconds) else None,
        "mfu": mfu,
        "stages": [_stage(stage, topology) for stage in trial.stages],
    }


def _described(topology: Topology) -> dict[str, Any]:
    chip = topology.chip
    return {
        "topology": topology.name,
        "chips": len(topology.devices),
        "chip": {
            "name": chip.name,
            "flops": chip.flops,
            "memory": chip.memory,
            "memory_bandwidth": chip.memory_bandwidth,
            "link_bandwidth": chip.link_bandwidth,
            "source": chip.source,
        },
    }


def _stage(stage: StagePlan, topology: Topology) -> dict[str, Any]:
    return {
        "stage": stage.name,
        "kind": stage.kind,
        "fits": stage.memory <= topology.chip.memory,
        "memory": stage.memory,
        "seconds": stage.seconds if math.isfinite(stage.seconds) else None,
        "tokens": stage.tokens,
        "tokens_per_second_per_chip": _rate(stage, topology),
        "compile_seconds": sum(program.compile_seconds for program in stage.programs),
        "steps": stage.steps,
        "hours": stage.hours if math.isfinite(stage.hours) else None,
        "programs": [_program(program) for program in stage.programs],
    }


def _program(program: ProgramPlan) -> dict[str, Any]:
    made = {
        "program": program.name,
        "work": program.work,
        "per_step": program.per_step,
        "tokens": program.tokens,
        "memory": {**program.memory.arrays, "temporary": program.memory.temporary},
        "compile_seconds": program.compile_seconds,
    }
    if program.cost is None or program.times is None:
        return made
    return made | {
        "flops": program.cost.flops,
        "memory_bytes": program.cost.memory_bytes,
        "collective_bytes": program.cost.collective_bytes,
        "seconds": {
            "products": program.times.products,
            "memory": program.times.memory,
            "links": program.times.links,
        },
        "limit": program.times.limit,
        "mfu": program.mfu,
    }


def _table(*headers: str, left: int) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 0, 0, 1), pad_edge=False)
    for index, header in enumerate(headers):
        table.add_column(header, justify="left" if index < left else "right", no_wrap=True)
    return table


def _size(count: float, unit: str = "B") -> str:
    """Three digits and a decimal prefix."""
    for prefix in ("", "k", "M", "G", "T", "P"):
        if abs(count) < 999.5 or prefix == "P":
            break
        count /= 1000
    digits = f"{count:.3g}" if abs(count) < 999.5 else f"{count:,.0f}"
    return f"{digits} {prefix}{unit}"


def _seconds(value: float) -> str:
    if value >= 100:
        return f"{value:,.0f} s"
    return f"{value:.2f} s" if value >= 1 else f"{1000 * value:.3g} ms"
