"""The order of training problems: every epoch has each once, and any stretch can be made again from its position."""

from __future__ import annotations

import pytest

from jaxreason.data.loader import problem_stream
from jaxreason.types import Problem

NUMBERS = [number for number in range(40) if number % 3]  # 26 of 40: the others' prompts were too long


def train(number: int) -> Problem:
    return Problem(id=f"p{number}", question=f"q{number}", answer=str(number))


def numbers(stream, position: int, count: int) -> list[int]:
    drawn = stream(position, count)
    assert [problem.id for _, problem in drawn] == [f"p{number}" for number, _ in drawn]
    return [number for number, _ in drawn]


def test_an_epoch_has_every_problem_once():
    stream = problem_stream(train, numbers=NUMBERS, seed=3)
    size = len(NUMBERS)
    epochs = [numbers(stream, epoch * size, size) for epoch in range(4)]
    assert all(sorted(epoch) == NUMBERS for epoch in epochs)
    assert len({tuple(epoch) for epoch in [*epochs, NUMBERS]}) == 5  # shuffled, and each time anew


def test_a_stretch_is_a_function_of_seed_and_position():
    whole = numbers(problem_stream(train, numbers=NUMBERS, seed=3), 0, 100)
    other = problem_stream(train, numbers=NUMBERS, seed=3)
    # resumed at any step, in any order, over the borders of epochs
    for position in (92, 0, 24, 25, 51, 52):
        assert numbers(other, position, 8) == whole[position : position + 8]
    assert numbers(other, 20, 60) == whole[20:80]
    assert numbers(problem_stream(train, numbers=NUMBERS, seed=4), 0, 100) != whole


def test_a_task_without_end_is_taken_in_order():
    stream = problem_stream(train, numbers=None, seed=3)
    assert numbers(stream, 0, 3) == [0, 1, 2] and numbers(stream, 10**9, 2) == [10**9, 10**9 + 1]


def test_a_batch_larger_than_the_task():
    stream = problem_stream(train, numbers=[5, 7], seed=0)
    drawn = numbers(stream, 0, 6)
    assert [sorted(drawn[at : at + 2]) for at in (0, 2, 4)] == [[5, 7]] * 3


def test_no_problem_left_is_a_mistake():
    with pytest.raises(ValueError, match="no training problem left.*max_prompt_tokens: raise it"):
        problem_stream(train, numbers=[], seed=0)
