"""From logits to a token and its log-probability, one uniform number a row.

Both ways cut the vocabulary into about sqrt(V) blocks, find the block, and then the token in it: two short scans instead of
one over V, and one uniform in [0, 1) a row instead of V Gumbel variables. What the logits are is `law.py`'s business.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int


def draw(logits: Float[Array, "N V"], uniform: Float[Array, " N"] | None) -> tuple[Int[Array, " N"], Float[Array, " N"]]:
    """A token of softmax(logits) and its log-probability under it; without uniforms the likeliest token."""
    return greedy(logits) if uniform is None else categorical(logits, uniform)


def greedy(logits: Float[Array, "N V"]) -> tuple[Int[Array, " N"], Float[Array, " N"]]:
    """The likeliest token, the first of equals, and its log-probability."""
    # not argmax, which XLA's CPU backend computes a number at a time: seven times as long as all of this
    blocks = _blocks(logits, fill=-math.inf)
    peaks = jnp.max(blocks, axis=-1)
    top = jnp.max(peaks, axis=-1, keepdims=True)
    logp = -jnp.log(jnp.sum(jnp.exp(logits - top), axis=-1))
    block = _first(peaks == top)
    within = jnp.take_along_axis(blocks, block[:, None, None], axis=1)[:, 0]
    token = block * blocks.shape[-1] + _first(within == top)
    return jnp.minimum(token, logits.shape[-1] - 1), logp


def categorical(logits: Float[Array, "N V"], uniform: Float[Array, " N"]) -> tuple[Int[Array, " N"], Float[Array, " N"]]:
    """A draw from softmax(logits) by inverse CDF in two levels, and its log-probability.

    A token without probability is never drawn, whatever the uniform in [0, 1). Neither is one so unlikely that no uniform resolves
    it, less than about 1e-35 times as likely as the likeliest in float32.
    """
    top = jnp.max(logits, axis=-1, keepdims=True)
    e = _blocks(jnp.exp(logits - top), fill=0)
    mass = jnp.sum(e, axis=-1)
    upto = jnp.cumsum(mass, axis=-1)
    z = upto[:, -1]
    point = uniform.astype(logits.dtype) * z
    # Below the smallest normal float, what an exp makes zero differs between its compilations. A block above this bound has a
    # token above it in all of them.
    tiny, width = float(np.finfo(logits.dtype).tiny), e.shape[-1]
    block = _at(point, mass, upto, least=2 * width * tiny)
    before = jnp.take_along_axis(upto - mass, block[:, None], axis=1)[:, 0]
    within = jnp.take_along_axis(e, block[:, None, None], axis=1)[:, 0]
    place = _at(point - before, within, jnp.cumsum(within, axis=-1), least=tiny)
    chosen = jnp.take_along_axis(within, place[:, None], axis=1)[:, 0]
    return block * width + place, jnp.log(chosen) - jnp.log(z)


def _blocks(x: jax.Array, *, fill: float) -> jax.Array:
    """[N, V] as [N, blocks, width]; the width divides V if it can, since then nothing is copied."""
    rows, vocab = x.shape
    root = math.isqrt(vocab)
    width = next((w for w in range(root, root // 8, -1) if vocab % w == 0), root)
    blocks = math.ceil(vocab / width)
    return jnp.pad(x, ((0, 0), (0, blocks * width - vocab)), constant_values=fill).reshape(rows, blocks, width)


def _at(point: jax.Array, mass: jax.Array, upto: jax.Array, *, least: float) -> jax.Array:
    """Index of the first entry whose running sum is greater than the point, or else of the last; of those with mass above `least`.

    Rounding makes the running sum fall here and there, rise where there is no mass, and end below the point.
    """
    size = mass.shape[-1]
    place = jax.lax.broadcasted_iota(jnp.int32, mass.shape, 1)
    rank = jnp.where(upto > point[:, None], place, 2 * size - 1 - place)  # beyond the point upwards, then the others downwards
    best = jnp.min(jnp.where(mass > least, rank, 2 * size - 1), axis=-1)
    return jnp.where(best < size, best, 2 * size - 1 - best)


def _first(hit: jax.Array) -> jax.Array:
    """Index of the first True; of the last entry if there is none."""
    size = hit.shape[-1]
    place = jax.lax.broadcasted_iota(jnp.int32, hit.shape, 1)
    return jnp.min(jnp.where(hit, place, size - 1), axis=-1)
