"""What every objective does with its arguments: checks them in words, and computes in float32 or better.

Shapes and dtypes are known while tracing, so those checks always run; values (a NaN reward, a negative clip) are looked
at only where they are concrete. Also here: sums over a completion, which is a row or, where rows are packed, a segment.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.core import Tracer
from jaxtyping import Float

# e^80 is finite in float32, and so is its product with any advantage; a ratio beyond it carries no information
LARGEST_LOG_RATIO = 80.0

Scalar = float | Float[Array, ""]  # a hyper-parameter that may be traced, as an adaptive one is


def precise(array: Any) -> Array:
    """The array as float32 or wider: bfloat16 has 3 digits, and a ratio or a mean of rewards needs more."""
    array = jnp.asarray(array)
    if not jnp.issubdtype(array.dtype, jnp.floating):
        return array.astype(jnp.result_type(float))
    return array if jnp.finfo(array.dtype).bits >= 32 else array.astype(jnp.float32)


def given(array: Array | None) -> Array:
    """The array, of which `prepare` and `policy_loss` have made sure that it is there."""
    assert array is not None
    return array


def exponential(log_ratio: Array) -> Array:
    """exp, held at e^80: finite for any log-ratio. Coefficients are written out, so holding it cuts no gradient."""
    return jnp.exp(jnp.minimum(log_ratio, LARGEST_LOG_RATIO))


def completion_totals(value: Array, segments: Array | None) -> Array:
    """The sum over each completion: [P, G, 1], or [P, G, T] by segment id where `segments` names completions.

    `value` must be 0 on masked tokens. The ids of a row's segments are integers from 0 to T - 1.
    """
    if segments is None:
        return jnp.sum(value, axis=-1, keepdims=True)

    def row(value: Array, ids: Array) -> Array:
        return jnp.zeros_like(value).at[ids].add(value, mode="drop")

    return jax.vmap(jax.vmap(row))(value, segments)


def completion_sum(value: Array, segments: Array | None) -> Array:
    """The sum over the completion that each token belongs to: [P, G, 1], or [P, G, T] where rows are packed."""
    totals = completion_totals(value, segments)
    return totals if segments is None else jnp.take_along_axis(totals, jnp.clip(segments, 0, value.shape[-1] - 1), axis=-1)


def known(value: Any) -> bool:
    """Is the value here to be looked at: not traced, and not spread over other processes' devices?"""
    return not isinstance(value, Tracer) and getattr(value, "is_fully_addressable", True)


def check_tokens(**arrays: Any) -> None:
    """Per-token arrays: all of one shape [P, G, T]. None is skipped.

    Raises ValueError with both shapes.
    """
    given = {name: jnp.shape(array) for name, array in arrays.items() if array is not None}
    for name, shape in given.items():
        if len(shape) != 3:
            raise ValueError(
                f"{name} has shape {shape}, but per-token arrays are [P, G, T]: problems, completions of each, tokens; "
                "where there are no groups, G is 1."
            )
    names = list(given)
    for name in names[1:]:
        if given[name] != given[names[0]]:
            raise ValueError(
                f"{name} has shape {given[name]} and {names[0]} has {given[names[0]]}, but both must be the same [P, G, T]; "
                "cut and pad them alike."
            )


def check_mask(mask: Any, **arrays: Any) -> None:
    """A boolean mask of the shape of the per-token arrays. Raises ValueError."""
    if jnp.asarray(mask).dtype != jnp.bool_:
        raise ValueError(
            f"mask has dtype {jnp.asarray(mask).dtype}, but it must be boolean, True where the policy chose the token; "
            "turn 0 and 1 into one with mask > 0."
        )
    check_tokens(**arrays, mask=mask)


def check_segments(segments: Any, mask: Any) -> None:
    """Integers of the mask's shape, from 0 to T - 1 on chosen tokens. Raises ValueError."""
    if segments is None:
        return
    check_tokens(mask=mask, segments=segments)
    if not jnp.issubdtype(jnp.asarray(segments).dtype, jnp.integer):
        raise ValueError(f"segments has dtype {jnp.asarray(segments).dtype}, but it must be integers, one id a completion.")
    if known(segments) and known(mask):
        ids = np.asarray(segments)[np.asarray(mask)]
        if ids.size and (ids.min() < 0 or ids.max() >= mask.shape[-1]):
            raise ValueError(
                f"segments holds ids from {ids.min()} to {ids.max()}, but a row of T = {mask.shape[-1]} tokens numbers its "
                "completions from 0 to T - 1; number them anew in each row."
            )


def check_reward(reward: Any, *, name: str = "reward", group: bool = False) -> None:
    """[P, G], without NaN where it is concrete, and with G > 1 if `group`. Raises ValueError."""
    shape = jnp.shape(reward)
    if len(shape) != 2:
        raise ValueError(
            f"{name} has shape {shape}, but it must be [P, G]: problems, completions of each; the group is an axis, and where "
            "there are no groups, G is 1."
        )
    if group and shape[1] < 2:
        raise ValueError(
            f"{name} has shape {shape}, a group of {shape[1]}, but its completions are compared with each other: sample two or "
            "more of each problem, or take an algorithm without a group baseline."
        )
    if known(reward):
        bad = np.argwhere(np.isnan(np.asarray(reward, np.float64)))
        if bad.size:
            raise ValueError(f"{name} is NaN at {tuple(int(i) for i in bad[0])} ([P, G]); give every completion a number.")


def check_pairs(array: Any, *, name: str) -> None:
    """[P, 2, ...], chosen first. Raises ValueError."""
    shape = jnp.shape(array)
    if len(shape) < 2 or shape[1] != 2:
        raise ValueError(f"{name} has shape {shape}, but a preference is a pair, [P, 2, ...] with the chosen completion first.")


def check_range(minimum: float | None, maximum: float | None = None, /, **values: Any) -> None:
    """Each concrete value lies in [minimum, maximum]. Raises ValueError with the value."""
    for name, value in values.items():
        if value is None or not known(value):
            continue
        if not ((minimum is None or value >= minimum) and (maximum is None or value <= maximum)):
            wanted = f"{minimum} or more" if maximum is None else f"between {minimum} and {maximum}"
            raise ValueError(f"{name} is {value}, but it must be {wanted}.")


def check_choice(choices: tuple[str, ...], **values: str) -> None:
    """Each value is one of the choices. Raises ValueError with the value."""
    for name, value in values.items():
        if value not in choices:
            raise ValueError(f"{name} is {value!r}, but it must be one of {', '.join(repr(c) for c in choices)}.")
