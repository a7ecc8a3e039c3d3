"""Any regular expression as a rule, on text: the automaton of `jaxreason.automata`, so no pattern can make it hang."""

from __future__ import annotations

from functools import lru_cache

from jaxreason.automata import accepts, compile_regex
from jaxreason.types import Completion, Problem, Reward


def matches(problem: Problem, completion: Completion, *, pattern: str) -> Reward:
    r"""1 if `pattern` matches the whole text; else 0. `[\s\S]*wait[\s\S]*` asks whether it occurs.

    How a completion ended does not count: `[\s\S]*</answer>` holds for one that was cut off there, too. What a pattern may
    hold is said at `jaxreason.automata.compile_regex`, which raises ValueError for anything else; bytes are matched, so `.`
    is a byte.
    """
    matched = float(accepts(_compiled(pattern), completion.text.encode(errors="replace")))
    return Reward(matched, {"match": matched})


_compiled = lru_cache(maxsize=64)(compile_regex)
