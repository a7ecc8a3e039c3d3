"""Rules on the form of a completion, on text. `jaxreason.rewards.traced` has the same rule on tokens.

The format is DeepSeek-R1's (arXiv:2501.12948, Table 1): `<think> reasoning </think> <answer> answer </answer>`.
No regular expression runs over the text as a whole, so a degenerate completion costs one linear pass.
"""

from __future__ import annotations

import re
from itertools import islice

from jaxreason.types import Completion, Problem, Reward, StopReason

_TAG = re.compile(r"</?(?:think|answer)>")
_SPACE = " \t\n\r\f\v"


def think_answer_format(problem: Problem, completion: Completion) -> Reward:
    """1 if the completion is one think block and then one answer block, with nothing outside, ended by EOS; else 0.

    Thinking may be empty and the answer may not; neither holds a tag. White space is allowed between the blocks, as in
    R1's own template, and nowhere else outside. A truncated completion is never well formed.
    """
    text = completion.text
    tags = list(islice(_TAG.finditer(text), 5))
    well_formed = (
        completion.stop is StopReason.EOS
        and [tag[0] for tag in tags] == ["<think>", "</think>", "<answer>", "</answer>"]
        and tags[0].start() == 0
        and not text[tags[1].end() : tags[2].start()].strip(_SPACE)
        and tags[2].end() < tags[3].start()
        and tags[3].end() == len(text)
    )
    return Reward(float(well_formed), {"format": float(well_formed)})


def thinking(text: str) -> str:
    """The chain of thought: up to the last `</think>`, from the first `<think>` on; the whole text where there is neither.

    The prompt may have opened the block already, and a truncated completion has not closed it.
    """
    before, closed, _ = text.rpartition("</think>")
    inside = before if closed else text
    opened = inside.find("<think>")
    return inside if opened < 0 else inside[opened + len("<think>") :]


def answered(text: str) -> str:
    """What follows the last `</think>`, and of that what the last `<answer>` opens, closed or not, where there is one."""
    text = text.rpartition("</think>")[2]
    _, opened, inside = text.rpartition("<answer>")
    return inside.partition("</answer>")[0] if opened else text


def summary(text: str) -> str:
    """What follows the last `</think>`: what a reader is shown. Empty where thinking never ended, the text where none began."""
    _, closed, after = text.rpartition("</think>")
    return after if closed or "<think>" not in text else ""
