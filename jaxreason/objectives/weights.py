"""Weights: what the sum over tokens is divided by. A mask `[P, G, T]` in, floats `[P, G, T]` out, 0 on masked tokens.

Call them once on the *whole* update batch and slice the result with it. The denominators are then the batch's own, and
splitting it into micro-batches, or over devices, changes nothing; a mean of micro-batch means would.

N, the number of completions, counts the rows with at least one chosen token. A completion always has one (the stop
token is chosen), so an empty row is padding, or a row masked on purpose: it adds nothing to the numerator, and counting
it in the denominator would shrink everybody else's share. Where no row is empty, N = P * G.
A batch without chosen tokens has weight 0 everywhere.
"""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float


def _shares(mask: Array, denominator: Array) -> Array:
    """1/denominator on chosen tokens; `denominator` is an integer array that broadcasts against the mask."""
    share = 1.0 / jnp.maximum(denominator, 1).astype(jnp.result_type(float))
    return jnp.where(mask, share, 0.0)


def _completions(mask: Array) -> Array:
    return jnp.sum(jnp.any(mask, axis=-1))


def token_mean(mask: Bool[Array, "P G T"]) -> Float[Array, "P G T"]:
    """w = 1 / sum_i |o_i|: every token counts the same (DAPO, arXiv:2503.14476, section 3.3)."""
    return _shares(mask, jnp.sum(mask))


def sequence_mean(mask: Bool[Array, "P G T"]) -> Float[Array, "P G T"]:
    """w = 1 / (N |o_i|): every completion counts the same (DeepSeekMath, arXiv:2402.03300, Eq. 3)."""
    return _shares(mask, _completions(mask) * jnp.sum(mask, axis=-1, keepdims=True))


def sequence_sum(mask: Bool[Array, "P G T"]) -> Float[Array, "P G T"]:
    """w = 1 / N: the plain policy gradient of the expected reward; its size grows with length."""
    return _shares(mask, _completions(mask))


def constant_length(mask: Bool[Array, "P G T"], *, max_completion_tokens: int) -> Float[Array, "P G T"]:
    """w = 1 / (N L), L a constant: `sequence_sum` at a size that does not grow (Dr. GRPO, arXiv:2503.20783).

    `max_completion_tokens` is the token budget of the run, never the padded width of a batch.

    Raises ValueError if `max_completion_tokens` is not positive.
    """
    if max_completion_tokens < 1:
        raise ValueError(
            f"max_completion_tokens is {max_completion_tokens}, but it must be the run's token budget per completion, "
            "a positive integer."
        )
    return _shares(mask, _completions(mask) * max_completion_tokens)
