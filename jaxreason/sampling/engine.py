"""The engine: completions in slots, grown a token at a time on the device, for RL and for search.

A slot is a completion in the making: whose prompt it follows, its own tokens' keys and values, what its next token is predicted
from, and its key. `open` reads prompts, once each; `fork` copies slots; `extend` chooses tokens until each slot stops; `append`
feeds tokens that nobody chose; `close` frees. (queue.py lets a slot that stops take the next completion in the same loop.) All are
pure functions of arrays, to be traced into a larger program or called by generate.py, which holds them compiled. What a slot
samples depends on its key and its tokens, not on its place or its neighbours.

Between any two verbs: `own` holds keys and values of all of a slot's `length` tokens, and `hidden` predicts the next.
With drafts (speculation.py) a step feeds more tokens than one, and what comes out is the same.
Deliberately absent: a second model's weights, and text.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Int

from jaxreason.models.decoder import Model
from jaxreason.numerics import at_least_float32
from jaxreason.sampling import law as laws
from jaxreason.sampling import speculation, stops
from jaxreason.sampling.law import Law
from jaxreason.sampling.logits import draw

Leaf = Any  # a jax.Array; a shape or a sharding under tree maps

# why a slot is not growing; in the order of types.StopReason
LIVE, EOS, STOP_STRING, STEP, LENGTH, PARKED, FREE = range(7)


@struct.dataclass
class Roots:
    """The prompts that slots follow."""

    prompts: Any  # keys and values, the model's
    hidden: Leaf  # [P, D], from which the first token is predicted
    seen: Leaf | None = None  # [P, V], tokens in the prompt; for a law that asks
    prompt: Leaf | None = None  # [P, Tp] int32, its tokens, -1 before the first; for drafts


@struct.dataclass
class Record:
    """What was written, R rows: a slot's each, or one for each completion that a queue holds."""

    tokens: Leaf  # [R, T] int32
    logp: Leaf  # [R, T], of each token under the law that sampled it
    mask: Leaf  # [R, T] bool, chosen by the policy
    step_end: Leaf  # [R, T] bool, a step ended within this token
    length: Leaf  # [R] int32
    status: Leaf  # [R] int8: LIVE, why it stopped, or FREE
    after: Leaf  # [R] int32, bytes of the last token that follow the stop string
    parent: Leaf  # [R] int32, the slot that it was forked from; -1: none
    drafts: Leaf | None = None  # [R, 2] int32, tokens drafted and accepted, where there are drafts


@struct.dataclass
class Slots:
    """S completions in the making."""

    own: Any  # keys and values, the model's
    hidden: Leaf  # [S, D], from which the next token is predicted
    root: Leaf  # [S] int32, its prompt
    key: Leaf  # [S] keys, of all its tokens
    search: Leaf  # [S] int32, state in the search for stop strings and delimiters
    grammar: Leaf  # [S] int32, state in the grammar
    record: Record  # S rows
    number: Leaf  # [S] int32, which of the queue's completions it is
    seen: Leaf | None = None  # [S, V], tokens so far, for a law that asks
    prompt: Leaf | None = None  # [S, Tp] int32, as Roots has it


@struct.dataclass
class Rules:
    """How tokens are chosen and what stops a slot."""

    law: Law = struct.field(pytree_node=False)
    eos_ids: tuple[int, ...] = struct.field(pytree_node=False)
    pad_id: int = struct.field(pytree_node=False)
    search: stops.Machine | None = None  # stop strings and step delimiters
    grammar: stops.Grammar | None = None  # what may be written at all
    steps_stop: bool = struct.field(pytree_node=False, default=False)  # a step's end stops a slot, and does not only mark it
    draft: int = struct.field(pytree_node=False, default=0)  # tokens drafted a step


