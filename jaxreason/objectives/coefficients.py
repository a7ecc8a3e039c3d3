"""Coefficients: one number per token that says how hard to push its log-probability, and which way.

The contract. Every function returns `(coefficient, objective)`, both `[P, G, T]` and 0 on masked tokens.

- `coefficient` is the gradient of the textbook objective with respect to `logp`, over the weight, as a constant: no
  gradient flows through it. `surrogate.surrogate_loss` multiplies it with `logp`.
- `objective` is the textbook objective's value per token, to be maximised, for reporting.

Masked entries of any log-probability may hold anything, -inf and NaN included. Clips are written as masks:
at a tie `jnp.minimum` and `jnp.clip` split the gradient, so exactly at the boundary they give 0.75 A, which is no one's
convention. Here the boundary itself is kept. Ratios are held at e^40, and arithmetic is float32 or wider.

`reference_pull` and `preference` keep the same contract; they are at home in `kl` and `preferences`.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Bool, Float, Int

from jaxreason.objectives.arrays import (
    check_above,
    check_choice,
    check_mask,
    check_range,
    check_segments,
    completion_sum,
    exponential,
    known,
    precise,
)
from jaxreason.objectives.kl import log_ratio, reference_pull
from jaxreason.objectives.preferences import preference as preference

Tokens = Float[Array, "P G T"]
Mask = Bool[Array, "P G T"]
Segments = Int[Array, "P G T"]
Pair = tuple[Tokens, Tokens]


def likelihood(logp: Tokens, advantage: Tokens, mask: Mask) -> Pair:
    """GC = A; J = A log pi. Likelihood where A = 1 (DeepSeekMath Eq. 6-7), REINFORCE where A is a reward."""
    check_mask(mask, logp=logp, advantage=advantage)
    logp = precise(logp)
    coefficient = _constant(advantage, mask, logp)
    # a token of probability 0 that nobody pushes costs nothing
    return coefficient, coefficient * jnp.where(mask & (coefficient != 0), logp, 0.0)


# ------------------------------------------------- ratios, token by token


def kept_by_clip(
    ratio: Tokens, advantage: Tokens, *, clip_low: float, clip_high: float, dual_clip: float | None = None
) -> Bool[Array, "P G T"]:
    """False where the clip drops a token: A > 0 and ratio > 1 + clip_high, or A < 0 and ratio < 1 - clip_low.

    With `dual_clip` c also where A < 0 and ratio > c. Tokens that already moved the wrong way are kept, and so are
    those with A = 0.

    Raises ValueError if a clip is negative, or `dual_clip` is not above 1.
    """
    check_clip(clip_low, clip_high, dual_clip)
    dropped = ((advantage > 0) & (ratio > 1 + clip_high)) | ((advantage < 0) & (ratio < 1 - clip_low))
    if dual_clip is not None:
        dropped |= (advantage < 0) & (ratio > dual_clip)
    return ~dropped


def clipped(
    logp: Tokens,
    logp_old: Tokens,
    advantage: Tokens,
    mask: Mask,
    *,
    clip_low: float,
    clip_high: float,
    dual_clip: float | None = None,
) -> Pair:
    """GC = m rho A; J = min(rho A, clip(rho, 1 - clip_low, 1 + clip_high) A), rho = pi/pi_old.

    PPO, arXiv:1707.06347, Eq. 7; m is `kept_by_clip`. With `dual_clip` c > 1, J is at least c A where A < 0
    (arXiv:1912.09729). At the first update after sampling rho = 1, so GC = A.

    Raises ValueError if shapes differ, a clip is negative, or `dual_clip` is not above 1.
    """
    check_mask(mask, logp=logp, logp_old=logp_old, advantage=advantage)
    logp = precise(logp)
    return _clip_ratio(
        exponential(log_ratio(logp, logp_old, mask)), _constant(advantage, mask, logp), clip_low, clip_high, dual_clip
    )


def clipped_importance(logp: Tokens, logp_old: Tokens, advantage: Tokens, mask: Mask, *, clip_low: float, clip_high: float) -> Pair:
    """GC = clip(rho, 1 - clip_low, 1 + clip_high) A; J = sg(that) log pi (CISPO, MiniMax-M1, arXiv:2506.13585).

    The clip bounds a constant weight, so no token is ever dropped. Both bounds are relative to 1, as in the paper;
    code that takes the upper one for an absolute cap on rho calls `clip_high=4` 5. `clip_low=1` is no lower bound.

    Raises ValueError if shapes differ, or a clip is negative.
    """
    check_mask(mask, logp=logp, logp_old=logp_old, advantage=advantage)
    check_clip(clip_low, clip_high)
    logp = precise(logp)
    ratio = exponential(log_ratio(logp, logp_old, mask))
    coefficient = lax.stop_gradient(jnp.clip(ratio, 1 - clip_low, 1 + clip_high)) * _constant(advantage, mask, logp)
    return coefficient, coefficient * jnp.where(mask, logp, 0.0)


def soft_gate(logp: Tokens, logp_old: Tokens, advantage: Tokens, mask: Mask, *, tau_positive: float, tau_negative: float) -> Pair:
    """GC = 4 g (1 - g) rho A, g = sigmoid(tau (rho - 1)); J = (4/tau) g A (SAPO, arXiv:2511.20347).

    tau is `tau_positive` where A > 0 and `tau_negative` elsewhere. At rho = 1 this is A; far from it, it fades.

    Raises ValueError if shapes differ, or a tau is not positive.
    """
    check_mask(mask, logp=logp, logp_old=logp_old, advantage=advantage)
    check_temperatures(tau_positive, tau_negative)
    logp = precise(logp)
    advantage = _constant(advantage, mask, logp)
    ratio = exponential(log_ratio(logp, logp_old, mask))
    tau = jnp.where(advantage > 0, jnp.full_like(ratio, tau_positive), tau_negative)
    gate = jax.nn.sigmoid(tau * (ratio - 1))
    coefficient = 4 * gate * jax.nn.sigmoid(-tau * (ratio - 1)) * ratio * advantage
    return lax.stop_gradient(coefficient), 4 / tau * gate * advantage


def decoupled(
    logp: Tokens,
    logp_old: Tokens,
    logp_behaviour: Tokens,
    advantage: Tokens,
    mask: Mask,
    *,
    clip_low: float,
    clip_high: float,
    cap: float | None = None,
) -> Pair:
    """GC = (pi_prox/pi_behav) m rho A, rho = pi/pi_prox; J is the clipped objective times the same constant.

    Decoupled PPO (arXiv:2110.00641; AReaL, arXiv:2505.24298). The proximal policy is `logp_old`, the newest one before
    the update; the behaviour policy sampled, perhaps several versions ago, and perhaps several versions in one
    completion. With `cap` the constant is at most that, as by `sampler_correction`.

    Raises ValueError if shapes differ, a clip is negative, or `cap` is not positive.
    """
    check_above(0.0, cap=cap)
    factor = sampler_correction(logp_old, logp_behaviour, mask, kind="truncate", high=jnp.inf if cap is None else cap)
    coefficient, objective = clipped(logp, logp_old, advantage, mask, clip_low=clip_low, clip_high=clip_high)
    return factor.astype(coefficient.dtype) * coefficient, factor.astype(coefficient.dtype) * objective


# ------------------------------------------------- ratios of whole completions


def sequence_ratio(logp: Tokens, logp_old: Tokens, mask: Mask, *, segments: Segments | None = None) -> Tokens:
    """s_i = exp(mean_t log(pi/pi_old)), the geometric mean of a completion's token ratios, on its chosen tokens.

    GSPO, arXiv:2507.18071. Padding and fed tokens are in neither the sum nor the count. 1 on masked tokens.
    """
    check_mask(mask, logp=logp, logp_old=logp_old)
    check_segments(segments, mask)
    mean = _completion_mean(log_ratio(lax.stop_gradient(logp), logp_old, mask), mask, segments)
    return jnp.where(mask, exponential(mean), 1.0)  # one exp a completion, not one a token


def sequence_clipped(
    logp: Tokens,
    logp_old: Tokens,
    advantage: Tokens,
    mask: Mask,
    *,
    clip_low: float,
    clip_high: float,
    segments: Segments | None = None,
) -> Pair:
    """GC = m s_i A; J = min(s_i A, clip(s_i) A), s_i being `sequence_ratio` (GSPO, arXiv:2507.18071).

    With one advantage a completion, all of it is kept or dropped. With one a token this is GSPO-token, whose ratio
    sg(s_i) pi/sg(pi) has the value s_i and the gradient of the token. For w = 1/(N |o_i|).

    Raises ValueError if shapes differ, or a clip is negative.
    """
    check_mask(mask, logp=logp, logp_old=logp_old, advantage=advantage)
    logp = precise(logp)
    ratio = sequence_ratio(logp, logp_old, mask, segments=segments)
    return _clip_ratio(ratio, _constant(advantage, mask, logp), clip_low, clip_high, None)


def geometric_mean(
    logp: Tokens,
    logp_old: Tokens,
    advantage: Tokens,
    mask: Mask,
    *,
    clip_low: float,
    clip_high: float,
    segments: Segments | None = None,
) -> Pair:
    """GC = m_t c_i A, c_i = exp(mean_t clipped log rho_t); J = c_i A (GMPO, arXiv:2507.20673).

    Each token's log-ratio is clipped to [-clip_low, clip_high], on the side that its advantage's sign makes
    profitable, as PPO does; m_t = 0 where it is. The clips are nats, not shares: 0.4 is a ratio of 1.49 or 0.67.
    A is one number a completion. For w = 1/(N |o_i|).

    Raises ValueError if shapes differ, or a clip is negative.
    """
    check_mask(mask, logp=logp, logp_old=logp_old, advantage=advantage)
    check_segments(segments, mask)
    check_range(0.0, clip_low=clip_low, clip_high=clip_high)
    logp = precise(logp)
    advantage = _constant(advantage, mask, logp)
    difference = log_ratio(lax.stop_gradient(logp), logp_old, mask)
    kept = kept_by_log_clip(difference, advantage, clip_low=clip_low, clip_high=clip_high)
    above, below = jnp.minimum(difference, clip_high), jnp.maximum(difference, -clip_low)
    bounded = jnp.where(advantage > 0, above, jnp.where(advantage < 0, below, difference))
    objective = jnp.where(mask, exponential(_completion_mean(bounded, mask, segments)) * advantage, 0.0)
    return jnp.where(kept, objective, 0.0), objective


def kept_by_log_clip(difference: Tokens, advantage: Tokens, *, clip_low: float, clip_high: float) -> Bool[Array, "P G T"]:
    """False where GMPO's clip drops a token: A > 0 and log rho > clip_high, or A < 0 and log rho < -clip_low."""
    return ~(((advantage > 0) & (difference > clip_high)) | ((advantage < 0) & (difference < -clip_low)))


