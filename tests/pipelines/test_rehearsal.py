"""A rehearsal's counts against independent ones, its mistakes in one sentence, and, where libtpu is, two runs compiled for TPUs."""

from __future__ import annotations

import importlib.util
import json
import math
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from jaxreason import config as schema
from jaxreason import sharding
from jaxreason.cli.main import main
from jaxreason.cli.rehearse import LIBTPU
from jaxreason.models import decoder, families, kernels, spec
from jaxreason.models.config import Architecture, Experts, Latent, Numerics
from jaxreason.models.declare import declare
from jaxreason.pipelines import chips, rehearsal, roofline, run, traffic
from jaxreason.pipelines.roofline import Rows
from jaxreason.sharding import MeshConfig

SIZES: dict[str, Any] = {"vocab_size": 512, "hidden_size": 128, "layers": 1, "heads": 8, "kv_heads": 4, "head_size": 16}
SIZES |= {"mlp_size": 256, "max_positions": 64, "tied": False}
ARCHITECTURES = {
    "dense": Architecture(family="llama", **SIZES),
    "latent": Architecture(
        family="deepseek_v3",
        **SIZES | {"kv_heads": 8, "head_size": 24},
        latent=Latent(kv_rank=32, q_rank=48, rotated=8, value_size=16),
    ),
}


# ---- slices and meshes


