"""A Flax module as a policy has the module's own numbers, whatever the padding, the group and the mesh; and it learns."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx, traverse_util
from jax.sharding import Mesh

from jaxreason import objectives, sharding
from jaxreason.batch import PromptBatch, RolloutBatch
from jaxreason.models import adapters, spec
from jaxreason.models.decoder import Model
from jaxreason.sampling.rollout import Sampled, sample
from jaxreason.training import state as states
from jaxreason.training.checkpoint import Checkpointer
from jaxreason.training.step import Split, make_update, score

ROOT = Path(__file__).parents[2]
V, D, HEADS, PLACES = 12, 8, 2, 16
P, G, TP, T = 8, 2, 4, 4
STOP = 0
QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}  # to compile
if jax.__version_info__ < (0, 11):
    QUICK["xla_cpu_use_fusion_emitters"] = False  # later versions have no such switch, and need less without it
jit = partial(jax.jit, compiler_options=QUICK)

# ---------------------------------------------------------------------------------------------------- people's modules


class Block(nnx.Module):
    """Attention and an MLP; some axes are named, by what they are and by where they lie."""

    def __init__(self, names: dict[str, Any], *, rngs: nnx.Rngs):
        self.attention = nnx.MultiHeadAttention(HEADS, D, decode=False, dropout_rate=0.3, rngs=rngs)
        self.up = nnx.Linear(D, 2 * D, rngs=rngs, kernel_metadata=names)
        self.down = nnx.Linear(2 * D, D, rngs=rngs)

    def __call__(self, x, mask):
        x = x + self.attention(x, mask=mask[:, None])
        return x + self.down(nnx.gelu(self.up(x)))


class Policy(nnx.Module):
    """Learned positions, dropout, a running statistic, tied embeddings: what people have."""

    def __init__(self, *, rngs: nnx.Rngs, names: dict[str, Any] | None = None):
        self.embed = nnx.Embed(V, D, rngs=rngs)
        self.places = nnx.Embed(PLACES, D, rngs=rngs)
        self.blocks = nnx.List([Block(names or {}, rngs=rngs)])
        self.statistic = nnx.BatchNorm(D, rngs=rngs)
        self.dropout = nnx.Dropout(0.3, rngs=rngs)
        self.scale = nnx.Variable(jnp.full((D,), 2.0))

    def hidden(self, tokens, positions, mask):
        x = self.dropout(self.embed(tokens) + self.places(positions))
        for block in self.blocks:
            x = block(x, mask)
        return self.statistic(x) * self.scale[...][None, None]

    def head(self, hidden):
        return self.embed.attend(hidden)

    def __call__(self, tokens, positions, mask):
        return self.head(self.hidden(tokens, positions, mask))


class Recurrent(nnx.Module):
    """Knows of no positions and no mask."""

    def __init__(self, *, rngs: nnx.Rngs):
        self.embed = nnx.Embed(V, D, rngs=rngs)
        self.memory = nnx.RNN(nnx.GRUCell(D, D, rngs=rngs), rngs=rngs)
        self.head = nnx.Linear(D, V, rngs=rngs)

    def __call__(self, tokens):
        return self.head(self.memory(self.embed(tokens)))  # pyright: ignore[reportArgumentType]


class Table(nnx.Module):
    """Bigram logits: the smallest policy, made wrong by its arguments."""

    def __init__(self, *, rngs: nnx.Rngs, dtype: Any = jnp.float32, second: Any = jnp.float32, names: Any = None):
        metadata = {"out_sharding": names, "eager_sharding": False} if names else {}
        self.embed = nnx.Param(jax.random.normal(rngs(), (V, V)).astype(dtype), **metadata)
        self.second = nnx.Param(jnp.zeros((V,), second))
        self.rngs = rngs

    def __call__(self, tokens, positions, mask):
        return self.embed[...][tokens].astype(jnp.float32) + self.second[...][None, None]

    def narrow(self, tokens, positions, mask):
        return self.embed[...][tokens]


class LinenPolicy(linen.Module):
    """In the style with setup, so that hidden states and head can be had apart."""

    def setup(self):
        named = linen.with_logical_partitioning(linen.initializers.lecun_normal(), ("embed", "mlp"))
        self.embed = linen.Embed(V, D)
        self.places = linen.Embed(PLACES, D)
        self.attention = linen.MultiHeadDotProductAttention(HEADS, dropout_rate=0.3, deterministic=True)
        self.up = linen.Dense(2 * D, kernel_init=named)
        self.down = linen.Dense(D)
        self.statistic = linen.BatchNorm(use_running_average=True)

    def hidden(self, tokens, positions, mask):
        x = self.embed(tokens) + self.places(positions)
        x = x + self.attention(x, mask=mask[:, None])
        return self.statistic(x + self.down(linen.gelu(self.up(x))))

    def head(self, hidden):
        return self.embed.attend(hidden)

    def __call__(self, tokens, positions, mask):
        return self.head(self.hidden(tokens, positions, mask))


def mesh_of(*shape: int) -> Mesh:
    return sharding.make_mesh(sharding.MeshConfig(*shape), devices=jax.devices()[: int(np.prod(shape))])


ONE = mesh_of(1, 1, 1)


class Case(NamedTuple):
    model: Model
    params: Any
    direct: Callable[[Any, jax.Array], jax.Array]  # params, tokens [N] -> logits [N, V], by the module alone


def whole(tokens: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """What a module is called with for one text without padding."""
    size = tokens.shape[0]
    return tokens[None], jnp.arange(size, dtype=jnp.int32)[None], jnp.tril(jnp.ones((size, size), bool))[None]


def functional(module: nnx.Module, call: Callable[..., Any]) -> Callable[[Any, jax.Array], jax.Array]:
    """The module in evaluation mode as a function of its parameters."""
    module = nnx.view(module, deterministic=True, use_running_average=True, raise_if_not_found=False)
    graph, state = nnx.split(module)

    def direct(params: Any, tokens: jax.Array) -> jax.Array:
        new, flat = nnx.clone(state), traverse_util.flatten_dict(params)
        for path, variable in nnx.to_flat_state(new):
            if isinstance(variable, nnx.Param):
                variable.set_value(flat[tuple(map(str, path))])
        return call(nnx.merge(graph, new), *whole(tokens))[0]

    return direct


def ignorant(module: Recurrent, tokens: jax.Array, positions: jax.Array, mask: jax.Array) -> jax.Array:
    return module(tokens)


@cache
def linen_variables() -> Any:
    variables = jit(LinenPolicy().init)(jax.random.key(3), *whole(jnp.zeros(4, jnp.int32)))
    return {**variables, "batch_stats": jax.tree.map(lambda x: x + 0.5, variables["batch_stats"])}


@cache
def case(kind: str, mesh: Mesh = ONE) -> Case:
    if kind == "nnx":
        module = Policy(rngs=nnx.Rngs(1), names={"out_sharding": ("fsdp", "tensor"), "eager_sharding": False})
        return Case(*adapters.from_nnx(module, mesh=mesh), functional(module, Policy.__call__))
    if kind == "recurrent":
        module = Recurrent(rngs=nnx.Rngs(2))
        return Case(*adapters.from_nnx(module, mesh=mesh, call=ignorant), functional(module, ignorant))
    made = adapters.from_linen(LinenPolicy(), linen_variables(), mesh=mesh, call=LinenPolicy.hidden, head=LinenPolicy.head)
    constants = {"batch_stats": linen_variables()["batch_stats"]}
    return Case(*made, lambda params, tokens: LinenPolicy().apply({"params": params, **constants}, *whole(tokens))[0])  # pyright: ignore


# ------------------------------------------------------------------------------------------------------------- batches


def prompts(mesh: Mesh = ONE) -> PromptBatch:
    """Of 1 to TP tokens, two lengths of them."""
    rng = np.random.default_rng(0)
    mask = np.arange(TP)[None] >= np.array([0, TP - 1] * (P // 2))[:, None]
    tokens = rng.integers(1, V, (P, TP)).astype(np.int32)
    batch = PromptBatch(tokens, mask, np.arange(P, dtype=np.uint32), np.zeros(P, np.int32))
    return sharding.place(mesh, batch, ("problems",))


def sampled(model: Model, params: Any, batch: PromptBatch, key: Any) -> Sampled:
    return sample(model, params, batch, key, group=G, max_completion_tokens=T, eos_ids=(STOP,), pad_id=STOP)


@pytest.mark.parametrize("kind", ("nnx", "linen"))
def test_drafts_change_nothing(kind: str) -> None:
    """The same completions, where the tokens of a draft that was not accepted are written over."""
    model, params, _ = case(kind)
    fixed: Any = {"group": G, "max_completion_tokens": T, "eos_ids": (STOP,), "pad_id": STOP}
    plain, out = (jit(partial(sample, model, **fixed, draft=draft))(params, prompts(), jax.random.key(5)) for draft in (0, 2))
    np.testing.assert_array_equal(out.completion, plain.completion)
    np.testing.assert_allclose(out.logp, plain.logp, rtol=0, atol=1e-5)
    assert np.asarray(out.drafts)[..., 0].sum() > 0


def rolled_out(batch: PromptBatch, out: Sampled) -> RolloutBatch:
    """The reward is the share of even tokens."""
    reward = jnp.mean((out.completion % 2 == 0) & out.mask, axis=-1, dtype=jnp.float32)
    return RolloutBatch(batch.prompt, batch.prompt_mask, out.completion, out.mask, out.truncated, out.logp, reward)


def fixed_rollouts(mesh: Mesh = ONE) -> RolloutBatch:
    rng = np.random.default_rng(1)
    mask = np.broadcast_to(np.arange(T) < np.array([2, T] * (P // 2))[:, None, None], (P, G, T))
    completion = rng.integers(0, V, (P, G, T)).astype(np.int32)
    logp, ended = np.where(mask, -2.5, 0.0).astype(np.float32), mask.all(-1)
    host = Sampled(completion, mask, logp, ended, ~ended, mask.sum(-1))  # pyright: ignore[reportArgumentType]
    return rolled_out(prompts(mesh), sharding.place(mesh, host, ("problems",)))


def texts(batch: RolloutBatch) -> list[tuple[np.ndarray, np.ndarray, tuple[int, int]]]:
    """Each completion's prompt and tokens without any padding, and its place."""
    prompt, known, completion, mask = (np.asarray(x) for x in (batch.prompt, batch.prompt_mask, batch.completion, batch.mask))
    return [(prompt[p][known[p]], completion[p, g][mask[p, g]], (p, g)) for p in range(P) for g in range(G)]


