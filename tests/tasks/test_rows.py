"""Reading rows: every form gives the same ones, and whatever is wrong with a file or a row is said with its place."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from jaxreason import tasks
from jaxreason.tasks.rows import read_file, read_hub, read_split

ROWS = [{"question": f"{n} + {n} é?", "answer": str(2 * n), "tags": ["a", None], "of": {"x": n / 2}} for n in range(2500)]


def jsonl(rows: list[dict]) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def write(folder: Path, split: str, rows: list[dict], *, ending: str) -> Path:
    folder.mkdir(exist_ok=True)
    file = folder / f"{split}{ending}"
    if ending == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file, row_group_size=700)
    else:
        file.write_bytes(gzip.compress(jsonl(rows)) if ending.endswith(".gz") else jsonl(rows))
    return file


@pytest.mark.parametrize("ending", [".jsonl", ".jsonl.gz", ".parquet"])
def test_every_form_gives_the_same_rows(ending, tmp_path):
    file = write(tmp_path, "train", ROWS, ending=ending)
    read = list(read_file(file))
    assert [row.values for row in read] == ROWS
    assert [row.where for row in read] == [f"{file}:{line}" for line in range(1, len(ROWS) + 1)]
    assert [row.values for row in read_split(str(tmp_path), "train")] == ROWS


def test_a_split_in_pieces_is_read_in_order(tmp_path):
    for piece in range(3):
        write(tmp_path, f"train-0000{piece}-of-00003", ROWS[piece * 800 : (piece + 1) * 800], ending=".parquet")
    assert [row.values for row in read_split(str(tmp_path), "train")] == ROWS[:2400]


def test_the_hub_client_gives_the_same_rows(tmp_path, monkeypatch):
    """Through `datasets` itself, from a folder laid out as the hub's are: with a named configuration."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    hub = tmp_path / "hub"
    write(hub, "train", ROWS, ending=".parquet")
    write(hub, "other", ROWS[:3], ending=".parquet")
    declared = {"main": "train.parquet", "small": "other.parquet"}
    configs = "".join(f"- config_name: {name}\n  data_files: {file}\n" for name, file in declared.items())
    (hub / "README.md").write_text(f"---\nconfigs:\n{configs}---\n")
    read = list(read_hub(str(hub), "train", config="main"))
    assert [row.values for row in read] == ROWS
    assert read[1999].where == f"{hub}/train:2000"
    assert [row.values for row in read_hub(str(hub), "train", config="small")] == ROWS[:3]
    task = tasks.table(train="train", hub_name=str(hub), hub_config="main", heldout_size=100)
    assert (task.train_size, len(task.heldout)) == (2400, 100)
    with pytest.raises(ValueError, match=r"split 'tset' of the data set .* could not be read from the hub .*tset.*data_dir"):
        list(read_hub(str(hub), "tset", config="main"))


def test_a_byte_order_mark_and_blank_lines_are_no_rows(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + jsonl(ROWS[:1]) + b"\n  \n" + jsonl(ROWS[1:2]).rstrip())
    read = list(read_file(tmp_path / "a.jsonl"))
    assert [row.values for row in read] == ROWS[:2] and read[1].where.endswith("a.jsonl:4")


# ---- what is wrong with a file


def table(file: Path, **settings):
    return tasks.table(train=str(file), **({"heldout_size": 1} | settings))