def open(model: Model, params: Any, prompt: Int[Array, "P Tp"], mask: Bool[Array, "P Tp"], *, rules: Rules) -> Roots:
    """Reads prompts, padded on the left. `params` are those that `model.prepare_sampling` gave."""
    hidden, prompts = model.prefill(params, prompt, mask)
    seen = None
    if rules.law.repetition_penalty != 1:
        vocab = vocab_size(model, params, hidden)
        row = jnp.arange(prompt.shape[0], dtype=jnp.int32)[:, None]
        seen = jnp.zeros((prompt.shape[0], vocab), bool).at[row, jnp.where(mask, prompt, vocab)].set(True, mode="drop")
    return Roots(prompts, hidden, seen, jnp.where(mask, prompt, jnp.full_like(prompt, -1)) if rules.draft else None)


def vocab_size(model: Model, params: Any, hidden: Any) -> int:
    """How many tokens the model chooses among, from shapes alone."""
    return jax.eval_shape(model.project, params, hidden).shape[1]


def seat(model: Model, roots: Roots, root: Int[Array, " S"], key: jax.Array, *, tokens: int, rules: Rules) -> Slots:
    """Slots at the end of their prompts, with room for `tokens` tokens each."""
    slots = root.shape[0]
    zero = jnp.zeros(slots, jnp.int32)
    record = blank(slots, tokens, rules=rules, dtype=at_least_float32(roots.hidden.dtype))
    return Slots(
        own=model.empty(roots.prompts, slots=slots, tokens=tokens),
        root=root,
        key=key,
        search=zero,
        grammar=zero + grammar_start(rules),
        record=replace(record, status=jnp.full(slots, LIVE, jnp.int8)),
        number=zero,
        **begun(roots, root),
    )


def begun(roots: Roots, root: Int[Array, " S"]) -> dict[str, Any]:
    """What slots have from these prompts."""
    given = {"hidden": roots.hidden, "seen": roots.seen, "prompt": roots.prompt}
    return jax.tree.map(lambda x: jnp.take(x, root, axis=0, mode="clip"), given)


def grammar_start(rules: Rules) -> Any:
    return 0 if rules.grammar is None else rules.grammar.start


def blank(rows: int, tokens: int, *, rules: Rules, dtype: Any) -> Record:
    """A record without a token."""
    shape = (rows, tokens)
    return Record(
        tokens=jnp.full(shape, rules.pad_id, jnp.int32),
        logp=jnp.zeros(shape, dtype),
        mask=jnp.zeros(shape, bool),
        step_end=jnp.zeros(shape, bool),
        length=jnp.zeros(rows, jnp.int32),
        status=jnp.full(rows, FREE, jnp.int8),
        after=jnp.zeros(rows, jnp.int32),
        parent=jnp.full(rows, -1, jnp.int32),
        drafts=jnp.zeros((rows, 2), jnp.int32) if rules.draft else None,
    )


def fork(model: Model, slots: Slots, parent: Int[Array, " S"], key: jax.Array) -> Slots:
    """Slots that continue what slots `parent` hold, each with a key of its own.

    What they share is copied exactly, so a child goes on as its parent would under the same key.
    """
    children = select(model, slots, parent)
    return replace(children, key=key, record=replace(children.record, parent=parent))


def select(model: Model, slots: Slots, index: Int[Array, " S"]) -> Slots:
    rest = jax.tree.map(lambda x: x[index], replace(slots, own=None))
    return replace(rest, own=model.select(slots.own, index))


def close(slots: Slots, which: Bool[Array, " S"]) -> Slots:
    """Frees slots."""
    return _with_status(slots, which, FREE)


def _with_status(slots: Slots, which: jax.Array, status: int) -> Slots:
    told = jnp.where(which, jnp.int8(status), slots.record.status)
    return replace(slots, record=replace(slots.record, status=told))


