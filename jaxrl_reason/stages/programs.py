"""The programs that a stage runs on its devices, made from shapes alone.

They are those of a run, compiled for the same arrays in the same places; nothing is allocated. So
they can be looked at on a machine that has none of the devices (`jaxrl_reason.planner`).
"""

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import numpy as np

from jaxrl_reason.data.batching import Batch, fill_rows, visual_rows
from jaxrl_reason.data.vision import VisionRow
from jaxrl_reason.errors import InputError
from jaxrl_reason.models.lora import trainable
from jaxrl_reason.sampling import Engine, Rollout, SamplingConfig
from jaxrl_reason.sampling.decode import Dispatch
from jaxrl_reason.sharding import batch_multiple, batch_sharding
from jaxrl_reason.stages.config import EvaluationSet
from jaxrl_reason.stages.conflict import Conflict
from jaxrl_reason.stages.context import Context, Stage
from jaxrl_reason.stages.data_config import SampledPairs
from jaxrl_reason.stages.dpo import pair_program, preference_update, reference_rows
from jaxrl_reason.stages.evaluate import configured_rewards
from jaxrl_reason.stages.groups import GROUP_ROWS
from jaxrl_reason.stages.grpo import policy_rows, policy_update
from jaxrl_reason.stages.judge_model import judge_engine
from jaxrl_reason.stages.load import load_config
from jaxrl_reason.stages.other_logprobs import batch_logprobs, correction
from jaxrl_reason.stages.policy_config import MORLConfig, PolicyConfig
from jaxrl_reason.stages.policy_rows import PolicyRows, Sight
from jaxrl_reason.stages.reject_config import RejectConfig
from jaxrl_reason.stages.reward_config import AnyReward, CheckpointJudge, checkpoint_judges
from jaxrl_reason.stages.stage_config import DPOConfig, SFTConfig
from jaxrl_reason.stages.training import compile_step, stage_optimizer, state_like
from jaxrl_reason.steps import Step, make_sft_step, needs_reference, partition

