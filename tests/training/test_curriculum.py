"""A run with a curriculum: it learns what it measured, ends the same after any stop, and mistakes are told first."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from jaxreason import config as configs
from jaxreason.pipelines import run as runs
from jaxreason.training.metrics import read_jsonl

pytestmark = pytest.mark.usefixtures("compiled_once")
CONFIG = Path(__file__).parents[1] / "short_run.py"
SHORT = (
    "--config.supervised.phases.base.steps=0",
    "--config.supervised.phases.cold_start.steps=0",
    "--config.evaluation.every_steps=0",
    "--config.online.logged_problems=4",
    "--config.evaluation.accuracy=ended",  # a policy at random ends now and then, and answers never
    "--config.online.curriculum.tries=4",
    "--config.online.curriculum.pool=6",
)
KINDS = {
    "prioritised": ("--config.online.curriculum.order=prioritised",),
    "easy first": ("--config.online.curriculum.order=easy_first",),
    "filtered": ("--config.online.curriculum.highest=0.05", "--config.online.curriculum.pool=12"),
}


class Quiet:
    def stage(self, name: str, total_steps: int, done_steps: int) -> None: ...

    def update(self, step: int, metrics: Any) -> None: ...

    def message(self, text: str) -> None: ...

    def close(self) -> None: ...


def train(workdir: Path, *options: str, checks: int | None = None) -> list[dict[str, Any]]:
    """Trains until the run has asked `checks` times whether to stop; what it logged, without clocks."""
    asked = 0

    def stop() -> bool:
        nonlocal asked
        asked += 1
        return checks is not None and asked >= checks

    config = configs.load(str(CONFIG), [*SHORT, *options])
    runs.train(config, workdir, progress=Quiet(), stop=stop, devices=jax.devices()[:1])
    lines = read_jsonl(workdir / "metrics.jsonl")
    return [{k: v for k, v in line.items() if not k.startswith(("time/", "throughput/"))} for line in lines]


def told(workdir: Path) -> dict[str, Any]:
    """What the last checkpoint says of the curriculum, read by orbax alone."""
    folder = workdir / "checkpoints" / "reinforce"
    step = max(int(path.name) for path in folder.iterdir() if path.name.isdigit())
    return json.loads((folder / str(step) / "host" / "metadata").read_text())["extra"]["curriculum"]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["prioritised", "filtered", "easy first"])
def test_a_stopped_run_ends_as_the_undisturbed_one(kind: str, tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    expected = train(whole, *KINDS[kind])
    train(parts, *KINDS[kind], checks=5)  # stopped in the middle, and then to the end
    assert 0 < sum(told(parts)["tried"]) < 6 * 16
    assert train(parts, *KINDS[kind]) == expected
    for name in ("rollouts.jsonl", "examples.json", "config.json", "policy/model.safetensors"):
        assert (parts / name).read_bytes() == (whole / name).read_bytes(), name
    assert told(parts) == told(whole)

    # what is written down adds up: each problem's completions, and how many of them ended
    rows = read_jsonl(whole / "rollouts.jsonl")
    tried, ended = Counter(row["problem_id"] for row in rows), Counter[str]()
    for row in rows:
        ended[row["problem_id"]] += row["reward"]["ended"]
    counts = told(whole)
    assert sum(counts["tried"]) == len(rows) == 6 * 16
    for number, (count, solved) in enumerate(zip(counts["tried"], counts["solved"], strict=True)):
        assert (tried[f"train/{number}"], ended[f"train/{number}"]) == (count, pytest.approx(solved))
    last = [line for line in expected if "curriculum/tried" in line][-1]
    rates = np.asarray(counts["solved"])[np.asarray(counts["tried"]) > 0] / np.asarray([n for n in counts["tried"] if n])
    assert last["curriculum/pass_rate"] == pytest.approx(rates.mean())
    assert last["curriculum/tried"] == len(rates)
    if kind == "filtered":
        assert last["curriculum/too_easy"] == (rates > 0.05).sum() > 0


@pytest.mark.slow
def test_without_one_nothing_changes(tmp_path: Path) -> None:
    lines = train(tmp_path / "off", "--config.online.steps=2")
    assert not [name for line in lines for name in line if name.startswith("curriculum")]
    rows = read_jsonl(tmp_path / "off" / "rollouts.jsonl")
    assert list(dict.fromkeys(row["problem_id"] for row in rows)) == [f"train/{number}" for number in range(8)]


MISTAKES = [
    (("order=hardest",), r"config\.online\.curriculum\.order is 'hardest': expected 'easy_first'"),
    (("lowest=0.9", "highest=0.1"), r"config\.online\.curriculum\.lowest is 0\.9 and highest is 0\.1"),
    (
        ("order=prioritised", "pool=0"),
        r"config\.online\.curriculum\.pool is 0, and task 'word_problems' makes problems without end",
    ),
    (("tries=0",), r"config\.online\.curriculum\.tries is 0: expected 1 or more"),
]


@pytest.mark.parametrize(("settings", "said"), MISTAKES)
def test_a_mistake_is_told_before_anything_is_trained(settings: tuple[str, ...], said: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=said) as error:
        train(tmp_path, *(f"--config.online.curriculum.{each}" for each in settings))
    assert "\n" not in str(error.value)
    assert not (tmp_path / "checkpoints").exists()


def test_parked_problems_have_no_pass_rate(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"step_tokens is 8 and config\.online\.curriculum is on"):
        train(tmp_path, *KINDS["prioritised"], "--config.sampling.parking.step_tokens=8")
