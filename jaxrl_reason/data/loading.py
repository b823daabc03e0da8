"""Examples that are made when a batch needs them, ahead of it, by the process that trains on them.

Before the first step each process makes its share of a data set's examples once, to learn how long
they are, and tells the others; then it makes again, in threads of Grain's, the examples in the rows
of its own devices. Which those are follows from (seed, step) alone, so that a resumed run continues
exactly and the data cursor of a checkpoint is its step.
"""

import hashlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, TypeVar, overload

from jaxrl_reason.data.batching import Example
from jaxrl_reason.errors import InputError
from jaxrl_reason.processes import count, number, together

T = TypeVar("T")
U = TypeVar("U")

_KEPT_TOKENS = 2**23
"""Of examples without images, which are kept once they are made."""
_THREADS = 4
"""That make rows."""


class Facts(NamedTuple):
    """What is known of an example that is not at hand."""

    size: int
    """Tokens of prompt and completion."""
    num_patches: int
    """Patches of its images and videos."""
    identity: str
    """Tells it from others."""


class Maker(NamedTuple):
    """Something that examples are made of: a row of a file, a problem with its trace."""

    make: Callable[[], Sequence[Example]]
    """The same whenever it is called."""
    where: str
    """Its place, for messages."""


class Examples(Sequence[tuple[Example, ...]]):
    """The examples of each maker, made again whenever they are read.

    Attributes:
        facts: what is known of them; the same in all processes.
    """

    def __init__(self, makers: Sequence[Maker], max_length: int, *, option: str) -> None:
        """Make all once, each process its share.

        Args:
            makers: the same in all processes.
            max_length: most tokens of an example.
            option: that says so, for the message.

        Raises:
            InputError: an example that cannot be made, or is too long, by its place.
        """
        self._makers = makers
        self._kept: dict[int, tuple[Example, ...]] = {}
        self._room = _KEPT_TOKENS
        self.facts = self._measure()
        for maker, facts in zip(makers, self.facts, strict=True):
            longest = max((fact.size for fact in facts), default=0)
            if longest > max_length:
                raise InputError(
                    f"{maker.where}: prompt and completion have {longest} tokens; "
                    f"{option}={max_length} is the most"
                )

    @property
    def hash(self) -> str:
        """Identifies all examples and their order."""
        of = [" ".join(fact.identity for fact in facts) for facts in self.facts]
        return hashlib.sha256("\n".join(of).encode()).hexdigest()[:16]

    def __len__(self) -> int:
        """Number of makers."""
        return len(self._makers)

    @overload
    def __getitem__(self, index: int, /) -> tuple[Example, ...]: ...

    @overload
    def __getitem__(self, index: slice, /) -> list[tuple[Example, ...]]: ...

    def __getitem__(self, index, /):
        """The examples of a maker, or of several."""
        if isinstance(index, slice):
            return [self[i] for i in range(len(self))[index]]
        kept = self._kept.get(index)
        if kept is not None:
            return kept
        made = tuple(self._makers[index].make())
        size = sum(example.size for example in made)
        if size <= self._room and all(example.shown is None for example in made):
            self._room -= size
            self._kept[index] = made
        return made

    def _measure(self) -> list[list[Facts]]:
        """Facts of all examples; of several mistakes the first is raised, in all processes."""
        own = range(number(), len(self), count())

        def share() -> tuple[list[list[Facts]], tuple[int, str] | None]:
            facts = []
            for index in own:
                try:
                    facts.append([_facts(example) for example in self[index]])
                except InputError as error:
                    return facts, (index, str(error))
            return facts, None

        shares = together(share)
        mistakes = [mistake for _, mistake in shares if mistake is not None]
        if mistakes:
            raise InputError(min(mistakes)[1])
        rounds = itertools.zip_longest(*(facts for facts, _ in shares))
        return [facts for round in rounds for facts in round if facts is not None]


def _facts(example: Example) -> Facts:
    return Facts(example.size, example.num_patches, example.identity)


def read_batches(
    row: Callable[[int, int], T],
    batch: Callable[[Sequence[T]], U],
    *,
    steps: range,
    numbers: Sequence[int],
) -> Iterator[U]:
    """What each step reads, in their order; rows of the next step are made while one runs.

    All processes read their steps together.

    Args:
        row: `(step, number) -> row`, called in threads.
        batch: makes the step's batch of its rows.
        steps: the steps.
        numbers: of the rows of every step that are read here.

    Raises:
        InputError: `row` or `batch` raised one in any process, at the step that needs it.
    """
    import grain

    if not steps:
        return
    size = len(numbers)
    made = lambda at: row(steps[at // size], numbers[at % size])
    options = grain.ReadOptions(num_threads=_THREADS, prefetch_buffer_size=size)
    rows = grain.MapDataset.range(len(steps) * size).map(made).to_iter_dataset(options)
    batches = iter(rows.batch(size, batch_fn=batch))
    for _ in steps:
        own: list[U] = []
        # The others would wait for this process in the step.
        together(lambda own=own: own.append(next(batches)))
        yield own[0]
