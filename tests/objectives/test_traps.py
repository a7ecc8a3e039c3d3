"""Bugs that well-known projects shipped or reported, each a test named after what it prevents.

Most are also instances of a property that `test_invariances` checks for every algorithm; here each stands alone, small
enough to see the bug, and where it can be shown the wrong answer is computed beside the right one.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jaxreason import objectives
from jaxreason.objectives import Algorithm, Signals, coefficients, policy_loss, prepare, shaping, weights
from jaxreason.objectives.advantages import at_last_token, gae, group_zscore, kl_in_reward, return_to_go
from jaxreason.objectives.kl import kl_k3, reference_pull

WEIGHTS = [
    weights.token_mean,
    weights.sequence_mean,
    weights.sequence_sum,
    partial(weights.constant_length, max_completion_tokens=10),
]


@pytest.fixture(autouse=True)
def float64() -> Iterator[None]:
    with jax.enable_x64(True):
        yield


def row(*values: float) -> jax.Array:
    return jnp.asarray([[values]], jnp.result_type(float))


def flags(*values: int) -> jax.Array:
    return jnp.asarray([[values]], bool)


def batch(problems: int = 4, group: int = 2, tokens: int = 6) -> tuple[jax.Array, Signals]:
    rng = np.random.default_rng(0)
    shape = (problems, group, tokens)
    logp = jnp.asarray(rng.normal(-1, 0.3, shape))
    lengths = np.arange(problems * group).reshape(problems, group, 1) % tokens + 1
    return logp, Signals(
        mask=jnp.asarray(np.arange(tokens) < lengths),
        reward=jnp.asarray(rng.normal(size=shape[:2])),
        **{f: logp + jnp.asarray(rng.normal(0, 0.3, shape)) for f in ("logp_old", "logp_ref", "logp_behaviour")},
    )


def loss_and_gradient(algorithm: Algorithm, logp: jax.Array, signals: Signals) -> tuple[jax.Array, jax.Array]:
    advantage, weight = prepare(algorithm, signals)
    return jax.value_and_grad(lambda x: policy_loss(algorithm, x, signals, advantage=advantage, weight=weight)[0])(logp)


def close(a: object, b: object) -> None:
    np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-13)  # type: ignore[arg-type]


# ------------------------------------------------- what the loss is divided by


def test_t1_a_mean_over_micro_batches_of_their_means():
    """Slices of a prepared batch add up; means of the slices' own means would weigh short slices more."""
    logp, signals = batch()
    algorithm = objectives.dapo()
    whole, _ = loss_and_gradient(algorithm, logp, signals)
    advantage, weight = prepare(algorithm, signals)
    parts = [(logp[i : i + 2], jax.tree.map(lambda x, i=i: x[i : i + 2], (signals, advantage, weight))) for i in (0, 2)]
    close(sum(policy_loss(algorithm, x, s, advantage=a, weight=w)[0] for x, (s, a, w) in parts), whole)
    mean_of_means = np.mean([float(loss_and_gradient(algorithm, x, s)[0]) for x, (s, _, _) in parts])
    assert abs(mean_of_means - whole) > 1e-3


def test_t2_a_second_division_by_the_number_of_micro_batches():
    logp, signals = batch()
    algorithm = objectives.grpo()
    advantage, weight = prepare(algorithm, signals)

    def part(x: jax.Array, i: int) -> jax.Array:
        s, a, w = jax.tree.map(lambda x: x[i : i + 1], (signals, advantage, weight))
        return policy_loss(algorithm, x[i : i + 1], s, advantage=a, weight=w)[0]

    accumulated = sum(jax.grad(part)(logp, i) for i in range(4))
    close(accumulated, loss_and_gradient(algorithm, logp, signals)[1])


