"""Decoding's attention over blocks of kept keys and values, as a Pallas kernel: which one, what it reads, and that for TPUs.

A row of queries reads `count` blocks of one row of keys from block `begin` on. Lengths are known before a step's blocks are
fetched, so that a block which nobody reads is not: its step names the block that is there already (PrefetchScalarGridSpec).
What is written is a softmax's parts, which merge with those of other keys. A block is 128 keys, the lanes of a TPU's register:
in rows of 32 three quarters of what is fetched would be padding. The same reads by a GPU's kernel are in slot_kernels_gpu.py.
Deliberately absent: pages that lie anywhere.
"""

from __future__ import annotations

import importlib.util
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxreason.models.attention import Law, softcap
from jaxreason.models.rounded import Rounded

BLOCK = 128  # keys
FETCH = 2**20  # bytes of keys and values in a step, about; of so many kv heads at once
FAST = 2**24  # bytes that a TPU kernel's blocks may take without asking for more
NAMES = ("xla", "pallas")
INTERPRETED = ("interpreted", "interpreted triton")  # the kernels on any platform, slowly: for tests
LOWEST = -1.7e38  # of scores: finite, so that a difference of two is a number


def choose(name: str, *, platform: str, dtype: str, size: int, capability: str = "") -> str:
    """The implementation: 'xla', 'pallas' (the TPU's kernel) or 'triton' (the GPU's).

    '' is the kernel on TPUs where it can run, and XLA elsewhere: that for GPUs, which nobody has run yet, must be named. `size` is
    the keys' width, `dtype` the operands' type and `capability` the GPU's, '' where it is not known. A name that cannot run here
    is refused.
    """
    if name in ("xla", *INTERPRETED):
        return name
    given = f"config.model.numerics.sampling_attention is '{name}'"
    unfit = "it works in float32 and was given float64" if dtype == "float64" else ""
    multiple = 16 if platform == "gpu" else 8
    if size % multiple:
        unfit = f"it takes keys of a multiple of {multiple} numbers and these have {size}"
    if name == "":
        return "pallas" if platform == "tpu" and not unfit else "xla"
    if name not in NAMES:
        raise ValueError(f"{given}, which is not known: expected '' for the best there is, {' or '.join(map(repr, NAMES))}")
    if platform not in ("gpu", "tpu"):
        raise ValueError(f"{given}, which runs on gpu and tpu, and this is {platform}: choose 'xla', or '' for the best there is")
    if platform == "gpu":
        unfit = unfit or _unfit_gpu(capability)
    if unfit:
        raise ValueError(f"{given}, and {unfit}: choose 'xla', or '' for the best there is")
    return "triton" if platform == "gpu" else name


def _unfit_gpu(capability: str) -> str:
    major = capability.split(".")[0]  # AMD's are 'gfx...'
    if major and not (major.isdecimal() and int(major) >= 8):
        return f"it takes NVIDIA GPUs of compute capability 8.0 or more and this one's is {capability}"
    if importlib.util.find_spec("jax.experimental.pallas.triton") is None:  # deprecated in jax 0.11.2
        return f"it needs jax.experimental.pallas.triton, which jax {jax.__version__} has not"
    return ""


Parts = tuple[jax.Array, jax.Array, jax.Array]  # as slot_attention.Part


