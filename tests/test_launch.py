"""Several processes are one run: real ones, started by launch/local.sh, stopped by signals, continued, compared."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

ROOT = Path(__file__).parents[1]
LAUNCHER = ROOT / "launch" / "local.sh"
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
        assert process.poll() is None, "\n".join(process.communicate())
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
        assert (tmp_path / f"flags.{i}").read_text() == "--xla_some_flag=true --xla_force_host_platform_device_count=4"


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


@pytest.mark.slow
def test_two_processes_are_one_run(tmp_path: Path) -> None:
    """2 processes x 4 devices, interrupted by SIGTERM and continued, = 1 process x 8 devices = 1 device, to 1e-9."""
    env = environment(tmp_path / "cache")
    two, eight, one = (tmp_path / name for name in ("two", "eight", "one"))
    first = command(2, two, (2, 2, 2))
    process = subprocess.Popen(first, env=env | {"DEVICES": "4"}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    until(lambda: (two / "metrics.jsonl").is_file() and (two / "metrics.jsonl").stat().st_size > 0, process)
    process.send_signal(signal.SIGTERM)
    output, errors = process.communicate(timeout=SECONDS)
    assert process.returncode == 75, output + errors
    assert "Interrupted and saved" in output and "Traceback" not in errors and "killed" not in errors
    assert not (two / "summary.json").exists()

    for workdir, processes, devices, shape in ((two, 2, 4, (2, 2, 2)), (eight, 1, 8, (2, 2, 2)), (one, 1, 1, (1, 1, 1))):
        ended = subprocess.run(
            command(processes, workdir, shape), env=env | {"DEVICES": str(devices)}, capture_output=True, text=True, timeout=SECONDS
        )
        assert ended.returncode == 0, ended.stdout + ended.stderr
        assert ("resuming stage" in ended.stdout) == (workdir == two)
        assert (ended.stdout.count("reinforce 2/2"), "Traceback" in ended.stderr) == (1, False)  # process 1 shows nothing

    subprocess.run([sys.executable, "-c", STATE, two, eight, one], env=env | {"JAX_ENABLE_X64": "1"}, check=True, timeout=SECONDS)
    states = [np.load(folder / "state.npz") for folder in (two, eight, one)]
    for state in states[:2]:
        assert sorted(state) == sorted(states[2])
        for name, expected in states[2].items():
            np.testing.assert_allclose(state[name], expected, rtol=1e-9, atol=1e-9 * np.max(np.abs(expected)), err_msg=name)
    moments = [name for name in states[0] if ".nu[" in name]
    assert len(moments) > 10 and all(np.any(states[0][name] > 0) for name in moments)  # the gradient was one

    for folder in (two, eight):  # a line written by two processes would be there twice
        for name in ("metrics.jsonl", "rollouts.jsonl"):
            assert_close(lines(folder / name), lines(one / name))
    assert {row["reward"]["format"] for row in lines(one / "rollouts.jsonl")} == {0.0, 1.0}
    assert not list(two.rglob("*.tmp")) and not list(two.glob(".*"))
