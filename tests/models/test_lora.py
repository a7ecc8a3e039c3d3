"""LoRA: W + scale A B in place of W, for every family and mesh, from initial values to PEFT's files.

What is computed, its gradients and the exported tensors are compared with those of merged matrices. A run is in test_int8.py.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from jaxreason import objectives, sharding
from jaxreason.batch import RolloutBatch
from jaxreason.compiling import compiled
from jaxreason.models import decoder, huggingface, lora, spec
from jaxreason.models.config import Numerics
from jaxreason.models.lora import LoraConfig
from jaxreason.numerics import token_logprobs
from jaxreason.training import state as states
from jaxreason.training.optimizer import OptimizerConfig, make_optimizer
from jaxreason.training.step import Split, make_update

FOLDER = Path(__file__).parents[1] / "fixtures" / "models"
FAMILIES = ("llama3", "gemma2", "phi3", "deepseek_v3", "qwen3_moe")
LORA = LoraConfig(rank=3, alpha=6.0)
QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}  # to compile
Shape = tuple[int, int, int, int, int]  # of the mesh, in the order of sharding.MESH_AXES
ONE: Shape = (1, 1, 1, 1, 1)


@pytest.fixture(autouse=True)
def highest_precision() -> Iterator[None]:
    with jax.default_matmul_precision("highest"):
        yield


class Made(NamedTuple):
    mesh: Any
    model: decoder.Model
    base: Any
    adapters: Any  # with a B that is not 0


def make(name: str, shape: Shape = ONE, *, dtype: str = "float32", config: LoraConfig = LORA, numerics: Any = None) -> Made:
    sizes = dict(zip(sharding.MESH_AXES, shape, strict=True))
    mesh = sharding.make_mesh(sharding.MeshConfig(**sizes), devices=jax.devices()[: int(np.prod(shape))])
    architecture = huggingface.read_architecture(FOLDER / name)
    model = decoder.make_decoder(architecture, numerics or Numerics(dtype, dtype), mesh)
    base = huggingface.load_params(model.specs, FOLDER / name, dtype=dtype, mesh=mesh)
    rng = np.random.default_rng(0)

    def draw(each: spec.ParamSpec) -> jax.Array:
        return jax.device_put(rng.normal(0, 0.2, each.shape).astype(dtype), sharding.named(mesh, each.axes))

    return Made(mesh, model, base, spec.tree_map(draw, lora.declare_lora(model.specs, config)))


@cache
def on_one_device(name: str) -> Made:
    return make(name)


def tokens() -> tuple[np.ndarray, np.ndarray]:
    """Rows [4, 12], padded on the left, and their mask."""
    rows = np.random.default_rng(1).integers(1, 96, (4, 12)).astype(np.int32)
    return rows, np.arange(12) >= np.array([0, 3, 1, 6])[:, None]


def logits(made: Made, *several: Any) -> list[np.ndarray]:
    """Of each of several trees of parameters."""
    rows, mask = tokens()
    run = jax.jit(lambda p: decoder.logits(made.model, p, jnp.asarray(rows), jnp.asarray(mask)), compiler_options=QUICK)
    return [np.asarray(run(params))[mask] for params in several]


# ---- declaration


@pytest.mark.parametrize("name", FAMILIES)
def test_adapters_are_declared_beside_their_weights(name: str) -> None:
    """Every matrix of a layer but the router, the routed experts and the latent's, with its inputs' and outputs' axes."""
    made = on_one_device(name)
    declared = lora.declare_lora(made.model.specs, LORA)
    left_out = {"router", "expert_gate", "expert_up", "expert_down", "kv_b"}
    for stack, layer in made.model.specs.items():
        if isinstance(layer, spec.ParamSpec):
            assert stack not in declared
            continue
        assert set(declared[stack]) == {n for n in layer if not n.endswith(("norm", "bias"))} - left_out
        for target, each in declared[stack].items():
            weight, cut = layer[target], 3 if target == "o" else 2
            assert each.scale == 2 and each.weight is None
            assert each.a.shape == (*weight.shape[:cut], 3) and each.b.shape == (weight.shape[0], 3, *weight.shape[cut:])
            assert each.a.axes == (*weight.axes[:cut], None) and each.b.axes == ("layers", None, *weight.axes[cut:])
    few = lora.declare_lora(made.model.specs, LoraConfig(rank=1, targets="o"))
    assert {name for layer in few.values() for name in layer} == {"o"} and set(few) == set(declared)


