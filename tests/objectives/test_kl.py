"""Values and gradients of the estimators, against exact expectations at one state of a small policy."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxreason.objectives.kl import kl_k1, kl_k2, kl_k3, log_ratio, reference_pull

VOCABULARY = 5


@pytest.fixture(autouse=True)
def float64() -> Iterator[None]:
    with jax.enable_x64(True):
        yield


def state() -> tuple[jax.Array, jax.Array, jax.Array]:
    rng = np.random.default_rng(1)
    shape = (1, 1, VOCABULARY)
    return jnp.asarray(rng.normal(size=shape)), jnp.asarray(rng.normal(size=shape)), jnp.ones(shape, bool)


def divergence(a: jax.Array, b: jax.Array) -> jax.Array:
    """KL(softmax a || softmax b)."""
    return jnp.sum(jax.nn.softmax(a) * (jax.nn.log_softmax(a) - jax.nn.log_softmax(b)))


def expected_gradient(pull: jax.Array, logits: jax.Array) -> jax.Array:
    """E over the policy's own tokens of pull * grad log pi: one pass through every token of the vocabulary."""
    probability = jax.nn.softmax(logits)
    return jax.grad(lambda z: jnp.sum(probability * pull * jax.nn.log_softmax(z)))(logits)


def test_k1_and_k3_are_unbiased_values_of_the_reverse_divergence():
    logits, ref, mask = state()
    logp, logp_ref = jax.nn.log_softmax(logits), jax.nn.log_softmax(ref)
    for estimator in (kl_k1, kl_k3):
        value = jnp.sum(jnp.exp(logp) * estimator(logp, logp_ref, mask))
        np.testing.assert_allclose(value, divergence(logits, ref), rtol=1e-12)
    np.testing.assert_allclose(kl_k2(logp, logp_ref, mask), (logp - logp_ref) ** 2 / 2)


@pytest.mark.parametrize(
    ("kind", "target"),
    [
        ("k1", lambda z, ref: 0.0 * jnp.sum(z)),
        ("k2", lambda z, ref: divergence(z, ref)),
        ("k3", lambda z, ref: divergence(ref, z)),
    ],
)
def test_what_each_pull_descends_on_policy(kind: str, target: Callable):
    logits, ref, mask = state()
    pull, _ = reference_pull(jax.nn.log_softmax(logits), jax.nn.log_softmax(ref), mask, kind=kind)
    np.testing.assert_allclose(expected_gradient(pull, logits), -jax.grad(target)(logits, ref), atol=1e-12)


@pytest.mark.parametrize("kind", ["k1", "k2", "k3"])
def test_the_coefficient_is_the_gradient_of_the_objective(kind: str):
    rng = np.random.default_rng(2)
    logp, logp_ref = (jnp.asarray(-rng.gamma(1.5, 0.6, (2, 3, 4))) for _ in range(2))
    mask = jnp.asarray(rng.random((2, 3, 4)) < 0.7)
    logp, logp_ref = (jnp.where(mask, x, -jnp.inf) for x in (logp, logp_ref))
    coefficient, objective = reference_pull(logp, logp_ref, mask, kind=kind)
    estimator = {"k1": kl_k1, "k2": kl_k2, "k3": kl_k3}[kind]
    np.testing.assert_allclose(objective, -estimator(logp, logp_ref, mask), rtol=1e-12)
    gradient = jax.grad(lambda x: -jnp.sum(estimator(x, logp_ref, mask)))(logp)
    np.testing.assert_allclose(coefficient, gradient, atol=1e-12)
    assert (np.asarray(coefficient)[~np.asarray(mask)] == 0).all() and np.isfinite(objective).all()


def test_log_ratio_takes_no_gradient_through_the_other_policy():
    logits, ref, mask = state()
    assert (np.asarray(jax.grad(lambda b: jnp.sum(log_ratio(logits, b, mask)))(ref)) == 0).all()


def test_unknown_estimator():
    logits, ref, mask = state()
    with pytest.raises(ValueError, match="'k5'"):
        reference_pull(logits, ref, mask, kind="k5")
