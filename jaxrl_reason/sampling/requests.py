"""What is asked of the engine, and what comes back."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
from jaxtyping import Bool, Float, Int

FinishReason = Literal["stop", "length", "aborted"]


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Shown:
    """Images and videos among the tokens of a prompt, already encoded.

    The completions of a prompt share one object: it is part of what identifies the prompt.
    """

    positions: Int[np.ndarray, "T 3"]
    """Time, row and column of every token of the prompt."""
    next_position: int
    """Of the first token behind the prompt, on all axes."""
    visual_index: Int[np.ndarray, " T"]
    """The feature that a token takes; -1 for text."""
    features: Float[np.ndarray, "M D"]
    """What `Model.visual_features` gives."""
    deep_features: Float[np.ndarray, "K M D"] | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
    """One completion of one prompt. Its draws depend on (key, id, index, token number) only."""

    prompt: Sequence[int]
    """Token ids; not empty."""
    id: int
    """Number of the prompt, below 2**32."""
    shown: Shown | None = None
    """What the prompt shows, in an engine with `visual_tokens`."""
    index: int = 0
    """Number of the completion among those of the prompt."""
    forced: Sequence[int] = ()
    """Tokens that the completion begins with; they are given and not drawn."""
    max_tokens: int | None = None
    """Longest completion, forced tokens included; the engine's own limit when None."""
    stop: Sequence[str] = ()
    """The completion ends once its text contains one of these."""
    logit_bias: Mapping[int, float] = dataclasses.field(default_factory=dict)
    """Added to the logits of these tokens; -inf forbids one. Log-probs include it."""
    resume: "Completion | None" = None
    """An aborted completion of this request to go on with, under whatever weights are now there."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Completion:
    """The n tokens of a completion and how they came about; the stop token is among them."""

    request: Request
    tokens: Int[np.ndarray, " n"]
    logprobs: Float[np.ndarray, " n"]
    """log q(token): temperature applied, truncated and renormalised; 0 where forced."""
    kept_logmass: Float[np.ndarray, " n"]
    """log of the mass that truncation kept: log p(token) = logprobs + kept_logmass."""
    sampled: Bool[np.ndarray, " n"]
    """False where the token was forced."""
    versions: Int[np.ndarray, " n"]
    """Version of the weights that drew the token; -1 where forced."""
    finish_reason: FinishReason

    @classmethod
    def begin(cls, request: Request) -> "Completion":
        """What of the completion is known before anything is drawn."""
        if request.resume is not None:
            return dataclasses.replace(request.resume, request=request)
        count = len(request.forced)
        return cls(
            request=request,
            tokens=np.asarray(request.forced, np.int32),
            logprobs=np.zeros(count, np.float32),
            kept_logmass=np.zeros(count, np.float32),
            sampled=np.zeros(count, bool),
            versions=np.full(count, -1, np.int32),
            finish_reason="aborted",
        )

    def extended(
        self, tokens: np.ndarray, logprobs: np.ndarray, kept_logmass: np.ndarray, version: int
    ) -> "Completion":
        """With tokens drawn under the weights of a version."""
        join = lambda old, new: np.concatenate([old, np.asarray(new, old.dtype)])
        return dataclasses.replace(
            self,
            tokens=join(self.tokens, tokens),
            logprobs=join(self.logprobs, logprobs),
            kept_logmass=join(self.kept_logmass, kept_logmass),
            sampled=join(self.sampled, np.ones(len(tokens), bool)),
            versions=join(self.versions, np.full(len(tokens), version)),
        )

    def ended(self, reason: FinishReason, length: int | None = None) -> "Completion":
        """Finished for a reason, cut to a length."""
        names = ("tokens", "logprobs", "kept_logmass", "sampled", "versions")
        cut = {name: getattr(self, name)[:length] for name in names}
        return dataclasses.replace(self, finish_reason=reason, **cut)


def group_requests(
    prompts: Sequence[Sequence[int]],
    shown: Sequence[Shown] | None = None,
    *,
    num_generations: int = 1,
    first: int = 0,
) -> list[Request]:
    """`num_generations` completions of each prompt, those of a prompt consecutive.

    Args:
        prompts: token ids.
        shown: what each prompt shows.
        num_generations: completions per prompt.
        first: number of the first prompt; the others follow.
    """
    return [
        Request(prompt=prompt, id=first + i, index=index, shown=None if shown is None else shown[i])
        for i, prompt in enumerate(prompts)
        for index in range(num_generations)
    ]
