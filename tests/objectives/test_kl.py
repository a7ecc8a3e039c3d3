"""Values and gradients of the estimators, against exact expectations at one state of a small policy."""

from __future__ import annotations

from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.lax import stop_gradient as sg

from jaxreason.objectives.coefficients import entropy_bonus, reverse_kl
from jaxreason.objectives.kl import KINDS, kl_k1, kl_k2, kl_k3, log_ratio, reference_pull

VOCABULARY = 5


@pytest.fixture(autouse=True)
def float64() -> Iterator[None]:
    with jax.enable_x64(True):
        yield


def state() -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Logits of the policy, of the reference and of an old policy at one state, as [1, 1, V], and the mask."""
    rng = np.random.default_rng(1)
    shape = (1, 1, VOCABULARY)
    policy, reference = jnp.asarray(rng.normal(size=shape)), jnp.asarray(rng.normal(size=shape))
    return policy, reference, policy + jnp.asarray(rng.normal(0, 0.5, shape)), jnp.ones(shape, bool)


def divergence(a: jax.Array, b: jax.Array) -> jax.Array:
    """KL(softmax a || softmax b)."""
    return jnp.sum(jax.nn.softmax(a) * (jax.nn.log_softmax(a) - jax.nn.log_softmax(b)))


def expected_gradient(pull: jax.Array, logits: jax.Array, sampler: jax.Array) -> jax.Array:
    """E over the sampler's tokens of pull * grad log pi: one pass through every token of the vocabulary."""
    return jax.grad(lambda z: jnp.sum(jax.nn.softmax(sampler) * pull * jax.nn.log_softmax(z)))(logits)


def test_k1_and_k3_are_unbiased_values_of_the_reverse_divergence():
    logits, ref, _, mask = state()
    logp, logp_ref = jax.nn.log_softmax(logits), jax.nn.log_softmax(ref)
    for estimator in (kl_k1, kl_k3):
        value = jnp.sum(jnp.exp(logp) * estimator(logp, logp_ref, mask))
        np.testing.assert_allclose(value, divergence(logits, ref), rtol=1e-12)
    np.testing.assert_allclose(kl_k2(logp, logp_ref, mask), (logp - logp_ref) ** 2 / 2)


def nothing(z: jax.Array, ref: jax.Array) -> jax.Array:
    return 0.0 * jnp.sum(z)


def reverse(z: jax.Array, ref: jax.Array) -> jax.Array:
    return divergence(z, ref)


def forward(z: jax.Array, ref: jax.Array) -> jax.Array:
    return divergence(ref, z)


ON_POLICY = {
    "k1": nothing,
    "k2": reverse,
    "k3": forward,
    "k1_plus": reverse,
    "k3_plus": reverse,
    "weighted_k1": reverse,
    "weighted_k3": reverse,
    "fixed_weight_k2": reverse,
    "fixed_weight_k3_plus": reverse,
    "fixed_weight_k3": forward,
}


@pytest.mark.parametrize("kind", KINDS)
def test_what_each_pull_descends_on_policy(kind: str):
    """k1 in the loss does nothing; plain k3 descends the forward divergence; abs and weighted k2 descend neither."""
    logits, ref, _, mask = state()
    pull, _ = reference_pull(jax.nn.log_softmax(logits), jax.nn.log_softmax(ref), mask, kind=kind)
    got = expected_gradient(pull, logits, logits)
    if kind in ON_POLICY:
        np.testing.assert_allclose(got, -jax.grad(ON_POLICY[kind])(logits, ref), atol=1e-12)
    else:
        for target in (nothing, reverse, forward):
            assert np.abs(got + jax.grad(target)(logits, ref)).max() > 1e-2


@pytest.mark.parametrize("kind", KINDS)
def test_what_each_pull_descends_off_policy(kind: str):
    """Samples of an old policy: only the weighted forms still descend the reverse divergence, and k3 fixed the forward one."""
    logits, ref, old, mask = state()
    logp, logp_ref, logp_old = (jax.nn.log_softmax(x) for x in (logits, ref, old))
    pull, minus_kl = reference_pull(logp, logp_ref, mask, kind=kind, logp_old=logp_old)
    got = expected_gradient(pull, logits, old)
    if kind in ("weighted_k1", "weighted_k3", "fixed_weight_k2", "fixed_weight_k3_plus"):
        np.testing.assert_allclose(got, -jax.grad(reverse)(logits, ref), atol=1e-12)
    elif kind == "fixed_weight_k3":
        np.testing.assert_allclose(got, -jax.grad(forward)(logits, ref), atol=1e-12)
    else:
        assert np.abs(got + jax.grad(reverse)(logits, ref)).max() > 1e-3
    if kind in ("weighted_k1", "weighted_k3", "fixed_weight_k3", "fixed_weight_k3_plus"):
        np.testing.assert_allclose(-jnp.sum(jnp.exp(logp_old) * minus_kl), divergence(logits, ref), rtol=1e-12)


