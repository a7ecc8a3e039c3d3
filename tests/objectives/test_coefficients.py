from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxreason.objectives import surrogate_loss, weighted_sum
from jaxreason.objectives.coefficients import (
    clipped,
    clipped_importance,
    geometric_mean,
    likelihood,
    mirror_descent,
    sampler_correction,
    sequence_clipped,
    sequence_ratio,
    soft_gate,
)
from jaxreason.objectives.preferences import preference


def row(*values: float) -> jax.Array:
    return jnp.asarray([[values]], jnp.float32)


LOG = np.log([0.5, 0.5, 1.0, 1.0, 1.5, 1.5, 4.0, 4.0])
ADVANTAGE = [2.0, -2.0, 2.0, -2.0, 2.0, -2.0, 2.0, -2.0]
ALL = jnp.ones((1, 1, 8), bool)


@pytest.mark.parametrize(
    ("dual_clip", "coefficient", "objective"),
    [
        (None, [1, 0, 2, -2, 0, -3, 0, -8], [1, -1.6, 2, -2, 2.4, -3, 2.4, -8]),
        (3.0, [1, 0, 2, -2, 0, -3, 0, 0], [1, -1.6, 2, -2, 2.4, -3, 2.4, -6]),
    ],
)
def test_clip_cells_by_hand(dual_clip, coefficient, objective):
    got = clipped(row(*LOG), row(*[0.0] * 8), row(*ADVANTAGE), ALL, clip_low=0.2, clip_high=0.2, dual_clip=dual_clip)
    np.testing.assert_allclose(got[0][0, 0], coefficient, rtol=1e-6)
    np.testing.assert_allclose(got[1][0, 0], objective, rtol=1e-6)


def test_the_boundary_is_kept():
    """At ratio exactly 1 with a clip range of 0, `jnp.minimum` of the two branches would split the gradient."""
    zero, advantage, mask = row(0.0, 0.0), row(2.0, -2.0), jnp.ones((1, 1, 2), bool)
    coefficient, objective = clipped(zero, zero, advantage, mask, clip_low=0.0, clip_high=0.0)
    np.testing.assert_array_equal(coefficient, advantage)
    np.testing.assert_array_equal(objective, advantage)

    def tied(x):
        return jnp.sum(jnp.minimum(jnp.exp(x) * advantage, jnp.clip(jnp.exp(x), 1.0, 1.0) * advantage))

    assert not np.array_equal(jax.grad(tied)(zero), advantage)  # what the mask avoids


@pytest.mark.parametrize("name", ["likelihood", "clipped"])
def test_the_objectives_own_gradient_is_the_coefficient_and_the_coefficient_has_none(name: str):
    old = row(*np.linspace(-1.5, 1.5, 8))
    mask = ALL.at[0, 0, 3].set(False)

    def parts(logp):
        if name == "likelihood":
            return likelihood(logp, row(*ADVANTAGE), mask)
        return clipped(logp, old, row(*ADVANTAGE), mask, clip_low=0.2, clip_high=0.28, dual_clip=3.0)

    logp = row(*LOG).at[0, 0, 3].set(-jnp.inf)
    coefficient = parts(logp)[0]
    for transform in (lambda f: f, jax.jit):
        gradient = transform(jax.grad(lambda x: jnp.sum(parts(x)[1])))(logp)
        np.testing.assert_allclose(gradient, coefficient, rtol=1e-5)
        assert (np.asarray(transform(jax.grad(lambda x: jnp.sum(parts(x)[0])))(logp)) == 0).all()
    assert np.isfinite(coefficient).all() and coefficient[0, 0, 3] == 0


def test_surrogate_loss_ignores_whatever_has_no_weight():
    logp, weight = row(-1.0, -jnp.inf, jnp.nan), row(0.5, 0.0, 0.0)
    coefficient = row(2.0, jnp.nan, jnp.inf)
    loss, gradient = jax.value_and_grad(surrogate_loss)(logp, coefficient, weight)
    assert loss == 1.0
    np.testing.assert_array_equal(gradient, row(-1.0, 0.0, 0.0))
    assert weighted_sum(coefficient, weight) == 1.0


