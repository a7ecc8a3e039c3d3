"""Weights: what the sum over tokens is divided by. A mask `[P, G, T]` in, floats `[P, G, T]` out, 0 on masked tokens.

Call them once on the *whole* update batch and slice the result with it. The denominators are then the batch's own, and
splitting it into micro-batches, or over devices, changes nothing; a mean of micro-batch means would.

N, the number of completions, counts those with at least one chosen token. A completion always has one (the stop
token is chosen), so an empty row is padding, or a row masked on purpose: it adds nothing to the numerator, and counting
it in the denominator would shrink everybody else's share. Where no row is empty, N = P * G.
A batch without chosen tokens has weight 0 everywhere.

Where several completions are packed into a row, `segments` tells them apart (integers, 0 to T - 1 in each row).
"""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float, Int

from jaxreason.objectives.arrays import check_mask, check_range, check_segments, completion_sum, completion_totals

Mask = Bool[Array, "P G T"]
Segments = Int[Array, "P G T"]


def token_mean(mask: Mask, *, segments: Segments | None = None) -> Float[Array, "P G T"]:
    """w = 1 / sum_i |o_i|: every token counts the same (DAPO, arXiv:2503.14476, section 3.3)."""
    check_mask(mask)
    return _share(mask, jnp.sum(mask))


def sequence_mean(mask: Mask, *, segments: Segments | None = None) -> Float[Array, "P G T"]:
    """w = 1 / (N |o_i|): every completion counts the same (DeepSeekMath, arXiv:2402.03300, Eq. 3)."""
    check_mask(mask)
    check_segments(segments, mask)
    if segments is None:
        length = jnp.sum(mask, axis=-1, keepdims=True)
        return _share(mask, jnp.sum(length > 0), length)
    length = completion_sum(mask.astype(jnp.result_type(float)), segments)
    return _share(mask, _completions(mask, segments), length)


def sequence_sum(mask: Mask, *, segments: Segments | None = None) -> Float[Array, "P G T"]:
    """w = 1 / N: the plain policy gradient of the expected reward; its size grows with length."""
    return _share(mask, _completions(mask, segments))


def constant_length(mask: Mask, *, max_completion_tokens: int, segments: Segments | None = None) -> Float[Array, "P G T"]:
    """w = 1 / (N L), L a constant: `sequence_sum` at a size that does not grow (Dr. GRPO, arXiv:2503.20783).

    `max_completion_tokens` is the token budget of the run, never the padded width of a batch.

    Raises ValueError if `max_completion_tokens` is not positive.
    """
    check_range(1, max_completion_tokens=max_completion_tokens)
    return _share(mask, _completions(mask, segments), jnp.asarray(max_completion_tokens))


def group_sum(mask: Mask) -> Float[Array, "P G T"]:
    """w = 1 / P, P the groups with a chosen token: one term a group, as for a preference pair (DPO, arXiv:2305.18290)."""
    check_mask(mask)
    return _share(mask, _groups(mask))


def group_mean(mask: Mask) -> Float[Array, "P G T"]:
    """w = 1 / (P |o_i|): one term a group, its completions averaged over tokens (DeepSeekMath, arXiv:2402.03300, Eq. 12)."""
    check_mask(mask)
    return _share(mask, _groups(mask), jnp.sum(mask, axis=-1, keepdims=True))


def _share(mask: Array, *counts: Array) -> Array:
    """1 over the product of the counts, which broadcast against the mask, on chosen tokens; floats before the product overflows."""
    share = jnp.ones((), jnp.result_type(float))
    for count in counts:
        share = share / jnp.maximum(count, 1).astype(share.dtype)
    return jnp.where(mask, share, 0.0)


def _completions(mask: Array, segments: Array | None) -> Array:
    check_mask(mask)
    check_segments(segments, mask)
    if segments is None:
        return jnp.sum(jnp.any(mask, axis=-1))
    return jnp.sum(completion_totals(mask.astype(int), segments) > 0)  # by id


def _groups(mask: Array) -> Array:
    return jnp.sum(jnp.any(mask, axis=(1, 2)))
