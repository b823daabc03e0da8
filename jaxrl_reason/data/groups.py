"""Groups of completions in rows that hold every prompt once.

A document of a row is a prompt, the trunk, and completions that each continue it, its branches.
A row of the prompt `p q` with the completions `a b` and `c d e`, one of whose tokens was not
sampled but forced, `c`, and of other documents behind them:

    tokens        p q a b c d e        targets       a b d e
    segment_ids   1 1 1 1 1 1 1        sources       1 2 4 5
    branch_ids    0 0 1 1 2 2 2        sequence_ids  1 1 2 2
    positions     0 1 2 3 2 3 4

On the left is what the model reads, one entry a slot. On the right are the tokens that count in the
loss, packed to the front: a target is predicted at the slot that is its source, the one before it,
or the last of the prompt where a branch begins.
"""

import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from jaxrl_reason.data.batching import Batch
from jaxrl_reason.data.vision import VisionRow, join_rows
from jaxrl_reason.errors import InputError


class Document(NamedTuple):
    """One prompt in a row and the completions that follow it, by number."""

    prompt: int
    completions: tuple[int, ...]


def pack_groups(
    prompt_lengths: Sequence[int],
    groups: Sequence[Mapping[int, int]],
    row_length: int,
    *,
    multiple: int = 1,
) -> list[list[Document]]:
    """Which completions share a row, and in it a prompt.

    The number of rows is the least multiple of `multiple` for which a greedy search succeeds. It
    takes the largest group first, puts it into the fullest row that holds it, and where none does,
    as much as fits into the emptiest row and then the rest, with the prompt repeated.

    Args:
        prompt_lengths: of each group's prompt, in tokens.
        groups: for each group the lengths of its completions by their numbers, any number of them.
        row_length: tokens in a row.
        multiple: rows are worked on so many at a time, so fewer save nothing.

    Returns:
        Rows, none of them empty. With prompt and completion together at most s tokens, N
        completions take at most N / floor(row_length / s) rows, rounded up.

    Raises:
        InputError: a prompt and one of its completions are longer than a row.
    """
    live = [g for g, lengths in enumerate(groups) if lengths]
    for g in live:
        longest = prompt_lengths[g] + max(groups[g].values())
        if longest > row_length:
            raise InputError(
                f"prompt {g} and its longest completion have {longest} tokens but a row holds "
                f"row_length={row_length}; raise row_length"
            )
    sizes = {g: prompt_lengths[g] + sum(groups[g].values()) for g in live}
    order = sorted(live, key=lambda g: (-sizes[g], g))
    count = multiple * -(-sum(sizes.values()) // (row_length * multiple))
    while True:
        rows = _fit(prompt_lengths, groups, order, [row_length] * count)
        if rows is not None:
            return [
                [Document(g, tuple(numbers)) for g, numbers in row.items()] for row in rows if row
            ]
        count += multiple


def _fit(
    prompt_lengths: Sequence[int],
    groups: Sequence[Mapping[int, int]],
    order: Iterable[int],
    room: list[int],
) -> list[dict[int, list[int]]] | None:
    """For each row the completions by group, or None where the rows are too few."""
    rows: list[dict[int, list[int]]] = [{} for _ in room]
    for g in order:
        lengths, prompt = groups[g], prompt_lengths[g]
        left = sorted(lengths, key=lambda i: (-lengths[i], i))
        while left:
            size = prompt + sum(lengths[i] for i in left)
            enough = [r for r in range(len(room)) if room[r] >= size]
            row = (
                min(enough, key=room.__getitem__)
                if enough
                else max(range(len(room)), key=room.__getitem__)
            )
            # A row that holds the prompt already was filled with all that fits.
            free, taken = room[row] - prompt, []
            for i in left:
                if lengths[i] <= free:
                    taken.append(i)
                    free -= lengths[i]
            if not taken or g in rows[row]:
                return None
            rows[row][g], room[row] = taken, free
            left = [i for i in left if i not in set(taken)]
    return rows


class GroupRows(NamedTuple):
    """Rows as arrays, and which token of which completion each of their targets is."""

    batch: Batch
    numbers: Int[np.ndarray, "R M"]
    """The completion of each target, by number."""
    offsets: Int[np.ndarray, "R M"]
    """The place of each target in its completion."""

    def spread(
        self, values: Float[np.ndarray, " B"] | Float[np.ndarray, "B C"]
    ) -> Float[np.ndarray, "R M"]:
        """Values of completions, or of their tokens, at their targets; 0 elsewhere."""
        chosen = values[self.numbers] if values.ndim == 1 else values[self.numbers, self.offsets]
        return np.where(self.batch["completion_mask"], chosen, 0).astype(np.float32)


def fill_groups(
    rows: Sequence[Sequence[Document]],
    prompts: Sequence[Sequence[int]],
    completions: Mapping[int, Int[np.ndarray, " n"]],
    counted: Mapping[int, Bool[np.ndarray, " n"]],
    row_length: int,
    *,
    pad_id: int,
    num_rows: int,
) -> GroupRows:
    """Rows of documents as arrays, laid out as the head of this file shows.

    Args:
        rows: from `pack_groups`.
        prompts: token ids of every group's prompt.
        completions: token ids of every completion in `rows`, by number.
        counted: which of those tokens count in the loss.
        row_length: tokens in a row, T; there is room for as many targets.
        pad_id: id of unused tokens.
        num_rows: pad with empty rows up to this many.

    Returns:
        A batch of `tokens, positions, segment_ids, branch_ids, targets, sources, sequence_ids`
        int32 and `completion_mask` bool, all [num_rows, T]. Segments, branches and sequences of a
        row are numbered from 1; 0 is padding, and among branches the trunk too.
    """
    entries = {name: np.zeros((num_rows, row_length), np.int32) for name in (*_SLOTS, *_TARGETS)}
    entries["tokens"][:] = entries["targets"][:] = pad_id
    mask = np.zeros((num_rows, row_length), bool)
    for r, documents in enumerate(rows):
        slots, targets = _row(documents, prompts, completions, counted)
        if len(slots) > row_length:
            raise ValueError(f"row {r} needs {len(slots)} tokens but holds {row_length}")
        for names, values in ((_SLOTS, slots), (_TARGETS, targets)):
            for name, column in zip(names, values.T, strict=True):
                entries[name][r, : len(column)] = column
        mask[r, : len(targets)] = True
    numbers, offsets = entries.pop("numbers"), entries.pop("offsets")
    return GroupRows({**entries, "completion_mask": mask}, numbers, offsets)


_SLOTS = ("tokens", "segment_ids", "branch_ids", "positions")
_TARGETS = ("targets", "sources", "sequence_ids", "numbers", "offsets")


def _row(
    documents: Sequence[Document],
    prompts: Sequence[Sequence[int]],
    completions: Mapping[int, Int[np.ndarray, " n"]],
    counted: Mapping[int, Bool[np.ndarray, " n"]],
) -> tuple[Int[np.ndarray, "n 4"], Int[np.ndarray, "m 5"]]:
    """What a row holds: a line for every slot, and one for every target."""
    lines = lambda *columns: np.stack(np.broadcast_arrays(*columns), axis=1)
    slots, targets, at, branches = [], [], 0, itertools.count(1)
    for segment, (g, numbers) in enumerate(documents, start=1):
        prompt = np.asarray(prompts[g])
        slots.append(lines(prompt, segment, 0, np.arange(len(prompt))))
        at += len(prompt)
        end_of_prompt = at - 1
        for number in numbers:
            tokens, branch = completions[number], next(branches)
            slots.append(lines(tokens, segment, branch, len(prompt) + np.arange(len(tokens))))
            (offsets,) = np.nonzero(counted[number])
            sources = np.where(offsets == 0, end_of_prompt, at + offsets - 1)
            targets.append(lines(tokens[offsets], sources, branch, number, offsets))
            at += len(tokens)
    return np.concatenate(slots), np.concatenate(targets)


def show_groups(
    rows: Sequence[Sequence[Document]],
    shown: Sequence[VisionRow],
    lengths: Mapping[int, int],
    row_length: int,
) -> list[VisionRow]:
    """What the rows of `fill_groups` show, and the positions of their tokens.

    Args:
        rows: from `pack_groups`.
        shown: of every group's prompt.
        lengths: tokens of every completion in `rows`, by number.
        row_length: tokens in a row.
    """
    return [
        join_rows(
            [continued(shown[g], [lengths[i] for i in numbers]) for g, numbers in documents],
            row_length=row_length,
        )
        for documents in rows
    ]


def continued(prompt: VisionRow, lengths: Sequence[int]) -> VisionRow:
    """A prompt's row with continuations of text, each of which begins where the prompt ends."""
    behind = [np.repeat(prompt.next_position + np.arange(n), 3).reshape(-1, 3) for n in lengths]
    return prompt._replace(
        positions=np.concatenate([prompt.positions, *behind]).astype(np.int32),
        visual_index=np.concatenate([prompt.visual_index, np.full(sum(lengths), -1, np.int32)]),
    )
