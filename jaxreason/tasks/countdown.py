"""Countdown and the Game of 24: an arithmetic expression of given numbers that reaches a target. Every problem has a solution.

    Use 3, 7 and 25 at most once each to make 46.
    <think>3*7=21;21+25=46</think><answer>3*7+25</answer>

An answer is right if it reaches the target, however it does: `rewards.arithmetic` evaluates it.
"""

from __future__ import annotations

import random
import re
from fractions import Fraction
from functools import lru_cache
from operator import add, mul, sub, truediv

from jaxreason.tasks.arithmetic import Tree, steps, text, value
from jaxreason.tasks.conversation import conversation, read_prompt
from jaxreason.tasks.procedural import DIGITS, TRIES, Written, check_span, endless, pieces
from jaxreason.tasks.rows import BadRow, Values, gather, read_split, skipped
from jaxreason.tasks.task import Task
from jaxreason.types import Problem

COUNTDOWN = "Use {} and {} at most once each to make {}."
GAME24 = "Use {} and {} exactly once each to make 24."
FIRST_HELDOUT = 901  # rank of the first puzzle on which Tree of Thoughts (arXiv:2305.10601) is tested; it takes a hundred


def countdown(
    *,
    seed: int = 0,
    heldout_size: int = 256,
    prompt: str = "as_it_is",
    min_numbers: int = 3,
    max_numbers: int = 4,
    max_number: int = 50,
    max_target: int = 99,
) -> Task:
    """Numbers from 1 to `max_number` and a target from 1 to `max_target` that is none of them."""
    check_span(min_numbers, max_numbers, smallest=2, largest=6, names=("min_numbers", "max_numbers"))
    for name, given in (("max_number", max_number), ("max_target", max_target)):
        if given < 2:
            raise ValueError(f"{name} is {given}: expected 2 or more")

    def draw(rng: random.Random) -> tuple[str, tuple[list[int], Tree, int]]:
        for _ in range(TRIES):  # one in three or so reaches a target
            numbers = [rng.randint(1, max_number) for _ in range(rng.randint(min_numbers, max_numbers))]
            tree = _combined(rng, numbers, most=max(max_target, max_number) * max_number)
            target = None if tree is None else value(tree)
            if tree is not None and target is not None and 1 <= target <= max_target and target not in numbers:
                return repr((sorted(numbers), target)), (numbers, tree, target)
        raise ValueError(f"max_target is {max_target}, which numbers up to {max_number} hardly ever make: raise it, or lower those")

    def write(rng: random.Random, content: tuple[list[int], Tree, int]) -> Written:
        numbers, tree, target = content
        shown = COUNTDOWN.format(", ".join(map(str, numbers[:-1])), numbers[-1], target)
        metadata = {"numbers": tuple(numbers), "target": target}
        return Written(shown, str(target), ";".join(steps(tree)), shown=text(tree), metadata=metadata)

    words = pieces(COUNTDOWN, DIGITS, " ,+-*/()=;")
    told = {"prompt": prompt, "name": "countdown", "rule": "arithmetic.countdown", "words": words}
    return endless(draw, write, seed=seed, heldout_size=heldout_size, **told)


def _combined(rng: random.Random, numbers: list[int], *, most: int) -> Tree | None:
    """An expression of all the numbers whose parts are whole, not negative and at most `most`; None where the draw has none."""
    parts: list[Tree] = list(numbers)
    while len(parts) > 1:
        left, right = (parts.pop(rng.randrange(len(parts))) for _ in range(2))
        tree: Tree = (rng.choice("+-*/"), left, right)
        result = value(tree)
        if result is None or not 0 <= result <= most:
            return None
        parts.append(tree)
    return parts[0]


# ------------------------------------------------------------------------------------------------------------ Game of 24


def game24(
    *,
    data_dir: str = "",
    seed: int = 0,
    heldout_size: int = 100,
    prompt: str = "as_it_is",
    max_number: int = 13,
    bad_rows: str = "fatal",
) -> Task:
    """Four numbers that make 24, drawn from 1 to `max_number`; or with `data_dir` the puzzles that people played.

    `data_dir` names a folder with `all.jsonl.gz` (or `.jsonl`, `.parquet`), whose column `puzzle` is four numbers, easiest first;
    held out are those from rank 901 on, and a puzzle that a held-out one repeats is not trained on. A bad row
    is fatal or, with 'skip', left out and counted.
    """
    if data_dir:
        return _played(data_dir, heldout_size=heldout_size, bad_rows=bad_rows, prompt=prompt)
    if max_number < 6:
        raise ValueError(f"max_number is {max_number}: expected 6 or more, for fewer numbers hardly ever make 24")

    def draw(rng: random.Random) -> tuple[str, tuple[int, ...]]:
        hand = tuple(sorted(rng.randint(1, max_number) for _ in range(4)))
        return repr(hand), hand

    def write(rng: random.Random, hand: tuple[int, ...]) -> Written | None:
        solution = solve(hand, 24)
        return None if solution is None else _written(tuple(rng.sample(hand, 4)), solution)

    told = {"prompt": prompt, "name": "game24", "rule": "arithmetic.countdown", "words": _game24_words()}
    return endless(draw, write, seed=seed, heldout_size=heldout_size, **told)


