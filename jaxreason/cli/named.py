"""Tasks and rules that a command line names, with their settings as `--task.KEY=VALUE`. Without jax: it takes seconds to import."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from rich.console import Console
from rich.markup import escape

from jaxreason import naming
from jaxreason.rewards import pool
from jaxreason.rewards.mixture import ByTask
from jaxreason.tasks.task import Task
from jaxreason.types import RewardFn

Words = Mapping[str, str]  # setting -> value as it was written


class NoTokens(Sequence[int]):
    """The tokens of a text that came without: a rule that asks for them fails, for 0 tokens would be another answer."""

    def __len__(self) -> int:
        raise ValueError("the rule reads tokens, and this completion is a text alone: grade a file with a column 'tokens'")

    def __getitem__(self, index: Any) -> Any:
        return len(self)


def settings(words: Sequence[str], name: str) -> dict[str, str]:
    """The settings in `--name.KEY=VALUE` words; those of other names are left out."""
    mine = [word.removeprefix(f"--{name}.").partition("=") for word in words if word.startswith(f"--{name}.")]
    return {key: value for key, _, value in mine}


def make_task(name: str, words: Words, *, option: str = "--task") -> Task:
    """The task of that name; a ValueError says what exists, and what it takes."""
    from jaxreason import tasks

    function = naming.find(name, naming.wholly_named(tasks, "Task"), key=option)
    return naming.call(function, kwargs=naming.typed(function, words), key=option)


def make_rule(name: str, words: Words, *, option: str = "--rule") -> RewardFn:
    """The host rule 'module.function' with its settings."""
    from jaxreason.rewards.finding import found_rules, host_rules

    if name.startswith("traced."):
        raise ValueError(f"{option} is '{name}', which reads tokens inside the train step: name a rule that reads text")
    if name in found_rules("list[Reward]", "Sequence[Reward]"):
        raise ValueError(f"{option} is '{name}', which compares the completions of a group: name a rule of one completion")
    function = naming.find(name, host_rules(), key=option)
    return partial(function, **naming.arguments(function, naming.typed(function, words), key=option))


def rule_of(task: Task, name: str, words: Words) -> RewardFn:
    """The rule that was named, or else the one that scores the task's answers; of a mixture of tasks each one's own."""
    if name:
        return make_rule(name, words)
    for label, rule in (task.rules or {task.name: task.rule}).items():
        if not rule:
            raise ValueError(f"task '{label}' names no rule that scores its answers: give one, such as --rule math.gsm8k_answer")
    if task.rules and words:
        raise ValueError("--rule.KEY sets what a rule takes, and a mixture's tasks have rules of their own: name one with --rule")
    if task.rules:
        return ByTask({part: make_rule(rule, {}) for part, rule in task.rules.items()})
    return make_rule(task.rule, words)


def listed(name: str, line: str, settings: Sequence[str]) -> None:
    """Prints what can be named: what it is, and what can be set of it."""
    console = Console(soft_wrap=True, highlight=False)
    console.print(f"[bold]{escape(name)}[/bold]\n    {escape(line)}")
    if settings:
        console.print(f"    settings: {', '.join(settings)}", markup=False)


def limits(given: argparse.Namespace) -> dict[str, Any]:
    """What the command line says of the processes that rules run in, as a pool takes it."""
    found = {"workers": given.workers, "limit_seconds": given.limit_seconds, "memory_mb": given.memory_mb}
    try:
        pool.check(**found)
    except ValueError as error:
        setting, rest = str(error).split(" ", 1)
        raise ValueError(f"--{setting.replace('_', '-')} {rest}") from None
    return found
