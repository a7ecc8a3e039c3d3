"""GSM8K: grade-school word problems by people (Cobbe et al., arXiv:2110.14168), from the hub or from local files."""

from __future__ import annotations

import importlib.resources
from pathlib import Path
from typing import Any

from jaxreason.tasks.task import Task
from jaxreason.types import Problem

SPLITS = ("train", "test")


def gsm8k(
    *, data_dir: str = "", hub_name: str = "openai/gsm8k", heldout_size: int = 256, prompt: str = "boxed"
) -> Task:
    """Train problems from the `train` split, held-out ones the first `heldout_size` of `test`.

    `data_dir` names a folder with `train.jsonl.gz` and `test.jsonl.gz` (or plain `.jsonl`) with the columns `question` and
    `answer`; without it the hub's data set is read. `prompt` names a template under `tasks/prompts`.
    """
    train, test = (_load(split, data_dir=data_dir, hub_name=hub_name) for split in SPLITS)
    template = _template(prompt)
    heldout = [
        _problem(row, number, split="test")
        for number, row in enumerate(test.select(range(min(heldout_size, len(test)))))
    ]
    return Task(
        name="gsm8k",
        train=lambda number: _problem(train[number], number, split="train"),
        train_size=len(train),
        heldout=heldout,
        messages=lambda problem: [{"role": "user", "content": template.replace("{question}", problem.question)}],
    )


def _template(name: str) -> str:
    folder = importlib.resources.files("jaxreason.tasks") / "prompts"
    file = folder / f"{name}.txt"
    if not file.is_file():
        there = sorted(entry.name.removesuffix(".txt") for entry in folder.iterdir() if entry.name.endswith(".txt"))
        raise ValueError(f"there is no prompt template named '{name}': choose one of {', '.join(there)}")
    return file.read_text(encoding="utf-8").strip()


def _load(split: str, *, data_dir: str, hub_name: str) -> Any:
    import datasets

    if not data_dir:
        try:
            return datasets.load_dataset(hub_name, "main", split=split)
        except Exception as error:  # the hub client raises many types; to the user they are one situation
            raise ValueError(
                f"the data set '{hub_name}' could not be read from the hub ({type(error).__name__}: {str(error).splitlines()[0]}): "
                "check the network, or give a local folder with --config.task.kwargs.data_dir=..."
            ) from error
    files = [Path(data_dir) / f"{split}.jsonl{ending}" for ending in (".gz", "")]
    file = next((file for file in files if file.is_file()), None)
    if file is None:
        raise ValueError(
            f"task.kwargs.data_dir is '{data_dir}', where neither {files[0].name} nor {files[1].name} lies: give the folder that holds them"
        )
    rows = datasets.load_dataset("json", data_files=str(file), split="train")
    missing = {"question", "answer"} - set(rows.column_names)
    if missing:
        raise ValueError(f"{file} has the columns {', '.join(rows.column_names)}: expected 'question' and 'answer'")
    return rows


def _problem(row: dict[str, str], number: int, *, split: str) -> Problem:
    solution, mark, answer = row["answer"].rpartition("####")
    if not mark:
        raise ValueError(f"row {number} of gsm8k's {split} split has no '####' before its answer: is this file GSM8K?")
    return Problem(
        id=f"{split}/{number}",
        question=row["question"],
        answer=answer.strip().replace(",", ""),
        task="gsm8k",
        metadata={"solution": solution.strip()},
    )
