"""Which problems a step trains on: a pure function of (seed, position), so any batch can be made again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache

import numpy as np

from jaxreason.types import Problem

Stream = Callable[[int, int], list[tuple[int, Problem]]]


def problem_stream(train: Callable[[int], Problem], *, numbers: Sequence[int] | None, seed: int) -> Stream:
    """stream(position, count) -> the problems number `position` to `position + count - 1` of training, each with its number.

    `numbers` are the problems of a finite task, shuffled anew for every epoch and never exhausted; None stands for a task
    without end, taken in order.
    """
    if numbers is not None and not len(numbers):
        raise ValueError(
            "the task has no training problem left: every prompt is longer than config.sampling.max_prompt_tokens: raise it"
        )

    @lru_cache(maxsize=2)
    def shuffled(epoch: int) -> np.ndarray:
        assert numbers is not None
        return np.random.default_rng([seed, epoch]).permutation(np.asarray(numbers))

    def stream(position: int, count: int) -> list[tuple[int, Problem]]:
        if numbers is None:
            chosen = list(range(position, position + count))
        else:
            chosen = [int(shuffled(at // len(numbers))[at % len(numbers)]) for at in range(position, position + count)]
        return [(number, train(number)) for number in chosen]

    return stream
