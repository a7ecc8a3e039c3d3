"""Which rules on text a config can name, from the code: for `jaxreason rules`, and as the table in docs/host_rules.md."""

from __future__ import annotations

import inspect
import typing
from collections.abc import Iterator

from jaxreason.rewards.finding import GROUP_NOUNS, found_rules, host_rules

HEADING = "## The rules\n"


class Row(typing.NamedTuple):
    """A rule on text: its name, what it looks at, its settings with their defaults, its docstring's first line."""

    name: str
    noun: str
    settings: list[str]
    line: str


def rows() -> Iterator[Row]:
    """Every rule on text."""
    of = {"completion": host_rules(), "group": found_rules(*GROUP_NOUNS)}
    found = [(name, noun, function) for noun, functions in of.items() for name, function in functions.items()]
    for name, noun, function in sorted(found, key=lambda each: (each[0].partition(".")[0], each[1])):
        if name.startswith(f"{function.__module__.rpartition('.')[2]}.") and _takes_a_problem(function):
            yield Row(name, noun, settings(function), first_line(function))


def written() -> str:
    """The rows as a table."""
    lines = ["| rule | of a | settings | reward |", "| --- | --- | --- | --- |"]
    for row in rows():
        shown, said = ", ".join(f"`{each}`" for each in row.settings), row.line.replace("|", "\\|")
        lines.append(f"| `{row.name}` | {row.noun} | {shown} | {said} |")
    return "\n".join(lines) + "\n"


def rewritten(page: str) -> str:
    """The page with the table as it is now below the heading; a ValueError where there is no such heading."""
    before, heading, _ = page.partition(HEADING)
    if not heading:
        raise ValueError(f"the page has no line {HEADING.strip()!r}, below which the table stands")
    return f"{before}{HEADING}\n{written()}"


def _takes_a_problem(function: typing.Callable[..., typing.Any]) -> bool:
    return next(iter(inspect.signature(function).parameters), "") == "problem"


def first_line(function: typing.Callable[..., typing.Any]) -> str:
    return (inspect.getdoc(function) or "").split("\n")[0]


def settings(function: typing.Callable[..., typing.Any]) -> list[str]:
    """What a config may set of a function, as 'name=default', or 'name' where it has to be set."""
    found = [p for p in inspect.signature(function).parameters.values() if p.kind is p.KEYWORD_ONLY]
    return [p.name if p.default is p.empty else f"{p.name}={p.default!r}" for p in found]
