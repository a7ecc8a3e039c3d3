"""`jaxreason play`: a person answers a task's problems, as completions that the task's rule scores. For debugging a reward."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator

from rich.console import Console

from jaxreason.cli.main import DONE
from jaxreason.cli.named import NoTokens, limits, make_task, rule_of, settings
from jaxreason.cli.progress import visible
from jaxreason.rewards.pool import Pool
from jaxreason.rewards.table import rows
from jaxreason.tasks.task import Task
from jaxreason.types import Completion, Problem, StopReason

HELP = (
    "Type a completion, as often as you like; an empty line goes on to the next problem. "
    ":text begins one of several lines, up to a line with a dot alone; :answer shows the reference, :prompt what a model is given, "
    ":quit leaves."
)


def run(given: argparse.Namespace) -> int:
    task = make_task(given.task, settings(given.settings, "task"))
    rule = rule_of(task, given.rule, settings(given.settings, "rule"))
    problems = _problems(task, given.split, given.start)
    console = Console(soft_wrap=True, highlight=False)

    def say(text: str) -> None:
        console.print(visible(text), markup=False)

    for sentence in task.skipped.told(task.name):
        say(sentence)
    scoring = [given.rule] if given.rule else sorted(set(task.rules.values())) or [task.rule]
    say(f"Task '{task.name}', scored by {', '.join(scoring)}. {HELP}")
    for row in rows():
        if row.name in scoring:
            say(f"{row.name}: {row.line}")
    with Pool({"rule": rule}, **limits(given)) as pool:
        answered = _play(task, problems, pool, console, say)
    say(f"{answered} completion{'' if answered == 1 else 's'} scored.")
    return DONE


def _play(task: Task, problems: Iterator[Problem], pool: Pool, console: Console, say: Callable[[str], None]) -> int:
    """How many completions were scored, when the person has left or the problems have ended."""
    answered = 0
    for problem in problems:
        say(f"\n{problem.id}\n{problem.question}")
        for line in _lines(console):
            if not line:
                break
            if line == ":quit":
                return answered
            if line == ":answer":
                say(f"    reference: {problem.answer}")
            elif line == ":prompt":
                say("\n".join(f"[{message['role']}]\n{message['content']}" for message in task.messages(problem)))
            elif line.startswith(":") and line != ":text":
                say(f"    {line} is none of :text, :answer, :prompt, :quit")
            else:
                text = "\n".join(iter(_next_dotted(console), None)) if line == ":text" else line
                say(_scored(pool, problem, text))
                answered += 1
        else:
            break  # the input has ended
    return answered


def _problems(task: Task, split: str, start: int) -> Iterator[Problem]:
    size = len(task.heldout) if split == "heldout" else task.train_size
    if start < 0 or (size is not None and start >= size):
        most = "" if size is None else f" to {size - 1}"
        raise ValueError(f"--start is {start}: expected the number of a problem, 0{most}")
    if split == "heldout":
        yield from task.heldout[start:]
        return
    number = start
    while size is None or number < size:
        yield task.train(number)
        number += 1


def _lines(console: Console) -> Iterator[str]:
    while True:
        line = _read(console, "> ")
        if line is None:
            return
        yield line.strip() if line.strip().startswith(":") or not line.strip() else line


def _next_dotted(console: Console) -> Callable[[], str | None]:
    def following() -> str | None:
        line = _read(console, ". ")
        return None if line is None or line == "." else line

    return following


def _read(console: Console, prompt: str) -> str | None:
    """A line that is typed, without its end; None where the input has ended."""
    if sys.stdin.isatty():
        console.print(prompt, end="")
    line = sys.stdin.readline()
    return line.rstrip("\r\n") if line else None


def _scored(pool: Pool, problem: Problem, text: str) -> str:
    (outcomes,) = pool.score([(problem, Completion(text, tokens=NoTokens(), stop=StopReason.EOS))])
    outcome = outcomes["rule"]
    if outcome.reward is None:
        return f"    the rule failed by {outcome.failure}: {outcome.detail}"
    reward = outcome.reward
    parts = "  ".join(f"{name} {'does not apply' if value is None else f'{value:g}'}" for name, value in reward.parts.items())
    return f"    reward {reward.total:g}  ({parts})"
