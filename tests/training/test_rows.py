"""Rows of problems between the host and the mesh: what a process holds goes there, and comes back, in its order.

With one process, which holds all; with two in tests/test_launch.py and tests/training/test_scoring.py.
"""

from __future__ import annotations

import jax
import numpy as np
import pytest

from jaxreason import sharding

COUNT = 8


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 2, 2), (4, 1, 2), (1, 8, 1)])
def test_rows_there_and_back(shape: tuple[int, int, int]) -> None:
    config = sharding.MeshConfig(*shape)
    mesh = sharding.make_mesh(config, devices=jax.devices()[: int(np.prod(shape))])
    assert sharding.held_rows(mesh, COUNT).tolist() == list(range(COUNT))
    assert sharding.keepers(mesh, COUNT).tolist() == [0] * COUNT
    rng = np.random.default_rng(0)
    given = {"tokens": rng.integers(0, 9, (COUNT, 3, 5), np.int32), "answer": rng.normal(size=COUNT).astype(np.float32)}
    placed = sharding.place_held(mesh, given, COUNT)
    for name, expected in sharding.place(mesh, given, ("problems",)).items():
        assert placed[name].sharding == expected.sharding
        np.testing.assert_array_equal(placed[name], given[name])
    rows = np.asarray([1, 2, 7])
    for name, values in sharding.fetch_held(placed, rows).items():
        np.testing.assert_array_equal(values, given[name][rows])
