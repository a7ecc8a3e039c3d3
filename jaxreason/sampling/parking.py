"""Parking: completions that a step of training leaves unfinished, and a later one goes on with under a newer policy.

Partial rollouts (Kimi k1.5, arXiv:2501.12599, section 2.6.2): a completion grows by so many tokens a step, so that a long one does
not hold the others. Between steps a problem keeps its seat, with the tokens of its group, each with its log-probability under the
policy that chose it. Their keys and values are read anew by the newer policy, or kept as older ones left them. Prompts are always
read anew.
A completion's random numbers are folded from the step in which it began and from each token's place, so where it was parked
changes nothing but the policy. Deliberately absent: who learns from which group (training/partial.py).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Int

from jaxreason import sharding
from jaxreason.batch import PromptBatch
from jaxreason.models import cache
from jaxreason.models.decoder import Model
from jaxreason.sampling import engine
from jaxreason.sampling.engine import Leaf, Record, Roots, Rules, Slots

PIECE = 32  # tokens of every completion that are read again at once: what bounds the memory of that


@struct.dataclass
class Parked:
    """The groups in P seats between two steps; a row is a completion, seat by seat. A seat whose group has ended is free."""

    record: Record  # [P G] rows; status PARKED or why it ended
    policy: Leaf  # [P G, T] int32, the step whose policy chose the token
    began: Leaf  # [P] int32, the step in which the seat's group began
    search: Leaf  # [P G] int32, as in Slots
    grammar: Leaf  # [P G] int32
    own: Any = None  # keys and values, where they are kept
    hidden: Leaf | None = None  # [P G, D], likewise


def ended(record: Record) -> Bool[Array, " R"]:
    """Which completions have come to an end; a row that was never begun has, too."""
    return (record.status != engine.LIVE) & (record.status != engine.PARKED)


def finished(parked: Parked) -> Bool[Array, " P"]:
    """Which groups have ended as a whole."""
    return jnp.all(ended(parked.record).reshape(parked.began.shape[0], -1), axis=1)


def layout(
    model: Model, params: Any, mesh: Mesh, *, problems: int, group: int, prompt_tokens: int, tokens: int, rules: Rules, kept: bool
) -> Parked:
    """Shapes, types and shardings of what is parked, from those of all the model's weights; nothing is allocated."""

    def seated(params: Any, prompt: jax.Array) -> Slots:
        params = model.prepare_sampling(params)
        roots = engine.open(model, params, prompt, prompt > 0, rules=rules)
        row = jnp.arange(problems * group, dtype=jnp.int32)
        return engine.seat(
            model, roots, row // group, jax.random.split(jax.random.key(0), row.shape[0]), tokens=tokens, rules=rules
        )

    slots = jax.eval_shape(seated, params, jax.ShapeDtypeStruct((problems, prompt_tokens), jnp.int32))

    def rows(x: Any) -> Any:
        axes = ("problems", *(None for _ in x.shape[1:]))
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding.named(mesh, axes))

    def places(own: Any) -> Any:
        if not isinstance(own, cache.Own):
            return jax.tree.map(rows, own)
        return jax.tree.map(
            lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), own, cache.own_shardings(own, mesh)
        )

    return Parked(
        record=jax.tree.map(rows, slots.record),
        policy=rows(slots.record.tokens),
        began=rows(jax.ShapeDtypeStruct((problems,), jnp.int32)),
        search=rows(slots.search),
        grammar=rows(slots.grammar),
        own=places(slots.own) if kept else None,
        hidden=rows(slots.hidden) if kept else None,
    )


def vacant(layout: Parked) -> Parked:
    """Seats in which nobody sits yet, on the device."""

    def make() -> Parked:
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), layout)
        return replace(zeros, record=replace(zeros.record, status=jnp.full_like(zeros.record.status, engine.FREE)))

    return jax.jit(make, out_shardings=jax.tree.map(lambda x: x.sharding, layout))()


def begun(parked: Parked, number: Int[Array, ""]) -> Int[Array, " P"]:
    """The step in which each seat's group begins: `number` for free ones, which are taken now."""
    return jnp.where(finished(parked), number, parked.began)


