"""Warm Up Before You Train (arXiv 2505.13718): reasoning from a toy domain, then RLVR on little.

    base  <- short facts of several domains, and attempts at the targets that are mostly guesses
    warm  <- SFT on knights and knaves: searches, answers alone, shuffled or spoilt searches
    final <- GRPO without a deviation on at most 100 problems of a target

The targets are in `warmup_kk_targets`. The rewards of the paper are -2 without the layout, -1 for
an answer that cannot be read, -0.5 for a wrong and 2 for a right one. With 2 more, which changes no
advantage, they are the sum of the rewards `format`, half of `usable` and 2.5 times `accuracy`.
"""

import random
import re
import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from jaxrl_reason.errors import InputError
from jaxrl_reason.papers.ton import skip
from jaxrl_reason.papers.warmup_kk_targets import COLOURS, Colouring, Equations
from jaxrl_reason.tasks import KnightsKnaves, Problem, Task, Verdict, make_task, write_completion
from jaxrl_reason.tasks.problem import Style, check_rate

_WORD = re.compile(r"</?\w+>|[A-Za-z0-9]+|[^\sA-Za-z0-9]")
_PARTS = re.compile(r"<think>(.*)</think>\s*<answer>(.*)</answer>", re.DOTALL)
_LAYOUT = re.compile(r".*\S.*</think>\s*<answer>(.*\S.*)</answer>\s*", re.DOTALL)
_ROLE = re.compile(r"\b(knight|knave)\b")
_TRAIN = 1_000_000  # training problems that the rows of base models are drawn from
_WINDOW = 5

# The base model


def base_rows(
    task: Colouring,
    problems: Sequence[Problem],
    rng: random.Random,
    *,
    shares: Mapping[str, float],
    aloud: float,
    longest: int,
    people: Mapping[str, Any],
) -> Iterator[dict[str, Any]]:
    """What a base model learns: facts, and attempts at the targets.

    Args:
        task: the colouring task.
        problems: of that task.
        rng: draws all.
        shares: of the rows: `people` (answers to knights and knaves), `logic` (values of
            expressions), `sums` (modulo 5), `edges` (may a vertex have a colour?), `colouring` and
            `equations` (attempts).
        aloud: share of the attempts that search; the others guess.
        longest: words and signs of a search; where it would be longer there is a guess.
        people: name and options of the task of knights and knaves.

    Raises:
        InputError: an unknown kind of rows, or a share that is none.
    """
    check_rate("aloud", aloud)
    puzzles, systems = make_task(people["name"], people["options"]), Equations()
    write = {
        "people": lambda problem: _answered(puzzles, rng),
        "logic": lambda problem: _expression(rng),
        "sums": lambda problem: _sum(rng),
        "edges": lambda problem: _edge(problem, rng),
        "colouring": lambda problem: _attempt(task, problem, rng, aloud, longest),
        "equations": lambda problem: _attempt(systems, _drawn(systems, rng), rng, aloud, longest),
    }
    if shares.keys() - write.keys():
        raise InputError(f"shares={dict(shares)} has other kinds than {', '.join(write)}")
    kinds = rng.choices(list(shares), list(shares.values()), k=len(problems))
    for number, (kind, problem) in enumerate(zip(kinds, problems, strict=True)):
        prompt, completion = write[kind](problem)
        yield {"problem": number, "prompt": prompt, "completion": completion}


def _drawn(task: Task, rng: random.Random) -> Problem:
    return task.generate("train", rng.randrange(_TRAIN))


def _answered(task: Task, rng: random.Random) -> tuple[str, str]:
    problem = _drawn(task, rng)
    return problem.prompt, write_completion("", problem.answer)


def _attempt(
    task: Colouring | Equations, problem: Problem, rng: random.Random, aloud: float, longest: int
) -> tuple[str, str]:
    if rng.random() < aloud and _length(search := task.trace(problem, "long")) <= longest:
        return problem.prompt, search
    return problem.prompt, write_completion("", task.guess(problem, rng))


def _expression(rng: random.Random) -> tuple[str, str]:
    a, b, c = (rng.random() < 0.5 for _ in range(3))
    first, second = rng.choice(("and", "or")), rng.choice(("and", "or"))
    inner = b and not c if second == "and" else b or not c
    value = a and inner if first == "and" else a or inner
    shown = [str(part).lower() for part in (a, b, c, value)]
    return f"{shown[0]} {first} ( {shown[1]} {second} not {shown[2]} )?", shown[3]


def _sum(rng: random.Random) -> tuple[str, str]:
    a, x, b, y = (rng.randrange(5) for _ in range(4))
    return f"{a} * {x} + {b} * {y} modulo 5?", str((a * x + b * y) % 5)


