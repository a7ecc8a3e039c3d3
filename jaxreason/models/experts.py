"""The sparse MLP block: each row is sent to a few of many small MLPs ("experts") and gets their weighted sum.

Routing is Qwen3-MoE's or DeepSeek-V3's. Nothing is dropped: (row, choice) pairs are sorted by expert into blocks of one expert
each, and the products go from block to block. On a mesh, experts lie on the axis `expert`, and a device does its own experts'
share for the rows of its whole expert group: rows move, weights do not. Deliberately absent: capacity limits and dropped rows,
jitter, the shared expert (an ordinary dense MLP beside this one), the update of the correction bias.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as Spec
from jaxtyping import Array, Bool, Float, Int

from jaxreason.models.config import Experts
from jaxreason.numerics import at_least_float32


class Routing(NamedTuple):
    """Where each row goes."""

    chosen: jax.Array  # int32 [rows, k], the experts
    weight: jax.Array  # [rows, k], what their outputs are multiplied by
    scores: jax.Array  # [rows, E], of all experts, before any choice


class Balance(NamedTuple):
    """What the load-balance loss needs of a layer's rows; layers and micro-batches are combined by adding."""

    choices: jax.Array  # [E], how often each expert was chosen
    score: jax.Array  # [E], sum of its scores
    rows: jax.Array  # [], how many rows


# ------------------------------------------------------------------------------------------------------------- choosing experts


def route(h: Float[Array, "rows D"], router: Float[Array, "D E"], bias: Float[Array, " E"] | None, *, experts: Experts) -> Routing:
    """The k experts of each row and their weights, g_i / (sum_j g_j + 1e-20) * scale where normalised, else g_i * scale.

    g are the chosen scores: s = softmax(h router) (Qwen3-MoE), or s = sigmoid(h router) with the choice by s + bias among the
    `chosen_groups` groups whose two best add up to most (DeepSeek-V3, arXiv:2412.19437, section 2.1.2, Eq. 12-16). Of equal
    scores the lower index wins. The gradient passes through the weights; the choice has none, and so the bias has none.
    """
    kind = jnp.promote_types(at_least_float32(h.dtype), at_least_float32(router.dtype))
    # a choice made on rounded products differs between machines, and between sampler and trainer; this product is small
    logits = jnp.dot(h.astype(kind), router.astype(kind), precision=jax.lax.Precision.HIGHEST)
    scores = jax.nn.sigmoid(logits) if experts.scoring == "sigmoid" else jax.nn.softmax(logits, axis=-1)
    preference = jax.lax.stop_gradient(scores if bias is None else scores + bias.astype(kind)[None])
    if experts.groups > 1:
        preference = jnp.where(_eligible(preference, experts), preference, -jnp.inf)
    chosen = _best(preference, experts.chosen)
    weight = jnp.take_along_axis(scores, chosen, axis=1)
    if experts.normalised:
        weight = weight / (jnp.sum(weight, axis=1, keepdims=True) + 1e-20)
    return Routing(chosen, weight * experts.scale, scores)


def _best(x: jax.Array, k: int) -> jax.Array:
    """Indices of each row's k greatest, in falling order; of equals the lower index first."""
    # a sort, because lax.top_k brings all rows to every device
    index = jax.lax.broadcasted_iota(jnp.int32, x.shape, 1)
    return jax.lax.sort((-x, index), dimension=1, num_keys=1)[1][:, :k]


def _eligible(preference: jax.Array, experts: Experts) -> jax.Array:
    """Which experts are in a row's best groups, [rows, E]; a group is as good as the sum of its two best."""
    count = preference.shape[1]
    size = count // experts.groups
    best_two = jnp.sort(preference.reshape(-1, experts.groups, size), axis=2)[:, :, -2:]
    best = _best(jnp.sum(best_two, axis=2), experts.chosen_groups)
    group = jnp.arange(count, dtype=jnp.int32) // size
    return jnp.any(best[:, :, None] == group[None, None], axis=1)


def balance_counts(scores: Float[Array, "rows E"], chosen: Int[Array, "rows k"], mask: Bool[Array, " rows"]) -> Balance:
    """What `balance_loss` needs of a layer, of the rows whose mask is True."""
    every = jnp.arange(scores.shape[1], dtype=chosen.dtype)
    hits = (chosen[:, :, None] == every[None, None]) & mask[:, None, None]
    return Balance(
        choices=jnp.sum(hits, axis=(0, 1), dtype=scores.dtype),
        score=jnp.sum(jnp.where(mask[:, None], scores, 0), axis=0),
        rows=jnp.sum(mask, dtype=scores.dtype),
    )


