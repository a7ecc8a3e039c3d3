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
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from jaxreason import sharding
from jaxreason.models import attention, block, cache, experts, kernels
from jaxreason.models.attention import Law
from jaxreason.models.block import Context
from jaxreason.models.config import Architecture, Numerics, stacks
from jaxreason.models.declare import LANGUAGE, declare
from jaxreason.models.families import Head
from jaxreason.models.spec import Specs
from jaxreason.numerics import TokenLaw, at_least_float32, token_logprobs

Params = Any


class CompletionForward(Protocol):
    def __call__(
        self, params: Params, prompt: jax.Array, prompt_mask: jax.Array, completion: jax.Array, mask: jax.Array | None = None
    ) -> tuple[jax.Array, jax.Array]: ...


class Hidden(Protocol):
    def __call__(self, params: Params, tokens: jax.Array, segments: jax.Array) -> jax.Array: ...


class Prefill(Protocol):
    def __call__(self, params: Params, prompt: jax.Array, prompt_mask: jax.Array) -> tuple[jax.Array, Any]: ...


class Empty(Protocol):
    def __call__(self, prompts: Any, *, slots: int, tokens: int) -> Any: ...


class Decode(Protocol):
    def __call__(
        self,
        params: Params,
        token: jax.Array,
        prompts: Any,
        own: Any,
        root: jax.Array,
        length: jax.Array,
        live: jax.Array,
        *,
        width: int,
    ) -> tuple[jax.Array, Any]: ...


class Logprobs(Protocol):
    def __call__(
        self, params: Params, hidden: jax.Array, completion: jax.Array, *, law: TokenLaw
    ) -> tuple[jax.Array, jax.Array]: ...


class Model(NamedTuple):
    """What training and sampling need of a policy. Parameters are an argument everywhere; nothing is held."""

    specs: Specs
    # params, prompt, prompt_mask, completion [P,G,T], mask -> [P,G,T,D], of the token *before*; and the load-balance loss
    forward: CompletionForward
    hidden: Hidden  # params, tokens [P,N], segments [P,N] (0: padding) -> [P,N,D], rows as they are
    # sampling's side: see cache.py, of which `prompts` and `own` are anything that the three pass on
    prefill: Prefill  # params, prompt, prompt_mask -> last hidden [P,D], prompts
    insert: Callable[[Any, Any, jax.Array], Any]  # prompts, some, row [R] -> prompts, with some in these rows
    empty: Empty  # prompts -> own, of slots
    select: Callable[[Any, jax.Array], Any]  # own, index [S] -> own: each slot with what slot index[s] holds
    decode: Decode  # params, token [S,M], prompts, own, root [S], length [S], live [S] -> hidden [S,M,D], own
    prepare_sampling: Callable[[Params], Params]  # params in the form that decoding reads fastest
    project: Callable[[Params, jax.Array], jax.Array]  # params, hidden [rows,D] -> logits [rows,V]
    numerics: Numerics
    # params, hidden [P,G,T,D], completion [P,G,T] -> [P,G,T] twice, each device its own tokens; None: see numerics.token_logprobs.
    # What its law is told has the completion's shape
    logprobs: Logprobs | None = None
    balance_weight: float = 0.0  # of the load-balance loss, beside the policy's
    # prompts, copies or None, root [S], which [S] -> prompts with a row for each slot, those of `which` made anew; or None
    at_hand: Callable[[Any, Any, jax.Array, jax.Array], Any] = lambda *_: None
    lanes: int = 1  # devices that problems are split over, where each decodes the slots of its own prompts

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
        insert=cache.insert,
        empty=partial(cache.empty, c=c),
        select=cache.select,
        decode=partial(cache.decode, c=c),
        prepare_sampling=partial(cache.prepare, c=c),
        project=partial(block.project if head.kind == "lm" else block.scores, c=c),
        numerics=numerics,
        logprobs=partial(_logprobs, c=c) if head.kind == "lm" else None,
        at_hand=partial(cache.at_hand, c=c),
        lanes=sharding.problem_shards(mesh),
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
    """How the tokens of a forward pass lie: rows of places, cut where the mesh splits them (sharding.cut)."""

    attend: Callable[[jax.Array, jax.Array, jax.Array, Law], jax.Array]
    counted: jax.Array  # real tokens, bool [R, n]


PLACES = ("pieces", None, None)  # the logical axes of activations [R, n, D]


