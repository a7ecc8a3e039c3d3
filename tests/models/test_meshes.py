"""Every family class computes on every mesh what it computes on one device: in float64 to 1e-9, in float32 loosely.

Logits, an update (loss, gradients, parameters after it) and sampled tokens. Adam's first moment after one update is the clipped
gradient times a constant, so comparing the state compares the gradients.
"""

from __future__ import annotations

import dataclasses
from functools import cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

from jaxreason import objectives, sharding
from jaxreason.batch import PromptBatch, RolloutBatch, TrainState
from jaxreason.models import cache as caches
from jaxreason.models import decoder, spec
from jaxreason.models.config import Architecture, Experts, Latent, Numerics, Rope
from jaxreason.models.decoder import Model
from jaxreason.sampling.rollout import sample
from jaxreason.training import state as states
from jaxreason.training.optimizer import OptimizerConfig, make_optimizer
from jaxreason.training.step import Split, make_update

Shape = tuple[int, int, int, int, int]  # data, fsdp, expert, sequence, tensor
ONE: Shape = (1, 1, 1, 1, 1)
QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}  # to compile
if jax.__version_info__ < (0, 11):
    QUICK["xla_cpu_use_fusion_emitters"] = False  # half the time; later versions have no such switch
P, G, TP, T = 8, 2, 6, 7  # neither 6 nor 7 places are a multiple of 4
SIZES: dict[str, Any] = {
    "vocab_size": 56,
    "hidden_size": 32,
    "layers": 2,
    "heads": 8,
    "kv_heads": 4,
    "head_size": 12,
    "mlp_size": 40,
    "max_positions": 64,
}
SHARED = Experts(8, 3, 24, 20, "sigmoid", groups=4, chosen_groups=2, scale=2.5)
LATENT = Latent(kv_rank=16, q_rank=24, rotated=4, value_size=10)
ARCHITECTURES = {
    "dense": Architecture(family="llama", tied=False, rope=Rope(1000.0, "llama3", 8.0, 16), **SIZES),
    "windowed": Architecture(family="gemma3_text", window=4, attention_layers="wf", window_rope=Rope(100.0), **SIZES),
    "capped": Architecture(family="gemma2", window=3, attention_layers="wf", attention_softcap=5.0, final_softcap=4.0, **SIZES),
    "experts": Architecture(family="qwen3_moe", tied=False, experts=Experts(count=8, chosen=2, mlp_size=24), **SIZES),
    "latent": Architecture(family="deepseek_v3", tied=False, experts=SHARED, latent=LATENT, **SIZES | {"kv_heads": 8}),
    "latent, dense and sparse": Architecture(
        family="deepseek_v3",
        tied=False,
        experts=dataclasses.replace(SHARED, layers="dss"),
        latent=LATENT,
        **SIZES | {"kv_heads": 8, "layers": 3},
    ),
}


class Made(NamedTuple):
    mesh: Mesh
    model: Model
    params: Any
    reference: Any


def make(name: str, shape: Shape, dtype: str) -> Made:
    data, fsdp, expert, sequence, tensor = shape
    config = sharding.MeshConfig(data, fsdp, tensor, sequence, expert)
    mesh = sharding.make_mesh(config, devices=jax.devices()[: int(np.prod(shape))])
    architecture = ARCHITECTURES[name]
    chunk = 2 * P  # in tokens, so that logits are made in several
    model = decoder.make_decoder(architecture, Numerics(dtype, dtype, logits_chunk_tokens=chunk), mesh)
    model = model._replace(balance_weight=0.1 if architecture.experts.count else 0.0)
    spec.check_divisible(model.specs, mesh)
    rng = np.random.default_rng(2)

    def draw(each: spec.ParamSpec) -> jax.Array:
        return jax.device_put(rng.normal(0.0, 0.3, each.shape).astype(dtype), sharding.named(mesh, each.axes))

    return Made(mesh, model, spec.tree_map(draw, model.specs), spec.tree_map(draw, model.specs))


def prompts(mesh: Mesh) -> PromptBatch:
    rng = np.random.default_rng(0)
    mask = np.arange(TP)[None] >= rng.integers(0, TP - 1, (P, 1))
    tokens = rng.integers(0, SIZES["vocab_size"], (P, TP)).astype(np.int32)
    batch = PromptBatch(tokens, mask, np.arange(P, dtype=np.uint32), np.zeros(P, np.int32))  # pyright: ignore[reportArgumentType]
    return sharding.place(mesh, batch, ("problems",))


