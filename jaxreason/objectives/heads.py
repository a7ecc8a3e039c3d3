"""Outputs other than log-probabilities: a reward model's score, a verifier's logit, a critic's value, a student's logits.

The contract is that of `coefficients`: each function returns `(coefficient, objective)`, the first being the gradient of
the objective with respect to the output, as a constant, the second the objective's value, to be maximised. Both are 0 on
what is masked. Turn them into a loss with a weight of the objective's shape:

    coefficient, objective = heads.bradley_terry(score)
    loss = objectives.valued_loss(score, coefficient, objective, jnp.full(score.shape, 1 / score.shape[0]))  # 1/P: see there
    coefficient, objective = heads.value_loss(value, returns, mask)
    loss = objectives.valued_loss(value, coefficient, objective, objectives.token_mean(mask))
"""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Bool, Float

from jaxreason.objectives.arrays import check_mask, check_range, check_tokens, precise


def bradley_terry(
    score: Float[Array, "P G"], *, margin: Float[Array, " P"] | None = None
) -> tuple[Float[Array, "P G"], Float[Array, "P G"]]:
    """J = mean over pairs i < j of log sigmoid(s_i - s_j - margin), completions ranked best first; GC_i = dJ/ds_i.

    InstructGPT's reward model, arXiv:2203.02155, Eq. 1; G = 2 is Bradley-Terry's chosen and rejected, with GC
    +-sigmoid(-(s_chosen - s_rejected - margin)). The optional margin is by how much a pair should differ (our option, as
    in Llama 2's reward model). J stands on the first column, so the weight 1/P gives the mean over problems. Only
    differences count: shift scores afterwards, so that demonstrations score 0.

    Raises ValueError if `score` is not [P, G] with G > 1, or if the margin is not [P].
    """
    shape = jnp.shape(score)
    if len(shape) != 2 or shape[1] < 2:
        raise ValueError(f"score has shape {shape}, but it must be [P, G] with two or more completions, the best first.")
    if margin is not None and jnp.shape(margin) != shape[:1]:
        raise ValueError(f"margin has shape {jnp.shape(margin)} and score {shape}, but they must be [P] and [P, G].")
    score = lax.stop_gradient(precise(score))
    pairs = list(itertools.combinations(range(shape[1]), 2))
    better, worse = (jnp.asarray(side) for side in zip(*pairs, strict=True))
    gap = score[:, better] - score[:, worse]
    if margin is not None:
        gap = gap - precise(margin).astype(gap.dtype)[:, None]
    slope = jax.nn.sigmoid(-gap) / len(pairs)
    coefficient = jnp.zeros_like(score).at[:, better].add(slope).at[:, worse].add(-slope)
    value = jnp.mean(jax.nn.log_sigmoid(gap), axis=1)
    return coefficient, jnp.zeros_like(score).at[:, 0].set(value)


def outcome_cross_entropy(
    logit: Float[Array, "P G"], label: Float[Array, "P G"], mask: Bool[Array, "P G"]
) -> tuple[Float[Array, "P G"], Float[Array, "P G"]]:
    """J = y log sigmoid(z) + (1 - y) log sigmoid(-z), GC = y - sigmoid(z): outcome reward model (arXiv:2110.14168).

    One logit a completion, y its correctness, hard or soft. `mask` is True where there is a label.

    Raises ValueError if shapes differ, or if a label is not between 0 and 1 where it is concrete.
    """
    return _cross_entropy(logit, label, mask)


def step_cross_entropy(
    logit: Float[Array, "P G T"], label: Float[Array, "P G T"], mask: Bool[Array, "P G T"]
) -> tuple[Float[Array, "P G T"], Float[Array, "P G T"]]:
    """J = y log sigmoid(z) + (1 - y) log sigmoid(-z), GC = y - sigmoid(z), at each step's last token: process reward model.

    Hard labels are 0 or 1 (arXiv:2305.20050; Math-Shepherd, arXiv:2312.08935, Eq. 3), soft ones the share of correct
    rollouts from the step (its Eq. 4). `mask` is True where a step is labelled: a label of 0 says "wrong", no label says
    nothing, and only the mask can tell them apart.

    Raises ValueError if shapes differ, or if a label is not between 0 and 1 where it is concrete.
    """
    check_mask(mask, logit=logit, label=label)
    return _cross_entropy(logit, label, mask)


