"""Objectives: the losses of reinforcement learning, and of its relatives, as plain functions of arrays.

Imports jax, numpy and jaxtyping and nothing else. Start at `surrogate` (the loss and its nouns) and `table()` (every
algorithm, one function each, here by name); the parts they are made of are in `advantages`, `coefficients`, `kl`,
`preferences`, `weights`, `shaping` and, for outputs that are not log-probabilities, `heads`.
"""

from jaxreason.objectives import (
    advantages,
    algorithms,
    coefficients,
    critics,
    heads,
    kl,
    likelihoods,
    preferences,
    shaping,
    weights,
)
from jaxreason.objectives.additions import with_entropy_bonus, with_reference_pull, with_sampler_correction
from jaxreason.objectives.algorithms import *  # noqa: F403
from jaxreason.objectives.critics import *  # noqa: F403
from jaxreason.objectives.likelihoods import *  # noqa: F403
from jaxreason.objectives.surrogate import (
    Algorithm,
    Signals,
    combine_aux,
    policy_loss,
    prepare,
    ratio_diagnostics,
    surrogate_loss,
    valued_loss,
    weighted_sum,
)
from jaxreason.objectives.table import every_algorithm, table

__all__ = [
    "Algorithm",
    "Signals",
    "advantages",
    "algorithms",
    "coefficients",
    "combine_aux",
    "critics",
    "every_algorithm",
    "heads",
    "kl",
    "likelihoods",
    "policy_loss",
    "preferences",
    "prepare",
    "ratio_diagnostics",
    "shaping",
    "surrogate_loss",
    "table",
    "valued_loss",
    "weighted_sum",
    "weights",
    "with_entropy_bonus",
    "with_reference_pull",
    "with_sampler_correction",
]
__all__ += likelihoods.__all__
__all__ += algorithms.__all__
__all__ += critics.__all__