def test_slices_are_read_by_name() -> None:
    assert chips.read("v5e:8x8") == ("v5e", (8, 8)) and chips.read("v5e:8x8").chips == 64
    assert chips.read("v5p:4x4x4").name == "v5:4x4x4"
    assert chips.read("v5:8x16x16").chips == 2048 and chips.read("v5:2x4x4").chips == 32


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("v7:4x4", "whose chip is not known: did you mean 'v5'\\?|choose one of v5e, v6e, v5"),
        ("v5e:7x8", r"no such slice: the nearest are v5e:8x8"),
        ("v5e:32x32", r"the nearest are v5e:16x16, v5e:8x16"),
        ("v5:4x4x5", r"the nearest are v5:4x4x4"),
        ("v5:128", r"no such slice: the nearest are"),
        ("v6e", "no shape in chips: write it as in v6e:8x8"),
    ],
)
def test_an_unknown_slice_names_the_nearest(name: str, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        chips.read(name)


def test_the_nearest_meshes_are_those_that_the_torus_has() -> None:
    near = chips.nearest_meshes(MeshConfig(data=1, fsdp=8, tensor=8), chips.read("v5:4x4x4"))
    assert {(mesh["fsdp"], mesh["tensor"]) for mesh in near[:2]} == {(16, 4), (4, 16)}
    assert all(math.prod(mesh.values()) == 64 for mesh in near)
    near = chips.nearest_meshes(MeshConfig(data=1, fsdp=12, tensor=4), chips.read("v5e:8x8"))
    assert (near[0]["fsdp"], near[0]["tensor"]) == (16, 4)


# ---- operations


def cost(function: Any, *args: Any) -> float:
    return jax.jit(function).lower(*args).compile().cost_analysis()["flops"]


@pytest.mark.parametrize("name", ["dense", "latent"])
def test_operations_are_what_xla_counts(name: str) -> None:
    """Of one layer, whose scan has one round, with logits in one chunk: XLA counts a loop's body once.

    To 6 %: XLA counts norms, softmaxes and activations too, and of attention masked pairs.
    """
    a, rows = ARCHITECTURES[name], Rows(4, 8, 2, 9)
    mesh = sharding.make_mesh(MeshConfig(), devices=jax.devices()[:1])
    model = decoder.make_decoder(a, Numerics(remat="none", logits_chunk_tokens=1024), mesh)
    params = spec.abstract(model.specs, dtype="float32", mesh=mesh)
    shape = (rows.problems, rows.prompt)
    prompt, mask = jax.ShapeDtypeStruct(shape, jnp.int32), jax.ShapeDtypeStruct(shape, jnp.bool_)
    completion = jax.ShapeDtypeStruct((rows.problems, rows.group, rows.tokens), jnp.int32)

    def logp(params: Any, prompt: Any, mask: Any, completion: Any) -> Any:
        hidden = model.completion_hidden(params, prompt, mask, completion)
        flat = model.project(params, hidden.reshape(-1, a.hidden_size))
        return jnp.sum(jnp.max(flat, axis=-1))

    counted = roofline.forward(model.specs, a, rows)
    assert cost(logp, params, prompt, mask, completion) == pytest.approx(counted, rel=0.06)
    if name == "dense":
        both = counted + roofline.backward(model.specs, a, rows)
        assert cost(jax.value_and_grad(logp), params, prompt, mask, completion) == pytest.approx(both, rel=0.06)


def test_chosen_experts_alone_are_counted() -> None:
    a = Architecture(family="qwen3_moe", **SIZES, experts=Experts(count=8, chosen=2, mlp_size=64))
    dense = Architecture(family="qwen3", **SIZES | {"mlp_size": 2 * 64})  # two experts side by side
    router = 128 * 8
    assert roofline.weights(declare(a), a).layers == roofline.weights(declare(dense), dense).layers + router


@pytest.mark.parametrize("window", [0, 5])
def test_pairs_are_those_of_the_mask(window: int) -> None:
    layout = kernels.Layout(7, 3, 6)
    pairs = kernels.allowed(layout, window=window).sum()
    assert roofline.seen(0, 7, window=window) + 3 * roofline.seen(7, 6, window=window) == pairs


def test_the_expected_share_of_experts() -> None:
    a = Architecture(family="qwen3_moe", **SIZES, experts=Experts(count=16, chosen=2, mlp_size=64))
    rng = np.random.default_rng(0)
    drawn = [len({e for _ in range(10) for e in rng.choice(16, 2, replace=False)}) / 16 for _ in range(2000)]
    assert roofline.touched(a, 10) == pytest.approx(np.mean(drawn), abs=0.01)
    assert roofline.touched(ARCHITECTURES["dense"], 10) == 1


# ---- what is sent


def test_collectives_are_counted_by_loop_and_axis() -> None:
    """A toy with known traffic: in each of 5 rounds a gathering over fsdp, after them a sum over both axes."""
    mesh = sharding.make_mesh(MeshConfig(data=2, fsdp=4), devices=jax.devices()[:8])

    def own(x: jax.Array) -> jax.Array:
        def turn(total: jax.Array, _: None) -> tuple[jax.Array, None]:
            whole = jax.lax.all_gather(total, "fsdp", axis=0, tiled=True)
            return jax.lax.pcast(jnp.sin(whole[:32] + whole[32:64]), (), to="varying"), None

        x, _ = jax.lax.scan(turn, x, None, length=5)
        return jax.lax.psum(x, ("data", "fsdp"))

    split = PartitionSpec(("data", "fsdp"), None)
    function = jax.shard_map(own, mesh=mesh, in_specs=split, out_specs=PartitionSpec(), check_vma=False)
    x = jax.ShapeDtypeStruct((8 * 32, 16), jnp.float32, sharding=jax.sharding.NamedSharding(mesh, split))
    found = traffic.collectives(jax.jit(function).lower(x).compile().as_text(), mesh)
    gathered = next(each for each in found if each.kind == "all-gather")
    assert (gathered.over, gathered.loops, gathered.count) == ("fsdp", ("5",), 1)
    assert gathered.bytes == 3 * 32 * 16 * 4 and gathered.total(decoding=1) == 5 * gathered.bytes
    summed = next(each for each in found if each.kind == "all-reduce")
    assert (summed.over, summed.loops) == ("data fsdp", ()) and summed.bytes == 2 * 7 / 8 * 32 * 16 * 4


TPU_TEXT = """HloModule toy

%all-reduce-scatter.1 (input: f32[64,8]) -> f32[16,8] {
  %input = f32[64,8]{1,0} parameter(0)
  %all-reduce.2 = f32[64,8]{1,0} all-reduce(%input), channel_id=1, replica_groups={{0,1,2,3},{4,5,6,7}}, to_apply=%add
  ROOT %dynamic-slice.1 = f32[16,8]{1,0} dynamic-slice(%all-reduce.2, %a, %b), dynamic_slice_sizes={16,8}
}

%started (p: bf16[4,8]) -> bf16[16,8] {
  ROOT %all-gather.1 = bf16[16,8]{1,0} all-gather(%p), channel_id=7, replica_groups=[2,4]<=[8], dimensions={0}
}

%async_collective_fusion.3 (p: bf16[4,8]) -> bf16[16,8] {
  ROOT %all-gather.2 = bf16[16,8]{1,0} all-gather(%p), channel_id=7, replica_groups=[2,4]<=[8], dimensions={0}
}

%layer (arg: (s32[], f32[64,8])) -> (s32[], f32[64,8]) {
  %async-collective-start.1 = (bf16[4,8], bf16[16,8]) fusion(%x), kind=kCustom, calls=%started
  %fusion.9 = (f32[64,8], bf16[16,8]) fusion(%y), kind=kOutput, calls=%async_collective_fusion.3
  %fusion.10 = f32[16,8]{1,0} fusion(%z), kind=kCustom, calls=%all-reduce-scatter.1
}

%under (arg: (s32[], f32[64,8])) -> pred[] {
  %constant.4 = s32[]{:T(128)} constant(28), backend_config={}
  %i = s32[]{:T(128)} get-tuple-element(%arg), index=0
  ROOT %lt.1 = pred[]{:T(512)} compare(%i, %constant.4), direction=LT
}

%token (arg: (s32[], f32[64,8])) -> (s32[], f32[64,8]) {
  %while.2 = (s32[], f32[64,8]) while(%tuple.2), condition=%under, body=%layer
  %permuted = (f32[8,8], f32[8,8], u32[], u32[]) collective-permute-start(%q), source_target_pairs={{0,4},{1,5},{2,6},{3,7}}
  %conditional.1 = f32[8] conditional(%p, %a, %b), branch_computations={%taken, %not_taken}
}

%taken (p: f32[8]) -> f32[8] {
  ROOT %all-reduce.9 = f32[8]{0} all-reduce(%p), channel_id=11, replica_groups=mesh['a'=2,'b'=4] {'b'}, to_apply=%add
}

%not_taken (p: f32[8]) -> f32[8] {
  ROOT %same = f32[8]{0} copy(%p)
}

%ended (arg: (s32[], f32[64,8])) -> pred[] {
  ROOT %or.1 = pred[] or(%a, %b)
}

ENTRY %main (p: f32[64,8]) -> f32[64,8] {
  %while.1 = (s32[], f32[64,8]) while(%tuple.1), condition=%ended, body=%token
}
"""


def test_a_tpu_programs_ways_of_writing_are_read() -> None:
    """Asynchronous ones once, a sum of which parts are kept as such, rounds from conditions, branches and endless loops as such."""
    mesh = sharding.make_mesh(MeshConfig(data=2, fsdp=4), devices=jax.devices()[:8])
    found = {each.kind: each for each in traffic.collectives(TPU_TEXT, mesh)}
    layer = (traffic.DECODING, "28")
    assert found["all-gather"] == ("all-gather", "fsdp", layer, 1, 16 * 8 * 2 * 3 / 4)
    assert found["reduce-scatter"] == ("reduce-scatter", "fsdp", layer, 1, 64 * 8 * 4 * 3 / 4)
    assert found["reduce-scatter"].total(decoding=10) == 280 * 64 * 8 * 4 * 3 / 4
    assert found["collective-permute"] == ("collective-permute", "data", (traffic.DECODING,), 1, 8 * 8 * 4)
    assert found["all-reduce"] == ("all-reduce", "fsdp", (traffic.DECODING, traffic.BRANCH), 1, 2 * 8 * 4 * 3 / 4)
    assert found["all-reduce"].total(decoding=10) is None


# ---- descriptions and memory


def shipped() -> list[Path]:
    return sorted((schema.config_folder() / rehearsal.DESCRIPTIONS).glob("*.json"))


# in billions, as their makers state them
PUBLISHED = {"Qwen2.5-7B": 7.61, "Qwen3-30B-A3B-Base": 30.5, "DeepSeek-V3-Base": 671.0, "deepseek-math-7b-instruct": 6.91}


@pytest.mark.parametrize("file", shipped(), ids=lambda file: file.stem)
def test_described_models_have_their_published_sizes(file: Path) -> None:
    architecture = families.read(json.loads(file.read_text(encoding="utf-8")), file)
    assert spec.count(declare(architecture)) / 1e9 == pytest.approx(PUBLISHED[file.stem], rel=2e-3)


def described(tmp_path: Path, *overrides: str, folder: Path | None = None) -> Any:
    """A config of the shipped ones, of a model in a folder, on 8 devices that are here."""
    small = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": 256, "num_attention_heads": 4}
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "qwen2", "num_key_value_heads": 4, "max_position_embeddings": 128, "eos_token_id": 7, **small})
    )
    sizes = ["--config.sampling.max_prompt_tokens=16", "--config.sampling.max_completion_tokens=16", "--config.sampling.slots=0"]
    sizes += [f"--config.online.problems_per_{each}=8" for each in ("step", "update", "microbatch")]
    sizes += ["--config.online.completions_per_problem=2", "--config.evaluation.problems_per_batch=8", "--config.mesh.tensor=2"]
    config = schema.load("r1_zero_7b", [f"--config.model.path={folder or tmp_path}", *sizes, *overrides])
    mesh = sharding.make_mesh(config.mesh, devices=jax.devices()[:8])
    return rehearsal.described(config, mesh, tmp_path)


