"""Rows of a data set as a task: prompts with gold answers, verified by math-verify.

No prompt is in both splits. With a file of test rows, training rows that occur in it are left out;
without one, a hash of the prompt and of what it shows decides.
"""

import dataclasses
import functools
import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxrl_reason.data.batching import epoch_order
from jaxrl_reason.data.records import Record, Row, Source, content_hash, load_records
from jaxrl_reason.errors import InputError, nearest
from jaxrl_reason.rewards.answers import answers_match, extract_answer, gold_answer
from jaxrl_reason.tasks import Problem, Verdict
from jaxrl_reason.tasks.problem import Split, Style, check_place, hash_split

_MEDIA = ("image", "images", "video", "videos")
_NO_ANSWER = r"no final answer; it is read from <answer>...</answer>, \boxed{...} or after ####"


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class DatasetTask:
    """A task whose problems are rows with the columns `prompt` and `answer`.

    Attributes:
        train: rows to learn from; problem `index` is one of them, each epoch in another order.
        test: held-out rows in their order; they begin again where the index exceeds them.
        seed: of the orders.
        timeout: seconds that one answer may take to verify.
    """

    train: Sequence[Record]
    test: Sequence[Record]
    seed: int = 0
    timeout: float = 5.0

    @classmethod
    def load(
        cls,
        source: Source,
        *,
        test_source: Source | None = None,
        test_split: str = "test",
        split: str = "train",
        columns: Mapping[str, str] | None = None,
        test_fraction: float = 0.05,
        seed: int = 0,
    ) -> "DatasetTask":
        """Read the rows.

        Args:
            source: training rows, as in `load_records`.
            test_source: held-out rows; without it, `test_fraction` of the training rows.
            test_split: split of `test_source`, where it has splits.
            split: split of `source`, where it has splits.
            columns: what `prompt` and `answer` are made of, as in `load_records`.
            test_fraction: share of the rows that is held out.
            seed: of the orders.

        Raises:
            InputError: unreadable rows, an answer that is empty, or a split without rows.
        """
        rows = _read(source, split, columns)
        if test_source is None:
            held_out = lambda key: hash_split("dataset", key, test_fraction) == "test"
            test = {key: record for key, record in rows.items() if held_out(key)}
        else:
            test = _read(test_source, test_split, columns)
        train = [record for key, record in rows.items() if key not in test]
        for name, found in (("train", train), ("test", test)):
            if not found:
                raise InputError(
                    f"{source}: of {len(rows)} different problems none is left for the split "
                    f"{name!r}; change test_fraction={test_fraction}, or give a file of test rows "
                    "that differ"
                )
        return cls(train=train, test=list(test.values()), seed=seed)

    @property
    def name(self) -> str:
        """Name in configurations."""
        return "dataset"

    def size(self, split: Split) -> int:
        """How many different problems a split has."""
        return len(self._records(split))

    def generate(self, split: Split, index: int, difficulty: int | None = None) -> Problem:
        """Problem number `index` of a split; data sets have no difficulty to choose."""
        row = self.record(split, index).row
        answer = gold_answer(str(row["answer"]))
        own = row.get("difficulty")
        # Images would travel to the processes of rewards with every completion.
        facts = {key: value for key, value in row.items() if key not in _MEDIA}
        facts["difficulty"] = own if type(own) is int else 0
        facts["answer_class"] = answer
        facts["record"] = [split, index]
        return Problem(prompt=_shown(row["prompt"]), answer=answer, columns=facts)

    def record(self, split: Split, index: int) -> Record:
        """The whole row of a problem, images and videos included."""
        check_place(split, index)
        records = self._records(split)
        epoch, place = divmod(index, len(records))
        if split == "train":
            place = _order(self.seed, epoch, len(records))[place]
        return records[place]

    def trace(self, problem: Problem, style: Style) -> str:
        """The row's own completion.

        Raises:
            InputError: it has none.
        """
        if "completion" not in problem.columns:
            raise InputError(
                "the data set has no column 'completion', so no demonstrations; for supervised "
                "fine-tuning give data of kind file"
            )
        return _shown(problem.columns["completion"])

    def verify(self, problem: Problem, text: str) -> Verdict:
        """Judge a completion by the last answer that it states."""
        found = extract_answer(text)
        if found is None:
            return Verdict(correct=False, formatted=False, answer=None, reason=_NO_ANSWER)
        match = answers_match(found, problem.answer, timeout=self.timeout)
        reasons: dict[bool | None, str] = {True: "", False: f"{found} is not {problem.answer}"}
        reason = reasons.get(match, f"the right answer {problem.answer!r} cannot be parsed")
        return Verdict(correct=match is True, formatted=True, answer=found, reason=reason)

    def words(self) -> tuple[str, ...]:
        """Refused: the vocabulary of a data set is not closed."""
        raise InputError(
            "a data set has no closed vocabulary to build a tokenizer from; start from a "
            "pretrained model, which brings its tokenizer"
        )

    def __getstate__(self) -> dict[str, Any]:
        # A process that verifies needs no rows.
        return {**vars(self), "train": (), "test": ()}

    def _records(self, split: Split) -> Sequence[Record]:
        return self.test if split == "test" else self.train


@functools.lru_cache(maxsize=4)
def _order(seed: int, epoch: int, size: int) -> np.ndarray:
    return epoch_order(seed, epoch, size)


def _read(source: Source, split: str, columns: Mapping[str, str] | None) -> dict[str, Record]:
    """The rows of a source by what makes them different problems, the first of equal ones."""
    types = {"prompt": (str, list), "answer": (str, int, float)}
    records = load_records(
        source, required=("prompt", "answer"), types=types, split=split, columns=columns
    )
    rows: dict[str, Record] = {}
    for record in records:
        record.check(_check)
        rows.setdefault(_key(record.row), record)
    return rows


def _check(row: Row) -> None:
    if not row["prompt"]:
        raise InputError("column 'prompt' is empty")
    if not gold_answer(str(row["answer"])):
        raise InputError("column 'answer' is empty")


def _key(row: Row) -> str:
    prompt = row["prompt"]
    shown = {column: row[column] for column in _MEDIA if row.get(column) is not None}
    text = " ".join(prompt.casefold().split()) if isinstance(prompt, str) else prompt
    return content_hash([{"prompt": text, **shown}])


def _shown(turns: Any) -> str:
    """A prompt or completion as text: of messages the last one."""
    if isinstance(turns, str):
        return turns
    content = turns[-1].get("content") or ""
    if isinstance(content, str):
        return content
    return "".join(part["text"] for part in content if part.get("type") == "text")


def load_dataset_task(options: Mapping[str, Any]) -> DatasetTask:
    """`DatasetTask.load` with options from a configuration.

    Raises:
        InputError: an unknown option, or no source.
    """
    known = [name for name in inspect.signature(DatasetTask.load).parameters if name != "cls"]
    unknown = [name for name in options if name not in known]
    if unknown:
        hint = nearest(unknown[0], known)
        raise InputError(f"option {unknown[0]!r} of task 'dataset' is unknown; {hint}")
    if "source" not in options:
        raise InputError("task 'dataset' needs the option source: a file, a directory or a hub id")
    return DatasetTask.load(**options)
