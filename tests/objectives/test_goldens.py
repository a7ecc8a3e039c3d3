"""Our losses, advantages and gradients beside those that TRL makes of the same arrays (`tests/goldens/trl.json`).

TRL is an independent implementation in PyTorch; `tests/goldens/trl_goldens.py` says how its numbers were made. Both
sides are float64. Where the two differ on purpose, a comment here says how, and the test maps one onto the other:
never by a wider tolerance.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxreason import objectives
from jaxreason.objectives import (
    Algorithm,
    Signals,
    advantages,
    coefficients,
    heads,
    policy_loss,
    prepare,
    shaping,
    valued_loss,
    weights,
)

GOLDENS = json.loads((Path(__file__).parents[1] / "goldens" / "trl.json").read_text())
BATCHES = GOLDENS["policy"]["batches"]
POLICY = {case["name"]: case for case in GOLDENS["policy"]["cases"]}
PREFERENCE = {case["name"]: case for case in GOLDENS["preference"]["cases"]}

# TRL's z-score divides by the sample's standard deviation plus 1e-4; our default is the population's plus 1e-6.
ZSCORE: dict[str, Any] = {"ddof": 1, "epsilon": 1e-4}

agree = partial(np.testing.assert_allclose, rtol=1e-9, atol=1e-12)


@pytest.fixture(autouse=True)
def float64() -> Iterator[None]:
    with jax.enable_x64(True):
        yield


# ------------------------------------------------- policies: TRL's settings in our words


def signals_of(case: dict[str, Any]) -> Signals:
    batch, settings = BATCHES[case["batch"]], case["settings"]
    mask = jnp.asarray(batch["mask"])
    if settings.get("mask_truncated_completions"):
        mask = shaping.without_truncated(mask, jnp.asarray(batch["truncated"]))
    reward_weights = np.asarray(settings.get("reward_weights", [1.0]))
    reward = np.einsum("k,kpg->pg", reward_weights, np.asarray(batch["rewards"])[: len(reward_weights)])
    once = settings["num_iterations"] == 1  # then TRL keeps no old log-probabilities
    return Signals(
        mask=mask,
        reward=jnp.asarray(reward),
        logp_old=None if once else jnp.asarray(batch["logp_old"]),
        logp_ref=jnp.asarray(batch["logp_ref"]),
        logp_behaviour=jnp.asarray(batch["logp_behaviour"]),
    )


def everywhere(per_completion: Callable[[Signals], jax.Array]) -> Callable[[Signals], jax.Array]:
    return lambda signals: jnp.broadcast_to(per_completion(signals)[..., None], signals.mask.shape)


def over_batch(signals: Signals) -> jax.Array:
    """`scale_rewards="batch"`: Lite PPO's advantage, but with the sample's standard deviation, plus 1e-4."""
    n = signals.mask.shape[0] * signals.mask.shape[1]
    shrink = np.sqrt((n - 1) / n).item()  # population's over sample's
    return objectives.lite_ppo(epsilon=1e-4 * shrink).advantage(signals)[..., 0] * shrink


def dual_clip_of(case: dict[str, Any], low: float, high: float) -> Callable[..., tuple[jax.Array, jax.Array]]:
    """TRL's two-sided clip `delta` is the dual clip."""

    def coefficient(logp: jax.Array, signals: Signals, advantage: jax.Array) -> tuple[jax.Array, jax.Array]:
        clips = {"clip_low": low, "clip_high": high, "dual_clip": case["settings"]["delta"]}
        return coefficients.clipped(logp, signals.logp_old, advantage, signals.mask, **clips)

    return coefficient


SAMPLER_KINDS = {
    "token_truncate": "truncate",
    "token_mask": "band",
    "sequence_truncate": "sequence_truncate",
    "sequence_mask": "sequence_mask",
}