def test_bytes_are_those_of_the_declarations(tmp_path: Path) -> None:
    """bfloat16 parameters 2, float32 copy and two moments 12, over fsdp 4 and tensor 2; norms and biases are not all split."""
    e = described(tmp_path)
    memory = rehearsal.memory_of(e)
    split = {"embed": 8, "heads": 2, "kv_heads": 2, "mlp": 8, "vocab": 8}
    count = 0
    for _, each in spec.leaves(e.specs):
        over = {"fsdp": 4 if "embed" in each.axes else 1, "tensor": 2 if set(each.axes) & split.keys() - {"embed"} else 1}
        count += math.prod(each.shape) // math.prod(over.values())
    assert memory["parameters"] == memory["reference"] == 2 * count
    assert 12 * count <= memory["optimiser"] <= 12 * count + 64  # and its counters
    assert abs(count - spec.count(e.specs) / 8) < 0.05 * count
    # of 8 prompts in blocks of 32 and 16 completions, over 4 shards: keys and values of 2 of the 4 heads in 2 layers
    assert memory["cache"] == (8 * 32 + 16 * 16) // 4 * (2 * 2 * 2 * 16 * 2)


def test_a_step_takes_what_its_parts_take(tmp_path: Path) -> None:
    """By hand, of given programs: each part's time is the longest of three, and the collectives go to the part they are in."""
    e, chip = described(tmp_path), chips.CHIPS["v5e"]
    gathered = traffic.Sent("all-gather", "fsdp", (), 1, 7e9)
    decoded = traffic.Sent("all-reduce", "tensor", (traffic.DECODING, "2"), 4, 5e9)
    learnt = traffic.Sent("all-reduce", "fsdp", ("2",), 4, 3e9)
    programs = (
        rehearsal.Program("sample", 0, 0, 0, True, 0.0, (gathered, decoded)),
        rehearsal.Program("update", 0, 0, 0, True, 0.0, (learnt,)),
    )
    parts, flops = rehearsal.parts_of(e, chips.read("v5e:2x4"), programs, 10)
    assert [part.sent_bytes for part in parts] == [7e9, 10 * 2 * 5e9, 2 * 3e9]
    assert [part.seconds for part in parts] == [part.sent_bytes / chip.links for part in parts]
    assert {part.bound for part in parts} == {"interconnect"}
    whole = Rows(8, 16, 2, 16)  # the update's shape; completions are written to 10 tokens
    forward = roofline.forward(e.specs, e.architecture, whole)
    sampling = sum(roofline.sampling(e.specs, e.architecture, whole._replace(tokens=10)))
    assert flops == pytest.approx(4 * forward + sampling)  # the reference's pass, and 3 of the policy's
    assert parts[2].flops * 8 == pytest.approx(5 * forward)  # of which remat computes one again
    # a token's weights once a step, in two bytes, of half of each layer; all keys that were written, and a share of the prompt's
    layer = sum(math.prod(each.shape) for path, each in spec.leaves(e.specs) if each.axes and set(each.axes) & TENSOR)
    rest = spec.count(e.specs) - layer
    head = math.prod(e.specs["embed"].shape)
    keys = 16 / 4 * (10 / 2 + 16 / 2) * 2 * 2 * 2 * 16 * 2
    assert parts[1].hbm_bytes == pytest.approx(10 * (2 * ((layer - head) / 2 + rest) + keys))


