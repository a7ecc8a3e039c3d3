"""The sparse MLP against loops over rows and experts in NumPy, its gradients, and the same numbers on every mesh."""

from __future__ import annotations

import math
import re
from functools import cache, partial
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as Spec

from jaxreason.models import experts as moe
from jaxreason.models.config import Experts

AXES = ("data", "fsdp", "expert", "sequence", "tensor")
ROWS_AXES = ("data", "fsdp", "expert", "sequence")
ONE = (1, 1, 1, 1, 1)
ROWS, D, E, F = 32, 16, 8, 12
NAMES = ("h", "router", "gate", "up", "down")
jit: Any = partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True})

QWEN = Experts(count=E, chosen=3, mlp_size=F)
DEEPSEEK = Experts(count=E, chosen=3, mlp_size=F, scoring="sigmoid", groups=4, chosen_groups=2, scale=2.5)
SETTINGS = {
    "softmax": QWEN,
    "softmax, not normalised": Experts(count=E, chosen=2, mlp_size=F, normalised=False),
    "one expert": Experts(count=E, chosen=1, mlp_size=F),
    "all experts": Experts(count=E, chosen=E, mlp_size=F),
    "sigmoid": Experts(count=E, chosen=3, mlp_size=F, scoring="sigmoid", scale=0.5),
    "groups": DEEPSEEK,
    "groups, not normalised": Experts(
        count=E, chosen=4, mlp_size=F, scoring="sigmoid", normalised=False, groups=2, chosen_groups=1, scale=1.5
    ),
}


def make_mesh(shape: tuple[int, ...]) -> Mesh:
    devices = jax.devices()[: math.prod(shape)]
    return jax.make_mesh(shape, AXES, (AxisType.Auto,) * len(AXES), devices=devices)


def arrays(*, rows: int = ROWS, dtype: str = "float64", seed: int = 0) -> tuple[np.ndarray, ...]:
    """h, router, gate, up, down."""
    rng = np.random.default_rng(seed)
    shapes = ((rows, D), (D, E), (E, D, F), (E, D, F), (E, F, D))
    return tuple(rng.normal(0, s[-2] ** -0.5 if len(s) == 3 else 0.5, s).astype(dtype) for s in shapes)


def some_bias(setting: Experts) -> Any:
    """A correction bias that changes choices, where the family has one."""
    return np.random.default_rng(7).normal(0, 0.3, E) if setting.scoring == "sigmoid" else None


# ------------------------------------------------------------------------------------------------------ loops to compare with


def falling(values: list[float], k: int) -> list[int]:
    """The k greatest's indices, of equals the lower first."""
    return sorted(range(len(values)), key=lambda i: (-values[i], i))[:k]


