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
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Bool, Float, Int

from jaxreason.objectives.arrays import check_mask, check_reward, check_segments, check_tokens, exponential, precise
from jaxreason.objectives.kl import kl_k3, log_ratio
from jaxreason.objectives.weights import token_mean


class Signals(NamedTuple):
    """What is known of a batch besides the policy's own log-probabilities; a pytree whose leaves all start with P.

    Take a micro-batch with `jax.tree.map(lambda x: x[start:stop], signals)`. `logp[p, g, t]` is the log-probability
    *of* `completion[p, g, t]`; where the mask is False, per-token leaves may hold anything.

    Packed rows, several completions in one, name them in `segments`: what an algorithm does to a whole completion is
    then done to a segment. A reward is of a row, so prepare advantage and weight first and pack them with the rest.
    """

    mask: Bool[Array, "P G T"]  # True where the policy chose the token, the stop token included
    reward: Float[Array, "P G"] | None = None  # an empty row's counts in its group's baseline: pad with whole groups
    logp_behaviour: Float[Array, "P G T"] | None = None  # under the policy that sampled, as the sampler computed it
    # at the start of the update, in float32 (bfloat16 rounds by more than GSPO clips); None: the present policy, so ratio 1
    logp_old: Float[Array, "P G T"] | None = None
    logp_ref: Float[Array, "P G T"] | None = None  # under the reference
    logp_teacher: Float[Array, "P G T"] | None = None  # under a teacher, for distillation
    value: Float[Array, "P G T"] | None = None  # the critic's V of the state before each token
    value_behind: Float[Array, "P G"] | None = None  # the critic's V behind the last token, for truncated completions
    greedy_reward: Float[Array, " P"] | None = None  # of the greedy completion of each problem
    step_reward: Float[Array, "P G T"] | None = None  # process supervision, read where a step ends
    step_end: Bool[Array, "P G T"] | None = None  # True on the last token of each reasoning step
    truncated: Bool[Array, "P G"] | None = None  # ended by the token budget; without `value_behind` that is an end like any
    segments: Int[Array, "P G T"] | None = None  # packed rows: which completion of its row a token belongs to, 0 to T - 1


class Card(NamedTuple):
    """An algorithm's row in the table of methods. The tests evaluate `coefficient`, and look `weight` up in `weights`."""

    data: str
    reward: str
    coefficient: str
    advantage: str
    weight: str
    paper: str


class Algorithm(NamedTuple):
    """An algorithm: three functions and what they need. Replace any part with `_replace`, and what goes with it.

    Make it once and close over it: as a static argument of `jax.jit` each new one, equal or not, is compiled anew.

    - `advantage(signals) -> [P, G, T]` sees the whole update batch; where a coefficient needs more than one array of the
      whole batch it is a pytree of them;
    - `coefficient(logp, signals, advantage) -> (coefficient, objective)`, each `[P, G, T]`, under the contract of
      `coefficients`, sees a slice of whole groups, with `signals.logp_old` always filled in;
    - `weight(signals) -> [P, G, T]` sees the whole update batch.

    `needs` are keys of NEEDS: reward, old, sampled (logp_old or logp_behaviour), behaviour, reference, teacher, value, greedy,
    steps, step_end. `kept` is what `policy/clip_fraction` counts: with a coefficient of your own set it to None, or to
    your clip. `additions` are pulls and bonuses, `card` is the row in the table.
    """

    name: str
    advantage: Callable[[Signals], Any]
    coefficient: Callable[[Array, Signals, Any], tuple[Array, Array]]
    weight: Callable[[Signals], Array]
    # keys of NEEDS; "old" is the one that may be missing: fill logp_old if a batch serves more than one update
    needs: frozenset[str] = frozenset()
    group_baseline: bool = False  # the advantage compares within the group: with G = 1 there is nothing to compare
    # (logp, signals, advantage) -> bool [P, G, T], False where the clip drops or caps a token; None: no clip
    kept: Callable[[Array, Signals, Any], Array] | None = None
    # (logp, signals) -> (coefficient, objective), added to the algorithm's own: pulls and bonuses, see `additions`
    additions: tuple[Callable[[Array, Signals], tuple[Array, Array]], ...] = ()
    # what its critic learns, [P, G, T] of the whole update batch; of algorithms that need a value
    returns: Callable[[Signals], Array] | None = None
    card: Card | None = None


