"""Cases of the advantages, which are all detached."""

import numpy as np

from jaxrl_reason.conformance.case import ROWS, Case

G, T = 4, 9


def _rewards(rng):
    return {"rewards": rng.normal(size=ROWS)}


def _one_dead_group(rng):
    rewards = rng.normal(size=ROWS)
    rewards[:G] = 0.1
    return {"rewards": rewards}


def _group(rewards, *, num_generations, baseline="mean", scale="group", ddof=1, eps=1e-4):
    advantages = np.zeros_like(rewards)
    for i, reward in enumerate(rewards):
        first = i - i % num_generations
        group = rewards[first : first + num_generations]
        others = np.delete(group, i - first)
        base = {"mean": np.mean(group), "leave_one_out": np.mean(others), "none": 0.0}[baseline]
        std = {"group": np.std(group, ddof=ddof), "batch": np.std(rewards, ddof=ddof)}
        divisor = 1 if scale == "none" else std[scale] + eps
        dead = np.ptp(group) == 0 and (baseline != "none" or scale == "group")
        advantages[i] = 0 if dead else (reward - base) / divisor
    return advantages


def _global(rewards, *, eps):
    return (rewards - np.mean(rewards)) / (np.std(rewards, ddof=1) + eps)


def _dead(rewards, *, num_generations):
    return np.ptp(rewards.reshape(-1, num_generations), axis=1) == 0


def _episodes(rng):
    rewards, values = rng.normal(size=(2, ROWS, T))
    # Holes as well as padding, a row without tokens and one without holes.
    mask = rng.random((ROWS, T)) < 0.6
    mask[1], mask[2] = False, True
    return {"rewards": rewards, "values": values, "mask": mask}


def _gae(rewards, values, mask, *, gamma, lam):
    advantages = np.zeros_like(rewards)
    for row in range(len(rewards)):
        later_value = later_advantage = 0.0
        for t in reversed(np.flatnonzero(mask[row])):
            delta = rewards[row, t] + gamma * later_value - values[row, t]
            advantages[row, t] = delta + gamma * lam * later_advantage
            later_value, later_advantage = values[row, t], advantages[row, t]
    return advantages, np.where(mask, advantages + values, 0)


CASES = (
    *(
        Case(
            function="group_advantages",
            label=f"{baseline}-{scale}",
            inputs=_rewards,
            options={"num_generations": G, "baseline": baseline, "scale": scale},
            oracle=_group,
            knobs={
                **({"num_generations": 2} if baseline != "none" or scale == "group" else {}),
                "baseline": "mean" if baseline == "none" else "none",
                "scale": "batch" if scale == "none" else "none",
                **({} if scale == "none" else {"ddof": 0, "eps": 0.1}),
            },
            rowwise=False,
        )
        for baseline in ("mean", "leave_one_out", "none")
        for scale in ("group", "batch", "none")
    ),
    Case(
        function="group_advantages",
        label="population",
        inputs=_one_dead_group,
        options={"num_generations": G, "ddof": 0, "eps": 0.1},
        oracle=_group,
        rowwise=False,
    ),
    Case(
        function="global_advantages",
        label="all equal",
        inputs=lambda rng: {"rewards": np.full(ROWS, 0.1)},
        options={"eps": 1e-4},
        oracle=lambda rewards, *, eps: np.zeros(ROWS),
        rowwise=False,
    ),
    Case(
        function="global_advantages",
        inputs=_rewards,
        options={"eps": 0.01},
        oracle=_global,
        knobs={"eps": 1.0},
        rowwise=False,
    ),
    Case(
        function="dead_groups",
        inputs=_one_dead_group,
        options={"num_generations": G},
        oracle=_dead,
        knobs={"num_generations": 2},
        rowwise=False,
    ),
    Case(
        function="gae",
        inputs=_episodes,
        options={"gamma": 0.9, "lam": 0.8},
        oracle=_gae,
        knobs={"gamma": 0.5, "lam": 0.5},
        mask="mask",
        masked=("rewards", "values"),
    ),
    Case(
        function="gae",
        label="monte-carlo",
        inputs=_episodes,
        options={"gamma": 1.0, "lam": 1.0},
        oracle=_gae,
        knobs={"gamma": 0.5, "lam": 0.5},
        mask="mask",
        masked=("rewards", "values"),
    ),
)
