"""Which completions vote alike."""

from __future__ import annotations

import pytest

from jaxreason.rewards.votes import voted

ALIKE = [
    ["\\boxed{3.50}", "so the answer is 3.5.", "#### 3.5", "<answer> 3.5 </answer>", "it is $\\frac{7}{2}$", "\\boxed{7/2}"],
    ["\\boxed{1{,}234}", "The answer is 1,234", "<think>\\boxed{7}</think>\\boxed{1234.0}", "\\boxed{\\$1234}"],
    ["The answer is (B).", "\\boxed{\\text{B}}", "\\boxed{B}", "<answer>B. forty-two</answer>", "\\boxed{(B)}"],
    ["\\boxed{\\text{Yes}}", "The answer is yes.", "<answer>yes</answer>"],
    ["\\boxed{\\left( 1, 2 \\right)}", "\\boxed{(1,2)}"],
    ["\\boxed{\\dfrac{x}{2}}", "\\boxed{\\frac{x}{2}}"],
    ["\\boxed{-0.0}", "\\boxed{0}"],
    ["\\boxed{}", "", "<answer></answer>", "so we think on and on and on " * 20],
]


@pytest.mark.parametrize("number", range(len(ALIKE)))
def test_spellings_of_one_answer_vote_alike_and_no_others(number):
    votes = {voted(text) for text in ALIKE[number]}
    assert len(votes) == 1
    assert not votes & {voted(texts[0]) for i, texts in enumerate(ALIKE) if i != number}


def test_what_commits_to_nothing_does_not_vote():
    assert [voted(text) for text in ALIKE[-1]] == [None] * 4
    assert voted("\\boxed{12") != "12"


def test_a_number_too_large_to_write_out_votes_by_its_spelling():
    votes = [voted(text) for text in ("\\boxed{1/2004!}", "so it is $1/2004!$", "\\boxed{1/2006!}", "\\boxed{3!}", "\\boxed{6}")]
    assert votes[0] == votes[1] != votes[2] and votes[3] == votes[4] == "6"
    assert all(vote and len(vote) < 20 for vote in votes)


def test_a_variable_is_no_choice():
    assert voted("\\boxed{A+1}") not in ("A", None) and voted("\\boxed{x}") == "x"