TENSOR = {"heads", "kv_heads", "mlp", "vocab"}


@pytest.mark.slow
def test_the_programs_are_compiled_from_shapes_alone(tmp_path: Path) -> None:
    e = described(tmp_path)
    told: list[str] = []
    sample, update = rehearsal.programs_of(e, told.append)
    assert told == ["sample", "update"] and sample.compiled and update.compiled
    memory = rehearsal.memory_of(e)
    assert sample.beside == memory["optimiser"] + memory["reference"] + 4  # the state's count
    given = memory["parameters"] + memory["optimiser"] + memory["reference"]
    assert given < update.arguments < given + 64 * 1024  # and the batch
    assert any(each.over == "fsdp" and each.kind == "all-gather" for each in update.sent)


def test_the_programs_are_those_of_training(tmp_path: Path, shared: Path) -> None:
    """The same text is handed to the compiler as by a run of the config with weights and data."""
    model = shared / "data" / "models" / "tiny_qwen2"
    e = described(tmp_path, folder=model)
    optimizer = run.online_optimizer(e)
    step, state = run.online_step(e, optimizer), run.online_state(e, optimizer)
    number = jax.ShapeDtypeStruct((), jnp.int32, sharding=sharding.named(e.mesh))
    text = step.collect.lower(state.params, rehearsal.prompts_of(e), number).as_text()

    real = run.states.create(e.model, optimizer, e.mesh, rehearsal.experiments.initial_params(e._replace(source=model)))
    assert jax.tree.map(lambda x: (x.shape, x.dtype, x.sharding), real) == jax.tree.map(
        lambda x: (x.shape, x.dtype, x.sharding), state
    )
    prompts = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype, device=x.sharding), rehearsal.prompts_of(e))
    assert step.collect.lower(real.params, prompts, jnp.zeros((), jnp.int32, device=number.sharding)).as_text() == text


