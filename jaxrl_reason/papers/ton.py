"""TON: a policy that may leave its thought out (arXiv 2505.16854).

SFT on demonstrations of which some have an empty thought makes skipping a legal output; plain GRPO
with rewards for the answer and the layout then decides for each question. Nothing rewards brevity.
The rest of the paper is configuration: `configs/papers/ton/`.
"""

import ast
import dataclasses
import math
import random
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from jaxrl_reason.errors import InputError
from jaxrl_reason.stages.groups import Group
from jaxrl_reason.tasks import ModularArithmetic, Problem, Task, write_completion
from jaxrl_reason.tasks.problem import Split, Style, check_rate

MARKER = "[hybrid]"
"""Stands for the request to think only where it helps, of which a small vocabulary has no words."""
EMPTY = "\n\n"
"""The empty thought of published models. A tokenizer of words drops white space, so that for it
`write_completion` with no thought is the same tokens."""
THETA = 0.14
"""How far from the right point a click may be, in widths and heights of the screen."""

_THOUGHT = re.compile(r"\s*<think>(.*?)</think>", re.DOTALL)
_TAG = re.compile(r"</?(think|answer|action)>|<\|")
_LAYOUT = re.compile(r"<think>.*?</think>\s*<(answer|action)>(.*?)</\1>", re.DOTALL)


# Data


def dropout_traces(
    task: Task, problems: Sequence[Problem], rng: random.Random, *, p: float, style: Style
) -> Iterator[dict[str, Any]]:
    """The solver's demonstrations, each with its thought emptied with probability `p`.

    Drawn once, when the rows are written: an epoch later the same thoughts are empty.
    """
    check_rate("p", p)
    for number, problem in enumerate(problems):
        empty = rng.random() < p
        completion = write_completion("", problem.answer) if empty else task.trace(problem, style)
        yield {"problem": number, "completion": completion}


def reverse_thinking(
    groups: Sequence[Group], rng: random.Random, *, p: float, prompt: str
) -> Iterator[dict[str, Any]]:
    """Demonstrations of a model's own explanations of answers that it was given.

    An explanation is kept if it came to its end and writes no tags and no special tokens, so does
    not state the answer as an answer. One that is kept is emptied with probability `p`, as in
    `dropout_traces`.

    Args:
        groups: completions of prompts that give the answer and ask how to get there.
        rng: chooses among a problem's explanations.
        p: share of empty thoughts.
        prompt: what is asked in training; names in braces are columns of the problem.
    """
    check_rate("p", p)
    for group in groups:
        kept = [c.text.strip() for c in group.completions if c.finished and not _TAG.search(c.text)]
        thoughts = [thought for thought in kept if thought]
        if not thoughts:
            continue
        thought = rng.choice(thoughts)
        thought = EMPTY if rng.random() < p else thought
        yield {
            "problem": group.number,
            "prompt": prompt.format(**group.problem.columns),
            "completion": f"<think>{thought}</think><answer>{group.problem.answer}</answer>",
        }


@dataclasses.dataclass(frozen=True, kw_only=True)
class HybridArithmetic(ModularArithmetic):
    """The same problems with `MARKER` before every prompt: the baseline that asks for skipping."""

    def generate(self, split: Split, index: int, difficulty: int | None = None) -> Problem:
        """The problem of that number, marked."""
        problem = super().generate(split, index, difficulty)
        return dataclasses.replace(problem, prompt=f"{MARKER} {problem.prompt}")

    def words(self) -> tuple[str, ...]:
        """Those of the task and the marker."""
        return (*super().words(), MARKER)


# Measures


def skip(problem: Problem, completion: str, verdict: Any, length: int) -> bool:
    """Whether the thought is empty; a completion that never ends its thought has skipped nothing.

    Examples:
        `<think> </think> <answer> 4 </answer>` skips, and so does `<think></think>`.
    """
    thought = _THOUGHT.match(completion)
    return thought is not None and not thought[1].strip()


def think_length(problem: Problem, completion: str, verdict: Any, length: int) -> float | None:
    """Tokens of a completion that thinks; does not apply to one that skips."""
    return None if skip(problem, completion, verdict, length) else float(length)


def selectivity(
    records: Mapping[str, Mapping[str, Any]], stage: str, *, easy: int, hard: int
) -> float:
    """How much more often easy problems are answered without a thought than hard ones."""
    shares = records[stage]["measures_by_difficulty"]["skip"]
    return shares[str(easy)] - shares[str(hard)]


# Rewards


def skip_bonus(
    prompts: Sequence[str], completions: Sequence[str], *, problem: Sequence[Problem], **_: Any
) -> list[float]:
    """1 for an empty thought, right or wrong: the ablation that pays for skipping."""
    return [float(skip(p, c, None, 0)) for p, c in zip(problem, completions, strict=True)]


def read_action(text: str) -> dict[str, Any] | None:
    """The action of a text, a dictionary between action tags; None if it has none of that kind."""
    try:
        action = ast.literal_eval(text.strip())
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return None
    named = isinstance(action, dict) and isinstance(action.get("action"), str)
    return action if named else None


def layout(prompts: Sequence[str], completions: Sequence[str], **_: Any) -> list[float]:
    """1 for a thought followed by an answer or an action and nothing else, whatever they say."""
    return [float(_LAYOUT.fullmatch(completion) is not None) for completion in completions]


def gui_type(
    prompts: Sequence[str], completions: Sequence[str], *, answer: Sequence[str], **_: Any
) -> list[float]:
    """1 for an action of the right name."""
    return _compared(completions, answer, lambda ours, gold: True)


def gui_value(
    prompts: Sequence[str], completions: Sequence[str], *, answer: Sequence[str], **_: Any
) -> list[float]:
    """1 for a click near the right point, or in the right box; other actions have no value."""
    return _compared(completions, answer, _hits)


def _compared(
    completions: Sequence[str],
    answers: Sequence[str],
    agree: Callable[[dict[str, Any], dict[str, Any]], bool],
) -> list[float]:
    rewards = []
    for completion, answer in zip(completions, answers, strict=True):
        gold = read_action(answer)
        if gold is None:
            raise InputError(f"answer {answer!r} is no dictionary with the name of an action")
        found = _LAYOUT.fullmatch(completion)
        ours = found and read_action(found[2])
        same = ours and ours["action"].casefold() == gold["action"].casefold()
        rewards.append(float(bool(same and agree(ours, gold))))
    return rewards


def _hits(ours: dict[str, Any], gold: dict[str, Any]) -> bool:
    """Whether a click is at most `THETA` from a point [x, y], or inside a box [x0, y0, x1, y1]."""
    point, goal = _numbers(ours.get("position")), _numbers(gold.get("position"))
    if gold["action"].casefold() != "click" or len(point) != 2 or len(goal) not in (2, 4):
        return False
    if len(goal) == 2:
        return math.dist(point, goal) <= THETA
    return goal[0] <= point[0] <= goal[2] and goal[1] <= point[1] <= goal[3]


def _numbers(value: Any) -> tuple[float, ...]:
    """A list of numbers; empty for anything else."""
    given = value if isinstance(value, list | tuple) else ()
    numbers = tuple(float(n) for n in given if type(n) in (int, float))
    return numbers if len(numbers) == len(given) else ()
