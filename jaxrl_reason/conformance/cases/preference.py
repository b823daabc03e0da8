"""Cases of the preference losses, paired and unpaired, and of the loss of reward models."""

import functools

import numpy as np

from jaxrl_reason.conformance.case import ROWS, Case

_POLICY: tuple[str, ...] = ("chosen", "rejected")
_PAIR: tuple[str, ...] = (*_POLICY, "ref_chosen", "ref_rejected")

_CHOSEN = np.array([-1.7, 0.6, -0.4, 1.1, -0.9, 0.2, 1.6, -0.1])
_MARGINS = np.array([-2.4, 1.3, 0.03, -0.7, 0.4, -0.05, 2.7, -1.2])
_LABELS = np.array([True, False, False, True, True, False, True, False])
_MASK = np.array([True, True, False, True, True, False, True, True])
_ALL = np.ones(ROWS, np.bool_)


def _jitter(rng):
    """Too small to reach a kink or to change an order."""
    return rng.uniform(-0.02, 0.02, ROWS)


def _pairs(rng):
    """Log-ratios and margins of both signs, and margins near 0."""
    ref_chosen, ref_rejected = rng.uniform(-9, -4, (2, ROWS))
    above = _CHOSEN + _jitter(rng)
    below = above - _MARGINS - _jitter(rng) / 2
    return dict(
        zip(
            _PAIR, (ref_chosen + above, ref_rejected + below, ref_chosen, ref_rejected), strict=True
        )
    )


def _two_samples(rng):
    """Two samples in an order of their own, no two numbers close."""
    return (0.4 * rng.permutation(ROWS) - 1.4 + _jitter(rng) for _ in range(2))


def _sorted_margins(rng, *, masked=False):
    policy, reference = _two_samples(rng)
    rejected, ref_rejected = rng.uniform(-9, -4, (2, ROWS))
    arrays = (rejected + policy, rejected, ref_rejected + reference, ref_rejected)
    return dict(zip(_PAIR, arrays, strict=True)) | ({"mask": _MASK} if masked else {})


def _sorted_ratios(rng, *, masked=False):
    above, below = _two_samples(rng)
    ref_chosen, ref_rejected = rng.uniform(-9, -4, (2, ROWS))
    arrays = (ref_chosen + above, ref_rejected + below, ref_chosen, ref_rejected)
    return dict(zip(_PAIR, arrays, strict=True)) | ({"mask": _MASK} if masked else {})


def _sums(rng):
    rejected = rng.uniform(-9, -4, ROWS)
    return {"chosen": rejected + _MARGINS + _jitter(rng), "rejected": rejected}


def _sums_and_lengths(rng):
    lengths = rng.integers(1, 9, (2, ROWS)).astype(np.int32)
    return {**_sums(rng), "chosen_lengths": lengths[0], "rejected_lengths": lengths[1]}


def _sums_and_float_lengths(rng):
    return {name: x.astype(np.float64) for name, x in _sums_and_lengths(rng).items()}


def _far_pairs(rng):
    """Log-ratios at which the square of p / p_ref is above exp(20)."""
    reference, ratios = rng.uniform(-30, -25, (2, ROWS)), rng.uniform(10.2, 11.5, (2, ROWS))
    return dict(zip(_PAIR, (*(reference + ratios), *reference), strict=True))


def _means(rng):
    """Geometric mean probabilities from 0.1 to 0.8; the odds bend too much for steps near 1."""
    chosen, rejected = -np.exp(rng.uniform(-1.4, 0.8, (2, ROWS)))
    return {"chosen_mean": chosen, "rejected_mean": rejected}


def _labelled(rng, *, level, one=False):
    """Log-ratios of both signs; `level` is of both signs too and never near 0, KTO's kink."""
    ref_logprobs = rng.uniform(-9, -4, ROWS)
    levels = rng.uniform(0.1, 1.0, ROWS) * rng.choice([-1, 1], ROWS)
    return {
        "logprobs": ref_logprobs + _CHOSEN + _jitter(rng),
        "ref_logprobs": ref_logprobs,
        "desirable": _LABELS,
        level: np.abs(levels[0]) if one else levels,
    }


