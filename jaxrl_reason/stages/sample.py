"""Completing prompts with a checkpoint."""

from collections import deque
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxrl_reason.config import Config
from jaxrl_reason.data.records import load_records
from jaxrl_reason.errors import InputError, nearest
from jaxrl_reason.sampling import Completion, Request, SamplingConfig
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
    begin: str = ""
    """Text that every completion begins with; it is given and not drawn."""
    stop: tuple[str, ...] = ()
    """Texts that end a completion."""
    logit_bias: Mapping[str, float] = {}
    """Added to the logits of tokens, given as the vocabulary writes them; at most 16."""


class Prompt(NamedTuple):
    """A prompt and its place, such as `prompts.txt:3`."""

    text: str
    where: str


def complete(
    loaded: Loaded,
    prompts: list[Prompt],
    config: SampleConfig,
    *,
    first: int = 0,
    on_text: Callable[[str], None] | None = None,
) -> Iterator[dict[str, Any]]:
    """Rows of prompt, completion, length in tokens, and whether it ended by itself.

    Args:
        loaded: the model.
        prompts: what to complete.
        config: how to draw.
        first: number of the first prompt, so that later calls draw anew.
        on_text: called with the text so far of the completion that grows (streaming).

    Raises:
        InputError: a prompt that the vocabulary cannot express or that is too long, by its place;
            a text or a token of the configuration that it cannot express.
    """
    context = loaded.context
    text_of = lambda tokens: context.decode([tokens])[0]
    engine = context.engine(
        config.sampling,
        config.max_completion_length,
        max_rows=min(config.batch_size, len(prompts)) * config.num_generations,
        group_size=config.num_generations,
    )
    requests = [
        Request(
            prompt=_encode(context, prompt),
            id=number,
            index=index,
            forced=context.encoder.begin(prompt.text, config.begin) if config.begin else (),
            stop=config.stop,
            logit_bias=_biases(context, config.logit_bias),
        )
        for number, prompt in enumerate(prompts, start=first)
        for index in range(config.num_generations)
    ]
    so_far: dict[tuple[int, int], list[int]] = {}

    def on_tokens(request: Request, tokens: np.ndarray) -> None:
        known = so_far.setdefault((request.id, request.index), list(request.forced))
        known += tokens.tolist()
        on_text(text_of(known))

    session = engine.session(
        loaded.params, jax.random.key(config.seed), on_tokens=on_tokens if on_text else None
    )
    session.submit(requests)
    # In the order of the prompts, each as soon as all before it have ended.
    ended: dict[tuple[int, int], Completion] = {}
    waiting = deque(requests)
    for completion in session:
        ended[completion.request.id, completion.request.index] = completion
        while waiting and (waiting[0].id, waiting[0].index) in ended:
            request = waiting.popleft()
            completion = ended.pop((request.id, request.index))
            yield {
                "prompt": prompts[request.id - first].text,
                "completion": text_of(completion.tokens.tolist()),
                "length": len(completion.tokens),
                "finished": completion.finish_reason == "stop",
            }


def _biases(context: Context, given: Mapping[str, float]) -> dict[int, float]:
    vocabulary = context.tokenizer.get_vocab()
    unknown = [token for token in given if token not in vocabulary]
    if unknown:
        raise InputError(
            f"logit_bias: {unknown[0]!r} is no token of the vocabulary; "
            f"{nearest(unknown[0], vocabulary)}"
        )
    return {vocabulary[token]: bias for token, bias in given.items()}


def _encode(context: Context, prompt: Prompt) -> list[int]:
    try:
        ids = context.encoder.prompt({"prompt": prompt.text})
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
