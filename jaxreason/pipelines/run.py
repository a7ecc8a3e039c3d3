"""A run: from a config to a trained policy in a folder. Supervised phases, then reinforcement, each resumable.

config.json      the resolved config        metrics.jsonl    a line a logged step
checkpoints/     both stages' states        rollouts.jsonl   a line a shown completion
tokenizer/       where the task made one    examples.json    held-out completions before and after
policy/          the Hugging Face folder    summary.json     before, after, seconds; written last
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh

import jaxreason
from jaxreason import config as configs
from jaxreason import objectives, sharding, tasks
from jaxreason.config import Config
from jaxreason.data.loader import Stream, problem_stream
from jaxreason.models import config as model_config
from jaxreason.models import decoder, huggingface, spec
from jaxreason.models.config import Architecture
from jaxreason.models.decoder import Model
from jaxreason.models.tokenizer import Tokenizer, load_tokenizer, save_word_tokenizer
from jaxreason.objectives import Algorithm
from jaxreason.tasks.task import Task
from jaxreason.training import online, supervised
from jaxreason.training import state as states
from jaxreason.training.checkpoint import Checkpointer
from jaxreason.training.collect import Scoring, make_scoring
from jaxreason.training.evaluate import Evaluate, make_evaluate
from jaxreason.training.metrics import NonFiniteError, Progress, RunLog, check_finite, read_jsonl
from jaxreason.training.optimizer import make_optimizer
from jaxreason.types import Problem

EXAMPLES = 16
PARTIAL_TOKENIZER = ".tokenizer.partial"
BEFORE_CONFIG = {"tokenizer", PARTIAL_TOKENIZER, "config.json.tmp"}  # what a run that has just begun may hold
INITIALISING = 1  # what the seed's key is folded with for random weights


class Experiment(NamedTuple):
    """What a config stands for, built: everything but weights."""

    config: Config
    mesh: Mesh
    task: Task
    tokenizer: Tokenizer
    architecture: Architecture
    model: Model
    algorithm: Algorithm
    scoring: Scoring
    source: Path | None  # the checkpoint's folder, where there is one
    left_out: int  # held-out problems whose prompts are too long, which `task` no longer has


class Result(NamedTuple):
    """How a run ended."""

    finished: bool
    summary: Mapping[str, Any]
    examples: Mapping[str, Any]


def build(config: Config, workdir: Path, *, devices: Sequence[Any] | None = None) -> Experiment:
    """Resolves every name of the config and checks every size; nothing is compiled, and no weight is read."""
    mesh = sharding.make_mesh(config.mesh, devices=devices)
    configs.check(config, shards=sharding.problem_shards(mesh))
    algorithm = configs.make(
        objectives,
        config.algorithm,
        key="algorithm",
        returns="Algorithm",
        max_completion_tokens=config.sampling.max_completion_tokens,
    )
    if config.online.steps and algorithm.group_baseline and config.online.completions_per_problem < 2:
        raise ValueError(
            f"config.online.completions_per_problem is {config.online.completions_per_problem}, and algorithm '{algorithm.name}' "
            "compares a group's completions with each other: set it to 2 or more"
        )
    if config.online.steps and "reward" not in algorithm.needs:
        raise ValueError(
            f"config.algorithm.name is '{algorithm.name}', which learns from no reward: name one that does, such as 'grpo'"
        )
    if config.online.updates_per_step > 1 and "old" not in algorithm.needs:
        raise ValueError(
            f"config.online makes {config.online.updates_per_step} updates a step, and algorithm '{algorithm.name}' holds for "
            "rows of the newest policy only: set epochs to 1 and problems_per_update to problems_per_step"
        )
    source = huggingface.resolve(config.model.path) if config.model.path else None
    architecture = huggingface.read_architecture(source) if source else config.model.architecture
    model_config.check(architecture)
    model_config.check_numerics(config.model.numerics)
    configs.check_context(config, architecture)
    task = configs.make(tasks, config.task, key="task", returns="Task")
    supervised.check_phases(config.supervised, task)
    folder = source
    if folder is None:
        if not task.words:
            raise ValueError(
                f"config.model.path is empty, and task '{task.name}' brings no vocabulary of its own: give a checkpoint's "
                "folder with --config.model.path=..."
            )
        folder = workdir / "tokenizer"
        if not folder.exists() and jax.process_index() == 0:
            partial = workdir / PARTIAL_TOKENIZER
            shutil.rmtree(partial, ignore_errors=True)
            save_word_tokenizer(task.words, partial)
            partial.rename(folder)  # there in full or, after a kill, not at all
        _barrier("tokenizer")
    tokenizer = load_tokenizer(folder)
    tokens = len(tokenizer.hf)
    if tokens > architecture.vocab_size:
        remedy = f"give a checkpoint whose tokenizer fits it, {source} does not" if source else f"raise it to {tokens} or more"
        raise ValueError(
            f"config.model.architecture.vocab_size is {architecture.vocab_size}, and the tokenizer has {tokens} tokens: {remedy}"
        )
    model = decoder.make_decoder(architecture, config.model.numerics, mesh)
    spec.check_divisible(model.specs, mesh)
    vocabulary = tokenizer.vocabulary(architecture.vocab_size)
    scoring = make_scoring(config.reward, vocabulary=vocabulary, eos_ids=tokenizer.eos_ids)
    heldout = [task.heldout[i] for i in _fitting(task, task.heldout, tokenizer, config.sampling.max_prompt_tokens)]
    if not heldout:
        raise ValueError(
            f"config.sampling.max_prompt_tokens is {config.sampling.max_prompt_tokens}, and every held-out prompt of task "
            f"'{task.name}' is longer: raise it"
        )
    left_out = len(task.heldout) - len(heldout)
    task = dataclasses.replace(task, heldout=heldout)
    return Experiment(config, mesh, task, tokenizer, architecture, model, algorithm, scoring, source, left_out)


def _fitting(task: Task, problems: Sequence[Problem], tokenizer: Tokenizer, limit: int) -> list[int]:
    """The indices of those problems whose prompts have at most `limit` tokens."""
    rows = tokenizer.encode_prompts([task.messages(problem) for problem in problems])
    return [index for index, row in enumerate(rows) if len(row) <= limit]


def initial_params(experiment: Experiment) -> Any:
    """The checkpoint's weights, or random ones folded from the seed."""
    e = experiment
    dtype = e.model.numerics.param_dtype
    if e.source is not None:
        return huggingface.load_params(e.model.specs, e.source, dtype=dtype, mesh=e.mesh)
    key = jax.random.fold_in(jax.random.key(e.config.seed), INITIALISING)
    return spec.init(e.model.specs, key, dtype=dtype, mesh=e.mesh)


