"""How long a completion is, and how much of it repeats: rules on tokens as numbers, which ask for no text at all.

A completion's tokens are those that the mask keeps, the EOS among them.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array

from jaxreason.batch import PromptBatch
from jaxreason.objectives import shaping
from jaxreason.objectives.arrays import check_range
from jaxreason.rewards.traced.answers import numeric_answer
from jaxreason.rewards.traced.game import countdown
from jaxreason.rewards.traced.lifted import TracedRule, integer_answer


def soft_overlong(
    vocabulary: Sequence[bytes | None], eos_ids: Sequence[int], *, max_completion_tokens: int, cache_tokens: int
) -> TracedRule:
    """0 up to L_max - L_cache, then (L_max - L_cache - |y|)/L_cache, -1 beyond L_max (DAPO, arXiv:2503.14476, Eq. 13).

    L_max is `max_completion_tokens` and L_cache is `cache_tokens`, its last part; host twin: `length.soft_overlong`. Raises
    ValueError unless 0 < L_cache <= L_max.
    """
    check_range(1, max_completion_tokens, cache_tokens=cache_tokens)

    def rule(prompts: PromptBatch, completion: Array, mask: Array) -> Array:
        length = shaping.lengths(mask)
        return shaping.soft_overlong(length, max_completion_tokens=max_completion_tokens, buffer_tokens=cache_tokens)

    return rule


def cosine_length(
    vocabulary: Sequence[bytes | None],
    eos_ids: Sequence[int],
    *,
    max_completion_tokens: int,
    r_0_correct: float = 2.0,
    r_max_correct: float = 1.0,
    r_0_wrong: float = -10.0,
    r_max_wrong: float = 0.0,
    r_exceed: float = -10.0,
    correct: str = "integer_answer",
    open: str = "<answer>",
    close: str = "</answer>",
) -> TracedRule:
    """r_L + (r_0 - r_L)(1 + cos(pi |y| / L_max))/2, by whether it is correct; r_exceed from |y| = L_max on.

    Yeo et al., arXiv:2502.03373, section 4.2. `correct` is the traced rule that says so: integer_answer, numeric_answer or
    countdown, with these tags; the host twin, `length.cosine_length`, reads another part's value instead. Raises ValueError for
    another name, if L_max is below 1, or as that rule does.
    """
    check_range(1, max_completion_tokens=max_completion_tokens)
    known = {"integer_answer": integer_answer, "numeric_answer": numeric_answer, "countdown": countdown}
    if correct not in known:
        raise ValueError(f"correct is '{correct}': expected {', '.join(known)}")
    is_correct = known[correct](vocabulary, eos_ids, open=open, close=close)

    def rule(prompts: PromptBatch, completion: Array, mask: Array) -> Array:
        right = is_correct(prompts, completion, mask) > 0
        length = shaping.lengths(mask).astype(jnp.float32)
        share = 0.5 * (1 + jnp.cos(jnp.pi * length / max_completion_tokens))
        value = jnp.where(
            right, r_max_correct + (r_0_correct - r_max_correct) * share, r_max_wrong + (r_0_wrong - r_max_wrong) * share
        )
        return jnp.where(length >= max_completion_tokens, jnp.float32(r_exceed), value)

    return rule


def repeated_ngrams(vocabulary: Sequence[bytes | None], eos_ids: Sequence[int], *, n: int = 3) -> TracedRule:
    """(|n-grams| - |distinct n-grams|) / |n-grams| of the tokens; 0 where there are fewer than n.

    A share between 0 and 1, so its weight is negative. Host twin: `repetition.repeated_ngrams`. Equal n-grams are neighbours once
    all are sorted, so it is exact, and no square of the length is made. Raises ValueError if n < 1.
    """
    check_range(1, n=n)

    def rule(prompts: PromptBatch, completion: Array, mask: Array) -> Array:
        length = shaping.lengths(mask)
        if completion.shape[-1] < n:
            return jnp.zeros(completion.shape[:2], jnp.float32)
        order = jnp.argsort(~mask, axis=-1, stable=True)  # the tokens that the mask keeps, in order, first
        tokens = jnp.take_along_axis(completion, order, axis=-1)
        count = completion.shape[-1] - n + 1
        within = jnp.arange(count, dtype=jnp.int32).reshape(1, 1, -1) < (length - n + 1)[..., None]
        grams = [tokens[..., k : k + count] for k in range(n)]
        absent, *grams = jax.lax.sort([~within, *grams], dimension=-1, num_keys=n + 1, is_stable=False)
        same = jnp.stack([gram[..., 1:] == gram[..., :-1] for gram in grams])
        repeats = jnp.sum(jnp.all(same, axis=0) & ~absent[..., 1:], axis=-1, dtype=jnp.int32)
        total = jnp.maximum(length - n + 1, 1)
        return repeats.astype(jnp.float32) / total.astype(jnp.float32)

    return rule
