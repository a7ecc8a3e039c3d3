"""The law that samples: from a model's scores to the logits of the distribution a token is drawn from.

Whoever scores a token later must do it under the law that drew it, so the law is one value and one function of the scores,
for the sampler and the trainer. What a token may not be is a mask; every truncation is a threshold a row, found by bisection.
Deliberately absent: stop strings, sequences (n-grams, banned words), and anything that has to sort a vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jaxreason.batch import RolloutBatch
from jaxreason.numerics import TokenLaw, at_least_float32

# A logit of probability exactly 0, far from overflow. Finite: in an entropy and in gradients 0 * inf would be NaN.
FORBIDDEN = float(np.finfo(np.float32).min) / 2
LEAST_TEMPERATURE = 1e-6  # dividing by less takes ordinary scores out of float32
LARGEST_BIAS = 1e4  # beyond it float32 has too few digits left for the score itself


@dataclass(frozen=True)
class Law:
    """How the policy's scores become a distribution. Hashable, hence static under jit; the defaults are softmax(scores)."""

    temperature: float = 1.0
    top_k: int = 0  # the k likeliest tokens and all that equal the last of them; 0: all
    top_p: float = 1.0  # the fewest likeliest tokens with this much probability, and all that equal the last of them
    min_p: float = 0.0  # tokens at least this many times as likely as the likeliest
    repetition_penalty: float = 1.0  # Keskar et al., arXiv:1909.05858, section 4.1: above 1, what was seen gets less likely
    banned: tuple[int, ...] = ()  # token ids that are never drawn
    forced: tuple[tuple[int, int], ...] = ()  # (position in the completion from 0, the token id that stands there)
    bias: tuple[tuple[int, float], ...] = ()  # (token id, what is added to its score)
    greedy: bool = False  # the likeliest token; its log-probability is that of the law at this temperature


def check(law: Law, *, vocab_size: int, eos_ids: Collection[int] = (), key: str = "config.sampling") -> None:
    """Raises ValueError for the first setting that is out of range or contradicts another, named `key.<setting>`."""
    # a config has no such setting: training needs completions that differ
    instead = "" if key.startswith("config.") else "; for the likeliest token set greedy"

    def refuse(setting: str, given: Any, expected: str) -> None:
        raise ValueError(f"{key}.{setting} is {given!r}: expected {expected}")

    top_p, min_p, penalty = law.top_p, law.min_p, law.repetition_penalty
    if not (_number(law.temperature) and law.temperature >= LEAST_TEMPERATURE):
        refuse("temperature", law.temperature, f"a number of at least {LEAST_TEMPERATURE}{instead}")
    if not (_whole(law.top_k) and law.top_k >= 0):
        refuse("top_k", law.top_k, "a whole number, 0 for no limit")
    if not (_number(top_p) and 0 < top_p <= 1):
        refuse("top_p", top_p, "a number above 0 and up to 1, and 1 for no limit")
    if not (_number(min_p) and 0 <= min_p < 1):
        refuse("min_p", min_p, f"a number from 0, which is no limit, to below 1{instead}")
    if not (_number(penalty) and penalty > 0):
        refuse("repetition_penalty", penalty, "a finite number above 0, and 1 for no penalty")
    for setting, off in (("top_k", 0), ("top_p", 1), ("min_p", 0)):
        if law.greedy and getattr(law, setting) != off:
            refuse(setting, getattr(law, setting), f"{off} with {key}.greedy, which leaves nothing to limit; drop one of them")

    for setting, pair in (("banned", False), ("forced", True), ("bias", True)):
        entries = getattr(law, setting)
        if not (isinstance(entries, tuple) and all(isinstance(entry, tuple) and len(entry) == 2 for entry in entries if pair)):
            refuse(setting, entries, "a tuple of pairs" if pair else "a tuple of token ids")
    ids = {"banned": law.banned, "forced": [token for _, token in law.forced], "bias": [token for token, _ in law.bias]}
    for setting, tokens in ids.items():
        for token in tokens:
            if not (_whole(token) and 0 <= token < vocab_size):
                refuse(
                    setting, getattr(law, setting), f"token ids from 0 to {vocab_size - 1}, the vocabulary's last; {token!r} is not"
                )
    if len(set(law.banned)) >= vocab_size:
        refuse("banned", law.banned, f"at least one of the {vocab_size} tokens to be left; shorten it")
    if eos_ids and set(eos_ids) <= set(law.banned):
        refuse("banned", law.banned, f"one of the stop tokens {sorted(eos_ids)} to be left, or no completion ends; take one out")
    places = [place for place, _ in law.forced]
    if not all(_whole(place) and place >= 0 for place in places) or len(set(places)) < len(places):
        refuse("forced", law.forced, "(position, token id) pairs with positions from 0, each at most once")
    if both := set(ids["forced"]) & set(law.banned):
        refuse("forced", law.forced, f"no token of {key}.banned, where {sorted(both)} stand; take them out of one of the two")
    if not all(_number(amount) and abs(amount) <= LARGEST_BIAS for _, amount in law.bias) or len(set(ids["bias"])) < len(law.bias):
        advice = f"(token id, number up to {LARGEST_BIAS:g} either way) pairs, each id at most once; to forbid a token ban it"
        refuse("bias", law.bias, advice)


