"""The host's format rule against one regular expression with lookahead, on text made of pieces of the tags."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxreason.rewards.format import answered, think_answer_format
from jaxreason.types import Completion, Problem, StopReason

PROBLEM = Problem(id="0", question="1 + 1?", answer="2")
GOOD = "<think>1 + 1 = 2 < 3</think>\n<answer>2</answer>"


def score(text: str, stop: StopReason = StopReason.EOS) -> float:
    reward = think_answer_format(PROBLEM, Completion(text, (), stop))
    assert reward.parts == {"format": reward.total}
    return reward.total


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (GOOD, 1),
        ("<think></think><answer>2</answer>", 1),
        ("<think>é\n\n</think> <answer>\n2 </answer>", 1),
        ("<think></think><answer></answer>", 0),
        ("<answer>2</answer>", 0),
        ("<answer>2</answer><think></think>", 0),
        (" " + GOOD, 0),
        (GOOD + "\n", 0),
        (GOOD + GOOD, 0),
        ("<think>1</think> so <answer>2</answer>", 0),
        ("<think><think>1</think><answer>2</answer>", 0),
        ("<think>1</think><answer><answer>2</answer>", 0),
        ("<think>1</think><answer>2", 0),
        ("<Think>1</Think><answer>2</answer>", 0),
        ("", 0),
        ("<think>" * 300_000, 0),
        ("<" * 1_000_000, 0),
        ("<think>" + "<think" * 100_000 + "</think><answer>2</answer>", 1),
    ],
)
def test_a_completion_is_well_formed_or_not(text: str, expected: float):
    assert score(text) == expected


@pytest.mark.parametrize("stop", [stop for stop in StopReason if stop is not StopReason.EOS])
def test_only_an_ended_completion_is_well_formed(stop: StopReason):
    assert score(GOOD) == 1 and score(GOOD, stop) == 0


TAG = "</?(?:think|answer)>"
REFERENCE = re.compile(rf"<think>(?:(?!{TAG})[\s\S])*</think>[ \t\n\r\f\v]*<answer>(?:(?!{TAG})[\s\S])+</answer>")
PIECES = st.sampled_from(["<think>", "</think>", "<answer>", "</answer>", "<", "think>", " ", "\n", "\u00a0", "1", "</"])


@settings(max_examples=300, deadline=None)
@given(st.lists(PIECES, max_size=3), st.lists(PIECES, max_size=2), st.lists(PIECES, max_size=3))
def test_it_is_one_regular_expression(before: list[str], between: list[str], answer: list[str]):
    text = f"<think>{''.join(before)}</think>{''.join(between)}<answer>{''.join(answer)}</answer>"
    assert score(text) == bool(REFERENCE.fullmatch(text))
    assert score("".join(answer)) == bool(REFERENCE.fullmatch("".join(answer)))


def test_host_rules_and_automata_do_not_import_jax():
    ours = "jaxreason.automata, jaxreason.rewards.format, jaxreason.rewards.math"
    code = f"import sys, {ours}; assert 'jax' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_answer_is_what_stands_last() -> None:
    assert answered("<think><answer>1</answer></think> so <answer> 2 </answer>") == " 2 "
    assert answered("<answer>1</answer> no, <answer>3</answer>.") == "3"
    assert answered("a</think> plain ") == " plain "
    assert answered("<answer>cut off") == "cut off"
