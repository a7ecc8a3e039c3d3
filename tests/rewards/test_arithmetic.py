"""Numbers and expressions on text, against Python's own parser, decimals and fractions."""

from __future__ import annotations

import ast
import random
import re
from collections import Counter
from fractions import Fraction

import pytest

from jaxreason.rewards.arithmetic import between, countdown, game, integer_answer, number, numeric_answer, reference_digits
from jaxreason.types import Completion, Problem, StopReason


def completion(text: str) -> Completion:
    return Completion(text, [], StopReason.EOS)


def of_game(numbers: object, target: object) -> Problem:
    return Problem("0", "", str(target), metadata={"numbers": numbers, "target": target})


def by_python(text: str) -> tuple[Fraction, list[int]] | None:
    """Value and numbers of an expression by Python's parser, with what our language lacks refused."""
    if not re.fullmatch(r"[0-9+\-*/() \t\n\r\f\v]*", text):
        return None
    text = re.sub(r"(?<![0-9])0+(?=[0-9])", "", re.sub(r"\s", " ", text)).strip()
    try:
        tree = ast.parse(text, mode="eval").body
    except (SyntaxError, ValueError):
        return None
    numbers: list[int] = []

    def value(node: ast.AST) -> Fraction:
        if isinstance(node, ast.Constant) and type(node.value) is int:
            numbers.append(node.value)
            return Fraction(node.value)
        if isinstance(node, ast.BinOp):
            left, right = value(node.left), value(node.right)
            for kind, function in ((ast.Add, Fraction.__add__), (ast.Sub, Fraction.__sub__), (ast.Mult, Fraction.__mul__)):
                if isinstance(node.op, kind):
                    return function(left, right)
            if isinstance(node.op, ast.Div):
                return left / right
        raise ArithmeticError

    try:
        return value(tree), numbers
    except ArithmeticError:
        return None


PIECES = ["1", "2", "3", "12", "(", ")", "+", "-", "*", "/", " ", "0", "x"]
FREQUENCY = (9, 9, 9, 9, 6, 6, 9, 9, 9, 9, 2, 1, 0.3)


def test_countdown_is_what_pythons_parser_and_fractions_say():
    rng, right, wrong = random.Random(0), 0, 0
    for _ in range(6000):
        text = "".join(rng.choices(PIECES, FREQUENCY, k=rng.choice((1, 3, 3, 5, 5, 7))))
        told = by_python(text)
        if told is not None and told[0].denominator == 1 and max(told[1]) < 10_000 and rng.random() < 0.9:
            numbers, target = [*told[1], *rng.choices(range(4), k=rng.randrange(2))][:8], int(told[0])
            rng.shuffle(numbers)
        else:
            numbers, target = rng.choices((1, 2, 3, 12), k=4), rng.randrange(-3, 30)
        for use_all in (False, True):
            expected = False
            if told is not None:
                used, given = Counter(told[1]), Counter(numbers)
                expected = told[0] == target and (used == given if use_all else used <= given)
            reward = countdown(of_game(numbers, target), completion(f"<answer>{text}</answer>"), use_all=use_all)
            assert reward.total == reward.parts["accuracy"] == float(expected), (text, numbers, target, use_all)
            right, wrong = right + expected, wrong + (not expected)
    assert right > 500 and wrong > 500


@pytest.mark.parametrize(
    ("text", "target"),
    [
        ("8/(3-8/3)", 24),  # through a fraction
        ("(8 / (3 - (8 / 3)))", 24),
        ("3-8-8", -13),
        ("8/8/3*3", 1),
        ("((((((((((((((8))))))))))))))", 8),
        ("\n3 *\t8 ", 24),
        ("003*8", 24),
    ],
)
def test_expressions_that_are_right(text: str, target: int):
    assert countdown(of_game([3, 3, 8, 8], target), completion(f"<answer>{text}</answer>")).total == 1


@pytest.mark.parametrize(
    "text",
    [
        "24", "8*3=24", "-8*-3", "+24", "8*3;", "3*3*8/3", "8**3", "8//3", "8 3", "(8*3", "8*3)", "8*3)(", ")8*3(", "()", "", " ",
        "8*3+0", "8(3)", "(8)(3)", "8*+3", "8*", "*3", "8*3.0", "8×3", "８*3", "3*8+3/(8-8)", "1" * 5000, "(" * 60 + "8*3",
        "__import__('os')", "8*3#", "lambda:24", "8e0*3", "0x8*3", "8_*3", "8*3" + " " * 200, "8*3\ud800", "{8*3}", "[8*3]",
    ],
)  # fmt: skip
def test_what_is_no_expression_of_the_numbers_is_wrong(text: str):
    assert countdown(of_game([3, 3, 8, 8], 24), completion(f"<answer>{text}</answer>")).total == 0


def test_a_problem_can_ask_for_all_of_its_numbers():
    of = Problem("0", "", "24", metadata={"numbers": (3, 8, 1), "target": 24, "use_all": True})
    assert [countdown(of, completion(f"<answer>{text}</answer>")).total for text in ("3*8", "3*8*1")] == [0, 1]


