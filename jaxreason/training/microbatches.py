"""A batch in pieces: what is computed micro-batch by micro-batch, and gradients summed over them.

A micro-batch is a set of whole groups, and what the pieces need of the whole batch is prepared before it is cut; so cutting it
changes nothing but memory.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxreason.batch import RolloutBatch
from jaxreason.numerics import at_least_float32


def slices(tree: Any, count: int) -> Any:
    """[P, ...] as [count, P / count, ...]: strided, so that each slice takes its share of every device's problems."""
    return jax.tree.map(lambda x: jnp.swapaxes(x.reshape(-1, count, *x.shape[1:]), 0, 1), tree)


def unslice(tree: Any) -> Any:
    """The inverse of `slices`."""
    return jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1).reshape(-1, *x.shape[2:]), tree)


def over_microbatches(function: Callable[[Any], Any], tree: Any, *, count: int) -> Any:
    """function on each of `count` slices, one after the other, results joined along P."""
    if count == 1:
        return function(tree)
    return unslice(jax.lax.map(function, slices(tree, count)))


def unless_empty(part: RolloutBatch, compute: Callable[[], Any], nothing: Callable[[Any], Any]) -> Any:
    """What is computed; or, in a part of partial rollouts without a completion, `nothing` of its shapes, in no time."""
    if part.fresh is None:
        return compute()
    return jax.lax.cond(jnp.any(part.mask), compute, lambda: nothing(jax.eval_shape(compute)))


def zeros(shapes: Any) -> Any:
    return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)


def summed_gradient(
    loss: Callable[[Any, Any], tuple[jax.Array, Any]], params: Any, whole: tuple[Any, ...], *, count: int
) -> tuple[jax.Array, Any, Any]:
    """(value, aux, gradient) of a batch from `loss(params, slice) -> (value, aux)`, whose values add up to the batch's.

    `whole` is a rollout batch and what is sliced with it. `aux` is that of the `count` slices, stacked; the gradient is in float32
    at least.
    """

    def gradient(part: Any) -> tuple[Any, Any]:
        out, new = jax.value_and_grad(loss, has_aux=True)(params, part)
        return out, jax.tree.map(lambda g: g.astype(at_least_float32(g.dtype)), new)  # before they are summed

    if count == 1:
        (value, aux), total = gradient(whole)
        return value, jax.tree.map(lambda x: x[None], aux), total

    def accumulate(total: Any, part: Any) -> tuple[Any, Any]:
        def add() -> tuple[Any, Any]:
            out, new = gradient(part)
            return jax.tree.map(jnp.add, total, new), out

        return unless_empty(part[0], add, lambda shapes: (total, zeros(shapes[1])))

    nothing = jax.tree.map(lambda p: jnp.zeros_like(p, at_least_float32(p.dtype)), params)
    total, (values, aux) = jax.lax.scan(accumulate, nothing, slices(whole, count))
    return jnp.sum(values), aux, total
