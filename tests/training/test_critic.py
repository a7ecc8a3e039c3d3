"""The critic in the loop: values, advantages and returns by hand through the real step; splits, meshes, resuming, refusals."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxreason import config as configs
from jaxreason import objectives, sharding
from jaxreason.models import decoder, heads, huggingface, lora, spec
from jaxreason.models.config import Architecture, Numerics
from jaxreason.models.families import Head
from jaxreason.pipelines import critic as critics
from jaxreason.pipelines import experiment as experiments
from jaxreason.pipelines import run as runs
from jaxreason.training import critic as training
from jaxreason.training import state as states
from jaxreason.training.critic import Critic
from jaxreason.training.metrics import NonFiniteError, RunLog, check_finite
from jaxreason.training.optimizer import make_optimizer
from jaxreason.training.step import Split, make_update

from ..test_quickstart import held_out
from ..test_quickstart import train as train_quickstart
from ..test_resume import Recorder, logged, newest_checkpoint, train
from .test_mesh import ARCHITECTURE, ONE, OPTIMIZER, QUICK, SPARSE, G, P, Shape, T, assert_close, make, rollouts

CONFIG = str(Path(__file__).parents[1] / "short_run.py")
MODELS = Path(__file__).parents[1] / "fixtures" / "models"
PPO = ("--config.algorithm.name=ppo", "--config.algorithm.kwargs={}")
BETA, DISCOUNT, LAMBDA = 0.3, 0.9, 0.8
SGD = optax.sgd(1.0)  # the gradient is what a step takes away


def make_critic(dtype: str, mesh: Any, *, architecture: Architecture = ARCHITECTURE, optimizer: Any = SGD, **more: Any) -> Any:
    """A critic with weights drawn at random, and its first state."""
    model = decoder.make_decoder(architecture, Numerics(dtype, dtype), mesh, head=Head("token", 1))
    rng = np.random.default_rng(5)

    def draw(each: spec.ParamSpec) -> jax.Array:
        return jax.device_put(rng.normal(0.0, 0.3, each.shape).astype(dtype), sharding.named(mesh, each.axes))

    return Critic(model, optimizer, **more), states.create(model, optimizer, mesh, spec.tree_map(draw, model.specs))


# ------------------------------------------------------------------------------------------------ one update, by hand


@cache
def scorer() -> Any:
    model = make_critic("float64", make(ONE, "float64").mesh)[0].model
    return jax.jit(lambda w, t, m: heads.token_scores(model, w, t, m), compiler_options=QUICK)


def plain_values(params: Any, batch: Any) -> np.ndarray:
    """V of the state before each chosen token, each completion in a row of its own without padding in front, 0 elsewhere."""
    found, rows, places = np.zeros(batch.mask.shape), [], []
    for p, g in np.ndindex(P, G):
        row = [*batch.prompt[p][batch.prompt_mask[p]], *batch.completion[p, g][batch.mask[p, g]][:-1]]
        places.append((p, g, len(row)))
        rows.append(row)
    width = max(map(len, rows))
    tokens = np.stack([np.pad(row, (0, width - len(row))) for row in rows]).astype(np.int32)
    mask = np.arange(width)[None] < np.array([length for *_, length in places])[:, None]
    scores = np.asarray(scorer()(params, jnp.asarray(tokens), jnp.asarray(mask)))[..., 0]
    for (p, g, length), row in zip(places, scores, strict=True):
        count = int(batch.mask[p, g].sum())
        found[p, g, :count] = row[length - count : length]
    return found


def gae_by_hand(batch: Any, value: np.ndarray, logp_ref: np.ndarray) -> np.ndarray:
    """The sum of discounted temporal differences, token by token, with the KL to the reference in the reward."""
    advantage = np.zeros(value.shape)
    for p, g in np.ndindex(P, G):
        count = int(batch.mask[p, g].sum())
        reward = -BETA * (batch.logp_behaviour[p, g, :count] - logp_ref[p, g, :count])
        reward[-1] += batch.reward[p, g]
        v = [*value[p, g, :count], 0.0]  # a truncated completion has ended as well
        delta = [reward[t] + DISCOUNT * v[t + 1] - v[t] for t in range(count)]
        for t in range(count):
            advantage[p, g, t] = sum((DISCOUNT * LAMBDA) ** (s - t) * delta[s] for s in range(t, count))
    return advantage


def logp_of_reference(batch: Any) -> np.ndarray:
    """Log-probabilities under the reference, from its logits."""
    _, model, _, reference = make(ONE, "float64")

    def project(params: Any, *rows: jax.Array) -> jax.Array:
        hidden = model.completion_hidden(params, *rows)
        return model.project(params, hidden.reshape(-1, hidden.shape[-1]))

    logits = jax.jit(project, compiler_options=QUICK)(reference, batch.prompt, batch.prompt_mask, batch.completion)
    logits = np.asarray(logits).reshape(P, G, T, -1)
    law = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    return np.take_along_axis(law, batch.completion[..., None], -1)[..., 0]


@cache
def updated(shape: Shape, split: Split) -> Any:
    """The state of policy and critic after all of PPO's updates on one batch of rollouts, metrics, advantages; in float64."""
    mesh, model, params, reference = make(shape, "float64")
    critic, own = make_critic("float64", mesh, optimizer=optax.sgd(0.1), clip=0.02)
    algorithm = objectives.ppo(beta=BETA, discount=DISCOUNT, lambda_=LAMBDA)
    update = make_update(model, algorithm, critic.optimizer, split=split, critic=critic)
    state = replace(states.create(model, critic.optimizer, mesh, params), algorithm=own)
    return sharding.fetch(jax.jit(update, compiler_options=QUICK)(state, reference, rollouts(mesh, "float64")))


