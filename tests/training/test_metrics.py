"""What a run writes down: appended, rewound, never half read."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from jaxreason.training.metrics import NonFiniteError, RunLog, check_finite, read_jsonl, write_atomically


@pytest.fixture
def log(tmp_path: Path) -> RunLog:
    """Three supervised steps and, in reinforcement, an evaluation before it and three steps with two rollouts each."""
    log = RunLog(tmp_path / "run")
    for step in (1, 2, 3):
        log.metrics("supervised", step, {"loss/sft": 1 / step})
    log.evaluation("reinforce", 0, {"eval/task/pass@1": 0.25})
    for step in (1, 2, 3):
        log.metrics("reinforce", step, {"reward/total": step / 7})
        log.rollouts("reinforce", step, [{"completion": f"{step} é\u2028\n", "g": g} for g in range(2)])
    return log


def places(file: Path) -> list[tuple[str, int]]:
    return [(line["stage"], line["step"]) for line in read_jsonl(file)]


SUPERVISED = [("supervised", step) for step in (1, 2, 3)]
REINFORCE = [("reinforce", step) for step in (0, 1, 2, 3)]


def test_lines_are_read_as_they_were_written(log: RunLog) -> None:
    assert places(log.folder / "metrics.jsonl") == SUPERVISED + REINFORCE
    rows = read_jsonl(log.folder / "rollouts.jsonl")
    assert rows[2] == {"stage": "reinforce", "step": 2, "completion": "2 é\u2028\n", "g": 0} and len(rows) == 6
    assert read_jsonl(log.folder / "metrics.jsonl")[-1]["reward/total"] == 3 / 7  # every bit of a float


@pytest.mark.parametrize("step", [0, 1, 3, 9])
def test_rewinding_a_stage_cuts_its_later_lines_and_no_other(log: RunLog, step: int) -> None:
    log.rewind("reinforce", step)
    assert places(log.folder / "metrics.jsonl") == SUPERVISED + [place for place in REINFORCE if place[1] <= step]
    assert places(log.folder / "rollouts.jsonl") == [("reinforce", n) for n in (1, 2, 3) if n <= step for _ in range(2)]


def test_an_earlier_stage_that_repeats_its_last_steps_leaves_the_later_one_alone(log: RunLog) -> None:
    before = (log.folder / "metrics.jsonl").read_bytes()
    log.rewind("supervised", 1)
    assert places(log.folder / "metrics.jsonl") == SUPERVISED[:1] + REINFORCE
    for step in (2, 3):
        log.metrics("supervised", step, {"loss/sft": 1 / step})
    log.rewind("reinforce", 3)
    assert (log.folder / "metrics.jsonl").read_bytes() == before  # and the order is the run's again


def test_rewinding_drops_a_half_written_last_line_and_what_follows_starts_a_line(log: RunLog) -> None:
    file = log.folder / "metrics.jsonl"
    whole = file.read_bytes()
    for end in range(1, len(whole.splitlines(keepends=True)[-1])):
        file.write_bytes(whole[:-end])
        log.rewind("reinforce", 2)
        log.metrics("reinforce", 3, {"reward/total": 3 / 7})
        assert file.read_bytes() == whole


def test_rewinding_a_run_that_has_written_nothing_writes_nothing(tmp_path: Path) -> None:
    RunLog(tmp_path / "run").rewind("supervised", 0)
    assert list((tmp_path / "run").iterdir()) == []


def test_an_evaluation_is_there_once_however_often_it_is_repeated(log: RunLog) -> None:
    file = log.folder / "metrics.jsonl"
    log.evaluation("reinforce", 3, {"eval/task/pass@1": 0.5})
    once = file.read_bytes()
    assert places(file) == SUPERVISED + REINFORCE + [("reinforce", 3)]  # beside the line of the loop's last step
    log.evaluation("reinforce", 3, {"eval/task/pass@1": 0.5})
    assert file.read_bytes() == once
    with open(file, "a") as stream:
        stream.write('{"stage": "rei')
    log.evaluation("reinforce", 3, {"eval/task/pass@1": 0.5})
    assert file.read_bytes() == once
    log.evaluation("reinforce", 0, {"eval/task/pass@1": 0.25})
    assert file.read_bytes() == once


def test_only_the_last_line_may_be_damaged(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    assert read_jsonl(file) == []
    file.write_text("")
    assert read_jsonl(file) == []
    file.write_text('{"a": 1}\n{"a"')
    assert read_jsonl(file) == [{"a": 1}]
    file.write_text('{"a": 1}\n{"a"\n{"a": 3}\n')
    with pytest.raises(ValueError, match=r"line 2 of .*metrics\.jsonl is not JSON"):
        read_jsonl(file)


def test_writing_replaces_the_whole_file_or_nothing(tmp_path: Path) -> None:
    file = tmp_path / "summary.json"
    (tmp_path / "summary.json.tmp").write_text("half of an old attempt, longer than what follows")
    write_atomically(file, "new")
    assert file.read_text() == "new" and [path.name for path in tmp_path.iterdir()] == ["summary.json"]
    with pytest.raises(UnicodeEncodeError):
        write_atomically(file, "no \ud800 such text")
    assert file.read_text() == "new"


def test_json_files_are_for_people(tmp_path: Path) -> None:
    RunLog(tmp_path).write_json("examples.json", {"before": ["é"]})
    text = (tmp_path / "examples.json").read_text(encoding="utf-8")
    assert "é" in text and json.loads(text) == {"before": ["é"]}


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_number_that_is_none_is_named_with_its_step(value: float) -> None:
    check_finite("reinforce", 7, {"reward/total": 0.0, "policy/loss": -1e30})
    with pytest.raises(NonFiniteError, match=rf"^reward/total is {value} at step 7 of stage 'reinforce'"):
        check_finite("reinforce", 7, {"policy/loss": 1.0, "reward/total": value, "policy/entropy": math.nan})