@pytest.mark.parametrize("weight", WEIGHTS)
def test_t3_a_power_too_many_of_the_number_of_devices(weight):
    mask = batch(problems=8)[1].mask
    mesh = Mesh(np.array(jax.devices()[:8]), ("data",), axis_types=(AxisType.Auto,))
    sharded = jax.jit(weight)(jax.device_put(mask, NamedSharding(mesh, PartitionSpec("data"))))
    close(sharded, weight(mask))


@pytest.mark.parametrize("weight", WEIGHTS)
def test_t4_a_loss_that_shrinks_as_the_batch_grows(weight):
    """The same batch twice is the same mean: each token weighs half."""
    mask = batch()[1].mask
    close(weight(jnp.concatenate([mask, mask]))[:4], weight(mask) / 2)


def test_t5_dr_grpos_divisor_tied_to_the_padded_width():
    logp, signals = batch()
    algorithm = objectives.dr_grpo(max_completion_tokens=100)
    loss, gradient = loss_and_gradient(algorithm, logp, signals)
    per_token = {"mask", "logp_old", "logp_ref", "logp_behaviour"}
    wide = Signals(**{f: jnp.pad(x, ((0, 0), (0, 0), (0, 7))) if f in per_token else x for f, x in signals._asdict().items()})
    wide_loss, wide_gradient = loss_and_gradient(algorithm, jnp.pad(logp, ((0, 0), (0, 0), (0, 7))), wide)
    close([wide_loss, jnp.max(wide_gradient)], [loss, jnp.max(gradient)])


@pytest.mark.parametrize("weight", WEIGHTS)
def test_t6_truncated_completions_that_leave_the_numerator_and_stay_in_the_denominator(weight):
    mask = jnp.ones((2, 2, 3), bool)
    kept = shaping.without_truncated(mask, jnp.asarray([[True, False], [True, False]]))
    close(weight(kept)[:, 1], weight(mask[:, 1:])[:, 0])


def test_t7_one_norm_for_the_policy_loss_and_another_for_its_kl_term():
    """All rewards equal, so only the pull is left: it has the weight of the algorithm."""
    logp, signals = batch()
    signals = signals._replace(reward=jnp.zeros_like(signals.reward))
    for algorithm in (objectives.grpo(beta=0.3), objectives.dr_grpo(beta=0.3), objectives.gspo(beta=0.3)):
        pull, _ = reference_pull(logp, signals.logp_ref, signals.mask, kind="k3")
        close(loss_and_gradient(algorithm, logp, signals)[1], -prepare(algorithm, signals)[1] * 0.3 * pull)


def test_t8_a_length_bias_that_nobody_chose():
    """1/|o| punishes a long wrong answer less per token; a constant does not. Which one it is stands in the name."""
    mask = jnp.asarray([[[True] * 4, [True, False, False, False]]])
    assert weights.sequence_mean(mask)[0, 0, 0] == weights.sequence_mean(mask)[0, 1, 0] / 4
    assert (
        weights.constant_length(mask, max_completion_tokens=9)[0, 0, 0]
        == weights.constant_length(mask, max_completion_tokens=9)[0, 1, 0]
    )


def test_t9_a_micro_batch_without_a_token_is_zero_over_zero():
    logp, signals = batch()
    signals = signals._replace(mask=signals.mask.at[0].set(False))
    algorithm = objectives.grpo()
    advantage, weight = prepare(algorithm, signals)
    s, a, w = jax.tree.map(lambda x: x[:1], (signals, advantage, weight))
    loss, aux = policy_loss(algorithm, logp[:1], s, advantage=a, weight=w)
    assert loss == 0 and all(np.isfinite(x).all() for x in aux.values())


# ------------------------------------------------- clips and ratios


def test_t10_the_larger_branch_where_the_advantage_is_negative():
    """Taking max for A < 0 inverts both cells: it would drop ratio 1.5 and keep 0.5."""
    coefficient, _ = coefficients.clipped(
        row(*np.log([0.5, 1.0, 1.5])), row(0, 0, 0), row(-1, -1, -1), flags(1, 1, 1), clip_low=0.2, clip_high=0.2
    )
    close(coefficient, row(0, -1, -1.5))


