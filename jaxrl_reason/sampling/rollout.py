"""Completions of a list of prompts, from jitted prefill and decode.

Shapes are closed: prompts are padded to one length and their number to one batch size, so a sampler
compiles two programs however many batches it serves.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Bool, Float, Int, Key

from jaxrl_reason.errors import InputError
from jaxrl_reason.models import Model, Params
from jaxrl_reason.sampling.decode import decode, prefill
from jaxrl_reason.sampling.filters import SamplingConfig

_prefill = jax.jit(
    prefill, static_argnames=("model", "num_generations", "max_completion_length", "pad_id")
)
_decode = jax.jit(
    decode,
    static_argnames=("model", "steps", "sampling", "stop_ids", "pad_id"),
    donate_argnames=("state",),
)


@dataclasses.dataclass(frozen=True)
class Rollout:
    """Completions on the host. B = prompts x num_generations, those of a prompt consecutive."""

    prompts: list[list[int]]
    num_generations: int
    tokens: Int[np.ndarray, "B C"]
    """Completion tokens, the stop token included, padding beyond."""
    completion_mask: Bool[np.ndarray, "B C"]
    """True on the tokens of the completion."""
    sampling_logprobs: Float[np.ndarray, "B C"]
    """log q(token): temperature applied, truncated and renormalised."""
    kept_logmass: Float[np.ndarray, "B C"]
    """log of the mass kept by truncation: log p(token) = sampling_logprobs + kept_logmass."""
    finished: Bool[np.ndarray, " B"]
    """The completion ended with a stop token; false where it was cut at the longest length."""

    @property
    def lengths(self) -> Int[np.ndarray, " B"]:
        """Tokens in each completion, the stop token included."""
        return self.completion_mask.sum(axis=1)

    def completions(self) -> list[list[int]]:
        """The token ids of every completion."""
        return [row[:n].tolist() for row, n in zip(self.tokens, self.lengths, strict=True)]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampler:
    """Everything about sampling that is fixed for a stage."""

    model: Model
    mesh: Mesh
    sampling: SamplingConfig
    stop_ids: tuple[int, ...]
    pad_id: int
    max_prompt_length: int
    max_completion_length: int
    steps_per_dispatch: int
    """Decode steps per dispatch; between dispatches the host sees whether all rows are done."""

    def __post_init__(self):
        room = self.model.config.max_position_embeddings
        if self.max_prompt_length + self.max_completion_length > room:
            raise InputError(
                f"max_prompt_length={self.max_prompt_length} plus max_completion_length="
                f"{self.max_completion_length} exceeds the model's max_position_embeddings={room}"
            )

    def sample(
        self,
        params: Params,
        prompts: list[list[int]],
        key: Key,
        *,
        num_generations: int,
        batch_prompts: int | None = None,
    ) -> Rollout:
        """Complete every prompt `num_generations` times.

        Args:
            params: parameters of the model, as they lie for training.
            prompts: token ids; none empty.
            key: the draws of completion g of prompt i depend on (key, i, g) only.
            num_generations: completions per prompt.
            batch_prompts: compile for this many prompts and pad the batch; default, as many as
                there are. Either is rounded up to a multiple of the devices.

        Raises:
            InputError: an empty prompt, or one longer than `max_prompt_length`.
        """
        rows = batch_prompts or len(prompts)
        if not 0 < len(prompts) <= rows:
            raise ValueError(f"got {len(prompts)} prompts for a batch of {rows}")
        devices = self.mesh.shape["data"] * self.mesh.shape["fsdp"]
        rows = -(-rows // devices) * devices
        padded, mask = self._pad(prompts, rows)
        # A row's key is a function of its prompt's index and its own, so padding changes nothing.
        keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(jnp.arange(rows * num_generations))
        over_rows = NamedSharding(self.mesh, PartitionSpec(("data", "fsdp")))
        padded, mask, keys = jax.device_put((padded, mask, keys), over_rows)
        state = _prefill(
            self.model,
            params,
            padded,
            mask,
            num_generations=num_generations,
            max_completion_length=self.max_completion_length,
            pad_id=self.pad_id,
        )
        for _ in range(0, self.max_completion_length, self.steps_per_dispatch):
            state = _decode(
                self.model,
                params,
                state,
                keys,
                steps=self.steps_per_dispatch,
                sampling=self.sampling,
                stop_ids=self.stop_ids,
                pad_id=self.pad_id,
            )
            if bool(jnp.all(state.done)):
                break
        return self._rollout(state, prompts, num_generations)

    def _pad(self, prompts, rows):
        padded = np.full((rows, self.max_prompt_length), self.pad_id, np.int32)
        mask = np.zeros(padded.shape, bool)
        mask[:, 0] = True  # a row without a prompt still needs one token to look at
        for i, prompt in enumerate(prompts):
            if not 0 < len(prompt) <= self.max_prompt_length:
                raise InputError(
                    f"prompt {i} has {len(prompt)} tokens; allowed are 1 to max_prompt_length="
                    f"{self.max_prompt_length}; shorten it or raise max_prompt_length"
                )
            padded[i, : len(prompt)] = prompt
            mask[i, : len(prompt)] = True
        return padded, mask

    def _rollout(self, state, prompts, num_generations) -> Rollout:
        host = jax.device_get((state.tokens, state.logprobs, state.kept_logmass, state.done))
        tokens, logprobs, kept, done = (x[: len(prompts) * num_generations] for x in host)
        stops = np.isin(tokens, self.stop_ids)
        # A token is part of the completion if no stop token lies before it.
        before = np.cumsum(stops, axis=1) - stops
        drawn = np.arange(tokens.shape[1])[None] < int(state.num_tokens)
        return Rollout(
            prompts=prompts,
            num_generations=num_generations,
            tokens=tokens,
            completion_mask=(before == 0) & drawn,
            sampling_logprobs=logprobs,
            kept_logmass=kept,
            finished=done,
        )
