"""The commands that train, and read a run's folder. Each takes the parsed arguments and returns an exit code."""

from __future__ import annotations

import argparse
import dataclasses
import os
import shlex
import shutil
import sys
import threading
import traceback
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import jax
from rich.console import Console

from jaxreason import config as schema
from jaxreason import sharding
from jaxreason.cli.main import DONE, INTERRUPTED, MISTAKE, NON_FINITE
from jaxreason.cli.progress import before_after_table, make_progress, side_by_side, visible
from jaxreason.cli.signals import stop_on_signals
from jaxreason.data.batching import prompt_batch, prompt_limits
from jaxreason.models import huggingface, lora
from jaxreason.pipelines import experiment as experiments
from jaxreason.pipelines import folder as folders
from jaxreason.pipelines import run as runs
from jaxreason.training.collect import applying, completions, placer, record, sample_and_score, score_on_host
from jaxreason.training.metrics import NonFiniteError
from jaxreason.training.report import write_report
from jaxreason.types import Problem, Reward

CACHE = ".jax_cache"  # beside runs' folders, for all of them
HEARTBEAT_SECONDS = 60  # without a sign of life from a process, after which the others end
PARTING_SECONDS = 10  # that a process which failed waits for the others to fail alike


def train(given: argparse.Namespace) -> int:
    config = schema.load(given.config, given.overrides)
    _join(given)
    choose_precision(config)
    try:
        return _train(config, given)
    except Exception as error:
        if jax.process_count() > 1:
            _leave(error)
        raise


def _train(config: schema.Config, given: argparse.Namespace) -> int:
    console, main = Console(soft_wrap=not sys.stdout.isatty()), jax.process_index() == 0
    folders.open_folder(config, given.workdir)
    cache_compilations(given.workdir.absolute().parent)
    ended = folders.finished(given.workdir)
    if ended is not None:
        if main:
            if not (given.workdir / "report.html").is_file():  # it is written last
                write_report(given.workdir)
            _show(console, ended)
            console.print(f"This run has ended: see {given.workdir / 'report.html'}, or give another --workdir.", highlight=False)
        return DONE
    progress = make_progress(sys.stdout, quiet=given.quiet or not main)
    try:
        with stop_on_signals(progress.message) as stop:
            result = runs.train(config, given.workdir, progress=progress, stop=stop)
            report = write_report(given.workdir) if result.finished and main else None
    finally:
        progress.close()
    if not result.finished:
        if main:
            again = shlex.join([*program_words(), *given.words])
            saved = any((given.workdir / "checkpoints").glob("*/*"))
            said = "Interrupted and saved" if saved else "Interrupted before there was anything to save"
            console.print(f"{said}. To go on: {again}", highlight=False, markup=False, soft_wrap=True)
        return INTERRUPTED
    if main:
        _show(console, result)
        console.print(f"Report: {report}   policy: {given.workdir / 'policy'}", highlight=False, markup=False)
    return DONE


def _show(console: Console, result: folders.Result) -> None:
    console.print(before_after_table(result.summary))
    console.print(side_by_side(result.examples))


def program_words() -> list[str]:
    """How this program was started, as words for a shell."""
    started = Path(sys.argv[0])
    if started.name == "__main__.py":
        return [sys.executable, "-m", "jaxreason"]
    return ["jaxreason"] if shutil.which("jaxreason") else [str(started)]


def _join(given: argparse.Namespace) -> None:
    """Joins the other processes of the run, before the first use of a device."""
    explicit = (given.coordinator, given.processes, given.process)
    if any(value is not None for value in explicit):
        if any(value is None for value in explicit):
            raise ValueError("--coordinator, --processes and --process go together: give all three, or --distributed alone")
        jax.distributed.initialize(given.coordinator, given.processes, given.process, heartbeat_timeout_seconds=HEARTBEAT_SECONDS)
    elif given.distributed:
        jax.distributed.initialize(heartbeat_timeout_seconds=HEARTBEAT_SECONDS)


def _leave(error: Exception) -> None:
    """Waits for the other processes, which may have failed alike; where they have not, says why and ends without them.

    They wait for this one in a computation then, and end when they miss its signs of life.
    """
    parting = threading.Thread(target=jax.distributed.shutdown, name="parting", daemon=True)
    parting.start()
    parting.join(PARTING_SECONDS)
    if not parting.is_alive():
        return
    if isinstance(error, ValueError | NonFiniteError):
        print(f"jaxreason: {error}", file=sys.stderr)
    else:
        traceback.print_exception(error)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(NON_FINITE if isinstance(error, NonFiniteError) else MISTAKE if isinstance(error, ValueError) else 1)


def choose_precision(config: schema.Config) -> None:
    if config.model.numerics.param_dtype == "float64":
        jax.config.update("jax_enable_x64", True)


