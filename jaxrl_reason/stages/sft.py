"""Supervised fine-tuning on demonstrations: the cold start.

Rows are packed once, before the first step, by best fit; an epoch visits the rows in a new order.
The loss counts completion tokens only, the end marker among them.
"""

import functools

import numpy as np

from jaxrl_reason.config import hash_json
from jaxrl_reason.data.batching import Example, fill_rows, pack, step_indices
from jaxrl_reason.errors import InputError
from jaxrl_reason.stages.context import Stage
from jaxrl_reason.stages.data_config import FileData, TraceData
from jaxrl_reason.stages.encoding import file_records
from jaxrl_reason.stages.made_rows import Made, example_of, made_rows
from jaxrl_reason.stages.placed_rows import place_rows
from jaxrl_reason.stages.stage_config import SFTConfig
from jaxrl_reason.stages.training import StepResult, compile_step, resume, stage_optimizer, train
from jaxrl_reason.steps import make_sft_step


def run_sft(stage: Stage) -> None:
    """Train on the stage's demonstrations, from its last checkpoint or its parent."""
    config: SFTConfig = stage.config
    microbatch_count = config.gradient_accumulation_steps
    stage.check_rows("batch_size", config.batch_size, microbatches=microbatch_count)
    examples = demonstrations(stage)
    rows = pack([example.size for example in examples], config.max_length)
    if not config.packing:
        rows = [[i] for i in range(len(examples))]
    of_rows = [[examples[i] for i in row] for row in rows]
    num_patches = stage.context.patches_of(*of_rows)
    optimizer = stage_optimizer(stage)
    update = compile_step(stage, make_sft_step, logprob_chunk_size=config.logprob_chunk_size)

    def fill(documents):
        return fill_rows(
            documents, config.max_length, pad_id=stage.context.pad_id, num_patches=num_patches
        )

    def one_step(state, step):
        chosen = step_indices(stage.seed, step, size=len(rows), batch_size=config.batch_size)
        documents = [of_rows[row] for row in chosen]
        placed = place_rows(stage.context.mesh, documents, fill, microbatch_count)
        state, metrics = update(state, placed.batch)
        told = {"num_tokens": placed.counted, "padding_share": placed.padding_share}
        return StepResult(state, [metrics], told, placed.num_tokens, placed.counted, placed.batch)

    data_hash = hash_json([example.identity for example in examples])
    begin = resume(stage, optimizer, data_hash=data_hash)
    train(stage, begin, one_step, show=("loss",), data_hash=data_hash)


def demonstrations(stage: Stage, most: int | None = None) -> list[Example]:
    """Token ids of every demonstration.

    Args:
        stage: the stage.
        most: how many of the task's own traces; all by default.

    Raises:
        InputError: a row of a file that is malformed or too long, by file and line.
    """
    config: SFTConfig = stage.config
    if isinstance(config.data, TraceData):
        traces = _traces(stage, config.data)[:most]
        found = [(example_of(stage, made), made.where) for made in traces]
    elif isinstance(config.data, FileData):
        found = _of_file(stage, config.data)
    else:
        found = [(example_of(stage, made), made.where) for made in made_rows(stage, "rows")]
    for example, where in found:
        if example.size > config.max_length:
            raise InputError(
                f"{where}: prompt and completion have {example.size} tokens; "
                f"stages.{stage.name}.max_length={config.max_length} is the most"
            )
    return [example for example, _ in found]


def _traces(stage: Stage, data: TraceData) -> list[Made]:
    """What the task's solver writes, in styles that are drawn."""
    problems = stage.problems(0, data.num_examples)
    names, shares = zip(*data.styles.items(), strict=True)
    draw = np.random.default_rng(stage.seed).choice
    styles = draw(names, size=len(problems), p=np.asarray(shares) / sum(shares))
    task = stage.context.tasks.named(data.problems.task)
    return [
        Made(problem, {"completion": task.trace(problem, str(style))}, f"problem {number}")
        for number, (problem, style) in enumerate(zip(problems, styles, strict=True))
    ]


def _of_file(stage: Stage, data: FileData) -> list[tuple[Example, str]]:
    encoder = stage.context.encoder.counting(
        completion_only_loss=stage.config.completion_only_loss,
        assistant_only_loss=stage.config.assistant_only_loss,
    )
    examples = []
    for record in file_records(data):
        found = record.check(encoder.supervised)
        again = lambda k, row=record.row: encoder.supervised(row)[k]
        found = [encoder.later(e, functools.partial(again, k)) for k, e in enumerate(found)]
        examples += [(example, record.where) for example in found]
    return examples