def evaluator(experiment: Experiment) -> Evaluate:
    e = experiment
    return make_evaluate(
        e.model,
        e.scoring,
        e.mesh,
        task=e.task,
        tokenizer=e.tokenizer,
        sampling=e.config.sampling,
        config=e.config.evaluation,
    )


def training_stream(experiment: Experiment) -> tuple[Stream, int]:
    """The stream of training problems, and how many were left out for a prompt that is too long."""
    e = experiment
    if e.task.train_size is None:
        return problem_stream(e.task.train, numbers=None, seed=e.config.seed), 0
    problems = [e.task.train(number) for number in range(e.task.train_size)]
    fitting = _fitting(e.task, problems, e.tokenizer, e.config.sampling.max_prompt_tokens)
    return problem_stream(e.task.train, numbers=fitting, seed=e.config.seed), e.task.train_size - len(fitting)


def train(
    config: Config,
    workdir: Path,
    *,
    progress: Progress,
    stop: Callable[[], bool],
    devices: Sequence[Any] | None = None,
) -> Result:
    """Trains to the end, or until `stop()`; a run folder that holds a part of this run is continued from there.

    Weights come from, in this order:
    1. the newest whole checkpoint of the reinforcement stage, if that has begun;
    2. the newest whole checkpoint of the supervised stage;
    3. the Hugging Face folder `model.path`;
    4. the seed.
    The reference is what the supervised stage ended with, or 3, or 4.
    """
    begun = time.perf_counter()
    open_folder(config, workdir)
    _barrier("folder")  # all have looked before one writes
    e = build(config, workdir, devices=devices)
    log = RunLog(workdir)
    log.write_json("config.json", configs.to_dict(config))
    evaluate = evaluator(e)
    stream, left_out = training_stream(e)
    progress.message(describe(e))
    for kind, count in (("training", left_out), ("held-out", e.left_out)):
        if count:
            limit = config.sampling.max_prompt_tokens
            progress.message(f"{count} {kind} problems are left out: their prompts are longer than max_prompt_tokens = {limit}")

    # ---- supervised phases
    params = initial_params(e)
    if config.supervised.steps:
        outcome = _supervised(e, params, workdir, evaluate=evaluate, log=log, progress=progress, stop=stop)
        if not outcome.finished or stop():
            return Result(False, {}, {})
        params = outcome.state.params

    # ---- before
    examples = _read_json(workdir / "examples.json")
    if "before" not in examples:
        metrics, rows = evaluate(params)
        check_finite(online.STAGE, 0, metrics)
        log.evaluation(online.STAGE, 0, metrics)
        examples = {"before": rows[:EXAMPLES]}
        log.write_json("examples.json", examples)
        progress.message(f"before reinforcement: {headline(metrics)}")

    # ---- reinforcement
    if config.online.steps:
        if stop():
            return Result(False, {}, examples)
        outcome = _online(e, params, workdir, stream=stream, evaluate=evaluate, log=log, progress=progress, stop=stop)
        if not outcome.finished:
            return Result(False, {}, examples)
        params = outcome.state.params

    # ---- after
    metrics, rows = evaluate(params)
    check_finite(online.STAGE, config.online.steps, metrics)
    before = _logged(workdir, online.STAGE, 0)
    log.evaluation(online.STAGE, config.online.steps, metrics)
    examples = {**examples, "after": rows[:EXAMPLES]}
    log.write_json("examples.json", examples)
    huggingface.export(params, e.architecture, e.tokenizer, workdir / "policy", source=e.source)
    ends = _phase_ends(config)
    summary = {
        "phases": {name: _logged(workdir, supervised.STAGE, step) for name, step in ends.items()},
        "before": before,
        "after": metrics,
        "seconds": time.perf_counter() - begun,
        "parameters": spec.count(e.model.specs),
        "version": jaxreason.__version__,
        "jax": jax.__version__,
    }
    log.write_json("summary.json", summary)
    return Result(True, summary, examples)


