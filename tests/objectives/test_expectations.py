"""Expected gradients of whole algorithms, by enumerating every group that a tiny autoregressive policy can sample."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxreason import objectives
from jaxreason.objectives import Algorithm, Signals, policy_loss, prepare

VOCABULARY, LENGTH = 3, 2
SEQUENCES = np.array(list(itertools.product(range(VOCABULARY), repeat=LENGTH)))  # [9, 2]
PREFIX = np.array([[0, 1 + s[0]] for s in SEQUENCES])  # row of the table that each token is drawn from
REWARD = np.array([1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0])


@pytest.fixture(autouse=True)
def float64() -> Iterator[None]:
    with jax.enable_x64(True):
        yield


def log_probs(table: jax.Array) -> jax.Array:
    return jax.nn.log_softmax(table)[PREFIX, SEQUENCES]  # [9, LENGTH]


def expected_gradient(algorithm: Algorithm, table: jax.Array, group_size: int) -> np.ndarray:
    """E[-grad loss] over all groups: each is a batch of one problem, and its probability is held constant."""
    groups = np.array(list(itertools.product(range(len(SEQUENCES)), repeat=group_size)))
    probability = jnp.exp(jnp.sum(log_probs(table), axis=1))[groups].prod(axis=1)

    def loss(x: jax.Array, members: jax.Array) -> jax.Array:
        logp = log_probs(x)[members][None]
        signals = Signals(mask=jnp.ones(logp.shape, bool), reward=jnp.asarray(REWARD)[members][None])
        advantage, weight = prepare(algorithm, signals)
        return policy_loss(algorithm, logp, signals, advantage=advantage, weight=weight)[0]

    def expectation(x: jax.Array) -> jax.Array:
        return jnp.sum(jax.lax.stop_gradient(probability) * jax.vmap(loss, (None, 0))(x, jnp.asarray(groups)))

    return -np.asarray(jax.grad(expectation)(table))


def expected_reward(table: jax.Array) -> jax.Array:
    return jnp.sum(jnp.exp(jnp.sum(log_probs(table), axis=1)) * REWARD)


@pytest.mark.parametrize("group_size", [2, 3])
@pytest.mark.parametrize("name", ["reinforce", "rloo", "dr_grpo"])
def test_expected_gradient_is_that_of_the_expected_reward(name: str, group_size: int):
    """REINFORCE and RLOO exactly; a mean that includes the sample itself loses 1/G (and Dr. GRPO divides by L)."""
    table = jnp.asarray(np.random.default_rng(3).normal(size=(1 + VOCABULARY, VOCABULARY)))
    algorithm, factor = {
        "reinforce": (objectives.reinforce(), 1.0),
        "rloo": (objectives.rloo(), 1.0),
        "dr_grpo": (objectives.dr_grpo(max_completion_tokens=5), (group_size - 1) / group_size / 5),
    }[name]
    truth = np.asarray(jax.grad(expected_reward)(table))
    np.testing.assert_allclose(expected_gradient(algorithm, table, group_size), factor * truth, atol=1e-12)
    assert np.abs(truth).max() > 1e-2
