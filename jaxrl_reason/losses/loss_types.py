"""The policy losses by name, with the aggregation and advantage scaling of their papers."""

import dataclasses
import inspect
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import jax
from jax import Array
from jaxtyping import Bool, Float

from jaxrl_reason.losses.covariance import clip_cov_loss, clip_cov_metrics, kl_cov_loss
from jaxrl_reason.losses.policy import (
    cispo_clip_metrics,
    cispo_loss,
    clip_metrics,
    clipped_policy_loss,
    gpg_loss,
    reinforce_loss,
    sapo_loss,
    triplet_clip_metrics,
    triplet_clipped_policy_loss,
)
from jaxrl_reason.losses.sequence import (
    gmpo_clip_metrics,
    gmpo_loss,
    gspo_clip_metrics,
    gspo_loss,
    gspo_token_loss,
    vespo_loss,
)

_ARRAYS = frozenset({"segment_ids", "key", "importance_weights"})


@dataclasses.dataclass(frozen=True)
class LossType:
    """What a ``loss_type`` stands for."""

    loss: Callable[..., Float[Array, "B T"]]
    """A function of ``losses.policy``, ``losses.sequence`` or ``losses.covariance``."""
    aggregation: str
    """``how`` of ``arrays.aggregate``."""
    scale: str
    """``scale`` of ``advantages.group_advantages`` in the paper that the name stands for."""
    clip_metrics: Callable[..., dict[str, Bool[Array, "B T"]]] | None = None
    """Which tokens have no gradient, for the same arrays; None where every token keeps its own."""
    separable: bool = True
    """A sequence whose advantage is 0 has loss 0 and gradient 0, and changes neither of another, so
    that it can be left out if its weight is still counted. ``gpg`` then needs ``alpha``."""

    @property
    def options(self) -> tuple[str, ...]:
        """The hyperparameters that ``loss`` takes, by keyword; arrays are not among them."""
        return tuple(parameter.name for parameter in self._hyperparameters())

    @property
    def required(self) -> tuple[str, ...]:
        """Those of ``options`` that have no default."""
        return tuple(
            parameter.name
            for parameter in self._hyperparameters()
            if parameter.default is inspect.Parameter.empty
        )

    def __call__(
        self,
        *,
        logprobs: Float[Array, "B T"],
        old_logprobs: Float[Array, "B T"],
        advantages: Float[Array, " B"] | Float[Array, "B T"],
        mask: Bool[Array, "B T"],
        segment_ids: Array | None = None,
        key: Array | None = None,
        importance_weights: Float[Array, "B T"] | None = None,
        **options: Any,
    ) -> Float[Array, "B T"]:
        """``loss`` of those arrays that it takes; unreduced.

        ``importance_weights``, p_old / p_sampling of each token, enter the loss where it has a
        place for them and multiply it elsewhere.
        """
        arrays = (logprobs, old_logprobs, advantages, mask, segment_ids, key)
        given = _taken(self.loss, arrays)
        if importance_weights is None:
            return self.loss(**given, **options)
        weights = jax.lax.stop_gradient(importance_weights)
        if "importance_weights" in inspect.signature(self.loss).parameters:
            return self.loss(**given, importance_weights=weights, **options)
        return weights * self.loss(**given, **options)

    def clipped(
        self,
        *,
        logprobs: Float[Array, "B T"],
        old_logprobs: Float[Array, "B T"],
        advantages: Float[Array, " B"] | Float[Array, "B T"],
        mask: Bool[Array, "B T"],
        segment_ids: Array | None = None,
        key: Array | None = None,
        **options: Any,
    ) -> dict[str, Bool[Array, "B T"]]:
        """``clip_metrics`` of those arrays and options that it takes; empty where there is none.

        A loss that draws tokens needs the ``key`` that the loss was called with.
        """
        if self.clip_metrics is None:
            return {}
        arrays = (logprobs, old_logprobs, advantages, mask, segment_ids, key)
        parameters = inspect.signature(self.clip_metrics).parameters
        options = {name: value for name, value in options.items() if name in parameters}
        return self.clip_metrics(**_taken(self.clip_metrics, arrays), **options)

    def _hyperparameters(self) -> list[inspect.Parameter]:
        parameters = inspect.signature(self.loss).parameters.values()
        return [p for p in parameters if p.kind is p.KEYWORD_ONLY and p.name not in _ARRAYS]