def rollouts(mesh: Mesh, dtype: str) -> RolloutBatch:
    """Completions of uneven lengths, not sampled by the policy that learns from them."""
    rng = np.random.default_rng(1)
    tokens = rng.integers(0, SIZES["vocab_size"], (P, G, T)).astype(np.int32)
    mask = np.arange(T) < rng.integers(1, T + 1, (P, G, 1))
    given = sharding.fetch(prompts(mesh))
    host = RolloutBatch(
        prompt=given.prompt,
        prompt_mask=given.prompt_mask,
        completion=tokens,  # pyright: ignore[reportArgumentType]
        mask=mask,  # pyright: ignore[reportArgumentType]
        truncated=mask.all(-1),
        logp_behaviour=np.where(mask, rng.normal(-3.5, 0.2, mask.shape), 0.0).astype(dtype),  # pyright: ignore[reportArgumentType]
        reward=np.arange(P * G, dtype=np.float32).reshape(P, G) % 3,
    )
    return sharding.place(mesh, host, ("problems",))


# ---------------------------------------------------------------------------------------------------------------- one update

# of each class the first is in the fast suite
MESHES: dict[str, tuple[Shape, ...]] = {
    "dense": ((1, 2, 1, 2, 2), (8, 1, 1, 1, 1), (2, 4, 1, 1, 1), (1, 4, 1, 1, 2), (2, 1, 1, 4, 1)),
    "windowed": ((2, 1, 1, 2, 2), (8, 1, 1, 1, 1), (1, 8, 1, 1, 1), (1, 2, 1, 1, 4), (1, 2, 1, 4, 1)),
    "experts": ((1, 2, 2, 1, 2), (1, 1, 8, 1, 1), (2, 1, 2, 2, 1), (1, 2, 1, 2, 2), (4, 1, 1, 1, 2)),
    "latent": ((1, 1, 2, 2, 2), (1, 1, 8, 1, 1), (2, 4, 1, 1, 1), (1, 4, 1, 1, 2), (2, 1, 2, 2, 1)),
}
MORE: dict[str, tuple[Shape, ...]] = {
    "capped": ((1, 2, 1, 2, 2), (2, 2, 1, 1, 2)),
    "latent, dense and sparse": ((1, 2, 2, 1, 2), (1, 2, 1, 2, 2)),
}


def each_mesh() -> list[Any]:
    every = [(name, shape) for meshes in (MESHES, MORE) for name, shapes in meshes.items() for shape in shapes]
    first = [("dense", MESHES["dense"][0]), ("windowed", MESHES["windowed"][0])]
    return [each if each in first else pytest.param(*each, marks=pytest.mark.slow) for each in every]


@cache
def updated(name: str, shape: Shape, dtype: str, *, per_microbatch: int = P) -> tuple[Any, Any, Any]:
    """Logits of rows of several segments, the state after one update, and its metrics; of one program."""
    mesh, model, params, reference = make(name, shape, dtype)
    optimizer = make_optimizer(OptimizerConfig(learning_rate=1e-2), steps=4)
    update = make_update(model, objectives.grpo(beta=0.04), optimizer, temperature=0.9, split=Split(P, per_microbatch))
    at, everywhere = states.shardings(model, optimizer, mesh), sharding.named(mesh)

    def run(params: Any, reference: Any, batch: RolloutBatch) -> Any:
        state = TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params))
        segments = jnp.asarray([[0, 1, 1, 1, 2, 2, 0]] * P, jnp.int32)
        hidden = model.hidden(params, batch.completion[:, 0], segments)
        logits = model.project(params, hidden.reshape(P * T, -1)).reshape(P, T, -1)
        return logits[:, 1:-1], *update(state, reference, batch)[:2]  # what stands at padding means nothing

    jitted = jax.jit(run, out_shardings=(everywhere, at, everywhere), compiler_options=QUICK)
    return jitted(params, reference, rollouts(mesh, dtype))


def assert_close(given: Any, expected: Any, *, tolerance: float) -> None:
    assert jax.tree.structure(given) == jax.tree.structure(expected)
    for (path, a), b in zip(jax.tree.leaves_with_path(given), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance, err_msg=jax.tree_util.keystr(path))


@pytest.mark.parametrize(("name", "shape"), each_mesh())
def test_an_update_is_the_same_on_every_mesh(name: str, shape: Shape) -> None:
    with jax.enable_x64(True):
        given, expected = (sharding.fetch(updated(name, each, "float64")) for each in (shape, ONE))
    assert expected[2]["optimizer/gradient_norm"] > 0.01 and np.std(expected[0]) > 0.1
    moved = {jax.tree_util.keystr(path) for path, x in jax.tree.leaves_with_path(expected[1].opt_state[1][0].mu) if np.any(x != 0)}
    everything = {jax.tree_util.keystr(path) for path, _ in jax.tree.leaves_with_path(expected[1].params)}
    assert everything - moved == {path for path in everything if "router_bias" in path}  # all but these have a gradient
    assert_close(given, expected, tolerance=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "shape"), [("dense", (1, 2, 1, 2, 2)), ("experts", (1, 2, 2, 1, 2)), ("latent", (2, 1, 2, 2, 1))])
