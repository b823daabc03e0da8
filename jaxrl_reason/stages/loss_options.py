"""Options of losses, checked when a configuration is read: what exists, is missing, or cannot act.

Everything is read off the loss functions themselves: names from their signatures, ranges from what
they refuse, and whether an option can act from their gradients.
"""

import functools
import inspect
from collections.abc import Collection, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl_reason.errors import nearest
from jaxrl_reason.losses import LOSS_TYPES, PREFERENCE_LOSSES, LossType

POLICY_OPTIONS: Mapping[str, tuple[str, ...]] = {
    name: variant.options for name, variant in LOSS_TYPES.items()
}
"""The options of each policy loss."""


def _preference_options(name: str) -> tuple[str, ...]:
    # A mask is an array that the step does not need: its batches hold no padding rows.
    parameters = inspect.signature(PREFERENCE_LOSSES[name]).parameters.values()
    return tuple(p.name for p in parameters if p.kind is p.KEYWORD_ONLY and p.name != "mask")


PREFERENCE_OPTIONS: Mapping[str, tuple[str, ...]] = {
    name: _preference_options(name) for name in PREFERENCE_LOSSES
}
"""The options of each preference loss."""


def is_of_sequence(loss_type: str) -> bool:
    """Whether a policy loss has one ratio for a whole completion."""
    return "segment_ids" in inspect.signature(LOSS_TYPES[loss_type].loss).parameters


def check_loss_options(
    given: Collection[str],
    losses: Collection[str],
    *,
    fields: Collection[str],
    table: Mapping[str, tuple[str, ...]],
) -> None:
    """Refuse names in `loss_options` that none of the losses takes.

    Args:
        given: the names.
        losses: the losses in use.
        fields: options that are fields of the stage themselves.
        table: `POLICY_OPTIONS` or `PREFERENCE_OPTIONS`.

    Raises:
        ValueError: naming the first, and what to write instead.
    """
    used = ", ".join(losses)
    allowed = {option for name in losses for option in table.get(name, ())} - set(fields)
    for option in given:
        if option in fields:
            raise ValueError(
                f"loss_options.{option}: write {option} beside loss_options, not in it"
            )
        if option in allowed:
            continue
        others = [name for name, options in table.items() if option in options]
        if others:
            raise ValueError(
                f"loss_options.{option} cannot act with loss_type={used}; it is an option of "
                f"{', '.join(others)}"
            )
        raise ValueError(
            f"loss_options.{option} is no option of loss_type={used}; {nearest(option, allowed)}"
        )


def check_policy_loss(loss_type: str, options: Mapping[str, float]) -> None:
    """Refuse options of which one is missing or has a value that the loss refuses.

    Raises:
        ValueError: naming them.
    """
    variant = LOSS_TYPES[loss_type]
    if missing := [name for name in variant.required if name not in options]:
        raise ValueError(f"loss_type={loss_type} needs {' and '.join(missing)}, without a default")
    try:
        _trace(variant, options)
    except (TypeError, ValueError) as error:
        raise ValueError(f"loss_type={loss_type}: {error}") from error


def check_preference_loss(name: str, options: Mapping[str, Any]) -> None:
    """The same for a preference loss; of `options` those that it takes count."""
    parameters = inspect.signature(PREFERENCE_LOSSES[name]).parameters
    taken = {option: x for option, x in options.items() if option in PREFERENCE_OPTIONS[name]}
    missing = [
        option
        for option in PREFERENCE_OPTIONS[name]
        if parameters[option].default is inspect.Parameter.empty and option not in taken
    ]
    if missing:
        raise ValueError(f"loss_type={name} needs loss_options.{' and '.join(missing)}")
    arrays = [p for p in parameters.values() if p.kind is not p.KEYWORD_ONLY]
    pairs = [jax.ShapeDtypeStruct((2,), jnp.float32)] * len(arrays)
    try:
        jax.eval_shape(functools.partial(PREFERENCE_LOSSES[name], **taken), *pairs)
    except (TypeError, ValueError) as error:
        raise ValueError(f"loss_type={name}: {error}") from error


def without_effect(loss_type: str, options: Mapping[str, float]) -> tuple[str, ...]:
    """Options that change no gradient of a policy loss where the ratio is 1.

    Each is set to smaller and larger values that the loss accepts, on fixed tokens whose log-probs
    and advantages span several orders of magnitude. Gradients are compared and not values: at ratio
    1 some options change a value of which nothing is learnt. A small program is compiled and run.
    """
    return _without_effect(loss_type, tuple(sorted(options.items())))


_FACTORS = (0.01, 0.5, 2.0, 100.0)


@functools.lru_cache
def _without_effect(loss_type: str, options: tuple[tuple[str, float], ...]) -> tuple[str, ...]:
    variant, given = LOSS_TYPES[loss_type], dict(options)
    gradients = _gradients_at_ratio_one(variant)
    before = gradients(given)
    limit = 1e-4 * np.abs(before) + 1e-6 * np.abs(before).max()

    def acts(name, value):
        others = [value * factor for factor in _FACTORS] if value else [0.5, 1.0]
        changed = (given | {name: other} for other in others)
        accepted = (options for options in changed if _accepts(variant, options))
        return any((np.abs(gradients(options) - before) > limit).any() for options in accepted)

    return tuple(name for name, value in options if not acts(name, value))


def _gradients_at_ratio_one(variant: LossType):
    """A function from options to gradients [draws, B, T]."""
    shape = (4, 64)
    rng = np.random.default_rng(0)
    spread = lambda low, high: np.exp(rng.uniform(np.log(low), np.log(high), shape))
    logprobs = np.asarray(-spread(1e-3, 30), np.float32)
    arrays = {
        "old_logprobs": logprobs,
        "advantages": np.asarray(spread(1e-2, 10) * rng.choice([-1, 1], shape), np.float32),
        "mask": np.ones(shape, bool),
        "segment_ids": np.repeat(np.asarray([[1, 2]] * shape[0], np.int32), shape[1] // 2, axis=1),
    }
    weights = np.asarray(rng.uniform(0.5, 1.5, shape), np.float32)
    # A loss that draws tokens may draw the same ones for two values of an option, but not always.
    keys = list(jax.random.split(jax.random.key(0), 8))

    def loss(logprobs, options, key):
        return jnp.sum(weights * variant(logprobs=logprobs, key=key, **arrays, **options))

    gradient = jax.jit(jax.grad(loss), compiler_options={"xla_backend_optimization_level": 0})

    def of_options(options: Mapping[str, float]) -> np.ndarray:
        # Arrays and not numbers, so that one program serves all values.
        numbers = {name: np.float32(value) for name, value in options.items()}
        return np.stack([gradient(logprobs, numbers, key) for key in keys])

    return of_options


def _accepts(variant: LossType, options: Mapping[str, float]) -> bool:
    try:
        _trace(variant, options)
    except ValueError:
        return False
    return True


def _trace(variant: LossType, options: Mapping[str, float]) -> None:
    shape = lambda dtype: jax.ShapeDtypeStruct((2, 2), dtype)

    def loss(logprobs, mask, segment_ids):
        return variant(
            logprobs=logprobs,
            old_logprobs=logprobs,
            advantages=logprobs,
            mask=mask,
            segment_ids=segment_ids,
            key=jax.random.key(0),
            **options,
        )

    jax.eval_shape(loss, shape(jnp.float32), shape(jnp.bool_), shape(jnp.int32))
