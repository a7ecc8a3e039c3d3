"""The identity that defines a coefficient: grad(textbook loss) = -sum weight * coefficient * grad logp, to rounding.

The textbooks are in `cases`, and know nothing of the package's coefficients, advantages and weights. Both are held
against each other in float64, on log-probabilities that fill every cell of every clip.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxreason import objectives
from jaxreason.objectives import Signals, kl, policy_loss, preferences, prepare, weights

from .cases import CASES, Case, batch, variables
from .textbooks import completions, of_steps, zscore

DEFAULTS = [algorithm.name for algorithm in objectives.every_algorithm()]


@pytest.fixture(autouse=True)
def float64() -> Iterator[None]:
    with jax.enable_x64(True):
        yield


@pytest.fixture(params=list(CASES))
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@cache
def batch_of(name: str, *, old: bool = True) -> tuple[np.ndarray, Signals]:
    logp, signals = batch(group=2 if "reference" in CASES[name].algorithm.needs and name.startswith("dpo") else 4)
    return logp, signals if old else signals._replace(logp_old=None)


@cache
def textbook(name: str, *, old: bool = True) -> tuple[np.ndarray, np.ndarray]:
    """(value, gradient) of the textbook's loss."""
    logp, signals = batch_of(name, old=old)
    value, gradient = jax.value_and_grad(CASES[name].textbook)(jnp.asarray(logp), signals)
    return np.asarray(value), np.asarray(gradient)


