"""Objectives: the losses of reinforcement learning, and of its relatives, as plain functions of arrays.

Imports jax, numpy and jaxtyping and nothing else. Start at `policy_loss` (the loss and its nouns are in `surrogate`) and at
`table()`: every algorithm, one function each. The parts they are made of are in `advantages`, `coefficients`, `kl`,
`preferences`, `weights`, `shaping` and, for outputs that are not log-probabilities, `heads`; all of them are here by name too.
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
from jaxreason.objectives.advantages import (
    at_last_token,
    batch_whiten,
    gae,
    greedy_baseline,
    group_centre,
    group_zscore,
    kl_in_reward,
    leave_one_out,
    length_adaptive_gae,
    relative_to_mean,
    return_to_go,
    step_returns,
    zero_variance,
)
from jaxreason.objectives.algorithms import *  # noqa: F403
from jaxreason.objectives.coefficients import (
    clipped,
    clipped_importance,
    decoupled,
    entropy_bonus,
    geometric_mean,
    likelihood,
    mirror_descent,
    reverse_kl,
    sampler_correction,
    sequence_clipped,
    soft_gate,
)
from jaxreason.objectives.critics import *  # noqa: F403
from jaxreason.objectives.heads import (
    bradley_terry,
    forward_kl,
    full_reverse_kl,
    outcome_cross_entropy,
    step_cross_entropy,
    value_loss,
)
from jaxreason.objectives.kl import kl_k1, kl_k2, kl_k3, log_ratio, reference_pull
from jaxreason.objectives.likelihoods import *  # noqa: F403
from jaxreason.objectives.parts import spread
from jaxreason.objectives.preferences import preference
from jaxreason.objectives.shaping import (
    adaptive_kl,
    dynamic_sampling,
    kimi_length,
    normalise_then_sum,
    soft_overlong,
    without_truncated,
)
from jaxreason.objectives.surrogate import (
    Algorithm,
    Card,
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
from jaxreason.objectives.weights import constant_length, group_mean, group_sum, sequence_mean, sequence_sum, token_mean

__all__ = [
    "Algorithm",
    "Card",
    "Signals",
    "adaptive_kl",
    "advantages",
    "algorithms",
    "at_last_token",
    "batch_whiten",
    "bradley_terry",
    "clipped",
    "clipped_importance",
    "coefficients",
    "combine_aux",
    "constant_length",
    "critics",
    "decoupled",
    "dynamic_sampling",
    "entropy_bonus",
    "every_algorithm",
    "forward_kl",
    "full_reverse_kl",
    "gae",
    "geometric_mean",
    "greedy_baseline",
    "group_centre",
    "group_mean",
    "group_sum",
    "group_zscore",
    "heads",
    "kimi_length",
    "kl",
    "kl_in_reward",
    "kl_k1",
    "kl_k2",
    "kl_k3",
    "leave_one_out",
    "length_adaptive_gae",
    "likelihood",
    "likelihoods",
    "log_ratio",
    "mirror_descent",
    "normalise_then_sum",
    "outcome_cross_entropy",
    "policy_loss",
    "preference",
    "preferences",
    "prepare",
    "ratio_diagnostics",
    "reference_pull",
    "relative_to_mean",
    "return_to_go",
    "reverse_kl",
    "sampler_correction",
    "sequence_clipped",
    "sequence_mean",
    "sequence_sum",
    "shaping",
    "soft_gate",
    "soft_overlong",
    "spread",
    "step_cross_entropy",
    "step_returns",
    "surrogate_loss",
    "table",
    "token_mean",
    "value_loss",
    "valued_loss",
    "weighted_sum",
    "weights",
    "with_entropy_bonus",
    "with_reference_pull",
    "with_sampler_correction",
    "without_truncated",
    "zero_variance",
]
__all__ += likelihoods.__all__
__all__ += algorithms.__all__
__all__ += critics.__all__
