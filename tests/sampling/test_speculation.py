"""Drafts change what sampling costs and nothing that comes out: against sampling without them, brute force and enumeration."""

from __future__ import annotations

import itertools
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxreason import sharding
from jaxreason.batch import PromptBatch
from jaxreason.models import decoder, huggingface, lora, spec
from jaxreason.models.config import Architecture, Numerics
from jaxreason.models.decoder import Model
from jaxreason.models.tokenizer import load_tokenizer
from jaxreason.sampling import engine, speculation, stops
from jaxreason.sampling.engine import Rules
from jaxreason.sampling.generate import Engine
from jaxreason.sampling.law import Law
from jaxreason.sampling.queue import compact
from jaxreason.sampling.rollout import completion_keys, sample

FOLDERS = Path(__file__).parents[1] / "fixtures" / "models"
V, EOS, PAD = 24, 1, 0
QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
CYCLE = 7  # a repeating model's text comes back after so many tokens


def architecture(**changes: Any) -> Architecture:
    sizes: Any = {"hidden_size": 32, "layers": 1, "heads": 4, "kv_heads": 2, "head_size": 8, "mlp_size": 48, "max_positions": 512}
    return Architecture(**{"vocab_size": V, "initializer_range": 0.2, "tied": False, **sizes, **changes})


@cache
def model_of(**changes: Any) -> Model:
    mesh = sharding.make_mesh(sharding.MeshConfig(), devices=jax.devices()[:1])
    return decoder.make_decoder(architecture(**changes), Numerics(), mesh)


def repeating(params: Any, *, strength: float) -> Any:
    """Weights under which a token is likeliest followed by the next one of its cycle, the more so the greater the strength."""
    size, vocab = params["head"].shape
    following = np.arange(vocab)
    for start in range(2, vocab, CYCLE):
        cycle = np.arange(start, min(start + CYCLE, vocab))
        following[cycle] = np.roll(cycle, -1)
    embed = np.random.default_rng(5).normal(size=(vocab, size))
    embed /= np.linalg.norm(embed, axis=1, keepdims=True)
    head = np.zeros((size, vocab))
    head[:, following] = embed.T
    kind = params["head"].dtype
    return {**params, "embed": jnp.asarray(4 * embed, kind), "head": jnp.asarray(strength * head, kind)}


@cache
def weights(strength: float = 1.4) -> Any:
    model = model_of()
    mesh = sharding.make_mesh(sharding.MeshConfig(), devices=jax.devices()[:1])
    return repeating(spec.init(model.specs, jax.random.key(0), dtype="float32", mesh=mesh), strength=strength)


def prompts_of(*lengths: int, vocab: int = V) -> PromptBatch:
    """Random prompts, padded on the left."""
    prompt = np.full((len(lengths), max(lengths)), PAD, np.int32)
    for number, length in enumerate(lengths):
        prompt[number, max(lengths) - length :] = np.random.default_rng(number).integers(2, vocab, length)
    mask = np.arange(max(lengths))[None] >= max(lengths) - np.asarray(lengths)[:, None]
    number = np.arange(len(lengths))
    return PromptBatch(*(jnp.asarray(x) for x in (prompt, mask, number.astype(np.uint32), number.astype(np.int32))))


def grown(
    rules: Rules,
    *,
    limit: Any = 40,
    tokens: int = 48,
    slots: int = 12,
    model: Model | None = None,
    params: Any = None,
    vocab: int = V,
) -> Any:
    """The records of slots that go on from three prompts until they stop."""
    model, params = (model_of(), weights()) if model is None else (model, params)
    prompts = prompts_of(5, 19, 1, vocab=vocab)

    def run(params: Any, rules: Rules, limit: Any) -> Any:
        ready = model.prepare_sampling(params)
        roots = engine.open(model, ready, prompts.prompt, prompts.prompt_mask, rules=rules)
        keys = completion_keys(jax.random.key(7), jnp.arange(slots, dtype=jnp.uint32), group=1).reshape(-1)
        seated = engine.seat(model, roots, jnp.arange(slots, dtype=jnp.int32) % 3, keys, tokens=tokens, rules=rules)
        return engine.extend(model, ready, roots, seated, rules=rules, limit=limit, width=2).record

    out = jax.jit(run, compiler_options=QUICK)(params, rules, jnp.broadcast_to(jnp.asarray(limit, jnp.int32), (slots,)))
    return jax.tree.map(np.asarray, out)


