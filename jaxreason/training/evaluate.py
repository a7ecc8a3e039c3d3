"""Greedy pass@1 on held-out problems, by the same rules that train."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from jaxreason import sharding
from jaxreason.data.batching import prompt_batch, prompt_limits
from jaxreason.models.decoder import Model
from jaxreason.models.tokenizer import Tokenizer
from jaxreason.sampling.rollout import SamplingConfig
from jaxreason.sampling.stops import StopStrings
from jaxreason.tasks.task import Task
from jaxreason.training.collect import Scoring, completions, placer, record, sample_and_score, score_on_host
from jaxreason.types import Reward


@dataclass(frozen=True)
class EvaluationConfig:
    """When held-out problems are answered, and how many at once."""

    every_steps: int = 10  # of reinforcement; 0: only before and after it
    problems_per_batch: int = 64
    accuracy: str = "accuracy"  # the part of the reward that is pass@1


Rows = list[dict[str, Any]]
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
    problems = task.heldout
    size = config.problems_per_batch
    ends = {"eos_ids": tokenizer.eos_ids, "pad_id": tokenizer.pad_id, "stop": stop}
    run = partial(sample_and_score, model, scoring, config=sampling, group=1, **ends)
    everywhere = sharding.named(mesh)
    greedy = jax.jit(lambda params, prompts: run(params, prompts, None), out_shardings=everywhere)
    place = placer(mesh)

    def evaluate(params: Any) -> tuple[dict[str, float], Rows]:
        rows: Rows = []
        for start in range(0, len(problems), size):
            part = list(problems[start : start + size])
            full = [*part, *([part[-1]] * (size - len(part)))]  # one shape, so one compilation
            prompts = prompt_batch(list(enumerate(full)), task=task, tokenizer=tokenizer, **prompt_limits(sampling))
            sampled, parts = sharding.fetch(greedy(params, place(prompts)))
            groups = completions(sampled, tokenizer, stop=stop)
            parts = {**parts, **score_on_host(scoring, full, groups)}
            for i, problem in enumerate(part):
                values = {name: float(part_values[i, 0]) for name, part_values in parts.items()}
                total = sum(scoring.weights[name] * value for name, value in values.items())
                rows.append(record(problem, groups[i][0], Reward(total, values)))
        return summarise(task.name, rows, accuracy=config.accuracy), rows

    return evaluate


def summarise(task_name: str, rows: Rows, *, accuracy: str) -> dict[str, float]:
    """Means over the records, under the names of the metrics."""

    def mean(values: Sequence[Any]) -> float:
        return float(np.mean(np.asarray(values, np.float64))) if len(values) else 0.0

    def rewards(row: Mapping[str, Any]) -> Mapping[str, float]:
        return row["reward"]

    metrics = {
        f"eval/{task_name}/pass@1": mean([rewards(row)[accuracy] for row in rows]),
        f"eval/{task_name}/length": mean([row["length"] for row in rows]),
        f"eval/{task_name}/truncated": mean([row["stop"] == "length" for row in rows]),
    }
    for name in rows[0]["reward"] if rows else ():
        if name not in ("total", accuracy):
            metrics[f"eval/{task_name}/{name}"] = mean([rewards(row)[name] for row in rows])
    return metrics
