"""Attention over a problem's row: one prompt, read by G completions.

A row is `[prompt | completion 1 | ... | completion G]`, so a prompt's keys are computed once and read by its whole group, in
training and in sampling alike. The prompt is causal in itself; a completion sees the prompt and its own past.
Scores and softmax are at least float32.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jaxreason.numerics import at_least_float32

Rotation = tuple[jax.Array, jax.Array]


def rotary(position: Int[Array, "*b"], *, head_size: int, theta: float, dtype: str) -> Rotation:
    """cos and sin of position x theta^(-2i/C), each [*b, C/2] (RoFormer, arXiv:2104.09864, Eq. 34)."""
    frequency = theta ** (-np.arange(0, head_size, 2, dtype=np.float64) / head_size)
    angle = position[..., None].astype(dtype) * jnp.asarray(frequency, dtype)[(None,) * position.ndim]
    return jnp.cos(angle), jnp.sin(angle)


def rotate(x: Float[Array, "*b H C"], rotation: Rotation) -> Float[Array, "*b H C"]:
    """Rotary positions in the half-split layout of Hugging Face checkpoints."""
    cos, sin = (r[..., None, :].astype(x.dtype) for r in rotation)
    a, b = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


def softmax(scores: jax.Array) -> jax.Array:
    """Softmax that leaves a row without a single allowed key finite (scores are finite where masked)."""
    e = jnp.exp(scores - jax.lax.stop_gradient(jnp.max(scores, axis=-1, keepdims=True)))
    return e / jnp.sum(e, axis=-1, keepdims=True)


def _mask(scores: jax.Array, allowed: jax.Array) -> jax.Array:
    # finite, not -inf: a row of padding has no allowed key, and its gradient must still be a number
    return jnp.where(allowed, scores, jnp.full_like(scores, jnp.finfo(scores.dtype).min / 2))


def _dot(equation: str, a: jax.Array, b: jax.Array) -> jax.Array:
    # with bfloat16 operands results are float32; otherwise their own type
    return jnp.einsum(equation, a, b, preferred_element_type=at_least_float32(a.dtype))


def prompt_attention(
    q: Float[Array, "P Tp H C"],
    k: Float[Array, "P Tp K C"],
    v: Float[Array, "P Tp K C"],
    prompt_mask: Bool[Array, "P Tp"],
) -> Float[Array, "P Tp H C"]:
    """Causal attention within the prompts."""
    problems, tokens, heads, size = q.shape
    q = (q * size**-0.5).reshape(problems, tokens, k.shape[2], -1, size)
    scores = _dot("ptkrc,pskc->pkrts", q, k)
    causal = jnp.tril(jnp.ones((tokens, tokens), bool))
    scores = _mask(scores, (causal[None] & prompt_mask[:, None, :])[:, None, None])
    out = _dot("pkrts,pskc->ptkrc", softmax(scores).astype(v.dtype), v)
    return out.reshape(problems, tokens, heads, size)


def completion_attention(
    q: Float[Array, "P G T H C"],
    k: Float[Array, "P G T K C"],
    v: Float[Array, "P G T K C"],
    prompt_k: Float[Array, "P Tp K C"],
    prompt_v: Float[Array, "P Tp K C"],
    prompt_mask: Bool[Array, "P Tp"],
) -> Float[Array, "P G T H C"]:
    """Each completion attends to its problem's prompt and to its own past: one softmax over both."""
    problems, group, tokens, heads, size = q.shape
    prompt_tokens = prompt_k.shape[1]
    q = (q * size**-0.5).reshape(problems, group, tokens, k.shape[3], -1, size)
    to_prompt = _dot("pgtkrc,pskc->pgkrts", q, prompt_k)
    to_prompt = _mask(to_prompt, prompt_mask[:, None, None, None, None, :])
    to_own = _dot("pgtkrc,pgskc->pgkrts", q, k)
    to_own = _mask(to_own, jnp.tril(jnp.ones((tokens, tokens), bool))[None, None, None, None])
    p = softmax(jnp.concatenate([to_prompt, to_own], axis=-1)).astype(v.dtype)
    out = _dot("pgkrts,pskc->pgtkrc", p[..., :prompt_tokens], prompt_v)
    out = out + _dot("pgkrts,pgskc->pgtkrc", p[..., prompt_tokens:], v)
    return out.reshape(problems, group, tokens, heads, size)


def decode_attention(
    q: Float[Array, "P G H C"],
    k: Float[Array, "P G K T C"],
    v: Float[Array, "P G K T C"],
    prompt_k: Float[Array, "P Tp K C"],
    prompt_v: Float[Array, "P Tp K C"],
    prompt_mask: Bool[Array, "P Tp"],
    time: Int[Array, ""],
) -> Float[Array, "P G H C"]:
    """One token of every completion against the prompt's cache and its own, of which entries up to `time` are filled."""
    problems, group, heads, size = q.shape
    prompt_tokens = prompt_k.shape[1]
    q = (q * size**-0.5).reshape(problems, group, k.shape[2], -1, size)
    to_prompt = _dot("pgkrc,pskc->pgkrs", q, prompt_k)
    to_prompt = _mask(to_prompt, prompt_mask[:, None, None, None, :])
    to_own = _dot("pgkrc,pgksc->pgkrs", q, k)
    to_own = _mask(to_own, (jnp.arange(k.shape[3], dtype=jnp.int32) <= time)[None, None, None, None])
    p = softmax(jnp.concatenate([to_prompt, to_own], axis=-1)).astype(v.dtype)
    out = _dot("pgkrs,pskc->pgkrc", p[..., :prompt_tokens], prompt_v)
    out = out + _dot("pgkrs,pgksc->pgkrc", p[..., prompt_tokens:], v)
    return out.reshape(problems, group, heads, size)
