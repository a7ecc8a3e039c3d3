"""Reward rules as JAX functions of token ids: they compile into the training step, and no text is ever made.

A factory does its work with the vocabulary once, on the host, and returns a rule
`(prompts, completion [P, G, T], mask [P, G, T]) -> reward [P, G]`. What a completion says is the bytes of the tokens that
the mask keeps; a None in the vocabulary, or an id outside it, is a token without text, which matches nothing. This is the one
part of `jaxreason.rewards` with jax, and a config names its rules 'traced.<rule>'; docs/rewards.md says how to write one.
Absent on purpose: anything that needs more than the tokens and what `PromptBatch` holds of a problem; that is a host rule.
"""

from jaxreason.rewards.traced.answers import AnswerBytes, answer_reader, numeric_answer
from jaxreason.rewards.traced.game import countdown
from jaxreason.rewards.traced.lengths import cosine_length, repeated_ngrams, soft_overlong
from jaxreason.rewards.traced.lifted import TracedRule, integer_answer, matches, think_answer_format, weighted_total

__all__ = [
    "AnswerBytes",
    "TracedRule",
    "answer_reader",
    "cosine_length",
    "countdown",
    "integer_answer",
    "matches",
    "numeric_answer",
    "repeated_ngrams",
    "soft_overlong",
    "think_answer_format",
    "weighted_total",
]
