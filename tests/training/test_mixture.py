"""A whole run whose reward is a mixture: what its files say of every completion and step is computed again from the parts."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from jaxreason import config as configs
from jaxreason.pipelines import run as runs
from jaxreason.rewards import mixture
from jaxreason.training.metrics import read_jsonl

CONFIG = Path(__file__).parents[1] / "short_run.py"
FILE = f"""
import importlib.util
from ml_collections import ConfigDict
from jaxreason import config as schema

def get_config(arg=None):
    spec = importlib.util.spec_from_file_location("short_run", {str(CONFIG)!r})
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    with module.get_config().unlocked() as config:
        short, long = ({{"task": "word_problems", "max_changes": most, "heldout_size": size}} for most, size in ((2, 4), (3, 2)))
        config.task.name, config.task.kwargs = "mixture", ConfigDict({{"tasks": {{"short": short, "long": long}}}})
        config.reward.accuracy = schema.part("task", kwargs={{"short": "math.gsm8k_answer", "long": "math.gsm8k_answer"}})
        own = {{"short": "math.gsm8k_answer", "long": "repetition.repeated_ngrams"}}
        config.reward.own = schema.part("task", weight=0.0, kwargs=own)
        config.reward.ended = schema.part("traced.think_answer_format", weight=0.5, kwargs={{"pattern": r"[\\s\\S]*"}})
        config.reward.chinese = schema.part("language.language_consistency", weight=-1.0, kwargs={{"language": "zh"}})
        config.reward.english = schema.part("language.language_consistency", gate="ended", kwargs={{"language": "en"}})
        config.reward.repeated = schema.part("repetition.repeated_ngrams", weight=-0.5, normalise=True, kwargs={{"n": 1}})
        config.reward.brevity = schema.part("length.kimi_length", weight=0.1, kwargs={{"correct": "ended"}})
        config.reward.reflection = schema.part("reflection.reflection_words", weight=0.0)
        config.sampling.max_completion_tokens = 8
        config.online.steps, config.online.logged_problems, config.evaluation.every_steps = 2, 4, 1
        config.supervised.phases.base.steps = config.supervised.phases.cold_start.steps = 0
    return schema.finish(config, arg)
"""


class Quiet:
    def stage(self, name: str, total_steps: int, done_steps: int) -> None: ...
    def update(self, step: int, metrics: Any) -> None: ...
    def message(self, text: str) -> None: ...
    def close(self) -> None: ...


@pytest.mark.usefixtures("compiled_once")
def test_every_total_and_every_mean_is_the_parts(tmp_path: Path) -> None:
    file = tmp_path / "mixed.py"
    file.write_text(FILE)
    config = configs.load(str(file))
    result = runs.train(config, tmp_path / "run", progress=Quiet(), stop=lambda: False, devices=jax.devices()[:1])
    assert result.finished
    weights = {name: part.weight for name, part in config.reward.items()}
    lines = [line for line in read_jsonl(tmp_path / "run" / "metrics.jsonl") if "reward/total" in line]
    rows = read_jsonl(tmp_path / "run" / "rollouts.jsonl")
    assert [line["step"] for line in lines] == [1, 2] and len(rows) == 2 * 4 * 4
    without = 0
    for line in lines:
        step = [row for row in rows if row["step"] == line["step"]]
        for begin in range(0, 16, 4):
            group = [dict(row["reward"]) for row in step[begin : begin + 4]]
            told = [parts.pop("total") for parts in group]
            expected = mixture.totals(group, weights, gates={"english": "ended"}, normalised=frozenset({"repeated"}))
            np.testing.assert_allclose(told, expected, atol=1e-5)
        for name in weights:
            known = [row["reward"][name] for row in step if row["reward"][name] is not None]
            without += 16 - len(known)
            assert line.get(f"rollout/none/{name}", 0) == 1 - len(known) / 16
            assert (f"reward/{name}" in line) == bool(known)
            if known:
                assert math.isclose(line[f"reward/{name}"], np.mean(known), abs_tol=1e-6)
    assert without, "the case that the test is about did not come up"
    assert any(row["reward"]["ended"] != rows[0]["reward"]["ended"] for row in rows)
    evaluated = [line for line in read_jsonl(tmp_path / "run" / "metrics.jsonl") if "eval/mixture/pass@1" in line]
    assert len(evaluated) == 3
    differ = 0
    for line in evaluated:
        for name in ("pass@1", "length", "own"):  # of 4 problems of the one task and 2 of the other
            whole, short, long = (line[f"eval/{of}/{name}"] for of in ("mixture", "mixture/short", "mixture/long"))
            assert math.isclose(whole, (4 * short + 2 * long) / 6, abs_tol=1e-6)
            differ += short != long
    assert differ, "the case that the test is about did not come up"
