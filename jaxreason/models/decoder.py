"""A Qwen2-style decoder as pure functions of (parameters, tokens): RMSNorm, rotary grouped-query attention, SwiGLU.

Layers are stacked on a leading axis and scanned. A problem's prompt and its G completions form one row (see attention.py), so
prompt tokens are computed once for their group. The reference model is the same functions with other parameters.
Deliberately absent: a module class, dropout, other families' variants.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int

from jaxreason import sharding
from jaxreason.models import attention
from jaxreason.models.config import Architecture, Numerics
from jaxreason.models.spec import ParamSpec, Specs, linear, table, vector
from jaxreason.numerics import at_least_float32, dense

Params = Any
UNROLLED_LAYERS = 8  # up to this depth decoding unrolls its layers: faster, and still quick to compile


class Cache(NamedTuple):
    """Keys and values: the prompts' once per group, and each completion's own."""

    prompt_k: Any  # L x [P, Tp, K, C]
    prompt_v: Any
    k: Any  # L x [P, G, K, T, C]
    v: Any
    prompt_mask: jax.Array  # [P, Tp]
    prompt_length: jax.Array  # [P]


class CompletionHidden(Protocol):
    def __call__(self, params: Params, prompt: jax.Array, prompt_mask: jax.Array, completion: jax.Array) -> jax.Array: ...


class Prefill(Protocol):
    def __call__(
        self, params: Params, prompt: jax.Array, prompt_mask: jax.Array, *, group: int, tokens: int
    ) -> tuple[jax.Array, Cache]: ...


class Decode(Protocol):
    def __call__(self, params: Params, token: jax.Array, time: jax.Array, cache: Cache) -> tuple[jax.Array, Cache]: ...


class Model(NamedTuple):
    """What training and sampling need of a policy. Parameters are an argument everywhere; nothing is held."""

    specs: Specs
    completion_hidden: CompletionHidden  # params, prompt, prompt_mask, completion [P,G,T] -> [P,G,T,D], of the token *before*
    prefill: Prefill  # params, prompt, prompt_mask -> last hidden [P,D], Cache
    decode: Decode  # params, token [P,G], time [], Cache -> hidden [P,G,D], Cache
    prepare_sampling: Any  # params -> params in the form that decoding reads fastest
    head: Any  # params -> [D, V]
    numerics: Numerics


def declare(architecture: Architecture) -> Specs:
    """The parameters of a Qwen2 decoder, with their Hugging Face names."""
    a = architecture
    std = a.initializer_range
    block = "model.layers.{layer}."

    def stacked(shape: tuple[int, ...], axes: sharding.Axes, name: str, *, init: str = "normal", hf: Any = None) -> ParamSpec:
        return ParamSpec((a.layers, *shape), ("layers", *axes), init, std, block + name, hf or linear())

    width, heads, kv, size, mlp = a.hidden_size, a.heads, a.kv_heads, a.head_size, a.mlp_size
    layers = {
        "attention_norm": stacked((width,), (None,), "input_layernorm.weight", init="ones", hf=vector()),
        "q": stacked((width, heads, size), ("embed", "heads", None), "self_attn.q_proj.weight"),
        "q_bias": stacked((heads, size), ("heads", None), "self_attn.q_proj.bias", init="zeros", hf=vector()),
        "k": stacked((width, kv, size), ("embed", "kv_heads", None), "self_attn.k_proj.weight"),
        "k_bias": stacked((kv, size), ("kv_heads", None), "self_attn.k_proj.bias", init="zeros", hf=vector()),
        "v": stacked((width, kv, size), ("embed", "kv_heads", None), "self_attn.v_proj.weight"),
        "v_bias": stacked((kv, size), ("kv_heads", None), "self_attn.v_proj.bias", init="zeros", hf=vector()),
        "o": stacked((heads, size, width), ("heads", None, "embed"), "self_attn.o_proj.weight", hf=linear(inputs=2)),
        "mlp_norm": stacked((width,), (None,), "post_attention_layernorm.weight", init="ones", hf=vector()),
        "gate": stacked((width, mlp), ("embed", "mlp"), "mlp.gate_proj.weight"),
        "up": stacked((width, mlp), ("embed", "mlp"), "mlp.up_proj.weight"),
        "down": stacked((mlp, width), ("mlp", "embed"), "mlp.down_proj.weight"),
    }
    specs: Specs = {
        "embed": ParamSpec((a.vocab_size, width), ("vocab", "embed"), "normal", std, "model.embed_tokens.weight", table()),
        "layers": layers,
        "final_norm": ParamSpec((width,), (None,), "ones", std, "model.norm.weight", vector()),
    }
    if not a.tied:
        specs["head"] = ParamSpec((width, a.vocab_size), ("embed", "vocab"), "normal", std, "lm_head.weight", linear())
    return specs


def rms_norm(x: Float[Array, "*b D"], scale: Float[Array, " D"], *, epsilon: float) -> Float[Array, "*b D"]:
    """x / sqrt(mean x^2 + epsilon) * scale (arXiv:1910.07467, Eq. 4), at least in float32."""
    y = x.astype(at_least_float32(x.dtype))
    y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + epsilon)
    return (y * scale.astype(y.dtype)[(None,) * (y.ndim - 1)]).astype(x.dtype)


def make_decoder(architecture: Architecture, numerics: Numerics, mesh: Mesh) -> Model:
    """The functions of a decoder on a mesh."""
    constrain = sharding.constrainer(mesh)
    activation = _activation(numerics)
    bind = partial(partial, architecture=architecture, numerics=numerics, constrain=constrain, activation=activation)
    return Model(
        specs=declare(architecture),
        completion_hidden=bind(_completion_hidden),
        prefill=bind(_prefill),
        decode=bind(_decode),
        prepare_sampling=partial(_prepare_sampling, architecture=architecture, numerics=numerics),
        head=_head,
        numerics=numerics,
    )


def _activation(numerics: Numerics) -> str:
    return "float64" if numerics.param_dtype == "float64" else "float32"


def _head(params: Params) -> jax.Array:
    return params["head"] if "head" in params else params["embed"].T


def _embed(params: Params, tokens: jax.Array, activation: str, constrain: sharding.Constrain) -> jax.Array:
    # the table's width is gathered first: rows looked up in a split one would be made whole on every device
    table = constrain(params["embed"], ("vocab", None))
    x = jnp.take(table, tokens, axis=0, mode="clip").astype(activation)
    return constrain(x, ("problems", None, None))


def _qkv(layer: Params, x: jax.Array, rotation: attention.Rotation, architecture: Architecture, numerics: Numerics) -> Any:
    """Queries, keys and values of [..., D] activations, rotated; one flat product for the three."""
    a = architecture
    h = rms_norm(x, layer["attention_norm"], epsilon=a.norm_epsilon).reshape(-1, a.hidden_size)
    y = dense(h, layer["qkv"], dtype=numerics.matmul_dtype).astype(x.dtype)
    y = (y + layer["qkv_bias"].astype(x.dtype)[None]).reshape(*x.shape[:-1], -1, a.head_size)
    q, k, v = jnp.split(y, [a.heads, a.heads + a.kv_heads], axis=-2)
    kind = "bfloat16" if numerics.matmul_dtype == "bfloat16" else x.dtype
    return attention.rotate(q, rotation).astype(kind), attention.rotate(k, rotation).astype(kind), v.astype(kind)


def _after_attention(layer: Params, x: jax.Array, out: jax.Array, architecture: Architecture, numerics: Numerics) -> jax.Array:
    """Output projection and the SwiGLU block, both residual."""
    a, kind = architecture, numerics.matmul_dtype
    flat = x.reshape(-1, a.hidden_size)
    flat = flat + dense(out.reshape(flat.shape[0], -1), layer["o"], dtype=kind).astype(x.dtype)
    h = rms_norm(flat, layer["mlp_norm"], epsilon=a.norm_epsilon)
    gate, up = jnp.split(dense(h, layer["gate_up"], dtype=kind).astype(x.dtype), 2, axis=-1)
    flat = flat + dense(jax.nn.silu(gate) * up, layer["down"], dtype=kind).astype(x.dtype)
    return flat.reshape(x.shape)


def _fuse(layer: Params, architecture: Architecture) -> Params:
    """A layer's weights as the few flat matrices that its products use."""
    width = architecture.hidden_size

    def flat(*names: str) -> jax.Array:
        return jnp.concatenate([layer[name].reshape(width, -1) for name in names], axis=-1)

    return {
        "attention_norm": layer["attention_norm"],
        "qkv": flat("q", "k", "v"),
        "qkv_bias": jnp.concatenate([layer[name].reshape(-1) for name in ("q_bias", "k_bias", "v_bias")]),
        "o": layer["o"].reshape(-1, width),
        "mlp_norm": layer["mlp_norm"],
        "gate_up": flat("gate", "up"),
        "down": layer["down"],
    }