def _supervised(
    e: Experiment,
    params: Any,
    workdir: Path,
    *,
    evaluate: Evaluate,
    log: RunLog,
    progress: Progress,
    stop: Callable[[], bool],
) -> supervised.Outcome:
    config = e.config.supervised
    optimizer = make_optimizer(config.optimizer, steps=config.steps)
    batches = supervised.make_batches(config, task=e.task, tokenizer=e.tokenizer, sampling=e.config.sampling)
    with _checkpointer(e, workdir, supervised.STAGE) as checkpointer:
        state, start = _restore(e, checkpointer, optimizer, supervised.STAGE, params=params, log=log, progress=progress)
        if start == config.steps:
            return supervised.Outcome(state, finished=True)
        return supervised.fit(
            state,
            model=e.model,
            optimizer=optimizer,
            mesh=e.mesh,
            config=config,
            batches=batches,
            evaluate=evaluate,
            start=start,
            checkpointer=checkpointer,
            saving=e.config.checkpoint,
            log=log,
            progress=progress,
            stop=stop,
        )


def _online(
    e: Experiment,
    params: Any,
    workdir: Path,
    *,
    stream: Stream,
    evaluate: Evaluate,
    log: RunLog,
    progress: Progress,
    stop: Callable[[], bool],
) -> supervised.Outcome:
    config = e.config.online
    optimizer = make_optimizer(config.optimizer, steps=config.steps * config.updates_per_step)
    step_fn = online.make_step(
        e.model,
        e.algorithm,
        optimizer,
        e.scoring,
        e.mesh,
        config=config,
        sampling=e.config.sampling,
        eos_ids=e.tokenizer.eos_ids,
        pad_id=e.tokenizer.pad_id,
        seed=e.config.seed,
    )
    with _checkpointer(e, workdir, online.STAGE) as checkpointer:
        state, start = _restore(e, checkpointer, optimizer, online.STAGE, params=params, log=log, progress=progress)
        return online.reinforce(
            state,
            reference=params if "reference" in e.algorithm.needs else None,
            step_fn=step_fn,
            mesh=e.mesh,
            config=config,
            sampling=e.config.sampling,
            scoring=e.scoring,
            task=e.task,
            tokenizer=e.tokenizer,
            stream=stream,
            evaluate=evaluate,
            evaluation=e.config.evaluation,
            start=start,
            checkpointer=checkpointer,
            saving=e.config.checkpoint,
            log=log,
            progress=progress,
            stop=stop,
        )


