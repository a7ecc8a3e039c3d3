"""The engine against the model's own forward pass, and against itself with other slots, neighbours, orders and forks."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxreason import sharding
from jaxreason.batch import PromptBatch
from jaxreason.models import decoder, huggingface, spec
from jaxreason.models.config import Architecture, Numerics
from jaxreason.models.decoder import Model
from jaxreason.sampling import engine, stops
from jaxreason.sampling import law as laws
from jaxreason.sampling.engine import Rules
from jaxreason.sampling.law import Law
from jaxreason.sampling.queue import buckets, compact
from jaxreason.sampling.rollout import Sampled, completion_keys, sample

FOLDERS = Path(__file__).parents[1] / "fixtures" / "models"
V, EOS, PAD = 32, 1, 0
PLAIN = Law()
QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


@dataclass(frozen=True, eq=False)
class Policy:
    model: Model
    params: Any


def architecture(layers: int) -> Architecture:
    sizes = {"hidden_size": 32, "layers": layers, "heads": 4, "kv_heads": 2, "head_size": 8, "mlp_size": 48, "max_positions": 512}
    return Architecture(vocab_size=V, initializer_range=0.25, **sizes)


@cache
def policy(layers: int = 2) -> Policy:
    mesh = sharding.make_mesh(sharding.MeshConfig(), devices=jax.devices()[:1])
    model = decoder.make_decoder(architecture(layers), Numerics(), mesh)
    return Policy(model, spec.init(model.specs, jax.random.key(0), dtype="float32", mesh=mesh))


def prompts_of(*lengths: int, width: int = 0, vocab: int = V) -> PromptBatch:
    """Random prompts, padded on the left; a prompt is a function of its number alone."""
    width = width or max(lengths)
    prompt = np.full((len(lengths), width), PAD, np.int32)
    for number, length in enumerate(lengths):
        prompt[number, width - length :] = np.random.default_rng(number).integers(2, vocab, length)
    mask = np.arange(width)[None] >= width - np.asarray(lengths)[:, None]
    number = np.arange(len(lengths))
    return PromptBatch(*(jnp.asarray(x) for x in (prompt, mask, number.astype(np.uint32), number.astype(np.int32))))


@cache
def sampler(made: Policy, group: int, tokens: int, slots: int, law: Law, eos_ids: tuple[int, ...]) -> Any:
    fixed: Any = {"group": group, "max_completion_tokens": tokens, "slots": slots, "law": law, "eos_ids": eos_ids, "pad_id": PAD}
    return jax.jit(partial(sample, made.model, **fixed), compiler_options=QUICK)


def draw(
    made: Policy, prompts: PromptBatch, *, group: int, tokens: int, slots: int = 0, law: Law = PLAIN, eos: Any = (EOS,)
) -> Sampled:
    run = sampler(made, group, tokens, slots, law, tuple(eos))
    return jax.tree.map(np.asarray, run(made.params, prompts, jax.random.key(7)))


def same(a: Sampled, b: Sampled) -> None:
    np.testing.assert_array_equal(a.completion, b.completion)
    np.testing.assert_array_equal(a.mask, b.mask)
    np.testing.assert_array_equal(a.truncated, b.truncated)
    np.testing.assert_allclose(a.logp, b.logp, rtol=0, atol=2e-5)


# ---- slots, neighbours, order


@pytest.mark.parametrize("tokens", [24, 136])  # own tokens read whole, and in blocks
def test_completions_do_not_depend_on_the_number_of_slots(tokens: int) -> None:
    lengths = (5, 33, 1, 40, 7, 12) if tokens > 100 else (5, 33, 1, 40, 7, 12, 9, 2, 21, 38, 4, 6, 17, 3, 30, 11)
    prompts = prompts_of(*lengths, width=70 if tokens > 100 else 40)  # long prompts are read otherwise than short ones
    every = draw(policy(), prompts, group=4, tokens=tokens)  # of 16 prompts 64 completions
    lengths = every.mask.sum(axis=-1)
    assert lengths.min() < 4 and lengths.max() > 20  # uneven
    for slots in (4, 16, 64) if tokens < 100 else (7, 16):
        same(draw(policy(), prompts, group=4, tokens=tokens, slots=slots), every)


def test_a_completion_does_not_depend_on_its_neighbours() -> None:
    prompts = prompts_of(5, 33, 1, 40)
    every = draw(policy(), prompts, group=4, tokens=24, slots=4)
    order = jnp.asarray([2, 0, 3, 1])
    moved = draw(policy(), jax.tree.map(lambda x: x[order], prompts), group=4, tokens=24, slots=4)
    same(jax.tree.map(lambda x: x[np.asarray(order)], every), moved)
    others = jax.tree.map(lambda x: x[jnp.asarray([1, 1, 1, 1])], prompts)
    alone = draw(policy(), others, group=4, tokens=24, slots=4)
    same(jax.tree.map(lambda x: x[[1, 1, 1, 1]], every), alone)


def test_padding_of_prompts_is_invisible() -> None:
    every = draw(policy(), prompts_of(5, 9, 1), group=4, tokens=24, slots=4)
    same(draw(policy(), prompts_of(5, 9, 1, width=70), group=4, tokens=24, slots=4), every)


def test_deep_models_are_scanned_and_sample_the_same_with_any_slots() -> None:
    prompts = prompts_of(5, 33, 1)
    every = draw(policy(9), prompts, group=4, tokens=136)
    same(draw(policy(9), prompts, group=4, tokens=136, slots=4), every)


@pytest.mark.parametrize(
    ("sizes", "slots", "tokens"),
    [
        ({"fsdp": 4, "tensor": 2, "data": 1}, 8, 24),
        pytest.param({"data": 4, "tensor": 2}, 16, 136, marks=pytest.mark.slow),
        pytest.param({"data": 2, "sequence": 2, "tensor": 2}, 8, 136, marks=pytest.mark.slow),
    ],
)
def test_refilled_slots_on_a_mesh_make_the_same_completions(sizes: dict[str, int], slots: int, tokens: int) -> None:
    """A device refills its slots from its own problems."""

    def made(mesh: Any, slots: int) -> Sampled:
        wide = Numerics(param_dtype="float64", matmul_dtype="float64")
        model = decoder.make_decoder(architecture(2), wide, mesh)
        params = spec.init(model.specs, jax.random.key(0), dtype="float64", mesh=mesh)
        fixed: Any = {"group": 4, "max_completion_tokens": tokens, "eos_ids": (EOS,), "pad_id": PAD, "slots": slots}
        prompts = sharding.place(mesh, prompts_of(5, 33, 1, 40, 7, 12, 9, 3), ("problems",))
        run = jax.jit(partial(sample, model, **fixed), compiler_options=QUICK)
        return jax.tree.map(np.asarray, run(params, prompts, jax.random.key(7)))

    with jax.enable_x64(True):
        one = made(sharding.make_mesh(sharding.MeshConfig(), devices=jax.devices()[:1]), 0)
        many = made(sharding.make_mesh(sharding.MeshConfig(**sizes), devices=jax.devices()), slots)
    np.testing.assert_array_equal(many.completion, one.completion)
    np.testing.assert_allclose(many.logp, one.logp, rtol=0, atol=1e-12)


# ---- log-probabilities

LAWS = {
    "plain": Law(),
    "warm": Law(temperature=1.7),
    "top-k": Law(temperature=0.8, top_k=5),
    "nucleus": Law(top_p=0.8, min_p=0.05),
    "penalty": Law(repetition_penalty=1.4, bias=((3, 1.5),), banned=(4, 5)),
    "forced": Law(forced=((0, 9), (2, 3))),
    "greedy": Law(greedy=True),
}


def teacher_forced(made: Policy, prompts: PromptBatch, completion: np.ndarray) -> jax.Array:
    """Scores [P G T, V] of every next token by the trainer's forward pass, compiled as it is there."""

    @jax.jit
    def run(params: Any, prompt: Any, mask: Any, completion: Any) -> jax.Array:
        hidden = made.model.completion_hidden(params, prompt, mask, completion)
        return made.model.project(params, hidden.reshape(-1, hidden.shape[-1]))

    return run(made.params, prompts.prompt, prompts.prompt_mask, jnp.asarray(completion))