def test_what_settings_save_is_arithmetic(tmp_path: Path) -> None:
    e = described(tmp_path, "--config.mesh.data=2", "--config.mesh.fsdp=2", "--config.sampling.slots=16")
    memory, found = rehearsal.memory_of(e), {each.key: each for each in rehearsal.changes_of(e)}
    assert found["online.optimizer.state_dtype"].saves == memory["parameters"]  # 2 bytes a parameter
    assert found["mesh.fsdp"].value == 4
    held = memory["parameters"] + memory["optimiser"] + memory["reference"]
    assert 0.45 * held < found["mesh.fsdp"].saves <= held / 2  # not of what is not split
    assert found["sampling.slots"].value == 8 and found["sampling.slots"].saves == 8 * 16 // 4 * (2 * 2 * 2 * 16 * 2)
    assert found["model.numerics.sampling_cache"].saves < memory["cache"] / 2  # and scales
    assert "model.numerics.param_dtype" not in found  # it is narrow


@pytest.mark.parametrize(
    ("name", "slice"),
    [
        ("r1_zero_7b", "v6e:4x4"),
        ("r1_zero_30b_a3b", "v5:4x4x4"),
        ("ppo_deepseekmath_7b", "v5:2x4x4"),
        ("r1_zero_671b", "v5:8x16x16"),
    ],
)
def test_shipped_meshes_are_of_whole_sides(name: str, slice: str) -> None:
    config, there = schema.load(name).mesh, chips.read(slice)
    shape = dict(zip(sharding.MESH_AXES, sharding.mesh_shape(config, devices=there.chips), strict=True))
    assert shape == chips.nearest_meshes(MeshConfig(**shape), there)[0]


# ---- mistakes


