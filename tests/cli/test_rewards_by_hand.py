"""`play`, `grade` and `contamination`: without jax, through a real terminal and real files."""

from __future__ import annotations

import gzip
import io
import json
import os
import pty
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from jaxreason import naming, tasks
from jaxreason.cli.main import main
from jaxreason.rewards.finding import host_rules

PLAY = ("play", "word_problems", "--task.heldout_size=2", "--task.max_changes=2")
FIRST = "Ann has 6 coins."  # the first held-out problem begins so

MIXED = {"countdown": {"heldout_size": 2}, "game24": {"heldout_size": 2}}
LONG = "12 and " * 300_000  # which takes a rule a tenth of a second

SCRIPT = (
    "import sys\nfrom jaxreason.cli.main import main\ncode = main(sys.argv[1:])\n"
    "print('\\x00', code, *{name.split('.')[0] for name in sys.modules})"
)


@pytest.mark.parametrize("command", ["play", "grade", "contamination", "tasks", "rules"])
def test_jax_is_not_imported(tmp_path, command):
    file = tmp_path / "rows.jsonl"
    file.write_text('{"question": "1 + 1?", "answer": "2", "completion": "2"}\n')
    words = {
        "play": PLAY,
        "grade": ("grade", file, "--rule", "math.gsm8k_answer"),
        "contamination": ("contamination", "--train", "word_problems", "--draws", "5", "--evaluation", file),
    }.get(command, (command,))
    command_line = [sys.executable, "-c", SCRIPT, *map(str, words)]
    done = subprocess.run(command_line, input="37\n", capture_output=True, text=True, timeout=60)
    printed, _, after = done.stdout.partition("\x00")
    code, *modules = after.split()
    assert code == "0" and printed, done.stderr
    assert not set(modules) & {"jax", "jaxlib", "flax", "transformers", "datasets", "sympy"}


# ------------------------------------------------------------------------------------------------------------------- play


class Terminal:
    """A command in a terminal of its own."""

    def __init__(self, *words: str) -> None:
        self.terminal, theirs = pty.openpty()
        environment = os.environ | {"TERM": "xterm", "COLUMNS": "100", "NO_COLOR": "1"}
        command = [sys.executable, "-m", "jaxreason", *words]
        self.process = subprocess.Popen(
            command, stdin=theirs, stdout=theirs, stderr=theirs, env=environment, start_new_session=True
        )
        os.close(theirs)
        self.seen = ""

    def until(self, text: str) -> str:
        """What is shown up to `text` and with it, since the last call."""
        deadline = time.monotonic() + 60
        while text not in self.seen:
            assert time.monotonic() < deadline, f"{text!r} did not come: {self.seen!r}"
            if select.select([self.terminal], [], [], 1)[0]:
                try:
                    self.seen += os.read(self.terminal, 4096).decode()
                except OSError:  # the other side is closed
                    raise AssertionError(f"{text!r} did not come: {self.seen!r}") from None
        shown, _, self.seen = self.seen.partition(text)
        return shown + text

    def type(self, text: str) -> None:
        os.write(self.terminal, text.encode())

    def end(self) -> int:
        code = self.process.wait(timeout=30)
        os.close(self.terminal)
        return code


def test_play_in_a_terminal():
    screen = Terminal(*PLAY)
    question = screen.until("> ")
    assert "heldout/0" in question and "How many?" in question
    assert "math.gsm8k_answer: 1 if the completion's final answer equals" in question
    screen.type("the answer is 1000\n")
    assert "reward 0  (accuracy 0)" in screen.until("> ")
    screen.type(":answer\n")
    told = screen.until("> ")
    reference = told.split("reference: ")[1].split()[0]
    screen.type(f"{reference}\n")
    assert "reward 1  (accuracy 1)" in screen.until("> ")
    screen.type(f":text\nI think\n#### {reference}\n.\n")
    assert "reward 1" in screen.until("reward 1  (accuracy 1)")
    screen.until("> ")
    screen.type(":prompt\n")
    assert "[user]" in screen.until("> ")
    screen.type(":nothing\n")
    assert ":nothing is none of :text, :answer, :prompt, :quit" in screen.until("> ")
    screen.type("\n")
    assert "heldout/1" in screen.until("> ")
    screen.type(":quit\n")
    assert "3 completions scored." in screen.until("scored.")
    assert screen.end() == 0


