"""Completions of a batch of prompts in one traced loop: prefill once per prompt, decode until all have ended.

Each completion's random numbers are folded from (seed, step, problem, child), so what it samples depends on nothing else in
the batch. Log-probability and mask are recorded where the token is sampled. Deliberately absent: slots that are refilled,
stop strings, top-k and top-p.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Integer

from jaxreason.batch import PromptBatch
from jaxreason.models.decoder import Model
from jaxreason.numerics import at_least_float32
from jaxreason.sampling import logits as laws


@dataclass(frozen=True)
class SamplingConfig:
    """How the policy is sampled."""

    max_prompt_tokens: int = 26
    max_completion_tokens: int = 36
    temperature: float = 1.0  # the law of both sampling and training is softmax(logits / temperature)


class Sampled(NamedTuple):
    """What came out; arrays [P, G, T] and [P, G]."""

    completion: Int[Array, "P G T"]
    mask: Bool[Array, "P G T"]  # the policy chose this token; its stop token included
    logp: Float[Array, "P G T"]  # of the token, under the law that sampled it
    truncated: Bool[Array, "P G"]  # no stop token within the budget


def completion_keys(key: jax.Array, problem: Integer[Array, " P"], *, group: int) -> jax.Array:
    """A key for every completion, [P, G], folded from the step's key, the problem's number and the child's index."""

    def one(number: jax.Array, child: jax.Array) -> jax.Array:
        return jax.random.fold_in(jax.random.fold_in(key, number), child)

    child = jnp.arange(group, dtype=jnp.uint32)
    return jax.vmap(lambda number: jax.vmap(lambda c: one(number, c))(child))(problem)


def sample(
    model: Model,
    params: Any,
    prompts: PromptBatch,
    key: jax.Array | None,
    *,
    group: int,
    max_completion_tokens: int,
    eos_ids: tuple[int, ...],
    pad_id: int,
    temperature: float = 1.0,
) -> Sampled:
    """`group` completions of each prompt; without a key the greedy ones.

    Tokens after a completion's end are `pad_id` with mask False. The loop leaves as soon as every completion has ended.
    """
    tokens, problems = max_completion_tokens, prompts.prompt.shape[0]
    params = model.prepare_sampling(params)
    hidden, cache = model.prefill(params, prompts.prompt, prompts.prompt_mask, group=group, tokens=tokens)
    hidden = jnp.broadcast_to(hidden[:, None], (problems, group, hidden.shape[-1]))
    float_type = at_least_float32(hidden.dtype)
    rows = problems * group
    if key is None:
        uniforms = jnp.zeros((tokens, rows), jnp.float32)
    else:
        keys = completion_keys(key, prompts.problem, group=group).reshape(-1)
        uniforms = jax.vmap(lambda k: jax.random.uniform(k, (tokens,), jnp.float32), out_axes=1)(keys)

    def choose(hidden: jax.Array, time: jax.Array) -> tuple[jax.Array, jax.Array]:
        scores = model.project(params, hidden.reshape(rows, -1)).astype(float_type)
        if key is None:
            token, logp = laws.greedy(scores / temperature)
        else:
            uniform = jax.lax.dynamic_index_in_dim(uniforms, time, keepdims=False)
            token, logp = laws.categorical(scores / temperature, uniform)
        return token.reshape(problems, group), logp.reshape(problems, group)

    class Loop(NamedTuple):
        time: jax.Array
        hidden: jax.Array
        cache: Any
        done: jax.Array
        completion: jax.Array
        mask: jax.Array
        logp: jax.Array

    def running(loop: Loop) -> jax.Array:
        return (loop.time < tokens) & ~jnp.all(loop.done)

    def body(loop: Loop) -> Loop:
        token, logp = choose(loop.hidden, loop.time)
        token = jnp.where(loop.done, jnp.full_like(token, pad_id), token)
        logp = jnp.where(loop.done, jnp.zeros_like(logp), logp)

        def write(buffer: jax.Array, new: jax.Array) -> jax.Array:
            return jax.lax.dynamic_update_index_in_dim(buffer, new, loop.time, 0)

        done = loop.done | jnp.isin(token, jnp.asarray(eos_ids, jnp.int32))
        hidden, cache = model.decode(params, token, loop.time, loop.cache)
        return Loop(
            loop.time + 1,
            hidden,
            cache,
            done,
            write(loop.completion, token),
            write(loop.mask, ~loop.done),
            write(loop.logp, logp),
        )

    shape = (tokens, problems, group)
    start = Loop(
        jnp.zeros((), jnp.int32),
        hidden,
        cache,
        jnp.zeros((problems, group), bool),
        jnp.full(shape, pad_id, jnp.int32),
        jnp.zeros(shape, bool),
        jnp.zeros(shape, float_type),
    )
    end = jax.lax.while_loop(running, body, start)
    completion, mask, logp = (jnp.moveaxis(x, 0, -1) for x in (end.completion, end.mask, end.logp))
    return Sampled(completion, mask, logp, ~end.done)