Shapes = dict[str, jax.ShapeDtypeStruct]
Work = Literal["update", "gradient", "forward", "prefill", "decode", "sync", "encode"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Program:
    """One program of a stage, at its largest sizes."""

    name: str
    work: Work
    compile: Callable[[], jax.stages.Compiled]
    per_step: float
    """Executions in a step of the stage, if sequences are as long as they may be."""
    tokens: int
    """Positions that an execution works on, on all devices, padding among them."""
    length: int
    """Of a sequence, in tokens; when decoding, the longest that is read."""
    arguments: Mapping[str, Any]
    """Shapes of what it is given, with where they lie, by what they are."""
    beside: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """The same of what else is on the devices meanwhile."""
    trains_encoder: bool = False
    """Whether the encoder of images gets a gradient."""
    rows: int | None = None
    """Completions that are decoded at once, when decoding."""
    judge: Context | None = None
    """The run of the model that it is of, if that is a judge and not the stage's own."""

    @property
    def patches(self) -> int:
        """Patches of images and videos that an execution encodes, on all devices."""
        patches = self.arguments.get("batch", {}).get("patches")
        return 0 if patches is None else math.prod(patches.shape[:-1])


def stage_programs(stage: Stage) -> list[Program]:
    """The programs of a stage, in the order of a step."""
    kinds: Mapping[type, Callable[[Stage], Iterator[Program]]] = {
        SFTConfig: _sft,
        DPOConfig: _dpo,
        PolicyConfig: _policy,
        RejectConfig: _reject,
    }
    make = next(make for kind, make in kinds.items() if isinstance(stage.config, kind))
    programs = list(make(stage))
    if not isinstance(config := stage.config, PolicyConfig):
        return programs
    judges = judges_of(config.rewards, list(stage.context.mesh.devices.flat)).described
    beside = {"judges": [judge.params_like for judge, _, _ in judges]} if judges else {}
    programs = [dataclasses.replace(p, beside={**p.beside, **beside}) for p in programs]
    of_sampling = lambda program: program.work in ("sync", "encode", "prefill", "decode")
    sampling = len([*itertools.takewhile(of_sampling, programs)])
    count = config.prompts_per_step * config.num_generations
    kept = {"parameters": stage.context.params_like, **_kept(stage)}
    return [*programs[:sampling], *_judging(judges, count, kept), *programs[sampling:]]


def evaluation_programs(context: Context) -> list[Program]:
    """The programs of an evaluation, in the order of its only step; every stage ends with one."""
    config = context.config.evaluation
    sets = (EvaluationSet(), *config.sets.values())
    counts = [chosen.problems or config.problems for chosen in sets]
    engine = context.engine(
        config.sampling,
        config.max_completion_length,
        max_rows=min(config.batch_size, max(counts)),
    )
    count, kept = sum(counts), {"parameters": context.params_like}
    rewards = [reward for reward, _ in configured_rewards(context.config).values()]
    judges = judges_of(rewards, list(context.mesh.devices.flat)).described
    return [
        *_sampling(context, engine, prompts=count, completions=count, beside={}),
        *_judging(judges, counts[0], kept),
    ]


class Judges(NamedTuple):
    """The checkpoints that judge for a stage."""

    described: list[tuple[Context, CheckpointJudge, int]]
    """The run of each, its configuration, and how many rewards ask it."""
    missing: list[str]
    """Paths at which there is no checkpoint, on this machine."""


def judges_of(rewards: Iterable[AnyReward], devices: Sequence[jax.Device]) -> Judges:
    """The checkpoints that judge, each once.

    Args:
        rewards: of a stage.
        devices: that they would lie on.
    """
    found = Judges([], [])
    asked = checkpoint_judges(rewards)
    for number, judge in enumerate(asked):
        if judge in asked[:number]:
            continue
        try:
            context = Context.describe(load_config(judge.path, devices), devices)
        except InputError:
            found.missing.append(judge.path)
            continue
        found.described.append((context, judge, asked.count(judge)))
    return found


def _judging(
    judges: Sequence[tuple[Context, CheckpointJudge, int]], count: int, kept: Mapping[str, Any]
) -> Iterator[Program]:
    """What judges sample about `count` completions, beside what the stage and the others keep."""
    for number, (context, config, rewards) in enumerate(judges):
        others = [judge.params_like for judge, _, _ in [*judges[:number], *judges[number + 1 :]]]
        engine = judge_engine(context, config)
        for program in _sampling(context, engine, prompts=count, completions=count, beside={}):
            if program.work == "encode":  # it is shown text alone
                continue
            beside, arguments = dict(program.beside), dict(program.arguments)
            own = [params] if (params := beside.pop("parameters", None)) is not None else []
            if "parameters" in arguments:
                arguments["judges"] = arguments.pop("parameters")
            yield dataclasses.replace(
                program,
                name=f"judge: {program.name}",
                per_step=rewards * program.per_step,
                arguments=arguments,
                beside={**beside, **kept, "judges": [*own, *others]},
                judge=context,
            )


def _sft(stage: Stage) -> Iterator[Program]:
    config: SFTConfig = stage.config
    count = config.gradient_accumulation_steps
    stage.check_rows("batch_size", config.batch_size, microbatches=count)
    shape = (count, config.batch_size // count)
    cut = _like(_row(stage, config.max_length), shape)
    update = compile_step(stage, make_sft_step, logprob_chunk_size=config.logprob_chunk_size)
    yield _update(stage, update, cut, config.max_length)


def _dpo(stage: Stage) -> Iterator[Program]:
    config: DPOConfig = stage.config
    count = config.gradient_accumulation_steps
    stage.check_rows("batch_size", config.batch_size, microbatches=count)
    if isinstance(config.data, SampledPairs):
        longest = config.max_length - stage.context.config.max_prompt_length
        of = (config.data.num_prompts, config.data.num_generations)
        yield from _groups(stage, *of, config.data.sampling, longest, steps=config.steps)
    row = _row(stage, config.max_length)
    if needs_reference(config.loss_type):
        rows, params = reference_rows(stage), stage.context.params_like
        placed = _placed(stage.context, _like(row, (rows, 2)))
        yield Program(
            name="reference log-probs",
            work="forward",
            compile=lambda: pair_program(stage).lower(params, placed).compile(),
            # Of every pair once, before the first step: as if no pair were visited twice.
            per_step=config.batch_size / rows,
            tokens=2 * rows * config.max_length,
            length=config.max_length,
            arguments={"parameters": params, "batch": placed},
        )
    shape = (count, config.batch_size // count, 2)
    cut = _like(row, shape)
    if needs_reference(config.loss_type):
        cut["ref_logprobs"] = jax.ShapeDtypeStruct(shape, np.float32)
    yield _update(stage, preference_update(stage), cut, config.max_length)


def _policy(stage: Stage) -> Iterator[Program]:
    config: PolicyConfig = stage.config
    context, count = stage.context, config.prompts_per_step * config.num_generations
    params, kept = context.params_like, _kept(stage)
    trained, shared = partition(params, trainable(context.model.config))
    yield from _sampling(
        context,
        context.engine(
            config.sampling,
            config.max_completion_length,
            max_rows=min(config.max_num_seqs or count, count),
            group_size=config.num_generations,
        ),
        prompts=config.prompts_per_step,
        completions=count,
        beside=kept,
    )
    rows = policy_rows(stage)
    batch = _policy_batch(stage, rows)
    placed = _placed(context, batch, batch_axis=1)
    if isinstance(config, MORLConfig) and config.conflict_steps:
        yield from _conflict(stage, placed, kept)
    if config.beta > 0:
        yield Program(
            name="reference log-probs",
            work="forward",
            compile=lambda: batch_logprobs(stage).lower(params, placed).compile(),
            per_step=1,
            tokens=math.prod(batch["tokens"].shape),
            length=rows.length,
            arguments={"reference": trained, "parameters": shared, "batch": placed},
            beside={"parameters": trained, "optimizer": kept["optimizer"]},
        )
        batch = batch | {"ref_logprobs": batch["old_logprobs"]}
    if config.mismatch.action == "correct":
        placed = _placed(context, batch, batch_axis=1)
        yield Program(
            name="policy log-probs",
            work="forward",
            compile=lambda: correction(stage).lower(params, placed).compile(),
            per_step=0,  # once a step from that on in which sampling has been found to differ
            tokens=math.prod(batch["tokens"].shape),
            length=rows.length,
            arguments={"parameters": params, "batch": placed},
            beside=kept,
        )
    program = _update(stage, policy_update(stage), batch, rows.length)
    beside = {name: tree for name, tree in kept.items() if name not in program.arguments}
    yield dataclasses.replace(program, per_step=config.num_iterations, beside=beside)


def _kept(stage: Stage) -> dict[str, Any]:
    """What a stage that samples keeps on the devices beside the parameters."""
    kept = {"optimizer": state_like(stage, stage_optimizer(stage)).opt_state}
    if stage.config.beta > 0:
        # The reference has what is trained for itself, and the rest in common with the policy.
        context = stage.context
        kept["reference"] = partition(context.params_like, trainable(context.model.config))[0]
    return kept


def _conflict(stage: Stage, batch: Shapes, beside: Mapping[str, Any]) -> Iterator[Program]:
    """What compares the objectives' gradients: all of them, and the update's, are there at once."""
    config: MORLConfig = stage.config
    count, params = len(config.rewards) + 1, stage.context.params_like
    gradients = partition(params, trainable(stage.context.model.config))[0]
    conflict = Conflict(stage)
    yield Program(
        name="objective's gradient",
        work="gradient",
        compile=lambda: conflict.gradient_of.lower(params, batch).compile(),
        per_step=count / config.conflict_steps,
        tokens=math.prod(batch["tokens"].shape),
        length=policy_rows(stage).length,
        arguments={"parameters": params, "batch": batch},
        beside={**beside, "gradients": [gradients] * (count - 1)},
        trains_encoder="patches" in batch and not stage.context.eyes.frozen,
    )
    yield Program(
        name="gradients' products",
        work="sync",
        compile=lambda: conflict.gram_of.lower(*[gradients] * count).compile(),
        per_step=1 / config.conflict_steps,
        tokens=0,
        length=0,
        arguments={"gradients": [gradients] * count},
        beside={**beside, "parameters": params, "batch": batch},
    )


def _reject(stage: Stage) -> Iterator[Program]:
    config: RejectConfig = stage.config
    of = (config.num_prompts, config.num_generations, config.sampling)
    yield from _groups(stage, *of, config.max_completion_length, steps=1)


def _row(stage: Stage, length: int) -> Batch:
    """An empty row [1, T]; that of a model that sees has room for what one prompt shows."""
    context = stage.context
    batch = fill_rows([[]], length, pad_id=context.pad_id)
    if not context.visual_tokens:
        return batch
    patches = context.visual_tokens * context.patches_per_token
    return batch | visual_rows([], (1, length), patches, like=_blank(context, length))


def _like(row: Batch, rows: tuple[int, ...]) -> Shapes:
    """Shapes of a batch of such rows."""
    return {name: jax.ShapeDtypeStruct((*rows, *x.shape[1:]), x.dtype) for name, x in row.items()}


def _policy_batch(stage: Stage, rows: PolicyRows) -> Shapes:
    """Shapes of a step's batch, from the row of a single completion."""
    config: PolicyConfig = stage.config
    context = stage.context
    one = dataclasses.replace(
        rows,
        completions=1,
        num_generations=1,
        row_length=rows.length,
        microbatch_tokens=rows.length,
    )
    sights = [_sight(context)] if context.visual_tokens else None
    rollout = _longest(context.config.max_prompt_length, config.max_completion_length)
    advantages = np.ones(1, np.float32)
    batch, _ = one.arrays(rollout, advantages, sights=sights, own=np.zeros(1, int))
    of = lambda x: jax.ShapeDtypeStruct((*rows.shape, *x.shape[2:]), x.dtype)
    return {name: of(x) for name, x in batch.items()}


def _blank(context: Context, length: int, patches: int = 0) -> VisionRow:
    """A document of so many tokens with patches that show nothing."""
    vision = context.model.config.vision
    assert vision is not None
    pairs, ones = np.zeros((patches, 2), np.int32), np.zeros(patches, np.int32)
    return VisionRow(
        patches=np.zeros((patches, vision.patch_dim), np.float32),
        patch_coords=pairs,
        patch_grids=pairs,
        patch_segments=ones,
        patch_windows=ones,
        visual_index=np.full(length, -1, np.int32),
        positions=np.zeros((length, 3), np.int32),
        next_position=length,
    )


def _sight(context: Context) -> Sight:
    """What the longest prompt shows: features where nothing trains what makes them."""
    model = context.model.config
    length, tokens = context.config.max_prompt_length, context.visual_tokens
    row = _blank(context, length, tokens * context.patches_per_token)
    if not context.eyes.frozen:
        return Sight(row)
    features = np.zeros((tokens, model.hidden_size), np.float32)
    levels = len(model.vision.deepstack_visual_indexes)
    deep = np.zeros((levels, *features.shape), np.float32) if levels else None
    return Sight(row, features, deep)


def _update(stage: Stage, update: Step, cut: Shapes, length: int) -> Program:
    state = state_like(stage, stage_optimizer(stage))
    placed = _placed(stage.context, cut, batch_axis=1)
    return Program(
        name="update",
        work="update",
        compile=lambda: update.lower(state, placed).compile(),
        per_step=1,
        tokens=math.prod(cut["tokens"].shape),
        length=length,
        arguments={"parameters": state.params, "optimizer": state.opt_state, "batch": placed},
        trains_encoder="patches" in placed and not stage.context.eyes.frozen,
    )


def _placed(context: Context, batch: Batch | Shapes, *, batch_axis: int = 0) -> Shapes:
    """Shapes of a batch, cut over the devices."""
    place = batch_sharding(context.mesh, batch_axis=batch_axis)
    of = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place)
    return {name: of(x) for name, x in batch.items()}


def _longest(prompt: int, completion: int) -> Rollout:
    """A prompt and a completion that are as long as they may be."""
    shape = (1, completion)
    return Rollout(
        prompts=[[0] * prompt],
        num_generations=1,
        tokens=np.zeros(shape, np.int32),
        completion_mask=np.ones(shape, bool),
        sampled=np.ones(shape, bool),
        sampling_logprobs=np.zeros(shape, np.float32),
        kept_logmass=np.zeros(shape, np.float32),
        versions=np.zeros(shape, np.int32),
        finished=np.ones(1, bool),
    )


# Sampling


def _encoding(context: Context, prompts: int, beside: Mapping[str, Any]) -> Program:
    """What makes features of prompts, as many at once as there are rows of devices."""
    count, patches = batch_multiple(context.mesh), context.visual_tokens * context.patches_per_token
    length = context.config.max_prompt_length
    row = visual_rows([], (1, length), patches, like=_blank(context, length))
    row = {name: x for name, x in row.items() if name.startswith("patch")}
    placed = _placed(context, _like(row, (count,)))
    params = context.params_like
    return Program(
        name=f"encode images, {count} x {patches}",
        work="encode",
        compile=lambda: context.eyes.program.lower(params, placed).compile(),
        per_step=math.ceil(prompts / count),
        tokens=count * patches,
        length=patches,
        arguments={"parameters": params, "batch": placed},
        beside={name: x for name, x in beside.items() if name != "parameters"},
    )


def _groups(
    stage: Stage,
    prompts: int,
    group: int,
    sampling: SamplingConfig,
    longest: int,
    *,
    steps: int,
) -> Iterator[Program]:
    """What is sampled once for a stage, as a part of each of its steps."""
    engine = stage.context.engine(
        sampling, longest, max_rows=min(GROUP_ROWS, prompts * group), group_size=group
    )
    for program in _sampling(
        stage.context, engine, prompts=prompts, completions=prompts * group, beside={}
    ):
        yield dataclasses.replace(program, per_step=program.per_step / steps)


def _sampling(
    context: Context, engine: Engine, *, prompts: int, completions: int, beside: Mapping[str, Any]
) -> Iterator[Program]:
    trained = context.params_like
    level = engine.levels[0]
    own_pages = max(level.own_pages)
    pages = engine.pages_like(level, own_pages)
    params, copied = engine.placed_like(trained), engine.copies(trained)
    if copied:
        yield Program(
            name="weight sync",
            work="sync",
            compile=lambda: engine.copy_program(trained),
            per_step=1,
            tokens=0,
            length=0,
            arguments={"parameters": trained},
            beside=beside,
        )
        beside = {**beside, "parameters": trained}
    if context.visual_tokens:
        yield _encoding(context, prompts, beside)
    read = "parameters to sample" if copied else "parameters"
    of_device = -(-prompts // engine.devices)
    rows = engine.devices * max(n for n in engine.prefill_sizes[0] if n <= max(of_device, 1))
    length = min(engine.prefill_sizes[1])
    group = engine.row_shape(length, level.of_device.context_pages).empty(rows)
    read_pages = pages._replace(own_keys=(), own_values=())
    yield Program(
        name=f"prefill, {rows} x {length}",
        work="prefill",
        compile=lambda: engine.prefill_program(params, read_pages, group),
        per_step=math.ceil(prompts / rows),
        tokens=rows * length,
        length=length,
        arguments={read: params, "cache": read_pages},
        beside={**beside, "cache": (pages.own_keys, pages.own_values)},
    )
    key = jax.eval_shape(lambda: jax.random.key(0))
    idle = (None, key, *(np.int32(0),) * 3)
    dispatch = Dispatch(*engine.batch(level, own_pages).arrays(), *idle)
    dispatches = math.ceil(engine.max_completion_length / engine.most_steps)
    yield Program(
        name=f"decode, {level.rows} rows",
        work="decode",
        compile=lambda: engine.decode_program(params, level, pages, dispatch),
        per_step=math.ceil(completions / level.rows) * dispatches,
        tokens=level.rows * engine.most_steps,
        length=engine.most_tokens,
        arguments={read: params, "cache": pages},
        beside=beside,
        rows=level.rows,
    )
