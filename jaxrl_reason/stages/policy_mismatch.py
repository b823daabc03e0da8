"""Sampling and training that disagree about the log-probs of one policy, and what is done then.

Both run the same parameters, but a decode step adds its products in another order than an update
does, and may store keys and values in another dtype. While the difference is rounding, the
log-probs recorded in sampling serve as those of the old policy. Where it is more, every ratio is
off by it. Then the log-probs of training become the old ones, which costs a forward pass a step,
and the losses are weighed by the ratio of the two policies, or the run stops.
"""

import logging
import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
import pydantic
from jax.sharding import Mesh
from pydantic import Field

from jaxrl_reason.arrays import WeightedMean
from jaxrl_reason.config import Config
from jaxrl_reason.errors import InputError
from jaxrl_reason.losses import importance_weights
from jaxrl_reason.models import Model
from jaxrl_reason.sharding import OnMesh, batch_sharding, jit_on_mesh, replicated
from jaxrl_reason.steps import make_batch_logprobs

_THRESHOLDS = {"float32": 1e-3, "bfloat16": 0.1}
_logger = logging.getLogger(__name__)


class MismatchConfig(Config):
    """How far sampling and training may differ in the log-prob of a token, and what happens then.

    The defaults of `threshold` lie well above rounding and below what matters to a ratio that is
    clipped at 0.2.
    """

    threshold: Annotated[float, Field(gt=0)] | None = None
    """Largest difference that is taken for rounding; null: 1e-3 in float32, 0.1 in bfloat16."""
    action: Literal["correct", "stop"] = "correct"
    """`correct`: importance weights from the next step on; `stop`: the run ends."""
    level: Literal["token", "sequence", "geometric"] = "token"
    """What a weight is the ratio of: a token, a completion, or its mean over a completion."""
    mode: Literal["truncate", "mask"] = "truncate"
    """Ratios out of bounds are set to the bound, or to 0."""
    cap: Annotated[float, Field(gt=0)] = 2.0
    """Upper bound of a weight."""
    floor: Annotated[float, Field(ge=0)] | None = None
    """Lower bound of a weight; none when null."""

    @pydantic.model_validator(mode="after")
    def _acts(self):
        # Not those that were named: a configuration that is read back names all.
        fields = type(self).model_fields
        weighing = [
            name
            for name in ("cap", "floor", "level", "mode")
            if getattr(self, name) != fields[name].default
        ]
        if self.action == "stop" and weighing:
            raise ValueError(
                f"{weighing[0]} cannot act: with action=stop nothing is weighed; remove it or take "
                "action=correct"
            )
        if self.floor is not None and self.floor > self.cap:
            raise ValueError(f"floor={self.floor:g} exceeds cap={self.cap:g}; lower it")
        return self


class Mismatch:
    """Watches the difference step by step; holds whether it is being corrected, and no more."""

    def __init__(self, config: MismatchConfig, dtype: str, saved: Mapping[str, Any] | None = None):
        """Not correcting, or as `state` was when the checkpoint was written.

        Args:
            config: what to do.
            dtype: of the model's computations, for the default threshold.
            saved: from a checkpoint.
        """
        self._config = config
        self._threshold = _THRESHOLDS[dtype] if config.threshold is None else config.threshold
        self.correcting: bool = False if saved is None else saved["correcting"]

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps, as JSON values."""
        return {"correcting": self.correcting}

    def look(self, step: int, max_difference: float) -> None:
        """Switch the correction on, for good, or end the run, if the difference is too large.

        Args:
            step: its number, from 1.
            max_difference: `sampling/sampling_logp_difference/max` of the first update on a batch,
                before which the policy is still the one that sampled.

        Raises:
            InputError: the difference exceeds the threshold and the action is `stop`.
        """
        # Written so that NaN ends a run that asks for it; no weight could correct it.
        if self.correcting or max_difference <= self._threshold:
            return
        seen = (
            f"step {step}: sampling and training differ by {max_difference:.3g} in the log-prob of "
            f"a token, more than mismatch.threshold={self._threshold:g}"
        )
        if self._config.action == "stop":
            raise InputError(
                f"{seen}; look at the dtypes of model and cache, raise mismatch.threshold, or set "
                "mismatch.action=correct"
            )
        if math.isnan(max_difference):
            return
        self.correcting = True
        _logger.warning(
            "%s. From the next step on the losses are weighed by the ratio of the two policies, "
            "which takes another forward pass.",
            seen,
        )


def make_correction(
    model: Model,
    mesh: Mesh,
    config: MismatchConfig,
    *,
    temperature: float,
    logprob_chunk_size: int | None,
) -> OnMesh:
    """A compiled function of the parameters that a batch begins with, and the batch.

    Returns:
        `(params, batch) -> (arrays, metrics)`: the `old_logprobs` and `importance_weights` to
        replace those of the batch by, and the metrics of the weights.
    """
    batch_logprobs = make_batch_logprobs(
        model, temperature=temperature, logprob_chunk_size=logprob_chunk_size
    )

    def weights(old_logprobs, sampling_logprobs, mask, sequence_ids):
        return importance_weights(
            old_logprobs,
            sampling_logprobs,
            mask,
            level=config.level,
            mode=config.mode,
            cap=config.cap,
            floor=config.floor,
            segment_ids=sequence_ids,
        )

    def correction(params, batch):
        old = batch_logprobs(params, batch)
        rest = (batch[name] for name in ("sampling_logprobs", "completion_mask", "sequence_ids"))
        weighed, parts = jax.vmap(weights)(old, *rest)
        is_mean = lambda x: isinstance(x, WeightedMean)
        sums = jax.tree.map(lambda x: jnp.sum(x, axis=0), parts)
        metrics = jax.tree.map(lambda m: m.mean(), sums, is_leaf=is_mean)
        return {"old_logprobs": old, "importance_weights": weighed}, metrics

    shardings = (batch_sharding(mesh, batch_axis=1), replicated(mesh))
    return jit_on_mesh(correction, mesh, out_shardings=shardings)