def _positions(prompt_mask: jax.Array) -> jax.Array:
    return jnp.maximum(jnp.cumsum(prompt_mask, axis=1, dtype=jnp.int32) - 1, 0)


def _completion_hidden(
    params: Params,
    prompt: Int[Array, "P Tp"],
    prompt_mask: Bool[Array, "P Tp"],
    completion: Int[Array, "P G T"],
    *,
    architecture: Architecture,
    numerics: Numerics,
    constrain: sharding.Constrain,
    activation: str,
) -> Float[Array, "P G T D"]:
    """Final hidden states from which each completion token is predicted.

    hidden[p, g, 0] is the last prompt token's, hidden[p, g, t] that of completion[p, g, t - 1]: the last token is fed to nobody.
    """
    a = architecture
    problems, prompt_tokens = prompt.shape
    group, tokens = completion.shape[1], completion.shape[2] - 1
    fed = completion[:, :, :-1].reshape(problems, -1)
    length = jnp.sum(prompt_mask, axis=1, dtype=jnp.int32)
    own = jnp.tile(jnp.arange(tokens, dtype=jnp.int32), group)[None] + length[:, None]
    position = jnp.concatenate([_positions(prompt_mask), own], axis=1)
    rotation = attention.rotary(position, head_size=a.head_size, theta=a.rope_theta, dtype=activation)
    x = _embed(params, jnp.concatenate([prompt, fed], axis=1), activation, constrain)

    def layer(x: jax.Array, weights: Params) -> tuple[jax.Array, None]:
        weights = _fuse(weights, a)
        x = constrain(x, ("problems", None, None))
        q, k, v = _qkv(weights, x, rotation, a, numerics)

        def split(y: jax.Array) -> tuple[jax.Array, jax.Array]:
            return y[:, :prompt_tokens], y[:, prompt_tokens:].reshape(problems, group, tokens, *y.shape[2:])

        (qp, qc), (kp, kc), (vp, vc) = split(q), split(k), split(v)
        out = attention.prompt_attention(qp, kp, vp, prompt_mask)
        own = attention.completion_attention(qc, kc, vc, kp, vp, prompt_mask)
        out = jnp.concatenate([out, own.reshape(problems, group * tokens, *own.shape[3:])], axis=1)
        return _after_attention(weights, x, out, a, numerics), None

    if numerics.remat:
        layer = jax.checkpoint(layer, prevent_cse=False)  # scan already keeps the two passes apart
    x, _ = jax.lax.scan(layer, x, params["layers"])
    last = jnp.broadcast_to(x[:, None, prompt_tokens - 1 : prompt_tokens], (problems, group, 1, a.hidden_size))
    x = jnp.concatenate([last, x[:, prompt_tokens:].reshape(problems, group, tokens, -1)], axis=2)
    return rms_norm(x, params["final_norm"], epsilon=a.norm_epsilon)


