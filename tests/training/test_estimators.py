"""The estimators against brute force: every subset of size k, and every way to break a tie."""

from __future__ import annotations

import itertools
import math
import subprocess
import sys
from collections import Counter
from fractions import Fraction

import numpy as np
import pytest

from jaxreason.training.estimators import bootstrap, majority_at_k, pass_at_k


def subsets(n: int, k: int):
    return list(itertools.combinations(range(n), k))


def test_pass_at_k_is_the_mean_over_all_subsets():
    for n in range(1, 9):
        for c in range(n + 1):
            right = [True] * c + [False] * (n - c)
            for k in range(1, n + 1):
                brute = np.mean([any(right[i] for i in subset) for subset in subsets(n, k)])
                assert pass_at_k(n, c, k=k) == pytest.approx(brute, abs=1e-12)


def test_pass_at_k_is_exact_where_binomial_coefficients_are_huge():
    for n, c, k in ((1000, 3, 500), (10_000, 1, 5_000), (200, 199, 1), (4096, 40, 64)):
        exact = 1 - Fraction(math.comb(n - c, k), math.comb(n, k))
        assert pass_at_k(n, c, k=k) == pytest.approx(float(exact), rel=1e-10)


def test_the_first_k_samples_are_not_the_estimate():
    """Of [wrong, wrong, right] the first two say pass@2 = 0; two of the three subsets hold the right one."""
    assert pass_at_k(3, 1, k=2) == pytest.approx(2 / 3)


def brute_majority(answers: list[str | None], value: dict[str, float], k: int) -> Fraction:
    total = Fraction(0)
    for subset in subsets(len(answers), k):
        votes = Counter(answers[i] for i in subset if answers[i] is not None)
        if votes:
            most = max(votes.values())
            first = [answer for answer, count in votes.items() if count == most]
            total += sum((Fraction(value[answer]) for answer in first), Fraction(0)) / len(first)
    return total / math.comb(len(answers), k)


@pytest.mark.parametrize("seed", range(40))
def test_majority_at_k_is_the_mean_over_all_subsets(seed):
    rng = np.random.default_rng(seed)
    n = int(rng.integers(1, 11))
    answers = [None if rng.random() < 0.2 else "abcd"[rng.integers(rng.integers(1, 5))] for _ in range(n)]
    value = {name: float(rng.choice([0.0, 0.0, 1.0, 0.5])) for name in "abcd"}
    classes = {name: (count, value[name]) for name, count in Counter(a for a in answers if a is not None).items()}
    for k in range(1, n + 1):
        brute = float(brute_majority(answers, value, k))
        assert majority_at_k(classes, samples=n, k=k) == pytest.approx(brute, abs=1e-12)


def test_majority_of_many_samples_agrees_with_random_subsets():
    rng = np.random.default_rng(0)
    counts = [60, 58, 41, 20, *[1] * 30, 17]  # the last gave no answer
    n, k = sum(counts), 32
    names = [f"a{i}" for i in range(len(counts) - 1)]
    classes = {name: (count, 1.0 if name in ("a1", "a3") else 0.0) for name, count in zip(names, counts[:-1], strict=True)}
    exact = majority_at_k(classes, samples=n, k=k)
    label = np.repeat(np.arange(len(counts)), counts)
    won = []
    for _ in range(20_000):
        votes = np.bincount(rng.choice(label, k, replace=False), minlength=len(counts))[:-1]
        first = np.flatnonzero(votes == votes.max())
        won.append(np.isin(first, (1, 3)).mean())
    assert exact == pytest.approx(np.mean(won), abs=4 * np.std(won) / len(won) ** 0.5)


def test_majority_shares_sum_to_one_at_any_size():
    counts = [900, 700, 250, 100, 50]
    every = {f"a{i}": (count, 1.0) for i, count in enumerate(counts)}
    for k in (1, 2, 64, 1000, 2000):
        assert majority_at_k(every, samples=2000, k=k) == pytest.approx(1, abs=1e-9)
    assert majority_at_k({}, samples=4, k=2) == 0
    assert majority_at_k({"a": (2, 1.0), "b": (1, 0.0)}, samples=3, k=3) == 1


def test_one_vote_is_the_mean():
    classes = {"a": (3, 1.0), "b": (4, 0.0), "c": (1, 0.25)}
    assert majority_at_k(classes, samples=10, k=1) == pytest.approx((3 + 0.25) / 10)
    assert pass_at_k(10, 3, k=1) == pytest.approx(0.3)


def test_bootstrap_intervals_cover_as_they_say():
    rng = np.random.default_rng(1)
    inside = 0
    for seed in range(200):
        (found,) = bootstrap((rng.random((80, 1)) < 0.4).astype(float), resamples=300, seed=seed)
        inside += found.low <= 0.4 <= found.high
    assert 180 <= inside <= 200  # 95 % of 200, to three standard deviations


def test_bootstrap_counts_problems_that_have_a_value():
    values = np.array([[1.0, np.nan, np.nan], [0.0, 0.5, np.nan], [1.0, 0.5, np.nan]])
    first, second, third = bootstrap(values, seed=3)
    assert first.value == pytest.approx(2 / 3) and first.problems == 3 and first.low < first.value < first.high
    assert (second.value, second.low, second.high, second.problems) == (0.5, 0.5, 0.5, 2)
    assert math.isnan(third.value) and math.isnan(third.low) and third.problems == 0
    assert bootstrap(values, seed=3)[0] == first != bootstrap(values[:, :1] * 0.9, seed=3)[0]


@pytest.mark.parametrize(("n", "k"), [(4, 5), (4, 0), (0, 1)])
def test_k_beyond_the_samples_is_refused(n, k):
    with pytest.raises(ValueError, match=f"k is {k} and there are {n} samples"):
        pass_at_k(n, 0, k=k)
    with pytest.raises(ValueError, match=f"k is {k}"):
        majority_at_k({}, samples=n, k=k)


def test_counts_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match="correct is 5 of 4"):
        pass_at_k(4, 5, k=1)
    with pytest.raises(ValueError, match="counts are"):
        majority_at_k({"a": (5, 1.0)}, samples=4, k=1)


def test_numpy_is_enough():
    script = "import sys, jaxreason.training.estimators; print({'jax', 'flax'} & {m.split('.')[0] for m in sys.modules})"
    assert subprocess.run([sys.executable, "-c", script], capture_output=True, text=True).stdout.strip() == "set()"