def test_t11_a_clipped_importance_weight_that_carries_gradient_or_an_absolute_cap():
    logp, old, a, mask = row(np.log(2.0)), row(0), row(1), flags(1)

    def objective(x: jax.Array) -> jax.Array:
        return jnp.sum(coefficients.clipped_importance(x, old, a, mask, clip_low=1.0, clip_high=4.0)[1])

    close(jax.grad(objective)(logp), row(2))  # with gradient through the weight it would be 2 + 2 log 2
    capped, _ = coefficients.clipped_importance(logp, old, a, mask, clip_low=1.0, clip_high=0.2)
    close(capped, row(1.2))  # 0.2 is a distance from 1 and not the largest weight


@pytest.mark.parametrize("algorithm", [objectives.grpo(), objectives.gspo(), objectives.ppo(), objectives.dapo()])
def test_t12_a_ratio_that_is_not_one_on_the_first_update(algorithm: Algorithm):
    logp, signals = batch()
    signals = signals._replace(logp_old=None, value=jnp.zeros_like(logp))
    advantage, weight = prepare(algorithm, signals)
    _, aux = policy_loss(algorithm, logp, signals, advantage=advantage, weight=weight)
    assert aux["policy/ratio_min"] == aux["policy/ratio_max"] == 1 and aux["policy/clip_fraction"] == 0


def test_t18_a_clip_around_a_recomputed_policy_while_another_one_sampled():
    """Decoupled: what sampled enters as its own weight, and moves no clip."""
    logp, signals = batch()
    plain, _ = coefficients.clipped(logp, signals.logp_old, jnp.ones_like(logp), signals.mask, clip_low=0.2, clip_high=0.2)
    ours, _ = coefficients.decoupled(
        logp, signals.logp_old, signals.logp_behaviour, jnp.ones_like(logp), signals.mask, clip_low=0.2, clip_high=0.2
    )
    close(ours, plain * jnp.exp(signals.logp_old - signals.logp_behaviour))
    assert ((np.asarray(plain) == 0) == (np.asarray(ours) == 0)).all()


def test_t19_a_sequence_ratio_that_averages_over_padding():
    """Two chosen tokens at log-ratio 1 in a row of eight: s is e, not e^(1/4)."""
    ratio = coefficients.sequence_ratio(row(*[1.0] * 8), row(*[0.0] * 8), flags(1, 1, 0, 0, 0, 0, 0, 0))
    close(ratio[0, 0, 0], np.e)


def test_t20_a_sequence_mask_that_clamps_tokens_instead():
    factor = coefficients.sampler_correction(
        row(*np.log([0.5, 3.0])), row(0, 0), flags(1, 1), kind="sequence_mask", low=0.5, high=2.0
    )
    close(factor, row(0.5, 3.0))  # the product is in range, so the tokens keep their own weights, 3 among them
    dropped = coefficients.sampler_correction(
        row(*np.log([2.0, 3.0])), row(0, 0), flags(1, 1), kind="sequence_mask", low=0.5, high=2.0
    )
    close(dropped, row(0, 0))


# ------------------------------------------------- divergences


def test_t21_k1_in_the_loss_for_a_regulariser():
    """Its pull is -1 whatever the distance; the ones that regularise grow with it."""
    near, far = row(0.1), row(5.0)
    for kind, grows in (("k1", False), ("k2", True), ("k3", True), ("weighted_k3", True)):
        sizes = [abs(reference_pull(x, row(0.0), flags(1), kind=kind)[0].item()) for x in (near, far)]
        assert (sizes[1] > sizes[0]) == grows


def test_t22_a_k3_that_overflows():
    with jax.enable_x64(False):
        value = kl_k3(jnp.full((1, 1, 1), -800.0), jnp.zeros((1, 1, 1)), flags(1))
    assert value.dtype == jnp.float32 and np.isfinite(value).all()