def mirror_descent(
    logp: Tokens, logp_old: Tokens, advantage: Tokens, mask: Mask, *, tau: float, segments: Segments | None = None
) -> Pair:
    """GC = A - tau log(pi/pi_i)(y), the log-ratio of the whole completion (Kimi k1.5, arXiv:2501.12599, section 2.3.2).

    J = sum_t A log pi_t - (tau/2) log(pi/pi_i)(y)^2 a completion, spread over its tokens. A = r - mean r stands for
    r - tau log Z; pi_i = `logp_old` is the policy at the iteration's start. No ratio and no clip; off-policy rows are
    allowed. For w = 1/N.

    Raises ValueError if shapes differ, or `tau` is negative.
    """
    check_mask(mask, logp=logp, logp_old=logp_old, advantage=advantage)
    check_segments(segments, mask)
    check_range(0.0, tau=tau)
    logp = precise(logp)
    advantage = _constant(advantage, mask, logp)
    difference = log_ratio(lax.stop_gradient(logp), logp_old, mask)
    whole = jnp.where(mask, completion_sum(difference, segments), 0.0)
    objective = advantage * jnp.where(mask, logp, 0.0) - 0.5 * tau * whole * difference
    return advantage - tau * whole, objective


# ------------------------------------------------- other policies, and the policy's own entropy


