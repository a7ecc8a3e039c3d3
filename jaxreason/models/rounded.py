"""Keys and values in eight bits: 255 even steps of the largest entry that a token has in a kv head.

A cache's arrays have their places (tokens) on the last axis, or, of values, on the one before. Scales lie beside them with the
places on the last axis in either case, so that scores and probabilities are multiplied by them and nothing is expanded.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxreason.numerics import at_least_float32


class Rounded(NamedTuple):
    """Keys, numbers [..., C, N] and scales [..., 1, N]; or values, numbers [..., N, C] and the same scales."""

    numbers: jax.Array  # int8
    scale: jax.Array  # float32

    @property
    def shape(self) -> tuple[int, ...]:
        return self.numbers.shape


def rounded(x: jax.Array) -> Rounded:
    """[..., C] as [..., C] of whole numbers within 127, and scales [..., 1]."""
    wide = x.astype(jnp.float32)
    scale = jnp.max(jnp.abs(wide), axis=-1, keepdims=True) / 127
    return Rounded(jnp.round(wide / jnp.where(scale == 0, jnp.ones_like(scale), scale)).astype(jnp.int8), scale)


def per_array(function: Callable[..., jax.Array], axis: int, *kept: Any) -> Any:
    """`function(x, ..., axis)` of arrays with their places on this axis, and of their scales, where there are any."""
    if isinstance(kept[0], Rounded):
        return Rounded(function(*(x.numbers for x in kept), axis), function(*(x.scale for x in kept), -1))
    return function(*kept, axis)


def swapped(keys: Any) -> Any:
    """Keys as values: latent attention's."""
    return keys._replace(numbers=_swap(keys.numbers)) if isinstance(keys, Rounded) else _swap(keys)


def _swap(x: jax.Array) -> jax.Array:
    return jnp.swapaxes(x, -2, -1)


def dot(equation: str, a: jax.Array, b: jax.Array) -> jax.Array:
    """A product with the result at least in float32."""
    return jnp.einsum(equation, a, b, preferred_element_type=at_least_float32(a.dtype))


def scores(equation: str, q: jax.Array, keys: jax.Array | Rounded) -> jax.Array:
    """q k, [..., q, N], of keys [..., C, N]."""
    if isinstance(keys, Rounded):
        # whole numbers up to 127 are exact in bfloat16 too
        out = dot(equation, q, keys.numbers.astype(q.dtype))
        return out * keys.scale.astype(out.dtype)
    return dot(equation, q.astype(keys.dtype), keys)


def weighted(equation: str, e: jax.Array, values: jax.Array | Rounded, *, dtype: Any) -> jax.Array:
    """The sums of values [..., N, C] that weights [..., q, N] make, operands in `dtype` where the values are rounded."""
    if isinstance(values, Rounded):
        return dot(equation, (e * values.scale.astype(e.dtype)).astype(dtype), values.numbers.astype(dtype))
    return dot(equation, e.astype(values.dtype), values)
