"""Completing prompts with a checkpoint."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax

from jaxrl_reason.config import Config
from jaxrl_reason.data.records import load_records
from jaxrl_reason.data.tokenizer import render_prompt
from jaxrl_reason.errors import InputError
from jaxrl_reason.sampling import SamplingConfig
from jaxrl_reason.stages.context import Context
from jaxrl_reason.stages.load import Loaded
from jaxrl_reason.stages.stage_config import Positive, Seed


class SampleConfig(Config):
    """How prompts are completed."""

    sampling: SamplingConfig = SamplingConfig()
    """How completions are drawn."""
    num_generations: Positive = 1
    """Completions of each prompt."""
    max_completion_length: Positive
    """Longest completion in tokens; the run's evaluation has the default."""
    seed: Seed = 0
    """Seed of the draws."""
    batch_size: Positive = 16
    """Prompts completed at once."""


class Prompt(NamedTuple):
    """A prompt and its place, such as `prompts.txt:3`."""

    text: str
    where: str


def complete(
    loaded: Loaded, prompts: list[Prompt], config: SampleConfig, *, first: int = 0
) -> Iterator[dict[str, Any]]:
    """Rows of prompt, completion, length in tokens, and whether it ended by itself.

    Args:
        loaded: the model.
        prompts: what to complete.
        config: how to draw.
        first: number of the first prompt, so that later calls draw anew.

    Raises:
        InputError: a prompt that the vocabulary cannot express or that is too long, by its place.
    """
    context = loaded.context
    sampler = context.sampler(config.sampling, config.max_completion_length)
    encoded = [_encode(context, prompt) for prompt in prompts]
    rows = min(config.batch_size, len(prompts))
    for start in range(0, len(prompts), rows):
        part = slice(start, start + rows)
        rollout = sampler.sample(
            loaded.params,
            encoded[part],
            jax.random.fold_in(jax.random.key(config.seed), first + start),
            num_generations=config.num_generations,
            batch_prompts=rows,
        )
        repeated = [prompt.text for prompt in prompts[part] for _ in range(config.num_generations)]
        texts = context.decode(rollout.completions())
        for i, (prompt, text) in enumerate(zip(repeated, texts, strict=True)):
            yield {
                "prompt": prompt,
                "completion": text,
                "length": int(rollout.lengths[i]),
                "finished": bool(rollout.finished[i]),
            }


def _encode(context: Context, prompt: Prompt) -> list[int]:
    try:
        ids = render_prompt(context.tokenizer, prompt.text)
    except InputError as error:
        raise InputError(f"{prompt.where}: {error}") from error
    if len(ids) > context.config.max_prompt_length:
        raise InputError(
            f"{prompt.where}: the prompt has {len(ids)} tokens; the run's max_prompt_length="
            f"{context.config.max_prompt_length} is the most"
        )
    return ids


def read_prompts(path: str | Path) -> list[Prompt]:
    """Prompts of a JSONL file's column `prompt`, or else the lines of a text file.

    Raises:
        InputError: no such file, a malformed row, or no prompt in it.
    """
    path = Path(path)
    if path.suffix == ".jsonl":
        records = load_records(path, required=("prompt",))
        return [Prompt(record.row["prompt"], record.where) for record in records]
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read prompts from {path}: {error}") from error
    numbered = enumerate(lines, start=1)
    prompts = [Prompt(line.strip(), f"{path}:{n}") for n, line in numbered if line.strip()]
    if not prompts:
        raise InputError(f"{path} has no prompt; write one a line")
    return prompts
