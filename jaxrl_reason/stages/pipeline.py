"""A run: its stages one after the other, each from its parent's checkpoint, each evaluated.

A stage that is complete is skipped; one that was interrupted goes on from its last checkpoint. What
was made with another configuration is never overwritten.
"""

import contextlib
import functools
import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxrl_reason import __version__, checkpoint, files
from jaxrl_reason.config import hash_json, load_yaml, to_json
from jaxrl_reason.data.tokenizer import save_tokenizer
from jaxrl_reason.errors import InputError
from jaxrl_reason.metrics import check_trackers
from jaxrl_reason.plugins import load_object
from jaxrl_reason.processes import from_first, wait
from jaxrl_reason.stages.config import RunConfig, other_stage
from jaxrl_reason.stages.context import CHECKED, Context, Stage
from jaxrl_reason.stages.data_config import FileData, PythonData, TraceData
from jaxrl_reason.stages.deadline import COMPILING, deadline
from jaxrl_reason.stages.dpo import preference_pairs, run_dpo
from jaxrl_reason.stages.evaluate import (
    check_evaluation,
    evaluate,
    reward_table,
    write_evaluation,
)
from jaxrl_reason.stages.grpo import run_grpo
from jaxrl_reason.stages.judge import reward_functions
from jaxrl_reason.stages.load import TOKENIZER
from jaxrl_reason.stages.morl import run_morl
from jaxrl_reason.stages.policy_config import PolicyConfig
from jaxrl_reason.stages.preemption import heeded
from jaxrl_reason.stages.reject import META, run_reject
from jaxrl_reason.stages.reject_config import RejectConfig
from jaxrl_reason.stages.sft import demonstrations, run_sft
from jaxrl_reason.stages.stage_config import DPOConfig, SFTConfig

RUNNERS: Mapping[str, Callable[[Stage], None]] = {
    "sft": run_sft,
    "dpo": run_dpo,
    "grpo": run_grpo,
    "morl": run_morl,
    "reject": run_reject,
}


def run(config: RunConfig, *, say: Callable[[str], None]) -> list[dict[str, Any]]:
    """Run all stages and write `summary.json`.

    Args:
        config: the run.
        say: receives one line about what happens next.

    Returns:
        One row a stage, in order, the untrained model first.

    Raises:
        InputError: a mistake in the configuration or the data, or a folder made by another one.
        StorageError: something could not be written; what was written before stays.
        Preemption: SIGTERM has come, and what there was is saved.
    """
    context = Context.create(config)
    with heeded():
        return _run(context, say)


def _run(context: Context, say: Callable[[str], None]) -> list[dict[str, Any]]:
    stages = plan(context)
    from_first(lambda: check_belongs(context, stages))
    check_trackers(wandb_project=context.config.tracking.wandb_project)
    check_evaluation(context)
    for stage in stages:
        if not _is_complete(stage):
            check_inputs(stage)
    _prepare_folder(context)
    rows = [_evaluated(context, "init", "init", context.root_hash, 0.0, say)]
    for stage in stages:
        began = time.monotonic()
        if _is_complete(stage):
            say(f"{stage.name}: complete, skipped")
        else:
            if (step := checkpoint.latest(stage.checkpoints)) is not None:
                say(f"{stage.name}: going on after step {step}")
            described = (stage.directory / "config.json", to_json(context.config))
            from_first(functools.partial(files.write_json, *described))
            RUNNERS[stage.config.kind](stage)
            wait(f"end of {stage.name}")
        meta = from_first(functools.partial(_latest_meta, stage.directory))
        if isinstance(stage.config, RejectConfig):
            rows.append(_kept(stage, meta, say))
        else:
            of = (stage.name, stage.config.kind, stage.hash, meta["seconds"])
            rows.append(_evaluated(context, *of, say))
        say(f"{stage.name}: {time.monotonic() - began:.0f} s")
        from_first(functools.partial(files.write_json, context.directory / "summary.json", rows))
    return rows


