"""A run: from a config to a trained policy in a folder. Supervised phases, then reinforcement, each resumable."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax

import jaxreason
from jaxreason import config as configs
from jaxreason import sharding
from jaxreason.batch import TrainState
from jaxreason.config import Config
from jaxreason.data.loader import Stream
from jaxreason.models import huggingface, lora, spec
from jaxreason.pipelines import critic as critics
from jaxreason.pipelines.experiment import (
    Experiment,
    Overlong,
    build,
    check_attention,
    curriculum_pool,
    describe,
    evaluator,
    initial_adapters,
    initial_params,
    training_stream,
)
from jaxreason.pipelines.folder import Result, begin, open_folder, read_json
from jaxreason.sampling import parking
from jaxreason.training import online, partial, profiling, supervised
from jaxreason.training import state as states
from jaxreason.training.checkpoint import Checkpointer
from jaxreason.training.evaluate import Evaluate
from jaxreason.training.metrics import NonFiniteError, Progress, RunLog, check_finite, read_jsonl
from jaxreason.training.optimizer import make_optimizer

EXAMPLES = 16  # held-out completions kept for the report


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

    With LoRA the weights are 3 or 4 and stay so, and what both stages train, save and resume are one set of adapters. The
    reference is then the weights without adapters, or with a copy of those that the supervised stage ended with: there is no
    second copy of the weights.
    """
    begun = time.perf_counter()
    open_folder(config, workdir)
    sharding.barrier("folder")  # all have looked before one writes
    if jax.process_index() == 0:
        begin(config, workdir)
    e = build(config, workdir, devices=devices)
    with closing(e.scoring):
        return _stages(e, workdir, begun=begun, progress=progress, stop=stop)


