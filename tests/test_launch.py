"""Several processes are one run: real ones, started by launch/local.sh, stopped by signals, continued, compared."""

from __future__ import annotations

import json
import os
import re
import resource
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

ROOT = Path(__file__).parents[1]
LAUNCHER = ROOT / "launch" / "local.sh"
IN_ORDER = "--xla_cpu_enable_concurrency_optimized_scheduler=false"
SECONDS = 300  # until a test gives up on a process

# what the launcher starts in the tests of the launcher alone: a program with the same options and a life of its own
FAKE = """#!/usr/bin/env bash
printf '%s\\n' "$@" >"$OUT/arguments.${@: -1}"
printf '%s' "${XLA_FLAGS:-}" >"$OUT/flags.${@: -1}"
"""
STOPPABLE = """
trap 'echo INT >>"$OUT/signals.$me"; exit 75' INT
trap 'echo TERM >>"$OUT/signals.$me"; exit 75' TERM
echo >"$OUT/ready.$me"
while true; do sleep 0.05; done
"""


def program(folder: Path, body: str) -> dict[str, str]:
    """The environment in which the launcher starts this program."""
    file = folder / "program"
    file.write_text(FAKE + "me=${@: -1}\n" + body)
    file.chmod(0o755)
    return {**os.environ, "JAXREASON": str(file), "OUT": str(folder), "GRACE": "1"}


