"""Log-probs of other policies than the one that is updated: extra forward passes of a step.

With `beta > 0` those of the reference, which is the parent. It shares with the policy what is not
trained, and where the run trains an adapter that is still untrained in the parent, all parameters.
And those of training before the first update, once sampling has been found to have others
(`policy_mismatch.py`).
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxrl_reason.models import Params
from jaxrl_reason.models.lora import trainable, without_adapter
from jaxrl_reason.sharding import OnMesh, batch_sharding, jit_on_mesh
from jaxrl_reason.stages.context import Stage
from jaxrl_reason.stages.policy_config import PolicyConfig
from jaxrl_reason.stages.policy_mismatch import Mismatch, make_correction
from jaxrl_reason.steps import combine, make_batch_logprobs, partition

_LARGEST = "sampling/sampling_logp_difference/max"


def batch_logprobs(stage: Stage) -> OnMesh:
    """What computes the log-probs of a batch under some parameters: `(params, batch)`."""
    config: PolicyConfig = stage.config
    context = stage.context
    of_model = _of_model(config)

    def make() -> OnMesh:
        shardings = batch_sharding(context.mesh, batch_axis=1)
        compute = make_batch_logprobs(context.model, **of_model)
        return jit_on_mesh(compute, context.mesh, out_shardings=shardings)

    return context.shared.get(make, "batch_logprobs", of_model)


def correction(stage: Stage) -> OnMesh:
    """What corrects a batch that was sampled with other log-probs: `(params, batch)`."""
    config: PolicyConfig = stage.config
    context = stage.context
    of_model = _of_model(config)

    def make() -> OnMesh:
        return make_correction(context.model, context.mesh, config.mismatch, **of_model)

    return context.shared.get(make, "correction", config.mismatch, of_model)


def _of_model(config: PolicyConfig) -> dict[str, Any]:
    return {
        "temperature": config.sampling.temperature,
        "logprob_chunk_size": config.logprob_chunk_size,
    }


class Reference:
    """A stage's parent, of which only what the stage changes is held.

    The state of training is donated to every update. So the parameters that parent and policy have
    in common are those of the present state, in each call.
    """

    def __init__(self, stage: Stage):
        config = stage.context.model.config
        self._trains = trainable(config)
        self._own, _ = partition(stage.parent_params(), self._trains)
        self._is_base = config.lora is not None and _adds_nothing(self._own)
        if self._is_base:
            self._own = None

    def params(self, policy: Params) -> Params:
        """The parent's parameters, given those of the policy; valid until the next update."""
        if self._is_base:
            return without_adapter(policy)
        return combine(self._own, partition(policy, self._trains)[1])


def _adds_nothing(adapter: Params) -> bool:
    """Whether B is 0 in every adapter, as it is before training."""
    leaves = jax.tree_util.tree_leaves_with_path(adapter)
    return not any(bool(jnp.any(x != 0)) for path, x in leaves if path[-1].key == "lora_b")


class OtherLogprobs:
    """Adds to a batch what other policies say of it.

    Args:
        stage: the stage.
        saved: what `state` gave when the checkpoint was written.
    """

    def __init__(self, stage: Stage, saved: Mapping[str, Any] | None):
        config: PolicyConfig = stage.config
        self._reference = Reference(stage) if config.beta > 0 else None
        self._logprobs = batch_logprobs(stage) if config.beta > 0 else None
        self._mismatch = Mismatch(config.mismatch, stage.context.model.config.dtype, saved)
        self._correction = correction(stage)

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
            reference = self._reference.params(params)
            batch = batch | {"ref_logprobs": self._logprobs(reference, batch)}
        if self._mismatch.correcting:
            arrays, metrics = self._correction(params, batch)
            batch = batch | arrays
        return jax.block_until_ready(batch), metrics

    def look(self, step: int, first_update: Mapping[str, Any], *, is_stale: bool) -> None:
        """Compare sampling with training; a stale batch cannot tell, since the policy has moved."""
        if not is_stale:
            self._mismatch.look(step, float(first_update[_LARGEST]))