def test_mistakes_are_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="problems_per_microbatch is 6.*choose a multiple of 4, such as 4 or 8"):
        described(tmp_path, "--config.online.problems_per_microbatch=6", "--config.online.problems_per_update=6",
                  "--config.online.problems_per_step=6")  # fmt: skip
    with pytest.raises(ValueError, match=r"whose tokenizer is not here.*give a folder"):
        described(tmp_path, "--config.sampling.stop=('</answer>',)")
    with pytest.raises(ValueError, match="asks no network: give a folder.*DeepSeek-V3-Base, Qwen2.5-7B"):
        described(tmp_path, folder=Path("Qwen/Qwen2.5-8B"))
    config = schema.load("r1_zero_7b", ["--config.online.steps=0"])
    with pytest.raises(ValueError, match=r"config.online.steps is 0"):
        rehearsal.rehearse(config, chips.read("v5e:8x8"))
    with pytest.raises(ValueError, match="--completion-tokens is 4096: expected 1 to 2048"):
        rehearsal.rehearse(schema.load("r1_zero_7b"), chips.read("v5e:8x8"), completion_tokens=4096)


def test_the_command_tells_a_mistake(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"JAX_PLATFORMS": "cpu", **LIBTPU}.items():  # it sets them itself, and for good
        monkeypatch.setenv(name, value)
    assert main(["rehearse", "--config", "r1_zero_7b", "--topology", "v5e:9x9"]) == 2
    told = capsys.readouterr().err
    assert "the nearest are v5e:8x8" in told and told.count("\n") == 1


# ---- by the TPU's own compiler

has_libtpu = importlib.util.find_spec("libtpu") is not None
needs_libtpu = pytest.mark.skipif(not has_libtpu, reason="needs libtpu, TPUs' compiler: pip install jaxreason[tpu]")


