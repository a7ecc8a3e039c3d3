"""Training scores a token under the law that sampled it (trap T17), however it was shaped, and completions end at stop strings."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxreason import config as configs
from jaxreason import objectives, sharding
from jaxreason.batch import PromptBatch, RolloutBatch
from jaxreason.models import adapters, decoder, lora, spec
from jaxreason.models.config import Architecture, Numerics
from jaxreason.numerics import token_logprobs
from jaxreason.pipelines import run as runs
from jaxreason.sampling import law as laws
from jaxreason.sampling.law import Law
from jaxreason.sampling.rollout import SamplingConfig, sample
from jaxreason.sampling.stops import StopStrings, stop_strings
from jaxreason.training import online
from jaxreason.training import state as states
from jaxreason.training.collect import Scoring, completions, rollout_batch
from jaxreason.training.metrics import read_jsonl
from jaxreason.training.optimizer import OptimizerConfig, make_optimizer
from jaxreason.training.step import score
from jaxreason.types import StopReason

from .test_mesh import QUICK, even_share

P, G, TP, T, V = 8, 2, 6, 10, 36
ARCHITECTURE = Architecture(
    vocab_size=V, hidden_size=16, layers=1, heads=4, kv_heads=2, head_size=8, mlp_size=24, max_positions=64, tied=False
)
VOCABULARY = [None, *(bytes([97 + i % 5]) + (b"" if i < 15 else bytes([97 + i // 5])) for i in range(V - 1))]
ENDS: Any = {"eos_ids": (0,), "pad_id": 0}


def mesh_of(**sizes: int) -> Any:
    return sharding.make_mesh(sharding.MeshConfig(**sizes), devices=jax.devices()[: int(np.prod([*sizes.values()], dtype=int))])


@cache
def policy(*mesh: tuple[str, int]) -> Any:
    """A decoder whose scores differ, on a mesh: that, the model and its parameters."""
    on = mesh_of(**dict(mesh or (("data", 1),)))
    model = decoder.make_decoder(ARCHITECTURE, Numerics(logits_chunk_tokens=24), on)
    rng = np.random.default_rng(2)

    def draw(each: spec.ParamSpec) -> jax.Array:
        return jax.device_put(rng.normal(0.0, 0.4, each.shape).astype(np.float32), sharding.named(on, each.axes))

    return on, model, spec.tree_map(draw, model.specs)


def prompts(mesh: Any) -> PromptBatch:
    """Padding is a token that a penalty must not count."""
    rng = np.random.default_rng(0)
    mask = np.arange(TP)[None] >= rng.integers(0, TP - 1, (P, 1))
    tokens = np.where(mask, rng.integers(1, V, (P, TP)), 5).astype(np.int32)
    return sharding.place(mesh, PromptBatch(tokens, mask, np.arange(P, dtype=np.uint32), np.zeros(P, np.int32)), ("problems",))


class Table(nnx.Module):
    """A user's own module: the last token's row is the logits."""

    def __init__(self, *, rngs: nnx.Rngs) -> None:
        self.rows = nnx.Embed(V, V, embedding_init=nnx.initializers.normal(2.0), rngs=rngs)

    def __call__(self, tokens: jax.Array, positions: jax.Array, mask: jax.Array) -> jax.Array:
        return self.rows(tokens)


# ---- one law on both sides

LAWS = {
    "temperature": Law(temperature=1.4),
    "top_k": Law(temperature=0.8, top_k=6),
    "top_p": Law(top_p=0.8),
    "min_p": Law(temperature=1.2, min_p=0.1),
    "penalty": Law(repetition_penalty=1.5),
    "banned_and_bias": Law(banned=(3, 4, 20), bias=((7, 2.0), (9, -1.5))),
    "all": Law(0.9, 20, 0.9, 0.02, 1.2, banned=(3,), forced=((0, 8), (4, 11)), bias=((7, 2.0),)),
}


def plainly(model: Any) -> Any:
    return jax.jit(lambda params, batch: score(model, params, batch).logp, compiler_options=QUICK)


PLAINLY = cache(lambda: plainly(policy()[1]))


def gaps(model: Any, params: Any, mesh: Any, law: Law, plainly: Any) -> tuple[np.ndarray, np.ndarray]:
    """|trainer's - sampler's log-probability| of each chosen token, the trainer under the law and under plain softmax."""

    @partial(jax.jit, compiler_options=QUICK)
    def run(params: Any, prompts: PromptBatch, key: jax.Array) -> Any:
        out = sample(model, params, prompts, key, group=G, max_completion_tokens=T, law=law, **ENDS)
        batch = rollout_batch(prompts, out, jnp.zeros((P, G), jnp.float32))
        return out, batch, jnp.abs(score(model, params, batch, law=law).logp - out.logp)

    out, batch, gap = run(params, prompts(mesh), jax.random.key(3))
    out, both = sharding.fetch((out, (gap, jnp.abs(plainly(params, batch) - out.logp))))
    assert out.mask.sum() > P * G * 2
    places = [place for place, _ in law.forced]
    assert not out.mask[..., places].any()  # nobody chose them
    return both[0][out.mask], both[1][out.mask]


@pytest.mark.parametrize("name", LAWS)
def test_t17_the_trainer_scores_under_the_law_that_sampled(name: str) -> None:
    mesh, model, params = policy()
    under_law, under_softmax = gaps(model, params, mesh, LAWS[name], PLAINLY())
    assert under_law.max() < 1e-5
    assert np.median(under_softmax) > 0.02  # the mistake would be seen


def test_t17_holds_for_a_module_of_ones_own() -> None:
    mesh = mesh_of(data=1)
    model, params = adapters.from_nnx(Table(rngs=nnx.Rngs(0)), mesh=mesh)
    under_law, under_softmax = gaps(model, params, mesh, LAWS["all"], plainly(model))
    assert under_law.max() < 1e-5 and np.median(under_softmax) > 0.02


def stepped(sampling: SamplingConfig, *, mesh: Any, model: Any, params: Any, reference: Any, stop: Any = None) -> Any:
    """Metrics and rows of one step of GRPO, its reference another model."""
    optimizer = make_optimizer(OptimizerConfig(learning_rate=1e-2), steps=2)
    config = online.OnlineConfig(
        steps=2, problems_per_step=P, problems_per_update=P, problems_per_microbatch=P // 2, completions_per_problem=G
    )
    scoring = Scoring({"even": even_share}, {}, {"even": 1.0}, frozenset())
    step = online.make_step(
        model, objectives.grpo(beta=0.04), optimizer, scoring, mesh, config=config, sampling=sampling, seed=3, stop=stop, **ENDS
    )
    assert step.fused is not None
    args = (states.create(model, optimizer, mesh, params), reference, prompts(mesh), sharding.place(mesh, np.int32(0), ()))
    return sharding.fetch(step.fused.lower(*args).compile(compiler_options=QUICK)(*args)[1:])  # pyright: ignore


ALL = {name: getattr(LAWS["all"], name) for name in ("temperature", "top_k", "top_p", "repetition_penalty", "forced", "bias")}
SAMPLING = SamplingConfig(TP, T, banned=(3,), min_p=0.02, **ALL, stop=("ce", "dd"))


@cache
def on_one_device() -> tuple[Any, Any]:
    mesh, model, params = policy()
    other = jax.tree.map(lambda x: 1.1 * x, params)
    stop = stop_strings(SAMPLING.stop, VOCABULARY)
    return stepped(SAMPLING, mesh=mesh, model=model, params=params, reference=other, stop=stop)


def test_t17_in_a_step() -> None:
    """The first update's gap to the sampler is nothing; the reference is under the law too, else the KL would be far larger."""
    metrics, shown = on_one_device()
    assert metrics["policy/sampler_gap"] < 1e-5 and metrics["optimizer/gradient_norm"] > 1e-3
    assert 0 < metrics["policy/kl_ref"] < 0.1
    assert 0 < metrics["rollout/stop_string"] < 1
    assert metrics["rollout/stop_string"] == np.mean(shown.stopped) and metrics["rollout/truncated"] == np.mean(shown.truncated)
    assert not (shown.stopped & shown.truncated).any()


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [{"data": 2, "fsdp": 2, "tensor": 2}, {"data": 2, "sequence": 2, "tensor": 2}], ids=str)
def test_t17_on_a_mesh_and_with_fewer_slots(sizes: dict[str, int]) -> None:
    """The same completions, eight at a time and on eight devices, and the same update."""
    mesh, model, params = policy(*sizes.items())
    other = jax.tree.map(lambda x: 1.1 * x, params)
    stop = stop_strings(SAMPLING.stop, VOCABULARY)
    metrics, shown = stepped(replace(SAMPLING, slots=8), mesh=mesh, model=model, params=params, reference=other, stop=stop)
    wanted, rows = on_one_device()
    np.testing.assert_array_equal(shown.completion, rows.completion)
    np.testing.assert_array_equal(shown.stopped, rows.stopped)
    assert metrics["policy/sampler_gap"] < 1e-5
    for name in ("policy/kl_ref", "policy/entropy", "optimizer/gradient_norm", "rollout/stop_string"):
        np.testing.assert_allclose(metrics[name], wanted[name], rtol=2e-3, err_msg=name)


