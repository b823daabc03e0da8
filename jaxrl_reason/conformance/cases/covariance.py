"""Cases of the losses that hold back tokens of large covariance."""

import functools

import numpy as np

from jaxrl_reason.conformance.case import Case
from jaxrl_reason.conformance.cases.ratios import (
    GAP,
    LOG_CLIPS,
    LOGPROBS,
    masked_inputs,
    ppo,
    ppo_sides,
    spread,
)

_LOWER, _UPPER = 0.1, 0.8
_QUARTER = 0.25


def _inputs(rng, *, per_token, far):
    """Draws until no small step moves a token over a bound of the covariance."""
    while True:
        arrays = masked_inputs(rng, per_token=per_token, kinks=(*LOG_CLIPS, 0.0))
        covariance = _covariance(arrays["logprobs"], arrays["advantages"], arrays["mask"])
        if far(covariance[arrays["mask"]]):
            return arrays


def _off_bounds(covariance):
    distance = np.abs(covariance[:, None] - [_LOWER, _UPPER]).min()
    return distance > GAP and np.count_nonzero((covariance > _LOWER) & (covariance < _UPPER)) > 8


def _parted(covariance):
    """The largest quarter stands apart from the rest."""
    falling, number = np.sort(covariance)[::-1], int(_QUARTER * len(covariance))
    return falling[number - 1] - falling[number] > GAP


def _covariance(logprobs, a, mask):
    a = spread(a, mask)
    return (logprobs - logprobs[mask].mean()) * (a - a[mask].mean())


def _all_drawn(logprobs, old, a, mask, lower, upper, clips):
    """The candidates, all of which are drawn where clip_cov_ratio is 1, whatever the key."""
    covariance = _covariance(logprobs, a, mask)
    clipped = ppo_sides(np.exp(logprobs - old), spread(a, mask), **clips)["region"]
    return mask & ~clipped & (covariance > lower) & (covariance < upper)


def _clip_cov(logprobs, old, a, mask, *, clip_cov_ratio, clip_cov_lb, clip_cov_ub, key, **clips):
    drawn = _all_drawn(logprobs, old, a, mask, clip_cov_lb, clip_cov_ub, clips)
    loss = ppo(np.exp(logprobs - old), spread(a, mask), **clips)
    return np.where(mask & ~drawn, loss, 0)


def _metrics(logprobs, old, a, mask, *, clip_cov_ratio, clip_cov_lb, clip_cov_ub, key, **clips):
    drawn = _all_drawn(logprobs, old, a, mask, clip_cov_lb, clip_cov_ub, clips)
    where = ppo_sides(np.exp(logprobs - old), spread(a, mask), **clips)
    where["region"] = where["region"] | drawn
    return {side: tokens & mask for side, tokens in where.items()}


def _kl_cov(logprobs, old, a, mask, *, kl_cov_ratio, ppo_kl_coef):
    covariance, log_ratio = _covariance(logprobs, a, mask), logprobs - old
    number = max(1, int(kl_cov_ratio * np.count_nonzero(mask)))
    chosen = mask & (covariance >= np.sort(covariance[mask])[-number])
    penalty = np.where(chosen, ppo_kl_coef * np.abs(log_ratio), 0)
    return np.where(mask, -spread(a, mask) * np.exp(log_ratio) + penalty, 0)


def _case(function, label, far, options, knobs, oracle, *, per_token=False, moving=("logprobs",)):
    return Case(
        function=function,
        label=label,
        inputs=functools.partial(_inputs, per_token=per_token, far=far),
        options=options,
        oracle=oracle,
        moving=moving,
        knobs=knobs,
        mask="mask",
        masked=(*LOGPROBS, "advantages"),
        rowwise=False,
    )


def _clip_covs(function, oracle, **fields):
    options = {"clip_cov_ratio": 1.0, "clip_cov_lb": _LOWER, "clip_cov_ub": _UPPER}
    options |= {"epsilon": 0.2, "key": np.zeros(2, np.uint32)}
    knobs = {"epsilon": 0.5, "epsilon_high": 0.5, "clip_cov_ratio": 0.05}
    knobs |= {"clip_cov_lb": 0.4, "clip_cov_ub": 0.4}
    high = {**options, "epsilon_high": 0.3}
    yield _case(function, "", _off_bounds, options, knobs, oracle, **fields)
    yield _case(
        function, "epsilon_high", _off_bounds, high, {"epsilon_high": 0.8}, oracle, **fields
    )
    tokens = {"per_token": True, **fields}
    yield _case(function, "token_advantages", _off_bounds, options, {}, oracle, **tokens)


_KL_COV = {"kl_cov_ratio": _QUARTER, "ppo_kl_coef": 0.7}
_KL_COV_KNOBS = {"kl_cov_ratio": 0.5, "ppo_kl_coef": 1.0}

CASES: tuple[Case, ...] = (
    *_clip_covs("clip_cov_loss", _clip_cov),
    *_clip_covs("clip_cov_metrics", _metrics, moving=()),
    _case("kl_cov_loss", "", _parted, _KL_COV, _KL_COV_KNOBS, _kl_cov),
    _case("kl_cov_loss", "token_advantages", _parted, _KL_COV, {}, _kl_cov, per_token=True),
)
