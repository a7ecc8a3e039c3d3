"""Completions that name several answers, or take one back: none of the rules on answers may pay for the right one among them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pytest

from jaxreason.rewards.choice import choice_answer, short_answer
from jaxreason.rewards.math import gsm8k_answer, math_answer
from jaxreason.types import Completion, Problem, RewardFn, StopReason

MARKS = ("{}", r"\boxed{{{}}}", "<answer>{}</answer>", "The answer is {}", "Let us see.\nAnswer: {}")
SPACE = " " * 5000


def paid(rule: RewardFn, golds: Sequence[str], texts: Sequence[str], **metadata: Any) -> list[tuple[str, str]]:
    completions = [(gold, mark.format(text)) for gold in golds for text in texts for mark in MARKS]
    return [
        (gold, text)
        for gold, text in completions
        if rule(Problem("0", "", gold, metadata=metadata), Completion(text, (), StopReason.EOS)).total
    ]


NUMBERS = [
    "3 or 4", "either 3 or 4", "3, or maybe 4", "3, maybe 4", "3, possibly 4", "either $3$ or maybe $4$", "3 (or 4)",
    "3 apples or 4 apples",
    "maybe 3, maybe 4", "not 3", "not 4", "not $4$",
]  # fmt: skip


@pytest.mark.parametrize("rule", [math_answer, gsm8k_answer])
def test_one_number_of_several(rule: RewardFn):
    assert not paid(rule, ["3", "4"], NUMBERS)


@pytest.mark.parametrize("rule", [math_answer, gsm8k_answer])
@pytest.mark.parametrize(
    "text",
    [
        r"\boxed{3} or maybe \boxed{4}", r"\boxed{3}, \boxed{4}", r"\boxed{x = 3 \text{ or } x = 4}", r"\boxed{\text{not }4}",
        "#### 3 or 4", "#### 3, 4", "<answer>3 4</answer>", "<answer>3, 4</answer>", "The answer is 3 and 4",
    ],
)  # fmt: skip
def test_one_marked_number_of_several(rule: RewardFn, text: str):
    for gold in ("3", "4"):
        assert rule(Problem("0", "", gold), Completion(text, (), StopReason.EOS)).total == 0


@pytest.mark.parametrize(("text", "last"), [("35 = 12", "12"), ("12 = 35", "35"), ("6 = 12 = 35", "35"), ("x = 12 = 35", "35")])
def test_of_an_equation_the_last_side_alone_counts(text: str, last: str):
    """So writing two numbers pays no more than writing one."""
    assert {gold for gold, _ in paid(math_answer, ["12", "35"], [text, f"${text}$"])} == {last}
    assert not paid(math_answer, ["12", "35"], [r"35 \in 12"])


@pytest.mark.parametrize(
    ("gold", "text"), [("12", "3 + 9 = 12"), ("0.67", "2/3 = 0.67"), ("12", "x = 12"), ("12", "m + n = 5 + 7 = 12")]
)
def test_an_equation_that_is_true(gold: str, text: str):
    assert len(paid(math_answer, [gold], [text])) == len(MARKS)


LETTERS = [
    "A B C D", "A, B", "A, or B", "A or B", "A/B", "A;B", "A | B", "(A)(B)", "(A) (B) (C)", "A. B. C. D.", "A and B", "A & B",
    "A (or B)",
    "A, maybe B", "A: B", "A) B)", "A =B", "A...B", "either A or B", "both A and B", "Option A, or option B", "option A; option B",
    "A. apple or B. banana", "A (apple), perhaps B (banana)", "apple or banana",
]  # fmt: skip


@pytest.mark.parametrize("metadata", [{}, {"choices": ["apple", "banana", "vitamin C", "dog"]}])
def test_one_letter_of_several(metadata: Mapping[str, Any]):
    assert not paid(choice_answer, ["A", "B"], LETTERS, **metadata)


@pytest.mark.parametrize(
    ("text", "gold"),
    [
        ("A, not B", "A"), ("A, because B is wrong", "A"), ("C. vitamin C", "C"), ("(C) vitamin C", "C"), ("B, I think", "B"),
        ("B. A fruit", "B"), ("B and that is all", "B"),
    ],
)  # fmt: skip
def test_a_letter_with_an_explanation_is_one(text: str, gold: str):
    problem = Problem("0", "", gold, metadata={"choices": ["apple", "banana", "vitamin C", "dog"]})
    for mark in MARKS:
        assert choice_answer(problem, Completion(mark.format(text), (), StopReason.EOS)).total == 1, mark


WORDS = [
    "yes or no",
    "yes and no",
    "yes, no",
    "no yes",
    "Both yes and no",
    "yes, but maybe no",
    "true false",
    "no or yes",
    "Yes/No",
]


def test_yes_and_no():
    assert not paid(short_answer, ["yes", "no"], WORDS)
    assert not paid(short_answer, ["yes"], ["It is not true"])
    denied = short_answer(Problem("0", "", "no"), Completion("It is not true", (), StopReason.EOS))
    explained = short_answer(Problem("0", "", "yes"), Completion("<answer>Yes, no doubt.</answer>", (), StopReason.EOS))
    assert denied.total == explained.total == 1


@pytest.mark.parametrize("space", [SPACE, "." * 5000, "$" * 5000])
def test_what_stands_beyond_the_part_that_is_read(space: str):
    """A rule that shortens an answer would read its beginning alone."""
    texts = [mark.format(f"Paris{space}or London") for mark in MARKS]
    for text in texts:
        assert short_answer(Problem("0", "", "Paris"), Completion(text, (), StopReason.EOS)).total == 0, text[:50]
    for text in (mark.format(f"A{space}B") for mark in MARKS):
        assert choice_answer(Problem("0", "", "A"), Completion(text, (), StopReason.EOS)).total == 0, text[:50]
    for text in (mark.format(f"4{space}or 3") for mark in MARKS):
        assert math_answer(Problem("0", "", "4"), Completion(text, (), StopReason.EOS)).total == 0, text[:50]