def test_play_ends_with_the_input_and_with_ctrl_c():
    for key, code in (("\x04", 0), ("\x03", None)):
        screen = Terminal(*PLAY, "--workers", "0")
        screen.until("> ")
        if code is None:
            os.killpg(screen.process.pid, signal.SIGINT)
        else:
            screen.type(key)
        assert screen.end() == (code if code is not None else 130)


def test_play_reads_a_pipe_and_problems_of_training():
    words = [sys.executable, "-m", "jaxreason", *PLAY, "--split", "train", "--start", "7", "--rule", "format.think_answer_format"]
    done = subprocess.run(
        words, input="<think>a</think><answer>b</answer>\n\n\x1b[2J\n", capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0 and "train/7" in done.stdout and "train/8" in done.stdout
    assert "reward 1  (format 1)" in done.stdout and "reward 0  (format 0)" in done.stdout
    assert "> " not in done.stdout and "\x1b" not in done.stdout


def test_play_a_mixture_by_each_tasks_rule_where_all_have_one(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", io.StringIO("1000003\n:quit\n"))
    assert main(["play", "mixture", f"--task.tasks={MIXED}", "--workers", "0"]) == 0
    told = capsys.readouterr().out
    assert "countdown/heldout/0" in told and "reward 0  (accuracy 0)" in told
    (tmp_path / "t.jsonl").write_text(
        '{"chosen": "\\n\\nHuman: a\\n\\nAssistant: b", "rejected": "\\n\\nHuman: a\\n\\nAssistant: c"}\n'
    )
    (tmp_path / "test.jsonl").write_text((tmp_path / "t.jsonl").read_text())
    (tmp_path / "train.jsonl").write_text((tmp_path / "t.jsonl").read_text())
    unscored = {"hh_rlhf": {"data_dir": str(tmp_path), "heldout_size": 1}}
    assert main(["play", "mixture", f"--task.tasks={unscored}", "--workers", "0"]) == 2
    assert "task 'hh_rlhf' names no rule that scores its answers: give one" in capsys.readouterr().err


def test_a_rule_beyond_its_limit_is_told(monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", io.StringIO(LONG + "\n"))
    assert main([*PLAY, "--limit-seconds", "0.001"]) == 0
    assert "the rule failed by timeout" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("play", "word_problem"), "--task is 'word_problem', which does not exist: did you mean 'word_problems'?"),
        (("play", "word_problems", "--task.seeds=3"), "--task has no key 'seeds': did you mean 'seed'?\n"),
        (("play", "word_problems", "--task.seed=x"), "--task.seed is 'x': expected a whole number"),
        (("play", "word_problems", "--task.heldout_size=0"), "--task: heldout_size is 0: expected 1 or more"),
        (("play", "word_problems", "--task.seed"), "--task.seed has no value: write --task.seed=VALUE"),
        (("play", "word_problems", "--rule", "math.gsm8k"), "--rule is 'math.gsm8k', which does not exist: did you mean"),
        (("play", "word_problems", "--rule", "traced.integer_answer"), "reads tokens inside the train step"),
        (("play", "word_problems", "--rule", "length.kimi_length"), "which compares the completions of a group"),
        (("play", "word_problems", "--start", "999"), "--start is 999: expected the number of a problem, 0 to 255"),
        (("play", "word_problems", "--limit-seconds", "0"), "--limit-seconds is 0.0: expected more than 0"),
        (("play", "mixture", f"--task.tasks={MIXED}", "--rule.n=2"), "rules of their own: name one with --rule"),
        (("play", "word_problems", "--config.seed=1"), "--config.seed=1 is not an option of 'play'"),
        (("grade", "x.jsonl", "--rule", "maths.gsm8k_answer"), "did you mean 'math.gsm8k_answer'?"),
        (("grade", "x.jsonl", "--rule", "math.gsm8k_answer", "--rule.limits=1"), "--rule has no key 'limits'"),
        (("grade", "x.jsonl", "--rule", "math.gsm8k_answer"), "there is no file 'x.jsonl'"),
        (("grade", ".", "--rule", "math.gsm8k_answer"), "there is no file '.'"),
        (
            ("contamination", "--train", "gsm9k", "--evaluation", "x"),
            "--train is 'gsm9k', which does not exist: did you mean 'gsm8k'?",
        ),
        (
            ("contamination", "--train", "word_problems", "--evaluation", "x.jsonl"),
            "--evaluation is 'x.jsonl', and there is no such file",
        ),
        (
            ("contamination", "--train", "word_problems", "--evaluation", "word_problems", "--n", "0"),
            "--n is 0: expected 1 or more",
        ),
        (
            ("contamination", "--train", "word_problems", "--evaluation", "word_problems", "--threshold", "2"),
            "--threshold is 2.0: expected a share from 0 to 1",
        ),
    ],
)
def test_mistakes_are_one_sentence(words, says, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(list(words)) == 2
    told = capsys.readouterr().err
    assert told.startswith("jaxreason: ") and says in told and told.count("\n") == 1


def test_tasks_and_rules_are_listed_with_their_settings(capsys):
    assert main(["tasks"]) == 0
    shown = capsys.readouterr().out
    for name in naming.wholly_named(tasks, "Task"):
        assert f"\n{name}\n    " in f"\n{shown}"
    assert "settings: seed=0, min_changes=2" in shown and "settings: train, heldout=''" in shown
    assert main(["rules"]) == 0
    shown = capsys.readouterr().out
    for name in host_rules():
        assert f"\n{name}\n    " in f"\n{shown}"
    assert "settings: limit_seconds=2.7" in shown and "\nlength.kimi_length (of a group: in a config alone)\n" in shown
    assert "[P, G]" not in shown and "traced." not in shown


@pytest.mark.parametrize("command", ["play", "contamination"])
def test_rows_that_are_left_out_are_told(tmp_path, capsys, monkeypatch, command):
    file = tmp_path / "rows.jsonl"
    file.write_text(
        "".join(json.dumps({"question": f"1 + {i}?", "answer": i + 1}) + "\n" for i in range(5)) + '{"question": "2"}\n'
    )
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    name = "task" if command == "play" else "train"
    kwargs = [f"--{name}.train={file}", f"--{name}.heldout_size=2", f"--{name}.bad_rows=skip"]
    words = ["table"] if command == "play" else ["--train", "table", "--evaluation", "word_problems"]
    assert main([command, *words, *kwargs]) == 0
    shown = capsys.readouterr().out
    assert (
        "1 bad rows of task 'table' are left out: 1 missing column" in shown and f"{file}:6: there is no column 'answer'" in shown
    )


# ------------------------------------------------------------------------------------------------------------------ grade


ROWS = [
    {"question": "1 + 1?", "answer": "2", "completion": "\\boxed{2}", "problem_id": "a"},
    {"question": "1 + 1?", "answer": "2", "completion": "\\boxed{3}"},
    {"answer": "2"},
    {"answer": 7, "completion": "7", "stop": "length"},
    {"answer": "x", "completion": "7"},
    {"answer": "x", "completion": ["7"]},
    {"answer": "2", "completion": "2", "stop": "bored"},
    {"answer": "2", "completion": "2", "tokens": "many"},
    {"answer": "2", "completion": "2", "metadata": [1]},
]


def lines(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def test_grade(tmp_path, capsys):
    file = tmp_path / "rows.jsonl"
    text = [*map(json.dumps, ROWS), "not json", "", "[1]", json.dumps(ROWS[0])]
    file.write_text("\n".join(text) + "\n")
    assert main(["grade", str(file), "--rule", "math.gsm8k_answer"]) == 0
    printed = capsys.readouterr().out
    graded = lines(tmp_path / "rows.graded.jsonl")
    assert [row["line"] for row in graded] == [*range(1, 11), 12, 13]  # all but the blank one
    assert graded[0] == {"line": 1, "problem_id": "a", "reward": {"total": 1.0, "accuracy": 1.0}}
    assert graded[1] == {"line": 2, "reward": {"total": 0.0, "accuracy": 0.0}}
    assert graded[3]["reward"]["accuracy"] == 1.0 and graded[4]["reward"]["accuracy"] is None
    wrong = {row["line"]: row["wrong"] for row in graded if "wrong" in row}
    assert list(wrong) == [3, 6, 7, 8, 9, 10, 12]
    for number, said in wrong.items():
        assert f"{file}:{number}: {said}" in printed
    for number, said in ((3, "no column 'completion': it has 'answer'"), (6, "holds ['7']"), (7, "stop is 'bored'")):
        assert said in wrong[number]
    assert "5 completions scored by math.gsm8k_answer" in printed and "7 bad rows" in printed
    cells = [[cell.strip() for cell in line.split("│")[1:-1]] for line in printed.splitlines() if "│" in line]
    assert cells == [["total", "5", "0.6", "0", "1"], ["accuracy", "4", "0.75", "0", "1"]]


def test_grade_names_columns_settings_and_the_results_file(tmp_path, capsys):
    file, out = tmp_path / "rows.jsonl.gz", tmp_path / "out.jsonl"
    with gzip.open(file, "wt") as stream:
        for i in range(600):  # several chunks
            stream.write(json.dumps({"gold": str(i), "text": str(i if i % 3 else -1)}) + "\n")
    words = ["--answer", "gold", "--completion", "text", "--out", str(out), "--workers", "0"]
    assert main(["grade", str(file), "--rule", "math.gsm8k_answer", *words]) == 0
    assert [row["reward"]["total"] for row in lines(out)] == [float(i % 3 > 0) for i in range(600)]
    assert main(["grade", str(out), "--rule", "math.gsm8k_answer"]) == 2
    told = capsys.readouterr().err
    assert "has no row that could be scored (600 bad)" in told
    assert main(["grade", str(out), "--rule", "math.gsm8k_answer", "--out", str(out)]) == 2
    assert "which is the file of completions" in capsys.readouterr().err
    (tmp_path / "empty.jsonl").write_text("\n")
    assert main(["grade", str(tmp_path / "empty.jsonl"), "--rule", "math.gsm8k_answer"]) == 2
    assert "is empty" in capsys.readouterr().err and not (tmp_path / "empty.graded.jsonl").exists()


def test_a_part_that_applies_to_no_row_is_told(tmp_path, capsys):
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps({"answer": "2", "completion": "<answer>1+1</answer>"}) + "\n")
    assert main(["grade", str(file), "--rule", "arithmetic.countdown"]) == 0
    assert "'accuracy' applies to no row" in capsys.readouterr().out
    file.write_text(json.dumps({"answer": "2", "completion": "<answer>1+1</answer>", "metadata": {"numbers": [1, 1], "target": 2}}))
    assert main(["grade", str(file), "--rule", "arithmetic.countdown"]) == 0
    assert "applies to no row" not in capsys.readouterr().out


def test_a_rule_that_raises_on_every_row_is_told_once(tmp_path, capsys):
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps({"answer": "2", "completion": text}) + "\n" for text in "abc"))
    assert main(["grade", str(file), "--rule", "pattern.matches", "--rule.pattern=(("]) == 2
    shown = capsys.readouterr()
    assert not shown.out
    assert shown.err.startswith("jaxreason: pattern.matches fails on every row: ValueError: cannot compile the pattern '(('")


