"""The one loss line, the nouns it speaks of, and the numbers to watch beside it.

    grad J = E[ sum_t  weight_t * coefficient_t * grad log pi(o_t) ]     (DeepSeekMath, arXiv:2402.03300, section 5.2.1)

One update of any algorithm is

    advantage, weight = prepare(algorithm, signals)                                        # the whole batch, once
    loss, aux = policy_loss(algorithm, logp, signals, advantage=advantage, weight=weight)  # any slice of whole groups

Letters: P problems, G completions of each, T completion tokens; the group is an axis. Absent: models, optimisers and
sampling; everything here is a function of arrays.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Bool, Float

from jaxreason.objectives.kl import kl_k3, log_ratio
from jaxreason.objectives.weights import token_mean


class Signals(NamedTuple):
    """What is known of a batch besides the policy's own log-probabilities; a pytree whose leaves all start with P.

    Take a micro-batch with `jax.tree.map(lambda x: x[start:stop], signals)`. `logp[p, g, t]` is the log-probability
    *of* `completion[p, g, t]`; where the mask is False, per-token leaves may hold anything.
    """

    mask: Bool[Array, "P G T"]  # True where the policy chose the token, the stop token included
    reward: Float[Array, "P G"] | None = None
    logp_behaviour: Float[Array, "P G T"] | None = None  # under the policy that sampled, as the sampler computed it
    logp_old: Float[Array, "P G T"] | None = None  # at the start of the update; None: the present policy, so ratio 1
    logp_ref: Float[Array, "P G T"] | None = None  # under the reference
    truncated: Bool[Array, "P G"] | None = None  # ended by the token budget
    step_reward: Float[Array, "P G T"] | None = None  # process supervision


class Algorithm(NamedTuple):
    """An algorithm: three functions and what they need. Replace any part with `_replace`.

    - `advantage(signals) -> [P, G, T]` sees the whole update batch;
    - `coefficient(logp, signals, advantage) -> (coefficient, objective)`, each `[P, G, T]`, under the contract of
      `coefficients`, sees a slice of whole groups, with `signals.logp_old` always filled in;
    - `weight(mask) -> [P, G, T]` sees the whole update batch.
    """

    name: str
    advantage: Callable[[Signals], Array]
    coefficient: Callable[[Array, Signals, Array], tuple[Array, Array]]
    weight: Callable[[Array], Array]
    # "reward"; "old": fill logp_old if a batch serves more than one update; "reference": fill logp_ref
    needs: frozenset[str] = frozenset()
    group_baseline: bool = False  # the advantage compares within the group: with G = 1 it is 0 and nothing is learnt
    # (logp, signals, advantage) -> bool [P, G, T], False where the clip drops a token; None: the algorithm has no clip
    kept: Callable[[Array, Signals, Array], Array] | None = None


def weighted_sum(value: Float[Array, "P G T"], weight: Float[Array, "P G T"]) -> Float[Array, ""]:
    """sum weight * value over the tokens whose weight is not 0; elsewhere `value` may hold anything."""
    used = weight != 0
    return jnp.sum(jnp.where(used, weight, 0.0) * jnp.where(used, value, 0.0))


def surrogate_loss(
    logp: Float[Array, "P G T"], coefficient: Float[Array, "P G T"], weight: Float[Array, "P G T"]
) -> Float[Array, ""]:
    """L = -sum weight * stop_gradient(coefficient) * logp. Its gradient is the algorithm's; its value means nothing.

    Where the weight is 0, `logp` and `coefficient` may hold anything, -inf and NaN included, and get zero gradient.
    """
    used = weight != 0
    scale = lax.stop_gradient(jnp.where(used, weight * coefficient, 0.0))
    return -jnp.sum(scale * jnp.where(used, logp, 0.0))


def prepare(algorithm: Algorithm, signals: Signals) -> tuple[Float[Array, "P G T"], Float[Array, "P G T"]]:
    """(advantage, weight) of the *whole* update batch, both 0 on masked tokens; slice them as you slice the signals.

    Raises ValueError if the algorithm needs a reward and `signals.reward` is None.
    """
    _require(algorithm, signals, "reward", "reward")
    advantage = jnp.where(signals.mask, algorithm.advantage(signals), 0.0)
    return lax.stop_gradient(advantage), lax.stop_gradient(algorithm.weight(signals.mask))


def policy_loss(
    algorithm: Algorithm,
    logp: Float[Array, "P G T"],
    signals: Signals,
    *,
    advantage: Float[Array, "P G T"],
    weight: Float[Array, "P G T"],
    token_weight: Float[Array, "P G T"] | None = None,
) -> tuple[Float[Array, ""], dict[str, Array]]:
    """(loss, aux) of a slice of whole groups: the value is the textbook's, -sum w J, the gradient the surrogate's.

    `advantage` and `weight` come from `prepare` on the whole batch and are sliced like `signals`. Losses and gradients
    of the slices of a batch *add up* to those of the batch: sum them, do not average them.

    `aux` is a flat dict of scalars without gradient, and `combine_aux` merges those of the slices:

    - `policy/objective` is sum w J = -loss;
    - `policy/ratio_mean`, `policy/clip_fraction` and, where `signals.logp_ref` is given, `policy/kl_ref` (k3, nats)
      are sums with `token_weight`, which is `weights.token_mean` of the whole batch's mask, sliced. Left out, it is
      taken from this slice's mask: right when the slice is the whole batch, and only then;
    - all of these are summed over slices; `policy/ratio_min` and `policy/ratio_max`, over chosen tokens (1 if there
      are none), are merged by min and max.

    Raises ValueError if shapes differ, or if the algorithm needs a reference and `signals.logp_ref` is None.
    """
    for name, array in {"mask": signals.mask, "advantage": advantage, "weight": weight}.items():
        if array.shape != logp.shape:
            raise ValueError(
                f"{name} has shape {array.shape} and logp has {logp.shape}, but both must be the [P, G, T] of the same "
                "slice; cut logp, signals, advantage and weight alike."
            )
    _require(algorithm, signals, "reference", "logp_ref")
    fixed = lax.stop_gradient(logp)
    signals = signals._replace(
        logp_old=fixed if signals.logp_old is None else _like(signals.logp_old, logp),
        logp_ref=None if signals.logp_ref is None else _like(signals.logp_ref, logp),
    )
    advantage, weight = _like(advantage, logp), _like(weight, logp)

    coefficient, objective = algorithm.coefficient(fixed, signals, advantage)
    textbook = -weighted_sum(objective, weight)
    surrogate = surrogate_loss(logp, coefficient, weight)
    # The bracket matters: (surrogate - stop_gradient(surrogate)) is exactly 0, so the value keeps all its digits.
    loss = textbook + (surrogate - lax.stop_gradient(surrogate))

    token_weight = token_mean(signals.mask) if token_weight is None else token_weight
    aux = {"policy/objective": -textbook, **_watch(algorithm, fixed, signals, advantage, _like(token_weight, logp))}
    return loss, aux


def ratio_diagnostics(
    logp: Float[Array, "P G T"],
    logp_old: Float[Array, "P G T"],
    mask: Bool[Array, "P G T"],
    token_weight: Float[Array, "P G T"],
) -> dict[str, Array]:
    """`policy/ratio_mean`, `_min` and `_max` of pi/pi_old over chosen tokens; min and max are 1 if there are none."""
    ratio = jnp.exp(log_ratio(logp, logp_old, mask))
    empty = ~jnp.any(mask)
    return {
        "policy/ratio_mean": weighted_sum(ratio, token_weight),
        "policy/ratio_min": jnp.where(empty, 1.0, jnp.min(jnp.where(mask, ratio, jnp.inf))),
        "policy/ratio_max": jnp.where(empty, 1.0, jnp.max(jnp.where(mask, ratio, -jnp.inf))),
    }


def combine_aux(aux: dict[str, Array]) -> dict[str, Array]:
    """Merge the aux of a batch's slices, stacked on a leading axis (as `lax.scan` stacks them): min, max, else sum."""

    def merge(name: str, values: Array) -> Array:
        if name.endswith("_min"):
            return jnp.min(values, axis=0)
        if name.endswith("_max"):
            return jnp.max(values, axis=0)
        return jnp.sum(values, axis=0)

    return {name: merge(name, values) for name, values in aux.items()}