def trained(made: Policy, prompts: PromptBatch, out: Sampled, law: Law) -> np.ndarray:
    """The tokens' log-probabilities by the trainer's forward pass, a law's memory of tokens kept in NumPy."""
    problems, group, tokens = out.completion.shape
    scores = teacher_forced(made, prompts, out.completion)
    vocab = scores.shape[-1]
    seen = np.zeros((problems, group, tokens, vocab), bool)
    for p in range(problems):
        seen[p, :, :, np.asarray(prompts.prompt[p])[np.asarray(prompts.prompt_mask[p])]] = True
        for g in range(group):
            for t in range(1, tokens):
                seen[p, g, t:, out.completion[p, g, t - 1]] = True
    position = jnp.asarray(np.broadcast_to(np.arange(tokens, dtype=np.int32), out.completion.shape).reshape(-1))

    @jax.jit
    def scored(scores: jax.Array, seen: jax.Array, chosen: jax.Array) -> jax.Array:
        law_of_each = jax.nn.log_softmax(laws.shape(scores, law, seen=seen, position=position, chosen=chosen))
        return law_of_each[jnp.arange(len(chosen)), chosen]

    logp = scored(scores, jnp.asarray(seen.reshape(-1, vocab)), jnp.asarray(out.completion.reshape(-1)))
    return np.asarray(logp).reshape(out.completion.shape)


