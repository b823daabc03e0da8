"""Cases of the policy-gradient losses that look at whole sequences, and of their clip metrics."""

import functools
import itertools
from collections.abc import Iterator

import numpy as np

from jaxrl_reason.conformance.case import ROWS, Case
from jaxrl_reason.conformance.cases.ratios import (
    LOG_CLIPS,
    LOGPROBS,
    SHAPE,
    away,
    detached,
    masked_inputs,
    ppo,
    ppo_sides,
    sides,
    signed,
    spread,
)

_PACKED = np.asarray([[1, 1, 2, 2, 2, 0], [3, 1, 1, 1, 2, 2]] * (ROWS // 2), np.int32)
_WEIGHTS = np.random.default_rng(3).uniform(0.7, 1.4, SHAPE)


def _units(mask, segment_ids):
    """For each sequence that has a token, which tokens of the batch it counts."""
    ids = np.zeros(mask.shape, int) if segment_ids is None else segment_ids
    for row, sequence in itertools.product(range(len(mask)), np.unique(ids)):
        unit = np.zeros_like(mask)
        unit[row] = mask[row] & (ids[row] == sequence)
        if unit.any():
            yield unit


def _along(values, mask, segment_ids, level):
    """`level` of the values of a sequence, at each of its tokens."""
    result = np.zeros(mask.shape)
    for unit in _units(mask, segment_ids):
        result[unit] = level(values[unit])
    return result


def _sequences(rng, *, form, level=np.mean):
    """The mean (or sum) of log ratios lies on both sides of every clip.

    `form` tells whether a row is one sequence or several, and whether an advantage belongs to a
    token. Packed sequences carry the same advantage at each of their tokens.
    """
    arrays = masked_inputs(rng, per_token=form != "")
    ids = _PACKED if form == "packed" else None
    for unit in _units(arrays["mask"], ids):
        log_ratio = rng.normal(scale=0.3, size=np.count_nonzero(unit))
        target = away(rng.normal(scale=0.5), LOG_CLIPS)
        log_ratio += (target - level(log_ratio)) / level(np.ones_like(log_ratio))
        arrays["logprobs"][unit] = arrays["old_logprobs"][unit] + log_ratio
    return _packed(rng, arrays) if form == "packed" else arrays


def _clipped_tokens(rng, *, form):
    """Every token has its own clip, so none needs to be shifted."""
    arrays = masked_inputs(rng, per_token=form != "", kinks=(-0.3, 0.3, 0.5))
    return _packed(rng, arrays) if form == "packed" else arrays


def _packed(rng, arrays):
    for unit in _units(arrays["mask"], _PACKED):
        arrays["advantages"][unit] = signed(rng)
    return {**arrays, "segment_ids": _PACKED}


def _live_and_dead(rng, *, form):
    """Every third sequence has advantage 0 at every token."""
    arrays = _sequences(rng, form=form)
    del arrays["old_logprobs"]
    for unit in list(_units(arrays["mask"], arrays.get("segment_ids")))[::3]:
        arrays["advantages"][unit if form else unit.any(axis=1)] = 0.0
    return arrays


def _weighted(rng, *, form):
    arrays = _sequences(rng, form=form, level=np.sum)
    return {**arrays, "importance_weights": rng.uniform(0.7, 1.4, SHAPE)}


def _far(rng, *, form):
    """Products of ratios beyond both ends of VESPO's range."""
    arrays = _sequences(rng, form=form)
    shift = np.where(np.arange(ROWS) % 4 < 2, 26.0, -24.0)[:, None] / np.maximum(
        arrays["mask"].sum(axis=1, keepdims=True), 1
    )
    return {**arrays, "logprobs": arrays["logprobs"] + np.where(arrays["mask"], shift, 0)}


def _with_alpha(rng, *, form):
    return {**_live_and_dead(rng, form=form), "alpha": np.asarray(1.7)}


def _gspo(logprobs, old, a, mask, *, segment_ids=None, **clips):
    ratio = np.exp(_along(logprobs - old, mask, segment_ids, np.mean))
    return np.where(mask, ppo(ratio, spread(a, mask), **clips), 0)


def _gspo_token(frozen, logprobs, old, a, mask, *, segment_ids=None, **clips):
    ratio = np.exp(_along(frozen["logprobs"] - old, mask, segment_ids, np.mean))
    ratio = ratio * np.exp(logprobs - frozen["logprobs"])
    return np.where(mask, ppo(ratio, spread(a, mask), **clips), 0)


def _gspo_metrics(logprobs, old, a, mask, *, segment_ids=None, **clips):
    ratio = np.exp(_along(logprobs - old, mask, segment_ids, np.mean))
    return {k: v & mask for k, v in ppo_sides(ratio, spread(a, mask), **clips).items()}


def _gmpo(logprobs, old, a, mask, *, epsilon, epsilon_high=None, segment_ids=None):
    high = epsilon if epsilon_high is None else epsilon_high
    sign, log_ratio = np.sign(spread(a, mask)), logprobs - old
    clipped = sign * np.minimum(sign * log_ratio, sign * np.clip(log_ratio, -epsilon, high))
    ratio = np.exp(_along(clipped, mask, segment_ids, np.mean))
    return np.where(mask, -spread(a, mask) * ratio, 0)


def _gmpo_metrics(logprobs, old, a, mask, *, epsilon, epsilon_high=None):
    high = epsilon if epsilon_high is None else epsilon_high
    log_ratio, a = logprobs - old, spread(a, mask)
    return sides(mask & (log_ratio < -epsilon) & (a < 0), mask & (log_ratio > high) & (a > 0))


def _vespo(frozen, logprobs, old, a, mask, *, importance_weights=1.0, segment_ids=None, **kernel):
    log_ratio = frozen["logprobs"] - old + np.log(importance_weights)
    log_weight = np.clip(_along(log_ratio, mask, segment_ids, np.sum), np.log(1e-8), 20)
    weight, a = np.exp(log_weight), spread(a, mask)
    k = np.where(a >= 0, kernel["k_pos"], kernel["k_neg"])
    rate = np.where(a >= 0, kernel["lambda_pos"], kernel["lambda_neg"])
    return np.where(mask, -(weight**k) * np.exp(rate * (1 - weight)) * a * logprobs, 0)


def _gpg(logprobs, a, mask, *, alpha=None, segment_ids=None):
    a, units = spread(a, mask), list(_units(mask, segment_ids))
    live = [unit for unit in units if np.any(a[unit] != 0)]
    factor = len(units) / len(live) if alpha is None else alpha
    return np.where(mask, -factor * a * logprobs, 0)


def _forms(function: str, draw, options: dict, knobs: dict, **fields) -> Iterator[Case]:
    """Rows of one sequence, packed rows, and an advantage that differs along the sequence."""
    fields = {"moving": ("logprobs",), "masked": (*LOGPROBS, "advantages"), **fields}
    for form in ("", "packed", "token_advantages"):
        case = {**fields, "keywords": ("segment_ids",)} if form == "packed" else fields
        yield Case(
            function=function,
            label=form,
            inputs=functools.partial(draw, form=form),
            options=options,
            knobs=knobs if form == "" else {},
            mask="mask",
            **case,
        )


def _mode(function: str, label: str, draw, options: dict, knobs: dict, **fields) -> Case:
    fields = {"moving": ("logprobs",), "masked": (*LOGPROBS, "advantages"), **fields}
    inputs = functools.partial(draw, form="")
    call = {"function": function, "label": label, "options": options, "knobs": knobs}
    return Case(**call, inputs=inputs, mask="mask", **fields)


_EPSILON, _HIGH = {"epsilon": 0.2}, {"epsilon": 0.2, "epsilon_high": 0.3}
_KNOBS = {"epsilon": 0.3, "epsilon_high": 3.0, "segment_ids": _PACKED}
_TO_HIGH = {"epsilon_high": 3.0}
_LOG_EPSILON, _LOG_HIGH = {"epsilon": 0.3}, {"epsilon": 0.3, "epsilon_high": 0.5}
_LOG_KNOBS = {"epsilon": 0.5, "epsilon_high": 0.8}
_VESPO = {"k_pos": 2.0, "lambda_pos": 3.0, "k_neg": 3.0, "lambda_neg": 2.0}
_FLAT = {"k_pos": 0.05, "lambda_pos": 1e-9, "k_neg": 0.04, "lambda_neg": 2e-9}
_VESPO_KNOBS = {name: value + 0.5 for name, value in _VESPO.items()}
_VESPO_KNOBS |= {"importance_weights": _WEIGHTS, "segment_ids": _PACKED}
_SUMS = functools.partial(_sequences, level=np.sum)
_SIDES = {"moving": (), "oracle": _gspo_metrics}
_BOUND = {"moving": (), "oracle": _gmpo_metrics}
_GPG = {"masked": ("logprobs", "advantages"), "oracle": _gpg, "rowwise": False}

CASES: tuple[Case, ...] = (
    *_forms("gspo_loss", _sequences, _EPSILON, _KNOBS, oracle=_gspo),
    _mode("gspo_loss", "epsilon_high", _sequences, _HIGH, _TO_HIGH, oracle=_gspo),
    *_forms("gspo_token_loss", _sequences, _EPSILON, _KNOBS, **detached(_gspo_token)),
    _mode("gspo_token_loss", "epsilon_high", _sequences, _HIGH, _TO_HIGH, **detached(_gspo_token)),
    *_forms("gspo_clip_metrics", _sequences, _EPSILON, _KNOBS, **_SIDES),
    _mode("gspo_clip_metrics", "epsilon_high", _sequences, _HIGH, _TO_HIGH, **_SIDES),
    *_forms(
        "gmpo_loss",
        _clipped_tokens,
        _LOG_EPSILON,
        {**_LOG_KNOBS, "segment_ids": _PACKED},
        oracle=_gmpo,
    ),
    _mode("gmpo_loss", "epsilon_high", _clipped_tokens, _LOG_HIGH, _TO_HIGH, oracle=_gmpo),
    _mode("gmpo_clip_metrics", "", _clipped_tokens, _LOG_EPSILON, _LOG_KNOBS, **_BOUND),
    _mode("gmpo_clip_metrics", "epsilon_high", _clipped_tokens, _LOG_HIGH, _TO_HIGH, **_BOUND),
    *_forms("vespo_loss", _SUMS, _VESPO, _VESPO_KNOBS, **detached(_vespo)),
    _mode("vespo_loss", "far away", _far, _FLAT, {}, **detached(_vespo)),
    _mode(
        "vespo_loss",
        "importance_weights",
        _weighted,
        _VESPO,
        {},
        keywords=("importance_weights",),
        **{"masked": (*LOGPROBS, "advantages", "importance_weights"), **detached(_vespo)},
    ),
    *_forms("gpg_loss", _live_and_dead, {}, {"alpha": 3.0, "segment_ids": _PACKED}, **_GPG),
    _mode("gpg_loss", "alpha", _live_and_dead, {"alpha": 2.0}, {"alpha": 3.0}, **_GPG),
    _mode("gpg_loss", "array alpha", _with_alpha, {}, {}, keywords=("alpha",), **_GPG),
)