def balance_loss(balance: Balance) -> Float[Array, ""]:
    """E sum_i f_i P_i (Switch Transformer, arXiv:2101.03961, Eq. 4-6, without its alpha); 0 where there are no rows.

    f_i is the number of choices of expert i per row, P_i its mean score. As in transformers f adds up to k, so that an even load
    costs k. The gradient passes through P alone. Layers are combined by adding their `Balance`.
    """
    rows = jnp.maximum(balance.rows, 1)
    return balance.choices.shape[0] * jnp.sum((balance.choices / rows) * (balance.score / rows))


# ------------------------------------------------------------------------------------------------------------ the chosen's sum


def mix(
    h: Float[Array, "rows D"],
    routing: Routing,
    gate: Float[Array, "E D F"],
    up: Float[Array, "E D F"],
    down: Float[Array, "E F D"],
    *,
    dtype: str,
    mesh: Mesh,
    rows_axes: tuple[str, ...],
) -> Float[Array, "rows D"]:
    """sum_k weight_k down_k(silu(gate_k h) * up_k h) over a row's chosen experts, at least in float32.

    Operands of the products are in `dtype`, as in `numerics.dense`. Rows are split over the mesh axes `rows_axes`, of which `fsdp`
    and `expert` must be two; weights over `expert`, their D over `fsdp`, their F over `tensor`. Sizes must divide evenly.
    """
    operands = (h, routing.chosen, routing.weight, gate, up, down)
    if mesh.size == 1:
        return _share(*operands, first=0, count=gate.shape[0], dtype=dtype)
    split = tuple(axis for axis in mesh.axis_names if mesh.shape[axis] > 1)  # on the others XLA would keep idle collectives
    if not set(split) & {"fsdp", "expert"} <= set(rows_axes) <= set(mesh.axis_names) - {"tensor"}:
        raise ValueError(
            f"rows_axes is {rows_axes} on a mesh of {dict(mesh.shape)}: expected axes of the mesh, 'fsdp' and 'expert' among them "
            "where they split anything, and not 'tensor'; split the rows so"
        )

    def on(*axes: str) -> tuple[str, ...]:
        return tuple(axis for axis in axes if axis in split)

    rows = Spec(on(*rows_axes), None)
    inward, outward = Spec(on("expert"), on("fsdp"), on("tensor")), Spec(on("expert"), on("tensor"), on("fsdp"))
    copies = tuple(axis for axis in on(*rows_axes) if axis not in ("fsdp", "expert"))
    return jax.shard_map(
        partial(_exchange, count=gate.shape[0], dtype=dtype, copies=copies, slices=on("tensor")),
        mesh=mesh,
        in_specs=(rows, rows, rows, inward, inward, outward),
        out_specs=rows,
    )(*operands)


def _exchange(
    h: Any,
    chosen: Any,
    weight: Any,
    gate: Any,
    up: Any,
    down: Any,
    *,
    count: int,
    dtype: str,
    copies: tuple[str, ...],
    slices: tuple[str, ...],
) -> jax.Array:
    """One device's part of `mix`: gathers the rows of its expert group, does its share, and sends the sums home.

    `copies` are the mesh axes that split rows and on which weights are repeated, `slices` those the other way round.
    """
    # Said here, of the smallest arrays, that they differ between devices from now on: the backward pass sums over those
    # devices at this very place.
    h, chosen, weight = (jax.lax.pcast(x, slices, to="varying") for x in (h, chosen, weight))
    gate, up, down = (jax.lax.pcast(w.astype(at_least_float32(w.dtype)), copies, to="varying") for w in (gate, up, down))
    h, weight, chosen = _gather(h, "expert", 0, dtype), _gather(weight, "expert", 0, weight.dtype.name), _join(chosen, "expert", 0)
    gate, up, down = _gather(gate, "fsdp", 1, dtype), _gather(up, "fsdp", 1, dtype), _gather(down, "fsdp", 2, dtype)
    first = jax.lax.axis_index("expert") * gate.shape[0] if gate.shape[0] < count else 0
    y = _share(h, chosen, weight, gate, up, down, first=first, count=count, dtype=dtype)
    return jax.lax.psum(_add_up(y, "expert", 0), slices)


def _join(x: jax.Array, name: str, axis: int) -> jax.Array:
    """The parts of x on the mesh axis `name`, in a row along `axis`."""
    return x if jax.lax.axis_size(name) == 1 else jax.lax.all_gather(x, name, axis=axis, tiled=True)