def same(ours: Any, theirs: Any) -> None:
    """All of two records but what was drafted; log-probabilities to rounding."""
    for name in ("tokens", "mask", "step_end", "length", "status", "after"):
        np.testing.assert_array_equal(getattr(ours, name), getattr(theirs, name), err_msg=name)
    np.testing.assert_allclose(ours.logp, theirs.logp, rtol=0, atol=1e-5)


# ---- drafts


def looked_up(text: list[int], count: int) -> list[int] | None:
    """What followed the longest and then latest earlier place of the text's last tokens, the text then repeating itself."""
    for n in range(min(speculation.NGRAM, len(text)), 0, -1):
        for end in range(len(text) - 1, n - 1, -1):
            if text[end - n : end] == text[-n:]:
                again = text[end:]
                return [again[i % len(again)] for i in range(count)]
    return None


def test_drafts_are_what_followed_the_last_tokens_before() -> None:
    rng = np.random.default_rng(0)
    before, room, count = 9, 14, 6
    prompt, tokens, length, texts = np.full((200, before), -1, np.int32), np.zeros((200, room), np.int32), [], []
    for row in range(200):
        kinds = int(rng.integers(2, 9))
        given, own = rng.integers(0, kinds, rng.integers(1, before + 1)), rng.integers(0, kinds, rng.integers(1, room + 1))
        prompt[row, before - len(given) :], tokens[row, : len(own)] = given, own
        length.append(len(own))
        texts.append([*given.tolist(), *own.tolist()])
    run = jax.jit(partial(speculation.lookup, count=count))
    draft = np.asarray(run(jnp.asarray(prompt), jnp.asarray(tokens), jnp.asarray(length, jnp.int32)))
    expected = [looked_up(text, count) for text in texts]
    found = [row for row, each in enumerate(expected) if each is not None]
    assert 100 < len(found) < 200 and draft.min() >= 0
    for row in found:
        assert draft[row].tolist() == expected[row], texts[row]


# ---- the same completions

