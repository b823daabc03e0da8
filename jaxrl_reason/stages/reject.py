"""Rejection sampling: completions of a policy that a verifier accepts, as data of later stages.

    for each problem:
        sample n completions of the parent (and n of another policy)
        verify them; leave the problem out if it is solved too seldom or too often
    rows   <- right completions, some of each problem
    pairs  <- a right completion against a wrong one
    take as many rows, and as many pairs, of every difficulty

Nothing is trained. SFT stages read the rows and DPO stages the pairs with `data: {kind: stage}`; a
function of the user's may make both in other ways.
"""

import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from random import Random
from typing import Any

from jaxrl_reason import files
from jaxrl_reason.data import chat
from jaxrl_reason.errors import InputError
from jaxrl_reason.processes import from_first
from jaxrl_reason.stages.context import Stage
from jaxrl_reason.stages.groups import Group, Sampled, sample_groups
from jaxrl_reason.stages.made_rows import SIDES, call_builder, checked_rows
from jaxrl_reason.stages.reject_config import RejectConfig
from jaxrl_reason.tasks import Problem

META = "data.json"
"""File of a stage's folder that says what was kept, written when all is."""


def run_reject(stage: Stage) -> None:
    """Sample, choose, and write `rows.jsonl`, `pairs.jsonl` and `data.json`.

    Raises:
        InputError: nothing was kept, or nothing of a difficulty where they are balanced.
        StorageError: what was kept could not be written.
    """
    config: RejectConfig = stage.config
    began = time.monotonic()
    problems = stage.problems(0, config.num_prompts)
    written = [_write(stage, stage.parent, problems, 0)]
    if stage.other is not None:
        written.append(_write(stage, stage.other, problems, 1))
    from_first(lambda: _keep(stage, problems, written, began))


def _keep(
    stage: Stage,
    problems: Sequence[Problem],
    written: Sequence[list[list[Sampled]]],
    began: float,
) -> None:
    """Choose and write."""
    config: RejectConfig = stage.config
    groups = list(_groups(config, problems, written))
    if config.builder is None:
        made = [*_choose(groups, config, Random(stage.seed))]
    else:
        rows = call_builder(config.builder, (groups,), stage.seed, config.options)
        made = checked_rows(rows, problems, config.builder, ("pairs", "rows"))
    every, made = len(made), [one for one in made if _can_be_read(stage, *one)]
    left_out = every - len(made)
    if config.balance:
        made = _balanced(made, problems, stage)
    if not made:
        solved = sum(any(c.is_right for c in group) for group in written[0])
        raise InputError(
            f"stages.{stage.name}: nothing was kept of {len(problems)} problems, of which "
            f"{solved} were solved at least once; raise num_prompts or num_generations, or let "
            "min_accuracy and max_accuracy leave out less"
        )
    counts = {**_write_rows(stage, made), "left_out": left_out}
    _write_meta(stage, counts | _shares(written[0]), time.monotonic() - began)


def _write(stage: Stage, policy, problems, turn: int) -> list[list[Sampled]]:
    config: RejectConfig = stage.config
    params = stage.context.restore_params(policy)
    return sample_groups(
        stage.context,
        params,
        problems,
        stage.key(turn),
        num_generations=config.num_generations,
        sampling=config.sampling,
        max_completion_length=config.max_completion_length,
    )


def _groups(
    config: RejectConfig, problems: Sequence[Any], written: Sequence[list[list[Sampled]]]
) -> Iterator[Group]:
    """The problems that are solved neither too seldom nor too often."""
    for number, problem in enumerate(problems):
        group = written[0][number]
        accuracy = sum(c.is_right for c in group) / len(group)
        if config.min_accuracy <= accuracy <= config.max_accuracy:
            sides = [_distinct(w[number]) if config.dedupe else w[number] for w in written]
            yield Group(number, problem, sides[0], sides[1] if len(sides) > 1 else [])


