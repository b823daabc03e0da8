"""Completions of a step in the rows that a policy update reads."""

import dataclasses
import math
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Bool, Float, Int

from jaxrl_reason.data.batching import Batch, visual_rows
from jaxrl_reason.data.groups import (
    Document,
    GroupRows,
    fill_groups,
    pack_groups,
    show_groups,
)
from jaxrl_reason.data.vision import VisionRow, without_patches
from jaxrl_reason.errors import InputError
from jaxrl_reason.losses import LOSS_TYPES
from jaxrl_reason.sharding import batch_multiple, own_rows, place_batch

_LONG_ROW = 1024
_WHOLE_GROUP = 2048
_TILE = 64
_MICROBATCH = 8192


class Sight(NamedTuple):
    """What a prompt shows."""

    row: VisionRow
    features: Float[np.ndarray, "M D"] | None = None
    """Of its images and videos, where the update does not train what makes them."""
    deep_features: Float[np.ndarray, "K M D"] | None = None


class Completions(Protocol):
    """What is read of a rollout; `sampling.Rollout` has it."""

    prompts: list[list[int]]
    num_generations: int
    tokens: Int[np.ndarray, "B C"]
    completion_mask: Bool[np.ndarray, "B C"]
    sampled: Bool[np.ndarray, "B C"]
    sampling_logprobs: Float[np.ndarray, "B C"]
    kept_logmass: Float[np.ndarray, "B C"]


def may_drop(loss_type: str, *, beta: float) -> bool:
    """Whether completions without advantage can be left out of an update, which stays the same."""
    return beta == 0 and LOSS_TYPES[loss_type].separable


