"""Cases of the masked reductions, and of log-probabilities and entropies of tokens."""

import functools
from collections import defaultdict

import numpy as np

from jaxrl_reason.conformance.case import ROWS, Case

T, D, V = 6, 4, 7


def _values(rng, dtype: type = np.bool_):
    # One row counts nowhere, and one everywhere.
    mask = rng.random((ROWS, T)) < 0.6
    mask[1], mask[2] = False, True
    return {"values": rng.normal(size=(ROWS, T)), "mask": mask.astype(dtype)}


def _segments():
    """Which sequence of its row a token belongs to: two or three, of several lengths."""
    ids = np.asarray([[1, 1, 1, 2, 2, 0], [3, 3, 3, 3, 1, 1], [0, 1, 1, 2, 2, 2]], np.int32)
    return np.resize(ids, (ROWS, T))


def _sequences(mask, segment_ids):
    """The places of the counted tokens, by sequence."""
    found = defaultdict(list)
    for row, t in np.argwhere(mask != 0):
        found[row, 0 if segment_ids is None else segment_ids[row, t]].append((row, t))
    return list(found.values())


def _aggregate(values, mask, *, how, max_length=None, segment_ids=None):
    sums = {
        tuple(places): sum(values[place] for place in places)
        for places in map(tuple, _sequences(mask, segment_ids))
    }
    rows = len(values) if segment_ids is None else len(sums)
    weight = {
        "token_mean": np.sum(mask != 0),
        "sequence_mean": len(sums),
        "constant": rows * (max_length or 0),
        "sequence_sum": len(sums),
    }[how]
    share = lambda places: 1 / len(places) if how == "sequence_mean" else 1
    return sum(total * share(places) for places, total in sums.items()), np.float64(weight)


def _sequence_sum(values, mask, segment_ids=None):
    totals = np.zeros_like(values)
    for row, t in np.ndindex(totals.shape):
        ids = np.zeros(T) if segment_ids is None else segment_ids[row]
        totals[row, t] = sum(values[row, (mask[row] != 0) & (ids == ids[t])])
    return totals


def _masked_sum(values, mask, axis=None):
    return np.sum(values * (mask != 0), axis=axis)


def _masked_mean(values, mask, axis=None):
    count = np.sum(mask != 0, axis=axis)
    return np.where(count > 0, _masked_sum(values, mask, axis) / np.maximum(count, 1), 0.0)


def _logprobs(logits, tokens=None, *, temperature=1.0):
    """Log-probabilities of the tokens and entropies; column t reads the logits of column t - 1."""
    probabilities = np.exp(logits[:, :-1] / temperature)
    probabilities /= probabilities.sum(-1, keepdims=True)
    entropy = -np.sum(probabilities * np.log(probabilities), axis=-1)
    shifted = np.zeros((2, *logits.shape[:2]))
    shifted[1, :, 1:] = entropy
    if tokens is not None:
        own = np.take_along_axis(probabilities, tokens[:, 1:, None], -1)[..., 0]
        shifted[0, :, 1:] = np.log(own)
    return shifted[0], shifted[1]


def _logits(rng):
    tokens = rng.integers(V, size=(ROWS, T)).astype(np.int32)
    return {"logits": 2 * rng.normal(size=(ROWS, T, V)), "tokens": tokens}


def _hidden(rng, vocabulary):
    return {
        "hidden": rng.normal(size=(ROWS, T, D)),
        "unembedding": rng.normal(size=(D, vocabulary)),
        "tokens": rng.integers(vocabulary, size=(ROWS, T)).astype(np.int32),
    }


def _far_apart(rng):
    """Logits around 75 and around -75, whose exponentials need their maximum taken off."""
    arrays = _hidden(rng, V)
    arrays["hidden"][..., 0] = 1
    arrays["unembedding"][0] += np.where(np.arange(V) % 2, 60, -60)
    return arrays


def _chunked(hidden, unembedding, tokens, *, chunk_size, temperature=1.0):
    return _logprobs(np.einsum("btd,dv->btv", hidden, unembedding), tokens, temperature=temperature)


def _targets(hidden, unembedding, targets, *, chunk_size, temperature=1.0, count=T):
    """Each target from the logits in its own column; none from column `count` on."""
    logits = np.pad(np.einsum("bmd,dv->bmv", hidden, unembedding), ((0, 0), (0, 1), (0, 0)))
    pair = _logprobs(logits, np.pad(targets, ((0, 0), (1, 0))), temperature=temperature)
    return tuple(np.where(np.arange(T) < count, x[:, 1:], 0) for x in pair)


def _counted(rng, count):
    arrays = _hidden(rng, V)
    arrays["targets"] = arrays.pop("tokens")
    return {**arrays, "count": np.asarray(count, np.int32)}


