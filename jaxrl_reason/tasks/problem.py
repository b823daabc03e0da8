"""What every task shares: problems, verdicts, completion format, disjoint train and test draws.

A task turns (seed, split, index, difficulty) into a `Problem`, writes a solver's trace for it and
verifies a text against it. The split of a problem is a property of the problem itself (a stable
hash of its canonical form), so no seed, index or option can put one problem into both splits.
A problem is text and JSON; what there is to see is rendered from it by a `VisualTask`.
"""

import functools
import hashlib
import random
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np
from jaxtyping import UInt8

from jaxrl_reason.errors import InputError

Split = Literal["train", "test"]
Style = Literal["long", "short", "answer"]

_COMPLETION = re.compile(r"\s*<think>(.*?)</think>\s*<answer>(.*?)</answer>\s*", re.DOTALL)
_WORD = re.compile(r"[A-Za-z0-9]+|[^\sA-Za-z0-9]")
_TAGS = ("<think>", "</think>", "<answer>", "</answer>")
_BLOCK = 256  # test problems are made distinct block by block, so that asking for one stays cheap
_REPEATS = 200  # repeats in a row after which a space counts as used up
_PROPOSALS = 20_000  # proposals in a row without one in the wanted split


@dataclass(frozen=True, kw_only=True)
class Problem:
    """One question with its true answer.

    Attributes:
        prompt: the user's turn.
        answer: the text that belongs between the answer tags.
        columns: JSON-able facts that traces and verifiers need; always has "difficulty" (int) and
            "answer_class" (str: what a guesser that ignores the question would have to hit).
    """

    prompt: str
    answer: str
    columns: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """The judgement of one completion; `correct` implies `formatted`.

    `answer` is None unless the text has the format and an answer of the right kind, so that
    (formatted, answer is None) tells an unusable answer from a wrong one. `grade` is set where an
    answer can be partly right: a number from 0 to 1, of which the task says from where on it
    counts as correct.
    """

    correct: bool
    formatted: bool
    answer: str | None
    reason: str
    grade: float | None = None

    @property
    def score(self) -> float:
        """The grade, or 1 for correct and 0 for wrong where there is none."""
        return float(self.correct) if self.grade is None else self.grade


@dataclass(frozen=True, kw_only=True, eq=False)
class Video:
    """Frames in order; frame `i` is what is seen at `i / fps` seconds."""

    frames: UInt8[np.ndarray, "F H W 3"]
    fps: float


@dataclass(frozen=True, kw_only=True, eq=False)
class Media:
    """What the user's turn shows before its text: first the images, then the videos, in order.

    The text has no placeholders for them.
    """

    images: tuple[UInt8[np.ndarray, "H W 3"], ...] = ()
    videos: tuple[Video, ...] = ()


class Task(Protocol):
    """A procedural family of problems; implementations are frozen dataclasses of options."""

    @property
    def name(self) -> str:
        """Name in configurations."""
        ...

    def generate(self, split: Split, index: int, difficulty: int | None = None) -> Problem:
        """Problem number `index` of a split; `None` mixes the task's range of difficulties."""
        ...

    def trace(self, problem: Problem, style: Style) -> str:
        """A whole correct completion, tags included."""
        ...

    def verify(self, problem: Problem, text: str) -> Verdict:
        """Judge a completion."""
        ...

    def words(self) -> tuple[str, ...]:
        """Every word and punctuation mark of the prompts and traces."""
        ...


@runtime_checkable
class VisualTask(Protocol):
    """What a task has besides `Task` when its questions are about images or videos."""

    def media(self, problem: Problem) -> Media:
        """What belongs before the prompt; the same bits whenever and wherever it is called."""
        ...


def media_of(task: Task, problem: Problem) -> Media:
    """What a problem shows; nothing for a task of text alone."""
    return task.media(problem) if isinstance(task, VisualTask) else Media()


