"""A loss or a reward that is no number stops the run at its step, and what was saved before is still good."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import pytest

from jaxreason import config as configs
from jaxreason.pipelines import experiment as experiments
from jaxreason.pipelines import run as runs
from jaxreason.training.collect import Scoring
from jaxreason.training.metrics import NonFiniteError, RunLog, read_jsonl
from jaxreason.types import Completion, Problem, Reward

ROOT = Path(__file__).parents[2]
CONFIG = str(ROOT / "tests" / "short_run.py")


def saved(workdir: Path, stage: str) -> list[str]:
    return sorted(path.name for path in (workdir / "checkpoints" / stage).iterdir())


@pytest.mark.slow
def test_a_loss_that_diverged_ends_the_command_with_3(one_device: dict[str, str], tmp_path: Path) -> None:
    """A learning rate of 1e15: the first step's loss is a number, the second's is none. Twice, as it is resumed alike."""
    options = ["--config.supervised.optimizer.learning_rate=1e15", "--config.checkpoint.every_steps=1", "--config.online.steps=0"]
    words = ["train", "--config", CONFIG, "--workdir", str(tmp_path / "run"), *options]
    environment = os.environ | one_device | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    for attempt in range(2):
        done = subprocess.run([sys.executable, "-m", "jaxreason", *words], env=environment, capture_output=True, text=True)
        assert done.returncode == 3, done.stdout + done.stderr
        sentences = [line for line in done.stderr.splitlines() if line.startswith("jaxreason: ")]
        assert len(sentences) == 1 and "Traceback" not in done.stderr + done.stdout
        assert "is nan at step 2 of stage 'supervised'" in sentences[0] and "last good checkpoint is untouched" in sentences[0]
        assert saved(tmp_path / "run", "supervised") == ["1", "1.manifest.json"]
        assert ("resuming stage 'supervised' from step 1" in done.stdout) == (attempt == 1)
    assert [(line["stage"], line["step"]) for line in read_jsonl(tmp_path / "run" / "metrics.jsonl")] == [("supervised", 1)]


class Silent:
    """A progress that shows nothing."""

    def stage(self, name: str, total_steps: int, done_steps: int) -> None: ...
    def update(self, step: int, metrics: Any) -> None: ...
    def message(self, text: str) -> None: ...
    def close(self) -> None: ...


def reinforce(experiment: experiments.Experiment, workdir: Path, *, broken_at: int | None) -> Any:
    """The reinforcement stage with a rule on the host, which gives one NaN in this step."""
    online = experiment.config.online
    per_step = online.problems_per_step * online.completions_per_problem
    workdir.mkdir(exist_ok=True)
    calls = runs_done(workdir) * per_step

    def rule(problem: Problem, completion: Completion) -> Reward:
        nonlocal calls
        calls += 1
        broken = broken_at is not None and calls == broken_at * per_step
        return Reward(math.nan if broken else float(len(completion.tokens) % 3), {})

    scoring = Scoring(traced={}, host={"accuracy": rule}, weights={"accuracy": 1.0}, shuffled=frozenset())
    return runs._online(
        experiment._replace(scoring=scoring),
        experiments.initial_params(experiment),
        workdir,
        stream=experiments.training_stream(experiment)[0],
        overlong=experiments.Overlong(),
        evaluate=lambda params: ({}, []),
        log=RunLog(workdir),
        progress=Silent(),
        stop=lambda: False,
    )


def runs_done(workdir: Path) -> int:
    """The newest checkpoint's step."""
    names = saved(workdir, "reinforce") if (workdir / "checkpoints").exists() else []
    return max((int(name) for name in names if name.isdigit()), default=0)


@pytest.mark.slow
@pytest.mark.usefixtures("compiled_once")
def test_a_reward_that_is_none_stops_before_its_step_is_saved(tmp_path: Path) -> None:
    options = ["--config.supervised.phases.base.steps=0", "--config.supervised.phases.cold_start.steps=0"]
    options += ["--config.checkpoint.every_steps=1", "--config.evaluation.every_steps=0", "--config.online.steps=5"]
    config = configs.load(CONFIG, options)
    experiment = experiments.build(config, tmp_path / "model", devices=jax.devices()[:1])
    undisturbed, stopped = tmp_path / "undisturbed", tmp_path / "stopped"
    expected = reinforce(experiment, undisturbed, broken_at=None)

    with pytest.raises(
        NonFiniteError, match=r"reward/accuracy is inf at step 4 of stage 'reinforce': nothing of this step was saved"
    ):
        reinforce(experiment, stopped, broken_at=4)
    assert saved(stopped, "reinforce") == ["2", "2.manifest.json", "3", "3.manifest.json"]
    assert [line["step"] for line in read_jsonl(stopped / "metrics.jsonl")] == [1, 2, 3]

    resumed = reinforce(experiment, stopped, broken_at=None)
    for ours, theirs in zip(jax.tree.leaves(resumed.state), jax.tree.leaves(expected.state), strict=True):
        assert jax.device_get(ours).tobytes() == jax.device_get(theirs).tobytes()
    assert (stopped / "rollouts.jsonl").read_bytes() == (undisturbed / "rollouts.jsonl").read_bytes()
