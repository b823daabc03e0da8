"""Direct preference optimisation (arXiv 2305.18290) against the parent, and its relatives.

The reference is the parent itself; its log-probs of every pair are computed once, before the first
step, and its parameters are then let go. Losses without a reference compute none. Pairs come from a
file, from an earlier stage, from a function, or from the parent's own samples: a completion that
the verifier accepts against one that it rejects.
"""

from typing import Any

import jax
import numpy as np

from jaxrl_reason.config import hash_json
from jaxrl_reason.data.batching import fill_rows, step_indices
from jaxrl_reason.data.records import load_records, write_jsonl
from jaxrl_reason.errors import InputError
from jaxrl_reason.processes import from_first
from jaxrl_reason.sharding import (
    OnMesh,
    batch_multiple,
    compiler_options,
    place_batch,
    replicated,
)
from jaxrl_reason.stages.context import Stage
from jaxrl_reason.stages.data_config import FileData, SampledPairs
from jaxrl_reason.stages.encoding import file_records
from jaxrl_reason.stages.groups import sample_groups
from jaxrl_reason.stages.made_rows import Made, Pair, made_rows, pair_of
from jaxrl_reason.stages.placed_rows import place_rows
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

_ROW_MULTIPLE = 16


def run_dpo(stage: Stage) -> None:
    """Train on the stage's pairs, from its last checkpoint or its parent."""
    config: DPOConfig = stage.config
    count = config.gradient_accumulation_steps
    stage.check_rows("batch_size", config.batch_size, microbatches=count)
    pairs = preference_pairs(stage)
    length = row_length(stage, pairs)
    num_patches = stage.context.patches_of(*([example] for pair in pairs for example in pair))
    reference = None
    if needs_reference(config.loss_type):
        reference = reference_logprobs(stage, pairs, length, num_patches)
    optimizer = stage_optimizer(stage)
    update = preference_update(stage)

    def fill(numbers):
        batch = pair_rows(stage, [pairs[i] for i in numbers], length, num_patches)
        return batch if reference is None else batch | {"ref_logprobs": reference[numbers]}

    def one_step(state, step):
        chosen = step_indices(stage.seed, step, size=len(pairs), batch_size=config.batch_size)
        placed = place_rows(stage.context.mesh, chosen, fill, count)
        state, metrics = update(state, placed.batch)
        told = {"padding_share": placed.padding_share}
        return StepResult(state, [metrics], told, placed.num_tokens, placed.counted, placed.batch)

    show = ("loss", "rewards/accuracies", "rewards/margins")
    data_hash = hash_json([[example.identity for example in pair] for pair in pairs])
    begin = resume(stage, optimizer, data_hash=data_hash)
    train(stage, begin, one_step, show=show, data_hash=data_hash)


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


def preference_pairs(stage: Stage) -> list[Pair]:
    """Token ids of every pair; sampled ones are written to a file and read back on resume.

    Raises:
        InputError: a malformed or over-long row, by file and line; or no pair at all.
    """
    config: DPOConfig = stage.config
    if isinstance(config.data, FileData):
        records = file_records(config.data)
        found = [(r.check(lambda row: encode_pair(stage, row)), r.where) for r in records]
    else:
        sampled = isinstance(config.data, SampledPairs)
        rows = _sampled_rows(stage) if sampled else made_rows(stage, "pairs")
        found = [(pair_of(stage, made), made.where) for made in rows]
    for pair, where in found:
        longest = max(example.size for example in pair)
        if longest > config.max_length:
            raise InputError(
                f"{where}: prompt and completion have {longest} tokens; "
                f"stages.{stage.name}.max_length={config.max_length} is the most"
            )
    return [pair for pair, _ in found]


def encode_pair(stage: Stage, row: dict[str, Any]) -> Pair:
    """Token ids of the texts of a file's row."""
    encoder = stage.context.encoder
    chosen, rejected = encoder.preference(row)
    return (
        encoder.later(chosen, lambda: encoder.preference(row)[0]),
        encoder.later(rejected, lambda: encoder.preference(row)[1]),
    )


def _sampled_rows(stage: Stage) -> list[Made]:
    # Named after what made it: another configuration must not find these pairs.
    path = stage.directory / f"pairs-{stage.hash}.jsonl"
    if not from_first(path.exists):
        rows = sampled_pairs(stage)
        from_first(lambda: write_jsonl(path, rows))
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


def row_length(stage: Stage, pairs: list[Pair]) -> int:
    """Tokens of a row: the longest of the data, rounded up, so that no row is mostly padding."""
    longest = max(example.size for pair in pairs for example in pair)
    return min(-(-longest // _ROW_MULTIPLE) * _ROW_MULTIPLE, stage.config.max_length)


def pair_program(stage: Stage) -> OnMesh:
    """What computes the sequence log-probs of pairs: `(params, batch)` to [pairs, 2]."""
    context, chunk = stage.context, stage.config.logprob_chunk_size

    def sums(params, batch):
        return pair_logprobs(context.model, params, batch, logprob_chunk_size=chunk)[0]

    jitted = jax.jit(
        sums,
        out_shardings=replicated(context.mesh),
        compiler_options=compiler_options(context.mesh),
    )
    return OnMesh(jitted, context.mesh)


def reference_rows(stage: Stage) -> int:
    """Pairs whose log-probs are computed at once."""
    config: DPOConfig = stage.config
    microbatch = config.batch_size // config.gradient_accumulation_steps
    return max(microbatch, batch_multiple(stage.context.mesh))


def reference_logprobs(
    stage: Stage, pairs: list[Pair], length: int, num_patches: int | None = None
) -> np.ndarray:
    """Sequence log-probs [pairs, 2] of every pair under the parent."""
    context = stage.context
    params = stage.parent_params()

    compute = pair_program(stage)
    size = reference_rows(stage)
    results = []
    for start in range(0, len(pairs), size):
        part = pairs[start : start + size]
        # One shape for all: the last part is filled up with copies of its first pair.
        batch = pair_rows(stage, part + part[:1] * (size - len(part)), length, num_patches)
        results.append(np.asarray(compute(params, place_batch(batch, context.mesh)))[: len(part)])
    return np.concatenate(results)


def pair_rows(
    stage: Stage, pairs: list[Pair], length: int, num_patches: int | None = None
) -> dict[str, np.ndarray]:
    """Arrays [pairs, 2, T, ...], the chosen completion first."""
    flat = [[example] for pair in pairs for example in pair]
    batch = fill_rows(flat, length, pad_id=stage.context.pad_id, num_patches=num_patches)
    return {name: x.reshape(len(pairs), 2, *x.shape[1:]) for name, x in batch.items()}
