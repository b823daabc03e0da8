"""A run on a topology: every program of its stages compiled, and what that says of it.

Memory is what the compiler allots. Times are bounds of `roofline`, of programs at their largest
sizes: a step takes less if completions are shorter than they may be.
"""

import dataclasses
import math
import re
import time
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import jax

from jaxrl_reason.models import ModelConfig
from jaxrl_reason.planner.hlo import Cost, program_cost
from jaxrl_reason.planner.roofline import Times, times
from jaxrl_reason.planner.topology import Topology
from jaxrl_reason.stages.context import Context
from jaxrl_reason.stages.pipeline import plan as stages_of
from jaxrl_reason.stages.policy_config import PolicyConfig
from jaxrl_reason.stages.programs import (
    Program,
    evaluation_programs,
    judges_of,
    stage_programs,
)

_TEMPORARIES = re.compile(r"required for HLO temporaries \(([\d.]+)([KMGT]?)\)")
_USED = re.compile(r"[Uu]sed ([\d.]+)([KMGT]?) of [\d.]+[KMGT]? hbm")
_PASSES = {
    "update": 3,
    "gradient": 3,
    "forward": 1,
    "prefill": 1,
    "decode": 1,
    "sync": 0,
    "encode": 0,
}
"""Products of a kind of work in forward passes of the language model."""
EVALUATION = "evaluation"
"""What plans call that which every stage ends with."""
_UNITS = {"": 1.0, "K": 2.0**10, "M": 2.0**20, "G": 2.0**30, "T": 2.0**40}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes of a chip's memory while a program runs."""

    arrays: Mapping[str, float]
    """What is kept from program to program, by what it is: `parameters`, `optimizer`, `cache`..."""
    temporary: float
    """What the program makes for itself: activations, gradients, results, its code."""

    @property
    def total(self) -> float:
        """All of it."""
        return sum(self.arrays.values()) + self.temporary


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProgramPlan:
    """What one program needs and takes."""

    name: str
    work: str
    per_step: float
    tokens: int
    memory: Memory
    compile_seconds: float
    cost: Cost | None = None
    """None if the compiler could not fit the program."""
    times: Times | None = None
    mfu: float | None = None
    """Share of the chips' peak that the model's products would use, by the bound on time."""

    @property
    def seconds(self) -> float:
        """Of one execution, at least; not a number if it does not fit."""
        return float("nan") if self.times is None else self.times.total


@dataclasses.dataclass(frozen=True, kw_only=True)
class StagePlan:
    """What a stage needs and takes."""

    name: str
    kind: str
    programs: Sequence[ProgramPlan]
    tokens: int
    """Tokens that a step updates on."""
    steps: int
    """Of the whole stage."""
    microbatches: int | None = None
    """That an update is cut into; None where nothing is updated."""
    rows_sampled: int | None = None
    """Completions that are decoded at once; None where nothing is sampled."""
    missing_judges: Sequence[str] = ()
    """Paths of judges that are not here, and so not planned."""

    @property
    def fullest(self) -> ProgramPlan:
        """The program that needs the most memory."""
        return max(self.programs, key=lambda program: program.memory.total)

    @property
    def hours(self) -> float:
        """Of the whole stage, at least."""
        return self.steps * self.seconds / 3600

    @property
    def memory(self) -> float:
        """Bytes of a chip at the fullest moment."""
        return self.fullest.memory.total

    @property
    def seconds(self) -> float:
        """Of a step, at least."""
        return sum(program.per_step * program.seconds for program in self.programs)


