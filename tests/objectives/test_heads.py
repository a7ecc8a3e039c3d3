"""Heads: each coefficient is the gradient of an objective written here in other words, and the value is that objective's."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxreason.objectives import Signals, heads, ppo, prepare, valued_loss, vapo, weights

RNG = np.random.default_rng(0)
SHAPE = (2, 3, 4)
MASK = RNG.random(SHAPE) < 0.7


@pytest.fixture(autouse=True)
def float64() -> Iterator[None]:
    with jax.enable_x64(True):
        yield


def check(head: Callable, book: Callable, output: np.ndarray, mask: np.ndarray, *, junk: float = np.nan) -> None:
    """`book(output)` gives the objective of each entry; its gradient is compared with the coefficient, and the loss with both."""
    wide = mask.reshape(mask.shape + (1,) * (output.ndim - mask.ndim))
    poisoned = jnp.where(wide, output, junk)
    coefficient, objective = head(poisoned)
    expected = np.where(mask, book(jnp.asarray(output)), 0.0)
    np.testing.assert_allclose(objective, expected, atol=1e-12)
    gradient = jax.grad(lambda x: jnp.sum(jnp.where(mask, book(x), 0.0)))(jnp.asarray(output))
    np.testing.assert_allclose(coefficient, gradient, atol=1e-12)
    assert np.abs(gradient).max() > 1e-3
    weight = jnp.where(mask, 1 / float(mask.sum()), 0.0)
    loss, through = jax.value_and_grad(lambda x: valued_loss(x, *head(x), weight))(poisoned)
    np.testing.assert_allclose(loss, -expected.sum() / float(mask.sum()), rtol=1e-12)
    np.testing.assert_allclose(through, -gradient / float(mask.sum()), atol=1e-12)
    assert (np.asarray(through)[~mask] == 0).all()


@pytest.mark.parametrize("label", [(RNG.random(SHAPE) < 0.5).astype(float), RNG.random(SHAPE)], ids=["hard", "soft"])
def test_step_cross_entropy(label: np.ndarray):
    def book(z: jax.Array) -> jax.Array:
        p = 1 / (1 + jnp.exp(-z))
        return label * jnp.log(p) + (1 - label) * jnp.log(1 - p)

    labels = jnp.where(MASK, label, jnp.nan)
    check(lambda z: heads.step_cross_entropy(z, labels, jnp.asarray(MASK)), book, RNG.normal(size=SHAPE), MASK)


def test_a_step_without_a_label_is_not_a_wrong_step():
    logit, label = jnp.zeros((1, 1, 2)), jnp.zeros((1, 1, 2))
    mask = jnp.asarray([[[True, False]]])
    coefficient, objective = heads.step_cross_entropy(logit, label, mask)
    np.testing.assert_allclose(coefficient, [[[-0.5, 0.0]]])
    np.testing.assert_allclose(objective, [[[np.log(0.5), 0.0]]])


def test_outcome_cross_entropy_survives_extreme_logits():
    mask = jnp.ones((1, 4), bool)
    coefficient, objective = heads.outcome_cross_entropy(
        jnp.asarray([[800.0, -800.0, 800.0, -800.0]]), jnp.asarray([[1.0, 1.0, 0.0, 0.0]]), mask
    )
    np.testing.assert_allclose(coefficient, [[0, 1, -1, 0]], atol=1e-12)
    np.testing.assert_allclose(objective, [[0, -800, -800, 0]], atol=1e-12)


def test_what_a_critic_learns():
    """PPO's returns are advantage + value, its KL in them; VAPO's are what is still to come, which values do not enter."""
    reward, discount = RNG.normal(size=SHAPE[:2]), 0.9
    value, behaviour, reference = (jnp.where(MASK, RNG.normal(size=SHAPE), jnp.nan) for _ in range(3))
    mask = jnp.asarray(MASK)
    signals = Signals(mask, jnp.asarray(reward), value=value, logp_behaviour=behaviour, logp_ref=reference)
    algorithm = ppo(beta=0.1, discount=discount, lambda_=0.7)
    assert algorithm.returns is not None
    expected = prepare(algorithm, signals)[0] + value
    np.testing.assert_allclose(algorithm.returns(signals)[MASK], expected[MASK], rtol=1e-12)
    returns = vapo(discount=discount).returns
    assert returns is not None
    found = returns(signals)
    for p, g in np.ndindex(*SHAPE[:2]):
        chosen = np.flatnonzero(MASK[p, g])
        to_come = reward[p, g] * discount ** np.arange(len(chosen))[::-1]
        np.testing.assert_allclose(found[p, g, chosen], to_come, rtol=1e-9)


def test_value_loss_plain():
    returns = RNG.normal(size=SHAPE)
    check(
        lambda v: heads.value_loss(v, jnp.where(MASK, returns, jnp.inf), jnp.asarray(MASK)),
        lambda v: -((v - returns) ** 2) / 2,
        RNG.normal(size=SHAPE),
        MASK,
    )


def test_value_loss_clipped():
    shape = (4, 5, 6)
    rng = np.random.default_rng(1)
    returns, old = rng.normal(size=shape), rng.normal(size=shape)
    value = old + rng.normal(0, 0.4, shape)
    mask = rng.random(shape) < 0.8

    def book(v: jax.Array) -> jax.Array:
        near = old + jnp.where(v - old > 0.2, 0.2, jnp.where(v - old < -0.2, -0.2, v - old))
        plain, held = (v - returns) ** 2, (near - returns) ** 2
        return -jnp.where(plain > held, plain, held) / 2

    def clipped(v: jax.Array) -> tuple[jax.Array, jax.Array]:
        return heads.value_loss(v, jnp.asarray(returns), jnp.asarray(mask), value_old=jnp.asarray(old), clip=0.2)

    check(clipped, book, value, mask)
    moved = np.abs(value - old)[mask] > 0.2
    dropped = np.asarray(clipped(jnp.asarray(value))[0])[mask] == 0
    assert (dropped & moved).any() and (~dropped & moved).any() and not (dropped & ~moved).any()


@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_distillation_from_logits(direction: str):
    teacher = RNG.normal(size=(*SHAPE, 5))

    def book(z: jax.Array) -> jax.Array:
        p, q = jnp.exp(z) / jnp.exp(z).sum(-1, keepdims=True), np.exp(teacher) / np.exp(teacher).sum(-1, keepdims=True)
        return -(q * jnp.log(q / p)).sum(-1) if direction == "forward" else -(p * jnp.log(p / q)).sum(-1)

    head = heads.forward_kl if direction == "forward" else heads.full_reverse_kl
    poisoned = jnp.where(MASK[..., None], teacher, jnp.nan)
    check(lambda z: head(z, poisoned, jnp.asarray(MASK)), book, RNG.normal(size=(*SHAPE, 5)), MASK)


def test_a_token_that_the_teacher_excludes_costs_nothing_forward():
    logits, teacher = jnp.zeros((1, 1, 1, 3)), jnp.asarray([[[[0.0, 0.0, -jnp.inf]]]])
    coefficient, objective = heads.forward_kl(logits, teacher, jnp.ones((1, 1, 1), bool))
    np.testing.assert_allclose(coefficient[0, 0, 0], [1 / 6, 1 / 6, -1 / 3], rtol=1e-12)
    np.testing.assert_allclose(objective[0, 0, 0], -np.log(1.5), rtol=1e-12)


@pytest.mark.parametrize("completions", [2, 4])
@pytest.mark.parametrize("margins", [False, True])
def test_bradley_terry_ranks_every_pair(completions: int, margins: bool):
    score = RNG.normal(size=(3, completions))
    margin = RNG.random(3) if margins else np.zeros(3)

    def book(s: jax.Array) -> jax.Array:
        total = jnp.zeros(3)
        pairs = [(i, j) for i in range(completions) for j in range(completions) if i < j]
        for i, j in pairs:
            total += -jnp.log(1 + jnp.exp(-(s[:, i] - s[:, j] - margin)))
        return jnp.mean(total / len(pairs))

    coefficient, objective = heads.bradley_terry(jnp.asarray(score), margin=jnp.asarray(margin) if margins else None)
    value, gradient = jax.value_and_grad(book)(jnp.asarray(score))
    np.testing.assert_allclose(coefficient / 3, gradient, atol=1e-12)

    def loss_of(s: jax.Array) -> jax.Array:
        return valued_loss(s, *heads.bradley_terry(s, margin=jnp.asarray(margin)), jnp.full(s.shape, 1 / 3))

    loss, through = jax.value_and_grad(loss_of)(jnp.asarray(score))
    np.testing.assert_allclose([loss, jnp.sum(objective) / 3], [-value, value], rtol=1e-12)
    np.testing.assert_allclose(through, -gradient, atol=1e-12)
    shifted, _ = heads.bradley_terry(jnp.asarray(score + 5.0), margin=jnp.asarray(margin))
    np.testing.assert_allclose(shifted, coefficient, atol=1e-12)  # only differences count


def test_bfloat16_heads_compute_in_float32():
    mask = jnp.ones((1, 1, 3), bool)
    value, returns = jnp.asarray([[[0.1, 0.2, 0.3]]], jnp.bfloat16), jnp.asarray([[[0.3, 0.3, 0.3]]], jnp.float32)
    coefficient, objective = heads.value_loss(value, returns, mask)
    assert coefficient.dtype == objective.dtype == jnp.float32
    weight = weights.token_mean(mask)
    loss, gradient = jax.value_and_grad(lambda v: valued_loss(v, *heads.value_loss(v, returns, mask), weight))(value)
    assert loss.dtype == jnp.float32 and gradient.dtype == jnp.bfloat16
