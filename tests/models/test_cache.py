"""Keys and values in eight bits: what is rounded and how far, what is sampled then by every family, and what a run says of it."""

from __future__ import annotations

from functools import cache, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxreason import config as configs
from jaxreason import sharding
from jaxreason.batch import PromptBatch
from jaxreason.models import cache as caches
from jaxreason.models import config as model_configs
from jaxreason.models import decoder, huggingface, spec
from jaxreason.models.config import Architecture, Numerics
from jaxreason.models.rounded import Rounded, rounded
from jaxreason.pipelines import experiment as experiments
from jaxreason.pipelines import run as runs
from jaxreason.sampling.rollout import Sampled, sample
from jaxreason.training.metrics import read_jsonl

from .test_int8 import QUICK, Recorder

TESTS = Path(__file__).parents[1]
INT8 = Numerics(sampling_cache="int8")
V, GROUP, PROMPT = 96, 4, 7


def mesh_of(**sizes: int) -> Any:
    sizes = {"data": 1, **sizes}
    return sharding.make_mesh(sharding.MeshConfig(**sizes), devices=jax.devices()[: int(np.prod([*sizes.values()]))])


def prompts_of(mesh: Any, count: int = 4) -> PromptBatch:
    rng = np.random.default_rng(0)
    tokens = rng.integers(1, V, (count, PROMPT)).astype(np.int32)
    mask = np.arange(PROMPT) >= rng.integers(0, PROMPT, (count, 1))
    whole = PromptBatch(tokens, mask, np.arange(count, dtype=np.uint32), np.zeros(count, np.int32))
    return sharding.place(mesh, whole, ("problems",))


def drawn(model: Any, params: Any, mesh: Any, *, tokens: int, slots: int = 0, score: bool = False) -> Any:
    """Completions, and, where asked, their log-probabilities by the training forward pass."""

    fixed: Any = {"group": GROUP, "max_completion_tokens": tokens, "slots": slots}
    fixed |= {"eos_ids": (2,), "pad_id": 0}

    def run(params: Any, prompts: PromptBatch, key: jax.Array) -> Any:
        made = sample(model, params, prompts, key, **fixed)
        if not score:
            return made
        hidden = model.completion_hidden(params, prompts.prompt, prompts.prompt_mask, made.completion)
        logits = model.project(params, hidden.reshape(-1, hidden.shape[-1])).reshape(*hidden.shape[:-1], -1)
        logp = jnp.take_along_axis(jax.nn.log_softmax(logits), made.completion[..., None], axis=-1)[..., 0]
        return made, logp

    return sharding.fetch(jax.jit(run, compiler_options=QUICK)(params, prompts_of(mesh), jax.random.key(1)))


def loaded(name: str, numerics: Numerics, mesh: Any) -> tuple[Any, Any]:
    folder = TESTS / "fixtures" / "models" / name
    model = decoder.make_decoder(huggingface.read_architecture(folder), numerics, mesh)
    return model, huggingface.load_params(model.specs, folder, dtype="float32", mesh=mesh)


def same(a: Sampled, b: Sampled) -> None:
    np.testing.assert_array_equal(a.completion, b.completion)
    np.testing.assert_allclose(a.logp, b.logp, rtol=0, atol=2e-5)


def test_a_rounded_token_is_within_half_a_step_of_its_head() -> None:
    rng = np.random.default_rng(0)
    x = (rng.normal(size=(3, 5, 2, 16)) * 10.0 ** rng.integers(-3, 4, (3, 5, 2, 1))).astype(np.float32)
    x[1, 2, 0] = 0
    found = rounded(jnp.asarray(x))
    assert found.numbers.dtype == jnp.int8 and found.scale.shape == (3, 5, 2, 1) and found.scale.dtype == jnp.float32
    largest = np.abs(x).max(axis=-1, keepdims=True)
    error = np.abs(np.asarray(found.numbers, np.float32) * np.asarray(found.scale) - x)
    assert (error <= largest / 254 * (1 + 1e-5)).all() and (error > largest / 300).any()
    np.testing.assert_array_equal(np.abs(np.asarray(found.numbers)).max(axis=-1, keepdims=True) == 127, largest > 0)