def _watch(algorithm: Algorithm, logp: Array, signals: Signals, advantage: Array, token_weight: Array) -> dict[str, Array]:
    """The diagnostics of `policy_loss`, on log-probabilities that carry no gradient."""
    assert signals.logp_old is not None
    metrics = ratio_diagnostics(logp, signals.logp_old, signals.mask, token_weight)
    if algorithm.kept is None:
        metrics["policy/clip_fraction"] = jnp.zeros((), logp.dtype)
    else:
        dropped = ~algorithm.kept(logp, signals, advantage)
        metrics["policy/clip_fraction"] = weighted_sum(dropped.astype(logp.dtype), token_weight)
    if signals.logp_ref is not None:
        metrics["policy/kl_ref"] = weighted_sum(kl_k3(logp, signals.logp_ref, signals.mask), token_weight)
    return metrics


def _require(algorithm: Algorithm, signals: Signals, need: str, field: str) -> None:
    if need in algorithm.needs and getattr(signals, field) is None:
        raise ValueError(f"Algorithm {algorithm.name!r} needs Signals.{field}, which is None; fill it in.")


def _like(array: Array, logp: Array) -> Array:
    """A constant in the policy's precision: rewards and stored log-probabilities may come in another one."""
    return lax.stop_gradient(array).astype(logp.dtype)
