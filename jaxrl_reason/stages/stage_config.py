"""The configuration of each kind of stage. A default lives here and nowhere else."""

import functools
import inspect
import math
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal

import jax
import numpy as np
import pydantic
from pydantic import Field

from jaxrl_reason.config import Config
from jaxrl_reason.errors import nearest
from jaxrl_reason.losses import LOSS_TYPES, PREFERENCE_LOSSES, SMOOTHED_LOSSES
from jaxrl_reason.objectives import AGGREGATORS
from jaxrl_reason.sampling import SamplingConfig
from jaxrl_reason.stages.loss_options import (
    POLICY_OPTIONS,
    PREFERENCE_OPTIONS,
    check_loss_options,
    check_policy_loss,
    check_preference_loss,
    is_of_sequence,
    without_effect,
)
from jaxrl_reason.stages.reward_config import AnyReward, reward_name
from jaxrl_reason.steps import OptimizerConfig

Positive = Annotated[int, Field(gt=0)]
Share = Annotated[float, Field(ge=0, le=1)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]


def _listed(given: Any) -> Any:
    if isinstance(given, str):
        return (given,)
    # Past this validator a list is no JSON array any more, and pydantic would want a tuple.
    return tuple(given) if isinstance(given, list) else given


Names = Annotated[
    tuple[str, ...],
    pydantic.BeforeValidator(_listed, json_schema_input_type=str | tuple[str, ...]),
]
"""A list of names; a single one need not be in a list."""


class TraceData(Config):
    """Demonstrations written by the task's own solver."""

    kind: Literal["traces"] = "traces"
    """`traces`: from the task."""
    num_examples: Positive = 4096
    """Number of demonstrations."""
    styles: Mapping[Literal["long", "short", "answer"], Share] = {"long": 1.0}
    """Share of each style of trace; shares sum to 1."""

    @pydantic.model_validator(mode="after")
    def _sums_to_one(self):
        if abs(sum(self.styles.values()) - 1) > 1e-6:
            raise ValueError(f"styles sum to {sum(self.styles.values()):g}; they must sum to 1")
        return self


class FileData(Config):
    """Rows of a JSONL or Parquet file, or of a data set on the hub, in TRL's columns."""

    kind: Literal["file"]
    """`file`: from a file or the hub."""
    path: str
    """File, or id of a data set."""


class SampledPairs(Config):
    """Preference pairs from the parent's own samples: a correct completion against a wrong one."""

    kind: Literal["sampled"] = "sampled"
    """`sampled`: from the parent."""
    num_prompts: Positive = 512
    """Problems to sample for; those solved always or never give no pair."""
    num_generations: Annotated[int, Field(ge=2)] = 8
    """Completions per problem."""
    pairs_per_prompt: Positive = 1
    """At most this many pairs of one problem."""
    sampling: SamplingConfig = SamplingConfig()
    """How completions are drawn."""

    @pydantic.model_validator(mode="after")
    def _differ(self):
        if self.sampling.temperature == 0:
            raise ValueError("sampling.temperature=0 gives equal completions, no pair; raise it")
        return self


class Training(Config):
    """What all stages that train have in common."""

    parent: str = "init"
    """Stage to start from: an earlier one of this run, or `init` for the untrained model."""
    steps: Positive
    """Updates; for reinforcement learning, batches of completions."""
    optimizer: OptimizerConfig
    """AdamW and its schedule."""
    save_steps: Positive = 50
    """A checkpoint is written every so many steps, and after the last."""
    save_total_limit: Positive = 2
    """Checkpoints kept; older ones are deleted."""
    logprob_chunk_size: Positive | None = None
    """Tokens whose logits may exist at once; null: as many as have 512 MiB of logits."""


class SFTConfig(Training):
    """Supervised fine-tuning on demonstrations, on the completion's tokens only."""

    kind: Literal["sft"]
    """`sft`"""
    data: Annotated[TraceData | FileData, Field(discriminator="kind")] = TraceData()
    """Demonstrations."""
    batch_size: Positive
    """Rows of an update."""
    gradient_accumulation_steps: Positive = 1
    """Microbatches of one update."""
    max_length: Positive
    """Tokens of a row."""
    packing: bool = True
    """Several demonstrations share a row, each seeing only itself."""


