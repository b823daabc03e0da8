"""The configuration of stages of reinforcement learning."""

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
from jaxrl_reason.losses import LOSS_TYPES
from jaxrl_reason.objectives import AGGREGATORS
from jaxrl_reason.sampling import SamplingConfig
from jaxrl_reason.stages.data_config import Positive, Problems
from jaxrl_reason.stages.loss_options import (
    POLICY_OPTIONS,
    check_loss_options,
    check_policy_loss,
    is_of_sequence,
    without_effect,
)
from jaxrl_reason.stages.policy_mismatch import MismatchConfig
from jaxrl_reason.stages.reward_config import (
    AnyReward,
    reward_name,
    reward_scope,
    runs_elsewhere,
    uses_device,
)
from jaxrl_reason.stages.stage_config import Training


class DynamicSampling(Config):
    """DAPO's dynamic sampling: groups that teach nothing are replaced. arXiv 2503.14476."""

    max_batches: Annotated[int, Field(ge=2)]
    """At most this many times `prompts_per_step` problems in a step; then dead groups fill up."""
    metric: str | None = None
    """Name of the reward that must vary within a group; null: any of them."""


class Phase(Config):
    """A part of a curriculum."""

    steps: Positive
    """How long it lasts; the last phase goes on to the end."""
    difficulties: Annotated[tuple[int, ...], Field(min_length=1)]
    """Difficulties of its problems, equally often."""


