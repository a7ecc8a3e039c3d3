"""Reflection words counted by hand, in English and Chinese."""

from __future__ import annotations

import pytest

from jaxreason.rewards.reflection import CHINESE, ENGLISH, reflection_words
from jaxreason.types import Completion, Problem, Reward, StopReason

PROBLEM = Problem("0", "1 + 1?", "2")


def count(text: str, tokens: int = 0, per_tokens: int = 0) -> Reward:
    return reflection_words(PROBLEM, Completion(text, (0,) * tokens, StopReason.EOS), per_tokens=per_tokens)


def counted(text: str) -> dict[str, float]:
    reward = count(text)
    found = {name: value for name, value in reward.parts.items() if value}
    assert reward.total == sum(each or 0 for each in found.values())
    return found


def test_by_hand():
    assert counted("Wait, that is wrong. However, let me\ncheck again: WAIT") == {"wait": 2, "wrong": 1, "however": 1, "check": 1}
    assert counted("Let me check. I double-check, then re-evaluate") == {"check": 2, "evaluate": 1}
    assert counted("await the button, unchecked; checkmate waiting for a butler") == {}
    assert counted("等等,这不对。但是让我检查一下,重新算。") == {"wait": 1, "wrong": 1, "but": 1, "check": 1, "retry": 1}
    assert counted("这个图形不对称") == {} and counted("我觉得wait一下") == {"wait": 1}
    assert counted("重新评估") == {"evaluate": 1}  # the longer form
    assert counted("<think>wait</think>But wait, however") == {"wait": 1}  # in the chain of thought alone


def test_per_tokens():
    assert count("wait, wait", tokens=500, per_tokens=1000).total == 4
    assert count("wait, wait", tokens=500, per_tokens=1000).parts["wait"] == 4
    assert count("wait", tokens=0, per_tokens=1000).parts == {"words": None}
    with pytest.raises(ValueError, match="per_tokens is -1"):
        count("wait", per_tokens=-1)


def test_every_form_counts_once_by_itself():
    assert ENGLISH.keys() == CHINESE.keys()
    for forms in (ENGLISH, CHINESE):
        for name, each in forms.items():
            for form in each:
                assert counted(form) == {name: 1}, form


def test_degenerate_text_takes_one_pass():
    for text in ("a" * 10**6, "let " * 10**5, "\n" * 10**5, "\ud800\0" * 10**5, "重" * 10**5, "wait " * 10**5):
        assert count(text).total == (10**5 if text.startswith("wait") else 0)