def book(kind: str, x: jax.Array, ref: jax.Array, old: jax.Array) -> jax.Array:
    """The estimators as their papers write them, to be differentiated by jax."""
    ell, w = x - ref, jnp.exp(x - old)
    plain = {"k1": ell, "k2": ell**2 / 2, "k3": jnp.exp(-ell) - 1 + ell, "abs": jnp.abs(ell)}
    if kind in plain:
        return plain[kind]
    if kind in ("k1_plus", "k3_plus"):
        return plain["k2"] + sg(plain[kind[:2]] - plain["k2"])
    if kind.startswith("weighted_"):
        return w * plain[kind[-2:]]
    if kind == "fixed_weight_k3_plus":
        return sg(w) * (plain["k2"] + sg(plain["k3"] - plain["k2"]))
    return sg(w) * plain[kind[-2:]]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scale", [0.001, 1.0, 4.0])
def test_the_coefficient_is_the_gradient_of_the_objective(kind: str, scale: float):
    rng = np.random.default_rng(2)
    logp = jnp.asarray(-rng.gamma(1.5, 0.6, (2, 3, 4)))
    logp_ref, logp_old = (logp + jnp.asarray(rng.normal(0, scale, logp.shape)) for _ in range(2))
    mask = jnp.asarray(rng.random((2, 3, 4)) < 0.7)
    value = book(kind, logp, logp_ref, logp_old)
    gradient = jax.grad(lambda x: -jnp.sum(jnp.where(mask, book(kind, x, logp_ref, logp_old), 0.0)))(logp)
    bad = [jnp.where(mask, x, -jnp.inf) for x in (logp, logp_ref)]
    coefficient, objective = reference_pull(*bad, mask, kind=kind, logp_old=jnp.where(mask, logp_old, jnp.nan))
    np.testing.assert_allclose(objective, jnp.where(mask, -value, 0.0), rtol=1e-9, atol=1e-13)
    np.testing.assert_allclose(coefficient, gradient, rtol=1e-9, atol=1e-13)
    assert (np.asarray(coefficient)[~np.asarray(mask)] == 0).all()


def test_weighted_k3_is_not_k3_even_where_the_weight_is_one():
    """Differentiating the weight adds k3 * grad log pi."""
    logp, ref, mask = jnp.full((1, 1, 1), -1.0), jnp.full((1, 1, 1), -2.0), jnp.ones((1, 1, 1), bool)
    plain, weighted = (reference_pull(logp, ref, mask, kind=kind)[0] for kind in ("k3", "weighted_k3"))
    np.testing.assert_allclose([plain.item(), weighted.item()], [np.exp(-1) - 1, -1.0])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("ell", [80.0, -80.0])
@pytest.mark.parametrize("move", [80.0, -80.0, 0.0])
def test_extreme_log_ratios_stay_finite_in_float32(kind: str, ell: float, move: float):
    logp, mask = jnp.full((1, 1, 1), -1.0, jnp.float32), jnp.ones((1, 1, 1), bool)
    coefficient, objective = reference_pull(logp, logp - ell, mask, kind=kind, logp_old=logp - move)
    assert coefficient.dtype == objective.dtype == jnp.float32
    assert np.isfinite(coefficient).all() and np.isfinite(objective).all()


@pytest.mark.parametrize("kind", ["k2", "k3", "weighted_k3"])
def test_the_pull_is_not_cut_where_the_divergence_is_largest(kind: str):
    """Other code clamps the log-ratio at 10 or 20, which sets this gradient to 0."""
    logp, mask = jnp.full((1, 1, 1), -30.0), jnp.ones((1, 1, 1), bool)
    coefficient, _ = reference_pull(logp, logp + 25.0, mask, kind=kind)
    assert coefficient.item() >= 25.0


def test_on_policy_distillation_descends_the_reverse_divergence_off_policy_too():
    logits, teacher, old, mask = state()
    logp, logp_teacher, logp_old = (jax.nn.log_softmax(x) for x in (logits, teacher, old))
    coefficient, objective = reverse_kl(logp, logp_teacher, logp_old, mask)
    np.testing.assert_allclose(expected_gradient(coefficient, logits, old), -jax.grad(reverse)(logits, teacher), atol=1e-12)
    np.testing.assert_allclose(jnp.sum(jnp.exp(logp_old) * objective), -divergence(logits, teacher), rtol=1e-12)


def test_the_entropy_bonus_is_unbiased_in_value_and_gradient():
    logits, _, old, mask = state()

    def entropy(z: jax.Array) -> jax.Array:
        return -jnp.sum(jax.nn.softmax(z) * jax.nn.log_softmax(z))

    for sampler in (logits, old):
        coefficient, objective = entropy_bonus(jax.nn.log_softmax(logits), jax.nn.log_softmax(sampler), mask)
        np.testing.assert_allclose(expected_gradient(coefficient, logits, sampler), jax.grad(entropy)(logits), atol=1e-12)
        np.testing.assert_allclose(jnp.sum(jax.nn.softmax(sampler) * objective), entropy(logits), rtol=1e-12)


def test_log_ratio_takes_no_gradient_through_the_other_policy():
    logits, ref, _, mask = state()
    assert (np.asarray(jax.grad(lambda b: jnp.sum(log_ratio(logits, b, mask)))(ref)) == 0).all()


def test_unknown_estimator():
    logits, ref, _, mask = state()
    with pytest.raises(ValueError, match="'k5'"):
        reference_pull(logits, ref, mask, kind="k5")
