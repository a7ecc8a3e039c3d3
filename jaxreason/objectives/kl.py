"""Log-ratios, and the estimators of the divergence from a reference policy: their values, and what they do to the policy.

An estimator's value and its gradient are two choices (Schulman, "Approximating KL divergence", 2020, names k1, k2, k3).
As a loss term on on-policy samples, with l = log pi - log pi_ref: k1 has zero expected gradient, so it regularises
nothing; k2 descends the reverse KL(pi || ref) at each visited state; k3, which is GRPO's, descends the *forward*
KL(ref || pi). All three are biased once the samples are off-policy; `weighted_k3` is not.

Absent: a clamp that cuts the gradient. It would do so exactly where the divergence is largest.
"""

from __future__ import annotations

import math

import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Bool, Float

from jaxreason.objectives.arrays import LARGEST_LOG_RATIO, check_choice, check_mask, exponential, precise

PLAIN = ("k1", "k2", "k3", "abs")
KINDS = (
    *PLAIN,
    *("k1_plus", "k3_plus"),  # the value of k1 or k3 with the gradient of k2
    *("weighted_k1", "weighted_k2", "weighted_k3"),  # times pi/pi_old, through which gradient flows
    *("fixed_weight_k2", "fixed_weight_k3", "fixed_weight_k3_plus"),  # times pi/pi_old, a constant
)


def log_ratio(logp: Float[Array, "P G T"], logp_other: Float[Array, "P G T"], mask: Bool[Array, "P G T"]) -> Float[Array, "P G T"]:
    """log pi - log pi_other on chosen tokens, 0 elsewhere, in float32 or wider; no gradient flows into `logp_other`.

    Masked entries may hold anything, -inf and NaN included. They are replaced here, before an `exp` sees them: a
    `where` behind the `exp` alone gives a finite value but a NaN gradient.
    """
    logp = precise(logp)
    return jnp.where(mask, logp, 0.0) - jnp.where(mask, lax.stop_gradient(precise(logp_other).astype(logp.dtype)), 0.0)


def kl_k1(logp: Float[Array, "P G T"], logp_ref: Float[Array, "P G T"], mask: Bool[Array, "P G T"]) -> Float[Array, "P G T"]:
    """k1 = l: unbiased value, either sign. 0 on masked tokens. Nats per token."""
    return log_ratio(logp, logp_ref, mask)


def kl_k2(logp: Float[Array, "P G T"], logp_ref: Float[Array, "P G T"], mask: Bool[Array, "P G T"]) -> Float[Array, "P G T"]:
    """k2 = l^2 / 2: biased value, never negative. 0 on masked tokens. Nats per token."""
    return 0.5 * jnp.square(log_ratio(logp, logp_ref, mask))


def kl_k3(logp: Float[Array, "P G T"], logp_ref: Float[Array, "P G T"], mask: Bool[Array, "P G T"]) -> Float[Array, "P G T"]:
    """k3 = pi_ref/pi - log(pi_ref/pi) - 1: unbiased value, never negative (DeepSeekMath, arXiv:2402.03300, Eq. 4).

    0 on masked tokens. Nats per token; the exponential is held at e^40, which is finite.
    """
    return _k3(log_ratio(logp, logp_ref, mask))[0]


