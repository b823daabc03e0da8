"""Cases of the policy-gradient losses and of their clip metrics.

Here are those that are elementwise; `sequence` and `covariance` have the others.
"""

import functools
from collections.abc import Iterator

import numpy as np

from jaxrl_reason.conformance.case import Case
from jaxrl_reason.conformance.cases import covariance, sequence
from jaxrl_reason.conformance.cases.ratios import (
    LOGPROBS,
    SHAPE,
    detached,
    ppo,
    ppo_sides,
    sides,
    spread,
    token_inputs,
)


def _clipped(logprobs, old, a, **clips):
    return ppo(np.exp(logprobs - old), spread(a, logprobs), **clips)


def _clip_metrics(logprobs, old, a, **clips):
    return ppo_sides(np.exp(logprobs - old), spread(a, logprobs), **clips)


def _cispo(frozen, logprobs, old, a, *, epsilon_high, epsilon=np.inf):
    weight = np.clip(np.exp(frozen["logprobs"] - old), 1 - epsilon, epsilon_high)
    return -weight * spread(a, logprobs) * logprobs


def _cispo_metrics(logprobs, old, a, *, epsilon_high, epsilon=np.inf):
    ratio, a = np.exp(logprobs - old), spread(a, logprobs)
    return sides((ratio < 1 - epsilon) & (a < 0), (ratio > epsilon_high) & (a > 0))


def _triplet(logprobs, old, a, *, epsilon_neg_low, epsilon_neg_high, epsilon_pos_high):
    ratio, a = np.exp(logprobs - old), spread(a, logprobs)
    up = np.minimum(ratio, 1 + epsilon_pos_high)
    down = np.clip(ratio, 1 - epsilon_neg_low, epsilon_neg_high)
    return -np.where(a > 0, up, down) * a


def _triplet_metrics(logprobs, old, a, *, epsilon_neg_low, epsilon_neg_high, epsilon_pos_high):
    ratio, a = np.exp(logprobs - old), spread(a, logprobs)
    top = np.where(a > 0, 1 + epsilon_pos_high, epsilon_neg_high)
    return sides((ratio < 1 - epsilon_neg_low) & (a < 0), ratio > top)


def _sapo(logprobs, old, a, *, temperature_pos, temperature_neg):
    ratio, a = np.exp(logprobs - old), spread(a, logprobs)
    tau = np.where(a > 0, temperature_pos, temperature_neg)
    return -a * (4 / tau) / (1 + np.exp(-tau * (ratio - 1)))


def _reinforce(per_token: bool) -> Case:
    def inputs(rng):
        arrays = token_inputs(rng, per_token=per_token)
        return {name: arrays[name] for name in ("logprobs", "advantages")}

    return Case(
        function="reinforce_loss",
        label="token_advantages" if per_token else "",
        inputs=inputs,
        oracle=lambda logprobs, a: -spread(a, logprobs) * logprobs,
        moving=("logprobs",),
        masked=("logprobs", "advantages"),
    )


def _both(function: str, label: str, options: dict, knobs: dict, **fields) -> Iterator[Case]:
    """A call with one advantage per sequence, and the same with one per token."""
    for form, per_token in (("", False), ("token_advantages", True)):
        yield Case(
            function=function,
            label="_".join(filter(None, (label, form))),
            inputs=functools.partial(token_inputs, per_token=per_token),
            options=options,
            knobs=knobs,
            masked=(*LOGPROBS, "advantages"),
            **fields,
        )


def _far_inputs(rng):
    """Ratios above exp(20), which only bad tokens keep."""
    log_ratio = rng.uniform(21, 26, SHAPE)
    arrays = token_inputs(rng, per_token=True)
    old, advantages = arrays["old_logprobs"], -np.abs(arrays["advantages"])
    return {"logprobs": old + log_ratio, "old_logprobs": old, "advantages": advantages}


def _far(logprobs, old, a, *, epsilon):
    """PPO with a ratio that goes on as its tangent, so that it never overflows."""
    return ppo(np.exp(20) * (1 + logprobs - old - 20), a, epsilon=epsilon)


_loss = functools.partial(_both, moving=("logprobs",))
_EPSILON, _HIGH = {"epsilon": 0.2}, {"epsilon": 0.2, "epsilon_high": 0.3}
_DELTA = {"epsilon": 0.2, "delta": 1.8}
_KNOBS, _TO_HIGH = {"epsilon": 0.3, "epsilon_high": 0.5}, {"epsilon_high": 0.5}
_CISPO, _FLOORED = {"epsilon_high": 1.5}, {"epsilon_high": 1.5, "epsilon": 0.3}
_CISPO_KNOBS = {"epsilon_high": 1.2, "epsilon": 0.1}
_TRIPLET = {"epsilon_neg_low": 0.2, "epsilon_neg_high": 1.8, "epsilon_pos_high": 0.3}
_TRIPLET_KNOBS = {"epsilon_neg_low": 0.4, "epsilon_neg_high": 1.3, "epsilon_pos_high": 0.6}
_SAPO = {"temperature_pos": 1.0, "temperature_neg": 1.5}
_SAPO_KNOBS = {"temperature_pos": 2.0, "temperature_neg": 2.5}

CASES: tuple[Case, ...] = (
    _reinforce(False),
    _reinforce(True),
    *_loss("clipped_policy_loss", "", _EPSILON, {**_KNOBS, "delta": 1.5}, oracle=_clipped),
    *_loss("clipped_policy_loss", "epsilon_high", _HIGH, _TO_HIGH, oracle=_clipped),
    *_loss("clipped_policy_loss", "delta", _DELTA, {"delta": 2.5}, oracle=_clipped),
    Case(
        function="clipped_policy_loss",
        label="far away",
        inputs=_far_inputs,
        options=_EPSILON,
        oracle=_far,
        moving=("logprobs",),
        masked=(*LOGPROBS, "advantages"),
    ),
    *_both("clip_metrics", "", _EPSILON, _KNOBS, oracle=_clip_metrics),
    *_both("clip_metrics", "epsilon_high", _HIGH, _TO_HIGH, oracle=_clip_metrics),
    *_loss("cispo_loss", "", _CISPO, _CISPO_KNOBS, **detached(_cispo)),
    *_loss("cispo_loss", "epsilon", _FLOORED, _CISPO_KNOBS, **detached(_cispo)),
    *_both("cispo_clip_metrics", "", _CISPO, _CISPO_KNOBS, oracle=_cispo_metrics),
    *_both("cispo_clip_metrics", "epsilon", _FLOORED, _CISPO_KNOBS, oracle=_cispo_metrics),
    *_loss("triplet_clipped_policy_loss", "", _TRIPLET, _TRIPLET_KNOBS, oracle=_triplet),
    *_both("triplet_clip_metrics", "", _TRIPLET, _TRIPLET_KNOBS, oracle=_triplet_metrics),
    *_loss("sapo_loss", "", _SAPO, _SAPO_KNOBS, oracle=_sapo),
    *sequence.CASES,
    *covariance.CASES,
)
