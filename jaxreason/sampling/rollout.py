"""Completions of a batch of prompts for training: every problem's group, in slots of the engine.

Each completion's random numbers are folded from (seed, step, problem, child), so what it samples depends on nothing else in
the batch. Log-probability and mask are recorded where the token is sampled.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Integer

from jaxreason.batch import PromptBatch
from jaxreason.models.decoder import Model
from jaxreason.sampling import engine, speculation, stops
from jaxreason.sampling.engine import Rules
from jaxreason.sampling.law import Law
from jaxreason.sampling.queue import Queue, drain


@dataclass(frozen=True)
class ParkingConfig:
    """Partial rollouts: what a step leaves unfinished is parked, and goes on in the next."""

    step_tokens: int = 0  # the most tokens that a completion grows by in a step; 0: all it has, nothing is parked
    cache: str = "recomputed"  # what goes on reads its own tokens again ('recomputed'), or as older policies did ('kept')


@dataclass(frozen=True)
class SamplingConfig:
    """How the policy is sampled. Training scores under the same law: see sampling/law.py, whose settings these are."""

    max_prompt_tokens: int = 26
    max_completion_tokens: int = 36
    overlong: str = "leave_out"  # problems with longer prompts: 'leave_out' | 'cut' (their beginning) | 'refuse'
    temperature: float = 1.0  # softmax(logits / temperature), of what the other settings leave
    top_k: int = 0  # the k likeliest tokens and all that equal the last of them; 0: all
    top_p: float = 1.0  # the fewest likeliest tokens with this much probability, and all that equal the last of them
    min_p: float = 0.0  # tokens at least this many times as likely as the likeliest
    repetition_penalty: float = 1.0  # above 1, what was seen gets less likely
    banned: tuple[int, ...] = ()  # token ids that are never drawn
    forced: tuple[tuple[int, int], ...] = ()  # (position in the completion from 0, the token id that stands there)
    bias: tuple[tuple[int, float], ...] = ()  # (token id, what is added to its score)
    stop: tuple[str, ...] = ()  # strings that end a completion, and are left out of its text
    slots: int = 0  # completions that grow at a time, which bounds the cache; 0: all of them
    parking: ParkingConfig = field(default_factory=ParkingConfig)
    draft: int = 0  # tokens drafted a step by looking the last ones up in the text so far; what is sampled stays the same

    @property
    def law(self) -> Law:
        own = {each.name for each in fields(self)}
        return Law(**{each.name: getattr(self, each.name) for each in fields(Law) if each.name in own})


class Sampled(NamedTuple):
    """What came out; arrays [P, G, T] and [P, G]."""

    completion: Int[Array, "P G T"]
    mask: Bool[Array, "P G T"]  # the policy chose this token; its stop token included, forced ones not
    logp: Float[Array, "P G T"]  # of the token, under the law that sampled it
    truncated: Bool[Array, "P G"]  # no stop token or string within the budget
    stopped: Bool[Array, "P G"]  # ended by a stop string
    length: Int[Array, "P G"]  # tokens, forced ones included
    parked: Any = None  # with partial rollouts, the seats after the step: parking.Parked
    drafts: Any = None  # [P, G, 2], where there are drafts: tokens drafted and accepted


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
    law: Law | None = None,
    search: stops.Machine | None = None,
    slots: int = 0,
    draft: int = 0,
) -> Sampled:
    """`group` completions of each prompt, by softmax(logits / temperature) or another law; without a key greedy. To be traced.

    Tokens after a completion's end are `pad_id` with mask False. `search` finds stop strings. With fewer `slots` than completions
    (0: as many) a slot takes the next completion when its own has ended, and what comes out is the same. With a `draft` of so many
    tokens a step (speculation.py) nothing else comes out, to rounding.
    """
    problems, tokens, lanes = prompts.prompt.shape[0], max_completion_tokens, model.lanes
    total = problems * group
    law = Law(temperature=temperature) if law is None else law
    rules = Rules(replace(law, greedy=True) if key is None else law, eos_ids, pad_id, search, draft=draft)
    params = model.prepare_sampling(params)
    speculation.check(model, params, draft=draft, lanes=problems)
    roots = engine.open(model, params, prompts.prompt, prompts.prompt_mask, rules=rules)
    keys = completion_keys(jax.random.key(0) if key is None else key, prompts.problem, group=group).reshape(-1)
    number = jnp.arange(total, dtype=jnp.int32)
    if slots == 0 or slots >= total:
        seated = engine.seat(model, roots, number // group, keys, tokens=tokens, rules=rules)
        # the same numbers as those that were looked up, but where devices split the problems nothing is sent
        hidden, prompt = jax.tree.map(
            lambda x: jnp.broadcast_to(x[:, None], (problems, group, x.shape[1])).reshape(total, -1), (roots.hidden, roots.prompt)
        )
        seated = replace(seated, hidden=hidden, prompt=prompt)
        limit = jnp.full(total, tokens, jnp.int32)
        record = engine.extend(model, params, roots, seated, rules=rules, limit=limit, width=0).record
    else:
        first = jnp.arange(slots, dtype=jnp.int32)
        root = first // (slots // lanes) * (problems // lanes)  # any prompt of the slot's device: the queue fills it
        seated = engine.seat(model, roots, root, keys[:slots], tokens=tokens, rules=rules)
        seated = engine.close(seated, jnp.ones(slots, bool))
        lane = jnp.zeros(lanes, jnp.int32)
        queue = Queue(keys, jnp.full(total, tokens, jnp.int32), lane, lane + total // lanes)
        record = engine.blank(total, tokens, rules=rules, dtype=seated.record.logp.dtype)
        _, record, _ = drain(model, params, roots, seated, record, queue, rules=rules, group=group, width=min(group, 8))
    shape = (problems, group)
    return Sampled(
        record.tokens.reshape(*shape, tokens),
        record.mask.reshape(*shape, tokens),
        record.logp.reshape(*shape, tokens),
        (record.status == engine.LENGTH).reshape(shape),
        (record.status == engine.STOP_STRING).reshape(shape),
        record.length.reshape(shape),
        drafts=None if record.drafts is None else record.drafts.reshape(*shape, 2),
    )