def sampler_bounds(settings: dict[str, Any]) -> dict[str, Any]:
    low, high = settings["vllm_importance_sampling_clip_min"], settings["vllm_importance_sampling_clip_max"]
    return {"kind": SAMPLER_KINDS[settings["vllm_importance_sampling_mode"]], "low": 0.0 if low is None else low, "high": high}


def algorithm_of(case: dict[str, Any]) -> Algorithm:
    """The `Algorithm` that a case's settings describe, from TRL's words."""
    settings = case["settings"]
    beta, loss = settings["beta"], settings.get("loss_type")
    clips = {"clip_low": settings.get("epsilon"), "clip_high": settings.get("epsilon_high", settings.get("epsilon"))}
    # TRL's "bias correction" multiplies k3 by the ratio and lets gradient flow through both. Beside a ratio of whole
    # completions it takes that one, where ours stays the token's: no case here has both.
    kind = "weighted_k3" if settings.get("use_bias_correction_kl") else "k3"
    pull: dict[str, Any] = {"beta": beta, "kl": kind}

    if case["trainer"] == "RLOOTrainer":
        return objectives.rloo(beta=beta)
    if case["trainer"] == "GMPOTrainer":
        return objectives.with_reference_pull(objectives.gmpo(**clips, **ZSCORE), beta=beta, kind=kind)
    if settings.get("importance_sampling_level") == "sequence":
        algorithm = objectives.gspo(**clips, **ZSCORE, **pull)
        if loss == "luspo":  # GSPO without 1/|o|
            algorithm = algorithm._replace(weight=lambda signals: weights.sequence_sum(signals.mask))
    elif "delta" in settings:
        algorithm = objectives.grpo(beta=0.0, **clips, **ZSCORE)
        algorithm = algorithm._replace(coefficient=dual_clip_of(case, **{k[5:]: v for k, v in clips.items()}))
        algorithm = objectives.with_reference_pull(algorithm, beta=beta, kind=kind)
    elif loss == "grpo":
        algorithm = objectives.grpo(**clips, **ZSCORE, **pull)
    elif loss == "dr_grpo":  # TRL leaves `scale_rewards` to the user; these cases say "none"
        algorithm = objectives.dr_grpo(max_completion_tokens=settings["max_completion_length"], **clips, **pull)
    elif loss in ("dapo", "bnpo"):  # the same within one process and one micro-batch: a mean over its tokens
        algorithm = objectives.with_reference_pull(objectives.dapo(**clips, **ZSCORE), beta=beta, kind=kind)
    elif loss == "cispo":  # TRL's epsilon_high is the cap itself, ours its distance from 1, as in the paper
        algorithm = objectives.cispo(clip_high=settings["epsilon_high"] - 1, **ZSCORE)
        algorithm = objectives.with_reference_pull(algorithm, beta=beta, kind=kind)
    elif loss == "sapo":
        taus = {"tau_positive": settings["sapo_temperature_pos"], "tau_negative": settings["sapo_temperature_neg"]}
        algorithm = objectives.with_reference_pull(objectives.sapo(**taus, **ZSCORE), beta=beta, kind=kind)
    else:
        raise AssertionError(f"case {case['name']!r} has no counterpart here")

    if settings.get("scale_rewards") == "none":
        algorithm = algorithm._replace(advantage=everywhere(lambda signals: advantages.group_centre(signals.reward)))
    elif settings.get("scale_rewards") == "batch":
        algorithm = algorithm._replace(advantage=everywhere(over_batch))
    if settings.get("multi_objective_aggregation") == "normalize_then_sum":
        algorithm = algorithm._replace(advantage=everywhere(lambda _: normalised_then_summed(case)))
    if settings.get("use_vllm"):
        algorithm = objectives.with_sampler_correction(algorithm, **sampler_bounds(settings))
    return algorithm


