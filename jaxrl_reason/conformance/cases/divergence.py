"""Cases of the KL estimators and of the losses of supervised fine-tuning."""

import numpy as np

from jaxrl_reason.conformance.case import ROWS, Case

_SHAPE = (ROWS, 5)

_ESTIMATORS = {
    "k1": lambda p, q: p - q,
    "k2": lambda p, q: (p - q) ** 2 / 2,
    "k3": lambda p, q: np.exp(q - p) - (q - p) - 1,
    "k1_abs": lambda p, q: np.abs(p - q),
}


def _logprobs(rng):
    return {"logprobs": -rng.exponential(size=_SHAPE)}


def _smoothed(rng):
    return _logprobs(rng) | {"mean_logprobs": -1 - rng.exponential(size=_SHAPE)}


def _policies(rng):
    logprobs = -rng.exponential(size=_SHAPE)
    # k1_abs has its kink where they agree.
    apart = rng.uniform(0.05, 2.0, _SHAPE) * rng.choice([-1, 1], _SHAPE)
    return {"logprobs": logprobs, "ref_logprobs": logprobs + apart}


def _kl(logprobs, ref_logprobs, *, estimator):
    return _ESTIMATORS[estimator](logprobs, ref_logprobs)


def _nll(logprobs, *, label_smoothing=0.0, mean_logprobs=0.0):
    return -(1 - label_smoothing) * logprobs - label_smoothing * mean_logprobs


CASES: tuple[Case, ...] = (
    *(
        Case(
            function="kl_estimate",
            label=estimator,
            inputs=_policies,
            options={"estimator": estimator},
            oracle=_kl,
            moving=("logprobs",),
            knobs={"estimator": "k2" if estimator == "k3" else "k3"},
            masked=("logprobs", "ref_logprobs"),
        )
        for estimator in _ESTIMATORS
    ),
    Case(
        function="nll_loss",
        inputs=_logprobs,
        oracle=_nll,
        moving=("logprobs",),
        masked=("logprobs",),
    ),
    Case(
        function="nll_loss",
        label="smoothed",
        inputs=_smoothed,
        options={"label_smoothing": 0.1},
        keywords=("mean_logprobs",),
        oracle=_nll,
        moving=("logprobs", "mean_logprobs"),
        knobs={"label_smoothing": 0.2},
        masked=("logprobs", "mean_logprobs"),
    ),
    Case(
        function="z_loss",
        inputs=lambda rng: {"log_normalizers": 3 * rng.normal(size=_SHAPE)},
        options={"coefficient": 0.3},
        oracle=lambda log_normalizers, *, coefficient: coefficient * log_normalizers**2,
        moving=("log_normalizers",),
        knobs={"coefficient": 0.1},
        masked=("log_normalizers",),
    ),
)
