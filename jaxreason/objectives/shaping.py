"""Shaping: what is made of rewards, lengths and masks before `prepare`, once, because it needs the group or the batch.

`[P, G]` arrays in and out, the group is axis 1. Absent: what decides correctness; rules are in `jaxreason.rewards`.
"""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float, Integer

from jaxreason.objectives.advantages import check_deviation, group_zscore, zero_variance
from jaxreason.objectives.arrays import check_above, check_range, check_reward, precise

Lengths = Float[Array, "P G"] | Integer[Array, "P G"]


def lengths(mask: Bool[Array, "P G T"]) -> Integer[Array, "P G"]:
    """|o_i|, the chosen tokens of each completion."""
    return jnp.sum(mask, axis=-1)


def soft_overlong(length: Lengths, *, max_completion_tokens: int, buffer_tokens: int) -> Float[Array, "P G"]:
    """0 up to L - B, then (L - B - |o|)/B, down to -1 at L and beyond; add it to the reward (DAPO, arXiv:2503.14476, Eq. 13).

    L is `max_completion_tokens`, the whole budget (20,480 in the paper), and B is `buffer_tokens`, its last part (4,096).

    Raises ValueError unless 0 < B <= L.
    """
    check_range(1, max_completion_tokens, buffer_tokens=buffer_tokens)
    over = (max_completion_tokens - buffer_tokens - precise(length)) / buffer_tokens
    return jnp.clip(over, -1.0, 0.0)


def kimi_length(length: Lengths, correct: Bool[Array, "P G"]) -> Float[Array, "P G"]:
    """lambda = 0.5 - (|o| - min)/(max - min) over the group; lambda if correct, else min(0, lambda).

    Kimi k1.5, arXiv:2501.12599, section 2.3.3: 0 for all where all lengths are equal. Add it to the reward times a weight,
    which the paper keeps at 0 at first.

    Raises ValueError if shapes differ, or if `correct` is not boolean [P, G].
    """
    _check_correct(correct)
    if jnp.shape(length) != jnp.shape(correct):
        raise ValueError(f"length has shape {jnp.shape(length)} and correct {jnp.shape(correct)}, but both must be [P, G].")
    length = precise(length)
    shortest, longest = jnp.min(length, axis=1, keepdims=True), jnp.max(length, axis=1, keepdims=True)
    equal = longest == shortest
    share = 0.5 - (length - shortest) / jnp.where(equal, 1.0, longest - shortest)
    return jnp.where(equal, 0.0, jnp.where(correct, share, jnp.minimum(share, 0.0)))


def normalise_then_sum(
    parts: Float[Array, "P G R"],
    weight: Float[Array, " R"],
    *,
    applies: Bool[Array, "P G R"] | None = None,
    ddof: int = 0,
    epsilon: float = 1e-6,
) -> Float[Array, "P G"]:
    """sum_k weight_k * group_zscore(reward part k): a part counts by its weight, not by its spread (GDPO, arXiv:2601.05242).

    Its Eq. 4 and 5; its Eq. 6 then normalises over the batch, which is `advantages.batch_whiten`. The result is an
    advantage already: `grpo()._replace(advantage=...)`, or an algorithm without a std of its own. Where a part does not
    apply to a row, it adds nothing to it, and the others of the group are compared among themselves.

    Raises ValueError if shapes do not fit, if G is 1, or if a reward is NaN.
    """
    if len(jnp.shape(parts)) != 3 or jnp.shape(weight) != jnp.shape(parts)[2:]:
        raise ValueError(f"parts have shape {jnp.shape(parts)} and weight {jnp.shape(weight)}; they must be [P, G, R] and [R].")
    if applies is not None and jnp.shape(applies) != jnp.shape(parts):
        raise ValueError(f"applies has shape {jnp.shape(applies)} and parts {jnp.shape(parts)}; they must be the same.")
    parts = precise(parts)
    if applies is None:
        scores = [group_zscore(parts[:, :, k], ddof=ddof, epsilon=epsilon) for k in range(parts.shape[2])]
    else:
        scores = [_zscore_where(parts[:, :, k], applies[:, :, k], ddof, epsilon) for k in range(parts.shape[2])]
    weight = precise(weight).astype(parts.dtype)
    return sum((weight[k] * score for k, score in enumerate(scores)), jnp.zeros_like(parts[:, :, 0]))