def test_values_advantages_and_returns_are_those_by_hand() -> None:
    """A step of PPO in two micro-batches."""
    with jax.enable_x64(True):
        _, metrics, advantage = updated(ONE, Split(8, 4))
        mesh = make(ONE, "float64").mesh
        batch = sharding.fetch(rollouts(mesh, "float64"))
        value = plain_values(make_critic("float64", mesh)[1].params, batch)
        expected = gae_by_hand(batch, value, logp_of_reference(batch))
    np.testing.assert_allclose(advantage, expected[:, :, 0], rtol=1e-9)
    chosen, returns = batch.mask, expected + value
    assert metrics["value/mean"] == pytest.approx(value[chosen].mean(), rel=1e-9)
    assert metrics["value/loss"] == pytest.approx(np.mean((returns - value)[chosen] ** 2) / 2, rel=1e-9)
    explained = 1 - np.var((returns - value)[chosen]) / np.var(returns[chosen])
    assert metrics["value/explained_variance"] == pytest.approx(explained, rel=1e-9) and explained < 1
    assert metrics["value/clip_fraction"] == 0
    assert batch.truncated.any() and not batch.truncated.all()


def test_the_critics_gradient_is_the_slope_of_its_clipped_loss() -> None:
    """Where values have moved since the update's start: central differences along random directions, in float64."""
    clip, rng = 0.1, np.random.default_rng(0)
    with jax.enable_x64(True):
        mesh = make(ONE, "float64").mesh
        critic, state = make_critic("float64", mesh, clip=clip)
        given = rollouts(mesh, "float64")
        batch, chosen = sharding.fetch(given), np.asarray(given.mask)
        now = plain_values(state.params, batch)
        old, returns = (np.where(chosen, now + rng.normal(0, 0.2, now.shape), 0.0) for _ in range(2))

        def loss(params: Any) -> tuple[float, np.ndarray]:
            value = plain_values(params, batch)
            plain, near = (value - returns) ** 2, (np.clip(value, old - clip, old + clip) - returns) ** 2
            return float(np.mean(np.maximum(plain, near)[chosen]) / 2), (near > plain)[chosen]

        arrays = jnp.asarray(returns), objectives.token_mean(given.mask)
        run = jax.jit(lambda s, b, *x: training.learn(critic, s, b, *x, count=1), compiler_options=QUICK)
        after, metrics = run(state, replace(given, value=jnp.asarray(old)), *arrays)
        expected, dropped = loss(state.params)
        assert metrics["value/loss"] == pytest.approx(expected, rel=1e-9)
        assert 0.1 < dropped.mean() < 0.9 and metrics["value/clip_fraction"] == pytest.approx(dropped.mean())
        gradient, width = jax.tree.map(lambda a, b: a - b, state.params, after.params), 1e-7  # no token crosses its clip
        assert metrics["value/gradient_norm"] == pytest.approx(float(optax.tree.norm(gradient)), rel=1e-6)
        for _ in range(3):
            way = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape)), state.params)
            high, low = (loss(jax.tree.map(lambda x, d, e=e: x + e * d, state.params, way))[0] for e in (width, -width))
            slope = sum(float(jnp.vdot(a, b)) for a, b in zip(jax.tree.leaves(gradient), jax.tree.leaves(way), strict=True))
            assert slope == pytest.approx((high - low) / (2 * width), rel=1e-5)


