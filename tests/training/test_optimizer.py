"""Narrow parameters are trained as their float32 copies would be, and the optimiser's state lies where its parameters do."""

from __future__ import annotations

from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh

from jaxreason import sharding
from jaxreason.models import decoder, spec
from jaxreason.models.config import Architecture, Numerics
from jaxreason.training import state as states
from jaxreason.training.checkpoint import Checkpointer
from jaxreason.training.optimizer import (
    MasterState,
    OptimizerConfig,
    apply_updates,
    check,
    learning_rate,
    make_optimizer,
    state_shardings,
    with_master_weights,
)

STEPS = 200
TINY = OptimizerConfig(learning_rate=1e-6, weight_decay=0.1)  # 1e-4 to 5e-5 of the parameters below; bfloat16 needs 2e-3
Tree = dict[str, Any]


def parameters(dtype: str) -> Tree:
    """Numbers of a checkpoint's size, all of them bfloat16's."""
    rng = np.random.default_rng(0)
    size = rng.uniform(0.01, 0.02, (4, 16)) * rng.choice([-1, 1], (4, 16))
    return {"w": jnp.asarray(size, "bfloat16").astype(dtype), "w_norm": jnp.ones((4,), "float32")}


def gradients(dtype: str = "bfloat16") -> Tree:
    """Numbers of bfloat16 for each step, with a lasting part, so that the parameters go somewhere."""
    rng = np.random.default_rng(1)
    w = rng.normal(0, 0.01, (STEPS, 4, 16)) + rng.normal(0, 0.02, (4, 16))[None]
    return {"w": jnp.asarray(w, "bfloat16").astype(dtype), "w_norm": jnp.asarray(rng.normal(0, 0.01, (STEPS, 4)), "float32")}


def trained(optimizer: optax.GradientTransformation, params: Tree, gradients: Tree, *, apply: Any) -> tuple[Tree, Any]:
    """Parameters and state after each step, in one program."""

    def step(carry: Any, gradient: Tree) -> tuple[Any, Any]:
        params, state = carry
        with jax.numpy_dtype_promotion("standard"):
            updates, state = optimizer.update(gradient, state, params)
            params = apply(params, updates, state)
        return (params, state), (params, state)

    @jax.jit
    def run(params: Tree, gradients: Tree) -> Any:
        return jax.lax.scan(step, (params, optimizer.init(params)), gradients)[1]

    return run(params, gradients)


def plain() -> optax.GradientTransformation:
    """What the optimiser of TINY has inside, from optax alone."""
    rate = learning_rate(TINY, steps=STEPS)

    def matrices(params: Tree) -> Tree:
        return {name: "norm" not in name for name in params}

    return optax.chain(
        optax.clip_by_global_norm(1.0), optax.adamw(rate, b1=0.9, b2=0.95, eps=1e-8, weight_decay=0.1, mask=matrices)
    )


def optax_apply(params: Tree, updates: Tree, state: Any) -> Any:
    return optax.apply_updates(params, updates)