@pytest.mark.parametrize("name", LAWS)
def test_log_probabilities_are_the_trainers_under_every_law(name: str) -> None:
    prompts = prompts_of(5, 33, 1, 40)
    out = draw(policy(), prompts, group=4, tokens=24, slots=4, law=LAWS[name])
    chosen = out.mask
    assert chosen.any(axis=-1).all()
    np.testing.assert_allclose(out.logp[chosen], trained(policy(), prompts, out, LAWS[name])[chosen], rtol=0, atol=1e-5)


CLASSES = ("qwen2_window", "gemma2", "qwen3_moe", "deepseek_v3")
FAST = {("gemma2", 16), ("qwen3_moe", 16), ("deepseek_v3", 136)}


@pytest.mark.parametrize(
    ("name", "tokens"),
    [
        pytest.param(name, tokens, marks=[] if (name, tokens) in FAST else [pytest.mark.slow])
        for name in (*CLASSES, "phi3", "gemma3_text", "llama_yarn", "llama3", "mistral", "qwen3", "olmo2")
        for tokens in (16, 136)
    ],
)
def test_log_probabilities_are_the_trainers_in_every_family(name: str, tokens: int) -> None:
    sampled, scored = both_sides(name, tokens, Numerics())
    # 1e-5, and a few of float32's last digits of numbers around 6
    np.testing.assert_allclose(sampled, scored, rtol=1e-6, atol=1e-5)
    assert np.sqrt(np.mean(np.square(sampled - scored))) < 3e-6  # what is off everywhere, and nowhere by much