VOCABULARY = [None, None, *(bytes([97 + i % 5]) + (b"" if i < 15 else bytes([97 + i // 5])) for i in range(V - 2))]
LAWS = {
    "plain": Law(),
    "greedy": Law(greedy=True),
    "top-k": Law(temperature=0.9, top_k=4),
    "nucleus": Law(top_p=0.95, min_p=0.001),
    "penalty": Law(repetition_penalty=1.1, bias=((3, 1.5),), banned=(4,)),
    "forced": Law(forced=((0, 9), (6, 3), (7, 2))),
}


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] * (name in ("nucleus", "forced"))) for name in LAWS])
def test_completions_are_the_same_under_every_law(name: str) -> None:
    """Ended by an EOS or by limits of every length, so in the midst of accepted drafts too."""
    rules, limit = Rules(LAWS[name], (22,), PAD), [*range(30, 42)]
    plain = grown(rules, limit=limit)
    out = grown(replace(rules, draft=4), limit=limit)
    same(out, plain)
    drafted, accepted = out.drafts.sum(axis=0)
    assert accepted > 30 and drafted % 4 == 0 and accepted < drafted
    steps = out.drafts[:, 0] // 4  # none is made where the slot has just ended
    assert (steps + out.drafts[:, 1] <= out.length).all() and (steps + out.drafts[:, 1] + 1 >= out.length).all()
    assert {engine.EOS, engine.LENGTH} == set(out.status.tolist())


@pytest.mark.parametrize("steps_stop", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_stop_strings_and_steps_end_slots_within_drafts(steps_stop: bool) -> None:
    """Strings that straddle tokens; each ends some slot in the midst of a draft, whose rest must not count."""
    search = stops.stop_machine(VOCABULARY, stops=["bcdea", "eabc"], steps=["cd", "ea"])
    rules = Rules(Law(), (EOS,), PAD, search=search, steps_stop=steps_stop)
    plain, out = grown(rules), grown(replace(rules, draft=4))
    same(out, plain)
    assert (engine.STEP if steps_stop else engine.STOP_STRING) in out.status
    assert out.drafts[:, 1].sum() > 0 and plain.step_end.any()


def test_a_grammar_holds_within_drafts() -> None:
    grammar = stops.constrain("(ab|c|d|ea)*e", VOCABULARY, eos_ids=[EOS])
    rules = Rules(Law(bias=((EOS, -2.0),)), (EOS,), PAD, grammar=grammar)
    plain, out = grown(rules), grown(replace(rules, draft=4))
    same(out, plain)
    assert out.drafts[:, 1].sum() > 20 and engine.EOS in out.status


@pytest.mark.parametrize(
    ("name", "tokens"),
    [
        ("qwen2_window", 40),
        pytest.param("qwen2_window", 136, marks=pytest.mark.slow),
        pytest.param("gemma3_text", 136, marks=pytest.mark.slow),
        pytest.param("qwen3_moe", 40, marks=pytest.mark.slow),
        pytest.param("deepseek_v3", 136, marks=pytest.mark.slow),
        pytest.param("phi3", 40, marks=pytest.mark.slow),
        pytest.param("llama_yarn", 40, marks=pytest.mark.slow),
        pytest.param("gemma2", 40, marks=pytest.mark.slow),
    ],
)
def test_greedy_is_greedy_in_every_class_of_family(name: str, tokens: int) -> None:
    folder = FOLDERS / name
    mesh = sharding.make_mesh(sharding.MeshConfig(), devices=jax.devices()[:1])
    read = huggingface.read_architecture(folder)
    model = decoder.make_decoder(read, Numerics(), mesh)
    params = huggingface.load_params(model.specs, folder, dtype="float32", mesh=mesh)
    given: Any = {"model": model, "params": params, "limit": tokens, "tokens": tokens, "slots": 3, "vocab": read.vocab_size}
    rules = Rules(Law(greedy=True), (), PAD)
    plain, out = grown(rules, **given), grown(replace(rules, draft=3), **given)
    same(out, plain)
    assert out.drafts[:, 1].sum() > 0  # greedy text of random weights comes round


@pytest.mark.slow
def test_frequencies_of_sequences_are_the_laws() -> None:
    """Three tokens of 8,192 completions on a vocabulary of five against their probabilities, by chi-square."""
    model = model_of(vocab_size=5, layers=1)
    mesh = sharding.make_mesh(sharding.MeshConfig(), devices=jax.devices()[:1])
    params = repeating(spec.init(model.specs, jax.random.key(2), dtype="float32", mesh=mesh), strength=0.15)
    prompt = jnp.asarray([[2, 3, 4, 2, 3, 4, 2]], jnp.int32)
    many = 8192
    batch = PromptBatch(prompt, jnp.ones((1, 7), bool), jnp.zeros(1, jnp.uint32), jnp.zeros(1, jnp.int32))
    rules = Rules(Law(), (), PAD, draft=2)

    def run(params: Any) -> Any:
        ready = model.prepare_sampling(params)
        roots = engine.open(model, ready, batch.prompt, batch.prompt_mask, rules=rules)
        keys = completion_keys(jax.random.key(3), batch.problem, group=many).reshape(-1)
        seated = engine.seat(model, roots, jnp.zeros(many, jnp.int32), keys, tokens=3, rules=rules)
        limit = jnp.full(many, 3, jnp.int32)
        return engine.extend(model, ready, roots, seated, rules=rules, limit=limit, width=0).record

    out = jax.tree.map(np.asarray, jax.jit(run, compiler_options=QUICK)(params))
    every = np.asarray([*itertools.product(range(5), repeat=3)], np.int32)
    hidden = model.completion_hidden(params, prompt, batch.prompt_mask, jnp.asarray(every)[None])
    scores = model.project(params, hidden.reshape(-1, hidden.shape[-1]))
    logp = np.asarray(jax.nn.log_softmax(scores)).reshape(len(every), 3, 5)
    p = np.exp(np.take_along_axis(logp, every[..., None], axis=2)[..., 0].sum(axis=1))
    np.testing.assert_allclose(p.sum(), 1, atol=1e-5)
    found = np.bincount(out.tokens @ np.asarray([25, 5, 1]), minlength=125)
    assert (many * p).min() > 5 and out.drafts[:, 1].sum() > many / 4
    statistic = np.sum((found - many * p) ** 2 / (many * p))
    assert statistic < 177  # 124 degrees of freedom, 0.1 %
    short = np.bincount(out.tokens[:, 0] * 5 + out.tokens[:, 1], minlength=25)
    expected = many * p.reshape(25, 5).sum(axis=1)
    assert np.sum((short - expected) ** 2 / expected) < 51.2  # 24 degrees of freedom, 0.1 %


# ---- slots, verbs, meshes


def sampler(model: Model, draft: int, slots: int) -> Any:
    fixed: Any = {"group": 4, "max_completion_tokens": 24, "eos_ids": (22,), "pad_id": PAD}
    return jax.jit(partial(sample, model, **fixed, draft=draft, slots=slots), compiler_options=QUICK)


def test_completions_do_not_depend_on_slots_or_drafts() -> None:
    prompts = prompts_of(5, 19, 1, 12)
    made = [sampler(model_of(), *each)(weights(), prompts, jax.random.key(7)) for each in ((0, 0), (3, 0), (3, 4))]
    for other in made[1:]:
        np.testing.assert_array_equal(other.completion, made[0].completion)
        np.testing.assert_array_equal(other.mask, made[0].mask)
        np.testing.assert_array_equal(other.truncated, made[0].truncated)
        np.testing.assert_allclose(other.logp, made[0].logp, rtol=0, atol=1e-5)


def test_drafts_with_low_rank_adapters_make_the_same_completions() -> None:
    model, prompts = model_of(), prompts_of(5, 19, 1, 12)
    mesh = sharding.make_mesh(sharding.MeshConfig(), devices=jax.devices()[:1])
    adapters = spec.init(lora.declare_lora(model.specs, lora.LoraConfig(rank=2)), jax.random.key(3), dtype="float32", mesh=mesh)
    drawn = jax.tree.map(lambda x: 0.1 * jax.random.normal(jax.random.key(x.size), x.shape), adapters)  # B begins at 0
    params = lora.adapt(weights(), drawn)
    plain, out = (sampler(model, draft, 0)(params, prompts, jax.random.key(7)) for draft in (0, 4))
    bare = sampler(model, 0, 0)(weights(), prompts, jax.random.key(7))
    np.testing.assert_array_equal(out.completion, plain.completion)
    np.testing.assert_allclose(out.logp, plain.logp, rtol=0, atol=1e-5)
    assert np.any(np.asarray(plain.completion) != np.asarray(bare.completion)) and np.asarray(out.drafts)[..., 1].sum() > 20


@pytest.mark.slow
def test_refilled_slots_on_a_mesh_with_drafts_make_the_same_completions() -> None:
    def made(mesh: Any, draft: int, slots: int) -> Any:
        model = decoder.make_decoder(architecture(), Numerics(param_dtype="float64", matmul_dtype="float64"), mesh)
        drawn = spec.init(model.specs, jax.random.key(0), dtype="float64", mesh=mesh)
        params = jax.device_put(repeating(drawn, strength=1.4), spec.shardings(model.specs, mesh))
        prompts = sharding.place(mesh, prompts_of(5, 19, 1, 12, 7, 12, 9, 3), ("problems",))
        out = sampler(model, draft, slots)(params, prompts, jax.random.key(7))
        return jax.tree.map(np.asarray, out)

    with jax.enable_x64(True):
        one = made(sharding.make_mesh(sharding.MeshConfig(), devices=jax.devices()[:1]), 0, 0)
        sizes = sharding.MeshConfig(fsdp=2, tensor=2, data=2)
        many = made(sharding.make_mesh(sizes, devices=jax.devices()), 3, 8)
    np.testing.assert_array_equal(many.completion, one.completion)
    np.testing.assert_allclose(many.logp, one.logp, rtol=0, atol=1e-12)


@pytest.mark.slow
def test_drafts_after_a_fork_an_append_and_a_compaction() -> None:
    """What was fed is looked up as well, and what came of it is the same as without drafts."""
    model, prompts = model_of(), prompts_of(5, 19)
    fed = jnp.asarray([[9, 10, 11, 12, 13, 14, 15, 9, 10]] * 8, jnp.int32)
    count = jnp.asarray([9, 0, 4, 9, 1, 9, 0, 9])

    def run(params: Any, rules: Rules) -> Any:
        ready = model.prepare_sampling(params)
        roots = engine.open(model, ready, prompts.prompt, prompts.prompt_mask, rules=rules)
        keys = completion_keys(jax.random.key(7), jnp.arange(8, dtype=jnp.uint32), group=1).reshape(-1)
        at = engine.seat(model, roots, jnp.arange(8, dtype=jnp.int32) % 2, keys, tokens=40, rules=rules)
        extend = partial(engine.extend, model, ready, roots, rules=rules, width=2)
        at = engine.fork(model, extend(at, limit=jnp.full(8, 6)), jnp.asarray([0, 0, 1, 1, 2, 3, 4, 5]), keys)
        at = extend(engine.append(model, ready, roots, at, fed, count, rules=rules, width=2), limit=jnp.full(8, 17))
        at = engine.close(at, jnp.arange(8) % 2 == 1)
        at = replace(at, record=replace(at.record, status=jnp.where(jnp.arange(8) % 2 == 0, jnp.int8(0), at.record.status)))
        return extend(compact(model, at, slots_left=4), limit=jnp.full(4, 39)).record

    plain, out = (jax.jit(run, compiler_options=QUICK)(weights(), Rules(Law(), (), PAD, draft=draft)) for draft in (0, 4))
    same(out, plain)
    assert out.drafts[:, 1].sum() > 20 and (out.length == 39).all()


def test_prompts_that_were_opened_without_drafts_have_none() -> None:
    prompts, rules = prompts_of(5), Rules(Law(), (EOS,), PAD)

    def run(params: Any) -> Any:
        roots = engine.open(model_of(), params, prompts.prompt, prompts.prompt_mask, rules=rules)
        at = engine.seat(model_of(), roots, jnp.zeros(1, jnp.int32), jax.random.split(jax.random.key(0), 1), tokens=4, rules=rules)
        return engine.extend(model_of(), params, roots, at, rules=replace(rules, draft=2), limit=jnp.full(1, 4))

    with pytest.raises(ValueError, match="rules.draft is 2, and these prompts were opened without"):
        jax.eval_shape(run, jax.eval_shape(model_of().prepare_sampling, weights()))


# ---- texts in, completions out


@pytest.fixture(scope="module")
def ready(shared: Path) -> tuple[Engine, Any]:
    folder = shared / "data" / "models" / "tiny_qwen2"
    mesh = sharding.make_mesh(sharding.MeshConfig(), devices=jax.devices()[:1])
    model = decoder.make_decoder(huggingface.read_architecture(folder), Numerics(), mesh)
    made = Engine(model, load_tokenizer(folder), mesh, slots=4, max_prompt_tokens=64, segment=8)
    return made, made.prepare(huggingface.load_params(model.specs, folder, dtype="float32", mesh=mesh))


TEXTS = ["What is 2 + 3?", "Ann has 6 coins. Buys 9. Doubles them. Ann has 6 coins. Buys 9.", "x"]


@pytest.mark.slow
def test_the_engine_returns_the_same_with_any_draft(ready: tuple[Engine, Any]) -> None:
    engine, params = ready
    asked: Any = {"n": 4, "max_tokens": [*range(20, 32)], "law": Law(bias=((300, 12.0), (301, 11.0))), "seed": 3}
    plain = engine.generate(params, TEXTS, **asked)
    assert (plain.drafted, plain.accepted) == (0, 0)
    for draft in (3, "auto", "auto"):
        out = engine.generate(params, TEXTS, **asked, draft=draft)
        for ours, theirs in zip(sum(out.completions, []), sum(plain.completions, []), strict=True):
            assert (ours.tokens, ours.text, ours.stop) == (theirs.tokens, theirs.text, theirs.stop)
            np.testing.assert_allclose(ours.logp, theirs.logp, rtol=0, atol=1e-5)
        assert out.accepted < out.drafted and out.new_tokens == plain.new_tokens
        assert out.accepted > 50 or draft == "auto"
    again = engine.generate(params, TEXTS, **{**asked, "law": Law(repetition_penalty=1.2)}, draft=3)
    assert again.drafted > 0  # programs of other laws and drafts are others


def test_what_cannot_be_drafted_is_said_before_compiling(ready: tuple[Engine, Any]) -> None:
    made, params = ready
    known = made.compilations
    for wrong in (-1, True, "often"):
        with pytest.raises(ValueError, match="draft is .*: expected a whole number of tokens to draft a step"):
            made.generate(params, TEXTS, draft=wrong)

    def one_at_a_time(params: Any, token: Any, *rest: Any, **fixed: Any) -> Any:
        return made.model.decode(params, token[:, :1], *rest, **fixed)

    narrow = Engine(made.model._replace(decode=one_at_a_time), made.tokenizer, made.mesh, slots=8, draft=2)
    with pytest.raises(ValueError, match="decode does not take the 3 tokens a slot that draft = 2 asks for: set draft to 0"):
        narrow.generate(params, TEXTS)
    assert made.compilations == known and narrow.compilations == 0
    assert narrow.generate(params, TEXTS, max_tokens=2, draft=0).new_tokens == 6


@pytest.mark.parametrize(("cost", "accepted", "pays"), [(2.0, 3, True), (2.0, 0, False), (4.2, 3, False), (1.0, 1, True)])
def test_the_pace_is_that_which_costs_less(cost: float, accepted: int, pays: bool) -> None:
    """Steps with drafts that cost so many times as much, and of whose 4 tokens so many are accepted."""
    pace = speculation.Pace(64)
    spent = {True: 0, False: 0}
    for _ in range(100):
        drafting, steps = pace.next(8)
        spent[drafting] += steps
        drafts = (4 * steps, accepted * steps) if drafting else (0, 0)
        pace.told(8, drafting, steps=steps, seconds=steps * (cost if drafting else 1.0), drafts=drafts)
    assert spent[not pays] < 0.02 * spent[pays] and spent[not pays] > 0
