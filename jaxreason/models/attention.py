"""Attention over a problem's row: one prompt, read by G completions.

A row is `[prompt | completion 1 | ... | completion G]`, so a prompt's keys are computed once and read by its whole group, in
training and in sampling alike. The prompt is causal in itself; a completion sees the prompt and its own past. Prompts end
where completions begin (they are padded on the left), so distances in places are distances in tokens.
Scores and softmax are at least float32. This is the form that runs everywhere; kernels.py has those of GPUs and TPUs.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxreason.numerics import at_least_float32


class Law(NamedTuple):
    """What a family makes of scores."""

    scale: float  # of queries
    softcap: float = 0.0  # c in c tanh(score / c) (arXiv:2408.00118, section 2); 0: none
    window: int | jax.Array = 0  # a query sees keys less than this far back, itself included; 0: all


def softmax(scores: jax.Array) -> jax.Array:
    """Softmax that leaves a row without a single allowed key finite (scores are finite where masked)."""
    e = jnp.exp(scores - jax.lax.stop_gradient(jnp.max(scores, axis=-1, keepdims=True)))
    return e / jnp.sum(e, axis=-1, keepdims=True)


def softcap(x: jax.Array, cap: float) -> jax.Array:
    """cap tanh(x / cap); x itself where cap is 0."""
    return cap * jnp.tanh(x / cap) if cap else x


def _mask(scores: jax.Array, allowed: jax.Array) -> jax.Array:
    # finite, not -inf: a row of padding has no allowed key, and its gradient must still be a number
    return jnp.where(allowed, scores, jnp.full_like(scores, jnp.finfo(scores.dtype).min / 2))


def _dot(equation: str, a: jax.Array, b: jax.Array) -> jax.Array:
    # with bfloat16 operands results are float32; otherwise their own type
    return jnp.einsum(equation, a, b, preferred_element_type=at_least_float32(a.dtype))


def _visible(query: jax.Array, key: jax.Array, law: Law) -> jax.Array:
    """Whether the key at a place is neither after the query's place nor before its window; [..., queries, keys]."""
    distance = query[..., :, None] - key[None, :]
    allowed = distance >= 0
    return allowed if isinstance(law.window, int) and law.window == 0 else allowed & (distance < law.window)


def row_attention(
    q: Float[Array, "P M H C"],
    k: Float[Array, "P N K C"],
    v: Float[Array, "P N K Cv"],
    segments: Int[Array, "P N"],
    *,
    law: Law,
    start: int | Int[Array, ""] = 0,
) -> Float[Array, "P M H Cv"]:
    """Causal attention within the segments of a row, of the M places from `start` on; segment 0 is padding, seen by nobody."""
    problems, tokens, heads, size = q.shape
    q = (q * law.scale).reshape(problems, tokens, k.shape[2], -1, size)
    scores = softcap(_dot("ptkrc,pskc->pkrts", q, k), law.softcap)
    place = jnp.arange(k.shape[1], dtype=jnp.int32)
    own, mine = (jax.lax.dynamic_slice_in_dim(x, start, tokens, axis=x.ndim - 1) for x in (place, segments))
    same = (mine[:, :, None] == segments[:, None, :]) & (segments != 0)[:, None, :]
    scores = _mask(scores, (_visible(own, place, law)[None] & same)[:, None, None])
    out = _dot("pkrts,pskc->ptkrc", softmax(scores).astype(v.dtype), v)
    return out.reshape(problems, tokens, heads, -1)