def test_a_file_cut_in_half_is_an_error_even_where_bad_rows_are_skipped(tmp_path):
    whole = gzip.compress(jsonl(ROWS))
    for cut in (len(whole) // 2, len(whole) - 4):
        (tmp_path / "a.jsonl.gz").write_bytes(whole[:cut])
        with pytest.raises(ValueError, match=r"a\.jsonl\.gz cannot be read after line \d+ .*damaged or cut short"):
            table(tmp_path / "a.jsonl.gz", bad_rows="skip")
    (tmp_path / "a.jsonl.gz").write_bytes(jsonl(ROWS[:3]))
    with pytest.raises(ValueError, match=r"a\.jsonl\.gz cannot be read after line 0 \(Not a gzipped file"):
        table(tmp_path / "a.jsonl.gz")
    file = write(tmp_path, "a", ROWS, ending=".parquet")
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with pytest.raises(ValueError, match=r"a\.parquet cannot be read as parquet after row 0"):
        table(file, bad_rows="skip")


def test_wrong_places_are_named(tmp_path):
    write(tmp_path, "train", ROWS[:5], ending=".jsonl")
    (tmp_path / "notes.csv").write_text("question,answer\n")
    with pytest.raises(ValueError, match=r"data_dir is '.*nowhere', which is no folder"):
        tasks.gsm8k(data_dir=str(tmp_path / "nowhere"))
    with pytest.raises(
        ValueError, match=r"holds no trian\.jsonl\.gz, \.jsonl or \.parquet: it has train\.jsonl; did you mean 'train'"
    ):
        tasks.svamp(data_dir=str(tmp_path), train_split="trian")
    with pytest.raises(ValueError, match=r"there is no file '.*trian\.jsonl': did you mean 'train\.jsonl'"):
        table(tmp_path / "trian.jsonl")
    with pytest.raises(ValueError, match=r"notes\.csv' is of no kind that is read here: give one that ends in \.jsonl\.gz"):
        table(tmp_path / "notes.csv")
    with pytest.raises(ValueError, match=r"'train' is no file.*data_dir or hub_name"):
        table(Path("train"))
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(ValueError, match=r"split '.*empty\.jsonl' of 'table' has no rows: give another file or split"):
        table(tmp_path / "empty.jsonl")
    with pytest.raises(ValueError, match=r"'prosqa' is on no hub: give the folder"):
        tasks.prosqa()
    with pytest.raises(ValueError, match="bad_rows is 'ignore': choose one of fatal, skip"):
        table(tmp_path / "train.jsonl", bad_rows="ignore")
    with pytest.raises(ValueError, match="heldout_size is 5, and 'table' has 5 questions for both sides"):
        table(tmp_path / "train.jsonl", heldout_size=5)
    with pytest.raises(ValueError, match="heldout_size is 0: expected 1 or more, or None"):
        table(tmp_path / "train.jsonl", heldout_size=0)


# ---- what is wrong with a row

GOOD = {"question": "1 + 1?", "answer": "2"}
BAD = {
    b"\xff\xfe{}": ("not UTF-8", "byte 1 of the line is not UTF-8"),
    b'{"question": "caf\xe9", "answer": "2"}': ("not UTF-8", "byte 18 of the line is not UTF-8"),
    b'{"question": "1", ': ("not JSON", "the line is not JSON"),
    b"[" * 100_000: ("not JSON", "the line is not JSON"),
    b'["1 + 1?", "2"]': ("not JSON", "the line is not a JSON object"),
    b'{"question": "1 + 1?", "answr": "2"}': ("missing column", "no column 'answer' among question, answr: did you mean 'answr'"),
    b'{"question": ["1"], "answer": "2"}': ("wrong type", r"column 'question' holds \['1'\]: expected a text"),
    b'{"question": "1 + 1?", "answer": null}': ("wrong type", "column 'answer' holds None: expected a text"),
    b'{"question": "1 + 1?", "answer": true}': ("wrong type", "column 'answer' holds True: expected a text"),
    b'{"question": " \\n", "answer": "2"}': ("empty", "column 'question' is empty"),
    b'{"question": "1 + 1?", "answer": ""}': ("empty", "column 'answer' is empty"),
    b'{"question": "\\ud800?", "answer": "2"}': ("not text", "column 'question' holds half of a character"),
    b'{"question": "1 + 1?", "answer": "\\\\frac{1}{2"}': ("unparsable answer", "gives the answer .*, which is no mathematical"),
    b'{"question": "1 + 1?", "answer": "1}{"}': ("unparsable answer", "gives the answer '1}{'"),
    b'{"question": "1 + 1?", "answer": "$ $"}': ("unparsable answer", "which is no mathematical value"),
    b'{"question": "1 + 1?", "answer": NaN}': ("unparsable answer", "which is no number"),
}


@pytest.mark.parametrize("line", BAD, ids=range(len(BAD)))
def test_a_bad_row_is_fatal_with_its_line_or_skipped_and_counted(line, tmp_path):
    reason, sentence = BAD[line]
    file = tmp_path / "a.jsonl"
    others = [GOOD | {"question": f"{n}?"} for n in range(4)]
    file.write_bytes(jsonl(others[:2]) + line + b"\n" + jsonl(others[2:]))
    with pytest.raises(ValueError, match=rf"a\.jsonl:3: .*{sentence}.*; mend the row, or set bad_rows to 'skip'"):
        table(file)
    task = table(file, bad_rows="skip")
    assert dict(task.skipped.counts) == {reason: 1}
    assert len(task.skipped.first) == 1 and task.skipped.first[0].startswith(f"{file}:3: ")
    kept = sorted([task.train(n).id for n in range(3)] + [each.id for each in task.heldout])
    assert kept == [f"{file}/{n}" for n in (0, 1, 3, 4)]  # a problem's number is its row's, whatever is skipped


def test_nothing_is_lost_silently(tmp_path):
    """Counts of what was kept and of what was left out add up; only the first few are told in full."""
    lines = list(BAD) * 3
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(lines) + b"\n" + jsonl([GOOD, GOOD | {"question": "other"}]))
    task = table(tmp_path / "a.jsonl", bad_rows="skip")
    assert (task.train_size, len(task.heldout)) == (1, 1)
    assert sum(task.skipped.counts.values()) == len(lines) and task.skipped.counts["missing column"] == 3
    assert [each.split(": ")[0] for each in task.skipped.first] == [f"{tmp_path / 'a.jsonl'}:{line}" for line in range(1, 6)]
    (tmp_path / "b.jsonl").write_bytes(b"\n".join(lines))
    with pytest.raises(ValueError, match=rf"has no good row among {len(lines)}, the first being .*b\.jsonl:1: byte 1"):
        table(tmp_path / "b.jsonl", bad_rows="skip")


def test_parquet_without_the_column(tmp_path):
    file = write(tmp_path, "a", [{"Question": "1 + 1?", "answer": "2"}], ending=".parquet")
    with pytest.raises(ValueError, match=r"a\.parquet:1: there is no column 'question' among Question, answer: did you mean"):
        table(file)
