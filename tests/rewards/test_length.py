"""Length rewards: numbers worked out by hand, and the arrays' versions of them."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxreason.objectives import shaping
from jaxreason.rewards.length import cosine_length, kimi_length, soft_overlong
from jaxreason.types import Completion, Problem, Reward, StopReason

PROBLEM = Problem("0", "1 + 1?", "2")


def of_length(length: int) -> Completion:
    return Completion("", tuple(range(length)), StopReason.EOS)


def judged(correct: bool | None) -> Reward:
    value = None if correct is None else float(correct)
    return Reward(value or 0.0, {"accuracy": value})


@pytest.mark.parametrize(("length", "expected"), [(0, 0), (6, 0), (7, -0.25), (8, -0.5), (9, -0.75), (10, -1), (25, -1)])
def test_soft_overlong_falls_over_the_last_tokens(length: int, expected: float):
    reward = soft_overlong(PROBLEM, of_length(length), max_completion_tokens=10, cache_tokens=4)
    assert reward == Reward(expected, {"overlong": expected})


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 300), min_size=1, max_size=6), st.integers(1, 200), st.integers(0, 100))
def test_soft_overlong_is_the_arrays_version(lengths: list[int], cache: int, more: int):
    limit = cache + more
    with jax.enable_x64(True):
        array = shaping.soft_overlong(jnp.asarray([lengths], jnp.float64), max_completion_tokens=limit, buffer_tokens=cache)
    ours = [soft_overlong(PROBLEM, of_length(n), max_completion_tokens=limit, cache_tokens=cache).total for n in lengths]
    np.testing.assert_allclose(ours, np.asarray(array)[0], rtol=0, atol=1e-15)  # a division may be a product there


@pytest.mark.parametrize(("limit", "cache"), [(4, 5), (4, 0), (0, 0), (4, -1)])
def test_soft_overlong_refuses_a_cache_outside_the_budget(limit: int, cache: int):
    with pytest.raises(ValueError, match="cache_tokens"):
        soft_overlong(PROBLEM, of_length(1), max_completion_tokens=limit, cache_tokens=cache)


def test_kimi_by_hand():
    completions = [of_length(n) for n in (10, 20, 30, 30, 14)]
    rewards = kimi_length(PROBLEM, completions, [judged(c) for c in (True, True, True, False, False)])
    assert [reward.total for reward in rewards] == [0.5, 0.0, -0.5, -0.5, 0.0]
    assert [reward.parts["length"] for reward in rewards] == [0.5, 0.0, -0.5, -0.5, 0.0]
    equal = kimi_length(PROBLEM, [of_length(3)] * 2, [judged(True), judged(None)])
    assert [reward.total for reward in equal] == [0.0, 0.0]
    assert kimi_length(PROBLEM, [], []) == []


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 500), st.booleans()), min_size=1, max_size=8))
def test_kimi_is_the_arrays_version(group: list[tuple[int, bool]]):
    length, correct = np.array([[n for n, _ in group]], np.float64), np.array([[c for _, c in group]])
    ours = [r.total for r in kimi_length(PROBLEM, [of_length(n) for n, _ in group], [judged(c) for _, c in group])]
    with jax.enable_x64(True):
        array = shaping.kimi_length(jnp.asarray(length), jnp.asarray(correct))
    np.testing.assert_allclose(ours, np.asarray(array)[0], rtol=0, atol=1e-15)


def test_cosine_by_hand():
    lengths, right = (0, 5, 10, 15, 20, 0, 10, 15, 20, 99), (1, 1, 1, 1, 1, 0, 0, 0, 0, 1)
    rewards = cosine_length(PROBLEM, [of_length(n) for n in lengths], [judged(bool(c)) for c in right], max_completion_tokens=20)
    half = math.sqrt(0.5) / 2
    expected = [2, 1.5 + half, 1.5, 1.5 - half, -10, -10, -5, -10 * (0.5 - half), -10, -10]
    np.testing.assert_allclose([reward.total for reward in rewards], expected, atol=1e-12)


def test_what_they_need_is_said():
    for rule in (lambda *a: cosine_length(*a, max_completion_tokens=9), kimi_length):
        with pytest.raises(ValueError, match="correct is 'accuracy', which is no part of the reward: choose one of format"):
            rule(PROBLEM, [of_length(1)], [Reward(1.0, {"format": 1.0})])
    with pytest.raises(ValueError, match="max_completion_tokens is 0"):
        cosine_length(PROBLEM, [], [], max_completion_tokens=0)