@pytest.fixture
def libtpu(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in LIBTPU.items():
        monkeypatch.setenv(name, value)


@pytest.mark.skipif(has_libtpu, reason="libtpu is installed")
def test_without_libtpu_the_extra_is_named() -> None:
    with pytest.raises(ValueError, match=r"pip install 'jaxreason\[tpu\]'"):
        chips.devices(chips.read("v5e:2x2"))


@needs_libtpu
@pytest.mark.usefixtures("libtpu")
def test_a_mesh_that_the_torus_has_not_names_the_nearest() -> None:
    with pytest.raises(
        ValueError, match=r"fsdp=8 tensor=8, which the torus of v5:4x4x4.*nearest that it can are .*fsdp=16 tensor=4"
    ):
        chips.make_mesh(MeshConfig(data=1, fsdp=8, tensor=8), chips.read("v5:4x4x4"))
    with pytest.raises(ValueError, match=r"fsdp=12 tensor=4.*fsdp=16 tensor=4"):
        chips.make_mesh(MeshConfig(data=1, fsdp=12, tensor=4), chips.read("v5e:8x8"))
    for kind in ("v5:4x4x4", "v6e:4x4", "v5e:2x4"):  # those that are named can be made
        for mesh in chips.nearest_meshes(MeshConfig(data=1, fsdp=8, tensor=8), chips.read(kind)):
            chips.make_mesh(MeshConfig(**mesh), chips.read(kind))


@needs_libtpu
@pytest.mark.slow
@pytest.mark.usefixtures("libtpu")
def test_a_run_in_one_program_is_rehearsed() -> None:
    found = rehearsal.rehearse(schema.load("quickstart:tiny", ["--config.online.completions_per_problem=2"]), chips.read("v5e:2x4"))
    assert found.fits and [each.name for each in found.programs] == ["step"] and found.mesh == {"data": 8}
    assert found.programs[0].arguments >= sum(found.memory[each] for each in ("parameters", "optimiser", "reference"))


def shallow(tmp_path: Path, model: str) -> str:
    """A described model with two layers and narrower ones."""
    content = json.loads((schema.config_folder() / rehearsal.DESCRIPTIONS / f"{model}.json").read_text(encoding="utf-8"))
    content |= {"num_hidden_layers": 2, "vocab_size": 4096}
    (tmp_path / "config.json").write_text(json.dumps(content))
    return f"--config.model.path={tmp_path}"


FEW = ("--config.sampling.max_prompt_tokens=128", "--config.sampling.max_completion_tokens=128", "--config.sampling.slots=0")


@needs_libtpu
@pytest.mark.slow
@pytest.mark.usefixtures("libtpu")
@pytest.mark.parametrize(
    ("name", "model", "slice", "problems"),
    [("r1_zero_7b", "Qwen2.5-7B", "v5e:4x4", 4), ("r1_zero_30b_a3b", "Qwen3-30B-A3B-Base", "v5:4x4x4", 16)],
)
def test_a_shallow_run_is_rehearsed(tmp_path: Path, name: str, model: str, slice: str, problems: int) -> None:
    overrides = [shallow(tmp_path, model), *FEW, "--config.online.completions_per_problem=2"]
    overrides += [f"--config.online.problems_per_{each}={problems}" for each in ("step", "update", "microbatch")]
    found = rehearsal.rehearse(schema.load(name, overrides), chips.read(slice))
    assert found.fits and [each.name for each in found.programs] == ["sample", "update"]
    sample, update = found.programs
    given = sum(found.memory[each] for each in ("parameters", "optimiser", "reference"))
    assert given <= update.arguments < 1.1 * given + 2**20  # tiles are padded
    assert sample.temporaries > found.memory["cache"] and update.temporaries > 0
    assert any(traffic.DECODING in each.loops for each in sample.sent)
    assert {"fsdp", "tensor"} <= {axis for each in update.sent for axis in each.over.split()}
    assert 0 < found.utilization < 1 and found.chip_hours > 0


@needs_libtpu
@pytest.mark.slow
@pytest.mark.usefixtures("libtpu")
@pytest.mark.parametrize(("name", "slice"), [("r1_zero_30b_a3b", "v5:4x4x4"), ("r1_zero_671b", "v5:8x16x16")])
def test_the_kernels_are_the_tpus_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, slice: str) -> None:
    """Attention's and decoding's, in the programs as they are handed to the compiler."""

    def lowered(name: str, function: Any, given: tuple[Any, ...], beside: int, e: Any) -> tuple[str, set[str]]:
        return name, set(re.findall(r'kernel_name = "(\w+)"', function.lower(*given).as_text()))

    monkeypatch.setattr(rehearsal, "_compile", lowered)
    config = schema.load(name)
    e = rehearsal.described(config, chips.make_mesh(config.mesh, chips.read(slice)), tmp_path)
    sample, update = rehearsal.programs_of(e, print)
    assert sample == ("sample", {"slot_attention"})
    assert update[0] == "update" and all(each.startswith("splash_mha_") for each in update[1])
    assert {each.split("_")[2] for each in update[1]} == {"fwd", "dkv", "dq"}


@needs_libtpu
@pytest.mark.slow
@pytest.mark.usefixtures("libtpu")
def test_a_run_that_does_not_fit_is_told_what_to_change(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A cache larger than the chip: the command says so, by how much, and what each setting would save."""
    for each in ("JAX_PLATFORMS", "TPU_MIN_LOG_LEVEL"):
        monkeypatch.setenv(each, "cpu" if each == "JAX_PLATFORMS" else "3")
    told = tmp_path / "told.json"
    sizes = ["heads=64", "kv_heads=64", "head_size=256", "max_positions=2048"]
    overrides = [f"--config.model.architecture.{each}" for each in sizes]
    overrides += [f"--config.online.problems_per_{each}=256" for each in ("step", "update")]
    overrides += ["--config.sampling.max_completion_tokens=1024"]
    where = ["--topology", "v5e:2x4", "--json", str(told)]
    assert main(["rehearse", "--config", "quickstart:tiny", *where, *overrides]) == 1
    out, found = capsys.readouterr().out, json.loads(told.read_text())
    assert "It does not fit: 'step' needs" in out and "config.online.completions_per_problem" in out
    assert not found["fits"] and found["programs"][0]["total"] > found["chip"]["hbm"]
    assert found["memory"]["cache"] > found["chip"]["hbm"] and found["changes"][0]["of"] == "temporaries of 'step'"
    assert {"sampling.slots", "model.numerics.sampling_cache"} <= {each["key"] for each in found["changes"]}
