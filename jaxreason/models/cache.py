"""Sampling's side of a decoder: prompts read once, then a token of every completion at a time, with keys and values kept.

Weights are brought into the form that decoding reads fastest once, before the loop. Shallow models are unrolled; in deep
ones the layers are scanned with the cache in the carry, updated in place (as scanned inputs and outputs it would be copied
whole, token by token). Deliberately absent: paging, and shorter caches for windowed layers.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int

from jaxreason import sharding
from jaxreason.models import attention, block, slot_attention, slot_kernels
from jaxreason.models.block import Context
from jaxreason.models.config import Stack, stacks
from jaxreason.models.kept import BLOCK, Places, Read, Written, places
from jaxreason.models.rounded import per_array, rounded, swapped
from jaxreason.models.slot_attention import FEW, NEAR, SHORT, Rows, Seats
from jaxreason.models.weights import Int8, LowRank, to_int8

Params = Any
UNROLLED_LAYERS = 8  # up to this depth decoding unrolls its layers: faster, and still quick to compile


# logical axes of a layer's fused weights [in, out], as decoding has them
WHOLE = {
    **dict.fromkeys(("qkv", "q", "q_b", "kv_b"), (None, "heads")),
    **dict.fromkeys(("q_a", "kv_a"), (None, None)),
    **dict.fromkeys(("gate_up", "shared_gate_up"), (None, "mlp")),
    **dict.fromkeys(("down", "shared_down"), ("mlp", None)),
    "o": ("heads", None),
}


class Prompts(NamedTuple):
    """Keys and values of prompts, held once for all who read them. An entry for each stack, with a layers' axis.

    Unrolled, each layer is a stack of its own, without that axis. With latent attention the latents of one head are both keys
    and values, and values are None. In eight bits each is a `Rounded`.
    """

    k: tuple[Any, ...]  # each [(layers,) P, K, C, Tp]
    v: tuple[Any, ...]  # each [(layers,) P, K, Tp, C]
    first: jax.Array  # [P], where each begins; all end together
    length: jax.Array  # [P]


class Own(NamedTuple):
    """Keys and values of each slot's own tokens, as `Prompts` has them, but cut into blocks (slot_attention.py).

    An entry is a pair: of the first places, [(layers,) S, K, n, ...], n blocks of B places; and of the rest,
    [(layers,) S, n, K, ...], None where rows are short or a kernel reads them.
    """

    k: tuple[Any, ...]  # each twice [..., C, B]; for a kernel as values
    v: tuple[Any, ...]  # each twice [..., B, C]


def prepare(params: Params, *, c: Context) -> Params:
    """Weights fused, cast to the operands' type and, in shallow models, cut into layers, once before the loop instead of in it.

    So are those gathered that the mesh axis `fsdp` splits, routed experts excepted: each device then holds a copy of its heads
    and its part of the MLP, and a token's weights need not be sent when it is decoded.
    """
    a, n = c.architecture, c.numerics

    def cast(name: str, weight: Any) -> Any:
        if isinstance(weight, tuple):
            return tuple(cast(name, each) for each in weight)
        if name.endswith(("norm", "bias", "router")):
            return weight
        if n.sampling_weights == "int8" and name != "kv_b":
            return to_int8(weight)
        return jax.tree.map(lambda x: x.astype(n.matmul_dtype), weight)

    def gather(name: str, weight: Any) -> Any:
        if isinstance(weight, tuple):
            return tuple(gather(name, each) for each in weight)
        if name not in WHOLE:
            return weight
        inputs, outputs = WHOLE[name]
        if isinstance(weight, LowRank):
            a, b = c.constrain(weight.a, (None, inputs, None)), c.constrain(weight.b, (None, None, outputs))
            return LowRank(gather(name, weight.weight), a, b, weight.scale)
        if isinstance(weight, Int8):
            return Int8(c.constrain(weight.values, (None, inputs, outputs)), c.constrain(weight.scale, (None, outputs)))
        return c.constrain(weight, (None, inputs, outputs, None)[: weight.ndim])

    prepared = {**params, "embed": c.constrain(params["embed"], ("vocab", None))}
    for stack in stacks(a):
        fused = jax.vmap(partial(block.fuse, c=c))(params[stack.name])
        prepared[stack.name] = {name: gather(name, cast(name, weight)) for name, weight in fused.items()}
    if a.layers <= UNROLLED_LAYERS:
        for stack in stacks(a):
            whole = prepared[stack.name]
            prepared[stack.name] = tuple(jax.tree.map(lambda x, i=i: x[i], whole) for i in range(stack.count))
    return {**prepared, "head": c.constrain(block.head(prepared).astype(n.head), (None, "vocab"))}


def _runs(params: Params, c: Context) -> list[tuple[Stack, Any, Any]]:
    """What is gone through one after the other: (layers, weights, whether each is windowed). Unrolled: single layers."""
    runs = []
    for stack in stacks(c.architecture):
        weights = params[stack.name]
        if not isinstance(weights, tuple):
            runs.append((stack, weights, block.layers_windowed(stack, c)))
            continue
        for i, one in enumerate(weights):
            runs.append((Stack(stack.name, stack.first + i, 0, stack.sparse), one, c.architecture.windowed(stack.first + i)))
    return runs


def prefill(
    params: Params, prompt: Int[Array, "P Tp"], prompt_mask: Bool[Array, "P Tp"], *, c: Context
) -> tuple[Float[Array, "P D"], Prompts]:
    """Reads the prompts, padded on the left, once: from what their first tokens are predicted, and what is kept of them."""
    axes = ("problems", None, None)
    rotations = block.rotations(jnp.maximum(jnp.cumsum(prompt_mask, axis=1, dtype=jnp.int32) - 1, 0), c)
    segments = prompt_mask.astype(jnp.int32)
    more = -prompt.shape[1] % (BLOCK if _implementation(c) == "xla" else slot_kernels.BLOCK)

    kind = _kind(c)

    def stored(x: jax.Array, axis: int) -> jax.Array:
        x = jnp.transpose(jnp.pad(x, ((0, 0), (more, 0), (0, 0), (0, 0))), (0, 2, 3, 1) if axis == -1 else (0, 2, 1, 3))
        return c.constrain(x, ("problems", "kv_heads" if x.shape[1] > 1 else None, None, None))

    def kept(x: jax.Array | None, axis: int) -> Any:
        if x is None:
            return None
        return per_array(stored, axis, rounded(x) if kind == "int8" else x.astype(kind))

    def layer(x: jax.Array, windowed: Any, weights: Params) -> tuple[jax.Array, tuple[Any, Any]]:
        x = c.constrain(x, axes)
        q, k, v = _inputs(weights, x, rotations.of(windowed), c)
        out = attention.row_attention(q, k, k if v is None else v, segments, law=block.law(windowed, c))
        x = x + block.attended(weights, _outputs(weights, out, c), c)
        return x + block.mlp(weights, x, prompt_mask, c)[0], (kept(k, -1), kept(v, -2))

    x, keys, values = block.embed(params, prompt, axes, c), [], []
    for stack, weights, windowed in _runs(params, c):
        if stack.count:
            x, (k, v) = block.scan(layer, x, windowed, weights)
        else:
            x, (k, v) = layer(x, windowed, weights)
        keys.append(k)
        values.append(v)
    hidden = block.norm(x[:, -1], params["final_norm"], c)
    length = jnp.sum(prompt_mask, axis=1, dtype=jnp.int32)
    return hidden, Prompts(tuple(keys), tuple(values), prompt.shape[1] + more - length, length)


def _kind(c: Context) -> str:
    """The cache's type: by name, or the operands' own, which on accelerators is narrowed to bfloat16."""
    n = c.numerics
    narrow = n.matmul_dtype == "float32" and c.mesh.devices.flat[0].platform in ("gpu", "tpu")
    return n.sampling_cache or ("bfloat16" if narrow else n.matmul_dtype)


def _implementation(c: Context) -> str:
    """What reads the cache."""
    a, n = c.architecture, c.numerics
    size = a.latent.kv_rank + a.latent.rotated if a.latent.kv_rank else a.head_size
    device = c.mesh.devices.flat[0]
    where = {"platform": device.platform, "capability": str(getattr(device, "compute_capability", ""))}
    return slot_kernels.choose(n.sampling_attention, dtype=n.matmul_dtype, size=size, **where)


def _keys_axis(c: Context) -> int:
    """On which axis own keys have their places."""
    return -1 if _implementation(c) == "xla" else -2


def _inputs(weights: Params, x: jax.Array, rotation: Any, c: Context) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    if c.architecture.latent.kv_rank:
        return *block.latent_qk(weights, x, rotation, c), None
    return block.qkv(weights, x, rotation, c)


def _outputs(weights: Params, out: jax.Array, c: Context) -> jax.Array:
    return block.latent_out(weights, out, c) if c.architecture.latent.kv_rank else out


def empty(prompts: Prompts, *, slots: int, tokens: int, c: Context) -> Own:
    """Room for `tokens` tokens, or a few more, of each of `slots` completions of these prompts."""
    parts = [(1, tokens)] if tokens <= SHORT else [(1, NEAR), (-(-(tokens - NEAR) // BLOCK), BLOCK)]
    by_kernel = _implementation(c) != "xla"
    if by_kernel:
        parts = [(-(-tokens // slot_kernels.BLOCK), slot_kernels.BLOCK)]

    def room(x: jax.Array, axis: int, *, blocks: int, size: int, far: bool) -> jax.Array:
        *lead, _, kv_heads, _, _ = x.shape
        inner = (blocks, kv_heads) if far else (kv_heads, blocks)
        last = (x.shape[-2], size) if axis == -1 else (size, x.shape[-1])
        nothing = jnp.zeros((*lead, slots, *inner, *last), x.dtype)
        return c.constrain(nothing, _axes(nothing, far=far))

    def pairs(axis: int, kept: tuple[Any, ...]) -> tuple[Any, ...]:
        near, *far = (_map(partial(room, blocks=n, size=size, far=i > 0), axis, kept) for i, (n, size) in enumerate(parts))
        return tuple(None if x is None else (x, y) for x, y in zip(near, far[0] if far else [None] * len(near), strict=True))

    keys = pairs(-2, tuple(swapped(k) for k in prompts.k)) if by_kernel else pairs(-1, prompts.k)
    return Own(keys, pairs(-2, prompts.v))


def _map(function: Any, axis: int, *kept: tuple[Any, ...]) -> tuple[Any, ...]:
    """`function(x, ..., axis)` of every stack's arrays."""
    return tuple(None if of[0] is None else per_array(function, axis, *of) for of in zip(*kept, strict=True))


