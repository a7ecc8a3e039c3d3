"""The learning test: the shipped quickstart reaches its numbers, and its controls do not."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]
CONTROLS = {
    "format only": "--config.reward.accuracy.weight=0.0",
    "shuffled": "--config.reward.accuracy.shuffle=True",
}


def train(workdir: Path, *overrides: str) -> dict:
    """A run of the quickstart in a process of its own, as a user has it: one device, no strict mode."""
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    environment["PYTHONPATH"] = str(REPOSITORY)
    command = [sys.executable, "-m", "jaxreason", "train", "--config", "quickstart", "--workdir", str(workdir), "--quiet"]
    subprocess.run([*command, *overrides], check=True, env=environment, stdout=subprocess.DEVNULL)
    return json.loads((workdir / "summary.json").read_text())


def held_out(summary: dict, when: str, what: str) -> float:
    return summary[when][f"eval/word_problems/{what}"]


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_accuracy_climbs_and_completions_get_longer(tmp_path: Path, seed: int) -> None:
    summary = train(tmp_path / "run", f"--config.seed={seed}")
    assert held_out(summary, "before", "pass@1") <= 0.25
    assert held_out(summary, "after", "pass@1") >= 0.90
    assert held_out(summary, "after", "length") >= 2 * held_out(summary, "before", "length")
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    gaps = [line["policy/sampler_gap"] for line in lines if "policy/sampler_gap" in line]
    assert len(gaps) == 50 and max(gaps) < 1e-3
    # one update a batch: the policy that learns is the one that sampled
    assert all(line["policy/clip_fraction"] == 0 for line in lines if "policy/clip_fraction" in line)


@pytest.mark.slow
@pytest.mark.parametrize("control", list(CONTROLS))
def test_a_control_does_not_improve(tmp_path: Path, control: str) -> None:
    summary = train(tmp_path / "run", CONTROLS[control])
    # the greedy answers of 256 problems: their share moves by a few hundredths on any change of the weights
    assert held_out(summary, "after", "pass@1") <= held_out(summary, "before", "pass@1") + 0.05
    assert held_out(summary, "after", "pass@1") <= 0.25