def reverse_kl(logp: Tokens, logp_teacher: Tokens, logp_old: Tokens, mask: Mask) -> Pair:
    """GC = rho (log pi_T - log pi); J = -rho k3, k3 = pi_T/pi - 1 - log(pi_T/pi), rho = pi/pi_old.

    On-policy distillation (arXiv:2306.13649 with the reverse KL, by samples). Both J and its gradient are unbiased for
    -KL(pi || pi_T) at each visited state, off-policy too, since gradient flows through rho (our derivation; the same as
    `kl.reference_pull` of kind weighted_k3). That a token now changes which states come later is left out; for the
    sequence's KL put `advantages.kl_in_reward` with the teacher as reference into a policy gradient.

    Raises ValueError if shapes differ.
    """
    return reference_pull(logp, logp_teacher, mask, kind="weighted_k3", logp_old=logp_old)


def entropy_bonus(logp: Tokens, logp_old: Tokens, mask: Mask) -> Pair:
    """GC = -rho log pi; J = rho (1 - log pi) - 1, per unit of the bonus (our derivation). Nats per token.

    E[J] is the entropy of each visited state's law and E[GC grad log pi] its gradient, off-policy too. Gradient flows
    through rho: E[grad log pi] = 0 lets the "+1" of -(log pi + 1) go, which only adds variance, and the constant 1 - rho
    repairs the value. For logits at hand, the exact entropy is better.

    Raises ValueError if shapes differ.
    """
    check_mask(mask, logp=logp, logp_old=logp_old)
    logp = lax.stop_gradient(precise(logp))
    ratio = exponential(log_ratio(logp, logp_old, mask))
    chosen = jnp.where(mask, logp, 0.0)
    return jnp.where(mask, -ratio * chosen, 0.0), jnp.where(mask, ratio * (1 - chosen) - 1, 0.0)