def test_a_rule_that_reads_tokens_needs_them(tmp_path, monkeypatch, capsys):
    rule = ["--rule", "length.soft_overlong", "--rule.max_completion_tokens=8", "--rule.cache_tokens=4"]
    file = tmp_path / "rows.jsonl"
    file.write_text(
        '{"answer": "1", "completion": "a b c d e f g h"}\n' + '{"answer": "1", "completion": "", "tokens": [1, 2, 3, 4, 5, 6]}\n'
    )
    assert main(["grade", str(file), *rule, "--workers", "1"]) == 0
    told = capsys.readouterr().out
    assert "rows.jsonl:1: the rule failed on it by error: ValueError: the rule reads tokens" in told and "1 bad rows" in told
    assert [json.loads(line).get("reward") for line in (tmp_path / "rows.graded.jsonl").read_text().splitlines()] == [
        None,
        {"total": -0.5, "overlong": -0.5},
    ]
    monkeypatch.setattr(sys, "stdin", io.StringIO("a b\n:quit\n"))
    assert main([*PLAY, *rule, "--workers", "0"]) == 0
    assert "the rule failed by error: ValueError: the rule reads tokens" in capsys.readouterr().out


def test_rows_on_which_a_rule_runs_too_long_are_reported(tmp_path, capsys):
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps({"answer": "2", "completion": LONG}) + "\n")
    assert main(["grade", str(file), "--rule", "math.gsm8k_answer", "--limit-seconds", "0.001"]) == 2
    assert f"{file}:1: the rule failed on it by timeout" in capsys.readouterr().out


