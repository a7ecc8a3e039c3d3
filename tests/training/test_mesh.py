"""A run is the same on every mesh: in float64 to 1e-9, in float32 loosely; and weights really lie in parts.

Runs in float64 are processes of their own, because orbax's threads do not see a local `jax.enable_x64`.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import zlib
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

from jaxreason import objectives, sharding
from jaxreason.batch import PromptBatch, RolloutBatch
from jaxreason.models import decoder, spec
from jaxreason.models.config import Architecture, Experts, Latent, Numerics
from jaxreason.models.decoder import Model
from jaxreason.sampling.rollout import SamplingConfig
from jaxreason.training import online
from jaxreason.training import state as states
from jaxreason.training.checkpoint import Checkpointer
from jaxreason.training.collect import Scoring
from jaxreason.training.optimizer import OptimizerConfig, make_optimizer
from jaxreason.training.step import Split, make_update

ROOT = Path(__file__).parents[2]
Shape = tuple[int, int, int]  # data, fsdp, tensor
ONE: Shape = (1, 1, 1)

# ------------------------------------------------------------------------------------------------ the quickstart, float64

RUN = """
import sys
from pathlib import Path
import jax, numpy as np
from jaxreason import config as configs
from jaxreason.cli.progress import QuietProgress
from jaxreason.pipelines import experiment as experiments
from jaxreason.pipelines import run
from jaxreason.training import online, state
from jaxreason.training.checkpoint import Checkpointer
from jaxreason.training.optimizer import make_optimizer

folder, devices, overrides = Path(sys.argv[1]), jax.devices()[: int(sys.argv[2])], sys.argv[3:]
config = configs.load("quickstart:tiny", overrides)
result = run.train(config, folder, progress=QuietProgress(), stop=lambda: False, devices=devices)
assert result.finished
e = experiments.build(config, folder, devices=devices)
optimizer = make_optimizer(config.online.optimizer, steps=config.online.steps)
checkpointer = Checkpointer(folder / "checkpoints" / online.STAGE)
restored = checkpointer.restore_latest(state.abstract(e.model, optimizer, e.mesh))
checkpointer.close()
np.savez(folder / "state.npz", **{jax.tree_util.keystr(p): x for p, x in jax.tree.leaves_with_path(restored.state)})
"""
OVERRIDES = (
    "model.numerics.param_dtype=float64",
    "model.numerics.matmul_dtype=float64",
    "reward.format.kwargs.pattern=(?:.|\\n)*",  # 1 for a completion that ended: rewards that differ, so a gradient
    "supervised.optimizer.warmup_steps=0",
    "online.optimizer.warmup_steps=0",
)


def run(folder: Path, shape: Shape) -> Path:
    """Two supervised steps and two of reinforcement in a new process."""
    mesh = [f"mesh.{axis}={size}" for axis, size in zip(("data", "fsdp", "tensor"), shape, strict=True)]
    env = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "JAX_PLATFORMS": "cpu",
        "JAX_ENABLE_X64": "1",
        "JAX_NUMPY_DTYPE_PROMOTION": "strict",
        "JAX_NUMPY_RANK_PROMOTION": "raise",
    }
    options = [f"--config.{each}" for each in (*OVERRIDES, *mesh)]
    command = [sys.executable, "-c", RUN, folder, str(np.prod(shape)), *options]
    ended = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stderr
    assert "Involuntary full rematerialization" not in ended.stderr  # some array made whole on every device
    return folder


def lines(file: Path) -> list[dict[str, Any]]:
    """The lines of a run's file without its seconds."""
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    return [{k: v for k, v in row.items() if not k.startswith(("time/", "throughput/"))} for row in rows]


