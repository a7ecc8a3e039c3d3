from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxreason.objectives.advantages import group_centre, group_zscore, leave_one_out, zero_variance

BASELINES = [group_zscore, group_centre, leave_one_out]


@pytest.mark.parametrize("baseline", BASELINES)
@pytest.mark.parametrize(("value", "size"), [(0.7, 7), (0.1, 7), (1.1, 16), (0.0, 4), (-0.3, 5), (0.7, 1)])
def test_equal_rewards_give_exactly_zero_in_float32(baseline, value: float, size: int):
    reward = jnp.full((2, size), value, jnp.float32).at[1].set(jnp.arange(size, dtype=jnp.float32))
    for function in (baseline, jax.jit(baseline)):
        advantage = function(reward)
        assert advantage.dtype == jnp.float32
        assert (np.asarray(advantage[0]) == 0).all()
        assert size == 1 or np.abs(advantage[1]).min() < np.abs(advantage[1]).max()


def test_the_float32_hazard_is_real():
    """Without the max == min rule the group above would be pushed: this is the test that it guards anything."""
    reward = np.full(7, 0.7, np.float32)
    mean = np.float32(reward.sum(dtype=np.float32) / np.float32(7))
    std = np.sqrt(((reward - mean) ** 2).mean(dtype=np.float32))
    assert abs((reward[0] - mean) / (std + np.float32(1e-8))) > 0.1


def test_values():
    reward = jnp.asarray([[1.0, 0.0, 0.0, 1.0], [2.0, 3.0, 5.0, 7.0]])
    r = np.asarray(reward)
    centred = r - r.mean(1, keepdims=True)
    np.testing.assert_allclose(group_centre(reward), centred, rtol=1e-6)
    np.testing.assert_allclose(leave_one_out(reward), [[r_ - (sum(g) - r_) / 3 for r_ in g] for g in r], rtol=1e-6)
    for ddof in (0, 1):
        expected = centred / (r.std(1, ddof=ddof, keepdims=True) + 1e-3)
        np.testing.assert_allclose(group_zscore(reward, ddof=ddof, epsilon=1e-3), expected, rtol=1e-6)
    np.testing.assert_array_equal(zero_variance(jnp.asarray([[0.7] * 3, [0.7, 0.7, 0.8]])), [True, False])


@pytest.mark.parametrize("baseline", BASELINES)
def test_a_nan_reward_is_not_hidden(baseline):
    advantage = baseline(jnp.asarray([[1.0, jnp.nan, 0.0], [1.0, 0.0, 0.0]]))
    assert np.isnan(advantage[0]).all() and np.isfinite(advantage[1]).all()


def test_ddof_is_checked():
    with pytest.raises(ValueError, match="ddof is 2"):
        group_zscore(jnp.ones((1, 2)), ddof=2)
