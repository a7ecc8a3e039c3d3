"""Algorithms with a critic, or with the whole batch as their baseline; each a function that returns an `Algorithm`.

The critic itself is trained beside them, by `heads.value_loss`, towards the `returns` of the algorithm; here it has spoken
already, in `Signals.value`.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax.numpy as jnp
from jax import Array

from jaxreason.objectives import advantages, coefficients, weights
from jaxreason.objectives.additions import with_reference_pull
from jaxreason.objectives.arrays import Scalar, check_above, check_range, given, precise
from jaxreason.objectives.parts import CLIPPED, LIVE, by_mask, clipped_ratio, gae_of, in_reward_needs, spread, token_reward
from jaxreason.objectives.surrogate import Algorithm, Card, Signals

__all__ = ["ppo", "vapo", "reinforce_plus_plus", "reinforce_plus_plus_baseline", "decoupled_ppo"]


def ppo(
    *,
    discount: float = 1.0,
    lambda_: float = 0.95,
    beta: Scalar = 0.0,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float | None = None,
) -> Algorithm:
    """GC = m rho A_t, A = GAE(discount, lambda) over r_t = [t last] r - beta log(pi_old/pi_ref), w = 1/(N |o_i|).

    PPO, arXiv:1707.06347, Eq. 7 (clip 0.2), with language as DeepSeekMath, arXiv:2402.03300, Eq. 15-18, writes it: the
    KL is in the reward (InstructGPT: beta 0.02), and each completion is a mean over its tokens. The discount is
    InstructGPT's 1; lambda is the paper's 0.95, and long completions want 1. The advantage is not whitened, as in
    much code it is: see `advantages.batch_whiten`. The critic's returns are A_t + V_t.
    """
    check_range(0.0, 1.0, discount=discount, lambda_=lambda_)

    def advantage(signals: Signals) -> Array:
        return gae_of(signals, beta, partial(advantages.gae, discount=discount, lambda_=lambda_))

    return Algorithm(
        name="ppo",
        advantage=advantage,
        returns=lambda signals: advantage(signals) + precise(given(signals.value)),
        weight=by_mask(weights.sequence_mean),
        card=Card(LIVE, "any; KL to the reference in it", CLIPPED, "GAE(r - beta l)", "sequence_mean", "1707.06347"),
        **clipped_ratio(clip_low, clip_high, dual_clip, needs={"reward", "value"} | in_reward_needs(beta)),
    )


class Imitating(NamedTuple):
    """VAPO's two constants of a token: its advantage, and what the likelihood of correct completions adds."""

    gae: Array
    imitation: Array


def vapo(
    *,
    alpha: float = 0.05,
    discount: float = 1.0,
    clip_low: float = 0.2,
    clip_high: float = 0.28,
    imitation: float = 0.1,
    correct_above: float = 0.0,
) -> Algorithm:
    """GC = m rho A_t + mu [correct] sum|o|/sum_correct|o|, w = 1/sum_i |o_i| (VAPO, arXiv:2504.05118, Eq. 5, 8-10).

    A is GAE with lambda = 1 - 1/(alpha |o|); the critic's returns are those of lambda 1. mu is `imitation`: the second term is
    the mean likelihood of all tokens of correct completions (reward > `correct_above`), a constant of the whole batch.
    """
    check_range(0.0, imitation=imitation)
    check_range(0.0, 1.0, discount=discount)
    advantages.check_alpha(alpha)

    def advantage(signals: Signals) -> Imitating:
        adaptive = partial(advantages.length_adaptive_gae, alpha=alpha, discount=discount)
        correct = signals.mask & (precise(given(signals.reward)) > correct_above)[:, :, None]
        gae = gae_of(signals, 0.0, adaptive)
        share = jnp.sum(signals.mask).astype(gae.dtype) / jnp.maximum(jnp.sum(correct), 1).astype(gae.dtype)
        return Imitating(gae, jnp.where(correct, imitation * share, 0.0))

    core = clipped_ratio(clip_low, clip_high, needs={"reward", "value"})

    def coefficient(logp: Array, signals: Signals, advantage: Imitating) -> tuple[Array, Array]:
        push, objective = core["coefficient"](logp, signals, advantage.gae)
        imitate, likelihood_ = coefficients.likelihood(logp, advantage.imitation, signals.mask)
        return push + imitate, objective + likelihood_

    def kept(logp: Array, signals: Signals, advantage: Imitating) -> Array:
        return core["kept"](logp, signals, advantage.gae)

    def returns(signals: Signals) -> Array:
        return gae_of(signals, 0.0, partial(advantages.gae, discount=discount, lambda_=1.0)) + precise(given(signals.value))

    return Algorithm(
        name="vapo",
        advantage=advantage,
        returns=returns,
        weight=by_mask(weights.token_mean),
        card=Card(LIVE, "rule", CLIPPED + " + mu * correct * tokens / correct_tokens", "GAE(r), lambda = 1 - 1/(alpha |o|)",
                  "token_mean", "2504.05118"),
        coefficient=coefficient,
        kept=kept,
        needs=core["needs"],
    )  # fmt: skip