def _taken(function, arrays):
    """The arrays by name that ``function`` has a parameter for."""
    names = ("logprobs", "old_logprobs", "advantages", "mask", "segment_ids", "key")
    parameters = inspect.signature(function).parameters
    named = zip(names, arrays, strict=True)
    return {name: array for name, array in named if name in parameters}


_CLIPPED = {"loss": clipped_policy_loss, "clip_metrics": clip_metrics}
_GSPO = {"loss": gspo_loss, "clip_metrics": gspo_clip_metrics}

LOSS_TYPES: Mapping[str, LossType] = MappingProxyType(
    {
        "grpo": LossType(aggregation="sequence_mean", scale="group", **_CLIPPED),
        "bnpo": LossType(aggregation="token_mean", scale="group", **_CLIPPED),
        "dr_grpo": LossType(aggregation="constant", scale="none", **_CLIPPED),
        "dapo": LossType(aggregation="token_mean", scale="group", **_CLIPPED),
        "cispo": LossType(cispo_loss, "token_mean", "group", cispo_clip_metrics),
        "sapo": LossType(sapo_loss, "sequence_mean", "group"),
        "luspo": LossType(aggregation="sequence_sum", scale="group", **_GSPO),
        "vespo": LossType(vespo_loss, "token_mean", "group"),
        "reinforce": LossType(reinforce_loss, "token_mean", "none"),
        "gspo": LossType(aggregation="sequence_mean", scale="group", **_GSPO),
        "gspo_token": LossType(gspo_token_loss, "sequence_mean", "group", gspo_clip_metrics),
        "gmpo": LossType(gmpo_loss, "sequence_mean", "group", gmpo_clip_metrics),
        "gpg": LossType(gpg_loss, "token_mean", "none"),
        "triplet": LossType(triplet_clipped_policy_loss, "constant", "none", triplet_clip_metrics),
        "clip_cov": LossType(
            clip_cov_loss, "token_mean", "group", clip_cov_metrics, separable=False
        ),
        "kl_cov": LossType(kl_cov_loss, "token_mean", "group", separable=False),
    }
)
"""The names that a stage offers.

``grpo`` to ``vespo`` are TRL's ``loss_type``. ``gspo`` is TRL's ``loss_type="grpo"`` with
``importance_sampling_level="sequence"``, ``luspo`` here always has that level, and ``gmpo`` is the
trainer of that name in ``trl.experimental``. Options are TRL's without the
prefix: ``sapo_temperature_pos`` is ``temperature_pos``, ``vespo_k_pos`` is ``k_pos``.

``grpo``, ``gspo_token``, ``sapo``, ``gmpo``, ``gpg``, ``clip_cov`` and ``kl_cov`` are verl's
``loss_mode`` ``vanilla``, ``gspo``, ``sapo``, ``geo_mean``, ``gpg``, ``clip_cov`` and ``kl_cov``,
each with the ``loss_agg_mode`` of its paper: ``token_mean`` is ``token-mean``, ``sequence_mean``
``seq-mean-token-mean``, ``sequence_sum`` ``seq-mean-token-sum``, ``constant``
``seq-mean-token-sum-norm``. ``triplet`` is LongCat's and in neither.

``bnpo`` and ``dapo`` are one thing here: TRL's ``bnpo`` divides by the tokens of a microbatch and
``dapo`` by those of the whole batch, and a ``WeightedMean`` always does the latter. ``grpo`` leaves
sequences without a token out of the mean; TRL counts them as zeros. ``clip_cov`` and ``kl_cov``
choose among the tokens they are given: with microbatches, in each by itself. So does ``gpg`` count,
unless it is given the ``alpha`` of the whole batch.
"""
