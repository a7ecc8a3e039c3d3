"""From logits to a token and its log-probability, one uniform number a row."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def greedy(logits: Float[Array, "N V"]) -> tuple[Int[Array, " N"], Float[Array, " N"]]:
    """The likeliest token and its log-probability."""
    top = jnp.max(logits, axis=-1)
    logp = -jnp.log(jnp.sum(jnp.exp(logits - top[:, None]), axis=-1))
    return jnp.argmax(logits, axis=-1).astype(jnp.int32), logp


def categorical(logits: Float[Array, "N V"], uniform: Float[Array, " N"]) -> tuple[Int[Array, " N"], Float[Array, " N"]]:
    """A draw from softmax(logits) by inverse CDF in two levels, and its log-probability.

    A block of the vocabulary is chosen by the blocks' sums, then a token within the block: two short scans instead of
    one over V, and one uniform in [0, 1) a row instead of V Gumbel variables.
    """
    rows, vocab = logits.shape
    width = max(1, math.isqrt(vocab))
    blocks = math.ceil(vocab / width)
    top = jnp.max(logits, axis=-1, keepdims=True)
    e = jnp.exp(logits - top)
    e = jnp.pad(e, ((0, 0), (0, blocks * width - vocab))).reshape(rows, blocks, width)
    upto = jnp.cumsum(jnp.sum(e, axis=-1), axis=-1)
    z = upto[:, -1]
    point = uniform.astype(logits.dtype) * z
    block = _first_above(upto, point)
    before = jnp.take_along_axis(jnp.pad(upto, ((0, 0), (1, 0))), block[:, None], axis=1)[:, 0]
    within = jnp.take_along_axis(e, block[:, None, None], axis=1)[:, 0]
    inside = jnp.cumsum(within, axis=-1)
    # rounding may leave the point a little outside the block: its first or last token with any probability is meant
    zero = jnp.zeros_like(before)
    place = jnp.clip(point - before, zero, jnp.nextafter(inside[:, -1], zero))
    position = _first_above(inside, place)
    token = block * width + position
    chosen = jnp.take_along_axis(within, position[:, None], axis=1)[:, 0]
    return token, jnp.log(chosen) - jnp.log(z)


def _first_above(increasing: jax.Array, point: jax.Array) -> jax.Array:
    """Index of the first entry greater than the point; at most the last index."""
    index = jnp.sum(increasing <= point[:, None], axis=-1, dtype=jnp.int32)
    return jnp.minimum(index, increasing.shape[-1] - 1)
