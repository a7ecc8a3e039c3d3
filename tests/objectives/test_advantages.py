"""Advantages against loops: one token, one completion, one group after another."""

from __future__ import annotations

from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxreason.objectives.advantages import (
    _by_doubling,
    _token_by_token,
    at_last_token,
    batch_whiten,
    gae,
    greedy_baseline,
    group_centre,
    group_zscore,
    kl_in_reward,
    leave_one_out,
    length_adaptive_gae,
    relative_to_mean,
    return_to_go,
    step_returns,
    zero_variance,
)

BASELINES = [group_zscore, group_centre, leave_one_out, relative_to_mean]
P, G, T = 2, 3, 9


@pytest.fixture
def float64() -> Iterator[None]:
    with jax.enable_x64(True):
        yield


# ------------------------------------------------- baselines of a group


@pytest.mark.parametrize("baseline", BASELINES)
@pytest.mark.parametrize(("value", "size"), [(0.7, 7), (0.1, 7), (1.1, 16), (0.0, 4), (0.3, 5)])
def test_equal_rewards_give_exactly_zero_in_float32(baseline, value: float, size: int):
    reward = jnp.full((2, size), value, jnp.float32).at[1].set(jnp.arange(size, dtype=jnp.float32))
    for function in (baseline, jax.jit(baseline)):
        advantage = function(reward)
        assert advantage.dtype == jnp.float32
        assert (np.asarray(advantage[0]) == 0).all()
        assert np.abs(advantage[1]).min() < np.abs(advantage[1]).max()


def test_the_float32_hazard_is_real():
    """Without the max == min rule the group above would be pushed: this is the test that it guards anything."""
    reward = np.full(7, 0.7, np.float32)
    mean = np.float32(reward.sum(dtype=np.float32) / np.float32(7))
    std = np.sqrt(((reward - mean) ** 2).mean(dtype=np.float32))
    assert abs((reward[0] - mean) / (std + np.float32(1e-8))) > 0.1


def test_values():
    reward = jnp.asarray([[1.0, 0.0, 0.0, 1.0], [2.0, 3.0, 5.0, 7.0]])
    r = np.asarray(reward)
    centred = r - r.mean(1, keepdims=True)
    np.testing.assert_allclose(group_centre(reward), centred, rtol=1e-6)
    np.testing.assert_allclose(leave_one_out(reward), [[r_ - (sum(g) - r_) / 3 for r_ in g] for g in r], rtol=1e-6)
    np.testing.assert_allclose(relative_to_mean(reward), [[r_ / g.mean() - 1 for r_ in g] for g in r], rtol=1e-6)
    for ddof in (0, 1):
        expected = centred / (r.std(1, ddof=ddof, keepdims=True) + 1e-3)
        np.testing.assert_allclose(group_zscore(reward, ddof=ddof, epsilon=1e-3), expected, rtol=1e-6)
    np.testing.assert_array_equal(zero_variance(jnp.asarray([[0.7] * 3, [0.7, 0.7, 0.8]])), [True, False])
    np.testing.assert_allclose(greedy_baseline(reward, jnp.asarray([1.0, 4.0])), r - [[1.0], [4.0]])


@pytest.mark.parametrize("baseline", BASELINES)
def test_a_traced_nan_reward_is_not_hidden(baseline):
    advantage = jax.jit(baseline)(jnp.asarray([[1.0, jnp.nan, 0.0], [1.0, 0.0, 0.0]]))
    assert np.isnan(advantage[0]).all() and np.isfinite(advantage[1]).all()


@pytest.mark.parametrize("baseline", BASELINES)
def test_bfloat16_rewards_are_computed_with_in_float32(baseline):
    reward = jnp.asarray([[1.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.5]], jnp.bfloat16)
    advantage = baseline(reward)
    assert advantage.dtype == jnp.float32
    np.testing.assert_allclose(advantage, baseline(reward.astype(jnp.float32)), rtol=1e-6)


# ------------------------------------------------- numbers of tokens, against a walk backwards over the chosen ones


def rows(seed: int = 0) -> dict[str, np.ndarray]:
    """Ragged rows with holes, an empty row, and packed rows' segments."""
    rng = np.random.default_rng(seed)
    mask = rng.random((P, G, T)) < 0.7
    mask[0, 1] = False
    mask[1, 0] = True
    arrays = {name: rng.normal(size=(P, G, T)) for name in ("reward", "value", "logp", "ref")}
    segments = np.sort(rng.integers(0, 3, (P, G, T)), axis=-1)
    return {"mask": mask, "segments": segments, **arrays}