@pytest.fixture(scope="module")
def on_one_device(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run(tmp_path_factory.mktemp("one"), ONE)


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(2, 2, 2), (8, 1, 1), (1, 4, 2)])
def test_the_quickstart_is_the_same_on_every_mesh(tmp_path: Path, on_one_device: Path, shape: Shape) -> None:
    folder = run(tmp_path, shape)
    given, expected = np.load(folder / "state.npz"), np.load(on_one_device / "state.npz")
    assert sorted(given) == sorted(expected)
    for name, value in expected.items():
        assert given[name].dtype == value.dtype and (value.dtype == np.float64 or value.ndim == 0), name
        np.testing.assert_allclose(given[name], value, rtol=1e-9, atol=1e-9 * np.max(np.abs(value)), err_msg=name)
    for file in ("metrics.jsonl", "rollouts.jsonl"):
        rows, wanted = lines(folder / file), lines(on_one_device / file)
        assert len(rows) == len(wanted)
        for row, want in zip(rows, wanted, strict=True):
            assert row.keys() == want.keys()
            for name, value in want.items():
                close = pytest.approx(value, rel=1e-9, abs=1e-9) if isinstance(value, float | dict) else value
                assert row[name] == close, (file, name)
    assert json.loads((folder / "examples.json").read_text()) == json.loads((on_one_device / "examples.json").read_text())


@pytest.mark.slow
def test_the_compared_run_had_gradients(on_one_device: Path) -> None:
    """Equality of runs in which nothing moves would say nothing."""
    steps = [row for row in lines(on_one_device / "metrics.jsonl") if "optimizer/gradient_norm" in row]
    assert [(row["stage"], row["step"]) for row in steps] == [(s, n) for s in ("supervised", "reinforce") for n in (1, 2)]
    assert min(row["optimizer/gradient_norm"] for row in steps) > 0.1
    state = np.load(on_one_device / "state.npz")
    assert all(np.any(state[name] != 0) for name in state if ".mu[" in name)
    assert len({row["completion"] for row in lines(on_one_device / "rollouts.jsonl")}) > 10


# ------------------------------------------------------------------------------------------------------- a model in hand

P, G, TP, T = 8, 4, 6, 10
ARCHITECTURE = Architecture(
    vocab_size=36, hidden_size=16, layers=2, heads=4, kv_heads=2, head_size=12, mlp_size=40, max_positions=64
)
OPTIMIZER = OptimizerConfig(learning_rate=1e-2)
QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}  # to compile
if jax.__version_info__ < (0, 11):
    QUICK["xla_cpu_use_fusion_emitters"] = False  # half the time; later versions have no such switch


class Made(NamedTuple):
    mesh: Mesh
    model: Model
    params: Any
    reference: Any


def make(shape: Shape, dtype: str, architecture: Architecture = ARCHITECTURE) -> Made:
    mesh = sharding.make_mesh(sharding.MeshConfig(*shape), devices=jax.devices()[: int(np.prod(shape))])
    model = decoder.make_decoder(architecture, Numerics(dtype, dtype), mesh)
    rng = np.random.default_rng(2)

    def draw(each: spec.ParamSpec) -> jax.Array:
        return jax.device_put(rng.normal(0.0, 0.3, each.shape).astype(dtype), sharding.named(mesh, each.axes))

    return Made(mesh, model, spec.tree_map(draw, model.specs), spec.tree_map(draw, model.specs))


def prompts(mesh: Mesh) -> PromptBatch:
    rng = np.random.default_rng(0)
    mask = np.arange(TP)[None] >= rng.integers(0, TP - 1, (P, 1))
    tokens = rng.integers(0, ARCHITECTURE.vocab_size, (P, TP)).astype(np.int32)
    batch = PromptBatch(tokens, mask, np.arange(P, dtype=np.uint32), np.zeros(P, np.int32))  # pyright: ignore[reportArgumentType]
    return sharding.place(mesh, batch, ("problems",))


def rollouts(mesh: Mesh, dtype: str) -> RolloutBatch:
    """Completions of uneven lengths, not sampled by the policy that learns from them."""
    rng = np.random.default_rng(1)
    tokens = rng.integers(0, ARCHITECTURE.vocab_size, (P, G, T)).astype(np.int32)
    mask = np.arange(T) < rng.integers(1, T + 1, (P, G, 1))
    host = RolloutBatch(
        prompt=sharding.fetch(prompts(mesh).prompt),
        prompt_mask=sharding.fetch(prompts(mesh).prompt_mask),
        completion=tokens,  # pyright: ignore[reportArgumentType]
        mask=mask,  # pyright: ignore[reportArgumentType]
        truncated=mask.all(-1),
        logp_behaviour=np.where(mask, rng.normal(-3.5, 0.2, mask.shape), 0.0).astype(dtype),  # pyright: ignore[reportArgumentType]
        reward=rng.integers(0, 2, (P, G)).astype(np.float32),
    )
    return sharding.place(mesh, host, ("problems",))


