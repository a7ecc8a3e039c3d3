"""Whether an experiment's numbers can hold together: ranges, sizes that divide each other, names that stand for one thing each.

Everything here looks at the typed config alone, before anything is compiled. What a component alone can judge it checks itself, and
is called from here or where it is built. Absent on purpose: keys and types, which `jaxreason.config` has told by then.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

from jaxreason.config import Config
from jaxreason.data.curriculum import ORDERS
from jaxreason.models.config import Architecture
from jaxreason.naming import nearest
from jaxreason.rewards import pool
from jaxreason.sampling.rollout import SamplingConfig
from jaxreason.training import profiling
from jaxreason.training.optimizer import check as check_optimizer

LEAST = {
    "seed": 0,
    "sampling.max_prompt_tokens": 1,
    "sampling.max_completion_tokens": 2,
    "sampling.parking.step_tokens": 0,
    "sampling.draft": 0,
    "supervised.demonstrations_per_step": 1,
    "supervised.demonstrations_per_microbatch": 1,
    "supervised.log_every_steps": 1,
    "online.steps": 0,
    "online.problems_per_step": 1,
    "online.completions_per_problem": 1,
    "online.problems_per_update": 1,
    "online.problems_per_microbatch": 1,
    "online.epochs": 1,
    "online.logged_problems": 0,
    "online.curriculum.tries": 1,
    "online.curriculum.pool": 0,
    "critic.clip": 0,
    "critic.alone_steps": 0,
    "critic.learning_rate": 0,
    "evaluation.every_steps": 0,
    "evaluation.problems_per_batch": 1,
    "checkpoint.every_steps": 0,
    "checkpoint.keep": 1,
    "model.balance_weight": 0,
    "model.numerics.logits_chunk_tokens": 1,
    "model.lora.rank": 0,
}
DIVIDES = (
    ("online.problems_per_update", "online.problems_per_step"),
    ("online.problems_per_microbatch", "online.problems_per_update"),
    ("supervised.demonstrations_per_microbatch", "supervised.demonstrations_per_step"),
)
SHARDED = ("online.problems_per_microbatch", "supervised.demonstrations_per_microbatch", "evaluation.problems_per_batch")
# metrics that stand beside the reward's parts
RESERVED = {"total", "zero_variance", "length", "truncated", "pass@1", "reward", "answered", "failed"}
LARGEST_SEED = 2**32 - 1


def check(config: Config, *, shards: int) -> None:
    """Raises ValueError where a value is out of its range or sizes contradict each other, before anything is compiled.

    `shards` is the number of devices over which problems are split.
    """

    def at(key: str) -> Any:
        return functools.reduce(getattr, key.split("."), config)

    least = LEAST | {f"supervised.phases.{name}.steps": 0 for name in config.supervised.phases}
    for key, smallest in least.items():
        value = config.supervised.phases[key.split(".")[2]].steps if ".phases." in key else at(key)
        if value < smallest:
            raise ValueError(f"config.{key} is {value}: expected {smallest} or more")
    if config.seed > LARGEST_SEED:
        raise ValueError(f"config.seed is {config.seed}: expected at most {LARGEST_SEED}")
    if not config.sampling.temperature > 0:
        raise ValueError(
            f"config.sampling.temperature is {config.sampling.temperature}: expected more than 0; evaluation is greedy by itself"
        )
    _check_sampling(config.sampling, shards=shards)
    pool.check(**dataclasses.asdict(config.scoring), key="config.scoring.")
    for piece, whole in DIVIDES:
        if at(whole) % at(piece):
            raise ValueError(
                f"config.{piece} is {at(piece)}, which does not divide config.{whole} = {at(whole)}: "
                f"choose a divisor of {at(whole)}"
            )
    for key in SHARDED:
        runs = key.startswith("evaluation") or at(key.split(".")[0]).steps > 0
        if runs and at(key) % shards:
            below = at(key) // shards * shards
            near = f"{below} or {below + shards}" if below else str(shards)
            raise ValueError(
                f"config.{key} is {at(key)}, which the {shards} devices along mesh axes data, fsdp and expert do not divide: "
                f"choose a multiple of {shards}, such as {near}"
            )
    for stage in ("supervised", "online"):
        check_optimizer(at(stage).optimizer, key=f"{stage}.optimizer")
    if not config.reward:
        raise ValueError("config.reward has no part: add a rule, config.reward.accuracy = schema.part('...'), in the config's file")
    for name in RESERVED & set(config.reward):
        raise ValueError(f"config.reward has a part named '{name}', which is a metric's own name: choose another")
    _check_curriculum(config)
    profiling.steps_of(config.profile, last=config.online.steps)
    accuracy = config.evaluation.accuracy
    if accuracy not in config.reward:
        raise ValueError(
            f"config.evaluation.accuracy is '{accuracy}', which is no part of the reward: {nearest(accuracy, [*config.reward])}"
        )


def _check_curriculum(config: Config) -> None:
    c = config.online.curriculum
    if c.order not in ORDERS:
        raise ValueError(f"config.online.curriculum.order is '{c.order}': expected 'easy_first', 'prioritised' or '', as they come")
    if not 0 <= c.lowest <= c.highest <= 1:
        raise ValueError(
            f"config.online.curriculum.lowest is {c.lowest} and highest is {c.highest}: expected 0 <= lowest <= highest <= 1"
        )
    if c.on and config.sampling.parking.step_tokens:
        raise ValueError(
            f"config.sampling.parking.step_tokens is {config.sampling.parking.step_tokens} and config.online.curriculum is on: a "
            "problem that is parked has no pass rate yet, so use one of the two"
        )


def _check_sampling(sampling: SamplingConfig, *, shards: int) -> None:
    """What is no part of the law, which `law.check` looks at when the vocabulary is known."""
    slots = sampling.slots
    if slots and (slots < shards or slots & (slots - 1) or slots % shards):
        raise ValueError(
            f"config.sampling.slots is {slots}: expected 0, for all at once, or a power of two that the {shards} devices along "
            "mesh axes data, fsdp and expert divide"
        )
    if sampling.overlong not in ("leave_out", "cut", "refuse"):
        raise ValueError(f"config.sampling.overlong is '{sampling.overlong}': expected 'leave_out', 'cut' or 'refuse'")
    parking = sampling.parking
    if parking.step_tokens > sampling.max_completion_tokens:
        raise ValueError(
            f"config.sampling.parking.step_tokens is {parking.step_tokens}, more than config.sampling.max_completion_tokens = "
            f"{sampling.max_completion_tokens}, so that nothing would ever be parked: lower it, or set it to 0"
        )
    for name, given, why in (("slots", slots, "need a slot each"), ("draft", sampling.draft, "go on without drafts")):
        if parking.step_tokens and given:
            raise ValueError(
                f"config.sampling.parking.step_tokens is {parking.step_tokens} and config.sampling.{name} is {given}: parked "
                f"completions {why}: set one of the two to 0"
            )
    if parking.cache not in ("recomputed", "kept"):
        raise ValueError(f"config.sampling.parking.cache is '{parking.cache}': expected 'recomputed' or 'kept'")
    if "" in sampling.stop:
        raise ValueError(f"config.sampling.stop is {sampling.stop!r}: expected texts of at least one character each")


def check_context(config: Config, architecture: Architecture, *, whose: str = "model") -> None:
    """Raises ValueError where prompt and completion do not fit the context of the model, or of the critic."""
    prompt, completion = config.sampling.max_prompt_tokens, config.sampling.max_completion_tokens
    if prompt + completion > architecture.max_positions:
        raise ValueError(
            f"config.sampling.max_prompt_tokens = {prompt} and max_completion_tokens = {completion} make {prompt + completion} "
            f"tokens, and the {whose}'s context holds {architecture.max_positions}: lower one of them"
        )