def reference_pull(
    logp: Float[Array, "P G T"],
    logp_ref: Float[Array, "P G T"],
    mask: Bool[Array, "P G T"],
    *,
    kind: str,
    logp_old: Float[Array, "P G T"] | None = None,
) -> tuple[Float[Array, "P G T"], Float[Array, "P G T"]]:
    """(coefficient, objective) of the term -beta * KL in the loss, both per unit of beta; J = -KL, GC = d(-KL)/dlogp.

    With l = log pi - log pi_ref, u = pi_ref/pi and w = pi/pi_old (1 where `logp_old` is None):

    =======================  ==============  =================  ============================================
    kind                     KL              GC                 expected gradient, on-policy
    =======================  ==============  =================  ============================================
    k1                       l               -1                 0: regularises nothing
    k2, k1_plus, k3_plus     l^2/2, l, k3    -l                 reverse KL(pi || ref)
    k3                       u - 1 + l       u - 1              forward KL(ref || pi)
    abs                      abs(l)          -sign(l)           neither
    weighted_k1              w l             -w (l + 1)         reverse KL, off-policy too, with more variance
    weighted_k2              w l^2/2         -w (l + l^2/2)     biased
    weighted_k3              w k3            -w l               reverse KL, off-policy too
    fixed_weight_k2          sg(w) l^2/2     -w l               reverse KL, off-policy too
    fixed_weight_k3_plus     sg(w) k3        -w l               reverse KL, off-policy too
    fixed_weight_k3          sg(w) k3        w (u - 1)          forward KL
    =======================  ==============  =================  ============================================

    k3's GC is in DeepSeekMath, arXiv:2402.03300, Eq. 21; weighted_k3 is DeepSeek-V3.2's unbiased estimate
    (arXiv:2512.02556); the other rows are our derivation. `weighted_k3` is not k3 even at w = 1: differentiating w adds
    k3 * grad log pi. The weight is each token's own, also beside an algorithm whose ratio is a whole completion's.

    The pull sits outside any clip: a clipped token still feels it. Both are 0 on masked tokens.

    Raises ValueError if `kind` is unknown, or if shapes differ.
    """
    check_choice(KINDS, kind=kind)
    check_mask(mask, logp=logp, logp_ref=logp_ref, logp_old=logp_old)
    difference = log_ratio(lax.stop_gradient(logp), logp_ref, mask)
    log_weight = jnp.zeros_like(difference) if logp_old is None else log_ratio(lax.stop_gradient(logp), logp_old, mask)
    weight = jnp.where(mask, exponential(log_weight), 0.0)
    estimator = next(name for name in PLAIN if name in kind)
    value, slope = {
        "k1": (difference, jnp.ones_like(difference)),
        "k2": (0.5 * jnp.square(difference), difference),
        "k3": _k3(difference),
        "abs": (jnp.abs(difference), jnp.sign(difference)),
    }[estimator]
    if kind.endswith("_plus"):
        slope = difference
    if kind == "weighted_k3":
        slope = difference  # (k3 + dk3/dlogp) = l: the u in both cancels, on paper better than in floating point
    elif kind.startswith("weighted_"):
        slope = slope + value
    if "weight" in kind:
        if estimator == "k3":
            # far from the reference w u is one exponential, finite where w and u apart would overflow
            far = exponential(log_weight - difference) - weight + weight * difference
            value = jnp.where(difference > -1, weight * value, far)
        else:
            value = weight * value
        if kind == "fixed_weight_k3":
            slope = jnp.where(difference > -1, weight * slope, weight - exponential(log_weight - difference))
        else:
            slope = weight * slope
    return lax.stop_gradient(jnp.where(mask, -slope, 0.0)), -value


def _k3(difference: Array) -> tuple[Array, Array]:
    """(k3, its derivative) of log(pi/pi_ref): exp(x) - 1 - x and 1 - exp(x) at x = -l, the exponential held at e^40.

    Near 0 by the series of (exp(x) - 1 - x)/x^2: where a policy has hardly moved, k3 is x^2/2 and the subtraction would leave
    no digit of it. (expm1 would leave half of them.)
    """
    x = jnp.minimum(-difference, LARGEST_LOG_RATIO)
    terms = 8 if jnp.finfo(x.dtype).bits == 32 else 14  # the next one is below the rounding at |x| = 1/2
    series = jnp.zeros_like(x)
    for k in reversed(range(terms)):
        series = series * x + 1 / math.factorial(k + 2)
    near = jnp.abs(x) < 0.5
    value = jnp.where(near, x * x * series, jnp.exp(x) - 1 - x)
    return value, -(value + x)