@dataclass(frozen=True, kw_only=True)
class Completion:
    """A completion taken apart; `answer` is None unless the format is right."""

    answer: str | None
    reason: str


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A proposed problem: its identity, its split and whatever its task needs to render it."""

    canonical: str
    split: Split
    content: Any


@dataclass(frozen=True, kw_only=True)
class Draft:
    """A proposal of which only the split is known, for tasks in which the rest takes its time.

    `finish` makes the candidate, or None when it has to be rejected after all; it may go on
    drawing from the generator that `propose` was given.
    """

    split: Split
    finish: Callable[[], Candidate | None]


class Proposer(Protocol):
    """The part of a task that `draw` needs; tasks are frozen, hence properties."""

    @property
    def name(self) -> str:
        """Name in configurations and in hashes."""
        ...

    @property
    def seed(self) -> int:
        """Seed of the stream."""
        ...

    def difficulties(self) -> tuple[int, ...]:
        """Difficulties that are mixed when none is asked for."""
        ...

    def propose(self, rng: random.Random, difficulty: int) -> Candidate | Draft | None:
        """One random problem, or None when the draw has to be rejected."""
        ...


def write_completion(thought: str, answer: str) -> str:
    """Put a thought (possibly empty) and an answer into the tags that `read_completion` expects."""
    inner = f" {thought.strip()} " if thought.strip() else " "
    return f"<think>{inner}</think> <answer> {answer.strip()} </answer>"


def read_completion(text: str) -> Completion:
    """Take the answer out of a text that has exactly one think block, then one answer block.

    Nothing but white space may stand before, between or after the blocks, and the answer must not
    be empty; an empty think block is allowed.
    """
    for tag in _TAGS:
        if text.count(tag) != 1:
            return Completion(answer=None, reason=f"{tag} occurs {text.count(tag)} times, not once")
    match = _COMPLETION.fullmatch(text)
    if match is None:
        return Completion(answer=None, reason="text outside the think and answer blocks")
    answer = match.group(2).strip()
    if not answer:
        return Completion(answer=None, reason="the answer is empty")
    return Completion(answer=answer, reason="")


def split_words(texts: Iterable[str]) -> tuple[str, ...]:
    """The distinct words and single punctuation marks of some texts, sorted."""
    return tuple(sorted({word for text in texts for word in _WORD.findall(text)}))


def hash_split(task_name: str, canonical: str, test_fraction: float) -> Split:
    """The split of a problem, from a hash that is the same on every machine and in every run."""
    digest = hashlib.sha256(f"{task_name}\n{canonical}".encode()).digest()
    return "test" if int.from_bytes(digest[:8], "big") < test_fraction * 2.0**64 else "train"


def draw(task: Proposer, split: Split, index: int, difficulty: int | None) -> Any:
    """The content of problem `index` of a split; test problems are pairwise distinct.

    Distinct holds as far as the space of problems allows. `task` must be hashable.

    Raises:
        InputError: on a bad split or index, or when the split is empty for these options.
    """
    check_place(split, index)
    if split == "test":
        return _test_block(task, difficulty, index // _BLOCK)[index % _BLOCK].content
    rng, level = _stream(task, split, index, difficulty)
    return _next_in_split(task, split, rng, level).content


def _stream(
    task: Proposer, split: Split, index: int, difficulty: int | None
) -> tuple[random.Random, int]:
    rng = random.Random(f"{task.name}|{task.seed}|{split}|{index}|{difficulty}")
    return rng, rng.choice(task.difficulties()) if difficulty is None else difficulty


def _next_in_split(task: Proposer, split: Split, rng: random.Random, difficulty: int) -> Candidate:
    for _ in range(_PROPOSALS):
        proposal = task.propose(rng, difficulty)
        if proposal is None or proposal.split != split:
            continue
        candidate = proposal.finish() if isinstance(proposal, Draft) else proposal
        if candidate is not None:
            return candidate
    raise InputError(
        f"task {task.name!r} has no {split} problem of difficulty {difficulty} with these options; "
        "widen its ranges or change test_fraction"
    )


@functools.lru_cache(maxsize=4096)
def _test_block(task: Proposer, difficulty: int | None, block: int) -> tuple[Candidate, ...]:
    # Ascending order keeps the recursion shallow: each block finds the earlier ones in the cache.
    seen = {
        candidate.canonical
        for earlier in range(block)
        for candidate in _test_block(task, difficulty, earlier)
    }
    chosen = []
    used_up: set[int] = set()
    for index in range(block * _BLOCK, (block + 1) * _BLOCK):
        rng, level = _stream(task, "test", index, difficulty)
        candidate = _next_in_split(task, "test", rng, level)
        repeats = 0
        while candidate.canonical in seen and level not in used_up:
            repeats += 1
            if repeats == _REPEATS:
                used_up.add(level)
            candidate = _next_in_split(task, "test", rng, level)
        seen.add(candidate.canonical)
        chosen.append(candidate)
    return tuple(chosen)


def constant_answer_accuracy(task: Task, n: int, difficulties: Sequence[int] = ()) -> float:
    """Accuracy on `n` test problems of the best answer that ignores the question.

    The answer is chosen per difficulty as the commonest of `n` train problems and scored on test
    problems, so a small sample does not flatter it.

    Args:
        task: whose problems they are.
        n: how many of each split.
        difficulties: only these, in turn; as the task mixes them when empty.
    """
    seen = _answers(task, "train", n, difficulties)
    best = {difficulty: counts.most_common(1)[0][0] for difficulty, counts in seen.items()}
    held_out = _answers(task, "test", n, difficulties)
    hits = (counts[best[d]] if d in best else 0 for d, counts in held_out.items())
    return sum(hits) / n


def chance_accuracy(task: Task, n: int, difficulties: Sequence[int] = ()) -> float:
    """Expected accuracy on `n` test problems of a guess that knows how often which answer is right.

    The guess is drawn from the answers of `n` train problems of the same difficulty. Arguments are
    those of `constant_answer_accuracy`.
    """
    seen = _answers(task, "train", n, difficulties)
    expected = 0.0
    for difficulty, counts in _answers(task, "test", n, difficulties).items():
        known = seen.get(difficulty, Counter())
        for answer, count in counts.items():
            expected += count * known[answer] / max(known.total(), 1)
    return expected / n


def _answers(
    task: Task, split: Split, n: int, difficulties: Sequence[int]
) -> dict[int, Counter[str]]:
    """How often which answer is that of the first `n` problems of a split, by difficulty."""
    if n < 1:
        raise InputError(f"n={n} must be at least 1")
    counts: dict[int, Counter[str]] = defaultdict(Counter)
    levels = difficulties or (None,)
    asked: Counter[int | None] = Counter()  # a difficulty may be named twice, to be met more often
    for number in range(n):
        wanted = levels[number % len(levels)]
        columns = task.generate(split, asked[wanted], wanted).columns
        asked[wanted] += 1
        counts[columns["difficulty"]][columns["answer_class"]] += 1
    return counts


def check_whole(name: str, value: Any, *, low: int, high: int) -> None:
    """Refuse an option that is not a whole number in `low..high`."""
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise InputError(f"{name}={value!r} must be a whole number from {low} to {high}")


def check_rate(name: str, value: Any, *, low: float = 0.0, high: float = 1.0) -> None:
    """Refuse an option that is not a number in `low..high`."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        raise InputError(f"{name}={value!r} must be a number from {low} to {high}")


def check_names(
    name: str, value: Any, allowed: Iterable[str], *, least: int = 1, repeats: bool = False
) -> None:
    """Refuse an option that is not a tuple of at least `least` of the allowed names."""
    known = tuple(allowed)
    fits = isinstance(value, tuple) and all(entry in known for entry in value)
    if not fits or len(set(value)) < least:
        raise InputError(f"{name}={value!r} must name at least {least} of {', '.join(known)}")
    if len(set(value)) < len(value) and not repeats:
        raise InputError(f"{name}={value!r} names one of them twice; name each once")


def check_place(split: str, index: int) -> None:
    """Refuse an unknown split or a negative index."""
    if split not in ("train", "test"):
        raise InputError(f"split={split!r} is unknown; use 'train' or 'test'")
    if index < 0:
        raise InputError(f"index={index} is negative; problems are numbered from 0")


def check_style(style: str) -> None:
    """Refuse an unknown trace style."""
    if style not in ("long", "short", "answer"):
        raise InputError(f"style={style!r} is unknown; use 'long', 'short' or 'answer'")
