"""A profiler trace of chosen steps: the files are there, the steps are those asked for, and the run's numbers are unmoved."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from jaxreason import config as configs
from jaxreason.pipelines import run as runs
from jaxreason.training.metrics import read_jsonl
from jaxreason.training.profiling import ProfileConfig, steps_of, tracing

CONFIG = str(Path(__file__).parents[1] / "short_run.py")
OPTIONS = (
    "--config.supervised.phases.base.steps=0",
    "--config.supervised.phases.cold_start.steps=0",
    "--config.evaluation.every_steps=0",
    "--config.online.steps=4",
)


class Recorder:
    """A progress that keeps what it is told."""

    def __init__(self) -> None:
        self.messages: list[str] = []

    def stage(self, name: str, total_steps: int, done_steps: int) -> None: ...
    def update(self, step: int, metrics: Any) -> None: ...
    def close(self) -> None: ...

    def message(self, text: str) -> None:
        self.messages.append(text)


def train(workdir: Path, steps: str, *, checks: int = 1000) -> list[str]:
    """What is said in a run on one device, which is stopped when it has asked so often whether to."""
    asked, told = iter(range(1, 1001)), Recorder()
    config = configs.load(CONFIG, [*OPTIONS, f"--config.profile.steps={steps}"])
    runs.train(config, workdir, progress=told, stop=lambda: next(asked) >= checks, devices=jax.devices()[:1])
    return told.messages


def logged(workdir: Path) -> list[dict[str, Any]]:
    lines = read_jsonl(workdir / "metrics.jsonl")
    return [{k: v for k, v in line.items() if not k.startswith(("time/", "throughput/"))} for line in lines]


def traces(workdir: Path) -> list[Path]:
    return sorted((workdir / "profile").rglob("*.trace.json.gz"))


def names_in(trace: Path) -> str:
    return " ".join(event.get("name", "") for event in json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"])


@pytest.mark.usefixtures("compiled_once")
def test_chosen_steps_are_traced_and_nothing_else_changes(tmp_path: Path) -> None:
    """Stopped in the midst of them, and resumed: two traces, of the steps before and after."""
    plain, profiled = tmp_path / "plain", tmp_path / "profiled"
    train(plain, "")
    assert not (plain / "profile").exists()
    train(profiled, "2-3", checks=1 + 2)
    assert len(traces(profiled)) == 1
    train(profiled, "2-3")
    assert logged(profiled) == logged(plain) and len(logged(plain)) == 6
    for name in ("rollouts.jsonl", "policy/model.safetensors"):
        assert (profiled / name).read_bytes() == (plain / name).read_bytes(), name
    assert len(list((profiled / "profile").rglob("*.xplane.pb"))) == len(traces(profiled)) == 2
    assert all("fused" in name for name in map(names_in, traces(profiled)))


@pytest.mark.slow
def test_a_profile_of_steps_that_are_done_is_told(tmp_path: Path) -> None:
    train(tmp_path, "", checks=1 + 3)
    assert "nothing is profiled: config.profile.steps = 2-3 are done" in train(tmp_path, "2-3")
    assert not traces(tmp_path)


def test_which_steps_are_in_the_trace_and_a_failure_ends_it(tmp_path: Path) -> None:
    def named(step: int) -> Any:
        def program(x: jax.Array) -> jax.Array:
            return x + 1

        program.__name__ = f"number_{step}"
        return jax.jit(program)

    programs, x = [named(step) for step in range(6)], jnp.zeros(8)
    for program in programs:
        program(x)
    with pytest.raises(RuntimeError, match="in the step"), tracing(range(2, 4), tmp_path / "whole") as trace:
        for step in range(1, 6):
            trace(step, x)
            x = programs[step](x)
        raise RuntimeError("in the step")
    with pytest.raises(RuntimeError, match="in the step"), tracing(range(2, 4), tmp_path / "failed") as trace:
        for step in (1, 2):
            trace(step, x)
            x = programs[step](x)
        raise RuntimeError("in the step")
    for folder, expected in (("whole", "23"), ("failed", "2")):
        (file,) = (tmp_path / folder).rglob("*.trace.json.gz")
        assert "".join(str(i) for i in range(6) if f"number_{i}" in names_in(file)) == expected


def test_which_steps() -> None:
    assert list(steps_of(ProfileConfig("3-5"), last=5)) == [3, 4, 5]
    assert list(steps_of(ProfileConfig("3"), last=5)) == [3] and not steps_of(ProfileConfig(), last=0)
    for wrong in ("3-", "a", "-3", "3-5-7", "1.5", " 3"):
        with pytest.raises(ValueError, match=f"config.profile.steps is '{wrong}': expected a step such as '3'"):
            steps_of(ProfileConfig(wrong), last=9)
    for outside in ("0", "0-2", "4-6", "6", "3-2"):
        with pytest.raises(ValueError, match=f"config.profile.steps is '{outside}', and config.online.steps is 5: expected"):
            steps_of(ProfileConfig(outside), last=5)