class DPOConfig(Training):
    """Preference optimisation on pairs: DPO, arXiv 2305.18290, and its relatives."""

    kind: Literal["dpo"]
    """`dpo`"""
    data: Annotated[SampledPairs | FileData, Field(discriminator="kind")] = SampledPairs()
    """Pairs of a chosen and a rejected completion."""
    batch_size: Positive
    """Pairs of an update."""
    gradient_accumulation_steps: Positive = 1
    """Microbatches of one update."""
    max_length: Positive
    """Longest prompt and completion together, in tokens."""
    beta: Annotated[float, Field(gt=0)] = 0.1
    """Inverse temperature of the implied reward; larger stays closer to the reference."""
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] = 0.0
    """Assumed share of pairs whose labels are swapped."""
    loss_type: Names = ("sigmoid",)
    """Terms of the loss by TRL's names; `sft` is the chosen completion's likelihood."""
    loss_weights: tuple[float, ...] | None = None
    """Weight of each term; 1 each when null."""
    loss_options: Mapping[str, float | str] = {}
    """Other arguments of the terms by name, for example `discopop_tau: 0.05`."""

    @property
    def options(self) -> dict[str, Any]:
        """What the terms take besides `beta`."""
        return {"label_smoothing": self.label_smoothing, **self.loss_options}

    @pydantic.model_validator(mode="after")
    def _terms(self):
        allowed = [*PREFERENCE_LOSSES, "sft"]
        unknown = [name for name in self.loss_type if name not in allowed]
        if unknown or not self.loss_type:
            raise ValueError(f"loss_type={list(self.loss_type)}; allowed are {allowed}")
        if set(self.loss_type) == {"sft"}:
            raise ValueError("loss_type needs a preference term; for `sft` alone use an sft stage")
        weights = self.loss_weights or (1.0,) * len(self.loss_type)
        if len(weights) != len(self.loss_type):
            raise ValueError(
                f"loss_weights has {len(weights)} entries for {len(self.loss_type)} terms in "
                "loss_type"
            )
        for name, weight in zip(self.loss_type, weights, strict=True):
            if weight == 0 or not math.isfinite(weight):
                raise ValueError(
                    f"loss_weights gives {name} the weight {weight:g}; use a finite one other than "
                    "0, or remove the term"
                )
        return self

    @pydantic.model_validator(mode="after")
    def _term_options(self):
        if self.label_smoothing and not SMOOTHED_LOSSES & set(self.loss_type):
            raise ValueError(
                f"label_smoothing cannot act with loss_type={list(self.loss_type)}; "
                f"it acts with {sorted(SMOOTHED_LOSSES)}"
            )
        reasons = {
            "robust": "corrects for label_smoothing",
            "exo_pair": "takes the logarithm of label_smoothing",
        }
        for name in reasons.keys() & set(self.loss_type):
            if not self.label_smoothing:
                raise ValueError(f"loss_type={name} {reasons[name]}, which is 0; set it")
        check_loss_options(
            self.loss_options,
            self.loss_type,
            fields=("beta", "label_smoothing"),
            table=PREFERENCE_OPTIONS,
        )
        for name in self.loss_type:
            if name != "sft":
                check_preference_loss(name, {"beta": self.beta, **self.options})
        return self