@pytest.mark.parametrize(
    ("shape", "split"),
    [
        ((2, 2, 2), Split(8, 8)),
        pytest.param(ONE, Split(8, 2, 2), marks=pytest.mark.slow),
        pytest.param((1, 2, 2), Split(4, 2, 2), marks=pytest.mark.slow),
        pytest.param((8, 1, 1), Split(8, 8, 2), marks=pytest.mark.slow),
    ],
)
def test_microbatches_and_meshes_change_nothing(shape: Shape, split: Split) -> None:
    """Policy and critic in micro-batches on a mesh = in others on one device; with two epochs the clip bites."""
    with jax.enable_x64(True):
        expected = updated(ONE, Split(split.problems_per_update, 4, split.epochs))
        given = updated(shape, split)
    assert expected[0].algorithm.step == split.epochs * P // split.problems_per_update
    assert expected[1]["value/gradient_norm"] > 0.01 and (expected[1]["value/clip_fraction"] > 0.01) == (split.epochs > 1)
    assert_close(given, expected, tolerance=1e-9)


@pytest.mark.slow
def test_a_critic_with_experts_keeps_them_balanced() -> None:
    """The load-balance loss is in the critic's gradient, and not in the loss that is reported."""
    with jax.enable_x64(True):
        mesh = make(ONE, "float64").mesh
        critic, state = make_critic("float64", mesh, architecture=SPARSE)
        heavy = critic._replace(model=critic.model._replace(balance_weight=0.5))
        batch = rollouts(mesh, "float64")
        batch = replace(batch, value=jnp.zeros(batch.mask.shape))
        returns = jnp.where(batch.mask, jnp.asarray(np.random.default_rng(0).normal(size=batch.mask.shape)), 0.0)

        def learnt(critic: Critic) -> Any:
            run = jax.jit(lambda s, b, *x: training.learn(critic, s, b, *x, count=1), compiler_options=QUICK)
            return run(state, batch, returns, objectives.token_mean(batch.mask))

        (plain, told), (balanced, told_too) = learnt(critic), learnt(heavy)
        given = (batch.prompt, batch.prompt_mask, batch.completion, batch.mask)
        slope = jax.jit(jax.grad(lambda w: heads.values(critic.model, w, *given)[1]), compiler_options=QUICK)(state.params)
        assert max(float(jnp.abs(x).max()) for x in jax.tree.leaves(slope)) > 1e-6
        assert_close(balanced.params, jax.tree.map(lambda a, b: a - 0.5 * b, plain.params, slope), tolerance=1e-9)
    assert told["value/loss"] == pytest.approx(float(told_too["value/loss"]), rel=1e-12)
    assert told["value/gradient_norm"] != told_too["value/gradient_norm"]