@cache
def updated(shape: Shape, dtype: str, *, per_update: int, per_microbatch: int) -> tuple[Any, dict[str, np.ndarray]]:
    """The state after all updates on one batch of rollouts, and the metrics."""
    mesh, model, params, reference = make(shape, dtype)
    optimizer = make_optimizer(OPTIMIZER, steps=4)
    split = Split(per_update, per_microbatch)
    update = make_update(model, objectives.grpo(beta=0.04), optimizer, temperature=0.9, split=split)
    state = states.create(model, optimizer, mesh, params)
    return sharding.fetch(jax.jit(update, compiler_options=QUICK)(state, reference, rollouts(mesh, dtype)))


def assert_close(given: Any, expected: Any, *, tolerance: float) -> None:
    assert jax.tree.structure(given) == jax.tree.structure(expected)
    for (path, a), b in zip(jax.tree.leaves_with_path(given), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance, err_msg=jax.tree_util.keystr(path))


@pytest.mark.parametrize(
    ("per_update", "shape", "per_microbatch"),
    [
        (8, (2, 2, 2), 4),
        pytest.param(4, (1, 2, 2), 2, marks=pytest.mark.slow),  # two updates
        pytest.param(8, ONE, 2, marks=pytest.mark.slow),
        pytest.param(8, (2, 2, 2), 8, marks=pytest.mark.slow),
        pytest.param(8, (1, 4, 2), 4, marks=pytest.mark.slow),
    ],
)
def test_microbatches_and_meshes_change_nothing(per_update: int, shape: Shape, per_microbatch: int) -> None:
    """Updates from 8 problems' rollouts in micro-batches on a mesh = in one piece on one device."""
    with jax.enable_x64(True):
        expected = updated(ONE, "float64", per_update=per_update, per_microbatch=per_update)
        given = updated(shape, "float64", per_update=per_update, per_microbatch=per_microbatch)
    assert expected[0].step == P // per_update and expected[1]["optimizer/gradient_norm"] > 0.01
    assert_close(given, expected, tolerance=1e-9)


def even_share(prompts: PromptBatch, completion: jax.Array, mask: jax.Array) -> jax.Array:
    """A traced reward that differs between completions: the share of even tokens."""
    return jnp.mean((completion % 2 == 0) & mask, axis=-1, dtype=jnp.float32)


def online_step(made: Made, optimizer: Any) -> online.OnlineStep:
    config = online.OnlineConfig(
        steps=2, problems_per_step=P, problems_per_update=P, problems_per_microbatch=P, completions_per_problem=G
    )
    return online.make_step(
        made.model,
        objectives.grpo(beta=0.04),
        optimizer,
        Scoring({"even": even_share}, {}, {"even": 1.0}, frozenset()),
        made.mesh,
        config=config,
        sampling=SamplingConfig(max_prompt_tokens=TP, max_completion_tokens=T),
        eos_ids=(0,),
        pad_id=0,
        seed=3,
    )


def parts(x: jax.Array) -> set[tuple[int, ...]]:
    """The shapes in which an array lies on its devices."""
    return {each.data.shape for each in x.addressable_shards}


