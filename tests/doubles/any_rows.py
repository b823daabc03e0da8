"""Builders of `reject` stages that keep what a random model writes, right or wrong."""

from collections.abc import Iterable
from typing import Any

from jaxrl_reason.stages.groups import Group


def rows(groups: list[Group], rng, **options) -> Iterable[dict[str, Any]]:
    """The first completion of each problem."""
    for group in groups:
        yield {"problem": group.number, "completion": group.completions[0].text}


def rows_and_pairs(groups: list[Group], rng, **options) -> Iterable[dict[str, Any]]:
    """The same, preferred to the empty layout."""
    for group in groups:
        text = group.completions[0].text
        yield {"problem": group.number, "completion": text}
        yield {"problem": group.number, "chosen": text, "rejected": "<think></think>"}
