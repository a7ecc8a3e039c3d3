"""The supervised loop: imitate demonstrations, phase after phase, under one schedule."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from jaxreason import objectives, sharding
from jaxreason.batch import RolloutBatch, TrainState
from jaxreason.compiling import compiled
from jaxreason.data.batching import demonstration_batch, prompt_limits
from jaxreason.models.decoder import Model
from jaxreason.models.lora import adapt
from jaxreason.models.tokenizer import Tokenizer
from jaxreason.naming import nearest
from jaxreason.sampling.rollout import SamplingConfig
from jaxreason.tasks.task import Task
from jaxreason.training import state as states
from jaxreason.training.checkpoint import Checkpointer
from jaxreason.training.evaluate import Evaluate
from jaxreason.training.metrics import Progress, RunLog, check_finite
from jaxreason.training.optimizer import OptimizerConfig
from jaxreason.training.step import Split, make_update

STAGE = "supervised"


@dataclass(frozen=True)
class PhaseConfig:
    """A stretch of the supervised stage with one kind of demonstrations."""

    demonstrations: str = "worked"  # a kind that the task offers
    steps: int = 0


@dataclass(frozen=True)
class SupervisedConfig:
    """The supervised stage; no phases: none. The phases share one optimiser and one schedule."""

    phases: Mapping[str, PhaseConfig] = field(default_factory=dict)
    demonstrations_per_step: int = 32
    demonstrations_per_microbatch: int = 32
    log_every_steps: int = 10
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)

    @property
    def steps(self) -> int:
        return sum(phase.steps for phase in self.phases.values())


class Outcome(NamedTuple):
    """Where a loop stopped."""

    state: TrainState
    finished: bool  # False: interrupted, and saved


@dataclass(frozen=True)
class Saving:
    """When a loop saves."""

    every_steps: int = 0  # 0: only at the end, and when interrupted
    keep: int = 2  # newest checkpoints kept in each stage


Batches = Callable[[int, Sequence[int]], RolloutBatch]


def check_phases(config: SupervisedConfig, task: Task) -> None:
    """A ValueError where a phase wants a kind of demonstrations that the task does not offer."""
    for name, phase in config.phases.items():
        kind = phase.demonstrations
        if kind not in task.demonstrations:
            hint = nearest(kind, list(task.demonstrations)) if task.demonstrations else "remove the phase, for it offers none"
            raise ValueError(
                f"config.supervised.phases.{name}.demonstrations is '{kind}', which task '{task.name}' does not offer: {hint}"
            )


def make_batches(config: SupervisedConfig, *, task: Task, tokenizer: Tokenizer, sampling: SamplingConfig) -> Batches:
    """batch(step, rows), a pure function of the step and of which of its rows are asked for: no demonstration comes twice."""
    kinds = [phase.demonstrations for phase in config.phases.values() for _ in range(phase.steps)]
    size = config.demonstrations_per_step

    def batch(step: int, rows: Sequence[int]) -> RolloutBatch:
        make = task.demonstrations[kinds[step]]
        return demonstration_batch(
            [make(step * size + row) for row in rows],
            task=task,
            tokenizer=tokenizer,
            **prompt_limits(sampling),
            max_completion_tokens=sampling.max_completion_tokens,
        )

    return batch


def fit(
    state: TrainState,
    *,
    model: Model,
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
    config: SupervisedConfig,
    batches: Batches,
    evaluate: Evaluate,
    start: int,
    checkpointer: Checkpointer,
    saving: Saving,
    log: RunLog,
    progress: Progress,
    stop: Callable[[], bool],
    base: Any = None,
) -> Outcome:
    """Trains from step `start` to the end of the last phase, or until `stop()`, when it saves and returns.

    Where the state holds adapters alone, `base` are the frozen weights beneath them.
    """
    split = Split(config.demonstrations_per_step, config.demonstrations_per_microbatch)
    update = make_update(model, objectives.sft(), optimizer, split=split)
    at, everywhere = states.shardings(model, optimizer, mesh), sharding.named(mesh)
    held = sharding.held_rows(mesh, config.demonstrations_per_step).tolist()

    def stepped(state: TrainState, frozen: Any, batch: RolloutBatch) -> tuple[TrainState, dict[str, jax.Array]]:
        state, metrics, _ = update(state, frozen, batch)
        tokens = jnp.sum(batch.prompt_mask, dtype=jnp.int32) + jnp.sum(batch.mask, dtype=jnp.int32)
        return state, metrics | {"tokens": tokens}

    step_fn = jax.jit(stepped, donate_argnums=0, out_shardings=(at, everywhere))
    ends = set(itertools.accumulate(phase.steps for phase in config.phases.values())) - {config.steps}
    progress.stage(STAGE, config.steps, start)

    pending: tuple[int, Any] | None = None
    clock = time.perf_counter()
    since = start

    def flush(at_end_of_phase: bool = False) -> None:
        """Reads the last step's metrics: one step late, so that the host prepares a batch while the device computes."""
        nonlocal pending, clock, since
        if pending is None:
            return
        step, metrics = pending
        pending = None
        values = {name: float(value) for name, value in sharding.fetch(metrics).items()}
        check_finite(STAGE, step, values)
        if step % config.log_every_steps == 0 or step in (1, config.steps) or at_end_of_phase:
            now = time.perf_counter()
            seconds, clock = (now - clock) / (step - since), now
            since = step
            line = {
                "loss/sft": values["policy/loss"],
                "optimizer/gradient_norm": values["optimizer/gradient_norm"],
                "optimizer/update_norm": values["optimizer/update_norm"],
                "policy/entropy": values["policy/entropy"],
                "time/step": seconds,
                "throughput/tokens_per_second": values["tokens"] / seconds,
            }
            if at_end_of_phase:
                line |= evaluate(adapt(base, state.params))[0]
                clock = time.perf_counter()
            log.metrics(STAGE, step, line)
            progress.update(step, line)

    step = start
    program: Any = None
    while step < config.steps:
        placed = sharding.place_held(mesh, batches(step, held), config.demonstrations_per_step)
        if program is None:
            program = compiled(step_fn, state, base, placed)
            clock = time.perf_counter()  # compiling is no part of a step
        state, metrics = program(state, base, placed)
        step += 1
        flush()
        pending = (step, metrics)
        if step in ends:
            flush(at_end_of_phase=True)
        stopping = stop()
        if step == config.steps or stopping or (saving.every_steps and step % saving.every_steps == 0):
            flush()
            saving_since = time.perf_counter()
            checkpointer.save(step, state, {"stage": STAGE, "position": step * config.demonstrations_per_step})
            clock += time.perf_counter() - saving_since  # a save is no part of a step
        if stopping and step < config.steps:
            checkpointer.wait()
            return Outcome(state, finished=False)
    flush()
    checkpointer.wait()
    return Outcome(state, finished=True)
