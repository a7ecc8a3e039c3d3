"""The answer that a completion votes for: what it commits to, in one spelling, or None where it commits to nothing.

Two completions vote alike where their answers are the same text, or the same rational number, after this. Whether an answer is
right is the rule's to say: spellings that stay apart here split a vote, and are not wrong for it.
"""

from __future__ import annotations

import re

from jaxreason.rewards import exact, notation
from jaxreason.rewards.answers import find_answer

LONGEST = 200  # characters; what is longer is no answer
LARGEST = 10**LONGEST  # of a number that is written out, such as 1/2004! is not: it votes by its spelling
_CHOICE = re.compile(r"[(\[]?(?:\\text(?:bf)?\{)?\(?([A-J])(?:\}|[).:\]]){0,3}(?![A-Za-z0-9+\-*/^=])")


def voted(text: str) -> str | None:
    """The answer of a completion in one spelling: a number by its value, a choice by its letter, words without their case."""
    found = find_answer(text)
    if found is None or len(found) > LONGEST:
        return None
    choice = _CHOICE.match(found)
    if choice and (choice.end() == len(found) or choice[0] != choice[1]):
        return choice[1]  # B, (B), B. text
    spelled = notation.plain(found)
    value = exact.value(spelled)
    if value is not None and max(abs(value.numerator), value.denominator) < LARGEST:
        return str(value)
    return notation.key(spelled).casefold() or None
