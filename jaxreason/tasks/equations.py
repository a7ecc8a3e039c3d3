"""Linear equations with whole solutions, in one unknown or two.

Solve 3x+4=5x-6. What is x?
<think>3x-5x=-6-4;-2x=-10;x=-10/-2;x=5</think><answer>5</answer>
"""

from __future__ import annotations

import random

from jaxreason.tasks.procedural import DIGITS, Written, endless, pieces
from jaxreason.tasks.task import Task

ONE = "Solve {}. What is x?"
TWO = "Solve {} and {}. What is {}?"


def linear_equations(
    *,
    seed: int = 0,
    heldout_size: int = 256,
    prompt: str = "as_it_is",
    unknowns: int = 1,
    max_coefficient: int = 9,
    max_solution: int = 20,
) -> Task:
    """Equations whose solutions are whole and from -`max_solution` to `max_solution`; coefficients likewise.

    One unknown: a x + b = c x + d with a and c apart. Two: two equations, and one of the unknowns is asked for.
    """
    if unknowns not in (1, 2):
        raise ValueError(f"unknowns is {unknowns}: expected 1 or 2")
    for name, given in (("max_coefficient", max_coefficient), ("max_solution", max_solution)):
        if given < 1:
            raise ValueError(f"{name} is {given}: expected 1 or more")
    if unknowns == 1:
        draw, write = _draw_one(max_coefficient, max_solution), _write_one
    else:
        draw, write = _draw_two(max_coefficient, max_solution), _write_two
    words = pieces(ONE, TWO, DIGITS, "x y", "y=+-;()/*")
    told = {"prompt": prompt, "name": "linear_equations", "rule": "math.gsm8k_answer", "words": words}
    return endless(draw, write, seed=seed, heldout_size=heldout_size, **told)


def _draw_one(largest: int, largest_solution: int):
    def draw(rng: random.Random) -> tuple[str, tuple[int, int, int, int, int]]:
        x = rng.randint(-largest_solution, largest_solution)
        a, c = rng.sample([n for n in range(-largest, largest + 1) if n or largest == 1], 2)
        if rng.random() < 0.5:
            c = 0  # a x + b = d
            a = a or 1
        b = rng.randint(-largest, largest)
        content = a, b, c, (a - c) * x + b, x
        return repr(sorted([content[:2], content[2:4]])), content  # the same equation with its sides exchanged

    return draw


def _write_one(rng: random.Random, content: tuple[int, int, int, int, int]) -> Written:
    a, b, c, d, x = content
    equation = f"{_sum((a, 'x'), (b, ''))}={_sum((c, 'x'), (d, ''))}"
    thought = []
    if b or c:
        thought.append(f"{_sum((a, 'x'), (-c, 'x'))}={_sum((d, ''), (-b, ''))}")
    thought += [f"{_sum((a - c, 'x'))}={d - b}", f"x={d - b}/{_bracketed(a - c)}", f"x={x}"]
    return Written(ONE.format(equation), str(x), ";".join(dict.fromkeys(thought)))


def _draw_two(largest: int, largest_solution: int):
    def draw(rng: random.Random) -> tuple[str, tuple[tuple[tuple[int, int, int], ...], str]]:
        x, y = (rng.randint(-largest_solution, largest_solution) for _ in "xy")
        while True:
            (a, b), (c, d) = [[rng.randint(-largest, largest) for _ in "xy"] for _ in range(2)]
            if a * d != b * c:
                break
        equations = (a, b, a * x + b * y), (c, d, c * x + d * y)
        asked = rng.choice("xy")
        return repr((sorted(equations), asked)), (equations, asked)

    return draw


def _write_two(rng: random.Random, content: tuple[tuple[tuple[int, int, int], ...], str]) -> Written:
    """The other unknown is eliminated: each equation times the other's coefficient of it, and their difference."""
    ((a, b, e), (c, d, f)), asked = content
    first, second = (_sum((p, "x"), (q, "y")) + f"={r}" for p, q, r in ((a, b, e), (c, d, f)))
    if asked == "x":
        times, coefficient, right = (d, b), a * d - c * b, e * d - f * b
        products = f"{_bracketed(a)}*{_bracketed(d)}-{_bracketed(c)}*{_bracketed(b)}={coefficient}"
    else:
        times, coefficient, right = (c, a), b * c - d * a, e * c - f * a
        products = f"{_bracketed(b)}*{_bracketed(c)}-{_bracketed(d)}*{_bracketed(a)}={coefficient}"
    rights = f"{_bracketed(e)}*{_bracketed(times[0])}-{_bracketed(f)}*{_bracketed(times[1])}={right}"
    solution = right // coefficient
    ends = [f"{_sum((coefficient, asked))}={right}", f"{asked}={right}/{_bracketed(coefficient)}", f"{asked}={solution}"]
    return Written(TWO.format(first, second, asked), str(solution), ";".join(dict.fromkeys([products, rights, *ends])))


def _sum(*terms: tuple[int, str]) -> str:
    """3x-y+4: terms with the coefficient 0 left out, 1 not written before an unknown."""
    written = ""
    for number, unknown in terms:
        if number:
            size = "" if unknown and abs(number) == 1 else str(abs(number))
            written += ("-" if number < 0 else "+" if written else "") + size + unknown
    return written or "0"


def _bracketed(number: int) -> str:
    return f"({number})" if number < 0 else str(number)
