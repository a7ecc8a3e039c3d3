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


def make_table(seed: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=(1 + VOCABULARY, VOCABULARY)))


def log_probs(table: jax.Array) -> jax.Array:
    return jax.nn.log_softmax(table)[PREFIX, SEQUENCES]  # [9, LENGTH]


def probability(table: jax.Array) -> jax.Array:
    return jnp.exp(jnp.sum(log_probs(table), axis=1))


def expected_gradient(
    algorithm: Algorithm,
    table: jax.Array,
    group_size: int,
    *,
    reward: np.ndarray = REWARD,
    reference: jax.Array | None = None,
    sampler: jax.Array | None = None,
) -> np.ndarray:
    """E[-grad loss] over all groups of the sampler: each is a batch of one problem, its probability held constant."""
    sampler = table if sampler is None else sampler
    groups = np.array(list(itertools.product(range(len(SEQUENCES)), repeat=group_size)))
    chance = probability(sampler)[groups].prod(axis=1)
    greedy = float(reward[int(jnp.argmax(probability(sampler)))])

    def loss(x: jax.Array, members: jax.Array) -> jax.Array:
        logp = log_probs(x)[members][None]
        signals = Signals(
            mask=jnp.ones(logp.shape, bool),
            reward=jnp.asarray(reward)[members][None],
            greedy_reward=jnp.full(1, greedy),
            value=jnp.zeros(logp.shape),
            logp_old=log_probs(sampler)[members][None],
            logp_ref=None if reference is None else log_probs(reference)[members][None],
        )
        advantage, weight = prepare(algorithm, signals)
        return policy_loss(algorithm, logp, signals, advantage=advantage, weight=weight)[0]

    def expectation(x: jax.Array) -> jax.Array:
        return jnp.sum(jax.lax.stop_gradient(chance) * jax.vmap(loss, (None, 0))(x, jnp.asarray(groups)))

    return -np.asarray(jax.grad(expectation)(table))


def expected_reward(table: jax.Array) -> jax.Array:
    return jnp.sum(probability(table) * REWARD)


def sequence_kl(table: jax.Array, reference: jax.Array) -> jax.Array:
    return jnp.sum(probability(table) * jnp.sum(log_probs(table) - log_probs(reference), axis=1))


def per_state(table: jax.Array, reference: jax.Array, *, forward: bool) -> jax.Array:
    """The divergence at each state, the states visited as often as they are now."""
    mine, other = jax.nn.log_softmax(table), jax.nn.log_softmax(reference)
    visits = jnp.concatenate([jnp.ones(1), jax.lax.stop_gradient(jnp.exp(mine[0]))])
    at_state = jnp.exp(other) * (other - mine) if forward else jnp.exp(mine) * (mine - other)
    return jnp.sum(visits * jnp.sum(at_state, axis=1))


@pytest.mark.parametrize("group_size", [2, 3])
@pytest.mark.parametrize("name", ["reinforce", "rloo", "remax", "dr_grpo"])
def test_expected_gradient_is_that_of_the_expected_reward(name: str, group_size: int):
    """REINFORCE, RLOO and ReMax exactly; a mean that includes the sample itself loses 1/G (and Dr. GRPO divides by L)."""
    table = make_table(3)
    algorithm, factor = {
        "reinforce": (objectives.reinforce(), 1.0),
        "rloo": (objectives.rloo(), 1.0),
        "remax": (objectives.remax(), 1.0),
        "dr_grpo": (objectives.dr_grpo(max_completion_tokens=5), (group_size - 1) / group_size / 5),
    }[name]
    truth = np.asarray(jax.grad(expected_reward)(table))
    np.testing.assert_allclose(expected_gradient(algorithm, table, group_size), factor * truth, atol=1e-12)
    assert np.abs(truth).max() > 1e-2