def import_model(config: RunConfig, *, say: Callable[[str], None]) -> Path:
    """Prepare the folder of a run: its untrained or published model as a checkpoint.

    Returns:
        The folder of that checkpoint's stage, `init`.

    Raises:
        InputError: as `run` does before it trains.
    """
    context = Context.create(config)
    check_belongs(context, plan(context))
    _prepare_folder(context)
    folder = context.directory / "init"
    count = context.model.config.num_parameters
    say(f"{folder}: {count:,} parameters, {len(context.tokenizer):,} tokens in the vocabulary")
    return folder


def plan(context: Context) -> list[Stage]:
    """The stages of a run with their parents, in order."""
    hashes = {"init": context.root_hash}
    stages = []
    for name, config in context.config.stages.items():
        other = other_stage(config)
        stage = Stage(
            context=context,
            name=name,
            config=config,
            parent=context.directory / config.parent,
            parent_hash=hashes[config.parent],
            other=None if other is None else context.directory / other,
            other_hash=None if other is None else hashes[other],
        )
        hashes[name] = stage.hash
        stages.append(stage)
    return stages


def check_belongs(context: Context, stages: Sequence[Stage]) -> None:
    """Refuse to go on in a folder that another configuration made.

    Raises:
        InputError: naming what differs and what to do.
    """
    _check_made(context.directory / "init", context.root_hash, context.root)
    for stage in stages:
        _check_made(stage.directory, stage.hash, to_json(stage.config))


def check_inputs(stage: Stage) -> None:
    """Read the files and functions of a stage, so that a mistake in them shows at once.

    Raises:
        InputError: as the stage itself would, after those before it had trained.
    """
    config = stage.config
    if isinstance(config, SFTConfig | DPOConfig):
        microbatches = config.gradient_accumulation_steps
        stage.check_rows("batch_size", config.batch_size, microbatches=microbatches)
    if isinstance(config, PolicyConfig):
        reward_functions(config.rewards, max_completion_length=config.max_completion_length)
        some = min(config.prompts_per_step, CHECKED)
        problems = stage.problems(0, some, config.difficulties(0))
        stage.context.check_prompts(problems, f"stages.{stage.name}")
    elif isinstance(config, RejectConfig):
        if config.builder is not None:
            load_object(config.builder, "function")
    elif isinstance(config.data, TraceData):
        demonstrations(stage, most=CHECKED)
    elif isinstance(config.data, FileData | PythonData):
        {"sft": demonstrations, "dpo": preference_pairs}[config.kind](stage)


def _check_made(directory: Path, made: str, config: Mapping[str, Any]) -> None:
    meta = _latest_meta(directory)
    if meta is None or meta["hash"] == made:
        return
    differences = _differences(meta["config"], config) or ["max_prompt_length, or its parent"]
    raise InputError(
        f"{directory} was made with another configuration; what differs: {', '.join(differences)}. "
        "Give the run another name (name=...) or move that folder away; nothing was overwritten"
    )


def _prepare_folder(context: Context) -> None:
    """Write the untrained model as stage `init`, and the run's configuration and tokenizer."""
    checkpoints = context.directory / "init" / "checkpoints"
    from_first(lambda: _write_description(context))
    if not from_first(lambda: _has_sound(checkpoints)):
        meta = {
            "run": context.config.name,
            "stage": "init",
            "kind": "init",
            "hash": context.root_hash,
            "config": context.root,
            "parent": None,
            "seed": context.config.seed,
            "step": 0,
            "complete": True,
            "seconds": 0.0,
            "code_version": __version__,
        }
        params = context.init_params()
        with deadline(context.config.step_timeout, times=COMPILING):
            checkpoint.save(checkpoints, 0, params=params, state={}, meta=meta)
        wait("the untrained model")


