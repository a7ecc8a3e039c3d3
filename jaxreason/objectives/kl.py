"""Log-ratios, and the three sampled estimators of the divergence from a reference policy.

An estimator's value and its gradient are two choices (Schulman, "Approximating KL divergence", 2020, names k1, k2, k3).
As a loss term on on-policy samples, with l = log pi - log pi_ref: k1 has zero expected gradient, so it regularises
nothing; k2 descends the reverse KL(pi || ref) at each visited state; k3, which is GRPO's, descends the *forward*
KL(ref || pi). All three are biased once the samples are off-policy.

Absent: a clamp on the log-ratio. It sets the gradient to zero exactly where the divergence is largest.
"""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Bool, Float


def log_ratio(logp: Float[Array, "P G T"], logp_other: Float[Array, "P G T"], mask: Bool[Array, "P G T"]) -> Float[Array, "P G T"]:
    """log pi - log pi_other on chosen tokens, 0 elsewhere; no gradient flows into `logp_other`.

    Masked entries may hold anything, -inf and NaN included. They are replaced here, before an `exp` sees them: a
    `where` behind the `exp` alone gives a finite value but a NaN gradient.
    """
    return jnp.where(mask, logp, 0.0) - jnp.where(mask, lax.stop_gradient(logp_other), 0.0)


def kl_k1(logp: Float[Array, "P G T"], logp_ref: Float[Array, "P G T"], mask: Bool[Array, "P G T"]) -> Float[Array, "P G T"]:
    """k1 = l: unbiased value, either sign. 0 on masked tokens. Nats per token."""
    return log_ratio(logp, logp_ref, mask)


def kl_k2(logp: Float[Array, "P G T"], logp_ref: Float[Array, "P G T"], mask: Bool[Array, "P G T"]) -> Float[Array, "P G T"]:
    """k2 = l^2 / 2: biased value, never negative. 0 on masked tokens. Nats per token."""
    return 0.5 * jnp.square(log_ratio(logp, logp_ref, mask))


def kl_k3(logp: Float[Array, "P G T"], logp_ref: Float[Array, "P G T"], mask: Bool[Array, "P G T"]) -> Float[Array, "P G T"]:
    """k3 = pi_ref/pi - log(pi_ref/pi) - 1: unbiased value, never negative (DeepSeekMath, arXiv:2402.03300, Eq. 4).

    0 on masked tokens. Nats per token.
    """
    difference = log_ratio(logp, logp_ref, mask)
    return jnp.expm1(-difference) + difference  # expm1: exp(-l) - 1 loses its digits near l = 0


def reference_pull(
    logp: Float[Array, "P G T"], logp_ref: Float[Array, "P G T"], mask: Bool[Array, "P G T"], *, kind: str
) -> tuple[Float[Array, "P G T"], Float[Array, "P G T"]]:
    """(coefficient, objective) of the term -beta * KL in the loss, both per unit of beta.

    The coefficient is d(-KL)/dlogp: -1 for k1, -l for k2, pi_ref/pi - 1 for k3 (DeepSeekMath Eq. 21 has the last).
    The pull sits outside any clip: a clipped token still feels it. Both are 0 on masked tokens.

    Raises ValueError if `kind` is not "k1", "k2" or "k3".
    """
    difference = log_ratio(logp, logp_ref, mask)
    if kind == "k1":
        coefficient, value = jnp.where(mask, -jnp.ones_like(difference), 0.0), kl_k1(logp, logp_ref, mask)
    elif kind == "k2":
        coefficient, value = -difference, kl_k2(logp, logp_ref, mask)
    elif kind == "k3":
        coefficient, value = jnp.expm1(-difference), kl_k3(logp, logp_ref, mask)
    else:
        raise ValueError(f"The KL estimator is {kind!r}, but it must be 'k1', 'k2' or 'k3'; set kl to one of them.")
    return lax.stop_gradient(coefficient), -value
