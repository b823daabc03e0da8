"""Modality bridging of Vision-R1 (arXiv 2503.06749): traces about images by a reasoner of text.

    draft       <- a model that sees, given the answer: a caption and the way to the answer
    description <- the same model, given the draft: all details that answering needs
    trace       <- a model of text, given the description: a long thought and an answer
    keep a trace if its answer is right and it reads as if its writer had seen the image

Without a draft the description is a plain caption, which leaves out what the question needs. Any
pair of models will do as teacher; `vision_r1_scene` has one of rules.
"""

import dataclasses
import random
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

from jaxrl_reason.errors import InputError
from jaxrl_reason.plugins import load_object
from jaxrl_reason.rewards.answers import answers_match, gold_answer
from jaxrl_reason.tasks import Problem, Task

DRAFT = (
    "Question: {question}\nThe right answer is: {answer}\nFirst describe the image. Then reason "
    "step by step from what it shows to this answer."
)
DESCRIBE = (
    "Question: {question}\nA caption and a way to the answer: {draft}\nDescribe the image for a "
    "reader who cannot see it, with every detail that a right answer needs. Do not answer."
)
CAPTION = "Describe the image."
REASON = (
    "An image, described: {description}\nQuestion: {question}\nThink inside <think> </think>, then "
    "give the answer inside <answer> </answer>."
)
"""Prompts of the passes; the words are ours, what they ask is the paper's."""

SUBSTITUTIONS = {"description": "image", "says": "displays"}
"""Words of a trace that become others, so that it is about the image."""

_IMAGE = r"(?:image|picture|photo)s?"
_UNSEEN = re.compile(
    rf"\b{_IMAGE} (?:is|are|was|were) (?:missing|not (?:given|provided|shown|visible|available))\b"
    rf"|\bno {_IMAGE}\b"
    rf"|\b(?:without|(?:cannot|can not|can't|could not|couldn't|unable to) see)"
    rf" (?:seeing )?(?:the|an|any) {_IMAGE}\b",
    re.IGNORECASE,
)
_FINAL = re.compile(
    r"<answer>(.*?)</answer>|final answer(?: is)?:?[ \t]*([^;\n<]+)", re.IGNORECASE | re.DOTALL
)
_QUOTED = re.compile(r"[\"“]([^\"“”]+)[\"”]")
_QUOTE = 4  # words from which on what stands in quotation marks is a quotation


class Teacher(Protocol):
    """Who writes drafts, descriptions and traces."""

    def draft(self, problems: Sequence[Problem]) -> Sequence[str]:
        """Caption and way to the answer of each problem, whose image and answer are seen."""
        ...

    def describe(self, problems: Sequence[Problem], drafts: Sequence[str] | None) -> Sequence[str]:
        """Description of each image; without drafts a caption that does not know the question."""
        ...

    def reason(self, questions: Sequence[str], descriptions: Sequence[str]) -> Sequence[str]:
        """A completion for each question about an image of which only the description is known."""
        ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class PromptedTeacher:
    """Two models behind functions of yours, asked with the prompts above."""

    task: Task
    rng: random.Random
    see: str
    """`f(prompts, problems) -> replies` as `package.module:function`, of a model that is shown the
    images of the problems."""
    think: str
    """`f(prompts) -> replies`, of a model of text."""

    def draft(self, problems: Sequence[Problem]) -> Sequence[str]:
        """As `DRAFT` asks."""
        prompts = [DRAFT.format(question=p.prompt, answer=p.answer) for p in problems]
        return self._see(prompts, problems)

    def describe(self, problems: Sequence[Problem], drafts: Sequence[str] | None) -> Sequence[str]:
        """As `DESCRIBE` asks, or `CAPTION`."""
        if drafts is None:
            return self._see([CAPTION] * len(problems), problems)
        pairs = zip(problems, drafts, strict=True)
        return self._see([DESCRIBE.format(question=p.prompt, draft=d) for p, d in pairs], problems)

    def reason(self, questions: Sequence[str], descriptions: Sequence[str]) -> Sequence[str]:
        """As `REASON` asks."""
        pairs = zip(questions, descriptions, strict=True)
        prompts = [REASON.format(question=q, description=d) for q, d in pairs]
        return load_object(self.think, "teacher")(prompts)

    def _see(self, prompts: list[str], problems: Sequence[Problem]) -> Sequence[str]:
        return load_object(self.see, "teacher")(prompts, problems)