# by how much log-probabilities are off on average and at most; these models' weights are large, so that all of them matter,
# and a token whose experts change with a rounded key is off by any amount
FAMILIES = {"llama3": (0.02, 0.15), "gemma2": (0.02, 0.15), "deepseek_v3": (0.06, np.inf), "qwen3_moe": (0.04, np.inf)}


@pytest.mark.parametrize(
    "name", ["gemma2", "deepseek_v3", *(pytest.param(name, marks=pytest.mark.slow) for name in ("llama3", "qwen3_moe"))]
)
def test_log_probabilities_are_off_by_a_little(name: str) -> None:
    """Dense, windowed with soft-caps, latent, and with experts; of those that sampled, against the training forward pass."""
    mesh = mesh_of()
    made, logp = drawn(*loaded(name, INT8, mesh), mesh, tokens=12, score=True)
    gap = np.abs(made.logp - logp)
    mean, largest = FAMILIES[name]
    assert 1e-3 < gap[made.mask].mean() < mean and gap[made.mask].max() < largest
    assert gap[:, :, 0].max() < 2e-5  # a prompt's own tokens read exact keys


def architecture(layers: int) -> Architecture:
    sizes: Any = {
        "hidden_size": 32,
        "layers": layers,
        "heads": 4,
        "kv_heads": 2,
        "head_size": 8,
        "mlp_size": 48,
        "max_positions": 512,
    }
    return Architecture(vocab_size=V, initializer_range=0.25, **sizes)


@cache
def policy(layers: int, dtype: str = "float32") -> tuple[Any, Any, Any]:
    mesh = mesh_of()
    model = decoder.make_decoder(architecture(layers), Numerics(dtype, dtype, sampling_cache="int8"), mesh)
    return model, spec.init(model.specs, jax.random.key(0), dtype=dtype, mesh=mesh), mesh


@pytest.mark.parametrize(("layers", "tokens"), [(1, 24), (2, 136)], ids=["whole", "blocks"])
def test_completions_do_not_depend_on_the_number_of_slots(layers: int, tokens: int) -> None:
    """In float64: which step is nearest must not hang on a sum's order."""
    with jax.enable_x64(True):
        every = drawn(*policy(layers, "float64"), tokens=tokens)
        assert every.mask.sum(axis=-1).min() < 16 < every.mask.sum(axis=-1).max()
        same(drawn(*policy(layers, "float64"), tokens=tokens, slots=4), every)


def test_scanned_layers_sample_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    every = drawn(*policy(2), tokens=24)
    monkeypatch.setattr(caches, "UNROLLED_LAYERS", 0)
    same(drawn(*policy(2), tokens=24, slots=4), every)


@pytest.mark.slow
def test_a_mesh_samples_the_same() -> None:
    """Each device rounds its own heads' keys and values. In float64: which step is nearest must not hang on a sum's order."""

    def made(mesh: Any, slots: int) -> Sampled:
        model = decoder.make_decoder(architecture(2), Numerics("float64", "float64", sampling_cache="int8"), mesh)
        params = spec.init(model.specs, jax.random.key(0), dtype="float64", mesh=mesh)
        return drawn(model, params, mesh, tokens=12, slots=slots)

    with jax.enable_x64(True):
        same(made(mesh_of(data=2, tensor=2), 8), made(mesh_of(), 0))


