"""Accuracy on held-out problems, with its uncertainty, and the completions to look at."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxrl_reason.data.records import write_jsonl
from jaxrl_reason.models import Params
from jaxrl_reason.sampling import sample
from jaxrl_reason.stages.config import EvaluationConfig
from jaxrl_reason.stages.context import Context
from jaxrl_reason.stages.dataset_task import DatasetTask
from jaxrl_reason.tasks import Problem

# One key for all stages: they answer the same problems with the same random numbers.
_KEY = 20_250_501


def evaluate(
    context: Context, params: Params, config: EvaluationConfig
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Sample one completion for each of the first problems of the test split, and verify it.

    Returns:
        The result (`accuracy` with its Wilson interval, `format_rate`, `mean_length` in tokens,
        accuracy by difficulty, ...) and one row a problem with prompt, completion and verdict.
    """
    # A data set begins again behind its last row.
    held_out = context.task.size("test") if isinstance(context.task, DatasetTask) else math.inf
    count = int(min(config.problems, held_out))
    problems = [context.task.generate("test", i) for i in range(count)]
    engine = context.engine(
        config.sampling,
        config.max_completion_length,
        max_rows=min(config.batch_size, count),
    )
    prompts = context.prompts(problems)
    rollout = sample(
        engine,
        params,
        [prompt.tokens for prompt in prompts],
        jax.random.fold_in(jax.random.key(context.config.seed), _KEY),
        pad_id=context.pad_id,
        shown=context.look(params, prompts)[0],
    )
    texts = context.decode(rollout.completions())
    rows = [
        _row(context, problem, text, int(length), bool(finished))
        for problem, text, length, finished in zip(
            problems, texts, rollout.lengths, rollout.finished, strict=True
        )
    ]
    return summarize(rows), rows


def summarize(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The result of verified completions."""
    correct = np.asarray([row["correct"] for row in rows])
    lengths = np.asarray([row["length"] for row in rows])
    difficulty = np.asarray([row["difficulty"] for row in rows])
    return {
        "accuracy": float(correct.mean()),
        "accuracy_ci95": list(wilson_interval(int(correct.sum()), len(rows))),
        "format_rate": float(np.mean([row["formatted"] for row in rows])),
        "mean_length": float(lengths.mean()),
        "mean_length_correct": float(lengths[correct].mean()) if correct.any() else None,
        "clipped_ratio": float(np.mean([not row["finished"] for row in rows])),
        "accuracy_by_difficulty": {
            str(d): float(correct[difficulty == d].mean()) for d in np.unique(difficulty)
        },
        "problems": len(rows),
    }


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
    """Write the rows of `evaluate` as JSONL."""
    write_jsonl(path, rows)


def write_evaluation(directory: Path, result: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    """Write `samples.jsonl`, then `eval.json`, each whole or not at all."""
    directory.mkdir(parents=True, exist_ok=True)
    write_jsonl(directory / "samples.jsonl", rows)
    temporary = directory / ".eval.json"
    temporary.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    temporary.replace(directory / "eval.json")


def _row(context: Context, problem: Problem, text: str, length: int, finished: bool):
    verdict = context.task.verify(problem, text)
    return {
        "prompt": problem.prompt,
        "completion": text,
        "answer": problem.answer,
        "given": verdict.answer,
        "correct": verdict.correct,
        "formatted": verdict.formatted,
        "reason": verdict.reason,
        "length": length,
        "finished": finished,
        "difficulty": problem.columns["difficulty"],
    }