def _number(x: Any) -> bool:
    return isinstance(x, int | float) and not isinstance(x, bool) and math.isfinite(x)


def _whole(x: Any) -> bool:
    return isinstance(x, int) and not isinstance(x, bool)


def shape(
    scores: Float[Array, "N V"],
    law: Law,
    *,
    seen: Bool[Array, "N V"] | None = None,
    allowed: Bool[Array, "N V"] | None = None,
    position: Int[Array, " N"] | None = None,
    chosen: Int[Array, " N"] | None = None,
) -> Float[Array, "N V"]:
    """Logits of the law, at least float32: softmax of them is what a token is drawn from; forbidden ones have probability 0.

    `seen` marks the tokens of prompt and completion so far, `allowed` those that a grammar lets follow, and `position` is the
    place in the completion. A control that is off costs nothing. The order is that of `_get_logits_processor` in transformers
    5.23: bias, repetition penalty, banned, allowed, forced, temperature, top-k, top-p, min-p, each on what the former left.
    (Forced comes last here; it leaves one token, so that changes nothing.) As there, all tokens that equal the k-th likeliest
    stay; unlike there, where it is a matter of the sort, so do all that equal the last one of top-p. A row of `allowed` that
    leaves nothing is ignored: where a grammar ends is for the caller to know.

    For a trainer, `chosen` is the token whose log-probability is wanted. It is kept, since it was when it was drawn; if now it is
    just below the k likeliest, it takes the place of the last of them, so that the law has as many tokens as it had.
    Gradients flow through the kept logits only, not through what decides which are kept.
    """
    value = scores.astype(at_least_float32(scores.dtype))
    vocab = value.shape[-1]
    if law.bias:
        added = np.zeros((1, vocab), value.dtype)
        added[0, [token for token, _ in law.bias]] = [amount for _, amount in law.bias]
        value = value + added
    if law.repetition_penalty != 1:
        if seen is None:
            raise ValueError(f"the law has repetition_penalty {law.repetition_penalty}, and shape() was not told the tokens seen")
        less = jnp.where(value < 0, value * law.repetition_penalty, value / law.repetition_penalty)
        value = jnp.where(seen, less, value)
    if law.temperature != 1:
        value = value / law.temperature

    token = jax.lax.broadcasted_iota(jnp.int32, value.shape, 1)
    own = None if chosen is None else token.astype(chosen.dtype) == chosen[:, None]
    kept = _permitted(law, allowed, vocab)
    if law.top_k or law.top_p < 1 or law.min_p > 0:
        kept = _truncate(jax.lax.stop_gradient(value), law, kept, own)
    if law.forced:
        if position is None:
            raise ValueError(f"the law has forced tokens {law.forced}, and shape() was not told the position of the token drawn")
        hit = position[:, None] == np.asarray([[place for place, _ in law.forced]], position.dtype)
        ids = np.asarray([[token for _, token in law.forced]], np.int32)
        there = jnp.sum(jnp.where(hit, ids, 0), axis=-1, keepdims=True, dtype=jnp.int32)
        kept = jnp.where(jnp.any(hit, axis=-1, keepdims=True), token == there, True if kept is None else kept)
    if kept is None:
        return value
    return jnp.where(kept if own is None else kept | own, value, FORBIDDEN)


