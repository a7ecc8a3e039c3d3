"""Ctrl-C and SIGTERM to real processes: the step is finished and saved, and the printed command goes on from there."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import select
import shutil
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from jaxreason.training.metrics import read_jsonl

ROOT = Path(__file__).parents[1]
CONFIG = ROOT / "tests" / "short_run.py"
COMMAND = [sys.executable, "-m", "jaxreason", "train", "--config", str(CONFIG), "--workdir"]
# makes the terminal that it was given its controlling one, as a shell's child has it, so that a typed Ctrl-C is a signal
IN_A_TERMINAL = "import fcntl, os, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); os.execv(sys.argv[1], sys.argv[1:])"
HIDE, SHOW = "\x1b[?25l", "\x1b[?25h"
SECONDS = 120  # after which a process that says nothing has hung


@pytest.fixture(scope="module")
def environment(one_device: dict[str, str]) -> dict[str, str]:
    return os.environ | one_device | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT), "TERM": "xterm", "COLUMNS": "100"}


class Process:
    """A process and what it has said, on a pipe or on a terminal of its own."""

    def __init__(self, command: Any, environment: dict[str, str], *, terminal: bool = False) -> None:
        if terminal:
            self.end, theirs = pty.openpty()
            fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 100, 0, 0))
            command = [sys.executable, "-c", IN_A_TERMINAL, *command]
        else:
            self.end, theirs = os.pipe()
        self.process = subprocess.Popen(
            command,
            env=environment,
            stdin=theirs if terminal else subprocess.DEVNULL,
            stdout=theirs,
            stderr=theirs,
            shell=isinstance(command, str),
            start_new_session=True,
        )
        os.close(theirs)
        self.said = ""

    def read(self) -> bool:
        """Waits for some more; False where there is no more to come."""
        ready, _, _ = select.select([self.end], [], [], SECONDS)
        if not ready:
            self.process.kill()
            raise AssertionError(f"nothing more came within {SECONDS} s after:\n{self.said}")
        try:
            some = os.read(self.end, 65536)
        except OSError:  # how Linux says that nobody has the terminal open any more
            some = b""
        self.said += some.decode(errors="replace")
        return bool(some)

    def until(self, text: str) -> None:
        while text not in self.said:
            assert self.read(), f"ended without saying {text!r}:\n{self.said}"

    def ended(self) -> int:
        while self.read():
            pass
        os.close(self.end)
        return self.process.wait(SECONDS)

    def kill(self, number: int) -> None:
        self.process.send_signal(number)


def printed_command(said: str) -> str:
    found = re.search(r"To go on: (.*)", said)
    assert found, said
    return found[1].strip()


def numbers(workdir: Path) -> list[dict[str, Any]]:
    lines = read_jsonl(workdir / "metrics.jsonl")
    return [{k: v for k, v in line.items() if not k.startswith(("time/", "throughput/"))} for line in lines]


@pytest.fixture(scope="module")
def undisturbed(environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    workdir = tmp_path_factory.mktemp("undisturbed") / "run"
    process = Process([*COMMAND, str(workdir)], environment)
    assert process.ended() == 0, process.said
    return workdir


def test_ctrl_c_then_sigterm_then_on_to_the_undisturbed_end(environment: dict[str, str], undisturbed: Path, tmp_path: Path) -> None:
    """A typed Ctrl-C in the supervised stage, SIGTERM in reinforcement; each time the printed command, run by a shell, goes on."""
    workdir = tmp_path / "it's a run"  # the printed command is for a shell, which gives quotes and blanks a meaning

    first = Process([*COMMAND, str(workdir)], environment, terminal=True)
    first.until("first step")  # the live display's word for a stage that has begun
    os.write(first.end, b"\x03")
    assert first.ended() == 75, first.said
    assert "SIGINT: finishing this step and saving; once more to stop at once" in first.said
    assert "Traceback" not in first.said
    assert first.said.rindex(SHOW) > first.said.rindex(HIDE)
    steps = [int(path.name) for path in (workdir / "checkpoints" / "supervised").iterdir() if path.name.isdigit()]
    assert max(steps) < 6 and not (workdir / "checkpoints" / "reinforce").exists()

    second = Process("exec " + printed_command(first.said), environment)
    second.until("reinforce: 6 steps")
    second.kill(signal.SIGTERM)
    assert second.ended() == 75, second.said
    assert f"resuming stage 'supervised' from step {max(steps)}" in second.said
    assert "SIGTERM: finishing this step and saving" in second.said and "Traceback" not in second.said
    reached = [int(path.name) for path in (workdir / "checkpoints" / "reinforce").iterdir() if path.name.isdigit()]
    assert 1 <= max(reached) < 6

    third = Process("exec " + printed_command(second.said), environment)
    assert third.ended() == 0, third.said
    assert f"resuming stage 'reinforce' from step {max(reached)}" in third.said
    assert numbers(workdir) == numbers(undisturbed)
    for name in ("rollouts.jsonl", "examples.json", "policy/model.safetensors"):
        assert (workdir / name).read_bytes() == (undisturbed / name).read_bytes(), name


def test_a_second_ctrl_c_ends_at_once_even_while_compiling(environment: dict[str, str], tmp_path: Path) -> None:
    """The compiler does not return to Python for as long as it works; and the terminal gets its cursor back."""
    cold = environment | {"JAX_COMPILATION_CACHE_DIR": str(tmp_path / "xla")}
    process = Process([*COMMAND, str(tmp_path / "run")], cold, terminal=True)
    process.until("first step")
    os.write(process.end, b"\x03")
    process.until("once more to stop at once")
    assert not (tmp_path / "run" / "metrics.jsonl").exists()  # not one step is done
    os.write(process.end, b"\x03")
    assert process.ended() == -signal.SIGINT, process.said
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
    assert process.said.rindex(SHOW) > process.said.rindex(HIDE)
    assert "Traceback" not in process.said


def test_a_second_sigterm_ends_by_the_signal(environment: dict[str, str], tmp_path: Path) -> None:
    cold = environment | {"JAX_COMPILATION_CACHE_DIR": str(tmp_path / "xla")}
    process = Process([*COMMAND, str(tmp_path / "run")], cold)
    process.until("supervised: 6 steps")
    process.kill(signal.SIGTERM)
    process.until("once more to stop at once")
    process.kill(signal.SIGTERM)
    assert process.ended() == -signal.SIGTERM, process.said
    assert "Traceback" not in process.said


def wait_for(condition: Callable[[], bool], process: Process) -> None:
    deadline = time.monotonic() + SECONDS
    while not condition():
        assert process.process.poll() is None and time.monotonic() < deadline, process.said
        time.sleep(0.005)


@pytest.mark.slow
def test_a_signal_when_everything_is_trained_lets_the_run_end(
    environment: dict[str, str], undisturbed: Path, tmp_path: Path
) -> None:
    workdir = tmp_path / "run"
    shutil.copytree(undisturbed, workdir)
    for name in ("summary.json", "report.html"):
        (workdir / name).unlink()
    shutil.rmtree(workdir / "policy")
    process = Process([*COMMAND, str(workdir)], environment)
    wait_for(lambda: (workdir / "policy").exists() or (workdir / ".policy.partial").exists(), process)
    process.kill(signal.SIGTERM)
    assert process.ended() == 0, process.said
    assert "SIGTERM" in process.said and "Report: " in process.said and "Traceback" not in process.said
    assert json.loads((workdir / "summary.json").read_text())["after"]
    assert (workdir / "report.html").is_file()
    assert (workdir / "policy" / "model.safetensors").read_bytes() == (undisturbed / "policy" / "model.safetensors").read_bytes()


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="looks into the process through /proc")
def test_ctrl_c_while_starting_ends_without_a_word(environment: dict[str, str], tmp_path: Path) -> None:
    process = Process([*COMMAND, str(tmp_path / "run")], environment)
    maps = Path(f"/proc/{process.process.pid}/maps")
    wait_for(lambda: "jaxlib" in maps.read_text(), process)  # jax is being imported
    process.kill(signal.SIGINT)
    assert process.ended() == -signal.SIGINT and process.said == ""