@contextmanager
def _checkpointer(e: Experiment, workdir: Path, stage: str) -> Iterator[Checkpointer]:
    """A stage's checkpoints. Where the stage ends in an exception, a save that is under way still becomes a checkpoint."""
    checkpointer = Checkpointer(workdir / "checkpoints" / stage, keep=e.config.checkpoint.keep)
    try:
        yield checkpointer
    except BaseException as error:
        # closing meets the other processes, and they come only where all of them fail alike
        if jax.process_count() == 1 or isinstance(error, NonFiniteError):
            checkpointer.close()
        raise
    checkpointer.close()


def _restore(
    e: Experiment,
    checkpointer: Checkpointer,
    optimizer: Any,
    stage: str,
    *,
    params: Any,
    log: RunLog,
    progress: Progress,
) -> tuple[Any, int]:
    """The state to go on from and its step in this stage, with the run's files cut back to it."""
    restored = checkpointer.restore_latest(states.abstract(e.model, optimizer, e.mesh))
    if restored is None:
        log.rewind(stage, 0)
        return states.create(e.model, optimizer, e.mesh, params), 0
    for sentence in restored.rejected:
        progress.message(sentence)
    log.rewind(stage, restored.step)
    progress.message(f"resuming stage '{stage}' from step {restored.step}")
    return restored.state, restored.step


def open_folder(config: Config, workdir: Path) -> None:
    """Makes the folder; raises ValueError where that fails, or where it holds something else than this run."""
    if workdir.exists() and not workdir.is_dir():
        raise ValueError(f"--workdir is '{workdir}', which is a file: give a folder")
    try:
        workdir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"--workdir is '{workdir}', which cannot be made ({error.strerror}): give another folder") from None
    if not os.access(workdir, os.W_OK):
        raise ValueError(f"--workdir is '{workdir}', which cannot be written to: give another folder")
    known = _read_json(workdir / "config.json")
    if not known:
        others = sorted(entry.name for entry in workdir.iterdir() if entry.name not in BEFORE_CONFIG)
        if others:
            raise ValueError(
                f"--workdir is '{workdir}', which is not a run's folder and holds '{others[0]}': give an empty or a new folder"
            )
        return
    # through JSON, as the stored one went: tuples are lists there
    changed = differences(known, json.loads(json.dumps(configs.to_dict(config))))
    if changed:
        key, old, new = changed[0]
        more = f" (and {len(changed) - 1} more keys)" if len(changed) > 1 else ""
        raise ValueError(
            f"'{workdir}' holds a run with config.{key} = {old!r}, and this one has {new!r}{more}: "
            "give another --workdir, or the same config to resume it"
        )


