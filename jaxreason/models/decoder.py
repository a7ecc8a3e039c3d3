"""Decoders as pure functions of (parameters, tokens), for every family: training rows, plain rows, prefill and decoding.

Layers of one kind are stacked on a leading axis and scanned. A problem's prompt and its G completions form one row (see
attention.py), so prompt tokens are computed once for their group. The reference model is the same functions with other
parameters. What one layer computes is block.py's matter. Deliberately absent: a module class, dropout.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int

from jaxreason.models import attention, block, cache, experts, kernels
from jaxreason.models.attention import Law
from jaxreason.models.block import Context
from jaxreason.models.config import Architecture, Numerics, stacks
from jaxreason.models.declare import LANGUAGE, declare
from jaxreason.models.families import Head
from jaxreason.models.spec import Specs
from jaxreason.numerics import at_least_float32

Params = Any


class CompletionForward(Protocol):
    def __call__(
        self, params: Params, prompt: jax.Array, prompt_mask: jax.Array, completion: jax.Array, mask: jax.Array | None = None
    ) -> tuple[jax.Array, jax.Array]: ...


class Hidden(Protocol):
    def __call__(self, params: Params, tokens: jax.Array, segments: jax.Array) -> jax.Array: ...


class Prefill(Protocol):
    def __call__(
        self, params: Params, prompt: jax.Array, prompt_mask: jax.Array, *, group: int, tokens: int
    ) -> tuple[jax.Array, Any]: ...


class Decode(Protocol):
    def __call__(self, params: Params, token: jax.Array, time: jax.Array, cache: Any) -> tuple[jax.Array, Any]: ...


class Model(NamedTuple):
    """What training and sampling need of a policy. Parameters are an argument everywhere; nothing is held."""

    specs: Specs
    # params, prompt, prompt_mask, completion [P,G,T], mask -> [P,G,T,D], of the token *before*; and the load-balance loss
    forward: CompletionForward
    hidden: Hidden  # params, tokens [P,N], segments [P,N] (0: padding) -> [P,N,D], rows as they are
    prefill: Prefill  # params, prompt, prompt_mask -> last hidden [P,D], cache
    decode: Decode  # params, token [P,G], time [], cache -> hidden [P,G,D], cache
    prepare_sampling: Callable[[Params], Params]  # params in the form that decoding reads fastest
    project: Callable[[Params, jax.Array], jax.Array]  # params, hidden [rows,D] -> logits [rows,V]
    numerics: Numerics
    balance_weight: float = 0.0  # of the load-balance loss, beside the policy's

    def completion_hidden(self, params: Params, prompt: jax.Array, prompt_mask: jax.Array, completion: jax.Array) -> jax.Array:
        """The hidden states of `forward` alone."""
        return self.forward(params, prompt, prompt_mask, completion)[0]


def make_decoder(architecture: Architecture, numerics: Numerics, mesh: Mesh, *, head: Head = LANGUAGE) -> Model:
    """The functions of a decoder on a mesh; with another head than the language model's, `project` makes scores (heads.py)."""
    c = Context(architecture, numerics, mesh)
    return Model(
        specs=declare(architecture, head),
        forward=partial(_forward, c=c),
        hidden=partial(_hidden, c=c),
        prefill=partial(cache.prefill, c=c),
        decode=partial(cache.decode, c=c),
        prepare_sampling=partial(cache.prepare, c=c),
        project=partial(block.project if head.kind == "lm" else block.scores, c=c),
        numerics=numerics,
    )


def logits(model: Model, params: Params, tokens: Int[Array, "P T"], mask: Bool[Array, "P T"]) -> Float[Array, "P T V"]:
    """Logits after every token of padded rows, all at once: to compare with other implementations, not to train."""
    hidden = model.hidden(params, tokens, mask.astype(jnp.int32))
    return model.project(params, hidden.reshape(-1, hidden.shape[-1])).reshape(*tokens.shape, -1)


# ---- whole rows