@pytest.mark.slow
def test_a_step_with_drafts_is_the_step_without() -> None:
    """And says how many of the drafted tokens were what was drawn."""
    mesh, model, params = policy()
    other = jax.tree.map(lambda x: 1.1 * x, params)
    stop = stop_strings(SAMPLING.stop, VOCABULARY)
    metrics, shown = stepped(replace(SAMPLING, draft=2), mesh=mesh, model=model, params=params, reference=other, stop=stop)
    wanted, rows = on_one_device()
    np.testing.assert_array_equal(shown.completion, rows.completion)
    assert "rollout/drafts_accepted" not in wanted and 0 < metrics["rollout/drafts_accepted"] < 1
    for name, value in wanted.items():
        np.testing.assert_allclose(metrics[name], value, rtol=2e-3, atol=1e-5, err_msg=name)


def test_t17_with_adapters() -> None:
    mesh, model, params = policy()
    config = lora.LoraConfig(rank=2)
    adapted = model._replace(specs=lora.declare_lora(model.specs, config))
    rng = np.random.default_rng(5)
    own = spec.tree_map(lambda each: jnp.asarray(rng.normal(0, 0.2, each.shape).astype(np.float32)), adapted.specs)
    metrics, _ = stepped(SamplingConfig(TP, T, top_k=6, temperature=0.8), mesh=mesh, model=adapted, params=own, reference=params)
    assert metrics["policy/sampler_gap"] < 1e-5 and metrics["policy/kl_ref"] > 1e-4
    assert metrics["optimizer/gradient_norm"] > 1e-3 and "rollout/stop_string" not in metrics


