"""The accuracy and brevity that a multi-objective stage passed through."""

from pathlib import Path
from typing import Any

import numpy as np

from jaxrl_reason.metrics import read_metrics
from jaxrl_reason.objectives import hypervolume
from jaxrl_reason.stages.config import RunConfig
from jaxrl_reason.stages.policy_config import MORLConfig

_WINDOW = 5  # steps averaged into one point: a batch alone is too noisy
_REFERENCE = (0.0, 0.0)


def pareto_points(config: RunConfig) -> dict[str, Any] | None:
    """Points of the last MORL stage with an accuracy reward; None if there is none.

    A point is the mean over five steps of (accuracy, 1 - length / longest length) of the sampled
    completions; problems are never repeated, so these are means over problems not trained on yet.
    """
    names = [name for name, stage in config.stages.items() if isinstance(stage, MORLConfig)]
    if not names:
        return None
    name = names[-1]
    rows = read_metrics(Path(config.output_dir) / config.name / name / "metrics.jsonl")
    if not rows or "rewards/accuracy/mean" not in rows[0]:
        return None
    longest = config.stages[name].max_completion_length
    accuracy = np.asarray([row["rewards/accuracy/mean"] for row in rows])
    brevity = 1 - np.asarray([row["completions/mean_length"] for row in rows]) / longest
    window = min(_WINDOW, len(rows))
    smooth = lambda x: np.convolve(x, np.full(window, 1 / window), "valid")
    points = np.stack([smooth(accuracy), smooth(brevity)], axis=1)
    return {
        "stage": name,
        "points": points,
        "steps": np.asarray([row["step"] for row in rows[window - 1 :]]),
        "hypervolume": float(hypervolume(points, np.asarray(_REFERENCE))),
        "reference": _REFERENCE,
        "labels": ("accuracy", f"brevity (1 - length / {longest} tokens)"),
    }
