"""A verifier's scores of slots against its scores of whole rows."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxreason import sharding
from jaxreason.models import decoder, heads, spec
from jaxreason.models.config import Architecture, Numerics
from jaxreason.models.families import Head
from jaxreason.sampling import engine, verifier
from jaxreason.sampling.engine import Rules
from jaxreason.sampling.law import Law

V, EOS, PAD = 32, 1, 0
RULES = Rules(Law(), (EOS,), PAD)
SIZES: dict[str, Any] = {
    "vocab_size": V,
    "heads": 4,
    "kv_heads": 2,
    "head_size": 8,
    "max_positions": 512,
    "initializer_range": 0.25,
}
POLICY = Architecture(hidden_size=36, layers=1, mlp_size=48, **SIZES)
WINDOWED = Architecture(hidden_size=18, layers=2, mlp_size=24, window=7, attention_layers="wf", tied=False, **SIZES)
LENGTHS, TP = (5, 33, 70), 70


def made(architecture: Architecture, shape: tuple[int, int], **head: Any) -> tuple[decoder.Model, Any]:
    fsdp, tensor = shape
    mesh = sharding.make_mesh(sharding.MeshConfig(fsdp=fsdp, tensor=tensor), devices=jax.devices()[: fsdp * tensor])
    model = decoder.make_decoder(architecture, Numerics(), mesh, **head)
    return model, spec.init(model.specs, jax.random.key(len(head)), dtype="float32", mesh=mesh)


@pytest.mark.parametrize(
    ("head", "shape"), [(Head("sequence", 1), (1, 1)), pytest.param(Head("token", 2), (3, 2), marks=pytest.mark.slow)]
)
def test_scores_of_growing_forked_and_fed_slots_are_those_of_whole_rows(head: Head, shape: tuple[int, int]) -> None:
    """extend, score, fork, append, score: each time as if every prefix were read from its beginning."""
    policy, params = made(POLICY, shape)
    judge, weights = made(WINDOWED, shape, head=head)
    rng = np.random.default_rng(0)
    prompt, mask = np.full((3, TP), PAD, np.int32), np.zeros((3, TP), bool)
    for row, length in enumerate(LENGTHS):
        prompt[row, TP - length :], mask[row, TP - length :] = rng.integers(2, V, length), True
    root, keys = jnp.repeat(jnp.arange(3, dtype=jnp.int32), 2), jax.random.split(jax.random.key(3), 6)
    fed, count = jnp.asarray(rng.integers(2, V, (6, 3)), jnp.int32), jnp.asarray([3, 0, 1, 0, 2, 3], jnp.int32)
    parent = jnp.asarray([1, 1, 3, 2, 5, 5], jnp.int32)  # of the same prompts

    @partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
    def run(params: Any, weights: Any) -> Any:
        params, weights = policy.prepare_sampling(params), judge.prepare_sampling(weights)
        roots = engine.open(policy, params, jnp.asarray(prompt), jnp.asarray(mask), rules=RULES)
        read = verifier.open(judge, weights, jnp.asarray(prompt), jnp.asarray(mask))
        slots = engine.seat(policy, roots, root, keys, tokens=140, rules=RULES)
        readings = verifier.begin(judge, read, root, tokens=140)
        found = []

        def look(slots: Any, readings: Any) -> Any:
            scores, readings = verifier.score(judge, weights, read, readings, slots)
            found.append((scores, slots.record.tokens, slots.record.length, readings.length))
            return readings

        readings = look(slots, readings)
        slots = engine.extend(policy, params, roots, slots, rules=RULES, limit=jnp.asarray([80, 20, 9, 40, 1, 130]))
        readings = look(slots, readings)
        slots = engine.fork(policy, slots, parent, keys)
        readings = verifier.fork(judge, readings, parent)
        slots = engine.append(policy, params, roots, slots, fed, count, rules=RULES)
        readings = look(slots, readings)
        look(engine.extend(policy, params, roots, slots, rules=RULES, limit=jnp.full(6, 135)), readings)
        return found

    stages = jax.tree.map(np.asarray, run(params, weights))
    lengths = [stage[2].tolist() for stage in stages]
    assert lengths[0] == [0] * 6 and len({*lengths[1]}) > 3 and max(lengths[3]) > verifier.PIECE
    whole = jax.jit(partial(heads.sequence_scores, judge))
    for scores, tokens, length, read in stages:
        assert (read == length).all()
        rows = [np.concatenate([prompt[r][mask[r]], tokens[s, : length[s]]]) for s, r in enumerate(np.asarray(root))]
        width = 210
        padded = np.stack([np.pad(row, (0, width - len(row))) for row in rows])
        expected = whole(weights, padded, np.arange(width)[None] < np.asarray([len(row) for row in rows])[:, None])
        assert scores.shape == (6, head.labels)
        np.testing.assert_allclose(scores, expected, atol=2e-5)
