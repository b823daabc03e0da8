"""The configuration of each kind of stage. A default lives here and nowhere else."""

import functools
import inspect
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
from jaxrl_reason.steps import OptimizerConfig

Positive = Annotated[int, Field(gt=0)]
Share = Annotated[float, Field(ge=0, le=1)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]


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


class Reward(Config):
    """What all rewards have in common."""

    weight: Annotated[float, Field(gt=0)] | None = None
    """Share in a weighted sum, 1 when null; a reward that should not count is left out."""


class AccuracyReward(Reward):
    """1 if the task's verifier accepts the answer."""

    kind: Literal["accuracy"]
    """`accuracy`: 0 or 1 by the verifier."""


class FormatReward(Reward):
    """1 if the completion is one think block followed by one answer block."""

    kind: Literal["format"]
    """`format`: 0 or 1 by the layout."""


class LengthReward(Reward):
    """1 up to `low` tokens, falling linearly to 0 at `high`; 0 unless the answer is right."""

    kind: Literal["length"]
    """`length`: shorter is better, among right answers."""
    low: Positive
    """Completion length in tokens up to which the reward is 1."""
    high: Positive
    """Completion length in tokens from which the reward is 0."""

    @pydantic.model_validator(mode="after")
    def _ordered(self):
        if self.low >= self.high:
            raise ValueError(f"low={self.low} must be smaller than high={self.high}")
        return self


class PythonReward(Reward):
    """A function of the user's with TRL's signature."""

    kind: Literal["python"]
    """`python`: `f(prompts, completions, completion_ids, **columns) -> list[float | None]`."""
    name: str
    """Name in the metrics."""
    function: Annotated[str, Field(pattern=r"^[\w.]+:\w+$")]
    """Where it is, as `package.module:function`."""


AnyReward = Annotated[
    AccuracyReward | FormatReward | LengthReward | PythonReward, Field(discriminator="kind")
]


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
    logprob_chunk_size: Positive = 65_536
    """Tokens whose logits may exist at once."""


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
    """Direct preference optimisation against the parent as reference. arXiv 2305.18290."""

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
    loss_type: tuple[str, ...] = ("sigmoid",)
    """Terms of the loss by TRL's names; `sft` is the chosen completion's likelihood."""
    loss_weights: tuple[float, ...] | None = None
    """Weight of each term; 1 each when null."""

    @pydantic.model_validator(mode="after")
    def _terms(self):
        allowed = [*PREFERENCE_LOSSES, "sft"]
        unknown = [name for name in self.loss_type if name not in allowed]
        if unknown or not self.loss_type:
            raise ValueError(f"loss_type={list(self.loss_type)}; allowed are {allowed}")
        if set(self.loss_type) == {"sft"}:
            raise ValueError("loss_type needs a preference term; for `sft` alone use an sft stage")
        if self.loss_weights is not None and len(self.loss_weights) != len(self.loss_type):
            raise ValueError(
                f"loss_weights has {len(self.loss_weights)} entries for "
                f"{len(self.loss_type)} terms in loss_type"
            )
        if self.label_smoothing and not set(SMOOTHED_LOSSES) & set(self.loss_type):
            raise ValueError(
                f"label_smoothing cannot act with loss_type={list(self.loss_type)}; "
                f"it acts with {sorted(SMOOTHED_LOSSES)}"
            )
        if "robust" in self.loss_type and not self.label_smoothing:
            raise ValueError("loss_type=robust corrects for label_smoothing, which is 0; set it")
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
    """Rows of prompt and completions, packed, in one microbatch; its size changes no result."""
    num_iterations: Positive = 1
    """Updates on each batch of completions; from the second on the ratio is not 1."""
    loss_type: str = "dapo"
    """Per-token loss and its average, by TRL's names."""
    epsilon: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Lower clip of the ratio, 1 - epsilon; 0.2 when null and num_iterations > 1."""
    epsilon_high: Annotated[float, Field(gt=0)] | None = None
    """Upper clip: 1 + epsilon_high, epsilon when null; with cispo the largest weight itself."""
    delta: Annotated[float, Field(gt=1)] | None = None
    """Upper bound on the ratio where the advantage is negative; no bound when null."""
    beta: Annotated[float, Field(ge=0)] = 0.0
    """Weight of KL(policy || parent); 0 loads no reference."""
    rewards: Annotated[tuple[AnyReward, ...], Field(min_length=1)]
    """Rewards, each with its options."""

    @property
    def clipping(self) -> dict[str, float]:
        """The bounds on the ratio that are set, as the loss takes them."""
        # With one update the ratio is 1 and any bound does; cispo needs no lower one.
        epsilon = self.epsilon if self.loss_type == "cispo" else self.epsilon or 0.2
        bounds = {"epsilon": epsilon, "epsilon_high": self.epsilon_high, "delta": self.delta}
        return {name: bound for name, bound in bounds.items() if bound is not None}

    @pydantic.model_validator(mode="after")
    def _acts(self):
        if self.loss_type not in LOSS_TYPES:
            raise ValueError(f"loss_type={self.loss_type!r}; allowed are {list(LOSS_TYPES)}")
        bounds = ("epsilon", "epsilon_high", "delta")
        clips = [name for name in bounds if getattr(self, name) is not None]
        useless = [name for name in clips if name not in LOSS_TYPES[self.loss_type].options]
        if useless:
            raise ValueError(f"{useless[0]} cannot act with loss_type={self.loss_type}; remove it")
        if self.loss_type == "cispo" and (self.epsilon_high or 0) < 1:
            raise ValueError("loss_type=cispo needs epsilon_high >= 1: the largest weight itself")
        if clips and self.num_iterations == 1:
            raise ValueError(
                f"{' and '.join(clips)} cannot act: with num_iterations=1 the ratio is always 1 "
                "and never clipped; remove it or set num_iterations > 1"
            )
        upper = 1 + self.clipping.get("epsilon_high", self.clipping.get("epsilon", 0.0))
        if self.delta is not None and self.delta <= upper:
            raise ValueError(f"delta={self.delta} must exceed the upper clip, {upper:g}")
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


def reward_name(reward: Reward) -> str:
    """The name of a reward in metrics."""
    return reward.name if isinstance(reward, PythonReward) else reward.kind