def _layers(
    params: Params, x: Float[Array, "R n D"], rotations: block.Rotations, row: Row, c: Context
) -> tuple[Float[Array, "R n D"], Float[Array, ""]]:
    """All layers over rows; the normed hidden states, and the load-balance loss (0 in a dense decoder)."""
    many, wide = (c.architecture.experts.count,), at_least_float32(c.numerics.activation)
    total = experts.Balance(jnp.zeros(many, wide), jnp.zeros(many, wide), jnp.zeros((), wide))

    def layer(carry: Any, windowed: Any, weights: Params) -> tuple[Any, None]:
        x, total = carry
        x, weights = c.constrain(x, PLACES), block.fuse(weights, c)
        q, k, v = (checkpoint_name(y, "product") for y in block.qkv(weights, x, rotations.of(windowed), c))

        def attend(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
            return row.attend(q, k, v, block.law(windowed, c))

        out = (jax.checkpoint(attend) if c.numerics.remat == "attention" else attend)(q, k, v)
        x = x + checkpoint_name(block.attended(weights, out, c), "product")
        y, balance = block.mlp(weights, x, row.counted, c)
        total = total if balance is None else jax.tree.map(lambda a, b: a + b.astype(a.dtype), total, balance)
        return (x + checkpoint_name(y, "product"), total), None

    carry = (x, total)
    for stack in stacks(c.architecture):
        carry, _ = block.scan(_remat(layer, c), carry, block.layers_windowed(stack, c), params[stack.name])
    x, total = carry
    balance = experts.balance_loss(total) if c.architecture.experts.count else jnp.zeros((), total.rows.dtype)
    return block.norm(x, params["final_norm"], c), balance


def _implementation(c: Context) -> str:
    device, a = c.mesh.devices.flat[0], c.architecture
    kind = "bfloat16" if c.numerics.matmul_dtype == "bfloat16" else c.numerics.activation
    name = c.numerics.attention
    if c.mesh.shape["sequence"] > 1 and name == "auto":
        return "xla"
    fits = max(a.head_size, a.value_size) <= kernels.widest_of_cudnn(device)
    name = kernels.choose(name, platform=device.platform, softcap=a.attention_softcap, dtype=kind, fits=fits)
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


def _attention(layout: kernels.Layout, segments: Int[Array, "P N"], c: Context) -> Callable[..., jax.Array]:
    """Attention of rows [prompt | completions] of this layout, by the implementation that config and platform choose."""
    name = _implementation(c)
    if name != "xla":
        return _by_kernel(name, layout, segments, c)
    segments = segments[:, : layout.prompt_tokens]
    part = partial(attention.part_attention, group=layout.group)
    if c.mesh.shape["sequence"] == 1:
        return lambda q, k, v, law: part(q, k[:, None], v[:, None], segments, 0, law=law)

    def attend(q: jax.Array, k: jax.Array, v: jax.Array, law: Law) -> jax.Array:
        def own(q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array, *window: jax.Array) -> jax.Array:
            # a device keeps its queries and gathers all keys and values of its rows; backward, their gradients are summed
            # before they are sent, and each device gets its own
            k, v = (jax.lax.all_gather(y, "sequence", axis=1) for y in (k, v))
            return part(q, k, v, segments, jax.lax.axis_index("sequence"), law=law._replace(window=window[0]) if window else law)

        window = () if isinstance(law.window, int) else (law.window,)
        heads = sharding.partition(("pieces", None, "heads", None))
        given = (heads, heads, heads, sharding.partition(("problems", None)), *(sharding.partition(()) for _ in window))
        return jax.shard_map(own, mesh=c.mesh, in_specs=given, out_specs=heads)(q, k, v, segments, *window)

    return attend


def _up_to_parts(tokens: int, c: Context) -> int:
    """So many places that the mesh axis `sequence` splits them evenly."""
    parts = c.mesh.shape["sequence"]
    return -(-tokens // parts) * parts


def _hidden(params: Params, tokens: Int[Array, "P N"], segments: Int[Array, "P N"], *, c: Context) -> Float[Array, "P N D"]:
    """Final hidden states of rows of one or several segments, numbered from 1; 0 is padding, on either side.

    Positions start at 0 in each segment, and no token sees another segment's.
    """
    wanted = tokens.shape[1]
    tokens, segments = (jnp.pad(x, ((0, 0), (0, _up_to_parts(wanted, c) - wanted))) for x in (tokens, segments))
    place = jnp.arange(tokens.shape[1], dtype=jnp.int32)
    begins = segments != jnp.pad(segments, ((0, 0), (1, 0)), constant_values=-1)[:, :-1]
    position = place[None] - jax.lax.cummax(jnp.where(begins, place[None], jnp.zeros_like(segments)), axis=1)
    row = Row(_attention(kernels.Layout(tokens.shape[1]), segments, c), sharding.cut(segments > 0, c.mesh, axis=1))
    x = block.embed(params, sharding.cut(tokens, c.mesh, axis=1), PLACES, c)
    hidden, _ = _layers(params, x, block.rotations(sharding.cut(position, c.mesh, axis=1), c), row, c)
    return sharding.uncut(hidden, c.mesh, axis=1)[:, :wanted]


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
    problems, group, wanted = completion.shape
    parts = c.mesh.shape["sequence"]
    before = _up_to_parts(prompt.shape[1], c)
    prompt, prompt_mask = (jnp.pad(x, ((0, 0), (before - prompt.shape[1], 0))) for x in (prompt, prompt_mask))
    # hidden states move on by one place, so on several devices each has as many places as it has predictions
    tokens = wanted - 1 if parts == 1 else _up_to_parts(wanted, c)

    def fed(x: jax.Array) -> jax.Array:
        return jnp.pad(x[:, :, :-1], ((0, 0), (0, 0), (0, tokens - wanted + 1)))

    def beside(a: jax.Array, b: jax.Array) -> jax.Array:
        a, b = sharding.cut(a, c.mesh, axis=1), sharding.cut(b, c.mesh, axis=2)
        return jnp.concatenate([a, b.reshape(b.shape[0], -1)], axis=1)

    real = fed(jnp.ones(completion.shape, bool) if mask is None else mask)
    length = jnp.sum(prompt_mask, axis=1, dtype=jnp.int32)
    own = jnp.broadcast_to(jnp.arange(tokens, dtype=jnp.int32)[None, None] + length[:, None, None], real.shape)
    position = beside(jnp.maximum(jnp.cumsum(prompt_mask, axis=1, dtype=jnp.int32) - 1, 0), own)
    segments = jnp.pad(prompt_mask.astype(jnp.int32), ((0, 0), (0, group * tokens)), constant_values=1)
    layout = kernels.Layout(before, group if tokens else 0, tokens)  # of a completion of one token nothing is fed
    row = Row(_attention(layout, segments, c), beside(prompt_mask, real))
    x = block.embed(params, beside(prompt, fed(completion)), PLACES, c)
    hidden, balance = _layers(params, x, block.rotations(position, c), row, c)
    return _moved_on(hidden, before // parts, group, c)[:, :, :wanted], balance


def _moved_on(hidden: Float[Array, "R n D"], prompt_tokens: int, group: int, c: Context) -> Float[Array, "P G T D"]:
    """The prompt's last place, and each completion's places but its last."""

    def own(hidden: jax.Array) -> jax.Array:
        places = (hidden.shape[1] - prompt_tokens) // group
        x = hidden[:, prompt_tokens:].reshape(hidden.shape[0], group, places, hidden.shape[-1])
        first = jnp.broadcast_to(hidden[:, None, prompt_tokens - 1 : prompt_tokens], (*x.shape[:2], 1, x.shape[3]))
        if parts == 1:
            return jnp.concatenate([first, x], axis=2)
        # the last device holds the prompt's last place, and the others the place before their neighbour's first
        last = jax.lax.axis_index("sequence") == parts - 1
        sent = jnp.where(last, first, x[:, :, -1:])
        first = jax.lax.ppermute(sent, "sequence", [(i, (i + 1) % parts) for i in range(parts)])
        return jnp.concatenate([first, x[:, :, :-1]], axis=2)

    parts = c.mesh.shape["sequence"]
    if parts == 1:
        return own(hidden)
    axes = sharding.partition(PLACES), sharding.partition(("problems", None, "tokens", None))
    return jax.shard_map(own, mesh=c.mesh, in_specs=axes[0], out_specs=axes[1])(hidden)


# ---- log-probabilities


def _logprobs(
    params: Params, hidden: Float[Array, "P G T D"], completion: Int[Array, "P G T"], *, law: TokenLaw, c: Context
) -> tuple[Float[Array, "P G T"], Float[Array, "P G T"]]:
    """Log-probability of each completion token under the law, and the law's entropy.

    A device takes its own tokens, chunk by chunk. The head is gathered once for all chunks, and its gradient summed once.
    """
    split = tuple(axis for axis in sharding.RULES["pieces"] if c.mesh.shape[axis] > 1)
    chunk = c.numerics.logits_chunk_tokens

    def own(head: jax.Array, hidden: jax.Array, completion: jax.Array, told: Any, row: Any) -> tuple[jax.Array, jax.Array]:
        # said before the chunks, not in each: where the head is said to differ between devices, its gradient is summed over them
        head = jax.lax.pcast(head, split, to="varying")
        rows, target = hidden.reshape(hidden.shape[0], -1, hidden.shape[-1]), completion.reshape(completion.shape[0], -1)
        project = partial(block.project, {"head": head}, c=c)
        mine = TokenLaw(law.shape, jax.tree.map(lambda x: x.reshape(target.shape), told), row)
        logp, entropy = token_logprobs(rows, project, target, law=mine, chunk_tokens=chunk)
        return logp.reshape(completion.shape), entropy.reshape(completion.shape)

    head = block.head(params)
    if not split:
        return own(head, hidden, completion, law.told, law.row)
    head = c.constrain(head.astype(at_least_float32(head.dtype)), (None, "vocab"))
    tokens = completion.shape[2]
    more = ((0, 0), (0, 0), (0, _up_to_parts(tokens, c) - tokens))
    rows = PartitionSpec(tuple(a for a in split if a != "sequence"), None, tuple(a for a in split if a == "sequence"))
    given = (PartitionSpec(), rows, rows, rows, PartitionSpec(rows[0]))
    run = jax.shard_map(own, mesh=c.mesh, in_specs=given, out_specs=rows, axis_names=set(split))
    told = jax.tree.map(lambda x: jnp.pad(x, more), law.told)
    logp, entropy = run(head, jnp.pad(hidden, (*more, (0, 0))), jnp.pad(completion, more), told, law.row)
    return logp[:, :, :tokens], entropy[:, :, :tokens]