# ------------------------------------------------- numbers by hand


def test_the_sequence_ratio_is_the_geometric_mean_over_chosen_tokens():
    logp, mask = row(np.log(2.0), np.log(8.0), 50.0, 0.0), jnp.asarray([[[True, True, False, False]]])
    np.testing.assert_allclose(sequence_ratio(logp, row(0, 0, 0, 0), mask), [[[4, 4, 1, 1]]], rtol=1e-6)
    packed = sequence_ratio(
        row(np.log(2.0), np.log(8.0), 0.0, 1.0), row(0, 0, 0, 0), jnp.ones((1, 1, 4), bool), segments=row_ids(0, 0, 1, 1)
    )
    np.testing.assert_allclose(packed, [[[4, 4, np.exp(0.5), np.exp(0.5)]]], rtol=1e-6)


def row_ids(*values: int) -> jax.Array:
    return jnp.asarray([[values]], jnp.int32)


@pytest.mark.parametrize(("advantage", "coefficient", "objective"), [(2.0, 0.0, 2.8), (-2.0, -8.0, -8.0)])
def test_sequence_clipped_keeps_or_drops_a_completion_whole(advantage: float, coefficient: float, objective: float):
    """Ratios 2 and 8, s = 4: one token alone is inside no clip, and both share their completion's fate."""
    mask = jnp.ones((1, 1, 2), bool)
    got = sequence_clipped(row(np.log(2.0), np.log(8.0)), row(0, 0), row(advantage, advantage), mask, clip_low=0.2, clip_high=0.4)
    np.testing.assert_allclose(got[0], row(coefficient, coefficient), rtol=1e-6)
    np.testing.assert_allclose(got[1], row(objective, objective), rtol=1e-6)


def test_geometric_mean_clips_each_token_on_its_profitable_side_in_nats():
    """A > 0, log-ratios 0.1, 1 and -1: the second is clipped to 0.4, the third is not. c = exp((0.1 + 0.4 - 1)/3)."""
    mask = jnp.ones((1, 1, 3), bool)
    c = np.exp(-0.5 / 3)
    coefficient, objective = geometric_mean(row(0.1, 1, -1), row(0, 0, 0), row(2, 2, 2), mask, clip_low=0.4, clip_high=0.4)
    np.testing.assert_allclose(coefficient, row(2 * c, 0, 2 * c), rtol=1e-6)
    np.testing.assert_allclose(objective, row(2 * c, 2 * c, 2 * c), rtol=1e-6)
    c = np.exp((0.1 + 1 - 0.4) / 3)
    coefficient, _ = geometric_mean(row(0.1, 1, -1), row(0, 0, 0), row(-2, -2, -2), mask, clip_low=0.4, clip_high=0.4)
    np.testing.assert_allclose(coefficient, row(-2 * c, -2 * c, 0), rtol=1e-6)


def test_clipped_importance_drops_nothing():
    coefficient, _ = clipped_importance(row(*LOG), row(*[0.0] * 8), row(*ADVANTAGE), ALL, clip_low=0.2, clip_high=0.28)
    np.testing.assert_allclose(coefficient[0, 0], [1.6, -1.6, 2, -2, 2.56, -2.56, 2.56, -2.56], rtol=1e-6)
    unbounded, _ = clipped_importance(row(*LOG), row(*[0.0] * 8), row(*ADVANTAGE), ALL, clip_low=1.0, clip_high=4.0)
    np.testing.assert_allclose(unbounded[0, 0], [1, -1, 2, -2, 3, -3, 8, -8], rtol=1e-6)


