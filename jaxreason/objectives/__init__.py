"""Objectives: reinforcement learning's losses as plain functions of arrays, for this project's loop or for yours.

Imports jax, numpy and jaxtyping and nothing else. Start at `surrogate` (the loss and its nouns) and `algorithms` (one
function each); the parts they are made of are in `advantages`, `coefficients`, `weights` and `kl`.
"""

from jaxreason.objectives import advantages, coefficients, kl, weights
from jaxreason.objectives.algorithms import dapo, dr_grpo, grpo, reinforce, rloo, sft
from jaxreason.objectives.surrogate import (
    Algorithm,
    Signals,
    combine_aux,
    policy_loss,
    prepare,
    ratio_diagnostics,
    surrogate_loss,
    weighted_sum,
)

__all__ = [
    "Algorithm",
    "Signals",
    "advantages",
    "coefficients",
    "combine_aux",
    "dapo",
    "dr_grpo",
    "grpo",
    "kl",
    "policy_loss",
    "prepare",
    "ratio_diagnostics",
    "reinforce",
    "rloo",
    "sft",
    "surrogate_loss",
    "weighted_sum",
    "weights",
]
