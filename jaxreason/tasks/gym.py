"""Every data set of reasoning-gym (extra `envs`) as a task: endless, seeded, and scored by its own rule.

Entries are made in windows: a window is one of reasoning-gym's data sets with a seed of its own, and the first `WINDOW` of its
entries are problems. The others stand in for entries whose question is held out. Absent on purpose: demonstrations, for
reasoning-gym has none, and its own curricula.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxreason.rewards.gym import SIZE, dataset
from jaxreason.tasks.conversation import conversation, read_prompt
from jaxreason.tasks.task import Task
from jaxreason.types import Problem

WINDOW = 500
# These walk through sets, whose order is that of Python's hashes, so that every process would have problems of its own.
UNORDERED = {"isomorphic_strings", "knight_swap", "polynomial_multiplication", "ransom_note", "word_ladder"}


def reasoning_gym(
    *,
    name: str,
    seed: int = 0,
    heldout_size: int = 64,
    prompt: str = "as_it_is",
    settings: Mapping[str, Any] | None = None,
) -> Task:
    """The data set `name` with `settings` as reasoning-gym calls them, such as {"min_terms": 2} for chain_sum.

    Held-out questions differ from each other, and none of them is ever a training problem's.
    """
    if heldout_size < 1:
        raise ValueError(f"heldout_size is {heldout_size}: expected 1 or more")
    try:
        plain = json.dumps(dict(settings or {}), sort_keys=True)
    except (TypeError, ValueError):
        raise ValueError(f"settings is {settings!r}: expected names with numbers, texts, lists or True and False") from None
    template = read_prompt(prompt)
    dataset(name, plain, 0)  # whatever is wrong with the names is said now
    _check_hashes({name, *(each["name"] for each in json.loads(plain).get("datasets", []) if name == "composite")})

    def entry(kind: str, window: int, place: int) -> dict[str, Any]:
        digest = hashlib.sha256(f"{seed}/{kind}/{window}".encode()).digest()
        made = dataset(name, plain, int.from_bytes(digest[:4], "big") % 2**31)
        before = np.random.get_state()  # some data sets seed NumPy's global generator
        try:
            return made[place]
        finally:
            np.random.set_state(before)

    def problem(entry: dict[str, Any], identity: str) -> Problem:
        told = {"gym": name, "settings": json.loads(plain), "entry": entry}
        reference = "" if entry["answer"] is None else str(entry["answer"])
        return Problem(id=identity, question=entry["question"], answer=reference, task=f"gym_{name}", metadata=told)

    heldout: dict[str, Problem] = {}
    for place in range(SIZE):
        if len(heldout) == heldout_size:
            break
        drawn = entry("heldout", 0, place)
        heldout.setdefault(drawn["question"], problem(drawn, f"heldout/{len(heldout)}"))
    if len(heldout) < heldout_size:
        raise ValueError(
            f"heldout_size is {heldout_size}, and {name} made {len(heldout)} different questions in {SIZE}: lower it, or widen "
            "settings"
        )

    def train(number: int) -> Problem:
        window, place = divmod(number, WINDOW)
        for another in range(place, SIZE, WINDOW):
            drawn = entry("train", window, another)
            if drawn["question"] not in heldout:
                return problem(drawn, f"train/{number}")
        raise ValueError(
            f"{name} makes next to no question with these settings that is not among the {heldout_size} held-out ones: lower "
            "heldout_size, or widen settings"
        )

    train(0)
    return Task(
        name=f"gym_{name}",
        train=train,
        train_size=None,
        heldout=list(heldout.values()),
        messages=lambda problem: conversation(template, problem),
        rule="gym.gym_solved",  # the score gives parts, in some data sets even for what says nothing
    )


def _check_hashes(names: set[str]) -> None:
    if names & UNORDERED and os.environ.get("PYTHONHASHSEED", "random") == "random":
        raise ValueError(
            f"{', '.join(sorted(names & UNORDERED))} makes other problems in every process, as Python's hashes are drawn anew: set "
            "PYTHONHASHSEED=0 in the environment of every process of the run"
        )
