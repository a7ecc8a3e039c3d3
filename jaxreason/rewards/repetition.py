"""How much of a completion repeats itself: the share of its n-grams that have occurred before in it.

A share between 0 and 1, so its weight is negative in a reward. One linear pass; absent on purpose: repetition of meaning.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence

from jaxreason.rewards.language import words
from jaxreason.types import Completion, Problem, Reward


def repeated_ngrams(problem: Problem, completion: Completion, *, n: int = 3) -> Reward:
    """(|n-grams| - |distinct|) / |n-grams| of the tokens; 0 where there are fewer than n. Raises ValueError if n < 1."""
    value = repeated_share(completion.tokens, n=n)
    return Reward(value, {"repetition": value})


def repeated_words(problem: Problem, completion: Completion, *, n: int = 3) -> Reward:
    """(|n-grams| - |distinct n-grams|) / |n-grams| of the text's words, whatever their case; 0 where there are fewer than n.

    A word is what `language.words` says: a run of letters and digits, or one Chinese or Japanese character. Raises
    ValueError if n < 1.
    """
    value = repeated_share(words(completion.text.lower()), n=n)
    return Reward(value, {"repetition": value})


def repeated_share(items: Sequence[Hashable], *, n: int) -> float:
    """(|n-grams| - |distinct n-grams|) / |n-grams| of a sequence; 0 where it is shorter than n."""
    if n < 1:
        raise ValueError(f"n is {n}: expected 1 or more, the number of neighbours that are compared")
    count = len(items) - n + 1
    if count < 1:
        return 0.0
    distinct = len(set(zip(*(items[i:] for i in range(n)), strict=False)))
    return (count - distinct) / count