def _axes(x: Any, *, far: bool) -> sharding.Axes:
    """The logical axes of an array of `Own`."""
    heads = "kv_heads" if x.shape[-3 if far else -4] > 1 else None
    return (*(None for _ in x.shape[:-5]), "problems", *((None, heads) if far else (heads, None)), None, None)


def own_shardings(own: Own, mesh: Mesh) -> Own:
    """Where `own` lies, whose arrays may be shapes."""

    def of(part: Any, *, far: bool) -> Any:
        return jax.tree.map(lambda x: sharding.named(mesh, _axes(x, far=far)), part)

    def pairs(kept: tuple[Any, ...]) -> tuple[Any, ...]:
        return tuple(None if pair is None else (of(pair[0], far=False), of(pair[1], far=True)) for pair in kept)

    return Own(pairs(own.k), pairs(own.v))


def insert(prompts: Prompts, some: Prompts, row: Int[Array, " R"]) -> Prompts:
    """`prompts` with others, no longer ones, in these rows; what goes to a row that does not exist is dropped."""
    more = _places(prompts) - _places(some)

    def put(there: jax.Array, new: jax.Array, axis: int) -> jax.Array:
        new = jnp.pad(new, [(more, 0) if each - new.ndim == axis else (0, 0) for each in range(new.ndim)])
        return there.at[row].set(new, mode="drop") if new.ndim == 4 else there.at[:, row].set(new, mode="drop")

    k, v = _map(put, -1, prompts.k, some.k), _map(put, -2, prompts.v, some.v)
    first, length = prompts.first.at[row].set(some.first + more, mode="drop"), prompts.length.at[row].set(some.length, mode="drop")
    return Prompts(k, v, first, length)


