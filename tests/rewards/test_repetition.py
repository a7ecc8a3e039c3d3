"""Repetition against counting by hand and by two loops."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxreason.rewards.repetition import repeated_ngrams, repeated_words
from jaxreason.types import Completion, Problem, StopReason

PROBLEM = Problem("0", "1 + 1?", "2")


def tokens(*ids: int, n: int = 3) -> float:
    return repeated_ngrams(PROBLEM, Completion("", ids, StopReason.EOS), n=n).total


def text(written: str, n: int = 3) -> float:
    reward = repeated_words(PROBLEM, Completion(written, (), StopReason.EOS), n=n)
    assert reward.parts == {"repetition": reward.total}
    return reward.total


def test_by_hand():
    assert tokens() == tokens(1, 1) == tokens(1, 2, 3) == 0
    assert tokens(1, 1, 1, 1) == 0.5  # (1 1 1) twice
    assert tokens(1, 2, 1, 2, 1, 2) == 0.5  # 121 212 121 212
    assert tokens(1, 2, 2, n=1) == 1 / 3
    assert text("Wait, wait. wait") == 0 and text("Wait, wait. wait wait") == 0.5
    assert text("三三三三三") == 2 / 3 and text("三 个", n=2) == 0
    assert text("हिन्दी हिन्दी", n=1) == 0.5  # vowel signs do not cut a word
    for n in (0, -1):
        with pytest.raises(ValueError, match="expected 1 or more"):
            tokens(1, 2, n=n)


@given(st.lists(st.integers(0, 2), max_size=30), st.integers(1, 4))
def test_an_ngram_is_a_repeat_where_it_stood_before(ids: list[int], n: int):
    starts = range(len(ids) - n + 1)
    repeats = sum(any(ids[j : j + n] == ids[i : i + n] for j in range(i)) for i in starts)
    assert tokens(*ids, n=n) == (repeats / len(starts) if len(starts) else 0)


def test_degenerate_text_takes_one_pass():
    for written in ("a" * 10**6, "\n" * 10**5, "\ud800" * 10**5, "\0" * 10**5, "a " * 10**5, "a\u0431" * 10**5, "'" * 10**6):
        assert 0 <= text(written) < 1
