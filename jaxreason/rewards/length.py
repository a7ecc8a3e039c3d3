"""Rewards for the length of a completion, in tokens: all that were written, the end-of-sequence token among them.

`jaxreason.objectives.shaping` has the first two on arrays, for code that has no text; they agree. Absent on purpose: length
in characters, which a policy can change without thinking less.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from jaxreason.types import Completion, Problem, Reward


def soft_overlong(problem: Problem, completion: Completion, *, max_completion_tokens: int, cache_tokens: int) -> Reward:
    """0 up to L_max - L_cache, then (L_max - L_cache - |y|)/L_cache, -1 beyond L_max (DAPO, arXiv:2503.14476, Eq. 13).

    L_max is `max_completion_tokens`, the whole budget (20,480 in the paper), and L_cache is `cache_tokens`, its last part
    (4,096). Between -1 and 0: give it a weight of 1. Raises ValueError unless 0 < L_cache <= L_max.
    """
    if not 0 < cache_tokens <= max_completion_tokens:
        raise ValueError(
            f"cache_tokens is {cache_tokens} and max_completion_tokens {max_completion_tokens}: the first must be at least 1 "
            "and at most the second, whose last tokens it counts"
        )
    over = (max_completion_tokens - cache_tokens - len(completion.tokens)) / cache_tokens
    value = min(0.0, max(-1.0, over))
    return Reward(value, {"overlong": value})


def kimi_length(
    problem: Problem, completions: Sequence[Completion], rewards: Sequence[Reward], *, correct: str = "accuracy"
) -> list[Reward]:
    """lambda = 0.5 - (len - min)/(max - min) over the group; lambda if correct, else min(0, lambda).

    Kimi k1.5, arXiv:2501.12599, section 2.3.3: 0 for all where all lengths are equal. `correct` names the part of `rewards`
    that is positive for a right answer; one to which it does not apply is not right. The paper adds it with a small weight,
    and with none at first. Raises ValueError if a reward has no such part.
    """
    lengths = [len(completion.tokens) for completion in completions]
    right = _right(rewards, correct)
    if not lengths:
        return []
    shortest, longest = min(lengths), max(lengths)
    shares = [0.5 - (length - shortest) / (longest - shortest) if longest > shortest else 0.0 for length in lengths]
    values = [share if is_right else min(share, 0.0) for share, is_right in zip(shares, right, strict=True)]
    return [Reward(value, {"length": value}) for value in values]


def cosine_length(
    problem: Problem,
    completions: Sequence[Completion],
    rewards: Sequence[Reward],
    *,
    max_completion_tokens: int,
    r_0_correct: float = 2.0,
    r_max_correct: float = 1.0,
    r_0_wrong: float = -10.0,
    r_max_wrong: float = 0.0,
    r_exceed: float = -10.0,
    correct: str = "accuracy",
) -> list[Reward]:
    """r_L + (r_0 - r_L)(1 + cos(pi |y| / L_max))/2, by whether it is correct; r_exceed from |y| = L_max on.

    Yeo et al., arXiv:2502.03373, section 4.2: right answers are better short (r_0 2 to r_L 1), wrong ones better long (-10
    to 0), and it is the whole reward there, accuracy included. It needs no group, but another part: `correct` is read as
    `kimi_length` reads it. Raises ValueError if a reward has no such part, or L_max is below 1.
    """
    if max_completion_tokens < 1:
        raise ValueError(f"max_completion_tokens is {max_completion_tokens}: expected 1 or more, the budget of a completion")

    def value(length: int, is_right: bool) -> float:
        if length >= max_completion_tokens:
            return r_exceed
        first, last = (r_0_correct, r_max_correct) if is_right else (r_0_wrong, r_max_wrong)
        return last + 0.5 * (first - last) * (1 + math.cos(math.pi * length / max_completion_tokens))

    right = _right(rewards, correct)
    values = [value(len(completion.tokens), is_right) for completion, is_right in zip(completions, right, strict=True)]
    return [Reward(each, {"length": each}) for each in values]


def _right(rewards: Sequence[Reward], correct: str) -> list[bool]:
    for reward in rewards:
        if correct not in reward.parts:
            raise ValueError(f"correct is '{correct}', which is no part of the reward: choose one of {', '.join(reward.parts)}")
    return [(reward.parts[correct] or 0.0) > 0 for reward in rewards]