def looped_route(h: np.ndarray, router: np.ndarray, bias: np.ndarray | None, setting: Experts) -> Any:
    chosen, weight, scores = [], [], []
    for row in h:
        logits = [sum(row[d] * router[d, e] for d in range(len(row))) for e in range(setting.count)]
        if setting.scoring == "softmax":
            total = sum(math.exp(x) for x in logits)
            score = [math.exp(x) / total for x in logits]
        else:
            score = [1 / (1 + math.exp(-x)) for x in logits]
        biased = [s + (0 if bias is None else bias[e]) for e, s in enumerate(score)]
        size = setting.count // setting.groups
        groups = [sum(sorted(biased[g * size : (g + 1) * size])[-2:]) for g in range(setting.groups)]
        allowed = falling(groups, setting.chosen_groups)
        best = falling([b if e // size in allowed else -math.inf for e, b in enumerate(biased)], setting.chosen)
        total = sum(score[e] for e in best) if setting.normalised else 1
        chosen.append(best)
        weight.append([score[e] / total * setting.scale for e in best])
        scores.append(score)
    return SimpleNamespace(chosen=np.array(chosen), weight=np.array(weight), scores=np.array(scores))


def looped_mix(h: np.ndarray, routing: Any, gate: np.ndarray, up: np.ndarray, down: np.ndarray) -> np.ndarray:
    out = np.zeros_like(h)
    for row in range(len(h)):
        for e, weight in zip(routing.chosen[row], routing.weight[row], strict=True):
            a = h[row] @ gate[e]
            out[row] += weight * ((a / (1 + np.exp(-a)) * (h[row] @ up[e])) @ down[e])
    return out


def block(
    h: Any, router: Any, gate: Any, up: Any, down: Any, *, setting: Experts, bias: Any = None, mesh: Mesh, dtype: str = "float64"
) -> jax.Array:
    routing = moe.route(h, router, None if bias is None else jnp.asarray(bias), experts=setting)
    return moe.mix(h, routing, gate, up, down, dtype=dtype, mesh=mesh, rows_axes=ROWS_AXES)


def one_layer(*operands: Any, mesh: Mesh, dtype: str) -> tuple[jax.Array, jax.Array]:
    y = block(*operands, setting=QWEN, mesh=mesh, dtype=dtype)
    return jnp.sum(jnp.sin(y)), y


# ------------------------------------------------------------------------------------------------------------------- choosing


@pytest.mark.parametrize("name", SETTINGS)
def test_the_block_is_the_loop(name: str) -> None:
    setting, bias = SETTINGS[name], some_bias(SETTINGS[name])
    h, router, *weights = arrays()
    expected = looped_route(h, router, bias, setting)

    @jit
    def computed(h: jax.Array, router: jax.Array, *weights: jax.Array) -> Any:
        routing = moe.route(h, router, None if bias is None else jnp.asarray(bias), experts=setting)
        return routing, moe.mix(h, routing, *weights, dtype="float64", mesh=make_mesh(ONE), rows_axes=ROWS_AXES)

    with jax.enable_x64(True):
        given, y = computed(h, router, *weights)
    assert given.chosen.dtype == jnp.int32 and given.weight.dtype == y.dtype == jnp.float64
    np.testing.assert_array_equal(given.chosen, expected.chosen)
    np.testing.assert_allclose(given.weight, expected.weight, rtol=1e-12)
    np.testing.assert_allclose(given.scores, expected.scores, rtol=1e-12)
    np.testing.assert_allclose(y, looped_mix(h, expected, *weights), rtol=1e-10, atol=1e-12)


def test_the_bias_and_the_groups_matter() -> None:
    h, router, *_ = arrays()
    plain = Experts(count=E, chosen=3, scoring="sigmoid", scale=2.5)
    chosen = [
        looped_route(h, router, bias, setting).chosen
        for bias, setting in ((None, plain), (some_bias(DEEPSEEK), plain), (some_bias(DEEPSEEK), DEEPSEEK))
    ]
    assert (chosen[0] != chosen[1]).any() and (chosen[1] != chosen[2]).any()


def test_of_equals_the_lower_index_wins() -> None:
    """Rows of zeros score all experts equally; the bias makes ties between groups and inside them."""
    h, router = np.zeros((2, D)), arrays()[1]
    tied = np.array([0.0, 0.25, 0.25, 0.0, 0.25, 0.25, 0.0, 0.5])
    for setting, bias, expected in ((QWEN, None, [0, 1, 2]), (DEEPSEEK, np.zeros(E), [0, 1, 2]), (DEEPSEEK, tied, [7, 4, 5])):
        with jax.enable_x64(True):
            given = jit(partial(moe.route, experts=setting))(h, router, bias)
        assert given.chosen.tolist() == [expected] * 2
        assert looped_route(h, router, bias, setting).chosen.tolist() == [expected] * 2
        np.testing.assert_allclose(given.weight, setting.scale / 3, rtol=1e-12)


def test_scores_are_float32_from_bfloat16_rows() -> None:
    h, router, *_ = (jnp.asarray(x, jnp.float32) for x in arrays(dtype="float32"))
    rounded = h.astype(jnp.bfloat16)
    given, expected = (jit(partial(moe.route, experts=QWEN))(x, router, None) for x in (rounded, rounded.astype(jnp.float32)))
    assert given.weight.dtype == given.scores.dtype == jnp.float32
    np.testing.assert_array_equal(given.weight, expected.weight)


def test_the_choice_and_the_bias_have_no_gradient() -> None:
    h, router, *_ = (jnp.asarray(x, jnp.float32) for x in arrays(dtype="float32"))
    bias = jnp.asarray(some_bias(DEEPSEEK), jnp.float32)

    def first(h: jax.Array, router: jax.Array, bias: jax.Array) -> jax.Array:
        return jnp.sum(moe.route(h, router, bias, experts=DEEPSEEK).weight[:, 0])

    to_h, to_router, to_bias = map(np.asarray, jit(jax.grad(first, argnums=(0, 1, 2)))(h, router, bias))
    assert np.any(to_h != 0) and np.any(to_router != 0)
    np.testing.assert_array_equal(to_bias, np.zeros_like(to_bias))


# --------------------------------------------------------------------------------------------------------------------- the sum


@pytest.mark.parametrize("rows", [1, 400])  # fewer pairs than a block; experts with several blocks, of more slots
def test_any_number_of_rows(rows: int) -> None:
    h, router, *weights = arrays(rows=rows)
    expected = looped_mix(h, looped_route(h, router, None, QWEN), *weights)
    with jax.enable_x64(True):
        given = jit(lambda *a: block(*a, setting=QWEN, mesh=make_mesh(ONE)))(h, router, *weights)
        np.testing.assert_allclose(given, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", ["softmax", "groups"])
def test_gradients_are_finite_differences_of_the_loop(name: str) -> None:
    setting, bias = SETTINGS[name], some_bias(SETTINGS[name])
    operands = arrays()
    rng = np.random.default_rng(3)
    seen = rng.normal(size=(ROWS, D))

    def looped(*operands: np.ndarray) -> float:
        h, router, *weights = operands
        return float(np.sum(seen * looped_mix(h, looped_route(h, router, bias, setting), *weights)))

    with jax.enable_x64(True):
        loss = lambda *a: jnp.sum(seen * block(*a, setting=setting, bias=bias, mesh=make_mesh(ONE)))  # noqa: E731
        gradients = jit(jax.grad(loss, argnums=range(5)))(*operands)
        gradients = [np.asarray(g) for g in gradients]
    for i, gradient in enumerate(gradients):
        direction, small = rng.normal(size=gradient.shape), 1e-6
        moved = [[x + sign * small * direction if j == i else x for j, x in enumerate(operands)] for sign in (1, -1)]
        expected = (looped(*moved[0]) - looped(*moved[1])) / (2 * small)
        np.testing.assert_allclose(np.sum(gradient * direction), expected, rtol=1e-6, err_msg=NAMES[i])


def test_every_row_may_choose_the_same_experts_and_the_others_learn_nothing() -> None:
    h, router, *weights = arrays()
    h[:, 0], router[:] = 1, 0.01 * router
    router[0] = [0, 0, 9, 0, 0, 8, 0, 7]
    with jax.enable_x64(True):
        step = partial(one_layer, mesh=make_mesh(ONE), dtype="float64")
        gradients, given = jit(jax.grad(step, argnums=(2, 3, 4), has_aux=True))(h, router, *weights)
        for gradient in gradients:
            learns = np.any(np.asarray(gradient) != 0, axis=(1, 2))
            assert learns.tolist() == [False, False, True, False, False, True, False, True]
        np.testing.assert_allclose(given, looped_mix(h, looped_route(h, router, None, QWEN), *weights), rtol=1e-10, atol=1e-12)


def test_a_tpus_product_is_the_others() -> None:
    """Blocks of 16 slots: two experts with blocks, two without, and a last block that nobody uses."""
    rng = np.random.default_rng(0)
    x, g = (jnp.asarray(rng.normal(size=(64, n)), jnp.float32) for n in (6, 5))
    w, used = jnp.asarray(rng.normal(size=(4, 6, 5)), jnp.float32), jnp.array([2, 0, 1, 0], jnp.int32)
    expected = np.concatenate([x[:32] @ w[0], x[32:48] @ w[2], np.zeros((16, 5))])
    gradient = np.stack([x[:32].T @ g[:32], np.zeros((6, 5)), x[32:48].T @ g[32:48], np.zeros((6, 5))])
    for product, over_rows in ((moe._ragged, moe._ragged_gradient), (moe._in_turn, moe._gradient_in_turn)):
        np.testing.assert_allclose(product(x, w, used, size=16), expected, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(over_rows(x, g, used, size=16), gradient, rtol=1e-5, atol=1e-6)
    operands = arrays(dtype="float32")
    for platform, ragged in (("tpu", True), ("cuda", False), ("cpu", False)):
        step = jit(lambda *a: block(*a, setting=QWEN, mesh=make_mesh(ONE), dtype="bfloat16"))
        assert ("ragged_dot" in jax.export.export(step, platforms=[platform])(*operands).mlir_module()) == ragged


# -------------------------------------------------------------------------------------------------------------------- on a mesh


def two_layers(h: Any, router: Any, gate: Any, up: Any, down: Any, *, mesh: Mesh, dtype: str) -> tuple[jax.Array, jax.Array]:
    """As a decoder has them: scanned, recomputed in the backward pass, residual."""

    @jax.checkpoint
    def layer(x: jax.Array, weights: Any) -> tuple[jax.Array, None]:
        return x + block(x, *weights, setting=QWEN, mesh=mesh, dtype=dtype), None

    stacked = jax.tree.map(lambda w: jnp.stack([w, -w]), (router, gate, up, down))
    y, _ = jax.lax.scan(layer, h, stacked)
    return jnp.sum(jnp.sin(y)), y


@cache
def on_mesh(shape: tuple[int, ...], dtype: str, function: Any) -> tuple[Any, Any]:
    """The compiled value and gradients of a function of the five arrays, and those arrays, on a mesh."""
    mesh = make_mesh(shape)
    rows, inward, outward = Spec(ROWS_AXES, None), Spec("expert", "fsdp", "tensor"), Spec("expert", "tensor", "fsdp")
    specs = (rows, Spec("fsdp", None), inward, inward, outward)
    kept = "float64" if dtype == "float64" else "float32"
    operands = [jax.device_put(x, NamedSharding(mesh, s)) for x, s in zip(arrays(dtype=kept), specs, strict=True)]
    step = jax.value_and_grad(lambda *a: function(*a, mesh=mesh, dtype=dtype), argnums=range(5), has_aux=True)
    return jit(step).lower(*operands).compile(), operands


def computed_on(shape: tuple[int, ...], dtype: str, function: Any) -> Any:
    step, operands = on_mesh(shape, dtype, function)
    return jax.tree.map(np.asarray, step(*operands))


@pytest.mark.parametrize("shape", [(1, 1, 8, 1, 1), (2, 1, 2, 1, 2), (1, 2, 4, 1, 1), (2, 2, 2, 1, 1), (1, 1, 1, 2, 4)])
def test_meshes_change_nothing(shape: tuple[int, ...]) -> None:
    with jax.enable_x64(True):
        given, expected = (computed_on(each, "float64", two_layers) for each in (shape, ONE))
    for a, b in zip(jax.tree.leaves(given), jax.tree.leaves(expected), strict=True):
        assert a.dtype == np.float64
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-9 * np.max(np.abs(b)))


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("bfloat16", 1e-2)])
def test_meshes_change_little(dtype: str, tolerance: float) -> None:
    given, expected = (computed_on(shape, dtype, one_layer) for shape in ((1, 2, 1, 1, 4), ONE))
    for a, b in zip(jax.tree.leaves(given), jax.tree.leaves(expected), strict=True):
        assert a.dtype == np.float32
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * np.max(np.abs(b)))