def _remat(layer: Callable[..., Any], c: Context) -> Callable[..., Any]:
    """The layer with its part of the forward pass repeated in the backward pass, by the policy's name."""
    if c.numerics.remat not in ("layer", "products"):
        return layer
    kept = jax.checkpoint_policies.save_only_these_names("product")
    policy = kept if c.numerics.remat == "products" else None
    return jax.checkpoint(layer, prevent_cse=False, policy=policy)  # scan already keeps the two passes apart


class Row(NamedTuple):
    """How the tokens of a forward pass lie: streams of places, and attention over all of them.

    One stream [P, N, D], or two where the mesh splits tokens: prompts [P, Tp, D] and completions [P, G, T, D], each cut evenly.
    """

    axes: tuple[tuple[str | None, ...], ...]  # logical axes of each stream's activations
    attend: Callable[[list[jax.Array], list[jax.Array], list[jax.Array], Law], list[jax.Array]]
    counted: tuple[jax.Array, ...]  # real tokens of each stream, bool


def _layers(
    params: Params, streams: tuple[jax.Array, ...], kinds: tuple[block.Kinds, ...], row: Row, c: Context
) -> tuple[tuple[jax.Array, ...], jax.Array]:
    """All layers over a row; the normed hidden states of each stream, and the load-balance loss (0 in a dense decoder)."""
    many, wide = (c.architecture.experts.count,), at_least_float32(c.numerics.activation)
    total = experts.Balance(jnp.zeros(many, wide), jnp.zeros(many, wide), jnp.zeros((), wide))

    def layer(carry: Any, windowed: Any, weights: Params) -> tuple[Any, None]:
        xs, total = carry
        weights = block.fuse(weights, c)
        xs = [c.constrain(x, axes) for x, axes in zip(xs, row.axes, strict=True)]
        heads = [block.qkv(weights, x, kind.rotation(windowed), c) for x, kind in zip(xs, kinds, strict=True)]
        q, k, v = ([checkpoint_name(y, "product") for y in each] for each in zip(*heads, strict=True))
        attend = partial(_attend, row=row, windowed=windowed, c=c)
        outs = (jax.checkpoint(attend) if c.numerics.remat == "attention" else attend)(q, k, v)
        after = []
        for x, out, counted in zip(xs, outs, row.counted, strict=True):
            x = x + checkpoint_name(block.attended(weights, out, c), "product")
            y, balance = block.mlp(weights, x, counted, c)
            total = total if balance is None else jax.tree.map(lambda a, b: a + b.astype(a.dtype), total, balance)
            after.append(x + checkpoint_name(y, "product"))
        return (tuple(after), total), None

    carry = (streams, total)
    for stack in stacks(c.architecture):
        carry, _ = block.scan(_remat(layer, c), carry, block.layers_windowed(stack, c), params[stack.name])
    xs, total = carry
    balance = experts.balance_loss(total) if c.architecture.experts.count else jnp.zeros((), total.rows.dtype)
    return tuple(block.norm(x, params["final_norm"], c) for x in xs), balance


def _attend(q: list[jax.Array], k: list[jax.Array], v: list[jax.Array], *, row: Row, windowed: Any, c: Context) -> list[jax.Array]:
    return row.attend(q, k, v, block.law(windowed, c))


def _implementation(c: Context) -> str:
    platform = c.mesh.devices.flat[0].platform
    kind = "bfloat16" if c.numerics.matmul_dtype == "bfloat16" else c.numerics.activation
    name = c.numerics.attention
    if c.mesh.shape["sequence"] > 1 and name == "auto":
        return "xla"
    name = kernels.choose(name, platform=platform, softcap=c.architecture.attention_softcap, dtype=kind)
    if c.mesh.shape["sequence"] > 1 and name != "xla":
        raise ValueError(
            f"config.model.numerics.attention is '{name}' with config.mesh.sequence = {c.mesh.shape['sequence']}: "
            "a kernel takes whole rows; set it to 'xla' or 'auto', or sequence to 1"
        )
    return name


