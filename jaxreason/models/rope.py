"""Rotary positions (RoFormer, arXiv:2104.09864), and their stretching for contexts longer than the trained ones.

Frequencies are made in NumPy, in float64, at trace time; only angles are computed on the device.
Deliberately absent: kinds whose frequencies depend on the length of the input (dynamic NTK, LongRoPE).
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxreason.models.config import Architecture, Rope

Rotation = tuple[jax.Array, jax.Array]


def frequencies(rope: Rope, *, size: int) -> np.ndarray:
    """The angle a token of each of `size / 2` pairs: theta^(-2i/size) (arXiv:2104.09864, section 3.2.2), stretched by `rope.kind`.

    linear: f / s (position interpolation, arXiv:2306.15595). llama3: f for waves shorter than L0 / high, f / s for those longer
    than L0 / low, and between them mixed in proportion to L0 f / 2 pi. yarn: f / s and f mixed by a ramp over the dimensions
    (arXiv:2309.00071).
    """
    base = rope.theta ** (-np.arange(0, size, 2, dtype=np.float64) / size)
    if rope.kind == "default":
        return base
    if rope.kind == "linear":
        return base / rope.factor
    if rope.kind == "llama3":
        waves = rope.original_positions * base / (2 * math.pi)  # how often each pair turns within the old context
        kept = np.clip((waves - rope.low_factor) / (rope.high_factor - rope.low_factor), 0.0, 1.0)
    else:
        kept = 1 - _yarn_ramp(rope, size=size)
    return base / rope.factor * (1 - kept) + base * kept


def _yarn_ramp(rope: Rope, *, size: int) -> np.ndarray:
    """0 for pairs that turn more than beta_fast times within the old context, 1 for those below beta_slow."""

    def pair(turns: float) -> float:
        return size * math.log(rope.original_positions / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = pair(rope.beta_fast), pair(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, size - 1)
    if low == high:
        high += 0.001  # a step instead of a division by 0
    return np.clip((np.arange(size // 2) - low) / (high - low), 0.0, 1.0)


def _mscale(factor: float, weight: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0


def amplitude(rope: Rope) -> float:
    """What cos and sin are multiplied by: yarn's sqrt(1/t) = 0.1 ln s + 1 (arXiv:2309.00071), else 1."""
    if rope.kind != "yarn":
        return 1.0
    if rope.attention_factor:
        return rope.attention_factor
    if rope.mscale and rope.mscale_all_dim:
        return _mscale(rope.factor, rope.mscale) / _mscale(rope.factor, rope.mscale_all_dim)
    return _mscale(rope.factor, 1.0)


def query_scale(architecture: Architecture) -> float:
    """What scores are multiplied by: 1 / sqrt(head_size), or the architecture's own; latent attention under yarn adds mscale^2."""
    a = architecture
    scale = a.attention_scale or a.head_size**-0.5
    if a.latent.kv_rank and a.rope.kind != "default" and a.rope.mscale_all_dim:
        scale *= _mscale(a.rope.factor, a.rope.mscale_all_dim) ** 2
    return scale


def rotary(position: Int[Array, "*b"], *, rope: Rope, size: int, dtype: str) -> Rotation:
    """cos and sin of position x frequency, each [*b, size/2]. Angles are at least float32: a position is no bfloat16."""
    wide = jnp.float64 if dtype == "float64" else jnp.float32
    angle = position[..., None].astype(wide) * jnp.asarray(frequencies(rope, size=size), wide)[(None,) * position.ndim]
    scale = jnp.asarray(amplitude(rope), wide)
    return jnp.cos(angle) * scale, jnp.sin(angle) * scale


def rotated_size(rope: Rope, *, head_size: int) -> int:
    """How many entries of a head are rotated."""
    return math.floor(head_size * rope.fraction)


def rotate(x: Float[Array, "*b H C"], rotation: Rotation, *, interleaved: bool = False) -> Float[Array, "*b H C"]:
    """Rotates the first entries of each head, as many as the rotation has, in the half-split layout of Hugging Face checkpoints.

    Interleaved pairs are written back half-split: scores between queries and keys rotated alike stay the same.
    """
    cos, sin = (r[..., None, :].astype(x.dtype) for r in rotation)
    half = cos.shape[-1]
    part, rest = x[..., : 2 * half], x[..., 2 * half :]
    if interleaved:
        part = jnp.concatenate([part[..., 0::2], part[..., 1::2]], axis=-1)
    # a sum of two products of whole heads, not two halves put together: XLA's CPU backend writes those a number at a time
    other = jnp.flip(part.reshape(*part.shape[:-1], 2, half), axis=-2).reshape(part.shape)
    out = part * jnp.concatenate([cos, cos], axis=-1) + other * jnp.concatenate([-sin, sin], axis=-1)
    return jnp.concatenate([out, rest], axis=-1) if rest.shape[-1] else out