def test_bfloat16_operands_change_little() -> None:
    given, expected = (computed_on(ONE, dtype, one_layer) for dtype in ("bfloat16", "float32"))
    for a, b in zip(jax.tree.leaves(given), jax.tree.leaves(expected), strict=True):
        assert a.dtype == np.float32
        assert 0 < np.max(np.abs(a - b)) / np.max(np.abs(b)) < 0.02


def collectives(shape: tuple[int, ...]) -> dict[str, list[tuple[int, ...]]]:
    """The sizes, sorted, of what each kind of collective makes on one device, in a layer's value and gradients."""
    found: dict[str, list[tuple[int, ...]]] = {}
    for line in on_mesh(shape, "float32", one_layer)[0].as_text().splitlines():
        match = re.search(r"= (.*?) (all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)(-start)?\(", line)
        if match:
            made = [tuple(sorted(int(n) for n in dims.split(",") if n)) for dims in re.findall(r"\w+\[([\d,]*)\]", match[1])]
            found.setdefault(match[2], []).extend(made)
    return {kind: sorted(made) for kind, made in found.items()}


def test_rows_move_and_weights_do_not() -> None:
    """On the axis `expert`: rows, choices and weights in, and rows out, each with its transpose; nothing of the experts'."""
    k, here = QWEN.chosen, ROWS // 8
    assert collectives((1, 1, 8, 1, 1)) == {
        "all-gather": [(k, ROWS), (k, ROWS), (D, ROWS), (D, ROWS)],
        "reduce-scatter": [(k, here), (here, D), (here, D)],
        "all-reduce": [(), (E, D)],  # the loss, and the router's gradient
    }


