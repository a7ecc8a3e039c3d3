"""Arithmetic on whole numbers: chains of operations, remainders, and numbers written in other bases.

What is 12-3*(4+1)?
<think>4+1=5;3*5=15;12-15=-3</think><answer>-3</answer>
"""

from __future__ import annotations

import random

from jaxreason.tasks.procedural import DIGITS, Written, check_span, endless, pieces
from jaxreason.tasks.task import Task

Tree = int | tuple[str, "Tree", "Tree"]  # a number, or an operator with what stands left and right of it

CHAIN = "What is {}?"
MODULAR = "What is ({}) mod {}?"
BASE_OPERATION = "What is {} in base {}? All numbers are in base {}."
BASE_CONVERSION = "Write {} from base {} in base {}."
STRENGTH = {"+": 1, "-": 1, "*": 2, "/": 2}
LARGEST = 10**9  # of a chain's running values


# ------------------------------------------------------------------------------------------------------------ expressions


def value(tree: Tree) -> int | None:
    """What an expression is worth; None where a division leaves a remainder or a value grows beyond LARGEST."""
    if isinstance(tree, int):
        return tree
    operator, left, right = tree[0], value(tree[1]), value(tree[2])
    if left is None or right is None:
        return None
    if operator == "/":
        return left // right if right and left % right == 0 else None
    result = left + right if operator == "+" else left - right if operator == "-" else left * right
    return result if abs(result) <= LARGEST else None


def text(tree: Tree) -> str:
    """An expression with the brackets that it needs."""
    if isinstance(tree, int):
        return str(tree)
    operator, left, right = tree
    before, after = text(left), text(right)
    if isinstance(left, tuple) and STRENGTH[left[0]] < STRENGTH[operator]:
        before = f"({before})"
    if isinstance(right, tuple) and STRENGTH[right[0]] <= STRENGTH[operator]:
        after = f"({after})"
    return f"{before}{operator}{after}"


def steps(tree: Tree) -> list[str]:
    """An expression's chain of thought: one equation an operation, inner ones first."""
    if isinstance(tree, int):
        return []
    operator, left, right = tree
    second = value(right)
    shown = f"({second})" if second is not None and second < 0 else f"{second}"
    return [*steps(left), *steps(right), f"{value(left)}{operator}{shown}={value(tree)}"]


def flat(numbers: list[int], operators: list[str]) -> Tree:
    """numbers[0] operators[0] numbers[1] ... read as usual: `*` and `/` first, then from left to right."""
    if not operators:
        return numbers[0]
    weakest = min(STRENGTH[operator] for operator in operators)
    at = max(place for place, operator in enumerate(operators) if STRENGTH[operator] == weakest)
    return operators[at], flat(numbers[: at + 1], operators[:at]), flat(numbers[at + 1 :], operators[at + 1 :])


def bracketed(rng: random.Random, numbers: list[int], operators: list[str]) -> Tree:
    """The same row of numbers and operators with brackets put anyhow."""
    if not operators:
        return numbers[0]
    at = rng.randrange(len(operators))
    left, right = (numbers[: at + 1], operators[:at]), (numbers[at + 1 :], operators[at + 1 :])
    return operators[at], bracketed(rng, *left), bracketed(rng, *right)


def arithmetic_chains(
    *,
    seed: int = 0,
    heldout_size: int = 256,
    prompt: str = "as_it_is",
    min_terms: int = 2,
    max_terms: int = 4,
    max_number: int = 20,
    operators: str = "+-*",
    brackets: bool = True,
) -> Task:
    """What is 12-3*(4+1)? Numbers from 1 to `max_number`; a division, where `operators` has `/`, leaves no remainder."""
    check_span(min_terms, max_terms, smallest=2, largest=12, names=("min_terms", "max_terms"))
    _check_most(max_number, 2, name="max_number")
    if not operators or not set(operators) <= set(STRENGTH):
        raise ValueError(f"operators is '{operators}': expected some of + - * /, such as '+-*'")

    def draw(rng: random.Random) -> tuple[str, Tree]:
        count = rng.randint(min_terms, max_terms)
        numbers = [rng.randint(1, max_number) for _ in range(count)]
        chosen = [rng.choice(operators) for _ in range(count - 1)]
        tree = bracketed(rng, numbers, chosen) if brackets else flat(numbers, chosen)
        return text(tree), tree

    def write(rng: random.Random, tree: Tree) -> Written | None:
        result = value(tree)
        return None if result is None else Written(CHAIN.format(text(tree)), str(result), ";".join(steps(tree)))

    words = pieces(CHAIN, DIGITS, "+-*/()=;")
    told = {"prompt": prompt, "name": "arithmetic_chains", "rule": "math.gsm8k_answer", "words": words}
    return endless(draw, write, seed=seed, heldout_size=heldout_size, **told)


# ------------------------------------------------------------------------------------------------------------- remainders


