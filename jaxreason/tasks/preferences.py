"""Pairs of continuations of which people preferred one: HH-RLHF's form.

The task's problems are the dialogues up to the judged turn, for training against a reward model; they have no reference answer
and no rule.
"""

from __future__ import annotations

import re

from jaxreason.tasks import columns
from jaxreason.tasks.rows import BadRow, Values
from jaxreason.tasks.source import DataSet, Question, task_of
from jaxreason.tasks.task import Message
from jaxreason.types import Preference

_TURN = re.compile(r"\n\n(Human|Assistant):")
_ROLES = {"Human": "user", "Assistant": "assistant"}


def _pair(row: Values) -> Preference:
    """The dialogue that both columns begin with, and the last turn of each."""
    (shared, chosen), (other, rejected) = (_dialogue(row, column) for column in ("chosen", "rejected"))
    if shared != other:
        raise BadRow("different dialogues", "columns 'chosen' and 'rejected' differ before their last turn")
    return Preference(shared, chosen, rejected)


def _dialogue(row: Values, column: str) -> tuple[list[Message], str]:
    before, *pieces = _TURN.split("\n\n" + columns.text(row, column))
    turns = [{"role": _ROLES[who], "content": said.strip()} for who, said in zip(pieces[::2], pieces[1::2], strict=True)]
    alternate = all(turn["role"] == ("user", "assistant")[place % 2] for place, turn in enumerate(turns))
    if before.strip() or not turns or len(turns) % 2 or not alternate:
        raise BadRow(
            "no dialogue", f"column '{column}' is no dialogue of 'Human:' and 'Assistant:' in turn that ends in the latter"
        )
    if not all(turn["content"] for turn in turns[:-1]):
        raise BadRow("empty", f"column '{column}' has an empty turn")
    return turns[:-1], turns[-1]["content"]


def _hh_rlhf(row: Values) -> Question:
    pair = _pair(row)
    return Question(pair.messages[-1]["content"], "", {"messages": pair.messages}, pair=pair)


HH_RLHF = DataSet(
    name="hh_rlhf",
    what="HH-RLHF, which of two answers people found more helpful or harmless (Bai et al., arXiv:2204.05862).",
    hub="Anthropic/hh-rlhf",
    columns=("chosen", "rejected"),
    question=_hh_rlhf,
    prompt="as_it_is",
    rule="",
    bad_rows="skip",  # three rows in a thousand are no pair of turns in one dialogue
)
DATA_SETS = (HH_RLHF,)

hh_rlhf = task_of(HH_RLHF)
