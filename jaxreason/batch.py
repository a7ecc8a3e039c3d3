"""Device nouns: the pytrees that flow through a step. The host's side of the same story is `jaxreason.types`.

Letters: P problems, G completions per problem, T completion tokens, Tp prompt tokens.
A group is an axis, so there are no group ids, and a prompt is stored once for its group.
"""

from __future__ import annotations

from typing import Any

import flax.struct

# a jax.Array; but a NumPy array before it is placed, and a shape or a sharding under tree maps
Leaf = Any


@flax.struct.dataclass
class PromptBatch:
    """Prompts of P problems, padded on the left to Tp tokens."""

    prompt: Leaf  # [P, Tp] int32
    prompt_mask: Leaf  # [P, Tp] bool, True on prompt tokens
    problem: Leaf  # [P] uint32, place in the stream of problems; folded into the sampling key
    answer: Leaf  # [P] int32, the reference as an integer for traced rules (-2^31 where it is none)
    # more of the reference, for the traced rules that need it
    digits: Leaf | None = None  # [P, 32] int8, its digits by place from 10^19 to 10^-12, signed (127 where it has others)
    numbers: Leaf | None = None  # [P, 8] int32, those given in a Countdown game, then -1
    target: Leaf | None = None  # [P] int32, what is to be made of them
    use_all: Leaf | None = None  # [P] bool, whether of all of them


@flax.struct.dataclass
class RolloutBatch:
    """G completions of each of P prompts, with what is known of them.

    `mask` is True where *the policy chose* the token: not on padding, not on fed tokens; the stop token is chosen,
    so it is in. It is born where the token is sampled and never derived again. `logp[p, g, t]` is the log-probability
    *of* `completion[p, g, t]`.
    """

    prompt: Leaf  # [P, Tp] int32
    prompt_mask: Leaf  # [P, Tp] bool
    completion: Leaf  # [P, G, T] int32
    mask: Leaf  # [P, G, T] bool
    truncated: Leaf  # [P, G] bool, ended by the token budget
    logp_behaviour: Leaf  # [P, G, T] float, under the policy that sampled
    reward: Leaf | None = None  # [P, G] float
    step_reward: Leaf | None = None  # [P, G, T] float, process supervision
    segments: Leaf | None = None  # [P, G, T] int32, packed rows
    logp_old: Leaf | None = None  # [P, G, T] float, at the start of the update
    logp_ref: Leaf | None = None  # [P, G, T] float, under the reference
    value: Leaf | None = None  # [P, G, T] float, the critic's of the state before each token, at the start of the update
    fresh: Leaf | None = None  # [P, G, T] bool, chosen by this step's policy; with partial rollouts, else all are


@flax.struct.dataclass
class TrainState:
    """All that a training step reads and writes. Keys are folded from seed and step, so there is no random state."""

    step: Leaf  # [] int32, updates of this stage done
    params: Any
    opt_state: Any
    # what a run carries besides: a critic's own TrainState, or what partial rollouts have parked; often empty
    algorithm: Any = flax.struct.field(default_factory=dict)
