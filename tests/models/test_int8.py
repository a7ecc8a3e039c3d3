"""Sampling with weights of eight bits: what is rounded and how far, what is sampled then, and a run with LoRA beneath it."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from jaxreason import config as configs
from jaxreason import objectives, sharding
from jaxreason.batch import PromptBatch
from jaxreason.models import cache as caches
from jaxreason.models import decoder, huggingface, lora, spec
from jaxreason.models.config import Architecture, Numerics
from jaxreason.models.tokenizer import load_tokenizer, save_word_tokenizer
from jaxreason.models.weights import Int8, LowRank, plain, to_int8
from jaxreason.pipelines import experiment as experiments
from jaxreason.pipelines import folder as folders
from jaxreason.pipelines import run as runs
from jaxreason.sampling.rollout import Sampled, sample
from jaxreason.tasks.word_problems import vocabulary
from jaxreason.training import state as states
from jaxreason.training.metrics import read_jsonl
from jaxreason.training.optimizer import OptimizerConfig, make_optimizer
from jaxreason.training.step import Split, make_update

from .test_lora import QUICK, Made, P, Shape, first_and_slow, make, rollouts

TESTS = Path(__file__).parents[1]
INT8 = Numerics(sampling_weights="int8")
EXACT = {"kv_b", "router"}  # matrices that are not rounded


@pytest.fixture(autouse=True)
def highest_precision() -> Iterator[None]:
    with jax.default_matmul_precision("highest"):
        yield


def make_rounded(name: str) -> tuple[Made, Any]:
    """A model whose weights are at most 0.4 of a step away from their rounded values, and the parameters with these.

    A step is 1/127 of the largest entry of an output channel; the inputs are one axis, of `o` two, and experts have their own.
    """
    made, rng = make(name, numerics=INT8), np.random.default_rng(3)
    base, rounded = dict(made.base), dict(made.base)
    for stack, layer in made.model.specs.items():
        if isinstance(layer, spec.ParamSpec):
            continue
        base[stack], rounded[stack] = dict(made.base[stack]), dict(made.base[stack])
        for target in (each for each in layer if each not in EXACT and not each.endswith(("norm", "bias"))):
            weight = np.asarray(made.base[stack][target])
            inputs = (1, 2) if target == "o" else 2 if target.startswith("expert_") else 1
            scale = np.abs(weight).max(axis=inputs, keepdims=True) / np.float32(127)
            steps = np.rint(weight / scale)
            offset = np.where(np.abs(steps) == 127, 0, rng.uniform(-0.4, 0.4, weight.shape))
            base[stack][target] = jnp.asarray((steps + offset) * scale, jnp.float32)
            rounded[stack][target] = jnp.asarray(steps * scale, jnp.float32)
    return made._replace(base=base), rounded


def test_a_rounded_weight_is_within_half_a_step_of_its_channel() -> None:
    rng = np.random.default_rng(0)
    weight = (rng.normal(size=(2, 50, 7)) * 10.0 ** rng.integers(-3, 4, (2, 1, 7))).astype(np.float32)
    weight[1, :, 3] = 0
    found = to_int8(jnp.asarray(weight))
    assert found.values.dtype == jnp.int8 and found.values.shape == weight.shape and found.scale.shape == (2, 7)
    largest = np.abs(weight).max(axis=1, keepdims=True)
    error = np.abs(np.asarray(plain(found, dtype="float32")) - weight)
    assert (error <= largest / 254 * (1 + 1e-5)).all() and (error > largest / 300).any()
    np.testing.assert_array_equal(np.abs(np.asarray(found.values)).max(axis=1) == 127, largest[:, 0] > 0)
    # in bfloat16 a channel's scale is not rounded by itself: entries are the nearest there are
    narrow = np.asarray(plain(found, dtype="bfloat16"))
    np.testing.assert_array_equal(narrow, np.asarray(plain(found, dtype="float32")).astype(jnp.bfloat16))


@pytest.mark.parametrize("name", first_and_slow(("deepseek_v3",)))
def test_what_is_rounded_and_what_is_not(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut into layers or stacked, every layer's matrices are rounded, and adapters, norms, router, latents and ends are not."""
    made, expected = make_rounded(name)
    adapted = lora.adapt(made.base, made.adapters)
    cut = jax.jit(made.model.prepare_sampling, compiler_options=QUICK)(adapted)
    monkeypatch.setattr(caches, "UNROLLED_LAYERS", 0)
    stacked = jax.jit(lambda p: made.model.prepare_sampling(p), compiler_options=QUICK)(adapted)
    for stack, layer in stacked.items():
        if not isinstance(layer, dict):
            kept = made.base["embed"].T if stack not in made.base else made.base[stack]  # the head of a tied model
            np.testing.assert_array_equal(layer, kept)
            continue
        assert isinstance(cut[stack], tuple)
        for i, one in enumerate(cut[stack]):
            jax.tree.map(np.testing.assert_array_equal, one, jax.tree.map(lambda x, i=i: x[i], layer))
        weights = {n: x for n, x in layer.items() if n not in ("qkv", "gate_up", "shared_gate_up")}
        for joined, names in (("qkv", "qkv"), ("gate_up", ("gate", "up")), ("shared_gate_up", ("shared_gate", "shared_up"))):
            weights |= zip(names, layer[joined], strict=True) if joined in layer else ()
        assert weights.keys() == made.base[stack].keys()
        for target, weight in weights.items():
            base = expected[stack][target]
            if isinstance(weight, LowRank):
                own = made.adapters[stack][target]
                np.testing.assert_array_equal(np.ravel(weight.a), np.ravel(own.a))
                np.testing.assert_array_equal(np.ravel(weight.b), np.ravel(own.b))
                weight = weight.weight
            assert isinstance(weight, Int8) == (target not in EXACT and not target.endswith(("norm", "bias")))
            np.testing.assert_allclose(np.ravel(plain(weight, dtype="float32")), np.ravel(base), rtol=1e-6)


