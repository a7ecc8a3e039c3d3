"""Attention when decoding: the newest tokens of every slot over its prompt and its own past.

A prompt's keys and values are held once and read by all of its slots. Own ones lie in a row per slot, of which each has filled
as much as it has tokens. Both are read in one of two forms, which merge as softmaxes over parts do (arXiv:2205.14135, section 3.1):
`whole` reads rows from end to end, which is best when they are short or all full; `blocks` and `far` list the blocks
of rows that hold anything for a live slot, and go through that list some at a time, so that their work is the sum of the lengths,
not slots x the longest. A long own row is both: its first places, which most slots have filled, and far blocks. On TPUs,
and on GPUs if it is named, blocks are a kernel's (slot_kernels.py), which reads them where they lie.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxreason.models import slot_kernels
from jaxreason.models.attention import Law, softcap
from jaxreason.models.kept import BLOCK, Cells, Places, Read, Written
from jaxreason.models.rounded import scores as scores_of
from jaxreason.models.rounded import weighted
from jaxreason.numerics import at_least_float32

TOGETHER = 8  # (slot, block) pairs that are read at once: few enough that a CPU's cache holds what is gathered
SHORT = 128  # own rows up to this long are read whole
NEAR = 64  # of longer ones, so many places
FEW = 64  # prompts up to this long are read for each of their slots: cheaper than finding out who shares them


class Rows(NamedTuple):
    """Slots with one prompt, some to a row, so that they read a block of it together."""

    slot: Int[Array, "S W"]  # S where there is none
    root: Int[Array, " S"]  # the row's prompt
    count: Int[Array, " 1"]  # rows in use, the first ones


class Seats(NamedTuple):
    """Where the slots are: how far they have come, and who reads which prompt."""

    length: Int[Array, " S"]  # own tokens before the newest ones
    live: Bool[Array, " S"]  # others are not read for, where that saves work
    root: Int[Array, " S"] | None  # each one's prompt; None: slots are [P, G] in order
    rows: Rows | None  # with a root: who reads a long prompt together
    near: Places  # where the newest tokens go among the first places
    far: Places | None = None  # and in far blocks, where there are any


def rows_of(root: Int[Array, " S"], live: Bool[Array, " S"], *, width: int) -> Rows:
    """Live slots in rows of at most `width` with one prompt."""
    slots = root.shape[0]
    number = jnp.arange(slots, dtype=jnp.int32)
    group, order = jax.lax.sort((jnp.where(live, root, jnp.int32(2**31 - 1)), number), num_keys=1)
    real = group < 2**31 - 1
    new = group != jnp.pad(group, (1, 0), constant_values=-1)[:-1]
    place = number - jax.lax.cummax(jnp.where(new, number, jnp.zeros_like(number)))
    opens = (place % width == 0) & real
    row = jnp.cumsum(opens, dtype=jnp.int32) - 1
    # by comparing everyone with everyone: scatters of single numbers are slow, on CPUs most of all
    here = (row[None] == number[:, None]) & real[None]  # [row, slot in order]
    at = here[:, None] & ((place % width)[None, None] == jnp.arange(width, dtype=jnp.int32)[None, :, None])
    slot = jnp.min(jnp.where(at, order[None, None], slots), axis=2)
    of_row = jnp.max(jnp.where(here, group[None], 0), axis=1)
    return Rows(slot, of_row, jnp.sum(opens, dtype=jnp.int32)[None])


class Part(NamedTuple):
    """A softmax over some of the keys: the largest score, the sum of exp(score - largest), and the values so weighted."""

    top: Float[Array, "S K q"]
    total: Float[Array, "S K q"]
    out: Float[Array, "S K q Cv"]


def attend(
    q: Float[Array, "S M H C"],
    own: Written,
    far: Written | None,
    prompts: Read,
    first: Int[Array, " P"],
    seats: Seats,
    *,
    law: Law,
    implementation: str = "xla",
) -> Float[Array, "S M H Cv"]:
    """softmax(scale q k) v over the prompt and own tokens, the M newest of which stand at `length` on and are in `own`.

    `first` is the first real place of each prompt, which ends where own tokens begin. Kernels (see slot_kernels.choose) take
    blocks of 128 places, and own rows of any length in blocks.
    """
    slots, newest, heads, size = q.shape
    kv_heads, before = prompts.k.shape[-3], prompts.k.shape[-1]
    q = (q * law.scale).reshape(slots, newest, kv_heads, -1, size)
    q = jnp.moveaxis(q, 2, 1).reshape(slots, kv_heads, -1, size)  # [S, K, M r, C]
    position = seats.length[:, None] + jnp.arange(newest, dtype=jnp.int32)[None]  # [S, M], in own tokens

    def of_prompt(slot_position: jax.Array, first: jax.Array, key: jax.Array) -> jax.Array:
        return (key >= first) & _in_window(slot_position + before - key, law)

    def of_own(slot_position: jax.Array, start: jax.Array | int, key: jax.Array) -> jax.Array:
        return (start + key <= slot_position) & _in_window(slot_position - start - key, law)

    if seats.root is None:
        prompt = _whole(q, *prompts.whole(), position, first, of_prompt, law)
    elif seats.rows is None:
        keys, values = jax.tree.map(lambda x: x[seats.root], prompts.whole())
        prompt = _whole(q, keys, values, position, first[seats.root], of_prompt, law)
    elif implementation != "xla":
        prompt = Part(*slot_kernels.of_prompts(q, prompts, position + before, first, seats.rows, law=law, by=implementation))
    else:
        rows = seats.rows
        begin = first[rows.root] // BLOCK
        used = jnp.arange(slots, dtype=jnp.int32) < rows.count[0]
        listed = _Listed(rows.slot, rows.root, begin, jnp.where(used, before // BLOCK - begin, 0))
        prompt = _blocks(_nothing(q, prompts), q, prompts, position, first[rows.root], listed, of_prompt, law)
    zero = jnp.zeros_like(seats.length)
    if implementation != "xla":
        part = _merge(prompt, Part(*slot_kernels.of_own(q, own, position, seats.live, law=law, by=implementation)))
    else:
        part = _merge(prompt, _whole(q, *own.whole(), position, zero, of_own, law))
    if far is not None:
        count = jnp.where(seats.live, jnp.maximum(seats.length + newest - NEAR + BLOCK - 1, 0) // BLOCK, 0)
        part = _far(part, q, far, position, count, of_own, law)
    out = part.out / jnp.where(part.total > 0, part.total, jnp.ones_like(part.total))[..., None]
    out = jnp.moveaxis(out.reshape(slots, kv_heads, newest, heads // kv_heads, -1), 1, 2)
    return out.reshape(slots, newest, heads, -1)


def _in_window(distance: jax.Array, law: Law) -> jax.Array:
    return jnp.ones_like(distance, bool) if isinstance(law.window, int) and law.window == 0 else distance < law.window


def _nothing(q: jax.Array, kept: Read) -> Part:
    kind, size = at_least_float32(q.dtype), kept.k.shape[-2] if kept.v is None else kept.v.shape[-1]
    # made of q, so that under shard_map they differ between devices as a loop's results do
    zero = (q[..., 0] * 0).astype(kind)
    return Part(zero + _lowest(kind), zero, jnp.zeros((*q.shape[:3], size), kind) + zero[..., None])


def _lowest(kind: Any) -> Any:
    return jnp.finfo(kind).min / 2  # finite: a difference of two is a number


def _merge(a: Part, b: Part) -> Part:
    top = jnp.maximum(a.top, b.top)
    of_a, of_b = jnp.exp(a.top - top), jnp.exp(b.top - top)
    return Part(top, a.total * of_a + b.total * of_b, a.out * of_a[..., None] + b.out * of_b[..., None])


def _whole(q: jax.Array, k: Cells, v: Cells, position: jax.Array, first: jax.Array, allowed: Any, law: Law) -> Part:
    """Rows, [R, K, C, N] and [R, K, N, C], from end to end, each for as many slots in order as there are to a row."""
    slots, kv_heads, queries, size = q.shape
    rows, together, newest = k.shape[0], slots // k.shape[0], position.shape[1]
    grouped = jnp.swapaxes(q.reshape(rows, together, kv_heads, queries, size), 1, 2).reshape(rows, kv_heads, -1, size)
    scores = softcap(scores_of("skqc,skcn->skqn", grouped, k), law.softcap)
    scores = scores.reshape(rows, kv_heads, together, newest, -1, k.shape[3])
    key = jnp.arange(k.shape[3], dtype=jnp.int32)
    seen = allowed(position.reshape(rows, together, newest, 1), first[:, None, None, None], key[None, None, None])
    scores = jnp.where(seen[:, None, :, :, None], scores, jnp.full_like(scores, _lowest(scores.dtype)))
    top = jnp.max(scores, axis=-1)
    e = jnp.exp(scores - top[..., None])
    out = weighted("skqn,sknc->skqc", e.reshape(*grouped.shape[:3], -1), v, dtype=q.dtype)

    def apart(x: jax.Array) -> jax.Array:
        x = x.reshape(rows, kv_heads, together, queries, *x.shape[3:])
        return jnp.swapaxes(x, 1, 2).reshape(slots, kv_heads, queries, *x.shape[4:])

    flat = (rows, kv_heads, together * queries)
    return Part(apart(top.reshape(flat)), apart(jnp.sum(e, axis=-1).reshape(flat)), apart(out))


class _Listed(NamedTuple):
    """Rows of blocks and who reads them."""

    slot: jax.Array  # [R, W]; as many as there are slots: nobody
    row: jax.Array  # [R], of the keys
    begin: jax.Array  # [R], its first block
    count: jax.Array  # [R], its blocks


def _blocks(
    part: Part,
    q: jax.Array,
    kept: Read,
    position: jax.Array,
    first: jax.Array,
    listed: _Listed,
    allowed: Any,
    law: Law,
) -> Part:
    """Adds the blocks that are listed, about `TOGETHER` reads at a time; `first` is of the listed rows."""
    slots, width = q.shape[0], listed.slot.shape[1]
    together = max(4, TOGETHER // width)
    end = jnp.cumsum(listed.count)

    def some(i: jax.Array) -> tuple[jax.Array, tuple[Cells, Cells], jax.Array]:
        item = i * together + jnp.arange(together, dtype=jnp.int32)
        which = jnp.sum(end[None] <= item[:, None], axis=1, dtype=jnp.int32)
        inside = which < end.shape[0]
        which = jnp.minimum(which, end.shape[0] - 1)
        slot = jnp.where(inside[:, None], listed.slot[which], slots)  # [N, W]
        block = jnp.where(inside, item - (end - listed.count)[which] + listed.begin[which], 0)
        key = (block * BLOCK)[:, None] + jnp.arange(BLOCK, dtype=jnp.int32)[None]
        seen = allowed(position[jnp.minimum(slot, slots - 1)][..., None], first[which][:, None, None, None], key[:, None, None])
        return slot, kept.blocks(listed.row[which], block), seen

    return _add(part, q, some, (end[-1] + together - 1) // together, law)


def _far(part: Part, q: jax.Array, kept: Written, position: jax.Array, count: jax.Array, allowed: Any, law: Law) -> Part:
    """Adds the first `count` far blocks of every slot, some at a time: `TOGETHER`, or fewer where there are never many."""
    slots = q.shape[0]
    together = min(TOGETHER, max(4, slots * kept.blocks // 8))
    end = jnp.cumsum(count)
    begin = end - count

    def some(i: jax.Array) -> tuple[jax.Array, tuple[Cells, Cells], jax.Array]:
        item = i * together + jnp.arange(together, dtype=jnp.int32)
        slot = jnp.sum(end[None] <= item[:, None], axis=1, dtype=jnp.int32)
        whose = jnp.minimum(slot, slots - 1)
        block = jnp.where(slot < slots, item - begin[whose], 0)
        key = (block * BLOCK)[:, None] + jnp.arange(BLOCK, dtype=jnp.int32)[None]
        seen = allowed(position[whose][:, None, :, None], NEAR, key[:, None, None])
        return slot[:, None], kept.fetch(whose, block), seen

    return _add(part, q, some, (end[-1] + together - 1) // together, law)


def _add(part: Part, q: jax.Array, some: Any, turns: jax.Array, law: Law) -> Part:
    """Adds what `some` reads in each of so many turns: N blocks, the W slots [N, W] that read each (as many as there are slots:
    nobody), their keys and values, and who sees which key [N, W, M, B]. A slot is nowhere twice in a block.
    """
    slots, kv_heads, queries, size = q.shape
    everyone = jnp.arange(slots, dtype=jnp.int32)

    def turn(i: jax.Array, before: Part) -> Part:
        slot, (keys, values), seen = some(i)
        (blocks, width), newest = slot.shape, seen.shape[2]
        near = jnp.minimum(slot, slots - 1)
        # who reads what as rows of zeros and a one: sums over reads are products, and cheaper than scatters, on CPUs most of all
        hot = everyone[:, None] == slot.reshape(-1)[None]  # [S, N W]
        asked = jnp.swapaxes(q[near], 1, 2).reshape(blocks, kv_heads, -1, size)  # [N, K, W q, C]
        scores = softcap(scores_of("nkqc,nkcb->nkqb", asked, keys), law.softcap)
        scores = scores.reshape(blocks, kv_heads, width, newest, -1, BLOCK)
        seen = seen & (slot < slots)[:, :, None, None]  # nobody's scores are against another's top, and may be infinite
        scores = jnp.where(seen[:, None, :, :, None], scores, jnp.full_like(scores, _lowest(scores.dtype)))
        scores = scores.reshape(blocks, kv_heads, width, queries, BLOCK)
        read = jnp.swapaxes(jnp.max(scores, axis=-1), 1, 2).reshape(-1, kv_heads, queries)  # [N W, K, q]
        lowest = jnp.full_like(read, _lowest(read.dtype))[None]
        top = jnp.maximum(before.top, jnp.max(jnp.where(hot[:, :, None, None], read[None], lowest), axis=1))
        e = jnp.exp(scores - jnp.swapaxes(top[near], 1, 2)[..., None])
        out = weighted("nkqb,nkbc->nkqc", e.reshape(*asked.shape[:3], BLOCK), values, dtype=q.dtype)

        def of_slots(x: jax.Array) -> jax.Array:  # [N, K, W, q, ...] -> [S, K, q, ...]
            x = jnp.swapaxes(x, 1, 2).reshape(blocks * width, kv_heads, queries, *x.shape[4:])
            return jnp.tensordot(hot.astype(x.dtype), x, axes=1, precision=jax.lax.Precision.HIGHEST)

        scale, out = jnp.exp(before.top - top), out.reshape(blocks, kv_heads, width, queries, -1)
        total = before.total * scale + of_slots(jnp.sum(e, axis=-1))
        return Part(top, total, before.out * scale[..., None] + of_slots(out))

    return jax.lax.fori_loop(jnp.int32(0), turns, turn, part)
