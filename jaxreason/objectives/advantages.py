"""Advantages: what a group of completions makes of its rewards, and what a critic or a list of step rewards makes of them.

`[P, G]` is a number a completion, `[P, G, T]` one a token; the group is axis 1. A group whose rewards are all equal says
nothing, and gets exactly 0 from every baseline here. It is recognised by max == min. Left to floating point it would not
be 0: in float32, seven rewards of 0.7 leave a rounding residue in the mean that a small epsilon turns into an advantage
of up to 0.86. A group of one has nothing to be compared with, and is refused. A traced NaN reward makes its whole group
NaN; nothing is repaired here.

Rewards of tokens sit on chosen tokens: what `reward` holds where the mask is False is ignored, so place a completion's
reward with `at_last_token`. Tokens that the policy did not choose (a tool's output) are stepped over: credit passes
from the chosen token behind them to the one before them, undiminished.
"""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jaxtyping import Bool, Float, Int

from jaxreason.objectives.arrays import (
    Scalar,
    check_above,
    check_mask,
    check_range,
    check_reward,
    check_segments,
    completion_sum,
    known,
    precise,
)
from jaxreason.objectives.kl import log_ratio

Segments = Int[Array, "P G T"]


def zero_variance(reward: Float[Array, "P G"]) -> Bool[Array, " P"]:
    """True for the groups whose rewards are all equal."""
    return jnp.max(reward, axis=1) == jnp.min(reward, axis=1)


# ------------------------------------------------- one number a completion, compared within its group


def group_centre(reward: Float[Array, "P G"]) -> Float[Array, "P G"]:
    """A_i = r_i - mean_j r_j (Dr. GRPO, arXiv:2503.20783). Its expected gradient is (G-1)/G of the true one.

    Raises ValueError if `reward` is not [P, G] with G > 1, or holds NaN.
    """
    check_reward(reward, group=True)
    reward = precise(reward)
    moved = reward - reward[:, :1]  # exact for what is near: an offset that all rewards share takes no digits from the mean
    centred = moved - jnp.mean(moved, axis=1, keepdims=True)
    return jnp.where(zero_variance(reward)[:, None], 0.0, centred)


def leave_one_out(reward: Float[Array, "P G"]) -> Float[Array, "P G"]:
    """A_i = r_i - mean_{j != i} r_j = G/(G-1) (r_i - mean r) (RLOO, arXiv:2402.14740). Unbiased.

    Raises ValueError if `reward` is not [P, G] with G > 1, or holds NaN.
    """
    centred = group_centre(reward)
    group_size = centred.shape[1]
    return centred * (group_size / (group_size - 1))


def group_zscore(reward: Float[Array, "P G"], *, ddof: int = 0, epsilon: float = 1e-6) -> Float[Array, "P G"]:
    """A_i = (r_i - mean r) / (std r + epsilon) (GRPO, DeepSeekMath, arXiv:2402.03300, section 4.1.2).

    The paper does not say which standard deviation it means. `ddof=0` divides by G (population), `ddof=1` by G - 1
    (sample; common in other code), which makes advantages smaller by sqrt((G-1)/G): a silent learning-rate factor.

    Raises ValueError if `ddof` is not 0 or 1, `epsilon` is negative, or `reward` is not [P, G] with G > 1 or holds NaN.
    """
    check_deviation(ddof, epsilon)
    centred = group_centre(reward)
    equal = zero_variance(precise(reward))[:, None]
    variance = jnp.sum(jnp.square(centred), axis=1, keepdims=True) / (centred.shape[1] - ddof)
    std = jnp.sqrt(jnp.where(equal, 1.0, variance))  # an equal group is 0 / (1 + epsilon), never something / epsilon
    return centred / (std + epsilon)


def relative_to_mean(reward: Float[Array, "P G"]) -> Float[Array, "P G"]:
    """A_i = (r_i - mean r) / mean r, for rewards that are not negative (MaxRL). A group without any reward gets 0.

    With 0 or 1 as rewards its expected group gradient climbs log p(q) as G grows, where `group_centre` climbs p(q).

    Raises ValueError if `reward` is not [P, G] with G > 1, or holds NaN or, where it is concrete, a negative number.
    """
    centred = group_centre(reward)
    check_range(0.0, reward=jnp.min(reward))
    mean = jnp.mean(precise(reward), axis=1, keepdims=True)
    return centred / jnp.where(mean > 0, mean, 1.0)


