"""From a problem to the conversation that is put to the policy: prompt templates, and what is left of earlier turns.

A template is a text file with `{question}` in it. Without more it is one message of the user. Lines `[system]`, `[user]` and
`[assistant]` cut it into turns, which is how examples are given; a file that begins with `[text]` is the prompt itself, which
no chat template is put around, for base models.
"""

from __future__ import annotations

import importlib.resources
import re
from collections.abc import Sequence
from pathlib import Path

from jaxreason.naming import nearest
from jaxreason.tasks.task import Message
from jaxreason.types import Problem

TEXT = "text"  # the role of a message that is the whole prompt as it stands
_TURN = re.compile(r"^\[(system|user|assistant|text)\]\n", re.MULTILINE)


def read_prompt(name: str) -> list[Message]:
    """The turns of a template that is shipped, by its name, or of a file of one's own whose name ends in .txt."""
    if name.endswith(".txt"):
        if not Path(name).is_file():
            raise ValueError(f"prompt is '{name}', and there is no such file: give a template's name or a text file")
        content = Path(name).read_text(encoding="utf-8")
    else:
        folder = importlib.resources.files("jaxreason.tasks") / "prompts"
        file = folder / f"{name}.txt"
        if not file.is_file():
            there = sorted(entry.name.removesuffix(".txt") for entry in folder.iterdir() if entry.name.endswith(".txt"))
            raise ValueError(f"prompt is '{name}', which is no template: {nearest(name, there)}")
        content = file.read_text(encoding="utf-8")
    before, *pieces = _TURN.split(content)
    turns = [{"role": role, "content": words.strip()} for role, words in zip(pieces[::2], pieces[1::2], strict=True)]
    if before.strip():
        turns = [{"role": "user", "content": before.strip()}, *turns]
    roles = [turn["role"] for turn in turns]
    if not turns or "{question}" not in turns[-1]["content"] or roles[-1] not in ("user", TEXT):
        raise ValueError(f"prompt is '{name}', whose last turn is not the user's with {{question}} in it: the problem goes there")
    if TEXT in roles and len(roles) > 1:
        raise ValueError(f"prompt is '{name}', which has [text] beside other turns: a text is the whole prompt, remove them")
    return turns


def conversation(template: Sequence[Message], problem: Problem) -> list[Message]:
    """The template's turns with the problem, and its choices where it has some, in their place.

    A problem that comes with a dialogue of its own, as `messages` in its metadata, is put as that.
    """
    if "messages" in problem.metadata:
        return [dict(message) for message in problem.metadata["messages"]]
    asked = wording(problem)
    return [{"role": turn["role"], "content": turn["content"].replace("{question}", asked)} for turn in template]


def wording(problem: Problem) -> str:
    """The question, and below it the choices, one a line."""
    choices = "\n".join(f"{letter}. {wording}" for letter, wording in problem.metadata.get("choices", ()))
    return f"{problem.question}\n\n{choices}" if choices else problem.question


def without_thinking(messages: Sequence[Message]) -> list[Message]:
    """The conversation as reasoning models are served it: of an earlier turn of the assistant only its answer is left.

    Earlier are the turns before the user's last one. What follows `</think>` is the answer; a turn that was cut off while it was
    thinking gave none.
    """
    last = max((place for place, message in enumerate(messages) if message["role"] == "user"), default=-1)
    kept = []
    for place, message in enumerate(messages):
        if message["role"] == "assistant" and place < last:
            answer = message["content"].rpartition("</think>")[2].partition("<think>")[0]
            message = {**message, "content": answer.strip()} if answer != message["content"] else message
        kept.append(message)
    return kept