def prompt_hidden(
    params: Params,
    prompt: Int[Array, "P Tp"],
    prompt_mask: Bool[Array, "P Tp"],
    *,
    architecture: Architecture,
    numerics: Numerics,
    constrain: sharding.Constrain,
    activation: str,
) -> tuple[Float[Array, "P Tp D"], tuple[Any, Any]]:
    """Final hidden states of every prompt token, and the keys and values of all layers, L x [P, Tp, K, C].

    The L are a tuple or an axis, as in `params["layers"]`.
    """
    a = architecture
    rotation = attention.rotary(_positions(prompt_mask), head_size=a.head_size, theta=a.rope_theta, dtype=activation)
    x = _embed(params, prompt, activation, constrain)

    def layer(x: jax.Array, weights: Params) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        x = constrain(x, ("problems", None, None))
        q, k, v = _qkv(weights, x, rotation, a, numerics)
        out = attention.prompt_attention(q, k, v, prompt_mask)
        return _after_attention(weights, x, out, a, numerics), (k, v)

    layers = params["layers"]
    if isinstance(layers, tuple):
        cache = []
        for weights in layers:
            x, kv = layer(x, weights)
            cache.append(kv)
        k, v = (tuple(each) for each in zip(*cache, strict=True))
    else:
        x, (k, v) = jax.lax.scan(layer, x, layers)
    return rms_norm(x, params["final_norm"], epsilon=a.norm_epsilon), (k, v)


def logits(
    params: Params,
    tokens: Int[Array, "P T"],
    mask: Bool[Array, "P T"],
    *,
    architecture: Architecture,
    numerics: Numerics,
    mesh: Mesh,
) -> Float[Array, "P T V"]:
    """Logits after every token of left-padded rows, all at once: to compare with other implementations, not to train."""
    bound = {"architecture": architecture, "numerics": numerics}
    prepared = _prepare_sampling(params, **bound)
    constrain = sharding.constrainer(mesh)
    hidden, _ = prompt_hidden(prepared, tokens, mask, **bound, constrain=constrain, activation=_activation(numerics))
    flat = dense(hidden.reshape(-1, architecture.hidden_size), prepared["head"], dtype=numerics.matmul_dtype)
    return flat.reshape(*tokens.shape, -1)


