"""What n samples of each problem say of k of them: exact expectations over all subsets of size k, and their intervals.

The samples of a problem are exchangeable, so a subset of k is as good a draw as any other, and the mean over all of them is the
unbiased estimate with the least variance. The first k samples would be one noisy subset. NumPy only. Deliberately absent: votes
weighted by a score, whose expectation has no closed form.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np


def pass_at_k(samples: int, correct: int, *, k: int) -> float:
    """1 - C(n - c, k) / C(n, k), the chance that k of n samples hold one of the c correct ones; as a product, so that nothing
    overflows.

    Chen et al., arXiv:2107.03374, Eq. 1. Raises ValueError unless 1 <= k <= samples and 0 <= correct <= samples.
    """
    _check(samples, k=k)
    if not 0 <= correct <= samples:
        raise ValueError(f"correct is {correct} of {samples} samples: expected 0 to {samples}")
    if samples - correct < k:
        return 1.0
    return 1.0 - math.prod(1.0 - k / number for number in range(samples - correct + 1, samples + 1))


def majority_at_k(classes: Mapping[str, tuple[int, float]], *, samples: int, k: int) -> float:
    """The expected correctness of the answer that most of k of n samples give; equally many share the vote.

    `classes` has (how many samples gave it, its correctness in [0, 1]) for every answer. Samples beyond the classes' counts gave
    no answer: they count in n, and never win. For an answer with c_* samples,

        P(wins) = sum_j C(c_*, j) [z^(k - j)] prod_i (sum_{x<j} C(c_i, x) z^x + s C(c_i, j) z^j) / C(n, k),

    integrated over s in [0, 1], because 1 / (1 + ties) = int s^ties ds; exactly, by Gauss's rule. The binomial coefficients
    stand multiplied by q^x (1 - q)^(c - x), which cancels, with q = k / n so that nothing leaves a float's range. Answers with
    fewer than j samples have no bound, and are one binomial together.
    """
    _check(samples, k=k)
    counts = [count for count, _ in classes.values()]
    if min(counts, default=1) < 1 or sum(counts) > samples:
        raise ValueError(f"the answers' counts are {counts} of {samples} samples: expected 1 or more each, and no more together")
    expected = 0.0
    for answer, (count, value) in classes.items():
        if value:
            others = [c for name, (c, _) in classes.items() if name != answer]
            expected += value * _wins(count, others, samples=samples, k=k)
    return expected


def _wins(count: int, others: Sequence[int], *, samples: int, k: int) -> float:
    """The share of the vote that an answer with `count` samples gets."""
    q = k / samples
    total = 0.0
    for votes in range(1, min(count, k) + 1):
        rivals = [each for each in others if each >= votes]
        rest = k - votes  # votes that go to others
        pool = samples - count - sum(rivals)
        ties = min(len(rivals), rest // votes)
        nodes, weights = np.polynomial.legendre.leggauss(ties // 2 + 1)
        free = _binomial(pool, q)[: rest + 1]
        terms = [_binomial(each, q)[: votes + 1] for each in rivals]
        for node, weight in zip((nodes + 1) / 2, weights / 2, strict=True):
            ways = free
            for term in terms:
                ways = np.convolve(ways, np.append(term[:votes], node * term[votes]))[: rest + 1]
            if len(ways) > rest:
                total += float(weight * ways[rest]) * float(_binomial(count, q)[votes])
    return total / float(_binomial(samples, q)[k])


def _binomial(count: int, q: float) -> np.ndarray:
    """C(count, x) q^x (1 - q)^(count - x) for x = 0 .. count."""
    if q == 1:
        return np.eye(1, count + 1, count)[0]
    x = np.arange(count + 1)
    logs = np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, count + 1)))])  # log x!
    return np.exp(logs[count] - logs - logs[::-1] + x * math.log(q) + (count - x) * math.log1p(-q))


class Interval(NamedTuple):
    """A mean over problems, and between which two numbers a share of the bootstrap's means lies."""

    value: float
    low: float
    high: float
    problems: int  # that have a value


def bootstrap(values: np.ndarray, *, resamples: int = 1000, level: float = 0.95, seed: int = 0) -> list[Interval]:
    """Means over the problems, with percentile intervals by drawing problems anew with replacement (Efron 1979).

    `values` [problems, metrics], NaN where a problem has no value. All metrics see the same draws. A metric without any value is
    NaN throughout.
    """
    values = np.asarray(values, np.float64)
    problems = len(values)
    there = ~np.isnan(values)
    filled = np.where(there, values, 0.0)
    found = there.sum(axis=0)
    with np.errstate(invalid="ignore"):  # 0 / 0 where there is no value
        means = filled.sum(axis=0) / found
        draws = np.random.default_rng(seed).multinomial(problems, np.full(problems, 1 / max(problems, 1)), size=resamples)
        drawn = (draws @ filled) / (draws @ there.astype(np.float64))
    tail = (1 - level) / 2
    intervals = []
    for column in range(values.shape[1]):
        some = drawn[:, column][~np.isnan(drawn[:, column])]
        low, high = np.quantile(some, [tail, 1 - tail]) if len(some) else (math.nan, math.nan)
        intervals.append(Interval(float(means[column]), float(low), float(high), int(found[column])))
    return intervals


def _check(samples: int, *, k: int) -> None:
    if not 1 <= k <= samples:
        raise ValueError(f"k is {k} and there are {samples} samples: expected k from 1 to {samples}")
