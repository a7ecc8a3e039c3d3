"""One list of all algorithms and their settings: each with the textbook that it must equal, and the symbols of its card."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from jaxreason import objectives
from jaxreason.objectives import Algorithm, Signals

from .textbooks import (
    Advantage,
    Denominator,
    Textbook,
    book,
    centre,
    chosen,
    cispo,
    clip,
    clip_and_kl,
    constant_length,
    correct,
    corrected,
    decoupled,
    distillation,
    dpo,
    gae,
    gmpo,
    gspo,
    gspo_token,
    kimi,
    leave_one_out,
    likelihood,
    minus_greedy,
    numbers,
    of_steps,
    ones,
    over_batch_std,
    places,
    plain,
    relative,
    sapo,
    sequence_mean,
    sequence_sum,
    star,
    token_mean,
    vapo,
    vapo_lambda,
    whitened,
    whitened_return,
    with_entropy,
    zeros,
    zscore,
)

P, T = 3, 6
Symbols = Callable[[np.ndarray, Signals], dict[str, Any]]  # (logp, signals) -> what a card's formula is made of


class Case(NamedTuple):
    algorithm: Algorithm
    textbook: Textbook
    symbols: Symbols


def batch(seed: int = 0, *, group: int = 4) -> tuple[np.ndarray, Signals]:
    """Off-policy enough for all clip cells: ragged rows, one with a hole, one empty, one group of equal rewards.

    Rewards are in [0, 1], some of them 0, so that some completions are correct. Call it with 64-bit floats enabled.
    """
    rng = np.random.default_rng(33 + seed)  # 33 fills every cell: `test_identity` looks
    shape = (P, group, T)
    mask = np.arange(T) < rng.integers(3, T + 1, (P, group, 1))
    mask[0, 0] = [True, False, True, True, False, False]  # fed tokens inside a completion
    mask[1, -2] = False
    reward = rng.uniform(0.1, 1.0, (P, group))
    reward[0, 1] = reward[1, 0] = reward[0, -1] = 0.0
    reward[1, 1] = 0.95
    reward[2] = 0.7
    step_end = rng.random(shape) < 0.7
    step_end[0, 0] = [False, True, True, False, True, False]  # two of them on tokens that nobody chose
    step_reward = rng.uniform(0.0, 1.0, shape)
    step_reward[2] = 0.7
    truncated = np.zeros((P, group), bool)
    truncated[0, 0] = truncated[1, -1] = True
    logp = -rng.gamma(1.5, 0.6, shape)
    drift = np.resize([-0.6, 0.5, 0.5, -0.5, 0.0, -0.4, 0.0, 0.4], (P, group, 1))  # whole completions move, too
    arrays = {
        "reward": reward,
        "logp_old": logp + drift + rng.normal(0, 0.5, shape),
        "logp_behaviour": logp + drift + rng.normal(0, 0.5, shape),
        "logp_ref": logp + rng.normal(0, 0.5, shape),
        "logp_teacher": logp + rng.normal(0, 0.5, shape),
        "value": rng.normal(0.5, 0.4, shape),
        "value_behind": rng.normal(0.5, 0.4, (P, group)),
        "greedy_reward": rng.uniform(0.0, 1.0, P),
        "step_reward": step_reward,
        "step_end": step_end,
        "truncated": truncated,
    }
    return logp, Signals(mask=jnp.asarray(mask), **{name: jnp.asarray(array) for name, array in arrays.items()})


def variables(case: Case, logp: np.ndarray, signals: Signals) -> dict[str, Any]:
    """What each symbol of the card's `coefficient` stands for: numbers, or arrays that broadcast to [P, G, T]."""
    return case.symbols(logp, signals)


# ------------------------------------------------- the symbols of the cards


def symbols(advantage: Advantage | None, low: float = 0.2, high: float = 0.2, **constants: Any) -> Symbols:
    """What most formulas use; a clip mask is a question about each token, or each completion, in turn."""

    def of(logp: np.ndarray, signals: Signals) -> dict[str, Any]:
        s = numbers(signals)
        a = zeros(s) if advantage is None else advantage(s)
        found = {name: zeros(s) for name in ("m", "m_seq", "m_log", "s", "geo", "L")}
        for p, g in places(s):
            ts = chosen(s, p, g)
            log_ratios = [logp[p, g, t] - s.logp_old[p, g, t] for t in ts]
            clipped_log_ratios = []
            whole = np.exp(sum(log_ratios) / len(ts))
            for t, x in zip(ts, log_ratios, strict=True):
                up, down = a[p, g, t] > 0, a[p, g, t] < 0
                found["m"][p, g, t] = not (up and np.exp(x) > 1 + high or down and np.exp(x) < 1 - low)
                found["m_seq"][p, g, t] = not (up and whole > 1 + high or down and whole < 1 - low)
                found["m_log"][p, g, t] = not (up and x > high or down and x < -low)
                clipped_log_ratios.append(min(x, high) if up else max(x, -low) if down else x)
            found["s"][p, g], found["L"][p, g] = whole, sum(log_ratios)
            found["geo"][p, g] = np.exp(sum(clipped_log_ratios) / len(ts))
        rho = np.exp(logp - s.logp_old)
        found |= {"A": a, "rho": rho, "rho_clipped": np.clip(rho, 1 - low, 1 + high)}
        found |= {"l": logp - s.logp_ref, "u": np.exp(s.logp_ref - logp), "log_pi": logp, "log_teacher": s.logp_teacher}
        return found | {"old_over_behaviour": np.exp(s.logp_old - s.logp_behaviour)} | constants

    return of