def same(given: Any, expected: Any) -> None:
    assert jax.tree.structure(given) == jax.tree.structure(expected)
    for (path, a), b in zip(jax.tree.leaves_with_path(given), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype and np.asarray(a).tobytes() == np.asarray(b).tobytes(), jax.tree_util.keystr(path)


# -------------------------------------------------------------------------------------------------- parameters in bfloat16


def test_bfloat16_parameters_are_a_float32_runs_rounded():
    """At each of 200 steps bit by bit, where the gradients are the same; and the parameters move.

    Not compiled whole: the compiler contracts products and sums in one program and not in the other.
    """
    ours: Any = make_optimizer(TINY, steps=STEPS)
    theirs: Any = plain()
    given: Any = parameters("bfloat16")
    expected: Any = parameters("float32")
    state, inner, every = ours.init(given), theirs.init(expected), gradients()
    with jax.numpy_dtype_promotion("standard"):
        for i in range(STEPS):
            gradient = {name: each[i] for name, each in every.items()}
            updates, state = ours.update(gradient, state, given)
            given = apply_updates(given, updates, state)
            updates, inner = theirs.update(jax.tree.map(lambda g: g.astype("float32"), gradient), inner, expected)
            expected = optax.apply_updates(expected, updates)
            same(given, {"w": expected["w"].astype("bfloat16"), "w_norm": expected["w_norm"]})
    same(state, MasterState({"w": expected["w"], "w_norm": None}, inner))
    assert (given["w"] != parameters("bfloat16")["w"]).mean() > 0.8


def test_a_compiled_runs_parameters_are_its_copies_rounded():
    """At each step: no rounding is left out between the copy and the parameter."""
    path, state = trained(make_optimizer(TINY, steps=STEPS), parameters("bfloat16"), gradients(), apply=apply_updates)
    same(path["w"], state.master["w"].astype("bfloat16"))
    expected, _ = trained(plain(), parameters("float32"), gradients("float32"), apply=optax_apply)
    np.testing.assert_allclose(state.master["w"], expected["w"], rtol=1e-6)


def test_without_the_copy_nothing_moves():
    """The control, and why the updates are not to be applied by optax."""
    given, _ = trained(plain(), parameters("bfloat16"), gradients(), apply=optax_apply)
    same(given["w"][-1], parameters("bfloat16")["w"])
    given, _ = trained(make_optimizer(TINY, steps=STEPS), parameters("bfloat16"), gradients(), apply=optax_apply)
    same(given["w"][-1], parameters("bfloat16")["w"])


def test_a_parameter_that_falls_to_almost_nothing_is_still_exact():
    """1 to 1e-10 in one step: a float32 difference to the parameter in bfloat16 would lead to 0."""
    params = {"w": jnp.ones((1,), "bfloat16")}
    optimizer: Any = with_master_weights(optax.identity())
    _, state = optimizer.update({"w": jnp.zeros((1,), "bfloat16")}, optimizer.init(params), params)
    state = state._replace(master={"w": jnp.full((1,), 1e-10, "float32")})
    same(apply_updates(params, {"w": jnp.zeros((1,), "float32")}, state), {"w": jnp.full((1,), 1e-10, "bfloat16")})


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_narrow_parameters_without_a_copy_are_refused(dtype: str):
    params = {"w": jnp.ones((2,), dtype)}
    for optimizer in (optax.sgd(1e-3), optax.chain(with_master_weights(optax.sgd(1e-3)))):
        updates, state = optimizer.update(params, optimizer.init(params), params)
        with pytest.raises(ValueError, match=f"parameters are {dtype}, and .* no float32 copy .*with_master_weights around"):
            apply_updates(params, updates, state)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_wide_parameters_have_optaxs_own_state(dtype: str):
    """So that a checkpoint of a run in float32 is read as before, and its steps are the same."""
    with jax.enable_x64(dtype == "float64"):
        params, given = parameters(dtype), jax.tree.map(lambda g: g.astype(dtype), gradients())
        params["w_norm"], given["w_norm"] = params["w_norm"].astype(dtype), given["w_norm"].astype(dtype)
        assert {x.dtype.name for x in jax.tree.leaves(params)} == {dtype}
        ours = trained(make_optimizer(TINY, steps=STEPS), params, given, apply=apply_updates)
        same(ours, trained(plain(), params, given, apply=optax_apply))


# ----------------------------------------------------------------------------------------------------- the state's numbers


def test_the_first_moment_alone_is_stored_in_bfloat16():
    config = OptimizerConfig(learning_rate=1e-6, state_dtype="bfloat16")
    for dtype in ("float32", "bfloat16"):
        state = jax.eval_shape(make_optimizer(config, steps=1).init, parameters(dtype))
        adam = (state.inner if dtype == "bfloat16" else state)[1][0]
        assert {x.dtype.name for x in jax.tree.leaves(adam.mu)} == {"bfloat16"}
        assert {x.dtype.name for x in jax.tree.leaves(adam.nu)} == {"float32"}
    expected, _ = trained(make_optimizer(TINY, steps=STEPS), parameters("float32"), gradients("float32"), apply=apply_updates)
    given, _ = trained(make_optimizer(config, steps=STEPS), parameters("float32"), gradients("float32"), apply=apply_updates)
    moved, wanted = (path["w"][-1] - path["w"][0] for path in (given, expected))
    np.testing.assert_allclose(moved, wanted, atol=0.02 * np.abs(wanted).max())
    assert np.any(np.asarray(moved) != np.asarray(wanted))


def test_a_second_moment_in_bfloat16_would_never_fall():
    """Why it is not: after 2000 steps of no gradient it should be e^-2 of what it was."""

    def fallen(dtype: str) -> float:
        def step(nu: jax.Array, _: None) -> tuple[jax.Array, None]:
            return optax.tree.update_moment_per_elem_norm(jnp.zeros((), jnp.float32), nu, 0.999, 2).astype(dtype), None

        with jax.numpy_dtype_promotion("standard"):
            return float(jax.lax.scan(step, jnp.ones((), dtype), length=2000)[0])

    assert fallen("float32") == pytest.approx(0.999**2000, rel=1e-3)
    assert fallen("bfloat16") == 1.0


def test_an_unknown_state_dtype_is_refused():
    with pytest.raises(ValueError, match=r"config.online.optimizer.state_dtype is 'bf16', .* did you mean 'bfloat16'"):
        check(OptimizerConfig(state_dtype="bf16"), key="online.optimizer")
    check(OptimizerConfig(state_dtype="bfloat16"), key="online.optimizer")


def test_matrices_are_decayed_and_loras_too_but_no_norms_and_biases():
    params = {"layers": {"q": {"a": 1.0, "b": 1.0}, "q_bias": 1.0, "mlp_norm": 1.0, "down": 1.0}, "norm": {"scale": 1.0}}
    params = jax.tree.map(lambda x: jnp.full((2, 2), x), params)
    optimizer = make_optimizer(OptimizerConfig(learning_rate=0.5, weight_decay=0.5), steps=1)
    zero = jax.tree.map(lambda p: jnp.zeros((1, *p.shape)), params)
    given, _ = trained(optimizer, params, zero, apply=apply_updates)
    kept = {"layers": {"q": {"a": 0.75, "b": 0.75}, "q_bias": 1.0, "mlp_norm": 1.0, "down": 0.75}, "norm": {"scale": 1.0}}
    assert jax.tree.map(lambda x: float(x.min()), given) == kept


# -------------------------------------------------------------------------------------------------------- the state's place


def make_mesh(fsdp: int, tensor: int) -> Mesh:
    return sharding.make_mesh(sharding.MeshConfig(fsdp=fsdp, tensor=tensor))


def where(tree: Any) -> Any:
    return jax.tree.map(lambda x: x.sharding, tree)


def parts(tree: Any) -> Any:
    """The shape in which each array lies on its devices."""
    return jax.tree.map(lambda x: {each.data.shape for each in x.addressable_shards}, tree)


def test_copies_and_moments_lie_in_parts_as_their_parameters_do():
    """Adapters of one matrix, and two types: what is float32 has no copy. By hand, on data 2 x fsdp 2 x tensor 2."""
    mesh = make_mesh(2, 2)

    def leaf(shape: tuple[int, ...], axes: sharding.Axes, dtype: str) -> jax.Array:
        return jax.device_put(np.full(shape, 0.1, dtype), sharding.named(mesh, axes))

    q = {"a": leaf((2, 16, 4), (None, "embed", None), "bfloat16"), "b": leaf((2, 4, 8), (None, None, "heads"), "float32")}
    params = {"layers": {"q": q}, "scores": leaf((16, 6), ("embed", "vocab"), "bfloat16")}
    shapes = {"layers": {"q": {"a": {(2, 8, 4)}, "b": {(2, 4, 4)}}}, "scores": {(8, 3)}}
    assert parts(params) == shapes

    optimizer = make_optimizer(OptimizerConfig(state_dtype="bfloat16"), steps=4)
    at = state_shardings(optimizer, params, mesh)
    state = jax.jit(optimizer.init, out_shardings=at)(params)
    assert jax.tree.structure(at) == jax.tree.structure(state)
    assert parts(state.master) == {"layers": {"q": {"a": {(2, 8, 4)}, "b": None}}, "scores": {(8, 3)}}
    adam = state.inner[1][0]
    assert parts(adam.mu) == parts(adam.nu) == shapes
    assert adam.count.sharding == sharding.named(mesh)
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), params)
    assert state_shardings(optimizer, abstract, mesh) == at

    alone = jax.jit(optimizer.init)(params)  # the control
    assert parts(alone.inner[1][0].nu) != shapes and parts(alone.inner[1][0].mu) != shapes


