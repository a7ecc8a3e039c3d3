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

# e^40 is about 2e17: two such ratios times an advantage are finite in float32, and a ratio beyond it says nothing more
LARGEST_LOG_RATIO = 40.0

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
    """exp, held at e^40: finite for any log-ratio. Coefficients are written out, so holding it cuts no gradient."""
    return jnp.exp(jnp.minimum(log_ratio, LARGEST_LOG_RATIO))


def completion_totals(value: Array, segments: Array | None) -> Array:
    """The sum over each completion: [P, G, 1], or [P, G, T] by segment id where `segments` names completions.

    `value` must be 0 on masked tokens. The ids of a row's segments are integers from 0 to T - 1; what has another is lost.
    """
    if segments is None:
        return jnp.sum(value, axis=-1, keepdims=True)

    def row(value: Array, ids: Array) -> Array:
        return jnp.zeros_like(value).at[ids].add(value, mode="drop")

    return jax.vmap(jax.vmap(row))(value, segments)


def completion_sum(value: Array, segments: Array | None) -> Array:
    """The sum over the completion that each token belongs to: [P, G, 1], or [P, G, T] where rows are packed.

    For floats: a traced id that is out of range gives NaN, which is loud.
    """
    totals = completion_totals(value, segments)
    return totals if segments is None else jnp.take_along_axis(totals, segments, axis=-1, mode="fill")


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


def check_mask(mask: Any, *, name: str = "mask", meaning: str = "the policy chose the token", **arrays: Any) -> None:
    """A boolean mask of the shape of the per-token arrays. Raises ValueError."""
    if mask is None or jnp.result_type(mask) != jnp.bool_:
        found = "is None" if mask is None else f"has dtype {jnp.result_type(mask)}"
        raise ValueError(
            f"{name} {found}, but it must be a boolean array, True where {meaning}; turn 0 and 1 into one with {name} > 0."
        )
    check_tokens(**arrays, **{name: mask})


def check_segments(segments: Any, mask: Any) -> None:
    """Integers of the mask's shape, from 0 to T - 1 on chosen tokens. Raises ValueError."""
    if segments is None:
        return
    check_tokens(mask=mask, segments=segments)
    if not jnp.issubdtype(jnp.result_type(segments), jnp.integer):
        raise ValueError(f"segments has dtype {jnp.result_type(segments)}, but it must be integers, one id a completion.")
    if not (known(segments) and known(mask)):
        return
    tokens = mask.shape[-1]
    for row, chosen in zip(np.asarray(segments).reshape(-1, tokens), np.asarray(mask).reshape(-1, tokens), strict=True):
        ids = row[chosen]
        if ids.size and (ids.min() < 0 or ids.max() >= tokens):
            raise ValueError(
                f"segments holds ids from {ids.min()} to {ids.max()}, but a row of T = {tokens} tokens numbers its completions "
                "from 0 to T - 1; number them anew in each row."
            )
        if ids.size and np.count_nonzero(np.diff(ids)) + 1 != len(np.unique(ids)):
            raise ValueError(f"segments holds {ids.tolist()} in a row, but a completion's tokens stand together; sort them.")


def check_reward(reward: Any, *, name: str = "reward", group: bool = False) -> None:
    """[P, G], finite where it is concrete, and with G > 1 if `group`. Raises ValueError."""
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
        values = np.asarray(reward, np.float64)
        bad = np.argwhere(~np.isfinite(values))
        if bad.size:
            place = tuple(int(i) for i in bad[0])
            raise ValueError(f"{name} is {values[place]} at {place} ([P, G]); give every completion a finite number.")


def check_pairs(array: Any, *, name: str) -> None:
    """[P, 2, ...], chosen first. Raises ValueError."""
    shape = jnp.shape(array)
    if len(shape) < 2 or shape[1] != 2:
        raise ValueError(f"{name} has shape {shape}, but a preference is a pair, [P, 2, ...] with the chosen completion first.")


def check_range(minimum: float | None, maximum: float | None = None, /, **values: Any) -> None:
    """Each concrete value, number or array, lies in [minimum, maximum]. Raises ValueError with the value."""
    for name, value in values.items():
        if value is None or not known(value):
            continue
        if not ((minimum is None or np.all(value >= minimum)) and (maximum is None or np.all(value <= maximum))):
            wanted = f"{minimum} or more" if maximum is None else f"between {minimum} and {maximum}"
            raise ValueError(f"{name} is {value}, but it must be {wanted}.")


def check_above(bound: float, /, why: str = "", **values: Any) -> None:
    """Each concrete value is above the bound. Raises ValueError with the value."""
    for name, value in values.items():
        if value is not None and known(value) and not value > bound:
            raise ValueError(f"{name} is {value}, but it must be above {bound:g}{why}.")


def check_choice(choices: tuple[str, ...], **values: str) -> None:
    """Each value is one of the choices. Raises ValueError with the value."""
    for name, value in values.items():
        if value not in choices:
            raise ValueError(f"{name} is {value!r}, but it must be one of {', '.join(repr(c) for c in choices)}.")
