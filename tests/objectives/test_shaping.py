from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxreason import objectives
from jaxreason.objectives import Signals, policy_loss, prepare, shaping
from jaxreason.objectives.advantages import group_zscore


def test_soft_overlong_at_its_corners():
    length = jnp.asarray([[0, 80, 90, 99, 100, 130]])
    penalty = shaping.soft_overlong(length, max_completion_tokens=100, buffer_tokens=20)
    np.testing.assert_allclose(penalty, [[0, 0, -0.5, -0.95, -1, -1]], rtol=1e-6)


def test_soft_overlong_with_the_papers_numbers():
    """A budget of 20,480 whose last 4,096 tokens cost: 0 up to 16,384, -1/2 at 18,432, -1 at 20,480."""
    length = jnp.asarray([[16384, 18432, 20480]])
    penalty = shaping.soft_overlong(length, max_completion_tokens=20480, buffer_tokens=4096)
    np.testing.assert_allclose(penalty, [[0, -0.5, -1]])


def test_kimi_length_by_hand():
    length = jnp.asarray([[10, 20, 30, 30], [7, 7, 7, 7], [1, 2, 3, 5]])
    correct = jnp.asarray([[True, True, True, False], [True, False, True, False], [False, False, False, True]])
    expected = [[0.5, 0, -0.5, -0.5], [0, 0, 0, 0], [0, 0, 0, -0.5]]  # the wrong and shortest gets 0, not a reward
    np.testing.assert_allclose(shaping.kimi_length(length, correct), expected, atol=1e-6)


def test_normalise_then_sum_counts_parts_by_their_weight():
    rng = np.random.default_rng(0)
    parts = rng.normal(size=(3, 4, 2)).astype(np.float32) * [1.0, 100.0]
    got = shaping.normalise_then_sum(jnp.asarray(parts, jnp.float32), jnp.asarray([1.0, 0.5]))
    z = (parts - parts.mean(1, keepdims=True)) / (parts.std(1, keepdims=True) + 1e-6)
    np.testing.assert_allclose(got, z[..., 0] + 0.5 * z[..., 1], rtol=1e-4)
    # sum first, and the part with the larger spread decides alone
    summed = group_zscore(jnp.asarray(parts.sum(-1), jnp.float32))
    assert np.abs(summed - z[..., 1]).max() < 0.05 < np.abs(summed - got).max()


def test_normalise_then_sum_compares_the_rows_that_have_a_part():
    parts = jnp.asarray([[[1.0], [3.0], [1e9], [5.0]], [[2.0], [7.0], [7.0], [7.0]], [[1.0], [2.0], [3.0], [4.0]]])
    applies = jnp.asarray([[1, 1, 0, 1], [1, 0, 0, 0], [0, 0, 0, 0]], bool)[..., None]
    got = shaping.normalise_then_sum(parts, jnp.asarray([2.0]), applies=applies, epsilon=0.0)
    z = np.sqrt(1.5)  # of 1, 3, 5
    np.testing.assert_allclose(got, [[-2 * z, 0, 0, 2 * z], [0] * 4, [0] * 4], rtol=1e-6)
    everywhere = shaping.normalise_then_sum(parts, jnp.asarray([2.0]), applies=jnp.ones_like(parts, bool))
    np.testing.assert_allclose(everywhere, shaping.normalise_then_sum(parts, jnp.asarray([2.0])), rtol=1e-6)


def test_dynamic_sampling_keeps_the_groups_that_are_neither_all_right_nor_all_wrong():
    correct = jnp.asarray([[True, True], [False, False], [True, False]])
    np.testing.assert_array_equal(shaping.dynamic_sampling(correct), [False, False, True])


def test_dropped_groups_are_in_no_denominator():
    rng = np.random.default_rng(1)
    mask = jnp.ones((3, 2, 4), bool)
    reward = jnp.asarray([[1.0, 1.0], [0.0, 0.0], [1.0, 0.0]])
    keep = shaping.dynamic_sampling(reward > 0)
    logp = jnp.asarray(rng.normal(size=(3, 2, 4)), jnp.float32)
    algorithm = objectives.dapo()

    def gradient(mask: jax.Array, reward: jax.Array, logp: jax.Array) -> jax.Array:
        signals = Signals(mask=mask, reward=reward)
        advantage, weight = prepare(algorithm, signals)
        return jax.grad(lambda x: policy_loss(algorithm, x, signals, advantage=advantage, weight=weight)[0])(logp)

    filtered = gradient(mask & keep[:, None, None], reward, logp)
    np.testing.assert_allclose(filtered[2:], gradient(mask[2:], reward[2:], logp[2:]), rtol=1e-6)
    assert (np.asarray(filtered[:2]) == 0).all() and np.abs(filtered[2]).max() > 0.1


