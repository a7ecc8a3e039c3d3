"""What is put on top of an algorithm, and small properties of the loss that hold for any of them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxreason import objectives
from jaxreason.objectives import Algorithm, Signals, combine_aux, policy_loss, prepare, shaping
from jaxreason.objectives.coefficients import sampler_correction

from .cases import batch


@pytest.fixture(autouse=True)
def float64() -> Iterator[None]:
    with jax.enable_x64(True):
        yield


def aux_of(algorithm: Algorithm, logp: Any, signals: Signals) -> dict[str, jax.Array]:
    advantage, weight = prepare(algorithm, signals)
    return policy_loss(algorithm, jnp.asarray(logp), signals, advantage=advantage, weight=weight)[1]


@pytest.mark.parametrize("kind", ["truncate", "band", "sequence_truncate", "sequence_mask", "sequence_mean_mask"])
@pytest.mark.parametrize("name", ["grpo", "gmpo", "kimi_k15", "gspo", "vapo", "reinforce", "on_policy_distillation"])
def test_a_sampler_correction_multiplies_each_tokens_coefficient(name: str, kind: str):
    """And changes no other token's: a token that a band drops is still clipped where GMPO averages over its completion."""
    logp, signals = batch()
    algorithm = getattr(objectives, name)(**({"beta": 0.0} if name == "grpo" else {}))
    factor = sampler_correction(signals.logp_old, signals.logp_behaviour, signals.mask, kind=kind, high=1.2)
    corrected = objectives.with_sampler_correction(algorithm, kind=kind, high=1.2)
    got, plain = (aux_of(a, logp, signals)["coefficient"] for a in (corrected, algorithm))
    np.testing.assert_allclose(got, factor * plain, rtol=1e-12)
    assert not np.allclose(got, plain)


def test_a_correction_leaves_pulls_and_bonuses_as_they_are_in_any_order():
    logp, signals = batch()
    o = objectives
    one = o.with_entropy_bonus(o.with_reference_pull(o.with_sampler_correction(o.dapo(), kind="band"), beta=0.3), bonus=0.1)
    other = o.with_sampler_correction(o.with_reference_pull(o.with_entropy_bonus(o.dapo(), bonus=0.1), beta=0.3), kind="band")
    a, b = (aux_of(algorithm, logp, signals) for algorithm in (one, other))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-12, atol=1e-14), a, b)
    push = aux_of(o.with_sampler_correction(o.dapo(), kind="band"), logp, signals)["coefficient"]
    pull, _ = o.reference_pull(jnp.asarray(logp), signals.logp_ref, signals.mask, kind="k3")
    spread, _ = o.entropy_bonus(jnp.asarray(logp), signals.logp_old, signals.mask)
    np.testing.assert_allclose(a["coefficient"], push + 0.3 * pull + 0.1 * spread, rtol=1e-12)


def test_two_pulls_add_up():
    logp, signals = batch()
    twice = objectives.with_reference_pull(objectives.grpo(beta=0.04), beta=0.01)
    once = objectives.grpo(beta=0.05)
    np.testing.assert_allclose(*(aux_of(a, logp, signals)["coefficient"] for a in (twice, once)), rtol=1e-12)
    assert objectives.with_reference_pull(once, beta=0.0) is once


@pytest.mark.parametrize("kind", objectives.kl.KINDS)
def test_the_card_says_which_pull_it_is(kind: str):
    logp, signals = batch()
    algorithm = objectives.dr_grpo(beta=0.3, kl=kind)
    assert algorithm.card is not None
    ell, rho = logp - np.asarray(signals.logp_ref), np.exp(logp - np.asarray(signals.logp_old))
    zero = signals._replace(reward=jnp.zeros_like(signals.reward))  # no push, so that m need not be computed
    symbols = {"m": 1.0, "A": 0.0, "rho": rho, "l": ell, "u": np.exp(-ell), "beta": 0.3, "sign": np.sign}
    expected = np.broadcast_to(eval(algorithm.card.coefficient, {}, symbols), logp.shape)
    np.testing.assert_allclose(aux_of(algorithm, logp, zero)["coefficient"], np.where(signals.mask, expected, 0.0), rtol=1e-12)


