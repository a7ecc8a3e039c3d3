"""Reflection words, counted: a metric and not a reward, which a policy would learn to write without reflecting.

DeepSeek-R1-Zero's authors count wait, mistake, however, but, retry, error, verify, wrong, evaluate and check (arXiv:2501.12948);
ours are these, phrases that say more than a single word, and Chinese ones. What a count shows is disputed: base models write such
words before any reinforcement, and plain 'wait' is often no reflection, so compare with the count at step 0.
"""

from __future__ import annotations

import re
from collections import Counter

from jaxreason.rewards.format import thinking
from jaxreason.types import Completion, Problem, Reward

# name of the part -> its forms; of two that begin at one place the longer counts
ENGLISH = {
    "wait": ("wait", "hold on"),
    "however": ("however",),
    "but": ("but",),
    "mistake": ("mistake", "mistakes", "mistaken"),
    "error": ("error", "errors"),
    "wrong": ("wrong", "incorrect"),
    "retry": ("retry", "try again", "think again", "start over"),
    "check": ("check", "checks", "checking", "double-check", "let me check", "check again"),
    "verify": ("verify", "verifies", "verifying", "let me verify"),
    "evaluate": ("evaluate", "re-evaluate", "reevaluate", "reconsider"),
}
CHINESE = {
    "wait": ("等等", "等一下", "等一等", "慢着"),
    "however": ("然而", "不过"),
    "but": ("但是", "可是"),
    "mistake": ("弄错", "搞错", "算错"),
    "error": ("错误",),
    "wrong": ("不对", "不正确"),
    "retry": ("重新", "再想想", "再试", "再算"),
    "check": ("检查", "让我检查", "检验"),
    "verify": ("验证", "核实", "验算"),
    "evaluate": ("重新评估", "重新考虑"),
}
_NAMES = {form: name for forms in (ENGLISH, CHINESE) for name, each in forms.items() for form in each}
_FORMS = re.compile(  # no letter before or after, in Chinese text either; and what is not symmetric is not wrong
    "|".join(
        f"{form}(?!称)" if form > "\u4e00" else f"(?<![A-Za-z]){form}(?![A-Za-z])".replace(" ", "[ \n]")
        for form in sorted(_NAMES, key=len, reverse=True)
    ),
    re.IGNORECASE,
)


def reflection_words(problem: Problem, completion: Completion, *, per_tokens: int = 0) -> Reward:
    """How many reflection words the chain of thought has, and as parts how many of each; per `per_tokens` tokens if positive.

    Give the part a weight of 0. It is None where there are no tokens to divide by. Raises ValueError if `per_tokens` is
    negative.
    """
    if per_tokens < 0:
        raise ValueError(f"per_tokens is {per_tokens}: expected 0, to count, or a number of tokens such as 1000")
    counts = Counter(_NAMES[found[0].lower().replace("\n", " ")] for found in _FORMS.finditer(thinking(completion.text)))
    if per_tokens and not completion.tokens:
        return Reward(0.0, {"words": None})
    scale = per_tokens / len(completion.tokens) if per_tokens else 1.0
    return Reward(counts.total() * scale, {name: counts[name] * scale for name in ENGLISH})