@pytest.mark.slow
def test_the_policy_waits_while_the_critic_is_alone() -> None:
    """Of three updates on one batch the critic makes the first two alone; the policy's schedule has not begun by then."""
    mesh, model, params, reference = make(ONE, "float32")
    optimizer = make_optimizer(OPTIMIZER, steps=4)
    critic, own = make_critic("float32", mesh, optimizer=make_optimizer(OPTIMIZER, steps=4), alone_updates=2)
    update = make_update(model, objectives.vapo(), optimizer, split=Split(P, P), critic=critic)
    run, batch = jax.jit(update, compiler_options=QUICK), rollouts(mesh, "float32")
    trail = [replace(states.create(model, optimizer, mesh, params), algorithm=own)]
    moved = []
    for _ in range(3):
        state, metrics, _ = run(trail[-1], reference, batch)
        trail.append(state)
        moved.append(float(metrics["optimizer/update_norm"]))
    assert [int(state.step) for state in trail] == [0, 0, 0, 1] and [int(s.algorithm.step) for s in trail] == [0, 1, 2, 3]
    assert moved[:2] == [0, 0] and moved[2] > 0
    first, third = ([np.asarray(x).tobytes() for x in jax.tree.leaves((s.params, s.opt_state))] for s in (trail[0], trail[2]))
    assert first == third
    heads_seen = [np.asarray(state.algorithm.params["head"]).tobytes() for state in trail]
    assert len(set(heads_seen)) == 4


def test_explained_variance() -> None:
    returns = np.array([0.0, 1.0, 0.0, 1.0], np.float32)
    cases = [  # (values, returns, what they explain)
        (returns, returns, 1),
        (returns + 3, returns, 1),  # what is off by a constant explains the variance too
        (0 * returns + 0.5, returns, 0),
        (1 - returns, returns, -3),
        (returns, 0 * returns + 0.7 + np.array([0, 1e-7, -1e-7, 0], np.float32), 0),  # returns equal but for rounding
    ]
    value, target, expected = (np.stack(each) for each in zip(*cases, strict=True))
    wide = (x[:, None, None] for x in (value, target, np.full(value.shape, 0.25, np.float32)))
    found = jax.jit(jax.vmap(training.explained_variance))(*wide)
    np.testing.assert_allclose(found, expected, atol=1e-6)


# ------------------------------------------------------------------------------------------------ runs


@pytest.mark.slow
@pytest.mark.usefixtures("compiled_once")
def test_a_run_stopped_midway_is_the_undisturbed_one(tmp_path: Path) -> None:
    """4 steps = 2 + 2, bit for bit: the first step is the critic's alone, and the critic is in the checkpoint."""
    options = [*PPO, "--config.critic.learning_rate=1e-3", "--config.critic.alone_steps=1"]
    options += ["--config.online.steps=4", "--config.evaluation.every_steps=0", "--config.sampling.max_completion_tokens=8"]
    options += ["--config.reward.accuracy.rule=traced.think_answer_format"]
    e = build(tmp_path, *options)

    def reinforce(name: str) -> Any:
        return runs._online(
            e,
            experiments.initial_params(e),
            tmp_path / name,
            stream=experiments.training_stream(e)[0],
            overlong=experiments.Overlong(),
            evaluate=lambda params: ({}, []),
            log=RunLog(tmp_path / name),
            progress=Recorder(),
            stop=lambda: False,
        )

    undisturbed = reinforce("undisturbed")
    # as a run that was killed in its third step
    shutil.copytree(tmp_path / "undisturbed", tmp_path / "stopped")
    for newest in (tmp_path / "stopped" / "checkpoints" / "reinforce").glob("4*"):
        shutil.rmtree(newest) if newest.is_dir() else newest.unlink()
    step, arrays = newest_checkpoint(tmp_path / "stopped" / "checkpoints" / "reinforce")
    assert step == 2 and any("algorithm" in name and "head" in name for name in arrays)
    resumed = reinforce("stopped")
    ours, theirs = ([np.asarray(x).tobytes() for x in jax.tree.leaves(each.state)] for each in (resumed, undisturbed))
    assert resumed.finished and ours == theirs
    rows = logged(tmp_path / "stopped")
    assert rows == logged(tmp_path / "undisturbed")
    assert [line["optimizer/update_norm"] > 0 for line in rows] == [False, True, True, True]
    assert rows[-1]["value/gradient_norm"] > 1e-4 and int(resumed.state.algorithm.step) == 4 and int(resumed.state.step) == 3