def extend(
    model: Model,
    params: Any,
    roots: Roots,
    slots: Slots,
    *,
    rules: Rules,
    limit: Int[Array, " S"],
    steps: int | Int[Array, ""] | None = None,
    width: int = 8,
) -> Slots:
    """Chooses tokens for every slot that has not ended until it stops, is `limit` tokens long or full, or `steps` steps are made.

    Slots at a step's end, at a former limit, and parked ones go on. `width`: see `Model.decode`; 0 where slots are [P, G] in order.
    """
    status, limit = slots.record.status, jnp.minimum(limit, slots.record.tokens.shape[1])
    copies = model.at_hand(roots.prompts, None, slots.root, jnp.ones_like(status, bool)) if width else None
    slots = _with_status(slots, (status == STEP) | (status == PARKED) | (status == LENGTH), LIVE)
    slots = _with_status(slots, (slots.record.status == LIVE) & (slots.record.length >= limit), LENGTH)

    def running(carry: Any) -> jax.Array:
        count, slots = carry
        some = jnp.any(slots.record.status == LIVE)
        return some if steps is None else some & (count < steps)

    def body(carry: Any) -> Any:
        count, slots = carry
        return count + 1, step(model, params, roots, slots, rules=rules, limit=limit, width=width, copies=copies)

    return jax.lax.while_loop(running, body, (jnp.zeros((), jnp.int32), slots))[1]


def step(
    model: Model, params: Any, roots: Roots, slots: Slots, *, rules: Rules, limit: Int[Array, " S"], width: int, copies: Any = None
) -> Slots:
    """One token of every live slot, and of a draft what would come next. `copies`: see `Model.at_hand`."""
    old, live, length = slots, slots.record.status == LIVE, slots.record.length
    choose, note = partial(_choose, model, params, rules=rules), partial(_note, rules=rules, limit=limit)
    drawn = choose(old.hidden, key=old.key, position=length, grammar=old.grammar, seen=old.seen)
    slots = note(old, drawn, live)
    fed = jnp.where(live, drawn[0], jnp.full_like(drawn[0], rules.pad_id))[:, None]
    if rules.draft:
        fed = jnp.concatenate([fed, speculation.drafted(slots, count=rules.draft)], axis=1)
    prompts, root = (roots.prompts, slots.root) if copies is None else (copies, jnp.arange(live.shape[0], dtype=jnp.int32))
    hidden, own = model.decode(params, fed, prompts, slots.own, root, length, live, width=width if copies is None else 0)
    if rules.draft:
        advance = None if rules.grammar is None else partial(stops.advance, rules.grammar)
        slots, hidden = speculation.accept(slots, fed[:, 1:], hidden, live=LIVE, choose=choose, note=note, advance=advance)
    return replace(slots, own=own, hidden=jnp.where(live[:, None], hidden[:, 0], old.hidden))


def _note(slots: Slots, drawn: tuple[Any, ...], which: Bool[Array, " S"], *, rules: Rules, limit: Int[Array, " S"]) -> Slots:
    """Slots `which` with what was drawn written down, and whether it ends them."""
    old, (token, logp, chosen) = slots.record, drawn
    token = jnp.where(which, token, jnp.full_like(token, rules.pad_id))
    length = old.length + which.astype(jnp.int32)
    status = jnp.where(length >= limit, jnp.int8(LENGTH), jnp.int8(LIVE))
    search, grammar, step_end, after = slots.search, slots.grammar, old.step_end, old.after
    keep = partial(jnp.where, which)
    place = jnp.arange(old.tokens.shape[1], dtype=jnp.int32)
    here = (place[None] == old.length[:, None]) & which[:, None]

    def write(new: jax.Array, there: jax.Array) -> jax.Array:
        # not a scatter, which takes longer, on CPUs far longer
        return jnp.where(here, new[:, None].astype(there.dtype), there)

    if rules.search is not None:
        found = stops.step(rules.search, search, token)
        search, after = keep(found.state, search), keep(found.after, after)
        step_end = write(found.steps > 0, step_end)
        if rules.steps_stop:
            status = jnp.where(found.steps > 0, jnp.int8(STEP), status)
        status = jnp.where(found.event == stops.STOP, jnp.int8(STOP_STRING), status)
    if rules.grammar is not None:
        grammar = keep(stops.advance(rules.grammar, grammar, token), grammar)
    if rules.eos_ids:
        status = jnp.where(jnp.isin(token, jnp.asarray(rules.eos_ids, jnp.int32)), jnp.int8(EOS), status)
    seen = slots.seen
    if seen is not None:
        seen = seen | ((jnp.arange(seen.shape[1], dtype=jnp.int32)[None] == token[:, None]) & which[:, None])
    record = replace(
        old,
        tokens=write(token, old.tokens),
        logp=write(logp, old.logp),
        mask=write(chosen, old.mask),
        step_end=step_end,
        length=length,
        status=keep(status, old.status),
        after=after,
    )
    return replace(slots, search=search, grammar=grammar, record=record, seen=seen)