# ---------------------------------------------------------------------------------------------------------- contamination


def test_contamination_of_files(tmp_path, capsys):
    train, evaluation, out = (tmp_path / name for name in ("train.jsonl", "evaluation.jsonl", "out.json"))
    train.write_text('{"id": "t0", "question": "A b c d e f g."}\n{"id": "t1", "question": "x y z"}\n')
    questions = ["we say: b, C d E!", "q b c d", "nothing of the kind here", "x Y z"]
    evaluation.write_text("".join(json.dumps({"problem": text}) + "\n" for text in questions))
    words = ["--train", str(train), "--evaluation", str(evaluation), "--n", "4", "--out", str(out)]
    assert main(["contamination", *words]) == 0
    assert "2 of 4 evaluation problems share 4 words in a row with some of 2 training problems" in capsys.readouterr().out
    told = json.loads(out.read_text())
    assert [(each["id"], each["share"], each["trained"], each["text"]) for each in told["overlaps"]] == [
        ("line 4", 1.0, ["t1"], "x y z"),  # shorter than n: the same words as a whole
        ("line 1", pytest.approx(1 / 3), ["t0"], "b c d e"),
    ]
    assert (told["n"], told["training_problems"], told["evaluation_problems"], told["overlapping"]) == (4, 2, 4, 2)
    assert main(["contamination", *words, "--threshold", "0.5"]) == 0
    assert json.loads(out.read_text())["overlapping"] == 1


