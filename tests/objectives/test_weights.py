from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxreason.objectives.weights import constant_length, group_mean, group_sum, sequence_mean, sequence_sum, token_mean

WEIGHTS = [token_mean, sequence_mean, sequence_sum, partial(constant_length, max_completion_tokens=10)]

# Lengths 3, 1 in one group, 0 (no completion) and 2 in the other: N = 3, and 6 tokens.
MASK = np.array([[[1, 1, 1, 0], [0, 1, 0, 0]], [[0, 0, 0, 0], [1, 0, 0, 1]]], bool)


@pytest.mark.parametrize(
    ("weight", "rows"),
    [
        (WEIGHTS[0], [[1 / 6, 1 / 6], [0, 1 / 6]]),
        (WEIGHTS[1], [[1 / 9, 1 / 3], [0, 1 / 6]]),
        (WEIGHTS[2], [[1 / 3, 1 / 3], [0, 1 / 3]]),
        (WEIGHTS[3], [[1 / 30, 1 / 30], [0, 1 / 30]]),
    ],
)
def test_values(weight, rows):
    expected = np.where(MASK, np.array(rows)[..., None], 0)
    np.testing.assert_allclose(weight(jnp.asarray(MASK)), expected, rtol=1e-6)


@pytest.mark.parametrize("weight", WEIGHTS)
def test_an_all_masked_batch_is_zero(weight):
    np.testing.assert_array_equal(weight(jnp.zeros((2, 3, 4), bool)), np.zeros((2, 3, 4)))


@pytest.mark.parametrize("weight", WEIGHTS)
def test_packed_completions_weigh_what_they_weigh_apart(weight):
    """Lengths 3, 1 and 2 in one row, between padding; ids under the padding may be anything."""
    packed = jnp.asarray([[[True, True, True, False, True, False, True, True, False]]])
    segments = jnp.asarray([[[0, 0, 0, 99, 3, -7, 5, 5, 5]]])
    got = np.asarray(weight(packed, segments=segments))[0, 0]
    apart = np.asarray(weight(jnp.asarray(MASK)))
    np.testing.assert_allclose(got, [*[apart[0, 0, 0]] * 3, 0, apart[0, 1, 1], 0, *[apart[1, 1, 0]] * 2, 0], rtol=1e-6)


def test_pairs_count_as_one():
    """Two pairs, one of them padding: w = 1/1, and 1/|o| in the mean."""
    mask = jnp.asarray([[[True, True, False], [True, False, False]], [[False] * 3] * 2])
    np.testing.assert_allclose(group_sum(mask), mask.astype(float))
    np.testing.assert_allclose(group_mean(mask)[0], [[0.5, 0.5, 0], [1, 0, 0]])


def test_constant_length_checks_its_budget():
    with pytest.raises(ValueError, match="max_completion_tokens is 0"):
        constant_length(jnp.asarray(MASK), max_completion_tokens=0)


def test_counts_whose_product_is_beyond_int32():
    weight = constant_length(jnp.ones((65536, 1, 1), bool), max_completion_tokens=32768)
    np.testing.assert_allclose(weight[0, 0, 0], 2.0**-31)


def test_a_traced_id_out_of_range_is_loud():
    ids = jnp.asarray([[[7, 7, 8, 8]]])
    weight = jax.jit(lambda ids: sequence_mean(jnp.ones((1, 1, 4), bool), segments=ids))(ids)
    assert np.isnan(weight).all()