@pytest.mark.parametrize("name", ["llama3", "deepseek_v3"])
def test_the_cache_takes_a_quarter_and_its_scales(name: str) -> None:
    """A float32 scale for C numbers of a byte each, of C x 4 bytes."""

    def size(sampling_cache: str) -> tuple[int, Any]:
        model, params = loaded(name, Numerics(sampling_cache=sampling_cache), mesh_of())
        prepared = jax.eval_shape(model.prepare_sampling, params)
        prompt = jax.ShapeDtypeStruct((4, 64), jnp.int32)
        _, prompts = jax.eval_shape(model.prefill, prepared, prompt, jax.ShapeDtypeStruct((4, 64), jnp.bool_))
        own = jax.eval_shape(partial(model.empty, slots=16, tokens=256), prompts)
        return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves((prompts.k, prompts.v, own))), prompts.k[0]

    (ours, keys), (exact, _), (half, narrow) = size("int8"), size(""), size("bfloat16")
    assert isinstance(keys, Rounded) and narrow.dtype == jnp.bfloat16 and 2 * half == exact
    width = keys.numbers.shape[-2]
    assert ours * 4 * width == exact * (width + 4)


def test_a_cache_in_bfloat16_rounds_keys_and_values_alone() -> None:
    mesh = mesh_of()
    made, logp = drawn(*loaded("llama3", Numerics(sampling_cache="bfloat16"), mesh), mesh, tokens=12, score=True)
    assert 1e-4 < np.abs(made.logp - logp)[made.mask].mean() < 0.02


def test_the_type_without_a_name() -> None:
    """The operands', but bfloat16 on accelerators; float64 stays."""

    def kind(platform: str, **numerics: str) -> str:
        device = type("Device", (), {"platform": platform})
        mesh = type("Mesh", (), {"devices": np.asarray([device])})
        return caches._kind(decoder.Context(architecture(1), Numerics(**numerics), mesh))  # type: ignore[arg-type]

    assert [kind(each) for each in ("cpu", "gpu", "tpu")] == ["float32", "bfloat16", "bfloat16"]
    assert kind("cpu", matmul_dtype="bfloat16") == "bfloat16" and kind("tpu", sampling_cache="float32") == "float32"
    assert kind("gpu", param_dtype="float64", matmul_dtype="float64") == "float64"


def test_an_unknown_type_is_refused() -> None:
    for given, matmul in (("int4", "float32"), ("float32", "bfloat16")):
        expected = f"sampling_cache is '{given}' with matmul_dtype '{matmul}': expected one of '', 'int8', 'bfloat16'"
        with pytest.raises(ValueError, match=expected):
            model_configs.check_numerics(Numerics(matmul_dtype=matmul, sampling_cache=given))


RUN = (
    "model.numerics.sampling_cache=int8",
    "supervised.phases.base.steps=0",
    "supervised.phases.cold_start.steps=0",
    "online.steps=2",
)


def test_a_run_says_what_it_does(tmp_path: Path, compiled_once: None) -> None:
    """The gap is logged, and held-out problems are answered from an exact cache."""
    config = configs.load(str(TESTS / "short_run.py"), [f"--config.{each}" for each in (*RUN, "evaluation.every_steps=0")])
    assert runs.train(config, tmp_path, progress=Recorder(), stop=lambda: False, devices=jax.devices()[:1]).finished
    lines = [line for line in read_jsonl(tmp_path / "metrics.jsonl") if "policy/sampler_gap" in line]
    assert len(lines) == 2 and all(3e-5 < line["policy/sampler_gap"] < 0.01 and line["policy/ratio_max"] == 1 for line in lines)
    e = experiments.build(config, tmp_path, devices=jax.devices()[:1])
    model, params = experiments.exact_model(e), spec.abstract(e.specs, dtype="float32", mesh=e.mesh)
    tokens = jax.ShapeDtypeStruct((2, 8), jnp.int32)
    prompts = jax.eval_shape(lambda p, t: model.prefill(model.prepare_sampling(p), t, t > 0)[1], params, tokens)
    assert {x.dtype for x in jax.tree.leaves((prompts.k, prompts.v))} == {jnp.dtype("float32")}