def test_t23_a_sequences_weight_spread_over_each_tokens_divergence():
    """GSPO's ratio is a completion's; its pull is weighted by each token's own ratio."""
    logp, signals = batch()
    signals = signals._replace(reward=jnp.zeros_like(signals.reward))
    algorithm = objectives.gspo(beta=1.0, kl="weighted_k3")
    advantage, weight = prepare(algorithm, signals)
    _, aux = policy_loss(algorithm, logp, signals, advantage=advantage, weight=weight)
    expected = -jnp.exp(logp - signals.logp_old) * (logp - signals.logp_ref)
    close(aux["coefficient"], jnp.where(signals.mask, expected, 0.0))


def test_t24_a_divergence_over_a_tools_tokens():
    logp, signals = batch()
    hole = signals.mask.at[:, :, 1].set(False)
    tool = signals._replace(mask=hole, logp_ref=signals.logp_ref.at[:, :, 1].set(-300.0))
    for algorithm in (objectives.grpo(beta=1.0), objectives.rloo(beta=1.0), objectives.reinforce_plus_plus(beta=1.0)):
        loss, gradient = loss_and_gradient(algorithm, logp, tool)
        other, expected = loss_and_gradient(algorithm, logp, tool._replace(logp_ref=signals.logp_ref))
        close(loss, other)
        close(gradient, expected)


# ------------------------------------------------- advantages


def test_t25_completions_of_one_problem_in_different_groups():
    """The group is an axis: what another problem's completions earned is not seen, equal prompts or not."""
    _, signals = batch()
    other = signals._replace(reward=signals.reward.at[1:].add(100.0))
    for algorithm in (objectives.grpo(), objectives.rloo(), objectives.dr_grpo(), objectives.maxrl()):
        positive = [s._replace(reward=jnp.abs(s.reward)) for s in (signals, other)]
        close(*(prepare(algorithm, s)[0][0] for s in positive))


def test_t26_equal_rewards_that_rounding_makes_different():
    with jax.enable_x64(False):
        for value, group in ((0.7, 7), (0.1, 7), (1.1, 16)):
            advantage = group_zscore(jnp.full((1, group), value), epsilon=1e-9)
            assert advantage.dtype == jnp.float32 and (np.asarray(advantage) == 0).all()


def test_t27_a_standard_deviation_that_does_not_say_which():
    reward = jnp.asarray([[1.0, 0.0, 0.0, 0.0]])
    close(group_zscore(reward, ddof=1, epsilon=0.0), group_zscore(reward, ddof=0, epsilon=0.0) * np.sqrt(3 / 4))


def test_t28_a_group_of_one_whose_advantage_is_its_reward(unchecked: None):
    with pytest.raises(ValueError, match="a group of 1"):
        group_zscore(jnp.ones((3, 1)))


def test_t29_a_format_reward_that_teaches_from_groups_without_a_right_answer():
    correct = jnp.asarray([[False, False], [False, True]])
    total = correct.astype(float) + 0.1 * jnp.asarray([[1.0, 0.0], [1.0, 0.0]])  # the first group differs in format only
    np.testing.assert_array_equal(shaping.dynamic_sampling(correct), [False, True])
    assert not objectives.advantages.zero_variance(total)[0]  # the reward alone would have kept it


def test_t30_gae_through_a_tools_tokens():
    """chosen, tool, chosen: credit passes undiminished, the tool's slot counts neither for discount nor for value."""
    mask = flags(1, 0, 1, 0)
    with_tool = gae(row(0, 9, 1, 9), row(0.2, 50, 0.4, 50), mask, discount=0.9, lambda_=0.8)
    without = gae(row(0, 1), row(0.2, 0.4), flags(1, 1), discount=0.9, lambda_=0.8)
    close(with_tool[0, 0, jnp.asarray([0, 2])], without[0, 0])


def test_t30_a_final_reward_on_a_slot_that_nobody_chose():
    close(at_last_token(jnp.asarray([[1.0]]), flags(1, 1, 0, 0)), row(0, 1, 0, 0))


