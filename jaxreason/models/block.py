"""One layer of a decoder, for every family: norms, projections, attention's inputs and outputs, dense and sparse MLPs.

All functions act on activations [P, ..., D] and one layer's weights as `fuse` gives them. How tokens lie in a row, what
is cached and what is scanned is decoder.py's matter.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Float

from jaxreason import sharding
from jaxreason.models import experts, rope
from jaxreason.models.attention import Law, softcap
from jaxreason.models.config import Architecture, Numerics, Stack
from jaxreason.models.rope import Rotation, rotate
from jaxreason.models.weights import Weight, flat, plain, product
from jaxreason.numerics import at_least_float32

Params = Any
FAR = 2**30  # a window that holds every context
LATENT_EPSILON = 1e-6  # of the norms inside latent attention, whatever config.json says of the others


class Context(NamedTuple):
    """What the functions of a decoder are closed over."""

    architecture: Architecture
    numerics: Numerics
    mesh: Mesh

    def constrain(self, x: jax.Array, axes: sharding.Axes) -> jax.Array:
        return jax.lax.with_sharding_constraint(x, sharding.named(self.mesh, axes))


def rms_norm(x: Float[Array, "*b D"], scale: Float[Array, " D"], *, epsilon: float, offset: bool = False) -> Float[Array, "*b D"]:
    """x / sqrt(mean x^2 + epsilon) * scale (arXiv:1910.07467, Eq. 4), or (1 + scale), at least in float32."""
    y = x.astype(at_least_float32(x.dtype))
    y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + epsilon)
    scale = scale.astype(y.dtype) + 1 if offset else scale.astype(y.dtype)
    return (y * scale[(None,) * (y.ndim - 1)]).astype(x.dtype)


def norm(x: jax.Array, scale: jax.Array, c: Context) -> jax.Array:
    """The family's norm of the residual stream."""
    return rms_norm(x, scale, epsilon=c.architecture.norm_epsilon, offset=c.architecture.traits.offset_norm)


# ---- weights


def fuse(layer: Params, c: Context) -> Params:
    """A layer's weights as the matrices that its products use, those with one input joined."""
    out = {name: value for name, value in layer.items() if name.endswith(("norm", "bias", "router")) or name.startswith("expert_")}

    def joined(*names: str) -> tuple[Weight, ...]:
        return _joined([flat(layer[name]) for name in names], c)

    if c.architecture.latent.kv_rank:
        out |= {name: flat(layer[name]) for name in ("q", "q_a", "q_b", "kv_a") if name in layer}
        out["kv_b"] = layer["kv_b"]  # [rank, H, key + value]: decoding folds its halves into queries and outputs
    else:
        out["qkv"] = joined("q", "k", "v")
        out |= {f"{name}_bias": layer[f"{name}_bias"].reshape(-1) for name in "qkv" if f"{name}_bias" in layer}
    out["o"] = flat(layer["o"], inputs=2)
    for name in out.keys() & {"q_a", "kv_a", "router"}:
        # no axis of theirs is on `tensor`, and left alone the compiler would send them around there
        out[name] = jax.tree.map(lambda x: c.constrain(x, (None, None)), out[name])
    for prefix in ("", "shared_"):
        if f"{prefix}gate" in layer:
            out[f"{prefix}gate_up"] = joined(f"{prefix}gate", f"{prefix}up")
            out[f"{prefix}down"] = flat(layer[f"{prefix}down"])
    return out


def _joined(weights: list[Weight], c: Context) -> tuple[Weight, ...]:
    """Matrices with the same input as one, where they are plain, so that their products and gradients are one too.

    The columns that a device of the mesh axis `tensor` has of each lie side by side, so no number moves.
    """
    arrays = [each for each in weights if isinstance(each, jax.Array)]
    if len(arrays) < len(weights):
        return tuple(weights)
    inputs, parts = arrays[0].shape[0], c.mesh.shape["tensor"]
    whole = jnp.concatenate([each.reshape(inputs, parts, -1) for each in arrays], axis=2).reshape(inputs, -1)
    return (c.constrain(whole, ("embed", "heads")),)  # heads or mlp; its gradient too, so that only a device's part is sent there