def reinforce_plus_plus(*, beta: Scalar = 0.001, clip_low: float = 0.2, clip_high: float = 0.2, epsilon: float = 1e-8) -> Algorithm:
    """GC = m rho A, A = whitened over the batch (r_i - beta sum_{s >= t} log(pi_old/pi_ref)_s), w = 1/(N |o_i|).

    REINFORCE++, arXiv:2501.03262v9, Eq. 1, 4 and 5; beta and clip as in its v2. Mean and deviation are over all chosen
    tokens of the batch, as in its code; the paper's text also speaks of samples.
    """
    check_range(0.0, epsilon=epsilon)

    def advantage(signals: Signals) -> Array:
        returns = advantages.return_to_go(token_reward(signals, beta), signals.mask)
        return advantages.batch_whiten(returns, signals.mask, epsilon=epsilon)

    return Algorithm(
        name="reinforce_plus_plus",
        advantage=advantage,
        weight=by_mask(weights.sequence_mean),
        card=Card(LIVE, "any; KL to the reference in it", CLIPPED, "whiten(r - beta l to go)", "sequence_mean", "2501.03262"),
        **clipped_ratio(clip_low, clip_high, needs={"reward"} | in_reward_needs(beta)),
    )


def reinforce_plus_plus_baseline(
    *, beta: Scalar = 0.0, clip_low: float = 0.2, clip_high: float = 0.2, epsilon: float = 1e-8, kl: str = "k2"
) -> Algorithm:
    """GC = m rho A - beta l, A = r_i - mean r of the group, whitened over the batch, w = 1/(N |o_i|).

    REINFORCE++ with baseline, arXiv:2501.03262v9, Eq. 6-8: its KL is k2 in the loss, and its weight is not stated, so 0.
    The batch's statistics are over chosen tokens here, over samples in the paper.
    """
    check_range(0.0, epsilon=epsilon)

    def advantage(signals: Signals) -> Array:
        centred = spread(advantages.group_centre(given(signals.reward)), signals)
        return advantages.batch_whiten(centred, signals.mask, epsilon=epsilon)

    core = Algorithm(
        name="reinforce_plus_plus_baseline",
        advantage=advantage,
        weight=by_mask(weights.sequence_mean),
        group_baseline=True,
        card=Card(LIVE, "any", CLIPPED, "whiten(r - mean(r))", "sequence_mean", "2501.03262"),
        **clipped_ratio(clip_low, clip_high),
    )
    return with_reference_pull(core, beta=beta, kind=kl)


def decoupled_ppo(*, clip_low: float = 0.2, clip_high: float = 0.2, cap: float | None = None, epsilon: float = 1e-8) -> Algorithm:
    """GC = (pi_old/pi_behaviour) m rho A, rho = pi/pi_old, A = the reward whitened over the batch, w = 1/sum_i |o_i|.

    AReaL, arXiv:2505.24298, Eq. 4-5, after arXiv:2110.00641: rows come from policies several updates old, perhaps from
    more than one within a completion, while the clip is around the newest. No critic, discount and lambda 1; the paper
    does not say its weight: token mean is taken. `cap` bounds the first ratio; the paper has no bound.
    """
    check_range(0.0, epsilon=epsilon)
    check_above(0.0, cap=cap)

    def advantage(signals: Signals) -> Array:
        return advantages.batch_whiten(spread(precise(given(signals.reward)), signals), signals.mask, epsilon=epsilon)

    def coefficient(logp: Array, signals: Signals, advantage: Array) -> tuple[Array, Array]:
        return coefficients.decoupled(
            logp, given(signals.logp_old), given(signals.logp_behaviour), advantage, signals.mask,
            clip_low=clip_low, clip_high=clip_high, cap=cap,
        )  # fmt: skip

    return Algorithm(
        name="decoupled_ppo",
        advantage=advantage,
        weight=by_mask(weights.token_mean),
        card=Card("policies of several versions, also within a completion", "rule", "old_over_behaviour * m * rho * A",
                  "whiten(r)", "token_mean", "2505.24298"),
        **clipped_ratio(clip_low, clip_high, needs={"reward", "behaviour"}),
    )._replace(coefficient=coefficient)  # fmt: skip