def greedy_baseline(reward: Float[Array, "P G"], greedy_reward: Float[Array, " P"]) -> Float[Array, "P G"]:
    """A_i = r_i - r(greedy completion of the same problem) (ReMax, arXiv:2310.10505). Unbiased; G may be 1.

    Raises ValueError if shapes do not fit, or if a reward is NaN.
    """
    check_reward(reward)
    if jnp.shape(greedy_reward) != jnp.shape(reward)[:1]:
        raise ValueError(
            f"greedy_reward has shape {jnp.shape(greedy_reward)} and reward has {jnp.shape(reward)}, but they must be [P] and "
            "[P, G]: one greedy completion a problem."
        )
    check_reward(greedy_reward[:, None], name="greedy_reward")
    reward = precise(reward)
    return reward - precise(greedy_reward).astype(reward.dtype)[:, None]


# ------------------------------------------------- one number a token


def batch_whiten(
    advantage: Float[Array, "P G T"], mask: Bool[Array, "P G T"], *, epsilon: float = 1e-8, ddof: int = 0
) -> Float[Array, "P G T"]:
    """(A - mean A) / (std A + epsilon), both over all chosen tokens of the batch (REINFORCE++, arXiv:2501.03262).

    Scale and shift are shared by all problems, so this is no baseline of a problem's own. All-equal input gives 0.

    Raises ValueError if shapes differ, `ddof` is not 0 or 1, or `epsilon` is negative.
    """
    check_mask(mask, advantage=advantage)
    check_deviation(ddof, epsilon)
    return _whiten(precise(advantage), mask, axes=(0, 1, 2), ddof=ddof, epsilon=epsilon)


def at_last_token(
    reward: Float[Array, "P G"], mask: Bool[Array, "P G T"], *, segments: Segments | None = None
) -> Float[Array, "P G T"]:
    """Each completion's reward on its last chosen token, 0 elsewhere: r_T = r(q, o).

    It is the last *chosen* token: a tool's output behind it does not receive the reward, where it would be lost.

    Raises ValueError if shapes do not fit, or if rows are packed: then a row has no one reward.
    """
    check_mask(mask)
    check_reward(reward)
    if segments is not None:
        raise ValueError("segments are given, but a packed row has no one reward: place rewards before packing.")
    if mask.shape[:2] != reward.shape:
        raise ValueError(f"reward has shape {reward.shape} and mask has {mask.shape}, but they must be [P, G] and [P, G, T].")
    last = mask & (_next_chosen(mask) == mask.shape[-1])
    return jnp.where(last, precise(reward)[:, :, None], 0.0)


def kl_in_reward(
    reward: Float[Array, "P G"],
    logp: Float[Array, "P G T"],
    logp_ref: Float[Array, "P G T"],
    mask: Bool[Array, "P G T"],
    *,
    beta: Scalar,
) -> Float[Array, "P G T"]:
    """r_t = [t is last] r(q, o) - beta log(pi/pi_ref)(o_t) (InstructGPT, arXiv:2203.02155; DeepSeekMath, Eq. 18).

    `logp` is of the policy that sampled. With the undiscounted return as the advantage this is the *exact* gradient of
    the sequence's reverse KL; a KL term in the loss is that of each visited state only (our derivation).

    Raises ValueError if shapes do not fit, `beta` is negative, or a reward is NaN.
    """
    check_range(0.0, beta=beta)
    check_mask(mask, logp=logp, logp_ref=logp_ref)
    placed = at_last_token(reward, mask)
    divergence = lax.stop_gradient(log_ratio(logp, logp_ref, mask))
    dtype = np.promote_types(placed.dtype, divergence.dtype)  # rewards come in float32, also beside float64
    return placed.astype(dtype) - jnp.asarray(beta, dtype) * divergence.astype(dtype)


def return_to_go(
    reward: Float[Array, "P G T"], mask: Bool[Array, "P G T"], *, discount: float = 1.0, segments: Segments | None = None
) -> Float[Array, "P G T"]:
    """R_t = sum_{s >= t} discount^(s-t) r_s over the chosen tokens of the completion. Tokens count, not slots."""
    check_mask(mask, reward=reward)
    check_segments(segments, mask)
    check_range(0.0, 1.0, discount=discount)
    reward = jnp.where(mask, precise(reward), 0.0)
    return jnp.where(mask, _recurrence(reward, jnp.full_like(reward, discount), mask, segments), 0.0)


