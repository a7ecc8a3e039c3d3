"""The critic in the loop: a decoder that ends in one number a token, with weights and an optimiser of its own.

It values every state as the update begins; from that come the advantages, its own returns (the algorithm says which), and the
range of its clip. It then learns from the same minibatches, epochs and micro-batches as the policy. Its `TrainState` is carried in
the policy's, as `algorithm`.

A completion that the token budget cut off has ended there: it was scored as it stands, and a value behind its last token would
reward it for going on. Deliberately absent: a value head on the policy's own body, and whitened advantages.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxreason.batch import RolloutBatch, TrainState
from jaxreason.models import heads
from jaxreason.models.decoder import Model
from jaxreason.objectives import value_loss, valued_loss
from jaxreason.objectives.surrogate import weighted_sum
from jaxreason.training import state as states
from jaxreason.training.microbatches import over_microbatches, summed_gradient

ROUNDING = 1e-10  # of a mean square: variances below are those of equal numbers


@dataclass(frozen=True)
class CriticConfig:
    """The critic of an algorithm that needs one, such as 'ppo'; no other algorithm reads it."""

    path: str = ""  # folder of a reward model with one score; '': the policy's weights as the stage begins, and a head of zeros
    clip: float = 0.2  # no gradient for values that have moved further than this in the update, to the good; 0: no clip
    alone_steps: int = 0  # the stage's first steps, in which the critic learns and the policy does not
    learning_rate: float = 9e-6  # InstructGPT's of its smaller policies (arXiv:2203.02155, C.4); all else is online.optimizer's


class Critic(NamedTuple):
    """What an update needs of a critic besides its state."""

    model: Model  # with a head of one label
    optimizer: optax.GradientTransformation
    clip: float = 0.0  # 0: none
    alone_updates: int = 0  # the first ones, which leave the policy as it is


def values(critic: Critic, params: Any, batch: RolloutBatch, *, count: int) -> jax.Array:
    """V of the state before each token [P, G, T], without gradient, micro-batch by micro-batch."""

    def one(part: RolloutBatch) -> jax.Array:
        return heads.values(critic.model, params, part.prompt, part.prompt_mask, part.completion, part.mask)[0]

    return jax.lax.stop_gradient(over_microbatches(one, batch, count=count))


def learn(
    critic: Critic, state: TrainState, batch: RolloutBatch, returns: jax.Array, token_weight: jax.Array, *, count: int
) -> tuple[TrainState, dict[str, jax.Array]]:
    """One step on the mean over the batch's tokens of (V - R)^2 / 2, clipped; and what to watch of it.

    `batch.value` is V at the start of the rollouts' use, and `returns` are 0 on masked tokens. The explained variance
    1 - Var(R - V)/Var(R) is that of `batch.value`; it is 0 where all returns are equal. At lambda < 1 the returns lean on V
    themselves, which makes it the larger.
    """

    def loss(params: Any, part: Any) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        rows, returns, weight = part
        value, balance = heads.values(critic.model, params, rows.prompt, rows.prompt_mask, rows.completion, rows.mask)
        clipped = {"value_old": rows.value, "clip": critic.clip} if critic.clip else {}
        coefficient, objective = value_loss(value, returns, rows.mask, **clipped)
        share = (balance / count).astype(value.dtype)  # as the policy's: see step.py
        own = valued_loss(value, coefficient, objective, weight)
        dropped = rows.mask & (coefficient == 0) & (value != returns)
        return own + critic.model.balance_weight * share, (own, weighted_sum(dropped.astype(weight.dtype), weight))

    _, (own, dropped), gradient = summed_gradient(loss, state.params, (batch, returns, token_weight), count=count)
    state, _ = states.advance(state, critic.optimizer, gradient)
    before = jnp.asarray(batch.value)
    return state, {
        "value/loss": jnp.sum(own),
        "value/clip_fraction": jnp.sum(dropped),
        "value/mean": weighted_sum(before, token_weight),
        "value/explained_variance": explained_variance(before, returns, token_weight),
        "value/gradient_norm": optax.tree.norm(gradient),
    }


def explained_variance(value: jax.Array, returns: jax.Array, token_weight: jax.Array) -> jax.Array:
    """1 - Var(R - V)/Var(R) under weights that sum to 1; 0 where the returns differ by no more than rounding."""

    def variance(x: jax.Array) -> jax.Array:
        return weighted_sum(jnp.square(x - weighted_sum(x, token_weight)), token_weight)

    size = weighted_sum(jnp.square(returns) + jnp.square(value), token_weight)
    total = variance(returns)
    differ = total > ROUNDING * size
    return jnp.where(differ, 1 - variance(returns - value) / jnp.where(differ, total, 1.0), 0.0)