def _choose(
    model: Model, params: Any, hidden: jax.Array, *, rules: Rules, key: Any, position: jax.Array, grammar: Any, seen: Any
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The next token of every row, its log-probability, and whether it was a choice at all."""
    scores = model.project(params, hidden)
    allowed = None if rules.grammar is None else stops.allowed(rules.grammar, grammar)
    logits = laws.shape(scores, rules.law, seen=seen, allowed=allowed, position=position)
    uniform = None
    if not rules.law.greedy:
        uniform = jax.vmap(lambda key, t: jax.random.uniform(jax.random.fold_in(key, t), (), jnp.float32))(key, position)
    token, logp = draw(logits, uniform)
    chosen = jnp.ones_like(token, bool)
    if rules.law.forced:
        forced = jnp.asarray([place for place, _ in rules.law.forced], jnp.int32)
        chosen = ~jnp.isin(position, forced)
    return token, logp, chosen


def append(
    model: Model,
    params: Any,
    roots: Roots,
    slots: Slots,
    token: Int[Array, "S M"],
    count: Int[Array, " S"],
    *,
    rules: Rules,
    width: int = 8,
) -> Slots:
    """Feeds slots the first `count` of these tokens, which nobody chose: their mask is False, their log-probability 0.

    Slots that had stopped go on afterwards; a count of 0 leaves a slot as it is. Stop strings and grammars begin anew behind what
    was fed. A slot must have room for its tokens: what does not fit is lost.
    """
    old = slots.record
    size, fed = old.tokens.shape[1], count > 0
    # tokens beyond the count lie beyond the slot's length, where the next ones will be written
    hidden, own = model.decode(params, token, roots.prompts, slots.own, slots.root, old.length, fed, width=width)
    last = jnp.take_along_axis(hidden, jnp.maximum(count - 1, 0)[:, None, None], axis=1)[:, 0]
    told = jnp.arange(token.shape[1], dtype=jnp.int32)[None] < count[:, None]
    slot = jnp.arange(token.shape[0], dtype=jnp.int32)[:, None]
    at = jnp.where(told, old.length[:, None] + jnp.arange(token.shape[1], dtype=jnp.int32)[None], size)
    seen = slots.seen
    if seen is not None:
        seen = seen.at[slot, jnp.where(told, token, seen.shape[1])].set(True, mode="drop")
    record = replace(
        old,
        tokens=old.tokens.at[slot, at].set(token, mode="drop"),
        length=jnp.minimum(old.length + count, size),
        status=jnp.where(fed, jnp.int8(LIVE), old.status),
    )
    return replace(
        slots,
        own=own,
        hidden=jnp.where(fed[:, None], last, slots.hidden),
        search=jnp.where(fed, 0, slots.search),
        grammar=jnp.where(fed, grammar_start(rules), slots.grammar),
        record=record,
        seen=seen,
    )