def by_hand(direct: Callable[..., jax.Array], params: Any, prompt: jax.Array, completion: jax.Array) -> jax.Array:
    """Log-probabilities of a completion's tokens, read off the module's logits."""
    laws = jax.nn.log_softmax(direct(params, jnp.concatenate([prompt, completion])))
    return laws[jnp.arange(len(prompt) - 1, len(prompt) + len(completion) - 1), completion]


# ------------------------------------------------------------------------------------------------------------- numbers

EVERY = ("nnx", "recurrent", "linen")


@cache
def scored(kind: str) -> Callable[..., Any]:
    """(params, batch, weight) -> (their sum, log-probabilities), gradient."""

    def loss(params: Any, batch: RolloutBatch, weight: jax.Array) -> tuple[jax.Array, jax.Array]:
        logp = score(case(kind).model, params, batch, temperature=1.0).logp
        return jnp.sum(weight * logp), logp

    return jit(jax.value_and_grad(loss, has_aux=True))


def weights(batch: RolloutBatch) -> jax.Array:
    return jnp.asarray(np.random.default_rng(4).normal(size=(P, G, T)).astype(np.float32) * np.asarray(batch.mask))


@pytest.mark.parametrize("kind", EVERY)
def test_log_probabilities_and_gradient_are_those_of_a_loop_over_unpadded_texts(kind: str) -> None:
    _, params, direct = case(kind)
    batch = fixed_rollouts()
    weight = weights(batch)
    (_, logp), gradient = scored(kind)(params, batch, weight)

    @jit
    def one(params: Any, prompt: jax.Array, completion: jax.Array, weight: jax.Array) -> Any:
        def loss(params: Any) -> tuple[jax.Array, jax.Array]:
            logp = by_hand(direct, params, prompt, completion)
            return jnp.sum(weight * logp), logp

        return jax.grad(loss, has_aux=True)(params)

    expected = jax.tree.map(jnp.zeros_like, params)
    lengths = set()
    for prompt, completion, at in texts(batch):
        its, want = one(params, prompt, completion, weight[at][: len(completion)])
        np.testing.assert_allclose(logp[at][: len(completion)], want, atol=2e-5)
        expected = jax.tree.map(jnp.add, expected, its)
        lengths.add((len(prompt), len(completion)))
    assert lengths == {(TP, 2), (1, T)}
    for (path, a), b in zip(jax.tree.leaves_with_path(gradient), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4, err_msg=jax.tree_util.keystr(path))


