"""What people copy runs: the examples improve their reward, the figures are drawn, the benchmark compares and reports."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture(scope="module")
def run(one_device: dict[str, str]) -> Callable[..., str]:
    def run(script: str, *arguments: str) -> str:
        environment = os.environ | one_device | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
        command = [sys.executable, str(ROOT / script), *arguments]
        result = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
        assert result.returncode == 0, result.stderr
        return result.stdout

    return run


@pytest.mark.parametrize("name", ["objective_in_your_loop", "objective_in_nnx"])
def test_example_improves_its_reward_and_its_clip_has_work_to_do(run, name):
    out = run(f"examples/{name}.py").splitlines()
    before, after = (float(line.rsplit(" ", 1)[1]) for line in out if line.startswith("reward"))
    assert before < 0.3 < 0.8 < after
    if name == "objective_in_nnx":
        assert 0 < float(out[0].rsplit(" ", 1)[1]) < 0.5


def test_the_table_of_coefficients_drops_the_tokens_behind_the_clip(run):
    rows = [line.split() for line in run("examples/look_at_coefficients.py").splitlines()]
    rows = [row for row in rows if row and row[-1] in ("kept", "dropped", "masked")]
    assert len(rows) == 10
    for _, _, ratio, advantage, coefficient, verdict in rows:
        r, a, c = float(ratio), float(advantage), float(coefficient)
        if verdict == "masked":
            assert (a, c) == (0, 0)
        else:
            wanted = "dropped" if (a > 0 and r > 1.28) or (a < 0 and r < 0.8) else "kept"
            assert verdict == wanted
            assert c == pytest.approx(r * a if verdict == "kept" else 0, abs=0.006)
    assert [row[-1] for row in rows].count("dropped") == 2


def test_the_figures_are_drawn(run, tmp_path):
    run("docs/figures/coefficients.py", "--out", str(tmp_path))
    for name in ("coefficients.png", "kl_pulls.png"):
        content = (tmp_path / name).read_bytes()
        assert content.startswith(PNG) and 10_000 < len(content) < 300_000
        assert (ROOT / "docs" / name).is_file()


@pytest.mark.slow
def test_the_benchmark_compares_and_prints_one_json_line(run):
    sizes = ("--problems", "4", "--group", "2", "--tokens", "64", "--rounds", "1", "--calls", "1")
    (line,) = run("benchmarks/objectives.py", *sizes, "--only", "grpo", "gspo", "ppo").splitlines()
    out = json.loads(line)
    assert out["bench"] == "objectives" and out["clock"] == "cpu"
    cell = {"seconds", "by_hand", "ratio", "temp_mb", "by_hand_temp_mb"}
    assert set(out["grpo"]) == set(out["gspo"]) == {"loss", "loss_with_metrics", "update", "update_with_metrics"}
    assert set(out["ppo"]) == {"loss", "loss_with_metrics"}
    assert all(
        set(measured) == cell and measured["ratio"] > 0 for name in ("grpo", "gspo", "ppo") for measured in out[name].values()
    )
    assert {"prepare_group_zscore", "prepare_gae", "prepare_grpo", "prepare_ppo"} < set(out)
    assert {"jaxreason", "jax", "jaxlib", "numpy", "python"} == set(out["versions"])
    assert out["arguments"]["tokens"] == 64 and {"platform", "device"} < set(out)
