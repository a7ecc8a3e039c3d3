"""What is computed in which type, what is kept for the backward pass, and what that costs in memory."""

from __future__ import annotations

import argparse
import importlib.util
from functools import cache
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxreason import objectives, sharding
from jaxreason.batch import RolloutBatch
from jaxreason.models import config as configs
from jaxreason.models import decoder, huggingface
from jaxreason.models.config import Numerics
from jaxreason.training import state as states
from jaxreason.training.optimizer import OptimizerConfig, make_optimizer
from jaxreason.training.step import Split, make_update

ROOT = Path(__file__).parents[2]
FIXTURES = ROOT / "tests" / "fixtures" / "models"
QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
P, G, TP, T = 4, 2, 5, 6


@cache
def one_device() -> Any:
    return sharding.make_mesh(sharding.MeshConfig(), devices=jax.devices()[:1])


def made(name: str, numerics: Numerics) -> tuple[decoder.Model, Any]:
    configs.check_numerics(numerics)
    architecture = huggingface.read_architecture(FIXTURES / name)
    model = decoder.make_decoder(architecture, numerics, one_device())
    return model, huggingface.load_params(model.specs, FIXTURES / name, dtype=numerics.param_dtype, mesh=one_device())


def rollouts() -> RolloutBatch:
    rng = np.random.default_rng(0)
    mask = np.arange(T) < rng.integers(2, T + 1, (P, G, 1))
    return RolloutBatch(
        prompt=jnp.asarray(rng.integers(1, 96, (P, TP)), jnp.int32),
        prompt_mask=jnp.asarray(np.arange(TP)[None] >= rng.integers(0, TP - 1, (P, 1))),
        completion=jnp.asarray(rng.integers(1, 96, (P, G, T)), jnp.int32),
        mask=jnp.asarray(mask),
        truncated=jnp.zeros((P, G), bool),
        logp_behaviour=jnp.zeros((P, G, T), jnp.float32),
        reward=jnp.asarray(np.tile([0.0, 1.0], (P, 1)), jnp.float32),
    )


def gradient(model: decoder.Model, params: Any) -> Any:
    rng = np.random.default_rng(1)
    weight, batch = jnp.asarray(rng.normal(size=(P, G, T)), jnp.float32), rollouts()

    def loss(params: Any) -> jax.Array:
        hidden = model.completion_hidden(params, batch.prompt, batch.prompt_mask, batch.completion)
        logits = model.project(params, hidden.reshape(-1, hidden.shape[-1])).reshape(*weight.shape, -1)
        law = jax.nn.log_softmax(logits.astype(jnp.float32))
        return jnp.sum(weight * jnp.take_along_axis(law, batch.completion[..., None], axis=-1)[..., 0])

    return jax.jit(jax.grad(loss), compiler_options=QUICK)(params)


@pytest.mark.parametrize(
    ("name", "remats"), [("gemma2", ("products", "attention")), pytest.param("qwen3_moe", ("layer",), marks=pytest.mark.slow)]
)
def test_what_is_recomputed_changes_no_gradient(name: str, remats: tuple[str, ...]) -> None:
    expected = gradient(*made(name, Numerics(remat="none")))
    assert min(np.abs(x).max() for path, x in jax.tree.leaves_with_path(expected) if "router_bias" not in str(path)) > 0
    for remat in remats:
        found = gradient(*made(name, Numerics(remat=remat)))
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=0, atol=1e-5 * max(1, np.abs(y).max())), found, expected)


def test_the_head_is_float32_with_bfloat16_weights() -> None:
    """Products of 16-bit operands alone would be off by 1e-2 (a reported cause of divergence between sampler and trainer)."""
    numerics = Numerics(param_dtype="bfloat16", matmul_dtype="bfloat16")
    model, params = made("llama3", numerics)
    assert {x.dtype for x in jax.tree.leaves(params)} == {jnp.dtype("bfloat16")}
    hidden = jnp.asarray(np.random.default_rng(0).normal(size=(7, 32)), jnp.float32)
    exact = np.asarray(hidden, np.float64) @ np.asarray(params["embed"], np.float64).T
    with jax.default_matmul_precision("highest"):
        np.testing.assert_allclose(model.project(params, hidden), exact, rtol=0, atol=1e-5)
    half = decoder.make_decoder(
        huggingface.read_architecture(FIXTURES / "llama3"),
        Numerics(param_dtype="bfloat16", matmul_dtype="bfloat16", head_dtype="bfloat16"),
        one_device(),
    )
    assert np.abs(np.asarray(half.project(params, hidden)) - exact).max() > 1e-3