def of_tokens(law: Law, batch: RolloutBatch, *, vocab_size: int) -> TokenLaw:
    """The law for a trainer that scores the batch's completions, token by token and chunk by chunk (numerics.token_logprobs).

    A forced token is no choice and has no place in a loss, so here its law is that of the others. For a repetition penalty the
    place is noted at which a completion first has each token, [P, G, V] int32: what comes after it has seen it.
    """
    law = replace(law, forced=(), greedy=False)
    _, group, tokens = batch.completion.shape
    told = first = None
    if law.repetition_penalty != 1:
        place = jnp.arange(group * tokens, dtype=jnp.int32).reshape(1, group, tokens)
        told, first = jnp.broadcast_to(place, batch.completion.shape), _first_places(batch, vocab_size)

    def shaped(logits: jax.Array, target: jax.Array, told: Any, first: Any) -> jax.Array:
        seen = None
        if first is not None:
            own = jax.vmap(lambda table, row: table[row])(first, told // tokens)
            seen = (own < (told % tokens)[..., None]).reshape(-1, vocab_size)
        return shape(logits.reshape(-1, vocab_size), law, seen=seen, chosen=target.reshape(-1)).reshape(logits.shape)

    return TokenLaw(shaped, told, first)


def _first_places(batch: RolloutBatch, vocab_size: int) -> Int[Array, "P G V"]:
    """The place in each completion at which each token stands first: -1 where in the prompt, that of the end where nowhere."""
    tokens = batch.completion.shape[2]

    def one(prompt: jax.Array, mask: jax.Array, completion: jax.Array) -> jax.Array:
        none = jnp.full(vocab_size, tokens, jnp.int32)
        table = none.at[completion].min(jnp.arange(tokens, dtype=jnp.int32), mode="drop")
        return table.at[jnp.where(mask, prompt, vocab_size)].set(-1, mode="drop")

    group = jax.vmap(one, in_axes=(None, None, 0))
    return jax.vmap(group)(batch.prompt, batch.prompt_mask, batch.completion)


def _permitted(law: Law, allowed: jax.Array | None, vocab: int) -> jax.Array | None:
    """What is neither banned nor outside the grammar, [N or 1, V]; None: everything."""
    if not law.banned:
        return None if allowed is None else allowed | ~jnp.any(allowed, axis=-1, keepdims=True)
    rest = np.ones((1, vocab), bool)
    rest[0, list(law.banned)] = False
    if allowed is None:
        return jnp.asarray(rest)
    both = allowed & rest
    return jnp.where(jnp.any(both, axis=-1, keepdims=True), both, rest)


def _truncate(value: jax.Array, law: Law, kept: jax.Array | None, own: jax.Array | None) -> jax.Array:
    """The tokens that top-k, top-p and min-p leave of those kept, [N, V]."""
    if kept is not None:
        value = jnp.where(kept, value, FORBIDDEN)
    if 0 < law.top_k < value.shape[-1]:
        cut = _largest(value, lambda t: jnp.sum(value >= t, axis=-1, keepdims=True, dtype=jnp.int32) >= law.top_k)
        stays = ~(value < cut)
        if own is not None:
            below = jnp.any(own & ~stays, axis=-1, keepdims=True)
            stays = jnp.where(below, (value > cut) | own, stays)
        value = jnp.where(stays, value, FORBIDDEN)
    top = jnp.max(value, axis=-1, keepdims=True)
    cut = jnp.maximum(top + math.log(law.min_p), FORBIDDEN) if law.min_p > 0 else jnp.full_like(top, FORBIDDEN)
    if law.top_p < 1:
        # what lies below the cut is summed, not what lies above: near 1 the small sum has the digits
        e = jnp.exp(value - top)
        spare = (1 - law.top_p) * jnp.sum(e, axis=-1, keepdims=True)
        nucleus = _largest(value, lambda t: jnp.sum(jnp.where(value >= t, 0, e), axis=-1, keepdims=True) <= spare)
        cut = jnp.maximum(cut, nucleus)
    return ~((value <= FORBIDDEN) | (value < cut))  # so said, a NaN stays, and is seen


def _largest(value: jax.Array, holds: Callable[[jax.Array], jax.Array]) -> jax.Array:
    """The largest t for which `holds(t)`, a row, [N, 1]: it holds at -inf, and up to somewhere not above the row's maximum.

    A bisection over the floats themselves, in the order of their bits, so it ends at exactly one of the row's values after 32
    passes (64 in float64). On a CPU a sort takes twenty times as long or more, and so does lax.top_k before jax 0.12; both
    gather a vocabulary that is split over devices, where this sends one number a row and pass.
    """
    bits = 8 * value.dtype.itemsize
    whole = jnp.int32 if bits == 32 else jnp.int64

    def order(x: jax.Array) -> jax.Array:
        x = jax.lax.bitcast_convert_type(x, whole)
        return jnp.where(x < 0, x ^ np.iinfo(whole).max, x)

    def number(x: jax.Array) -> jax.Array:
        return jax.lax.bitcast_convert_type(jnp.where(x < 0, x ^ np.iinfo(whole).max, x), value.dtype)

    def halve(_: jax.Array, bounds: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        low, high = bounds
        middle = (low | high) - ((low ^ high) >> 1)  # their mean, rounded up, without overflow
        good = holds(number(middle))
        return jnp.where(good, middle, low), jnp.where(good, high, middle - 1)

    top = jnp.max(value, axis=-1, keepdims=True)
    return number(jax.lax.fori_loop(0, bits, halve, (order(jnp.full_like(top, -jnp.inf)), order(top)))[0])
