"""Compiled programs are kept beside a run's folder, and a second start of the same config compiles nothing anew."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.slow
OPTIONS = ("supervised.phases.base.steps=0", "supervised.phases.cold_start.steps=0", "online.steps=1", "evaluation.every_steps=0")


def start(workdir: Path, environment: dict[str, str]) -> None:
    words = ["train", "--config", str(ROOT / "tests" / "short_run.py"), "--workdir", str(workdir), "--quiet"]
    command = [sys.executable, "-m", "jaxreason", *words, *(f"--config.{each}" for each in OPTIONS)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr and "Warning" not in done.stderr, done.stderr


def programs(folder: Path) -> dict[str, int]:
    """Each kept program, and when it was written."""
    return {file.name: file.stat().st_mtime_ns for file in folder.iterdir() if not file.name.endswith("-atime")}


@pytest.fixture
def environment(one_device: dict[str, str]) -> dict[str, str]:
    env = os.environ | one_device | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    del env["JAX_COMPILATION_CACHE_DIR"]
    return env


def test_a_second_start_compiles_nothing_anew(environment: dict[str, str], tmp_path: Path) -> None:
    start(tmp_path / "runs" / "first", environment)
    kept = programs(tmp_path / "runs" / ".jax_cache")
    assert any(name.startswith("jit_fused-") for name in kept) and len(kept) > 3
    start(tmp_path / "runs" / "second", environment)
    assert programs(tmp_path / "runs" / ".jax_cache") == kept


def test_another_folder_or_none(environment: dict[str, str], tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    start(tmp_path / "named" / "run", environment | {"JAX_COMPILATION_CACHE_DIR": str(elsewhere)})
    assert programs(elsewhere) and not (tmp_path / "named" / ".jax_cache").exists()
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / ".jax_cache").write_text("a file, so that no folder can be made here")
    start(tmp_path / "taken" / "run", environment)
