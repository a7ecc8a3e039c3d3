"""What the tasks that write their own problems share: endless, seeded, and split by what a problem is about.

A family draws a problem's content with its key, such as the numbers of an equation, and writes the content down. The hash of the
key decides whether a problem is held out, whatever the seed, the settings or the wording: what is held out by one run is trained
on by none. Deliberately absent: any difficulty that moves with training (jaxreason.data.curriculum has that).
"""

from __future__ import annotations

import hashlib
import random
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from jaxreason.tasks.conversation import conversation, read_prompt
from jaxreason.tasks.task import Task
from jaxreason.types import Demonstration, Problem

HELDOUT_SHARE = 8  # one content in this many is held out
TRIES = 20_000  # draws before settings are said to give no problem
TRIES_FOR_NEW = 4_000  # draws of held-out problems before they are said to give no further one
DIGITS = "0123456789"
_PIECE = re.compile(r" ?[A-Za-z]+|[\s\S]")  # as the tokenizer of a closed vocabulary cuts

Draw = Callable[[random.Random], tuple[str, Any]]  # -> key, content


@dataclass(frozen=True)
class Written:
    """A content as a problem: `shown` is what stands between the answer tags, where that is not the answer itself."""

    question: str
    answer: str
    thought: str
    shown: str = ""
    metadata: Mapping[str, Any] = field(default_factory=dict)


Write = Callable[[random.Random, Any], Written | None]  # None: the content makes no problem


def is_heldout(name: str, key: str) -> bool:
    """Whether this content of a task belongs to the held-out side."""
    return hashlib.sha256(f"{name}:{key}".encode()).digest()[0] % HELDOUT_SHARE == 0


def endless(
    draw: Draw, write: Write, *, name: str, rule: str, seed: int, heldout_size: int, words: tuple[str, ...], prompt: str
) -> Task:
    """The task of a family; a ValueError where its settings give too few problems of either side.

    Held-out problems differ from each other. Demonstrations are of the training side, and their chain of thought is right.
    """
    if heldout_size < 1:
        raise ValueError(f"heldout_size is {heldout_size}: expected 1 or more")
    template = read_prompt(prompt)

    def find(rng: random.Random, *, heldout: bool, tries: int, seen: frozenset[str] | set[str]) -> tuple[str, Written] | None:
        for _ in range(tries):
            key, content = draw(rng)
            if is_heldout(name, key) == heldout and key not in seen:
                written = write(rng, content)
                if written is not None:
                    return key, written
        return None

    def make(kind: str, number: int) -> tuple[Problem, Written]:
        found = find(random.Random(f"{seed}/{kind}/{number}"), heldout=False, tries=TRIES, seen=frozenset())
        if found is None:
            raise ValueError(f"{name} has next to no training problem with these settings: widen their range")
        return _problem(found[1], f"{kind}/{number}", task=name), found[1]

    def worked(number: int) -> Demonstration:
        problem, written = make("worked", number)
        return Demonstration(problem, f"<think>{written.thought}</think><answer>{written.shown or written.answer}</answer>")

    make("train", 0)
    heldout: list[Problem] = []
    keys: set[str] = set()
    rng = random.Random(f"{seed}/heldout")
    while len(heldout) < heldout_size:
        found = find(rng, heldout=True, tries=TRIES_FOR_NEW, seen=keys)
        if found is None:
            raise ValueError(
                f"heldout_size is {heldout_size}, and {name} has no more than about {len(heldout)} held-out problems with these "
                "settings: lower it, or widen their range"
            )
        keys.add(found[0])
        heldout.append(_problem(found[1], f"heldout/{len(heldout)}", task=name))
    return Task(
        name=name,
        train=lambda number: make("train", number)[0],
        train_size=None,
        heldout=heldout,
        messages=lambda problem: conversation(template, problem),
        demonstrations={"worked": worked},
        words=words,
        rule=rule,
    )


def _problem(written: Written, identity: str, *, task: str) -> Problem:
    return Problem(id=identity, question=written.question, answer=written.answer, task=task, metadata=written.metadata)


def pieces(*texts: str) -> tuple[str, ...]:
    """The closed vocabulary of these texts; what stands in braces is filled in later and is no part of it."""
    return tuple(dict.fromkeys(piece for text in texts for piece in _PIECE.findall(re.sub(r"\{\w*\}", "", text))))


def check_span(least: int, most: int, *, smallest: int, names: tuple[str, str], largest: int | None = None) -> None:
    """A ValueError unless smallest <= least <= most <= largest."""
    if not smallest <= least <= most or (largest is not None and most > largest):
        end = "" if largest is None else f" <= {largest}"
        raise ValueError(f"{names[0]} is {least} and {names[1]} is {most}: expected {smallest} <= {names[0]} <= {names[1]}{end}")