@pytest.mark.slow
@pytest.mark.usefixtures("compiled_once")
def test_a_run_with_adapters_and_a_rule_on_the_host(tmp_path: Path) -> None:
    """The staged step and LoRA: the critic is all weights, and its body the policy's with adapters merged."""
    options = [
        *PPO,
        "--config.model.lora.rank=2",
        "--config.reward.accuracy.rule=arithmetic.integer_answer",
        "--config.online.steps=2",
    ]
    config = configs.load(CONFIG, options)
    assert train(config, tmp_path)[0].finished
    losses = [line["value/loss"] for line in logged(tmp_path) if "value/loss" in line]
    assert len(losses) == 2 and np.isfinite(losses).all()
    _, where = runs.latest_params(build(tmp_path, *options), tmp_path)
    assert where == "stage 'reinforce', step 2"


@pytest.mark.slow
def test_ppo_learns_the_quickstart(tmp_path: Path) -> None:
    """As GRPO does there, from the same start; and the critic comes to know which completions succeed."""
    summary = train_quickstart(tmp_path / "run", *PPO, "--config.critic.learning_rate=1e-3")
    assert held_out(summary, "before", "pass@1") <= 0.25
    assert held_out(summary, "after", "pass@1") >= 0.80
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    explained = [line["value/explained_variance"] for line in lines if "value/explained_variance" in line]
    # between knowing nothing and there being next to nothing left to explain
    assert len(explained) == 50 and abs(explained[0]) < 0.05 and np.convolve(explained, np.full(5, 0.2), "valid").max() > 0.1


# ------------------------------------------------------------------------------------------------ from a config


def build(workdir: Path, *options: str) -> experiments.Experiment:
    return experiments.build(configs.load(CONFIG, options), workdir, devices=jax.devices()[:1])


def test_a_critic_starts_as_the_policy_with_a_head_of_zeros(tmp_path: Path) -> None:
    """With LoRA too: as its weights with adapters merged, all of them its own."""
    e = build(tmp_path, *PPO, "--config.model.lora.rank=2", "--config.model.lora.targets=q")
    assert e.critic is not None
    rng = np.random.default_rng(0)
    adapters = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), x.dtype), experiments.initial_adapters(e))
    policy = lora.adapt(experiments.initial_params(e), adapters)
    state = critics.initial_state(e.config, e.critic, policy, e.mesh)
    merged, own = lora.merge(policy), state.params
    assert jax.tree.structure(own) == jax.tree.structure(e.critic.model.specs, is_leaf=spec.is_spec)
    np.testing.assert_array_equal(own["layers"]["q"], merged["layers"]["q"])
    assert np.any(np.asarray(merged["layers"]["q"]) != np.asarray(policy["layers"]["q"].weight))
    assert not np.any(own["head"]) and not np.any(own["head_bias"])
    # what a checkpoint is restored into is this state's form
    expected = states.abstract(e.critic.model, e.critic.optimizer, e.mesh)
    assert jax.tree.structure(state) == jax.tree.structure(expected)
    for x, form in zip(jax.tree.leaves(state), jax.tree.leaves(expected), strict=True):
        assert (x.shape, x.dtype) == (form.shape, form.dtype) and x.sharding.is_equivalent_to(form.sharding, x.ndim)
    assert (
        own["embed"].unsafe_buffer_pointer() != policy["embed"].unsafe_buffer_pointer()
    )  # the state is donated, the policy is not


