"""Supervised fine-tuning on demonstrations: the cold start.

Rows are packed once, before the first step, by best fit; an epoch visits the rows in a new order.
The loss counts completion tokens only, the end marker among them.
"""

import functools
from collections.abc import Sequence

import numpy as np

from jaxrl_reason.data.batching import Batch, Example, fill_rows, pack
from jaxrl_reason.data.loading import Examples, Maker
from jaxrl_reason.stages.context import Stage
from jaxrl_reason.stages.data_config import FileData, TraceData
from jaxrl_reason.stages.encoding import file_records
from jaxrl_reason.stages.made_rows import Made, made_maker, made_rows
from jaxrl_reason.stages.placed_rows import StepRows
from jaxrl_reason.stages.stage_config import SFTConfig
from jaxrl_reason.stages.training import StepResult, compile_step, resume, stage_optimizer, train
from jaxrl_reason.steps import make_sft_step


def run_sft(stage: Stage) -> None:
    """Train on the stage's demonstrations, from its last checkpoint or its parent."""
    config: SFTConfig = stage.config
    microbatch_count = config.gradient_accumulation_steps
    stage.check_rows("batch_size", config.batch_size, microbatches=microbatch_count)
    examples = demonstrations(stage)
    places = [(i, k) for i, found in enumerate(examples.facts) for k in range(len(found))]
    facts = [fact for found in examples.facts for fact in found]
    rows = pack([fact.size for fact in facts], config.max_length)
    if not config.packing:
        rows = [[i] for i in range(len(facts))]
    num_patches = stage.context.patches_of(*([facts[i] for i in row] for row in rows))
    optimizer = stage_optimizer(stage)
    update = compile_step(stage, make_sft_step, logprob_chunk_size=config.logprob_chunk_size)

    def documents(row: int) -> list[Example]:
        return [examples[i][k] for i, k in (places[number] for number in rows[row])]

    def fill(rows: Sequence[list[Example]]) -> Batch:
        return fill_rows(
            rows, config.max_length, pad_id=stage.context.pad_id, num_patches=num_patches
        )

    begin = resume(stage, optimizer, data_hash=examples.hash)
    step_rows = StepRows(
        stage.context.mesh, stage.seed, len(rows), config.batch_size, microbatch_count
    )
    batches = step_rows.read(documents, fill, range(begin.step, config.steps))

    def one_step(state, step):
        placed = step_rows.place(next(batches))
        state, metrics = update(state, placed.batch)
        told = {"num_tokens": placed.counted, "padding_share": placed.padding_share}
        return StepResult(state, [metrics], told, placed.num_tokens, placed.counted, placed.batch)

    train(stage, begin, one_step, show=("loss",), data_hash=examples.hash)


def demonstrations(stage: Stage, most: int | None = None) -> Examples:
    """The demonstrations, of each row one or several.

    Args:
        stage: the stage.
        most: how many of the task's own traces; all by default.

    Raises:
        InputError: a row of a file that is malformed or too long, by file and line.
    """
    config: SFTConfig = stage.config
    if isinstance(config.data, FileData):
        makers = _of_file(stage, config.data)
    else:
        traces = isinstance(config.data, TraceData)
        rows = _traces(stage, config.data)[:most] if traces else made_rows(stage, "rows")
        makers = [made_maker(stage, made) for made in rows]
    return Examples(makers, config.max_length, option=f"stages.{stage.name}.max_length")


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


def _of_file(stage: Stage, data: FileData) -> list[Maker]:
    encoder = stage.context.encoder.counting(
        completion_only_loss=stage.config.completion_only_loss,
        assistant_only_loss=stage.config.assistant_only_loss,
    )
    return [
        Maker(functools.partial(record.check, encoder.supervised), record.where)
        for record in file_records(data)
    ]
