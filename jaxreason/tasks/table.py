"""Any file or hub data set as a task, by naming its columns."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from jaxreason.tasks import code, columns
from jaxreason.tasks.rows import ENDINGS, Row, Values, read_file, read_hub, read_split
from jaxreason.tasks.source import DataSet, Question, load
from jaxreason.tasks.task import Task

KINDS = {  # what is asked -> rule and prompt
    "math": ("math.math_answer", "boxed"),
    "choice": ("choice.choice_answer", "choice"),
    "code": ("code.code_tests", "program"),
}


def table(
    *,
    train: str,
    heldout: str = "",
    data_dir: str = "",
    hub_name: str = "",
    hub_config: str = "",
    question_column: str = "question",
    answer_column: str = "answer",
    choices_column: str = "",
    inputs_column: str = "",
    outputs_column: str = "",
    solution_column: str = "",
    category_column: str = "",
    rule: str = "",
    prompt: str = "",
    name: str = "table",
    heldout_size: int | None = 256,
    bad_rows: str = "fatal",
) -> Task:
    """Problems from the columns of a table.

    `train` and `heldout` are files (.jsonl.gz, .jsonl, .parquet), or splits where `data_dir` or `hub_name` is given. Without
    `heldout`, or where it is `train` again, `heldout_size` questions are held out by their hash; with `train` '' there is
    nothing to train on. An answer is a text or a number; with choices (a list of texts, or {"label", "text"}) it is the letter
    or the text of the right one, or a whole number, its place from 0. With `inputs_column` and `outputs_column`, two lists of
    texts, the problem is to write a program that reads and writes, and has no other answer.

    `rule` and `prompt` default to those of the kind: 'math.math_answer' and 'boxed', 'choice.choice_answer' and 'choice',
    'code.code_tests' and 'program'. `solution_column` gives demonstrations, `category_column` what an evaluation is broken down by.
    """
    if data_dir and hub_name:
        raise ValueError("data_dir and hub_name are both given: remove one")
    if not train and not heldout:
        raise ValueError("train and heldout are both '': give a file, or a split beside data_dir or hub_name")
    if bool(inputs_column) != bool(outputs_column):
        raise ValueError("inputs_column and outputs_column belong together: name both or neither")
    kind = KINDS["code" if inputs_column else "choice" if choices_column else "math"]

    def question(row: Values) -> Question:
        metadata: dict[str, Any] = {}
        if inputs_column:
            metadata, right = code.cases(row, inputs=inputs_column, outputs=outputs_column), ""
        elif choices_column:
            metadata["choices"], right = _choices(row, choices_column, answer_column)
        else:
            right = columns.answer(row, answer_column) if _mathematical(rule) else _stated(row, answer_column)
        if category_column:
            metadata[category_column] = columns.value(row, category_column)
        solution = columns.text(row, solution_column) if solution_column else ""
        if solution:
            metadata["solution"] = solution
        return Question(columns.text(row, question_column), right, metadata, solution)

    data_set = DataSet(
        name=name,
        what="",
        hub=hub_name,
        columns=(question_column, answer_column),
        question=question,
        rule=rule or kind[0],
    )
    return load(
        data_set,
        _reader(data_dir, hub_name, hub_config),
        train_split=train,
        heldout_split=heldout or train,
        heldout_size=heldout_size,
        prompt=prompt or kind[1],
        bad_rows=bad_rows,
    )


def _reader(data_dir: str, hub_name: str, hub_config: str) -> Callable[[str], Iterator[Row]]:
    if data_dir:
        return lambda split: read_split(data_dir, split)
    if hub_name:
        return lambda split: read_hub(hub_name, split, config=hub_config)

    def read(file: str) -> Iterator[Row]:
        if Path(file).suffix == "" and not Path(file).exists():
            raise ValueError(f"'{file}' is no file: give one that ends in {', '.join(ENDINGS)}, or name data_dir or hub_name too")
        return read_file(Path(file))

    return read


def _mathematical(rule: str) -> bool:
    return not rule or rule.startswith("math.")


def _stated(row: Values, column: str) -> str:
    """Any answer that is not empty: a text, a number, true or false."""
    found = columns.value(row, column)
    return str(found) if isinstance(found, bool | int | float) else columns.text(row, column)


def _choices(row: Values, column: str, answer_column: str) -> tuple[list[tuple[str, str]], str]:
    found = columns.value(row, column)
    if isinstance(found, dict):
        return columns.labelled(row, column, answer_column)
    choices = columns.lettered(columns.texts(row, column), column)
    return choices, columns.picked(choices, columns.value(row, answer_column), answer_column)
