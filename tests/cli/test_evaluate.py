"""`jaxreason evaluate` on a model's folder, as a process that is interrupted and killed; and every mistake a sentence."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from jaxreason.cli.main import main

PROBLEMS = 48


@pytest.fixture(scope="module")
def environment(one_device, tmp_path_factory) -> dict[str, str]:
    return os.environ | one_device | {"COLUMNS": "100", "HOME": str(tmp_path_factory.mktemp("home"))}


@pytest.fixture(scope="module")
def model(shared) -> Path:
    return shared / "data" / "models" / "tiny_qwen2"


@pytest.fixture(scope="module")
def command(model) -> list[str]:
    settings = {
        "task.heldout_size": PROBLEMS,
        "config.sampling.max_prompt_tokens": 128,
        "config.sampling.max_completion_tokens": 8,
        "config.evaluation.problems_per_batch": 2,
        "config.scoring.workers": 1,
    }
    asked = ["--samples", "2", "--temperature", "0.9", "--category", "start", "--resamples", "20"]
    words = [str(model), "--task", "word_problems", *asked, *(f"--{key}={value}" for key, value in settings.items())]
    return [sys.executable, "-m", "jaxreason", "evaluate", *words, "--out"]


@pytest.fixture(scope="module")
def whole(command, environment, tmp_path_factory) -> tuple[Path, str]:
    """The folder of an evaluation that nothing interrupted, and what was printed."""
    folder = tmp_path_factory.mktemp("evaluations") / "whole"
    done = subprocess.run([*command, str(folder)], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return folder, done.stdout


def lines(folder: Path) -> list[bytes]:
    file = folder / "completions.jsonl"
    return file.read_bytes().splitlines() if file.exists() else []


def signalled(command: list[str], folder: Path, environment: dict[str, str], number: int, *, after: int) -> tuple[int, str]:
    """Exit code and output of the command when it was sent a signal as soon as it had written more than so many lines."""
    process = subprocess.Popen(
        [*command, str(folder)], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    deadline = time.monotonic() + 120
    while len(lines(folder)) <= after:
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.002)
    process.send_signal(number)
    printed, _ = process.communicate(timeout=120)
    return process.returncode, printed


def test_the_table_and_the_files(whole):
    folder, printed = whole
    results = json.loads((folder / "results.json").read_text())
    numbers = results["sampled"]["all"]["all"]
    assert set(results) >= {"source", "versions", "weights", "asked", "config", "counts", "bootstrap", "sampled"}
    assert "greedy" not in results and results["config"]["reward"]["accuracy"]["rule"] == "math.gsm8k_answer"
    assert list(numbers) == [
        "avg@2", "pass@1", "pass@2", "majority@1", "majority@2", "reward", "format", "answered", "length", "failed", "truncated"
    ]  # fmt: skip
    cells = [[cell.strip() for cell in line.split("│")[1:-1]] for line in printed.splitlines() if "│" in line]
    for name, found in numbers.items():
        (row,) = [row for row in cells if row and row[0] == name]
        assert row[3] == str(PROBLEMS)
        if name == "answered":
            assert row[1] == f"{100 * found['value']:.1f}%" and found["low"] <= found["value"] <= found["high"]
    starts = {row[0]: int(row[1]) for row in cells if row and row[0].isdecimal()}
    assert sum(starts.values()) == PROBLEMS and list(starts) == sorted(starts, key=int)
    assert f"{PROBLEMS} held-out problems, 2 samples at temperature 0.9" in printed and str(folder / "results.json") in printed
    assert f"sampled {PROBLEMS}/{PROBLEMS}" in printed


@pytest.mark.slow
def test_interrupted_and_killed_it_goes_on_to_the_same_files(whole, command, environment, tmp_path):
    folder, _ = whole
    code, printed = signalled(command, tmp_path / "out", environment, signal.SIGINT, after=0)
    begun = lines(tmp_path / "out")
    assert code == 75 and 0 < len(begun) < 2 * PROBLEMS and len(begun) % 4 == 0, printed
    assert "finishing this batch and saving" in printed and "what is finished is kept. To go on:" in printed
    code, _ = signalled(command, tmp_path / "out", environment, signal.SIGKILL, after=len(begun))
    assert code == -signal.SIGKILL and lines(tmp_path / "out")[: len(begun)] == begun
    assert not (tmp_path / "out" / "results.json").exists()
    with (tmp_path / "out" / "completions.jsonl").open("ab") as file:
        file.write(b'{"kind": "sampled", "num')  # as a kill in the midst of writing leaves it
    done = subprocess.run([*command, str(tmp_path / "out")], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    for name in ("completions.jsonl", "results.json", "settings.json"):
        assert (tmp_path / "out" / name).read_bytes() == (folder / name).read_bytes()


def test_rows_left_out_and_answers_that_no_rule_scores_are_told(model, environment, tmp_path):
    (tmp_path / "colours.jsonl").write_text('{"question": "Which?", "answer": "blue"}\n{"question": 7}\n' * 2)
    words = ["--task", "table", "--task.train=", f"--task.heldout={tmp_path / 'colours.jsonl'}", "--task.bad_rows=skip"]
    rule = ["--task.rule=arithmetic.integer_answer", "--config.scoring.workers=0"]
    sizes = [f"--config.{key}" for key in ("sampling.max_completion_tokens=2", "evaluation.problems_per_batch=2")]
    command = [sys.executable, "-m", "jaxreason", "evaluate", str(model), *words, *rule, *sizes, "--out", str(tmp_path / "out")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "2 bad rows of task 'table' are left out: 2 missing column" in done.stdout and "colours.jsonl:2: " in done.stdout
    cells = [[cell.strip() for cell in line.split("│")[1:-1]] for line in done.stdout.splitlines() if "│" in line]
    assert ["pass@1", "n/a", "n/a", "0"] in cells
    assert "2 of 2 completions count in no number on correctness: the rule of 'accuracy' does not apply" in done.stdout
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["counts"]["skipped_rows"] == {"missing column": 2} and results["counts"]["unscored_completions"] == 2
    assert results["greedy"]["all"]["all"]["pass@1"] == {"problems": 0}


def test_mistakes_are_one_sentence(model, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text('{"model_type": "bert"}')
    task = ["--task", "word_problems"]
    for words, says in (
        (["nothing"], "'nothing' is neither a run's folder nor a Hugging Face folder"),
        (["empty"], "'empty' is neither a run's folder nor a Hugging Face folder"),
        (["other", *task], "bert"),
        ([str(model)], "names no problems: give --task NAME, or --config F"),
        ([str(model), "--task", "word_problem"], "--task is 'word_problem', which does not exist: did you mean 'word_problems'?"),
        ([str(model), *task, "--rule", "maths.gsm8k_answer"], "--rule is 'maths.gsm8k_answer', which does not exist"),
        ([str(model), *task, "--task.heldout=3"], "--task has no key 'heldout': did you mean 'heldout_size'?"),
        ([str(model), *task, "--samples", "0"], "--samples is 0: expected 1 or more"),
        (
            [str(model), *task, "--samples", "4", "--temperature", "0"],
            "--temperature is 0 and --samples is 4: they would all be alike",
        ),
        ([str(model), *task, "--samples", "4", "--temperature=-1"], "--temperature is -1: expected more than 0"),
        ([str(model), *task, "--temperature", "1"], "without --samples the evaluation is greedy: give --samples"),
        ([str(model), *task, "--samples", "4", "--k", "1,8"], "--k holds 8, and there are 4 samples"),
        ([str(model), *task, "--k", "one"], "--k is 'one': expected whole numbers"),
        (
            [str(model), *task, "--config.sampling.temprature=1"],
            "config.sampling has no key 'temprature': did you mean 'temperature'?",
        ),
        ([str(model), *task, "--config.sampling.max_prompt_tokens=9999"], "the model's context holds 2048"),
        ([str(model), "--task.seed=3", "--config", "quickstart"], "there is no --task: give one"),
    ):
        assert main(["evaluate", *words]) == 2, words
        told = capsys.readouterr().err
        assert told.startswith("jaxreason: ") and says in told and told.count("\n") == 1, told
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["empty", "other"]
