"""Additions: what can be put on top of any algorithm and gives an algorithm again.

with_reference_pull(with_sampler_correction(objectives.dapo(), kind="truncate", high=2.0), beta=0.01)
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jax import Array

from jaxreason.objectives.arrays import Scalar, check_choice, check_range, given
from jaxreason.objectives.coefficients import entropy_bonus, sampler_correction
from jaxreason.objectives.kl import KINDS, reference_pull
from jaxreason.objectives.surrogate import Algorithm, Signals


def with_reference_pull(algorithm: Algorithm, *, beta: Scalar, kind: str = "k3") -> Algorithm:
    """GC + beta * pull, J - beta * KL(policy, reference), outside any clip; `kind` is one of `kl.reference_pull`'s.

    `beta` may be a traced array, as an adaptive one is. With a beta of 0 it is the algorithm itself, and no reference is
    needed.

    Raises ValueError if `beta` is negative or `kind` unknown.
    """
    check_choice(KINDS, kl=kind)
    check_range(0.0, beta=beta)
    if not isinstance(beta, Array) and beta == 0:
        return algorithm

    def coefficient(logp: Array, signals: Signals, advantage: Any) -> tuple[Array, Array]:
        push, objective = algorithm.coefficient(logp, signals, advantage)
        pull, minus_kl = reference_pull(logp, given(signals.logp_ref), signals.mask, kind=kind, logp_old=signals.logp_old)
        return push + beta * pull, objective + beta * minus_kl

    card = algorithm.card
    if card is not None and kind in ("k2", "k3"):
        card = card._replace(coefficient=card.coefficient + {"k2": " - beta * l", "k3": " + beta * (u - 1)"}[kind])
    return algorithm._replace(coefficient=coefficient, needs=algorithm.needs | {"reference"}, card=card)


def with_entropy_bonus(algorithm: Algorithm, *, bonus: Scalar) -> Algorithm:
    """GC - bonus * rho log pi, J + bonus * entropy of the sampled tokens; see `coefficients.entropy_bonus`.

    Raises ValueError if `bonus` is negative.
    """
    check_range(0.0, bonus=bonus)

    def coefficient(logp: Array, signals: Signals, advantage: Any) -> tuple[Array, Array]:
        push, objective = algorithm.coefficient(logp, signals, advantage)
        spreading, entropy = entropy_bonus(logp, given(signals.logp_old), signals.mask)
        return push + bonus * spreading, objective + bonus * entropy

    return algorithm._replace(coefficient=coefficient, needs=algorithm.needs | {"old"})


def with_sampler_correction(algorithm: Algorithm, *, kind: str, low: float = 0.0, high: float = 2.0) -> Algorithm:
    """The algorithm with its advantage times `coefficients.sampler_correction`; a pull to the reference is left as it is.

    Every coefficient of a reward is proportional to the advantage given its sign, and the factor is never negative, so
    the clip falls where it did. Corrects `logp_behaviour`, what the sampler computed, to `logp_old`, what the trainer
    does; without `logp_old`, to the present policy. Raises ValueError if the algorithm's advantage is not one array.
    """
    check_range(0.0, low=low)
    check_range(low, high=high)

    def coefficient(logp: Array, signals: Signals, advantage: Any) -> tuple[Array, Array]:
        if not isinstance(advantage, Array):
            raise ValueError(f"Algorithm {algorithm.name!r} has more than an advantage; correct a simpler one, such as ppo.")
        factor = sampler_correction(
            given(signals.logp_old),
            given(signals.logp_behaviour),
            signals.mask,
            kind=kind,
            low=low,
            high=high,
            segments=signals.segments,
        )
        return algorithm.coefficient(logp, signals, advantage * jnp.asarray(factor, advantage.dtype))

    return algorithm._replace(coefficient=coefficient, needs=algorithm.needs | {"behaviour", "old"})