def test_t30_a_truncated_completion_taken_for_a_finished_one():
    """Cut off, it goes on in the value behind it; finished, that value does not exist."""
    signals = Signals(
        mask=flags(1, 1),
        reward=jnp.zeros((1, 1)),
        value=row(0.0, 0.5),
        value_behind=jnp.asarray([[0.8]]),
        truncated=jnp.asarray([[True]]),
    )
    algorithm = objectives.ppo(lambda_=0.0)
    close(prepare(algorithm, signals)[0], row(0.5, 0.8 - 0.5))
    close(prepare(algorithm, signals._replace(truncated=jnp.asarray([[False]])))[0], row(0.5, 0.0 - 0.5))


def test_t31_a_return_that_a_tools_tokens_cut_off_from_earlier_turns():
    close(return_to_go(row(0, 0, 1), flags(1, 0, 1)), row(1, 0, 1))


def test_t32_rewards_taken_for_returns_and_divergence_on_padding():
    rewards = kl_in_reward(jnp.asarray([[1.0]]), row(-1, -1, -9), row(-2, -2, 90), flags(1, 1, 0), beta=0.1)
    close(rewards, row(-0.1, 0.9, 0))
    close(return_to_go(rewards, flags(1, 1, 0)), row(0.8, 0.9, 0))


# ------------------------------------------------- numerics


def test_t40_infinite_log_probabilities_under_the_mask_that_make_gradients_nan():
    old, a, mask = row(-1, -jnp.inf), row(1, 1), flags(1, 0)

    def single(x: jax.Array) -> jax.Array:
        return jnp.sum(jnp.where(mask, jnp.exp(x - old) * a, 0.0))

    def ours(x: jax.Array) -> jax.Array:
        return jnp.sum(coefficients.clipped(x, old, a, mask, clip_low=0.2, clip_high=0.2)[1])

    logp = row(-1, -jnp.inf)
    assert np.isnan(jax.grad(single)(logp)).any()  # one `where` behind the exp: finite value, NaN gradient
    close(jax.grad(ours)(logp), row(1, 0))


@pytest.mark.parametrize("advantage", [2.0, -2.0])
def test_t41_a_gradient_that_ties_split_at_the_clips_edge(advantage: float):
    """Exactly on the bound the token is kept, at both bounds; `minimum` of equal branches gives half or 3/4 of it."""
    for ratio, clips in ((1.25, {"clip_low": 0.2, "clip_high": 0.25}), (0.75, {"clip_low": 0.25, "clip_high": 0.2})):
        assert coefficients.kept_by_clip(row(ratio), row(advantage), **clips).all()
    coefficient, _ = coefficients.clipped(row(0), row(0), row(advantage), flags(1), clip_low=0.0, clip_high=0.0)
    close(coefficient, row(advantage))

    def tied(x: jax.Array) -> jax.Array:
        ratio = jnp.exp(x)
        return jnp.sum(jnp.minimum(ratio * advantage, jnp.clip(ratio, 1.0, 1.0) * advantage))

    assert abs(jax.grad(tied)(row(0.0)).item()) < abs(advantage)


def test_t42_a_straight_through_value_that_loses_its_digits_in_bfloat16():
    """The value is the textbook's to float32, whatever the size of the surrogate that is added and taken away."""
    with jax.enable_x64(False):
        mask = jnp.ones((1, 2, 512), bool)
        logp = jnp.full(mask.shape, -20.0, jnp.bfloat16)
        signals = Signals(mask=mask, reward=jnp.asarray([[1.0, 0.0]]), logp_ref=logp)
        algorithm = objectives.grpo(beta=1.0)
        advantage, weight = prepare(algorithm, signals)
        loss, _ = policy_loss(algorithm, logp, signals, advantage=advantage * 1000, weight=weight)
    assert loss.dtype == jnp.float32
    np.testing.assert_allclose(loss, 0.0, atol=1e-3)  # x - sg(x) around -20,000 in bfloat16 would be off by up to 64
