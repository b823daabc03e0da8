"""Signs that a stage's updates do nothing, or do harm: counted in the metrics and said once each.

    unit_ratio       an update after the first on a batch finds the policy where the first found it
    zero_advantages  no completion had an advantage, for `guard_steps` steps in a row
    empty_mask       no token of the batch counts
    nonfinite_loss   the loss or the gradient is NaN or infinite, so that the update is skipped
    off_policy       many tokens have another probability than when they were sampled

`guard/<kind>` is how often a sign was seen since the stage began: in updates for `unit_ratio`,
`nonfinite_loss` and `off_policy`, in steps for the other two. The count is in the checkpoint, so a
resumed run logs what an uninterrupted one would, and repeats no warning from before its checkpoint.
"""

import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxrl_reason.stages.policy_config import PolicyConfig
from jaxrl_reason.stages.stage_config import Training

LARGEST_OUTSIDE_SHARE = 0.05
"""Share of tokens with a ratio outside [0.5, 2] from which an update is called off-policy."""

_DISTANCE = "sampling/sampling_logp_difference/mean"
_OUTSIDE = "sampling/importance_sampling_ratio/outside_share"
_logger = logging.getLogger(__name__)


class Guard:
    """Looks at each step of a stage; holds counts and nothing that a step depends on."""

    def __init__(self, stage: str, config: Training, saved: Mapping[str, Any] | None = None):
        """Counts from 0, or from what `state` gave when the checkpoint was written."""
        policy = config if isinstance(config, PolicyConfig) else None
        kinds = ["empty_mask", "nonfinite_loss"]
        if policy is not None:
            kinds += ["zero_advantages", "off_policy"]
            kinds += ["unit_ratio"] if policy.num_iterations > 1 else []
        saved = saved or {"counts": {}, "steps_without_advantage": 0}
        self._stage = stage
        ahead = policy is not None and policy.max_staleness > 0
        self._first_is_off = _MOVED_SINCE if ahead else _DISAGREE
        self._guard_steps = 0 if policy is None else policy.guard_steps
        self._counts = {kind: saved["counts"].get(kind, 0) for kind in kinds}
        self._steps_without_advantage = saved["steps_without_advantage"]
        self.nonfinite_in_a_row = saved.get("nonfinite_in_a_row", 0)
        """Updates that were skipped since the last that was not."""

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps, as JSON values."""
        return {
            "counts": dict(self._counts),
            "steps_without_advantage": self._steps_without_advantage,
            "nonfinite_in_a_row": self.nonfinite_in_a_row,
        }

    def look(
        self,
        step: int,
        *,
        updates: Sequence[Mapping[str, Any]],
        counted_tokens: int,
        advantages: np.ndarray | None = None,
    ) -> dict[str, int]:
        """Count and report the signs of a step.

        Args:
            step: its number, from 1.
            updates: metrics of each of its updates, in order.
            counted_tokens: tokens of its batch under the mask of the loss.
            advantages: of its completions; only for reinforcement learning.

        Returns:
            `guard/<kind>` of every kind that the stage can show.
        """
        if counted_tokens == 0:
            self._found(step, "empty_mask", "no token of the batch counts in the loss", _EMPTY)
        if advantages is not None:
            self._look_at_advantages(step, advantages)
        for number in range(len(updates)):
            self._look_at_update(step, updates, number)
        return {f"guard/{kind}": count for kind, count in self._counts.items()}

    def _look_at_advantages(self, step: int, advantages: np.ndarray) -> None:
        self._steps_without_advantage += 1
        if np.any(advantages):
            self._steps_without_advantage = 0
        if self._steps_without_advantage >= self._guard_steps:
            seen = f"all advantages were 0 in {self._steps_without_advantage} steps in a row"
            self._found(step, "zero_advantages", seen, _DEAD)

    def _look_at_update(self, step: int, updates: Sequence[Mapping[str, Any]], number: int) -> None:
        now = updates[number]
        which = f"update {number + 1} of {len(updates)}" if len(updates) > 1 else "the update"
        loss, norm = float(now["loss"]), float(now["grad_norm"])
        self.nonfinite_in_a_row += 1
        if math.isfinite(loss) and not float(now["nonfinite_steps"]):
            self.nonfinite_in_a_row = 0
        else:
            seen = f"{which} had loss {loss:g} and gradient norm {norm:g}"
            self._found(step, "nonfinite_loss", seen, _SKIPPED)
        # Written so that NaN is found.
        if "off_policy" in self._counts and not float(now[_OUTSIDE]) <= LARGEST_OUTSIDE_SHARE:
            share = float(now[_OUTSIDE])
            seen = f"{share:.0%} of the tokens in {which} had a ratio outside [0.5, 2]"
            self._found(step, "off_policy", seen, _FAR_MOVED if number else self._first_is_off)
        if number > 0 and _has_not_moved(updates[0], updates[number - 1], now):
            norm = float(updates[number - 1]["grad_norm"])
            seen = f"the ratio was still 1 in {which}, after a gradient of norm {norm:.2g}"
            self._found(step, "unit_ratio", seen, _FROZEN)

    def _found(self, step: int, kind: str, seen: str, meaning: str) -> None:
        self._counts[kind] += 1
        if self._counts[kind] == 1:
            _logger.warning(
                "%s, step %d: %s. %s Further cases are only counted, in the metric guard/%s.",
                self._stage,
                step,
                seen,
                meaning,
                kind,
            )


_EMPTY = (
    "The step learns nothing. Look at the data: completions are empty, or cut off by the longest "
    "length."
)
_DEAD = (
    "Nothing is learnt from these completions: those of a prompt all got the same rewards, or "
    "several objectives cancel. Look at rewards/<name>/mean and /std, and at entropy: the task is "
    "too hard or too easy for the parent, or a reward never varies."
)
_SKIPPED = (
    "The update was skipped and the parameters stay as they were. Look at grad_norm of the steps "
    "before, at optimizer.learning_rate, and at the rewards and the data of this step."
)
_DISAGREE = (
    "Sampling and training disagree about the probabilities of the same policy. Look at "
    "sampling/sampling_logp_difference/mean and at the dtypes."
)
_MOVED_SINCE = (
    "The batch was sampled before the last update, which moved the policy far. Lower "
    "optimizer.learning_rate, or set max_staleness=0."
)
_FAR_MOVED = (
    "The policy moves far within one batch, and the clip can only stop what is already done. Lower "
    "optimizer.learning_rate or num_iterations."
)
_FROZEN = (
    "The parameters did not move, so the update repeats the first and no clip can act. Look at "
    "optimizer.learning_rate and its schedule, and at the dtype of the parameters: bfloat16 loses "
    "small updates."
)


def _has_not_moved(
    first: Mapping[str, Any], before: Mapping[str, Any], now: Mapping[str, Any]
) -> bool:
    """Whether an update found the policy of the first, although the one before it had a gradient.

    Sampling and training may differ by rounding, so a ratio of 1 is the first update's ratio.
    """
    had_gradient = float(before["grad_norm"]) > 0 and not float(before["nonfinite_steps"])
    return had_gradient and float(now[_DISTANCE]) in (0.0, float(first[_DISTANCE]))
