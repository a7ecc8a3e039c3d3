"""Several tasks as one, each with its weight and its own rule.

    config.task.name = "mixture"
    config.task.kwargs = {"tasks": {"gsm8k": {"data_dir": ..., "weight": 2}, "hard": {"task": "countdown", "max_numbers": 6}}}

Problems come in blocks, in which every task stands exactly as often as its weight says, in an order of the block's own; so any
problem is found by its number alone. A finite task is gone through epoch by epoch, each in an order of its own. A problem's
`task` is the entry's name, by which prompts and rules are found. Deliberately absent: weights that move with training.
"""

from __future__ import annotations

import dataclasses
import inspect
import math
import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from functools import lru_cache
from types import MappingProxyType
from typing import Any, TypeVar

from jaxreason.naming import call, nearest, returning
from jaxreason.tasks.task import Skipped, Task
from jaxreason.types import Demonstration, Problem

LARGEST_BLOCK = 10_000
Made = TypeVar("Made")


def mixture(*, tasks: Mapping[str, Any], seed: int = 0) -> Task:
    """`tasks` maps a name to a task's settings, `weight` (1) and `rule` (the task's own) among them.

    The name is that of a task, or else the entry's `task` says which. Held-out problems are all of theirs; a kind of
    demonstrations is mixed of the tasks that offer it.
    """
    if not isinstance(tasks, Mapping) or not tasks:
        raise ValueError(f"tasks is {tasks!r}: expected at least one name with its settings, such as {{'countdown': {{}}}}")
    # sorted, so that the same mixture written in another order is the same
    made = {label: _make(label, tasks[label]) for label in sorted(tasks)}
    parts = {label: task for label, (task, _) in made.items()}
    shares = _shares({label: weight for label, (_, weight) in made.items()})

    def restrict(numbers: Mapping[str, Sequence[int]]) -> Callable[[int], Problem]:
        return _mixed({label: _numbered(label, parts[label], numbers.get(label), seed) for label in parts}, shares, seed)

    def messages(problem: Problem) -> list[dict[str, str]]:
        part = parts.get(problem.task)
        return [{"role": "user", "content": problem.question}] if part is None else part.messages(problem)

    return Task(
        name="mixture",
        train=restrict({}),
        train_size=None,
        heldout=[_labelled(problem, label) for label, part in parts.items() for problem in part.heldout],
        messages=messages,
        demonstrations=_demonstrations(parts, shares, seed),
        words=tuple(dict.fromkeys(word for part in parts.values() for word in part.words))
        if all(part.words for part in parts.values())
        else (),
        rule="task",
        skipped=Skipped(
            sum((Counter(part.skipped.counts) for part in parts.values()), Counter()),
            tuple(told for part in parts.values() for told in part.skipped.first),
        ),
        rules={label: part.rule for label, part in parts.items()},
        parts=MappingProxyType(parts),
        restrict=restrict,
    )


def _make(label: str, settings: Any) -> tuple[Task, float]:
    """One entry's task and weight."""
    from jaxreason import tasks

    key = f"task.kwargs.tasks.{label}"
    if not isinstance(settings, Mapping):
        raise ValueError(f"config.{key} is {settings!r}: expected its settings, such as {{'weight': 2}}")
    kwargs = dict(settings)
    name, weight, rule = kwargs.pop("task", label), kwargs.pop("weight", 1), kwargs.get("rule", "")
    there = {each: function for each, function in returning(tasks, "Task").items() if each != "mixture"}
    if name not in there:
        remedy = nearest(str(name), sorted(there))
        raise ValueError(
            f"config.{key} is a task named '{name}', which a mixture cannot have: {remedy} An entry of another name has its 'task'"
        )
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 < weight < math.inf:
        raise ValueError(f"config.{key}.weight is {weight!r}: expected a number above 0")
    if not isinstance(rule, str):
        raise ValueError(f"config.{key}.rule is {rule!r}: expected a rule's name, such as 'math.gsm8k_answer'")
    if "rule" not in inspect.signature(there[name]).parameters:
        kwargs.pop("rule", None)
    made = call(there[name], kwargs=kwargs, key=key)
    return (dataclasses.replace(made, rule=rule) if rule else made), weight


def _shares(weights: Mapping[str, float]) -> dict[str, int]:
    """How often each stands in a block: whole numbers in proportion to the weights as they are written."""
    exact = {label: Fraction(str(weight)) for label, weight in weights.items()}
    common = math.lcm(*(weight.denominator for weight in exact.values()))
    whole = {label: int(weight * common) for label, weight in exact.items()}
    divisor = math.gcd(*whole.values())
    shares = {label: count // divisor for label, count in whole.items()}
    if sum(shares.values()) > LARGEST_BLOCK:
        raise ValueError(
            f"the weights {dict(weights)} hold exactly only over {sum(shares.values())} problems: write them with fewer digits, so "
            f"that it is {LARGEST_BLOCK} or fewer"
        )
    return shares


def _mixed(makes: Mapping[str, Callable[[int], Made]], shares: Mapping[str, int], seed: int) -> Callable[[int], Made]:
    """number -> what the task that stands at that place makes of its own next number."""
    size = sum(shares[label] for label in makes)

    @lru_cache(maxsize=4)
    def order(block: int) -> list[tuple[str, int]]:
        """Who stands at each place of a block, and for the how manieth time in it."""
        labels = [label for label in makes for _ in range(shares[label])]
        random.Random(f"{seed}/mixture/{block}").shuffle(labels)
        before = dict.fromkeys(makes, 0)
        places = []
        for label in labels:
            places.append((label, before[label]))
            before[label] += 1
        return places

    def make(number: int) -> Made:
        block, place = divmod(number, size)
        label, earlier = order(block)[place]
        return makes[label](block * shares[label] + earlier)

    return make


def _numbered(label: str, part: Task, numbers: Sequence[int] | None, seed: int) -> Callable[[int], Problem]:
    """The how manieth problem of a task -> the problem; of a finite task epoch by epoch, each shuffled, `numbers` alone."""
    if part.train_size is None:
        return lambda index: _labelled(part.train(index), label)
    there = list(range(part.train_size)) if numbers is None else list(numbers)
    if not there:
        why = "left: raise config.sampling.max_prompt_tokens" if part.train_size else "to mix: leave it out"
        raise ValueError(f"config.task.kwargs.tasks.{label} has no training problem {why}")

    @lru_cache(maxsize=2)
    def shuffled(epoch: int) -> list[int]:
        return random.Random(f"{seed}/{label}/{epoch}").sample(there, len(there))

    def problem(index: int) -> Problem:
        epoch, place = divmod(index, len(there))
        return _labelled(part.train(shuffled(epoch)[place]), label)

    return problem


def _labelled(problem: Problem, label: str) -> Problem:
    return dataclasses.replace(problem, id=f"{label}/{problem.id}", task=label)


def _demonstrations(parts: Mapping[str, Task], shares: Mapping[str, int], seed: int) -> dict[str, Callable[[int], Demonstration]]:
    def labelled(label: str, make: Callable[[int], Demonstration]) -> Callable[[int], Demonstration]:
        def one(number: int) -> Demonstration:
            shown = make(number)
            return Demonstration(_labelled(shown.problem, label), shown.completion)

        return one

    kinds = dict.fromkeys(kind for part in parts.values() for kind in part.demonstrations)
    return {
        kind: _mixed(
            {label: labelled(label, part.demonstrations[kind]) for label, part in parts.items() if kind in part.demonstrations},
            shares,
            seed,
        )
        for kind in kinds
    }
