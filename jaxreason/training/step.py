"""One update as a pure function: log-probabilities, coefficients, gradient, optimiser.

Advantage and weight are prepared once on the whole update batch and sliced with it, so splitting a batch into micro-batches
changes nothing but memory. A micro-batch is a set of whole groups.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxreason.batch import RolloutBatch, TrainState
from jaxreason.models.decoder import Model
from jaxreason.models.lora import adapt
from jaxreason.numerics import masked_mean, token_logprobs
from jaxreason.objectives import Algorithm, Signals, combine_aux, policy_loss, prepare, weights
from jaxreason.sampling import law as laws
from jaxreason.sampling.law import Law
from jaxreason.training import critic as critics
from jaxreason.training import state as states
from jaxreason.training.critic import Critic
from jaxreason.training.microbatches import over_microbatches, slices, summed_gradient, unless_empty, unslice, zeros

Metrics = dict[str, jax.Array]
RATIO_QUANTILES = (0.01, 0.5, 0.99)
# what an update can provide an algorithm with; a teacher and step rewards have no place in the loop yet
PROVIDED = frozenset({"reward", "old", "sampled", "behaviour", "reference", "value"})


class Split(NamedTuple):
    """How a rollout batch is cut; all counts in problems (whole groups)."""

    problems_per_update: int
    problems_per_microbatch: int
    epochs: int = 1


class Scored(NamedTuple):
    """What a forward pass says of a batch's completions."""

    logp: jax.Array  # [P, G, T], of each token, in nats
    entropy: jax.Array  # [P, G, T], of its law
    balance: jax.Array  # [], the load-balance loss of the model's experts; 0 without


def score(model: Model, params: Any, batch: RolloutBatch, *, temperature: float = 1.0, law: Law | None = None) -> Scored:
    """Log-probabilities of the completions under softmax(logits / temperature), or under the law that sampled them."""
    shape = batch.completion.shape
    hidden, balance = model.forward(params, batch.prompt, batch.prompt_mask, batch.completion, batch.mask)
    vocab_size = jax.eval_shape(lambda h: model.project(params, h[:, 0, 0]), hidden).shape[1]
    token_law = laws.of_tokens(Law(temperature=temperature) if law is None else law, batch, vocab_size=vocab_size)
    if model.logprobs is not None:
        return Scored(*model.logprobs(params, hidden, batch.completion, law=token_law), balance)
    logp, entropy = token_logprobs(
        hidden.reshape(shape[0], shape[1] * shape[2], -1),
        partial(model.project, params),
        batch.completion.reshape(shape[0], -1),
        law=token_law._replace(told=jax.tree.map(lambda x: x.reshape(shape[0], -1), token_law.told)),
        chunk_tokens=model.numerics.logits_chunk_tokens,
    )
    return Scored(logp.reshape(shape), entropy.reshape(shape), balance)


