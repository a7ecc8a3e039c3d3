"""Rules on an answer that is a number or an arithmetic expression between two tags, in exact arithmetic, on text.

`jaxreason.rewards.traced` has both on tokens, and they agree: what a number and an expression are is written down twice, and
the tests compare. The text is that of the last opening tag, up to the first closing tag after it. Nothing here raises,
whatever the completion; a rule costs one linear pass and never calls `eval`. Absent on purpose: powers, roots, units,
percentages and LaTeX, which `jaxreason.rewards.math` reads.
"""

from __future__ import annotations

import re
from collections import Counter
from decimal import Decimal
from fractions import Fraction
from typing import NamedTuple

from jaxreason.types import Completion, Problem, Reward

# What a traced rule can hold of a problem; see `reference_digits` and `game`.
INTEGER_DIGITS, DECIMALS = 20, 12
MOST_NUMBERS, LARGEST_NUMBER, LARGEST_INTEGER = 8, 9999, 2**31 - 1

_SPACE = " \t\n\r\f\v"
_INTEGER = re.compile(r"(?P<sign>-?)0*(?P<digits>0|[1-9][0-9]*)")
_NUMBER = re.compile(r"[-+]?(?:[0-9]{1,3}(?:,[0-9]{3})+(?:\.[0-9]*)?|[0-9]+(?:\.[0-9]*)?|\.[0-9]+)")
_SYMBOL = re.compile(r"[0-9]+|[-+*/()]|[ \t\n\r\f\v]+")


def integer_answer(problem: Problem, completion: Completion, *, open: str = "<answer>", close: str = "</answer>") -> Reward:
    """1 if the text between the last `open` and the next `close` is an integer equal to `problem.answer`; else 0.

    An integer is decimal digits with an optional minus, white space around it allowed. The part is None where the reference is
    no integer of 32 bits.
    """
    expected = reference_integer(problem.answer)
    if expected is None:
        return Reward(0.0, {"accuracy": None})
    text = between(completion.text, open=open, close=close)
    match = None if text is None else _INTEGER.fullmatch(text.strip(_SPACE))
    # as text: int() refuses a number of thousands of digits
    correct = float(
        match is not None and match["digits"] == str(abs(expected)) and (match["sign"] == "-" * (expected < 0) or not expected)
    )
    return Reward(correct, {"accuracy": correct})


def numeric_answer(
    problem: Problem, completion: Completion, *, open: str = "<answer>", close: str = "</answer>", max_bytes: int = 64
) -> Reward:
    r"""1 if the text between the last `open` and the next `close` is a number equal to `problem.answer`; else 0.

    A number is decimal digits with an optional sign, an optional point (3.50, 5., .5), and commas before every third digit or
    none at all; white space around it is allowed. 3.50 is 3.5, 1,234 is 1234, -0 is 0. `open="\\boxed{", close="}"` reads a
    box. Text of more than `max_bytes` bytes is no number. The part is None where the reference is no number, or needs more
    than 20 digits before the point or 12 after it.
    """
    if reference_digits(problem.answer) is None:
        return Reward(0.0, {"accuracy": None})
    text = between(completion.text, open=open, close=close, max_bytes=max_bytes)
    value = None if text is None else number(text)
    correct = float(value is not None and value == number(problem.answer))
    return Reward(correct, {"accuracy": correct})


def countdown(
    problem: Problem,
    completion: Completion,
    *,
    open: str = "<answer>",
    close: str = "</answer>",
    use_all: bool = False,
    max_bytes: int = 128,
) -> Reward:
    """1 if the expression between the tags makes `metadata["target"]` of `metadata["numbers"]`, each used at most once; else 0.

    An expression is whole numbers without a sign, + - * / and parentheses, white space between them allowed, evaluated as
    rational numbers; a division by zero is wrong. With `use_all`, or `metadata["use_all"]`, every number is to be
    used. Text of more than `max_bytes` bytes is wrong. The part is None where the problem is no game; `game` says what one is.
    """
    told = game(problem)
    if told is None:
        return Reward(0.0, {"accuracy": None})
    text = between(completion.text, open=open, close=close, max_bytes=max_bytes)
    symbols = None if text is None else _symbols(text)
    correct = float(
        symbols is not None and _uses(symbols, told, use_all=use_all or told.use_all) and _value(symbols) == told.target
    )
    return Reward(correct, {"accuracy": correct})


class Game(NamedTuple):
    """Numbers to be used, and what is to be made of them."""

    numbers: tuple[int, ...]
    target: int
    use_all: bool  # every number is to be used, as in the Game of 24