_REDUCED = {
    "inputs": _values,
    "moving": ("values",),
    "mask": "mask",
    "masked": ("values",),
    "rowwise": False,
}

CASES = (
    *(
        Case(
            function="aggregate",
            label=f"{how}{label}",
            options={"how": how, "max_length": 10, **packed},
            oracle=_aggregate,
            knobs={
                "how": "token_mean" if how == "constant" else "constant",
                **({"max_length": 5} if how == "constant" else {}),
                **({"segment_ids": None} if packed and how != "token_mean" else {}),
            },
            **_REDUCED,
        )
        for how in ("token_mean", "sequence_mean", "constant", "sequence_sum")
        for label, packed in (("", {}), ("-packed", {"segment_ids": _segments()}))
    ),
    Case(
        function="aggregate",
        label="integer-mask",
        options={"how": "sequence_mean"},
        oracle=_aggregate,
        **{**_REDUCED, "inputs": lambda rng: _values(rng, np.int32)},
    ),
    *(
        Case(
            function="sequence_sum",
            label=label,
            options=packed,
            oracle=_sequence_sum,
            knobs={"segment_ids": None} if packed else {},
            **{**_REDUCED, "rowwise": True},
        )
        for label, packed in (("", {}), ("packed", {"segment_ids": _segments()}))
    ),
    *(
        Case(
            function=name,
            label="rows" if options else "",
            options=options,
            oracle=oracle,
            knobs={} if options else {"axis": 1},
            **{**_REDUCED, "rowwise": bool(options)},
        )
        for name, oracle in (("masked_sum", _masked_sum), ("masked_mean", _masked_mean))
        for options in ({}, {"axis": 1})
    ),
    *(
        Case(
            function="token_logprobs",
            label=label,
            inputs=_logits,
            options=options,
            oracle=lambda *arrays, **options: _logprobs(*arrays, **options)[0],
            moving=("logits",),
            knobs={"temperature": 0.7},
        )
        for label, options in (("", {}), ("cold", {"temperature": 0.5}))
    ),
    *(
        Case(
            function="token_entropy",
            label=label,
            inputs=lambda rng: {"logits": _logits(rng)["logits"]},
            options=options,
            oracle=lambda logits, **options: _logprobs(logits, **options)[1],
            moving=("logits",),
            knobs={"temperature": 0.7},
        )
        for label, options in (("", {}), ("hot", {"temperature": 2.0}))
    ),
    # The least chunks, chunks that divide neither rows nor vocabulary, and one that holds all.
    *(
        Case(
            function="chunked_token_logprobs",
            label=f"{chunk_size}_of_{vocabulary}",
            inputs=functools.partial(_hidden, vocabulary=vocabulary),
            options={"chunk_size": chunk_size, "temperature": 0.8},
            oracle=_chunked,
            moving=("hidden", "unembedding"),
            knobs={"temperature": 1.0},
        )
        for chunk_size, vocabulary in ((1, V), (17, V), (27, 12), (1000, V))
    ),
    Case(
        function="chunked_token_logprobs",
        label="warm",
        inputs=functools.partial(_hidden, vocabulary=V),
        options={"chunk_size": 17},
        oracle=_chunked,
        moving=("hidden", "unembedding"),
        knobs={"temperature": 0.8},
    ),
    Case(
        function="chunked_token_logprobs",
        label="array_temperature",
        inputs=lambda rng: {**_hidden(rng, V), "temperature": np.asarray(0.8)},
        options={"chunk_size": 17},
        keywords=("temperature",),
        oracle=_chunked,
        moving=("hidden", "unembedding", "temperature"),
    ),
    Case(
        function="chunked_token_logprobs",
        label="far_apart",
        inputs=_far_apart,
        options={"chunk_size": 17, "temperature": 0.8},
        oracle=_chunked,
        moving=("hidden", "unembedding"),
    ),
    # Columns that nobody wants: none, some, all but one, and all; in blocks and at once.
    *(
        Case(
            function="chunked_target_logprobs",
            label=f"{count}_columns_{chunk_size}",
            inputs=functools.partial(_counted, count=count),
            options={"chunk_size": chunk_size, "temperature": 0.8},
            keywords=("count",),
            oracle=_targets,
            moving=("hidden", "unembedding"),
            knobs={"temperature": 1.0},
        )
        for count, chunk_size in ((3, 17), (4, 1000), (5, 17), (T, 17), (T, 1000))
    ),
    Case(
        function="chunked_target_logprobs",
        label="all_columns",
        inputs=lambda rng: _hidden(rng, V),
        options={"chunk_size": 17},
        oracle=_targets,
        moving=("hidden", "unembedding"),
        knobs={"temperature": 0.8},
    ),
)