def _by_kernel(name: str, layout: kernels.Layout, segments: jax.Array, c: Context) -> Callable[..., jax.Array]:
    """Attention of whole rows through a kernel, whose mask is static: a stack with both kinds of layers has both."""

    fixed = {"layout": layout, "implementation": name, "mesh": c.mesh}

    def run(q: jax.Array, k: jax.Array, v: jax.Array, law: Law) -> jax.Array:
        def one(window: int) -> Callable[[], jax.Array]:
            return lambda: kernels.row_attention(q, k, v, segments, scale=law.scale, softcap=law.softcap, window=window, **fixed)

        if isinstance(law.window, int):
            return one(law.window)()
        return jax.lax.cond(law.window < block.FAR, one(c.architecture.window), one(0))

    return run


def _hidden(params: Params, tokens: Int[Array, "P N"], segments: Int[Array, "P N"], *, c: Context) -> Float[Array, "P N D"]:
    """Final hidden states of rows of one or several segments, numbered from 1; 0 is padding, on either side.

    Positions start at 0 in each segment, and no token sees another segment's.
    """
    splits = tokens.shape[1] % c.mesh.shape["sequence"] == 0
    axes = ("problems", "tokens" if splits else None, None)
    place = jnp.arange(tokens.shape[1], dtype=jnp.int32)
    begins = segments != jnp.pad(segments, ((0, 0), (1, 0)), constant_values=-1)[:, :-1]
    position = place[None] - jax.lax.cummax(jnp.where(begins, place[None], jnp.zeros_like(segments)), axis=1)
    name = _implementation(c)
    kernel = _by_kernel(name, kernels.Layout(tokens.shape[1]), segments, c)

    def attend(q: list[jax.Array], k: list[jax.Array], v: list[jax.Array], law: Law) -> list[jax.Array]:
        if name != "xla":
            return [kernel(q[0], k[0], v[0], law)]
        gathered_k, gathered_v = (c.constrain(y, ("problems", None, "kv_heads", None)) for y in (k[0], v[0]))
        return [attention.row_attention(q[0], gathered_k, gathered_v, segments, law=law)]

    x = block.embed(params, tokens, axes, c)
    row = Row((axes,), attend, (segments > 0,))
    (hidden,), _ = _layers(params, (x,), (block.kinds(position, c),), row, c)
    return hidden


def _positions(prompt_mask: jax.Array) -> jax.Array:
    return jnp.maximum(jnp.cumsum(prompt_mask, axis=1, dtype=jnp.int32) - 1, 0)


