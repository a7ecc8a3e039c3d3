"""Partial rollouts: a completion that was parked is the one that was not, and nobody learns from half a group."""

from __future__ import annotations

import dataclasses
import json
import shutil
from functools import cache
from functools import partial as partial_of
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh

from jaxreason import config as configs
from jaxreason import objectives, sharding
from jaxreason.batch import PromptBatch
from jaxreason.models import spec
from jaxreason.pipelines import experiment
from jaxreason.sampling import engine, parking, stops
from jaxreason.sampling.engine import Rules
from jaxreason.sampling.law import Law
from jaxreason.sampling.rollout import ParkingConfig, SamplingConfig, completion_keys
from jaxreason.training import online, partial
from jaxreason.training import state as states
from jaxreason.training.collect import Scoring, total_reward
from jaxreason.training.optimizer import OptimizerConfig, make_optimizer
from jaxreason.training.step import Split, make_update, score, slices

from .test_mesh import ARCHITECTURE, ONE, QUICK, SPARSE, TP, Made, Shape, assert_close, even_share, make, parts, rollouts

V, P, G, T, STOPS = ARCHITECTURE.vocab_size, 8, 4, 10, (0, 1, 2, 3, 4, 5)
CACHES = ("recomputed", "kept")


def problem(number: int) -> tuple[np.ndarray, np.ndarray]:
    """The prompt of the stream's problem, padded on the left."""
    rng = np.random.default_rng(number)
    mask = np.arange(TP) >= rng.integers(0, TP - 1)
    return np.where(mask, rng.integers(0, V, TP), 0).astype(np.int32), mask


def prompts(mesh: Mesh, numbers: list[int]) -> PromptBatch:
    tokens, mask = (np.stack(each) for each in zip(*map(problem, numbers), strict=True))
    batch = PromptBatch(tokens, mask, np.asarray(numbers, np.uint32), np.zeros(len(numbers), np.int32))  # pyright: ignore[reportArgumentType]
    return sharding.place(mesh, batch, ("problems",))


# ------------------------------------------------------------------------------------------------------ the tokens themselves


