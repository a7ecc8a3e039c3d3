"""Data sets as tasks: what is declared of each, and the one way in which all of them are read, split and asked.

A data set is declared by its place on the hub, its splits and a function from a row to a `Question`. Where its folder or its
hub name has only one split, that split is cut in two by a hash of the question, so that no held-out question is trained on,
not even a copy of it.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, NamedTuple, TypeVar

from jaxreason.tasks import conversation
from jaxreason.tasks.rows import Left, Row, Values, gather, read_hub, read_split, skipped
from jaxreason.tasks.task import Task
from jaxreason.types import Demonstration, Preference, Problem, StepLabels

T = TypeVar("T")


class Chain(NamedTuple):
    """A chain of reasoning as `StepLabels` has it, its problem aside."""

    steps: list[str]
    labels: list[float | None]
    outcome: float | None = None


@dataclass(frozen=True)
class Question:
    """What one row says."""

    question: str
    answer: str
    metadata: Mapping[str, Any] = field(default_factory=dict)  # 'messages' stand in place of a prompt
    solution: str = ""  # a completion to imitate, where the row has one
    chains: Sequence[Chain] = ()
    pair: Preference | None = None


@dataclass(frozen=True)
class DataSet:
    """What is declared of a data set."""

    name: str
    what: str  # in a few words
    hub: str  # '' where it is on no hub
    columns: tuple[str, ...]  # that its rows must have
    question: Callable[[Values], Question]
    hub_config: str = ""
    hub_revision: str = ""
    train: str = "train"  # the splits; '' where nothing is to be trained on
    heldout: str = "test"
    heldout_size: int | None = 256  # None: all
    prompt: str = "boxed"
    rule: str = "math.math_answer"
    bad_rows: str = "fatal"


class Made(NamedTuple):
    """What was made of one row."""

    problem: Problem
    said: Question


def task_of(data_set: DataSet) -> Callable[..., Task]:
    """The function that a config names: the data set's settings -> Task."""

    def task(
        *,
        data_dir: str = "",
        hub_name: str = data_set.hub,
        train_split: str = data_set.train,
        heldout_split: str = data_set.heldout,
        heldout_size: int | None = data_set.heldout_size,
        prompt: str = data_set.prompt,
        bad_rows: str = data_set.bad_rows,
    ) -> Task:
        read = reader(data_set, data_dir=data_dir, hub_name=hub_name)
        return load(
            data_set,
            read,
            train_split=train_split,
            heldout_split=heldout_split,
            heldout_size=heldout_size,
            prompt=prompt,
            bad_rows=bad_rows,
        )

    task.__name__ = task.__qualname__ = data_set.name
    task.__doc__ = f"{data_set.what} Columns: {', '.join(data_set.columns)}. Settings: see docs/tasks.md."
    return task


def reader(data_set: DataSet, *, data_dir: str, hub_name: str) -> Callable[[str], Iterator[Row]]:
    """split -> its rows, from a folder or from the hub."""
    if data_dir:
        return lambda split: read_split(data_dir, split)
    if not hub_name:
        raise ValueError(f"'{data_set.name}' is on no hub: give the folder with its files as data_dir, or a hub_name")
    ours = hub_name == data_set.hub
    config, revision = (data_set.hub_config, data_set.hub_revision) if ours else ("", "")
    return lambda split: read_hub(hub_name, split, config=config, revision=revision)


def load(
    data_set: DataSet,
    read: Callable[[str], Iterator[Row]],
    *,
    train_split: str,
    heldout_split: str,
    heldout_size: int | None,
    prompt: str,
    bad_rows: str,
) -> Task:
    """The task: problems of both sides, what the rows say beside them, and which rows were left out.

    Held out are the first `heldout_size` rows of that split, None for all; where both sides are one split, the `heldout_size`
    questions with the smallest hashes, with every copy.
    """
    if heldout_size is not None and heldout_size < 1:
        raise ValueError(f"heldout_size is {heldout_size}: expected 1 or more, or None for all")
    if not heldout_split:
        raise ValueError("heldout_split is '': name the split that is held out, or the training one, which is then cut in two")
    template = conversation.read_prompt(prompt)
    left: list[Left] = []
    places: dict[str, str] = {}

    def rows(split: str) -> list[Made]:
        def convert(values: Values, number: int, where: str) -> Made:
            said = data_set.question(values)
            problem = Problem(f"{split}/{number}", said.question, said.answer, data_set.name, said.metadata)
            places[problem.id] = where
            return Made(problem, said)

        made, out = gather(read(split), convert, bad_rows=bad_rows, source=f"split '{split}' of '{data_set.name}'")
        left.extend(out)
        return made

    if train_split == heldout_split:
        train, heldout = _cut(rows(train_split), heldout_size, data_set.name)
    else:
        train = rows(train_split) if train_split else []
        heldout = rows(heldout_split)[:heldout_size]
    problems = _problems(train)
    worked = [Demonstration(problem, said.solution) for problem, said in train if said.solution]
    sides = {"train": train, "heldout": heldout}
    labels = {
        side: [StepLabels(problem, *chain) for problem, said in made for chain in said.chains] for side, made in sides.items()
    }
    pairs = {side: [said.pair for _, said in made if said.pair is not None] for side, made in sides.items()}
    return Task(
        name=data_set.name,
        train=problems.__getitem__,
        train_size=len(problems),
        heldout=_problems(heldout),
        messages=lambda problem: conversation.conversation(template, problem),
        demonstrations={"worked": endless(worked)} if worked else {},
        rule=data_set.rule,
        preferences=pairs if any(pairs.values()) else {},
        step_labels=labels if any(labels.values()) else {},
        skipped=skipped(left),
        places=places,
    )


def _problems(made: Sequence[Made]) -> list[Problem]:
    """The problems; where rows are chains, of which many have one problem, each once."""
    if any(said.chains for _, said in made):
        return list({problem.question: problem for problem, _ in reversed(made)}.values())[::-1]
    return [problem for problem, _ in made]


def _cut(made: Sequence[Made], heldout_size: int | None, name: str) -> tuple[list[Made], list[Made]]:
    """What is trained on, and what is held out: the `heldout_size` questions with the smallest hashes."""
    rank = {question: hashlib.sha256(question.encode()).digest() for question in {each.said.question for each in made}}
    if heldout_size is None or heldout_size >= len(rank):
        raise ValueError(f"heldout_size is {heldout_size}, and '{name}' has {len(rank)} questions for both sides: lower it")
    chosen = set(sorted(rank, key=rank.__getitem__)[:heldout_size])
    train = [each for each in made if each.said.question not in chosen]
    return train, [each for each in made if each.said.question in chosen]


def endless(items: Sequence[T]) -> Callable[[int], T]:
    """number -> an item, for any number: all of them in each round, every round in another order."""

    @lru_cache(maxsize=2)
    def order(round_: int) -> list[int]:
        places = list(range(len(items)))
        random.Random(f"round {round_}").shuffle(places)
        return places

    return lambda number: items[order(number // len(items))[number % len(items)]]
