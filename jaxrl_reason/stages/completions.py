"""Metrics of a batch of completions, by TRL's names."""

import numpy as np

from jaxrl_reason.sampling import Rollout
from jaxrl_reason.stages.policy_config import PolicyConfig
from jaxrl_reason.stages.reward_config import reward_name
from jaxrl_reason.stages.scoring import Scored


def completion_metrics(config: PolicyConfig, scored: Scored, rollout: Rollout) -> dict[str, float]:
    """Lengths, rewards, and how many groups teach nothing."""
    lengths = rollout.lengths
    metrics = {
        "completions/mean_length": lengths.mean(),
        "completions/min_length": lengths.min(),
        "completions/max_length": lengths.max(),
        "completions/clipped_ratio": 1 - rollout.finished.mean(),
        "num_tokens": lengths.sum(),
    }
    for m, reward in enumerate(config.rewards):
        name = reward_name(reward)
        values = scored.rewards[scored.mask[:, m], m]
        metrics[f"rewards/{name}/mean"] = values.mean() if values.size else 0.0
        metrics[f"rewards/{name}/std"] = values.std() if values.size else 0.0
    groups = scored.groups(config.num_generations)
    dead = np.asarray([not group.varies() for group in groups])
    return metrics | {"frac_reward_zero_std": dead.mean(), "dead_groups": dead.sum()}