# need -> the fields of Signals of which one must be there; "old" may be missing: then it is the present policy
NEEDS = {
    "reward": ("reward",),
    "old": (),
    "sampled": ("logp_old", "logp_behaviour"),
    "behaviour": ("logp_behaviour",),
    "reference": ("logp_ref",),
    "teacher": ("logp_teacher",),
    "value": ("value",),
    "greedy": ("greedy_reward",),
    "steps": ("step_reward",),
    "step_end": ("step_end",),
}
PREPARED = frozenset({"reward", "sampled", "value", "greedy", "steps", "step_end"})  # done with once the advantage is made


def weighted_sum(value: Float[Array, "P G T"], weight: Float[Array, "P G T"]) -> Float[Array, ""]:
    """sum weight * value over the tokens whose weight is not 0; elsewhere `value` may hold anything."""
    used = weight != 0
    return jnp.sum(jnp.where(used, weight * value, 0.0))


def surrogate_loss(
    logp: Float[Array, "P G T"], coefficient: Float[Array, "P G T"], weight: Float[Array, "P G T"]
) -> Float[Array, ""]:
    """L = -sum weight * stop_gradient(coefficient) * logp. Its gradient is the algorithm's; its value means nothing.

    Where the weight is 0, `logp` and `coefficient` may hold anything, -inf and NaN included, and get zero gradient.

    Raises ValueError if shapes differ, or are not [P, G, T].
    """
    check_tokens(logp=logp, coefficient=coefficient, weight=weight)
    logp = precise(logp)
    weight, coefficient = _like(weight, logp), _like(coefficient, logp)
    used = weight != 0
    return -jnp.sum(weight * jnp.where(used, coefficient, 0.0) * jnp.where(used, logp, 0.0))


def prepare(algorithm: Algorithm, signals: Signals) -> tuple[Any, Float[Array, "P G T"]]:
    """(advantage, weight) of the *whole* update batch, both 0 on masked tokens; slice them as you slice the signals.

    Raises ValueError if a field that the algorithm needs is None, if shapes do not fit, if the mask is not boolean, if a
    group of one is to be compared with itself, or if a reward is not finite (the last one where it is not traced).
    """
    _check_kinds(algorithm, signals)
    _check(algorithm, signals, algorithm.needs)
    if signals.segments is not None and algorithm.needs & {"reward", "steps"}:
        raise ValueError(
            f"Signals.segments is given, but algorithm {algorithm.name!r} needs a reward, and a packed row has no one reward; "
            "prepare advantage and weight first, then pack them with the rest."
        )

    def on_mask(array: Array, name: str) -> Array:
        if jnp.shape(array) != signals.mask.shape:
            raise ValueError(
                f"The {name} of algorithm {algorithm.name!r} has shape {jnp.shape(array)}, but it must be the mask's [P, G, T], "
                f"{signals.mask.shape}; give each token its completion's number with objectives.spread(array, signals)."
            )
        return lax.stop_gradient(jnp.where(signals.mask, array, 0.0))

    advantage = jax.tree.map(lambda a: on_mask(a, "advantage"), algorithm.advantage(signals))
    return advantage, on_mask(algorithm.weight(signals), "weight")