def _rewards(rng, *, margin=False):
    rejected = rng.normal(size=ROWS)
    rewards = {"chosen_rewards": rejected + _MARGINS, "rejected_rewards": rejected}
    return rewards | ({"margin": rng.uniform(0.1, 1.0, ROWS)} if margin else {})


def _sigmoid(x):
    return 1 / (1 + np.exp(-x))


def _softplus(x):
    """-log sigmoid(-x)."""
    return np.logaddexp(0, x)


def _slope(u, f_divergence, f_alpha):
    """f'(u) of the generator f of the divergence, which f-DPO's reward is linear in."""
    if f_divergence == "alpha":
        alpha = 1 - f_alpha
        return (1 - u**-alpha) / alpha
    return {
        "reverse_kl": lambda: np.log(u) + 1,
        "forward_kl": lambda: -1 / u,
        "js": lambda: np.log(2 * u / (1 + u)),
    }[f_divergence]()


def _of_margin(formula):
    """Oracle of a loss that reads z = beta x (score of chosen - score of rejected) alone."""

    def oracle(*pair, beta, f_divergence="reverse_kl", f_alpha=None, **options):
        chosen, rejected, ref_chosen, ref_rejected = pair
        above = _slope(np.exp(chosen - ref_chosen), f_divergence, f_alpha)
        below = _slope(np.exp(rejected - ref_rejected), f_divergence, f_alpha)
        return formula(beta * (above - below), **options)

    return oracle


def _far(*pair, beta, f_divergence, f_alpha):
    """DPO with a reward that goes on as the tangent of (u^2 - 1) / 2 from u^2 = exp(20)."""
    assert (f_divergence, f_alpha) == ("alpha", 3.0)
    score = lambda x: (np.exp(20) * (1 + 2 * x - 20) - 1) / 2
    return _softplus(-beta * (score(pair[0] - pair[2]) - score(pair[1] - pair[3])))


def _of_ratios(formula):
    """Oracle of a loss of log(p / p_ref) of chosen and rejected."""
    return lambda *pair, beta: formula(pair[0] - pair[2], pair[1] - pair[3], beta)


def _logistic(z, label_smoothing=0.0):
    return (1 - label_smoothing) * _softplus(-z) + label_smoothing * _softplus(z)


def _robust(z, label_smoothing):
    agree, disagree = _softplus(-z), _softplus(z)
    return ((1 - label_smoothing) * agree - label_smoothing * disagree) / (1 - 2 * label_smoothing)


def _exo(z, label_smoothing):
    losses = np.zeros(z.shape)
    for sign, target in ((1, 1 - label_smoothing), (-1, label_smoothing)):
        q = _sigmoid(sign * z)
        losses += q * np.log(q / target)
    return losses


def _discopop(z, discopop_tau=0.05):
    modulation = _sigmoid(z / discopop_tau)
    return (1 - modulation) * _softplus(-z) + modulation * np.exp(-z)


def _quantiles(first, second, mask, beta, label_smoothing):
    losses, rows = np.zeros(first.shape), np.flatnonzero(mask)
    for i, j in zip(rows[np.argsort(first[rows])], rows[np.argsort(second[rows])], strict=True):
        losses[i] = _logistic(beta * (first[i] - second[j]), label_smoothing)
    return losses


def _aot(chosen, rejected, ref_chosen, ref_rejected, *, beta, label_smoothing=0.0, mask=_ALL):
    policy, reference = chosen - rejected, ref_chosen - ref_rejected
    return _quantiles(policy, reference, mask, beta, label_smoothing)


def _aot_unpaired(*pair, beta, label_smoothing=0.0, mask=_ALL):
    chosen, rejected, ref_chosen, ref_rejected = pair
    return _quantiles(chosen - ref_chosen, rejected - ref_rejected, mask, beta, label_smoothing)


def _simpo(chosen, rejected, chosen_lengths, rejected_lengths, *, beta, gamma):
    margin = beta / chosen_lengths * chosen - beta / rejected_lengths * rejected
    return _softplus(gamma - margin)


def _orpo(chosen_mean, rejected_mean, *, beta):
    odds = [p / (1 - p) for p in (np.exp(chosen_mean), np.exp(rejected_mean))]
    return -chosen_mean - beta * np.log(_sigmoid(np.log(odds[0] / odds[1])))


