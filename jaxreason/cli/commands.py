"""The commands. Each takes the parsed arguments and returns an exit code; only this package prints."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
from rich.console import Console

from jaxreason import config as schema
from jaxreason import sharding
from jaxreason.cli.main import DONE, INTERRUPTED
from jaxreason.cli.progress import before_after_table, make_progress, side_by_side
from jaxreason.data.batching import prompt_batch
from jaxreason.models import huggingface
from jaxreason.pipelines import run as runs
from jaxreason.training.collect import completions, placer, record, sample_and_score, score_on_host
from jaxreason.training.report import write_report
from jaxreason.types import Problem, Reward


def train(given: argparse.Namespace) -> int:
    config = schema.load(given.config, given.overrides)
    _join(given)
    _choose_precision(config)
    _cache_compilations()
    console, main = Console(soft_wrap=not sys.stdout.isatty()), jax.process_index() == 0
    runs.open_folder(config, given.workdir)
    ended = runs.finished(given.workdir)
    if ended is not None:
        if main:
            _show(console, ended)
            console.print(
                f"This run has ended: see {given.workdir / 'report.html'}, or give another --workdir.", highlight=False
            )
        return DONE
    progress = make_progress(sys.stdout, quiet=given.quiet or not main)
    try:
        with _stop_on_signals(progress.message) as stop:
            result = runs.train(config, given.workdir, progress=progress, stop=stop)
    finally:
        progress.close()
    if not result.finished:
        if main:
            again = " ".join(
                ["jaxreason train --config", given.config, "--workdir", str(given.workdir), *given.overrides]
            )
            console.print(f"Interrupted and saved. To go on: {again}", highlight=False, markup=False)
        return INTERRUPTED
    if main:
        report = write_report(given.workdir)
        _show(console, result)
        console.print(f"Report: {report}   policy: {given.workdir / 'policy'}", highlight=False, markup=False)
    return DONE


def _show(console: Console, result: runs.Result) -> None:
    console.print(before_after_table(result.summary))
    console.print(side_by_side(result.examples))


def _join(given: argparse.Namespace) -> None:
    """Joins the other processes of the run, before the first use of a device."""
    explicit = (given.coordinator, given.processes, given.process)
    if any(value is not None for value in explicit):
        if any(value is None for value in explicit):
            raise ValueError(
                "--coordinator, --processes and --process go together: give all three, or --distributed alone"
            )
        jax.distributed.initialize(given.coordinator, given.processes, given.process)
    elif given.distributed:
        jax.distributed.initialize()


def _choose_precision(config: schema.Config) -> None:
    if config.model.numerics.param_dtype == "float64":
        jax.config.update("jax_enable_x64", True)


def _cache_compilations() -> None:
    """Keeps compiled programs for the next start, in JAX_COMPILATION_CACHE_DIR or the user's cache folder."""
    if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        jax.config.update("jax_compilation_cache_dir", str(home / "jaxreason" / "xla"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


@contextmanager
def _stop_on_signals(say: Callable[[str], None]) -> Iterator[Callable[[], bool]]:
    """Ctrl-C and SIGTERM let the step finish and be saved; a second one ends the process at once."""
    asked = False

    def ask(number: int, frame: Any) -> None:
        nonlocal asked
        if asked:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        asked = True
        say(f"{signal.Signals(number).name}: finishing this step and saving; once more to stop at once")

    def stop() -> bool:
        if jax.process_count() == 1:
            return asked
        import numpy as np
        from jax.experimental import multihost_utils

        # all processes must leave after the same step, whichever was signalled
        return bool(np.any(multihost_utils.process_allgather(np.asarray(asked))))

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _open(run: Path) -> tuple[runs.Experiment, Any, str]:
    """The experiment of a run's folder on this machine's devices, with its newest weights."""
    config = runs.read_config(run)
    _choose_precision(config)
    _cache_compilations()
    experiment = runs.build(config, run)
    params, source = runs.latest_params(experiment, run)
    return experiment, params, source


def evaluate(given: argparse.Namespace) -> int:
    experiment, params, source = _open(given.run)
    metrics, _ = runs.evaluator(experiment)(params)
    console = Console(soft_wrap=True)
    console.print(f"{source}; {len(experiment.task.heldout)} held-out problems, greedy", highlight=False)
    for name, value in metrics.items():
        console.print(f"{name} = {value:.4f}", highlight=False)
    return DONE


def sample(given: argparse.Namespace) -> int:
    if given.n < 1:
        raise ValueError(f"--n is {given.n}: expected 1 or more completions")
    experiment, params, source = _open(given.run)
    console = Console(soft_wrap=True)
    e, config = experiment, experiment.config
    group = 1 if given.greedy else given.n

    def program(params: Any, prompts: Any, key: jax.Array) -> Any:
        where = {
            "config": config.sampling,
            "group": group,
            "eos_ids": e.tokenizer.eos_ids,
            "pad_id": e.tokenizer.pad_id,
        }
        return sample_and_score(e.model, e.scoring, params, prompts, None if given.greedy else key, **where)

    compiled = jax.jit(program, out_shardings=sharding.named(e.mesh))
    shards = sharding.problem_shards(e.mesh)

    def answer(question: str, reference: str, number: int) -> None:
        problem = Problem(id="typed", question=question, answer=reference, task=e.task.name)
        prompts = prompt_batch(
            [(number, problem)] * shards,
            task=e.task,
            tokenizer=e.tokenizer,
            max_prompt_tokens=config.sampling.max_prompt_tokens,
        )
        sampled, parts = sharding.fetch(compiled(params, placer(e.mesh)(prompts), jax.random.key(given.seed)))
        groups = completions(sampled, e.tokenizer)
        parts = {**parts, **score_on_host(e.scoring, [problem] * shards, groups)}
        for g, completion in enumerate(groups[0]):
            # without a reference nothing can be said of accuracy
            known = {
                name: float(values[0, g])
                for name, values in parts.items()
                if reference or name != config.evaluation.accuracy
            }
            row = record(problem, completion, Reward(0.0, known))
            scores = "  ".join(f"{name} {value:g}" for name, value in known.items())
            console.print(
                f"{row['completion']}\n    {scores}  tokens {row['length']}  ended by {row['stop']}",
                markup=False,
                highlight=False,
            )

    if given.problem is not None:
        answer(given.problem, given.answer, 0)
        return DONE
    console.print(
        f"{source}. Type a problem, or an empty line to leave. For example: {e.task.heldout[0].question}",
        markup=False,
        highlight=False,
    )
    number = 0
    for line in sys.stdin:
        if not line.strip():
            break
        try:
            answer(line.strip(), given.answer, number)
        except ValueError as error:
            console.print(f"jaxreason: {error}", markup=False, highlight=False)
        number += 1
    return DONE


def report(given: argparse.Namespace) -> int:
    Console(soft_wrap=True).print(f"Report: {write_report(given.run)}", markup=False, highlight=False)
    return DONE


def export(given: argparse.Namespace) -> int:
    experiment, params, source = _open(given.run)
    huggingface.export(params, experiment.architecture, experiment.tokenizer, given.out, source=experiment.source)
    Console(soft_wrap=True).print(f"{source} -> {given.out}", markup=False, highlight=False)
    return DONE


def configs(given: argparse.Namespace) -> int:
    console = Console(soft_wrap=True)
    for name, line in schema.shipped():
        console.print(f"{name:16} {line}", markup=False, highlight=False)
    return DONE
