"""The tasks of a run: its main one, and others that some stages and evaluations name."""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

from jaxrl_reason.errors import InputError
from jaxrl_reason.stages.dataset_task import DatasetTask
from jaxrl_reason.tasks import Problem, Task, Verdict

_OWNER = "task"
"""Column of a problem of another task than the main one: the task's name in the run."""


class Place(NamedTuple):
    """Where a training problem comes from."""

    index: int
    difficulty: int | None
    task: str | None


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class TaskSet:
    """Tasks of a run; problems know which of them they belong to.

    Attributes:
        main: the run's own task.
        others: further tasks by name.
    """

    main: Task
    others: Mapping[str, Task] = dataclasses.field(default_factory=dict)

    def named(self, name: str | None) -> Task:
        """A task by its name; the main one for None."""
        return self.main if name is None else self.others[name]

    def of(self, problem: Problem) -> Task:
        """The task that a problem belongs to."""
        return self.others[problem.columns[_OWNER]] if self._is_other(problem) else self.main

    def generate(
        self, split: str, index: int, difficulty: int | None = None, *, task: str | None = None
    ) -> Problem:
        """Problem number `index` of a split of a task."""
        problem = self.named(task).generate(split, index, difficulty)
        if task is None:
            return problem
        return dataclasses.replace(problem, columns={**problem.columns, _OWNER: task})

    def at(self, place: Mapping[str, Any]) -> Problem:
        """The training problem of a `Place`, as JSON has it."""
        return self.generate("train", place["index"], place["difficulty"], task=place["task"])

    def verify(self, problem: Problem, text: str) -> Verdict:
        """Judge a completion."""
        return self.of(problem).verify(problem, text)

    def words(self) -> set[str]:
        """Words of all tasks but data sets, which have no grammar."""
        return {word for task in self.all() for word in task.words()}

    def all(self) -> list[Task]:
        """The main task, then the others."""
        return [self.main, *self.others.values()]

    def size(self, split: str, task: str | None) -> int | None:
        """Different problems of a split of a data set; None for a procedural task."""
        owner = self.named(task)
        return owner.size(split) if isinstance(owner, DatasetTask) else None

    def check_difficulties(self, task: str | None, difficulties: tuple[int, ...]) -> None:
        """Refuse difficulties that a task has not.

        Raises:
            InputError: by the task, or because rows of a data set cannot be chosen by it.
        """
        owner = self.named(task)
        if difficulties and isinstance(owner, DatasetTask):
            raise InputError("difficulties cannot act on the rows of a data set; remove them")
        for difficulty in difficulties:
            owner.generate("train", 0, difficulty)

    def _is_other(self, problem: Problem) -> bool:
        # A row of a data set may have a column of that name.
        owner = problem.columns.get(_OWNER)
        return isinstance(owner, str) and owner in self.others
