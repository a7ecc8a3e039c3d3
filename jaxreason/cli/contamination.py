"""`jaxreason contamination`: which evaluation problems share words in a row with training problems."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from jaxreason.cli.grade import text_of
from jaxreason.cli.main import DONE
from jaxreason.cli.named import make_task, settings
from jaxreason.cli.progress import visible
from jaxreason.data.contamination import Report, contamination
from jaxreason.tasks.rows import ENDINGS, BadRow, read_file
from jaxreason.types import Problem

COLUMNS = ("question", "problem", "prompt", "text", "query", "input")  # the first that a file's first row has
IDS = ("problem_id", "id", "task_id", "unique_id")
SHOWN = 20  # rows of the table


def run(given: argparse.Namespace) -> int:
    if not 0 <= given.threshold <= 1:
        raise ValueError(f"--threshold is {given.threshold}: expected a share from 0 to 1")
    for name, value in (("n", given.n), ("draws", given.draws)):
        if value < 1:
            raise ValueError(f"--{name} is {value}: expected 1 or more")
    sides = {"train": given.train, "evaluation": given.evaluation}
    texts = {name: _texts(name, source, given) for name, source in sides.items()}
    evaluation: dict[str, str] = {}
    for name, text in texts["evaluation"]:
        evaluation[name if name not in evaluation else f"{name} (again, number {len(evaluation)})"] = text
    report = contamination(texts["train"], evaluation, n=given.n)
    for name, number in (("train", report.training), ("evaluation", report.evaluation)):
        if not number:
            raise ValueError(f"--{name} is '{sides[name]}', which has no problem: give another")
    above = [each for each in report.overlaps if each.share > given.threshold]
    console = Console(soft_wrap=True)
    if above:
        console.print(_table(report._replace(overlaps=above[:SHOWN])))
    if len(above) > SHOWN:
        console.print(f"... and {len(above) - SHOWN} more", highlight=False)
    share = f" (more than {100 * given.threshold:g}% of all there are)" if given.threshold else ""
    said = f"{len(above)} of {report.evaluation} evaluation problems share {given.n} words in a row{share}"
    console.print(f"{said} with some of {report.training} training problems", highlight=False)
    if given.out is not None:
        rows = [{**each._asdict(), "trained": list(each.trained)} for each in above]
        told = {"n": given.n, "threshold": given.threshold, **sides, "training_problems": report.training}
        content = {**told, "evaluation_problems": report.evaluation, "overlapping": len(above), "overlaps": rows}
        try:
            given.out.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8", errors="replace")
        except OSError as error:
            raise ValueError(f"--out is '{given.out}', which cannot be written ({error.strerror}): give another file") from None
        console.print(f"All of them: {given.out}", markup=False, highlight=False)
    return DONE


def _table(report: Report) -> Table:
    table = Table()
    for heading in ("evaluation problem", "share", "training problems", f"the first {report.n} words"):
        table.add_column(heading, overflow="fold")
    for each in report.overlaps:
        cells = (each.id, f"{100 * each.share:.0f}%", "\n".join(each.trained), each.text)
        table.add_row(*(Text(visible(cell)) for cell in cells))
    return table


def _texts(side: str, source: str, given: argparse.Namespace) -> Iterator[tuple[str, str]]:
    """(id, text) of each problem of a file, or else of a task: all that it trains on, or holds out."""
    words = settings(given.settings, side)
    if Path(source).is_file():
        if words:
            raise ValueError(f"--{side}.{next(iter(words))} sets a task, and --{side} is the file '{source}': drop it")
        return _file(Path(source), given.column)
    if source.endswith(ENDINGS):
        raise ValueError(f"--{side} is '{source}', and there is no such file: give one, or a task's name")
    task = make_task(source, words, option=f"--{side}")

    def text(problem: Problem) -> tuple[str, str]:
        return problem.id, problem.question

    for sentence in task.skipped.told(task.name):
        Console(soft_wrap=True, highlight=False).print(visible(sentence), markup=False)
    if side == "evaluation":
        return map(text, task.heldout)
    size = given.draws if task.train_size is None else task.train_size
    return (text(task.train(number)) for number in range(size))


def _file(file: Path, columns: Sequence[str]) -> Iterator[tuple[str, str]]:
    lines = iter(read_file(file))
    first = next(lines, None)
    if first is None:
        raise ValueError(f"'{file}' is empty: give a file with a problem a line")
    there = {} if isinstance(first.values, BadRow) else first.values
    chosen = list(columns) or [name for name in COLUMNS if name in there][:1]
    if there and not chosen:
        known, has = ", ".join(COLUMNS), ", ".join(map(repr, there))
        raise ValueError(f"{first.where} has none of the columns {known}: name one with --column; it has {has}")

    def rows() -> Iterator[tuple[str, str]]:
        for where, values in chain([first], lines):
            try:
                if isinstance(values, BadRow):
                    raise values
                text = "\n".join(text_of(values, column) for column in chosen)
            except ValueError as error:
                raise ValueError(f"{where}: {error}") from None
            name = next((str(values[column]) for column in IDS if isinstance(values.get(column), str | int)), "")
            yield name or f"line {where.rpartition(':')[2]}", text

    return rows()