def sapo_symbols(logp: np.ndarray, signals: Signals) -> dict[str, Any]:
    found = symbols(zscore)(logp, signals)
    tau = np.where(found["A"] > 0, 1.0, 1.05)
    return found | {"gate": 1 / (1 + np.exp(-tau * (found["rho"] - 1)))}


def vapo_symbols(logp: np.ndarray, signals: Signals) -> dict[str, Any]:
    s = numbers(signals)
    right = correct(s)
    found = symbols(partial(gae, lambda_=partial(vapo_lambda, alpha=0.05)), 0.2, 0.28, mu=0.1)(logp, signals)
    return found | {"correct": right, "tokens": s.mask.sum(), "correct_tokens": right.sum()}


def dpo_symbols(logp: np.ndarray, signals: Signals) -> dict[str, Any]:
    s = numbers(signals)
    h = np.zeros((s.mask.shape[0], 1, 1))
    for p, g in places(s):
        for t in chosen(s, p, g):
            h[p] += (1 - 2 * g) * (logp[p, g, t] - s.logp_ref[p, g, t])
    sign = np.broadcast_to(np.array([[[1.0], [-1.0]]]), s.mask.shape)
    return {"A": sign, "M": 0.1 * h, "beta": 0.1}


# ------------------------------------------------- all of them


def case(algorithm: Algorithm, objective: Any, advantage: Advantage, denominator: Denominator, **settings: Any) -> Case:
    return Case(algorithm, book(partial(objective, **settings), advantage, denominator), symbols(advantage, **settings))


