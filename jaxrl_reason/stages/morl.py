"""Multi-objective reinforcement learning: GRPO with several rewards kept apart.

Only one line differs from `grpo.py`: instead of adding the rewards up and normalising the sum, an
aggregator of `objectives.py` reads the vector of rewards of every completion and returns one
advantage (P-FAB, arXiv 2604.04415; GDPO, arXiv 2601.05242; and others).
"""

import jax

from jaxrl_reason.stages.completions import Scored
from jaxrl_reason.stages.conflict import Conflict
from jaxrl_reason.stages.context import Stage
from jaxrl_reason.stages.grpo import train_policy
from jaxrl_reason.stages.policy_config import MORLConfig
from jaxrl_reason.stages.reward_config import reward_name


def run_morl(stage: Stage) -> None:
    """Train on several rewards as separate objectives."""
    config: MORLConfig = stage.config
    names = [reward_name(reward) for reward in config.rewards]
    aggregate = jax.jit(config.aggregate)

    def advantages_of(scored: Scored):
        advantages, weights = jax.device_get(aggregate(scored.rewards, scored.mask))
        means = weights.mean(axis=0)
        metrics = {f"objectives/weights/{n}": w for n, w in zip(names, means, strict=True)}
        return advantages, metrics

    train_policy(stage, advantages_of, Conflict(stage).look if config.conflict_steps else None)
