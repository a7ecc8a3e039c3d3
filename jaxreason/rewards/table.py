"""The table of host rules in docs/host_rules.md, written from the code: the functions that a config can name."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import typing

from jaxreason import naming, rewards

HEADING = "## The rules\n"
_NOUNS = {"Reward": "completion", "list[Reward]": "group", "Sequence[Reward]": "group"}


def host_rules() -> str:
    """A row for each rule on text: its name, what it looks at, its settings with their defaults, its docstring's first line."""
    rows = ["| rule | of a | settings | reward |", "| --- | --- | --- | --- |"]
    for info in sorted(pkgutil.iter_modules(rewards.__path__), key=lambda info: info.name):
        if info.name == "traced":  # rules on tokens, which import jax
            continue
        module = importlib.import_module(f"{rewards.__name__}.{info.name}")
        for noun, what in _NOUNS.items():
            for name, function in naming.returning(module, noun).items():
                if function.__module__ == module.__name__ and _takes_a_problem(function):
                    line = (inspect.getdoc(function) or "").split("\n")[0].replace("|", "\\|")
                    rows.append(f"| `{info.name}.{name}` | {what} | {_settings(function)} | {line} |")
    return "\n".join(rows) + "\n"


def rewritten(page: str) -> str:
    """The page with the table as it is now below the heading; a ValueError where there is no such heading."""
    before, heading, _ = page.partition(HEADING)
    if not heading:
        raise ValueError(f"the page has no line {HEADING.strip()!r}, below which the table stands")
    return f"{before}{HEADING}\n{host_rules()}"


def _takes_a_problem(function: typing.Callable[..., typing.Any]) -> bool:
    return next(iter(inspect.signature(function).parameters), "") == "problem"


def _settings(function: typing.Callable[..., typing.Any]) -> str:
    found = [p for p in inspect.signature(function).parameters.values() if p.kind is p.KEYWORD_ONLY]
    shown = [p.name if p.default is p.empty else f"{p.name}={p.default!r}" for p in found]
    return ", ".join(f"`{each}`" for each in shown)