def _products(x: Float[Array, "rows D"], weights: tuple[Weight, ...], sizes: tuple[int, ...], c: Context) -> list[jax.Array]:
    """The products with each of the matrices that `_joined` was given, whose widths are `sizes`."""
    out = [product(x, weight, dtype=c.numerics.matmul_dtype) for weight in weights]
    if len(out) == len(sizes):
        return out
    parts = c.mesh.shape["tensor"]
    ends = [sum(sizes[:i]) // parts for i in range(1, len(sizes))]
    return [y.reshape(x.shape[0], -1) for y in jnp.split(out[0].reshape(x.shape[0], parts, -1), ends, axis=2)]


# ---- attention's inputs and outputs


def qkv(layer: Params, x: Float[Array, "P *b D"], rotation: Rotation, c: Context) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Queries [P, ..., H, C], keys and values [P, ..., K, C] of a layer's input, normed and rotated."""
    a = c.architecture
    h = norm(x, layer["attention_norm"], c) if a.traits.pre_norm else x
    if a.latent.kv_rank:
        return _latent_qkv(layer, h, rotation, c)
    counts = (a.heads, a.kv_heads, a.kv_heads)
    sizes = tuple(count * a.head_size for count in counts)
    rows = h.reshape(-1, a.hidden_size)
    parts = _products(rows, layer["qkv"], sizes, c)
    out = []
    for name, count, y in zip("qkv", counts, parts, strict=True):
        y = y.astype(x.dtype)
        if f"{name}_bias" in layer:
            y = y + layer[f"{name}_bias"].astype(x.dtype)[None]
        if a.traits.head_norm == "width" and name != "v":
            y = norm(y, layer[f"{name}_norm"], c)
        y = y.reshape(*x.shape[:-1], count, a.head_size)
        if a.traits.head_norm == "head" and name != "v":
            y = norm(y, layer[f"{name}_norm"], c)
        out.append(rotate(y, rotation, interleaved=a.rope.interleaved) if name != "v" else y)
    kind = operands(x, c)
    return out[0].astype(kind), out[1].astype(kind), out[2].astype(kind)


def operands(x: jax.Array, c: Context) -> Any:
    """The type in which queries, keys and values are kept."""
    return jnp.dtype("bfloat16") if c.numerics.matmul_dtype == "bfloat16" else x.dtype


def attended(layer: Params, out: Float[Array, "P *b H Cv"], c: Context) -> Float[Array, "P *b D"]:
    """What attention adds to the residual stream: the heads' outputs projected, and normed where the family does."""
    a = c.architecture
    y = product(out.reshape(-1, a.heads * a.value_size), layer["o"], dtype=c.numerics.matmul_dtype)
    if "o_bias" in layer:
        y = y + layer["o_bias"].astype(y.dtype)[None]
    y = y.astype(c.numerics.activation).reshape(*out.shape[:-2], a.hidden_size)
    return norm(y, layer["attention_post_norm"], c) if a.traits.post_norm else y


# ---- latent attention (arXiv:2405.04434, section 2.1)


class Latents(NamedTuple):
    """What latent attention keeps of a token."""

    query: jax.Array  # [P, ..., H, C], its last `rotated` entries rotated
    latent: jax.Array  # [P, ..., rank]
    key: jax.Array  # [P, ..., rotated], rotated, shared by the heads


def _latents(layer: Params, h: jax.Array, rotation: Rotation, c: Context) -> Latents:
    a, dtype = c.architecture, c.numerics.matmul_dtype
    rows, plain = h.reshape(-1, a.hidden_size), a.head_size - a.latent.rotated
    if "q_a" in layer:
        low = product(rows, layer["q_a"], dtype=dtype).astype(h.dtype)
        query = product(rms_norm(low, layer["q_a_norm"], epsilon=LATENT_EPSILON), layer["q_b"], dtype=dtype)
    else:
        query = product(rows, layer["q"], dtype=dtype)
    query = query.astype(h.dtype).reshape(*h.shape[:-1], a.heads, a.head_size)
    turned = rotate(query[..., plain:], rotation, interleaved=a.rope.interleaved)
    both = product(rows, layer["kv_a"], dtype=dtype).astype(h.dtype).reshape(*h.shape[:-1], -1)
    latent = rms_norm(both[..., : a.latent.kv_rank], layer["kv_a_norm"], epsilon=LATENT_EPSILON)
    key = rotate(both[..., None, a.latent.kv_rank :], rotation, interleaved=a.rope.interleaved)[..., 0, :]
    return Latents(jnp.concatenate([query[..., :plain], turned], axis=-1), latent, key)


def _latent_qkv(layer: Params, h: jax.Array, rotation: Rotation, c: Context) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Every head's own keys and values, read from the latent: the form for many queries."""
    a = c.architecture
    query, latent, key = _latents(layer, h, rotation, c)
    plain = a.head_size - a.latent.rotated
    wide = product(latent.reshape(-1, a.latent.kv_rank), flat(layer["kv_b"]), dtype=c.numerics.matmul_dtype)
    wide = wide.astype(h.dtype).reshape(*h.shape[:-1], a.heads, plain + a.latent.value_size)
    shared = jnp.broadcast_to(key[..., None, :], (*key.shape[:-1], a.heads, a.latent.rotated))
    k, kind = jnp.concatenate([wide[..., :plain], shared], axis=-1), operands(h, c)
    return query.astype(kind), k.astype(kind), wide[..., plain:].astype(kind)


def latent_qk(layer: Params, x: Float[Array, "P *b D"], rotation: Rotation, c: Context) -> tuple[jax.Array, jax.Array]:
    """Queries [P, ..., H, rank + rotated] against the latents themselves, [P, ..., 1, rank + rotated], which are the values too.

    The keys' half of `kv_b` is folded into the queries (arXiv:2405.04434, section 2.1.2): one head's cache serves all.
    """
    a = c.architecture
    h = norm(x, layer["attention_norm"], c)
    query, latent, key = _latents(layer, h, rotation, c)
    plain, kind = a.head_size - a.latent.rotated, operands(x, c)
    up = layer["kv_b"][..., :plain].astype(kind)
    folded = jnp.einsum("...hc,rhc->...hr", query[..., :plain].astype(kind), up, preferred_element_type=at_least_float32(kind))
    q = jnp.concatenate([folded.astype(kind), query[..., plain:].astype(kind)], axis=-1)
    return q, jnp.concatenate([latent, key], axis=-1)[..., None, :].astype(kind)


def latent_out(layer: Params, out: Float[Array, "P *b H R"], c: Context) -> Float[Array, "P *b H Cv"]:
    """The heads' outputs from what they gathered of the latents: the values' half of `kv_b`."""
    a = c.architecture
    kind = operands(out.astype(c.numerics.activation), c)
    up = layer["kv_b"][..., a.head_size - a.latent.rotated :].astype(kind)
    gathered = out[..., : a.latent.kv_rank].astype(kind)
    return jnp.einsum("...hr,rhc->...hc", gathered, up, preferred_element_type=at_least_float32(kind))


# ---- MLP

ACTIVATIONS = {"silu": jax.nn.silu, "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True)}


def mlp(
    layer: Params, x: Float[Array, "P *b D"], counted: jax.Array | None, c: Context
) -> tuple[Float[Array, "P *b D"], experts.Balance | None]:
    """What the MLP adds to the residual stream; of a sparse one also how evenly the `counted` tokens chose."""
    a = c.architecture
    h = norm(x, layer["mlp_norm"], c) if a.traits.pre_norm else x
    balance = None
    if "router" in layer:
        y, balance = _sparse(layer, h, counted, c)
    else:
        y = _gated(layer, h, "", c)
    return (norm(y, layer["mlp_post_norm"], c) if a.traits.post_norm else y), balance


def _gated(layer: Params, h: jax.Array, prefix: str, c: Context) -> jax.Array:
    """down(act(gate h) * up h) (SwiGLU, arXiv:2002.05202, Eq. 6)."""
    a, dtype = c.architecture, c.numerics.matmul_dtype
    size = a.experts.shared_mlp_size if prefix else a.mlp_size
    rows = h.reshape(-1, a.hidden_size)
    gate, up = (y.astype(h.dtype) for y in _products(rows, layer[f"{prefix}gate_up"], (size, size), c))
    y = product(ACTIVATIONS[a.traits.activation](gate) * up, layer[f"{prefix}down"], dtype=dtype)
    return y.astype(h.dtype).reshape(h.shape)


def _sparse(layer: Params, h: jax.Array, counted: jax.Array | None, c: Context) -> tuple[jax.Array, experts.Balance]:
    """The chosen experts' weighted sum, and the shared expert's output."""
    e = c.architecture.experts
    rows = h.reshape(-1, c.architecture.hidden_size)
    routing = experts.route(rows, layer["router"], layer.get("router_bias"), experts=e)
    weights = (plain(layer[f"expert_{name}"], dtype=c.numerics.matmul_dtype) for name in ("gate", "up", "down"))
    axes = sharding.RULES["problems"]
    if rows.shape[0] % (sharding.problem_shards(c.mesh) * c.mesh.shape["sequence"]) == 0:
        axes = (*axes, *sharding.RULES["tokens"])  # when decoding there is one token a row, the same on all of this axis
    y = experts.mix(rows, routing, *weights, dtype=c.numerics.matmul_dtype, mesh=c.mesh, rows_axes=axes)
    y = y.astype(h.dtype).reshape(h.shape)
    if e.shared_mlp_size:
        y = y + _gated(layer, h, "shared_", c)
    mask = jnp.ones(rows.shape[0], bool) if counted is None else counted.reshape(-1)
    return y, experts.balance_counts(routing.scores, routing.chosen, mask)


# ---- ends


def embed(params: Params, tokens: jax.Array, axes: tuple[str | None, ...], c: Context) -> jax.Array:
    # the table's width is gathered first: rows looked up in a split one would be made whole on every device
    table = c.constrain(params["embed"], ("vocab", None))
    x = jnp.take(table, tokens, axis=0, mode="clip").astype(c.numerics.activation)
    if c.architecture.traits.scaled_embedding:
        x = x * jnp.asarray(c.architecture.hidden_size**0.5, params["embed"].dtype).astype(x.dtype)
    return c.constrain(x, axes)


def head(params: Params) -> Any:
    """The matrix [D, V] that makes logits: the embedding's own, transposed, in a tied model."""
    return params["head"] if "head" in params else params["embed"].T


def project(params: Params, hidden: Float[Array, "rows D"], *, c: Context) -> Float[Array, "rows V"]:
    """Logits, soft-capped where the family does; at least float32 (a head in bfloat16 is a known source of divergence)."""
    return softcap(product(hidden, head(params), dtype=c.numerics.head), c.architecture.final_softcap)


def scores(params: Params, hidden: Float[Array, "rows D"], *, c: Context) -> Float[Array, "rows labels"]:
    """Scores of a classifier's head, which has no soft-cap."""
    y = product(hidden, params["head"], dtype=c.numerics.head)
    return y + params["head_bias"].astype(y.dtype)[None] if "head_bias" in params else y


# ---- what differs between layers


class Rotations(NamedTuple):
    """How the two kinds of layers, full and windowed, rotate the same positions."""

    full: Rotation
    local: Rotation  # often the same

    def of(self, windowed: Any) -> Rotation:
        if self.full is self.local or isinstance(windowed, bool):
            return self.local if windowed is True else self.full
        return jnp.where(windowed, self.local[0], self.full[0]), jnp.where(windowed, self.local[1], self.full[1])


def rotations(position: jax.Array, c: Context) -> Rotations:
    a = c.architecture
    size = a.latent.rotated or rope.rotated_size(a.rope, head_size=a.head_size)
    kind = c.numerics.activation
    full = rope.rotary(position, rope=a.rope, size=size, dtype=kind)
    local = full if a.family != "gemma3_text" else rope.rotary(position, rope=a.window_rope, size=size, dtype=kind)
    return Rotations(full, local)


def layers_windowed(stack: Stack, c: Context) -> Any:
    """Whether each layer of a stack is windowed: one bool, or an array to be scanned where they differ."""
    each = [c.architecture.windowed(stack.first + i) for i in range(stack.count)]
    return each[0] if len(set(each)) == 1 else jnp.asarray(each)


def law(windowed: Any, c: Context) -> Law:
    a = c.architecture
    window = (a.window if windowed else 0) if isinstance(windowed, bool) else jnp.where(windowed, a.window, FAR)
    return Law(rope.query_scale(a), a.attention_softcap, window)


def scan(layer: Callable[..., Any], carry: Any, windowed: Any, *inputs: Any) -> tuple[Any, Any]:
    """Scans layers; `windowed` is an argument of theirs, constant or scanned too."""
    if isinstance(windowed, bool):
        return jax.lax.scan(lambda carry, each: layer(carry, windowed, *each), carry, inputs)
    return jax.lax.scan(lambda carry, each: layer(carry, *each), carry, (windowed, *inputs))
