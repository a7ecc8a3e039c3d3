"""Algorithms without a ratio: likelihood of chosen rows, REINFORCE and its baselines, preferences, distillation.

Most have the same coefficient, 1 or a reward. What sets them apart is the data source, which is the first column of the
table, and which the caller provides: sampling, filtering and hints are not here. Rows of the REINFORCE kind are on-policy.
"""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array

from jaxreason.objectives import advantages, coefficients, preferences, weights
from jaxreason.objectives.arrays import Scalar, check_pairs, given, precise
from jaxreason.objectives.kl import log_ratio
from jaxreason.objectives.parts import by_mask, in_reward_needs, likelihood, of_reward, sampled_logp, spread
from jaxreason.objectives.surrogate import Algorithm, Card, Signals

__all__ = [
    "sft",
    "rft",
    "online_rft",
    "star",
    "sequence_distillation",
    "on_policy_distillation",
    "dpo",
    "reinforce",
    "rloo",
    "remax",
]

REWARD = frozenset({"reward"})


def sft() -> Algorithm:
    """Maximum likelihood of given completions: GC = 1, w = 1/(N |o_i|) (DeepSeekMath, arXiv:2402.03300, Eq. 6-7)."""
    return _likelihood_of_all("sft", Card("demonstrations", "none", "1", "1", "sequence_mean", "2402.03300"))


def sequence_distillation() -> Algorithm:
    """Maximum likelihood of a teacher's completions: GC = 1, w = 1/(N |o_i|) (sequence-level KD, arXiv:1606.07947).

    `sft` on other data. The paper's completions are the teacher's best by beam search; R1's distillation samples them.
    """
    return _likelihood_of_all("sequence_distillation", Card("teacher", "none", "1", "1", "sequence_mean", "1606.07947"))


def rft(*, correct_above: float = 0.0) -> Algorithm:
    """Rejection sampling: GC = [o correct], w = 1/(N |o_i|), rows from the frozen SFT model (arXiv:2402.03300, Eq. 8-10).

    Correct is a reward above `correct_above`. N counts the wrong ones too, as the paper's expectation does; to divide by
    the correct ones only, see `star`.
    """
    card = Card("SFT model, before training", "rule", "A", "correct", "sequence_mean", "2402.03300")
    return _likelihood_of_correct("rft", card, correct_above)


def online_rft(*, correct_above: float = 0.0) -> Algorithm:
    """RFT with rows from the live policy: GC = [o correct], w = 1/(N |o_i|) (DeepSeekMath, arXiv:2402.03300, Eq. 11)."""
    card = Card("policy", "rule", "A", "correct", "sequence_mean", "2402.03300")
    return _likelihood_of_correct("online_rft", card, correct_above)


def star(*, correct_above: float = 0.0) -> Algorithm:
    """STaR: GC = [o correct], w = 1/(N' |o_i|), N' the correct completions: SFT on what was kept (arXiv:2203.14465, Eq. 2).

    The last round's model writes, greedily, and problems it failed are tried again with the answer as a hint, which is
    cut out before training; the model starts from the base again each round. All of that is the caller's.
    """

    def weight(signals: Signals) -> Array:
        kept = signals.mask & (precise(given(signals.reward)) > correct_above)[:, :, None]
        return weights.sequence_mean(kept, segments=signals.segments)

    source = "last round's model; problems it failed again, with a hint"
    card = Card(source, "rule", "A", "correct", "sequence_mean of correct", "2203.14465")
    return _likelihood_of_correct("star", card, correct_above)._replace(weight=weight)


def reinforce() -> Algorithm:
    """REINFORCE without a baseline: GC = r, w = 1/N, for on-policy rows (Williams, 1992)."""
    return Algorithm(
        name="reinforce",
        advantage=of_reward(lambda reward: reward),
        coefficient=likelihood,
        weight=by_mask(weights.sequence_sum),
        needs=REWARD,
        card=Card("policy", "any", "A", "r", "sequence_sum", "Williams 1992"),
    )


def rloo(*, beta: Scalar = 0.0) -> Algorithm:
    """REINFORCE with a leave-one-out baseline: GC = R_i - mean_{j != i} R_j, w = 1/N (RLOO, arXiv:2402.14740, section 2.3).

    R = r - beta sum_t log(pi/pi_ref), the KL of the completion inside its reward; the paper's beta is 0.03 or 0.10 by data
    set, and 0 here. The whole completion is one action, so there is no 1/|o|, and no ratio: rows must be on-policy.
    """
    regularising = in_reward_needs(beta)

    def advantage(signals: Signals) -> Array:
        reward = precise(given(signals.reward))
        if regularising:
            divergence = jnp.sum(log_ratio(sampled_logp(signals), given(signals.logp_ref), signals.mask), axis=-1)
            reward = reward - jnp.asarray(beta, reward.dtype) * divergence.astype(reward.dtype)
        return spread(advantages.leave_one_out(reward), signals)

    return Algorithm(
        name="rloo",
        advantage=advantage,
        coefficient=likelihood,
        weight=by_mask(weights.sequence_sum),
        needs=REWARD | regularising,
        group_baseline=True,
        card=Card("policy", "any; KL to the reference in it", "A", "r - mean_of_others(r)", "sequence_sum", "2402.14740"),
    )


