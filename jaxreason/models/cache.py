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
from jaxtyping import Array, Bool, Float, Int

from jaxreason.models import attention, block
from jaxreason.models.block import Context
from jaxreason.models.config import Stack, stacks
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


class Cache(NamedTuple):
    """Keys and values: the prompts' once per group, and each completion's own. An entry for each stack, with a layers' axis.

    Unrolled, each layer is a stack of its own, without that axis. With latent attention the latents of one head are both keys
    and values, and values are None.
    """

    prompt_k: tuple[Any, ...]  # each [(layers,) P, Tp, K, C]
    prompt_v: tuple[Any, ...]
    k: tuple[Any, ...]  # each [(layers,) P, G, K, T, C]
    v: tuple[Any, ...]
    prompt_mask: jax.Array  # [P, Tp]
    prompt_length: jax.Array  # [P]


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
    params: Params,
    prompt: Int[Array, "P Tp"],
    prompt_mask: Bool[Array, "P Tp"],
    *,
    group: int,
    tokens: int,
    c: Context,
) -> tuple[Float[Array, "P D"], Cache]:
    """Reads the prompts, padded on the left, once; opens an empty cache of `tokens` entries for each of `group` completions."""
    axes = ("problems", None, None)
    rotations = block.rotations(jnp.maximum(jnp.cumsum(prompt_mask, axis=1, dtype=jnp.int32) - 1, 0), c)
    segments = prompt_mask.astype(jnp.int32)

    def layer(x: jax.Array, windowed: Any, weights: Params) -> tuple[jax.Array, tuple[Any, Any]]:
        x = c.constrain(x, axes)
        q, k, v = _inputs(weights, x, rotations.of(windowed), c)
        out = attention.row_attention(q, k, k if v is None else v, segments, law=block.law(windowed, c))
        x = x + block.attended(weights, _outputs(weights, out, c), c)
        return x + block.mlp(weights, x, prompt_mask, c)[0], (k, v)

    x, keys, values = block.embed(params, prompt, axes, c), [], []
    for stack, weights, windowed in _runs(params, c):
        if stack.count:
            x, (k, v) = block.scan(layer, x, windowed, weights)
        else:
            x, (k, v) = layer(x, windowed, weights)
        keys.append(k)
        values.append(v)

    def empty(prompts: jax.Array) -> jax.Array:
        *lead, problems, _, kv_heads, size = prompts.shape
        axes = (*(None for _ in lead), "problems", None, "kv_heads" if kv_heads > 1 else None, None, None)
        return c.constrain(jnp.zeros((*lead, problems, group, kv_heads, tokens, size), prompts.dtype), axes)

    k, v = (jax.tree.map(empty, tuple(each)) for each in (keys, values))
    hidden = block.norm(x[:, -1], params["final_norm"], c)
    length = jnp.sum(prompt_mask, axis=1, dtype=jnp.int32)
    return hidden, Cache(tuple(keys), tuple(values), k, v, prompt_mask, length)


def _inputs(weights: Params, x: jax.Array, rotation: Any, c: Context) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    if c.architecture.latent.kv_rank:
        return *block.latent_qk(weights, x, rotation, c), None
    return block.qkv(weights, x, rotation, c)


def _outputs(weights: Params, out: jax.Array, c: Context) -> jax.Array:
    return block.latent_out(weights, out, c) if c.architecture.latent.kv_rank else out


def decode(
    params: Params, token: Int[Array, "P G"], time: Int[Array, ""], cache: Cache, *, c: Context
) -> tuple[Float[Array, "P G D"], Cache]:
    """Feeds token number `time` of every completion; returns the hidden state that predicts the next."""
    axes = ("problems", None, None)
    rotations = block.rotations(jnp.broadcast_to((cache.prompt_length + time)[:, None], token.shape), c)

    def write(buffer: Any, new: Any, *lead: Any) -> Any:
        if buffer is None:
            return None
        new = new[:, :, :, None].astype(buffer.dtype)[(None,) * len(lead)]
        start = (jnp.asarray(i, jnp.int32) for i in (*lead, 0, 0, 0, time, 0))  # with float64 on, a plain 0 would be int64
        return jax.lax.dynamic_update_slice(buffer, new, tuple(start))

    def layer(x: jax.Array, k: Any, v: Any, prompt_k: Any, prompt_v: Any, windowed: Any, weights: Params, *number: Any) -> Any:
        x = c.constrain(x, axes)
        q, new_k, new_v = _inputs(weights, x, rotations.of(windowed), c)
        k, v = write(k, new_k, *number), write(v, new_v, *number)
        own_k: Any = k[number[0]] if number else k
        own_v: Any = own_k if v is None else v[number[0]] if number else v
        prompt_v = prompt_k if v is None else prompt_v
        out = attention.decode_attention(q, own_k, own_v, prompt_k, prompt_v, cache.prompt_mask, time, law=block.law(windowed, c))
        x = x + block.attended(weights, _outputs(weights, out, c), c)
        return x + block.mlp(weights, x, None, c)[0], k, v

    x, keys, values = block.embed(params, token, axes, c), [], []
    entries = zip(cache.k, cache.v, cache.prompt_k, cache.prompt_v, strict=True)
    for (stack, weights, windowed), (k, v, prompt_k, prompt_v) in zip(_runs(params, c), entries, strict=True):
        if stack.count:

            def step(carry: Any, windowed: Any, weights: Params, prompt_k: Any, prompt_v: Any, number: Any) -> tuple[Any, None]:
                x, k, v = carry
                return layer(x, k, v, prompt_k, prompt_v, windowed, weights, number), None

            numbers = jnp.arange(stack.count, dtype=jnp.int32)
            (x, k, v), _ = block.scan(step, (x, k, v), windowed, weights, prompt_k, prompt_v, numbers)
        else:
            x, k, v = layer(x, k, v, prompt_k, prompt_v, windowed, weights)
        keys.append(k)
        values.append(v)
    return block.norm(x, params["final_norm"], c), cache._replace(k=tuple(keys), v=tuple(values))