@pytest.mark.parametrize("kind", EVERY)
def test_padding_and_the_rest_of_the_group_are_invisible(kind: str) -> None:
    _, params, _ = case(kind)
    batch = fixed_rollouts()
    (_, logp), _ = scored(kind)(params, batch, weights(batch))
    junk = batch.replace(  # pyright: ignore[reportAttributeAccessIssue]
        prompt=jnp.where(batch.prompt_mask, batch.prompt, 9), completion=jnp.where(batch.mask, batch.completion, 5)
    )
    others = batch.replace(completion=batch.completion.at[:, 1:].set(3))  # pyright: ignore[reportAttributeAccessIssue]
    for changed, kept in ((junk, batch.mask), (others, batch.mask.at[:, 1:].set(False))):
        (_, again), _ = scored(kind)(params, changed, weights(batch))
        np.testing.assert_allclose(np.asarray(again)[kept], np.asarray(logp)[kept], atol=2e-5)


@cache
def greedy(kind: str) -> Callable[..., Sampled]:
    return jit(partial(sampled, case(kind).model, key=None))


def test_a_prompt_without_a_token_is_one_of_padding() -> None:
    """It may fill up a batch: what it is worth does not matter, but it is finite, and the sampler's."""
    params, batch = case("recurrent").params, prompts()
    empty = batch.replace(prompt_mask=batch.prompt_mask.at[0].set(False))  # pyright: ignore[reportAttributeAccessIssue]
    out = greedy("recurrent")(params, empty)
    (_, logp), gradient = scored("recurrent")(params, rolled_out(empty, out), weights(rolled_out(empty, out)))
    np.testing.assert_allclose(np.asarray(logp)[np.asarray(out.mask)], np.asarray(out.logp)[np.asarray(out.mask)], atol=1e-5)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(gradient))