class Bridged(NamedTuple):
    """A trace, and why it was dropped if it was."""

    completion: str
    fault: str | None


def bridge(
    task: Task,
    problems: Sequence[Problem],
    teacher: Teacher,
    *,
    passes: int,
    substitutions: Mapping[str, str] = SUBSTITUTIONS,
) -> Iterator[Bridged]:
    """What the teacher writes about each problem, in their order.

    Args:
        task: whose verifier compares answers with the truth.
        problems: about images.
        teacher: who writes.
        passes: 2 describes after a draft, 1 blindly.
        substitutions: words that are replaced in traces that are kept.

    Raises:
        InputError: another number of passes.
    """
    if passes not in (1, 2):
        raise InputError(f"passes={passes!r} must be 1 (a caption) or 2 (a draft before it)")
    drafts = teacher.draft(problems) if passes == 2 else None
    descriptions = teacher.describe(problems, drafts)
    traces = teacher.reason([problem.prompt for problem in problems], descriptions)
    for problem, description, trace in zip(problems, descriptions, traces, strict=True):
        found = fault(trace, description)
        if found is None and not task.verify(problem, trace).correct:
            found = "wrong"
        yield Bridged(trace if found else substitute(trace, substitutions), found)


def fault(trace: str, description: str) -> str | None:
    """Why a trace does not read as that of someone who saw the image, whatever its answer.

    Returns:
        `unseen` if it says that there is no image, `two answers` if it asserts different final
        answers, `quotes` if it quotes the description as a text; else None.
    """
    if _UNSEEN.search(trace):
        return "unseen"
    final = [_answer(found) for found in _FINAL.findall(trace)]
    if any(other != final[0] and not answers_match(other, final[0]) for other in final[1:]):
        return "two answers"
    quoted = [_plain(words) for words in _QUOTED.findall(trace)]
    known = _plain(description)
    if any(len(words.split()) >= _QUOTE and words in known for words in quoted):
        return "quotes"
    return None


def substitute(trace: str, substitutions: Mapping[str, str]) -> str:
    """A trace with words replaced in its thought; a capital stays one."""
    head, tag, tail = trace.partition("<answer>")
    for word, other in substitutions.items():
        as_before = lambda match, other=other: (
            other.capitalize() if match[0][0].isupper() else other
        )
        head = re.sub(rf"\b{re.escape(word)}\b", as_before, head, flags=re.IGNORECASE)
    return head + tag + tail


def _answer(found: tuple[str, str]) -> str:
    """What stands in an answer block, or behind `final answer` up to the end of the sentence."""
    text = re.sub(r"^\s*final answer\s*:", "", "".join(found), flags=re.IGNORECASE)
    return gold_answer(re.split(r"\.(?:\s|$)", text)[0].strip())


def _plain(text: str) -> str:
    return " ".join(text.lower().split()).strip(" .")


def bridged_rows(
    task: Task,
    problems: Sequence[Problem],
    rng: random.Random,
    *,
    passes: int,
    teacher: str = "jaxrl_reason.papers.vision_r1_scene:SceneTeacher",
    options: Mapping[str, Any] | None = None,
) -> Iterator[dict[str, Any]]:
    """Demonstrations about images: the traces that are kept.

    Args:
        task: of `problems`.
        problems: about images, which a stage's rows show again.
        rng: what a teacher draws from.
        passes: as for `bridge`.
        teacher: a class as `package.module:Class`, called with `task`, `rng` and the options.
        options: its further arguments.
    """
    made: Callable[..., Teacher] = load_object(teacher, "teacher")
    writer = made(task=task, rng=rng, **(options or {}))
    for number, found in enumerate(bridge(task, problems, writer, passes=passes)):
        if found.fault is None:
            yield {"problem": number, "completion": found.completion}