def drawn(made: Made, *several: Any) -> list[Sampled]:
    """Completions of prompts of uneven lengths, by each of several trees of parameters."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(1, 96, (P, 6)).astype(np.int32)
    prompts = PromptBatch(tokens, np.arange(6) >= rng.integers(0, 5, (P, 1)), np.arange(P, dtype=np.uint32), np.zeros(P, np.int32))
    prompts = sharding.place(made.mesh, prompts, ("problems",))

    def run(params: Any, prompts: PromptBatch, key: jax.Array) -> Sampled:
        return sample(made.model, params, prompts, key, group=2, max_completion_tokens=8, eos_ids=(2,), pad_id=0)

    program = jax.jit(run, compiler_options=QUICK)
    return [sharding.fetch(program(params, prompts, jax.random.key(1))) for params in several]


@pytest.mark.parametrize("name", first_and_slow(("qwen3_moe",)))
def test_the_policy_that_samples_is_that_of_the_rounded_weights(name: str) -> None:
    """The same tokens and log-probabilities as from the rounded numbers in float32, under adapters that are exact."""
    made, rounded = make_rounded(name)
    (found,) = drawn(made, lora.adapt(made.base, made.adapters))
    expected, other = drawn(make(name), *(lora.adapt(params, made.adapters) for params in (rounded, made.base)))
    np.testing.assert_array_equal(found.completion, expected.completion)
    np.testing.assert_allclose(found.logp, expected.logp, rtol=0, atol=1e-4)
    assert np.abs(other.logp[:, :, 0] - found.logp[:, :, 0]).max() > 1e-3  # it is not the exact policy


@pytest.mark.parametrize("shape", [(1, 2, 1, 1, 4), pytest.param((2, 1, 2, 1, 2), marks=pytest.mark.slow)])
def test_a_mesh_samples_the_same(shape: Shape) -> None:
    """Channels whose inputs lie on several devices are rounded by the largest of all of them."""
    name = "qwen3_moe" if shape[2] > 1 else "llama2"
    one, many = make(name, numerics=INT8), make(name, shape, numerics=INT8)
    weights = [sharding.fetch(jax.jit(made.model.prepare_sampling)(made.base)) for made in (one, many)]
    for stack in ("o", "down", "expert_down"):
        for ours, theirs in zip(*(w["layers"] for w in weights), strict=True):
            if stack in ours:
                np.testing.assert_array_equal(ours[stack].values, theirs[stack].values)
                np.testing.assert_array_equal(ours[stack].scale, theirs[stack].scale)
    (found,), (expected,) = drawn(many, many.base), drawn(one, one.base)
    np.testing.assert_array_equal(found.completion, expected.completion)
    np.testing.assert_allclose(found.logp, expected.logp, rtol=0, atol=1e-4)


def test_training_is_the_same_program() -> None:
    """The update does not know of the copy that samples."""

    def program(numerics: Numerics) -> str:
        made = make("llama3", numerics=numerics)
        optimizer = make_optimizer(OptimizerConfig(), steps=2)
        update = make_update(made.model, objectives.grpo(beta=0.04), optimizer, temperature=0.9, split=Split(P, P))
        state = states.abstract(made.model, optimizer, made.mesh)
        return jax.jit(update).lower(state, made.base, rollouts(made.mesh, "float32")).as_text()

    assert program(INT8) == program(Numerics())


def test_the_layers_that_sample_take_a_quarter_of_the_memory() -> None:
    """Of the quickstart's policy, as arrays and as the compiler counts them; a vector of scales beside each matrix."""
    architecture = Architecture(vocab_size=64, hidden_size=128, layers=2, heads=4, kv_heads=2, head_size=32, mlp_size=384)
    mesh = sharding.make_mesh(sharding.MeshConfig(), devices=jax.devices()[:1])

    def layers(numerics: Numerics) -> tuple[int, int]:
        model = decoder.make_decoder(architecture, numerics, mesh)
        params = spec.abstract(model.specs, dtype="float32", mesh=mesh)
        compiled = jax.jit(lambda p: model.prepare_sampling(p)["layers"]).lower(params).compile(QUICK)
        counted = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(jax.eval_shape(model.prepare_sampling, params)["layers"]))
        analysis = compiled.memory_analysis()
        assert analysis is not None
        return counted, analysis.output_size_in_bytes

    for ours, exact in zip(layers(INT8), layers(Numerics()), strict=True):
        assert 0.25 < ours / exact < 0.27