@pytest.mark.parametrize("kind", ["nnx", "recurrent"])
def test_greedy_sampling_is_the_argmax_of_teacher_forcing(kind: str) -> None:
    _, params, direct = case(kind)
    out = greedy(kind)(params, prompts())
    laws = jit(direct)
    found = texts(rolled_out(prompts(), out))
    for prompt, completion, at in found:
        tokens = np.concatenate([prompt, completion])
        taught = np.asarray(laws(params, np.pad(tokens, (0, TP + T - len(tokens)))))  # causal: what is appended is not seen
        np.testing.assert_array_equal(np.argmax(taught, -1)[len(prompt) - 1 : len(tokens) - 1], completion)
        assert (completion[-1] == STOP) != out.truncated[at]
    assert len({tuple(completion) for _, completion, _ in found}) > 2


def test_packed_rows_hold_texts_that_do_not_see_each_other() -> None:
    model, params, direct = case("nnx")
    rng = np.random.default_rng(5)
    parts = [rng.integers(0, V, size).astype(np.int32) for size in (4, 6)]
    pad = np.zeros(2, np.int32)
    row = jnp.asarray(np.concatenate([pad, *parts, pad]))[None]
    segments = jnp.asarray(np.repeat(np.array([0, 1, 2, 0], np.int32), [2, 4, 6, 2]))[None]
    laws = model.project(params, jit(model.hidden)(params, row, segments)[0])
    for part, start in zip(parts, (2, 6), strict=True):
        np.testing.assert_allclose(laws[start : start + len(part)], jit(direct)(params, jnp.asarray(part)), atol=2e-5)