def whitened(per_completion: jax.Array) -> jax.Array:
    """Over the batch, each completion counting once: what `batch_whiten` does where all have one token."""
    one_token = per_completion[..., None]
    return advantages.batch_whiten(one_token, jnp.ones(one_token.shape, bool), **ZSCORE)[..., 0]


def normalised_then_summed(case: dict[str, Any]) -> jax.Array:
    reward_weights = jnp.asarray(case["settings"]["reward_weights"])
    parts = jnp.moveaxis(jnp.asarray(BATCHES[case["batch"]]["rewards"]), 0, -1)
    return whitened(shaping.normalise_then_sum(parts, reward_weights, **ZSCORE))


def ours(case: dict[str, Any], algorithm: Algorithm, signals: Signals) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(loss, advantage, gradient)."""
    advantage, weight = prepare(algorithm, signals)
    corrected = advantage
    if case["settings"].get("vllm_importance_sampling_mode") == "sequence_mask":
        corrected = advantage * product_over_token_weight(signals)

    def loss(logp: jax.Array) -> jax.Array:
        return policy_loss(algorithm, logp, signals, advantage=corrected, weight=weight)[0]

    value, gradient = jax.value_and_grad(loss)(jnp.asarray(BATCHES[case["batch"]]["logp"]))
    return value, advantage, gradient


def product_over_token_weight(signals: Signals) -> jax.Array:
    """TRL's sequence mask keeps completions by the product of their token weights, and weights them by it too.

    Ours keeps the same ones and weights each token by its own, as the algorithm beneath would.
    """
    assert signals.logp_old is not None and signals.logp_behaviour is not None
    difference = jnp.where(signals.mask, signals.logp_old - signals.logp_behaviour, 0.0)
    return jnp.exp(jnp.sum(difference, axis=-1, keepdims=True) - difference)


def test_the_batches_fill_all_clip_cells():
    for name in ("ragged", "wild"):
        batch = BATCHES[name]
        ratio = np.exp(np.subtract(batch["logp"], batch["logp_old"]))
        sign = np.sign(POLICY[f"grpo on {name}"]["advantage"])[..., None]
        for cell in (ratio < 0.8, (ratio > 0.8) & (ratio < 1.2), ratio > 1.5):
            for side in (sign > 0, sign < 0):
                assert (np.asarray(batch["mask"]) & cell & side).any()
        if name == "wild":  # the dual clip's cell
            assert (np.asarray(batch["mask"]) & (ratio > 3) & (sign < 0)).any()


@pytest.mark.parametrize("name", [name for name, case in POLICY.items() if case["trainer"] != "RLOOTrainer"])
def test_policy_losses(name: str):
    case = POLICY[name]
    signals = signals_of(case)
    loss, advantage, gradient = ours(case, algorithm_of(case), signals)
    scale = 1.0
    if name == "grpo truncated masked":
        # A completion masked as a whole is counted among the N of TRL's mean; ours leaves it out
        present = np.asarray(signals.mask).any(-1)
        scale = present.size / present.sum()
        assert scale > 1
    agree(loss, scale * case["loss"])
    agree(advantage, np.asarray(case["advantage"])[..., None] * np.asarray(signals.mask))
    agree(gradient, scale * np.asarray(case["gradient"]))
    assert np.abs(gradient).max() > 1e-2


def counts_tokens(case: dict[str, Any]) -> bool:
    """TRL counts clipped completions where the ratio is a completion's, and leaves tokens of the dual clip out."""
    per_token = case["settings"].get("importance_sampling_level") != "sequence" and "delta" not in case["settings"]
    return per_token and case["trainer"] != "RLOOTrainer" and "clip_fraction" in case