def _add_up(x: jax.Array, name: str, axis: int) -> jax.Array:
    """`_join`'s transpose: x summed over the mesh axis `name`, of which each device keeps its part of `axis`."""
    return x if jax.lax.axis_size(name) == 1 else jax.lax.psum_scatter(x, name, scatter_dimension=axis, tiled=True)


@partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3))
def _gather(x: jax.Array, name: str, axis: int, dtype: str) -> jax.Array:
    """`_join`, with x sent in `dtype`, but its gradients added up in its own type."""
    return _join(x.astype(dtype), name, axis).astype(x.dtype)


def _gather_forward(x: jax.Array, name: str, axis: int, dtype: str) -> tuple[jax.Array, None]:
    return _gather(x, name, axis, dtype), None


def _gather_backward(name: str, axis: int, dtype: str, _: None, g: jax.Array) -> tuple[jax.Array]:
    return (_add_up(g, name, axis),)


_gather.defvjp(_gather_forward, _gather_backward)


def _share(h: Any, chosen: Any, weight: Any, gate: Any, up: Any, down: Any, *, first: Any, count: int, dtype: str) -> jax.Array:
    """What the experts `first`, `first + 1`, ... of `count`, whose weights these are, add to all rows' sums."""
    # about a quarter of an expert's mean load, because its last block is half empty; 16 rows are a tile in bfloat16
    size = min(512, max(16, chosen.size // (4 * count) // 16 * 16))
    pair, place, used = _blocks(chosen.reshape(-1) - first, own=gate.shape[0], size=size)
    x = _spread(h, pair, place)
    gated: Any = _product(x, gate, used, size, dtype)
    raised: Any = _product(x, up, used, size, dtype)
    hidden = jax.nn.silu(gated) * raised
    # the weight goes in before the last product, where a pair is F numbers, not D
    hidden = hidden * _spread(weight.reshape(-1, 1), pair, place).astype(hidden.dtype)
    return _collect(_product(hidden, down, used, size, dtype), pair, place, h.shape[0])


def _blocks(expert: jax.Array, *, own: int, size: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Where the (row, choice) pairs of `own` experts lie when each expert's fill whole blocks of `size` slots.

    Given every pair's expert, counted from the first here. Returns the slots' pairs, the pairs' slots (either is beyond the last
    where there is none: an empty slot, another device's expert), and each expert's number of blocks.
    """
    pairs = expert.size
    slots = (pairs // size + own) * size  # enough for every load
    expert = jnp.where((expert >= 0) & (expert < own), expert, own)
    count = jnp.arange(pairs, dtype=jnp.int32)
    _, order = jax.lax.sort((expert, count), num_keys=1)
    _, position = jax.lax.sort((order, count), num_keys=1)
    load = jnp.sum(expert[:, None] == jnp.arange(own, dtype=jnp.int32)[None], axis=0, dtype=jnp.int32)
    used = (load + size - 1) // size
    shift = (jnp.cumsum(used) - used) * size - (jnp.cumsum(load) - load)
    place = jnp.where(expert < own, position + jnp.take(shift, expert, mode="clip"), slots)
    pair = jnp.full(slots, pairs, jnp.int32).at[place].set(count, mode="drop")
    return pair, place, used


# _spread and _collect are each other's transpose. Autodiff would add up with scatters, whose order is not fixed on a GPU; as
# written, both passes of both read by index and add along an axis.


@jax.custom_vjp
def _spread(h: jax.Array, pair: jax.Array, place: jax.Array) -> jax.Array:
    """Each row in the slots of its pairs, and 0 in empty slots: [rows, D] -> [slots, D]."""
    return jnp.take(h, pair // (place.size // h.shape[0]), axis=0, mode="fill", fill_value=0)


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def _collect(y: jax.Array, pair: jax.Array, place: jax.Array, rows: int) -> jax.Array:
    """Each row's sum over the slots of its pairs: [slots, D] -> [rows, D]."""
    return jnp.sum(jnp.take(y, place, axis=0, mode="fill", fill_value=0).reshape(rows, -1, y.shape[1]), axis=1)


def _spread_forward(h: jax.Array, pair: jax.Array, place: jax.Array) -> tuple[jax.Array, Any]:
    return _spread(h, pair, place), (pair, place, h.shape[0])


def _spread_backward(saved: Any, g: jax.Array) -> tuple[jax.Array, None, None]:
    return _collect(g, *saved), None, None


def _collect_forward(y: jax.Array, pair: jax.Array, place: jax.Array, rows: int) -> tuple[jax.Array, Any]:
    return _collect(y, pair, place, rows), (pair, place)


def _collect_backward(rows: int, saved: Any, g: jax.Array) -> tuple[jax.Array, None, None]:
    return _spread(g, *saved), None, None


_spread.defvjp(_spread_forward, _spread_backward)
_collect.defvjp(_collect_forward, _collect_backward)


@partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _product(x: jax.Array, w: jax.Array, used: jax.Array, size: int, dtype: str) -> jax.Array:
    """Every slot times its expert's matrix, [slots, a] [experts, a, b] -> [slots, b]; 0 beyond the last block in use.

    Operands in `dtype` and results at least in float32, in the backward pass too, as in `numerics.dense`.
    """
    return _by_platform(_ragged, _in_turn, x.astype(dtype), w.astype(dtype), used, size=size)


def _product_forward(x: jax.Array, w: jax.Array, used: jax.Array, size: int, dtype: str) -> tuple[jax.Array, Any]:
    return _product(x, w, used, size, dtype), (x, w, used)


def _product_backward(size: int, dtype: str, saved: Any, g: jax.Array) -> tuple[jax.Array, jax.Array, None]:
    x, w, used = saved
    dw = _by_platform(_ragged_gradient, _gradient_in_turn, x.astype(dtype), g.astype(dtype), used, size=size)
    dx: Any = _product(g, jnp.swapaxes(w, 1, 2), used, size, dtype)
    return dx.astype(x.dtype), dw.astype(w.dtype), None


_product.defvjp(_product_forward, _product_backward)


def _by_platform(tpu: Callable[..., jax.Array], other: Callable[..., jax.Array], *operands: jax.Array, size: int) -> jax.Array:
    # Of a ragged product XLA makes, unless for a TPU, a dense one: every slot with every expert.
    return jax.lax.platform_dependent(*operands, tpu=partial(tpu, size=size), default=partial(other, size=size))


def _ragged(x: jax.Array, w: jax.Array, used: jax.Array, *, size: int) -> jax.Array:
    y = jax.lax.ragged_dot(x, w, used * size, preferred_element_type=at_least_float32(x.dtype))
    inside = jnp.arange(x.shape[0], dtype=jnp.int32) < jnp.sum(used, dtype=jnp.int32) * size
    return jnp.where(inside[:, None], y, 0)  # nobody promises what is there


def _ragged_gradient(x: jax.Array, g: jax.Array, used: jax.Array, *, size: int) -> jax.Array:
    over_rows = jax.lax.RaggedDotDimensionNumbers(
        dot_dimension_numbers=(([0], [0]), ([], [])), lhs_ragged_dimensions=[0], rhs_group_dimensions=[]
    )
    return jax.lax.ragged_dot_general(x, g, used * size, over_rows, preferred_element_type=at_least_float32(x.dtype))


def _in_turn(x: jax.Array, w: jax.Array, used: jax.Array, *, size: int) -> jax.Array:
    kind = at_least_float32(x.dtype)
    last = jnp.cumsum(used)

    def block(i: jax.Array, y: jax.Array) -> jax.Array:
        part = jnp.dot(_slots(x, i, size), w[_owner(last, i)], preferred_element_type=kind)
        return jax.lax.dynamic_update_slice_in_dim(y, part, i * size, axis=0)

    return jax.lax.fori_loop(jnp.int32(0), last[-1], block, _zeros((x.shape[0], w.shape[2]), kind, last))


def _gradient_in_turn(x: jax.Array, g: jax.Array, used: jax.Array, *, size: int) -> jax.Array:
    kind = at_least_float32(x.dtype)
    last = jnp.cumsum(used)

    def block(i: jax.Array, dw: jax.Array) -> jax.Array:
        part = jnp.dot(_slots(x, i, size).T, _slots(g, i, size), preferred_element_type=kind)
        owner = _owner(last, i)
        return jax.lax.dynamic_update_index_in_dim(dw, dw[owner] + part, owner, axis=0)

    return jax.lax.fori_loop(jnp.int32(0), last[-1], block, _zeros((used.size, x.shape[1], g.shape[1]), kind, last))


def _slots(x: jax.Array, block: jax.Array, size: int) -> jax.Array:
    return jax.lax.dynamic_slice_in_dim(x, block * size, size)


def _owner(last: jax.Array, block: jax.Array) -> jax.Array:
    """A block's expert, from the running number of blocks in use."""
    return jnp.sum(last <= block, dtype=jnp.int32)


def _zeros(shape: tuple[int, ...], dtype: Any, like: jax.Array) -> jax.Array:
    # made of an array that differs between devices, as the loop's result will: shard_map compares the two
    return jnp.full(shape, (like[-1] * 0).astype(dtype))
