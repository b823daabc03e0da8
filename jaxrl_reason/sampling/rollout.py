"""Completions of a batch of prompts as arrays on the host."""

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float, Int, Key

from jaxrl_reason.models import Params
from jaxrl_reason.sampling.engine import Engine
from jaxrl_reason.sampling.requests import Completion, Shown, group_requests


@dataclasses.dataclass(frozen=True)
class Rollout:
    """Completions on the host. B = prompts x num_generations, those of a prompt consecutive."""

    prompts: list[list[int]]
    num_generations: int
    tokens: Int[np.ndarray, "B C"]
    """Completion tokens, the stop token included, padding beyond."""
    completion_mask: Bool[np.ndarray, "B C"]
    """True on the tokens of the completion."""
    sampled: Bool[np.ndarray, "B C"]
    """True on those that were drawn and not forced."""
    sampling_logprobs: Float[np.ndarray, "B C"]
    """log q(token): temperature applied, truncated and renormalised."""
    kept_logmass: Float[np.ndarray, "B C"]
    """log of the mass kept by truncation: log p(token) = sampling_logprobs + kept_logmass."""
    versions: Int[np.ndarray, "B C"]
    """Version of the weights that drew the token; -1 where none did."""
    finished: Bool[np.ndarray, " B"]
    """The completion ended with a stop token; false where it was cut at the longest length."""

    @classmethod
    def of(
        cls,
        prompts: Sequence[Sequence[int]],
        num_generations: int,
        completions: Sequence[Completion],
        *,
        pad_id: int,
        max_completion_length: int,
    ) -> "Rollout":
        """From completions sorted by prompt, then by their number."""
        shape = (len(completions), max_completion_length)
        tokens = np.full(shape, pad_id, np.int32)
        mask, sampled = np.zeros(shape, bool), np.zeros(shape, bool)
        logprobs, kept = np.zeros(shape, np.float32), np.zeros(shape, np.float32)
        versions = np.full(shape, -1, np.int32)
        for i, completion in enumerate(completions):
            here = (i, slice(len(completion.tokens)))
            tokens[here], mask[here] = completion.tokens, True
            sampled[here], versions[here] = completion.sampled, completion.versions
            logprobs[here], kept[here] = completion.logprobs, completion.kept_logmass
        return cls(
            prompts=[list(prompt) for prompt in prompts],
            num_generations=num_generations,
            tokens=tokens,
            completion_mask=mask,
            sampled=sampled,
            sampling_logprobs=logprobs,
            kept_logmass=kept,
            versions=versions,
            finished=np.asarray([c.finish_reason == "stop" for c in completions]),
        )

    @property
    def lengths(self) -> Int[np.ndarray, " B"]:
        """Tokens in each completion, the stop token included."""
        return self.completion_mask.sum(axis=1)

    def completions(self) -> list[list[int]]:
        """The token ids of every completion."""
        return [row[:n].tolist() for row, n in zip(self.tokens, self.lengths, strict=True)]


def sample(
    engine: Engine,
    params: Params,
    prompts: Sequence[Sequence[int]],
    key: Key,
    *,
    num_generations: int = 1,
    pad_id: int,
    shown: Sequence[Shown] | None = None,
) -> Rollout:
    """Complete every prompt `num_generations` times.

    Args:
        engine: what samples.
        params: parameters of its model, as they lie for training.
        prompts: token ids; none empty.
        key: the draws of completion g of prompt i depend on (key, i, g) only.
        num_generations: completions per prompt.
        pad_id: fills the arrays beyond the completions.
        shown: what each prompt shows, for an engine with `visual_tokens`.

    Raises:
        InputError: an empty prompt, or one longer than the engine's `max_prompt_length`.
    """
    session = engine.session(params, key)
    session.submit(group_requests(prompts, shown, num_generations=num_generations))
    done = sorted(session, key=lambda completion: (completion.request.id, completion.request.index))
    return Rollout.of(
        prompts,
        num_generations,
        done,
        pad_id=pad_id,
        max_completion_length=engine.max_completion_length,
    )
