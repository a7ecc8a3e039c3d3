"""Advantages: what a group of completions makes of its rewards. `[P, G]` in, `[P, G]` out; the group is axis 1.

A group whose rewards are all equal says nothing, and gets exactly 0 from every baseline here. It is recognised by
max == min. Left to floating point it would not be 0: in float32, seven rewards of 0.7 leave a rounding residue in the
mean that a small epsilon turns into an advantage of up to 0.86. A group of one is the smallest such group: also 0.
A NaN reward makes its whole group NaN; nothing is repaired here.
"""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float


def zero_variance(reward: Float[Array, "P G"]) -> Bool[Array, " P"]:
    """True for the groups whose rewards are all equal."""
    return jnp.max(reward, axis=1) == jnp.min(reward, axis=1)


def group_centre(reward: Float[Array, "P G"]) -> Float[Array, "P G"]:
    """A_i = r_i - mean_j r_j (Dr. GRPO, arXiv:2503.20783). Its expected gradient is (G-1)/G of the true one."""
    centred = reward - jnp.mean(reward, axis=1, keepdims=True)
    return jnp.where(zero_variance(reward)[:, None], 0.0, centred)


def leave_one_out(reward: Float[Array, "P G"]) -> Float[Array, "P G"]:
    """A_i = r_i - mean_{j != i} r_j = G/(G-1) (r_i - mean r) (RLOO, arXiv:2402.14740). Unbiased."""
    group_size = reward.shape[1]
    return group_centre(reward) * (group_size / max(group_size - 1, 1))


def group_zscore(reward: Float[Array, "P G"], *, ddof: int = 0, epsilon: float = 1e-6) -> Float[Array, "P G"]:
    """A_i = (r_i - mean r) / (std r + epsilon) (GRPO, DeepSeekMath, arXiv:2402.03300, section 4.1.2).

    The paper does not say which standard deviation it means. `ddof=0` divides by G (population), `ddof=1` by G - 1
    (sample; common in other code), which makes advantages smaller by sqrt((G-1)/G): a silent learning-rate factor.

    Raises ValueError if `ddof` is not 0 or 1.
    """
    if ddof not in (0, 1):
        raise ValueError(f"ddof is {ddof!r}, but it must be 0 (population std) or 1 (sample std).")
    centred = group_centre(reward)
    equal = zero_variance(reward)[:, None]
    degrees = max(reward.shape[1] - ddof, 1)
    variance = jnp.sum(jnp.square(centred), axis=1, keepdims=True) / degrees
    std = jnp.sqrt(jnp.where(equal, 1.0, variance))  # an equal group is 0 / (1 + epsilon), never something / epsilon
    return centred / (std + epsilon)