def _game24_words() -> tuple[str, ...]:
    return pieces(GAME24, DIGITS, " ,+-*/()=;")


def _written(hand: tuple[int, ...], solution: tuple[str, str]) -> Written:
    question = GAME24.format(", ".join(map(str, hand[:-1])), hand[-1])
    metadata = {"numbers": hand, "target": 24, "use_all": True}
    return Written(question, "24", solution[1], shown=solution[0], metadata=metadata)


@lru_cache(maxsize=4096)  # a hand comes again and again: there are 1,820
def solve(numbers: tuple[int, ...], target: int) -> tuple[str, str] | None:
    """An expression of all the numbers that is worth `target`, and its steps; None where there is none.

    Whole results are preferred; where there are only others, the steps are in fractions.
    """
    for whole in (True, False):
        found = _search([(number, 1, number) for number in numbers], target, whole=whole)
        if found is not None:
            return text(found), ";".join(_rational_steps(found)[0])
    return None


Part = tuple[int, int, Tree]  # numerator, denominator, and how it was made


def _search(parts: list[Part], target: int, *, whole: bool) -> Tree | None:
    if len(parts) == 1:
        top, bottom, tree = parts[0]
        return tree if top == target * bottom else None
    for i, left in enumerate(parts):
        for j, right in enumerate(parts):
            if i == j:
                continue
            others = [part for k, part in enumerate(parts) if k not in (i, j)]
            for operator in "+-*/":
                if operator in "+*" and i > j:  # the same again
                    continue
                joined = _joined(operator, left, right, whole=whole)
                found = None if joined is None else _search([*others, joined], target, whole=whole)
                if found is not None:
                    return found
    return None


def _joined(operator: str, left: Part, right: Part, *, whole: bool) -> Part | None:
    """None where the result is negative, for the operands are tried the other way round too."""
    (a, b, one), (c, d, other) = left, right
    if operator == "/":
        if c == 0 or (whole and a % c):  # in whole numbers b and d are 1
            return None
        return (a // c, 1, (operator, one, other)) if whole else (a * d, b * c, (operator, one, other))
    if operator == "*":
        return a * c, b * d, (operator, one, other)
    top = a * d + c * b if operator == "+" else a * d - c * b
    return None if top < 0 else (top, b * d, (operator, one, other))


def _rational_steps(tree: Tree) -> tuple[list[str], Fraction]:
    if isinstance(tree, int):
        return [], Fraction(tree)
    (before, left), (after, right) = _rational_steps(tree[1]), _rational_steps(tree[2])
    result = {"+": add, "-": sub, "*": mul, "/": truediv}[tree[0]](left, right)
    return [*before, *after, f"{_shown(left)}{tree[0]}{_shown(right)}={_shown(result)}"], result


def _shown(number: Fraction) -> str:
    return str(number) if number.denominator == 1 else f"({number})"


def _played(data_dir: str, *, heldout_size: int, bad_rows: str, prompt: str) -> Task:
    template = read_prompt(prompt)
    source = f"the file in '{data_dir}'"
    hands, left = gather(read_split(data_dir, "all"), _hand, bad_rows=bad_rows, source=source)
    if heldout_size < 1 or FIRST_HELDOUT - 1 + heldout_size > len(hands):
        raise ValueError(
            f"heldout_size is {heldout_size}, and {source} has {len(hands)} puzzles, held out from rank {FIRST_HELDOUT} on: "
            f"expected 1 to {max(1, len(hands) - FIRST_HELDOUT + 1)}"
        )
    heldout = hands[FIRST_HELDOUT - 1 : FIRST_HELDOUT - 1 + heldout_size]
    kept_apart = {tuple(sorted(hand)) for _, hand in heldout}
    train = [(rank, hand) for rank, hand in hands if tuple(sorted(hand)) not in kept_apart]

    def problem(rank: int, hand: tuple[int, ...]) -> Problem:
        question = GAME24.format(", ".join(map(str, hand[:-1])), hand[-1])
        metadata = {"numbers": hand, "target": 24, "use_all": True}
        return Problem(id=f"rank/{rank}", question=question, answer="24", task="game24", metadata=metadata)

    return Task(
        name="game24",
        train=lambda number: problem(*train[number]),
        train_size=len(train),
        heldout=[problem(*each) for each in heldout],
        messages=lambda problem: conversation(template, problem),
        words=_game24_words(),
        rule="arithmetic.countdown",
        skipped=skipped(left),
    )


def _hand(row: Values, number: int, where: str) -> tuple[int, tuple[int, ...]]:
    """A puzzle's rank from 1 on, and its numbers."""
    text = row.get("puzzle")
    if not isinstance(text, str) or not re.fullmatch(r"\s*[1-9][0-9]?(\s+[1-9][0-9]?){3}\s*", text):
        raise BadRow("no puzzle", f"its 'puzzle' is {text!r}, expected four numbers from 1 to 99, such as '1 3 4 6'")
    return number + 1, tuple(map(int, text.split()))