def _prepare_sampling(params: Params, *, architecture: Architecture, numerics: Numerics) -> Params:
    """Weights fused, cast to the operands' type and, in shallow models, cut into layers, once before the loop instead of in it."""
    fused = jax.vmap(partial(_fuse, architecture=architecture))(params["layers"])
    for name in ("qkv", "o", "gate_up", "down"):
        fused[name] = fused[name].astype(numerics.matmul_dtype)
    if architecture.layers <= UNROLLED_LAYERS:
        fused = tuple(jax.tree.map(lambda x, i=i: x[i], fused) for i in range(architecture.layers))
    return {**params, "layers": fused, "head": _head(params).astype(numerics.matmul_dtype)}


def _prefill(
    params: Params,
    prompt: Int[Array, "P Tp"],
    prompt_mask: Bool[Array, "P Tp"],
    *,
    group: int,
    tokens: int,
    architecture: Architecture,
    numerics: Numerics,
    constrain: sharding.Constrain,
    activation: str,
) -> tuple[Float[Array, "P D"], Cache]:
    """Reads the prompts once; opens an empty cache of `tokens` entries for each of `group` completions."""
    a = architecture
    bound = {"architecture": a, "numerics": numerics, "constrain": constrain, "activation": activation}
    hidden, (k, v) = prompt_hidden(params, prompt, prompt_mask, **bound)
    kind = "bfloat16" if numerics.matmul_dtype == "bfloat16" else activation
    shape = (prompt.shape[0], group, a.kv_heads, tokens, a.head_size)

    def empty() -> Any:
        def one(*lead: int) -> jax.Array:
            axes = (None,) * len(lead) + ("problems", None, "kv_heads", None, None)
            return constrain(jnp.zeros((*lead, *shape), kind), axes)

        return tuple(one() for _ in range(a.layers)) if isinstance(params["layers"], tuple) else one(a.layers)

    length = jnp.sum(prompt_mask, axis=1, dtype=jnp.int32)
    return hidden[:, -1], Cache(k, v, empty(), empty(), prompt_mask, length)


def _decode(
    params: Params,
    token: Int[Array, "P G"],
    time: Int[Array, ""],
    cache: Cache,
    *,
    architecture: Architecture,
    numerics: Numerics,
    constrain: sharding.Constrain,
    activation: str,
) -> tuple[Float[Array, "P G D"], Cache]:
    """Feeds token number `time` of every completion; returns the hidden state that predicts the next."""
    a = architecture
    position = jnp.broadcast_to((cache.prompt_length + time)[:, None], token.shape)
    rotation = attention.rotary(position, head_size=a.head_size, theta=a.rope_theta, dtype=activation)
    x = _embed(params, token, activation, constrain)

    def write(buffer: jax.Array, new: jax.Array, *lead: Any) -> jax.Array:
        new = new[:, :, :, None].astype(buffer.dtype)[(None,) * len(lead)]
        start = (jnp.asarray(i, jnp.int32) for i in (*lead, 0, 0, 0, time, 0))  # with float64 on, a plain 0 would be int64
        return jax.lax.dynamic_update_slice(buffer, new, tuple(start))

    def attend(weights: Params, x: jax.Array, read: Any) -> tuple[jax.Array, Any]:
        x = constrain(x, ("problems", None, None))
        q, k, v = _qkv(weights, x, rotation, a, numerics)
        own_k, own_v, prompt_k, prompt_v, kept = read(k, v)
        out = attention.decode_attention(q, own_k, own_v, prompt_k, prompt_v, cache.prompt_mask, time)
        return _after_attention(weights, x, out, a, numerics), kept

    layers = params["layers"]
    if isinstance(layers, tuple):
        ks, vs = [], []
        for i, weights in enumerate(layers):

            def read(k: jax.Array, v: jax.Array, i: int = i) -> Any:
                new_k, new_v = write(cache.k[i], k), write(cache.v[i], v)
                return new_k, new_v, cache.prompt_k[i], cache.prompt_v[i], (new_k, new_v)

            x, (new_k, new_v) = attend(weights, x, read)
            ks.append(new_k)
            vs.append(new_v)
        k, v = tuple(ks), tuple(vs)
    else:

        def step(carry: Any, inputs: Any) -> tuple[Any, None]:
            # the cache is carried and updated in place; as scanned inputs and outputs it would be copied whole, token by token
            x, k, v = carry
            number, weights, prompt_k, prompt_v = inputs

            def read(new_k: jax.Array, new_v: jax.Array) -> Any:
                kept = write(k, new_k, number), write(v, new_v, number)
                return kept[0][number], kept[1][number], prompt_k, prompt_v, kept

            x, (k, v) = attend(weights, x, read)
            return (x, k, v), None

        numbers = jnp.arange(a.layers, dtype=jnp.int32)
        (x, k, v), _ = jax.lax.scan(step, (x, cache.k, cache.v), (numbers, layers, cache.prompt_k, cache.prompt_v))
    return rms_norm(x, params["final_norm"], epsilon=a.norm_epsilon), cache._replace(k=k, v=v)
