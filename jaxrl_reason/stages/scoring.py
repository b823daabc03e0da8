"""The rewards of a batch on their way: started as completions end, put together at the end.

Which process computes a reward and in what order completions end changes no result: each value is
written to the place of its completion.

Of several processes each scores groups of its own and tells the others; where a reward is given a
whole batch, the first scores all. A model on the devices is asked by all processes about the whole
batch, as the devices belong to all.
"""

import functools
import queue
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any, NamedTuple

import numpy as np

from jaxrl_reason import processes
from jaxrl_reason.errors import InputError
from jaxrl_reason.rewards import Scores
from jaxrl_reason.rewards.workers import Workers, result
from jaxrl_reason.stages.judge import Judge, Read
from jaxrl_reason.stages.reward_config import Scope
from jaxrl_reason.tasks import Problem


class Scored(NamedTuple):
    """Rewards of completions; column m belongs to the m-th reward."""

    rewards: np.ndarray  # [B, M]
    mask: np.ndarray  # [B, M], false where a reward does not apply

    @classmethod
    def empty(cls, count: int, num_rewards: int) -> "Scored":
        """Room for the rewards of `count` completions."""
        return cls(np.zeros((count, num_rewards), np.float32), np.zeros((count, num_rewards), bool))

    def groups(self, size: int) -> list["Scored"]:
        """Those of each problem, of `size` completions each."""
        starts = range(0, len(self.rewards), size)
        return [Scored(self.rewards[i : i + size], self.mask[i : i + size]) for i in starts]

    def varies(self, columns: Sequence[int] | None = None) -> bool:
        """Whether any of these rewards, or of all, differs between completions it applies to."""
        chosen = range(self.rewards.shape[1]) if columns is None else columns
        applying = (self.rewards[self.mask[:, m], m] for m in chosen)
        return any(bool((values != values[:1]).any()) for values in applying)

    def write(self, rows: slice, columns: list[int], scores: Scores) -> None:
        """Put some rewards of some completions into their place."""
        self.rewards[rows, columns], self.mask[rows, columns] = scores


class _Found(NamedTuple):
    """What a process has scored."""

    groups: dict[int, Scored]
    columns: list[int]
    """Rewards of scope `batch`."""
    batch: Scored


class _Group:
    """A problem's completions, as far as they have come."""

    def __init__(self, size: int, num_rewards: int):
        self.reads: dict[int, Read] = {}
        self.scored = Scored.empty(size, num_rewards)
        self.open = size
        """Parts of its rewards of scope `completion` and `group` that are still to come."""


