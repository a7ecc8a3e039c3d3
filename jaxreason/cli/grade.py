"""`jaxreason grade`: scores a file of completions by a rule, and says which rows it could not read or score."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from itertools import islice
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from jaxreason.cli.main import DONE
from jaxreason.cli.named import NoTokens, limits, make_rule, settings
from jaxreason.cli.progress import visible
from jaxreason.rewards.pool import Pool
from jaxreason.tasks.rows import BadRow, Row, Values, read_file
from jaxreason.types import Completion, Problem, Reward, StopReason

SHOWN = 10  # bad rows that are printed; the file of results has all
NAME = "problem_id"
FAILED = "the rule failed on it by "
RAISED = f"{FAILED}error: "
CHUNK = 256  # rows that are scored before their results are written


def run(given: argparse.Namespace) -> int:
    rule = make_rule(given.rule, settings(given.settings, "rule"))
    if not given.file.is_file():
        raise ValueError(f"there is no file '{given.file}': give a .jsonl, .jsonl.gz or .parquet file")
    out = given.out or given.file.with_name(given.file.name.removesuffix(".gz").removesuffix(".jsonl") + ".graded.jsonl")
    if out.resolve() == given.file.resolve():
        raise ValueError(f"--out is '{out}', which is the file of completions: give another")
    columns = {"question": given.question, "answer": given.answer, "completion": given.completion}
    rewards: list[Reward] = []
    bad: list[str] = []
    raised: set[str] = set()
    lines = iter(read_file(given.file))
    chunk = list(islice(lines, CHUNK))  # before the results' file is made
    if not chunk:
        raise ValueError(f"'{given.file}' is empty: give a file with a completion a line")
    began = time.perf_counter()
    try:
        with Pool({given.rule: rule}, **limits(given)) as pool, out.open("w", encoding="utf-8", errors="replace") as file:
            while chunk:
                for line, (row, reward) in zip(chunk, _grade(chunk, pool, columns), strict=True):
                    if reward is None:
                        bad.append(f"{line.where}: {row['wrong']}")
                        if row["wrong"].startswith(RAISED):
                            raised.add(row["wrong"].removeprefix(RAISED))
                    else:
                        rewards.append(reward)
                    file.write(json.dumps(row, ensure_ascii=False) + "\n")
                chunk = list(islice(lines, CHUNK))
    except OSError as error:
        raise ValueError(f"--out is '{out}', which cannot be written ({error.strerror}): give another file") from None
    seconds = time.perf_counter() - began
    console = Console(soft_wrap=True, highlight=False)
    if not rewards and len(raised) == 1:  # the rule's settings are wrong, not the rows
        raise ValueError(f"{given.rule} fails on every row: {raised.pop()}")
    for sentence in bad[:SHOWN]:
        console.print(visible(sentence), markup=False)
    if len(bad) > SHOWN:
        console.print(f"... and {len(bad) - SHOWN} more bad rows")
    if not rewards:
        raise ValueError(f"'{given.file}' has no row that could be scored ({len(bad)} bad): see --question, --answer, --completion")
    console.print(_table(rewards))
    for name in dict.fromkeys(name for reward in rewards for name in reward.parts):
        if all(reward.parts.get(name) is None for reward in rewards):
            console.print(
                f"'{name}' applies to no row: the rule cannot read their answers, or lacks what it reads of their metadata"
            )
    console.print(f"{len(rewards)} completions scored by {given.rule} in {seconds:.1f} s, {len(bad)} bad rows", markup=False)
    console.print(f"Results: {out}", markup=False)
    return DONE


def _grade(lines: Sequence[Row], pool: Pool, columns: dict[str, str]) -> list[tuple[dict[str, Any], Reward | None]]:
    """Of each line that of the results' file, and the reward; None where the row is bad or the rule failed on it."""
    told: list[dict[str, Any]] = []
    asked: dict[int, tuple[Problem, Completion]] = {}
    for place, line in enumerate(lines):
        row: dict[str, Any] = {"line": int(line.where.rpartition(":")[2])}
        told.append(row)
        try:
            if isinstance(line.values, BadRow):
                raise line.values
            row |= {name: line.values[name] for name in (NAME,) if name in line.values}
            asked[place] = _read(line.values, columns, name=str(row.get(NAME, f"line {row['line']}")))
        except ValueError as error:
            row["wrong"] = str(error)
    rewards: list[Reward | None] = [None] * len(lines)
    for place, outcomes in zip(asked, pool.score(list(asked.values())), strict=True):
        (outcome,) = outcomes.values()
        rewards[place] = outcome.reward
        if outcome.reward is None:
            told[place]["wrong"] = f"{FAILED}{outcome.failure}: {outcome.detail}"
        else:
            told[place]["reward"] = {"total": outcome.reward.total, **outcome.reward.parts}
    return list(zip(told, rewards, strict=True))


def _read(row: Values, columns: dict[str, str], *, name: str) -> tuple[Problem, Completion]:
    """What a row holds; stop, tokens, task and metadata where the columns are there, as in the files of a run."""
    answer, text = text_of(row, columns["answer"]), text_of(row, columns["completion"])
    question = text_of(row, columns["question"]) if columns["question"] in row else ""
    stop, tokens, metadata = row.get("stop", StopReason.EOS.value), row.get("tokens", NoTokens()), row.get("metadata", {})
    if stop not in [reason.value for reason in StopReason]:
        raise ValueError(f"stop is {stop!r}: expected one of {', '.join(reason.value for reason in StopReason)}")
    if "tokens" in row and not (isinstance(tokens, list) and all(isinstance(token, int) for token in tokens)):
        raise ValueError("tokens are no list of whole numbers: correct or drop the column")
    if not isinstance(metadata, dict):
        raise ValueError("metadata is no object: correct or drop the column")
    return Problem(name, question, answer, str(row.get("task", "")), metadata), Completion(text, tokens, StopReason(stop))


def text_of(row: Values, column: str) -> str:
    """A column's text, or number as it is written; a ValueError where it is missing or holds something else."""
    if column not in row:
        raise ValueError(f"no column '{column}': it has {', '.join(map(repr, row)) or 'none'}")
    value = row[column]
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise ValueError(f"column '{column}' holds {value!r:.60}: expected a text")
    return str(value)


def _table(rewards: Sequence[Reward]) -> Table:
    """The total and every part: over how many rows, mean, least, most."""
    table = Table()
    for heading in ("part", "rows", "mean", "least", "most"):
        table.add_column(heading, justify="left" if heading == "part" else "right")
    names = dict.fromkeys(name for reward in rewards for name in reward.parts)
    for name in ("total", *names):
        found = [reward.total if name == "total" else reward.parts.get(name) for reward in rewards]
        values = [value for value in found if value is not None]
        numbers = (sum(values) / len(values), min(values), max(values)) if values else ("-", "-", "-")
        table.add_row(Text(name), str(len(values)), *(each if isinstance(each, str) else f"{each:.4g}" for each in numbers))
    return table