# ---- against numbers by hand


def by_hand(scores: np.ndarray, law: Law, seen: set[int], chosen: int) -> tuple[float, float]:
    """log-probability of a token and the law's entropy, in plain NumPy."""
    z = scores.copy()
    for token, more in law.bias:
        z[token] += more
    for token in seen:
        z[token] = z[token] * law.repetition_penalty if z[token] < 0 else z[token] / law.repetition_penalty
    z /= law.temperature
    z[list(law.banned)] = -np.inf
    z[np.argsort(z)[: -law.top_k]] = -np.inf
    assert np.isfinite(z[chosen])
    p = np.exp(z - z.max()) / np.exp(z - z.max()).sum()
    return float(np.log(p[chosen])), float(-sum(each * np.log(each) for each in p if each > 0))


def test_a_truncated_laws_gradient_is_that_of_finite_differences() -> None:
    """Over chunks that cut completions in two; the values are NumPy's, by a loop over tokens."""
    law = Law(temperature=0.7, top_k=5, repetition_penalty=1.3, banned=(2,), bias=((4, 0.5),))
    rng = np.random.default_rng(0)
    problems, group, tokens, vocab, width = 2, 2, 5, 9, 4
    hidden, head = rng.normal(size=(problems, group * tokens, width)), rng.normal(size=(width, vocab))
    prompt, mask = rng.integers(0, vocab, (problems, 3)), np.array([[False, True, True], [True, True, True]])
    order = np.argsort(np.where(np.arange(vocab) == 2, -np.inf, hidden @ head), axis=-1)
    target = order[..., -1]  # kept, whatever the penalty does to it
    completion = target.reshape(problems, group, tokens)
    weight = rng.normal(size=target.shape)

    with jax.enable_x64(True):
        given = [jnp.asarray(x, jnp.int32) for x in (prompt, completion)]
        none = jnp.zeros((problems, group, tokens))
        batch = RolloutBatch(given[0], jnp.asarray(mask), given[1], none == 0, none[..., 0] == 1, none)
        own = laws.of_tokens(law, batch, vocab_size=vocab)
        own = own._replace(told=own.told.reshape(target.shape))

        def loss(head: jax.Array, hidden: jax.Array) -> Any:
            of = given[1].reshape(target.shape)
            logp, entropy = token_logprobs(hidden, lambda h: h @ head, of, law=own, chunk_tokens=6)
            return jnp.sum(weight * logp), (logp, entropy)

        run = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))
        (_, (logp, entropy)), slopes = run(jnp.asarray(head), jnp.asarray(hidden))
        for p in range(problems):
            for n in range(group * tokens):
                g, t = divmod(n, tokens)
                seen = set(prompt[p][mask[p]]) | set(completion[p, g, :t])
                wanted = by_hand(hidden[p, n] @ head, law, seen, target[p, n])
                np.testing.assert_allclose([logp[p, n], entropy[p, n]], wanted, rtol=0, atol=1e-12)

        value = jax.jit(jax.vmap(lambda head, hidden: loss(head, hidden)[0]))
        step = 1e-6
        for place, slope in enumerate(slopes):
            size = slope.size
            moved = [np.repeat(x[None], 2 * size, axis=0) for x in (head, hidden)]
            moved[place].reshape(2 * size, -1)[np.arange(2 * size), np.arange(2 * size) // 2] += step * np.tile([1.0, -1.0], size)
            up, down = np.asarray(value(*map(jnp.asarray, moved))).reshape(size, 2).T
            np.testing.assert_allclose(np.asarray(slope).reshape(-1), (up - down) / (2 * step), rtol=1e-5, atol=1e-7)


# ---- stop strings


def test_texts_are_cut_at_stop_strings() -> None:
    """A row that was stopped, one that ended and one that did not; fed tokens are in the text."""
    stop = stop_strings(("ce", "dd"), VOCABULARY)
    assert isinstance(stop, StopStrings)
    _, shown = on_one_device()

    class Words:
        def decode(self, tokens: list[int]) -> str:
            return "".join((VOCABULARY[token] or b"").decode() for token in tokens)

    rows = [row for group in completions(shown, Words(), stop=stop) for row in group]  # pyright: ignore[reportArgumentType]
    assert {row.stop for row in rows} == {StopReason.STOP_STRING, StopReason.EOS, StopReason.LENGTH}
    for row in rows:
        whole = Words().decode(list(row.tokens))
        if row.stop is StopReason.STOP_STRING:
            end = min(whole.find(each) for each in stop.strings if each in whole)
            assert row.text == whole[:end] and row.after_stop == len(whole) - end - 2 < 2
        else:
            assert row.text == whole and not any(each in whole for each in stop.strings)
        assert [n for n, chosen in enumerate(row.mask) if not chosen] == [n for n in (0, 4) if n < len(row.tokens)]


class Quiet:
    def stage(self, name: str, total_steps: int, done_steps: int) -> None: ...
    def update(self, step: int, metrics: Any) -> None: ...
    def message(self, text: str) -> None: ...
    def close(self) -> None: ...


@pytest.mark.slow
def test_a_run_whose_completions_end_at_a_stop_string(tmp_path: Path) -> None:
    """Each is a digit and then "=7", which is fed: the rule on the host sees the digit alone, for what follows is cut."""
    file = str(Path(__file__).parents[1] / "short_run.py")
    settings = {
        "supervised.phases.base.steps": 0,
        "supervised.phases.cold_start.steps": 0,
        "task.kwargs.max_changes": 2,
        "reward.accuracy.rule": "math.gsm8k_answer",
        "online.steps": 2,
        "online.logged_problems": 4,
        "evaluation.every_steps": 0,
        "sampling.max_completion_tokens": 6,
        "sampling.stop": ("=7",),
        "sampling.slots": 8,
    }
    words = configs.load(file, [f"--config.{key}={value}" for key, value in settings.items()])
    built = runs.build(words, tmp_path / "words", devices=jax.devices()[:1])
    number = {text: n for n, text in enumerate(built.tokenizer.vocabulary(64)) if text}
    fed = ((1, number[b"="]), (2, number[b"7"]))
    likely = tuple((number[str(digit).encode()], 50.0) for digit in range(10))
    config = replace(words, sampling=replace(words.sampling, forced=fed, bias=likely))
    result = runs.train(config, tmp_path / "run", progress=Quiet(), stop=lambda: False, devices=jax.devices()[:1])
    assert result.finished

    for line in read_jsonl(tmp_path / "run" / "metrics.jsonl"):
        if "policy/sampler_gap" in line:
            assert line["policy/sampler_gap"] < 1e-5
            assert line["rollout/stop_string"] == 1 and line["rollout/truncated"] == 0 and line["rollout/length"] == 1
    rows = [json.loads(line) for line in (tmp_path / "run" / "rollouts.jsonl").read_text().splitlines()]
    assert len(rows) == 2 * 4 * 4
    for row in rows:
        assert row["stop"] == "stop_string" and row["length"] == 3 and row["completion"] in list("0123456789")
        assert row["reward"]["accuracy"] == (row["completion"] == row["answer"])
    assert any(row["reward"]["accuracy"] and row["answer"] != "7" for row in rows)
    assert result.summary["after"]["eval/word_problems/length"] == 3  # evaluation ends there too
