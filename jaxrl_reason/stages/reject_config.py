"""The configuration of rejection sampling."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

import pydantic
from pydantic import Field

from jaxrl_reason.plugins import PATTERN
from jaxrl_reason.sampling import SamplingConfig
from jaxrl_reason.stages.data_config import Positive, Problems, Share
from jaxrl_reason.stages.stage_config import FromParent


class RejectConfig(FromParent):
    """Rejection sampling: what a policy wrote and a verifier accepted, as data of later stages."""

    kind: Literal["reject"]
    """`reject`"""
    rejected_from: str | None = None
    """Stage whose completions are the rejected sides of pairs; the parent when null."""
    problems: Problems = Problems()
    """What is sampled for."""
    num_prompts: Positive
    """Number of problems."""
    num_generations: Positive = 8
    """Completions of each, of the parent and of `rejected_from`."""
    sampling: SamplingConfig = SamplingConfig()
    """How completions are drawn."""
    max_completion_length: Positive
    """Longest completion in tokens; one that is cut there is never kept."""
    min_accuracy: Share = 0.0
    """Problems solved in a smaller share of completions are left out."""
    max_accuracy: Share = 1.0
    """Problems solved in a larger share are left out, as too easy to learn from."""
    dedupe: bool = True
    """Of equal completions of a problem only the first counts."""
    rows_per_prompt: Annotated[int, Field(ge=0)] = 1
    """At most so many right completions of a problem become rows."""
    select: Literal["random", "shortest", "longest"] = "random"
    """Which of the right completions they are."""
    pairs_per_prompt: Annotated[int, Field(ge=0)] = 1
    """At most so many pairs of a right and a wrong completion of a problem."""
    balance: bool = False
    """The same number of rows, and of pairs, of every difficulty: that of the rarest."""
    builder: Annotated[str, Field(pattern=PATTERN)] | None = None
    """Function `f(groups, rng, **options)` that makes rows and pairs in place of the choice above,
    as `package.module:function`."""
    options: Mapping[str, Any] = {}
    """Its further arguments."""

    @pydantic.model_validator(mode="after")
    def _keeps(self):
        if self.min_accuracy > self.max_accuracy:
            raise ValueError(
                f"min_accuracy={self.min_accuracy:g} exceeds max_accuracy={self.max_accuracy:g}"
            )
        if self.sampling.temperature == 0 and self.num_generations > 1:
            raise ValueError(
                f"sampling.temperature=0 gives {self.num_generations} equal completions; raise it "
                "or set num_generations=1"
            )
        if self.builder is None:
            self._chooses()
        else:
            chosen = [n for n in _CHOICE if getattr(self, n) != type(self).model_fields[n].default]
            if chosen:
                raise ValueError(f"{chosen[0]} cannot act beside builder, which chooses itself")
        return self

    def _chooses(self) -> None:
        if self.options:
            raise ValueError(f"options={dict(self.options)} are of a builder; set builder")
        if self.rows_per_prompt == self.pairs_per_prompt == 0:
            raise ValueError("rows_per_prompt=0 and pairs_per_prompt=0 keep nothing; raise one")
        if self.select != "random" and self.rows_per_prompt == 0:
            raise ValueError(f"select={self.select} cannot act with rows_per_prompt=0")
        if self.rejected_from is not None and self.pairs_per_prompt == 0:
            raise ValueError("rejected_from cannot act with pairs_per_prompt=0; remove it")


_CHOICE = ("rows_per_prompt", "select", "pairs_per_prompt")
"""Fields of the choice that a builder replaces."""