def _stages(e: Experiment, workdir: Path, *, begun: float, progress: Progress, stop: Callable[[], bool]) -> Result:
    config = e.config
    check_attention(e)
    log = RunLog(workdir)
    log.write_json("config.json", configs.to_dict(config))
    evaluate = evaluator(e)
    stream, overlong = training_stream(e)
    if config.online.steps and config.online.curriculum.on:
        curriculum_pool(e, overlong)  # what is wrong with it is said before anything is trained
    progress.message(describe(e))
    fate = "cut at their beginning" if config.sampling.overlong == "cut" else "left out"
    sides = {"training": overlong, "held-out": e.overlong}
    long = {kind: each._asdict() for kind, each in sides.items() if each.count}
    if e.task.skipped.counts or long:
        left_out = {"counts": dict(e.task.skipped.counts), "first": list(e.task.skipped.first), "overlong": long}
        log.write_json("skipped_rows.json", left_out)
    for sentence in e.task.skipped.told(e.task.name):
        progress.message(sentence)
    for kind, each in sides.items():
        if each.count:
            why = f"their prompts are longer than max_prompt_tokens = {config.sampling.max_prompt_tokens}"
            progress.message(f"{each.count} {kind} problems are {fate}: {why} (first: {', '.join(each.first)})")

    # ---- supervised phases
    params, base = initial_params(e), None
    if config.model.lora.rank:
        params, base = initial_adapters(e), params
    frozen = base
    if config.supervised.steps:
        outcome = _supervised(e, params, workdir, base=base, evaluate=evaluate, log=log, progress=progress, stop=stop)
        if not outcome.finished or stop():
            return Result(False, {}, {})
        params = outcome.state.params
        frozen = None if base is None else lora.adapt(base, params)

    # ---- before
    examples = read_json(workdir / "examples.json")
    if "before" not in examples:
        metrics, rows = evaluate(lora.adapt(base, params))
        check_finite(online.STAGE, 0, metrics)
        log.evaluation(online.STAGE, 0, metrics)
        examples = {"before": rows[:EXAMPLES]}
        log.write_json("examples.json", examples)
        progress.message(f"before reinforcement: {headline(metrics)}")

    # ---- reinforcement
    if config.online.steps:
        if stop():
            return Result(False, {}, examples)
        told = {"evaluate": evaluate, "log": log, "progress": progress, "stop": stop}
        outcome = _online(e, params, workdir, frozen=frozen, stream=stream, overlong=overlong, **told)
        if not outcome.finished:
            return Result(False, {}, examples)
        params = outcome.state.params

    # ---- after
    policy = lora.adapt(base, params)
    metrics, rows = evaluate(policy)
    check_finite(online.STAGE, config.online.steps, metrics)
    before = _logged(workdir, online.STAGE, 0)
    log.evaluation(online.STAGE, config.online.steps, metrics)
    examples = {**examples, "after": rows[:EXAMPLES]}
    log.write_json("examples.json", examples)
    if base is not None:
        known = config.model.path if config.model.weights == "checkpoint" else ""
        lora.export(params, e.specs, config.model.lora, workdir / "adapter", base=known)
    huggingface.export(lora.merge(policy), e.architecture, e.tokenizer, workdir / "policy", source=e.source)
    ends = _phase_ends(config)
    summary = {
        "phases": {name: _logged(workdir, supervised.STAGE, step) for name, step in ends.items()},
        "before": before,
        "after": metrics,
        "seconds": time.perf_counter() - begun,
        "parameters": spec.count(e.specs),
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
    base: Any,
    evaluate: Evaluate,
    log: RunLog,
    progress: Progress,
    stop: Callable[[], bool],
) -> supervised.Outcome:
    config = e.config.supervised
    optimizer = make_optimizer(config.optimizer, steps=config.steps)
    batches = supervised.make_batches(config, task=e.task, tokenizer=e.tokenizer, sampling=e.config.sampling)
    with _checkpointer(e, workdir, supervised.STAGE) as checkpointer:
        state, start, _ = _restore(e, checkpointer, optimizer, supervised.STAGE, params=params, log=log, progress=progress)
        if start == config.steps:
            return supervised.Outcome(state, finished=True)
        return supervised.fit(
            state,
            base=base,
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
    frozen: Any = None,
    overlong: Overlong,
) -> supervised.Outcome:
    """The reinforcement stage; with LoRA `frozen` is the reference, and holds the weights beneath the adapters."""
    config = e.config.online
    optimizer, parked = online_optimizer(e), _parked(e)
    step_fn = online_step(e, optimizer)
    profiled = profiling.steps_of(e.config.profile, last=config.steps)
    with _checkpointer(e, workdir, online.STAGE) as checkpointer, profiling.tracing(profiled, workdir / "profile") as trace:
        told = {"params": params, "log": log, "progress": progress}

        def carried() -> Any:
            if e.critic is not None:
                return critics.initial_state(e.config, e.critic, lora.adapt(frozen, params), e.mesh)
            return parking.vacant(parked) if parked else {}

        state, start, extra = _restore(e, checkpointer, optimizer, online.STAGE, **told, carries=_carried(e), carried=carried)
        if profiled and start >= profiled[-1]:
            progress.message(f"nothing is profiled: config.profile.steps = {e.config.profile.steps} are done")
        reference = params if frozen is None and "reference" in e.algorithm.needs else frozen
        if reference is None:  # the state has its own copy, and this one would take its memory to the stage's end
            jax.tree.map(lambda x: x.delete(), params)
        return online.reinforce(
            state,
            reference=reference,
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
            resumed=extra,
            stop_strings=e.stop,
            pool=curriculum_pool(e, overlong) if config.curriculum.on else 0,
            seed=e.config.seed,
            trace=trace,
        )


def online_optimizer(e: Experiment) -> Any:
    """That of the reinforcement stage."""
    return make_optimizer(e.config.online.optimizer, steps=_policy_updates(e))


def online_step(e: Experiment, optimizer: Any) -> online.OnlineStep:
    """The programs of a step of reinforcement."""
    return online.make_step(
        e.model,
        e.algorithm,
        optimizer,
        e.scoring,
        e.mesh,
        config=e.config.online,
        sampling=e.config.sampling,
        eos_ids=e.tokenizer.eos_ids,
        pad_id=e.tokenizer.pad_id,
        seed=e.config.seed,
        parked=_parked(e),
        critic=e.critic,
        stop=e.stop,
        accuracy=e.config.evaluation.accuracy,
    )


