"""Rewards by a language model as judge, however it is asked.

Each completion is one question, or several of the same text where replies are averaged. Replies
without a score are asked for once more; a completion of which none has a score has no reward.
"""

import inspect
import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, cast

from jaxrl_reason.errors import InputError
from jaxrl_reason.rewards.replies import Ask, Question, Replies, Reply
from jaxrl_reason.rewards.rubric import Rubric
from jaxrl_reason.rewards.scoring import RewardFunction

_logger = logging.getLogger(__name__)

_AGAIN = (
    "\n\nYou were asked this before, and your reply had no score in the form that is asked for. "
    "Keep to that form.\n"
)
_LOOK_AFTER = 16  # replies after which the share of those without a score is looked at


def make_judge_reward(
    ask: Ask,
    rubric: Rubric,
    *,
    name: str = "judge",
    replies: Replies | None = None,
    asks_again: bool = True,
) -> RewardFunction:
    """A reward function that asks a judge, async if `ask` is.

    It reads the columns `answer`, if the template has that field, and `verdict`, for `{given}` and
    for `when`.

    Args:
        ask: from prompts to one reply each.
        rubric: what it is asked.
        name: of the reward, in messages.
        replies: what it has replied before; its own, empty one if None.
        asks_again: ask once more where a reply has no score.
    """
    known, tally = replies or Replies(), _Tally(name)

    def begin(prompts: Sequence[str], completions: Sequence[str], columns: Mapping[str, Any]):
        return _Judging(rubric, _rows(rubric, prompts, completions, columns), again=asks_again)

    async def judged_async(prompts, completions, **columns) -> list[float | None]:
        judging = begin(prompts, completions, columns)
        while judging.questions:
            judging.take(await known.ask_async(ask, judging.questions))
        return judging.rewards(tally)

    def judged(prompts, completions, **columns) -> list[float | None]:
        judging = begin(prompts, completions, columns)
        while judging.questions:
            judging.take(known.ask(ask, judging.questions))
        return judging.rewards(tally)

    return cast(RewardFunction, judged_async if inspect.iscoroutinefunction(ask) else judged)


class _Judging:
    """The completions of a call on their way to their rewards, however the judge is asked."""

    def __init__(self, rubric: Rubric, rows: Iterable[str | None], *, again: bool):
        self._rubric, self._again = rubric, again
        self._rows = list(rows)
        texts = [text for text in self._rows if text is not None]
        self._asked = [Question(text, draw) for text in texts for draw in range(rubric.samples)]
        self._scores: list[float | None] = [None] * len(self._asked)
        self._last: list[Reply] = [None] * len(self._asked)
        self._open = list(range(len(self._asked)))
        self._is_second = False

    @property
    def questions(self) -> list[Question]:
        """What is to be asked now."""
        end = _AGAIN if self._is_second else ""
        asked = (self._asked[place] for place in self._open)
        return [Question(question.text + end, question.draw) for question in asked]

    def take(self, replies: Sequence[Reply]) -> None:
        """Read the replies to `questions`."""
        for place, reply in zip(self._open, replies, strict=True):
            self._last[place], self._scores[place] = reply, self._rubric.read(reply)
        unread = [place for place in self._open if self._scores[place] is None]
        self._open = unread if self._again and not self._is_second else []
        self._is_second = True

    def rewards(self, tally: "_Tally") -> list[float | None]:
        """The mean score of each completion; None where no reply had one."""
        pairs = zip(self._scores, self._last, strict=True)
        tally.add(len(self._scores), [reply for score, reply in pairs if score is None])
        scores = iter(self._scores)
        rewards: list[float | None] = []
        for text in self._rows:
            if text is None:
                rewards.append(self._rubric.otherwise)
                continue
            drawn = [next(scores) for _ in range(self._rubric.samples)]
            known = [score for score in drawn if score is not None]
            rewards.append(sum(known) / len(known) if known else None)
        return rewards


class _Tally:
    """Counts replies without a score, and warns once if most have none."""

    def __init__(self, name: str):
        self._name, self._warned = name, False
        self._count = self._unread = 0
        self._example: Reply = None

    def add(self, count: int, unread: Sequence[Reply]) -> None:
        """Count the replies of a call, among them those without a score."""
        self._count += count
        self._unread += len(unread)
        self._example = next((reply for reply in unread if reply), self._example)
        if self._count < _LOOK_AFTER:
            return
        what = f"judge {self._name!r}: {self._unread} of {self._count} replies had no score"
        if 2 * self._unread > self._count and not self._warned:
            self._warned = True
            example = (
                f"one of them ends: {self._example[-500:]!r}" if self._example else "all empty"
            )
            _logger.warning(
                "%s and count as no reward; change its prompt or pattern, or let it read and write "
                "more; %s",
                what,
                example,
            )
        elif self._unread:
            _logger.info("%s", what)
        self._count = self._unread = 0


def _rows(
    rubric: Rubric,
    prompts: Sequence[str],
    completions: Sequence[str],
    columns: Mapping[str, Any],
) -> list[str | None]:
    """What is asked about each completion; None where it is not judged."""
    answers = verdicts = [None] * len(completions)
    if "answer" in rubric.fields:
        answers = _column(columns, "answer", "its template has {answer}")
    if "given" in rubric.fields or rubric.when != "all":
        verdicts = _column(columns, "verdict", "its template has {given}, or when is not all")
    asked = []
    for prompt, text, answer, verdict in zip(prompts, completions, answers, verdicts, strict=True):
        given = verdict.answer if "given" in rubric.fields else None
        texts = {"answer": str(answer), "given": given or ""}
        judged = rubric.applies(verdict)
        asked.append(rubric.question(prompt=prompt, completion=text, **texts) if judged else None)
    return asked


def _column(columns: Mapping[str, Any], name: str, reason: str) -> Sequence[Any]:
    if name not in columns:
        raise InputError(f"the judge needs the column {name!r} and was not given it: {reason}")
    return columns[name]