def test_where_nothing_is_narrow_the_moments_alone_are_placed():
    mesh = make_mesh(2, 2)
    params = {"scores": jax.ShapeDtypeStruct((16,), jnp.float32, sharding=sharding.named(mesh, ("embed",)))}
    at = state_shardings(make_optimizer(OptimizerConfig(), steps=4), params, mesh)
    assert jax.tree.structure(at) == jax.tree.structure(plain().init({"scores": jnp.zeros((16,))}))
    assert at[1][0].mu == at[1][0].nu == where(params) and at[1][0].count == sharding.named(mesh)


def made(mesh: Mesh) -> decoder.Model:
    return decoder.make_decoder(Architecture(), Numerics("bfloat16", "bfloat16"), mesh)


@pytest.mark.slow
def test_a_checkpoint_with_copies_restores_on_another_mesh(tmp_path: Path):
    """A decoder's state, bitwise, where the other mesh wants it; its copies are more than its parameters by then."""
    mesh, other = make_mesh(2, 2), make_mesh(4, 2)
    optimizer: Any = make_optimizer(OptimizerConfig(state_dtype="bfloat16"), steps=4)
    rng = np.random.default_rng(2)

    def draw(each: spec.ParamSpec) -> jax.Array:
        return jax.device_put(rng.normal(0, 0.3, each.shape).astype("bfloat16"), sharding.named(mesh, each.axes))

    state = states.create(made(mesh), optimizer, mesh, spec.tree_map(draw, made(mesh).specs))
    assert where(state) == where(states.abstract(made(mesh), optimizer, mesh))
    same(jax.tree.map(lambda m: m.astype("bfloat16"), state.opt_state.master), state.params)

    @partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
    def step(state: Any) -> Any:
        with jax.numpy_dtype_promotion("standard"):
            updates, opt_state = optimizer.update(jax.tree.map(jnp.sin, state.params), state.opt_state, state.params)
            return state.replace(params=apply_updates(state.params, updates, opt_state), opt_state=opt_state)

    state = step(state)
    template = states.abstract(made(other), optimizer, other)
    with closing(Checkpointer(tmp_path)) as checkpointer:
        checkpointer.save(1, state, {})
        restored = checkpointer.restore_latest(template)
    assert restored is not None
    same(restored.state, state)
    adam = restored.state.opt_state.inner[1][0]
    for tree in (restored.state.opt_state.master, adam.mu, adam.nu):
        assert where(tree) == where(restored.state.params) == spec.shardings(made(other).specs, other)
    for copy, parameter in zip(*map(jax.tree.leaves, (state.opt_state.master, state.params)), strict=True):
        assert np.any(np.asarray(copy) != np.asarray(parameter, "float32"))


def test_a_checkpoint_of_two_types_restores(tmp_path: Path):
    """A parameter without a copy has no place in the checkpoint's tree of them."""
    params = parameters("bfloat16")
    everywhere = sharding.named(make_mesh(2, 2))
    state = jax.device_put(make_optimizer(TINY, steps=1).init(params), everywhere)
    with closing(Checkpointer(tmp_path)) as checkpointer:
        checkpointer.save(1, state, {})
        template = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=everywhere), state)
        restored = checkpointer.restore_latest(template)
    assert restored is not None and isinstance(restored.state, MasterState)
    same(restored.state, state)
