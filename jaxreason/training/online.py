"""The reinforcement loop: sample, score, update, and write down what happened.

With traced rules the three are one XLA program, and nothing returns to the host but metrics and the rows shown to people.
With a host rule among them the same pure functions run with the scoring between. The loop does not know which algorithm it runs.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from jaxreason import sharding
from jaxreason.batch import PromptBatch, TrainState
from jaxreason.compiling import compiled
from jaxreason.data import curriculum
from jaxreason.data.batching import prompt_batch, prompt_limits
from jaxreason.data.curriculum import CurriculumConfig
from jaxreason.data.loader import Stream
from jaxreason.models.decoder import Model
from jaxreason.models.lora import adapt
from jaxreason.models.tokenizer import Tokenizer
from jaxreason.numerics import masked_mean
from jaxreason.objectives import Algorithm
from jaxreason.objectives.advantages import zero_variance
from jaxreason.sampling import parking
from jaxreason.sampling.rollout import Sampled, SamplingConfig
from jaxreason.sampling.stops import StopStrings
from jaxreason.tasks.task import Task
from jaxreason.training import partial as partial_rollouts
from jaxreason.training import state as states
from jaxreason.training.checkpoint import Checkpointer
from jaxreason.training.collect import (
    Parts,
    Scoring,
    Shown,
    completions,
    rollout_batch,
    rows_of,
    sample_and_score,
    score_on_host,
    score_traced,
    total_reward,
)
from jaxreason.training.critic import Critic
from jaxreason.training.evaluate import Evaluate, EvaluationConfig
from jaxreason.training.metrics import Progress, RunLog, check_finite
from jaxreason.training.optimizer import OptimizerConfig
from jaxreason.training.profiling import Trace, no_trace
from jaxreason.training.step import Metrics, Split, make_update
from jaxreason.training.supervised import Outcome, Saving
from jaxreason.types import Problem

STAGE = "reinforce"
SAMPLING, SHUFFLING = 2, 3  # what a step's keys are folded with

ProblemOf = Callable[[int], Problem]


@dataclass(frozen=True)
class OnlineConfig:
    """The reinforcement stage; 0 steps: none. Counts are in problems, that is whole groups."""

    steps: int = 0
    problems_per_step: int = 32
    completions_per_problem: int = 8
    problems_per_update: int = 32  # below problems_per_step: several updates on one batch of rollouts
    problems_per_microbatch: int = 32  # below problems_per_update: gradients are accumulated
    epochs: int = 1  # passes over a batch of rollouts
    logged_problems: int = 8  # groups of each step written to rollouts.jsonl
    curriculum: CurriculumConfig = field(default_factory=CurriculumConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)

    @property
    def updates_per_step(self) -> int:
        return self.epochs * (self.problems_per_step // self.problems_per_update)


@dataclass(frozen=True)
class OnlineStep:
    """The step in its two forms; `fused` is None where a host rule stands between sampling and update.

    With partial rollouts `state.algorithm` is what is parked; `collect` takes it last, and `learn` a state without it. With a
    critic it is the critic's own state.
    """

    collect: Callable[..., tuple[Sampled, dict[str, jax.Array]]]
    learn: Callable[[TrainState, Any, PromptBatch, Sampled, Parts, jax.Array], tuple[TrainState, Metrics, Shown]]
    fused: Callable[[TrainState, Any, PromptBatch, jax.Array], tuple[TrainState, Metrics, Shown]] | None


def make_step(
    model: Model,
    algorithm: Algorithm,
    optimizer: optax.GradientTransformation,
    scoring: Scoring,
    mesh: Mesh,
    *,
    config: OnlineConfig,
    sampling: SamplingConfig,
    eos_ids: tuple[int, ...],
    pad_id: int,
    seed: int,
    parked: Any = None,
    critic: Critic | None = None,
    stop: StopStrings | None = None,
    accuracy: str = "accuracy",
) -> OnlineStep:
    """The jitted forms of one step. `number` is the step's number; all randomness is folded from it and the seed.

    `parked` is what partial.layout says, where `sampling.parking.step_tokens` asks for partial rollouts. With a curriculum,
    `accuracy` is the part of the reward whose mean over a group is its pass rate.
    """
    if bool(parked) != (sampling.parking.step_tokens > 0):
        raise ValueError(
            f"parking.step_tokens is {sampling.parking.step_tokens}: give `parked` as partial.layout makes it of this config"
        )
    if parked and critic is not None:
        raise ValueError("a critic and `parked` are given, and a state carries one of them: leave one out")
    split = Split(config.problems_per_update, config.problems_per_microbatch, config.epochs)
    update = make_update(model, algorithm, optimizer, law=sampling.law, split=split, critic=critic)

    def key(kind: int, number: jax.Array) -> jax.Array:
        return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), kind), number)

    def collect(params: Any, prompts: PromptBatch, number: jax.Array, parked: Any = None) -> tuple[Sampled, dict[str, jax.Array]]:
        group = config.completions_per_problem
        where = {"config": sampling, "group": group, "eos_ids": eos_ids, "pad_id": pad_id, "stop": stop}
        if not parked:
            return sample_and_score(model, scoring, params, prompts, key(SAMPLING, number), **where)
        sampled = partial_rollouts.sample(model, params, prompts, parked, number, partial(key, SAMPLING), **where)
        return sampled, score_traced(scoring, prompts, sampled, config=sampling)

    def learn(
        state: TrainState, reference: Any, prompts: PromptBatch, sampled: Sampled, parts: Parts, number: jax.Array
    ) -> tuple[TrainState, Metrics, Shown]:
        parked, sampled = sampled.parked, sampled._replace(parked=None)
        done = None if parked is None else parking.finished(parked)
        reward = total_reward(scoring, parts, key(SHUFFLING, number), done)
        batch = rollout_batch(prompts, sampled, reward)
        if parked is not None and done is not None:
            batch = partial_rollouts.to_learn_from(batch, parked, number, balanced=model.balance_weight > 0)
            order, back = partial_rollouts.together(done, split=split, shards=sharding.problem_shards(mesh))
            state, metrics, advantage = update(state, reference, partial_rollouts.in_order(batch, order))
            advantage = partial_rollouts.in_order(advantage, back)
        else:
            state, metrics, advantage = update(state, reference, batch)
        metrics |= rollout_metrics(sampled, parts, reward, done)
        if stop is not None:
            metrics["rollout/stop_string"] = mean_over(done, sampled.stopped, jnp.float32)
        ends = (sampled.truncated, sampled.stopped, sampled.length)
        shown = Shown(sampled.completion, sampled.mask, *ends, reward, advantage, dict(parts))
        if parked is None:
            shown = jax.tree.map(lambda x: x[: config.logged_problems], shown)
            if config.curriculum.on:
                shown = shown._replace(pass_rate=jnp.nanmean(jnp.clip(parts[accuracy], 0, 1), axis=-1))
            return state, metrics, shown
        done, seat = partial_rollouts.shown_first(parked, count=config.logged_problems)
        shown = jax.tree.map(lambda x: x[seat], shown)._replace(done=done, seat=seat)
        return replace(state, algorithm=parked), metrics | partial_rollouts.metrics(parked, sampled, number), shown

    def fused(state: TrainState, reference: Any, prompts: PromptBatch, number: jax.Array) -> tuple[TrainState, Metrics, Shown]:
        sampled, parts = collect(adapt(reference, state.params), prompts, number, state.algorithm if parked else None)
        return learn(replace(state, algorithm={}) if parked else state, reference, prompts, sampled, parts, number)

    at, everywhere, problems = states.shardings(model, optimizer, mesh), sharding.named(mesh), sharding.named(mesh, ("problems",))
    collected: Any = problems
    if critic is not None:
        at = replace(at, algorithm=states.shardings(critic.model, critic.optimizer, mesh))
    if parked:
        seats = jax.tree.map(lambda x: x.sharding, parked)
        at, collected = replace(at, algorithm=seats), (Sampled(*[problems] * 6, parked=seats), problems)  # pyright: ignore[reportArgumentType]
    out = (at, everywhere, everywhere)
    return OnlineStep(
        collect=jax.jit(collect, out_shardings=collected, donate_argnames="parked" if parked else None),
        learn=jax.jit(learn, donate_argnums=0, out_shardings=out),
        fused=None if scoring.host or scoring.group else jax.jit(fused, donate_argnums=0, out_shardings=out),
    )


def mean_over(done: jax.Array | None, x: jax.Array, dtype: Any = None) -> jax.Array:
    """The mean over [P, ...], or over the groups that are `done` [P]."""
    if done is None:
        return jnp.mean(x, dtype=dtype)
    x = x if dtype is None else x.astype(dtype)
    return masked_mean(x, jnp.broadcast_to(done.reshape(-1, *(1 for _ in x.shape[1:])), x.shape))


def mean_where_it_applies(part: jax.Array, done: jax.Array | None) -> jax.Array:
    """The mean over [P, G] without NaN, of groups that are `done` [P]; NaN where the part applies to none of them."""
    counts = ~jnp.isnan(part) if done is None else ~jnp.isnan(part) & done[:, None]
    return jnp.where(jnp.any(counts), masked_mean(jnp.where(counts, part, 0.0), counts), jnp.nan)


def rollout_metrics(sampled: Sampled, parts: Parts, reward: jax.Array, done: jax.Array | None = None) -> Metrics:
    """Means over the batch: reward and its parts, dead groups, length in tokens, truncated share, tokens sampled.

    Of a batch with groups that are not `done` [P], means over those that are; 0 without any. A part's mean is over the rows
    where it applies; NaN without any. With drafts the share of them that was accepted.
    """
    mean = partial(mean_over, done)
    length = jnp.sum(sampled.mask, axis=-1, dtype=jnp.int32)
    drafts = {}
    if sampled.drafts is not None:
        tried, accepted = jnp.sum(sampled.drafts.astype(jnp.float32), axis=(0, 1))
        drafts = {"rollout/drafts_accepted": accepted / jnp.maximum(tried, 1)}
    return {
        "reward/total": mean(reward),
        **{f"reward/{name}": mean_where_it_applies(values, done) for name, values in parts.items()},
        "reward/zero_variance": mean(zero_variance(reward), jnp.float32),
        "rollout/length": mean(length, jnp.float32),
        "rollout/truncated": mean(sampled.truncated, jnp.float32),
        "rollout/tokens": jnp.sum(length).astype(jnp.float32),
        **drafts,
    }


def reinforce(
    state: TrainState,
    *,
    reference: Any,
    step_fn: OnlineStep,
    mesh: Mesh,
    config: OnlineConfig,
    sampling: SamplingConfig,
    scoring: Scoring,
    task: Task,
    tokenizer: Tokenizer,
    stream: Stream,
    evaluate: Evaluate,
    evaluation: EvaluationConfig,
    start: int,
    checkpointer: Checkpointer,
    saving: Saving,
    log: RunLog,
    progress: Progress,
    stop: Callable[[], bool],
    resumed: Mapping[str, Any] | None = None,
    stop_strings: StopStrings | None = None,
    pool: int = 0,
    seed: int = 0,
    trace: Trace = no_trace,
) -> Outcome:
    """Reinforces from step `start` to `config.steps`, or until `stop()`, when it saves and returns.

    `reference` may be None where the algorithm has no use for it and the state holds all parameters, not adapters. `resumed` is
    what the checkpoint of step `start` says besides: with partial rollouts the place in the stream depends on what was written.
    With a curriculum the stream's first `pool` problems are chosen from, by what is known of them
    and by `seed`.
    """
    count = config.problems_per_step
    held, keeper = sharding.held_rows(mesh, count), sharding.keepers(mesh, count)
    own = np.flatnonzero(keeper == jax.process_index())  # the rows that are scored here
    progress.stage(STAGE, config.steps, start)
    parks = sampling.parking.step_tokens > 0
    seats = partial_rollouts.seats_of(resumed or {}, problems=config.problems_per_step)
    counts = curriculum.fresh(pool) if "curriculum" not in (resumed or {}) else curriculum.from_json((resumed or {})["curriculum"])
    chosen = np.zeros(0, np.int64)

    def prepare_batch(step: int) -> tuple[ProblemOf, PromptBatch]:
        """The problem of each row, and the prompts of those rows that this process holds."""
        nonlocal seats, counts, chosen
        # keys are folded from the place in the stream: a step may hold a problem twice, at the border of two epochs
        places = numbers = list(range(step * count, (step + 1) * count))
        if parks:
            seats = partial_rollouts.seated(seats)
            places = numbers = [number for number in seats.numbers if number is not None]
        elif config.curriculum.on:
            counts, chosen = curriculum.choose(counts, step=step, count=count, config=config.curriculum, seed=seed)
            places = chosen.tolist()
        drawn = {row: stream(places[row], 1)[0][1] for row in held.tolist()}
        numbered = [(numbers[row], problem) for row, problem in drawn.items()]
        batch = prompt_batch(numbered, task=task, tokenizer=tokenizer, **prompt_limits(sampling))
        # what people are shown may lie elsewhere: then it is drawn again
        return lambda row: drawn[row] if row in drawn else stream(places[row], 1)[0][1], sharding.place_held(mesh, batch, count)

    programs: dict[str, Any] = {}

    def program(name: str, function: Any, *args: Any) -> Any:
        nonlocal clock
        if name not in programs:
            begun = time.perf_counter()
            programs[name] = compiled(function, *args)
            clock += time.perf_counter() - begun  # compiling is no part of a step
        return programs[name]

    def staged(state: TrainState, prompts: PromptBatch, problem: ProblemOf, number: jax.Array) -> Any:
        times = {}
        policy = adapt(reference, state.params)
        given = (policy, prompts, number, *([state.algorithm] if parks else []))
        collect = program("collect", step_fn.collect, *given)
        begun = time.perf_counter()
        sampled, parts = jax.block_until_ready(collect(*given))
        times["time/sample"], begun = time.perf_counter() - begun, time.perf_counter()
        written = sharding.fetch_held(sampled._replace(logp=None, parked=None, drafts=None), own)
        groups = completions(written, tokenizer, stop=stop_strings)
        done = None
        if parks:
            done, state = sharding.fetch(parking.finished(sampled.parked))[own], replace(state, algorithm={})
        traced = sharding.fetch_held(parts, own) if scoring.group else {}
        shared = {"keeper": keeper, "size": config.completions_per_problem}
        host = score_on_host(scoring, [problem(row) for row in own.tolist()], groups, done, traced=traced, **shared)
        times["time/score"] = time.perf_counter() - begun
        times |= {f"reward/failed/{reason}": share for reason, share in host.shares().items()}
        times |= {f"rollout/none/{name}": share for name, share in host.none_shares().items()}
        batch = (state, reference, prompts, sampled, {**parts, **sharding.place(mesh, host.parts, ("problems",))}, number)
        learn = program("learn", step_fn.learn, *batch)
        begun = time.perf_counter()
        out = jax.block_until_ready(learn(*batch))
        times["time/update"] = time.perf_counter() - begun
        return *out, times

    pending: Any = None
    clock = time.perf_counter()

    def flush(state: TrainState | None) -> None:
        """Writes the last step down: one step late, so that the device already works on the next one."""
        nonlocal pending, clock
        if pending is None:
            return
        step, metrics, shown, problem, times = pending
        pending = None
        metrics, shown = sharding.fetch((metrics, shown))
        values = {name: float(value) for name, value in metrics.items()}
        for name in scoring.weights:
            if math.isnan(values[f"reward/{name}"]):  # the part applied to no row
                del values[f"reward/{name}"]
        check_finite(STAGE, step, values)
        if parks and not values["rollout/finished"]:  # means over nothing are no zeros
            values = {name: value for name, value in values.items() if name in partial_rollouts.ALWAYS}
        now = time.perf_counter()
        seconds, clock = now - clock, now
        values |= {**times, "time/step": seconds, "throughput/tokens_per_second": values["rollout/tokens"] / seconds}
        if state is not None:
            values |= evaluate(adapt(reference, state.params))[0]
            clock = time.perf_counter()
        log.metrics(STAGE, step, values)
        log.rollouts(STAGE, step, rows_of(shown, problem, tokenizer, stop=stop_strings))
        progress.update(step, values)

    step = start
    while step < config.steps:
        trace(step + 1, state)
        problem, prompts = prepare_batch(step)
        number = sharding.place(mesh, np.asarray(step, np.int32), ())
        if step_fn.fused is not None:
            fused = program("fused", step_fn.fused, state, reference, prompts, number)
            state, metrics, shown = fused(state, reference, prompts, number)
            times: dict[str, float] = {}
        else:
            state, metrics, shown, times = staged(state, prompts, problem, number)
        step += 1
        flush(None)
        if parks:  # which seats are free: the host waits for it
            seats = partial_rollouts.left(seats, sharding.fetch(shown.done).tolist())
        if config.curriculum.on:  # what the next step trains on: here too
            rates = np.asarray(sharding.fetch(shown.pass_rate))
            counts = curriculum.record(counts, chosen, rates, group=config.completions_per_problem)
            times |= curriculum.metrics(counts, config.curriculum)
        pending = (step, metrics, shown, problem, times)
        stopping = stop()
        last = step == config.steps
        # the last step's evaluation is the caller's, who also wants its completions
        if evaluation.every_steps and step % evaluation.every_steps == 0 and not last:
            flush(state)
        if last or stopping or (saving.every_steps and step % saving.every_steps == 0):
            flush(None)
            where: dict[str, Any] = seats.extra() if parks else {"position": step * config.problems_per_step}
            if config.curriculum.on:
                where["curriculum"] = curriculum.to_json(counts)
            checkpointer.save(step, state, {"stage": STAGE, **where})
            clock = time.perf_counter()  # a save is no part of a step
        if stopping and not last:
            checkpointer.wait()
            return Outcome(state, finished=False)
    flush(None)
    checkpointer.wait()
    return Outcome(state, finished=True)
