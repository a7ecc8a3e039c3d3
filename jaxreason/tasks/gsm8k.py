"""GSM8K: grade-school word problems by people (Cobbe et al., arXiv:2110.14168), from the hub or from local files."""

from __future__ import annotations

import gzip
import importlib.resources
import json
from pathlib import Path

from jaxreason.naming import nearest
from jaxreason.tasks.task import Task
from jaxreason.types import Problem

COLUMNS = ("question", "answer")
Row = tuple[str, str]  # question, and the solution that ends in '#### answer'


def gsm8k(*, data_dir: str = "", hub_name: str = "openai/gsm8k", heldout_size: int = 256, prompt: str = "boxed") -> Task:
    """Train problems from the `train` split, held-out ones the first `heldout_size` of `test`.

    `data_dir` names a folder with `train.jsonl.gz` and `test.jsonl.gz` (or plain `.jsonl`) with the columns `question` and
    `answer`; without it the hub's data set is read. `prompt` names a template under `tasks/prompts`.
    """
    if heldout_size < 1:
        raise ValueError(f"heldout_size is {heldout_size}: expected 1 or more")
    template = _template(prompt)
    train, test = (_read(data_dir, split) if data_dir else _download(hub_name, split) for split in ("train", "test"))
    return Task(
        name="gsm8k",
        train=lambda number: _problem(train[number], number, split="train"),
        train_size=len(train),
        heldout=[_problem(row, number, split="test") for number, row in enumerate(test[:heldout_size])],
        messages=lambda problem: [{"role": "user", "content": template.replace("{question}", problem.question)}],
    )


def _template(name: str) -> str:
    folder = importlib.resources.files("jaxreason.tasks") / "prompts"
    file = folder / f"{name}.txt"
    if not file.is_file():
        there = sorted(entry.name.removesuffix(".txt") for entry in folder.iterdir() if entry.name.endswith(".txt"))
        raise ValueError(f"prompt is '{name}', which is no template: {nearest(name, there)}")
    return file.read_text(encoding="utf-8").strip()


def _read(data_dir: str, split: str) -> list[Row]:
    files = [Path(data_dir) / f"{split}.jsonl{ending}" for ending in (".gz", "")]
    file = next((file for file in files if file.is_file()), None)
    if file is None:
        names = f"neither {files[0].name} nor {files[1].name}"
        raise ValueError(f"data_dir is '{data_dir}', which holds {names}: give the folder that holds one of them")
    rows = []
    with gzip.open(file, "rt", encoding="utf-8") if file.suffix == ".gz" else file.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                row = json.loads(line)
                rows.append(tuple(str(row[column]) for column in COLUMNS))
            except (ValueError, KeyError, TypeError):
                raise ValueError(
                    f"line {number} of {file} is no JSON object with 'question' and 'answer': give GSM8K's own files as data_dir"
                ) from None
    return rows


def _download(hub_name: str, split: str) -> list[Row]:
    import datasets

    try:
        rows = datasets.load_dataset(hub_name, "main", split=split)
        # column by column: a data set read row by row takes a second for every ten thousand
        return list(zip(*(rows[column] for column in COLUMNS), strict=True))
    except Exception as error:  # the hub client raises many types; to the user they are one situation
        why = next(iter(str(error).splitlines()), "")
        raise ValueError(
            f"the data set '{hub_name}' could not be read from the hub ({type(error).__name__}: {why}): check the network and "
            "hub_name, or give a local folder as data_dir"
        ) from error


def _problem(row: Row, number: int, *, split: str) -> Problem:
    question, answer = row
    solution, mark, answer = answer.rpartition("####")
    if not mark:
        raise ValueError(f"row {number} of gsm8k's {split} split has no '####' before its answer: is this file GSM8K?")
    return Problem(
        id=f"{split}/{number}",
        question=question,
        answer=answer.strip().replace(",", ""),
        task="gsm8k",
        metadata={"solution": solution.strip()},
    )
