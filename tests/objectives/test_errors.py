"""Mistakes in words: every bad argument is a ValueError that says what was given and what was expected.

The annotations' checks are off here (`unchecked`), as they are for everyone who does not test this package.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxreason import objectives
from jaxreason.objectives import (
    Signals,
    advantages,
    coefficients,
    heads,
    kl,
    policy_loss,
    preferences,
    prepare,
    shaping,
    surrogate_loss,
    weights,
)

pytestmark = pytest.mark.usefixtures("unchecked")

TOKENS = jnp.zeros((2, 3, 4))
MASK = jnp.ones((2, 3, 4), bool)
SHORT = jnp.zeros((2, 3, 3))
LOGITS = jnp.zeros((2, 3, 4, 5))
FLAT = jnp.zeros((6, 4))
REWARD = jnp.asarray([[1.0, 0.0, 0.0], [0.0, 1.0, 1.0]])
BOTH = r"\(2, 3, 4\).*\(2, 3, 3\)|\(2, 3, 3\).*\(2, 3, 4\)"
CLIPS: dict[str, Any] = {"clip_low": 0.2, "clip_high": 0.2}


def signals(**changed: Any) -> Signals:
    given = {"mask": MASK, "reward": REWARD, "logp_old": TOKENS, "logp_ref": TOKENS, **changed}
    return Signals(**given)


def loss(algorithm: Any, s: Signals, logp: Any = TOKENS, **changed: Any) -> Any:
    advantage, weight = prepare(algorithm, signals())
    return policy_loss(algorithm, logp, s, **({"advantage": advantage, "weight": weight} | changed))


CASES: dict[str, tuple[Callable[[], Any], str]] = {
    # shapes that differ: both are said
    "surrogate": (lambda: surrogate_loss(TOKENS, SHORT, TOKENS), BOTH),
    "likelihood": (lambda: coefficients.likelihood(TOKENS, SHORT, MASK), BOTH),
    "clipped": (lambda: coefficients.clipped(TOKENS, SHORT, TOKENS, MASK, **CLIPS), BOTH),
    "clipped_importance": (lambda: coefficients.clipped_importance(TOKENS, TOKENS, SHORT, MASK, **CLIPS), BOTH),
    "soft_gate": (lambda: coefficients.soft_gate(TOKENS, SHORT, TOKENS, MASK, tau_positive=1.0, tau_negative=1.0), BOTH),
    "sequence_clipped": (lambda: coefficients.sequence_clipped(SHORT, TOKENS, TOKENS, MASK, **CLIPS), BOTH),
    "geometric_mean": (lambda: coefficients.geometric_mean(TOKENS, SHORT, TOKENS, MASK, **CLIPS), BOTH),
    "mirror_descent": (lambda: coefficients.mirror_descent(TOKENS, SHORT, TOKENS, MASK, tau=0.1), BOTH),
    "reverse_kl": (lambda: coefficients.reverse_kl(TOKENS, SHORT, TOKENS, MASK), BOTH),
    "entropy_bonus": (lambda: coefficients.entropy_bonus(TOKENS, SHORT, MASK), BOTH),
    "sampler_correction": (lambda: coefficients.sampler_correction(TOKENS, SHORT, MASK, kind="band"), BOTH),
    "decoupled": (lambda: coefficients.decoupled(TOKENS, TOKENS, SHORT, TOKENS, MASK, **CLIPS), BOTH),
    "reference_pull": (lambda: kl.reference_pull(TOKENS, SHORT, MASK, kind="k3"), BOTH),
    "gae": (lambda: advantages.gae(TOKENS, SHORT, MASK), BOTH),
    "step_returns": (lambda: advantages.step_returns(TOKENS, MASK[:, :, :3], MASK), BOTH),
    "batch_whiten": (lambda: advantages.batch_whiten(SHORT, MASK), BOTH),
    "value_loss": (lambda: heads.value_loss(TOKENS, SHORT, MASK), BOTH),
    "forward_kl": (lambda: heads.forward_kl(LOGITS, LOGITS[..., :4], MASK), r"\(2, 3, 4, 5\).*\(2, 3, 4, 4\)"),
    "outcome": (lambda: heads.outcome_cross_entropy(REWARD, REWARD[:, :2], REWARD > 0), r"\(2, 3\).*\(2, 2\)"),
    "margin": (lambda: heads.bradley_terry(jnp.zeros((2, 2)), margin=jnp.zeros(3)), r"\(3,\).*\(2, 2\)"),
    "at_last_token": (lambda: advantages.at_last_token(jnp.zeros((2, 4)), MASK), r"\(2, 4\).*\(2, 3, 4\)"),
    "greedy": (lambda: advantages.greedy_baseline(REWARD, jnp.zeros(3)), r"\(3,\).*\(2, 3\)"),
    "reward": (lambda: prepare(objectives.grpo(), signals(reward=jnp.zeros((3, 3)))), r"\(3, 3\).*\(2, 3, 4\)"),
    "logp_old": (lambda: prepare(objectives.grpo(), signals(logp_old=SHORT)), "logp_old.*|" + BOTH),
    "segments": (lambda: weights.token_mean(MASK) + weights.sequence_mean(MASK, segments=jnp.zeros((2, 3, 3), int)), BOTH),
    "sliced signals": (lambda: loss(objectives.dapo(), jax.tree.map(lambda x: x[:1], signals())), r"\(1, 3, 4\)"),
    "sliced weight": (lambda: loss(objectives.dapo(), signals(), weight=TOKENS[:1]), r"\(1, 3, 4\)"),
    "sliced advantage": (lambda: loss(objectives.dapo(), signals(), advantage=TOKENS[:1]), r"\(1, 3, 4\)"),
    "short logp": (lambda: loss(objectives.dapo(), signals(), logp=SHORT), BOTH),
    # a missing group axis
    "flat logp": (lambda: coefficients.likelihood(FLAT, FLAT, jnp.ones((6, 4), bool)), r"\(6, 4\).*\[P, G, T\]"),
    "flat mask": (lambda: weights.token_mean(jnp.ones((6, 4), bool)), r"\(6, 4\).*\[P, G, T\]"),
    "flat reward": (lambda: advantages.group_zscore(jnp.zeros(6)), r"\(6,\).*\[P, G\]"),
    "flat signals": (lambda: prepare(objectives.sft(), Signals(mask=jnp.ones((6, 4), bool))), r"\(6, 4\).*\[P, G, T\]"),
    # a group of one
    **{
        f"one: {f.__name__}": (lambda f=f: f(jnp.zeros((3, 1))), r"\(3, 1\), a group of 1")
        for f in (advantages.group_zscore, advantages.group_centre, advantages.leave_one_out, advantages.relative_to_mean)
    },
    "one: steps": (lambda: advantages.step_returns(TOKENS[:, :1], MASK[:, :1], MASK[:, :1]), "a group of 1"),
    "one: prepare": (lambda: prepare(objectives.grpo(beta=0.0), Signals(mask=MASK[:, :1], reward=REWARD[:, :1])), "a group of 1"),
    "no pair": (lambda: preferences.preference(TOKENS, TOKENS, MASK, beta=0.1), r"\(2, 3, 4\).*pair"),
    "no pair of scores": (lambda: heads.bradley_terry(jnp.zeros((2, 1))), r"\(2, 1\)"),
    # numbers out of their range
    "negative clip": (lambda: coefficients.clipped(TOKENS, TOKENS, TOKENS, MASK, clip_low=-0.1, clip_high=0.2), "clip_low is -0.1"),
    "negative clip_high": (lambda: objectives.dapo(clip_high=-1.0), "clip_high is -1.0"),
    "negative sequence clip": (lambda: objectives.gspo(clip_low=-1e-4), "clip_low is -0.0001"),
    "negative log clip": (lambda: objectives.gmpo(clip_low=-0.4), "clip_low is -0.4"),
    "dual clip": (lambda: objectives.ppo(dual_clip=1.0), "dual_clip is 1.0.*above 1"),
    "negative beta": (lambda: objectives.grpo(beta=-0.04), "beta is -0.04"),
    "negative beta in the reward": (lambda: objectives.rloo(beta=-1.0), "beta is -1.0"),
    "beta of a preference": (lambda: preferences.preference(TOKENS[:, :2], TOKENS[:, :2], MASK[:, :2], beta=0.0), "beta is 0.0"),
    "smoothing": (
        lambda: preferences.preference(TOKENS[:, :2], TOKENS[:, :2], MASK[:, :2], beta=0.1, loss="robust", label_smoothing=0.5),
        "label_smoothing is 0.5",
    ),
    "tau": (lambda: objectives.sapo(tau_positive=0.0), "tau_positive is 0.0"),
    "kimi tau": (lambda: objectives.kimi_k15(tau=-1.0), "tau is -1.0"),
    "lambda": (lambda: advantages.gae(TOKENS, TOKENS, MASK, lambda_=1.5), "lambda_ is 1.5.*between 0.0 and 1.0"),
    "discount": (lambda: advantages.return_to_go(TOKENS, MASK, discount=-0.5), "discount is -0.5"),
    "alpha": (lambda: advantages.length_adaptive_gae(TOKENS, TOKENS, MASK, alpha=0.0), "alpha is 0.0"),
    "ddof": (lambda: objectives.grpo(ddof=2), "ddof is 2"),
    "epsilon": (lambda: advantages.group_zscore(REWARD, epsilon=-1.0), "epsilon is -1.0"),
    "budget": (lambda: objectives.dr_grpo(max_completion_tokens=0), "max_completion_tokens is 0"),
    "band": (lambda: coefficients.sampler_correction(TOKENS, TOKENS, MASK, kind="band", low=3.0), "high is 2.0.*3.0 or more"),
    "value clip": (lambda: heads.value_loss(TOKENS, TOKENS, MASK, clip=0.2), "clip is 0.2.*both, or neither"),
    "label": (lambda: heads.step_cross_entropy(TOKENS, TOKENS + 2, MASK), "label is 2.0.*between 0.0 and 1.0"),
    "negative reward": (lambda: advantages.relative_to_mean(-REWARD), "reward is -1.0"),
    "bonus": (lambda: objectives.with_entropy_bonus(objectives.ppo(), bonus=-1.0), "bonus is -1.0"),
    # names
    "kl": (lambda: objectives.grpo(kl="k4"), "kl is 'k4'.*'k1', 'k2', 'k3'"),
    "loss": (lambda: objectives.dpo(loss="huber"), "loss is 'huber'.*'ipo'"),
    "margin name": (lambda: objectives.dpo(margin="max"), "margin is 'max'"),
    "kind": (lambda: coefficients.sampler_correction(TOKENS, TOKENS, MASK, kind="icepop"), "kind is 'icepop'.*'band'"),
    # masks and rewards
    "float mask": (lambda: weights.token_mean(MASK.astype(float)), "mask has dtype float32.*mask > 0"),
    "integer mask": (lambda: prepare(objectives.sft(), Signals(mask=MASK.astype(int))), "mask has dtype int32"),
    "float label mask": (lambda: heads.outcome_cross_entropy(REWARD, REWARD, REWARD), "dtype of the mask float32"),
    "nan": (lambda: prepare(objectives.reinforce(), signals(reward=REWARD.at[1, 2].set(jnp.nan))), r"reward is nan at \(1, 2\)"),
    "all nan": (lambda: advantages.group_zscore(REWARD * jnp.nan), r"reward is nan at \(0, 0\)"),
    "nan of numpy": (lambda: advantages.leave_one_out(np.full((2, 2), np.nan)), "reward is nan"),  # type: ignore[arg-type]
    "float segments": (lambda: weights.sequence_sum(MASK, segments=TOKENS), "segments has dtype float32"),  # type: ignore[arg-type]
    "far segments": (lambda: weights.sequence_sum(MASK, segments=jnp.full((2, 3, 4), 4)), "from 4 to 4.*0 to T - 1"),
    "packed reward": (lambda: prepare(objectives.dapo(), signals(segments=MASK.astype(int))), "packed row has no one"),
    "packed pairs": (
        lambda: policy_loss(
            objectives.dpo(),
            TOKENS[:, :2],
            signals(mask=MASK[:, :2], reward=None, logp_old=None, logp_ref=TOKENS[:, :2], segments=jnp.zeros((2, 2, 4), int)),
            advantage=TOKENS[:, :2],
            weight=TOKENS[:, :2],
        ),
        "do not pack pairs",
    ),
    "kimi correct": (lambda: shaping.kimi_length(REWARD, REWARD), "correct has dtype float32"),
    "smoothing of dpo": (lambda: objectives.dpo(label_smoothing=0.3), "label_smoothing is 0.3.*'sigmoid' has none"),
    "dpo beta": (lambda: objectives.dpo(beta=0.0), "beta is 0.0.*above 0"),
    "cap": (lambda: coefficients.decoupled(TOKENS, TOKENS, TOKENS, TOKENS, MASK, **CLIPS, cap=0.0), "cap is 0.0.*above 0"),
    "cap of decoupled_ppo": (lambda: objectives.decoupled_ppo(cap=-1.0), "cap is -1.0"),
    "correction's kind": (lambda: objectives.with_sampler_correction(objectives.dapo(), kind="tis"), "kind is 'tis'.*'truncate'"),
    "correction's low": (lambda: objectives.with_sampler_correction(objectives.dapo(), kind="truncate", low=0.5), "low is 0.5"),
    "two corrections": (
        lambda: objectives.with_sampler_correction(objectives.decoupled_ppo(), kind="truncate"),
        "'decoupled_ppo' has a sampler's correction already",
    ),
    "nothing to correct": (lambda: objectives.with_sampler_correction(objectives.dpo(), kind="band"), "'dpo' learns from rows"),
    "infinite reward": (lambda: advantages.group_centre(REWARD.at[0, 1].set(jnp.inf)), r"reward is inf at \(0, 1\)"),
    "nan step": (
        lambda: advantages.step_returns(TOKENS.at[1, 0, 2].set(jnp.nan), MASK, MASK),
        r"step_reward is nan at \(1, 0, 2\).*finite",
    ),
    "float step_end": (lambda: advantages.step_returns(TOKENS, TOKENS, MASK), "step_end has dtype float32.*a step ends"),
    "no mask": (lambda: prepare(objectives.sft(), Signals(mask=None)), "mask is None"),  # type: ignore[arg-type]
    "truncated": (lambda: prepare(objectives.sft(), signals(truncated=MASK[0, :, 0])), r"Signals.truncated has shape \(3,\)"),
    "value_behind": (lambda: prepare(objectives.sft(), signals(value_behind=REWARD)), "value_behind is given without"),
    "packed steps": (
        lambda: prepare(objectives.gspo_token(), signals(step_reward=TOKENS, step_end=MASK, segments=MASK.astype(int))),
        "packed row has no one",
    ),
    "packed bootstrap": (
        lambda: advantages.gae(TOKENS, TOKENS, MASK, segments=MASK.astype(int), bootstrap=REWARD),
        "segments and bootstrap",
    ),
    "scattered segments": (
        lambda: weights.sequence_sum(MASK, segments=jnp.broadcast_to(jnp.asarray([0, 1, 0, 1]), MASK.shape)),
        r"\[0, 1, 0, 1\].*stand together",
    ),
    "array lambda": (lambda: advantages.gae(TOKENS, TOKENS, MASK, lambda_=np.full((2, 3, 4), 1.5)), "lambda_ is"),
    "flat advantage": (
        lambda: prepare(objectives.dapo()._replace(advantage=lambda s: advantages.group_centre(s.reward)), signals()),
        r"advantage of algorithm 'dapo' has shape \(2, 3\).*spread",
    ),
    "flat weight": (lambda: prepare(objectives.sft()._replace(weight=lambda s: s.reward), signals()), r"weight of algorithm 'sft'"),
    "unknown need": (
        lambda: prepare(objectives.sft()._replace(needs=frozenset({"logp_ref"})), signals()),
        "'logp_ref', but.*reference",
    ),
    "swapped": (lambda: prepare(signals(), objectives.sft()), "algorithm is of type Signals and signals of type Algorithm"),  # type: ignore[arg-type]
    "not called": (lambda: prepare(objectives.grpo, signals()), "algorithm is of type function.*with its brackets"),  # type: ignore[arg-type]
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_the_mistake_is_named(name: str):
    call, message = CASES[name]
    with pytest.raises(ValueError, match=message) as caught:
        call()
    assert str(caught.value).endswith(".")


NEEDED = {
    "reward": "Signals.reward",
    "reference": "Signals.logp_ref",
    "teacher": "Signals.logp_teacher",
    "value": "Signals.value",
    "behaviour": "Signals.logp_behaviour",
    "greedy": "Signals.greedy_reward",
    "steps": "Signals.step_reward",
    "step_end": "Signals.step_end",
    "sampled": "Signals.logp_old or Signals.logp_behaviour",
}


@pytest.mark.parametrize("algorithm", [*objectives.every_algorithm(), objectives.ppo(beta=0.1)], ids=lambda a: a.name)
def test_what_an_algorithm_needs_and_lacks_is_named(algorithm: objectives.Algorithm):
    """Each need in turn, with all others there; and without any, the first one."""
    mask = MASK[:, :2]
    everything = Signals(
        mask=mask,
        reward=REWARD[:, :2],
        greedy_reward=REWARD[:, 0],
        step_end=mask,
        **{
            f: TOKENS[:, :2]
            for f in ("logp_old", "logp_ref", "logp_teacher", "logp_behaviour", "value", "step_reward")
        },
    )  # fmt: skip
    prepared = prepare(algorithm, everything)
    for need in algorithm.needs - {"old"}:
        fields = [part.removeprefix("Signals.") for part in NEEDED[need].split(" or ")]
        lacking = everything._replace(**dict.fromkeys(fields))
        expected = f"'{algorithm.name}' needs .*Signals.{fields[0]}"
        with pytest.raises(ValueError, match=expected):
            prepare(algorithm, lacking)
        try:
            policy_loss(algorithm, TOKENS[:, :2], lacking, advantage=prepared[0], weight=prepared[1])
            assert need in ("reward", "sampled", "value", "greedy", "steps", "step_end")  # `prepare` is done with it
        except ValueError as error:
            assert re.search(expected, str(error))
    prepare(algorithm, everything._replace(logp_old=None))  # today's policy stands in for it


def test_a_traced_nan_is_not_looked_at():
    """Under jit the reward has no value yet; the NaN shows in the loss, which training refuses."""
    bad = signals(reward=REWARD.at[0, 0].set(jnp.nan))
    advantage, _ = jax.jit(lambda s: prepare(objectives.grpo(), s))(bad)
    assert np.isnan(advantage[0]).all() and np.isfinite(advantage[1]).all()


def test_a_misspelt_setting_is_pythons_own_error():
    with pytest.raises(TypeError, match="cliplow"):
        objectives.grpo(cliplow=0.1)  # type: ignore[call-arg]