def walk(r: dict[str, np.ndarray], discount: float, lambdas: np.ndarray, segments: np.ndarray, behind: np.ndarray) -> np.ndarray:
    out = np.zeros((P, G, T))
    for p, g in np.ndindex(P, G):
        following = None  # (advantage, value, segment) of the chosen token behind
        for t in reversed(range(T)):
            if not r["mask"][p, g, t]:
                continue
            same = following is not None and following[2] == segments[p, g, t]
            value_behind = following[1] if same else behind[p, g]
            delta = r["reward"][p, g, t] + discount * value_behind - r["value"][p, g, t]
            out[p, g, t] = delta + (discount * lambdas[p, g, t] * following[0] if same else 0.0)
            following = (out[p, g, t], r["value"][p, g, t], segments[p, g, t])
    return out


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(("discount", "lambda_"), [(1.0, 1.0), (1.0, 0.95), (0.9, 0.5), (0.99, 0.0), (0.0, 0.7)])
def test_gae_steps_over_what_the_policy_did_not_choose(float64: None, packed: bool, discount: float, lambda_: float):
    r = rows()
    segments = r["segments"] if packed else np.zeros((P, G, T), int)
    behind = np.zeros((P, G)) if packed else np.arange(P * G, dtype=float).reshape(P, G)
    expected = walk(r, discount, np.full((P, G, T), lambda_), segments, behind)
    poisoned = [jnp.where(r["mask"], r[name], jnp.nan) for name in ("reward", "value")]
    got = gae(
        *poisoned,
        jnp.asarray(r["mask"]),
        discount=discount,
        lambda_=lambda_,
        segments=jnp.asarray(segments) if packed else None,
        bootstrap=None if packed else jnp.asarray(behind),
    )
    np.testing.assert_allclose(got, expected, atol=1e-13)
    assert np.abs(expected).max() > 0.1


def test_the_two_forms_of_the_recurrence_agree(float64: None):
    """A loop on a CPU, doubling elsewhere: this machine runs one of them only."""
    rng = np.random.default_rng(9)
    decay, increment = (jnp.asarray(rng.uniform(-1, 1, (2, 3, 37))) for _ in range(2))
    np.testing.assert_allclose(_token_by_token(decay, increment), _by_doubling(decay, increment), atol=1e-13)


@pytest.mark.parametrize("baseline", [group_zscore, group_centre, leave_one_out])
def test_an_offset_of_the_rewards_takes_no_digits_in_float32(baseline):
    reward = jnp.asarray([[0.0, 0, 1, 0, 1, 1, 0]], jnp.float32)
    np.testing.assert_allclose(baseline(reward + 1e6), baseline(reward), rtol=1e-5)
    mask = jnp.ones((1, 7, 1), bool)
    near, far = (batch_whiten((reward + offset)[:, :, None], mask) for offset in (0.0, 1e6))
    np.testing.assert_allclose(far, near, atol=1e-4)


def test_gae_with_lambda_one_is_the_return_minus_the_value(float64: None):
    r = rows(1)
    mask = jnp.asarray(r["mask"])
    returns = return_to_go(jnp.asarray(r["reward"]), mask)
    got = gae(jnp.asarray(r["reward"]), jnp.asarray(r["value"]), mask, lambda_=1.0)
    np.testing.assert_allclose(got, jnp.where(mask, returns - r["value"], 0.0), atol=1e-12)


def test_return_to_go_counts_tokens_and_not_slots(float64: None):
    mask = jnp.asarray([[[True, False, True, False, True]]])
    reward = jnp.asarray([[[1.0, 50.0, 2.0, jnp.nan, 4.0]]])
    np.testing.assert_allclose(return_to_go(reward, mask, discount=0.5), [[[1 + 1 + 1, 0, 2 + 2, 0, 4]]])


def test_length_adaptive_lambda(float64: None):
    """lambda = 1 - 1/(alpha l), a number for each completion, 0 for those shorter than 1/alpha."""
    r = rows(2)
    lengths = r["mask"].sum(-1)
    alpha = 0.25  # so that completions of 4 tokens or fewer have lambda 0, and longer ones more
    lambdas = np.clip(1 - 1 / (alpha * np.maximum(lengths, 1)), 0, 1)
    assert (lambdas == 0).any() and (lambdas > 0.3).any()
    expected = walk(r, 1.0, np.broadcast_to(lambdas[..., None], (P, G, T)), np.zeros((P, G, T), int), np.zeros((P, G)))
    got = length_adaptive_gae(jnp.asarray(r["reward"]), jnp.asarray(r["value"]), jnp.asarray(r["mask"]), alpha=alpha)
    np.testing.assert_allclose(got, expected, atol=1e-13)


def test_length_adaptive_lambda_of_packed_completions_is_each_ones_own(float64: None):
    mask = jnp.ones((1, 1, 9), bool)
    reward, value = (jnp.asarray(np.random.default_rng(3).normal(size=(1, 1, 9))) for _ in range(2))
    segments = jnp.asarray([[[0, 0, 0, 1, 1, 1, 1, 1, 1]]])
    got = length_adaptive_gae(reward, value, mask, alpha=0.4, segments=segments)
    apart = [length_adaptive_gae(reward[..., s], value[..., s], mask[..., s], alpha=0.4) for s in (slice(0, 3), slice(3, 9))]
    np.testing.assert_allclose(got, jnp.concatenate(apart, axis=-1), atol=1e-13)


