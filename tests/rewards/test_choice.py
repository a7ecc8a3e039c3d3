"""Letters of choices and short answers as models write them."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxreason.rewards.choice import choice_answer, short_answer
from jaxreason.types import Completion, Problem, StopReason

CHOICES = ["Paris", "a dog", "London is big", "4"]


def choose(text: str, answer: str = "B", choices: object = CHOICES) -> float:
    metadata = {} if choices is None else {"choices": choices}
    reward = choice_answer(Problem("0", "", answer, metadata=metadata), Completion(text, (), StopReason.EOS))
    assert reward.parts == {"accuracy": reward.total}
    return reward.total


def short(text: str, answer: str, **metadata: object) -> float:
    reward = short_answer(Problem("0", "", answer, metadata=metadata), Completion(text, (), StopReason.EOS))
    assert reward.parts == {"accuracy": reward.total}
    return reward.total


@pytest.mark.parametrize(
    "text",
    [
        "B", "(B)", "B.", "B. a dog", r"\boxed{B}", r"\boxed{\text{B}}", r"\boxed{\textbf{(B)} a dog}", "[B]",
        r"The answer is $\boxed{B}$",
        "The answer is B.", "The answer is (B) a dog.", "Answer: B", "**Answer: B**",
        "Answer: **B**", "Answer:\nB", "#### B", "B: a dog",
        "The answer is a dog.", "a dog", "A dog", r"\boxed{a dog}", "<answer>B</answer>",
        "<answer>B) a dog</answer>", "<think>A</think>B",
        "So option B is correct.", "The correct choice is B", "The correct option is B.",
        "B is the correct answer because A is wrong",
        "I think (A) is wrong. (B)", "Therefore, the correct answer is: B) a dog", "The answer is option B", "Final answer: [B]",
    ],
)  # fmt: skip
def test_a_choice_is_read(text: str):
    assert choose(text) == 1
    assert choose(text, "C") == 0


@pytest.mark.parametrize(
    "text",
    [
        "A", "C", "", " \n", "A, B", "A and B", "The answer is A or B", r"\boxed{A, B}", r"\boxed{AB}", "B or C", "A dog is in B",
        "The answer is a cat.", "E", "<think>B</think>", "<think>B</think> A", "not B", "Both", "B+C", "(A) (B) (C) (D)",
        "I", "A boy",
        "Answer: C. (B) is wrong", "Because",
    ],
)  # fmt: skip
def test_another_choice_several_or_none_are_wrong(text: str):
    assert choose(text) == 0


def test_choices_come_in_several_forms():
    labelled = ["A)21", "B)22", "C)23"]
    assert choose("C", "C", labelled) == choose("23", "C", labelled) == choose("Answer: 23", "C", labelled) == 1
    assert choose("22", "C", labelled) == 0
    numbered = {"1": "x", "2": "y"}
    assert choose("2", "2", numbered) == choose("(2)", "2", numbered) == choose("The answer is y", "2", numbered) == 1
    pairs = [("A", "x"), ["B", "y"]]
    assert choose("y", "B", pairs) == choose("B", "B", pairs) == choose("(B) y", "y", pairs) == 1
    assert choose("x", "B", pairs) == 0
    assert choose("15", "B", ["-15", "15"]) == choose(r"\boxed{-15}", "A", ["-15", "15"]) == 1
    assert choose("The answer is B", "B", None) == choose("The answer is a dog", "a dog") == 1
    assert choice_answer(Problem("0", "", "?"), Completion("B", (), StopReason.EOS)).parts == {"accuracy": None}


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("yes", "Yes"), ("Yes, because it is.", "yes"), ("The answer is yes.", "yes"), ("It floats. So the answer is no.", "no"),
        ("<answer>No</answer>", "no"), ("Pears float. So yes.", "yes"), (r"\boxed{\text{Yes}}", "yes"), ("True", "yes"),
        ("#### yes", "yes"),
        ("The Eiffel Tower", "eiffel tower"), ("The answer is the Eiffel Tower.", "Eiffel Tower"), ("Answer: Dr. Who", "Dr. Who"),
        ("The answer is Henry J. Kaiser. He built ships.", "Henry J. Kaiser"), ("The answer is vitamin C. It heals.", "vitamin C"),
        ("Reasoning.\nParis", "Paris"), ('The answer is "1,000 people".', "1000 people"), ("So it is.\nMax is a vumpus.",
        "Max is a vumpus"),
    ],
)  # fmt: skip
def test_a_short_answer_is_read(text: str, answer: str):
    assert short(text, answer) == 1
    assert short(text, {"yes": "no", "no": "yes"}.get(answer.lower(), "elsewhere")) == 0


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("Both: yes and no", "no"), ("The answer is not Paris", "Paris"), ("Paris or London", "Paris"), ("", "Paris"), ("", "no"),
        ("<think>yes</think>", "yes"), ("I do not know.", "no"), ("The answer is nothing", "no"), ("Pari", "Paris"),
    ],
)  # fmt: skip
def test_what_is_not_the_short_answer_is_wrong(text: str, answer: str):
    assert short(text, answer) == 0


def test_aliases_count_and_a_reference_without_words_is_not_judged():
    assert short("NYC", "New York City", aliases=["NYC"]) == 1
    assert short("NY", "New York City", aliases=["NYC"]) == 0
    assert short_answer(Problem("0", "", "The!"), Completion("x", (), StopReason.EOS)).parts == {"accuracy": None}


PIECES = [
    "A",
    "(B)",
    "B.",
    " ",
    "\n",
    "answer is ",
    "option ",
    "\\boxed{",
    "}",
    "yes",
    "no ",
    "####",
    "<answer>",
    "</answer>",
    "\ud800",
    "or ",
]


@settings(max_examples=300, deadline=None)
@given(st.one_of(st.text(), st.lists(st.sampled_from(PIECES), max_size=12).map("".join)))
def test_nothing_raises(text: str):
    choose(text)
    short(text, "yes")
    short(text, "Paris")
    choice_answer(Problem("0", "", text, metadata={"choices": [text, "x"]}), Completion("x", (), StopReason.EOS))


@pytest.mark.parametrize("piece", PIECES)
def test_long_texts_are_read(piece: str):
    choose(piece * (300_000 // len(piece)))
    short(piece * (300_000 // len(piece)), "yes")