def dynamic_sampling(correct: Bool[Array, "P G"]) -> Bool[Array, " P"]:
    """True for the groups with 0 < #correct < G, which alone teach anything (DAPO, arXiv:2503.14476, Eq. 11).

    Correctness, not the total reward: a format reward or a length penalty makes all-wrong groups differ without any
    answer being right. Keep the groups, or empty the others' masks (`mask & keep[:, None, None]`): empty rows are in
    no denominator.

    Raises ValueError if `correct` is not boolean [P, G].
    """
    _check_correct(correct)
    return jnp.any(correct, axis=1) & ~jnp.all(correct, axis=1)


def without_truncated(mask: Bool[Array, "P G T"], truncated: Bool[Array, "P G"]) -> Bool[Array, "P G T"]:
    """The mask without the completions that the token budget cut off (DAPO's overlong filtering).

    Made of the mask, so they leave the denominators too. Their rewards still count in their group's baseline.
    """
    return mask & ~truncated[:, :, None]


def adaptive_kl(beta: Float[Array, ""] | float, kl: Float[Array, ""], *, target: float, gain: float = 0.1) -> Float[Array, ""]:
    """beta (1 + gain * clip(KL/target - 1, -0.2, 0.2)): a KL weight that keeps to a target (Ziegler, arXiv:1909.08593, 2.2).

    `kl` and `target` are in the same unit, nats per completion in the paper. Its gain is 0.1; code often has
    (completions of the step)/(a horizon) there. Call it once a step, keep beta in the training state, and so in the
    checkpoint, and hand it to an algorithm as a traced array.

    Raises ValueError if `target` is not positive, or `gain` is negative.
    """
    check_above(0.0, ", being a divergence in nats", target=target)
    check_range(0.0, gain=gain)
    error = jnp.clip(precise(kl) / target - 1, -0.2, 0.2)
    return jnp.asarray(beta, error.dtype) * (1 + gain * error)


def _check_correct(correct: Array) -> None:
    dtype, shape = jnp.result_type(correct), jnp.shape(correct)
    if dtype != jnp.bool_ or len(shape) != 2:
        raise ValueError(
            f"correct has dtype {dtype} and shape {shape}, but it must be boolean [P, G]; turn rewards into it with reward > 0."
        )


def _zscore_where(part: Array, applies: Array, ddof: int, epsilon: float) -> Array:
    """`group_zscore` of the rows [P, G] where a part applies, among themselves; 0 elsewhere."""
    check_deviation(ddof, epsilon)
    known = jnp.where(applies, part, jnp.max(jnp.where(applies, part, -jnp.inf), axis=1, keepdims=True))
    known = jnp.where(jnp.any(applies, axis=1, keepdims=True), known, 0.0)  # the largest known one: it changes no extreme
    check_reward(known, group=True)
    moved = known - known[:, :1]
    count = jnp.sum(applies, axis=1, keepdims=True).astype(part.dtype)
    mean = jnp.sum(jnp.where(applies, moved, 0.0), axis=1, keepdims=True) / jnp.maximum(count, 1.0)
    centred = jnp.where(applies & ~zero_variance(known)[:, None], moved - mean, 0.0)
    variance = jnp.sum(jnp.square(centred), axis=1, keepdims=True) / jnp.maximum(count - ddof, 1.0)
    std = jnp.sqrt(jnp.where(zero_variance(known)[:, None], 1.0, variance))
    return centred / (std + epsilon)
