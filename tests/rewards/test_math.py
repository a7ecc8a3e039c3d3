"""The GSM8K rule on what models write, on every reference solution, and on text that no one should write."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxreason.rewards.math import final_number, gsm8k_answer
from jaxreason.types import Completion, Problem, StopReason


def score(text: str, answer: str) -> float:
    reward = gsm8k_answer(Problem("0", "", answer), Completion(text, (), StopReason.LENGTH))
    assert reward.parts == {"accuracy": reward.total}
    return reward.total


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("#### 72", "72"),
        ("She sold 48+24 = <<48+24=72>>72 clips.\n#### 72", "72"),
        ("####72\n", "72"),
        ("#### $1,234.50", "1234.5"),
        ("#### 5\nNo, wait.\n#### 6", "6"),
        (r"Thus $x = \boxed{72}$ after 3 steps.", "72"),
        (r"\boxed{1} and then \boxed{\$1,200}", "1200"),
        (r"\boxed{1{,}200 \text{ dollars}}", "1200"),
        (r"\boxed{x = 12}", "12"),
        (r"\boxed{50\%}", "50"),
        (r"\boxed{-3.0}", "-3"),
        (r"\boxed{\text{72}}", "72"),
        (r"\boxed{18\,\mathrm{m}}", "18"),
        (r"\boxed{72} <answer>5</answer> #### 6", "72"),
        ("<answer>72</answer>", "72"),
        ("<answer>She sold 48 + 24 = 72 clips.</answer> Those are 3 numbers.", "72"),
        ("<answer> \\$72.00 </answer>", "72"),
        ("<think>so \\boxed{5}, or 6</think>The answer is 72.", "72"),
        ("<think>5</think><think>6</think> 72", "72"),
        ("The answer is 72. Check: 48 + 24.", "72"),
        ("The final answer is: **$1,000,000**!", "1000000"),
        ("ANSWER: -4 (in degrees)", "-4"),
        ("The answer is \N{MINUS SIGN}4.", "-4"),
        ("The answer is approximately .5", "0.5"),
        ("So that makes 10 - 3 = 7 apples", "7"),
        ("It is 10-3", "3"),
        ("There were x2 and 7", "7"),
        ("Each costs Rs.500.", "500"),
        ("### Step 3\n#### Step 4: add\nWe get 9", "9"),
        ("It's 100% of 18.", "18"),
        ("答案是72个", "72"),
        ("\\boxed{72", "72"),
        ("<answer>72", "72"),
        ("0" * 5000 + "72", "72"),
        ("72", " $72.00 "),
        ("72", "72%"),
        ("1234", "1,234."),
    ],
)
def test_it_reads_what_models_write(text: str, answer: str):
    assert score(text, answer) == 1
    assert score(text, "12345") == 0


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("", "72"),
        ("He has 1,2, or 3", "3"),
        ("no number", "0"),
        ("The answer is 1/2.", "2"),
        ("The answer is 1/2.", "1"),
        (r"\boxed{\frac{1}{2}}", "2"),
        (r"\boxed{2^3}", "3"),
        (r"\boxed{5, 72}", "72"),
        (r"\boxed{} 72", "72"),
        ("<answer>none</answer> 72", "72"),
        ("<answer>72</answer><answer>5</answer>", "72"),
        ("72.000000000000000000000000000000001", "72"),
        ("10000000000000000000000000000000001", "10000000000000000000000000000000000"),
        ("-72", "72"),
        ("<think>72</think>", "72"),
        ("x72", "72"),
        ("\N{ARABIC-INDIC DIGIT SEVEN}", "7"),
    ],
)
def test_what_is_not_the_answer_scores_zero(text: str, answer: str):
    assert score(text, answer) == 0


@pytest.mark.parametrize("answer", ["", "x + 1", "1/2", "yes", "1 2", "NaN", "--"])
def test_the_part_is_none_where_the_reference_is_no_number(answer: str):
    reward = gsm8k_answer(Problem("0", "", answer), Completion(answer, (), StopReason.EOS))
    assert reward.total == 0 and reward.parts == {"accuracy": None}


def rows(shared: Path, split: str) -> list[tuple[str, str]]:
    with gzip.open(shared / "data" / "gsm8k" / f"{split}.jsonl.gz", "rt", encoding="utf-8") as lines:
        solutions = [json.loads(line)["answer"] for line in lines]
    return [(solution, solution.rpartition("####")[2].strip()) for solution in solutions]


@pytest.mark.parametrize("split", ["train", "test"])
def test_every_reference_solution_is_right_for_its_own_answer_and_wrong_for_another(shared: Path, split: str):
    solved = rows(shared, split)
    assert len(solved) > 1000
    for (solution, answer), (_, other) in zip(solved, solved[1:] + solved[:1], strict=True):
        assert score(solution, answer) == 1, solution
        different = float(answer.replace(",", "")) != float(other.replace(",", ""))
        assert score(solution, other) == (not different), solution
        work = solution.rpartition("####")[0]
        for form in (r"\boxed{{{}}}", "<answer>{}</answer>", "The answer is ${}."):
            assert score(work + form.format(answer), answer) == 1
        if "answer" not in work.lower():  # else 'the answer is' decides, before the last number does
            assert score(work + f"That makes {answer} in all.", answer) == 1


PIECES = ["1", ",000", "-", "$", "/", ".", " ", "\n", "####", "\\boxed{", "}", "{", "=", "<answer>", "</answer>"]
PIECES += ["</think>", "the answer is ", "answer:", "\\text{", "\\$", "x", "\ud800", "%", "e5", "\\"]


@settings(max_examples=500, deadline=None)
@given(st.one_of(st.text(), st.lists(st.sampled_from(PIECES), max_size=12).map("".join)), st.text(max_size=5))
def test_nothing_raises(text: str, answer: str):
    gsm8k_answer(Problem("0", "", answer), Completion(text, (), StopReason.EOS))
    assert score(text, "31415") == (final_number(text) == 31415)


@pytest.mark.parametrize("piece", [*PIECES, "1 ", "1,000,", "1/", "-1", "####  ", "\\boxed{1}", "answer is", "1."])
@pytest.mark.parametrize("start", ["", "\\boxed{", "1/2"])
def test_three_hundred_thousand_characters_of_anything_are_read(start: str, piece: str):
    text = start + piece * (300_000 // len(piece))
    assert score(text, "31415") == 0
    assert gsm8k_answer(Problem("0", "", text), Completion("1", (), StopReason.EOS)).total <= 1
