"""Rows of data sets: read from JSON lines, parquet or the hub, and turned into something else one by one.

Every row knows where it stands, as `file:line` (a parquet file's and the hub's rows are counted from 1 too). A row that cannot
be used is a `BadRow`: it ends the reading, or is left out and counted, as the caller says, and is never lost without a word. A
file that is damaged as a whole is an error in either case.
"""

from __future__ import annotations

import gzip
import json
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, cast

from jaxreason.naming import nearest
from jaxreason.tasks.task import Skipped

ENDINGS = (".jsonl.gz", ".jsonl", ".parquet")
POLICIES = ("fatal", "skip")
SHOWN = 5  # bad rows that are told in full

T = TypeVar("T")
Values = Mapping[str, Any]


class BadRow(ValueError):
    """Why a row cannot be used: `reason`, a few words to count by, and the sentence that says it."""

    def __init__(self, reason: str, sentence: str) -> None:
        super().__init__(sentence)
        self.reason = reason


class Row(NamedTuple):
    """A row, or why it cannot be read, and where it stands."""

    where: str
    values: Values | BadRow


class Left(NamedTuple):
    """A row that was left out."""

    where: str
    bad: BadRow


def read_split(folder: str, split: str) -> Iterator[Row]:
    """The rows of a split's file in a folder: `split.jsonl.gz`, `split.jsonl`, `split.parquet`, or parquet pieces as the hub's."""
    if not Path(folder).is_dir():
        raise ValueError(
            f"data_dir is '{folder}', which is no folder: give the folder that holds {split}.jsonl.gz, .jsonl or .parquet"
        )
    files = [file for ending in ENDINGS if (file := Path(folder) / (split + ending)).is_file()][:1]
    files = files or sorted(Path(folder).glob(f"{split}-*-of-*.parquet"))
    if not files:
        there = sorted(file.name for file in Path(folder).iterdir() if file.name.endswith(ENDINGS))
        names = [name.partition(".")[0] for name in there]
        hint = f"it has {', '.join(there)}; {nearest(split, names)}" if there else "it has no such file of any split"
        raise ValueError(f"data_dir is '{folder}', which holds no {split}.jsonl.gz, .jsonl or .parquet: {hint}")
    for file in files:
        yield from read_file(file)


def read_file(file: Path) -> Iterator[Row]:
    """The rows of one file, by its name's ending."""
    if not file.name.endswith(ENDINGS):
        raise ValueError(f"'{file}' is of no kind that is read here: give one that ends in {', '.join(ENDINGS)}")
    if not file.is_file():
        near = [entry.name for entry in file.parent.iterdir()] if file.parent.is_dir() else []
        raise ValueError(f"there is no file '{file}': " + (nearest(file.name, near) if near else "its folder is not there"))
    return _parquet(file) if file.suffix == ".parquet" else _lines(file)


def read_hub(name: str, split: str, *, config: str = "", revision: str = "") -> Iterator[Row]:
    """The rows of a split of a data set on the Hugging Face hub, or in a folder laid out like one."""
    import datasets

    try:
        table = datasets.load_dataset(name, config or None, split=split, revision=revision or None)
    except Exception as error:  # the hub client raises many types; to the user they are one situation
        why = next(iter(str(error).splitlines()), "")
        raise ValueError(
            f"split '{split}' of the data set '{name}' could not be read from the hub ({type(error).__name__}: {why}): check "
            "the network, hub_name and the split, or give a local folder as data_dir"
        ) from error
    number = 0
    # by the thousand: a data set read row by row takes a second for every ten thousand
    for piece in cast(Iterator[Any], table.with_format("arrow").iter(batch_size=1000)):
        for values in piece.to_pylist():
            number += 1
            yield Row(f"{name}/{split}:{number}", values)


def gather(
    rows: Iterable[Row], convert: Callable[[Values, int, str], T], *, bad_rows: str, source: str
) -> tuple[list[T], list[Left]]:
    """convert(values, number, where) of every good row, numbers from 0 and counting bad ones too; and the rows left out.

    `bad_rows` is 'fatal' (a ValueError names the first bad row) or 'skip'. Without a single good row there is no data set:
    that is a ValueError too.
    """
    if bad_rows not in POLICIES:
        raise ValueError(f"bad_rows is '{bad_rows}': {nearest(bad_rows, POLICIES)}")
    good: list[T] = []
    left: list[Left] = []
    for number, (where, values) in enumerate(rows):
        try:
            if isinstance(values, BadRow):
                raise values
            good.append(convert(values, number, where))
        except BadRow as bad:
            if bad_rows == "fatal":
                raise ValueError(f"{where}: {bad}; mend the row, or set bad_rows to 'skip', which leaves out and counts") from None
            left.append(Left(where, bad))
    if not good:
        why = f"has no good row among {len(left)}, the first being {left[0].where}: {left[0].bad}" if left else "has no rows"
        raise ValueError(f"{source} {why}: give another file or split")
    return good, left


def skipped(left: Sequence[Left]) -> Skipped:
    """What a task tells of the rows that were left out."""
    return Skipped(Counter(each.bad.reason for each in left), tuple(f"{each.where}: {each.bad}" for each in left[:SHOWN]))


def _lines(file: Path) -> Iterator[Row]:
    number = 0
    try:
        with gzip.open(file, "rb") if file.suffix == ".gz" else file.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    yield Row(f"{file}:{number}", _object(line, first=number == 1))
    except (EOFError, OSError, zlib.error) as error:
        raise ValueError(f"{file} cannot be read after line {number} ({error}): it is damaged or cut short, copy it anew") from None


def _object(line: bytes, *, first: bool) -> Values | BadRow:
    try:
        values = json.loads(line.decode("utf-8-sig" if first else "utf-8"))
    except UnicodeDecodeError as error:
        return BadRow("not UTF-8", f"byte {error.start + 1} of the line is not UTF-8")
    except (ValueError, RecursionError):
        return BadRow("not JSON", "the line is not JSON")
    return values if isinstance(values, dict) else BadRow("not JSON", "the line is not a JSON object")


def _parquet(file: Path) -> Iterator[Row]:
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        for batch in pyarrow.parquet.ParquetFile(file).iter_batches():
            for values in batch.to_pylist():
                number += 1
                yield Row(f"{file}:{number}", values)
    except (pyarrow.ArrowException, OSError) as error:
        why = next(iter(str(error).splitlines()), "")
        raise ValueError(f"{file} cannot be read as parquet after row {number} ({why}): copy it anew") from None