def test_the_reward_is_placed_on_the_last_chosen_token():
    mask = jnp.asarray([[[True, True, False, False], [True, False, True, False], [False] * 4]])
    placed = at_last_token(jnp.asarray([[1.0, 2.0, 3.0]]), mask)
    np.testing.assert_array_equal(placed, [[[0, 1, 0, 0], [0, 0, 2, 0], [0, 0, 0, 0]]])


def test_kl_in_reward(float64: None):
    r = rows(4)
    reward = np.arange(P * G, dtype=float).reshape(P, G)
    mask = r["mask"]
    expected = np.where(mask, -0.1 * (r["logp"] - r["ref"]), 0.0)
    for p, g in np.ndindex(P, G):
        if mask[p, g].any():
            expected[p, g, np.nonzero(mask[p, g])[0][-1]] += reward[p, g]
    poisoned = [jnp.where(mask, r[name], -jnp.inf) for name in ("logp", "ref")]
    np.testing.assert_allclose(kl_in_reward(jnp.asarray(reward), *poisoned, jnp.asarray(mask), beta=0.1), expected, atol=1e-14)


@pytest.mark.parametrize("ddof", [0, 1])
def test_whitening_is_over_the_chosen_tokens_of_the_batch(float64: None, ddof: int):
    r = rows(5)
    chosen = r["reward"][r["mask"]]
    got = batch_whiten(jnp.where(r["mask"], r["reward"], jnp.nan), jnp.asarray(r["mask"]), ddof=ddof, epsilon=1e-3)
    expected = np.where(r["mask"], (r["reward"] - chosen.mean()) / (chosen.std(ddof=ddof) + 1e-3), 0.0)
    np.testing.assert_allclose(got, expected, atol=1e-13)


def test_whitening_equal_numbers_gives_exactly_zero_in_float32():
    mask = jnp.ones((1, 7, 1), bool)
    assert (np.asarray(batch_whiten(jnp.full((1, 7, 1), 0.7), mask)) == 0).all()
    assert (np.asarray(batch_whiten(jnp.full((1, 7, 1), 0.7), ~mask)) == 0).all()


# ------------------------------------------------- process supervision


def test_step_returns_by_hand():
    """Two completions, steps ending at 1 and 3, and at 2: rewards 1, 0 and 2, so mean 1 and std sqrt(2/3)."""
    end = jnp.asarray([[[False, True, False, True, False], [False, False, True, False, False]]])
    reward = jnp.asarray([[[9.0, 1.0, 9.0, 0.0, 9.0], [9.0, 9.0, 2.0, 9.0, 9.0]]])  # read where a step ends only
    mask = jnp.asarray([[[True] * 5, [True] * 4 + [False]]])
    std = np.sqrt(2 / 3)
    expected = np.array([[[-1, -1, -1, -1, 0], [1, 1, 1, 0, 0]]]) / std
    np.testing.assert_allclose(step_returns(reward, end, mask, epsilon=0.0), expected, rtol=1e-6)


def test_step_returns_against_loops(float64: None):
    r = rows(6)
    end = np.random.default_rng(7).random((P, G, T)) < 0.4
    expected = np.zeros((P, G, T))
    for p in range(P):
        where = end[p] & r["mask"][p]
        scores = r["reward"][p][where]
        normalised = (r["reward"][p] - scores.mean()) / (scores.std(ddof=1) + 1e-6)
        for g, t in zip(*np.nonzero(r["mask"][p]), strict=True):
            expected[p, g, t] = sum(normalised[g, s] for s in range(t, T) if where[g, s])
    got = step_returns(jnp.asarray(r["reward"]), jnp.asarray(end), jnp.asarray(r["mask"]), ddof=1)
    np.testing.assert_allclose(got, expected, atol=1e-12)


def test_one_step_a_completion_is_outcome_supervision(float64: None):
    r = rows(8)
    mask = r["mask"] | (np.arange(T) == 0)
    reward = jnp.asarray(r["reward"][:, :, 0])
    end = at_last_token(jnp.ones((P, G)), jnp.asarray(mask)) > 0
    got = step_returns(at_last_token(reward, jnp.asarray(mask)), end, jnp.asarray(mask))
    np.testing.assert_allclose(got, jnp.where(mask, group_zscore(reward)[:, :, None], 0.0), atol=1e-12)


def test_equal_step_rewards_give_exactly_zero_in_float32():
    end = jnp.ones((1, 7, 1), bool)
    assert (np.asarray(step_returns(jnp.full((1, 7, 1), 0.7), end, end)) == 0).all()