def online_state(e: Experiment, optimizer: Any) -> TrainState:
    """Shapes, types and shardings of the reinforcement's state."""
    return replace(states.abstract(e.model, optimizer, e.mesh), algorithm=_carried(e))


def _policy_updates(e: Experiment) -> int:
    """How many updates the policy makes in reinforcement: its schedule begins where the critic is no longer alone."""
    return (e.config.online.steps - e.config.critic.alone_steps) * e.config.online.updates_per_step


def _carried(e: Experiment) -> Any:
    """Shapes and shardings of what the reinforcement's state carries besides the policy."""
    return _parked(e) if e.critic is None else states.abstract(e.critic.model, e.critic.optimizer, e.mesh)


def _parked(e: Experiment) -> Any:
    """Shapes and shardings of what partial rollouts park; {} without them."""
    return partial.layout(
        e.model,
        spec.abstract(e.specs, dtype=e.model.numerics.param_dtype, mesh=e.mesh),
        e.mesh,
        config=e.config.sampling,
        problems=e.config.online.problems_per_step,
        group=e.config.online.completions_per_problem,
        eos_ids=e.tokenizer.eos_ids,
        pad_id=e.tokenizer.pad_id,
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
    carries: Any = None,
    carried: Callable[[], Any] = dict,
) -> tuple[Any, int, Mapping[str, Any]]:
    """The state to go on from, its step in this stage and what was saved besides, with the run's files cut back to it.

    `carries` is the abstract form of the state's `algorithm`, and `carried()` is what it begins as.
    """
    restored = checkpointer.restore_latest(replace(states.abstract(e.model, optimizer, e.mesh), algorithm=carries or {}))
    if restored is None:
        log.rewind(stage, 0)
        return replace(states.create(e.model, optimizer, e.mesh, params), algorithm=carried()), 0, {}
    for sentence in restored.rejected:
        progress.message(sentence)
    log.rewind(stage, restored.step)
    progress.message(f"resuming stage '{stage}' from step {restored.step}")
    return restored.state, restored.step, restored.extra


def latest_params(experiment: Experiment, workdir: Path) -> tuple[Any, str]:
    """The newest weights of a run's folder, adapted ones with LoRA, and where they come from in words."""
    e = experiment
    for stage, settings, steps in (
        (online.STAGE, e.config.online.optimizer, _policy_updates(e)),
        (supervised.STAGE, e.config.supervised.optimizer, e.config.supervised.steps),
    ):
        folder = workdir / "checkpoints" / stage
        if folder.is_dir():
            checkpointer = Checkpointer(folder, keep=e.config.checkpoint.keep)
            state = states.abstract(e.model, make_optimizer(settings, steps=steps), e.mesh)
            restored = checkpointer.restore_latest(replace(state, algorithm=_carried(e)) if stage == online.STAGE else state)
            checkpointer.close()
            if restored is not None:
                base = initial_params(e) if e.config.model.lora.rank else None
                return lora.adapt(base, restored.state.params), f"stage '{stage}', step {restored.step}"
    raise ValueError(f"'{workdir}' has no checkpoint yet: train it first with jaxreason train --workdir {workdir}")


def headline(metrics: Mapping[str, float]) -> str:
    """An evaluation in a few words."""
    accuracy, length = (next((v for name, v in metrics.items() if name.endswith(end)), None) for end in ("/pass@1", "/length"))
    shown = "n/a (its rule applies to no held-out problem)" if accuracy is None else f"{100 * accuracy:.1f}%"
    return f"held-out accuracy {shown}, mean completion {length:.1f} tokens"


def _phase_ends(config: Config) -> dict[str, int]:
    ends, step = {}, 0
    for name, phase in config.supervised.phases.items():
        step += phase.steps
        if phase.steps and step < config.supervised.steps:  # the last phase's end is 'before'
            ends[name] = step
    return ends


def _logged(workdir: Path, stage: str, step: int) -> dict[str, float]:
    """The evaluation that was logged at a step."""
    for line in read_jsonl(workdir / "metrics.jsonl"):
        if (line["stage"], line["step"]) == (stage, step):
            return {name: value for name, value in line.items() if name.startswith("eval/")}
    return {}