def make_update(
    model: Model,
    algorithm: Algorithm,
    optimizer: optax.GradientTransformation,
    *,
    split: Split,
    temperature: float = 1.0,
    law: Law | None = None,
    critic: Critic | None = None,
) -> Callable[[TrainState, Any, RolloutBatch], tuple[TrainState, Metrics, jax.Array]]:
    """update(state, reference_params, batch) -> (state, metrics, advantage): all updates that a rollout batch is used for.

    The law that sampled the batch, softmax(logits / temperature) or another one, is that of every policy in the update: the newest,
    that of the update's start and the reference.
    Where the state holds adapters alone, the frozen weights beneath them are the reference's, whatever the algorithm needs. The
    advantage is [P, G], that of each completion's first token, as the first pass over the batch saw it.

    An algorithm that needs a value comes with a critic, whose own state is `state.algorithm`.
    """
    if critic is None and "value" in algorithm.needs:
        raise ValueError(f"algorithm '{algorithm.name}' needs values, and no critic is given: give `critic`, as critic.Critic")
    if critic is not None and algorithm.returns is None:
        raise ValueError(f"a critic is given, and algorithm '{algorithm.name}' has no returns for it to learn: leave it out")
    sampled_by = Law(temperature=temperature) if law is None else law

    def update(state: TrainState, reference: Any, batch: RolloutBatch) -> tuple[TrainState, Metrics, jax.Array]:
        problems = batch.completion.shape[0]
        per_update, per_micro = split.problems_per_update, split.problems_per_microbatch
        minibatches, updates = problems // per_update, split.epochs * (problems // per_update)

        def logp(params: Any) -> jax.Array:
            def one(part: RolloutBatch) -> jax.Array:
                return unless_empty(part, lambda: score(model, params, part, law=sampled_by).logp, zeros)

            return jax.lax.stop_gradient(over_microbatches(one, batch, count=problems // per_micro))

        if "reference" in algorithm.needs:
            batch = dataclasses.replace(batch, logp_ref=logp(reference))
        if "old" in algorithm.needs and updates > 1:
            batch = dataclasses.replace(batch, logp_old=logp(adapt(reference, state.params)))
        if critic is not None:
            value = critics.values(critic, state.algorithm.params, batch, count=problems // per_micro)
            batch = dataclasses.replace(batch, value=value)

        def one_update(state: TrainState, part: RolloutBatch) -> tuple[TrainState, tuple[Metrics, jax.Array]]:
            count = per_update // per_micro
            return _update(model, algorithm, optimizer, state, reference, part, law=sampled_by, count=count, critic=critic)

        if updates == 1:
            state, (metrics, advantage) = one_update(state, batch)
            return state, metrics, advantage
        parts = slices(batch, minibatches)
        order = jnp.tile(jnp.arange(minibatches), split.epochs)
        state, (metrics, advantage) = jax.lax.scan(lambda s, i: one_update(s, jax.tree.map(lambda x: x[i], parts)), state, order)
        used = None if batch.fresh is None else jnp.any(parts.mask, axis=(1, 2, 3))[order]
        return state, _over_updates(metrics, used), unslice(advantage[:minibatches])

    return update


def _over_updates(metrics: Metrics, used: jax.Array | None) -> Metrics:
    """Metrics of several updates on one rollout batch: their mean, the extremes of extremes, and the first sampler gap.

    The mean is over the updates that were `used`, where partial rollouts left some without a completion.
    """

    def merge(name: str, values: jax.Array) -> jax.Array:
        if name.endswith("_max"):
            return jnp.max(values)
        if name.endswith("_min"):
            return jnp.min(values)
        # later updates have moved away from the sampler on purpose
        if name.startswith("policy/sampler_gap"):
            return values[0]
        return jnp.mean(values) if used is None else masked_mean(values, used)

    return {name: merge(name, values) for name, values in metrics.items()}


def _update(
    model: Model,
    algorithm: Algorithm,
    optimizer: optax.GradientTransformation,
    state: TrainState,
    reference: Any,
    batch: RolloutBatch,
    *,
    law: Law,
    count: int,
    critic: Critic | None,
) -> tuple[TrainState, tuple[Metrics, jax.Array]]:
    """One optimiser step on one update batch, its gradient summed over `count` micro-batches."""
    signals = Signals(
        mask=batch.mask,
        reward=batch.reward,
        logp_behaviour=batch.logp_behaviour,
        logp_old=batch.logp_old,
        logp_ref=batch.logp_ref,
        value=batch.value,
        truncated=batch.truncated,
        step_reward=batch.step_reward,
        segments=batch.segments,
    )
    advantage, weight = prepare(algorithm, signals)
    token_weight = weights.token_mean(signals.mask)
    if batch.fresh is not None:  # a completion counts the same however few end in its step: see partial.py
        weight = weight * jnp.mean(jnp.any(batch.mask, axis=(1, 2)), dtype=weight.dtype)

    def loss(params: Any, part: Any) -> tuple[jax.Array, Any]:
        rows, signals, advantage, weight, token_weight = part
        logp, entropy, balance = score(model, adapt(reference, params), rows, law=law)
        value, aux = policy_loss(algorithm, logp, signals, advantage=advantage, weight=weight, token_weight=token_weight)
        del aux["coefficient"]  # [P, G, T], to be looked at elsewhere
        # a product of means over tokens, so micro-batches are averaged: splitting a batch changes it a little
        share = (balance / count).astype(value.dtype)
        value = value + model.balance_weight * share if model.balance_weight else value
        return value, (aux, jax.lax.stop_gradient(logp), entropy, share)

    whole = (batch, signals, advantage, weight, token_weight)
    value, (aux, logp, entropy, shares), total = summed_gradient(loss, state.params, whole, count=count)
    aux, logp, entropy = combine_aux(aux), unslice(logp), unslice(entropy)

    new_state, updates = states.advance(state, optimizer, total)
    moves = None
    if batch.fresh is not None:
        moves = jnp.any(batch.mask)  # without a row there is no update: neither decay nor momentum moves anything
    elif critic is not None and critic.alone_updates:
        moves = state.algorithm.step >= critic.alone_updates
    if moves is not None:
        new_state, updates = jax.tree.map(
            lambda new, old: jnp.where(moves, new, old), (new_state, updates), (state, jax.tree.map(jnp.zeros_like, updates))
        )
    watched: Metrics = {}
    if critic is not None and algorithm.returns is not None:
        returns = jnp.where(batch.mask, algorithm.returns(signals), 0.0)
        own, watched = critics.learn(critic, state.algorithm, batch, returns, token_weight, count=count)
        new_state = dataclasses.replace(new_state, algorithm=own)
    metrics = {
        "policy/loss": value,
        "optimizer/gradient_norm": optax.tree.norm(total),
        "optimizer/update_norm": optax.tree.norm(updates),
        "policy/entropy": masked_mean(entropy, batch.mask),
        **{name: number for name, number in aux.items() if name != "policy/objective"},
        **_rollout_metrics(algorithm, batch, logp, entropy),
        **watched,
    }
    if model.balance_weight:
        metrics["policy/load_balance"] = jnp.sum(shares)
    per_token = jax.tree.leaves(advantage)[0]  # an algorithm with more constants than an advantage has it first
    first = jnp.argmax(batch.mask, axis=-1, keepdims=True)
    return new_state, (metrics, jnp.take_along_axis(per_token, first, axis=-1)[..., 0])


def _rollout_metrics(algorithm: Algorithm, batch: RolloutBatch, logp: jax.Array, entropy: jax.Array) -> Metrics:
    """What is measured on sampled rows: the gap to the sampler, and the ratio's quantiles against the update's start."""
    if "reward" not in algorithm.needs:
        return {}  # demonstrations: nothing was sampled
    behaviour = batch.logp_behaviour.astype(logp.dtype)
    own = batch.mask if batch.fresh is None else batch.mask & batch.fresh  # an older policy's differ as they should
    gap = jnp.where(own, jnp.abs(logp - behaviour), jnp.zeros_like(logp))
    old = logp if batch.logp_old is None else batch.logp_old
    ratio = jnp.where(batch.mask, jnp.exp(jnp.where(batch.mask, logp - old, jnp.zeros_like(logp))), jnp.full_like(logp, jnp.nan))
    # a batch without a single token has no ratio; 1 says that nothing moved
    quantiles = jnp.nan_to_num(jnp.nanquantile(ratio, jnp.asarray(RATIO_QUANTILES, logp.dtype)), nan=1.0)
    return {
        "policy/sampler_gap": jnp.max(gap),
        "policy/sampler_gap_mean": masked_mean(gap, own),
        **{f"policy/ratio_q{round(100 * q):02d}": quantiles[i] for i, q in enumerate(RATIO_QUANTILES)},
    }