def modular_arithmetic(
    *,
    seed: int = 0,
    heldout_size: int = 256,
    prompt: str = "as_it_is",
    max_number: int = 99,
    min_modulus: int = 2,
    max_modulus: int = 20,
    max_exponent: int = 5,
) -> Task:
    """What is (17*23) mod 7? Sums, differences, products and, where `max_exponent` is 2 or more, powers."""
    check_span(min_modulus, max_modulus, smallest=2, names=("min_modulus", "max_modulus"))
    _check_most(max_number, 2, name="max_number")
    _check_most(max_exponent, 1, name="max_exponent")

    def draw(rng: random.Random) -> tuple[str, tuple[str, int, int, int]]:
        operator = rng.choice("+-*^" if max_exponent >= 2 else "+-*")
        second = rng.randint(2, max_exponent) if operator == "^" else rng.randint(1, max_number)
        content = operator, rng.randint(1, max_number), second, rng.randint(min_modulus, max_modulus)
        return repr(content), content

    def write(rng: random.Random, content: tuple[str, int, int, int]) -> Written:
        operator, a, b, modulus = content
        thought: list[str] = []

        def reduced(number: int) -> int:
            if not 0 <= number < modulus:
                thought.append(f"{number}={number // modulus}*{modulus}+{number % modulus}")
            return number % modulus

        first = reduced(a)
        if operator == "^":
            result = first
            for _ in range(b - 1):
                thought.append(f"{result}*{first}={result * first}")
                result = reduced(result * first)
        else:
            second = reduced(b)
            total = {"+": first + second, "-": first - second, "*": first * second}[operator]
            thought.append(f"{first}{operator}{second}={total}")
            result = reduced(total)
        return Written(MODULAR.format(f"{a}{operator}{b}", modulus), str(result), ";".join(thought))

    words = pieces(MODULAR, DIGITS, "+-*^=;")
    told = {"prompt": prompt, "name": "modular_arithmetic", "rule": "math.gsm8k_answer", "words": words}
    return endless(draw, write, seed=seed, heldout_size=heldout_size, **told)


# ------------------------------------------------------------------------------------------------------------ other bases


def in_base(number: int, base: int) -> str:
    """The digits of a number of 0 or more."""
    digits = ""
    while number or not digits:
        number, digit = divmod(number, base)
        digits = f"{digit}{digits}"
    return digits


def base_arithmetic(
    *, seed: int = 0, heldout_size: int = 256, prompt: str = "as_it_is", min_base: int = 2, max_base: int = 9, max_number: int = 99
) -> Task:
    """What is 1021+22 in base 3? Also differences, products, and numbers of one base written in another, with 10 among them.

    Bases above 10 would need letters as digits, and an answer is a number here.
    """
    check_span(min_base, max_base, smallest=2, largest=10, names=("min_base", "max_base"))
    _check_most(max_number, 2, name="max_number")

    def draw(rng: random.Random) -> tuple[str, tuple[str, int, int, int]]:
        kind, base = rng.choice("+-*>"), rng.randint(min_base, max_base)
        a = rng.randint(1, max_number)
        if kind == ">":
            other = rng.choice([each for each in range(min_base, 11) if each <= max_base or each == 10])
            content = (kind, base, a, other) if rng.random() < 0.5 else (kind, other, a, base)
        else:
            b = rng.randint(1, a if kind == "-" else max_number)
            content = kind, base, a, b
        return repr(content), content

    def write(rng: random.Random, content: tuple[str, int, int, int]) -> Written | None:
        kind, base, a, b = content
        if kind == ">":
            if in_base(a, base) == in_base(a, b):
                return None
            thought = [*_from_base(a, base), *_to_base(a, b)]
            return Written(BASE_CONVERSION.format(in_base(a, base), base, b), in_base(a, b), ";".join(thought))
        total = {"+": a + b, "-": a - b, "*": a * b}[kind]
        thought = [*_from_base(a, base), *_from_base(b, base), f"{a}{kind}{b}={total}", *_to_base(total, base)]
        question = BASE_OPERATION.format(f"{in_base(a, base)}{kind}{in_base(b, base)}", base, base)
        return Written(question, in_base(total, base), ";".join(thought))

    words = pieces(BASE_OPERATION, BASE_CONVERSION, DIGITS, "+-*=;")
    told = {"prompt": prompt, "name": "base_arithmetic", "rule": "math.gsm8k_answer", "words": words}
    return endless(draw, write, seed=seed, heldout_size=heldout_size, **told)


def _from_base(number: int, base: int) -> list[str]:
    """Horner's rule, digit by digit: the value of 1021 in base 3."""
    if base == 10:
        return []
    digits = [int(digit) for digit in in_base(number, base)]
    thought, total = [], digits[0]
    for digit in digits[1:]:
        thought.append(f"{total}*{base}+{digit}={total * base + digit}")
        total = total * base + digit
    return thought


def _to_base(number: int, base: int) -> list[str]:
    """Divided again and again, the remainders being the digits from the last to the first."""
    thought = []
    while base != 10 and number >= base:
        thought.append(f"{number}={number // base}*{base}+{number % base}")
        number //= base
    return thought


def _check_most(given: int, smallest: int, *, name: str) -> None:
    if given < smallest:
        raise ValueError(f"{name} is {given}: expected {smallest} or more")
