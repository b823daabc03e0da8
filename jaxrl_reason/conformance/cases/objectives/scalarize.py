"""Cases of the rules that give each completion one score."""

from collections.abc import Callable

import numpy as np

from jaxrl_reason.conformance.case import ROWS, Case, Inputs

G, M = 4, 4
"""Completions of a prompt, and objectives."""
WEIGHTS = np.asarray([1.0, 0.5, 2.0, 0.25])


def rewards_of(rng, prompts: int) -> Inputs:
    """Rewards and mask; nine where nothing counts.

    Prompt 0 lacks one reward, and its objective 1 is equal everywhere. Objective 3 does not apply
    to prompt 1. Nothing applies to prompt 2.
    """
    rewards = rng.normal(size=(prompts, G, M)) * [1, 0.5, 2, 1] + [0, 1, 0, 0]
    rewards[0, :, 1] = 0.25
    mask = np.ones(rewards.shape, bool)
    mask[0, 1, 2] = False
    mask[1:2, :, 3] = False
    mask[2:3] = False
    rewards[~mask] = 9.0
    return {"rewards": rewards.reshape(-1, M), "mask": mask.reshape(-1, M)}


def draw(*, prompts: int = ROWS // G, accept: Callable[..., bool] = lambda **inputs: True):
    """Draws rewards until they are accepted."""

    def inputs(rng):
        while not accept(**(drawn := rewards_of(rng, prompts))):
            pass
        return drawn

    return inputs


def groups_of(rewards, mask, num_generations):
    """Pairs of the rewards and the mask of a prompt."""
    split = lambda rows: rows.reshape(-1, num_generations, rows.shape[1])
    return list(zip(split(rewards), split(mask), strict=True))


def standardized(rewards, mask, num_generations, *, ddof, eps, min_std=0.0):
    """z of each prompt, completion and objective; and which objectives of a prompt are live."""
    vectors, live = [], []
    for own, counts in groups_of(rewards, mask, num_generations):
        z, alive = np.zeros(own.shape), np.zeros(own.shape[1], bool)
        for k, least in enumerate(np.broadcast_to(min_std, own.shape[1:])):
            values = own[counts[:, k], k]
            if len(values) and np.ptp(values) > 0 and values.std(ddof=ddof) >= least:
                alive[k] = True
                z[counts[:, k], k] = (values - values.mean()) / (values.std(ddof=ddof) + eps)
        vectors.append(z)
        live.append(alive)
    return np.stack(vectors), np.stack(live)


def normalized(scores, over):
    """Scores [N, G] of each group or of the batch over their deviation; equal ones give 0."""
    if over == "none":
        return scores.reshape(-1)
    parts = [scores] if over == "batch" else list(scores)
    return np.concatenate(
        [
            np.ravel((x - x.mean()) / (x.std(ddof=1) + 1e-4) if np.ptp(x) > 0 else 0 * x)
            for x in parts
        ]
    )


def grpo(scores, scale):
    """Scores [N, G] minus the mean of their group, over a deviation."""
    centered = scores - scores.mean(axis=1, keepdims=True)
    if scale == "group":
        return normalized(scores, "group")
    return (centered / (scores.std(ddof=1) + 1e-4 if scale == "batch" else 1)).reshape(-1)


def imputed(rewards, mask, num_generations):
    """Rewards with the mean of the others of the group in gaps, and 0 where there are none."""
    filled = []
    for own, counts in groups_of(rewards, mask, num_generations):
        means = [own[c, k].mean() if c.any() else 0.0 for k, c in enumerate(counts.T)]
        filled.append(np.where(counts, own, means))
    return np.stack(filled)


def weighted_sum(rewards, mask, *, weights, num_generations, scale="group"):
    """GRPO of the weighted sum."""
    return grpo(imputed(rewards, mask, num_generations) @ weights, scale)


def gdpo(rewards, mask, *, weights, num_generations):
    """Each objective in its group, then the sum over the batch."""
    z, _ = standardized(rewards, mask, num_generations, ddof=1, eps=1e-4)
    return normalized(z @ weights, "batch")


def chebyshev(rewards, mask, *, weights, ideal, num_generations, rho=0.0, scale="group"):
    """The largest weighted distance to the ideal decides."""
    filled = imputed(rewards, mask, num_generations)
    scores = np.zeros(filled.shape[:2])
    for n, (_, counts) in enumerate(groups_of(rewards, mask, num_generations)):
        applies = counts.any(axis=0)
        for i in range(num_generations if applies.any() else 0):
            deficits = (weights * (ideal - filled[n, i]))[applies]
            scores[n, i] = -deficits.max() - rho * deficits.sum()
    return grpo(scores, scale)


def lagrangian(rewards, mask, *, weights, multipliers, **options):
    """The weighted sum with multipliers added to the weights."""
    total = weights + multipliers
    return weighted_sum(rewards, mask, weights=total / total.sum(), **options)


def multipliers_after(
    multipliers, rewards, mask, *, thresholds, learning_rate, max_multiplier=np.inf
):
    """Dual ascent, objective by objective."""
    moved = np.array(multipliers)
    for k, counts in enumerate(mask.T):
        if counts.any():
            step = learning_rate * (thresholds[k] - rewards[counts, k].mean())
            moved[k] = min(max(multipliers[k] + step, 0.0), max_multiplier)
    return moved


def several(rng) -> Inputs:
    """Multipliers before rewards; objective 2 applies nowhere."""
    drawn = rewards_of(rng, ROWS // G)
    drawn["mask"][:, 2] = False
    return {"multipliers": np.asarray([0.2, 0.1, 0.4, 1.0]), **drawn}


GROUPS = {"num_generations": G}
REWARDS = {"mask": "mask", "masked": ("rewards",), "rowwise": False}
IDEAL = np.asarray([3.0, 2.5, 4.0, 3.5])
MULTIPLIERS = np.asarray([0.0, 1.5, 0.25, 1.0])
OTHERS = {"num_generations": 2, "weights": WEIGHTS[::-1].copy()}

CASES = (
    Case(
        function="weighted_sum_advantages",
        inputs=draw(),
        options={"weights": WEIGHTS, **GROUPS},
        oracle=weighted_sum,
        knobs={**OTHERS, "scale": "none"},
        **REWARDS,
    ),
    *(
        Case(
            function="weighted_sum_advantages",
            label=scale,
            inputs=draw(prompts=4),
            options={"weights": WEIGHTS, "scale": scale, **GROUPS},
            oracle=weighted_sum,
            **REWARDS,
        )
        for scale in ("batch", "none")
    ),
    Case(
        function="gdpo_advantages",
        inputs=draw(),
        options={"weights": WEIGHTS, **GROUPS},
        oracle=gdpo,
        knobs=OTHERS,
        **REWARDS,
    ),
    # The float32 mean of seven times 0.1 is not 0.1.
    Case(
        function="gdpo_advantages",
        label="all equal",
        inputs=lambda rng: {
            "rewards": np.full((ROWS, 2), 0.1),
            "mask": np.arange(2 * ROWS).reshape(ROWS, 2) > 0,
        },
        options={"weights": WEIGHTS[:2], "num_generations": ROWS},
        oracle=lambda rewards, mask, **_: np.zeros(ROWS),
        **REWARDS,
    ),
    Case(
        function="chebyshev_advantages",
        inputs=draw(),
        options={"weights": WEIGHTS, "ideal": IDEAL, **GROUPS},
        oracle=chebyshev,
        knobs={**OTHERS, "ideal": IDEAL[::-1].copy(), "rho": 0.3, "scale": "none"},
        **REWARDS,
    ),
    *(
        Case(
            function="chebyshev_advantages",
            label=f"augmented_{scale}",
            inputs=draw(prompts=4),
            options={"weights": WEIGHTS, "ideal": IDEAL, "rho": 0.3, "scale": scale, **GROUPS},
            oracle=chebyshev,
            knobs={"rho": 0.0},
            **REWARDS,
        )
        for scale in ("batch", "none")
    ),
    Case(
        function="lagrangian_weights",
        inputs=lambda rng: {"weights": rng.uniform(0.1, 1, 8), "multipliers": rng.uniform(0, 2, 8)},
        oracle=lambda weights, multipliers: (weights + multipliers) / sum(weights + multipliers),
        moving=("weights", "multipliers"),
        rowwise=False,
    ),
    Case(
        function="lagrangian_advantages",
        inputs=draw(),
        options={"weights": WEIGHTS, "multipliers": MULTIPLIERS, **GROUPS},
        oracle=lagrangian,
        knobs={**OTHERS, "multipliers": MULTIPLIERS[::-1].copy(), "scale": "none"},
        **REWARDS,
    ),
    *(
        Case(
            function="update_multipliers",
            label=label,
            inputs=several,
            options={
                "thresholds": np.asarray([5.0, -9.0, 1.0, -np.inf]),
                "learning_rate": 0.5,
                **bound,
            },
            oracle=multipliers_after,
            knobs=knobs,
            **REWARDS,
        )
        for label, bound, knobs in (
            (
                "",
                {},
                {
                    "learning_rate": 0.7,
                    "thresholds": np.asarray([6.0, 0.0, 0.0, 0.0]),
                    "max_multiplier": 0.6,
                },
            ),
            ("bounded", {"max_multiplier": 0.8}, {"max_multiplier": 0.6}),
        )
    ),
)