@dataclasses.dataclass(frozen=True, kw_only=True)
class PolicyRows:
    """Packs completions into rows of one shape, in which a prompt stands once for its group."""

    mesh: Mesh
    """Devices that the rows of a microbatch are cut over."""
    pad_id: int
    """Id of unused tokens."""
    max_prompt_length: int
    """Longest prompt, in tokens."""
    max_completion_length: int
    """Longest completion, in tokens."""
    completions: int
    """Most completions of a step."""
    num_generations: int
    """Most completions of a group."""
    microbatch_tokens: int | None
    """Tokens of a microbatch, rounded down to whole rows of every device, but at least one; by
    default one row of each on CPUs, and 8192 tokens of each on others."""
    drop: bool
    """Leave out completions whose advantage is 0. Only for what `may_drop` allows."""
    row_length: int | None = None
    """Tokens of a row; by default a group's, from 1024 to 2048 if the lengths above allow it."""
    visual_tokens: int = 0
    """Most tokens of a prompt that stand for images and videos; 0: prompts are text alone."""
    patches_per_token: int = 1
    """Patches that one of them stands for."""
    prefix_sharing: bool = True
    """False gives every completion its own row with its own prompt, the plain layout."""

    def __post_init__(self):
        longest = self.max_prompt_length + self.max_completion_length
        if self.row_length is not None and self.row_length < longest:
            raise InputError(
                f"row_length={self.row_length} is less than max_prompt_length="
                f"{self.max_prompt_length} plus max_completion_length="
                f"{self.max_completion_length}; raise it to at least {longest}"
            )

    @property
    def length(self) -> int:
        """Tokens of a row, T."""
        longest = self.max_prompt_length + self.max_completion_length
        if self.row_length is not None:
            return self.row_length
        if not self.prefix_sharing:
            return longest
        group = self.max_prompt_length + self.num_generations * self.max_completion_length
        # Longer rows than the devices have tokens for would stay empty.
        groups = self.completions / self.num_generations
        share = math.ceil(groups * group / batch_multiple(self.mesh))
        wanted = group if group <= _WHOLE_GROUP else _LONG_ROW
        return _TILE * math.ceil(max(longest, min(wanted, share)) / _TILE)

    @property
    def shape(self) -> tuple[int, int]:
        """Microbatches of a batch and rows of a microbatch: enough for any lengths."""
        devices = batch_multiple(self.mesh)
        tokens = self.microbatch_tokens
        if tokens is None:
            on_cpu = self.mesh.devices.flat[0].platform == "cpu"
            tokens = devices * (self.length if on_cpu else _MICROBATCH)
        rows = devices * max(1, tokens // (self.length * devices))
        return math.ceil(self._most_rows / rows), rows

    @property
    def _most_rows(self) -> int:
        """Rows that completions fill if all are as long as they may be."""
        prompt, completion = self.max_prompt_length, self.max_completion_length
        if self.visual_tokens:
            groups = math.ceil(self.completions / self.num_generations)
            together = (self.length - prompt) // completion
            return groups * math.ceil(self.num_generations / together)
        together = self.length // (prompt + completion) if self.prefix_sharing else 1
        return math.ceil(self.completions / together)

    def place(
        self,
        rollout: Completions,
        advantages: Float[np.ndarray, " B"],
        counts: Bool[np.ndarray, " B"] | None = None,
        sights: Sequence[Sight] | None = None,
    ) -> tuple[dict[str, jax.Array], dict[str, float]]:
        """`arrays` on the mesh; each process fills the rows of its own devices."""
        rows = self.shape[1]
        own = own_rows(self.mesh, rows)
        cut, info = self.arrays(rollout, advantages, counts, sights, own=own)
        return place_batch(cut, self.mesh, batch_axis=1, rows=rows), info

    def arrays(
        self,
        rollout: Completions,
        advantages: Float[np.ndarray, " B"],
        counts: Bool[np.ndarray, " B"] | None = None,
        sights: Sequence[Sight] | None = None,
        *,
        own: Int[np.ndarray, " R"] | None = None,
    ) -> tuple[Batch, dict[str, float]]:
        """A batch as `make_policy_step` reads it, [k, rows, ...].

        Every batch has one shape, whatever its lengths; microbatches that stay empty are the last
        ones and cost nothing.

        Args:
            rollout: completions, those of a prompt consecutive.
            advantages: one of each completion.
            counts: completions that count in the loss; all by default.
            sights: what each prompt shows, with `visual_tokens`.
            own: rows of each microbatch that are wanted, ascending; all by default.

        Returns:
            The arrays, and, of all rows, `tokens` (prompts and completions in them), `counted` (of
            these under the mask of the loss), `padding_share` (of the slots that are worked on),
            `dropped_completions` and `dropped_groups` (that nothing is left of).
        """
        counted = rollout.completion_mask & rollout.sampled
        if counts is not None:
            counted = counted & counts[:, None]
        sizes = counted.sum(axis=1)
        dropped = (sizes > 0) & (advantages == 0) & self.drop
        kept = (sizes > 0) & ~dropped
        made, packed = self._fill(rollout, counted, kept)
        used = math.ceil(len(packed) / self.shape[1])
        batch = made.batch
        batch["advantages"] = made.spread(advantages)
        batch["sampling_logprobs"] = made.spread(rollout.sampling_logprobs + rollout.kept_logmass)
        batch["old_logprobs"] = batch["sampling_logprobs"]
        batch["importance_weights"] = made.spread(np.ones(len(advantages)))
        of_rows = np.zeros((2, len(batch["tokens"])), np.int32)
        of_rows[:, 0] = dropped.sum(), sizes[dropped].sum()
        batch["dropped_sequences"], batch["dropped_tokens"] = of_rows
        tokens = np.count_nonzero(batch["segment_ids"])
        slots = used * self.shape[1] * self.length
        groups = lambda rows: rows.reshape(-1, rollout.num_generations).any(axis=1)
        info = {
            "tokens": tokens,
            "counted": np.count_nonzero(batch["completion_mask"]),
            "padding_share": 1 - tokens / slots if slots else 0.0,
            "dropped_completions": dropped.sum(),
            "dropped_groups": (groups(dropped) & ~groups(kept)).sum(),
        }
        rows = np.arange(math.prod(self.shape)).reshape(self.shape)
        rows = rows if own is None else rows[:, own]
        batch = {name: x[rows] for name, x in batch.items()}
        if self.visual_tokens:
            lengths = rollout.completion_mask.sum(axis=1)
            wanted = [packed[r] for r in rows.ravel() if r < len(packed)]
            for name, x in self._show(wanted, sights, lengths, rows.size).items():
                batch[name] = x.reshape(*rows.shape, *x.shape[1:])
        return batch, {name: float(value) for name, value in info.items()}

    def _fill(self, rollout, counted, kept) -> tuple[GroupRows, list[list[Document]]]:
        """The rows, and the documents of those that are not empty."""
        count, rows = self.shape
        lengths = rollout.completion_mask.sum(axis=1)
        numbers = [int(i) for i in np.flatnonzero(kept)]
        groups: list[dict[int, int]] = [{} for _ in rollout.prompts]
        for i in numbers:
            groups[i // rollout.num_generations][i] = int(lengths[i])
        sizes = [len(prompt) for prompt in rollout.prompts]
        if self.visual_tokens:
            # Each group has rows of its own, which then have room for one prompt's images.
            packed = [
                [Document(g, document.completions) for document in row]
                for g, group in enumerate(groups)
                for row in pack_groups([sizes[g]], [group], self.length, multiple=1)
            ]
        elif self.prefix_sharing:
            packed = pack_groups(sizes, groups, self.length, multiple=rows)
        else:
            packed = [[Document(g, (i,))] for g, group in enumerate(groups) for i in group]
        # Rows with as many targets lie together: the output head works on the most of a microbatch.
        targets = lambda row: sum(int(counted[i].sum()) for _, ids in row for i in ids)
        packed.sort(key=targets, reverse=True)
        made = fill_groups(
            packed,
            rollout.prompts,
            {i: rollout.tokens[i, : lengths[i]] for i in numbers},
            {i: counted[i, : lengths[i]] for i in numbers},
            self.length,
            pad_id=self.pad_id,
            num_rows=count * rows,
        )
        return made, packed

    def _show(self, packed, sights: Sequence[Sight], lengths, num_rows: int) -> Batch:
        """Positions, and the images and videos of each row: patches, or features of them."""
        shape = (num_rows, self.length)
        trained = any(sight.features is None for sight in sights)
        # Features stand in for patches, which would take far more room.
        of_prompts = [sight.row if trained else without_patches(sight.row) for sight in sights]
        by_number = {i: int(n) for i, n in enumerate(lengths)}
        shown = show_groups(packed, of_prompts, by_number, self.length)
        patches = self.visual_tokens * self.patches_per_token if trained else 0
        arrays = visual_rows([[row] for row in shown], shape, patches, like=of_prompts[0])
        if trained:
            return arrays
        names = [
            name for name in ("features", "deep_features") if getattr(sights[0], name) is not None
        ]
        found = {name: arrays[name] for name in ("positions", "visual_index")}
        for name in names:
            first = getattr(sights[0], name)
            found[name] = np.zeros(
                (num_rows, *first.shape[:-2], self.visual_tokens, first.shape[-1]), np.float32
            )
            for r, ((group, _),) in enumerate(packed):
                values = getattr(sights[group], name)
                found[name][r, ..., : values.shape[-2], :] = values
        return found