# ---- a run with LoRA


class Recorder:
    """A progress that keeps what it is told."""

    def __init__(self) -> None:
        self.messages: list[str] = []

    def stage(self, name: str, total_steps: int, done_steps: int) -> None: ...

    def update(self, step: int, metrics: Any) -> None: ...

    def message(self, text: str) -> None:
        self.messages.append(text)

    def close(self) -> None: ...


RUN = (
    "model.lora.rank=2",
    "model.lora.alpha=4",
    "model.lora.targets=q o",
    "model.numerics.sampling_weights=int8",
    "supervised.phases.base.steps=2",
    "supervised.phases.cold_start.steps=0",
    "supervised.optimizer.learning_rate=0.03",
    "online.steps=4",
    "online.completions_per_problem=16",  # some of which end in time
    "online.optimizer.learning_rate=0.03",
    "evaluation.every_steps=0",
)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint to adapt."""
    folder = tmp_path_factory.mktemp("models")
    save_word_tokenizer(vocabulary(), folder / "words")
    sizes: dict[str, Any] = {"hidden_size": 16, "layers": 1, "heads": 2, "kv_heads": 1, "head_size": 8, "mlp_size": 32}
    architecture, rng = Architecture(vocab_size=64, **sizes), np.random.default_rng(0)
    mesh = sharding.make_mesh(sharding.MeshConfig(), devices=jax.devices()[:1])
    params = spec.tree_map(
        lambda each: jnp.asarray(rng.normal(each.init == "ones", 0.1, each.shape), jnp.float32),
        decoder.make_decoder(architecture, Numerics(), mesh).specs,
    )
    huggingface.export(params, architecture, load_tokenizer(folder / "words"), folder / "base")
    return folder / "base"


def train(config: configs.Config, workdir: Path, *, checks: int | None = None) -> tuple[folders.Result, Recorder]:
    """Trains on one device until the run has asked `checks` times whether to stop."""
    asked, progress = 0, Recorder()

    def stop() -> bool:
        nonlocal asked
        asked += 1
        return checks is not None and asked >= checks

    return runs.train(config, workdir, progress=progress, stop=stop, devices=jax.devices()[:1]), progress


def left(workdir: Path) -> dict[str, Any]:
    """What a run leaves behind, without its clocks and its checkpoints."""
    clocks = ("time/", "throughput/")
    lines = [{k: v for k, v in line.items() if not k.startswith(clocks)} for line in read_jsonl(workdir / "metrics.jsonl")]
    kept = [path for name in ("policy", "adapter") for path in sorted((workdir / name).iterdir())]
    kept += [workdir / "rollouts.jsonl", workdir / "examples.json"]
    return {"metrics": lines} | {str(path.relative_to(workdir)): path.read_bytes() for path in kept}


@pytest.mark.slow
def test_a_run_trains_saves_resumes_and_exports_adapters(base: Path, tmp_path: Path, compiled_once: None) -> None:
    """Supervised, then reinforced: 4 steps = 2 + stop + 2, bit for bit; the policy is the checkpoint with what was exported."""
    config = configs.load(str(TESTS / "short_run.py"), [f"--config.{each}" for each in (*RUN, f"model.path={base}")])
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    result, progress = train(config, whole)
    e = experiments.build(config, whole, devices=jax.devices()[:1])
    trained, total = spec.count(e.model.specs), spec.count(e.specs)
    assert result.finished and (trained, result.summary["parameters"]) == (2 * 2 * (16 + 16), total)  # q and o, rank
    assert any(text.startswith(f"{trained} trained of {total:,} parameters") for text in progress.messages)

    assert not train(config, stopped, checks=2 + 1 + 1 + 2)[0].finished  # two steps, the stage's end, before RL, two steps
    assert sorted(os.listdir(stopped / "checkpoints" / "reinforce")) == ["2", "2.manifest.json"]
    assert train(config, stopped)[0].finished
    ours, theirs = left(stopped), left(whole)
    assert ours.keys() == theirs.keys() and not [name for name in theirs if ours[name] != theirs[name]]

    lines = [line for line in theirs["metrics"] if "policy/kl_ref" in line]
    assert [line["step"] for line in lines] == [1, 2, 3, 4] and min(line["optimizer/gradient_norm"] for line in lines) > 1e-4
    assert lines[0]["policy/kl_ref"] < 1e-9 < lines[3]["policy/kl_ref"]  # the reference has the supervised stage's adapters
    assert all(1e-4 < line["policy/sampler_gap"] < 0.3 and line["policy/ratio_max"] == 1 for line in lines)
    host = json.loads((whole / "checkpoints" / "reinforce" / "4" / "host" / "metadata").read_text())
    assert all(name.endswith((".a", ".b")) for name in host["leaves"] if name.startswith(".params"))
    sizes = [int(np.prod(json.loads(kind[kind.index("[") :]))) for kind in host["leaves"].values()]
    assert 3 * trained < sum(sizes) < 3 * trained + 5  # adapters, two moments, and counters

    adapters = load_file(whole / "adapter" / "adapter_model.safetensors")
    assert json.loads((whole / "adapter" / "adapter_config.json").read_text())["base_model_name_or_path"] == str(base)
    before, after = (load_file(folder / "model.safetensors") for folder in (base, whole / "policy"))
    for name, tensor in after.items():
        stem, expected = f"base_model.model.{name.removesuffix('.weight')}", before[name]
        if f"{stem}.lora_A.weight" in adapters:
            added = 2 * adapters[f"{stem}.lora_B.weight"] @ adapters[f"{stem}.lora_A.weight"]
            assert np.abs(added).max() > 1e-4
            expected = expected + added
        np.testing.assert_allclose(tensor, expected, rtol=0, atol=1e-6, err_msg=name)
    params, source = runs.latest_params(e, whole)
    assert source == "stage 'reinforce', step 4" and isinstance(params["layers"]["q"], LowRank)
    assert experiments.evaluator(e)(params)[0] == result.summary["after"]


def test_held_out_problems_are_answered_by_the_weights_themselves(base: Path, tmp_path: Path) -> None:
    """What is rounded samples rollouts only: accuracy is that of the policy that is trained and exported."""
    config = configs.load(str(TESTS / "short_run.py"), [f"--config.{each}" for each in (*RUN, f"model.path={base}")])
    e = experiments.build(config, tmp_path, devices=jax.devices()[:1])
    params = spec.abstract(e.specs, dtype="float32", mesh=e.mesh)
    prepared = (jax.eval_shape(model.prepare_sampling, params) for model in (e.model, experiments.exact_model(e)))
    assert [any(x.dtype == jnp.int8 for x in jax.tree.leaves(each)) for each in prepared] == [True, False]