# by hand from the architecture on data 2 x fsdp 2 x tensor 2: embed and width over fsdp, heads, mlp and vocabulary over tensor
SHARDS = {
    "embed": (36 // 2, 16 // 2),
    "final_norm": (16,),
    "layers/q": (2, 16 // 2, 4 // 2, 12),
    "layers/k": (2, 16 // 2, 2 // 2, 12),
    "layers/k_bias": (2, 2 // 2, 12),
    "layers/o": (2, 4 // 2, 12, 16 // 2),
    "layers/gate": (2, 16 // 2, 40 // 2),
    "layers/down": (2, 40 // 2, 16 // 2),
    "layers/mlp_norm": (2, 16),
}


def test_a_step_in_float32_and_where_its_arrays_lie() -> None:
    """A fused step on 8 devices: close to one device's, weights and moments in parts before and after it, the cache too."""
    optimizer = make_optimizer(OPTIMIZER, steps=2)

    def stepped(made: Made) -> tuple[Any, Any]:
        step = online_step(made, optimizer)
        assert step.fused is not None
        state = states.create(made.model, optimizer, made.mesh, made.params)
        args = (state, made.reference, prompts(made.mesh), sharding.place(made.mesh, np.asarray(0, np.int32), ()))
        return step, step.fused.lower(*args).compile(compiler_options=QUICK)(*args)  # pyright: ignore[reportFunctionMemberAccess]

    _, one = stepped(make(ONE, "float32"))
    made = make((2, 2, 2), "float32")
    step, eight = stepped(made)
    given, expected = sharding.fetch(eight), sharding.fetch(one)
    np.testing.assert_array_equal(given[2].completion, expected[2].completion)
    assert expected[1]["optimizer/gradient_norm"] > 0.01
    assert_close(given[1:], expected[1:], tolerance=1e-3)
    # Adam's first step is the gradient's sign: where that is near 0 only the moments can be compared
    assert_close(given[0].opt_state, expected[0].opt_state, tolerance=1e-4)

    state = eight[0]
    adam = state.opt_state[1][0]
    for tree in (state.params, adam.mu, adam.nu, made.reference):
        leaves = {jax.tree_util.keystr(path, simple=True, separator="/"): x for path, x in jax.tree.leaves_with_path(tree)}
        assert {path: parts(leaves[path]) for path in SHARDS} == {path: {shape} for path, shape in SHARDS.items()}

    args = (made.params, prompts(made.mesh), jnp.asarray(0, jnp.int32))
    sampling = step.collect.lower(*args).compile(compiler_options=QUICK)  # pyright: ignore[reportFunctionMemberAccess]
    text = sampling.as_text()
    a = ARCHITECTURE
    # a layer's own keys are [P * G, K, 1, C, T]: problems over 4 devices, heads over 2
    assert f"f32[{P // 4 * G},{a.kv_heads // 2},1,{a.head_size},{T}]" in text
    for slots, kv_heads in ((P * G, a.kv_heads), (P * G, a.kv_heads // 2), (P // 4 * G, a.kv_heads)):
        assert f"f32[{slots},{kv_heads},1,{a.head_size},{T}]" not in text
    sampled, rewards = sampling(*args)
    assert parts(sampled.completion) == {(P // 4, G, T)} and parts(rewards["even"]) == {(P // 4, G)}


# ------------------------------------------------------------------------------- checkpoints, other meshes, other processes

SPARSE = Architecture(
    family="deepseek_v3",
    vocab_size=36,
    hidden_size=16,
    layers=2,
    heads=4,
    kv_heads=4,
    head_size=12,
    mlp_size=40,
    max_positions=64,
    tied=False,
    experts=Experts(count=8, chosen=2, mlp_size=24, shared_mlp_size=20, scoring="sigmoid", layers="ds"),
    latent=Latent(kv_rank=8, q_rank=12, rotated=4, value_size=10),
)


def sparse_state(mesh_config: sharding.MeshConfig) -> Any:
    """The abstract state of a decoder with experts and latent attention, on a mesh of all devices."""
    mesh = sharding.make_mesh(mesh_config)
    model = decoder.make_decoder(SPARSE, Numerics(), mesh)
    spec.check_divisible(model.specs, mesh)
    return states.abstract(model, make_optimizer(OPTIMIZER, steps=4), mesh)


def value(path: Any, x: Any, step: int) -> np.ndarray:
    """A leaf's numbers, a function of its path: any process knows them all."""
    rng = np.random.default_rng((step, zlib.crc32(jax.tree_util.keystr(path).encode())))
    return rng.integers(-1000, 1000, x.shape).astype(x.dtype)


def filled(abstract: Any, step: int) -> Any:
    def make(path: Any, x: Any) -> jax.Array:
        whole = value(path, x, step)
        return jax.make_array_from_callback(x.shape, x.sharding, lambda index: whole[index])

    return jax.tree.map_with_path(make, abstract)


def check_filled(state: Any, abstract: Any, step: int) -> None:
    """Every shard that this process holds lies where it should and has the numbers it should."""
    assert jax.tree.structure(state) == jax.tree.structure(abstract)
    for (path, x), expected in zip(jax.tree.leaves_with_path(state), jax.tree.leaves(abstract), strict=True):
        assert (x.shape, x.dtype) == (expected.shape, expected.dtype) and x.sharding.is_equivalent_to(expected.sharding, x.ndim)
        whole = value(path, x, step)
        for shard in x.addressable_shards:
            np.testing.assert_array_equal(shard.data, whole[shard.index], err_msg=jax.tree_util.keystr(path))


MESHES = (
    sharding.MeshConfig(data=1, expert=4, tensor=2),
    sharding.MeshConfig(data=2, fsdp=2, expert=2),
    sharding.MeshConfig(data=1, expert=2, fsdp=2, sequence=2),
)


def test_a_checkpoint_of_experts_restores_on_other_meshes(tmp_path: Path) -> None:
    saved = filled(sparse_state(MESHES[0]), 1)
    assert parts(saved.opt_state[1][0].mu["layers1"]["expert_down"]) == {(1, 8 // 4, 24 // 2, 16)}
    checkpointer = Checkpointer(tmp_path / "run")
    checkpointer.save(1, saved, {})
    for config in MESHES[1:]:
        abstract = sparse_state(config)
        restored = checkpointer.restore_latest(abstract)
        assert restored is not None
        check_filled(restored.state, abstract, 1)
    checkpointer.close()
    assert parts(restored.state.params["layers1"]["expert_down"]) == {(1, 8 // 2, 24, 16 // 2)}  # pyright: ignore


PROCESS = """
import sys, warnings
from pathlib import Path
warnings.simplefilter("error")
folder, here, address, processes, process, step = sys.argv[1:]
sys.path.insert(0, here)
import jax
jax.config.update("jax_num_cpu_devices", 8 // int(processes))
jax.config.update("jax_platforms", "cpu")
if processes != "1":
    jax.distributed.initialize(address, num_processes=int(processes), process_id=int(process))
import test_mesh
from jaxreason.training.checkpoint import Checkpointer

assert jax.device_count() == 8 and jax.process_count() == int(processes)
step = int(step)
abstract = test_mesh.sparse_state(test_mesh.MESHES[step % 3])
checkpointer = Checkpointer(Path(folder))
if step:
    restored = checkpointer.restore_latest(abstract)
    assert restored.step == step and not restored.rejected
    test_mesh.check_filled(restored.state, abstract, step)
checkpointer.save(step + 1, test_mesh.filled(abstract, step + 1), {})
checkpointer.close()
"""


@pytest.mark.slow
def test_a_checkpoint_restores_on_another_number_of_processes(tmp_path: Path) -> None:
    """One process saves, two restore and save on another mesh, one restores that on a third; always 8 devices."""
    environment = {name: text for name, text in os.environ.items() if name != "XLA_FLAGS"} | {"PYTHONPATH": str(ROOT)}
    for step, processes in enumerate((1, 2, 1)):
        with socket.socket() as free:
            free.bind(("localhost", 0))
            address = f"localhost:{free.getsockname()[1]}"
        command = [sys.executable, "-c", PROCESS, str(tmp_path / "run"), str(Path(__file__).parent), address, str(processes)]
        running = [
            subprocess.Popen(
                [*command, str(i), str(step)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
            )
            for i in range(processes)
        ]
        try:
            outputs = [process.communicate(timeout=200)[0] for process in running]
        finally:
            for process in running:
                process.kill()
        assert [process.returncode for process in running] == [0] * processes, "\n".join(outputs)
