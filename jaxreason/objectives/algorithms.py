"""Algorithms that compare a group's completions: each a function of its hyper-parameters that returns an `Algorithm`.

Names and defaults are the papers'; where a paper gives no value the docstring says whose it is. An experiment names one
by its function's name and keyword arguments: `getattr(objectives, "grpo")(beta=0.0)`. Absent: how rows are sampled and
filtered, and rewards themselves; both fill in `Signals`. `beta` may be a traced array, as an adaptive one is.

Algorithms without a ratio (likelihood, REINFORCE, preferences, distillation) are in `likelihoods`, those with a critic in
`critics`; what is added to any algorithm (a pull, a bonus, a correction) is in `additions`.
"""

from __future__ import annotations

from functools import partial

import jax.numpy as jnp
from jax import Array

from jaxreason.objectives import advantages, coefficients, weights
from jaxreason.objectives.additions import with_reference_pull
from jaxreason.objectives.arrays import Scalar, check_range, exponential, given, precise
from jaxreason.objectives.coefficients import check_temperatures, kept_by_log_clip
from jaxreason.objectives.kl import log_ratio
from jaxreason.objectives.parts import (
    CLIPPED,
    LIVE,
    by_mask,
    clipped_ratio,
    clipped_sequence_ratio,
    likelihood,
    of_reward,
    of_steps,
    of_zscore,
    spread,
)
from jaxreason.objectives.surrogate import Algorithm, Card, Signals

__all__ = [
    "grpo",
    "grpo_process",
    "dr_grpo",
    "lite_ppo",
    "dapo",
    "maxrl",
    "gspo",
    "gspo_token",
    "gmpo",
    "cispo",
    "sapo",
    "kimi_k15",
]

LATER_STEPS = "sum of later (R - mean(R)) / std(R)"


# ------------------------------------------------- GRPO and what changed its advantage or its weight