def plan_stages(
    context: Context,
    topology: Topology,
    *,
    names: Sequence[str] | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> list[StagePlan]:
    """Compile the programs of a run's stages.

    Args:
        context: of the run, on the devices of the topology.
        topology: what to compile for.
        names: of the stages, and `evaluation` for what each ends with; all by default.
        say: receives a line about each program as it is compiled.

    Raises:
        InputError: the rows of a stage do not divide over the mesh.
    """
    stages = stages_of(context)
    # Mistakes of any stage are told before the first is compiled, which may take minutes.
    described = [
        (stage.name, stage.config.kind, getattr(stage.config, "steps", 1), stage_programs(stage))
        for stage in stages
        if names is None or stage.name in names
    ]
    missing = {
        stage.name: judges_of(stage.config.rewards, topology.devices).missing
        for stage in stages
        if isinstance(stage.config, PolicyConfig)
    }
    if names is None or EVALUATION in names:
        trained = sum(hasattr(stage.config, "optimizer") for stage in stages)
        # Of what the stages begin with, too.
        described.append((EVALUATION, EVALUATION, trained + 1, evaluation_programs(context)))
    plans = []
    for name, kind, steps, of_stage in described:
        programs = []
        for program in of_stage:
            made = _plan_program(program, context, topology)
            say(f"{name}: {program.name} compiled in {made.compile_seconds:.0f} s")
            programs.append(made)
        tokens = sum(round(p.per_step * p.tokens) for p in programs if p.work == "update")
        updates = [p.arguments["batch"]["tokens"].shape[0] for p in of_stage if p.work == "update"]
        rows = [p.rows for p in of_stage if p.rows is not None and p.judge is None]
        plans.append(
            StagePlan(
                name=name,
                kind=kind,
                programs=programs,
                tokens=tokens,
                steps=steps,
                microbatches=max(updates, default=None),
                rows_sampled=max(rows, default=None),
                missing_judges=missing.get(name, ()),
            )
        )
    return plans


def _plan_program(program: Program, context: Context, topology: Topology) -> ProgramPlan:
    context = program.judge or context
    began, chip, config = time.monotonic(), topology.chip, context.model.config
    arrays: Counter[str] = Counter()
    for name, tree in (*program.arguments.items(), *program.beside.items()):
        arrays[name] += bytes_per_device(tree)
    of = {"name": program.name, "work": program.work}
    of |= {"per_step": program.per_step, "tokens": program.tokens}
    given = sum(bytes_per_device(tree) for tree in program.arguments.values())
    try:
        compiled = program.compile()
    except jax.errors.JaxRuntimeError as error:
        wanted = _wanted(str(error), given)
        if wanted is None:
            raise
        memory = Memory(arrays=arrays, temporary=wanted)
        return ProgramPlan(**of, memory=memory, compile_seconds=time.monotonic() - began)
    took = time.monotonic() - began
    stats = compiled.memory_analysis()
    needed = stats.argument_size_in_bytes + stats.temp_size_in_bytes
    needed += stats.output_size_in_bytes - stats.alias_size_in_bytes
    needed += stats.generated_code_size_in_bytes
    cost = program_cost(compiled.as_text())
    inside = kernel_flops(config, program, cost.kernels) / len(topology.devices)
    cost = dataclasses.replace(cost, flops=cost.flops + inside)
    # Programs number devices as the mesh does, not as the topology.
    bound = times(cost, chip, list(context.mesh.devices.flat))
    peak = bound.total * chip.flops * len(topology.devices)
    return ProgramPlan(
        **of,
        memory=Memory(arrays=arrays, temporary=max(needed - given, 0.0)),
        cost=cost,
        times=bound,
        mfu=model_flops(config, program) / peak if peak else None,
        compile_seconds=took,
    )


def model_flops(config: ModelConfig, program: Program) -> float:
    """Of the products that an execution is for, on all chips: none that is done a second time.

    As in PaLM (arXiv 2204.02311, appendix B): 2 a parameter and token forward, 6 with the gradient,
    and attention over half of the sequence, as it is causal. Images and videos that are encoded in
    it have theirs, without attention among patches.
    """
    seen = 0.0
    if program.patches:
        assert config.vision is not None
        passes = 3 if program.trains_encoder else 1
        seen = 2.0 * passes * program.patches * config.vision.active_parameters
    if program.work == "encode":
        return seen
    passes = _PASSES[program.work]
    parameters = active_parameters(config)
    if program.work == "prefill":  # writes keys and values, and predicts nothing
        parameters -= config.vocab_size * config.hidden_size
    of_token = 2 * parameters + _attention_flops(config, program.length)
    return passes * program.tokens * of_token + seen


def kernel_flops(config: ModelConfig, program: Program, kernels: Collection[str]) -> float:
    """Of the products inside of kernels, on all chips: those that the model needs, each once.

    The compiler does not tell what a kernel multiplies. What is done a second time, with
    rematerialization, is not counted, and neither is attention among the patches of images.

    Args:
        config: of the model.
        program: that the kernels are in.
        kernels: where they come from, as `Cost.kernels`.
    """
    if program.work == "encode":
        return 0.0
    flops, width = 0.0, config.moe_intermediate_size
    backward = _PASSES[program.work] == 3
    if any("splash" in name for name in kernels):
        flops += (3 if backward else 1) * _attention_flops(config, program.length)
    if any("ragged_dot" in name for name in kernels):
        # Gradients of the experts' kernels are a loop of products that the compiler tells.
        chosen = config.num_hidden_layers * config.num_experts_per_tok
        flops += (2 if backward else 1) * 2 * chosen * 3 * config.hidden_size * width
    return program.tokens * flops


def _attention_flops(config: ModelConfig, length: int) -> float:
    """Of a token forward, in a row of so many: of those before it, half as many on average."""
    width = config.num_attention_heads * config.head_dim
    return sum(
        4 * width * min(length / 2, (config.sliding_window or length) if slides else length)
        for slides in config.sliding_layers
    )


def active_parameters(config: ModelConfig) -> int:
    """Parameters that a token is multiplied with: of its own experts, without the embedding."""
    count = config.num_parameters
    if not config.tie_word_embeddings:
        count -= config.vocab_size * config.hidden_size
    if config.num_experts:
        unused = config.num_experts - config.num_experts_per_tok
        expert = 3 * config.hidden_size * config.moe_intermediate_size
        count -= config.num_hidden_layers * unused * expert
    if config.vision is not None:
        count -= config.vision.num_parameters
    return count


def bytes_per_device(tree: Any) -> float:
    """Bytes of arrays, given as shapes with shardings, on each device."""
    return sum(
        x.dtype.itemsize * float(math.prod(x.sharding.shard_shape(x.shape)))
        for x in jax.tree.leaves(tree)
    )


def _wanted(message: str, given: float) -> float | None:
    """Bytes of temporary arrays that a program would need, from the compiler's refusal."""
    if found := _TEMPORARIES.search(message):
        return float(found[1]) * _UNITS[found[2]]
    if found := _USED.search(message):
        return max(float(found[1]) * _UNITS[found[2]] - given, 0.0)
    return None