def test_microbatches_too(name: str, shape: Shape) -> None:
    with jax.enable_x64(True):
        given, expected = (sharding.fetch(updated(name, each, "float64", per_microbatch=4)) for each in (shape, ONE))
    assert_close(given, expected, tolerance=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "shape"),
    [("dense", (1, 2, 1, 2, 2)), ("windowed", (2, 1, 1, 2, 2)), ("experts", (1, 2, 2, 1, 2)), ("latent", (2, 1, 2, 2, 1))],
)
def test_an_update_in_float32_is_nearly_so(name: str, shape: Shape) -> None:
    given, expected = (sharding.fetch(updated(name, each, "float32")) for each in (shape, ONE))
    assert_close(given[0], expected[0], tolerance=1e-3)
    assert_close(given[1].opt_state, expected[1].opt_state, tolerance=1e-3)  # where a gradient is near 0, so is not Adam's step
    assert_close(given[2]["policy/loss"], expected[2]["policy/loss"], tolerance=1e-4)


# by hand from the architectures: on fsdp 2 x expert 2 x tensor 2, and on expert 2 x sequence 2 x tensor 2
SHARDS = {
    ("experts", (1, 2, 2, 1, 2)): {
        "layers/expert_gate": (2, 8 // 2, 32 // 2, 24 // 2),
        "layers/expert_down": (2, 8 // 2, 24 // 2, 32 // 2),
        "layers/router": (2, 32 // 2, 8),
        "layers/q": (2, 32 // 2, 8 // 2, 12),
        "layers/q_norm": (2, 12),
        "head": (32 // 2, 56 // 2),
    },
    ("latent", (1, 1, 2, 2, 2)): {
        "layers/q_a": (2, 32, 24),
        "layers/q_b": (2, 24, 8 // 2, 12),
        "layers/kv_a": (2, 32, 16 + 4),
        "layers/kv_b": (2, 16, 8 // 2, 12 - 4 + 10),
        "layers/o": (2, 8 // 2, 10, 32),
        "layers/router_bias": (2, 8),
        "layers/shared_down": (2, 20 // 2, 32),
        "layers/expert_up": (2, 8 // 2, 32, 24 // 2),
        "embed": (56 // 2, 32),
    },
}


@pytest.mark.parametrize(("name", "shape"), SHARDS)
def test_moments_lie_where_their_parameters_do(name: str, shape: Shape) -> None:
    with jax.enable_x64(True):
        state = updated(name, shape, "float64")[1]
    adam = state.opt_state[1][0]
    for tree in (state.params, adam.mu, adam.nu):
        leaves = {jax.tree_util.keystr(path, simple=True, separator="/"): x for path, x in jax.tree.leaves_with_path(tree)}
        for path, own in SHARDS[name, shape].items():
            assert {each.data.shape for each in leaves[path].addressable_shards} == {own}, path
    for moment in (adam.mu, adam.nu):
        at = [(a.sharding, b.sharding) for a, b in zip(*map(jax.tree.leaves, (moment, state.params)), strict=True)]
        assert all(mine.is_equivalent_to(theirs, 8) for mine, theirs in at)


# ------------------------------------------------------------------------------------------------------------------ sampling


@cache
def sampled(name: str, shape: Shape, unrolled: bool) -> Any:
    mesh, model, params, _ = make(name, shape, "float64")
    run = partial(sample, model, group=G, max_completion_tokens=T, eos_ids=(1,), pad_id=0, temperature=1.3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(caches, "UNROLLED_LAYERS", 8 if unrolled else 0)
        jitted = jax.jit(lambda params, batch: run(params, batch, jax.random.key(5)), compiler_options=QUICK)
        return sharding.fetch(jitted(params, prompts(mesh)))


@pytest.mark.parametrize(
    ("name", "shape", "unrolled"),
    [
        ("windowed", (2, 1, 1, 1, 4), True),
        ("latent", (1, 2, 2, 1, 2), False),
        *(
            pytest.param(*each, marks=pytest.mark.slow)
            for each in (
                ("dense", (1, 2, 1, 2, 2), True),
                ("dense", (2, 2, 1, 1, 2), False),
                ("windowed", (1, 2, 1, 2, 2), False),
                ("capped", (1, 2, 1, 2, 2), False),
                ("experts", (1, 2, 2, 1, 2), False),
                ("experts", (2, 1, 2, 2, 1), True),
                ("latent", (1, 1, 2, 2, 2), True),
                ("latent, dense and sparse", (2, 2, 1, 1, 2), True),
            )
        ),
    ],
)
def test_tokens_are_the_same_on_every_mesh(name: str, shape: Shape, unrolled: bool) -> None:
    with jax.enable_x64(True):
        given, expected = sampled(name, shape, unrolled), sampled(name, ONE, unrolled)
    assert len(np.unique(expected.completion)) > 10 and len({str(row) for row in expected.completion.reshape(P * G, T)}) == P * G
    for field in ("completion", "mask", "truncated"):
        np.testing.assert_array_equal(getattr(given, field), getattr(expected, field))
    np.testing.assert_allclose(given.logp, expected.logp, rtol=1e-9, atol=1e-9)
