"""One pure update for each kind of training; the stages jit, shard and donate them."""

from jaxrl_reason.steps.forward import make_batch_logprobs, model_logprobs, target_logprobs
from jaxrl_reason.steps.policy import PolicyObjective, make_policy_gradient, make_policy_step
from jaxrl_reason.steps.preference import (
    make_preference_step,
    needs_reference,
    pair_logprobs,
)
from jaxrl_reason.steps.sft import make_sft_step
from jaxrl_reason.steps.state import (
    AnyOptimizer,
    Optimizer,
    OptimizerConfig,
    Step,
    TrainState,
    init_state,
    learning_rate_schedule,
    make_optimizer,
    state_shardings,
    trains_of,
)
from jaxrl_reason.steps.trained import Trains, combine, count_parameters, everything, partition

__all__ = [
    "AnyOptimizer",
    "Optimizer",
    "OptimizerConfig",
    "PolicyObjective",
    "Step",
    "TrainState",
    "Trains",
    "combine",
    "count_parameters",
    "everything",
    "init_state",
    "learning_rate_schedule",
    "make_batch_logprobs",
    "make_optimizer",
    "make_policy_gradient",
    "make_policy_step",
    "make_preference_step",
    "make_sft_step",
    "model_logprobs",
    "needs_reference",
    "pair_logprobs",
    "partition",
    "state_shardings",
    "target_logprobs",
    "trains_of",
]