def _places(prompts: Prompts) -> int:
    return prompts.k[0].shape[-1]


def select(own: Own, index: Int[Array, " S"]) -> Own:
    """Each slot with what slot `index` of it holds: forks and moves."""
    return jax.tree.map(lambda x: jnp.take(x, index, axis=x.ndim - 5, mode="clip"), own)


def at_hand(
    prompts: Prompts, copies: Prompts | None, root: Int[Array, " S"], which: Bool[Array, " S"], *, c: Context
) -> Prompts | None:
    """A row for each slot with a copy of its prompt, so that a loop need not gather them at every step; None where they are long.

    Those of slots `which` are made anew; without earlier `copies` all are. A slot is on the device of its prompt.
    """
    if _places(prompts) > FEW:
        return None

    def run(prompts: Prompts, copies: Prompts | None, root: jax.Array, which: jax.Array) -> Prompts:
        whose = root % prompts.length.shape[0]  # a device's own, from 0

        def axis(x: jax.Array) -> int:
            return max(x.ndim - 4, 0)

        if copies is None:
            return jax.tree.map(lambda x: jnp.take(x, whose, axis=axis(x), mode="clip"), prompts)
        first = jnp.argsort(~which, stable=True).astype(jnp.int32)

        def one(i: jax.Array, copies: Prompts) -> Prompts:
            def put(old: jax.Array, x: jax.Array) -> jax.Array:
                row = jax.lax.dynamic_index_in_dim(x, whose[first[i]], axis(x))
                return jax.lax.dynamic_update_slice_in_dim(old, row, first[i], axis(x))

            return jax.tree.map(put, copies, prompts)

        return jax.lax.fori_loop(jnp.int32(0), jnp.sum(which, dtype=jnp.int32), one, copies)

    if c.mesh.size == 1:
        return run(prompts, copies, root, which)

    def where(x: jax.Array) -> Any:
        lead = (None for _ in x.shape[:-4])
        return SLOTS if x.ndim == 1 else sharding.partition((*lead, "problems", "kv_heads" if x.shape[-3] > 1 else None))

    specs = jax.tree.map(where, (prompts, copies))
    return jax.shard_map(run, mesh=c.mesh, in_specs=(*specs, SLOTS, SLOTS), out_specs=specs[0])(prompts, copies, root, which)