class PolicyConfig(Training):
    """What GRPO and MORL share: sampling a batch and updating on it."""

    prompts_per_step: Positive
    """Problems sampled in a step."""
    num_generations: Annotated[int, Field(ge=2)] = 8
    """Completions per problem: the group."""
    max_completion_length: Positive
    """Longest completion in tokens; longer ones are cut."""
    sampling: SamplingConfig = SamplingConfig()
    """How completions are drawn."""
    microbatch_rows: Positive = 16
    """Packed rows in a microbatch; changes no result but what `clip_cov` and `kl_cov` choose."""
    num_iterations: Positive = 1
    """Updates on each batch of completions; from the second on the ratio is not 1."""
    loss_type: str = "dapo"
    """Loss and how it is averaged, by TRL's and verl's names."""
    epsilon: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Lower clip of the ratio, 1 - epsilon; null: 0.2 if the ratio is of a token, else required."""
    epsilon_high: Annotated[float, Field(gt=0)] | None = None
    """Upper clip: 1 + epsilon_high, epsilon when null; with cispo the largest weight itself."""
    delta: Annotated[float, Field(gt=1)] | None = None
    """Upper bound on the ratio where the advantage is negative; no bound when null."""
    loss_options: Mapping[str, float] = {}
    """Other arguments of the loss by name, for example `temperature_pos: 1.0` with sapo."""
    beta: Annotated[float, Field(ge=0)] = 0.0
    """Weight of KL(policy || parent); 0 loads no reference."""
    rewards: Annotated[tuple[AnyReward, ...], Field(min_length=1)]
    """Rewards, each with its options."""
    guard_steps: Positive = 10
    """Steps in a row without any advantage after which the run warns."""

    @property
    def options(self) -> dict[str, float]:
        """The arguments of the loss."""
        given = {**self._bounds, **self.loss_options}
        needs = "epsilon" in LOSS_TYPES[self.loss_type].required and "epsilon" not in given
        # With one update the ratio is 1 and any bound does.
        if needs and (self.num_iterations == 1 or not is_of_sequence(self.loss_type)):
            given["epsilon"] = 0.2
        return given

    @property
    def _bounds(self) -> dict[str, float]:
        bounds = {"epsilon": self.epsilon, "epsilon_high": self.epsilon_high, "delta": self.delta}
        return {name: bound for name, bound in bounds.items() if bound is not None}

    @pydantic.model_validator(mode="after")
    def _acts(self):
        if self.loss_type not in LOSS_TYPES:
            raise ValueError(f"loss_type={self.loss_type!r}; allowed are {list(LOSS_TYPES)}")
        useless = [name for name in self._bounds if name not in POLICY_OPTIONS[self.loss_type]]
        if useless:
            raise ValueError(f"{useless[0]} cannot act with loss_type={self.loss_type}; remove it")
        check_loss_options(
            self.loss_options,
            [self.loss_type],
            fields=("epsilon", "epsilon_high", "delta"),
            table=POLICY_OPTIONS,
        )
        check_policy_loss(self.loss_type, self.options)
        set_here = {*self._bounds, *self.loss_options}
        if self.num_iterations == 1 and set_here:
            inert = without_effect(self.loss_type, self.options)
            self._refuse_inert([name for name in inert if name in set_here])
        return self

    def _refuse_inert(self, inert: list[str]) -> None:
        if not inert:
            return
        required = {*LOSS_TYPES[self.loss_type].required} - {"epsilon"}
        other = "choose another loss_type" if required & set(inert) else "remove it"
        raise ValueError(
            f"{' and '.join(inert)} cannot act: with num_iterations=1 the ratio is always 1, where "
            f"loss_type={self.loss_type} has the same gradient whatever its value; {other} or set "
            "num_iterations > 1"
        )

    @pydantic.model_validator(mode="after")
    def _completions_and_rewards_differ(self):
        if self.sampling.temperature == 0:
            raise ValueError("sampling.temperature=0 gives a group of equal completions; raise it")
        names = [reward_name(reward) for reward in self.rewards]
        if len(set(names)) != len(names):
            raise ValueError(f"rewards have the names {names}; each may occur once")
        return self


class GRPOConfig(PolicyConfig):
    """Group-relative policy optimisation. arXiv 2402.03300."""

    kind: Literal["grpo"]
    """`grpo`"""
    scale_rewards: Literal["group", "batch", "none"] | None = None
    """Divide advantages by the deviation of group or batch, or not; null: as `loss_type` has it."""

    @property
    def advantage_scale(self) -> str:
        """`scale_rewards`, or what the paper of `loss_type` divides by."""
        return self.scale_rewards or LOSS_TYPES[self.loss_type].scale


class MORLConfig(PolicyConfig):
    """GRPO with several rewards kept apart until an aggregator makes one advantage of them."""

    kind: Literal["morl"]
    """`morl`"""
    aggregator: str = "pfab"
    """How objectives become one advantage; see `jaxrl_reason.objectives.AGGREGATORS`."""
    aggregator_options: Mapping[str, Any] = {}
    """Arguments of the aggregator, for example `scope: batch`."""

    @property
    def aggregator_takes_weights(self) -> bool:
        """Whether the rewards' weights mean something to the aggregator."""
        return "weights" in inspect.signature(AGGREGATORS[self.aggregator]).parameters

    @property
    def aggregate(self) -> Callable:
        """The aggregator with its options: rewards and mask [B, M] to advantages and weights."""
        options = dict(self.aggregator_options)
        if self.aggregator_takes_weights:
            options["weights"] = np.asarray(reward_weights(self), np.float32)
        return functools.partial(
            AGGREGATORS[self.aggregator], num_generations=self.num_generations, **options
        )

    @pydantic.model_validator(mode="after")
    def _aggregates(self):
        if self.aggregator not in AGGREGATORS:
            raise ValueError(f"aggregator={self.aggregator!r}; allowed are {list(AGGREGATORS)}")
        if len(self.rewards) < 2:
            raise ValueError("morl needs at least two rewards; with one use a grpo stage")
        weighted = [reward_name(reward) for reward in self.rewards if reward.weight is not None]
        if weighted and not self.aggregator_takes_weights:
            raise ValueError(
                f"the weight of reward {weighted[0]!r} cannot act: {self.aggregator} finds its own "
                "weights; remove it or choose an aggregator with weights, such as gdpo"
            )
        given = {"rewards", "mask", "num_generations", "weights"}
        parameters = inspect.signature(AGGREGATORS[self.aggregator]).parameters
        options = {name: p for name, p in parameters.items() if name not in given}
        unknown = [name for name in self.aggregator_options if name not in options]
        if unknown:
            raise ValueError(
                f"aggregator_options.{unknown[0]} is no option of {self.aggregator}; "
                f"{nearest(unknown[0], options)}"
            )
        missing = [n for n, p in options.items() if p.default is p.empty]
        missing = [name for name in missing if name not in self.aggregator_options]
        if missing:
            raise ValueError(f"aggregator_options must set {missing} for {self.aggregator}")
        shape = (self.num_generations, len(self.rewards))
        try:
            jax.eval_shape(self.aggregate, np.zeros(shape, np.float32), np.ones(shape, bool))
        except (TypeError, ValueError) as error:
            raise ValueError(f"aggregator_options of {self.aggregator}: {error}") from error
        return self


StageConfig = Annotated[
    SFTConfig | DPOConfig | GRPOConfig | MORLConfig, Field(discriminator="kind")
]


def reward_weights(config: PolicyConfig) -> list[float]:
    """The weight of each reward."""
    return [1.0 if reward.weight is None else reward.weight for reward in config.rewards]