def test_logits_and_hidden_states_with_a_head_are_the_same_policy() -> None:
    batch, (model, params, _) = fixed_rollouts(), case("linen")
    without, _ = adapters.from_linen(LinenPolicy(), linen_variables(), mesh=ONE)
    given, expected = (jit(lambda p, b, m=m: score(m, p, b, temperature=0.7).logp)(params, batch) for m in (model, without))
    np.testing.assert_allclose(given, expected, atol=1e-5)
    hidden, _ = jax.eval_shape(model.forward, params, batch.prompt, batch.prompt_mask, batch.completion)
    assert hidden.shape == (P, G, T, D)


@pytest.mark.parametrize("wrong", ["looks ahead", "is noisy"])
def test_what_shapes_do_not_tell_shows_as_a_gap_to_the_sampler(wrong: str) -> None:
    def call(m: Table, tokens: jax.Array, positions: jax.Array, mask: jax.Array) -> jax.Array:
        right = m(tokens, positions, mask)
        if wrong == "is noisy":
            return right + jax.random.normal(m.rngs.noise(), right.shape)
        return right + jnp.roll(right, -1, axis=1)

    model, params = adapters.from_nnx(Table(rngs=nnx.Rngs(0)), mesh=ONE, call=call)

    @jit
    def gap(params: Any, batch: PromptBatch, key: jax.Array) -> jax.Array:
        out = sampled(model, params, batch, key)
        logp = score(model, params, rolled_out(batch, out), temperature=1.0).logp
        return jnp.max(jnp.where(out.mask, jnp.abs(logp - out.logp), 0.0))

    assert gap(params, prompts(), jax.random.key(0)) > 0.1


def test_the_given_module_stays_as_it_was_and_its_constants_are_no_parameters() -> None:
    module = Policy(rngs=nnx.Rngs(1))
    before = jax.tree.leaves(nnx.split(module, nnx.Param, ...)[2])
    _, params = adapters.from_nnx(module, mesh=ONE)
    assert module.dropout.deterministic is False and module.statistic.use_running_average is False
    assert all(a is b for a, b in zip(before, jax.tree.leaves(nnx.split(module, nnx.Param, ...)[2]), strict=True))
    assert set(params) == {"embed", "places", "blocks", "statistic"} and set(params["blocks"]) == {"0"}
    assert set(params["statistic"]) == {"scale", "bias"}  # and not its running mean
    assert all(type(node) is dict for node in (params, params["blocks"], params["blocks"]["0"]["attention"]))


def test_trained_parameters_go_back_into_the_module() -> None:
    module = Policy(rngs=nnx.Rngs(1))
    _, params = adapters.from_nnx(module, mesh=ONE)
    adapters.write_nnx(module, jax.tree.map(lambda x: x + 1.0, params))
    _, again = adapters.from_nnx(module, mesh=ONE)
    for a, b in zip(jax.tree.leaves(again), jax.tree.leaves(params), strict=True):
        np.testing.assert_array_equal(a, np.asarray(b) + 1)
    np.testing.assert_array_equal(module.blocks[0].up.kernel[...], again["blocks"]["0"]["up"]["kernel"])


