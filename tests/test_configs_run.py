"""Every shipped config runs two tiny steps, with local folders in place of what it would download."""

from __future__ import annotations

import json
import math

import jax
import pytest

from jaxreason import checking
from jaxreason import config as schema
from jaxreason.cli.progress import QuietProgress
from jaxreason.pipelines import folder as folders
from jaxreason.pipelines import run as runs

# which other tests train as the command does, in a process of its own: in test_commands and test_gsm8k
TRAINED_ELSEWHERE = ("quickstart", "gsm8k_grpo")
FOR_PODS = ("r1_zero_7b", "r1_zero_30b_a3b", "r1_zero_671b", "ppo_deepseekmath_7b")  # half a minute each, and one pipeline


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[pytest.mark.slow] * (name in TRAINED_ELSEWHERE + FOR_PODS)) for name, _ in schema.shipped()],
)
def test_it_runs_two_tiny_steps(name, tmp_path, request):
    config = schema.load(f"{name}:tiny")
    overrides = []
    if config.model.path or "data_dir" in config.task.kwargs:
        data = request.getfixturevalue("shared") / "data"
        folder = data / config.task.name
        if config.task.name == "math":  # its two splits are data sets of their own
            folder = tmp_path / "math"
            folder.mkdir()
            for split, there in (("train", "math_train"), ("test", "math500")):
                (folder / f"{split}.jsonl.gz").symlink_to(data / there / f"{split}.jsonl.gz")
        overrides = [f"--config.model.path={data / 'models' / 'tiny_qwen2'}"]
        overrides += [f"--config.task.kwargs.data_dir={folder}"] * ("data_dir" in config.task.kwargs)
    config = schema.load(f"{name}:tiny", overrides)
    assert config.online.steps == 2 and sum(phase.steps for phase in config.supervised.phases.values()) <= 2

    workdir = tmp_path / "run"
    result = runs.train(config, workdir, progress=QuietProgress(), stop=lambda: False, devices=jax.devices()[:1])
    assert result.finished and set(result.summary) >= {"before", "after", "seconds"}
    logged = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    assert all(math.isfinite(value) for line in logged for value in line.values() if not isinstance(value, str))
    steps = [line["step"] for line in logged if line["stage"] == "reinforce" and "time/step" in line]
    assert steps == [1, 2]
    assert folders.read_config(workdir) == config
    assert (workdir / "policy" / "model.safetensors").is_file()


@pytest.mark.parametrize("name", [name for name, _ in schema.shipped()])
def test_the_real_sizes_fit_together(name):
    """The checks that need neither a model nor data, at the sizes that are shipped."""
    config = schema.load(name)
    checking.check(config, shards=1)
    assert config.online.steps * config.online.problems_per_step * config.online.completions_per_problem > 1000
    assert config.evaluation.accuracy in config.reward