def remax() -> Algorithm:
    """REINFORCE with the greedy completion's reward as baseline: GC = r_i - r(greedy), w = 1/N (ReMax, arXiv:2310.10505)."""
    return Algorithm(
        name="remax",
        advantage=lambda signals: spread(advantages.greedy_baseline(given(signals.reward), given(signals.greedy_reward)), signals),
        coefficient=likelihood,
        weight=by_mask(weights.sequence_sum),
        needs=REWARD | {"greedy"},
        card=Card("policy, and its greedy completion", "any", "A", "r - r_greedy", "sequence_sum", "2310.10505"),
    )


def dpo(*, beta: float = 0.1, loss: str = "sigmoid", margin: str = "sum", label_smoothing: float = 0.0) -> Algorithm:
    """GC = +-beta sigmoid(-M), M = beta (l(chosen) - l(rejected)), for pairs [P, 2, T], chosen first.

    DPO, arXiv:2305.18290, Eq. 7 (`margin="sum"`, w = 1/P), and DeepSeekMath's length-normalised Eq. 12 (`margin="mean"`,
    w = 1/(P |o|)); `loss` is "sigmoid", "ipo", "hinge" or "robust". See `preferences.preference`.
    """
    preferences.check_settings(beta=beta, loss=loss, margin=margin, label_smoothing=label_smoothing)

    def advantage(signals: Signals) -> Array:
        check_pairs(signals.mask, name="Signals.mask")
        _check_unpacked(signals)
        return jnp.broadcast_to(jnp.asarray([1.0, -1.0], jnp.result_type(float))[None, :, None], signals.mask.shape)

    def coefficient(logp: Array, signals: Signals, advantage: Array) -> tuple[Array, Array]:
        _check_unpacked(signals)
        return preferences.preference(
            logp, given(signals.logp_ref), signals.mask, beta=beta, loss=loss, margin=margin, label_smoothing=label_smoothing
        )

    weight = weights.group_sum if margin == "sum" else weights.group_mean
    slope = {
        "sigmoid": "beta * sigmoid(-M)",
        "ipo": "-2 * (M / beta - 1 / (2 * beta))",
        "hinge": "beta * (M < 1)",
        "robust": "beta * ((1 - e) * sigmoid(-M) + e * sigmoid(M)) / (1 - 2 * e)",
    }[loss]
    return Algorithm(
        name="dpo",
        advantage=advantage,
        coefficient=coefficient,
        weight=lambda signals: weight(signals.mask),
        needs=frozenset({"reference"}),
        card=Card("SFT model, pairs", "preference", f"A * {slope}", "+1 chosen, -1 rejected", weight.__name__, "2305.18290"),
    )


def on_policy_distillation() -> Algorithm:
    """GC = rho (log pi_T - log pi), token by token, w = 1/sum_i |o_i|: reverse KL to a teacher on the policy's own rows.

    After GKD, arXiv:2306.13649, whose own divergence on the policy's rows is the forward one; sampled reverse KL
    with discount 0. See `coefficients.reverse_kl`, and `heads.forward_kl` where the teacher's logits are at hand.
    """

    def coefficient(logp: Array, signals: Signals, advantage: Array) -> tuple[Array, Array]:
        pull, objective = coefficients.reverse_kl(logp, given(signals.logp_teacher), given(signals.logp_old), signals.mask)
        return advantage * pull, advantage * objective

    return Algorithm(
        name="on_policy_distillation",
        advantage=_ones,
        coefficient=coefficient,
        weight=by_mask(weights.token_mean),
        needs=frozenset({"teacher", "old"}),
        card=Card("policy", "teacher's log-probability", "rho * (log_teacher - log_pi)", "1", "token_mean", "2306.13649"),
    )


def _check_unpacked(signals: Signals) -> None:
    if signals.segments is not None:
        raise ValueError("Signals.segments is given, but a preference is a pair of rows, [P, 2, T]; do not pack pairs.")


def _ones(signals: Signals) -> Array:
    return jnp.ones(signals.mask.shape, jnp.result_type(float))


def _likelihood_of_all(name: str, card: Card) -> Algorithm:
    return Algorithm(name=name, advantage=_ones, coefficient=likelihood, weight=by_mask(weights.sequence_mean), card=card)


def _likelihood_of_correct(name: str, card: Card, correct_above: float) -> Algorithm:
    return Algorithm(
        name=name,
        advantage=of_reward(lambda reward: (reward > correct_above).astype(reward.dtype)),
        coefficient=likelihood,
        weight=by_mask(weights.sequence_mean),
        needs=REWARD,
        card=card,
    )