def of_own(
    q: Float[Array, "S K q C"], own: Any, position: Int[Array, "S M"], live: Bool[Array, " S"], *, law: Law, by: str
) -> Parts:
    """Every slot's queries over its own row, a slot_attention.Written."""
    slots, newest = position.shape
    number, zero = jnp.arange(slots, dtype=jnp.int32), jnp.zeros(slots, jnp.int32)
    at = jnp.broadcast_to(position[:, :, None], (slots, newest, q.shape[2] // newest)).reshape(slots, -1)
    # of tokens that are no longer wanted, some may lie beyond a row's end
    count = jnp.minimum(position[:, -1] // BLOCK + 1, own.k.shape[-3])
    reads = Reads(at, number, zero, zero, jnp.where(live, count, 0))
    return _read(q, own, reads, position[:, 0], law=law, by=by)


def of_prompts(
    q: Float[Array, "S K q C"],
    prompts: Any,
    position: Int[Array, "S M"],
    first: Int[Array, " P"],
    rows: Any,
    *,
    law: Law,
    by: str,
) -> Parts:
    """Every prompt, of a slot_attention.Read, for the slots of a row together; positions are counted from its first place."""
    (slots, kv_heads, queries, size), newest = q.shape, position.shape[1]
    width, near = rows.slot.shape[1], jnp.minimum(rows.slot, slots - 1)
    asked = jnp.swapaxes(q[near], 1, 2).reshape(slots, kv_heads, -1, size)  # [R, K, W q, C]
    at = jnp.broadcast_to(position[near][..., None], (slots, width, newest, queries // newest)).reshape(slots, -1)
    nearest = jnp.min(jnp.where(rows.slot < slots, position[near][..., 0], jnp.int32(2**30)), axis=1)
    start, used = first[rows.root], jnp.arange(slots, dtype=jnp.int32) < rows.count[0]
    count = jnp.where(used, prompts.k.shape[-1] // BLOCK - start // BLOCK, 0)
    parts = _read(asked, prompts, Reads(at, rows.root, start, start // BLOCK, count), nearest, law=law, by=by)
    hot = rows.slot.reshape(-1)[:, None] == jnp.arange(slots, dtype=jnp.int32)[None]  # [R W, S]
    listed, place = jnp.any(hot, axis=0), jnp.argmax(hot, axis=0)

    def of_slot(x: jax.Array, nothing: float) -> jax.Array:
        x = jnp.swapaxes(x.reshape(slots, kv_heads, width, queries, *x.shape[3:]), 1, 2)
        x = x.reshape(-1, kv_heads, queries, *x.shape[4:])[place]
        return jnp.where(listed.reshape(-1, *(1 for _ in x.shape[1:])), x, jnp.full_like(x, nothing))

    top, total, out = parts
    return of_slot(top, LOWEST), of_slot(total, 0.0), of_slot(out, 0.0)


class Reads(NamedTuple):
    """Who reads what: R rows of Q queries each."""

    at: Int[Array, "R Q"]  # the query's own place, counted as keys are; it sees none beyond
    row: Int[Array, " R"]  # of the keys
    first: Int[Array, " R"]  # its first key that is one
    begin: Int[Array, " R"]  # its first block that is read
    count: Int[Array, " R"]  # blocks that are read; 0: nobody is here


def _read(q: jax.Array, kept: Any, reads: Reads, nearest: jax.Array, *, law: Law, by: str) -> Parts:
    """`nearest` is the first place among a row's queries: blocks that its window does not reach are left out."""
    row, begin, count = reads.row, reads.begin, reads.count
    if not isinstance(law.window, int) or law.window:
        begin = jnp.maximum(begin, (nearest - law.window + 1) // BLOCK)
        count = jnp.maximum(count - (begin - reads.begin), 0)
    # rows of nobody name one block, so that it is fetched once
    row, begin = (jnp.where(count > 0, x, 0) for x in (row, begin))
    reads = reads._replace(row=row, begin=begin, count=count)
    q = q if isinstance(kept.k, Rounded) else q.astype(kept.k.dtype)
    fixed: Any = {"window": law.window, "cap": law.softcap, "number": kept.number, "interpret": by in INTERPRETED}
    run = read_blocks
    if by.endswith("triton"):
        from jaxreason.models.slot_kernels_gpu import read_blocks as run  # here, as it imports what stands here
    return run(q, kept.k, kept.v, reads, axis=getattr(kept, "axis", -1), **fixed)


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
    """The largest score [R, K, Q], the sum of exp(score - largest), and the values so weighted [R, K, Q, Cv], all float32.

    Keys are [(L,) S, K, n, C, 128] or [(L,) S, K, C, n 128], or, with `axis` -2, with the last two axes swapped, as values always
    are. Without values keys are those too. Either may be `Rounded`. A leading axis is of layers, of which `number` is read.
    `window` 0: none. `cap`: see softcap. Where count is 0 the results are a softmax's over nothing.
    """
    from jax.experimental import pallas as pl  # here, as only a kernel needs it: 0.3 s of import
    from jax.experimental.pallas import tpu as pltpu

    rows, kv_heads, queries, size = q.shape
    lanes = 8 * 4 // q.dtype.itemsize  # sublanes of a tile
    more = -queries % lanes
    q = jnp.pad(q, ((0, 0), (0, 0), (0, more), (0, 0)))
    at = jnp.pad(reads.at, ((0, 0), (0, more)))[..., None]
    lead = () if number is None else (None,)
    in_blocks = len(k.shape) == 5 + len(lead)
    arrays = arrays_of(k, axis) + arrays_of(v, -2)
    taken, wide = [x for x, _ in arrays], size if v is None else v.shape[-1]
    together = _heads(kv_heads, sum(BLOCK * x.shape[-3 - axis] * x.dtype.itemsize for x, axis in arrays))

    def kept(x: jax.Array, axis: int) -> Any:
        widths = [x.shape[-2], BLOCK] if axis == -1 else [BLOCK, x.shape[-1]]

        def index(r: Any, h: Any, i: Any, told: Any, row: Any, first: Any, begin: Any, count: Any) -> tuple[Any, ...]:
            block = begin[r] + jnp.minimum(i, jnp.maximum(count[r] - 1, 0))
            where = (block, 0, 0) if in_blocks else (0, block) if axis == -1 else (block, 0)
            return (*(told[1] for _ in lead), row[r], h, *where)

        return pl.BlockSpec((*lead, None, together, *([None] if in_blocks else []), *widths), index)

    def mine(r: Any, h: Any, i: Any, *_: Any) -> tuple[Any, ...]:
        return r, h, 0, 0

    def spec(width: int) -> Any:
        return pl.BlockSpec((None, together, queries + more, width), mine)

    shape = partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
    outs = [shape((rows, kv_heads, queries + more, width)) for width in (1, 1, wide)]
    held = 2 * together * (queries + more) * 4 * (size + wide + 2 * 128) + 2 * FETCH
    told = [jnp.asarray(window, jnp.int32) if not isinstance(window, int) or window else jnp.int32(2**30)]
    told.append(jnp.int32(0) if number is None else number)
    how: Any = {"rounded": isinstance(k, Rounded), "valued": v is not None, "inner": 0 if axis == -1 else 1}
    kernel = partial(_kernel, cap=cap, heads=together, **how)
    top, total, out = pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=5,
            grid=(rows, kv_heads // together, jnp.maximum(jnp.max(reads.count), 1)),
            in_specs=[
                pl.BlockSpec((None, queries + more, 1), lambda r, h, i, *_: (r, 0, 0)),
                spec(size),
                *(kept(*each) for each in arrays),
            ],
            out_specs=[spec(1), spec(1), spec(wide)],
        ),
        out_shape=outs,
        interpret=interpret,
        name="slot_attention",
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=max(FAST, 2 * held)
        ),
    )(jnp.stack(told), reads.row, reads.first, reads.begin, reads.count, at, q, *taken)
    return top[:, :, :queries, 0], total[:, :, :queries, 0], out[:, :, :queries]


def arrays_of(kept: Any, axis: int) -> list[tuple[jax.Array, int]]:
    """Arrays with the axis of their places."""
    if kept is None:
        return []
    return [(kept.numbers, axis), (kept.scale, -1)] if isinstance(kept, Rounded) else [(kept, axis)]


def _heads(kv_heads: int, bytes_each: int) -> int:
    """How many kv heads a step takes: few steps, of blocks that are not too large."""
    return max(d for d in range(1, kv_heads + 1) if kv_heads % d == 0 and (d == 1 or d * bytes_each <= FETCH))


def _kernel(told: Any, row: Any, first: Any, begin: Any, count: Any, at: Any, q: Any, *refs: Any, **how: Any) -> None:
    """One block of keys for one row's queries: an online softmax (arXiv:2205.14135, Algorithm 1), summed up in the outputs."""
    from jax.experimental import pallas as pl

    del row
    *kept, top, total, out = refs
    r, i = pl.program_id(0), pl.program_id(2)

    @pl.when(i == 0)
    def _() -> None:
        top[...] = jnp.full(top.shape, LOWEST, jnp.float32)
        total[...] = jnp.zeros(total.shape, jnp.float32)
        out[...] = jnp.zeros(out.shape, jnp.float32)

    @pl.when(i < count[r])
    def _() -> None:
        key = (begin[r] + i) * BLOCK + jax.lax.broadcasted_iota(jnp.int32, (1, BLOCK), 1)
        mine = at[...]
        seen = (key >= first[r]) & (key <= mine) & (mine - key < told[0])
        for h in range(how["heads"]):
            keys, key_scale, values, value_scale = _unpacked(kept, h, q.dtype, **how)
            scores = softcap(dot(q[h], keys, how["inner"]) * key_scale, how["cap"])
            scores = jnp.where(seen, scores, LOWEST)
            before = top[h]
            highest = jnp.maximum(before, jnp.max(scores, axis=1, keepdims=True))
            e, shrunk = jnp.exp(scores - highest), jnp.exp(before - highest)
            top[h] = highest
            total[h] = total[h] * shrunk + jnp.sum(e, axis=1, keepdims=True)
            added = dot((e * value_scale).astype(values.dtype), values, 0 if how["valued"] else 1 - how["inner"])
            out[h] = out[h] * shrunk + added


def _unpacked(kept: list[Any], h: int, dtype: Any, *, rounded: bool, valued: bool, **_: Any) -> tuple[Any, Any, Any, Any]:
    """A head's keys, values and their scales."""
    if not rounded:
        return kept[0][h], 1.0, kept[-1][h], 1.0
    keys = kept[0][h].astype(jnp.float32).astype(dtype)
    values = kept[2][h].astype(jnp.float32).astype(dtype) if valued else keys
    return keys, kept[1][h], values, kept[3 if valued else 1][h]


def dot(a: jax.Array, b: jax.Array, axis: int) -> jax.Array:
    return jax.lax.dot_general(a, b, (((1,), (axis,)), ((), ())), preferred_element_type=jnp.float32)
