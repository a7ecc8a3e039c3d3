"""Decoding's attention over blocks of kept keys and values, as a Pallas kernel for NVIDIA GPUs (Pallas's Triton backend).

A program takes a tile of one row's queries in one kv head and loops over exactly the keys that the row has, with an online
softmax in registers. Where rows and heads are too few to fill a GPU, a row's blocks are split over several programs, whose parts
are merged afterwards. It has not run on a GPU: its sizes are reasoned, not measured. jax 0.11.2 and later call the Triton backend
deprecated. Deliberately absent: pages that lie anywhere; a form for jax's other GPU backend, Mosaic; AMD's GPUs.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxreason.models.attention import softcap
from jaxreason.models.rounded import Rounded
from jaxreason.models.slot_kernels import BLOCK, LOWEST, Parts, Reads, arrays_of, dot

PIECE = 128  # numbers of a width that one product takes; widths are cut into powers of two, as Triton's arrays are
ROWS = (16, 64)  # queries of a program: no fewer than a tensor core takes, and no more
HELD = 2**14  # of its outputs, so many numbers at most: a quarter of a processor's registers
FETCH = 3 * 2**14  # bytes of keys and values that a turn of its loop reads at most; two turns' lie in shared memory
PROGRAMS = 256  # about two for each of a large GPU's processors


def read_blocks(
    q: Float[Array, "R K Q C"],
    k: Any,
    v: Any,
    reads: Reads,
    *,
    axis: int,
    window: int | Int[Array, ""],
    cap: float,
    number: Int[Array, ""] | None,
    interpret: bool,
) -> Parts:
    """What slot_kernels.read_blocks returns, of the same arrays; own keys lie as values do."""
    from jax.experimental import pallas as pl  # here, as only a kernel needs it
    from jax.experimental.pallas import triton as plgpu

    rows, kv_heads, queries, size = q.shape
    arrays, wide = arrays_of(k, axis) + arrays_of(v, -2), size if v is None else v.shape[-1]
    kept = [_in_a_row(x, along, layered=number is not None) for x, along in arrays]
    tile = ROWS[0]
    while tile < min(queries, ROWS[1]) and 2 * tile * wide <= HELD:
        tile *= 2
    more = -queries % tile
    tiles = (queries + more) // tile
    q = jnp.pad(q, ((0, 0), (0, 0), (0, more), (0, 0)))
    at = jnp.pad(reads.at, ((0, 0), (0, more)))
    splits = max(1, min(kept[0].shape[axis] // BLOCK, PROGRAMS // (rows * kv_heads * tiles)))
    each, step = sum(x.dtype.itemsize * x.shape[-3 - along] for x, along in arrays), BLOCK
    while step > 16 and step * each > FETCH:
        step //= 2

    def out(*width: int) -> Any:
        return pl.BlockSpec((None, None, None, tile, *width), lambda r, h, t, s: (s, r, h, t, *(0 for _ in width)))

    whole = pl.BlockSpec()
    shape = partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
    flat = (splits, rows, kv_heads, queries + more)
    told = [jnp.asarray(window, jnp.int32) if not isinstance(window, int) or window else jnp.int32(2**30)]
    told.append(jnp.int32(0) if number is None else number)
    how: Any = {"rounded": isinstance(k, Rounded), "valued": v is not None, "inner": 0 if axis == -1 else 1}
    top, total, summed = pl.pallas_call(
        partial(_kernel, cap=cap, step=step, splits=splits, layered=number is not None, **how),
        grid=(rows, kv_heads, tiles, splits),
        in_specs=[
            *(whole for _ in range(5)),
            pl.BlockSpec((None, tile), lambda r, h, t, s: (r, t)),
            pl.BlockSpec((None, None, tile, size), lambda r, h, t, s: (r, h, t, 0)),
            *(whole for _ in kept),
        ],
        out_specs=[out(), out(), out(wide)],
        out_shape=[shape(flat), shape(flat), shape((*flat, wide))],
        interpret=interpret,
        name="slot_attention",
        compiler_params=plgpu.CompilerParams(num_warps=4 if tile * wide <= HELD // 2 else 8, num_stages=2),
    )(jnp.stack(told), reads.row, reads.first, reads.begin, reads.count, at, q, *kept)
    # the splits' parts merge as softmaxes do (arXiv:2205.14135, section 3.1)
    highest = jnp.max(top, axis=0)
    shrunk = jnp.exp(top - highest[None])
    total, summed = jnp.sum(total * shrunk, axis=0), jnp.sum(summed * shrunk[..., None], axis=0)
    return highest[:, :, :queries], total[:, :, :queries], summed[:, :, :queries]


def _in_a_row(x: jax.Array, axis: int, *, layered: bool) -> jax.Array:
    """Blocks [n, 128, C] as places [n 128, C], and scales [n, 1, 128] as [1, n 128]: the same bytes."""
    # Pallas counts elements in 64 bits beyond 4 GiB; below that in 32 with a sign, which bytes outgrow at 2 GiB
    if x.dtype.itemsize == 1 and 2**31 < x.size <= 2**32:
        raise ValueError(
            f"config.model.numerics.sampling_attention is 'pallas', whose kernel for GPUs cannot address {x.size} bytes of keys or "
            "values in eight bits, between 2 and 4 GiB on a device: choose 'xla', or fewer or more slots"
        )
    if x.ndim == 4 + layered:
        return x
    lead = x.shape[:-3]
    return x.reshape(*lead, -1, x.shape[-1]) if axis == -2 else x.reshape(*lead, 1, -1)


def _pieces(width: int) -> list[tuple[int, int]]:
    """(start, size) of powers of two that make up a width, a multiple of 16."""
    sizes = [PIECE] * (width // PIECE) + [2**i for i in reversed(range(PIECE.bit_length() - 1)) if width % PIECE & 2**i]
    return [(sum(sizes[:i]), size) for i, size in enumerate(sizes)]


def _kernel(told: Any, row: Any, first: Any, begin: Any, count: Any, at: Any, q: Any, *refs: Any, **how: Any) -> None:
    """A tile of a row's queries over its share of the row's blocks: an online softmax (arXiv:2205.14135, Algorithm 1)."""
    from jax.experimental import pallas as pl

    *kept, top, total, out = refs
    step, inner, splits = how["step"], how["inner"], how["splits"]
    r, share = pl.program_id(0), pl.program_id(3)
    where = (*([told[1]] if how["layered"] else []), row[r], pl.program_id(1))
    each = jax.lax.div(count[r] + (splits - 1), jnp.int32(splits))
    start = begin[r] + share * each
    stop = jnp.minimum(start + each, begin[r] + count[r])
    asked = [q[:, pl.ds(c, n)] for c, n in _pieces(q.shape[1])]
    mine, opens, reach = at[...][:, None], first[r], told[0]

    def read(x: Any, i: Any, place: Any, c: int, n: int) -> jax.Array:
        got = x[(*where, pl.ds(c, n), place)] if i == 0 else x[(*where, place, pl.ds(c, n))]
        return got.astype(jnp.float32).astype(q.dtype) if how["rounded"] else got

    def turn(i: jax.Array, carry: Any) -> Any:
        before, sums, outs = carry
        place = pl.ds(i * step, step)
        keys = [read(kept[0], inner, place, c, n) for c, n in _pieces(q.shape[1])]
        scores = sum((dot(a, b, inner) for a, b in zip(asked[1:], keys[1:], strict=True)), dot(asked[0], keys[0], inner))
        if how["rounded"]:
            scores = scores * kept[1][(*where, 0, place)][None]
        key = i * step + jax.lax.broadcasted_iota(jnp.int32, (1, step), 1)
        seen = (key >= opens) & (key <= mine) & (mine - key < reach)
        scores = jnp.where(seen, softcap(scores, how["cap"]), LOWEST)
        highest = jnp.maximum(before, jnp.max(scores, axis=1))
        e, shrunk = jnp.exp(scores - highest[:, None]), jnp.exp(before - highest)
        sums = sums * shrunk + jnp.sum(e, axis=1)
        values, along = keys, 1 - inner
        if how["valued"]:
            along = 0
            values = [read(kept[2 if how["rounded"] else 1], 1, place, c, n) for c, n in _pieces(out.shape[1])]
        if how["rounded"]:
            e = e * kept[3 if how["valued"] else 1][(*where, 0, place)][None]
        e = e.astype(values[0].dtype)
        outs = [o * shrunk[:, None] + dot(e, x, along) for o, x in zip(outs, values, strict=True)]
        return highest, sums, outs

    rows, turns = q.shape[0], BLOCK // step
    zero = [jnp.zeros((rows, n), jnp.float32) for _, n in _pieces(out.shape[1])]
    carry = jnp.full((rows,), LOWEST, jnp.float32), jnp.zeros((rows,), jnp.float32), zero
    highest, sums, outs = jax.lax.fori_loop(start * turns, stop * turns, turn, carry)
    top[...], total[...] = highest, sums
    for (c, n), x in zip(_pieces(out.shape[1]), outs, strict=True):
        out[:, pl.ds(c, n)] = x