def gae(
    reward: Float[Array, "P G T"],
    value: Float[Array, "P G T"],
    mask: Bool[Array, "P G T"],
    *,
    discount: float = 1.0,
    lambda_: float | Array = 0.95,
    segments: Segments | None = None,
    bootstrap: Float[Array, "P G"] | None = None,
) -> Float[Array, "P G T"]:
    """A_t = delta_t + discount lambda A_{t+1}, delta_t = r_t + discount V_{t+1} - V_t (GAE, arXiv:1506.02438, Eq. 16).

    `reward[p, g, t]` follows token t, `value[p, g, t]` is V of the state *before* it. t + 1 is the next chosen token of
    the same completion. Behind the last one V is 0, the episode having ended there; where it was cut off by the token
    budget instead, give V of the state behind it as `bootstrap`. `lambda_` is a number, or an array that broadcasts to
    [P, G, T]. The critic's targets are `gae(...) + value`.

    Raises ValueError if shapes do not fit, or if `discount` or `lambda_` is not between 0 and 1.
    """
    check_mask(mask, reward=reward, value=value)
    check_segments(segments, mask)
    check_range(0.0, 1.0, discount=discount, lambda_=lambda_)
    if segments is not None and bootstrap is not None:
        raise ValueError("segments and bootstrap are given, but a packed row has no one state behind its last token; unpack it.")
    value = jnp.where(mask, precise(value), 0.0)
    reward = jnp.where(mask, precise(reward).astype(value.dtype), 0.0)
    follows, index = _follows(mask, segments)
    next_value = jnp.where(follows, jnp.take_along_axis(value, index, axis=-1), 0.0)
    if bootstrap is not None:
        next_value = jnp.where(mask & ~follows, precise(bootstrap).astype(value.dtype)[:, :, None], next_value)
    delta = jnp.where(mask, reward + discount * next_value - value, 0.0)
    decay = jnp.broadcast_to(jnp.asarray(lambda_, value.dtype) * discount, value.shape)
    return jnp.where(mask, _recurrence(delta, decay, mask, segments), 0.0)


def length_adaptive_gae(
    reward: Float[Array, "P G T"],
    value: Float[Array, "P G T"],
    mask: Bool[Array, "P G T"],
    *,
    alpha: float = 0.05,
    discount: float = 1.0,
    segments: Segments | None = None,
    bootstrap: Float[Array, "P G"] | None = None,
) -> Float[Array, "P G T"]:
    """GAE with lambda = 1 - 1/(alpha |o|), clipped to [0, 1], for each completion (VAPO, arXiv:2504.05118).

    The paper's formula is negative for |o| < 1/alpha (20 tokens at its alpha); there lambda is 0.

    Raises ValueError as `gae` does, or if `alpha` is not positive.
    """
    check_alpha(alpha)
    check_mask(mask, reward=reward, value=value)
    length = completion_sum(mask.astype(jnp.result_type(float)), segments)
    lambda_ = jnp.clip(1 - 1 / (alpha * jnp.maximum(length, 1)), 0.0, 1.0)
    return gae(reward, value, mask, discount=discount, lambda_=lambda_, segments=segments, bootstrap=bootstrap)


def step_returns(
    step_reward: Float[Array, "P G T"],
    step_end: Bool[Array, "P G T"],
    mask: Bool[Array, "P G T"],
    *,
    ddof: int = 0,
    epsilon: float = 1e-6,
) -> Float[Array, "P G T"]:
    """A_t = sum over the steps that end at or behind t of (r - mean R)/std R (DeepSeekMath, arXiv:2402.03300, 4.1.3).

    R is the set of all step rewards of the group. `step_end` is True on each step's last token; `step_reward` is read
    there and nowhere else, so a step reward of 0 counts. Tokens behind the last step's end get 0. With one step a
    completion, ending at its last token, this is `group_zscore`.

    Raises ValueError if shapes differ, if G is 1, or if `ddof` is not 0 or 1.
    """
    check_mask(mask, step_reward=step_reward, step_end=step_end)
    check_mask(step_end, name="step_end", meaning="a step ends")
    if known(step_reward) and known(step_end) and known(mask):
        rewards = np.asarray(step_reward, np.float64)
        bad = np.argwhere(np.asarray(step_end) & np.asarray(mask) & ~np.isfinite(rewards))
        if bad.size:
            place = tuple(int(i) for i in bad[0])
            raise ValueError(f"step_reward is {rewards[place]} at {place} ([P, G, T]), where a step ends; give it a finite number.")
    check_reward(jnp.zeros(mask.shape[:2]), name="the mask's [P, G]", group=True)
    check_deviation(ddof, epsilon)
    normalised = _whiten(precise(step_reward), step_end & mask, axes=(1, 2), ddof=ddof, epsilon=epsilon)
    return return_to_go(normalised, mask)