def _edge(problem: Problem, rng: random.Random) -> tuple[str, str]:
    names, edges = problem.columns["names"], problem.columns["edges"]
    pairs = edges if rng.random() < 0.5 else [rng.sample(range(len(names)), 2)]
    u, v = rng.sample(rng.choice(pairs), 2)
    colour = rng.choice(COLOURS)
    other = colour if rng.random() < 0.7 else rng.choice(COLOURS)
    joined = [u, v] in edges or [v, u] in edges
    question = f"{problem.prompt} {names[u]} is {colour}. Can {names[v]} be {other}?"
    return question, "no" if joined and colour == other else "yes"


# Warm-ups


def warm_up(
    task: KnightsKnaves,
    problems: Sequence[Problem],
    rng: random.Random,
    *,
    style: Style,
    longest: int,
    shuffled: bool = False,
    wrong: float = 0.0,
    prompt: str | None = None,
) -> Iterator[dict[str, Any]]:
    """One demonstration of each puzzle whose search is not too long, in the same order for all.

    Args:
        task: knights and knaves.
        problems: the puzzles.
        rng: shuffles lines and spoils answers.
        style: of the traces: `long` searches, `answer` has no thought.
        longest: words and signs of a puzzle with its search; longer ones are left out whatever the
            style, so that all styles have the same puzzles.
        shuffled: put the lines of each search into a random order.
        wrong: share of answers in which one person's role is turned round.
        prompt: what is asked, with the field {prompt}; ends with the tag that opens the thought,
            which completions then lack. Null: the puzzle itself.
    """
    check_rate("wrong", wrong)
    for number, problem in enumerate(problems):
        if _length(problem.prompt) + _length(task.trace(problem, "long")) > longest:
            continue
        thought, answer = _PARTS.findall(task.trace(problem, style))[0]
        if shuffled:
            lines = thought.strip().split("\n")
            thought = "\n".join(rng.sample(lines, len(lines)))
        if rng.random() < wrong:
            answer = _spoilt(answer, rng)
        row = {"problem": number, "completion": write_completion(thought, answer)}
        if prompt is not None:
            row["prompt"] = prompt.format(prompt=problem.prompt)
            row["completion"] = row["completion"].removeprefix("<think> ")
        yield row


def _length(text: str) -> int:
    return len(_WORD.findall(text))


def _spoilt(answer: str, rng: random.Random) -> str:
    role = rng.choice(list(_ROLE.finditer(answer)))
    other = {"knight": "knave", "knave": "knight"}[role[0]]
    return answer[: role.start()] + other + answer[role.end() :]


# Rewards and numbers


def usable(
    prompts: Sequence[str], completions: Sequence[str], *, verdict: Sequence[Verdict], **_: Any
) -> list[float]:
    """1 for an answer that can be read, right or wrong."""
    return [float(v.answer is not None) for v in verdict]


def math_rule(
    prompts: Sequence[str], completions: Sequence[str], *, verdict: Sequence[Verdict], **_: Any
) -> list[float]:
    r"""The paper's reward for mathematics, where the prompt has opened the thought.

    -2 without the layout (a thought that is not empty, then an answer that is not empty, each tag
    once), -1 if the answer has no `\boxed`, -0.5 if it is wrong, 2 if it is right.
    """
    return [_level(text, v) for text, v in zip(completions, verdict, strict=True)]


def _level(text: str, verdict: Verdict) -> float:
    laid = _LAYOUT.fullmatch(text)
    if laid is None or any(text.count(tag) != 1 for tag in ("</think>", "<answer>", "</answer>")):
        return -2.0
    if r"\boxed" not in laid[1]:
        return -1.0
    return 2.0 if verdict.correct else -0.5


def right_aloud(problem: Problem, completion: str, verdict: Verdict, length: int) -> float | None:
    """Whether a completion that thinks is right; does not apply to an empty thought."""
    return None if skip(problem, completion, verdict, length) else float(verdict.correct)


def steps_to_reach(
    records: Mapping[str, Mapping[str, Any]], stage: str, *, goal: str, series: str
) -> float:
    """When a stage has reached what another ends with, as a share of the other's steps.

    Args:
        records: of the stages by name.
        stage: which one has to get there.
        goal: the other, of whose series the mean of the last five steps is to be reached.
        series: of training, for example `rewards/accuracy/mean`.

    Returns:
        The first step at which the mean of five in a row is as high, or one more than there are
        steps, divided by the number of steps of the other.
    """
    own, others = (records[name]["train"][series] for name in (stage, goal))
    bound = statistics.fmean(others[-_WINDOW:])
    means = [statistics.fmean(own[end - _WINDOW : end]) for end in range(_WINDOW, len(own) + 1)]
    reached = (end for end, mean in enumerate(means, start=_WINDOW) if mean >= bound)
    return next(reached, len(own) + 1) / len(others)


def change(
    records: Mapping[str, Mapping[str, Any]], stage: str, *, since: Mapping[str, str], name: str
) -> float:
    """By how much the accuracy on a set has changed since the stage that `since` gives for it."""
    before, after = (records[s]["sets"][name]["accuracy"] for s in (since[stage], stage))
    return after - before
