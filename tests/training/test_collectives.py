"""What devices send each other in a layer, a head and a decoded token, read from the optimised program: what the mesh implies.

XLA's CPU backend sums a gradient whole and cuts it afterwards, where others send each device its part alone (the TPU's compiler
makes a reduce-scatter of every one of these sums), so sums of gradients are expected whole. Sizes are sorted: the compiler is
free to transpose.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from functools import cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

from jaxreason import objectives, sharding
from jaxreason.batch import PromptBatch, RolloutBatch
from jaxreason.models import cache as caches
from jaxreason.models import decoder, spec
from jaxreason.models.config import Architecture, Experts, Latent, Numerics
from jaxreason.numerics import SOFTMAX
from jaxreason.sampling.rollout import sample
from jaxreason.training import state as states
from jaxreason.training.optimizer import OptimizerConfig, make_optimizer
from jaxreason.training.step import Split, make_update

Shape = tuple[int, int, int, int, int]  # data, fsdp, expert, sequence, tensor
QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}  # to compile
if jax.__version_info__ < (0, 11):
    QUICK["xla_cpu_use_fusion_emitters"] = False
P, G, TP, T = 8, 4, 8, 12
D, V, H, K, C, F, E, LAYERS = 32, 56, 8, 4, 12, 40, 8, 5  # no loop but the layers' has 5 rounds
SIZES: dict[str, Any] = {
    "vocab_size": V,
    "hidden_size": D,
    "layers": LAYERS,
    "heads": H,
    "kv_heads": K,
    "head_size": C,
    "mlp_size": F,
    "max_positions": 64,
}
ARCHITECTURES = {
    "dense": Architecture(family="llama", tied=False, **SIZES),
    "tied": Architecture(family="qwen2", tied=True, **SIZES),
    "experts": Architecture(family="qwen3_moe", tied=False, experts=Experts(count=E, chosen=2, mlp_size=24), **SIZES),
    "latent": Architecture(
        family="deepseek_v3",
        tied=False,
        **SIZES | {"kv_heads": H},
        experts=Experts(E, 3, 24, 20, "sigmoid", groups=4, chosen_groups=2, scale=2.5),
        latent=Latent(kv_rank=16, q_rank=28, rotated=4, value_size=10),
    ),
}

# ------------------------------------------------------------------------------------------------------------ reading programs

KINDS = "all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute|ragged-all-to-all|collective-broadcast"
IOTA = r"\[[\d,]+\](?:T\([\d,]+\))?"  # 0, 1, 2, ... in a shape, and its axes' new order
WAYS = (r"\{\{.*?\}\}", rf"\[[\d,]+\]<={IOTA}", rf"mesh\[.*?\](?:, device_ids=\({IOTA}\))? \{{.*?\}}")
GROUPS = re.compile(rf"(?:replica_groups|source_target_pairs)=({'|'.join(WAYS)})")


class Sent(NamedTuple):
    """One array of a collective operation."""

    kind: str
    over: str  # the mesh axes whose devices take part
    size: tuple[int, ...]  # of the result on one device, sorted


def numbers(text: str) -> list[int]:
    return [int(each) for each in re.findall(r"\d+", text)]


def iota(text: str) -> np.ndarray:
    sizes, *order = (numbers(each) for each in text.split("T"))
    ids = np.arange(math.prod(sizes)).reshape(sizes)
    return ids.transpose(order[0]) if order else ids


def group_of(text: str, mesh: Mesh) -> str:
    """The mesh axes along which the devices of a group differ, in any of the ways in which a program writes groups."""
    if text.startswith("{"):
        group = np.asarray(numbers(text.split("}")[0]))
    elif text.startswith("["):
        sizes, ids = text.split("<=")
        group = iota(ids).reshape(numbers(sizes))[0]
    else:
        axes, ids, chosen = re.fullmatch(r"mesh\[(.*?)\](?:, device_ids=\((.*)\))? \{(.*)\}", text).groups()  # pyright: ignore
        names, sizes = zip(*re.findall(r"'(\w+)'=(\d+)", axes), strict=True)
        assert set(re.findall(r"'(\w+)'", chosen)) <= set(names) and ":" not in chosen, text  # no part of an axis
        whole = (iota(ids) if ids else np.arange(mesh.size)).reshape([int(size) for size in sizes])
        group = whole[tuple(slice(None) if f"'{name}'" in chosen else 0 for name in names)].reshape(-1)
    assert len(group) <= mesh.size and set(group.tolist()) <= set(range(mesh.size)), text
    places = np.stack(np.unravel_index(group, mesh.devices.shape))
    return " ".join(name for name, place in zip(mesh.axis_names, places, strict=True) if len(set(place.tolist())) > 1)


def sent(text: str, mesh: Mesh) -> dict[tuple[str, ...], Counter[Sent]]:
    """The collectives of a program by the loops they are in, a loop being told by its rounds and whether it goes backward.

    Only arrays of floats with an axis count: the others are metrics, masks and choices.
    """
    bodies: dict[str, list[str]] = {}
    name = entry = ""
    for line in text.splitlines():
        begins = re.match(r"(ENTRY )?%?([\w.\-]+) .*\{\s*$", line)
        if begins and not line.startswith(" "):
            name = begins[2]
            bodies[name], entry = [], name if begins[1] else entry
        elif line.startswith("  "):
            bodies[name].append(line)
    found: dict[tuple[str, ...], Counter[Sent]] = {}

    def walk(name: str, loops: tuple[str, ...]) -> None:
        for line in bodies[name]:
            operation = re.search(rf"= (.*?) ({KINDS})(-start)?\(", line)
            if operation:
                groups = GROUPS.search(line)
                assert groups, line
                over = group_of(groups[1], mesh)
                for size in re.findall(r"\b(?:bf16|f\d+)\[([\d,]+)\]", operation[1]):
                    found.setdefault(loops, Counter())[Sent(operation[2], over, tuple(sorted(numbers(size))))] += 1
                continue
            for role, called in re.findall(r"(body|calls|to_apply|branch_computations)=\{?((?:%[\w.\-]+(?:, )?)+)", line):
                for each in re.findall(r"%([\w.\-]+)", called):
                    if role != "body":
                        walk(each, loops)
                        continue
                    rounds = re.search(r"known_trip_count[^\d]*(\d+)", line)
                    backward = any("transpose(jvp" in row for row in bodies[each])
                    walk(each, (*loops, f"{rounds[1] if rounds else '?'} {'backward' if backward else 'forward'}"))

    walk(entry, ())
    return found


# ----------------------------------------------------------------------------------------------------------------- the update


def make(name: str, shape: Shape) -> tuple[Mesh, decoder.Model]:
    data, fsdp, expert, sequence, tensor = shape
    config = sharding.MeshConfig(data, fsdp, tensor, sequence, expert)
    mesh = sharding.make_mesh(config, devices=jax.devices()[: math.prod(shape)])
    model = decoder.make_decoder(ARCHITECTURES[name], Numerics(logits_chunk_tokens=P * 3), mesh)
    return mesh, model._replace(balance_weight=0.01)


def rows(mesh: Mesh, shape: tuple[int, ...], dtype: Any) -> Any:
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding.named(mesh, ("problems",)))


def compiled(function: Any, *args: Any, **options: Any) -> str:
    return jax.jit(function, **options).lower(*args).compile(compiler_options=QUICK).as_text()


@cache
def update_sends(name: str, shape: Shape) -> tuple[Counter[Sent], Counter[Sent], Counter[Sent]]:
    """What an update sends in a layer going forward, in one going backward, and outside of the layers."""
    mesh, model = make(name, shape)
    optimizer = make_optimizer(OptimizerConfig(), steps=4)
    update = make_update(model, objectives.grpo(beta=0.0), optimizer, temperature=1.0, split=Split(P, P))
    batch = RolloutBatch(
        prompt=rows(mesh, (P, TP), jnp.int32),
        prompt_mask=rows(mesh, (P, TP), bool),
        completion=rows(mesh, (P, G, T), jnp.int32),
        mask=rows(mesh, (P, G, T), bool),
        truncated=rows(mesh, (P, G), bool),
        logp_behaviour=rows(mesh, (P, G, T), jnp.float32),
        reward=rows(mesh, (P, G), jnp.float32),
    )
    state = states.abstract(model, optimizer, mesh)
    out = (states.shardings(model, optimizer, mesh), sharding.named(mesh), sharding.named(mesh))
    found = sent(compiled(update, state, state.params, batch, donate_argnums=0, out_shardings=out), mesh)
    forward, backward = ((f"{LAYERS} {way}",) for way in ("forward", "backward"))
    outside = sum((each for loops, each in found.items() if loops not in (forward, backward)), Counter())
    return found.get(forward, Counter()), found.get(backward, Counter()), outside


def several(kind: str, over: str, *sizes: tuple[int, ...], times: int = 1) -> Counter[Sent]:
    return Counter({Sent(kind, over, tuple(sorted(size))): count * times for size, count in Counter(sizes).items()})


def weights(parts: int = 1, fsdp: int = 1) -> list[tuple[int, ...]]:
    """A dense layer's matrices on one of `parts` tensor devices, with D cut in `fsdp`: qkv, o, gate and up, down."""
    width = D // fsdp
    return [(width, (H + 2 * K) * C // parts), (H * C // parts, width), (width, 2 * F // parts), (F // parts, width)]


def large(outside: Counter[Sent]) -> set[Sent]:
    """What is sent outside of the layers, sums excepted, that is no small part of a table of the vocabulary."""
    return {each for each in outside if each.kind != "all-reduce" and math.prod(each.size) >= V * D // 4}


@pytest.fixture
def nothing_made_whole(capfd: pytest.CaptureFixture[str]) -> Any:
    """The compiler does not say that it had to make some array whole on every device."""
    yield
    assert "Involuntary full rematerialization" not in capfd.readouterr().err


pytestmark = pytest.mark.usefixtures("nothing_made_whole")


def test_fsdp_gathers_a_layers_weights_and_sums_their_gradients() -> None:
    forward, backward, outside = update_sends("dense", (1, 4, 1, 1, 1))
    gathered = several("all-gather", "fsdp", *weights())
    assert forward == gathered
    assert backward == gathered + several("all-reduce", "fsdp", *weights(), (D,), (D,))
    assert large(outside) == set(several("all-gather", "fsdp", (V, D)))


def test_tensor_parallelism_sums_activations_twice_a_pass() -> None:
    """After attention and after the MLP, and backward in front of both. Once more in remat: the MLP's input is made again."""
    forward, backward, outside = update_sends("dense", (1, 1, 1, 1, 4))
    activations = (P * (TP + G * (T - 1)), D)
    assert forward == several("all-reduce", "tensor", activations, times=2)
    assert backward == several("all-reduce", "tensor", activations, times=3)
    assert not large(outside)


def test_data_fsdp_and_tensor_together() -> None:
    forward, backward, outside = update_sends("dense", (2, 2, 1, 1, 2))
    activations = (P // 4 * (TP + G * (T - 1)), D)
    gathered = several("all-gather", "fsdp", *weights(parts=2))
    assert forward == gathered + several("all-reduce", "tensor", activations, times=2)
    gradients = several("all-reduce", "fsdp", *weights(parts=2)) + several("all-reduce", "data", *weights(parts=2, fsdp=2))
    norms = several("all-reduce", "data fsdp", (D,), (D,))
    assert backward == gathered + several("all-reduce", "tensor", activations, times=3) + gradients + norms
    assert large(outside) == set(several("all-gather", "fsdp", (V // 2, D)))


def test_sequences_send_keys_and_values_alone() -> None:
    forward, backward, outside = update_sends("dense", (1, 1, 1, 4, 1))
    own = (TP + G * T) // 4
    gathered = several("all-gather", "sequence", (P, 4, own, K, C), times=2)
    assert forward == gathered
    scattered = several("reduce-scatter", "sequence", (P, 1, own, K, C), times=2)
    assert backward == gathered + scattered + several("all-reduce", "sequence", *weights(), (D,), (D,))
    # a hidden state predicts the next place, which the neighbour may have
    assert large(outside) == set(several("collective-permute", "sequence", (P, G, 1, D)))


def test_sequences_and_tensor_together() -> None:
    """Each device gathers the keys and values of its own heads."""
    forward, backward, outside = update_sends("dense", (1, 1, 1, 2, 4))
    own = (TP + G * T) // 2
    gathered = several("all-gather", "sequence", (P, 2, own, K // 4, C), times=2)
    activations = (P * own, D)
    assert forward == gathered + several("all-reduce", "tensor", activations, times=2)
    scattered = several("reduce-scatter", "sequence", (P, 1, own, K // 4, C), times=2)
    gradients = several("all-reduce", "sequence", *weights(parts=4), (D,), (D,))
    assert backward == gathered + scattered + several("all-reduce", "tensor", activations, times=3) + gradients
    assert large(outside) == set(several("collective-permute", "sequence", (P, G, 1, D)))


def test_experts_send_rows_and_never_weights() -> None:
    forward, backward, outside = update_sends("experts", (1, 1, 4, 1, 1))
    count, chosen = P * (TP + G * (T - 1)), 2
    there = several("all-gather", "expert", (count, D), (count, chosen))
    home = several("reduce-scatter", "expert", (count // 4, D))
    assert forward == there + home + several("all-reduce", "expert", (E,), (E,))  # the last: how evenly experts were chosen
    # the transposes of both, and in remat the way there again
    back = several("all-gather", "expert", (count, D)) + several("reduce-scatter", "expert", (count // 4, D), (count // 4, chosen))
    dense = [*weights()[:2], (D, E), (D,), (D,), (C,), (C,)]
    assert backward == there + back + several("all-reduce", "expert", *dense)
    assert not large(outside)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "shape"), [("experts", (1, 2, 2, 1, 2)), ("latent", (1, 2, 2, 1, 2)), ("latent", (2, 2, 1, 2, 1))]
)
def test_sparse_layers_on_mixed_meshes(name: str, shape: Shape) -> None:
    """FSDP gathers the layer's parameters; on `expert` nothing has three axes, as experts' weights do; nothing goes in circles."""
    forward, backward, _ = update_sends(name, shape)
    _, model = make(name, shape)
    _, _, expert, _, tensor = shape
    layer = {path.split("/")[1]: each for path, each in spec.leaves(model.specs) if path.startswith("layers/")}
    own = {}
    for path, each in layer.items():
        parts = {"heads": tensor, "kv_heads": tensor, "mlp": tensor, "expert": expert}
        sizes = [size // parts.get(axis or "", 1) for size, axis in zip(each.shape[1:], each.axes[1:], strict=True)]
        own[path] = tuple(sorted(size for size in (sizes if path.startswith("expert_") else flattened(path, sizes))))
    joined = {"q", "k", "v", "gate", "up", "shared_gate", "shared_up"}
    whole = Counter(size for path, size in own.items() if path not in joined and len(size) > 1)
    for names in (("q", "k", "v"), ("gate", "up"), ("shared_gate", "shared_up")):
        if names[0] in own:
            whole[tuple(sorted((D, sum(math.prod(own[each]) for each in names) // D)))] += 1
    for way in (forward, backward):
        gathered: Counter[tuple[int, ...]] = Counter()
        for each, count in way.items():
            if (each.kind, each.over) == ("all-gather", "fsdp"):
                gathered[tuple(size for size in each.size if size > 1)] += count
        assert gathered == whole
        assert {each.over for each in way if each.kind == "all-gather"} <= {"fsdp", "expert", "sequence"}
        assert all(len(each.size) == 2 for each in way if each.over == "expert" and each.kind != "all-reduce")
        assert not {each for each in way if each.kind in ("collective-permute", "all-to-all")}


def flattened(path: str, sizes: list[int]) -> list[int]:
    """A weight's sizes as the matrix that its product uses."""
    cut = 2 if path == "o" else 1
    return [math.prod(sizes[:cut]), math.prod(sizes[cut:])] if len(sizes) > 1 else sizes


# ------------------------------------------------------------------------------------------------------- the head, and sampling


def test_the_head_is_gathered_once_and_its_gradient_summed_once() -> None:
    """However many chunks of tokens there are; in a chunk, sums over the vocabulary's parts alone."""
    mesh, model = make("tied", (1, 2, 1, 2, 2))
    assert model.logprobs is not None
    table = spec.abstract(model.specs, dtype="float32", mesh=mesh)["embed"]
    tokens = sharding.partition(("problems", None, "tokens"))
    hidden = jax.ShapeDtypeStruct((P, G, T, D), jnp.float32, sharding=jax.NamedSharding(mesh, tokens))
    completion = jax.ShapeDtypeStruct((P, G, T), jnp.int32, sharding=jax.NamedSharding(mesh, tokens))

    def total(table: jax.Array, hidden: jax.Array, completion: jax.Array) -> jax.Array:
        logp, _ = model.logprobs({"embed": table}, hidden, completion, law=SOFTMAX)  # pyright: ignore[reportOptionalCall]
        return jnp.sum(jnp.sin(logp))

    out = (table.sharding, hidden.sharding)
    found = sent(compiled(jax.grad(total, argnums=(0, 1)), table, hidden, completion, out_shardings=out), mesh)
    outside = found.pop(())
    assert outside == several("all-gather", "fsdp", (V // 2, D)) + several("all-reduce", "fsdp sequence", (V // 2, D))
    assert len(found) == 2
    for chunk in found.values():
        assert {(each.kind, each.over) for each in chunk} == {("all-reduce", "tensor")}
        assert all(V not in each.size and V // 2 not in each.size for each in chunk)


@pytest.mark.parametrize("shape", [(1, 4, 1, 1, 1), pytest.param((2, 2, 1, 1, 2), marks=pytest.mark.slow)])
def test_a_decoded_token_needs_no_weights_of_others(monkeypatch: pytest.MonkeyPatch, shape: Shape) -> None:
    monkeypatch.setattr(caches, "UNROLLED_LAYERS", 0)
    mesh, model = make("tied", shape)
    params = spec.abstract(model.specs, dtype="float32", mesh=mesh)
    batch = PromptBatch(
        prompt=rows(mesh, (P, TP), jnp.int32),
        prompt_mask=rows(mesh, (P, TP), bool),
        problem=rows(mesh, (P,), jnp.uint32),
        answer=rows(mesh, (P,), jnp.int32),
    )

    def run(params: Any, batch: PromptBatch) -> Any:
        return sample(model, params, batch, None, group=G, max_completion_tokens=T, eos_ids=(1,), pad_id=0)

    found = sent(compiled(run, params, batch, out_shardings=sharding.named(mesh, ("problems",))), mesh)
    outside = found.pop(())
    # the table, which is the head too, and each matrix of all layers
    large = sorted(math.prod(each.size) for each in outside.elements() if each.kind == "all-gather")
    parts = shape[-1]
    assert large == sorted([V * D // parts, *(LAYERS * math.prod(each) for each in weights(parts))])
    assert {each.over for each in outside if each.kind == "all-gather"} == {"fsdp"}
    for loop in found.values():
        assert {each.over for each in loop} <= {"tensor"}
        assert max(math.prod(each.size) for each in loop) <= P // 4 * max(G, TP) * D  # activations
