"""Inputs and formulas that the cases of the policy-gradient losses share."""

import numpy as np

from jaxrl_reason.conformance.case import ROWS

SHAPE = (ROWS, 6)
GAP = 0.02
"""Distance kept from every kink, in log ratios."""
LOG_CLIPS = tuple(np.log([0.7, 0.8, 1.2, 1.3, 1.5, 1.8, 2.5]))
LOGPROBS = ("logprobs", "old_logprobs")


def away(x, kinks):
    """The numbers, moved off the kinks."""
    for kink in kinks:
        x = np.where(np.abs(x - kink) < GAP, kink + np.where(x < kink, -GAP, GAP), x)
    return x


def signed(rng, size=None):
    """Numbers of both signs, none near 0."""
    return rng.choice([-1.0, 1.0], size) * rng.uniform(0.2, 1.5, size)


def token_inputs(rng, *, per_token, kinks=LOG_CLIPS):
    """Token ratios on both sides of every clip; one advantage per sequence or per token."""
    old = -rng.exponential(size=SHAPE)
    return {
        "logprobs": old + away(rng.normal(scale=0.6, size=SHAPE), kinks),
        "old_logprobs": old,
        "advantages": signed(rng, SHAPE if per_token else ROWS),
    }


def masked_inputs(rng, **options):
    """`token_inputs` and a mask under which one row has no token."""
    arrays, mask = token_inputs(rng, **options), rng.random(SHAPE) < 0.8
    mask[5] = False
    return {**arrays, "mask": mask}


def spread(a, like):
    """Advantages of either form as one per token."""
    return np.broadcast_to(a.reshape(len(like), -1), like.shape)


def ppo(ratio, a, *, epsilon, epsilon_high=None, delta=np.inf):
    """PPO's surrogate of any ratio."""
    high = epsilon if epsilon_high is None else epsilon_high
    clipped = np.clip(ratio, 1 - epsilon, 1 + high)
    return -np.minimum(np.minimum(ratio, delta) * a, clipped * a)


def ppo_sides(ratio, a, *, epsilon, epsilon_high=None):
    """Where PPO clips a ratio."""
    high = epsilon if epsilon_high is None else epsilon_high
    return sides((ratio < 1 - epsilon) & (a < 0), (ratio > 1 + high) & (a > 0))


def sides(low, high):
    """Clip metrics of two conditions."""
    return {"low": low, "high": high, "region": low | high}


def detached(formula):
    """Oracle and surrogate of a formula whose first argument holds what is detached."""

    def oracle(logprobs, *arrays, **options):
        return formula({"logprobs": logprobs}, logprobs, *arrays, **options)

    return {"oracle": oracle, "surrogate": formula}
