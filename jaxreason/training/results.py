"""From the records of an evaluation's completions to its numbers: estimates with intervals, over all problems and by category.

NumPy and the records alone, so that they can be computed again, with other k, from the file of completions. A problem whose
reference no rule can score has no part in what is said of correctness, and is counted.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from jaxreason.naming import nearest
from jaxreason.training.estimators import Interval, bootstrap, majority_at_k, pass_at_k
from jaxreason.types import Problem

CATEGORIES = ("subject", "level", "category", "type")  # keys of a problem's metadata that are reported where they are there
ALL = "all"

Row = Mapping[str, Any]
Numbers = dict[str, dict[str, float]]  # metric -> {"value", "low", "high", "problems"}


def default_k(samples: int) -> tuple[int, ...]:
    """1, 2, 4, ... and the number of samples."""
    return (*(2**i for i in range(samples.bit_length()) if 2**i < samples), samples)


def problem_numbers(rows: Sequence[Row], *, accuracy: str, k: Sequence[int]) -> dict[str, float]:
    """What the n samples of one problem say: each metric of the results, NaN where it has no value.

    A sample is right where its accuracy is 1. An answer's correctness in a vote is that of the samples which gave it.
    """
    n = len(rows)
    marks = [row["reward"].get(accuracy) for row in rows]
    scored = any(mark is not None for mark in marks)
    right = [mark is not None and mark >= 1 for mark in marks]
    found: dict[str, float] = {f"avg@{n}" if n > 1 else "pass@1": float(np.mean(right)) if scored else math.nan}
    voted = Counter(row["voted"] for row in rows if row["voted"] is not None)
    correct = Counter(row["voted"] for row, good in zip(rows, right, strict=True) if good)
    classes = {answer: (count, correct[answer] / count) for answer, count in voted.items()}
    for each in k if n > 1 else ():
        found[f"pass@{each}"] = pass_at_k(n, sum(right), k=each) if scored else math.nan
    for each in k if n > 1 else ():
        found[f"majority@{each}"] = majority_at_k(classes, samples=n, k=each) if scored else math.nan
    for name in rows[0]["reward"]:
        if name != accuracy:
            values = [row["reward"][name] for row in rows if row["reward"][name] is not None]
            found["reward" if name == "total" else name] = float(np.mean(values)) if values else math.nan
    found["answered"] = float(np.mean([row["voted"] is not None for row in rows]))
    found["length"] = float(np.mean([row["length"] for row in rows]))
    found["failed"] = float(np.mean([bool(row["failed"]) for row in rows]))
    found["truncated"] = float(np.mean([row["stop"] == "length" for row in rows]))
    return found


def summarise(
    groups: Sequence[Sequence[Row]],
    problems: Sequence[Problem],
    *,
    accuracy: str,
    k: Sequence[int],
    categories: Sequence[str] = (),
    resamples: int = 1000,
    seed: int = 0,
) -> dict[str, dict[str, Numbers]]:
    """{"all": {"all": metrics}, category: {its value: metrics}}, from each problem's records.

    `categories` are keys of the problems' metadata besides those that are reported anyway; a ValueError where no problem has one.
    """
    table = [problem_numbers(rows, accuracy=accuracy, k=k) for rows in groups]
    names = list(dict.fromkeys(name for numbers in table for name in numbers))
    values = np.asarray([[numbers.get(name, math.nan) for name in names] for numbers in table], np.float64)

    def numbers(rows: Iterable[int]) -> Numbers:
        found = bootstrap(values[list(rows)], resamples=resamples, seed=seed)
        return {name: _plain(interval) for name, interval in zip(names, found, strict=True)}

    results = {ALL: {ALL: numbers(range(len(groups)))}}
    for key in categories_of(problems, categories):
        of_value: dict[str, list[int]] = {}
        for index, problem in enumerate(problems):
            of_value.setdefault(_category(problem, key), []).append(index)
        results[key] = {value: numbers(rows) for value, rows in sorted(of_value.items(), key=_order)}
    return results


def _plain(interval: Interval) -> dict[str, float]:
    """For JSON, which has no NaN: what has no value is left out."""
    return {name: value for name, value in interval._asdict().items() if not math.isnan(value)}


def categories_of(problems: Sequence[Problem], asked: Sequence[str]) -> list[str]:
    """The keys to report by: those that are there of the usual ones, and those that were asked for."""
    there = dict.fromkeys(key for problem in problems for key in problem.metadata)
    for key in asked:
        if key not in there and key != "task":
            raise ValueError(f"--category is '{key}', which no problem has: {nearest(key, [*there, 'task'])}")
    own = [key for key in CATEGORIES if key in there]
    mixed = ["task"] * (len({problem.task for problem in problems}) > 1)
    return list(dict.fromkeys([*mixed, *own, *asked]))


def _category(problem: Problem, key: str) -> str:
    return str(problem.task if key == "task" and key not in problem.metadata else problem.metadata.get(key, "none"))


def _order(item: tuple[str, Any]) -> tuple[int, str]:
    """Whole numbers by size, before other texts."""
    return (int(item[0]), "") if item[0].isdecimal() else (10**9, item[0])