def policy_loss(
    algorithm: Algorithm,
    logp: Float[Array, "P G T"],
    signals: Signals,
    *,
    advantage: Any,
    weight: Float[Array, "P G T"],
    token_weight: Float[Array, "P G T"] | None = None,
) -> tuple[Float[Array, ""], dict[str, Array]]:
    """(loss, aux) of a slice of whole groups: the value is the textbook's, -sum w J, the gradient the surrogate's.

    `advantage` and `weight` come from `prepare` on the whole batch and are sliced like `signals`. Losses and gradients
    of the slices of a batch *add up* to those of the batch: sum them, do not average them. Arithmetic is in float32 or
    wider, whatever the log-probabilities come in. The coefficient is a constant, so second derivatives are not the textbook's.
    What `prepare` has used (rewards, values, steps) may be None here. Under `shard_map` sum over devices, as over slices.

    `aux` is a flat dict without gradient, the same names for every algorithm; `combine_aux` merges those of the slices:

    - `coefficient`, [P, G, T], 0 on masked tokens;
    - `policy/objective` is sum w J = -loss;
    - `policy/ratio_mean`, `policy/clip_fraction` and, where `signals.logp_ref` is given, `policy/kl_ref` (k3, nats)
      are sums with `token_weight`, which is `weights.token_mean` of the whole batch's mask, sliced. Left out, it is
      taken from this slice's mask: right when the slice is the whole batch, and only then;
    - `policy/ratio_min` and `policy/ratio_max`, over chosen tokens (1 if there are none).

    Raises ValueError if shapes differ, if a field that the algorithm needs is None, or if the mask is not boolean.
    """
    _check_kinds(algorithm, signals)
    _check(algorithm, signals, algorithm.needs - PREPARED)
    check_tokens(logp=logp, mask=signals.mask, weight=weight, token_weight=token_weight)
    for leaf in jax.tree.leaves(advantage):
        check_tokens(logp=logp, advantage=leaf)
    logp = precise(logp)
    fixed = lax.stop_gradient(logp)
    signals = _in_precision_of(logp, signals)
    if signals.logp_old is None:
        signals = signals._replace(logp_old=fixed)
    advantage, weight = jax.tree.map(lambda a: _like(a, logp), advantage), _like(weight, logp)

    coefficient, objective = algorithm.coefficient(fixed, signals, advantage)
    for addition in algorithm.additions:
        slope, value = addition(fixed, signals)
        coefficient, objective = coefficient + slope, objective + value
    coefficient = jnp.where(signals.mask, lax.stop_gradient(coefficient), 0.0)
    objective = jnp.where(signals.mask, objective, 0.0)
    loss = valued_loss(logp, coefficient, objective, weight)
    token_weight = token_mean(signals.mask) if token_weight is None else token_weight
    return loss, {
        "coefficient": coefficient,
        "policy/objective": -lax.stop_gradient(loss),
        **_watch(algorithm, fixed, signals, advantage, _like(token_weight, logp)),
    }


def valued_loss(output: Array, coefficient: Array, objective: Array, weight: Array) -> Float[Array, ""]:
    """-sum w J in value, -sum w GC d(output) in gradient: the loss line for any output that has a coefficient.

    For log-probabilities, `policy_loss` calls it; for a head of `heads`, call it yourself. `weight` and `objective` have
    one shape, and `output` and `coefficient` another, which is the same or has axes behind it (logits: the vocabulary).

    Raises ValueError if the shapes do not fit.
    """
    if output.shape != coefficient.shape or weight.shape != objective.shape or output.shape[: weight.ndim] != weight.shape:
        raise ValueError(
            f"output {output.shape} and coefficient {coefficient.shape} must have one shape, which begins with that of weight "
            f"{weight.shape} and objective {objective.shape}."
        )
    output = precise(output)
    coefficient, objective, weight = _like(coefficient, output), _like(objective, output), _like(weight, output)
    used = weight != 0
    textbook = -jnp.sum(jnp.where(used, weight * objective, 0.0))
    behind = tuple(range(weight.ndim, output.ndim))
    scale = jnp.where(jnp.expand_dims(used, behind), jnp.expand_dims(weight, behind) * coefficient, 0.0)
    return _with_slope(textbook, output, scale)


@jax.custom_jvp
def _with_slope(value: Array, output: Array, scale: Array) -> Array:
    """`value`, with the gradient -scale with respect to `output` and no other.

    The same as value + (s - stop_gradient(s)) with s = -sum scale * output, which adds exactly 0; but to compute that 0
    takes as long as the rest of the loss.
    """
    return value


@_with_slope.defjvp
def _slope(primals: tuple[Array, Array, Array], tangents: tuple[Array, Array, Array]) -> tuple[Array, Array]:
    value, _, scale = primals
    return value, -jnp.sum(scale * tangents[1])


def ratio_diagnostics(
    logp: Float[Array, "P G T"],
    logp_old: Float[Array, "P G T"],
    mask: Bool[Array, "P G T"],
    token_weight: Float[Array, "P G T"],
) -> dict[str, Array]:
    """`policy/ratio_mean`, `_min` and `_max` of pi/pi_old over chosen tokens; min and max are 1 if there are none."""
    ratio = exponential(log_ratio(logp, logp_old, mask))
    low, high = jnp.min(jnp.where(mask, ratio, jnp.inf)), jnp.max(jnp.where(mask, ratio, -jnp.inf))
    return {
        "policy/ratio_mean": weighted_sum(ratio, _like(token_weight, ratio)),
        "policy/ratio_min": jnp.where(low == jnp.inf, 1.0, low),
        "policy/ratio_max": jnp.where(high == -jnp.inf, 1.0, high),
    }