class PolicyConfig(Training):
    """What GRPO and MORL share: sampling a batch and updating on it."""

    problems: Problems = Problems()
    """Which problems are sampled for."""
    curriculum: tuple[Phase, ...] = ()
    """Phases with difficulties of their own; without any, `problems` says all."""
    prompts_per_step: Positive
    """Problems sampled in a step."""
    num_generations: Annotated[int, Field(ge=2)] = 8
    """Completions per problem: the group."""
    max_completion_length: Positive
    """Longest completion in tokens; longer ones are cut."""
    sampling: SamplingConfig = SamplingConfig()
    """How completions are drawn."""
    dynamic_sampling: DynamicSampling | None = None
    """Replace groups whose rewards are all equal by groups of further problems."""
    mask_truncated_completions: bool = False
    """Leave completions that were cut at the longest length out of the loss."""
    max_num_seqs: Positive | None = None
    """Completions decoded at once; the others wait until one ends. Null: all of a step. Fewer need
    less memory for keys and values, and rows that end early are filled again."""
    precompile: bool = False
    """Compile all sizes of sampling before the first step; otherwise each when it is first met."""
    row_length: Positive | None = None
    """Tokens of a row of the update; null: room for a prompt with its group, up to 2048."""
    microbatch_tokens: Positive | None = None
    """Tokens of a microbatch; changes no result but what `clip_cov` and `kl_cov` choose. Null: one
    row of each device on CPUs, 8192 tokens of each on others."""
    mismatch: MismatchConfig = MismatchConfig()
    """What happens when sampling and training disagree about log-probs."""
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
    reward_workers: Annotated[int, Field(ge=0)] = 0
    """Processes that read completions and compute rewards; 0: the main process does it."""
    max_staleness: Annotated[int, Field(ge=0, le=1)] = 0
    """1: sample the next batch before the update on this one, while its rewards are computed."""
    guard_steps: Positive = 10
    """Steps in a row without any advantage after which the run warns."""

    @property
    def options(self) -> dict[str, float]:
        """The arguments of the loss."""
        given = {**self._bounds, **self.loss_options}
        needs = "epsilon" in LOSS_TYPES[self.loss_type].required and "epsilon" not in given
        # Where the ratio is 1 any bound does.
        if needs and (self.is_on_policy or not is_of_sequence(self.loss_type)):
            given["epsilon"] = 0.2
        return given

    @property
    def is_on_policy(self) -> bool:
        """Whether every update is of the policy that sampled, so that the ratio is always 1."""
        return self.num_iterations == 1 and self.max_staleness == 0

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
        if self.is_on_policy and set_here:
            inert = without_effect(self.loss_type, self.options)
            self._refuse_inert([name for name in inert if name in set_here])
        return self

    def difficulties(self, step: int) -> tuple[int, ...]:
        """Those of a step, counted from 0; empty where the task mixes them."""
        for phase in self.curriculum:
            if step < phase.steps:
                return phase.difficulties
            step -= phase.steps
        return self.curriculum[-1].difficulties if self.curriculum else self.problems.difficulties

    @pydantic.model_validator(mode="after")
    def _curriculum_acts(self):
        if self.curriculum and self.problems.difficulties:
            raise ValueError("problems.difficulties cannot act beside curriculum; remove one")
        begun = sum(phase.steps for phase in self.curriculum[:-1])
        if begun >= self.steps:
            raise ValueError(
                f"the last phase of curriculum begins at step {begun + 1} and the stage has "
                f"steps={self.steps}; raise steps or shorten the phases before"
            )
        return self

    def _refuse_inert(self, inert: list[str]) -> None:
        if not inert:
            return
        required = {*LOSS_TYPES[self.loss_type].required} - {"epsilon"}
        other = "choose another loss_type" if required & set(inert) else "remove it"
        raise ValueError(
            f"{' and '.join(inert)} cannot act: with num_iterations=1 the ratio is always 1, where "
            f"loss_type={self.loss_type} has the same gradient whatever its value; {other} or set "
            "num_iterations > 1 or max_staleness=1"
        )

    @pydantic.model_validator(mode="after")
    def _completions_and_rewards_differ(self):
        if self.sampling.temperature == 0:
            raise ValueError("sampling.temperature=0 gives a group of equal completions; raise it")
        names = [reward_name(reward) for reward in self.rewards]
        if len(set(names)) != len(names):
            raise ValueError(f"rewards have the names {names}; each may occur once")
        for reward in self.rewards:
            if reward.kind == "overlong" and reward.cache > self.max_completion_length:
                raise ValueError(
                    f"rewards.overlong.cache={reward.cache} exceeds max_completion_length="
                    f"{self.max_completion_length}; every completion would be punished, an empty "
                    "one too"
                )
        return self

    @pydantic.model_validator(mode="after")
    def _judges_have_a_device(self):
        on_device = [reward_name(reward) for reward in self.rewards if uses_device(reward)]
        if on_device and self.reward_workers:
            raise ValueError(
                f"reward_workers={self.reward_workers} cannot be beside reward {on_device[0]!r}: "
                "a checkpoint judges on the devices, which belong to the main process; set "
                "reward_workers=0, or let a server judge (backend.kind=openai)"
            )
        return self

    @pydantic.model_validator(mode="after")
    def _dynamic_sampling_knows_its_rewards(self):
        if self.dynamic_sampling is None:
            return self
        names = [reward_name(reward) for reward in self.rewards]
        metric = self.dynamic_sampling.metric
        if metric is not None and metric not in names:
            raise ValueError(
                f"dynamic_sampling.metric={metric!r} is no reward; {nearest(metric, names)}"
            )
        late = [name for name, r in zip(names, self.rewards, strict=True) if _is_of_batch(r)]
        if late:
            raise ValueError(
                f"dynamic_sampling must know the rewards of a group before the batch is complete, "
                f"and reward {late[0]!r} has scope=batch; set its scope to group or completion"
            )
        if self.max_staleness:
            raise ValueError(
                "max_staleness=1 cannot act with dynamic_sampling, which waits for the rewards of "
                "a batch before the next one begins; remove one of them"
            )
        return self

    @pydantic.model_validator(mode="after")
    def _staleness_acts(self):
        if self.max_staleness == 0:
            return self
        if min(self.save_steps, self.steps) == 1:
            raise ValueError(
                "max_staleness=1 cannot act with a checkpoint after every step: a batch right "
                "after a checkpoint is sampled by its policy; raise steps and save_steps"
            )
        if self.reward_workers == 0 and not any(map(runs_elsewhere, self.rewards)):
            raise ValueError(
                "max_staleness=1 samples while rewards are computed elsewhere, and with "
                "reward_workers=0 these rewards are computed in between; set reward_workers, or "
                "remove max_staleness"
            )
        return self

    @property
    def updates(self) -> int:
        """Updates of the optimiser in the whole stage."""
        return self.steps * self.num_iterations


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
    hypervolume_weighting: bool = False
    """Multiply the advantages of a step by 0.5 to 2, the more the further the batch's mean rewards
    push the Pareto front outward."""
    conflict_steps: Positive | None = None
    """Every so many steps, compare the update with MGDA on the objectives' gradients, for which
    each takes a backward pass of its own; null: never."""

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


def reward_weights(config: PolicyConfig) -> list[float]:
    """The weight of each reward."""
    return [1.0 if reward.weight is None else reward.weight for reward in config.rewards]


def _is_of_batch(reward: AnyReward) -> bool:
    return reward_scope(reward) == "batch"