@pytest.mark.parametrize("kind", CACHES)
def test_tokens_do_not_depend_on_where_they_were_parked(kind: str) -> None:
    """Under one policy, with a law that remembers tokens and with stop strings, in steps of 3 and of 7 and in one piece."""
    mesh, model, params, _ = make(ONE, "float32")
    tokens, problems, group = 45, 2, 6  # more than one piece is read again
    vocabulary = [b"abcab"[token % 3 : token % 3 + 2] for token in range(V)]
    search = stops.stop_machine(vocabulary, stops=["bcabcabc"], steps=["cc"])
    rules = Rules(Law(temperature=0.9, repetition_penalty=1.2), (0,), 0, search=search)
    batch = prompts(mesh, [3, 4])
    key = completion_keys(jax.random.key(5), batch.problem, group=group)
    whole = jax.jit(lambda: _in_one_piece(model, params, batch, key, tokens, rules))()
    assert len(set(np.asarray(whole.status).tolist())) == 3  # by a stop token, by a stop string, by their length
    assert np.any(np.asarray(whole.step_end))
    layout = parking.layout(
        model,
        params,
        mesh,
        problems=problems,
        group=group,
        prompt_tokens=TP,
        tokens=tokens,
        rules=rules,
        kept=kind == "kept",
    )
    for step_tokens in (3, 7):
        parked = parking.vacant(layout)
        grow = jax.jit(
            lambda parked, n, m=step_tokens: parking.grow(model, params, batch, parked, n, key, rules=rules, step_tokens=m)
        )
        for number in range(-(-tokens // step_tokens)):
            assert not np.asarray(parking.finished(parked)).any() or number == 0
            parked = grow(parked, jnp.int32(number))
            length = np.asarray(parked.record.length)
            over = np.asarray(whole.length) > step_tokens * (number + 1)
            np.testing.assert_array_equal(length, np.minimum(np.asarray(whole.length), step_tokens * (number + 1)))
            np.testing.assert_array_equal(np.asarray(parked.record.status) == engine.PARKED, over)
            if np.asarray(parking.finished(parked)).any():
                break
        done = np.repeat(np.asarray(parking.finished(parked)), group)
        assert done.any()
        for name in ("tokens", "mask", "status", "step_end", "after", "logp"):
            given, expected = np.asarray(getattr(parked.record, name))[done], np.asarray(getattr(whole, name))[done]
            if name == "logp" and kind == "recomputed":  # keys and values of several tokens at once: other products
                np.testing.assert_allclose(given, expected, rtol=1e-4, atol=1e-5)
            else:
                np.testing.assert_array_equal(given, expected, err_msg=name)
        policy = np.asarray(parked.policy)[done]
        place = np.arange(tokens)[None]
        np.testing.assert_array_equal(policy, np.where(place < np.asarray(whole.length)[done][:, None], place // step_tokens, 0))


def _in_one_piece(model: Any, params: Any, batch: PromptBatch, key: jax.Array, tokens: int, rules: Rules) -> Any:
    ready = model.prepare_sampling(params)
    roots = engine.open(model, ready, batch.prompt, batch.prompt_mask, rules=rules)
    root = jnp.repeat(jnp.arange(key.shape[0], dtype=jnp.int32), key.shape[1])
    slots = engine.seat(model, roots, root, key.reshape(-1), tokens=tokens, rules=rules)
    limit = jnp.full(root.shape, tokens, jnp.int32)
    return engine.extend(model, ready, roots, slots, rules=rules, limit=limit, width=0).record


# ----------------------------------------------------------------------------------------------------------- the whole loop


class Step(NamedTuple):
    """What a step left behind."""

    numbers: list[int]
    before: Any  # weights that sampled
    state: Any  # with what is parked
    metrics: dict[str, float]
    shown: Any


def laid_out(made: Made, kind: str, step_tokens: int) -> Any:
    abstract = spec.abstract(made.model.specs, dtype="float32", mesh=made.mesh)
    sampling = SamplingConfig(TP, T, parking=ParkingConfig(step_tokens, kind))
    seats = {"config": sampling, "problems": P, "group": G, "eos_ids": STOPS, "pad_id": 0}
    return partial.layout(made.model, abstract, made.mesh, **seats)


@cache
def looped(kind: str, step_tokens: int, *, shape: Shape = ONE) -> tuple[Made, list[Step]]:
    """Steps of the loop in its fused form, from the same weights; `kind` is how what is parked keeps its past."""
    made, steps = make(shape, "float32"), 5
    mesh, model, params, reference = made
    optimizer = make_optimizer(OptimizerConfig(learning_rate=3e-2, warmup_steps=0), steps=steps)
    config = online.OnlineConfig(
        steps=steps, problems_per_step=P, problems_per_update=P, problems_per_microbatch=P // 2, completions_per_problem=G
    )
    sampling = SamplingConfig(TP, T, parking=ParkingConfig(step_tokens, kind))
    parked = laid_out(made, kind, step_tokens)
    assert parked == {} or step_tokens
    step = online.make_step(
        model,
        objectives.grpo(beta=0.04),
        optimizer,
        Scoring({"even": even_share}, {}, {"even": 1.0}, frozenset()),
        mesh,
        config=config,
        sampling=sampling,
        eos_ids=STOPS,
        pad_id=0,
        seed=3,
        parked=parked,
    )
    state = states.create(model, optimizer, mesh, params)
    state = dataclasses.replace(state, algorithm=parking.vacant(parked)) if parked else state
    where, trail, fused = partial.seats_of({}, problems=P), [], None
    for number in range(steps):
        where = partial.seated(where)
        numbers, before = [each for each in where.numbers if each is not None], sharding.fetch(state.params)
        args = (state, reference, prompts(mesh, numbers), sharding.place(mesh, np.asarray(number, np.int32), ()))
        fused = fused or step.fused.lower(*args).compile()  # pyright: ignore
        state, metrics, shown = fused(*args)
        shown = sharding.fetch(shown)
        where = partial.left(where, shown.done.tolist() if parked else [True] * P)
        kept = jax.tree.map(jnp.copy, state)  # the next step overwrites it
        trail.append(Step(numbers, before, kept, {k: float(v) for k, v in metrics.items()}, shown))
    return made, trail


@pytest.mark.parametrize("kind", ["recomputed", "kept"])
@pytest.mark.slow
def test_with_the_whole_budget_in_a_step_it_is_the_run_without(kind: str) -> None:
    """Bit for bit: weights, moments, metrics, what is shown."""
    (_, without), (_, whole) = looped("recomputed", 0), looped(kind, T)
    for a, b in zip(without, whole, strict=True):
        assert a.state.algorithm == {} and a.numbers == b.numbers
        jax.tree.map(np.testing.assert_array_equal, a.state, b.state.replace(algorithm={}))
        assert a.metrics == {name: b.metrics[name] for name in a.metrics}
        assert (b.metrics["rollout/finished"], b.metrics["rollout/segments"], b.metrics["rollout/staleness"]) == (1, 1, 0)
        jax.tree.map(np.testing.assert_array_equal, a.shown, b.shown._replace(done=None, seat=None))
    assert without[-1].metrics["optimizer/gradient_norm"] > 0.01


@pytest.mark.parametrize("kind", ["recomputed", pytest.param("kept", marks=pytest.mark.slow)])
def test_each_token_has_the_log_probability_of_the_policy_that_chose_it(kind: str) -> None:
    (mesh, model, *_), trail = looped(kind, 4)
    batch = rollouts(mesh, "float32")
    logp = jax.jit(lambda params, batch: score(model, params, batch, temperature=1.0).logp)
    turns = set()
    for number, step in enumerate(trail):
        parked = sharding.fetch(step.state.algorithm)
        given = jax.tree.map(lambda x: x.reshape(P, G, *x.shape[1:]), (parked.record, parked.policy))
        record, policy = given
        rows = dataclasses.replace(batch, completion=record.tokens, mask=record.mask, **_prompt(mesh, step.numbers))
        assert record.mask.sum() > 0
        for earlier in range(number + 1):
            # kept keys and values are those of older policies from a completion's second step on
            own = record.mask & (policy == earlier)
            own = own & (parked.began == earlier)[:, None, None] if kind == "kept" else own
            expected = np.asarray(logp(trail[earlier].before, rows))
            np.testing.assert_allclose(record.logp[own], expected[own], atol=2e-4)
            turns.add((number - earlier, bool(own.any())))
        stale = record.mask & (policy < number)
        if stale.any() and number > 1:
            assert np.abs(record.logp - np.asarray(logp(step.before, rows)))[stale].max() > 1e-2
        assert step.metrics["policy/sampler_gap"] < 2e-4
    assert {(0, True), (1, True)} <= turns
    assert max(step.metrics["rollout/staleness"] for step in trail) > 0.2


def _prompt(mesh: Mesh, numbers: list[int]) -> dict[str, Any]:
    batch = prompts(mesh, numbers)
    return {"prompt": batch.prompt, "prompt_mask": batch.prompt_mask}


def test_metrics_are_means_over_the_groups_that_ended() -> None:
    """By NumPy from what lies in the seats; seats are taken in order; and no token is lost or counted twice."""
    _, trail = looped("recomputed", 4)
    seats: list[int | None] = [None] * P
    position, sampled, left, shares, waiting = 0, 0, 0, [], 0
    for number, step in enumerate(trail):
        for i, seat in enumerate(seats):
            if seat is None:
                seats[i], position = position, position + 1
        assert step.numbers == seats
        parked = sharding.fetch(step.state.algorithm)
        record, policy = jax.tree.map(lambda x: x.reshape(P, G, *x.shape[1:]), (parked.record, parked.policy))
        done = np.asarray(np.isin(record.status, (engine.EOS, engine.LENGTH)).all(1))
        np.testing.assert_array_equal(step.shown.done, done)
        assert np.all((record.status == engine.PARKED) <= (record.length % 4 == 0))
        assert np.all((record.length == T) | (record.status != engine.LENGTH))
        even = np.mean((record.tokens % 2 == 0) & record.mask, axis=-1)[done]
        expected = {
            "reward/total": even.mean() if done.any() else 0,
            "reward/zero_variance": np.mean(even.max(1) == even.min(1)) if done.any() else 0,
            "rollout/length": record.length[done].mean() if done.any() else 0,
            "rollout/truncated": np.mean(record.status[done] == engine.LENGTH) if done.any() else 0,
            "rollout/parked": np.mean(record.status == engine.PARKED),
            "rollout/finished": done.mean(),
            "rollout/tokens": np.sum(record.mask & (policy == number)),
        }
        if done.any():
            several = [len(set(policy[p, g, : record.length[p, g]])) for p in np.flatnonzero(done) for g in range(G)]
            expected["rollout/segments"] = np.mean(several)
            expected["rollout/staleness"] = np.mean((number - policy)[record.mask & done[:, None, None]])
        for name, value in expected.items():
            assert step.metrics[name] == pytest.approx(value, rel=1e-5), name
        order = [*np.flatnonzero(done), *np.flatnonzero(~done)]
        np.testing.assert_array_equal(step.shown.seat, order[: len(step.shown.seat)])
        np.testing.assert_array_equal(step.shown.completion[: done.sum()], record.tokens[done])
        seats = [None if gone else seat for seat, gone in zip(seats, done, strict=True)]
        sampled += step.metrics["rollout/tokens"]
        left += record.length[done].sum()
        waiting = record.length[~done].sum()
        shares.append(done.mean())
    assert sampled == left + waiting
    assert any(0 < share < 1 for share in shares) and position > P


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["recomputed", "kept"])
def test_on_a_mesh_it_is_the_same(kind: str) -> None:
    (_, one), (_, eight) = looped(kind, 4), looped(kind, 4, shape=(2, 2, 2))
    for a, b in zip(one, eight, strict=True):
        assert a.numbers == b.numbers
        np.testing.assert_array_equal(a.shown.completion, b.shown.completion)
        record, given = sharding.fetch(a.state.algorithm.record), sharding.fetch(b.state.algorithm.record)
        np.testing.assert_array_equal(record.tokens, given.tokens)
        assert_close(given.logp, record.logp, tolerance=1e-3)
        for name in ("policy/loss", "reward/total", "rollout/segments", "rollout/staleness", "optimizer/gradient_norm"):
            assert b.metrics[name] == pytest.approx(a.metrics[name], rel=2e-3, abs=1e-5), name
    wanted = {name: x.sharding for name, x in jax.tree.leaves_with_path(laid_out(make((2, 2, 2), "float32"), kind, 4))}
    for name, x in jax.tree.leaves_with_path(eight[-1].state.algorithm):
        assert x.sharding.is_equivalent_to(wanted[name], x.ndim), name


def test_what_is_parked_lies_with_its_problems() -> None:
    parked = parking.vacant(laid_out(make((2, 2, 2), "float32"), "kept", 4))
    assert np.asarray(parking.finished(parked)).all()
    assert parts(parked.record.tokens) == {(P * G // 4, T)} and parts(parked.began) == {(P // 4,)}
    assert parts(jnp.asarray(parked.hidden)) == {(P * G // 4, ARCHITECTURE.hidden_size)}
    # problems over 4 devices, heads over 2
    assert {shape for x in jax.tree.leaves(parked.own) for shape in parts(x)} == {
        (P * G // 4, 1, 1, ARCHITECTURE.head_size, T),
        (P * G // 4, 1, 1, T, ARCHITECTURE.head_size),
    }


# -------------------------------------------------------------------------------------------------------------- the update


@pytest.mark.slow
@pytest.mark.parametrize("name", ["lite_ppo", "grpo", "dapo", "kimi_k15", "decoupled_ppo"])
def test_a_completion_counts_the_same_however_few_groups_end(name: str) -> None:
    """An update from 4 groups of 8 = half the update from those 4 alone, whatever lies in the others."""
    mesh, model, params, reference = make(ONE, "float32")
    algorithm, optimizer = getattr(objectives, name)(), optax.sgd(1.0)
    done = np.arange(P) % 2 == 1
    batch = rollouts(mesh, "float32")
    some = jax.tree.map(lambda x: x[done], batch)

    def moved(batch: Any, *, per_update: int, per_micro: int) -> Any:
        update = make_update(model, algorithm, optimizer, temperature=0.9, split=Split(per_update, per_micro))
        state = states.create(model, optimizer, mesh, params)
        after, metrics, _ = jax.jit(update)(state, reference, batch)
        return jax.tree.map(lambda a, b: np.asarray(a - b), after.params, params), metrics

    def among(garbage: int) -> Any:
        rng = np.random.default_rng(garbage)
        keep = done[:, None, None]
        return dataclasses.replace(
            batch,
            completion=jnp.where(keep, batch.completion, rng.integers(0, V, batch.completion.shape).astype(np.int32)),
            mask=batch.mask & keep,
            truncated=batch.truncated | (rng.random(batch.truncated.shape) < 0.5),
            logp_behaviour=jnp.where(keep, batch.logp_behaviour, np.float32(rng.normal())),
            reward=jnp.where(done[:, None], jnp.asarray(batch.reward), 0.0),
            fresh=jnp.asarray(rng.random(batch.mask.shape) < 0.5) | True,
        )

    alone, told = moved(some, per_update=4, per_micro=4)
    given, metrics = moved(among(1), per_update=P, per_micro=2)
    for (path, a), b in zip(jax.tree.leaves_with_path(given), jax.tree.leaves(alone), strict=True):
        np.testing.assert_allclose(2 * a, b, atol=2e-5 * max(1.0, np.abs(b).max()), err_msg=jax.tree_util.keystr(path))
    assert max(np.abs(x).max() for x in jax.tree.leaves(alone)) > 1e-2
    for key, value in told.items():  # means over the rows that are there; the loss and the gradient over all
        scale = 2 if key in ("policy/loss", "optimizer/gradient_norm", "optimizer/update_norm") else 1
        assert float(metrics[key]) * scale == pytest.approx(float(value), rel=1e-3, abs=1e-5), key
    again, _ = moved(among(2), per_update=P, per_micro=2)
    jax.tree.map(np.testing.assert_array_equal, again, given)


@pytest.mark.slow
def test_with_experts_nothing_of_a_group_that_did_not_end_counts() -> None:
    """Neither do its prompts in the load-balance loss: whatever they are, the update is the same, and theirs matters else."""
    made = make(ONE, "float32", SPARSE)
    model, optimizer = made.model._replace(balance_weight=0.5), optax.sgd(1.0)
    done = np.arange(P) % 2 == 1
    batch = rollouts(made.mesh, "float32")
    empty = dataclasses.replace(batch, mask=batch.mask & done[:, None, None], reward=jnp.where(done[:, None], batch.reward, 0.0))
    parked = parking.vacant(laid_out(made, "recomputed", T))
    status = jnp.where(jnp.repeat(jnp.asarray(done), G), engine.EOS, engine.LIVE).astype(parked.record.status.dtype)
    parked = dataclasses.replace(parked, record=dataclasses.replace(parked.record, status=status))
    update = make_update(model, objectives.grpo(beta=0.0), optimizer, temperature=0.9, split=Split(P, P))

    @partial_of(jax.jit, static_argnames="balanced", compiler_options=QUICK)
    def moved(batch: Any, balanced: bool) -> Any:
        state = states.create(model, optimizer, made.mesh, made.params)
        batch = partial.to_learn_from(batch, parked, jnp.int32(0), balanced=balanced)
        return update(state, None, batch)[0].params

    other = dataclasses.replace(empty, prompt=jnp.where(jnp.asarray(done)[:, None], empty.prompt, (empty.prompt + 7) % V))

    def apart(balanced: bool) -> float:
        return max(float(jnp.max(jnp.abs(a - b))) for a, b in zip(*map(leaves, [balanced] * 2, [empty, other]), strict=True))

    def leaves(balanced: bool, batch: Any) -> list[Any]:
        return jax.tree.leaves(moved(batch, balanced))

    assert apart(True) < 1e-6 < 1e-3 < apart(False)  # were the prompts counted, they would tell


@pytest.mark.slow
def test_a_step_in_which_no_group_ends_moves_nothing() -> None:
    """Neither decay nor momentum, nor the schedule; and all that is logged is a number."""
    mesh, model, params, reference = make(ONE, "float32")
    optimizer = make_optimizer(OptimizerConfig(learning_rate=1e-2, warmup_steps=0, weight_decay=0.1), steps=4)
    update = jax.jit(make_update(model, objectives.grpo(beta=0.04), optimizer, temperature=0.9, split=Split(4, 4)))
    batch = rollouts(mesh, "float32")
    batch = dataclasses.replace(batch, fresh=jnp.ones_like(batch.mask))
    state, _, _ = update(states.create(model, optimizer, mesh, params), reference, batch)
    assert state.step == 2
    nobody = dataclasses.replace(batch, mask=jnp.zeros_like(batch.mask), reward=jnp.zeros((P, G), jnp.float32))
    after, metrics, _ = update(state, reference, nobody)
    jax.tree.map(np.testing.assert_array_equal, after, state)
    assert all(np.isfinite(value) for value in metrics.values()) and metrics["optimizer/update_norm"] == 0
    # two updates, of which one has groups
    half = np.arange(P) % 2 == 0
    after, _, _ = update(state, reference, dataclasses.replace(batch, mask=batch.mask & half[:, None, None]))
    assert after.step == 3


@pytest.mark.parametrize(("per_update", "per_micro", "shards"), [(16, 4, 1), (16, 4, 2), (8, 4, 2), (8, 2, 1), (4, 4, 4)])
def test_groups_that_ended_fill_one_micro_batch_after_the_other(per_update: int, per_micro: int, shards: int) -> None:
    split, rng = Split(per_update, per_micro), np.random.default_rng(0)
    number = jnp.arange(16, dtype=jnp.int32)
    order, back = partial.together(jnp.ones(16, bool), split=split, shards=shards)
    np.testing.assert_array_equal(partial.in_order(number, order), number)
    for share in (0.1, 0.4, 0.7):
        done = jnp.asarray(rng.random(16) < share)
        order, back = partial.together(done, split=split, shards=shards)
        moved = partial.in_order({"number": number, "done": done}, order)
        np.testing.assert_array_equal(partial.in_order(moved["number"], back), number)
        lane = 16 // shards
        np.testing.assert_array_equal(np.asarray(moved["number"]) // lane, np.asarray(number) // lane)
        cut = slices(moved["done"], 16 // per_update)  # as the update does
        cut = np.concatenate([np.asarray(slices(each, per_update // per_micro)) for each in cut])
        used = cut.reshape(len(cut), shards, -1).sum(2)  # [micro-batch, device]
        for device in range(shards):
            count, room = int(np.asarray(done).reshape(shards, -1)[device].sum()), per_micro // shards
            assert used[:, device].tolist() == [min(room, max(0, count - i * room)) for i in range(len(cut))]


def test_a_control_deals_out_the_rewards_of_groups_that_ended_among_them() -> None:
    values = {"part": jnp.arange(P * G, dtype=jnp.float32).reshape(P, G)}
    scoring, key = Scoring({}, {}, {"part": 1.0}, frozenset({"part"})), jax.random.key(1)
    every = total_reward(scoring, values, key)
    np.testing.assert_array_equal(total_reward(scoring, values, key, jnp.ones(P, bool)), every)
    done = np.asarray([True, False, False, True, True, False, True, False])
    dealt = np.asarray(total_reward(scoring, values, key, jnp.asarray(done)))
    given = np.asarray(values["part"])
    assert sorted(dealt[done].ravel()) == sorted(given[done].ravel()) and np.any(dealt[done] != given[done])


# --------------------------------------------------------------------------------------------------- runs: texts, resume, refusals

CONFIG = Path(__file__).parents[1] / "short_run.py"
SETTINGS = (
    "--config.supervised.phases.cold_start.steps=0",
    "--config.supervised.phases.base.steps=0",
    "--config.online.completions_per_problem=2",
    "--config.sampling.max_completion_tokens=24",
    "--config.sampling.parking.step_tokens=8",
    "--config.model.architecture.vocab_size=48",
    "--config.online.steps=7",
    "--config.checkpoint.every_steps=3",
    "--config.evaluation.every_steps=0",
    "--config.online.logged_problems=4",
)


@pytest.mark.usefixtures("compiled_once")
@pytest.mark.parametrize(
    ("kind", "rule"),
    [("kept", "math.gsm8k_answer"), ("recomputed", "traced.integer_answer")],
)
@pytest.mark.slow
def test_a_stopped_run_goes_on_bit_for_bit(tmp_path: Path, kind: str, rule: str) -> None:
    """With a host rule, which is asked about whole groups alone, and with traced ones."""
    from ..test_resume import assert_same_run, train

    config = configs.load(
        str(CONFIG), [*SETTINGS, f"--config.sampling.parking.cache={kind}", f"--config.reward.accuracy.rule={rule}"]
    )
    assert train(config, tmp_path / "undisturbed")[0].finished
    assert not train(config, tmp_path / "stopped", checks=1 + 2)[0].finished
    assert train(config, tmp_path / "stopped")[0].finished
    assert_same_run(tmp_path / "stopped", tmp_path / "undisturbed")
    if kind == "recomputed":  # killed while it saved the last step: it goes on from the one before
        shutil.copytree(tmp_path / "undisturbed", tmp_path / "killed")
        (tmp_path / "killed" / "summary.json").unlink()
        (tmp_path / "killed" / "checkpoints" / "reinforce" / "7.manifest.json").unlink()
        result, progress = train(config, tmp_path / "killed")
        assert result.finished and progress.begun == [("reinforce", 6)]
        assert_same_run(tmp_path / "killed", tmp_path / "undisturbed")
    lines = [json.loads(line) for line in (tmp_path / "stopped" / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "rollout/parked" in line]
    assert {line["rollout/finished"] > 0 for line in steps} == {False, True}
    assert all(("reward/total" in line) == ("policy/loss" in line) == (line["rollout/finished"] > 0) for line in steps)
    steps = [line for line in steps if line["rollout/finished"]]
    assert max(line["rollout/segments"] for line in steps) > 1 and max(line["optimizer/gradient_norm"] for line in steps) > 1e-3
    rows = [json.loads(line) for line in (tmp_path / "stopped" / "rollouts.jsonl").read_text().splitlines()]
    for line in steps:
        shown = [row for row in rows if row["step"] == line["step"]]
        assert len(shown) == round(4 * line["rollout/finished"]) * 2
        assert sum(row["length"] for row in shown) == pytest.approx(line["rollout/length"] * len(shown), rel=1e-5)
    assert {row["stop"] for row in rows} <= {"eos", "length"}


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        (["sampling.parking.step_tokens=-1"], "config.sampling.parking.step_tokens is -1: expected 0 or more"),
        (["sampling.parking.step_tokens=37"], "step_tokens is 37, more than .* nothing would ever be parked"),
        (["sampling.parking.step_tokens=4", "sampling.slots=16"], "step_tokens is 4 and config.sampling.slots is 16"),
        (["sampling.parking.step_tokens=4", "sampling.draft=2"], "step_tokens is 4 and config.sampling.draft is 2"),
        (
            ["sampling.parking.step_tokens=4", "sampling.parking.cache=stored"],
            "parking.cache is 'stored': expected 'recomputed' or 'kept'",
        ),
        (
            ["sampling.parking.step_tokens=4", "algorithm.name=rloo", "algorithm.kwargs={}"],
            "'rloo' holds for rows of the newest policy only",
        ),
    ],
)
def test_what_cannot_be_is_refused_by_name(settings: list[str], says: str, tmp_path: Path) -> None:
    config = configs.load(
        "quickstart:tiny", ["--config.sampling.max_completion_tokens=36", *(f"--config.{each}" for each in settings)]
    )
    with pytest.raises(ValueError, match=says):
        experiment.build(config, tmp_path)


def test_a_step_without_its_layout_is_refused() -> None:
    assert ParkingConfig(4).cache == "recomputed"
    mesh, model, *_ = make(ONE, "float32")
    with pytest.raises(ValueError, match="give `parked` as partial.layout makes it"):
        online.make_step(
            model,
            objectives.grpo(),
            optax.sgd(1.0),
            Scoring({"even": even_share}, {}, {"even": 1.0}, frozenset()),
            mesh,
            config=online.OnlineConfig(),
            sampling=SamplingConfig(parking=ParkingConfig(4)),
            eos_ids=STOPS,
            pad_id=0,
            seed=3,
        )