@pytest.mark.parametrize("name", [name for name, case in POLICY.items() if counts_tokens(case)])
def test_diagnostics(name: str):
    case = POLICY[name]
    signals, algorithm = signals_of(case), algorithm_of(case)
    advantage, weight = prepare(algorithm, signals)
    logp = jnp.asarray(BATCHES[case["batch"]]["logp"])
    _, aux = policy_loss(algorithm, logp, signals, advantage=advantage, weight=weight)
    np.testing.assert_allclose(aux["policy/clip_fraction"], case["clip_fraction"], rtol=1e-6)  # float32 in TRL
    if case["settings"]["beta"] and not case["settings"].get("use_bias_correction_kl"):  # else TRL's is weighted by the ratio
        agree(aux["policy/kl_ref"], case["kl"])


@pytest.mark.parametrize("name", ["gspo", "gspo wide", "gspo k3"])
def test_gspo_token_with_one_step_a_completion_is_gspo(name: str):
    case = POLICY[name]
    signals = signals_of(case)
    settings, mask = case["settings"], signals.mask
    algorithm = objectives.gspo_token(
        clip_low=settings["epsilon"], clip_high=settings["epsilon_high"], beta=settings["beta"], **ZSCORE
    )
    step_reward = advantages.at_last_token(signals.reward, mask)
    step_end = advantages.at_last_token(jnp.ones(mask.shape[:2]), mask) > 0
    loss, advantage, gradient = ours(case, algorithm, signals._replace(step_reward=step_reward, step_end=step_end))
    agree(loss, case["loss"])
    agree(advantage, np.asarray(case["advantage"])[..., None] * np.asarray(mask))
    agree(gradient, case["gradient"])


@pytest.mark.parametrize("name", [name for name, case in POLICY.items() if case["trainer"] == "RLOOTrainer"])
def test_rloo(name: str):
    """TRL clips the ratio of the whole completion; ours has none. On-policy, where ours belongs, gradients coincide.

    The values do not: TRL's is that of the ratio, 1, so it is minus the mean advantage; ours is -sum A log pi / N.
    """
    case = POLICY[name]
    signals, algorithm = signals_of(case), algorithm_of(case)
    if case["settings"].get("normalize_advantages"):
        algorithm = algorithm._replace(advantage=everywhere(lambda s: whitened(objectives.rloo(beta=0.05).advantage(s)[..., 0])))
    loss, advantage, gradient = ours(case, algorithm, signals)
    mask, logp = np.asarray(signals.mask), np.asarray(BATCHES[case["batch"]]["logp"])
    expected = np.asarray(case["advantage"])
    agree(advantage, expected[..., None] * mask)
    agree(gradient, case["gradient"])
    agree(case["loss"], -expected.mean())
    agree(loss, -np.sum(expected[..., None] * mask * logp) / expected.size)


@pytest.mark.parametrize("name", [name for name, case in POLICY.items() if "sampler_weight" in case])
def test_sampler_corrections(name: str):
    case = POLICY[name]
    signals = signals_of(case)
    factor = coefficients.sampler_correction(
        signals.logp_old, signals.logp_behaviour, signals.mask, **sampler_bounds(case["settings"])
    )
    if case["settings"]["vllm_importance_sampling_mode"] == "sequence_mask":
        factor *= product_over_token_weight(signals)
    expected = np.asarray(case["sampler_weight"]) * np.asarray(signals.mask)
    agree(factor, expected)
    bounds = sampler_bounds(case["settings"])
    cut = (expected == 0) if "mask" in case["settings"]["vllm_importance_sampling_mode"] else (expected == bounds["high"])
    assert (cut & np.asarray(signals.mask)).any() and (~cut & np.asarray(signals.mask)).any()


# ------------------------------------------------- pairs


def preference_algorithm(settings: dict[str, Any]) -> Algorithm:
    beta, loss = settings["beta"], settings["loss_type"]
    if loss == "sft":  # TRL's mean is over tokens, ours over completions first; and over the chosen ones only
        return objectives.sft()._replace(weight=lambda s: weights.token_mean(s.mask.at[:, 1].set(False)))
    if loss == "sigmoid_norm":  # DPO with length-normalised margins: DeepSeekMath's Eq. 12
        return objectives.dpo(beta=beta, margin="mean")
    if loss == "ipo":  # TRL averages IPO's margin over tokens, after its authors; ours does as it is told
        return objectives.dpo(beta=beta, loss="ipo", margin="mean")
    return objectives.dpo(beta=beta, loss=loss, label_smoothing=settings.get("label_smoothing", 0.0))