def sampler_correction(
    logp_old: Tokens,
    logp_behaviour: Tokens,
    mask: Mask,
    *,
    kind: str,
    low: float = 0.0,
    high: float = 2.0,
    segments: Segments | None = None,
) -> Tokens:
    """The factor that a coefficient takes because the sampler was not the trainer's policy; w = pi_old/pi_behaviour.

    - "truncate": min(w, high), truncated importance sampling (TIS);
    - "band": w where low <= w <= high, else 0, token by token (IcePop; its band is 0.5 to 5);
    - "sequence_truncate": min(prod_t w, high) for the whole completion;
    - "sequence_mask", "sequence_mean_mask": token w, and 0 for every token of a completion whose product, or geometric
      mean, of w is outside [low, high]. The mask masks; it does not clamp. (TRL keeps the same completions but weighs their
      tokens by the product.)

    A constant, 0 on masked tokens. Dropped tokens stay in the weight's denominator, so dropping many shrinks the step.

    Raises ValueError if `kind` is unknown, shapes differ, `low` and `high` are not 0 <= low <= high, or `low` is given to a
    kind without a lower bound.
    """
    check_correction(kind, low, high)
    check_mask(mask, logp_old=logp_old, logp_behaviour=logp_behaviour)
    check_segments(segments, mask)
    difference = log_ratio(lax.stop_gradient(logp_old), logp_behaviour, mask)
    ratio = exponential(difference)
    if kind == "truncate":
        factor = jnp.minimum(ratio, high)
    elif kind == "sequence_truncate":
        factor = jnp.minimum(exponential(completion_sum(difference, segments)), high)
    else:
        if kind == "band":
            measure = ratio
        elif kind == "sequence_mask":
            measure = exponential(completion_sum(difference, segments))
        else:
            measure = exponential(_completion_mean(difference, mask, segments))
        factor = jnp.where((measure >= low) & (measure <= high), ratio, 0.0)
    return jnp.where(mask, factor, 0.0)


def _constant(advantage: Array, mask: Array, logp: Array) -> Array:
    """The advantage in the log-probability's precision, without gradient, 0 on masked tokens."""
    return lax.stop_gradient(jnp.where(mask, precise(advantage).astype(logp.dtype), 0.0))


def _clip_ratio(ratio: Array, advantage: Array, clip_low: float, clip_high: float, dual_clip: float | None) -> Pair:
    kept = kept_by_clip(ratio, advantage, clip_low=clip_low, clip_high=clip_high, dual_clip=dual_clip)
    above, below = jnp.minimum(ratio, 1 + clip_high), jnp.maximum(ratio, 1 - clip_low)
    # the same as min(rho A, clip(rho) A), by the sign of A
    bounded = jnp.where(advantage > 0, above, below if dual_clip is None else jnp.minimum(below, dual_clip))
    coefficient = jnp.where(kept, ratio * advantage, 0.0)
    return lax.stop_gradient(coefficient), bounded * advantage


def _completion_mean(value: Array, mask: Array, segments: Array | None) -> Array:
    """The mean over the chosen tokens of each completion; `value` is 0 on masked tokens."""
    if segments is None:
        count = jnp.sum(mask, axis=-1, keepdims=True)  # integers, as in `weights`, so that one sum serves both
    else:
        count = completion_sum(mask.astype(value.dtype), segments)
    return completion_sum(jnp.where(mask, value, 0.0), segments) / jnp.maximum(count, 1).astype(value.dtype)


def check_clip(clip_low: float, clip_high: float, dual_clip: float | None = None) -> None:
    """Raises ValueError if a clip is negative, or `dual_clip` is not above 1."""
    check_range(0.0, clip_low=clip_low, clip_high=clip_high)
    check_above(1.0, ", being the largest ratio kept where A < 0", dual_clip=dual_clip)


def check_temperatures(tau_positive: float, tau_negative: float) -> None:
    """Raises ValueError if a tau of the soft gate is not positive."""
    check_above(0.0, tau_positive=tau_positive, tau_negative=tau_negative)


def check_correction(kind: str, low: float, high: float) -> None:
    """Raises ValueError if a sampler correction's settings are wrong."""
    check_choice(("truncate", "band", "sequence_truncate", "sequence_mask", "sequence_mean_mask"), kind=kind)
    check_range(0.0, low=low)
    check_range(low, high=high)
    if kind.endswith("truncate") and known(low) and low != 0:
        raise ValueError(f"low is {low}, but kind {kind!r} has no lower bound; leave it out, or take a band or a mask.")
