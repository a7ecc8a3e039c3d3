"""A queue of completions behind the engine's slots: one that ends gives its slot to the next, in the same loop on the device.

Every completion has its own key and a row in the record, so neither the number of slots nor the order of finishing shows. When the
queue is empty, those that still live are moved to fewer slots (`compact`), by the host, between two calls of `drain`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Int

from jaxreason.models.decoder import Model
from jaxreason.sampling.engine import LIVE, Leaf, Record, Roots, Rules, Slots, begun, grammar_start, select, step


@struct.dataclass
class Queue:
    """Completions that wait for a slot: of every problem G, numbered problem by problem; a device has those of its problems."""

    key: Leaf  # [N] keys
    limit: Leaf  # [N] int32, the most tokens of each
    taken: Leaf  # [devices] int32, how many of its own each device has taken
    count: Leaf  # [devices] int32, how many of its own there are, the first ones
    steps: Leaf | None = None  # [] int32, that the last `drain` made; for who asks


def drain(
    model: Model,
    params: Any,
    roots: Roots,
    slots: Slots,
    record: Record,
    queue: Queue,
    *,
    rules: Rules,
    group: int,
    steps: int | Int[Array, ""] | None = None,
    least: int | Int[Array, ""] = 0,
    width: int = 8,
) -> tuple[Slots, Record, Queue]:
    """Extends slots, and gives one that stops the queue's next completion, until there are none, or `steps` steps are made.

    Returns too when the queue is empty and no device has more than `least` live slots, so that they can be moved to fewer
    (`compact`). `record` has a row for each of the queue's completions, which is filled when it has ended; `collect` fills those of
    the ones that have not.
    """
    lanes = queue.taken.shape[0]

    def running(carry: Any) -> jax.Array:
        count, slots, _, queue, _ = carry
        live = jnp.sum((slots.record.status == LIVE).reshape(lanes, -1), axis=1, dtype=jnp.int32)
        some = jnp.any(live > least) | (jnp.any(live > 0) & jnp.any(queue.taken < queue.count))
        return some if steps is None else some & (count < steps)

    def body(carry: Any) -> Any:
        count, slots, record, queue, copies = carry
        limit = jnp.minimum(jnp.take(queue.limit, slots.number, mode="clip"), slots.record.tokens.shape[1])
        before = slots.record.status == LIVE
        slots = step(model, params, roots, slots, rules=rules, limit=limit, width=width, copies=copies)
        ended = before & (slots.record.status != LIVE)

        def turn(slots: Slots, record: Record, queue: Queue, copies: Any) -> tuple[Slots, Record, Queue, Any]:
            record = collect(slots, record, ended)
            slots, queue = _refill(roots, slots, queue, rules=rules, group=group)
            if copies is not None:
                copies = model.at_hand(roots.prompts, copies, slots.root, ended)
            return slots, record, queue, copies

        return count + 1, *jax.lax.cond(jnp.any(ended), turn, lambda *same: same, slots, record, queue, copies)

    slots, queue = _refill(roots, slots, queue, rules=rules, group=group)
    copies = model.at_hand(roots.prompts, None, slots.root, jnp.ones_like(slots.root, bool))
    state = (jnp.zeros((), jnp.int32), slots, record, queue, copies)
    made, slots, record, queue, _ = jax.lax.while_loop(running, body, state)
    return slots, record, queue if queue.steps is None else replace(queue, steps=made)


def collect(slots: Slots, record: Record, which: Bool[Array, " S"]) -> Record:
    """The queue's record with the rows of these slots."""
    first = jnp.argsort(~which, stable=True).astype(jnp.int32)

    def one(i: jax.Array, record: Record) -> Record:
        def put(there: jax.Array, new: jax.Array) -> jax.Array:
            row = jax.lax.dynamic_index_in_dim(new, first[i], keepdims=False)
            return jax.lax.dynamic_update_index_in_dim(there, row, slots.number[first[i]], 0)

        return jax.tree.map(put, record, slots.record)

    return jax.lax.fori_loop(jnp.int32(0), jnp.sum(which, dtype=jnp.int32), one, record)


def _refill(roots: Roots, slots: Slots, queue: Queue, *, rules: Rules, group: int) -> tuple[Slots, Queue]:
    """Gives every slot that is not live the next completion in its device's part of the queue, as long as there are any."""
    lanes, total = queue.taken.shape[0], queue.key.shape[0]
    idle = (slots.record.status != LIVE).reshape(lanes, -1)
    number = queue.taken[:, None] + jnp.cumsum(idle, axis=1, dtype=jnp.int32) - 1
    new = idle & (number < queue.count[:, None])
    row = (number + (jnp.arange(lanes, dtype=jnp.int32) * (total // lanes))[:, None]).reshape(-1)
    fresh, root = new.reshape(-1), row // group

    def put(there: jax.Array, old: jax.Array) -> jax.Array:
        return jnp.where(fresh.reshape(-1, *(1 for _ in old.shape[1:])), there, old)

    zero, new_ones = jnp.zeros_like(slots.root), begun(roots, root)
    record = jax.tree.map(jnp.zeros_like, slots.record)  # LIVE is 0
    record = replace(record, tokens=jnp.full_like(record.tokens, rules.pad_id), parent=jnp.full_like(record.parent, -1))
    record = jax.tree.map(put, record, slots.record)
    slots = replace(
        slots,
        root=put(root, slots.root),
        key=put(queue.key[jnp.clip(row, 0, total - 1)], slots.key),
        search=put(zero, slots.search),
        grammar=put(zero + grammar_start(rules), slots.grammar),
        record=record,
        number=put(row, slots.number),
        **jax.tree.map(put, new_ones, {name: getattr(slots, name) for name in new_ones}),
    )
    return slots, replace(queue, taken=queue.taken + jnp.sum(new, axis=1, dtype=jnp.int32))


def compact(model: Model, slots: Slots, *, slots_left: int, lanes: int = 1) -> Slots:
    """The live slots, of which there are no more than `slots_left`, in so many slots; each stays on its device."""
    idle = (slots.record.status != LIVE).reshape(lanes, -1)
    order = jnp.argsort(idle, axis=1, stable=True).astype(jnp.int32)
    kept = order[:, : slots_left // lanes] + (jnp.arange(lanes, dtype=jnp.int32) * idle.shape[1])[:, None]
    return select(model, slots, kept.reshape(-1))


def buckets(slots: int, *, lanes: int = 1, least: int = 4) -> tuple[int, ...]:
    """Numbers of slots to move to as completions end, from `slots` down by halves."""
    sizes = [slots]
    while sizes[-1] % (2 * lanes) == 0 and sizes[-1] // 2 >= least * lanes:
        sizes.append(sizes[-1] // 2)
    return tuple(sizes)