@pytest.mark.parametrize("name", PREFERENCE)
def test_preference_losses(name: str):
    case, batch = PREFERENCE[name], GOLDENS["preference"]["batch"]
    signals = Signals(mask=jnp.asarray(batch["mask"]), logp_ref=jnp.asarray(batch["logp_ref"]))
    algorithm = preference_algorithm(case["settings"])
    advantage, weight = prepare(algorithm, signals)
    loss, gradient = jax.value_and_grad(lambda logp: policy_loss(algorithm, logp, signals, advantage=advantage, weight=weight)[0])(
        jnp.asarray(batch["logp"])
    )
    agree(loss, case["loss"])
    agree(gradient, case["gradient"])
    assert np.abs(gradient).max() > 1e-3


def test_hinge_margins_lie_on_both_sides():
    gradient = np.asarray(PREFERENCE["hinge strong"]["gradient"])[:, 0, 0]
    assert (gradient == 0).any() and (gradient != 0).any()


# ------------------------------------------------- other outputs


@pytest.mark.parametrize("case", GOLDENS["reward_model"], ids=lambda case: case["name"])
def test_the_reward_models_loss(case: dict[str, Any]):
    margin = None if case["margin"] is None else jnp.asarray(case["margin"])

    def loss(score: jax.Array) -> jax.Array:
        coefficient, objective = heads.bradley_terry(score, margin=margin)
        return valued_loss(score, coefficient, objective, jnp.full(objective.shape, 1 / len(score)))

    value, gradient = jax.value_and_grad(loss)(jnp.asarray(case["score"]))
    agree(value, case["loss"])
    agree(gradient, case["gradient"])


def distillation() -> tuple[dict[str, dict[str, Any]], jax.Array, jax.Array, jax.Array]:
    """(cases, student's logits, teacher's logits, mask)."""
    golden = GOLDENS["distillation"]
    arrays = (jnp.asarray(golden[key]) for key in ("student_logits", "teacher_logits", "mask"))
    return {case["name"]: case for case in golden["cases"]}, *arrays


@pytest.mark.parametrize(("name", "head"), [("forward kl", heads.forward_kl), ("reverse kl", heads.full_reverse_kl)])
def test_distillation_on_logits(name: str, head: Callable[..., tuple[jax.Array, jax.Array]]):
    cases, student, teacher, mask = distillation()

    def loss(logits: jax.Array) -> jax.Array:
        return valued_loss(logits, *head(logits, teacher, mask), weights.token_mean(mask))

    value, gradient = jax.value_and_grad(loss)(student)
    agree(value, cases[name]["loss"])
    agree(gradient, cases[name]["gradient"])


def test_distillation_on_sampled_tokens():
    """Gradients only: TRL's value is sg(l) log pi, which estimates nothing; ours estimates the divergence."""
    cases, student, teacher, mask = distillation()
    case = cases["sampled reverse kl"]
    token = jnp.asarray(case["token"])[..., None]

    def logp_of(logits: jax.Array) -> jax.Array:
        return jnp.take_along_axis(jax.nn.log_softmax(logits), token, axis=-1)[..., 0]

    signals = Signals(mask=mask, logp_teacher=logp_of(teacher))
    algorithm = objectives.on_policy_distillation()
    advantage, weight = prepare(algorithm, signals)
    gradient = jax.grad(lambda x: policy_loss(algorithm, logp_of(x), signals, advantage=advantage, weight=weight)[0])(student)
    agree(gradient, case["gradient"])