def test_a_critic_starts_as_a_reward_model(tmp_path: Path) -> None:
    e = build(tmp_path, *PPO, f"--config.critic.path={MODELS / 'qwen2_reward'}")
    assert e.critic is not None
    state = critics.initial_state(e.config, e.critic, experiments.initial_params(e), e.mesh)
    head, architecture = (f(MODELS / "qwen2_reward") for f in (huggingface.read_head, huggingface.read_architecture))
    model = decoder.make_decoder(architecture, Numerics(), e.mesh, head=head)
    params = huggingface.load_params(model.specs, MODELS / "qwen2_reward", dtype="float32", mesh=e.mesh)
    tokens = np.random.default_rng(0).integers(3, 60, (2, 7)).astype(np.int32)
    prompt, completion = jnp.asarray(tokens[:, :4]), jnp.asarray(tokens[:, None, 4:])
    ours = jax.jit(partial(heads.values, e.critic.model), compiler_options=QUICK)
    value, _ = ours(state.params, prompt, jnp.ones(prompt.shape, bool), completion)
    # a reward model scores the state behind a row: here that before the last token
    theirs = jax.jit(partial(heads.sequence_scores, model), compiler_options=QUICK)
    score = theirs(params, jnp.asarray(tokens[:, :6]), jnp.ones((2, 6), bool))
    np.testing.assert_allclose(value[:, 0, -1], score[:, 0], rtol=1e-5)


REFUSED = {
    "unread clip": (["--config.critic.clip=0.5"], "config.critic.clip is 0.5, and algorithm 'grpo' has no critic: leave it at 0.2"),
    "unread rate": (["--config.critic.learning_rate=1.0"], "config.critic.learning_rate is 1.0, and algorithm"),
    "alone": ([*PPO, "--config.critic.alone_steps=6"], "the policy would never learn: expected at most 5"),
    "below": ([*PPO, "--config.critic.alone_steps=-1"], "config.critic.alone_steps is -1: expected 0 or more"),
    "rate": ([*PPO, "--config.critic.learning_rate=-1.0"], "config.critic.learning_rate is -1.0: expected 0 or more"),
    "parked": ([*PPO, "--config.sampling.parking.step_tokens=8"], "algorithm 'ppo' has a critic, beside which nothing is parked"),
    "logits": ([*PPO, f"--config.critic.path={MODELS / 'qwen3'}"], "which ends in logits, and a value is one number"),
    "labels": ([*PPO, f"--config.critic.path={MODELS / 'qwen2_prm'}"], "which ends in 2 scores, and a value is one number"),
    "no folder": ([*PPO, "--config.critic.path=nowhere/at/all"], "nowhere/at/all"),
    "context": (
        [*PPO, f"--config.critic.path={MODELS / 'qwen2_reward'}", "--config.sampling.max_completion_tokens=128"],
        "the critic's context holds 128",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_settings_that_cannot_hold_are_told_before_anything_runs(name: str, tmp_path: Path) -> None:
    options, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        build(tmp_path, *options)


def test_a_critic_with_another_vocabulary_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "reward"
    folder.mkdir()
    e = build(tmp_path / "run")
    for file in (MODELS / "qwen2_reward").iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    e.tokenizer.save(folder)
    assert build(tmp_path / "run", *PPO, f"--config.critic.path={folder}").critic is not None
    tokenizer = folder / "tokenizer.json"
    tokenizer.write_text(tokenizer.read_text().replace('"Sam"', '"Tim"'))
    with pytest.raises(ValueError, match="another vocabulary than the policy"):
        build(tmp_path / "run", *PPO, f"--config.critic.path={folder}")


def test_an_update_has_a_critic_just_where_its_algorithm_needs_one() -> None:
    mesh, model, _, _ = make(ONE, "float32")
    critic, _ = make_critic("float32", mesh)
    with pytest.raises(ValueError, match="'ppo' needs values, and no critic is given"):
        make_update(model, objectives.ppo(), SGD, split=Split(P, P))
    with pytest.raises(ValueError, match="'grpo' has no returns for it to learn"):
        make_update(model, objectives.grpo(), SGD, split=Split(P, P), critic=critic)


def test_a_broken_critic_is_named_before_what_it_broke() -> None:
    with pytest.raises(NonFiniteError, match="value/mean is nan at step 3"):
        check_finite("reinforce", 3, dict.fromkeys(("policy/loss", "value/loss", "value/mean", "optimizer/gradient_norm"), np.nan))