# ------------------------------------------------------------------------------------- training, meshes, checkpoints

OPTIMIZER = optax.sgd(0.05, momentum=0.9)


@cache
def trained(kind: str, shape: tuple[int, int, int], steps: int) -> tuple[list[Any], list[Any], list[Sampled]]:
    """States from the first on, metrics and rollouts of steps on what the policy sampled."""
    mesh = mesh_of(*shape)
    model, params, _ = case(kind, mesh)
    update = jit(make_update(model, objectives.grpo(beta=0.04), OPTIMIZER, temperature=1.0, split=Split(P, P)))
    rollout = jit(partial(sampled, model))
    trail, metrics, rollouts = [states.create(model, OPTIMIZER, mesh, params)], [], []
    for step in range(steps):
        out = rollout(trail[-1].params, prompts(mesh), jax.random.key(step))
        state, measured, _ = update(trail[-1], params, rolled_out(prompts(mesh), out))
        trail, metrics, rollouts = [*trail, state], [*metrics, sharding.fetch(measured)], [*rollouts, sharding.fetch(out)]
    return trail, metrics, rollouts


@pytest.mark.parametrize("kind", ["nnx", "linen"])
def test_two_steps_on_what_it_sampled(kind: str) -> None:
    """Sampler and trainer agree, the ratio is 1 in the first update on a batch, every parameter moves."""
    trail, metrics, _ = trained(kind, (1, 1, 1), 2)
    assert [int(state.step) for state in trail] == [0, 1, 2]
    for before, after, measured in zip(trail, trail[1:], metrics, strict=False):
        assert np.isfinite(measured["policy/loss"]) and measured["optimizer/gradient_norm"] > 1e-2
        assert measured["policy/sampler_gap"] < 1e-4
        assert measured["policy/ratio_min"] == measured["policy/ratio_max"] == 1
        for (path, a), b in zip(jax.tree.leaves_with_path(before.params), jax.tree.leaves(after.params), strict=True):
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            assert name.endswith("attention/key/bias") or np.abs(a - b).max() > 1e-5, name  # that one moves no softmax


@pytest.mark.parametrize(("kind", "shape"), [("linen", (8, 1, 1)), pytest.param("nnx", (2, 2, 2), marks=pytest.mark.slow)])
def test_a_mesh_changes_nothing(kind: str, shape: tuple[int, int, int]) -> None:
    trail, metrics, rollouts = trained(kind, shape, 1)
    alone, expected, rollouts_alone = trained(kind, (1, 1, 1), 2)
    np.testing.assert_array_equal(rollouts[0].completion, rollouts_alone[0].completion)
    assert metrics[0].keys() == expected[0].keys()
    for name, value in expected[0].items():
        np.testing.assert_allclose(metrics[0][name], value, rtol=1e-4, atol=1e-5, err_msg=name)
    for (path, a), b in zip(jax.tree.leaves_with_path(trail[1]), jax.tree.leaves(alone[1]), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5, err_msg=jax.tree_util.keystr(path))