def _kto(logprobs, ref_logprobs, desirable, kl, *, beta, desirable_weight, undesirable_weight):
    losses = np.zeros(logprobs.shape)
    for i, reward in enumerate(logprobs - ref_logprobs):
        z = max(0, np.broadcast_to(kl, losses.shape)[i])
        if desirable[i]:
            losses[i] = desirable_weight * (1 - _sigmoid(beta * (reward - z)))
        else:
            losses[i] = undesirable_weight * (1 - _sigmoid(beta * (z - reward)))
    return losses


def _bco(logprobs, ref_logprobs, desirable, shift, *, beta):
    probability = _sigmoid(beta * (logprobs - ref_logprobs) - shift)
    return -np.log(np.where(desirable, probability, 1 - probability))


def _bradley_terry(chosen_rewards, rejected_rewards, *, margin=0.0, center=0.0):
    total = chosen_rewards + rejected_rewards
    return _softplus(rejected_rewards + margin - chosen_rewards) + center * total**2


def _metrics(chosen, rejected, ref_chosen, ref_rejected, *, beta):
    rewards = beta * (chosen - ref_chosen), beta * (rejected - ref_rejected)
    return {
        "rewards/chosen": rewards[0],
        "rewards/rejected": rewards[1],
        "rewards/margins": rewards[0] - rewards[1],
        "rewards/accuracies": (rewards[0] > rewards[1]).astype(np.float64),
    }


def _paired(function, oracle, options, knobs, *, label="", moving=_POLICY):
    return Case(
        function=function,
        label=label,
        inputs=_pairs,
        options=options,
        oracle=oracle,
        moving=moving,
        knobs=knobs,
        masked=_PAIR,
    )


_OF_MARGIN = {
    "dpo_loss": (_of_margin(_logistic), {}, {}),
    "hinge_dpo_loss": (_of_margin(lambda z: np.maximum(0, 1 - z)), {}, {}),
    "robust_dpo_loss": (_of_margin(_robust), {"label_smoothing": 0.2}, {"label_smoothing": 0.1}),
    "exo_loss": (_of_margin(_exo), {"label_smoothing": 0.01}, {"label_smoothing": 0.1}),
    "discopop_loss": (_of_margin(_discopop), {"discopop_tau": 0.5}, {"discopop_tau": 0.05}),
}

_SCORES = (
    ({"f_divergence": "forward_kl"}, {"f_divergence": "js"}),
    ({"f_divergence": "js"}, {"f_divergence": "reverse_kl"}),
    ({"f_divergence": "alpha", "f_alpha": 0.4}, {"f_alpha": 0.7}),
)

_OF_RATIOS = {
    "dpo_norm_loss": lambda c, r, beta: _softplus(-beta * (c - r)),
    "ipo_loss": lambda c, r, beta: (c - r - 1 / (2 * beta)) ** 2,
    "nca_loss": lambda c, r, beta: (
        _softplus(-beta * c) + (_softplus(beta * c) + _softplus(beta * r)) / 2
    ),
    "bco_pair_loss": lambda c, r, beta: _softplus(-beta * c) + _softplus(beta * r),
    "sppo_hard_loss": lambda c, r, beta: (c - 1 / beta / 2) ** 2 + (r + 1 / beta / 2) ** 2,
    "apo_zero_loss": lambda c, r, beta: 1 - _sigmoid(beta * c) + _sigmoid(beta * r),
    "apo_down_loss": lambda c, r, beta: _sigmoid(beta * c) + 1 - _sigmoid(beta * (c - r)),
}


def _sorted_cases(function, inputs, oracle):
    """With and without a mask, which makes the only difference to padding."""
    for label, masked in (("", False), ("mask", True)):
        yield Case(
            function=function,
            label=label,
            inputs=functools.partial(inputs, masked=masked),
            options={"beta": 0.5, "label_smoothing": 0.1},
            keywords=("mask",) if masked else (),
            oracle=oracle,
            moving=_POLICY,
            knobs={"beta": 0.8, "label_smoothing": 0.3},
            mask="mask" if masked else None,
            masked=_PAIR if masked else (),
            rowwise=False,
        )


