"""Parts that algorithms share: advantage functions of the signals, weights of the mask, and the clipped ratio's fields."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax.numpy as jnp
from jax import Array

from jaxreason.objectives import advantages, coefficients
from jaxreason.objectives.arrays import Scalar, check_range, exponential, given, precise
from jaxreason.objectives.coefficients import check_clip, kept_by_clip, sequence_ratio
from jaxreason.objectives.kl import log_ratio
from jaxreason.objectives.surrogate import Signals

LIVE = "policy, several updates old"
CLIPPED = "m * rho * A"


def spread(per_completion: Array, signals: Signals) -> Array:
    """One number per completion, given to each of its tokens."""
    return jnp.broadcast_to(per_completion[:, :, None], signals.mask.shape)


def of_reward(baseline: Callable[[Array], Array]) -> Callable[[Signals], Array]:
    """The advantage function of a baseline of rewards."""
    return lambda signals: spread(baseline(precise(given(signals.reward))), signals)


def by_mask(weight: Callable[..., Array]) -> Callable[[Signals], Array]:
    """The weight function of the signals, from one of the mask."""
    return lambda signals: weight(signals.mask, segments=signals.segments)


def likelihood(logp: Array, signals: Signals, advantage: Array) -> tuple[Array, Array]:
    """The coefficient function of an algorithm without a ratio."""
    return coefficients.likelihood(logp, advantage, signals.mask)


def of_zscore(ddof: int, epsilon: float) -> Callable[[Signals], Array]:
    """GRPO's advantage function; refuses a bad `ddof` now, not at the first batch."""
    advantages.check_deviation(ddof, epsilon)
    return of_reward(partial(advantages.group_zscore, ddof=ddof, epsilon=epsilon))


def of_steps(ddof: int, epsilon: float) -> Callable[[Signals], Array]:
    """The advantage function of process supervision."""
    advantages.check_deviation(ddof, epsilon)

    def advantage(signals: Signals) -> Array:
        return advantages.step_returns(
            given(signals.step_reward), given(signals.step_end), signals.mask, ddof=ddof, epsilon=epsilon
        )

    return advantage


def in_reward_needs(beta: Scalar) -> set[str]:
    """What a KL in the reward needs, if there is one."""
    return {"reference", "sampled"} if positive(beta) else set()


def positive(beta: Scalar) -> bool:
    """Whether the term is there at all: a traced beta may be 0, and is."""
    check_range(0.0, beta=beta)
    return isinstance(beta, Array) or beta != 0


def sampled_logp(signals: Signals) -> Array:
    """Of the policy that sampled: as the trainer computes it if it did, else as the sampler did."""
    return given(signals.logp_behaviour if signals.logp_old is None else signals.logp_old)


def token_reward(signals: Signals, beta: Scalar) -> Array:
    """The completion's reward on its last token, and -beta log(pi/pi_ref) on each."""
    reward, mask = given(signals.reward), signals.mask
    if not positive(beta):
        return advantages.at_last_token(reward, mask)
    return advantages.kl_in_reward(reward, sampled_logp(signals), given(signals.logp_ref), mask, beta=beta)


def gae_of(signals: Signals, beta: Scalar, estimator: Callable[..., Array]) -> Array:
    """The estimator on the signals; a truncated completion goes on in its value behind the last token, if that is given."""
    bootstrap = None
    if signals.value_behind is not None and signals.truncated is not None:
        bootstrap = jnp.where(signals.truncated, precise(signals.value_behind), 0.0)  # cut off is not finished
    return estimator(token_reward(signals, beta), given(signals.value), signals.mask, bootstrap=bootstrap)


def clipped_ratio(
    clip_low: float, clip_high: float, dual_clip: float | None = None, *, needs: set[str] | frozenset[str] = frozenset({"reward"})
) -> dict[str, Any]:
    """The fields that all with PPO's clip share."""
    clips: dict[str, Any] = {"clip_low": clip_low, "clip_high": clip_high, "dual_clip": dual_clip}
    check_clip(**clips)  # now, not at the first batch

    def coefficient(logp: Array, signals: Signals, advantage: Array) -> tuple[Array, Array]:
        return coefficients.clipped(logp, given(signals.logp_old), advantage, signals.mask, **clips)

    def kept(logp: Array, signals: Signals, advantage: Array) -> Array:
        return kept_by_clip(exponential(log_ratio(logp, given(signals.logp_old), signals.mask)), advantage, **clips)

    return {"coefficient": coefficient, "kept": kept, "needs": frozenset(needs) | {"old"}}


def clipped_sequence_ratio(
    clip_low: float, clip_high: float, *, needs: set[str] | frozenset[str] = frozenset({"reward"})
) -> dict[str, Any]:
    """The fields that the GSPO pair shares."""
    clips: dict[str, Any] = {"clip_low": clip_low, "clip_high": clip_high}
    check_clip(**clips)

    def coefficient(logp: Array, signals: Signals, advantage: Array) -> tuple[Array, Array]:
        return coefficients.sequence_clipped(
            logp, given(signals.logp_old), advantage, signals.mask, segments=signals.segments, **clips
        )  # fmt: skip

    def kept(logp: Array, signals: Signals, advantage: Array) -> Array:
        ratio = sequence_ratio(logp, given(signals.logp_old), signals.mask, segments=signals.segments)
        return kept_by_clip(ratio, advantage, **clips)

    return {"coefficient": coefficient, "kept": kept, "needs": frozenset(needs) | {"old"}}