def differences(a: Any, b: Any, path: str = "") -> list[tuple[str, Any, Any]]:
    """(key, value in a, value in b) of every leaf in which two nested dicts differ."""
    if isinstance(a, dict) and isinstance(b, dict):
        return [each for key in {**a, **b} for each in differences(a.get(key), b.get(key), f"{path}.{key}" if path else key)]
    return [] if a == b else [(path, a, b)]


def finished(workdir: Path) -> Result | None:
    """The result of a run that has ended, from its folder."""
    summary = _read_json(workdir / "summary.json")
    return Result(True, summary, _read_json(workdir / "examples.json")) if summary else None


def latest_params(experiment: Experiment, workdir: Path) -> tuple[Any, str]:
    """The newest weights of a run's folder, and where they come from in words."""
    e = experiment
    for stage, settings, steps in (
        (online.STAGE, e.config.online.optimizer, e.config.online.steps * e.config.online.updates_per_step),
        (supervised.STAGE, e.config.supervised.optimizer, e.config.supervised.steps),
    ):
        folder = workdir / "checkpoints" / stage
        if folder.is_dir():
            checkpointer = Checkpointer(folder, keep=e.config.checkpoint.keep)
            restored = checkpointer.restore_latest(states.abstract(e.model, make_optimizer(settings, steps=steps), e.mesh))
            checkpointer.close()
            if restored is not None:
                return restored.state.params, f"stage '{stage}', step {restored.step}"
    raise ValueError(f"'{workdir}' has no checkpoint yet: train it first with jaxreason train --workdir {workdir}")


def read_config(workdir: Path) -> Config:
    """The config of a run's folder."""
    known = _read_json(workdir / "config.json")
    if not known:
        raise ValueError(f"'{workdir}' is not a run's folder: it holds no config.json; give the --workdir of jaxreason train")
    try:
        return configs.from_dict(known)
    except ValueError as error:
        raise ValueError(f"{workdir / 'config.json'} is no run's config: {error}") from error


def describe(e: Experiment) -> str:
    """One line of what is about to run, with the derived sizes."""
    o, s = e.config.online, e.config.supervised
    shape = " x ".join(f"{name} {size}" for name, size in e.mesh.shape.items() if size > 1) or "one device"
    rollouts = o.problems_per_step * o.completions_per_problem
    return (
        f"{spec.count(e.model.specs):,} parameters on {shape}; "
        f"supervised: {s.steps} steps x {s.demonstrations_per_step} demonstrations; "
        f"{e.algorithm.name}: {o.steps} steps x {o.problems_per_step} problems x {o.completions_per_problem} completions = "
        f"{rollouts} rollouts a step, {o.updates_per_step} update{'s' if o.updates_per_step != 1 else ''} each; "
        f"{'one program a step' if not e.scoring.host else 'rewards on the host'}"
    )


def headline(metrics: Mapping[str, float]) -> str:
    """An evaluation in a few words."""
    accuracy, length = (next(v for name, v in metrics.items() if name.endswith(end)) for end in ("/pass@1", "/length"))
    return f"held-out accuracy {100 * accuracy:.1f}%, mean completion {length:.1f} tokens"


def _phase_ends(config: Config) -> dict[str, int]:
    ends, step = {}, 0
    for name, phase in config.supervised.phases.items():
        step += phase.steps
        ends[name] = step
    return dict(list(ends.items())[:-1])  # the last phase's end is 'before'


def _logged(workdir: Path, stage: str, step: int) -> dict[str, float]:
    """The evaluation that was logged at a step."""
    for line in read_jsonl(workdir / "metrics.jsonl"):
        if (line["stage"], line["step"]) == (stage, step):
            return {name: value for name, value in line.items() if name.startswith("eval/")}
    return {}


def _read_json(file: Path) -> dict[str, Any]:
    try:
        return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    except ValueError as error:
        raise ValueError(f"{file} is not valid JSON ({error}): it was changed by hand or damaged") from error


def _barrier(name: str) -> None:
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices(name)
