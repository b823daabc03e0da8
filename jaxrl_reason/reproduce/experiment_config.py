"""The configuration of an experiment: a tree of stages, its arms, what they claim and may cost."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

import pydantic
from pydantic import Field

from jaxrl_reason.config import Config
from jaxrl_reason.errors import InputError, nearest
from jaxrl_reason.plugins import PATTERN, load_object
from jaxrl_reason.reproduce.budget import Quantity, planned
from jaxrl_reason.stages.config import RunConfig
from jaxrl_reason.stages.reject_config import RejectConfig
from jaxrl_reason.stages.stage_config import Names

DERIVED = "derived."
"""How a test names a metric of `metrics`."""


class Paper(Config):
    """What is reproduced."""

    title: str
    """Title of the paper."""
    arxiv: Annotated[str, Field(pattern=r"^\d{4}\.\d{4,5}$")]
    """Its number at arXiv."""


class Arm(Config):
    """One of the recipes that are compared."""

    stage: str
    """Its last stage; the stages before it follow from their parents."""
    label: str | None = None
    """What tables and plots call it; its name when null."""


class Budget(Config):
    """Numbers that must be the same for some arms, so that a comparison is fair."""

    arms: Annotated[Names, Field(min_length=2)]
    """Names of the arms."""
    equal: Annotated[tuple[Quantity, ...], Field(min_length=1)]
    """Quantities, each summed over all stages of an arm."""


class Metric(Config):
    """A number of a stage that is computed from what was measured."""

    function: Annotated[str, Field(pattern=PATTERN)]
    """`f(records, stage, **options) -> float` as `package.module:function`; `records` has the
    record of each stage."""
    options: Mapping[str, Any] = {}
    """Its further arguments."""
    stages: Names
    """Stages that have it."""
    train: Names = ()
    """Series of training metrics that the function reads."""


class ClaimTest(Config):
    """A statement about one number, which the seeds bear out or not."""

    metric: str
    """Path of the number in a stage's record, for example `sets.hard.accuracy`."""
    arm: str
    """Stage that it is read of."""
    against: str | None = None
    """Stage whose number is taken from it, seed by seed; null: the number itself."""
    ratio: bool = False
    """Divide the two numbers and compare the ratio, on a logarithmic scale."""
    direction: Literal["higher", "lower", "within"]
    """On which side of `margin` the number is claimed to be; `within`: no further than that off."""
    margin: float = 0.0
    """Bound of the claim; of a ratio `within`, the largest factor either way."""

    @pydantic.model_validator(mode="after")
    def _acts(self):
        if self.ratio and self.against is None:
            raise ValueError("ratio=true needs against, the stage to divide by")
        if self.ratio and self.margin <= 0:
            raise ValueError(f"margin={self.margin:g} of a ratio must be > 0; 1 means equal")
        least = 1 if self.ratio else 0
        if self.direction == "within" and self.margin <= least:
            raise ValueError(f"margin={self.margin:g} of `within` must be > {least}")
        return self


class Claim(Config):
    """Something that the paper says, at this scale."""

    claim: str
    """One sentence."""
    tests: Annotated[tuple[ClaimTest, ...], Field(min_length=1)]
    """All of which must hold."""


class Pareto(Config):
    """A plot of two numbers of which neither may be bought with the other."""

    x: str
    """Path of a number in a stage's record, as in a test; larger is better."""
    y: str
    """Another one; larger is better."""
    arms: Names = ()
    """Arms that are shown; all when empty."""
    reference: tuple[float, float] = (0.0, 0.0)
    """Corner above which the hypervolume is measured."""


class ExperimentConfig(Config):
    """An experiment as its YAML file has it."""

    paper: Paper
    """What is reproduced."""
    question: str
    """What is tested at this scale, in a sentence or two."""
    run: RunConfig
    """The run of a seed; stages that arms share stand here once."""
    arms: Annotated[Mapping[str, Arm], Field(min_length=1)]
    """The recipes by name, the most interesting one first."""
    budget: tuple[Budget, ...] = ()
    """What arms must have in common."""
    metrics: Mapping[str, Metric] = {}
    """Further numbers of stages by name."""
    claims: Mapping[str, Claim] = {}
    """Claims by a short name such as `C1`."""
    pareto: tuple[Pareto, ...] = ()
    """Plots of two numbers of the arms against each other."""
    smoke: Mapping[str, Any] = {}
    """Overrides of `run` for `--smoke`, by dotted key."""
    findings: str = ""
    """Markdown for the page, written by hand once there are results."""

    @pydantic.model_validator(mode="after")
    def _names_exist(self):
        stages = ["init", *self.run.stages]
        policies = [name for name, s in self.run.stages.items() if not isinstance(s, RejectConfig)]
        for name, arm in self.arms.items():
            _check_name(f"arms.{name}.stage", arm.stage, policies)
        for number, budget in enumerate(self.budget):
            for name in budget.arms:
                _check_name(f"budget.{number}.arms", name, list(self.arms))
        for name, metric in self.metrics.items():
            for stage in metric.stages:
                _check_name(f"metrics.{name}.stages", stage, stages)
        for name, claim in self.claims.items():
            for number, test in enumerate(claim.tests):
                self._check_test(f"claims.{name}.tests.{number}", test, stages)
        for number, plot in enumerate(self.pareto):
            for name in plot.arms:
                _check_name(f"pareto.{number}.arms", name, list(self.arms))
            for name in plot.arms or self.arms:
                for field in ("x", "y"):
                    metric, stage = getattr(plot, field), self.arms[name].stage
                    self._check_derived(f"pareto.{number}", field, metric, "arms", stage)
        return self

    def _check_test(self, where: str, test: ClaimTest, stages: list[str]) -> None:
        for field in ("arm", "against"):
            stage = getattr(test, field)
            if stage is None:
                continue
            _check_name(f"{where}.{field}", stage, stages)
            self._check_derived(where, "metric", test.metric, field, stage)

    def _check_derived(self, where: str, key: str, metric: str, field: str, stage: str) -> None:
        """Refuse a derived metric that is unknown, or that this stage does not have."""
        if metric.startswith(DERIVED):
            name = metric.removeprefix(DERIVED)
            _check_name(f"{where}.{key}", name, list(self.metrics))
            _check_name(f"{where}.{field}", stage, list(self.metrics[name].stages))

    @pydantic.model_validator(mode="after")
    def _metrics_load(self):
        for name, metric in self.metrics.items():
            try:
                load_object(metric.function, "metric function")
            except InputError as error:
                raise ValueError(f"metrics.{name}: {error}") from error
        return self

    @pydantic.model_validator(mode="after")
    def _budgets_are_equal(self):
        costs = {name: planned(self.run, arm.stage) for name, arm in self.arms.items()}
        for budget in self.budget:
            first, *others = budget.arms
            for quantity in budget.equal:
                for other in others:
                    here, there = costs[first][quantity], costs[other][quantity]
                    if here != there:
                        raise ValueError(
                            f"budget: {quantity} of arm {first} is {here:,} and of arm {other} "
                            f"{there:,}; make them equal or take {quantity} out of the budget"
                        )
        return self


def _check_name(where: str, name: str, known: list[str]) -> None:
    if name not in known:
        raise ValueError(f"{where}={name!r} is unknown; {nearest(name, known)}")