def combine_aux(aux: dict[str, Array]) -> dict[str, Array]:
    """Merge the aux of a batch's equal slices, stacked on a leading axis (as `lax.scan` stacks them).

    `_min` and `_max` by min and max, the coefficients of consecutive slices one behind the other, all else by sum.
    """
    # a slice without a token says 1 for its extremes, and alone has a mean of 0: ratios are positive
    empty = aux["policy/ratio_mean"] == 0

    def merge(name: str, values: Array) -> Array:
        if name == "coefficient":
            return values.reshape(-1, *values.shape[2:])
        if name.endswith("_min"):
            return jnp.where(jnp.all(empty), 1.0, jnp.min(jnp.where(empty, jnp.inf, values), axis=0))
        if name.endswith("_max"):
            return jnp.where(jnp.all(empty), 1.0, jnp.max(jnp.where(empty, -jnp.inf, values), axis=0))
        return jnp.sum(values, axis=0)

    return {name: merge(name, values) for name, values in aux.items()}


def _watch(algorithm: Algorithm, logp: Array, signals: Signals, advantage: Any, token_weight: Array) -> dict[str, Array]:
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


def _check_kinds(algorithm: Any, signals: Any) -> None:
    if not isinstance(algorithm, Algorithm) or not isinstance(signals, Signals):
        raise ValueError(
            f"algorithm is of type {type(algorithm).__name__} and signals of type {type(signals).__name__}, but they must be an "
            "Algorithm, such as objectives.grpo() with its brackets, and Signals; policy_loss takes algorithm, logp, signals."
        )


def _check(algorithm: Algorithm, signals: Signals, needs: frozenset[str]) -> None:
    """Everything about the signals that can be said before computing."""
    unknown = set(needs) - NEEDS.keys()
    if unknown:
        raise ValueError(
            f"Algorithm {algorithm.name!r} needs {', '.join(map(repr, sorted(unknown)))}, but what can be needed is "
            f"{', '.join(NEEDS)}; give a frozenset of these."
        )
    for need in sorted(needs):
        fields = NEEDS[need]
        if fields and all(getattr(signals, field) is None for field in fields):
            wanted = " or ".join(f"Signals.{field}" for field in fields)
            raise ValueError(f"Algorithm {algorithm.name!r} needs {wanted}, which is None; fill it in.")
    per_token = ("logp_behaviour", "logp_old", "logp_ref", "logp_teacher", "value", "step_reward", "step_end")
    check_mask(signals.mask, **{name: getattr(signals, name) for name in per_token})
    check_segments(signals.segments, signals.mask)
    for name in ("truncated", "value_behind"):
        array = getattr(signals, name)
        if array is not None and jnp.shape(array) != signals.mask.shape[:2]:
            raise ValueError(
                f"Signals.{name} has shape {jnp.shape(array)}, but it must be the mask's [P, G], {signals.mask.shape[:2]}."
            )
    if signals.value_behind is not None and signals.truncated is None:
        raise ValueError("Signals.value_behind is given without Signals.truncated, which says for which completions it counts.")
    if signals.reward is not None and "reward" in algorithm.needs:
        check_reward(signals.reward)
        if signals.reward.shape != signals.mask.shape[:2]:
            raise ValueError(
                f"Signals.reward has shape {signals.reward.shape} and Signals.mask {signals.mask.shape}, but they must be "
                "[P, G] and [P, G, T]."
            )


def _in_precision_of(logp: Array, signals: Signals) -> Signals:
    """Stored log-probabilities and rewards may come in another precision than the policy's: constants in its own."""

    def constant(x: Array) -> Array:
        if jnp.issubdtype(jnp.result_type(x), jnp.floating) and jnp.result_type(x) != logp.dtype:
            # whatever padding holds goes first: a cast of NaN is what `jax_debug_nans` looks for
            x = jnp.where(signals.mask, x, 0.0) if jnp.shape(x) == signals.mask.shape else x
            x = x.astype(logp.dtype)
        return lax.stop_gradient(x)

    return jax.tree.map(constant, signals)


def _like(array: Array, logp: Array) -> Array:
    return lax.stop_gradient(jnp.asarray(array)).astype(logp.dtype)
