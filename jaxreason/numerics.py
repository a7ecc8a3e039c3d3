"""Token log-probabilities and entropy from hidden states, without ever holding all the logits; the large product.

Logits are made and used up a chunk of tokens at a time, forward and backward, so memory does not grow with
tokens x vocabulary. They are float32 (or float64) whatever the operands' type.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int


def at_least_float32(dtype: Any) -> np.dtype:
    """float32, or the wider float that `dtype` is; NumPy's rule, because jax's obeys strict promotion and refuses the pair."""
    return np.promote_types(dtype, np.float32)


def dense(x: Float[Array, "rows inner"], w: Float[Array, "inner outer"], *, dtype: str) -> Float[Array, "rows outer"]:
    """x w with operands in `dtype` and the result at least in float32, in the backward pass too.

    Callers flatten to two axes first: with more, XLA's CPU backend takes a slow path for the weight's gradient.
    """
    if jnp.dtype(dtype) == jnp.bfloat16:
        return _mixed(x, w)
    return x.astype(dtype) @ w.astype(dtype)


def _dot(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.dot(a.astype(jnp.bfloat16), b.astype(jnp.bfloat16), preferred_element_type=jnp.float32)


@jax.custom_vjp
def _mixed(x: jax.Array, w: jax.Array) -> jax.Array:
    # Autodiff would mix a float32 cotangent with bfloat16 operands; that product leaves the fast path.
    return _dot(x, w)


def _mixed_forward(x: jax.Array, w: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return _dot(x, w), (x, w)


def _mixed_backward(saved: tuple[jax.Array, jax.Array], g: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, w = saved
    return _dot(g, w.T).astype(x.dtype), _dot(x.T, g).astype(w.dtype)


_mixed.defvjp(_mixed_forward, _mixed_backward)


class TokenLaw(NamedTuple):
    """The law that tokens are scored under: what is done to a chunk's logits, with what it must be told beside them."""

    shape: Callable[[jax.Array, jax.Array, Any, Any], jax.Array]  # logits [P,n,V], target [P,n], told, row -> logits
    told: Any = None  # arrays with an entry for every token, cut into chunks as the targets are
    row: Any = None  # arrays with an entry for every problem, whole


SOFTMAX = TokenLaw(lambda logits, target, told, row: logits)


def token_logprobs(
    hidden: Float[Array, "P N D"],
    project: Callable[[jax.Array], jax.Array],
    target: Int[Array, "P N"],
    *,
    law: TokenLaw = SOFTMAX,
    chunk_tokens: int = 1024,
) -> tuple[Float[Array, "P N"], Float[Array, "P N"]]:
    """Log-probability of each target under the law of project(hidden), and the law's entropy (nats, no gradient).

    `project` makes logits [rows, V] of hidden states [rows, D]. The N tokens of a row are taken `chunk_tokens / P` at a time, so
    that every device keeps working on its own problems.
    """
    problems, tokens, width = hidden.shape
    size = max(1, min(tokens, chunk_tokens // problems))
    chunks = math.ceil(tokens / size)
    pad = chunks * size - tokens

    def split(x: jax.Array) -> jax.Array:
        x = jnp.pad(x, ((0, 0), (0, pad)) + ((0, 0),) * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(problems, chunks, size, *x.shape[2:]), 1, 0)

    @jax.checkpoint
    def chunk(args: tuple[jax.Array, jax.Array, Any]) -> tuple[jax.Array, jax.Array]:
        h, t, told = args
        logits = project(h.reshape(-1, width)).reshape(*t.shape, -1)
        return logprob_and_entropy(law.shape(logits, t, told, law.row), t)

    logp, entropy = jax.lax.map(chunk, (split(hidden), split(target), jax.tree.map(split, law.told)))
    join = partial(_join, problems=problems, tokens=tokens)
    return join(logp), join(entropy)


def _join(x: jax.Array, *, problems: int, tokens: int) -> jax.Array:
    return jnp.moveaxis(x, 0, 1).reshape(problems, -1)[:, :tokens]


def logprob_and_entropy(logits: Float[Array, "*b V"], target: Int[Array, "*b"]) -> tuple[Float[Array, "*b"], Float[Array, "*b"]]:
    """log softmax(logits)[target], and the entropy without gradient."""
    top = jax.lax.stop_gradient(jnp.max(logits, axis=-1, keepdims=True))
    shifted = logits - top
    e = jnp.exp(shifted)
    z = jnp.sum(e, axis=-1)
    logz = jnp.log(z)
    # a masked sum rather than a gather: it fuses with the passes around it, and a vocabulary split over devices stays split
    chosen = jax.lax.broadcasted_iota(target.dtype, logits.shape, logits.ndim - 1) == target[..., None]
    logp = jnp.sum(jnp.where(chosen, shifted, jnp.zeros_like(shifted)), axis=-1) - logz
    entropy = jax.lax.stop_gradient(logz - jnp.sum(e * shifted, axis=-1) / z)
    return logp, entropy


def masked_mean(x: Float[Array, "*b"], mask: Bool[Array, "*b"]) -> Float[Array, ""]:
    """Mean over True places; 0 where there are none."""
    total = jnp.sum(jnp.where(mask, x, jnp.zeros_like(x)))
    return total / jnp.maximum(jnp.sum(mask), 1).astype(x.dtype)