def value_loss(
    value: Float[Array, "P G T"],
    returns: Float[Array, "P G T"],
    mask: Bool[Array, "P G T"],
    *,
    value_old: Float[Array, "P G T"] | None = None,
    clip: float | None = None,
) -> tuple[Float[Array, "P G T"], Float[Array, "P G T"]]:
    """J = -(V - R)^2 / 2, GC = R - V: the critic's regression to its returns (PPO, arXiv:1707.06347, Eq. 9).

    With `clip` and `value_old`: J = -max((V - R)^2, (clip(V, V_old - clip, V_old + clip) - R)^2)/2, GC = R - V where the
    first is the larger or V is inside, else 0. The half and the clip are conventions of code, in neither paper nor Eq. 9.

    Raises ValueError if shapes differ, if only one of `clip` and `value_old` is given, or if `clip` is negative.
    """
    check_mask(mask, value=value, returns=returns, value_old=value_old)
    if (clip is None) != (value_old is None):
        raise ValueError(f"clip is {clip} and value_old is {'not ' if value_old is None else ''}given: give both, or neither.")
    check_range(0.0, clip=clip)
    value = lax.stop_gradient(jnp.where(mask, precise(value), 0.0))
    returns = jnp.where(mask, precise(returns), 0.0).astype(value.dtype)
    gap = returns - value
    if value_old is None or clip is None:
        return gap, -0.5 * jnp.square(gap)
    old = jnp.where(mask, precise(value_old), 0.0).astype(value.dtype)
    clipped_gap = returns - jnp.clip(value, old - clip, old + clip)
    inside = jnp.abs(value - old) <= clip
    coefficient = jnp.where(inside | (jnp.square(gap) > jnp.square(clipped_gap)), gap, 0.0)
    return coefficient, -0.5 * jnp.maximum(jnp.square(gap), jnp.square(clipped_gap))


def forward_kl(
    logits: Float[Array, "P G T V"], teacher_logits: Float[Array, "P G T V"], mask: Bool[Array, "P G T"]
) -> tuple[Float[Array, "P G T V"], Float[Array, "P G T"]]:
    """J = -KL(pi_T || pi) of each token's whole law, GC_v = pi_T(v) - pi(v): distillation (GKD, arXiv:2306.13649).

    Any rows: the teacher's, the policy's, a data set's. Nats per token.

    Raises ValueError if shapes differ.
    """
    student, teacher = _laws(logits, teacher_logits, mask)
    gap = jnp.where(jnp.exp(teacher) > 0, teacher - student, 0.0)  # a token that the teacher excludes adds nothing
    objective = -jnp.sum(jnp.exp(teacher) * gap, axis=-1)
    coefficient = jnp.exp(teacher) - jnp.exp(student)
    return jnp.where(mask[..., None], coefficient, 0.0), jnp.where(mask, objective, 0.0)


def full_reverse_kl(
    logits: Float[Array, "P G T V"], teacher_logits: Float[Array, "P G T V"], mask: Bool[Array, "P G T"]
) -> tuple[Float[Array, "P G T V"], Float[Array, "P G T"]]:
    """J = -KL(pi || pi_T) of each token's whole law, GC_v = -pi(v) (log(pi(v)/pi_T(v)) - KL) (our derivation).

    On-policy distillation with the teacher's logits; `coefficients.reverse_kl` is its estimate from one token. Infinite where
    the teacher excludes a token (a logit of -inf) that the student does not.

    Raises ValueError if shapes differ.
    """
    student, teacher = _laws(logits, teacher_logits, mask)
    gap = jnp.where(jnp.exp(student) > 0, student - teacher, 0.0)
    divergence = jnp.sum(jnp.exp(student) * gap, axis=-1)
    coefficient = -jnp.exp(student) * (gap - divergence[..., None])
    return jnp.where(mask[..., None], coefficient, 0.0), jnp.where(mask, -divergence, 0.0)


def _cross_entropy(logit: Array, label: Array, mask: Array) -> tuple[Array, Array]:
    shapes = {jnp.shape(logit), jnp.shape(label), jnp.shape(mask)}
    if len(shapes) != 1 or jnp.asarray(mask).dtype != jnp.bool_:
        raise ValueError(
            f"logit, label and mask have shapes {jnp.shape(logit)}, {jnp.shape(label)} and {jnp.shape(mask)}, dtype of the mask "
            f"{jnp.asarray(mask).dtype}, but they must be of one shape, and the mask boolean."
        )
    logit = lax.stop_gradient(precise(logit))
    label = jnp.where(mask, precise(label), 0.0).astype(logit.dtype)
    check_range(0.0, 1.0, label=jnp.min(label, initial=0.0))
    check_range(0.0, 1.0, label=jnp.max(label, initial=0.0))
    logit = jnp.where(mask, logit, 0.0)
    objective = label * jax.nn.log_sigmoid(logit) + (1 - label) * jax.nn.log_sigmoid(-logit)
    return jnp.where(mask, label - jax.nn.sigmoid(logit), 0.0), jnp.where(mask, objective, 0.0)


def _laws(logits: Array, teacher_logits: Array, mask: Array) -> tuple[Array, Array]:
    """Log-probabilities of both; on masked tokens, whose logits may hold anything, the uniform law."""
    if jnp.shape(logits) != jnp.shape(teacher_logits):
        raise ValueError(f"logits have shape {jnp.shape(logits)} and teacher_logits {jnp.shape(teacher_logits)}; they must agree.")
    check_mask(mask)
    check_tokens(mask=mask, logits_without_vocabulary=jnp.empty(jnp.shape(logits)[:-1], jnp.bool_))
    student = lax.stop_gradient(precise(logits))
    teacher = lax.stop_gradient(precise(teacher_logits).astype(student.dtype))
    wide = mask[..., None]
    return jax.nn.log_softmax(jnp.where(wide, student, 0.0)), jax.nn.log_softmax(jnp.where(wide, teacher, 0.0))
