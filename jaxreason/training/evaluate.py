"""Greedy pass@1 on held-out problems, by the same rules that train."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from jax.sharding import Mesh

from jaxreason.models.decoder import Model
from jaxreason.models.tokenizer import Tokenizer
from jaxreason.rewards.pool_messages import FAILURES
from jaxreason.sampling.rollout import SamplingConfig
from jaxreason.sampling.stops import StopStrings
from jaxreason.tasks.task import Task
from jaxreason.training.answering import Rows, make_answer
from jaxreason.training.collect import Scoring


@dataclass(frozen=True)
class EvaluationConfig:
    """When held-out problems are answered, and how many at once."""

    every_steps: int = 10  # of reinforcement; 0: only before and after it
    problems_per_batch: int = 64
    accuracy: str = "accuracy"  # the part of the reward that is 1 where a completion is right: pass@1


Evaluate = Callable[[Any], tuple[dict[str, float], Rows]]


def make_evaluate(
    model: Model,
    scoring: Scoring,
    mesh: Mesh,
    *,
    task: Task,
    tokenizer: Tokenizer,
    sampling: SamplingConfig,
    config: EvaluationConfig,
    stop: StopStrings | None = None,
) -> Evaluate:
    """evaluate(params) -> (metrics, a record of each greedy completion), over the task's held-out problems.

    Greedy is the likeliest token of the run's law, and completions end where they do in training.
    """
    numbered, size = list(enumerate(task.heldout)), config.problems_per_batch
    told = {"task": task, "tokenizer": tokenizer, "sampling": sampling, "stop": stop}
    answer = make_answer(model, scoring, mesh, **told, size=size, samples=1, seed=None)

    def evaluate(params: Any) -> tuple[dict[str, float], Rows]:
        rows = [row for start in range(0, len(numbered), size) for row in answer(params, numbered[start : start + size])]
        metrics = summarise(task.name, rows, accuracy=config.accuracy)
        for label in task.parts:
            own = [row for row in rows if task.heldout[row["number"]].task == label]
            metrics |= summarise(f"{task.name}/{label}", own, accuracy=config.accuracy)
        for reason in FAILURES if scoring.host or scoring.group else ():
            metrics[f"eval/{task.name}/failed/{reason}"] = float(np.mean([reason in row["failed"] for row in rows]))
        return metrics, rows

    return evaluate


def summarise(task_name: str, rows: Rows, *, accuracy: str) -> dict[str, float]:
    """Means over the records, under the names of the metrics; of a part over those to which it applies, left out without any.

    A completion is right where its accuracy is 1, as in `training.results`.
    """
    values = {
        "pass@1": [None if row["reward"][accuracy] is None else row["reward"][accuracy] >= 1 for row in rows],
        "length": [row["length"] for row in rows],
        "truncated": [row["stop"] == "length" for row in rows],
        **{name: [row["reward"][name] for row in rows] for name in rows[0]["reward"] if name not in ("total", accuracy)},
    }
    known = {name: [each for each in those if each is not None] for name, those in values.items()}
    return {f"eval/{task_name}/{name}": float(np.mean(those)) for name, those in known.items() if those}
