from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxreason.objectives import surrogate_loss, weighted_sum
from jaxreason.objectives.coefficients import clipped, likelihood


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
