"""Grade-school word problems from templates: a name, some things, two or three changes, how many are left.

    Tom has 7 pens. Triples them. Loses 8. Gets 2. How many?
    <think>7*3=21;21-8=13;13+2=15</think><answer>15</answer>

The numbers decide whether a problem is held out, not its wording, so no held-out computation is ever trained on.
Demonstrations come in two kinds: `worked` ones reason step by step and are right; `flawed` ones mostly answer at once, and
are then mostly wrong.
"""

from __future__ import annotations

import hashlib
import random

from jaxreason.tasks.conversation import conversation, read_prompt
from jaxreason.tasks.task import Task
from jaxreason.types import Demonstration, Problem

NAMES = ("Tom", "Ann", "Sam", "Mia", "Leo")
THINGS = ("pens", "coins", "cards", "books", "shells", "stamps")
VERBS = {"+": ("Gets", "Finds", "Buys"), "-": ("Loses", "Sells", "Gives")}
TIMES = {2: "Doubles", 3: "Triples"}
HELDOUT_SHARE = 8  # one computation in this many is held out
LARGEST = 50

Change = tuple[str, int]  # operator and number


def is_heldout(start: int, changes: tuple[Change, ...]) -> bool:
    """Whether this computation belongs to the held-out side; a function of its numbers alone."""
    key = f"{start}" + "".join(f"{op}{number}" for op, number in changes)
    return hashlib.sha256(key.encode()).digest()[0] % HELDOUT_SHARE == 0


def results(start: int, changes: tuple[Change, ...]) -> list[int]:
    """The running total after each change."""
    totals, total = [], start
    for op, number in changes:
        total = total * number if op == "*" else total + number if op == "+" else total - number
        totals.append(total)
    return totals


def reasoning(start: int, changes: tuple[Change, ...]) -> str:
    """The chain of thought: one equation a change."""
    steps, total = [], start
    for (op, number), after in zip(changes, results(start, changes), strict=True):
        steps.append(f"{total}{op}{number}={after}")
        total = after
    return ";".join(steps)


def _draw(rng: random.Random, *, changes: tuple[int, int], heldout: bool) -> tuple[int, tuple[Change, ...]]:
    """A computation of the wanted side whose running totals stay between 0 and LARGEST."""
    while True:
        start = rng.randint(2, 12)
        drawn: list[Change] = []
        for _ in range(rng.randint(*changes)):
            op = rng.choice("++--*")
            drawn.append((op, rng.choice((2, 3)) if op == "*" else rng.randint(1, 9)))
        computation = tuple(drawn)
        if all(0 <= total <= LARGEST for total in results(start, computation)) and is_heldout(start, computation) == heldout:
            return start, computation


def _problem(rng: random.Random, *, name: str, changes: tuple[int, int], heldout: bool) -> Problem:
    start, computation = _draw(rng, changes=changes, heldout=heldout)
    sentences = [f"{rng.choice(NAMES)} has {start} {rng.choice(THINGS)}."]
    for op, number in computation:
        sentences.append(f"{TIMES[number]} them." if op == "*" else f"{rng.choice(VERBS[op])} {number}.")
    answer = results(start, computation)[-1]
    return Problem(
        id=name,
        question=" ".join([*sentences, "How many?"]),
        answer=str(answer),
        task="word_problems",
        metadata={"start": start, "changes": computation},
    )


def word_problems(
    *,
    seed: int = 0,
    min_changes: int = 2,
    max_changes: int = 3,
    heldout_size: int = 256,
    prompt: str = "as_it_is",
    short_share: float = 0.75,
) -> Task:
    """`min_changes` to `max_changes` changes; `short_share` of the flawed demonstrations answer at once, off by -4 to 4."""
    if not 1 <= min_changes <= max_changes:
        raise ValueError(
            f"word_problems got min_changes={min_changes} and max_changes={max_changes}: expected 1 <= min_changes <= max_changes"
        )
    if heldout_size < 1:
        raise ValueError(f"heldout_size is {heldout_size}: expected 1 or more")
    if not 0 <= short_share <= 1:
        raise ValueError(f"short_share is {short_share}: expected 0 to 1")
    span = (min_changes, max_changes)
    template = read_prompt(prompt)

    def train(number: int) -> Problem:
        return _problem(random.Random(f"{seed}/train/{number}"), name=f"train/{number}", changes=span, heldout=False)

    def worked(number: int) -> Demonstration:
        rng = random.Random(f"{seed}/worked/{number}")
        problem = _problem(rng, name=f"worked/{number}", changes=span, heldout=False)
        return Demonstration(problem, _complete(problem, reasoning(*_computation(problem)), problem.answer))

    def flawed(number: int) -> Demonstration:
        rng = random.Random(f"{seed}/flawed/{number}")
        problem = _problem(rng, name=f"flawed/{number}", changes=span, heldout=False)
        if rng.random() < short_share:
            return Demonstration(problem, _complete(problem, "", str(max(0, int(problem.answer) + rng.randint(-4, 4)))))
        return Demonstration(problem, _complete(problem, reasoning(*_computation(problem)), problem.answer))

    heldout = [
        _problem(random.Random(f"{seed}/heldout/{number}"), name=f"heldout/{number}", changes=span, heldout=True)
        for number in range(heldout_size)
    ]
    return Task(
        name="word_problems",
        train=train,
        train_size=None,
        heldout=heldout,
        messages=lambda problem: conversation(template, problem),
        demonstrations={"worked": worked, "flawed": flawed},
        words=vocabulary(),
        rule="math.gsm8k_answer",
    )


def _computation(problem: Problem) -> tuple[int, tuple[Change, ...]]:
    return problem.metadata["start"], problem.metadata["changes"]


def _complete(problem: Problem, thought: str, answer: str) -> str:
    return f"<think>{thought}</think><answer>{answer}</answer>"


def vocabulary() -> tuple[str, ...]:
    """Every piece that a problem or a demonstration is made of: digits one by one, words with the space before them."""
    verbs = [verb for several in VERBS.values() for verb in several] + list(TIMES.values())
    words = ["has", "them", "How", "many", *THINGS, *verbs]
    return (*"0123456789", " ", "+", "-", "*", "=", ";", ".", "?", *NAMES, *(f" {word}" for word in words))
