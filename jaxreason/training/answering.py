"""Answers to numbered problems, many of each or one greedily, by the engine and the rules that train.

What a completion samples depends only on (seed, problem's number, child). With fewer slots than completions a slot takes the next
completion when its own has ended.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from jaxreason import sharding
from jaxreason.data.batching import prompt_batch, prompt_limits
from jaxreason.models.decoder import Model
from jaxreason.models.tokenizer import Tokenizer
from jaxreason.rewards import mixture
from jaxreason.rewards.votes import voted
from jaxreason.sampling.rollout import SamplingConfig
from jaxreason.sampling.stops import StopStrings
from jaxreason.tasks.task import Task
from jaxreason.training.collect import Scoring, applying, completions, record, sample_and_score, score_on_host
from jaxreason.types import Problem, Reward

Rows = list[dict[str, Any]]
Answer = Callable[[Any, Sequence[tuple[int, Problem]]], Rows]


def make_answer(
    model: Model,
    scoring: Scoring,
    mesh: Mesh,
    *,
    task: Task,
    tokenizer: Tokenizer,
    sampling: SamplingConfig,
    stop: StopStrings | None,
    size: int,
    samples: int,
    seed: int | None,
) -> Answer:
    """answer(params, numbered problems) -> a record of each of their `samples` completions, at most `size` problems at a time.

    Without a seed greedy: the likeliest token of the run's law.
    """
    ends = {"eos_ids": tokenizer.eos_ids, "pad_id": tokenizer.pad_id, "stop": stop}
    run = partial(sample_and_score, model, scoring, config=sampling, group=samples, **ends)
    if seed is None:
        program = jax.jit(lambda params, prompts, key: run(params, prompts, None), out_shardings=sharding.named(mesh))
    else:
        program = jax.jit(run, out_shardings=sharding.named(mesh))
    key = jax.random.key(seed or 0)
    held, keeper = sharding.held_rows(mesh, size).tolist(), sharding.keepers(mesh, size)

    def answer(params: Any, numbered: Sequence[tuple[int, Problem]]) -> Rows:
        full = [*numbered, *([numbered[-1]] * (size - len(numbered)))]  # one shape, so one compilation
        prompts = prompt_batch([full[row] for row in held], task=task, tokenizer=tokenizer, **prompt_limits(sampling))
        sampled, parts = sharding.fetch(program(params, sharding.place_held(mesh, prompts, size), key))
        groups = completions(sampled, tokenizer, stop=stop)[: len(numbered)]
        kept = keeper[: len(numbered)]
        own = np.flatnonzero(kept == jax.process_index()).tolist()
        problems, traced = [full[row][1] for row in own], {name: values[own] for name, values in parts.items()}
        host = score_on_host(scoring, problems, [groups[row] for row in own], traced=traced, keeper=kept, size=samples)
        parts = {**parts, **host.parts}
        rows: Rows = []
        for p, (number, problem) in enumerate(numbered):
            for child, completion in enumerate(groups[p]):
                values = applying(parts, p, child)
                total = mixture.total(values, scoring.weights, gates=scoring.gates)
                failed = [reason for reason, each in host.failed.items() if each[p, child]]
                row = record(problem, completion, Reward(total, values), voted=voted(completion.text), failed=failed)
                rows.append({"number": number, "child": child, **row})
        return rows

    return answer