def grpo(
    *,
    beta: Scalar = 0.04,
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
    core = Algorithm(
        name="grpo",
        advantage=of_zscore(ddof, epsilon),
        weight=by_mask(weights.sequence_mean),
        group_baseline=True,
        card=Card(LIVE, "any", CLIPPED, "(r - mean(r)) / std(r)", "sequence_mean", "2402.03300"),
        **clipped_ratio(clip_low, clip_high),
    )
    return with_reference_pull(core, beta=beta, kind=kl)


def grpo_process(
    *,
    beta: Scalar = 0.04,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    ddof: int = 0,
    epsilon: float = 1e-6,
    kl: str = "k3",
) -> Algorithm:
    """GRPO with process supervision: A_t = sum of the normalised rewards of the steps that end at or behind t.

    DeepSeekMath, arXiv:2402.03300, section 4.1.3; all step rewards of the group are normalised together.
    """
    core = Algorithm(
        name="grpo_process",
        advantage=of_steps(ddof, epsilon),
        weight=by_mask(weights.sequence_mean),
        group_baseline=True,
        card=Card(LIVE, "process reward model", CLIPPED, LATER_STEPS, "sequence_mean", "2402.03300"),
        **clipped_ratio(clip_low, clip_high, needs={"steps", "step_end"}),
    )
    return with_reference_pull(core, beta=beta, kind=kl)


def dr_grpo(
    *,
    max_completion_tokens: int = 3000,
    beta: Scalar = 0.0,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    kl: str = "k3",
) -> Algorithm:
    """GRPO without its two biases: GC = m rho (r_i - mean r), no std, w = 1/(N L) (arXiv:2503.20783, section 3.2).

    `max_completion_tokens` is L, the run's constant token budget per completion; 3000 is the paper's run, and makes the
    gradients of a run of 100 tokens thirty times too small. Give yours: a config's is filled in.
    """
    check_range(1, max_completion_tokens=max_completion_tokens)
    core = Algorithm(
        name="dr_grpo",
        advantage=of_reward(advantages.group_centre),
        weight=by_mask(partial(weights.constant_length, max_completion_tokens=max_completion_tokens)),
        group_baseline=True,
        card=Card(LIVE, "rule", CLIPPED, "r - mean(r)", "constant_length", "2503.20783"),
        **clipped_ratio(clip_low, clip_high),
    )
    return with_reference_pull(core, beta=beta, kind=kl)


def lite_ppo(*, clip_low: float = 0.2, clip_high: float = 0.2, epsilon: float = 1e-6) -> Algorithm:
    """GC = m rho A, A = (r_i - mean r)/std of all rewards of the batch, w = 1/sum_i |o_i| (Lite PPO, arXiv:2508.08221).

    Section 5: a group's mean, the batch's standard deviation, PPO's symmetric clip, no critic, no KL. Here both the
    deviation and the sum of lengths are those of the whole update batch.
    """
    check_range(0.0, epsilon=epsilon)

    def advantage(signals: Signals) -> Array:
        reward = precise(given(signals.reward))
        # the rewards of the batch are those of its groups, as in the groups' means: only an empty group is padding
        present = jnp.broadcast_to(jnp.any(signals.mask, axis=(1, 2))[:, None, None], (*reward.shape, 1))
        scaled = advantages.batch_whiten(reward[:, :, None], present, epsilon=epsilon)[:, :, 0]
        return spread(advantages.group_centre(scaled), signals)

    return Algorithm(
        name="lite_ppo",
        advantage=advantage,
        weight=by_mask(weights.token_mean),
        group_baseline=True,
        card=Card(LIVE, "rule", CLIPPED, "(r - mean(r)) / std_batch(r)", "token_mean", "2508.08221"),
        **clipped_ratio(clip_low, clip_high),
    )


def dapo(*, clip_low: float = 0.2, clip_high: float = 0.28, ddof: int = 0, epsilon: float = 1e-6) -> Algorithm:
    """GRPO with clip-higher and token-mean weights: GC = m rho A, w = 1/sum_i |o_i|, no KL (DAPO, arXiv:2503.14476).

    Eq. 8 and 9. The paper prints the sum of lengths per group, averaged over prompts; like its released code, we divide by
    that of the whole batch. Its dynamic sampling and its overlong penalty are `shaping.dynamic_sampling` and
    `shaping.soft_overlong`.
    """
    return Algorithm(
        name="dapo",
        advantage=of_zscore(ddof, epsilon),
        weight=by_mask(weights.token_mean),
        group_baseline=True,
        card=Card("policy, several updates old; groups neither all right nor all wrong", "rule, soft overlong penalty",
                  CLIPPED, "(r - mean(r)) / std(r)", "token_mean", "2503.14476"),
        **clipped_ratio(clip_low, clip_high),
    )  # fmt: skip


def maxrl() -> Algorithm:
    """GC = (r_i - mean r)/mean r, w = 1/N, for on-policy rows and rewards 0 or 1 (MaxRL, arXiv:2602.02710, Alg. 1).

    A group without a success gets 0. Its expectation climbs log p(q), the likelihood of success, truncated after G - 1
    terms: it is w(p) grad p with w(p) = (1 - (1-p)^(G-1))/p (our derivation, tested by enumeration).
    """
    return Algorithm(
        name="maxrl",
        advantage=of_reward(advantages.relative_to_mean),
        coefficient=likelihood,
        weight=by_mask(weights.sequence_sum),
        needs=frozenset({"reward"}),
        group_baseline=True,
        card=Card("policy", "rule", "A", "(r - mean(r)) / mean(r)", "sequence_sum", "2602.02710"),
    )


# ------------------------------------------------- another treatment of the ratio


def gspo(
    *,
    clip_low: float = 3e-4,
    clip_high: float = 4e-4,
    beta: Scalar = 0.0,
    ddof: int = 0,
    epsilon: float = 1e-6,
    kl: str = "k3",
) -> Algorithm:
    """GC = m_i s_i A_i, s_i = exp(mean_t log rho_t), w = 1/(N |o_i|) (GSPO, arXiv:2507.18071, Eq. 5-7).

    A whole completion is kept or dropped. The clips are on s_i, whose scale is not a token ratio's: keep `logp_old` in
    float32, since rounding it to bfloat16 alone moves s_i by ten clips.
    """
    core = Algorithm(
        name="gspo",
        advantage=of_zscore(ddof, epsilon),
        weight=by_mask(weights.sequence_mean),
        group_baseline=True,
        card=Card(LIVE, "any", "m_seq * s * A", "(r - mean(r)) / std(r)", "sequence_mean", "2507.18071"),
        **clipped_sequence_ratio(clip_low, clip_high),
    )
    return with_reference_pull(core, beta=beta, kind=kl)


def gspo_token(
    *, clip_low: float = 3e-4, clip_high: float = 4e-4, beta: Scalar = 0.0, ddof: int = 0, epsilon: float = 1e-6, kl: str = "k3"
) -> Algorithm:
    """GC = m_t s_i A_t, the ratio being sg(s_i) pi/sg(pi), w = 1/(N |o_i|) (GSPO-token, arXiv:2507.18071, Eq. 13-14).

    For advantages that differ within a completion: A_t is `advantages.step_returns`. With one step a completion it is
    `gspo`; for other advantages, `gspo()._replace(advantage=...)` is the same objective.
    """
    core = Algorithm(
        name="gspo_token",
        advantage=of_steps(ddof, epsilon),
        weight=by_mask(weights.sequence_mean),
        group_baseline=True,
        card=Card(LIVE, "process reward model", "m_seq * s * A", LATER_STEPS, "sequence_mean", "2507.18071"),
        **clipped_sequence_ratio(clip_low, clip_high, needs={"steps", "step_end"}),
    )
    return with_reference_pull(core, beta=beta, kind=kl)


def gmpo(*, clip_low: float = 0.4, clip_high: float = 0.4, ddof: int = 0, epsilon: float = 1e-6) -> Algorithm:
    """GC = m_t c_i A_i, c_i the geometric mean of the clipped token ratios, w = 1/(N |o_i|) (GMPO, arXiv:2507.20673, Eq. 4).

    The clips are in nats: the paper's range (e^-0.4, e^0.4).
    """

    def coefficient(logp: Array, signals: Signals, advantage: Array) -> tuple[Array, Array]:
        return coefficients.geometric_mean(
            logp,
            given(signals.logp_old),
            advantage,
            signals.mask,
            clip_low=clip_low,
            clip_high=clip_high,
            segments=signals.segments,
        )

    def kept(logp: Array, signals: Signals, advantage: Array) -> Array:
        difference = log_ratio(logp, given(signals.logp_old), signals.mask)
        return kept_by_log_clip(difference, advantage, clip_low=clip_low, clip_high=clip_high)

    check_range(0.0, clip_low=clip_low, clip_high=clip_high)
    return Algorithm(
        name="gmpo",
        advantage=of_zscore(ddof, epsilon),
        coefficient=coefficient,
        weight=by_mask(weights.sequence_mean),
        needs=frozenset({"reward", "old"}),
        group_baseline=True,
        kept=kept,
        card=Card(LIVE, "any", "m_log * geo * A", "(r - mean(r)) / std(r)", "sequence_mean", "2507.20673"),
    )


def cispo(*, clip_low: float = 1.0, clip_high: float = 4.0, ddof: int = 0, epsilon: float = 1e-6) -> Algorithm:
    """GC = clip(rho, 1 - clip_low, 1 + clip_high) A, no token dropped, w = 1/sum_i |o_i| (MiniMax-M1, arXiv:2506.13585, Eq. 4-5).

    The paper has no lower bound (clip_low = 1) and does not publish the upper one; 4 is a choice of ours. It is relative to
    1: the largest weight is 5. The sum of lengths is the whole batch's, as in `dapo`. `policy/clip_fraction` counts
    the tokens whose weight is capped.
    """

    def coefficient(logp: Array, signals: Signals, advantage: Array) -> tuple[Array, Array]:
        return coefficients.clipped_importance(
            logp, given(signals.logp_old), advantage, signals.mask, clip_low=clip_low, clip_high=clip_high
        )

    def kept(logp: Array, signals: Signals, advantage: Array) -> Array:
        ratio = exponential(log_ratio(logp, given(signals.logp_old), signals.mask))
        return (ratio >= 1 - clip_low) & (ratio <= 1 + clip_high)

    check_range(0.0, clip_low=clip_low, clip_high=clip_high)
    return Algorithm(
        name="cispo",
        advantage=of_zscore(ddof, epsilon),
        coefficient=coefficient,
        weight=by_mask(weights.token_mean),
        needs=frozenset({"reward", "old"}),
        group_baseline=True,
        kept=kept,
        card=Card(LIVE, "any", "rho_clipped * A", "(r - mean(r)) / std(r)", "token_mean", "2506.13585"),
    )


def sapo(*, tau_positive: float = 1.0, tau_negative: float = 1.05, ddof: int = 0, epsilon: float = 1e-6) -> Algorithm:
    """GC = 4 g (1 - g) rho A, g = sigmoid(tau (rho - 1)), w = 1/(N |o_i|) (SAPO, arXiv:2511.20347, Eq. 5-6).

    A gate in place of a clip: nothing is dropped, everything fades with its distance from rho = 1.
    """

    def coefficient(logp: Array, signals: Signals, advantage: Array) -> tuple[Array, Array]:
        return coefficients.soft_gate(
            logp, given(signals.logp_old), advantage, signals.mask, tau_positive=tau_positive, tau_negative=tau_negative
        )

    check_temperatures(tau_positive, tau_negative)
    return Algorithm(
        name="sapo",
        advantage=of_zscore(ddof, epsilon),
        coefficient=coefficient,
        weight=by_mask(weights.sequence_mean),
        needs=frozenset({"reward", "old"}),
        group_baseline=True,
        card=Card(LIVE, "any", "4 * gate * (1 - gate) * rho * A", "(r - mean(r)) / std(r)", "sequence_mean", "2511.20347"),
    )


def kimi_k15(*, tau: float = 0.1) -> Algorithm:
    """GC = (r_i - mean r) - tau log(pi/pi_i)(y_i), of the whole completion, w = 1/N (Kimi k1.5, arXiv:2501.12599, Eq. 3).

    pi_i, the policy at the iteration's start, is `logp_old`; rows may be off-policy, and the paper resets the optimiser
    at each iteration. The paper does not publish tau: 0.1 is a choice of ours. Its length reward is `shaping.kimi_length`.
    """

    def coefficient(logp: Array, signals: Signals, advantage: Array) -> tuple[Array, Array]:
        return coefficients.mirror_descent(
            logp, given(signals.logp_old), advantage, signals.mask, tau=tau, segments=signals.segments
        )  # fmt: skip

    check_range(0.0, tau=tau)
    return Algorithm(
        name="kimi_k15",
        advantage=of_reward(advantages.group_centre),
        coefficient=coefficient,
        weight=by_mask(weights.sequence_sum),
        needs=frozenset({"reward", "old"}),
        group_baseline=True,
        card=Card("policy at the iteration's start, older rows allowed", "rule, length reward", "A - tau * L", "r - mean(r)",
                  "sequence_sum", "2501.12599"),
    )  # fmt: skip
