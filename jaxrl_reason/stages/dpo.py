"""Direct preference optimisation (arXiv 2305.18290) against the parent, and its relatives.

The reference is the parent itself; its log-probs of every pair are computed once, before the first
step, and its parameters are then let go. Losses without a reference compute none. Pairs come from a
file, from an earlier stage, from a function, or from the parent's own samples: a completion that
the verifier accepts against one that it rejects.
"""

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxrl_reason import files
from jaxrl_reason.data.batching import Batch, Example, fill_rows
from jaxrl_reason.data.loading import Examples, Maker, read_batches
from jaxrl_reason.data.records import load_records
from jaxrl_reason.errors import InputError
from jaxrl_reason.processes import from_first
from jaxrl_reason.sharding import (
    OnMesh,
    batch_multiple,
    jit_on_mesh,
    own_rows,
    place_batch,
    replicated,
)
from jaxrl_reason.stages.context import Stage
from jaxrl_reason.stages.data_config import FileData, SampledPairs
from jaxrl_reason.stages.deadline import COMPILING, deadline, progress
from jaxrl_reason.stages.encoding import file_records
from jaxrl_reason.stages.groups import sample_groups
from jaxrl_reason.stages.made_rows import Made, made_rows, pair_maker
from jaxrl_reason.stages.placed_rows import StepRows
from jaxrl_reason.stages.stage_config import DPOConfig
from jaxrl_reason.stages.training import (
    StepResult,
    compile_step,
    resume,
    stage_optimizer,
    train,
)
from jaxrl_reason.steps import (
    Step,
    make_preference_step,
    needs_reference,
    pair_logprobs,
)

Pair = tuple[Example, ...]
"""The chosen and the rejected completion of a prompt."""

_ROW_MULTIPLE = 16


def run_dpo(stage: Stage) -> None:
    """Train on the stage's pairs, from its last checkpoint or its parent."""
    config: DPOConfig = stage.config
    count = config.gradient_accumulation_steps
    stage.check_rows("batch_size", config.batch_size, microbatches=count)
    pairs = preference_pairs(stage)
    length = row_length(stage, pairs)
    num_patches = stage.context.patches_of(*([fact] for pair in pairs.facts for fact in pair))
    reference = None
    if needs_reference(config.loss_type):
        reference = reference_logprobs(stage, pairs, length, num_patches)
    optimizer = stage_optimizer(stage)
    update = preference_update(stage)

    def fill(rows: Sequence[tuple[int, Pair]]) -> Batch:
        batch = pair_rows(stage, [pair for _, pair in rows], length, num_patches)
        if reference is None:
            return batch
        return batch | {"ref_logprobs": reference[[number for number, _ in rows]]}

    begin = resume(stage, optimizer, data_hash=pairs.hash)
    rows = StepRows(stage.context.mesh, stage.seed, len(pairs), config.batch_size, count)
    steps = range(begin.step, config.steps)
    batches = rows.read(lambda number: (number, pairs[number]), fill, steps)

    def one_step(state, step):
        placed = rows.place(next(batches))
        state, metrics = update(state, placed.batch)
        told = {"padding_share": placed.padding_share}
        return StepResult(state, [metrics], told, placed.num_tokens, placed.counted, placed.batch)

    show = ("loss", "rewards/accuracies", "rewards/margins")
    train(stage, begin, one_step, show=show, data_hash=pairs.hash)


def preference_update(stage: Stage) -> Step:
    """The compiled update of a stage."""
    config: DPOConfig = stage.config
    return compile_step(
        stage,
        make_preference_step,
        loss_type=config.loss_type,
        loss_weights=config.loss_weights or (1.0,) * len(config.loss_type),
        beta=config.beta,
        options=config.options,
        logprob_chunk_size=config.logprob_chunk_size,
    )


def preference_pairs(stage: Stage) -> Examples:
    """The chosen and the rejected example of every pair; sampled pairs are written to a file.

    Raises:
        InputError: a malformed or over-long row, by file and line; or no pair at all.
    """
    config: DPOConfig = stage.config
    if isinstance(config.data, FileData):
        encode = stage.context.encoder.preference
        records = file_records(config.data)
        makers = [Maker(functools.partial(r.check, encode), r.where) for r in records]
    else:
        sampled = isinstance(config.data, SampledPairs)
        rows = _sampled_rows(stage) if sampled else made_rows(stage, "pairs")
        makers = [pair_maker(stage, made) for made in rows]
    return Examples(makers, config.max_length, option=f"stages.{stage.name}.max_length")


