"""Partial rollouts in the loop: which groups are learnt from, how much each counts, and which problem sits where.

Kimi k1.5, arXiv:2501.12599, section 2.6.2. Each of a step's P problems has a seat. A group whose completions have all ended is
learnt from, and its seat takes the stream's next problem; the others stay seated, parked (sampling/parking.py). The update keeps
its shape: the rows of a group that is not learnt from have an empty mask, which is in no sum and no denominator.

How much a completion counts: an algorithm's weights are means over the rows that are there, so alone they would make a completion
count more the fewer end beside it. They are scaled by the share of groups that ended, which makes them means over all P: every
completion counts the same in whichever step it ends. An update without any group does not happen: parameters, moments, the
schedule's count and the state's stay as they are.

Deliberately absent: an importance ratio of its own. `logp_behaviour` is, token by token, that of the policy which chose it, for
algorithms that ask for it; `logp_old` is the policy at the update's start, as always.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxreason.batch import PromptBatch, RolloutBatch
from jaxreason.models.decoder import Model
from jaxreason.numerics import masked_mean
from jaxreason.sampling import engine, parking
from jaxreason.sampling.engine import Rules
from jaxreason.sampling.parking import Parked
from jaxreason.sampling.rollout import Sampled, SamplingConfig, completion_keys
from jaxreason.sampling.stops import StopStrings
from jaxreason.training.step import Split

KEPT = "kept"
ALWAYS = ("rollout/tokens", "rollout/finished", "rollout/parked")  # the metrics of a step in which no group ends
NOBODY = -1  # stands in a checkpoint for the problem of a free seat

# ---- on the device


def rules_of(config: SamplingConfig, *, eos_ids: tuple[int, ...], pad_id: int, stop: StopStrings | None = None) -> Rules:
    return Rules(config.law, eos_ids, pad_id, None if stop is None else jax.tree.map(jnp.asarray, stop.machine))


def layout(
    model: Model,
    params: Any,
    mesh: Mesh,
    *,
    config: SamplingConfig,
    problems: int,
    group: int,
    eos_ids: tuple[int, ...],
    pad_id: int,
) -> Any:
    """Shapes and shardings of what a run parks, given those of all the model's weights; {} where it parks nothing."""
    if not config.parking.step_tokens:
        return {}
    return parking.layout(
        model,
        params,
        mesh,
        problems=problems,
        group=group,
        prompt_tokens=config.max_prompt_tokens,
        tokens=config.max_completion_tokens,
        rules=rules_of(config, eos_ids=eos_ids, pad_id=pad_id),
        kept=config.parking.cache == KEPT,
    )


def sample(
    model: Model,
    params: Any,
    prompts: PromptBatch,
    parked: Parked,
    number: jax.Array,
    key_of_step: Any,
    *,
    config: SamplingConfig,
    group: int,
    eos_ids: tuple[int, ...],
    pad_id: int,
    stop: StopStrings | None = None,
) -> Sampled:
    """The groups that end in step `number`, the rows of all others empty; `key_of_step(number)` is a step's key. To be traced."""

    def keys(began: jax.Array, problem: jax.Array) -> jax.Array:
        return completion_keys(key_of_step(began), problem[None], group=group)[0]

    key = jax.vmap(keys)(parking.begun(parked, number), prompts.problem)
    rules = rules_of(config, eos_ids=eos_ids, pad_id=pad_id, stop=stop)
    parked = parking.grow(model, params, prompts, parked, number, key, rules=rules, step_tokens=config.parking.step_tokens)
    done, record = parking.finished(parked)[:, None, None], parked.record
    shape = (*key.shape, -1)
    tokens, logp = record.tokens.reshape(shape), record.logp.reshape(shape)
    return Sampled(
        jnp.where(done, tokens, jnp.full_like(tokens, pad_id)),
        record.mask.reshape(shape) & done,
        jnp.where(done, logp, jnp.zeros_like(logp)),
        (record.status == engine.LENGTH).reshape(key.shape) & done[..., 0],
        (record.status == engine.STOP_STRING).reshape(key.shape) & done[..., 0],
        jnp.where(done[..., 0], record.length.reshape(key.shape), jnp.zeros(key.shape, jnp.int32)),
        parked,
    )


def to_learn_from(batch: RolloutBatch, parked: Parked, number: jax.Array, *, balanced: bool) -> RolloutBatch:
    """The batch with `fresh`: the tokens whose log-probability the trainer should find again, those that this step chose.

    With kept keys and values only completions that this step began: the others' were predicted from older policies' too. Where a
    load-balance loss counts prompts as well (`balanced`), those of groups that are not learnt from become padding.
    """
    done = parking.finished(parked)
    fresh = (parked.policy == number).reshape(batch.mask.shape)
    if parked.own is not None:
        fresh = fresh & (parked.began == number)[:, None, None]
    prompt_mask = batch.prompt_mask & done[:, None] if balanced else batch.prompt_mask
    reward = jnp.asarray(batch.reward)
    reward = jnp.where(done[:, None], reward, jnp.zeros_like(reward))
    return replace(batch, reward=reward, prompt_mask=prompt_mask, fresh=fresh)


