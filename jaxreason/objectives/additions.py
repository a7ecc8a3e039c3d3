"""Additions: what can be put on top of any algorithm and gives an algorithm again, in any order.

with_reference_pull(with_sampler_correction(objectives.dapo(), kind="truncate", high=2.0), beta=0.01)
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jax import Array

from jaxreason.objectives.arrays import Scalar, check_choice, check_range, given
from jaxreason.objectives.coefficients import check_correction, entropy_bonus, sampler_correction
from jaxreason.objectives.kl import KINDS, reference_pull
from jaxreason.objectives.surrogate import Algorithm, Signals

PULLS = {
    "k1": " - beta",
    "k2": " - beta * l",
    "k1_plus": " - beta * l",
    "k3_plus": " - beta * l",
    "k3": " + beta * (u - 1)",
    "abs": " - beta * sign(l)",
    "weighted_k1": " - beta * rho * (l + 1)",
    "weighted_k2": " - beta * rho * (l + l**2 / 2)",
    "weighted_k3": " - beta * rho * l",
    "fixed_weight_k2": " - beta * rho * l",
    "fixed_weight_k3_plus": " - beta * rho * l",
    "fixed_weight_k3": " + beta * rho * (u - 1)",
}


def with_reference_pull(algorithm: Algorithm, *, beta: Scalar, kind: str = "k3") -> Algorithm:
    """GC + beta * pull, J - beta * KL(policy, reference), outside any clip; `kind` is one of `kl.reference_pull`'s.

    It comes on top of a pull that the algorithm has: `with_reference_pull(grpo(), beta=0.01)` has two, `grpo(beta=0.01)` one.
    `beta` may be a traced array, as an adaptive one is. With a beta of 0 it is the algorithm itself, and no reference is
    needed.

    Raises ValueError if `beta` is negative or `kind` unknown.
    """
    check_choice(KINDS, kl=kind)
    check_range(0.0, beta=beta)
    if not isinstance(beta, Array) and beta == 0:
        return algorithm

    def pull(logp: Array, signals: Signals) -> tuple[Array, Array]:
        slope, minus_kl = reference_pull(logp, given(signals.logp_ref), signals.mask, kind=kind, logp_old=signals.logp_old)
        scale = jnp.asarray(beta, slope.dtype)
        return scale * slope, scale * minus_kl

    card = algorithm.card
    if card is not None:
        card = card._replace(coefficient=card.coefficient + PULLS[kind])
    return algorithm._replace(additions=(*algorithm.additions, pull), needs=algorithm.needs | {"reference"}, card=card)


def with_entropy_bonus(algorithm: Algorithm, *, bonus: Scalar) -> Algorithm:
    """GC - bonus * rho log pi, J + bonus * entropy of the sampled tokens; see `coefficients.entropy_bonus`.

    Raises ValueError if `bonus` is negative.
    """
    check_range(0.0, bonus=bonus)

    def spreading(logp: Array, signals: Signals) -> tuple[Array, Array]:
        slope, entropy = entropy_bonus(logp, given(signals.logp_old), signals.mask)
        scale = jnp.asarray(bonus, slope.dtype)
        return scale * slope, scale * entropy

    card = algorithm.card
    if card is not None:
        card = card._replace(coefficient=card.coefficient + " - bonus * rho * log_pi")
    return algorithm._replace(additions=(*algorithm.additions, spreading), needs=algorithm.needs | {"old"}, card=card)


def with_sampler_correction(algorithm: Algorithm, *, kind: str, low: float = 0.0, high: float = 2.0) -> Algorithm:
    """GC * factor, J * factor, the factor being `coefficients.sampler_correction`; pulls and bonuses are left as they are.

    Corrects `logp_behaviour`, what the sampler computed, to `logp_old`, what the trainer does; without `logp_old`, to the
    present policy. Where an algorithm's ratio is a whole completion's, a token's own factor multiplies its own
    coefficient (GSPO-token's convention), which is the gradient of J only where all factors of the completion are equal.

    Raises ValueError if a setting is wrong, if the algorithm corrects the sampler already, or if it learns from rows that
    nobody sampled (demonstrations, pairs).
    """
    check_correction(kind, low, high)
    if "behaviour" in algorithm.needs:
        raise ValueError(f"Algorithm {algorithm.name!r} has a sampler's correction already; a second one would count twice.")
    if not algorithm.needs & {"reward", "steps", "teacher"}:
        raise ValueError(f"Algorithm {algorithm.name!r} learns from rows that no sampler wrote; there is nothing to correct.")

    def coefficient(logp: Array, signals: Signals, advantage: Any) -> tuple[Array, Array]:
        behaviour, segments = given(signals.logp_behaviour), signals.segments
        factor = sampler_correction(
            given(signals.logp_old), behaviour, signals.mask, kind=kind, low=low, high=high, segments=segments
        )  # fmt: skip
        push, objective = algorithm.coefficient(logp, signals, advantage)
        return factor * push, factor * objective

    card = algorithm.card
    if card is not None:
        card = card._replace(coefficient=f"factor * ({card.coefficient})")
    return algorithm._replace(coefficient=coefficient, needs=algorithm.needs | {"behaviour", "old"}, card=card)