def test_initial_adapters_are_random_and_zero() -> None:
    """A has PEFT's deviation, 1 / sqrt(3 inputs), and its numbers do not depend on the other targets."""
    made = on_one_device("llama3")

    def drawn(targets: str) -> Any:
        declared = lora.declare_lora(made.model.specs, LoraConfig(rank=8, targets=targets))
        return spec.init(declared, jax.random.key(0), dtype="float32", mesh=made.mesh)["layers"]

    both = drawn("o down")
    for name, inputs in (("o", 4 * 16), ("down", 48)):
        a, b = np.asarray(both[name].a), np.asarray(both[name].b)
        assert a.std() == pytest.approx((3 * inputs) ** -0.5, rel=0.1) and abs(a.mean()) < 0.01 and not b.any()
    np.testing.assert_array_equal(both["down"].a, drawn("down")["down"].a)


@pytest.mark.parametrize(
    ("name", "config", "says"),
    [
        ("llama3", {"targets": "q w"}, "targets is 'q w', which has no adapters for 'w': expected 'all', .*: q k v o gate up down"),
        ("llama3", {"targets": "embed"}, "no adapters for 'embed'"),
        ("llama3", {"targets": " "}, "which names nothing: expected 'all'"),
        ("qwen3_moe", {"targets": "expert_gate"}, "no adapters for 'expert_gate'.*: q k v o$"),
        ("deepseek_v3", {"targets": "kv_b"}, "no adapters for 'kv_b'.*: o q_a q_b kv_a gate up down shared_gate .*$"),
        ("deepseek_v3", {"rank": 13}, r"rank is 13, and 'q_a' is a matrix \[32, 12\]: expected 1 to 12"),
        ("llama3", {"rank": 0}, "rank is 0, and 'q' is a matrix"),
        ("llama3", {"alpha": 0.0}, r"alpha is 0\.0: expected more than 0"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_sentence(name: str, config: dict[str, Any], says: str) -> None:
    specs = on_one_device(name).model.specs
    with pytest.raises(ValueError, match=rf"^config\.model\.lora\..*{says}"):
        lora.declare_lora(specs, LoraConfig(**{"rank": 2, **config}))


# ---- the function computed


def first_and_slow(first: tuple[str, ...]) -> list[Any]:
    """All families, those that are not among the first as slow tests."""
    return [name if name in first else pytest.param(name, marks=pytest.mark.slow) for name in FAMILIES]


@pytest.mark.parametrize("name", first_and_slow(("deepseek_v3",)))
def test_without_b_nothing_changes_and_merged_is_adapted(name: str) -> None:
    with jax.enable_x64(True):
        made = make(name, dtype="float64")
        without = jax.tree.map_with_path(lambda path, x: x if path[-1].name == "a" else jnp.zeros_like(x), made.adapters)
        adapted = lora.adapt(made.base, made.adapters)
        merged = lora.merge(adapted)
        assert jax.tree.structure(merged) == jax.tree.structure(made.base)
        plain, same, found, expected = logits(made, made.base, lora.adapt(made.base, without), adapted, merged)
    assert np.abs(found - plain).max() > 0.1
    np.testing.assert_allclose(same, plain, rtol=0, atol=1e-12)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-11)


def test_adapting_copies_nothing_and_can_be_done_again() -> None:
    made = on_one_device("deepseek_v3")
    adapted = lora.adapt(made.base, made.adapters)
    again = lora.adapt(adapted, jax.tree.map(lambda x: x + 1, made.adapters))
    pointers = {x.unsafe_buffer_pointer() for x in jax.tree.leaves((made.base, made.adapters))}
    assert {x.unsafe_buffer_pointer() for x in jax.tree.leaves(adapted)} == pointers
    assert again["layers0"]["gate"].weight is made.base["layers0"]["gate"]
    np.testing.assert_array_equal(again["layers0"]["gate"].a, made.adapters["layers0"]["gate"].a + 1)
    assert lora.adapt(None, made.base) is made.base and lora.adapt(made.base, adapted) is adapted


P, G, TP, T = 8, 2, 5, 6


def rollouts(mesh: Any, dtype: str) -> RolloutBatch:
    """Completions of uneven lengths, not sampled by the policy that learns from them."""
    rng = np.random.default_rng(1)
    mask = np.arange(T) < rng.integers(2, T + 1, (P, G, 1))
    host = RolloutBatch(
        prompt=rng.integers(1, 96, (P, TP)).astype(np.int32),
        prompt_mask=np.arange(TP)[None] >= rng.integers(0, TP - 1, (P, 1)),
        completion=rng.integers(1, 96, (P, G, T)).astype(np.int32),
        mask=mask,
        truncated=mask.all(-1),
        logp_behaviour=np.where(mask, rng.normal(-4.5, 0.2, mask.shape), 0.0).astype(dtype),
        reward=np.tile(np.array([0.0, 1.0], np.float32), (P, 1)),
    )
    return sharding.place(mesh, host, ("problems",))


def weighted_logp(made: Made, params: Any) -> jax.Array:
    batch = rollouts(made.mesh, made.model.numerics.param_dtype)
    hidden, _ = made.model.forward(params, batch.prompt, batch.prompt_mask, batch.completion, batch.mask)
    rows = hidden.reshape(P, G * T, -1)
    logp, _ = token_logprobs(rows, lambda h: made.model.project(params, h), batch.completion.reshape(P, -1))
    return jnp.sum(logp * jnp.sin(jnp.arange(P * G * T, dtype=logp.dtype)).reshape(P, -1))


@pytest.mark.parametrize("name", first_and_slow(("llama3",)))
def test_gradients_are_those_of_the_merged_weights_by_the_chain_rule(name: str) -> None:
    """dL/dA = scale dL/dW B^T and dL/dB = scale A^T dL/dW; the weights beneath get none; along a line they are the slope."""
    with jax.enable_x64(True):
        made = make(name, dtype="float64")
        adapted = lora.adapt(made.base, made.adapters)
        value = jax.jit(lambda p: weighted_logp(made, p), compiler_options=QUICK)
        gradient = jax.jit(jax.grad(lambda p: weighted_logp(made, p)), compiler_options=QUICK)
        merged, found = gradient(lora.merge(adapted)), gradient(adapted)
        slope, step = 0.0, 1e-6
        for stack, layer in made.adapters.items():
            for target, own in layer.items():
                given, whole = found[stack][target], np.asarray(merged[stack][target])
                layers, inputs = own.a.shape[0], int(np.prod(own.a.shape[1:-1]))
                a, b = np.asarray(own.a).reshape(layers, inputs, 3), np.asarray(own.b).reshape(layers, 3, -1)
                w = whole.reshape(layers, inputs, -1)
                scale = np.abs(w).max()
                assert scale > 1e-3
                np.testing.assert_allclose(given.a, (2 * w @ b.swapaxes(1, 2)).reshape(own.a.shape), rtol=0, atol=1e-9 * scale)
                np.testing.assert_allclose(given.b, (2 * a.swapaxes(1, 2) @ w).reshape(own.b.shape), rtol=0, atol=1e-9 * scale)
                assert not np.any(given.weight)
                slope += float(jnp.sum(given.a * jnp.cos(own.a)) + jnp.sum(given.b * jnp.cos(own.b)))

        def moved(by: float) -> float:
            return float(value(lora.adapt(made.base, jax.tree.map(lambda x: x + by * jnp.cos(x), made.adapters))))

        assert (moved(step) - moved(-step)) / (2 * step) == pytest.approx(slope, rel=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("alpha", [3.0, 6.0])
def test_bfloat16_gradients_with_layers_computed_again(alpha: float) -> None:
    """With a scale of 1 too, where XLA's CPU compiler once made a product that it cannot run; near those of float32."""

    def gradient(dtype: str) -> list[np.ndarray]:
        made = make("llama3", dtype=dtype, config=LoraConfig(rank=3, alpha=alpha))
        run = jax.jit(jax.grad(lambda adapters: weighted_logp(made, lora.adapt(made.base, adapters))))
        return [np.asarray(x, np.float32) for x in jax.tree.leaves(compiled(run, made.adapters)(made.adapters))]

    for narrow, exact in zip(gradient("bfloat16"), gradient("float32"), strict=True):
        assert np.sum(narrow * exact) > 0.98 * np.linalg.norm(narrow) * np.linalg.norm(exact)


# ---- training


class Trainer(NamedTuple):
    made: Made
    model: decoder.Model  # that declares the adapters
    optimizer: Any
    update: Any


@cache
def trainer(name: str, shape: Shape = ONE) -> Trainer:
    """GRPO with a reference in two micro-batches, in float64."""
    with jax.enable_x64(True):
        made = make(name, shape, dtype="float64")
        model = made.model._replace(specs=lora.declare_lora(made.model.specs, LORA))
        optimizer = make_optimizer(OptimizerConfig(learning_rate=1e-2), steps=4)
        update = make_update(model, objectives.grpo(beta=0.04), optimizer, temperature=0.9, split=Split(P, P // 2))
        at = (states.shardings(model, optimizer, made.mesh), sharding.named(made.mesh), sharding.named(made.mesh))
        return Trainer(made, model, optimizer, jax.jit(update, compiler_options=QUICK, out_shardings=at, donate_argnums=0))


def updated(t: Trainer, *, adapters: Any = None, reference: Any = None, steps: int = 1) -> tuple[Any, list[Any]]:
    """The state after updates on one batch of rollouts, and the metrics of each."""
    with jax.enable_x64(True):
        state = states.create(t.model, t.optimizer, t.made.mesh, t.made.adapters if adapters is None else adapters)
        batch, lines = rollouts(t.made.mesh, "float64"), []
        for _ in range(steps):
            state, metrics, _ = t.update(state, t.made.base if reference is None else reference, batch)
            lines.append(sharding.fetch(metrics))
        return state, lines


def test_training_moves_the_adapters_and_nothing_else() -> None:
    """The reference is the base's own arrays: no second copy of them is alive; moments are the adapters' alone."""
    t = trainer("llama3")
    with jax.enable_x64(True):
        fresh = spec.init(t.model.specs, jax.random.key(0), dtype="float64", mesh=t.made.mesh)
    before, alive = sharding.fetch(t.made.base), {id(x) for x in jax.live_arrays()}
    state, lines = updated(t, adapters=fresh, steps=2)
    new = sum(x.nbytes for x in jax.live_arrays() if id(x) not in alive)
    adapters = sum(x.nbytes for x in jax.tree.leaves(fresh))
    assert 3 * adapters <= new < 3 * adapters + 1000 < sum(x.nbytes for x in jax.tree.leaves(t.made.base))  # two moments, counters
    jax.tree.map(np.testing.assert_array_equal, sharding.fetch(t.made.base), before)
    assert jax.tree.structure(state.params) == jax.tree.structure(fresh)
    for given, first in zip(jax.tree.leaves(state.params), jax.tree.leaves(fresh), strict=True):
        assert 0 < np.abs(np.asarray(given) - np.asarray(first)).max() < 0.03
    # as long as B is 0 the policy is the reference
    assert lines[0]["policy/kl_ref"] < 1e-20 and lines[1]["policy/kl_ref"] > 1e-6


@pytest.mark.slow  # a run in test_int8.py says it too
def test_adapters_of_the_reference_are_not_those_that_learn() -> None:
    """After a supervised stage the reference is the base with a copy of its adapters: the first update sees no divergence."""
    t = trainer("llama3")
    reference = lora.adapt(t.made.base, jax.tree.map(jnp.copy, t.made.adapters))
    (_, (own,)), (_, (bare,)) = updated(t, reference=reference), updated(t)
    assert own["policy/kl_ref"] < 1e-20 and bare["policy/kl_ref"] > 1e-3
    assert own["policy/entropy"] == pytest.approx(bare["policy/entropy"], rel=1e-12)  # the policy is the same


MESHES = [("llama3", (1, 2, 1, 2, 2))]
MORE = [
    ("deepseek_v3", (1, 2, 2, 1, 2)),
    ("deepseek_v3", (2, 2, 1, 2, 1)),
    ("gemma2", (2, 1, 1, 2, 2)),
    ("phi3", (1, 4, 1, 1, 2)),
    ("qwen3_moe", (2, 1, 2, 1, 2)),
]


@pytest.mark.parametrize(("name", "shape"), [*MESHES, *(pytest.param(*each, marks=pytest.mark.slow) for each in MORE)])
def test_an_update_on_a_mesh_is_that_of_one_device(name: str, shape: Shape) -> None:
    """Parameters, moments and metrics; and adapters lie in parts, as their weights' inputs and outputs do."""
    one, many = updated(trainer(name)), updated(trainer(name, shape))
    assert one[1][0]["optimizer/gradient_norm"] > 0.01
    for (path, a), b in zip(jax.tree.leaves_with_path(many), jax.tree.leaves(one), strict=True):
        np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=1e-9, atol=1e-9, err_msg=jax.tree_util.keystr(path))
    for tree in (many[0].params, many[0].opt_state[1][0].mu):
        o = tree["layers0" if "layers0" in tree else "layers"]["o"]
        assert o.a.sharding.num_devices == o.b.sharding.num_devices == 8
        assert o.a.addressable_shards[0].data.shape[1] == o.a.shape[1] // shape[4]  # heads over tensor
        assert o.b.addressable_shards[0].data.shape[2] == o.b.shape[2] // shape[1]  # width over fsdp


# ---- PEFT


def peft_folder(made: Made, folder: Path, *, config: LoraConfig) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    lora.export(made.adapters, made.model.specs, config, folder, base="owner/name")
    assert sorted(each.name for each in folder.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    return load_file(folder / "adapter_model.safetensors"), json.loads((folder / "adapter_config.json").read_text())


SOME = [("phi3", "q v down"), ("phi3", "up"), ("deepseek_v3", "o gate shared_down")]


@pytest.mark.parametrize(("name", "targets"), [*((name, "all") for name in FAMILIES), *SOME])
def test_the_adapters_of_a_folder_make_the_weights_of_the_exported_policy(name: str, targets: str, tmp_path: Path) -> None:
    """As PEFT does it, by NumPy: W + (alpha / r) B A for every module, and all other tensors as they were."""
    config = LoraConfig(rank=3, alpha=6.0, targets=targets)
    made = make(name, config=config)
    tensors, said = peft_folder(made, tmp_path / "adapter", config=config)
    architecture = huggingface.read_architecture(FOLDER / name)
    policy = lora.merge(lora.adapt(made.base, made.adapters))
    for params, folder in ((made.base, "base"), (policy, "policy")):
        huggingface.export(params, architecture, None, tmp_path / folder)
    base, merged = (load_file(tmp_path / folder / "model.safetensors") for folder in ("base", "policy"))
    names = [*said["target_modules"], *(each.removesuffix(".weight") for each in said["target_parameters"] or ())]
    changed = set()
    for name_a in (each for each in tensors if "lora_A" in each):
        a, b = tensors[name_a], tensors[name_a.replace("lora_A", "lora_B")]
        module = name_a.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
        (named,) = [each for each in names if module.endswith(f".{each}")]
        rank, alpha = said["rank_pattern"].get(named, said["r"]), said["alpha_pattern"].get(named, said["lora_alpha"])
        assert a.shape[0] == b.shape[1] == rank and a.dtype == b.dtype == np.float32
        changed.add(f"{module}.weight")
        np.testing.assert_allclose(base[f"{module}.weight"] + alpha / rank * b @ a, merged[f"{module}.weight"], rtol=0, atol=1e-6)
    assert {each for each in base if not np.array_equal(base[each], merged[each])} == changed and len(tensors) == 2 * len(changed)
    # none is the name of a module without adapters too
    assert {each for each in base if any(each.endswith(f".{name}.weight") for name in names)} == changed
    assert said["base_model_name_or_path"] == "owner/name" and said["peft_type"] == "LORA" and said["task_type"] == "CAUSAL_LM"


@pytest.mark.torch
@pytest.mark.filterwarnings("default")  # torch's, transformers' and PEFT's own
@pytest.mark.parametrize(("name", "targets"), [*((name, "all") for name in FAMILIES), *SOME])
def test_peft_computes_the_same_from_the_folder(name: str, targets: str, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft", reason="compares with PEFT, which is not installed")
    torch = pytest.importorskip("torch", reason="compares with PyTorch, which is not installed")
    from transformers import AutoModelForCausalLM

    config = LoraConfig(rank=3, alpha=6.0, targets=targets)
    made = make(name, config=config)
    peft_folder(made, tmp_path, config=config)
    theirs = AutoModelForCausalLM.from_pretrained(FOLDER / name, dtype=torch.float32, attn_implementation="eager")
    rows, mask = tokens()
    inputs = {"input_ids": torch.tensor(rows).long(), "attention_mask": torch.tensor(mask).long()}
    inputs["position_ids"] = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        plain = theirs.eval()(**inputs).logits.numpy()[mask]
        adapted = peft.PeftModel.from_pretrained(theirs, tmp_path).eval()
        expected = adapted(**inputs).logits.numpy()[mask]
    loaded = {key for key in adapted.state_dict() if "lora_" in key}
    assert len(loaded) == len(load_file(tmp_path / "adapter_model.safetensors"))
    assert np.abs(expected - plain).max() > 0.1
    (found,) = logits(made, lora.adapt(made.base, made.adapters))
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)
