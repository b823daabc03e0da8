"""What a judge has replied: it is asked the same question once in a process.

Completions of a group are often equal, and an evaluation asks what training has asked before.
"""

import asyncio
import hashlib
import threading
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, NamedTuple

from jaxrl_reason.errors import InputError

Reply = str | None
"""What a judge wrote; None if it could not be asked."""
Ask = Callable[[list[str]], Any]
"""From prompts to one reply each, plain or async."""


class Question(NamedTuple):
    """What a judge is asked."""

    text: str
    draw: int = 0
    """Number of the reply, where several to the same text are wanted."""


class Replies:
    """The newest replies of one judge, for any number of threads and event loops.

    Args:
        capacity: replies that are kept; the one that was used longest ago is forgotten first.
    """

    def __init__(self, capacity: int = 16384):
        self._capacity = capacity
        self._known: OrderedDict[bytes, Reply] = OrderedDict()
        self._lock = threading.Lock()
        self._under_way: dict[Question, asyncio.Future[dict[Question, Reply]]] = {}

    def ask(self, ask: Ask, questions: Sequence[Question]) -> list[Reply]:
        """The replies in order; `ask` is called with those texts that are new, in one call."""
        found, new = self._look_up(questions)
        if new:
            found |= self._keep(new, ask([question.text for question in new]))
        return [found[question] for question in questions]

    async def ask_async(self, ask: Ask, questions: Sequence[Question]) -> list[Reply]:
        """As `ask`; a question that another task is asking is waited for."""
        found, new = self._look_up(questions)
        loop = asyncio.get_running_loop()
        known = ((question, self._under_way.get(question)) for question in new)
        others = {q: task for q, task in known if task is not None and task.get_loop() is loop}
        own = [question for question in new if question not in others]
        if own:
            task = asyncio.ensure_future(self._ask_new(ask, own))
            self._under_way |= dict.fromkeys(own, task)
            try:
                found |= await task
            finally:
                for question in own:
                    self._under_way.pop(question, None)
        for question, other in others.items():
            found[question] = (await other)[question]
        return [found[question] for question in questions]

    async def _ask_new(self, ask: Ask, new: list[Question]) -> dict[Question, Reply]:
        asked: Awaitable[Any] = ask([question.text for question in new])
        return self._keep(new, await asked)

    def _look_up(
        self, questions: Sequence[Question]
    ) -> tuple[dict[Question, Reply], list[Question]]:
        """Known replies, and the other questions, each once."""
        found: dict[Question, Reply] = {}
        new: list[Question] = []
        with self._lock:
            for question in dict.fromkeys(questions):
                key = _key(question)
                if key in self._known:
                    self._known.move_to_end(key)
                    found[question] = self._known[key]
                else:
                    new.append(question)
        return found, new

    def _keep(self, questions: Sequence[Question], replies: Any) -> dict[Question, Reply]:
        fits = isinstance(replies, Sequence) and not isinstance(replies, str)
        if not fits or not all(reply is None or isinstance(reply, str) for reply in replies):
            raise InputError(
                f"the judge returned {type(replies).__name__}: {str(replies)[:80]!r}; return a "
                "list with one text for each prompt"
            )
        if len(replies) != len(questions):
            raise InputError(
                f"the judge returned {len(replies)} replies to {len(questions)} prompts; return "
                "one text for each"
            )
        found: dict[Question, Reply] = dict(zip(questions, replies, strict=True))
        with self._lock:
            self._known |= {_key(question): reply for question, reply in found.items()}
            while len(self._known) > self._capacity:
                self._known.popitem(last=False)
        return found


def _key(question: Question) -> bytes:
    return hashlib.sha256(f"{question.draw} {question.text}".encode("utf-8", "replace")).digest()
