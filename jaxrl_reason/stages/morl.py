"""Multi-objective reinforcement learning: GRPO with several rewards kept apart.

Only one line differs from `grpo.py`: instead of adding the rewards up and normalising the sum, an
aggregator of `objectives.py` reads the vector of rewards of every completion and returns one
advantage (P-FAB, arXiv 2604.04415; GDPO, arXiv 2601.05242; and others).
"""

import jax
import numpy as np

from jaxrl_reason.objectives import dynamic_weights_hypervolume
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
    front = FrontFactor() if config.hypervolume_weighting else None

    def advantages_of(scored: Scored):
        advantages, weights = jax.device_get(aggregate(scored.rewards, scored.mask))
        means = weights.mean(axis=0)
        metrics = {f"objectives/weights/{n}": w for n, w in zip(names, means, strict=True)}
        if front is not None:
            metrics["objectives/hypervolume_factor"] = factor = front.next(scored)
            advantages = advantages * np.float32(factor)
        return advantages, metrics

    look = Conflict(stage).look if config.conflict_steps else None
    train_policy(stage, advantages_of, look, memory=front)


class FrontFactor:
    """What the advantages of a step are multiplied by: more while the Pareto front moves outward.

    Dynamic reward weighting guided by hypervolume (arXiv 2509.11452). The authors multiply the
    scalarised reward, and measure the front on validation problems at intervals. Here a point of
    the front is the mean of each reward over the batch of a step, before its update: problems that
    are not repeated are as good as held out. The first batch is the reference point.
    """

    def __init__(self):
        self._history: list[list[float]] = []

    def load(self, saved: list[list[float]]) -> None:
        """Go on from what `state` gave."""
        self._history = saved

    def state(self) -> list[list[float]]:
        """The reference point, then the batches that added volume: [N, M] as JSON."""
        return self._history

    def next(self, scored: Scored) -> float:
        """The factor of a batch, from 0.5 (nothing gained) to 2.

        A batch in which a reward applies to no completion is no point and gains nothing.
        """
        counts = scored.mask.sum(axis=0)
        sums = (scored.rewards * scored.mask).sum(axis=0, dtype=np.float64)
        point = (sums / np.maximum(counts, 1)).tolist()
        known = self._history or [point]
        is_point = bool(counts.all())
        factor, longer = dynamic_weights_hypervolume(known, point if is_point else known[0])
        if is_point:
            self._history = np.asarray(longer).tolist()
        return factor