class Scoring:
    """Collects the rewards of one batch; used by one thread, which calls `poll` now and then.

    Args:
        judge: reads completions and calls the reward functions.
        workers: of this judge.
        num_generations: completions of a group.
        num_groups: rewards of scope `batch` are given the groups 0 .. num_groups - 1.
    """

    def __init__(self, judge: Judge, workers: Workers, *, num_generations: int, num_groups: int):
        self._judge, self._workers = judge, workers
        self._size, self._num_groups = num_generations, num_groups
        self._groups: dict[int, _Group] = {}
        self._unread = num_generations * num_groups
        self._of_batch = Scored.empty(self._unread, len(judge.names))
        self._columns_of_batch: list[int] = []
        self._failed: InputError | None = None
        self._ended: queue.SimpleQueue[tuple[Callable[[Any], None], Future]] = queue.SimpleQueue()
        self._open = 0
        self._for_devices: dict[tuple[int, int], tuple[Problem, list[int]]] = {}

    def add(self, number: int, index: int, problem: Problem, ids: list[int]) -> None:
        """Start the rewards of completion `index` of group `number`, if they are this process's."""
        if self._judge.on_devices:
            self._for_devices[number, index] = problem, ids
        if self._scorer(number) != processes.number():
            return
        if number not in self._groups:
            self._groups[number] = _Group(self._size, len(self._judge.names))
        future = self._workers.submit("read_and_score", self._row(number, index), problem, ids)
        self._follow(future, functools.partial(self._was_read, number, index))

    def poll(self) -> None:
        """Go on with what has ended; never waits."""
        while not self._ended.empty() and self._failed is None:
            try:
                self._go_on()
            except InputError as error:
                if processes.count() == 1:
                    raise
                self._failed = error  # the other processes are told when they ask

    def group(self, number: int) -> Scored:
        """Wait for the rewards, but those of scope `batch`, of a group whose completions ended.

        All processes must ask for it, and for `finish`.
        """
        scorer = self._scorer(number)
        own = scorer == processes.number()
        return processes.together(lambda: self._own_group(number) if own else None)[scorer]

    def finish(self, numbers: Sequence[int]) -> Scored:
        """Wait for everything; the rewards of these groups, in this order.

        Raises:
            InputError: a reward function failed; the message names the reward and the completion.
        """
        found = processes.together(self._own_groups)
        parts = [found[self._scorer(number)].groups[number] for number in numbers]
        scored = Scored(*(np.concatenate(arrays) for arrays in zip(*parts, strict=True)))
        columns, of_batch = found[0].columns, found[0].batch
        if columns:
            here = of_batch.rewards[:, columns], of_batch.mask[:, columns]
            scored.write(slice(None), columns, here)
        if on_devices := self._judge.on_devices:
            places = [(number, index) for number in numbers for index in range(self._size)]
            reads = [self._judge.read(*self._for_devices[place]) for place in places]
            scored.write(slice(None), on_devices, self._judge.score_on_devices(reads))
        return scored

    # What this process scores

    def _scorer(self, number: int) -> int:
        """The process that scores a group."""
        return 0 if self._has_batch_rewards else number % processes.count()

    @functools.cached_property
    def _has_batch_rewards(self) -> bool:
        return any(self._judge.columns("batch", is_async=mode) for mode in (False, True))

    def _own_group(self, number: int) -> Scored:
        group = self._groups[number]
        while group.open:
            self._go_on()
        return group.scored

    def _own_groups(self) -> "_Found":
        while self._open:
            self._go_on()
        scored = {number: group.scored for number, group in self._groups.items()}
        return _Found(scored, self._columns_of_batch, self._of_batch)

    # What follows on what has ended

    def _follow(self, future: Future, then: Callable[[Any], None]) -> None:
        self._open += 1
        future.add_done_callback(lambda ended: self._ended.put((then, ended)))

    def _go_on(self) -> None:
        if self._failed is not None:
            raise self._failed
        then, future = self._ended.get()
        self._open -= 1
        then(result(future))

    def _was_read(self, number: int, index: int, found: tuple[Read, Scores]) -> None:
        (read, scores), group = found, self._groups[number]
        group.reads[index] = read
        here, row = slice(index, index + 1), self._row(number, index)
        write = functools.partial(self._write, number, here)
        group.open += self._launch("completion", [read], row, write, (True,))
        if len(group.reads) == self._size:
            write = functools.partial(self._write, number, slice(None))
            group.open += self._launch("group", self._reads(number), self._row(number, 0), write)
        self._unread -= number < self._num_groups
        if self._unread == 0 and number < self._num_groups:
            reads = [read for n in range(self._num_groups) for read in self._reads(n)]
            self._launch("batch", reads, None, self._write_batch)
        columns = self._judge.columns("completion", is_async=False)
        self._write(number, here, columns, scores)

    def _launch(
        self,
        scope: Scope,
        reads: Sequence[Read],
        first: int | None,
        write: Callable[[list[int], Scores], None],
        modes: Sequence[bool] = (False, True),
    ) -> int:
        """Start the plain and the async rewards of a scope; returns how many parts that are."""
        parts = 0
        for is_async in modes:
            if columns := self._judge.columns(scope, is_async=is_async):
                if is_async:
                    coroutine = self._judge.score_async(scope, reads, first)
                    future = self._workers.submit_async(coroutine)
                else:
                    future = self._workers.submit("score", scope, reads, first)
                self._follow(future, functools.partial(write, columns))
                parts += 1
        return parts

    def _write(self, number: int, rows: slice, columns: list[int], scores: Scores) -> None:
        group = self._groups[number]
        group.scored.write(rows, columns, scores)
        group.open -= 1

    def _write_batch(self, columns: list[int], scores: Scores) -> None:
        self._of_batch.write(slice(None), columns, scores)
        self._columns_of_batch += columns

    def _reads(self, number: int) -> list[Read]:
        """Completions of a group in their order."""
        return [self._groups[number].reads[index] for index in range(self._size)]

    def _row(self, number: int, index: int) -> int:
        return number * self._size + index
