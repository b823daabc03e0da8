"""Losses of value functions: PPO's value head, and ensembles of critics for offline RL.

Below, E critics, B transitions, N actions sampled at a transition's state. Results are unreduced.
The gradient flows through the predictions only; targets, returns and log-probabilities of sampled
actions are detached.
"""

import math

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int, Shaped

from jaxrl_reason.arrays import check_number, check_shape, guard_nonfinite, to_floats, to_mask


def clipped_value_loss(
    values: Float[Array, "..."],
    old_values: Float[Array, "..."],
    returns: Float[Array, "..."],
    *,
    clip_range: float,
) -> Float[Array, "..."]:
    """1/2 max((V - R)^2, (clip(V, V_old - c, V_old + c) - R)^2), c = ``clip_range``.

    The value loss of OpenAI's PPO2 (studied in arXiv 2005.12729 and 2006.05990): no gradient where
    the value has left the range and is nearer to the return than the range is. The factor 1/2 is
    included, as in TRL and verl. With ``clip_range=math.inf`` it is half the squared error. Any
    shape, usually ``[B, T]``.
    """
    check_number("clip_range", clip_range, at_least=0)
    values, old_values, returns = to_floats(values, old_values, returns)
    check_shape("old_values", old_values, values.shape)
    check_shape("returns", returns, values.shape)

    def loss(value, old, target):
        clipped = jnp.clip(value, old - clip_range, old + clip_range)
        return 0.5 * jnp.maximum(jnp.square(value - target), jnp.square(clipped - target))

    old_values, returns = map(jax.lax.stop_gradient, (old_values, returns))
    return guard_nonfinite(loss, values, old_values, returns)


def expectile_loss(differences: Float[Array, "..."], *, expectile: float) -> Float[Array, "..."]:
    """|tau - 1[u < 0]| u^2 of u = target - prediction (IQL, arXiv 2110.06169).

    Its minimiser is the ``expectile`` tau of the targets: their mean at 1/2, their maximum towards
    1. IQL fits V(s) with u = stop_gradient(min_e Q_e(s, a)) - V(s); the gradient flows through the
    whole of u, so the target is the caller's to detach.
    """
    check_number("expectile", expectile, above=0, below=1)
    (differences,) = to_floats(differences)
    weighted = lambda u: jnp.where(u < 0, 1 - expectile, expectile) * jnp.square(u)
    return guard_nonfinite(weighted, differences)


def td_targets(
    rewards: Float[Array, " B"],
    continues: Shaped[Array, " B"],
    next_q_values: Float[Array, "E B"] | Float[Array, "E B N"],
    *,
    discount: float,
    members: Int[Array, " K"] | None = None,
) -> Float[Array, " B"]:
    """r + discount x continues x min_e Q_e(s', a'), detached (clipped double Q-learning).

    arXiv 1802.09477, with the minimum over a random subset as in REDQ (arXiv 2101.05982). With
    values of N next actions the best of the N minima is taken (CQL's max-backup, arXiv 2006.04779).
    IQL's target is that of one critic: ``next_q_values=V(s')[None]``.

    Args:
        continues: bool or 0/1, false at a terminal step (a time limit is none). What stands under
            false in ``next_q_values`` never reaches the result.
        next_q_values: of the target critics.
        members: the critics that enter the minimum, possibly repeated; all when None.
    """
    check_number("discount", discount, at_least=0, at_most=1)
    rewards, next_q_values = map(jax.lax.stop_gradient, to_floats(rewards, next_q_values))
    continues = to_mask(continues)
    if next_q_values.ndim not in (2, 3):
        raise ValueError(f"next_q_values has shape {next_q_values.shape}; expected [E, B(, N)]")
    check_shape("rewards", rewards, next_q_values.shape[1:2])
    check_shape("continues", continues, rewards.shape)
    if members is not None:
        next_q_values = jnp.take(next_q_values, _check_members(members), axis=0)
    best = jnp.min(next_q_values, axis=0)
    if best.ndim == 2:
        best = jnp.max(best, axis=-1)
    return rewards + discount * jnp.where(continues, best, 0)


def td_loss(q_values: Float[Array, "E B"], targets: Float[Array, " B"]) -> Float[Array, "E B"]:
    """(Q_e - y)^2: every critic of an ensemble against the same, detached target.

    Without a factor 1/2, as in WSRL (arXiv 2412.07762). One critic without the axis E is allowed.
    """
    q_values, targets = to_floats(q_values, targets)
    check_shape("targets", targets, q_values.shape[-1:])
    targets = jnp.broadcast_to(jax.lax.stop_gradient(targets), q_values.shape)
    return guard_nonfinite(lambda q, y: jnp.square(q - y), q_values, targets)