def completion_attention(
    q: Float[Array, "P G M H C"],
    k: Float[Array, "P G T K C"],
    v: Float[Array, "P G T K Cv"],
    prompt_k: Float[Array, "P Tp K C"],
    prompt_v: Float[Array, "P Tp K Cv"],
    prompt_mask: Bool[Array, "P Tp"],
    *,
    law: Law,
    start: int | Int[Array, ""] = 0,
) -> Float[Array, "P G M H Cv"]:
    """Each completion's M tokens from `start` on attend to its problem's prompt and to its own past: one softmax over both."""
    problems, group, tokens, heads, size = q.shape
    before = prompt_k.shape[1]
    q = (q * law.scale).reshape(problems, group, tokens, k.shape[3], -1, size)
    place = jnp.arange(k.shape[2], dtype=jnp.int32)
    own = jax.lax.dynamic_slice_in_dim(place, start, tokens)
    to_prompt = softcap(_dot("pgtkrc,pskc->pgkrts", q, prompt_k), law.softcap)
    in_window = _visible(own + before, jnp.arange(before, dtype=jnp.int32), law)
    to_prompt = _mask(to_prompt, (in_window[None] & prompt_mask[:, None, :])[:, None, None, None])
    to_own = softcap(_dot("pgtkrc,pgskc->pgkrts", q, k), law.softcap)
    to_own = _mask(to_own, _visible(own, place, law)[None, None, None, None])
    p = softmax(jnp.concatenate([to_prompt, to_own], axis=-1)).astype(v.dtype)
    out = _dot("pgkrts,pskc->pgtkrc", p[..., :before], prompt_v)
    out = out + _dot("pgkrts,pgskc->pgtkrc", p[..., before:], v)
    return out.reshape(problems, group, tokens, heads, -1)


def part_attention(
    q: Float[Array, "P n H C"],
    k: Float[Array, "P S n K C"],
    v: Float[Array, "P S n K Cv"],
    segments: Int[Array, "P Tp"],
    part: int | Int[Array, ""],
    *,
    group: int,
    law: Law,
) -> Float[Array, "P n H Cv"]:
    """Attention of one of a row's S parts over all of them: a part holds 1 / S of the prompt and of each of `group` completions.

    `segments` are the prompt's. Without completions the prompt is any row, of one or several segments.
    """
    parts, before = k.shape[1], segments.shape[1]
    share = before // parts

    def prompts(y: jax.Array) -> jax.Array:
        return y[:, :, :share].reshape(y.shape[0], before, *y.shape[3:])

    def completions(y: jax.Array) -> jax.Array:
        y = y[:, :, share:].reshape(*y.shape[:2], group, -1, *y.shape[3:])
        return jnp.swapaxes(y, 1, 2).reshape(y.shape[0], group, -1, *y.shape[4:])

    prompt_k, prompt_v = prompts(k), prompts(v)
    out = row_attention(q[:, :share], prompt_k, prompt_v, segments, law=law, start=part * share)
    if not group:
        return out
    mine = completions(q[:, None])
    own = completion_attention(
        mine, completions(k), completions(v), prompt_k, prompt_v, segments != 0, law=law, start=part * mine.shape[2]
    )
    return jnp.concatenate([out, own.reshape(q.shape[0], -1, *own.shape[3:])], axis=1)


def decode_attention(
    q: Float[Array, "P G H C"],
    k: Float[Array, "P G K T C"],
    v: Float[Array, "P G K T Cv"],
    prompt_k: Float[Array, "P Tp K C"],
    prompt_v: Float[Array, "P Tp K Cv"],
    prompt_mask: Bool[Array, "P Tp"],
    time: Int[Array, ""],
    *,
    law: Law,
) -> Float[Array, "P G H Cv"]:
    """One token of every completion against the prompt's cache and its own, of which entries up to `time` are filled."""
    problems, group, heads, size = q.shape
    before = prompt_k.shape[1]
    q = (q * law.scale).reshape(problems, group, k.shape[2], -1, size)
    to_prompt = softcap(_dot("pgkrc,pskc->pgkrs", q, prompt_k), law.softcap)
    in_window = _visible(time[None] + before, jnp.arange(before, dtype=jnp.int32), law)
    to_prompt = _mask(to_prompt, (in_window & prompt_mask)[:, None, None, None, :])
    to_own = softcap(_dot("pgkrc,pgksc->pgkrs", q, k), law.softcap)
    to_own = _mask(to_own, _visible(time[None], jnp.arange(k.shape[3], dtype=jnp.int32), law)[None, None, None])
    p = softmax(jnp.concatenate([to_prompt, to_own], axis=-1)).astype(v.dtype)
    out = _dot("pgkrs,pskc->pgkrc", p[..., :before], prompt_v)
    out = out + _dot("pgkrs,pgksc->pgkrc", p[..., before:], v)
    return out.reshape(problems, group, heads, -1)
