"""CPU seconds of each traced rule, compiled alone at the quickstart's shapes, against its training step. One JSON line a rule.

    XLA_FLAGS=--xla_cpu_multi_thread_eigen=false OMP_NUM_THREADS=1 taskset -c 0 python benchmarks/traced_rules.py

The step is the quickstart's whole program (sample, score, reference, update) from random weights, whose completions mostly have
their full length; the completions that the rules read are the task's demonstrations with an expression for an answer. `--tokens`
and `--vocabulary` make the rules' completions longer and their vocabulary larger (with made-up tokens); the step stays as it is.
CPU seconds, being of one thread, change little on a busy machine; the share is of medians in one process.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxreason import config as configs
from jaxreason import sharding
from jaxreason.batch import PromptBatch
from jaxreason.compiling import compiled
from jaxreason.data.batching import prompt_batch, prompt_limits, references
from jaxreason.pipelines import experiment as experiments
from jaxreason.rewards import traced
from jaxreason.training import online
from jaxreason.training import state as states
from jaxreason.training.optimizer import make_optimizer
from jaxreason.types import Problem

RULES: dict[str, dict[str, Any]] = {
    "think_answer_format": {},
    "matches": {"pattern": r"[\s\S]*<answer>[\s\S]*"},
    "integer_answer": {},
    "numeric_answer": {},
    "countdown": {},
    "soft_overlong": {"max_completion_tokens": 32, "cache_tokens": 8},
    "cosine_length": {"max_completion_tokens": 32},
    "repeated_ngrams": {"n": 3},
}


def cpu_seconds(function: Callable[[], Any], *, calls: int, repeats: int) -> float:
    """The median over `repeats` of the CPU seconds a call, every call waited for."""
    measured = []
    for _ in range(repeats + 1):  # the first warms up
        begun = time.process_time()
        for _ in range(calls):
            jax.block_until_ready(function())
        measured.append((time.process_time() - begun) / calls)
    return statistics.median(measured[1:])


def step_seconds(experiment: experiments.Experiment, *, repeats: int) -> float:
    """The quickstart's step, with its own two rules."""
    e, config = experiment, experiment.config
    optimizer = make_optimizer(config.online.optimizer, steps=config.online.steps)
    params = experiments.initial_params(e)
    step = online.make_step(
        e.model, e.algorithm, optimizer, e.scoring, e.mesh, config=config.online, sampling=config.sampling,
        eos_ids=e.tokenizer.eos_ids, pad_id=e.tokenizer.pad_id, seed=config.seed,
    )  # fmt: skip
    reference = jax.tree.map(jnp.copy, params)
    state = states.create(e.model, optimizer, e.mesh, params)
    stream, count = experiments.training_stream(e)[0], config.online.problems_per_step
    limits = prompt_limits(config.sampling)
    program, numbers = None, itertools.count()

    def one() -> Any:
        nonlocal state, program
        number = next(numbers)
        batch = prompt_batch(stream(number * count, count), task=e.task, tokenizer=e.tokenizer, **limits)
        prompts = sharding.place(e.mesh, batch, ("problems",))
        args = state, reference, prompts, sharding.place(e.mesh, np.asarray(number, np.int32), ())
        program = program or compiled(step.fused, *args)
        state, metrics, _ = program(*args)
        return metrics

    return cpu_seconds(one, calls=2, repeats=repeats)


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--tokens", type=int, default=32)
    p.add_argument("--vocabulary", type=int, default=64)
    p.add_argument("--repeats", type=int, default=7)
    a = p.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        experiment = experiments.build(configs.load("quickstart"), Path(folder))
        problems, group = experiment.config.online.problems_per_step, experiment.config.online.completions_per_problem
        per_step = step_seconds(experiment, repeats=a.repeats)

    told = [Problem(str(p), "", "24", metadata={"numbers": (3, 8, 3, 8), "target": 24}) for p in range(problems)]
    prompt = jnp.zeros((problems, 1), jnp.int32)
    prompts = PromptBatch(prompt, prompt == 0, jnp.arange(problems, dtype=jnp.uint32), **references(told))
    text = experiment.task.demonstrations["worked"](0).completion.replace("</answer>", "+3*8-3</answer>")
    (tokens,) = experiment.tokenizer.encode_completions([text])
    row = np.full(a.tokens, experiment.tokenizer.pad_id, np.int32)
    row[: len(tokens)] = tokens[: a.tokens]
    completion = jnp.asarray(np.tile(row, (problems, group, 1)))
    mask = jnp.asarray(np.tile(np.arange(a.tokens) < len(tokens), (problems, group, 1)))
    vocabulary = experiment.tokenizer.vocabulary(64)
    vocabulary += [f"w{token}".encode() for token in range(a.vocabulary - len(vocabulary))]
    for name, kwargs in RULES.items():
        begun = time.process_time()
        rule = jax.jit(getattr(traced, name)(vocabulary, experiment.tokenizer.eos_ids, **kwargs))
        lifting = time.process_time() - begun
        cpu = cpu_seconds(lambda rule=rule: rule(prompts, completion, mask), calls=10, repeats=a.repeats)
        shape = {"completions": problems * group, "tokens": a.tokens, "vocabulary": len(vocabulary)}
        out = {"bench": "traced_rules", "rule": name, **shape, "rule_cpu_ms": 1e3 * cpu, "step_cpu_ms": 1e3 * per_step}
        print(json.dumps({**out, "percent_of_step": 100 * cpu / per_step, "lift_cpu_s": lifting, "jax": jax.__version__}))


if __name__ == "__main__":
    main()