@pytest.mark.parametrize("kind", [np.float64, np.float32, jnp.float32])
def test_a_weight_of_another_precision_is_taken_in_the_losss(unchecked: None, kind: Any):
    """float64 on, logp in float32, under strict promotion."""
    logp, signals = batch()
    logp = jnp.asarray(logp, jnp.float32)
    beta = kind(0.25)
    for make in (objectives.grpo, objectives.rloo, objectives.reinforce_plus_plus):
        got, expected = (aux_of(make(beta=b), logp, signals)["coefficient"] for b in (beta, 0.25))
        np.testing.assert_array_equal(got, expected)
    got, expected = (aux_of(objectives.with_entropy_bonus(objectives.dapo(), bonus=b), logp, signals) for b in (beta, 0.25))
    np.testing.assert_array_equal(got["coefficient"], expected["coefficient"])


def test_an_empty_slice_is_no_extreme_of_the_batch():
    logp, signals = batch()
    signals = signals._replace(mask=signals.mask.at[0].set(False), logp_old=jnp.asarray(logp - 0.5))
    algorithm = objectives.dapo()
    advantage, weight = prepare(algorithm, signals)
    token_weight = objectives.token_mean(signals.mask)
    parts = []
    for i in range(3):
        x, s, a, w, tw = jax.tree.map(lambda x, i=i: x[i : i + 1], (jnp.asarray(logp), signals, advantage, weight, token_weight))
        parts.append(policy_loss(algorithm, x, s, advantage=a, weight=w, token_weight=tw)[1])
    merged = combine_aux(jax.tree.map(lambda *x: jnp.stack(x), *parts))
    np.testing.assert_allclose([merged["policy/ratio_min"], merged["policy/ratio_max"]], np.exp(0.5), rtol=1e-12)


def test_lite_ppo_survives_a_filtered_completion_that_alone_was_wrong():
    """All right but a truncated one, whose mask was emptied: its reward is in the group's mean, and so in the batch's std."""
    mask = shaping.without_truncated(jnp.ones((1, 4, 3), bool), jnp.asarray([[False, False, False, True]]))
    advantage, _ = prepare(objectives.lite_ppo(), Signals(mask=mask, reward=jnp.asarray([[1.0, 1.0, 1.0, 0.0]])))
    np.testing.assert_allclose(advantage[0, :, 0], [0.25 / np.sqrt(3 / 16)] * 3 + [0], rtol=1e-5)


def test_a_token_of_probability_0_that_nobody_pushes_costs_nothing():
    signals = Signals(mask=jnp.ones((1, 2, 1), bool), reward=jnp.asarray([[0.0, 1.0]]))
    logp = jnp.asarray([[[-jnp.inf], [-1.0]]])
    algorithm = objectives.reinforce()
    advantage, weight = prepare(algorithm, signals)
    loss, gradient = jax.value_and_grad(lambda x: policy_loss(algorithm, x, signals, advantage=advantage, weight=weight)[0])(logp)
    assert loss == 0.5 and np.isfinite(gradient).all()


@pytest.mark.parametrize("name", ["grpo", "gspo", "ppo", "kimi_k15", "on_policy_distillation", "rloo"])
def test_nan_under_the_mask_is_not_even_computed_with(name: str):
    """So that `jax_debug_nans` finds other people's NaN."""
    logp, signals = batch()
    fields = ("logp_old", "logp_ref", "logp_teacher", "logp_behaviour", "value")
    signals = signals._replace(**{f: jnp.where(signals.mask, getattr(signals, f), jnp.nan) for f in fields})
    bad = jnp.where(signals.mask, logp, jnp.nan)
    with jax.debug_nans(True):
        aux_of(getattr(objectives, name)(), bad, signals)


@pytest.mark.parametrize("far", [200.0, -200.0])
@pytest.mark.parametrize("name", ["dr_grpo", "decoupled_ppo", "cispo", "gspo", "sapo", "vapo"])
def test_log_ratios_of_200_and_rewards_of_a_million_are_finite_in_float32(name: str, far: float):
    logp, signals = batch()
    fields = ("logp_ref", "logp_teacher")
    low = signals._replace(
        **{f: jnp.asarray(logp + far, jnp.float32) for f in fields},
        logp_old=jnp.asarray(logp - far, jnp.float32),
        logp_behaviour=jnp.asarray(logp - 2 * far, jnp.float32),
        reward=signals.reward.astype(jnp.float32) * 1e6,
    )
    algorithm = getattr(objectives, name)()
    advantage, weight = prepare(algorithm, low)
    x = jnp.asarray(logp, jnp.float32)
    (loss, aux), gradient = jax.value_and_grad(
        lambda x: policy_loss(algorithm, x, low, advantage=advantage, weight=weight), has_aux=True
    )(x)
    assert all(np.isfinite(y).all() for y in (loss, gradient, *aux.values()))