def cql_penalty(
    q_values: Float[Array, "E B"],
    sampled_q_values: Float[Array, "E B N"],
    sample_logprobs: Float[Array, "B N"] | None = None,
    *,
    temperature: float = 1.0,
) -> Float[Array, "E B"]:
    """T log sum_j exp(z_j / T) - Q(s, a), the conservative term of CQL(H).

    arXiv 2006.04779, eq. 4; T = ``temperature``. It is large where actions that are not in the data
    look better than the one that is. With ``sample_logprobs`` log q(a_j) the
    z_j = Q(s, a_j) - log q(a_j) are importance weighted, up to the constant T log N (as in the
    authors' code, which does not scale log q by T). Without, the action of the data joins the N
    samples and T log(N + 1) is subtracted, so the penalty of a constant Q is 0.

    Args:
        q_values: of the actions in the data.
        sampled_q_values: of actions drawn uniformly, from pi(s) and from pi(s'), at the same state.
        sample_logprobs: log-density of each under what it was drawn from (log 0.5 per dimension for
            uniform actions in [-1, 1]).
    """
    q_values, samples, logprobs = _prepare(q_values, sampled_q_values, sample_logprobs)
    return _conservative_gap(q_values, samples, logprobs, temperature)


def calql_penalty(
    q_values: Float[Array, "E B"],
    sampled_q_values: Float[Array, "E B N"],
    mc_returns: Float[Array, " B"],
    from_policy: Shaped[Array, " N"],
    sample_logprobs: Float[Array, "B N"] | None = None,
    *,
    temperature: float = 1.0,
) -> Float[Array, "E B"]:
    """``cql_penalty`` that pushes no value of the policy below a known return (Cal-QL).

    arXiv 2303.05479, section 5: where ``from_policy``, Q(s, a_j) is replaced by
    max(Q(s, a_j), mc_return(s)) before the logsumexp. Uniform actions are left as they are.

    Args:
        mc_returns: discounted return of the data from s on; -inf where it is not known.
        from_policy: bool or 0/1, true for samples of pi(s) and pi(s'), the same for all states.
    """
    q_values, samples, logprobs = _prepare(q_values, sampled_q_values, sample_logprobs)
    (mc_returns,), from_policy = to_floats(mc_returns), to_mask(from_policy)
    check_shape("mc_returns", mc_returns, samples.shape[-2:-1])
    check_shape("from_policy", from_policy, samples.shape[-1:])
    bound = jax.lax.stop_gradient(mc_returns).astype(samples.dtype)
    bound = jnp.where(from_policy[None, :], bound[:, None], -jnp.inf)
    lifted = jnp.maximum(samples, jnp.broadcast_to(bound, samples.shape))
    return _conservative_gap(q_values, lifted, logprobs, temperature)


def _check_members(members):
    members = jnp.asarray(members)
    if members.ndim != 1 or not jnp.issubdtype(members.dtype, jnp.integer):
        raise TypeError(f"members is {members.dtype}{list(members.shape)}; expected integers [K]")
    return members


def _prepare(q_values, sampled_q_values, sample_logprobs):
    """The arrays in one dtype, log-probabilities detached and spread over the ensemble, or None."""
    given = (q_values, sampled_q_values)
    if sample_logprobs is None:
        q_values, samples = to_floats(*given)
        logprobs = None
    else:
        q_values, samples, logprobs = to_floats(*given, sample_logprobs)
    if samples.ndim != q_values.ndim + 1 or samples.shape[:-1] != q_values.shape:
        raise ValueError(
            f"sampled_q_values has shape {samples.shape}; expected {q_values.shape} and an axis of "
            "samples after it"
        )
    if logprobs is not None:
        check_shape("sample_logprobs", logprobs, samples.shape[-2:])
        logprobs = jnp.broadcast_to(jax.lax.stop_gradient(logprobs), samples.shape)
    return q_values, samples, logprobs


def _conservative_gap(q_values, samples, logprobs, temperature):
    """The penalty, with gradient 0 where anything that enters it is NaN or infinite."""
    check_number("temperature", temperature, above=0)

    def gap(q_values, z):
        count = 1
        if logprobs is None:
            z = jnp.concatenate([z, q_values[..., None]], axis=-1)
            count = z.shape[-1]
        # Subtracted before the division, since fused with it a huge value would overflow exp.
        peak = jax.lax.stop_gradient(jnp.max(z, axis=-1, keepdims=True))
        total = jnp.sum(jnp.exp((z - peak) / temperature), axis=-1)
        return temperature * (jnp.log(total) - math.log(count)) + peak[..., 0] - q_values

    z = samples if logprobs is None else samples - logprobs
    finite = jnp.isfinite(q_values) & jnp.all(jnp.isfinite(z), axis=-1)
    clean = gap(jnp.where(finite, q_values, 0), jnp.where(finite[..., None], z, 0))
    return jnp.where(finite, clean, jax.lax.stop_gradient(gap(q_values, z)))