def _sampled_rows(stage: Stage) -> list[Made]:
    # Named after what made it: another configuration must not find these pairs.
    path = stage.directory / f"pairs-{stage.hash}.jsonl"
    if not from_first(path.exists):
        rows = sampled_pairs(stage)
        from_first(lambda: files.write_jsonl(path, rows))
    problems = stage.problems(0, stage.config.data.num_prompts)
    return [Made(problems[r.row["problem"]], r.row, r.where) for r in load_records(path)]


def sampled_pairs(stage: Stage) -> list[dict[str, Any]]:
    """Rows of prompt, chosen and rejected, text and ids, from the parent's own completions.

    Raises:
        InputError: the parent solves nearly every problem always or never, so that pairs are few.
    """
    config: DPOConfig = stage.config
    data = config.data
    problems = stage.problems(0, data.num_prompts)
    groups = sample_groups(
        stage.context,
        stage.parent_params(),
        problems,
        stage.key(0),
        num_generations=data.num_generations,
        sampling=data.sampling,
        max_completion_length=config.max_length - stage.context.config.max_prompt_length,
    )
    draw = np.random.default_rng(stage.seed)
    rows = []
    for number, (problem, group) in enumerate(zip(problems, groups, strict=True)):
        right = [completion for completion in group if completion.is_right]
        wrong = [completion for completion in group if completion.is_wrong]
        for _ in range(min(data.pairs_per_prompt, len(right), len(wrong))):
            chosen = right.pop(draw.integers(len(right)))
            rejected = wrong.pop(draw.integers(len(wrong)))
            row = {"prompt": problem.prompt, "chosen": chosen.text, "rejected": rejected.text}
            ids = {"chosen_ids": chosen.ids, "rejected_ids": rejected.ids}
            rows.append({"problem": number, **row, **ids})
    if len(rows) < config.batch_size:
        raise InputError(
            f"stages.{stage.name}: the parent's samples for {data.num_prompts} problems gave "
            f"{len(rows)} pairs and batch_size={config.batch_size} needs more: it solves nearly "
            "all problems always or never; raise data.num_prompts or change the task's difficulty"
        )
    return rows


def row_length(stage: Stage, pairs: Examples) -> int:
    """Tokens of a row: the longest of the data, rounded up, so that no row is mostly padding."""
    longest = max(fact.size for pair in pairs.facts for fact in pair)
    return min(-(-longest // _ROW_MULTIPLE) * _ROW_MULTIPLE, stage.config.max_length)


def pair_program(stage: Stage) -> OnMesh:
    """What computes the sequence log-probs of pairs: `(params, batch)` to [pairs, 2]."""
    context, chunk = stage.context, stage.config.logprob_chunk_size

    def sums(params, batch):
        return pair_logprobs(context.model, params, batch, logprob_chunk_size=chunk)[0]

    return jit_on_mesh(sums, context.mesh, out_shardings=replicated(context.mesh))


def reference_rows(stage: Stage) -> int:
    """Pairs whose log-probs are computed at once."""
    config: DPOConfig = stage.config
    microbatch = config.batch_size // config.gradient_accumulation_steps
    return max(microbatch, batch_multiple(stage.context.mesh))


def reference_logprobs(
    stage: Stage, pairs: Sequence[Pair], length: int, num_patches: int | None = None
) -> np.ndarray:
    """Sequence log-probs [pairs, 2] of every pair under the parent."""
    mesh, params = stage.context.mesh, stage.parent_params()
    compute, size = pair_program(stage), reference_rows(stage)
    parts = -(-len(pairs) // size)
    batches = read_batches(
        # One shape for all: the last part is filled up with the last pair.
        lambda part, number: pairs[min(part * size + number, len(pairs) - 1)],
        lambda rows: pair_rows(stage, rows, length, num_patches),
        steps=range(parts),
        numbers=own_rows(mesh, size).tolist(),
    )
    results = []
    with deadline(stage.context.config.step_timeout, before_progress=COMPILING):
        for batch in batches:
            results.append(np.asarray(compute(params, place_batch(batch, mesh, rows=size))))
            progress()
    return np.concatenate(results)[: len(pairs)]


def pair_rows(
    stage: Stage, pairs: Sequence[Pair], length: int, num_patches: int | None = None
) -> dict[str, np.ndarray]:
    """Arrays [pairs, 2, T, ...], the chosen completion first."""
    flat = [[example] for pair in pairs for example in pair]
    batch = fill_rows(flat, length, pad_id=stage.context.pad_id, num_patches=num_patches)
    return {name: x.reshape(len(pairs), 2, *x.shape[1:]) for name, x in batch.items()}