@pytest.mark.slow
@pytest.mark.parametrize("name", CLASSES)
def test_without_rounding_they_are_equal(name: str) -> None:
    with jax.enable_x64(True):
        np.testing.assert_allclose(*both_sides(name, 136, Numerics("float64", "float64")), rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", ["gemma2", *(pytest.param(name, marks=pytest.mark.slow) for name in CLASSES if name != "gemma2")])
def test_log_probabilities_in_bfloat16_are_within_a_bound(name: str) -> None:
    """Products of bfloat16 operands in another order: hundredths of a nat, more where a router may choose other experts."""
    sampled, scored = both_sides(name, 16, Numerics("bfloat16", "bfloat16"))
    gap = np.abs(sampled - scored)
    assert gap.mean() < 0.02 and 1e-4 < gap.max() < (0.5 if name == "deepseek_v3" else 0.1)


def both_sides(name: str, tokens: int, numerics: Numerics) -> tuple[np.ndarray, np.ndarray]:
    """The sampler's log-probabilities and the trainer's."""
    folder = FOLDERS / name
    mesh = sharding.make_mesh(sharding.MeshConfig(), devices=jax.devices()[:1])
    read = huggingface.read_architecture(folder)
    model = decoder.make_decoder(read, numerics, mesh)
    made = Policy(model, huggingface.load_params(model.specs, folder, dtype=numerics.param_dtype, mesh=mesh))
    prompts = prompts_of(5, 21, vocab=read.vocab_size)
    out = draw(made, prompts, group=2, tokens=tokens, slots=2, eos=())
    return out.logp, trained(made, prompts, out, Law())


def test_greedy_is_the_argmax_of_teacher_forcing() -> None:
    prompts = prompts_of(5, 33)
    out = draw(policy(), prompts, group=2, tokens=24, slots=2, law=Law(greedy=True))
    best = jnp.argmax(teacher_forced(policy(), prompts, out.completion), axis=-1)
    np.testing.assert_array_equal(out.completion[out.mask], np.asarray(best).reshape(out.completion.shape)[out.mask])


def test_frequencies_are_the_laws() -> None:
    """First tokens of 4,096 completions of one prompt against softmax, by chi-square."""
    prompts, law = prompts_of(6), Law(temperature=1.3, top_k=8)
    out = draw(policy(), prompts, group=4096, tokens=1, law=law)
    p = np.asarray(jax.nn.softmax(laws.shape(teacher_forced(policy(), prompts, np.zeros((1, 1, 1), np.int32)), law)))[0]
    found = np.bincount(out.completion.reshape(-1), minlength=V)
    assert not found[p == 0].any()
    kept = p > 0
    expected = 4096 * p[kept]
    assert expected.min() > 5
    assert np.sum((found[kept] - expected) ** 2 / expected) < 24.3  # 7 degrees of freedom, 0.1 %


# ---- verbs


class Handle(NamedTuple):
    roots: Any
    slots: Any
    rules: Rules


@cache
def opener() -> Any:
    def run(params: Any, prompt: Any, mask: Any, rules: Rules) -> Any:
        return engine.open(policy().model, policy().model.prepare_sampling(params), prompt, mask, rules=rules)

    return jax.jit(run, compiler_options=QUICK)


def opened(prompts: PromptBatch, slots: int, *, tokens: int = 48, law: Law = PLAIN, **rules: Any) -> Handle:
    """Slots that go on from the prompts in turn."""
    told = Rules(law, (EOS,), PAD, **rules)
    roots = opener()(policy().params, prompts.prompt, prompts.prompt_mask, told)
    root = jnp.arange(slots, dtype=jnp.int32) % prompts.prompt.shape[0]
    keys = completion_keys(jax.random.key(7), jnp.arange(slots, dtype=jnp.uint32), group=1).reshape(-1)
    return Handle(roots, engine.seat(policy().model, roots, root, keys, tokens=tokens, rules=told), told)


@cache
def extender() -> Any:
    def run(params: Any, at: Handle, limit: Any, steps: Any) -> Any:
        params = policy().model.prepare_sampling(params)
        slots = engine.extend(policy().model, params, at.roots, at.slots, rules=at.rules, limit=limit, steps=steps, width=2)
        return at._replace(slots=slots)

    return jax.jit(run, compiler_options=QUICK)


def extended(at: Handle, limit: int, *, steps: int = 1000) -> Handle:
    return extender()(policy().params, at, jnp.full(at.slots.root.shape, limit, jnp.int32), steps)


def test_a_fork_goes_on_as_its_parent_would() -> None:
    start = extended(opened(prompts_of(5, 33, 9), 6), 7)
    parent = jnp.asarray([3, 3, 0, 5, 1, 1])
    slots = engine.fork(policy().model, start.slots, parent, start.slots.key[parent])
    np.testing.assert_array_equal(slots.record.tokens, start.slots.record.tokens[parent])
    children, parents = extended(start._replace(slots=slots), 20).slots.record, extended(start, 20).slots.record
    for name in ("tokens", "mask", "length", "status"):
        np.testing.assert_array_equal(getattr(children, name), getattr(parents, name)[parent], err_msg=name)
    np.testing.assert_allclose(children.logp, parents.logp[parent], rtol=0, atol=1e-5)


def test_forks_with_other_keys_share_their_beginning_and_differ_after_it() -> None:
    start = extended(opened(prompts_of(33), 4, law=Law(temperature=2.0)), 7)
    parent = jnp.full(4, int(np.argmax(start.slots.record.status == engine.LENGTH)))
    slots = engine.fork(policy().model, start.slots, parent, jax.random.split(jax.random.key(3), 4))
    out = extended(start._replace(slots=slots), 20).slots.record
    tokens = np.asarray(out.tokens)
    assert (tokens[:, :7] == tokens[:1, :7]).all() and len({tuple(row) for row in tokens}) == 4
    np.testing.assert_array_equal(out.parent, parent)
    assert (np.asarray(start.slots.record.parent) == -1).all()


def test_extending_in_two_parts_is_extending_once() -> None:
    start = opened(prompts_of(5, 33, 9), 6)
    once, twice = extended(start, 20), extended(extended(start, 7), 20)
    for a, b in zip(jax.tree.leaves(once.slots.record), jax.tree.leaves(twice.slots.record), strict=True):
        np.testing.assert_array_equal(a, b)


def test_appended_tokens_are_fed_and_not_chosen() -> None:
    """After an append the log-probabilities are those of teacher forcing over the whole row."""
    made, prompts = policy(), prompts_of(5, 33, 9)
    at = extended(opened(prompts, 3), 6)
    fed = jnp.asarray(np.random.default_rng(3).integers(2, V, (3, 5)), jnp.int32)
    count = jnp.asarray([5, 0, 3])
    before = np.asarray(at.slots.record.length)

    def feed(params: Any, at: Handle) -> Any:
        params = made.model.prepare_sampling(params)
        return engine.append(made.model, params, at.roots, at.slots, fed, count, rules=at.rules, width=2)

    slots = jax.jit(feed, compiler_options=QUICK)(made.params, at)
    np.testing.assert_array_equal(slots.record.length, before + np.asarray(count))
    out = extended(at._replace(slots=slots), 24).slots.record
    tokens, mask = np.asarray(out.tokens), np.asarray(out.mask)
    for row in range(3):
        kept = slice(before[row], before[row] + int(count[row]))
        np.testing.assert_array_equal(tokens[row, kept], fed[row, : int(count[row])])
        assert not mask[row, kept].any() and mask[row].sum() == out.length[row] - int(count[row])
    none = np.zeros((3, 1), bool)
    whole = Sampled(tokens[:, None], mask[:, None], np.asarray(out.logp)[:, None], none, none, np.asarray(out.length)[:, None])
    logp = trained(made, prompts, whole, PLAIN)
    np.testing.assert_allclose(np.asarray(out.logp)[mask], logp[:, 0][mask], rtol=0, atol=1e-5)


VOCABULARY = [None, None, *(bytes([97 + i % 5]) + (b"" if i < 15 else bytes([97 + i // 5])) for i in range(V - 2))]


def text_of(tokens: np.ndarray) -> bytes:
    return b"".join(VOCABULARY[token] or b"" for token in tokens.tolist())


def test_slots_stop_at_strings_and_at_steps_where_a_search_of_the_text_says() -> None:
    search = stops.stop_machine(VOCABULARY, stops=["dce", "aab"], steps=["bd", "ca"])
    at = opened(prompts_of(5, 33, 9), 24, law=Law(temperature=3.0), search=search, steps_stop=True)
    reasons = set()
    texts = [b""] * 24
    while True:
        old = at.slots.record
        at = extended(at, 40)
        new = jax.tree.map(np.asarray, at.slots.record)
        for row in range(24):
            status, length = int(new.status[row]), int(new.length[row])
            if int(old.status[row]) not in (engine.LIVE, engine.STEP):
                assert length == old.length[row]
                continue
            said = text_of(new.tokens[row, int(old.length[row]) : length])
            last = len(VOCABULARY[int(new.tokens[row, length - 1])] or b"")
            texts[row] += said
            reasons.add(status)
            if status == engine.STOP_STRING:
                stop = min(texts[row].find(each) + 3 for each in (b"dce", b"aab") if each in texts[row])
                assert len(texts[row]) - last < stop <= len(texts[row]) and len(texts[row]) - stop == new.after[row]
            else:
                assert b"dce" not in texts[row] and b"aab" not in texts[row]
            if status == engine.STEP:
                assert new.step_end[row, length - 1] and any(each in texts[row][-last - 1 :] for each in (b"bd", b"ca"))
        if not (new.status == engine.STEP).any():
            break
    assert reasons == {engine.EOS, engine.STOP_STRING, engine.STEP, engine.LENGTH}


def test_a_grammar_bounds_what_is_written() -> None:
    grammar = stops.constrain("a(b|cd)*e", VOCABULARY, eos_ids=[EOS])
    out = extended(opened(prompts_of(5, 33, 9), 12, law=Law(temperature=2.0), grammar=grammar), 48).slots.record
    ended = np.flatnonzero(out.status == engine.EOS)
    assert len(ended) >= 6
    for row in ended:
        assert re.fullmatch(rb"a(b|cd)*e", text_of(np.asarray(out.tokens[row, : int(out.length[row])])))


def test_a_full_slot_ends() -> None:
    at = opened(prompts_of(5, 33), 4, tokens=9)
    out = extended(at, 40).slots.record
    assert (out.status == engine.LENGTH).any() and ((out.status == engine.LENGTH) == (out.length == 9)).all()


def test_closed_slots_are_left_alone() -> None:
    at = opened(prompts_of(5, 33), 4)
    out = extended(at._replace(slots=engine.close(at.slots, jnp.asarray([True, False, False, True]))), 9).slots.record
    assert np.asarray(out.length)[[0, 3]].tolist() == [0, 0] and (np.asarray(out.length)[1:3] > 0).all()


def test_compaction_keeps_who_lives() -> None:
    at = extended(opened(prompts_of(5, 33, 9), 8), 20, steps=2)
    assert (at.slots.record.status[::2] == engine.LIVE).all()
    closed = engine.close(at.slots, jnp.asarray([False, True] * 4))
    moved = extended(at._replace(slots=compact(policy().model, closed, slots_left=4)), 20).slots.record
    whole = extended(at, 20).slots.record
    for name in ("tokens", "length", "status"):
        np.testing.assert_array_equal(getattr(moved, name), getattr(whole, name)[::2])


def test_buckets_halve() -> None:
    assert buckets(32) == (32, 16, 8, 4)
    assert buckets(32, lanes=4) == (32, 16)
    assert buckets(7) == (7,)