def test_fsdp_gathers_each_weight_once_and_scatters_its_gradient_once() -> None:
    found = collectives((1, 2, 1, 1, 4))
    assert [x for x in found["all-gather"] if len(x) == 3] == [(F // 4, E, D)] * 3
    assert [x for x in found["reduce-scatter"] if len(x) == 3] == [(F // 4, E, D // 2)] * 3
    assert not [x for x in found["all-reduce"] if len(x) == 3]


def test_rows_must_be_split_as_the_weights_are() -> None:
    h, router, *weights = (jnp.asarray(x, jnp.float32) for x in arrays(dtype="float32"))
    routing = moe.route(h, router, None, experts=QWEN)
    for axes in (("data", "fsdp"), ("data", "expert"), ("fsdp", "expert", "tensor"), ("fsdp", "expert", "context")):
        with pytest.raises(ValueError, match="rows_axes is .*expected axes of the mesh, 'fsdp' and 'expert' among them"):
            moe.mix(h, routing, *weights, dtype="float32", mesh=make_mesh((1, 2, 2, 1, 1)), rows_axes=axes)


# ---------------------------------------------------------------------------------------------------------------- load balance


def looped_balance(layers: list[Any], mask: np.ndarray) -> float:
    """Over all layers' kept rows: the experts' choices per row times their mean scores, times E."""
    choices, score, rows = [0.0] * E, [0.0] * E, 0
    for routing in layers:
        for row in np.flatnonzero(mask):
            rows += 1
            for e in range(E):
                choices[e] += routing.chosen[row].tolist().count(e)
                score[e] += routing.scores[row, e].item()
    return E * sum(c / rows * s / rows for c, s in zip(choices, score, strict=True))


def test_load_balance_is_the_loop_and_layers_add() -> None:
    mask = np.arange(ROWS) % 3 > 0
    layers = [looped_route(*arrays(seed=seed)[:2], bias=None, setting=QWEN) for seed in (0, 1)]
    with jax.enable_x64(True):
        counts: Any = jit(moe.balance_counts)
        first, second = (counts(r.scores, r.chosen, mask) for r in layers)
        one, both = moe.balance_loss(first), moe.balance_loss(jax.tree.map(jnp.add, first, second))
    np.testing.assert_allclose(one, looped_balance(layers[:1], mask), rtol=1e-12)
    np.testing.assert_allclose(both, looped_balance(layers, mask), rtol=1e-12)


def test_an_even_load_costs_k_and_no_rows_cost_nothing() -> None:
    chosen = jnp.asarray((np.arange(E)[:, None] + np.arange(3)[None]) % E)  # every expert three times
    scores = np.full((E, E), 1 / E, np.float32)
    step = jit(jax.value_and_grad(lambda s, mask: moe.balance_loss(moe.balance_counts(s, chosen, mask))))
    loss, gradient = step(scores, np.ones(E, bool))
    np.testing.assert_allclose(loss, 3, rtol=1e-6)
    np.testing.assert_allclose(gradient, 3 / E, rtol=1e-6)  # of every score alike
    loss, gradient = step(scores, np.zeros(E, bool))
    assert loss == 0 and not np.any(gradient)


# ------------------------------------------------------------------------------------------------------------------ transformers


@pytest.mark.torch
@pytest.mark.filterwarnings("default")  # torch's and transformers' own
@pytest.mark.parametrize("family", ["qwen3_moe", "qwen3_moe, not normalised", "deepseek_v3", "deepseek_v3, not normalised"])
def test_blocks_of_transformers(family: str) -> None:
    torch = pytest.importorskip("torch", reason="compares with PyTorch, which is not installed")
    normalised = "not" not in family
    h, router, gate, up, down = arrays(dtype="float32")
    if family.startswith("qwen3_moe"):
        from transformers import Qwen3MoeConfig
        from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

        sizes = {"num_experts": E, "num_experts_per_tok": 3, "moe_intermediate_size": F, "norm_topk_prob": normalised}
        setting, bias = Experts(count=E, chosen=3, mlp_size=F, normalised=normalised), None
        module = Qwen3MoeSparseMoeBlock(Qwen3MoeConfig(hidden_size=D, **sizes))
    else:
        from transformers import DeepseekV3Config
        from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3MoE

        sizes = {"n_routed_experts": E, "num_experts_per_tok": 3, "moe_intermediate_size": F, "norm_topk_prob": normalised}
        sizes |= {"n_group": 4, "topk_group": 2, "routed_scaling_factor": 2.5, "n_shared_experts": 1}
        setting = Experts(
            count=E, chosen=3, mlp_size=F, scoring="sigmoid", normalised=normalised, groups=4, chosen_groups=2, scale=2.5
        )
        module = DeepseekV3MoE(DeepseekV3Config(hidden_size=D, **sizes))
        bias = some_bias(setting).astype("float32")
        module.gate.e_score_correction_bias.copy_(torch.tensor(bias))
        for weight in module.shared_experts.parameters():
            weight.data.zero_()
    module.gate.weight.data.copy_(torch.tensor(router.T))
    module.experts.gate_up_proj.data.copy_(torch.tensor(np.concatenate([gate, up], axis=2).swapaxes(1, 2)))
    module.experts.down_proj.data.copy_(torch.tensor(down.swapaxes(1, 2)))
    expected = module(torch.tensor(h)[None])[0].detach().numpy()
    given = block(*map(jnp.asarray, (h, router, gate, up, down)), setting=setting, bias=bias, mesh=make_mesh(ONE), dtype="float32")
    np.testing.assert_allclose(given, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.torch
@pytest.mark.filterwarnings("default")
def test_load_balance_of_transformers() -> None:
    torch = pytest.importorskip("torch", reason="compares with PyTorch, which is not installed")
    from transformers.models.qwen3_moe.modeling_qwen3_moe import load_balancing_loss_func

    mask = np.arange(ROWS) % 3 > 0
    layers = [arrays(dtype="float32", seed=seed)[:2] for seed in (0, 1)]
    logits = tuple(torch.tensor(h @ router) for h, router in layers)
    for kept in (mask, np.ones(ROWS, bool)):
        routings = [moe.route(jnp.asarray(h), jnp.asarray(router), None, experts=QWEN) for h, router in layers]
        counts = [moe.balance_counts(r.scores, r.chosen, jnp.asarray(kept)) for r in routings]
        expected = load_balancing_loss_func(logits, E, QWEN.chosen, torch.tensor(kept.reshape(2, -1)))
        np.testing.assert_allclose(moe.balance_loss(jax.tree.map(jnp.add, *counts)), expected, rtol=1e-5)