def cases(o: Any) -> dict[str, Case]:
    """Every algorithm with its defaults, under its name, and then what its settings do. `o` is the package."""
    to_go, whitened_centre, whitened_plain = whitened_return, partial(whitened, of=centre), partial(whitened, of=plain)
    found = {
        "sft": case(o.sft(), likelihood, ones, sequence_mean),
        "rft": case(o.rft(), likelihood, correct, sequence_mean),
        "online_rft": case(o.online_rft(), likelihood, correct, sequence_mean),
        "star": Case(o.star(), star, symbols(correct)),
        "sequence_distillation": case(o.sequence_distillation(), likelihood, ones, sequence_mean),
        "on_policy_distillation": case(o.on_policy_distillation(), distillation, ones, token_mean),
        "dpo": Case(o.dpo(), partial(dpo, loss="sigmoid", margin="sum", beta=0.1), dpo_symbols),
        "reinforce": case(o.reinforce(), likelihood, plain, sequence_sum),
        "rloo": case(o.rloo(), likelihood, leave_one_out, sequence_sum),
        "remax": case(o.remax(), likelihood, minus_greedy, sequence_sum),
        "grpo": case(o.grpo(), clip_and_kl, zscore, sequence_mean, beta=0.04),
        "grpo_process": case(o.grpo_process(), clip_and_kl, of_steps, sequence_mean, beta=0.04),
        "dr_grpo": case(o.dr_grpo(), clip, centre, constant_length),
        "lite_ppo": case(o.lite_ppo(), clip, over_batch_std, token_mean),
        "dapo": case(o.dapo(), clip, zscore, token_mean, high=0.28),
        "maxrl": case(o.maxrl(), likelihood, relative, sequence_sum),
        "gspo": case(o.gspo(), gspo, zscore, sequence_mean, low=3e-4, high=4e-4),
        "gspo_token": case(o.gspo_token(), gspo_token, of_steps, sequence_mean, low=3e-4, high=4e-4),
        "gmpo": case(o.gmpo(), gmpo, zscore, sequence_mean, low=0.4, high=0.4),
        "cispo": case(o.cispo(), cispo, zscore, token_mean, low=1.0, high=4.0),
        "sapo": case(o.sapo(), sapo, zscore, sequence_mean, positive=1.0, negative=1.05)._replace(symbols=sapo_symbols),
        "kimi_k15": case(o.kimi_k15(), kimi, centre, sequence_sum, tau=0.1),
        "ppo": case(o.ppo(), clip, gae, sequence_mean),
        "vapo": Case(o.vapo(), vapo, vapo_symbols),
        "reinforce_plus_plus": case(o.reinforce_plus_plus(), clip, partial(to_go, beta=0.001), sequence_mean),
        "reinforce_plus_plus_baseline": case(o.reinforce_plus_plus_baseline(), clip, whitened_centre, sequence_mean),
        "decoupled_ppo": case(o.decoupled_ppo(), decoupled, whitened_plain, token_mean),
    }
    z1, kinds = partial(zscore, ddof=1), ("k1", "k2", "k3", "abs", "k1_plus", "k3_plus")
    kinds += ("weighted_k1", "weighted_k2", "weighted_k3", "fixed_weight_k2", "fixed_weight_k3", "fixed_weight_k3_plus")
    for kind in kinds:
        found[f"grpo-{kind}"] = case(o.grpo(kl=kind, beta=0.3), clip_and_kl, zscore, sequence_mean, beta=0.3, kind=kind)
    for loss, margin in [(loss, margin) for loss in ("sigmoid", "ipo", "hinge", "robust") for margin in ("sum", "mean")]:
        settings: dict[str, Any] = {"loss": loss, "margin": margin, "beta": 1.5 if loss == "hinge" else 0.3}
        e = 0.1 if loss == "robust" else 0.0
        found[f"dpo-{loss}-{margin}"] = Case(o.dpo(label_smoothing=e, **settings), partial(dpo, e=e, **settings), dpo_symbols)
    for kind, low, high in [
        ("truncate", 0.0, 1.3), ("band", 0.6, 1.5), ("sequence_truncate", 0.0, 1.4), ("sequence_mask", 0.5, 1.8),
        ("sequence_mean_mask", 0.8, 1.2),
    ]:  # fmt: skip
        algorithm = o.with_sampler_correction(o.dapo(), kind=kind, low=low, high=high)
        settings = {"of": partial(clip, high=0.28), "kind": kind}
        found[f"dapo-{kind}"] = case(algorithm, partial(corrected, **settings), zscore, token_mean, low=low, high=high)
    return found | {
        "rft-above": case(o.rft(correct_above=0.5), likelihood, partial(correct, above=0.5), sequence_mean),
        "rloo-kl": case(o.rloo(beta=0.1), likelihood, partial(leave_one_out, beta=0.1), sequence_sum),
        "grpo-sample-std": case(o.grpo(ddof=1, beta=0.0), clip, z1, sequence_mean),
        "grpo_process-sample-std": case(
            o.grpo_process(ddof=1, kl="k2"), clip_and_kl, partial(of_steps, ddof=1), sequence_mean, beta=0.04, kind="k2"
        ),
        "dr_grpo-budget-kl": case(
            o.dr_grpo(max_completion_tokens=8, beta=0.1), clip_and_kl, centre, partial(constant_length, budget=8), beta=0.1
        ),
        "dapo-kl": case(o.with_reference_pull(o.dapo(), beta=0.2), clip_and_kl, zscore, token_mean, high=0.28, beta=0.2),
        "gspo-wide": case(o.gspo(clip_low=0.2, clip_high=0.25), gspo, zscore, sequence_mean, low=0.2, high=0.25),
        "gspo-kl": case(o.gspo(beta=0.1), gspo, zscore, sequence_mean, low=3e-4, high=4e-4, beta=0.1),
        "gspo_token-wide": case(
            o.gspo_token(clip_low=0.2, clip_high=0.25), gspo_token, of_steps, sequence_mean, low=0.2, high=0.25
        ),
        "gmpo-uneven": case(o.gmpo(clip_low=0.3, clip_high=0.5), gmpo, zscore, sequence_mean, low=0.3, high=0.5),
        "cispo-two-sided": case(o.cispo(clip_low=0.2, clip_high=0.28), cispo, zscore, token_mean, low=0.2, high=0.28),
        "sapo-taus": case(o.sapo(tau_positive=2.0, tau_negative=0.5), sapo, zscore, sequence_mean, positive=2.0, negative=0.5),
        "kimi_k15-tau": case(o.kimi_k15(tau=0.7), kimi, centre, sequence_sum, tau=0.7),
        "ppo-kl": case(o.ppo(beta=0.1), clip, partial(gae, beta=0.1), sequence_mean),
        "ppo-dual-clip": case(o.ppo(dual_clip=1.5), clip, gae, sequence_mean, dual=1.5),
        "ppo-lambda-1": case(o.ppo(lambda_=1.0), clip, partial(gae, lambda_=1.0), sequence_mean),
        "ppo-discount": case(o.ppo(discount=0.9), clip, partial(gae, discount=0.9), sequence_mean),
        "ppo-entropy": case(
            o.with_entropy_bonus(o.ppo(), bonus=0.05), partial(with_entropy, of=clip, bonus=0.05), gae, sequence_mean
        ),
        "vapo-alpha": Case(
            o.vapo(alpha=0.5, imitation=0.3, correct_above=0.5), partial(vapo, alpha=0.5, mu=0.3, above=0.5), vapo_symbols
        ),
        "reinforce_plus_plus-kl": case(o.reinforce_plus_plus(beta=0.1), clip, partial(to_go, beta=0.1), sequence_mean),
        "reinforce_plus_plus_baseline-kl": case(
            o.reinforce_plus_plus_baseline(beta=0.1), clip_and_kl, whitened_centre, sequence_mean, beta=0.1, kind="k2"
        ),
        "decoupled_ppo-cap": case(o.decoupled_ppo(cap=1.2), decoupled, whitened_plain, token_mean, cap=1.2),
    }


CASES = cases(objectives)