def cache_compilations(folder: Path) -> None:
    """Keeps compiled programs for the next start, in JAX_COMPILATION_CACHE_DIR or else in `.jax_cache` of this folder.

    Where nothing can be written there, programs are compiled anew at each start.
    """
    if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        cache = folder.absolute() / CACHE
        with suppress(OSError):
            cache.mkdir(parents=True, exist_ok=True)
        if not cache.is_dir() or not os.access(cache, os.W_OK):
            return
        jax.config.update("jax_compilation_cache_dir", str(cache))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def _open(run: Path) -> tuple[experiments.Experiment, Any, str]:
    """The experiment of a run's folder on this machine's devices, with its newest weights."""
    config = folders.read_config(run)
    choose_precision(config)
    cache_compilations(run.absolute().parent)
    if jax.process_count() == 1 and not sharding.fits(config.mesh, devices=jax.device_count()):
        config = dataclasses.replace(config, mesh=sharding.MeshConfig())  # trained on other devices than these
    experiment = experiments.build(config, run)
    params, source = runs.latest_params(experiment, run)
    return experiment, params, source


def sample(given: argparse.Namespace) -> int:
    if given.n < 1:
        raise ValueError(f"--n is {given.n}: expected 1 or more completions")
    if given.answer and given.problem is None:
        raise ValueError(f"--answer is '{given.answer}', and there is no --problem that it answers: give both")
    e, params, source = _open(given.run)
    console, config = Console(soft_wrap=True), e.config

    def say(text: str) -> None:
        console.print(visible(text), markup=False, highlight=False)

    group, model = 1 if given.greedy else given.n, experiments.exact_model(e)

    def program(params: Any, prompts: Any, key: jax.Array) -> Any:
        where = {
            "config": config.sampling,
            "group": group,
            "eos_ids": e.tokenizer.eos_ids,
            "pad_id": e.tokenizer.pad_id,
            "stop": e.stop,
        }
        return sample_and_score(model, e.scoring, params, prompts, None if given.greedy else key, **where)

    compiled = jax.jit(program, out_shardings=sharding.named(e.mesh))
    shards = sharding.problem_shards(e.mesh)

    def answer(question: str, reference: str, number: int) -> None:
        unknown = e.tokenizer.unknown(question)
        if unknown:
            words = ", ".join(dict.fromkeys(unknown))
            say(f"The policy has no token for: {words}. It knows the words of problems such as: {e.task.heldout[0].question}")
        problem = Problem(id="typed", question=question, answer=reference, task=e.task.name)
        prompts = prompt_batch(
            [(number, problem)] * shards,
            task=e.task,
            tokenizer=e.tokenizer,
            **prompt_limits(config.sampling),
        )
        sampled, parts = sharding.fetch(compiled(params, placer(e.mesh)(prompts), jax.random.key(given.seed)))
        groups = completions(sampled, e.tokenizer, stop=e.stop)
        host = score_on_host(e.scoring, [problem] * shards, groups, [True] + [False] * (shards - 1), traced=parts)
        parts = {**parts, **host.parts}
        for g, completion in enumerate(groups[0]):
            # without a reference nothing can be said of accuracy
            known = {n: value for n, value in applying(parts, 0, g).items() if reference or n != config.evaluation.accuracy}
            row = record(problem, completion, Reward(0.0, known))
            scores = "  ".join(f"{name} {'-' if value is None else f'{value:g}'}" for name, value in known.items())
            scores += "".join(f"  failed by {reason}" for reason, each in host.failed.items() if each[0, g])
            say(f"{row['completion']}\n    {scores}  tokens {row['length']}  ended by {row['stop']}")

    with closing(e.scoring):
        if given.problem is not None:
            answer(given.problem, given.answer, 0)
            return DONE
        say(f"{source}. Type a problem, or an empty line to leave. For example: {e.task.heldout[0].question}")
        for number, line in enumerate(iter(sys.stdin.readline, "")):
            if not line.strip():
                break
            try:
                answer(line.strip(), "", number)
            except ValueError as error:
                say(f"jaxreason: {error}")
    return DONE


def report(given: argparse.Namespace) -> int:
    Console(soft_wrap=True).print(f"Report: {write_report(given.run)}", markup=False, highlight=False)
    return DONE


def export(given: argparse.Namespace) -> int:
    experiment, params, source = _open(given.run)
    huggingface.export(lora.merge(params), experiment.architecture, experiment.tokenizer, given.out, source=experiment.source)
    Console(soft_wrap=True).print(f"{source} -> {given.out}", markup=False, highlight=False)
    return DONE


def configs(given: argparse.Namespace) -> int:
    console = Console(soft_wrap=True)
    for name, line in schema.shipped():
        console.print(f"{name:16} {line}", markup=False, highlight=False)
    return DONE