def test_soft_gate_is_the_advantage_at_ratio_one_and_fades():
    coefficient, objective = soft_gate(row(*LOG), row(*[0.0] * 8), row(*ADVANTAGE), ALL, tau_positive=1.0, tau_negative=2.0)
    gate = 1 / (1 + np.exp(-1.0 * 3))
    gate_negative = 1 / (1 + np.exp(-2.0 * 3))
    np.testing.assert_allclose(coefficient[0, 0, 2:4], [2, -2], rtol=1e-6)
    expected = [4 * gate * (1 - gate) * 4 * 2, -4 * gate_negative * (1 - gate_negative) * 4 * 2]
    np.testing.assert_allclose(coefficient[0, 0, 6:], expected, rtol=1e-5)
    np.testing.assert_allclose(objective[0, 0, 2:4], [2 / 1.0 * 2, -2 / 2.0 * 2], rtol=1e-6)  # f(1) = 2/tau: only its slope is A


def test_mirror_descent_by_hand():
    """A = 1, tau = 0.5, log-ratios 1 and 2: each token gets 1 - 0.5 * 3; J = sum A log pi - 0.25 * 9."""
    mask = jnp.asarray([[[True, True, False]]])
    coefficient, objective = mirror_descent(row(-1, -2, jnp.nan), row(-2, -4, 0), row(1, 1, 1), mask, tau=0.5)
    np.testing.assert_allclose(coefficient, row(-0.5, -0.5, 0), rtol=1e-6)
    np.testing.assert_allclose(jnp.sum(objective), -3 - 0.25 * 9, rtol=1e-6)


def test_deepseekmaths_dpo_row_is_not_its_equation_14():
    """The check of the design: beta sigmoid(-M) of the whole margins, where the printed form would read one token's."""
    beta, chosen, rejected = 0.3, np.array([0.1, -0.2, 0.3]), np.array([0.4, -0.1])
    logp = jnp.asarray([[[*chosen], [*rejected, 0.0]]], jnp.float32)
    mask = jnp.asarray([[[True] * 3, [True, True, False]]])
    for margin, reduce in (("mean", np.mean), ("sum", np.sum)):
        slope = beta / (1 + np.exp(beta * (reduce(chosen) - reduce(rejected))))
        coefficient, _ = preference(logp, jnp.zeros_like(logp), mask, beta=beta, margin=margin)
        np.testing.assert_allclose(coefficient, [[[slope] * 3, [-slope, -slope, 0]]], rtol=1e-6)
        token = 1 / (1 + np.exp(beta * (chosen[0] - rejected[0])))
        assert abs(token - slope) > 0.3


W = np.log([[0.5, 1.5, 4.0, 9.0], [0.9, 1.1, 1.0, 9.0]])  # log pi_old/pi_behaviour of two completions, the last token masked
W_MASK = jnp.asarray([[[True, True, True, False]] * 2])


@pytest.mark.parametrize(
    ("kind", "low", "high", "expected"),
    [
        ("truncate", 0.0, 2.0, [[0.5, 1.5, 2, 0], [0.9, 1.1, 1, 0]]),
        ("band", 0.6, 2.0, [[0, 1.5, 0, 0], [0.9, 1.1, 1, 0]]),
        ("sequence_truncate", 0.0, 2.0, [[2, 2, 2, 0], [0.99, 0.99, 0.99, 0]]),
        ("sequence_mask", 0.0, 2.0, [[0, 0, 0, 0], [0.9, 1.1, 1, 0]]),
        ("sequence_mask", 0.0, 3.5, [[0.5, 1.5, 4, 0], [0.9, 1.1, 1, 0]]),
        ("sequence_mean_mask", 0.9, 1.2, [[0, 0, 0, 0], [0.9, 1.1, 1, 0]]),
    ],
)
def test_sampler_corrections_by_hand(kind: str, low: float, high: float, expected: list):
    factor = sampler_correction(jnp.asarray(W[None], jnp.float32), jnp.zeros((1, 2, 4)), W_MASK, kind=kind, low=low, high=high)
    np.testing.assert_allclose(factor[0], expected, rtol=1e-5)


def test_the_samplers_own_policy_needs_no_correction():
    logp = jnp.asarray(W[None], jnp.float32)
    for kind in ("truncate", "band", "sequence_truncate", "sequence_mask", "sequence_mean_mask"):
        np.testing.assert_array_equal(sampler_correction(logp, logp, W_MASK, kind=kind, high=2.0), W_MASK)