def test_ppo_without_a_critic_and_a_clip_is_the_policy_gradient():
    """lambda 1 and V = 0 make the advantage the return; the weight's 1/|o| is one factor, as all lengths are equal."""
    table = make_table(4)
    truth = np.asarray(jax.grad(expected_reward)(table)) / LENGTH
    np.testing.assert_allclose(expected_gradient(objectives.ppo(lambda_=1.0), table, 1), truth, atol=1e-12)


def test_kl_in_the_reward_is_the_gradient_of_the_sequences_reverse_divergence():
    table, reference = make_table(5), make_table(6)
    nothing = np.zeros(len(REWARD))
    truth = -0.3 * np.asarray(jax.grad(sequence_kl)(table, reference))
    got = expected_gradient(objectives.rloo(beta=0.3), table, 2, reward=nothing, reference=reference)
    np.testing.assert_allclose(got, truth, atol=1e-12)
    ppo = expected_gradient(objectives.ppo(beta=0.3, lambda_=1.0), table, 1, reward=nothing, reference=reference)
    np.testing.assert_allclose(ppo * LENGTH, truth, atol=1e-12)
    # which is not the gradient of the divergence at each state: a token changes which states come later
    assert np.abs(truth + 0.3 * np.asarray(jax.grad(per_state)(table, reference, forward=False))).max() > 1e-3


@pytest.mark.parametrize("kind", ["k1", "k2", "k3", "weighted_k3"])
def test_kl_in_the_loss_descends_the_divergence_at_each_state(kind: str):
    table, reference = make_table(5), make_table(6)
    algorithm = objectives.grpo(beta=0.3, kl=kind)
    got = expected_gradient(algorithm, table, 2, reward=np.zeros(len(REWARD)), reference=reference) * LENGTH
    if kind == "k1":
        truth = np.zeros_like(got)
    else:
        truth = -0.3 * np.asarray(jax.grad(per_state)(table, reference, forward=kind == "k3"))
    np.testing.assert_allclose(got, truth, atol=1e-12)


@pytest.mark.parametrize("group_size", [2, 3, 4])
def test_maxrl_climbs_the_truncated_likelihood_of_success(group_size: int):
    """E = w(p) grad p with w(p) = (1 - (1-p)^(G-1))/p, the first G - 1 terms of log p."""
    table = make_table(7)
    p = float(expected_reward(table))
    factor = (1 - (1 - p) ** (group_size - 1)) / p
    truth = factor * np.asarray(jax.grad(expected_reward)(table))
    np.testing.assert_allclose(expected_gradient(objectives.maxrl(), table, group_size), truth, atol=1e-12)


def test_a_ratio_without_a_clip_is_unbiased_off_policy_for_one_token():
    """The token-level ratio leaves the drift of the prefix out; with a wide clip the first token's row is exact."""
    table, sampler = make_table(8), make_table(9)
    algorithm = objectives.ppo(lambda_=1.0, clip_low=1.0, clip_high=1e9)
    got = expected_gradient(algorithm, table, 1, sampler=sampler) * LENGTH

    def first_token(x: jax.Array) -> jax.Array:
        """The first token from the policy, the second from the sampler."""
        second = jnp.exp(log_probs(sampler)[:, 1])
        return jnp.sum(jnp.exp(log_probs(x)[:, 0]) * second * REWARD)

    np.testing.assert_allclose(got[0], jax.grad(first_token)(table)[0], atol=1e-12)


def test_grpos_deviation_weighs_a_question_by_its_difficulty():
    """For many completions E[A+] is sqrt((1-p)/p) a success: 1/sqrt(p(1-p)) of the true gradient."""
    p, group_size = 0.25, 400
    reward = jnp.asarray(np.arange(group_size) < p * group_size, float)[None]
    advantage = objectives.advantages.group_zscore(reward, epsilon=0.0)
    np.testing.assert_allclose(advantage[0, 0], np.sqrt((1 - p) / p), rtol=1e-12)
    np.testing.assert_allclose(advantage[0, -1], -np.sqrt(p / (1 - p)), rtol=1e-12)