def together(done: jax.Array, *, split: Split, shards: int) -> tuple[jax.Array, jax.Array]:
    """The order [P] in which groups that are done fill one micro-batch after the other, and the order that undoes it.

    So those that nobody is left for cost nothing. Groups stay on their device, and where all are done, each in its place.
    """
    own = done.shape[0] // shards
    place = np.arange(own)  # of a device's groups, as `step.slices` takes them: micro-batch by micro-batch
    for parts in (done.shape[0] // split.problems_per_update, split.problems_per_update // split.problems_per_microbatch):
        place = np.swapaxes(place.reshape(*place.shape[:-1], -1, parts), -1, -2)
    place = jnp.asarray(place.reshape(-1), jnp.int32)
    mine = done.reshape(shards, own)[:, place]
    chosen = place[jnp.argsort(~mine, axis=1, stable=True)]
    order = jnp.zeros((shards, own), jnp.int32).at[:, place].set(chosen)
    return order, jnp.argsort(order, axis=1).astype(jnp.int32)


def in_order(tree: Any, order: jax.Array) -> Any:
    """Arrays of [P, ...] in this order, which leaves every group on its device."""

    def moved(x: jax.Array) -> jax.Array:
        return jax.vmap(lambda own, at: own[at])(x.reshape(*order.shape, *x.shape[1:]), order).reshape(x.shape)

    return jax.tree.map(moved, tree)


def shuffled(values: jax.Array, key: jax.Array, done: jax.Array | None) -> jax.Array:
    """[P, G] dealt out anew among the groups that are done, whose values alone it deals; with all of them a permutation."""
    if done is None:
        return jax.random.permutation(key, values.reshape(-1)).reshape(values.shape)
    flat = jnp.repeat(done, values.shape[1], total_repeat_length=values.size)
    order = jax.random.permutation(key, jnp.arange(values.size, dtype=jnp.int32))
    order = order[jnp.argsort(~flat[order], stable=True)]
    dealt = values.reshape(-1)[order][jnp.maximum(jnp.cumsum(flat, dtype=jnp.int32) - 1, 0)]
    return jnp.where(flat, dealt, values.reshape(-1)).reshape(values.shape)


def metrics(parked: Parked, sampled: Sampled, number: jax.Array) -> dict[str, jax.Array]:
    """What was parked, by how many policies a completion that is learnt from was written, and how old its tokens are, in steps."""
    done, shape = parking.finished(parked), sampled.mask.shape
    policy, length = parked.policy.reshape(shape), parked.record.length.reshape(shape[:2])
    told = jnp.arange(1, shape[2], dtype=jnp.int32)[None, None] < length[..., None]
    turns = 1 + jnp.sum((policy[..., 1:] != policy[..., :-1]) & told, axis=-1, dtype=jnp.int32)
    chosen = parked.record.mask & (parked.policy == number)
    return {
        "rollout/tokens": jnp.sum(chosen, dtype=jnp.int32).astype(jnp.float32),
        "rollout/finished": jnp.mean(done, dtype=jnp.float32),
        "rollout/parked": jnp.mean(parked.record.status == engine.PARKED, dtype=jnp.float32),
        "rollout/segments": masked_mean(turns.astype(jnp.float32), jnp.broadcast_to(done[:, None], turns.shape)),
        "rollout/staleness": masked_mean((number - policy).astype(jnp.float32), sampled.mask),
    }


def shown_first(parked: Parked, *, count: int) -> tuple[jax.Array, jax.Array]:
    """Which groups are done, and `count` seats to show people: done ones first."""
    done = parking.finished(parked)
    return done, jnp.argsort(~done, stable=True)[:count].astype(jnp.int32)


# ---- on the host


class Seats(NamedTuple):
    """Who sits where: each seat's place in the stream of problems, None where it is free, and the stream's next place."""

    numbers: tuple[int | None, ...]
    position: int

    def extra(self) -> dict[str, Any]:
        """What a checkpoint says of them."""
        return {"position": self.position, "seats": [NOBODY if number is None else number for number in self.numbers]}


def seats_of(extra: Mapping[str, Any], *, problems: int) -> Seats:
    """The seats as a checkpoint says, all of them free where there is none."""
    numbers = extra.get("seats", [NOBODY] * problems)
    return Seats(tuple(None if number == NOBODY else number for number in numbers), extra.get("position", 0))


def seated(seats: Seats) -> Seats:
    """Gives free seats the stream's next problems."""
    numbers, position = [], seats.position
    for number in seats.numbers:
        numbers.append(position if number is None else number)
        position += number is None
    return Seats(tuple(numbers), position)


def left(seats: Seats, done: Sequence[bool]) -> Seats:
    """The seats after the groups that are done have gone."""
    return seats._replace(numbers=tuple(None if gone else number for number, gone in zip(seats.numbers, done, strict=True)))
