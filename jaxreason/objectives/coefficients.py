"""Coefficients: one number per token that says how hard to push its log-probability, and which way.

The contract. Every function returns `(coefficient, objective)`, both `[P, G, T]` and 0 on masked tokens.

- `coefficient` is the gradient of the textbook objective with respect to `logp`, as a constant: no gradient flows
  through it. `surrogate.surrogate_loss` multiplies it with `logp`.
- `objective` is the textbook objective's value per token, to be maximised, for reporting.

Masked entries of any log-probability may hold anything, -inf and NaN included. Clips are written as masks:
at a tie `jnp.minimum` and `jnp.clip` split the gradient, so exactly at the boundary they give 0.75 A, which is no one's
convention. Here the boundary itself is kept.
"""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Bool, Float

from jaxreason.objectives.kl import log_ratio


def likelihood(
    logp: Float[Array, "P G T"], advantage: Float[Array, "P G T"], mask: Bool[Array, "P G T"]
) -> tuple[Float[Array, "P G T"], Float[Array, "P G T"]]:
    """GC = A; J = A log pi. Likelihood where A = 1 (DeepSeekMath Eq. 6-7), REINFORCE where A is a reward."""
    coefficient = lax.stop_gradient(jnp.where(mask, advantage, 0.0))
    return coefficient, coefficient * jnp.where(mask, logp, 0.0)


def kept_by_clip(
    ratio: Float[Array, "P G T"],
    advantage: Float[Array, "P G T"],
    *,
    clip_low: float,
    clip_high: float,
    dual_clip: float | None = None,
) -> Bool[Array, "P G T"]:
    """False where the clip drops a token: A > 0 and ratio > 1 + clip_high, or A < 0 and ratio < 1 - clip_low.

    With `dual_clip` c also where A < 0 and ratio > c. Tokens that already moved the wrong way are kept, and so are
    those with A = 0.
    """
    dropped = ((advantage > 0) & (ratio > 1 + clip_high)) | ((advantage < 0) & (ratio < 1 - clip_low))
    if dual_clip is not None:
        dropped |= (advantage < 0) & (ratio > dual_clip)
    return ~dropped


def clipped(
    logp: Float[Array, "P G T"],
    logp_old: Float[Array, "P G T"],
    advantage: Float[Array, "P G T"],
    mask: Bool[Array, "P G T"],
    *,
    clip_low: float,
    clip_high: float,
    dual_clip: float | None = None,
) -> tuple[Float[Array, "P G T"], Float[Array, "P G T"]]:
    """GC = m rho A; J = min(rho A, clip(rho, 1 - clip_low, 1 + clip_high) A), rho = pi/pi_old.

    PPO, arXiv:1707.06347, Eq. 7; m is `kept_by_clip`. With `dual_clip` c > 1, J is at least c A where A < 0
    (arXiv:1912.09729).
    At the first update after sampling rho = 1, so GC = A.
    """
    advantage = lax.stop_gradient(jnp.where(mask, advantage, 0.0))
    ratio = jnp.exp(log_ratio(logp, logp_old, mask))
    kept = kept_by_clip(ratio, advantage, clip_low=clip_low, clip_high=clip_high, dual_clip=dual_clip)
    bound = jnp.where(advantage > 0, jnp.full_like(ratio, 1 + clip_high), 1 - clip_low)
    if dual_clip is not None:
        bound = jnp.where((advantage < 0) & (ratio > dual_clip), dual_clip, bound)
    coefficient = jnp.where(kept, ratio * advantage, 0.0)
    return lax.stop_gradient(coefficient), jnp.where(kept, ratio, bound) * advantage
