"""Cases of value losses and of the losses of critics in offline RL."""

import functools

import numpy as np

from jaxrl_reason.conformance.case import ROWS, Case

_CRITICS, _BATCH, _SAMPLES = ROWS, 12, 5
"""The critics of an ensemble are the rows of its results, of a shape [E, B]."""

_CLIP = 0.5
_FROM_POLICY = np.arange(_SAMPLES) >= 3


def _far(rng, size, low=0.05, high=1.5):
    """Numbers of both signs that stay away from 0."""
    return rng.uniform(low, high, size) * rng.choice([-1, 1], size)


def _values(rng):
    """Inside and outside the range, on both sides, nearer to the return and further from it."""
    shape = (ROWS, 6)
    old = rng.normal(size=shape)
    side = rng.choice([-1, 1], shape)
    values = old + side * rng.choice([0.2, 0.4, 0.6, 0.9], shape)
    # The two squares are equal where the return is midway between value and clipped value.
    midway = (values + np.clip(values, old - _CLIP, old + _CLIP)) / 2
    return {"values": values, "old_values": old, "returns": midway + _far(rng, shape)}


def _clipped(values, old_values, returns, *, clip_range):
    losses = np.zeros(values.shape)
    for i in np.ndindex(values.shape):
        clipped = min(max(values[i], old_values[i] - clip_range), old_values[i] + clip_range)
        losses[i] = max((values[i] - returns[i]) ** 2, (clipped - returns[i]) ** 2) / 2
    return losses


def _expectile(differences, *, expectile):
    return np.abs(expectile - (differences < 0)) * differences**2


def _transitions(rng, *, actions=()):
    return {
        "rewards": rng.normal(size=_BATCH),
        "continues": np.arange(_BATCH) % 5 != 1,
        "next_q_values": rng.normal(size=(_CRITICS, _BATCH, *actions)),
    }


def _targets(rewards, continues, next_q_values, *, discount, members=None):
    chosen = range(len(next_q_values)) if members is None else members
    targets = np.array(rewards)
    for i in np.flatnonzero(continues):
        per_action = np.min([np.atleast_1d(next_q_values[e][i]) for e in chosen], axis=0)
        targets[i] += discount * per_action.max()
    return targets


def _critics(rng):
    return {"q_values": rng.normal(size=(_CRITICS, _BATCH)), "targets": rng.normal(size=_BATCH)}


def _actions(rng, *, returns, weighted):
    """Sampled values on both sides of their state's return, where max(Q, return) has its kink."""
    mc_returns = rng.normal(size=_BATCH)
    samples = mc_returns[:, None] + _far(rng, (_CRITICS, _BATCH, _SAMPLES))
    inputs = {"q_values": rng.normal(size=(_CRITICS, _BATCH)), "sampled_q_values": samples}
    if returns:
        inputs |= {"mc_returns": mc_returns, "from_policy": _FROM_POLICY}
    if weighted:
        inputs["sample_logprobs"] = rng.normal(size=(_BATCH, _SAMPLES))
    return inputs


def _cql(q_values, sampled_q_values, sample_logprobs=None, *, temperature=1.0):
    penalties = np.zeros(q_values.shape)
    for e, i in np.ndindex(q_values.shape):
        z = sampled_q_values[e, i]
        if sample_logprobs is None:
            z = np.append(z, q_values[e, i])
            scale = len(z)
        else:
            z, scale = z - sample_logprobs[i], 1
        soft = temperature * np.log(np.sum(np.exp(z / temperature)) / scale)
        penalties[e, i] = soft - q_values[e, i]
    return penalties


def _calql(q_values, sampled_q_values, mc_returns, from_policy, sample_logprobs=None, **options):
    lifted = sampled_q_values.copy()
    for j in np.flatnonzero(from_policy):
        lifted[:, :, j] = np.maximum(lifted[:, :, j], mc_returns)
    return _cql(q_values, lifted, sample_logprobs, **options)


def _conservative(function, oracle, weighted, *, label="", **options):
    returns = function == "calql_penalty"
    return Case(
        function=function,
        label=label or ("weighted" if weighted else ""),
        inputs=functools.partial(_actions, returns=returns, weighted=weighted),
        options=options,
        oracle=oracle,
        moving=("q_values", "sampled_q_values"),
        knobs={"temperature": 1.5},
        masked=("q_values", "sampled_q_values"),
    )


_PENALTIES = {"cql_penalty": _cql, "calql_penalty": _calql}


def _td_targets(label, knobs, *, actions=(), **options):
    return Case(
        function="td_targets",
        label=label,
        inputs=functools.partial(_transitions, actions=actions),
        options={"discount": 0.9, **options},
        oracle=_targets,
        knobs={"discount": 0.5, **knobs},
        masked=("rewards",),
        rowwise=False,
    )


_MEMBERS = np.asarray([5, 2], np.int32)

CASES: tuple[Case, ...] = (
    Case(
        function="clipped_value_loss",
        inputs=_values,
        options={"clip_range": _CLIP},
        oracle=_clipped,
        moving=("values",),
        knobs={"clip_range": 0.3},
        masked=("values", "old_values", "returns"),
    ),
    *(
        Case(
            function="expectile_loss",
            label=label,
            inputs=lambda rng: {"differences": _far(rng, (ROWS, 3))},
            options={"expectile": expectile},
            oracle=_expectile,
            moving=("differences",),
            knobs={"expectile": 0.5},
            masked=("differences",),
        )
        for label, expectile in (("high", 0.9), ("low", 0.2))
    ),
    _td_targets("", {"members": _MEMBERS}),
    _td_targets("members", {"members": _MEMBERS[::-1] - 1}, members=_MEMBERS),
    _td_targets("actions", {"members": _MEMBERS}, actions=(4,)),
    Case(
        function="td_loss",
        inputs=_critics,
        oracle=lambda q_values, targets: (q_values - targets) ** 2,
        moving=("q_values",),
        masked=("q_values",),
    ),
    *(
        _conservative(function, oracle, weighted, temperature=0.7)
        for function, oracle in _PENALTIES.items()
        for weighted in (False, True)
    ),
    *(
        _conservative(function, oracle, False, label="temperature 1")
        for function, oracle in _PENALTIES.items()
    ),
)