def test_adaptive_kl_follows_its_target():
    """beta (1 + 0.1 clip(KL/target - 1, -0.2, 0.2)): at most 2 % a step either way."""
    for kl, factor in ((6.0, 1.0), (6.6, 1.01), (60.0, 1.02), (5.4, 0.99), (0.0, 0.98)):
        np.testing.assert_allclose(shaping.adaptive_kl(0.2, jnp.asarray(kl), target=6.0), 0.2 * factor, rtol=1e-6)
    beta = jnp.asarray(0.2)
    for _ in range(3):
        beta = jax.jit(lambda b, kl: shaping.adaptive_kl(b, kl, target=6.0))(beta, jnp.asarray(60.0))
    np.testing.assert_allclose(beta, 0.2 * 1.02**3, rtol=1e-5)


def test_a_traced_beta_is_the_same_beta_and_compiles_once():
    rng = np.random.default_rng(2)
    signals = Signals(
        mask=jnp.ones((2, 2, 3), bool),
        reward=jnp.asarray(rng.random((2, 2)), jnp.float32),
        logp_behaviour=jnp.asarray(rng.normal(size=(2, 2, 3)), jnp.float32),
        logp_ref=jnp.asarray(rng.normal(size=(2, 2, 3)), jnp.float32),
    )
    logp = jnp.asarray(rng.normal(size=(2, 2, 3)), jnp.float32)
    for make in (objectives.grpo, objectives.rloo):
        count = 0

        @jax.jit
        def loss(beta: jax.Array, make=make) -> jax.Array:
            nonlocal count
            count += 1
            algorithm = make(beta=beta)
            advantage, weight = prepare(algorithm, signals)
            return policy_loss(algorithm, logp, signals, advantage=advantage, weight=weight)[0]

        for beta in (0.1, 0.2):
            algorithm = make(beta=beta)
            advantage, weight = prepare(algorithm, signals)
            expected = policy_loss(algorithm, logp, signals, advantage=advantage, weight=weight)[0]
            np.testing.assert_allclose(loss(jnp.asarray(beta)), expected, rtol=1e-6)
        assert count == 1


def test_truncated_completions_leave_by_the_mask():
    mask = jnp.ones((1, 3, 2), bool)
    got = shaping.without_truncated(mask, jnp.asarray([[False, True, False]]))
    np.testing.assert_array_equal(got, [[[True, True], [False, False], [True, True]]])
    np.testing.assert_array_equal(shaping.lengths(got), [[2, 0, 2]])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: shaping.soft_overlong(jnp.ones((1, 2)), max_completion_tokens=10, buffer_tokens=0), "buffer_tokens is 0"),
        (lambda: shaping.soft_overlong(jnp.ones((1, 2)), max_completion_tokens=10, buffer_tokens=11), "buffer_tokens is 11"),
        (lambda: shaping.kimi_length(jnp.ones((1, 2)), jnp.ones((1, 3), bool)), r"\(1, 2\).*\(1, 3\)"),
        (lambda: shaping.dynamic_sampling(jnp.ones((1, 2))), "boolean"),
        (lambda: shaping.normalise_then_sum(jnp.ones((1, 2, 3)), jnp.ones(2)), r"\(1, 2, 3\).*\(2,\)"),
        (
            lambda: shaping.normalise_then_sum(jnp.ones((1, 2, 3)), jnp.ones(3), applies=jnp.ones((1, 2), bool)),
            r"applies has shape \(1, 2\)",
        ),
        (lambda: shaping.adaptive_kl(0.1, jnp.asarray(1.0), target=0.0), "target is 0.0"),
    ],
)
def test_mistakes_are_named(unchecked: None, call, message: str):
    with pytest.raises(ValueError, match=message):
        call()