def launch(*arguments: str, env: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run([LAUNCHER, *arguments], env=env, capture_output=True, text=True, timeout=SECONDS)


def until(condition: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    """Waits for a condition while the process runs."""
    end = time.monotonic() + SECONDS
    while not condition():
        assert process.poll() is None, "\n".join(each or "" for each in process.communicate())
        assert time.monotonic() < end
        time.sleep(0.02)


def test_every_process_is_told_of_the_others(tmp_path: Path) -> None:
    env = program(tmp_path, "") | {"DEVICES": "4", "XLA_FLAGS": "--xla_some_flag=true"}
    ended = launch("3", "train", "--config", "a name:tiny", "--workdir", "runs/two words", env=env)
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "", "")
    given = [(tmp_path / f"arguments.{i}").read_text().splitlines() for i in range(3)]
    address = given[0][6]
    assert re.fullmatch(r"localhost:\d+", address)
    for i, arguments in enumerate(given):
        assert arguments[:5] == ["train", "--config", "a name:tiny", "--workdir", "runs/two words"]
        assert arguments[5:] == ["--coordinator", address, "--processes", "3", "--process", str(i)]
        assert (tmp_path / f"flags.{i}").read_text() == f"--xla_some_flag=true {IN_ORDER} --xla_force_host_platform_device_count=4"


@pytest.mark.parametrize(("codes", "expected"), [((0, 0), 0), ((0, 3), 3), ((75, 75), 75)])
def test_the_code_is_that_of_a_process_that_failed(tmp_path: Path, codes: tuple[int, int], expected: int) -> None:
    env = program(tmp_path, f"codes=({codes[0]} {codes[1]}); exit ${{codes[$me]}}")
    assert launch("2", "train", env=env).returncode == expected


def test_when_one_dies_the_others_are_killed(tmp_path: Path) -> None:
    """Process 0 neither ends by itself nor hears signals, as one that waits in a collective."""
    env = program(tmp_path, "trap '' INT TERM; [[ $me == 1 ]] && exit 4; while true; do sleep 0.05; done")
    ended = launch("2", "train", env=env)
    assert ended.returncode == 4
    assert "ended with code 4, so the others are killed" in ended.stderr


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_reaches_every_process_once(tmp_path: Path, number: signal.Signals) -> None:
    """Sent to the launcher's whole group, as a terminal sends Ctrl-C: a second one would stop a run at once."""
    env = program(tmp_path, STOPPABLE)
    process = subprocess.Popen([LAUNCHER, "2", "train"], env=env, stderr=subprocess.PIPE, text=True, start_new_session=True)
    until(lambda: all((tmp_path / f"ready.{i}").exists() for i in range(2)), process)
    os.killpg(process.pid, number)
    _, errors = process.communicate(timeout=SECONDS)
    assert (process.returncode, errors) == (75, "")
    name = number.name.removeprefix("SIG")
    assert [(tmp_path / f"signals.{i}").read_text().split() for i in range(2)] == [[name], [name]]


@pytest.mark.parametrize(
    ("arguments", "env", "sentence"),
    [
        ([], {}, "expected the number of processes and a command"),
        (["0", "train"], {}, "the number of processes is '0'"),
        (["two", "train"], {}, "the number of processes is 'two'"),
        (["2", "train"], {"DEVICES": "many"}, "DEVICES is 'many'"),
        (["2", "train"], {"JAXREASON": "/no/such/program"}, "there is no '/no/such/program'"),
    ],
)
def test_mistakes_are_one_sentence(tmp_path: Path, arguments: Sequence[str], env: dict[str, str], sentence: str) -> None:
    ended = launch(*arguments, env=program(tmp_path, "") | env)
    assert ended.returncode == 2
    assert sentence in ended.stderr and ended.stderr.count("\n") == 1
    assert not list(tmp_path.glob("arguments.*"))


# ------------------------------------------------------------------------------------------------- two processes, one run

OVERRIDES = (
    "model.numerics.param_dtype=float64",
    "model.numerics.matmul_dtype=float64",
    "reward.format.kwargs.pattern=(?:.|\\n)*",  # 1 for a completion that ended: rewards that differ, so a gradient
    "supervised.optimizer.warmup_steps=0",
    "online.optimizer.warmup_steps=0",
)
STATE = """
import dataclasses, sys
from pathlib import Path
import jax, numpy as np
from jaxreason.pipelines import experiment as experiments
from jaxreason.pipelines import folder as folders
from jaxreason.sharding import MeshConfig
from jaxreason.training import online, state
from jaxreason.training.checkpoint import Checkpointer
from jaxreason.training.optimizer import make_optimizer

for folder in map(Path, sys.argv[1:]):
    config = dataclasses.replace(folders.read_config(folder), mesh=MeshConfig())
    e = experiments.build(config, folder)
    optimizer = make_optimizer(config.online.optimizer, steps=config.online.steps)
    checkpointer = Checkpointer(folder / "checkpoints" / online.STAGE)
    restored = checkpointer.restore_latest(state.abstract(e.model, optimizer, e.mesh))
    checkpointer.close()
    assert restored.step == config.online.steps and not restored.rejected
    np.savez(folder / "state.npz", **{jax.tree_util.keystr(p): x for p, x in jax.tree.leaves_with_path(restored.state)})
"""


def environment(cache: Path) -> dict[str, str]:
    """The environment of real processes: strict as the tests are, and quick to compile."""
    return {
        **os.environ,
        "PYTHON": sys.executable,
        "PYTHONPATH": str(ROOT),
        "JAX_PLATFORMS": "cpu",
        "JAX_NUMPY_DTYPE_PROMOTION": "strict",
        "JAX_NUMPY_RANK_PROMOTION": "raise",
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "XLA_FLAGS": "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true",
    }


def command(processes: int, workdir: Path, shape: tuple[int, int, int]) -> list[str]:
    mesh = [f"mesh.{axis}={size}" for axis, size in zip(("data", "fsdp", "tensor"), shape, strict=True)]
    options = [f"--config.{each}" for each in (*OVERRIDES, *mesh)]
    return [str(LAUNCHER), str(processes), "train", "--config", "quickstart:tiny", "--workdir", str(workdir), *options]


def lines(file: Path) -> list[dict[str, Any]]:
    """The lines of a run's file without its seconds."""
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    return [{k: v for k, v in row.items() if not k.startswith(("time/", "throughput/"))} for row in rows]


def assert_close(given: list[dict[str, Any]], expected: list[dict[str, Any]]) -> None:
    assert len(given) == len(expected)
    for a, b in zip(given, expected, strict=True):
        assert a.keys() == b.keys()
        for name, value in b.items():
            assert a[name] == (pytest.approx(value, rel=1e-9, abs=1e-9) if isinstance(value, float | dict) else value), name


Pair = Callable[..., list[subprocess.Popen[str]]]


@pytest.fixture
def pair() -> Iterator[Pair]:
    """Two processes of four devices without the launcher, which would pass a signal on, and kill whom another leaves."""
    started: list[subprocess.Popen[str]] = []

    def start(workdir: Path, shape: tuple[int, int, int], *more: str, env: dict[str, str]) -> list[subprocess.Popen[str]]:
        with socket.socket() as free:
            free.bind(("localhost", 0))
            address = f"localhost:{free.getsockname()[1]}"
        words = [*command(2, workdir, shape)[2:], *more, "--coordinator", address, "--processes", "2", "--process"]
        devices = {"XLA_FLAGS": f"{env['XLA_FLAGS']} {IN_ORDER} --xla_force_host_platform_device_count=4", "NPROC": "16"}
        for i in range(2):
            started.append(
                subprocess.Popen(
                    [sys.executable, "-m", "jaxreason", *words, str(i)],
                    env=env | devices,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                    text=True,
                )
            )
        return started

    yield start
    for process in started:
        process.kill()
        process.communicate()


def ended(processes: list[subprocess.Popen[str]]) -> list[tuple[int, str]]:
    """The code of each process and what it said."""
    return [(code, said) for said, code in ((each.communicate(timeout=SECONDS)[0], each.returncode) for each in processes)]


def reached(workdir: Path) -> int:
    """The step of reinforcement that was logged last."""
    file = workdir / "metrics.jsonl"
    rows = [line for line in file.read_text().splitlines() if line.endswith("}")] if file.is_file() else []
    return max((row["step"] for row in map(json.loads, rows) if row["stage"] == "reinforce"), default=-1)


def saved(workdir: Path) -> list[int]:
    return sorted(int(file.name.split(".")[0]) for file in (workdir / "checkpoints" / "reinforce").glob("*.manifest.json"))


def run(processes: int, workdir: Path, shape: tuple[int, int, int], *more: str, env: dict[str, str]) -> str:
    """What a run by the launcher, to its end, says."""
    devices = str(8 // processes if shape != (1, 1, 1) else 1)
    words = [*command(processes, workdir, shape), *more]
    done = subprocess.run(words, env=env | {"DEVICES": devices}, capture_output=True, text=True, timeout=SECONDS)
    assert (done.returncode, "Traceback" in done.stderr) == (0, False), done.stdout + done.stderr
    return done.stdout


def states(*folders: Path, env: dict[str, str]) -> list[dict[str, np.ndarray]]:
    """The last state of reinforcement of each run."""
    subprocess.run([sys.executable, "-c", STATE, *folders], env=env | {"JAX_ENABLE_X64": "1"}, check=True, timeout=SECONDS)
    return [dict(np.load(folder / "state.npz")) for folder in folders]


def assert_same_run(given: Path, expected: Path) -> None:
    """Line by line to 1e-9; a line that two processes wrote would be there twice."""
    for name in ("metrics.jsonl", "rollouts.jsonl"):
        assert_close(lines(given / name), lines(expected / name))


THREE = "--config.online.steps=3"


@pytest.mark.slow
def test_two_processes_are_one_run(pair: Pair, tmp_path: Path) -> None:
    """2 processes x 4 devices = 1 process x 8 devices = 1 device, to 1e-9; SIGTERM to one process stops both, and what they
    go on to is bit for bit what an undisturbed pair ends with."""
    env = environment(tmp_path / "cache")
    stopped, two, eight, one = (tmp_path / name for name in ("stopped", "two", "eight", "one"))
    shape = (2, 2, 2)
    processes = pair(stopped, shape, THREE, env=env)
    until(lambda: reached(stopped) >= 1, processes[0])
    processes[1].send_signal(signal.SIGTERM)
    (code, said), (other_code, other_said) = ended(processes)
    assert (code, other_code) == (75, 75), said + other_said
    assert "Interrupted and saved" in said and "Traceback" not in said + other_said
    assert not (stopped / "summary.json").exists() and saved(stopped)[-1] in (1, 2)
    assert f"resuming stage 'reinforce' from step {saved(stopped)[-1]}" in run(2, stopped, shape, THREE, env=env)

    for workdir, count, sizes in ((two, 2, shape), (eight, 1, shape), (one, 1, (1, 1, 1))):
        assert run(count, workdir, sizes, THREE, env=env).count("reinforce 3/3") == 1  # process 1 shows nothing
    after_signal, *others, expected = states(stopped, two, eight, one, env=env)
    for state in others:
        assert sorted(state) == sorted(expected)
        for name, values in expected.items():
            np.testing.assert_allclose(state[name], values, rtol=1e-9, atol=1e-9 * np.max(np.abs(values)), err_msg=name)
    moments = [name for name in expected if ".nu[" in name]
    assert len(moments) > 10 and all(np.any(expected[name] > 0) for name in moments)  # the gradient was one

    assert {name: x.tobytes() for name, x in after_signal.items()} == {name: x.tobytes() for name, x in others[0].items()}
    assert lines(stopped / "metrics.jsonl") == lines(two / "metrics.jsonl")
    for name in ("rollouts.jsonl", "policy/model.safetensors"):
        assert (stopped / name).read_bytes() == (two / name).read_bytes(), name
    for folder in (two, eight):
        assert_same_run(folder, one)
    assert {row["reward"]["format"] for row in lines(one / "rollouts.jsonl")} == {0.0, 1.0}
    assert not list(stopped.rglob("*.tmp")) and not list(stopped.glob(".*"))


@pytest.mark.slow
def test_a_killed_process_ends_the_other_and_the_run_goes_on(pair: Pair, tmp_path: Path) -> None:
    """Rules run on the host, each completion's in one process; the numbers are those of one process that was not killed."""
    env = environment(tmp_path / "cache")
    host = ("--config.reward.accuracy.rule=math.gsm8k_answer", "--config.evaluation.every_steps=1", THREE)
    killed, one = tmp_path / "killed", tmp_path / "one"
    processes = pair(killed, (2, 2, 2), *host, env=env)
    until(lambda: bool(saved(killed)), processes[0])
    processes[1].kill()
    (code, said), (other_code, _) = ended(processes)
    # the first says what a sum that lost its other half says, or else that it misses the other's heartbeats
    assert code in (1, -signal.SIGABRT) and other_code == -signal.SIGKILL, said
    assert "Gloo" in said.splitlines()[-1] or "stopped sending heartbeats" in said
    # on another mesh, whose parameters lie on both processes: what was whole is taken up
    step = saved(killed)[-1]
    assert f"resuming stage 'reinforce' from step {step}" in run(2, killed, (1, 4, 2), *host, env=env)
    run(1, one, (1, 1, 1), *host, env=env)
    given, expected = states(killed, one, env=env)
    for name, values in expected.items():
        np.testing.assert_allclose(given[name], values, rtol=1e-9, atol=1e-9 * np.max(np.abs(values)), err_msg=name)
    assert_same_run(killed, one)
    assert any("reward/failed/error" in row for row in lines(one / "metrics.jsonl"))


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(resource, "prlimit"), reason="limits another process, as Linux can")
def test_a_process_that_cannot_save_ends_the_run(pair: Pair, tmp_path: Path) -> None:
    """It says so when it saves again; the other ends for want of its signs of life, and the checkpoint before stays."""
    workdir = tmp_path / "run"
    more = (
        "--config.online.steps=100000",
        "--config.supervised.phases.base.steps=0",
        "--config.supervised.phases.cold_start.steps=0",
    )
    processes = pair(workdir, (1, 4, 2), *more, env=environment(tmp_path / "cache"))
    until(lambda: len(saved(workdir)) >= 2, processes[0])
    resource.prlimit(processes[1].pid, resource.RLIMIT_FSIZE, (64, 64))
    (code, said), (other_code, other_said) = ended(processes)
    assert code in (1, -signal.SIGABRT) and other_code == 2, said + other_said
    (sentence,) = [line for line in other_said.splitlines() if line.startswith("jaxreason: ")]
    assert "Error writing" in sentence and "ocdbt.process_1" in sentence
    kept = saved(workdir)
    assert kept and all((workdir / "checkpoints" / "reinforce" / str(step)).is_dir() for step in kept)