def _distinct(completions: Sequence[Sampled]) -> list[Sampled]:
    found: dict[str, Sampled] = {}
    for completion in completions:
        found.setdefault(completion.text, completion)
    return list(found.values())


def _choose(
    groups: Sequence[Group], config: RejectConfig, rng: Random
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Rows of right completions, and pairs of a right and a wrong one."""
    for group in groups:
        right = [c for c in group.completions if c.is_right]
        others = group.completions if config.rejected_from is None else group.others
        wrong = [c for c in others if c.is_wrong]
        rng.shuffle(wrong)
        if config.select == "random":
            rng.shuffle(right)
        else:
            right.sort(key=lambda c: len(c.ids), reverse=config.select == "longest")
        for completion in right[: config.rows_per_prompt]:
            yield "rows", _row(group, completion=completion)
        pairs = zip(right, wrong, strict=False)
        for _, (chosen, rejected) in zip(range(config.pairs_per_prompt), pairs, strict=False):
            yield "pairs", _row(group, chosen=chosen, rejected=rejected)


def _row(group: Group, **sides: Sampled) -> dict[str, Any]:
    row: dict[str, Any] = {"problem": group.number}
    row |= {name: side.text for name, side in sides.items()}
    return row | {f"{name}_ids": side.ids for name, side in sides.items()}


def _can_be_read(stage: Stage, kind: str, row: dict[str, Any]) -> bool:
    """Whether its texts say which tokens they are.

    A policy may write a special token by chance, which the text of a builder's row then spells out.
    """
    tokenizer = stage.context.tokenizer
    texts = [row[side] for side in SIDES[kind] if f"{side}_ids" not in row]
    return not any(chat.has_special(tokenizer, text) for text in texts)


def _balanced(made, problems, stage: Stage) -> list[tuple[str, dict[str, Any]]]:
    """As many of each kind and difficulty as there are of the rarest, in the same order."""
    difficulty = lambda row: problems[row["problem"]].columns["difficulty"]
    counts: dict[str, Counter] = defaultdict(Counter)
    for kind, row in made:
        counts[kind][difficulty(row)] += 1
    for kind, found in counts.items():
        for missing in {p.columns["difficulty"] for p in problems} - found.keys():
            raise InputError(
                f"stages.{stage.name}: balance=true and none of the {kind} is of difficulty "
                f"{missing}; raise num_prompts or num_generations, or set problems.difficulties"
            )
    left = {kind: Counter(dict.fromkeys(c, min(c.values()))) for kind, c in counts.items()}
    kept = []
    for kind, row in made:
        if left[kind][difficulty(row)] > 0:
            left[kind][difficulty(row)] -= 1
            kept.append((kind, row))
    return kept


def _write_rows(stage: Stage, made) -> dict[str, int]:
    """Both files; in them a row says by itself which problem it is about."""
    places = stage.places(0, stage.config.num_prompts)
    problems = stage.problems(0, stage.config.num_prompts)
    counts = {}
    for kind in ("rows", "pairs"):
        rows = [
            {
                **row,
                "prompt": row.get("prompt", problems[row["problem"]].prompt),
                "problem": places[row["problem"]]._asdict(),
            }
            for k, row in made
            if k == kind
        ]
        counts[kind] = len(rows)
        files.write_jsonl(stage.directory / f"{kind}.jsonl", rows)
    return counts


def _shares(written: Sequence[Sequence[Sampled]]) -> dict[str, float]:
    flat = [completion for group in written for completion in group]
    return {
        "completions": len(flat),
        "accuracy": sum(c.verdict.correct for c in flat) / len(flat),
        "format_rate": sum(c.verdict.formatted for c in flat) / len(flat),
        "mean_length": sum(len(c.ids) for c in flat) / len(flat),
    }


def _write_meta(stage: Stage, counts: dict[str, float], seconds: float) -> None:
    meta = stage.meta(complete=True, seconds=seconds, counts=counts)
    files.write_json(stage.directory / META, meta)