def game(problem: Problem) -> Game | None:
    """The numbers and the target in the problem's metadata: 1 to 8 whole numbers from 0 to 9,999, a target below 2^31.

    None where they are not there, or are anything else.
    """
    numbers, target = problem.metadata.get("numbers"), problem.metadata.get("target")
    if not isinstance(numbers, list | tuple) or not 0 < len(numbers) <= MOST_NUMBERS:
        return None
    if any(type(one) is not int or not 0 <= one <= LARGEST_NUMBER for one in numbers):
        return None
    if type(target) is not int or abs(target) > LARGEST_INTEGER:
        return None
    return Game(tuple(numbers), target, problem.metadata.get("use_all") is True)


def number(text: str) -> Decimal | None:
    """The number that the text is, white space around it aside, as `numeric_answer` reads one; None where it is none."""
    text = text.strip(_SPACE)
    return Decimal(text.replace(",", "")) if _NUMBER.fullmatch(text) else None


def reference_integer(answer: str) -> int | None:
    """The reference as an integer whose magnitude is below 2^31; None where it is none."""
    try:
        value = int(answer)
    except ValueError:
        return None
    return value if abs(value) <= LARGEST_INTEGER else None


def reference_digits(answer: str) -> tuple[int, ...] | None:
    """The digits of a number by place, 10^19 down to 10^-12, each with the number's sign; None where it has others, or is none.

    Equal numbers have equal digits, however they were written: this is what a traced rule compares.
    """
    value = number(answer)
    if value is None:
        return None
    sign, digits, exponent = value.as_tuple()
    places = [0] * (INTEGER_DIGITS + DECIMALS)
    for at, digit in enumerate(digits):
        if digit:
            place = INTEGER_DIGITS - (len(digits) - at + int(exponent))
            if not 0 <= place < len(places):
                return None
            places[place] = -digit if sign else digit
    return tuple(places)


def between(text: str, *, open: str, close: str, max_bytes: int | None = None) -> str | None:
    """The text from the last `open` to the first `close` after it; None where there is none, or it is too long."""
    start = text.rfind(open)
    if start < 0:
        return None
    start += len(open)
    end = text.find(close, start)
    if end < 0:
        return None
    # a character is one byte at least, so that only short text is encoded
    if max_bytes is not None and (end - start > max_bytes or len(text[start:end].encode(errors="replace")) > max_bytes):
        return None
    return text[start:end]


def _symbols(text: str) -> list[int | str] | None:
    """Numbers and signs in order; None where the text holds anything else, or a number that none of a game can be."""
    found, at = [], 0
    while at < len(text):
        match = _SYMBOL.match(text, at)
        if match is None:
            return None
        at, symbol = match.end(), match[0]
        if symbol in "+-*/()":
            found.append(symbol)
        elif symbol[0] not in _SPACE:
            symbol = symbol.lstrip("0") or "0"
            if len(symbol) > len(str(LARGEST_NUMBER)):
                return None  # before int(), which refuses a number of thousands of digits
            found.append(int(symbol))
    return found


def _uses(symbols: list[int | str], told: Game, *, use_all: bool) -> bool:
    used, given = Counter(one for one in symbols if isinstance(one, int)), Counter(told.numbers)
    return used == given if use_all else used <= given


def _value(symbols: list[int | str]) -> Fraction | None:
    """The value; None where the symbols are no expression, or it divides by zero.

    What is read so far is total + product (operator) operand; a parenthesis puts the three aside and begins anew.
    """
    outside: list[tuple[Fraction, Fraction, str]] = []
    total, product, operator = Fraction(0), Fraction(1), "*"
    operand = None
    for symbol in [*symbols, "end"]:
        if isinstance(symbol, int) or symbol == "(":
            if operand is not None:
                return None
            if isinstance(symbol, int):
                operand = Fraction(symbol)
                continue
            outside.append((total, product, operator))
            total, product, operator = Fraction(0), Fraction(1), "*"
            continue
        if operand is None or (operator == "/" and operand == 0):
            return None
        product = product * operand if operator == "*" else product / operand
        operand = None
        if symbol in ("*", "/"):
            operator = symbol
            continue
        total += product
        if symbol in ("+", "-"):
            product, operator = Fraction(1 if symbol == "+" else -1), "*"
        elif symbol == "end":
            return None if outside else total
        elif not outside:
            return None
        else:
            operand = total
            total, product, operator = outside.pop()
    return None