def check_alpha(alpha: float) -> None:
    """Raises ValueError if VAPO's alpha is not positive."""
    check_above(0.0, "; the paper's is 0.05", alpha=alpha)


def check_deviation(ddof: int, epsilon: float) -> None:
    """Raises ValueError if `ddof` is not 0 or 1, or `epsilon` is negative."""
    if ddof not in (0, 1):
        raise ValueError(f"ddof is {ddof!r}, but it must be 0 (population std) or 1 (sample std).")
    check_range(0.0, epsilon=epsilon)


def _whiten(value: Array, where: Array, *, axes: tuple[int, ...], ddof: int, epsilon: float) -> Array:
    """(x - mean)/(std + epsilon) over `axes`, of the entries in `where` only; 0 elsewhere and where all are equal."""
    value = jnp.where(where, value, 0.0)
    count = jnp.sum(where, axis=axes, keepdims=True).astype(value.dtype)
    mean = jnp.sum(value, axis=axes, keepdims=True) / jnp.maximum(count, 1)
    largest = jnp.max(value, axis=axes, keepdims=True, where=where, initial=-jnp.inf)
    smallest = jnp.min(value, axis=axes, keepdims=True, where=where, initial=jnp.inf)
    equal = largest <= smallest  # an empty set too
    centred = jnp.where(where & ~equal, value - mean, 0.0)
    # once more, for what the first mean lost to rounding where all values are far from 0
    again = jnp.sum(centred, axis=axes, keepdims=True) / jnp.maximum(count, 1)
    centred = jnp.where(where & ~equal, centred - again, 0.0)
    variance = jnp.sum(jnp.square(centred), axis=axes, keepdims=True) / jnp.maximum(count - ddof, 1)
    return centred / (jnp.sqrt(jnp.where(equal, 1.0, variance)) + epsilon)


def _next_chosen(mask: Array) -> Array:
    """The index of the next chosen token behind each slot; T where there is none."""
    tokens = mask.shape[-1]
    index = jnp.where(mask, jnp.arange(tokens, dtype=jnp.int32), tokens)  # of this slot or of the next chosen one
    behind = lax.cummin(index, axis=index.ndim - 1, reverse=True)
    return jnp.concatenate([behind[..., 1:], jnp.full_like(behind[..., :1], tokens)], axis=-1)


def _follows(mask: Array, segments: Array | None) -> tuple[Array, Array]:
    """(is there a next chosen token in the same completion, its index), for each chosen token."""
    tokens = mask.shape[-1]
    index = _next_chosen(mask)
    follows, index = mask & (index < tokens), jnp.minimum(index, tokens - 1)
    if segments is not None:
        follows &= jnp.take_along_axis(segments, index, axis=-1) == segments
    return follows, index


def _recurrence(increment: Array, decay: Array, mask: Array, segments: Array | None) -> Array:
    """x_t = increment_t + decay_t x_next, next being the next chosen token of the completion; masked slots pass x on."""
    follows, _ = _follows(mask, segments)
    decay = jnp.where(mask, jnp.where(follows, decay, 0.0), 1.0)
    return lax.platform_dependent(decay, increment, cpu=_token_by_token, default=_by_doubling)


def _token_by_token(decay: Array, increment: Array) -> Array:
    """x_t = increment_t + decay_t x_{t+1}, as a loop: what is quick on a CPU."""

    def step(behind: Array, here: tuple[Array, Array]) -> tuple[Array, Array]:
        x = here[1] + here[0] * behind
        return x, x

    rows = jnp.moveaxis(decay, -1, 0), jnp.moveaxis(increment, -1, 0)
    return jnp.moveaxis(lax.scan(step, jnp.zeros_like(rows[1][0]), rows, reverse=True)[1], 0, -1)


def _by_doubling(decay: Array, increment: Array) -> Array:
    """The same in log T steps, each of them on all tokens: what is quick on an accelerator."""

    def compose(later: tuple[Array, Array], earlier: tuple[Array, Array]) -> tuple[Array, Array]:
        return earlier[0] * later[0], earlier[1] + earlier[0] * later[1]

    return lax.associative_scan(compose, (decay, increment), axis=increment.ndim - 1, reverse=True)[1]