def _write_description(context: Context) -> None:
    """The configuration and the tokenizer."""
    with files.chosen(f"to {context.directory}", "choose another output_dir"):
        context.directory.mkdir(parents=True, exist_ok=True)
        text = json.dumps(to_json(context.config), indent=2) + "\n"
        files.replace(context.directory / "config.json", text)
    choice = context.config.model
    if choice.path is not None:
        from jaxrl_reason.models.convert import copy_description

        copy_description(choice.path, context.directory / TOKENIZER, choice.revision)
    with files.storing(context.directory / TOKENIZER):
        save_tokenizer(context.tokenizer, context.directory / TOKENIZER)


def _evaluated(
    context: Context, name: str, kind: str, made: str, seconds: float, say: Callable[[str], None]
) -> dict[str, Any]:
    """The summary row of a stage; evaluates it unless that was done with the same settings."""
    directory = context.directory / name
    settings = hash_json([made, to_json(context.config.evaluation), reward_table(context.config)])
    path = directory / "eval.json"
    result = from_first(lambda: json.loads(path.read_text()) if path.exists() else {})
    if result.get("hash") != settings:
        say(f"{name}: evaluating on {context.config.evaluation.problems} held-out problems")
        began = time.monotonic()
        params = context.restore_params(directory)
        result, rows = evaluate(context, params, context.config.evaluation)
        result = {"stage": name, "kind": kind, "hash": settings, **result}
        result["seconds"] = time.monotonic() - began
        from_first(functools.partial(write_evaluation, directory, result, rows))
    row = {"stage": name, "kind": kind}
    row |= {k: result[k] for k in ("accuracy", "accuracy_ci95", "format_rate", "mean_length")}
    return row | {"problems": result["problems"], "seconds": seconds + result["seconds"]}


def _kept(stage: Stage, meta: Mapping[str, Any], say: Callable[[str], None]) -> dict[str, Any]:
    """The summary row of a stage that trains nothing: of what its parent wrote."""
    counts = meta["counts"]
    special = f", left out {counts['left_out']} with special tokens" if counts["left_out"] else ""
    say(f"{stage.name}: kept {counts['rows']} rows and {counts['pairs']} pairs{special}")
    row = {"stage": stage.name, "kind": stage.config.kind, "accuracy_ci95": None}
    row |= {name: counts[name] for name in ("accuracy", "format_rate", "mean_length")}
    return row | {"problems": stage.config.num_prompts, "seconds": meta["seconds"]}


def _latest_meta(directory: Path) -> dict[str, Any] | None:
    """What a stage's folder says about it: of its last checkpoint, or of the data it kept."""
    if (data := directory / META).exists():
        return load_yaml(data)
    for step in reversed(checkpoint.steps(directory / "checkpoints")):
        with contextlib.suppress(checkpoint.DamagedCheckpointError):
            return checkpoint.read_meta(directory / "checkpoints" / str(step))
    return None


def _is_complete(stage: Stage) -> bool:
    return from_first(lambda: _is_whole(stage.directory))


def _is_whole(directory: Path) -> bool:
    """Whether a stage has nothing left to do, and what it has made can be read."""
    meta = _latest_meta(directory)
    if meta is None or not meta["complete"]:
        return False
    step = checkpoint.latest(directory / "checkpoints")
    return step is None or checkpoint.is_sound(directory / "checkpoints" / str(step))


def _has_sound(checkpoints: Path) -> bool:
    """Whether there is a checkpoint of the untrained model; a damaged one is put aside."""
    step = checkpoint.latest(checkpoints)
    if step is None:
        return False
    if checkpoint.is_sound(checkpoints / str(step)):
        return True
    checkpoint.put_aside(checkpoints / str(step))
    return False


def _differences(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> list[str]:
    changes = []
    for name in sorted(old.keys() | new.keys()):
        before, after = old.get(name), new.get(name)
        if isinstance(before, Mapping) and isinstance(after, Mapping):
            changes += _differences(before, after, f"{prefix}{name}.")
        elif before != after:
            changes.append(f"{prefix}{name}: {before!r} -> {after!r}")
    return changes