@pytest.mark.parametrize("kind", ["nnx", "linen"])
def test_a_checkpoint_restores_on_another_mesh_where_named_axes_lie_in_parts(kind: str, tmp_path: Path) -> None:
    state = states.create(case(kind).model, OPTIMIZER, ONE, case(kind).params)
    checkpointer = Checkpointer(tmp_path)
    checkpointer.save(1, state, {})
    mesh = mesh_of(2, 2, 2)
    restored = checkpointer.restore_latest(states.abstract(case(kind, mesh).model, OPTIMIZER, mesh))
    checkpointer.close()
    assert restored is not None and jax.tree.structure(restored.state) == jax.tree.structure(state)
    for a, b in zip(jax.tree.leaves(restored.state), jax.tree.leaves(state), strict=True):
        np.testing.assert_array_equal(a, b)
    fresh = states.create(case(kind, mesh).model, OPTIMIZER, mesh, case(kind, mesh).params)
    for each in (restored.state, fresh):
        for params in (each.params, each.opt_state[0].trace):
            kernel = (params["blocks"]["0"] if kind == "nnx" else params)["up"]["kernel"]
            assert {shard.data.shape for shard in kernel.addressable_shards} == {(D // 2, 2 * D // 2)}
            assert params["embed"]["embedding"].sharding.is_fully_replicated


def test_names_of_axes_mean_where_they_lie() -> None:
    """Ours, a mesh axis, one that the module's own rules translate, and one that nobody knows."""

    class Named(nnx.Module):
        def __init__(self):
            rules = (("wide", "tensor"),)
            self.table = nnx.Param(jnp.ones((4, 6, 8, 10)), out_sharding=("vocab", "fsdp", None, "other"), eager_sharding=False)
            self.second = nnx.Param(jnp.ones((4, V)), out_sharding=("kept", "wide"), sharding_rules=rules, eager_sharding=False)

        def __call__(self, tokens, positions, mask):
            return self.table[...][:, 0, 0, 0][tokens % 4][..., None] * self.second[...][0][None, None]

    mesh = mesh_of(2, 2, 2)
    model, params = adapters.from_nnx(Named(), mesh=mesh)
    assert {path: each.axes for path, each in spec.leaves(model.specs)} == {
        "second": (None, "heads"),
        "table": ("vocab", "embed", None, None),
    }
    assert params["table"].sharding.spec == jax.P("tensor", "fsdp", None, None)
    assert params["second"].sharding.spec == jax.P(None, "tensor")


def test_bfloat16_parameters_have_float32_logits() -> None:
    model, params = adapters.from_nnx(
        Table(rngs=nnx.Rngs(0), dtype=jnp.bfloat16, second=jnp.bfloat16), mesh=ONE, call=Table.narrow, head=lambda m, hidden: hidden
    )
    assert {str(x.dtype) for x in jax.tree.leaves(params)} == {model.numerics.param_dtype} == {"bfloat16"}
    batch = fixed_rollouts()
    hidden, balance = jax.eval_shape(model.forward, params, batch.prompt, batch.prompt_mask, batch.completion)
    assert (hidden.shape, hidden.dtype, balance.dtype) == ((P, G, T, V), jnp.bfloat16, jnp.float32)
    assert jax.eval_shape(model.project, params, jax.ShapeDtypeStruct((3, V), jnp.bfloat16)).dtype == jnp.float32


# ------------------------------------------------------------------------------------------------------------ mistakes


CALLS: dict[str, tuple[Any, str]] = {  # and what is said
    "too few arguments": (
        lambda m, tokens: 0,
        "Table was called with (tokens int32[2, 8], positions int32[2, 8], mask bool[2, 8, 8]) and raised TypeError, "
        "'.*takes 2 positional arguments but 4 were given': expected logits [2, 8, V]; `call` says how to call it otherwise",
    ),
    "no vocabulary": (lambda m, *args: m(*args)[..., 0], "returned float32[2, 8]: expected logits [2, 8, V], of a float type"),
    "turned": (lambda m, *args: m(*args).mT, "returned float32[2, 12, 8]: expected logits [2, 8, V]"),
    "integers": (lambda m, *args: m(*args).astype(jnp.int32), "returned int32[2, 8, 12]: expected logits [2, 8, V], of a float"),
    "two things": (lambda m, *args: (m(*args), 0.0), "returned a tuple: expected logits [2, 8, V]; `call` can take"),
    "its own error": (lambda m, *args: m.absent, "and raised AttributeError, "),
}
TABLES: dict[str, tuple[dict[str, Any], str]] = {
    "two types": ({"dtype": jnp.bfloat16}, "parameters embed and second of Table are bfloat16 and float32: expected one type"),
    "a type": ({"dtype": jnp.float16}, "parameter embed of Table is float16: expected an array of float32, bfloat16 or float64"),
    "a mesh axis": (
        {"names": ("data", None)},
        "parameter embed lies on mesh axis data: expected one of expert, fsdp, sequence, ten",
    ),
    "two mesh axes": (
        {"names": (("fsdp", "tensor"), None)},
        "parameter embed lies on mesh axis ('fsdp', 'tensor'): expected one of",
    ),
    "a mesh axis twice": (
        {"names": ("embed", "fsdp")},
        "parameter embed has axes named ('embed', 'fsdp'), two of which lie on one",
    ),
    "names": ({"names": ("embed",)}, "parameter embed has axes named ('embed',), expected 2 names, one for each axis"),
    "an odd mesh": ({"names": ("embed", None)}, "parameter embed has 12 embed, which mesh axis fsdp = 8 does not divide"),
}


def assert_refused(said: str, module: nnx.Module, **options: Any) -> None:
    with pytest.raises(ValueError, match=re.escape(said).replace(r"\.\*", ".*")) as error:
        adapters.from_nnx(module, **options)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("mistake", CALLS)
def test_a_module_that_breaks_the_contract_is_told_in_a_sentence(mistake: str, unchecked: None) -> None:
    call, said = CALLS[mistake]
    assert_refused(said, Table(rngs=nnx.Rngs(0)), mesh=ONE, call=call)


def test_a_head_that_breaks_the_contract(unchecked: None) -> None:
    said = "the head of Table was called with hidden float32[16, 12] and returned float32[12]: expected logits [16, V], of a float"
    assert_refused(said, Table(rngs=nnx.Rngs(0)), mesh=ONE, head=lambda m, hidden: hidden[0])


@pytest.mark.parametrize("mistake", TABLES)
def test_parameters_that_cannot_be_placed_are_told_in_a_sentence(mistake: str, unchecked: None) -> None:
    made, said = TABLES[mistake]
    assert_refused(said, Table(rngs=nnx.Rngs(0), **made), mesh=mesh_of(1, 8, 1))


def test_mistakes_with_linen(unchecked: None) -> None:
    module, variables = LinenPolicy(), linen_variables()
    with pytest.raises(ValueError, match="collections .*'embed', .*expected 'params' among them: pass what module.init returned"):
        adapters.from_linen(module, variables["params"], mesh=ONE)
    with pytest.raises(ValueError, match="from_nnx was given a LinenPolicy: expected an nnx module; from_linen takes linen ones"):
        adapters.from_nnx(module, mesh=ONE)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="from_linen was given a Table: expected a linen module; from_nnx takes nnx ones"):
        adapters.from_linen(Table(rngs=nnx.Rngs(0)), {}, mesh=ONE)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="Empty has no parameters: expected a module with at least one to learn"):
        adapters.from_linen(type("Empty", (linen.Module,), {})(), {"params": {}}, mesh=ONE)

    class Dropping(linen.Module):
        @linen.compact
        def __call__(self, tokens, positions, mask):
            return linen.Dropout(0.5, deterministic=False)(linen.Embed(V, V)(tokens))

    variables = Dropping().init({"params": jax.random.key(0), "dropout": jax.random.key(1)}, *whole(jnp.zeros(4, jnp.int32)))
    with pytest.raises(ValueError, match="Dropping was called with .* and raised InvalidRngError"):
        adapters.from_linen(Dropping(), variables, mesh=ONE)


# ------------------------------------------------------------------------------------------------------------- example


@pytest.mark.slow
def test_the_example_learns(one_device: dict[str, str]) -> None:
    environment = os.environ | one_device | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-W", "error", str(ROOT / "examples" / "bring_your_own_model.py")]
    ended = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
    assert ended.returncode == 0, ended.stderr
    rewards = [float(re.search(r"reward ([0-9.]+)", line)[1]) for line in ended.stdout.splitlines() if "reward" in line]  # pyright: ignore
    assert rewards[0] < 0.3 < 0.8 < rewards[-1]
