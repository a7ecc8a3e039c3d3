"""What the terminal shows: in a real pseudo-terminal, in a pipe, and at the end of a run."""

from __future__ import annotations

import io
import os
import re
import subprocess
import sys
from typing import Any

import pytest
from rich.console import Console, RenderableType

from jaxreason.cli.progress import (
    LiveProgress,
    PlainProgress,
    QuietProgress,
    before_after_table,
    make_progress,
    side_by_side,
    visible,
)


class Clock:
    """Seconds that pass only when told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def printed(renderable: RenderableType, *, width: int = 100, encoding: str = "utf-8") -> str:
    file = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    Console(file=file, width=width).print(renderable)
    file.flush()
    return file.buffer.getvalue().decode(encoding)  # type: ignore[attr-defined]


def test_plain_lines_are_few_but_hold_every_evaluation_and_the_last_step() -> None:
    clock, file = Clock(), io.StringIO()
    progress = PlainProgress(file, clock=clock)
    progress.stage("reinforce", 20, 0)
    for step in range(1, 21):
        clock.now += 0.5
        evaluation = {"eval/sum/pass@1": 0.25} if step in (3, 10) else {}
        progress.update(step, {"reward/total": step / 10, "policy/kl_ref": 0.01, **evaluation})
    progress.close()
    lines = file.getvalue().splitlines()
    assert lines[0] == "reinforce: 20 steps"
    steps = [int(match.group(1)) for line in lines[1:] if (match := re.match(r"reinforce +(\d+)/20 ", line))]
    assert steps == [1, 3, 7, 10, 14, 18, 20]  # a line every four steps (two seconds), restarted by each evaluation
    assert [int(s) for line in lines if "held-out 25.0%" in line for s in re.findall(r"(\d+)/20", line)] == [3, 10]
    assert "reward 0.7  KL 0.01  elapsed 0:04  left 0:06" in lines[3]
    assert lines[-1].endswith("elapsed 0:10")


def test_time_left_counts_this_stages_steps_and_not_the_first_ones_compilation() -> None:
    clock, file = Clock(), io.StringIO()
    progress = PlainProgress(file, clock=clock)
    progress.stage("supervised", 1000, 900)
    clock.now += 60.0
    progress.update(901, {"loss/sft": 2.0})
    clock.now += 30.0
    progress.update(911, {"loss/sft": 1.0, "throughput/tokens_per_second": 12345.6})
    start, first, second = file.getvalue().splitlines()
    assert start == "supervised: 1000 steps, 900 of them done before"
    assert first.endswith("elapsed 1:00  left -")
    assert second == "supervised  911/1000  loss 1  tokens/s 12.3k  elapsed 1:30  left 4:27"  # 89 steps of 3 seconds


def test_live_display_shows_the_latest_numbers_and_keeps_the_last_evaluation() -> None:
    clock = Clock()
    console = Console(file=io.StringIO(), force_terminal=True, width=120, color_system=None)
    progress = LiveProgress(console, clock=clock)
    progress.stage("supervised", 4, 0)
    progress.update(4, {"loss/sft": 0.5, "throughput/tokens_per_second": 900.0})
    progress.stage("reinforce", 300, 0)
    for step in range(1, 88):
        clock.now += 1.0
        progress.update(step, {"reward/total": step / 100, "rollout/length": 21.5, "policy/kl_ref": 0.0123})
        if step == 80:
            progress.update(step, {"eval/sum/pass@1": 0.612})
    progress.message("saved [bold]checkpoint[/bold] \x1b[31m")
    shown = printed(progress._render(), width=120)
    progress.close()
    progress.close()
    assert re.search(r"supervised .* 4/4 .*done", shown) and re.search(r"reinforce .* 87/300 +1:27 +left 3:33", shown)
    assert "reward 0.87   held-out 61.2% at 80   length 21.5   KL 0.0123" in shown
    written = console.file.getvalue()  # type: ignore[attr-defined]
    assert "saved [bold]checkpoint[/bold] \\x1b[31m" in written and "stopped" in written


@pytest.mark.parametrize("make", [lambda: PlainProgress(io.StringIO()), lambda: LiveProgress(Console(file=io.StringIO()))])
def test_a_step_before_a_stage_is_refused(make: Any) -> None:
    with pytest.raises(ValueError, match="call stage"):
        make().update(1, {})


SCRIPT = """
import sys
from jaxreason.cli.progress import make_progress
progress = make_progress(sys.stdout)
progress.stage("reinforce", 2, 0)
progress.update(1, {"reward/total": 0.5})
progress.message("a message with [brackets]")
progress.update(2, {"reward/total": 1.0})
progress.close()
print(type(progress).__name__)
"""


def run_in(terminal: bool, term: str = "xterm-256color") -> str:
    """What SCRIPT writes to a pseudo-terminal, or to a pipe."""
    kept = {key: value for key, value in os.environ.items() if key not in ("FORCE_COLOR", "TTY_COMPATIBLE", "NO_COLOR")}
    environment = {**kept, "TERM": term, "COLUMNS": "100", "PYTHONIOENCODING": "utf-8"}
    if not terminal:
        return subprocess.run([sys.executable, "-c", SCRIPT], env=environment, capture_output=True, check=True).stdout.decode()
    master, slave = os.openpty()
    with subprocess.Popen([sys.executable, "-c", SCRIPT], env=environment, stdout=slave, stderr=slave) as process:
        os.close(slave)
        chunks = []
        while True:
            try:
                chunk = os.read(master, 65536)
            except OSError:  # Linux's end of file: the other side is closed
                break
            if not chunk:
                break
            chunks.append(chunk)
    os.close(master)
    assert process.returncode == 0
    return b"".join(chunks).decode()


def test_a_terminal_gets_a_live_display_and_its_cursor_back() -> None:
    written = run_in(terminal=True)
    assert written.rstrip().endswith("LiveProgress")
    assert "2/2" in written and "a message with [brackets]" in written
    assert written.count("\x1b[?25l") == written.count("\x1b[?25h") == 1


@pytest.mark.parametrize("where", [{"terminal": False}, {"terminal": True, "term": "dumb"}])
def test_a_pipe_and_a_dumb_terminal_get_plain_lines(where: dict[str, Any]) -> None:
    written = run_in(**where)
    assert written.rstrip().endswith("PlainProgress") and "\x1b" not in written
    assert "reinforce 2/2  reward 1  elapsed" in written and "a message with [brackets]" in written


def test_quiet_says_nothing() -> None:
    file = io.StringIO()
    progress = make_progress(file, quiet=True)
    assert isinstance(progress, QuietProgress)
    progress.stage("reinforce", 2, 0)
    progress.update(1, {})
    progress.message("x")
    progress.close()
    assert file.getvalue() == ""


def test_before_after_table() -> None:
    summary = {"phases": {"base": {"eval/sum/pass@1": 0.702, "eval/sum/length": 19.5}},
               "before": {"eval/sum/pass@1": 0.231, "eval/sum/length": 20.4},
               "after": {"eval/sum/pass@1": 0.683, "eval/sum/length": 18.0, "eval/[b]/pass@1": 1.0}}  # fmt: skip
    lines = [re.findall(r"[^\s│|]+(?: points)?", line) for line in printed(before_after_table(summary)).splitlines()]
    assert ["sum/pass@1", "70.2%", "23.1%", "68.3%", "+45.2 points"] in lines
    assert ["sum/length", "19.5", "20.4", "18", "-2.4"] in lines
    assert ["[b]/pass@1", "-", "-", "100.0%"] in lines
    assert "held-out" in printed(before_after_table({}))  # an unfinished run


def test_side_by_side_shows_completions_as_they_were_written() -> None:
    written = "<think>\n  [bold]3[/bold] + [/x] = 7 \x1b[31m\x07\n</think>"
    reward = {"total": 1.1, "accuracy": 1.0, "format": None}
    examples = {
        "before": [{"question": f"[red]q{n}[/red]", "answer": "7", "completion": "no", "reward": {"total": 0.0}} for n in range(3)],
        "after": [{"question": f"[red]q{n}[/red]", "answer": "7", "completion": written, "reward": reward} for n in (1, 0)],
    }
    text = printed(side_by_side(examples))
    assert text.count("<think>") == 2 and text.count("  [bold]3[/bold] + [/x] = 7 \\x1b[31m\\x07") == 2
    assert all(f"[red]q{n}[/red]" in text for n in range(3)) and text.count("(not there yet)") == 1
    assert "after RL  reward 1.1  accuracy 1  format -" in text and "\x1b" not in text
    assert "q1" not in printed(side_by_side(examples, limit=1))
    assert printed(side_by_side(examples), encoding="ascii").isascii()
    assert "no examples" in printed(side_by_side({}))


def test_a_very_long_completion_says_how_much_is_missing() -> None:
    examples = {"before": [{"question": "q", "completion": "a" * 5000 + "z", "reward": {}}]}
    text = printed(side_by_side(examples))
    assert "... 3801 characters ..." in text and "z" in text and text.count("a" * 40) < 50


def test_visible_spells_out_control_characters_only() -> None:
    assert visible("a\tb\nc 思考 <x>") == "a\tb\nc 思考 <x>"
    assert visible("\x1b[2J\r\x00\x9b\ud800") == "\\x1b[2J\\x0d\\x00\\x9b\\xd800"
