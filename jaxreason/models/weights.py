"""What may stand in a matrix's place in the parameter tree, and the product with it.

A weight is an array, an array with a low-rank addition (`LowRank`: lora.py), or eight bits a number (`Int8`: made for
sampling). Products dispatch on that, so an adapted or rounded model is the same functions with another tree.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from jaxreason.numerics import at_least_float32, dense


@struct.dataclass
class LowRank:
    """W + scale A B (LoRA, arXiv:2106.09685, Eq. 3), never formed: x W + scale (x A) B."""

    weight: Any  # [in..., out...]; or Int8, of a matrix; None where adapters stand alone
    a: Any  # [in..., r]; declarations and shardings under tree maps
    b: Any  # [r, out...]
    scale: float = struct.field(pytree_node=False, default=1.0)  # alpha / r


@struct.dataclass
class Int8:
    """values x scale, one scale an output channel; stored in a byte a number."""

    values: Any  # int8 [..., in, out]
    scale: Any  # [..., out]


Weight = jax.Array | LowRank | Int8


def flat(weight: Weight, *, inputs: int = 1) -> Weight:
    """The weight as a matrix [in, out], its first `inputs` axes being the input's."""

    def matrix(x: jax.Array, lead: int) -> jax.Array:
        return x.reshape(math.prod(x.shape[:lead]), math.prod(x.shape[lead:]))

    if isinstance(weight, LowRank):
        return LowRank(matrix(weight.weight, inputs), matrix(weight.a, inputs), matrix(weight.b, 1), weight.scale)
    return weight if isinstance(weight, Int8) else matrix(weight, inputs)


def product(x: jax.Array, weight: Weight, *, dtype: str) -> jax.Array:
    """x W of rows x, operands in `dtype`, the result at least in float32."""
    if isinstance(weight, LowRank):
        # without the barrier XLA's CPU compiler writes the product's transpose as a product of bfloat16, which it cannot run
        low = jax.lax.optimization_barrier(weight.scale * dense(x, weight.a, dtype=dtype))
        return product(x, jax.lax.stop_gradient(weight.weight), dtype=dtype) + dense(low.astype(x.dtype), weight.b, dtype=dtype)
    if isinstance(weight, Int8):
        return dense(x, weight.values.astype(dtype), dtype=dtype) * weight.scale.astype(at_least_float32(dtype))[None]
    return dense(x, weight, dtype=dtype)


def plain(weight: jax.Array | Int8, *, dtype: str) -> jax.Array:
    """The array that a weight stands for."""
    if isinstance(weight, Int8):
        wide = at_least_float32(dtype)  # a scale in bfloat16 would move its whole channel
        return (weight.values.astype(wide) * weight.scale.astype(wide)[..., None, :]).astype(dtype)
    return weight


def to_int8(weight: Any) -> Any:
    """Each output channel of [..., in, out] rounded to 255 even steps of its largest absolute value; of a LowRank, its base's."""
    if isinstance(weight, LowRank):
        return LowRank(to_int8(weight.weight), weight.a, weight.b, weight.scale)
    wide = weight.astype(jnp.float32)
    scale = jnp.max(jnp.abs(wide), axis=-2) / 127
    steps = wide / jnp.where(scale == 0, jnp.ones_like(scale), scale)[..., None, :]
    return Int8(jnp.round(steps).astype(jnp.int8), scale)
