"""Log-probs of other policies than the one that is updated: extra forward passes of a step.

With `beta > 0` those of the reference, which is the parent. And those of training before the first
update, once sampling has been found to have others (`policy_mismatch.py`).
"""

from collections.abc import Mapping
from typing import Any

import jax

from jaxrl_reason.models import Params
from jaxrl_reason.sharding import on_mesh
from jaxrl_reason.stages.context import Stage
from jaxrl_reason.stages.policy_config import PolicyConfig
from jaxrl_reason.stages.policy_mismatch import Mismatch, make_correction
from jaxrl_reason.steps import make_batch_logprobs

_LARGEST = "sampling/sampling_logp_difference/max"


class OtherLogprobs:
    """Adds to a batch what other policies say of it.

    Args:
        stage: the stage.
        saved: what `state` gave when the checkpoint was written.
    """

    def __init__(self, stage: Stage, saved: Mapping[str, Any] | None):
        config: PolicyConfig = stage.config
        model = stage.context.model
        of_model = {
            "temperature": config.sampling.temperature,
            "logprob_chunk_size": config.logprob_chunk_size,
        }
        self._reference = None
        if config.beta > 0:
            self._reference = stage.parent_params()
            jitted = jax.jit(make_batch_logprobs(model, **of_model))
            self._logprobs = on_mesh(jitted, stage.context.mesh)
        self._mismatch = Mismatch(config.mismatch, model.config.dtype, saved)
        self._correction = make_correction(model, stage.context.mesh, config.mismatch, **of_model)

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps, as JSON values."""
        return self._mismatch.state()

    def add(
        self, params: Params, batch: dict[str, jax.Array]
    ) -> tuple[dict[str, jax.Array], dict[str, Any]]:
        """The batch with the arrays that the update needs, and metrics of how they differ."""
        metrics: dict[str, Any] = {}
        if self._reference is None and not self._mismatch.correcting:
            return batch, metrics
        if self._reference is not None:
            batch = batch | {"ref_logprobs": self._logprobs(self._reference, batch)}
        if self._mismatch.correcting:
            arrays, metrics = self._correction(params, batch)
            batch = batch | arrays
        return jax.block_until_ready(batch), metrics

    def look(self, step: int, first_update: Mapping[str, Any], *, is_stale: bool) -> None:
        """Compare sampling with training; a stale batch cannot tell, since the policy has moved."""
        if not is_stale:
            self._mismatch.look(step, float(first_update[_LARGEST]))