def grow(
    model: Model,
    params: Any,
    prompts: PromptBatch,
    parked: Parked,
    number: Int[Array, ""],
    key: jax.Array,
    *,
    rules: Rules,
    step_tokens: int,
) -> Parked:
    """Step `number`: free seats begin their prompts' groups, and every unfinished completion grows by up to `step_tokens` tokens.

    `key` [P, G] has the completions' keys, folded from the step in which each began (`begun`). To be traced.
    """
    problems, group = key.shape
    total, tokens = problems * group, parked.policy.shape[1]
    new = jnp.repeat(finished(parked), group, total_repeat_length=total)
    params = model.prepare_sampling(params)
    roots = engine.open(model, params, prompts.prompt, prompts.prompt_mask, rules=rules)
    root = jnp.arange(total, dtype=jnp.int32) // group
    slots = engine.seat(model, roots, root, key.reshape(-1), tokens=tokens, rules=rules)
    # the same numbers as those that were looked up, but where devices split the problems nothing is sent
    hidden = jnp.broadcast_to(roots.hidden[:, None], (problems, group, roots.hidden.shape[1])).reshape(total, -1)
    slots = _go_on(model, params, roots, replace(slots, hidden=hidden), parked, new, rules=rules)
    before = slots.record.length
    slots = engine.extend(model, params, roots, slots, rules=rules, limit=jnp.minimum(before + step_tokens, tokens), width=0)
    record = slots.record
    unfinished = (record.status == engine.LENGTH) & (record.length < tokens)
    place = jnp.arange(tokens, dtype=jnp.int32)[None]
    chosen_now = (place >= before[:, None]) & (place < record.length[:, None])
    return replace(
        parked,
        record=replace(record, status=jnp.where(unfinished, jnp.int8(engine.PARKED), record.status)),
        policy=jnp.where(chosen_now, number, _where(new, jnp.zeros_like(parked.policy), parked.policy)),
        began=begun(parked, number),
        search=slots.search,
        grammar=slots.grammar,
        own=None if parked.own is None else slots.own,
        hidden=None if parked.hidden is None else slots.hidden,
    )


def _go_on(model: Model, params: Any, roots: Roots, slots: Slots, parked: Parked, new: Bool[Array, " S"], *, rules: Rules) -> Slots:
    """Slots at their prompts' ends with what is parked in them, where they are not new."""
    going = ~(new | ended(parked.record))
    if parked.own is None:
        slots = _read_again(model, params, roots, slots, parked.record, going, rules=rules)
    else:
        hidden = _where(new, slots.hidden, parked.hidden)
        slots = replace(slots, own=parked.own, hidden=hidden, seen=_with_own(slots.seen, parked.record, going))
    blank = engine.blank(*parked.record.tokens.shape, rules=rules, dtype=parked.record.logp.dtype)
    blank = replace(blank, status=jnp.full_like(blank.status, engine.LIVE))
    start = jnp.zeros_like(slots.grammar) + (0 if rules.grammar is None else rules.grammar.start)
    return replace(
        slots,
        record=jax.tree.map(lambda fresh, old: _where(new, fresh, old), blank, parked.record),
        search=_where(new, jnp.zeros_like(parked.search), parked.search),
        grammar=_where(new, start, parked.grammar),
    )


def _read_again(
    model: Model, params: Any, roots: Roots, slots: Slots, record: Record, which: Bool[Array, " S"], *, rules: Rules
) -> Slots:
    """Feeds slots the tokens of these rows, PIECE at a time: keys and values under the present policy."""
    length = jnp.where(which, record.length, jnp.zeros_like(record.length))
    tokens = jnp.pad(record.tokens, ((0, 0), (0, -record.tokens.shape[1] % PIECE)))

    def piece(i: jax.Array, slots: Slots) -> Slots:
        some = jax.lax.dynamic_slice_in_dim(tokens, i * PIECE, PIECE, axis=1)
        count = jnp.clip(length - i * PIECE, 0, PIECE)
        return engine.append(model, params, roots, slots, some, count, rules=rules, width=0)

    return jax.lax.fori_loop(jnp.int32(0), (jnp.max(length) + PIECE - 1) // PIECE, piece, slots)


def _with_own(seen: jax.Array | None, record: Record, which: Bool[Array, " S"]) -> jax.Array | None:
    """The tokens seen in the prompts, and those of these rows."""
    if seen is None:
        return None
    place = jnp.arange(record.tokens.shape[1], dtype=jnp.int32)[None]
    told = (place < record.length[:, None]) & which[:, None]
    slot = jnp.arange(record.tokens.shape[0], dtype=jnp.int32)[:, None]
    return seen.at[slot, jnp.where(told, record.tokens, seen.shape[1])].set(True, mode="drop")


def _where(rows: Bool[Array, " R"], a: Any, b: Any) -> jax.Array:
    return jnp.where(rows.reshape(-1, *(1 for _ in a.shape[1:])), a, b)
