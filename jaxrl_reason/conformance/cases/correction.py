"""Cases of importance weights."""

import functools

import numpy as np

from jaxrl_reason.arrays import WeightedMean
from jaxrl_reason.conformance.case import ROWS, Case

_GRID = 0.26
"""Token log ratios are multiples of this. Over 1, 2 or 4 counted tokens neither their sums nor
their means then come near log 0.5, log 2, log 0.7 or log 1.74, the edges of the ratios below."""

_PACKED = np.asarray([[1, 1, 1, 2, 2, 2, 2, 0], [3, 3, 1, 1, 1, 1, 1, 2]] * (ROWS // 2), np.int32)
_LOG_MASS = np.log(np.random.default_rng(11).uniform(0.5, 1.0, _PACKED.shape))


def _rollout(rng, *, packed=False, truncated=False):
    """Every sequence counts 1, 2 or 4 of its tokens; one row of single sequences counts none."""
    ids = _PACKED if packed else np.zeros_like(_PACKED)
    mask = np.zeros(ids.shape, bool)
    for row in range(ROWS):
        for sequence in np.unique(ids[row]):
            places = np.flatnonzero(ids[row] == sequence)
            count = max(n for n in (1, 2, 4) if n <= len(places))
            count = count if packed else (4, 2, 1, 4, 0, 2, 4, 1)[row]
            mask[row, rng.permutation(places)[:count]] = True
    sampling = -rng.exponential(size=ids.shape)
    log_mass = np.log(rng.uniform(0.5, 1.0, ids.shape)) if truncated else np.zeros(ids.shape)
    log_ratios = _GRID * rng.integers(-4, 5, ids.shape)
    inputs = {
        "old_logprobs": sampling + log_mass + log_ratios,
        "sampling_logprobs": sampling,
        "mask": mask,
    }
    if truncated:
        inputs["keep_mass"] = log_mass
    if packed:
        inputs["segment_ids"] = ids
    return inputs


def _bounded(ratio, *, mode, cap, floor=None):
    """The weight and what is counted of one ratio."""
    low, high = floor is not None and ratio < floor, ratio > cap
    if mode == "truncate":
        weight = min(ratio, cap) if floor is None else max(min(ratio, cap), floor)
    else:
        weight = 0.0 if low or high else ratio
    return weight, weight**2, low, high, not 0.5 <= ratio <= 2


def _weights(old, sampling, mask, *, level, keep_mass=None, segment_ids=None, **bounds):
    ids = np.zeros(mask.shape, int) if segment_ids is None else segment_ids
    log_ratio = old - sampling - (0.0 if keep_mass is None else keep_mass)
    weights, counted = np.zeros(mask.shape), []
    for row in range(len(mask)):
        units = [(ids[row] == i) & mask[row] for i in np.unique(ids[row])]
        if level == "token":
            units = [np.arange(mask.shape[1]) == t for t in np.flatnonzero(mask[row])]
        for unit in filter(np.any, units):
            logs = log_ratio[row, unit]
            ratio = np.exp(logs.mean() if level == "geometric" else logs.sum())
            counted.append(_bounded(ratio, **bounds))
            weights[row, unit] = counted[-1][0]
    names = ("mean", "mean_square", "below_floor", "above_cap", "outside_half_to_double")
    totals = np.sum(np.asarray(counted, np.float64), axis=0)
    return weights, {
        f"sampling/importance_sampling_ratio/{name}": WeightedMean(total, np.float64(len(counted)))
        for name, total in zip(names, totals, strict=True)
    }


def _case(level, mode, *, packed=False, truncated=False, cap_only=False):
    how = {"packed": packed, "keep_mass": truncated, "cap_only": cap_only}
    label = "_".join([level, mode, *(name for name, given in how.items() if given)])
    knobs = {
        "level": "sequence" if level == "token" else "token",
        "mode": "mask" if mode == "truncate" else "truncate",
        "cap": 1.2,
        "floor": 0.7 if cap_only else None,
    }
    optional = {"segment_ids": (packed, _PACKED), "keep_mass": (truncated, _LOG_MASS)}
    if level == "token":
        del optional["segment_ids"]
    return Case(
        function="importance_weights",
        label=label,
        inputs=functools.partial(_rollout, packed=packed, truncated=truncated),
        options={"level": level, "mode": mode, "cap": 1.74} | ({} if cap_only else {"floor": 0.7}),
        keywords=("keep_mass",) * truncated + ("segment_ids",) * packed,
        oracle=_weights,
        knobs=knobs | {name: other for name, (given, other) in optional.items() if not given},
        mask="mask",
        masked=("old_logprobs", "sampling_logprobs") + ("keep_mass",) * truncated,
        rowwise=False,
    )


CASES: tuple[Case, ...] = (
    *(_case(x, mode) for x in ("token", "sequence", "geometric") for mode in ("truncate", "mask")),
    *(_case("token", mode, cap_only=True) for mode in ("truncate", "mask")),
    *(_case(level, "truncate", packed=True) for level in ("sequence", "geometric")),
    _case("token", "mask", truncated=True),
    _case("sequence", "truncate", truncated=True, packed=True),
    Case(
        function="effective_sample_share",
        inputs=lambda rng: {
            "mean": rng.uniform(0.2, 1.0, ROWS),
            "mean_square": rng.uniform(1.0, 2.0, ROWS),
        },
        oracle=lambda mean, mean_square: mean**2 / mean_square,
        masked=("mean", "mean_square"),
    ),
    Case(
        function="effective_sample_share",
        label="no weight",
        inputs=lambda rng: {"mean": np.arange(ROWS) / 8, "mean_square": np.arange(ROWS) / 1.0},
        oracle=lambda mean, square: np.divide(mean**2, square, np.zeros(ROWS), where=square != 0),
    ),
)