def test_contamination_of_tasks_and_bad_files(tmp_path, capsys):
    """The word problems' two sides share no computation, but whole sentences: three words of them in a row."""
    words = ["--train", "word_problems", "--draws", "300", "--evaluation", "word_problems", "--evaluation.heldout_size=20"]
    assert main(["contamination", *words, "--n", "3"]) == 0
    assert "20 of 20 evaluation problems" in capsys.readouterr().out
    file = tmp_path / "rows.jsonl"
    for content, says in (
        ('{"question": "a"}\nnot json\n', f"{file}:2: the line is not JSON"),
        ('{"title": "a"}\n', f"{file}:1 has none of the columns"),
        ('{"question": "a"}\n{"question": null}\n', f"{file}:2: column 'question' holds None"),
        ("", "is empty"),
    ):
        file.write_text(content)
        assert main(["contamination", "--train", "word_problems", "--draws", "1", "--evaluation", str(file)]) == 2
        assert says in capsys.readouterr().err
    file.write_text('{"question": "a", "title": "b"}\n')
    assert main(["contamination", "--train", str(file), "--evaluation", str(file), "--column", "title"]) == 0
    assert main(["contamination", "--train", str(file), "--evaluation", str(file), "--train.seed=3"]) == 2
    assert "--train.seed sets a task" in capsys.readouterr().err


def test_a_rule_that_loads_much_pays_for_it_before_its_limit_begins(tmp_path):
    pytest.importorskip("math_verify", reason="needs the extra `math`")
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps({"answer": "x^2+1", "completion": "\\boxed{1+x\\cdot x}"}) + "\n")
    # importing sympy and building the parser's tables takes seconds
    assert main(["grade", str(file), "--rule", "math.math_answer", "--limit-seconds", "1"]) == 0
    assert lines(tmp_path / "rows.graded.jsonl") == [{"line": 1, "reward": {"total": 1.0, "accuracy": 1.0}}]
