"""Algorithms: each a function of its hyper-parameters that returns an `Algorithm`, with the paper's defaults.

An experiment names one by its function's name and keyword arguments: `getattr(objectives, "grpo")(beta=0.0)`.
Absent: what happens outside the loss. How rows are sampled and filtered, and KL or length terms in the reward,
belong to whoever fills in `Signals`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import jax.numpy as jnp
from jax import Array

from jaxreason.objectives import advantages, coefficients, weights
from jaxreason.objectives.kl import log_ratio, reference_pull
from jaxreason.objectives.surrogate import Algorithm, Signals


def sft() -> Algorithm:
    """Maximum likelihood of given completions: GC = 1, w = 1/(N |o_i|) (DeepSeekMath, arXiv:2402.03300, Eq. 6-7)."""
    return Algorithm(
        name="sft",
        advantage=lambda signals: jnp.ones(signals.mask.shape, jnp.result_type(float)),
        coefficient=_likelihood,
        weight=weights.sequence_mean,
    )


def reinforce() -> Algorithm:
    """REINFORCE without a baseline: GC = r, w = 1/N, for on-policy rows (Williams, 1992)."""
    return Algorithm(
        name="reinforce",
        advantage=_of_reward(lambda reward: reward),
        coefficient=_likelihood,
        weight=weights.sequence_sum,
        needs=frozenset({"reward"}),
    )


def rloo() -> Algorithm:
    """REINFORCE with a leave-one-out baseline: GC = r_i - mean_{j != i} r_j, w = 1/N (RLOO, arXiv:2402.14740).

    The whole completion is one action, so there is no 1/|o|, and no ratio: rows must be on-policy.
    The paper's KL is part of the reward, so it is not here.
    """
    return Algorithm(
        name="rloo",
        advantage=_of_reward(advantages.leave_one_out),
        coefficient=_likelihood,
        weight=weights.sequence_sum,
        needs=frozenset({"reward"}),
        group_baseline=True,
    )


def grpo(
    *,
    beta: float = 0.04,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    ddof: int = 0,
    epsilon: float = 1e-6,
    kl: str = "k3",
) -> Algorithm:
    """GC = m rho A + beta (pi_ref/pi - 1), A = (r_i - mean r)/std r, w = 1/(N |o_i|).

    DeepSeekMath, arXiv:2402.03300, Eq. 3 and 21 (outcome supervision). The paper gives beta, but neither the clip
    range (PPO's usual 0.2 is taken) nor which standard deviation (see `advantages.group_zscore`).
    With `beta=0` no reference is needed.
    """
    return Algorithm(
        name="grpo",
        advantage=_of_reward(partial(advantages.group_zscore, ddof=ddof, epsilon=epsilon)),
        weight=weights.sequence_mean,
        group_baseline=True,
        **_clipped_parts(clip_low=clip_low, clip_high=clip_high, beta=beta, kl=kl),
    )


def dr_grpo(
    *,
    max_completion_tokens: int,
    beta: float = 0.0,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    kl: str = "k3",
) -> Algorithm:
    """GRPO without its two biases: GC = m rho (r_i - mean r), no std, w = 1/(N L) (arXiv:2503.20783, section 3.2).

    `max_completion_tokens` is L, the run's constant token budget per completion.
    """
    return Algorithm(
        name="dr_grpo",
        advantage=_of_reward(advantages.group_centre),
        weight=partial(weights.constant_length, max_completion_tokens=max_completion_tokens),
        group_baseline=True,
        **_clipped_parts(clip_low=clip_low, clip_high=clip_high, beta=beta, kl=kl),
    )


def dapo(*, clip_low: float = 0.2, clip_high: float = 0.28, ddof: int = 0, epsilon: float = 1e-6) -> Algorithm:
    """GRPO with clip-higher and token-mean weights: GC = m rho A, w = 1/sum_i |o_i|, no KL (DAPO, arXiv:2503.14476).

    Sections 3.1 and 3.3 of the paper: coefficient and weight only. Its dynamic sampling chooses which groups enter the
    batch, and its overlong penalty is a reward: neither is here.
    """
    return Algorithm(
        name="dapo",
        advantage=_of_reward(partial(advantages.group_zscore, ddof=ddof, epsilon=epsilon)),
        weight=weights.token_mean,
        group_baseline=True,
        **_clipped_parts(clip_low=clip_low, clip_high=clip_high, beta=0.0, kl="k3"),
    )


def _of_reward(baseline: Callable[[Array], Array]) -> Callable[[Signals], Array]:
    """One advantage per completion, given to each of its tokens."""

    def advantage(signals: Signals) -> Array:
        assert signals.reward is not None  # `prepare` has asked for it
        return jnp.broadcast_to(baseline(signals.reward)[:, :, None], signals.mask.shape)

    return advantage


def _likelihood(logp: Array, signals: Signals, advantage: Array) -> tuple[Array, Array]:
    return coefficients.likelihood(logp, advantage, signals.mask)


def _clipped_parts(*, clip_low: float, clip_high: float, beta: float, kl: str) -> dict:
    """The fields that GRPO's family shares: a clipped surrogate and, beside it, a pull to the reference."""
    if kl not in ("k1", "k2", "k3"):
        raise ValueError(f"kl is {kl!r}, but it must be 'k1', 'k2' or 'k3'.")
    for name, value in (("beta", beta), ("clip_low", clip_low), ("clip_high", clip_high)):
        if value < 0:
            raise ValueError(f"{name} is {value}, but it must be 0 or more.")

    def coefficient(logp: Array, signals: Signals, advantage: Array) -> tuple[Array, Array]:
        assert signals.logp_old is not None
        push, objective = coefficients.clipped(
            logp, signals.logp_old, advantage, signals.mask, clip_low=clip_low, clip_high=clip_high
        )
        if beta == 0:
            return push, objective
        assert signals.logp_ref is not None  # `policy_loss` has asked for it
        pull, minus_kl = reference_pull(logp, signals.logp_ref, signals.mask, kind=kl)
        return push + beta * pull, objective + beta * minus_kl

    def kept(logp: Array, signals: Signals, advantage: Array) -> Array:
        assert signals.logp_old is not None
        ratio = jnp.exp(log_ratio(logp, signals.logp_old, signals.mask))
        return coefficients.kept_by_clip(ratio, advantage, clip_low=clip_low, clip_high=clip_high)

    needs = {"reward", "old"} | ({"reference"} if beta != 0 else set())
    return {"coefficient": coefficient, "kept": kept, "needs": frozenset(needs)}