def test_a_degenerate_answer_costs_little_and_raises_nothing():
    deep = "(" * 100_000 + "8" + ")" * 100_000
    assert countdown(of_game([8], 8), completion(f"<answer>{deep}</answer>"), max_bytes=10**6).total == 1
    assert countdown(of_game([8], 8), completion("<answer>" * 100_000)).total == 0
    digits = "0" * 100_000 + "8"
    assert countdown(of_game([8], 8), completion(f"<answer>{digits}</answer>"), max_bytes=10**6).total == 1
    assert countdown(of_game([8], 8), completion(f"<answer>{digits}8</answer>"), max_bytes=10**6).total == 0


@pytest.mark.parametrize(
    ("numbers", "target"),
    [(None, 24), ([], 24), ([1] * 9, 24), ([1.0], 1), ([-1], 1), ([10_000], 1), ([True], 1), ("12", 3), ([1], None), ([1], 2**31)],
)
def test_a_problem_that_is_no_game_has_no_such_part(numbers: object, target: object):
    assert game(of_game(numbers, target)) is None
    reward = countdown(of_game(numbers, target), completion("<answer>1</answer>"))
    assert reward.total == 0 and reward.parts == {"accuracy": None}


@pytest.mark.parametrize(
    ("text", "answer", "right"),
    [
        ("3.50", "3.5", True), ("3.5", "3.50", True), ("1,234", "1234", True), ("1234", "1,234", True), ("-0", "0", True),
        ("+7", "7", True), (" 7\n", "7", True), ("7.", "7", True), (".5", "0.5", True), ("-.5", "-0.5", True),
        ("007", "7", True), ("1,234,567.890", "1234567.89", True), ("0.0", "-0", True),
        ("12,34", "1234", False), ("1,2345", "12345", False), (",123", "123", False), ("1,", "1", False),
        ("1234,567", "1234567", False),
        ("7.0.0", "7", False), (".", "0", False), ("", "0", False), ("-", "0", False), ("--7", "7", False), ("- 7", "-7", False),
        ("7 7", "77", False), ("7e0", "7", False), ("$7", "7", False), ("7%", "7", False), ("٧", "7", False), ("−7", "-7", False),
        ("7x", "7", False), ("nan", "nan", False), ("Infinity", "7", False), ("1_0", "10", False), ("7" + " " * 64, "7", False),
        ("9" * 40, "1", False), ("0." + "0" * 20 + "1", "0", False), ("-7", "7", False), ("70", "7", False), ("0.7", "7", False),
    ],
)  # fmt: skip
def test_numbers(text: str, answer: str, right: bool):
    reward = numeric_answer(Problem("0", "", answer), completion(f"so <answer>{text}</answer>"))
    assert reward.total == float(right) and reward.parts["accuracy"] in (None, float(right))


@pytest.mark.parametrize(
    ("text", "answer", "right"),
    [
        ("7", "7", True), (" -7\n", "-7", True), ("007", "7", True), ("-0", "0", True), ("00", "0", True),
        ("2147483647", "2147483647", True),
        ("-7", "7", False), ("7", "-7", False), ("+7", "7", False), ("7.0", "7", False), ("- 7", "-7", False), ("", "0", False),
        ("7" * 9999, "7", False), ("2147483648", "2147483648", False), ("7", "7.0", False), ("7", "x", False), ("٧", "7", False),
    ],
)  # fmt: skip
def test_integers(text: str, answer: str, right: bool):
    assert integer_answer(Problem("0", "", answer), completion(f"<answer>{text}</answer>")).total == float(right)


@pytest.mark.parametrize("answer", ["x", "", "1/2", "1" * 21, "0." + "0" * 12 + "1", "12,34", "nan"])
def test_a_reference_that_no_traced_rule_can_hold_has_no_such_part(answer: str):
    assert reference_digits(answer) is None
    assert numeric_answer(Problem("0", "", answer), completion(f"<answer>{answer}</answer>")).parts == {"accuracy": None}


def test_the_digits_of_a_reference_are_its_value():
    rng = random.Random(1)
    for _ in range(500):
        whole, zeros = rng.randrange(10 ** rng.randrange(1, 21)), "0" * rng.randrange(4)
        text = f"{rng.choice(['', '-', '+'])}{whole}.{zeros}{rng.randrange(10**8)}"
        digits = reference_digits(text)
        value = number(text)
        assert digits is not None and value is not None
        assert sum(Fraction(10) ** (19 - place) * digit for place, digit in enumerate(digits)) == Fraction(value)


def test_the_last_answer_counts_and_boxes_can_be_read():
    assert between("<answer>1</answer> <answer>2</answer></answer>", open="<answer>", close="</answer>", max_bytes=9) == "2"
    assert between("<answer>1</answer> <answer>2", open="<answer>", close="</answer>", max_bytes=9) is None
    box = {"open": "\\boxed{", "close": "}"}
    assert numeric_answer(Problem("0", "", "4"), completion(r"\boxed{3} or \boxed{4}."), **box).total == 1
    assert numeric_answer(Problem("0", "", "4"), completion(r"\boxed{\frac{4}{1}}"), **box).total == 0