@cache
def package(name: str, *, old: bool = True) -> tuple[np.ndarray, np.ndarray, dict[str, Any], np.ndarray]:
    """(value, gradient, aux, weight) of the package's."""
    logp, signals = batch_of(name, old=old)
    advantage, weight = prepare(CASES[name].algorithm, signals)

    def loss(x: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        return policy_loss(CASES[name].algorithm, x, signals, advantage=advantage, weight=weight)

    (value, aux), gradient = jax.value_and_grad(loss, has_aux=True)(jnp.asarray(logp))
    return np.asarray(value), np.asarray(gradient), jax.tree.map(np.asarray, aux), np.asarray(weight)


def assert_close(got: np.ndarray, expected: np.ndarray) -> None:
    np.testing.assert_allclose(got, expected, rtol=1e-12, atol=1e-12 * np.abs(expected).max())


# ------------------------------------------------- the identity


def test_value_and_gradient_are_the_textbooks(name: str):
    value, gradient, aux, _ = package(name)
    expected_value, expected_gradient = textbook(name)
    np.testing.assert_allclose(value, expected_value, rtol=1e-12)
    np.testing.assert_allclose(aux["policy/objective"], -expected_value, rtol=1e-12)
    assert_close(gradient, expected_gradient)
    assert np.abs(gradient).max() > 1e-5


def test_the_gradient_is_the_surrogates(name: str):
    _, gradient, aux, weight = package(name)
    np.testing.assert_array_equal(gradient, -weight * aux["coefficient"])


def test_finite_differences_of_the_textbook_agree(name: str):
    """What the paper holds constant is held at the point of the derivative."""
    logp, signals = batch_of(name)
    step, expected = 1e-6, np.zeros_like(logp)
    for index in np.ndindex(*logp.shape):
        sides = [CASES[name].textbook(moved(logp, index, h), signals, frozen=logp) for h in (step, -step)]
        expected[index] = (sides[0] - sides[1]) / (2 * step)
    np.testing.assert_allclose(package(name)[1], expected, atol=1e-7)


def moved(x: np.ndarray, index: tuple[int, ...], h: float) -> np.ndarray:
    out = x.copy()
    out[index] += h
    return out


def test_without_old_log_probs_the_ratio_is_one_and_nothing_is_clipped(name: str):
    """The textbook then has pi_old frozen at today's policy."""
    value, gradient, aux, weight = package(name, old=False)
    assert aux["policy/ratio_min"] == aux["policy/ratio_max"] == 1.0
    np.testing.assert_allclose(aux["policy/ratio_mean"], 1.0, rtol=1e-12)
    assert aux["policy/clip_fraction"] == 0.0
    expected_value, expected_gradient = textbook(name, old=False)
    np.testing.assert_allclose(value, expected_value, rtol=1e-12, atol=1e-14)
    assert_close(gradient, expected_gradient)
    np.testing.assert_array_equal(gradient, -weight * aux["coefficient"])


# ------------------------------------------------- the batch is a good one


@pytest.mark.parametrize("clips", [(0.2, 0.2), (0.2, 0.28), (1 - np.exp(-0.4), np.exp(0.4) - 1)], ids=["ppo", "dapo", "gmpo"])
@pytest.mark.parametrize("advantage", [zscore, of_steps])
def test_the_batch_fills_every_cell_of_the_token_clips(clips: tuple[float, float], advantage: Any):
    logp, signals = batch()
    rows = completions(logp, signals, logp, advantage)
    cells = {cell(np.exp(x - y), a, clips) for o in rows for x, y, a in zip(o.logp, o.old, o.advantage, strict=True)}
    assert cells >= EVERY_CELL


@pytest.mark.parametrize("clips", [(3e-4, 4e-4), (0.2, 0.25)])
def test_the_batch_fills_every_cell_of_the_sequence_clips(clips: tuple[float, float]):
    logp, signals = batch()
    rows = completions(logp, signals, logp, zscore)
    cells = {cell(np.exp((o.logp - o.old).mean()), o.advantage[0], clips) for o in rows}
    inside = {(sign, "inside") for sign in (-1, 1)} if clips[1] < 0.01 else set()  # GSPO's own clips are that narrow
    assert cells >= EVERY_CELL - inside


EVERY_CELL = {(sign, where) for sign in (-1, 1) for where in ("below", "inside", "above")}


def cell(ratio: float, advantage: float, clips: tuple[float, float]) -> tuple[int, str]:
    return int(np.sign(advantage)), "below" if ratio < 1 - clips[0] else "above" if ratio > 1 + clips[1] else "inside"


def test_the_batch_has_what_can_go_wrong():
    _, signals = batch()
    mask, reward, end = (np.asarray(x) for x in (signals.mask, signals.reward, signals.step_end))
    assert len(set(mask.sum(-1).ravel())) > 3 and (mask.sum(-1) == 0).sum() == 1
    assert (np.diff(mask.astype(int), axis=-1) == 1).any(), "no hole"
    assert len(set(reward[2])) == 1 and (reward == 0).any() and (reward >= 0).all()
    assert (end & ~mask).any() and (mask[..., -1] & ~end[..., -1]).any()
    assert (np.asarray(signals.truncated) & mask.any(-1)).any()


@pytest.mark.parametrize("kind", ["band", "sequence_mask", "sequence_mean_mask"])
def test_the_batch_is_partly_dropped_by_a_sampler_correction(kind: str):
    coefficient, weight = package(f"dapo-{kind}")[2]["coefficient"], package(f"dapo-{kind}")[3]
    plain = package("dapo")[2]["coefficient"]
    share = ((coefficient == 0) & (plain != 0)).sum() / (plain != 0).sum()
    assert 0 < share < 1 and (weight == package("dapo")[3]).all()


def test_the_hinge_is_on_both_sides():
    logp, signals = batch(group=2)
    M = 1.5 / 0.1 * variables(CASES["dpo"], logp, signals)["M"]  # noqa: N806
    assert (M > 1).any() and (M < 1).any()


# ------------------------------------------------- the cards


@pytest.mark.parametrize("name", [*DEFAULTS, "gspo-wide", "gspo_token-wide", "gmpo-uneven", "cispo-two-sided", "kimi_k15-tau"])
def test_the_cards_formula_is_the_coefficient(name: str):
    case: Case = CASES[name]
    assert case.algorithm.card is not None
    logp, signals = batch_of(name)
    symbols = variables(case, logp, signals) | {"sigmoid": lambda x: 1 / (1 + np.exp(-x))}
    formula = eval(case.algorithm.card.coefficient, {"__builtins__": {}}, symbols)
    mask = np.asarray(signals.mask)
    assert_close(package(name)[2]["coefficient"][mask], np.broadcast_to(formula, mask.shape)[mask])


@pytest.mark.parametrize("algorithm", objectives.every_algorithm(), ids=DEFAULTS)
def test_the_cards_weight_is_the_weight(algorithm: objectives.Algorithm):
    _, signals = batch_of(algorithm.name)
    assert algorithm.card is not None and signals.reward is not None
    name, _, of_correct = algorithm.card.weight.partition(" of ")
    mask = signals.mask & (signals.reward > 0)[..., None] if of_correct == "correct" else signals.mask
    settings = {"max_completion_tokens": 3000} if name == "constant_length" else {}
    np.testing.assert_array_equal(algorithm.weight(signals), getattr(weights, name)(mask, **settings))


def test_every_algorithm_and_every_kind_has_a_case():
    for algorithm in objectives.every_algorithm():
        assert CASES[algorithm.name].algorithm.name == algorithm.name
        assert CASES[algorithm.name].algorithm.card == algorithm.card
    assert {f"grpo-{kind}" for kind in kl.KINDS} <= CASES.keys()
    assert {f"dpo-{loss}-{margin}" for loss in preferences.LOSSES for margin in preferences.MARGINS} <= CASES.keys()
