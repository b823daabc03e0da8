"""Cases of P-FAB and of the other rules that resolve conflicts between standardised rewards."""

import itertools

import numpy as np

from jaxrl_reason.conformance.case import Case, Inputs
from jaxrl_reason.conformance.cases.objectives.scalarize import (
    GROUPS,
    G,
    M,
    draw,
    normalized,
    standardized,
)
from jaxrl_reason.conformance.cases.objectives.simplex import (
    cagrad_coefficients,
    capped,
    frank_wolfe,
    min_norm,
    simplex_minimum,
)


def problems(z, live, scope, least_share=0.0):
    """Vectors [D, M] and who is live, for each minimisation; columns of norm 1 at group scope."""
    if scope == "group":
        return [(own / np.sqrt(len(own)), alive) for own, alive in zip(z, live, strict=True)]
    rows, share = z.reshape(-1, z.shape[2]), live.mean(axis=0)
    return [(rows / np.sqrt(len(rows)), (share > 0) & (share >= least_share))]


def balanced(weigh, *, scope="batch", least_share=0.0):
    """The oracle of a rule that finds weights from vectors [D, M] and from who is live."""
    default = scope

    def oracle(
        rewards,
        mask,
        *,
        num_generations,
        scope=default,
        renormalize="batch",
        min_std=0.0,
        **options,
    ):
        z, live = standardized(rewards, mask, num_generations, ddof=0, eps=0.0, min_std=min_std)
        weights = [weigh(*one, **options) for one in problems(z, live, scope, least_share)]
        advantages = np.sum(z * np.stack(weights)[:, None], axis=2)
        return normalized(advantages, renormalize), np.stack(weights)

    return oracle


def pfab_weights(vectors, live, *, max_weight=None, frank_wolfe_steps=None):
    """Exact or by Frank-Wolfe, then capped."""
    gram = vectors.T @ vectors
    if frank_wolfe_steps is None:
        weights = min_norm(gram, live)
    else:
        weights = frank_wolfe(gram, live, frank_wolfe_steps)[0]
    return weights if max_weight is None else capped(weights, live, max_weight=max_weight)


def mean_pcgrad(vectors, live):
    """PCGrad's coefficients averaged over all orders, and the inner product closest to 0."""
    orders = list(itertools.permutations(np.flatnonzero(live)))
    coefficients, closest = np.zeros(len(live)), np.inf
    for order in orders:
        for i in order:
            vector = vectors[:, i].copy()
            coefficients[i] += 1 / len(orders)
            for j in (j for j in order if j != i):
                inner = vector @ vectors[:, j]
                closest = min(closest, abs(inner) or np.inf)  # 0 where no prompt has both
                if inner < 0:
                    step = inner / (vectors[:, j] @ vectors[:, j])
                    vector -= step * vectors[:, j]
                    coefficients[j] -= step / len(orders)
    return coefficients, closest


pfab = balanced(pfab_weights, scope="group", least_share=0.02)
mgda = balanced(lambda vectors, live: min_norm(vectors.T @ vectors, live))
pcgrad = balanced(lambda vectors, live: mean_pcgrad(vectors, live)[0])
cagrad = balanced(lambda vectors, live, c: cagrad_coefficients(vectors.T @ vectors, live, c=c))


def separated(scope):
    """Whether solutions are well-conditioned and far from a tie, for all rules."""

    def accept(rewards, mask):
        z, live = standardized(rewards, mask, G, ddof=0, eps=0.0)
        for vectors, alive in problems(z, live, scope):
            gram = vectors.T @ vectors
            margins = [
                simplex_minimum(gram, np.zeros(M), alive)[1],
                frank_wolfe(gram, alive, 3)[1],
                mean_pcgrad(vectors, alive)[1],
            ]
            if alive.any() and (np.linalg.cond(vectors[:, alive]) > 5 or min(margins) < 0.02):
                return False
        return True

    return accept


def rare(rng) -> Inputs:
    """Sixty prompts of two completions; the last two objectives are live in two and in one."""
    rewards = rng.normal(size=(60, 2, 4))
    rewards[2:, :, 2] = rewards[1:, :, 3] = 1.0
    return {"rewards": rewards.reshape(-1, 4), "mask": np.ones((120, 4), bool)}


def case(function, oracle, label="", *, at="group", prompts=2, knobs=None, **options):
    """A case separated at a scope; the one without a label has the transformations for all."""
    return Case(
        function=function,
        label=label,
        inputs=draw(prompts=prompts, accept=separated(at)),
        options={**GROUPS, **options},
        oracle=oracle,
        knobs=knobs or {},
        mask="mask",
        masked=("rewards",),
        rowwise=False,
        transforms=("jit",) if label else ("jit", "vmap", "devices"),
    )


KNOBS = {
    "num_generations": 2,
    "renormalize": "none",
    "min_std": np.asarray([0.0, 0.0, 9.0, 0.0]),
}
WITHOUT_THE_LAST = np.asarray([0.01, 0.01, 0.01, 9.0])

PFAB = (
    case("pfab_advantages", pfab, knobs={**KNOBS, "scope": "batch"}, min_std=0.01),
    case("pfab_advantages", pfab, "plain", renormalize="none", min_std=WITHOUT_THE_LAST),
    case("pfab_advantages", pfab, "of_groups", prompts=3, renormalize="group", min_std=0.01),
    Case(
        function="pfab_advantages",
        label="rare",
        inputs=rare,
        options={"num_generations": 2, "scope": "batch", "min_std": 0.0, "renormalize": "none"},
        oracle=pfab,
        rowwise=False,
        transforms=("jit",),
    ),
    case(
        "pfab_advantages",
        pfab,
        "capped",
        min_std=0.01,
        max_weight=0.4,
        knobs={"max_weight": None},
    ),
    case(
        "pfab_advantages",
        pfab,
        "frank_wolfe",
        min_std=0.01,
        frank_wolfe_steps=3,
        knobs={"frank_wolfe_steps": None},
    ),
)

CASES = (
    *PFAB,
    *(
        one
        for name, oracle, options, other in (
            ("mgda_advantages", mgda, {}, {}),
            ("pcgrad_advantages", pcgrad, {}, {}),
            ("cagrad_advantages", cagrad, {"c": 0.5}, {"c": 0.9}),
        )
        for one in (
            case(name, oracle, at="batch", knobs={**KNOBS, "scope": "group", **other}, **options),
            case(name, oracle, "of_groups", scope="group", renormalize="group", **options),
        )
    ),
)
