"""Accuracy on held-out problems, with its uncertainty, and the completions to look at."""

import functools
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxrl_reason import files
from jaxrl_reason.config import to_json
from jaxrl_reason.errors import InputError
from jaxrl_reason.models import Params
from jaxrl_reason.plugins import load_object
from jaxrl_reason.processes import from_first
from jaxrl_reason.rewards import Scores
from jaxrl_reason.stages.config import EvaluationConfig, EvaluationSet, RunConfig
from jaxrl_reason.stages.context import CHECKED, Context
from jaxrl_reason.stages.deadline import COMPILING, deadline, progress
from jaxrl_reason.stages.groups import sample_groups
from jaxrl_reason.stages.judge import Judge, Read
from jaxrl_reason.stages.policy_config import PolicyConfig
from jaxrl_reason.stages.reward_config import AnyReward, reward_name
from jaxrl_reason.tasks import Problem

# One key for all stages: they answer the same problems with the same random numbers.
_KEY = 20_250_501


def evaluate(
    context: Context, params: Params, config: EvaluationConfig
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Sample one completion for each of the first problems of the test split, and verify it.

    Returns:
        The result (`accuracy` with its Wilson interval, `format_rate`, `mean_length` in tokens,
        accuracy by difficulty, measures, the results of further sets, ...) and one row a problem
        of the main set with prompt, completion, verdict and rewards.
    """
    sets = {"": EvaluationSet(), **config.sets}
    answers = {name: _answers(context, params, config, chosen) for name, chosen in sets.items()}
    # Of many more completions than those of a step.
    limited = functools.partial(deadline, context.config.step_timeout, times=COMPILING)
    reads, judges = [answer.read for answer in answers[""]], _judges(context)
    with limited():
        on_devices = [judge.score_on_devices(reads) for judge in judges]

    def judged() -> tuple[dict[str, Any], list[dict[str, Any]]]:
        with limited():
            return _judged(config, answers, _rewards(judges, reads, on_devices))

    # Other rewards and measures may ask others than this program, so one process does.
    return from_first(judged)


def check_evaluation(context: Context) -> None:
    """Import the measures and read some of the problems, so that a mistake in them shows at once.

    Raises:
        InputError: no such function, or a prompt that is too long.
    """
    config = context.config.evaluation
    for where in config.measures.values():
        load_object(where, "measure")
    for name, chosen in {"": EvaluationSet(), **config.sets}.items():
        some = min(chosen.problems or config.problems, CHECKED)
        problems = _held_out(context, config, chosen.model_copy(update={"problems": some}))
        context.check_prompts(problems, f"evaluation.sets.{name}" if name else "evaluation")


def _judged(
    config: EvaluationConfig,
    answers: Mapping[str, "list[_Answer]"],
    rewards: Sequence[dict[str, float | None]],
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The result and the rows; of `answers`, those of the main set have no name and rewards."""
    measures = {name: load_object(where, "measure") for name, where in config.measures.items()}
    rows = [
        _row(answer, measures) | {"rewards": given}
        for answer, given in zip(answers[""], rewards, strict=True)
    ]
    result = summarize(rows)
    if config.sets:
        result["sets"] = {
            name: summarize([_row(answer, measures) for answer in answers[name]])
            for name in config.sets
        }
    return result, rows


def reward_table(config: RunConfig) -> dict[str, Any]:
    """What `evaluate` rewards completions with, as JSON."""
    return {
        name: [to_json(r), longest] for name, (r, longest) in configured_rewards(config).items()
    }


def configured_rewards(config: RunConfig) -> dict[str, tuple[AnyReward, int]]:
    """The rewards of a run's evaluations by name, with the longest completion of their stage.

    They are those of all stages; of rewards with the same name that of the last stage counts.
    """
    return {
        reward_name(reward): (reward, stage.max_completion_length)
        for stage in config.stages.values()
        if isinstance(stage, PolicyConfig)
        for reward in stage.rewards
    }


class _Answer(NamedTuple):
    read: Read
    finished: bool


def _answers(
    context: Context, params: Params, config: EvaluationConfig, chosen: EvaluationSet
) -> list[_Answer]:
    """One completion of each problem of a set."""
    problems = _held_out(context, config, chosen)
    groups = sample_groups(
        context,
        params,
        problems,
        jax.random.fold_in(jax.random.key(context.config.seed), _KEY),
        num_generations=1,
        sampling=config.sampling,
        max_completion_length=config.max_completion_length,
        max_rows=config.batch_size,
    )
    return [
        _Answer(Read(problem, answer.ids, answer.text, answer.verdict), answer.finished)
        for problem, (answer,) in zip(problems, groups, strict=True)
    ]


def _held_out(context: Context, config: EvaluationConfig, chosen: EvaluationSet) -> list[Problem]:
    """The first problems of a set; of several difficulties, each in turn."""
    wanted = chosen.problems or config.problems
    # A data set begins again behind its last row.
    held_out = context.tasks.size("test", chosen.task)
    count = wanted if held_out is None else min(wanted, held_out)
    levels = chosen.difficulties or (None,)
    asked: Counter[int | None] = Counter()  # a difficulty may be named twice, to be met more often
    problems = []
    for number in range(count):
        level = levels[number % len(levels)]
        problems.append(context.tasks.generate("test", asked[level], level, task=chosen.task))
        asked[level] += 1
    return problems


def _judges(context: Context) -> list[Judge]:
    """Of every reward of the run, those with the same longest completion together."""
    configured = configured_rewards(context.config)
    return [
        Judge(
            context.tasks,
            context.tokenizer,
            [reward for reward, longest in configured.values() if longest == length],
            stop_ids=context.stop_ids,
            max_completion_length=length,
        )
        for length in sorted({longest for _, longest in configured.values()})
    ]


def _rewards(
    judges: Sequence[Judge], reads: Sequence[Read], on_devices: Sequence[Scores]
) -> list[dict[str, float | None]]:
    """Every reward of every completion by name; None where it does not apply."""
    rows: list[dict[str, float | None]] = [{} for _ in reads]
    for judge, given in zip(judges, on_devices, strict=True):
        rewards, mask = judge.score_alone(reads, given)
        progress()
        for row, values, applies in zip(rows, rewards, mask, strict=True):
            named = zip(judge.names, values, applies, strict=True)
            row |= {name: float(value) if here else None for name, value, here in named}
    return rows


def summarize(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The result of verified completions."""
    correct = np.asarray([row["correct"] for row in rows])
    lengths = np.asarray([row["length"] for row in rows])
    difficulty = np.asarray([row["difficulty"] for row in rows])
    levels = {str(d): difficulty == d for d in np.unique(difficulty)}
    result = {
        "accuracy": float(correct.mean()),
        "accuracy_ci95": list(wilson_interval(int(correct.sum()), len(rows))),
        "format_rate": float(np.mean([row["formatted"] for row in rows])),
        "mean_length": float(lengths.mean()),
        "mean_length_correct": float(lengths[correct].mean()) if correct.any() else None,
        "clipped_ratio": float(np.mean([not row["finished"] for row in rows])),
        "accuracy_by_difficulty": {d: float(correct[here].mean()) for d, here in levels.items()},
        "problems": len(rows),
    }
    if not rows[0]["measures"]:
        return result
    of = {name: [row["measures"][name] for row in rows] for name in rows[0]["measures"]}
    result["measures"] = {name: _mean(values) for name, values in of.items()}
    result["measures_by_difficulty"] = {
        name: {
            d: _mean([v for v, h in zip(values, here, strict=True) if h])
            for d, here in levels.items()
        }
        for name, values in of.items()
    }
    return result


def _mean(values: Sequence[float | None]) -> float | None:
    """Over those to which the measure applies."""
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None


def wilson_interval(successes: int, trials: int, *, z: float = 1.959964) -> tuple[float, float]:
    """Confidence interval of a proportion (Wilson 1927); 95 % by default. Good near 0 and 1 too."""
    if not 0 <= successes <= trials or trials == 0:
        raise ValueError(f"got {successes} successes in {trials} trials")
    p = successes / trials
    centre = p + z * z / (2 * trials)
    spread = z * math.sqrt(p * (1 - p) / trials + z * z / (4 * trials * trials))
    scale = 1 + z * z / trials
    return max(0.0, (centre - spread) / scale), min(1.0, (centre + spread) / scale)


def write_samples(path: str | Path, rows: list[dict[str, Any]]) -> None:
    """Write the rows of `evaluate` as JSONL, to a file that a user has chosen.

    Raises:
        InputError: one cannot write there.
        StorageError: storage refuses it.
    """
    with files.chosen(path, "choose another file"):
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        files.replace(path, files.jsonl(rows))


def write_evaluation(directory: Path, result: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    """Write `samples.jsonl`, then `eval.json`, each whole or not at all.

    Raises:
        StorageError: storage refuses one of them.
    """
    files.write_jsonl(directory / "samples.jsonl", rows)
    files.write_json(directory / "eval.json", result)


def _row(answer: _Answer, measures: Mapping[str, Callable[..., Any]]) -> dict[str, Any]:
    progress()
    read = answer.read
    problem, verdict, length = read.problem, read.verdict, len(read.ids)
    return {
        "prompt": problem.prompt,
        "completion": read.text,
        "answer": problem.answer,
        "given": verdict.answer,
        "correct": verdict.correct,
        "formatted": verdict.formatted,
        "reason": verdict.reason,
        "length": length,
        "finished": answer.finished,
        "difficulty": problem.columns["difficulty"],
        "measures": {
            name: _measured(name, measure(problem, read.text, verdict, length))
            for name, measure in measures.items()
        },
    }


def _measured(name: str, value: Any) -> float | None:
    if value is None:
        return None
    if not isinstance(value, bool | int | float) or not math.isfinite(value):
        raise InputError(
            f"measure {name!r} returned {value!r}; return a finite number, or None where it does "
            "not apply"
        )
    return float(value)