def _forward(
    params: Params,
    prompt: Int[Array, "P Tp"],
    prompt_mask: Bool[Array, "P Tp"],
    completion: Int[Array, "P G T"],
    mask: Bool[Array, "P G T"] | None = None,
    *,
    c: Context,
) -> tuple[Float[Array, "P G T D"], Float[Array, ""]]:
    """Final hidden states from which each completion token is predicted, and the load-balance loss of the real tokens.

    hidden[p, g, 0] is the last prompt token's, hidden[p, g, t] that of completion[p, g, t - 1]: the last token is fed to nobody.
    `mask` says which completion tokens are real; without it all are.
    """
    problems, before = prompt.shape
    group, wanted = completion.shape[1], completion.shape[2]
    parts = c.mesh.shape["sequence"]
    tokens = wanted - 1 if parts == 1 else -(-(wanted - 1) // parts) * parts
    # an even number of places for every device; what is added comes last, so no real token sees it
    fed = jnp.pad(completion[:, :, :-1], ((0, 0), (0, 0), (0, tokens - (wanted - 1))))
    real = jnp.ones(fed.shape, bool) if mask is None else jnp.pad(mask, ((0, 0), (0, 0), (0, tokens)))[:, :, :tokens]
    length = jnp.sum(prompt_mask, axis=1, dtype=jnp.int32)
    own = jnp.broadcast_to(jnp.arange(tokens, dtype=jnp.int32)[None, None] + length[:, None, None], fed.shape)
    make = _one_stream if parts == 1 else _two_streams
    row, tokens_of, positions_of, split = make(prompt, prompt_mask, fed, own, real, c)
    streams = tuple(block.embed(params, x, axes, c) for x, axes in zip(tokens_of, row.axes, strict=True))
    hidden, balance = _layers(params, streams, tuple(block.kinds(each, c) for each in positions_of), row, c)
    x_prompt, x = split(hidden)
    last = jnp.broadcast_to(x_prompt[:, None, -1:], (problems, group, 1, x_prompt.shape[-1]))
    return jnp.concatenate([last, x[:, :, : wanted - 1]], axis=2), balance


def _one_stream(prompt: Any, prompt_mask: Any, fed: Any, own: Any, real: Any, c: Context) -> tuple[Row, Any, Any, Any]:
    """Prompt and completions side by side in each row."""
    problems, before = prompt.shape
    group, tokens = fed.shape[1:]
    name = _implementation(c)
    segments = jnp.concatenate([prompt_mask, jnp.ones((problems, group * tokens), bool)], axis=1).astype(jnp.int32)
    kernel = _by_kernel(name, kernels.Layout(before, group, tokens), segments, c)

    def flat_group(x: jax.Array) -> jax.Array:
        return x.reshape(problems, group * tokens, *x.shape[3:])

    def beside(a: jax.Array, b: jax.Array) -> jax.Array:
        return jnp.concatenate([a, flat_group(b)], axis=1)

    def split(ys: Any) -> tuple[jax.Array, jax.Array]:
        return ys[0][:, :before], ys[0][:, before:].reshape(problems, group, tokens, *ys[0].shape[2:])

    def attend(q: list[jax.Array], k: list[jax.Array], v: list[jax.Array], law: Law) -> list[jax.Array]:
        if name != "xla":
            return [kernel(q[0], k[0], v[0], law)]
        (qp, qc), (kp, kc), (vp, vc) = split(q), split(k), split(v)
        out = attention.row_attention(qp, kp, vp, prompt_mask.astype(jnp.int32), law=law)
        return [beside(out, attention.completion_attention(qc, kc, vc, kp, vp, prompt_mask, law=law))]

    row = Row((("problems", None, None),), attend, (beside(prompt_mask, real),))
    return row, (beside(prompt, fed),), (beside(_positions(prompt_mask), own),), split


def _two_streams(prompt: Any, prompt_mask: Any, fed: Any, own: Any, real: Any, c: Context) -> tuple[Row, Any, Any, Any]:
    """Prompts and completions apart, each cut along its tokens: every device keeps its queries, and gathers all keys and values."""
    _implementation(c)
    over = "tokens" if prompt.shape[1] % c.mesh.shape["sequence"] == 0 else None
    axes = (("problems", over, None), ("problems", None, "tokens", None))

    def attend(q: list[jax.Array], k: list[jax.Array], v: list[jax.Array], law: Law) -> list[jax.Array]:
        def whole(ys: list[jax.Array]) -> tuple[jax.Array, jax.Array]:
            return (
                c.constrain(ys[0], ("problems", None, "kv_heads", None)),
                c.constrain(ys[1], ("problems", None, None, "kv_heads", None)),
            )

        (kp, kc), (vp, vc) = whole(k), whole(v)
        qp = c.constrain(q[0], ("problems", over, "heads", None))
        qc = c.constrain(q[1], ("problems", None, "tokens", "heads", None))
        out = attention.row_attention(qp, kp, vp, prompt_mask.astype(jnp.int32), law=law)
        return [out, attention.completion_attention(qc, kc, vc, kp, vp, prompt_mask, law=law)]

    row = Row(axes, attend, (prompt_mask, real))
    return row, (prompt, fed), (_positions(prompt_mask), own), lambda ys: ys
