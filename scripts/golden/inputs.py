"""Random inputs of the golden records.

Floats are multiples of 1/1024: exact in float32 too, and small when compressed. Clip bounds such as
1.2 are never hit exactly, because no logarithm of theirs is such a multiple.
"""

import numpy as np

ROWS, TOKENS = 8, 6
Arrays = dict[str, np.ndarray]


def rounded(values: np.ndarray) -> np.ndarray:
    """The nearest multiples of 1/1024."""
    return np.round(np.asarray(values, np.float64) * 1024) / 1024


def contiguous_mask(rng: np.random.Generator, *, empty_row: bool = False) -> np.ndarray:
    """Completions of random length that start at column 0; every length occurs.

    TRL counts a sequence without tokens as a zero in the mean over sequences and we leave it out,
    so only verl, which leaves it out too, is asked about one.
    """
    lengths = rng.permutation(np.arange(ROWS) % TOKENS + 1)
    if empty_row:
        lengths[2] = 0
    return np.arange(TOKENS)[None, :] < lengths[:, None]


def policy(seed: int, *, spread: float = 0.5, per_token: bool = False, empty_row=False) -> Arrays:
    """Log-probabilities of two policies, advantages of both signs and a mask.

    ``spread`` is the deviation of the log ratio; 0.5 puts tokens on both sides of the usual clips.
    """
    rng = np.random.default_rng(seed)
    old = -rounded(rng.gamma(2.0, 0.5, (ROWS, TOKENS)) + 0.01)
    advantages = rng.normal(size=(ROWS, TOKENS) if per_token else ROWS)
    advantages += 0.1 * np.sign(advantages)
    return {
        "logprobs": rounded(old + spread * rng.normal(size=old.shape)),
        "old_logprobs": old,
        "advantages": rounded(advantages),
        "mask": contiguous_mask(rng, empty_row=empty_row),
    }


def pairs(seed: int, *, per_token: bool = False) -> Arrays:
    """Sequence log-probabilities of pairs under policy and reference, and lengths.

    ``per_token`` gives means over a completion's tokens instead of sums.
    """
    rng = np.random.default_rng(seed)
    lengths = {name: rng.integers(2, TOKENS + 1, ROWS) for name in ("chosen", "rejected")}
    arrays = {}
    for name in ("chosen", "rejected"):
        mean = -0.3 - rng.gamma(2.0, 0.3, ROWS)
        ref_mean = mean + 0.4 * rng.normal(size=ROWS)
        factor = 1 if per_token else lengths[name]
        arrays[name] = rounded(mean * factor)
        arrays[f"ref_{name}"] = rounded(ref_mean * factor)
        arrays[f"{name}_lengths"] = lengths[name]
    return arrays


def rewards(seed: int, *, groups: int = 4, size: int = 4, objectives: int | None = None) -> Arrays:
    """Rewards of ``groups`` prompts with ``size`` completions; the second group is all equal."""
    rng = np.random.default_rng(seed)
    shape = (groups * size,) if objectives is None else (groups * size, objectives)
    values = rounded(rng.normal(size=shape) * 2)
    values[size : 2 * size] = 1.5
    return {"rewards": values}


def logits(seed: int, *, vocabulary: int = 7) -> Arrays:
    """Logits, tokens and a mask whose first column is false: nothing predicts the first token."""
    rng = np.random.default_rng(seed)
    mask = contiguous_mask(rng)
    mask[:, 0] = False
    mask[:, 1] = True
    return {
        "logits": rounded(2 * rng.normal(size=(ROWS, TOKENS, vocabulary))),
        "tokens": rng.integers(0, vocabulary, (ROWS, TOKENS)).astype(np.int32),
        "mask": mask,
    }