@pytest.mark.parametrize("activation", ["", "bfloat16"])
def test_bfloat16_is_used_and_close(activation: str) -> None:
    exact = gradient(*made("qwen3", Numerics()))
    found = gradient(*made("qwen3", Numerics(matmul_dtype="bfloat16", activation_dtype=activation)))
    gap = {jax.tree_util.keystr(path): float(jnp.linalg.norm(x - y) / jnp.linalg.norm(y)) for (path, x), y in zip(
        jax.tree.leaves_with_path(found), jax.tree.leaves(exact), strict=True
    )}  # fmt: skip
    assert 1e-3 < max(gap.values()) < 0.2, gap


@pytest.mark.slow
def test_bfloat16_parameters_learn_as_float32_ones_do() -> None:
    """Steps of 1e-6 are lost in bfloat16; the optimiser's float32 copy keeps them, and the parameters are its rounding."""
    optimizer = make_optimizer(OptimizerConfig(learning_rate=1e-6), steps=30)

    def run(param_dtype: str, matmul_dtype: str) -> tuple[Any, Any, Any]:
        model, params = made("qwen3", Numerics(param_dtype=param_dtype, matmul_dtype=matmul_dtype))
        update = make_update(model, objectives.grpo(beta=0.04), optimizer, temperature=1.0, split=Split(P, P // 2))
        state = states.create(model, optimizer, one_device(), params)
        step = jax.jit(update, compiler_options=QUICK)
        for _ in range(3):
            state, metrics, _ = step(state, params, rollouts())
        return state, metrics, params

    narrow, metrics, start = run("bfloat16", "bfloat16")
    wide, expected, _ = run("float32", "bfloat16")
    master = narrow.opt_state.master
    assert {x.dtype for x in jax.tree.leaves(master)} == {jnp.dtype("float32")}
    for rounded, kept, full, old in zip(*(jax.tree.leaves(x) for x in (narrow.params, master, wide.params, start)), strict=True):
        assert rounded.dtype == jnp.bfloat16
        np.testing.assert_array_equal(rounded, kept.astype(jnp.bfloat16))
        moved = np.abs(np.asarray(kept) - np.asarray(old, np.float32))
        assert 0 < moved.max() < 4e-6
        # Adam's first steps are the gradient's sign: they agree but where it is near 0
        close = np.abs(np.asarray(kept) - np.asarray(full)) < 5e-7
        assert close.mean() > 0.85
    for name in ("policy/loss", "optimizer/gradient_norm", "optimizer/update_norm"):
        np.testing.assert_allclose(metrics[name], expected[name], rtol=0.05, atol=1e-3)


@pytest.mark.slow
def test_a_load_balance_loss_moves_the_routers() -> None:
    """Its weight is a part of the loss; its value is logged; without it neither happens."""
    optimizer = make_optimizer(OptimizerConfig(learning_rate=1e-3), steps=3)

    def run(weight: float, parts: int) -> Any:
        model, params = made("qwen3_moe", Numerics())
        update = make_update(
            model._replace(balance_weight=weight), objectives.grpo(beta=0.0), optimizer, temperature=1.0, split=Split(P, P // parts)
        )
        state = states.create(model, optimizer, one_device(), params)
        state, metrics, _ = jax.jit(update, compiler_options=QUICK)(state, params, rollouts())
        return state, {name: float(value) for name, value in metrics.items()}

    (_, without), (_, with_it), (_, halves) = run(0.0, 1), run(0.1, 1), run(0.1, 2)
    assert "policy/load_balance" not in without
    assert 1.9 < with_it["policy/load_balance"] < 4.0  # an even load is the number of chosen experts
    np.testing.assert_allclose(with_it["policy/loss"] - without["policy/loss"], 0.1 * with_it["policy/load_balance"], rtol=1e-4)
    np.testing.assert_allclose(halves["policy/load_balance"], with_it["policy/load_balance"], rtol=0.1)
    assert abs(with_it["optimizer/gradient_norm"] - without["optimizer/gradient_norm"]) > 1e-4


@pytest.mark.slow
def test_chunks_and_remat_save_memory() -> None:
    """By the compiler's own account, on a small model; benchmarks/memory.py has the real vocabulary."""
    found = importlib.util.spec_from_file_location("memory", ROOT / "benchmarks" / "memory.py")
    assert found and found.loader
    memory = importlib.util.module_from_spec(found)
    found.loader.exec_module(memory)
    sizes = argparse.Namespace(rows=8, prompt=8, tokens=120, hidden=64, layers=3, vocab=20_000)

    def temporaries(*, chunk: int, remat: str) -> int:
        return memory.temporaries(sizes, chunk=chunk, remat=remat)

    whole = temporaries(chunk=8 * 120, remat="none")
    chunked = temporaries(chunk=64, remat="none")
    least = temporaries(chunk=64, remat="layer")
    assert chunked < whole / 4 and least < chunked and least < whole / 5