def decode(
    params: Params,
    token: Int[Array, "S M"],
    prompts: Prompts,
    own: Own,
    root: Int[Array, " S"],
    length: Int[Array, " S"],
    live: Bool[Array, " S"],
    *,
    width: int,
    c: Context,
) -> tuple[Float[Array, "S M D"], Own]:
    """Feeds every slot its next M tokens, which follow its prompt `root` and `length` own ones; the hidden states after them.

    Results of slots that are not live mean nothing, and what they write lies beyond their length. A prompt is read for up to
    `width` of its slots together; width = 0 says that slots are [P, G] in order. A slot is on the device of its prompt.
    """
    place = length[:, None] + jnp.arange(token.shape[1], dtype=jnp.int32)[None]
    rotations = block.rotations(jnp.take(prompts.length, root, mode="clip")[:, None] + place, c)
    axes = ("problems", None, None)
    whose = root % (prompts.length.shape[0] // sharding.problem_shards(c.mesh)) if width else None  # a device's own, from 0
    rows = _rows(whose, live, width=width, c=c) if whose is not None and _places(prompts) > FEW else None
    seats = Seats(length, live, whose, rows, *_places_of(own, length, newest=token.shape[1], c=c))

    def layer(
        x: jax.Array, k: Any, v: Any, prompt_k: Any, prompt_v: Any, windowed: Any, weights: Params, *number: Any
    ) -> tuple[jax.Array, Any, Any]:
        x = c.constrain(x, axes)
        q, new_k, new_v = _inputs(weights, x, rotations.of(windowed), c)
        out, k, v = _attend(q, new_k, new_v, (k, v), (prompt_k, prompt_v), prompts.first, seats, windowed, *number, c=c)
        x = x + block.attended(weights, _outputs(weights, out, c), c)
        return x + block.mlp(weights, x, None, c)[0], k, v

    x, keys, values = block.embed(params, token, axes, c), [], []
    entries = zip(own.k, own.v, prompts.k, prompts.v, strict=True)
    for (stack, weights, windowed), (k, v, prompt_k, prompt_v) in zip(_runs(params, c), entries, strict=True):
        if stack.count:

            def step(carry: Any, windowed: Any, weights: Params, number: Any, at: Any = (prompt_k, prompt_v)) -> tuple[Any, None]:
                x, k, v = carry
                return layer(x, k, v, *at, windowed, weights, number), None

            numbers = jnp.arange(stack.count, dtype=jnp.int32)
            (x, k, v), _ = block.scan(step, (x, k, v), windowed, weights, numbers)
        else:
            x, k, v = layer(x, k, v, prompt_k, prompt_v, windowed, weights)
        keys.append(k)
        values.append(v)
    return block.norm(x, params["final_norm"], c), Own(tuple(keys), tuple(values))


SLOTS = sharding.partition(("problems",))


def _rows(root: jax.Array, live: jax.Array, *, width: int, c: Context) -> Rows:
    """The rows of each device's own slots."""
    return _on_each(partial(slot_attention.rows_of, width=width), root, live, c=c)


def _places_of(own: Own, length: jax.Array, *, newest: int, c: Context) -> tuple[Places, Places | None]:
    """Where each device's own slots write their newest tokens: among the first places, and in far blocks."""
    near, far = own.k[0]
    blocks, size = near.shape[-3], near.shape[_keys_axis(c)]

    def found(length: jax.Array) -> tuple[Places, Places | None]:
        of_near = places(length, newest=newest, blocks=blocks, size=size)
        return of_near, None if far is None else places(length - NEAR, newest=newest, blocks=far.shape[-4], size=BLOCK)

    return _on_each(found, length, c=c)


def _on_each(function: Any, *of_slots: jax.Array, c: Context) -> Any:
    """`function(...)` of each device's own slots."""
    if c.mesh.size == 1:
        return function(*of_slots)
    return jax.shard_map(function, mesh=c.mesh, in_specs=tuple(SLOTS for _ in of_slots), out_specs=SLOTS)(*of_slots)


def _attend(
    q: jax.Array,
    new_k: jax.Array,
    new_v: jax.Array | None,
    own: tuple[Any, Any],
    prompts: tuple[Any, Any],
    first: jax.Array,
    seats: Seats,
    windowed: Any,
    number: jax.Array | None = None,
    *,
    c: Context,
) -> tuple[jax.Array, Any, Any]:
    """Writes the newest keys and values and attends to them and all before; each device for its own slots and heads."""
    law, implementation = block.law(windowed, c), _implementation(c)

    def run(
        q: Any, new_k: Any, new_v: Any, own: Any, prompts: Any, first: Any, seats: Seats, number: Any, window: Any
    ) -> tuple[jax.Array, Any, Any]:
        (near_k, far_k), (near_v, far_v) = own[0], own[1] or (None, None)
        near, far = Written(near_k, near_v, number, _keys_axis(c)).write(new_k, new_v, seats.near), None
        if seats.far is not None:
            far = Written(far_k, far_v, number, apart=True).write(new_k, new_v, seats.far)
        told = law if window is None else law._replace(window=window)
        read = Read(prompts[0], prompts[1], number)
        out = slot_attention.attend(q, near, far, read, first, seats, law=told, implementation=implementation)
        k, v = (near.k, far and far.k), (near.v, far and far.v)
        return out, k, None if near.v is None else v

    window = None if isinstance(law.window, int) else law.window
    given = (q, new_k, new_v, own, prompts, first, seats, number, window)
    if c.mesh.size == 1:
        return run(*given)
    kv_heads = "kv_heads" if new_k.shape[2] > 1 else None
    new = sharding.partition(("problems", None, kv_heads, None))
    lead = () if number is None else (None,)
    prompt = near = sharding.partition((*lead, "problems", kv_heads))
    kept = tuple(None if pair is None else (near, sharding.partition((*lead, "problems", None, kv_heads))) for pair in own)
    heads = sharding.partition(("problems", None, "heads", None))
    whole = sharding.partition(())
    specs = (heads, new, new, kept, prompt, SLOTS, SLOTS, whole, whole)
    # Pallas does not say over which axes its results vary
    split = partial(jax.shard_map, check_vma=implementation == "xla")
    return split(run, mesh=c.mesh, in_specs=specs, out_specs=(heads, *kept))(*given)