def _labelled_cases(function, oracle, level, options, knobs):
    """With a level for each row, and with one for the batch."""
    for label, one in (("", False), (f"one {level}", True)):
        yield Case(
            function=function,
            label=label,
            inputs=functools.partial(_labelled, level=level, one=one),
            options=options,
            oracle=oracle,
            moving=("logprobs",),
            knobs=knobs,
            masked=("logprobs", "ref_logprobs", *(() if one else (level,))),
        )


CASES: tuple[Case, ...] = (
    *(
        _paired(name, oracle, {"beta": 0.5} | options, {"beta": 0.8} | knobs)
        for name, (oracle, options, knobs) in _OF_MARGIN.items()
    ),
    *(
        _paired(name, oracle, {"beta": 0.5} | options | score, knobs, label=score["f_divergence"])
        for name, (oracle, options, _) in _OF_MARGIN.items()
        for score, knobs in _SCORES
    ),
    *(
        _paired(name, _of_ratios(formula), {"beta": 0.5}, {"beta": 0.8})
        for name, formula in _OF_RATIOS.items()
    ),
    _paired(
        "dpo_loss",
        _of_margin(_logistic),
        {"beta": 0.5, "label_smoothing": 0.2},
        {"label_smoothing": 0.0},
        label="conservative",
    ),
    Case(
        function="dpo_loss",
        label="alpha far away",
        inputs=_far_pairs,
        options={"beta": 1e-9, "f_divergence": "alpha", "f_alpha": 3.0},
        oracle=_far,
        moving=_POLICY,
        masked=_PAIR,
    ),
    # The paper's tau, at a beta that keeps the modulation from being a step.
    _paired("discopop_loss", _of_margin(_discopop), {"beta": 0.1}, {"beta": 0.2}, label="tau 0.05"),
    _paired("preference_metrics", _metrics, {"beta": 0.5}, {"beta": 0.8}, moving=()),
    *_sorted_cases("aot_loss", _sorted_margins, _aot),
    *_sorted_cases("aot_unpaired_loss", _sorted_ratios, _aot_unpaired),
    *(
        Case(
            function="simpo_loss",
            label=label,
            inputs=inputs,
            options={"beta": 2.0, "gamma": 0.5},
            oracle=_simpo,
            moving=_POLICY,
            knobs={"beta": 1.0, "gamma": 0.3},
            masked=_POLICY,
        )
        for label, inputs in (("", _sums_and_lengths), ("float lengths", _sums_and_float_lengths))
    ),
    Case(
        function="orpo_loss",
        inputs=_means,
        options={"beta": 0.5},
        oracle=_orpo,
        moving=("chosen_mean", "rejected_mean"),
        knobs={"beta": 0.8},
        masked=("chosen_mean", "rejected_mean"),
    ),
    *(
        Case(
            function="cpo_loss",
            label=label,
            inputs=_sums,
            options={"beta": 0.5} | smoothing,
            oracle=lambda c, r, *, beta, **smoothing: _logistic(beta * (c - r), **smoothing),
            moving=_POLICY,
            knobs={"beta": 0.8, "label_smoothing": 0.3},
            masked=_POLICY,
        )
        for label, smoothing in (("", {}), ("smoothed", {"label_smoothing": 0.2}))
    ),
    *_labelled_cases(
        "kto_loss",
        _kto,
        "kl",
        {"beta": 0.5, "desirable_weight": 1.0, "undesirable_weight": 1.5},
        {"beta": 0.8, "desirable_weight": 1.2, "undesirable_weight": 1.0},
    ),
    *_labelled_cases("bco_loss", _bco, "shift", {"beta": 0.5}, {"beta": 0.8}),
    Case(
        function="bradley_terry_loss",
        inputs=_rewards,
        oracle=_bradley_terry,
        moving=("chosen_rewards", "rejected_rewards"),
        knobs={"margin": 0.5, "center": 0.1},
        masked=("chosen_rewards", "rejected_rewards"),
    ),
    Case(
        function="bradley_terry_loss",
        label="margin",
        inputs=functools.partial(_rewards, margin=True),
        options={"center": 0.1},
        keywords=("margin",),
        oracle=_bradley_terry,
        moving=("chosen_rewards", "rejected_rewards"),
        knobs={"center": 0.0},
        masked=("chosen_rewards", "rejected_rewards", "margin"),
    ),
)
