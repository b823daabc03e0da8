"""What an arm may spend by its configuration, and what it did spend."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

from jaxrl_reason.stages.config import RunConfig, StageConfig, other_stage
from jaxrl_reason.stages.data_config import SampledPairs
from jaxrl_reason.stages.policy_config import PolicyConfig
from jaxrl_reason.stages.reject_config import RejectConfig
from jaxrl_reason.stages.stage_config import DPOConfig, SFTConfig

Quantity = Literal[
    "updates",
    "sft_rows",
    "sft_tokens",
    "dpo_pairs",
    "sampled_completions",
    "rl_prompts",
    "rl_completions",
    "rl_tokens",
]
"""Updates of the parameters; rows of fine-tuning, and their tokens at most; pairs; completions
sampled as data; problems and completions of reinforcement learning, and their tokens at most."""
QUANTITIES: tuple[str, ...] = get_args(Quantity)


def path_of(run: RunConfig, stage: str) -> list[str]:
    """The stages from the untrained model to `stage`, in order; the model itself is no stage."""
    path: list[str] = []
    while stage != "init":
        path.append(stage)
        stage = run.stages[stage].parent
    return path[::-1]


def needed(run: RunConfig, stages: Sequence[str]) -> list[str]:
    """All stages that must run for `stages`, in the order of the run."""
    found: set[str] = {"init"}
    open_ = list(stages)
    while open_:
        name = open_.pop()
        if name not in found:
            found.add(name)
            other = other_stage(run.stages[name])
            open_ += [run.stages[name].parent, *([] if other is None else [other])]
    return [name for name in run.stages if name in found]


def planned(run: RunConfig, stage: str) -> dict[str, int]:
    """The quantities of an arm that ends in `stage`, over its path and the data it samples."""
    total = dict.fromkeys(QUANTITIES, 0)
    path = path_of(run, stage)
    read = {other_stage(run.stages[name]) for name in path} - {None}
    for name in [*path, *read]:
        for quantity, amount in _of_stage(run.stages[name]).items():
            total[quantity] += amount
    return total


def used(run: RunConfig, stage: str, records: Mapping[str, Any]) -> dict[str, float]:
    """What a seed's records say that an arm has used.

    Returns:
        `updates`; `sft_tokens`, those that the loss counted; `rl_tokens`, those that were sampled.
    """
    total = {"updates": 0.0, "sft_tokens": 0.0, "rl_tokens": 0.0}
    for name in path_of(run, stage):
        config, spent = run.stages[name], records[name]["used"]
        per_step = config.num_iterations if isinstance(config, PolicyConfig) else 1
        total["updates"] += per_step * spent["steps"]
        if isinstance(config, SFTConfig):
            total["sft_tokens"] += spent["tokens"]
        elif isinstance(config, PolicyConfig):
            total["rl_tokens"] += spent["tokens"]
    return total


def _of_stage(stage: StageConfig) -> dict[str, int]:
    if isinstance(stage, SFTConfig):
        rows = stage.steps * stage.batch_size
        return {"updates": stage.steps, "sft_rows": rows, "sft_tokens": rows * stage.max_length}
    if isinstance(stage, DPOConfig):
        spent = {"updates": stage.steps, "dpo_pairs": stage.steps * stage.batch_size}
        if isinstance(stage.data, SampledPairs):
            spent["sampled_completions"] = stage.data.num_prompts * stage.data.num_generations
        return spent
    if isinstance(stage, RejectConfig):
        policies = 1 if stage.rejected_from is None else 2
        return {"sampled_completions": policies * stage.num_prompts * stage.num_generations}
    batches = 1 if stage.dynamic_sampling is None else stage.dynamic_sampling.max_batches
    prompts = stage.steps * stage.prompts_per_step * batches
    completions = prompts * stage.num_generations
    return {
        "updates": stage.steps * stage.num_iterations,
        "rl_prompts": prompts,
        "rl_completions": completions,
        "rl_tokens": completions * stage.max_completion_length,
    }
