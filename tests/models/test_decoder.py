"""The decoder's several ways to the same numbers: cache and no cache, one prompt or many copies, padding, neighbours."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxreason import sharding
from jaxreason.batch import PromptBatch
from jaxreason.models import cache as caches
from jaxreason.models import decoder, spec
from jaxreason.models.config import Architecture, Numerics
from jaxreason.numerics import TokenLaw, token_logprobs
from jaxreason.sampling import logits as laws
from jaxreason.sampling.rollout import Sampled, sample

EOS, PAD = 5, 0
SMALL = {"vocab_size": 32, "hidden_size": 32, "heads": 4, "kv_heads": 2, "head_size": 8, "mlp_size": 48}


@pytest.fixture(autouse=True)
def highest_precision() -> Iterator[None]:
    with jax.default_matmul_precision("highest"):
        yield


@dataclass(frozen=True, eq=False)
class Policy:
    architecture: Architecture
    numerics: Numerics
    mesh: Any
    model: decoder.Model
    params: Any


@cache
def make_policy(*, layers: int = 2, tied: bool = True, **numerics: Any) -> Policy:
    """A small random decoder whose biases and scales matter and whose laws are neither flat nor sharp."""
    architecture = Architecture(**SMALL, layers=layers, tied=tied, initializer_range=0.3)
    mesh = sharding.make_mesh(sharding.MeshConfig(), devices=jax.devices()[:1])
    model = decoder.make_decoder(architecture, Numerics(**numerics), mesh)
    rng = np.random.default_rng(1)

    def values(each: spec.ParamSpec) -> jax.Array:
        center, spread = {"normal": (0, each.scale), "ones": (1, 0.1), "zeros": (0, 0.1)}[each.init]
        return jnp.asarray(rng.normal(center, spread, each.shape), jnp.float32)

    params = spec.tree_map(values, model.specs)
    return Policy(architecture, model.numerics, mesh, model, params)


def make_prompts(*lengths: int, width: int | None = None, seed: int = 0) -> PromptBatch:
    """Random prompts, padded on the left. A problem's prompt is a function of its number alone."""
    width = width or max(lengths)
    prompt = np.full((len(lengths), width), PAD, np.int32)
    for number, length in enumerate(lengths):
        prompt[number, width - length :] = np.random.default_rng((seed, number)).integers(6, 32, length)
    return PromptBatch(
        prompt=jnp.asarray(prompt),
        prompt_mask=jnp.asarray(np.arange(width)[None] >= width - np.asarray(lengths)[:, None]),
        problem=jnp.arange(len(lengths), dtype=jnp.uint32),
        answer=jnp.zeros(len(lengths), jnp.int32),
    )


def take(prompts: PromptBatch, rows: list[int]) -> PromptBatch:
    return jax.tree.map(lambda x: x[jnp.asarray(rows)], prompts)


@cache
def sampler(policy: Policy, group: int, tokens: int, temperature: float) -> Any:
    def run(params: Any, prompts: PromptBatch, key: jax.Array | None) -> Sampled:
        return sample(
            policy.model,
            params,
            prompts,
            key,
            group=group,
            max_completion_tokens=tokens,
            eos_ids=(EOS,),
            pad_id=PAD,
            temperature=temperature,
        )

    return jax.jit(run)


def draw(policy: Policy, prompts: PromptBatch, *, group: int = 3, tokens: int = 12, temperature: float = 1.0) -> Sampled:
    run = sampler(policy, group, tokens, temperature)
    return jax.tree.map(np.asarray, run(policy.params, prompts, jax.random.key(7)))


def logits_of(policy: Policy, params: Any, hidden: jax.Array) -> jax.Array:
    return policy.model.project(params, hidden.reshape(-1, hidden.shape[-1])).reshape(*hidden.shape[:-1], -1)


@cache
def scorer(policy: Policy, temperature: float) -> Any:
    def run(params: Any, prompts: PromptBatch, completion: jax.Array) -> jax.Array:
        hidden = policy.model.completion_hidden(params, prompts.prompt, prompts.prompt_mask, completion)
        law = jax.nn.log_softmax(logits_of(policy, params, hidden) / temperature)
        return jnp.take_along_axis(law, completion[..., None], axis=-1)[..., 0]

    return jax.jit(run)


def score(policy: Policy, prompts: PromptBatch, completion: np.ndarray, *, temperature: float = 1.0) -> np.ndarray:
    """Log-probabilities of completions by the training forward and a plain log-softmax, [P, G, T]."""
    return np.asarray(scorer(policy, temperature)(policy.params, prompts, jnp.asarray(completion)))


def by_logits(policy: Policy, prompts: PromptBatch, completion: np.ndarray) -> np.ndarray:
    """Logits that predict each completion token, from plain rows [prompt | completion], [P, G, T, V]."""
    problems, group, tokens = completion.shape
    width = prompts.prompt.shape[1]
    rows = jnp.concatenate([jnp.repeat(prompts.prompt, group, axis=0), completion.reshape(-1, tokens)], axis=1)
    real = jnp.ones((problems * group, tokens), bool)
    mask = jnp.concatenate([jnp.repeat(prompts.prompt_mask, group, axis=0), real], axis=1)
    run = jax.jit(lambda p, t, m: decoder.logits(policy.model, p, t, m))
    return np.asarray(run(policy.params, rows, mask))[:, width - 1 : -1].reshape(problems, group, tokens, -1)


# ---- cache, teacher forcing and layout


@pytest.mark.parametrize(("layers", "temperature"), [(2, 0.6), (caches.UNROLLED_LAYERS + 1, 1.0)], ids=["unrolled", "scanned"])
def test_sampled_logp_is_the_trained_logp(layers: int, temperature: float) -> None:
    policy, prompts = make_policy(layers=layers, tied=layers == 2), make_prompts(7, 4, 1, 5)
    out = draw(policy, prompts, temperature=temperature)
    trained = score(policy, prompts, out.completion, temperature=temperature)
    assert out.mask.any(axis=-1).all()
    np.testing.assert_allclose(out.logp[out.mask], trained[out.mask], rtol=0, atol=5e-5)


def test_the_mask_ends_with_the_stop_token() -> None:
    out = draw(make_policy(), make_prompts(7, 4, 1, 5), group=8)
    ended = (out.completion == EOS).any(axis=-1)
    assert ended.any() and not ended.all()  # both kinds are here
    np.testing.assert_array_equal(out.truncated, ~ended)
    for row, mask, logp in zip(*(x.reshape(-1, x.shape[-1]) for x in (out.completion, out.mask, out.logp)), strict=True):
        length = list(row).index(EOS) + 1 if EOS in row else len(row)
        assert mask[:length].all() and not mask[length:].any()
        assert (row[length:] == PAD).all() and (logp[length:] == 0).all()


def test_completion_hidden_is_the_plain_causal_forward() -> None:
    policy, prompts = make_policy(), make_prompts(7, 4, 1, 5)
    completion = np.random.default_rng(0).integers(0, 32, (4, 2, 9)).astype(np.int32)
    run = jax.jit(policy.model.completion_hidden)
    hidden = run(policy.params, prompts.prompt, prompts.prompt_mask, jnp.asarray(completion))
    found = np.asarray(logits_of(policy, policy.params, hidden))
    np.testing.assert_allclose(found, by_logits(policy, prompts, completion), rtol=0, atol=1e-4)


def test_a_prompt_shared_by_its_group_equals_a_copy_for_each_in_loss_and_gradient() -> None:
    prompts, group, tokens = make_prompts(7, 4, 1, 5), 4, 6
    rng = np.random.default_rng(0)
    completion = jnp.asarray(rng.integers(0, 32, (4, group, tokens)), jnp.int32)
    weight = jnp.asarray(rng.normal(size=(4, group, tokens)), jnp.float32)
    copies = take(prompts, [number for number in range(4) for _ in range(group)])

    def run(policy: Policy, prompts: PromptBatch, completion: jax.Array, weight: jax.Array) -> Any:
        def loss(params: Any) -> jax.Array:
            return jnp.sum(weight * scorer(policy, 1.0)(params, prompts, completion))

        return jax.jit(jax.value_and_grad(loss))(policy.params)

    shared = run(make_policy(), prompts, completion, weight)
    # and without recomputing layers in the backward pass, which is to change nothing either
    plain = run(make_policy(remat="none"), copies, completion.reshape(-1, 1, tokens), weight.reshape(-1, 1, tokens))
    for a, b in zip(jax.tree.leaves(shared), jax.tree.leaves(plain), strict=True):
        a, b = np.asarray(a), np.asarray(b)
        assert np.abs(b).max() > 0
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * max(1, np.abs(b).max()))


def test_greedy_tokens_are_the_argmax_of_teacher_forcing() -> None:
    policy, prompts = make_policy(), make_prompts(7, 4, 1, 5)
    out = jax.tree.map(np.asarray, sampler(policy, 2, 12, 1.0)(policy.params, prompts, None))
    best = by_logits(policy, prompts, out.completion).argmax(-1)
    assert len(np.unique(out.completion[out.mask])) > 4
    np.testing.assert_array_equal(out.completion[out.mask], best[out.mask])
    np.testing.assert_array_equal(out.completion[:, 0], out.completion[:, 1])


def test_scanned_and_unrolled_decoding_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    policy, prompts = make_policy(), make_prompts(7, 4, 1, 5)
    unrolled = draw(policy, prompts)
    assert isinstance(policy.model.prepare_sampling(policy.params)["layers"], tuple)
    monkeypatch.setattr(caches, "UNROLLED_LAYERS", 0)
    policy = make_policy.__wrapped__()  # a new one: the sampler of the other is compiled already
    scanned = draw(policy, prompts)
    assert not isinstance(policy.model.prepare_sampling(policy.params)["layers"], tuple)
    np.testing.assert_array_equal(scanned.completion, unrolled.completion)
    np.testing.assert_allclose(scanned.logp, unrolled.logp, rtol=0, atol=5e-5)


# ---- what a row must not see


def test_what_is_written_in_the_padding_is_invisible() -> None:
    policy, prompts = make_policy(), make_prompts(7, 4, 1, 5)
    other = prompts.replace(prompt=jnp.where(prompts.prompt_mask, prompts.prompt, 31))
    assert (other.prompt != prompts.prompt).any()
    a, b = draw(policy, prompts), draw(policy, other)
    jax.tree.map(np.testing.assert_array_equal, a, b)

    def loss(params: Any, prompts: PromptBatch) -> jax.Array:
        return jnp.sum(scorer(policy, 1.0)(params, prompts, jnp.asarray(a.completion)))

    run = jax.jit(jax.grad(loss))
    one, two = run(policy.params, prompts), run(policy.params, other)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(one))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=0, atol=1e-5 * np.abs(x).max()), one, two)


def test_how_wide_the_padding_is_is_invisible() -> None:
    policy = make_policy()
    narrow, wide = make_prompts(7, 4, 1, 5), make_prompts(7, 4, 1, 5, width=19)
    a, b = draw(policy, narrow), draw(policy, wide)
    np.testing.assert_array_equal(a.completion, b.completion)
    np.testing.assert_allclose(a.logp, b.logp, rtol=0, atol=2e-5)
    scored = (score(policy, each, a.completion) for each in (narrow, wide))
    np.testing.assert_allclose(*scored, rtol=0, atol=2e-5)


def test_a_row_does_not_depend_on_its_neighbours() -> None:
    policy, prompts = make_policy(), make_prompts(7, 4, 1, 5)
    base = draw(policy, prompts)
    flat = base.completion.reshape(-1, base.completion.shape[-1])
    assert len(np.unique(flat, axis=0)) == len(flat)  # every completion has its own random numbers

    shuffled = draw(policy, take(prompts, [2, 1, 3, 0]))
    np.testing.assert_array_equal(shuffled.completion, base.completion[[2, 1, 3, 0]])
    alone_in_a_larger_group = draw(policy, take(prompts, [1]), group=5)
    np.testing.assert_array_equal(alone_in_a_larger_group.completion[0, :3], base.completion[1])
    longer = draw(policy, prompts, tokens=20)
    np.testing.assert_array_equal(longer.completion[..., :12], base.completion)


# ---- numerics


def test_bfloat16_products_are_close() -> None:
    single, half = make_policy(), make_policy(matmul_dtype="bfloat16")
    prompts = make_prompts(7, 4, 1, 5)
    out = draw(half, prompts)
    exact = score(single, prompts, out.completion)[out.mask]
    trained = score(half, prompts, out.completion)[out.mask]
    assert 1e-4 < np.abs(trained - exact).max() < 0.3  # bfloat16 is used, and harmless
    np.testing.assert_allclose(out.logp[out.mask], trained, rtol=0, atol=0.2)
    assert np.abs(trained - exact).mean() < 0.03


VOCABULARIES = (1, 2, 7, 64, 1000)
categorical = jax.jit(laws.categorical)


def random_logits(vocab: int) -> np.ndarray:
    return np.random.default_rng(vocab).normal(scale=0.7, size=vocab).astype(np.float32)


def choose(logits: np.ndarray, uniform: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and log-probabilities of one law at many uniforms."""
    rows = np.broadcast_to(logits, (len(uniform), len(logits)))
    token, logp = categorical(jnp.asarray(rows), jnp.asarray(uniform, jnp.float32))
    return np.asarray(token), np.asarray(logp)


def exact_law(logits: np.ndarray) -> np.ndarray:
    e = np.exp(logits.astype(np.float64) - logits.max())
    return e / e.sum()


@pytest.mark.parametrize("vocab", VOCABULARIES)
def test_frequencies_are_those_of_softmax(vocab: int) -> None:
    logits, rows, counts = random_logits(vocab), 10_000, np.zeros(vocab)
    for number in range(20):
        uniform = np.asarray(jax.random.uniform(jax.random.key(number), (rows,)))
        counts += np.bincount(choose(logits, uniform)[0], minlength=vocab)
    expected = exact_law(logits) * 20 * rows
    assert counts.sum() == 20 * rows and expected.min() > 5
    statistic, freedom = ((counts - expected) ** 2 / expected).sum(), vocab - 1
    assert statistic <= freedom + 5 * np.sqrt(2 * freedom)  # mean and five standard deviations of chi-square


@pytest.mark.parametrize("vocab", VOCABULARIES)
def test_an_even_grid_of_uniforms_gives_each_token_its_share(vocab: int) -> None:
    logits, points = random_logits(vocab), 20_000
    token, logp = choose(logits, (np.arange(points) + 0.5) / points)
    law = exact_law(logits)
    assert (np.diff(token) >= 0).all()  # the inverse of the distribution function
    assert np.abs(np.bincount(token, minlength=vocab) - law * points).max() <= 1.1
    np.testing.assert_allclose(logp, np.log(law[token]), rtol=0, atol=2e-6)


def boundaries(logits: np.ndarray) -> np.ndarray:
    """The uniforms at which the token changes, and their nearest neighbours, all below 1."""
    edge = np.concatenate([[0.0], np.cumsum(exact_law(logits)), [1 - 2**-23]]).astype(np.float32)
    steps = np.arange(-4, 5, dtype=np.float32) * np.float32(2**-23)
    return np.clip((edge[:, None] + steps).ravel(), 0, np.float32(1 - 2**-23))


@pytest.mark.parametrize("vocab", VOCABULARIES)
def test_a_token_without_probability_is_never_chosen(vocab: int) -> None:
    rng = np.random.default_rng(vocab)
    for trial in range(30):
        allowed = rng.random(vocab) < (0.1, 0.3, 0.7)[trial % 3]
        allowed[rng.integers(vocab)] = True
        forbidden = (-np.inf, -1e30, -200.0)[trial % 2 + (trial % 3 == 2)]
        logits = np.where(allowed, rng.normal(size=vocab), forbidden).astype(np.float32)
        uniform = rng.permuted(np.resize(boundaries(logits), 2048))  # one shape, so one compilation
        token, logp = choose(logits, uniform)
        assert allowed[token].all()
        assert np.isfinite(logp).all()


@pytest.mark.parametrize("vocab", VOCABULARIES)
def test_the_only_possible_token_is_always_chosen(vocab: int) -> None:
    places = np.unique(np.linspace(0, vocab - 1, 40, dtype=int))
    uniform = np.asarray([0, 0.3, 0.999, 1 - 2**-23], np.float32)
    rows = np.full((len(places), 1, vocab), -np.inf, np.float32)
    rows[np.arange(len(places)), :, places] = 3
    rows = np.repeat(rows, len(uniform), axis=1).reshape(-1, vocab)
    token, logp = categorical(jnp.asarray(rows), jnp.asarray(np.tile(uniform, len(places))))
    np.testing.assert_array_equal(np.asarray(token), np.repeat(places, len(uniform)))
    np.testing.assert_array_equal(np.asarray(logp), 0)


def test_greedy_takes_the_first_of_the_largest_and_its_logp() -> None:
    rows = np.random.default_rng(0).normal(size=(50, 64)).astype(np.float32)
    rows[0, 3] = rows[0, 9] = 50
    token, logp = (np.asarray(x) for x in laws.greedy(jnp.asarray(rows)))
    np.testing.assert_array_equal(token, rows.argmax(-1))
    expected = [np.log(exact_law(row)[t]) for row, t in zip(rows, token, strict=True)]
    np.testing.assert_allclose(logp, expected, rtol=0, atol=2e-6)


# ---- log-probabilities without the logits


def training_inputs(*, tokens: int, vocab: int, width: int = 8) -> tuple[jax.Array, jax.Array, jax.Array]:
    rng = np.random.default_rng(0)
    hidden, head = rng.normal(size=(2, tokens, width)), rng.normal(size=(width, vocab))
    target = rng.integers(0, vocab, (2, tokens))
    return jnp.asarray(hidden, jnp.float32), jnp.asarray(head, jnp.float32), jnp.asarray(target, jnp.int32)


def loss_of(chunk_tokens: int) -> Any:
    """value, (log-probabilities, entropies), gradients; the loss weighs every token differently."""

    def loss(hidden: jax.Array, head: jax.Array, target: jax.Array) -> Any:
        law = TokenLaw(lambda z, *_: z / 0.7)
        logp, entropy = token_logprobs(hidden, lambda h: h @ head, target, law=law, chunk_tokens=chunk_tokens)
        weight = jnp.sin(jnp.arange(logp.size, dtype=jnp.float32)).reshape(logp.shape)
        return jnp.sum(weight * logp), (logp, entropy)

    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))


@pytest.mark.parametrize("chunk_tokens", [1, 10, 64, 1_000_000])
def test_chunks_of_any_size_give_the_plain_log_softmax(chunk_tokens: int) -> None:
    hidden, head, target = training_inputs(tokens=37, vocab=50)

    def plain(hidden: jax.Array, head: jax.Array) -> Any:
        law = jax.nn.log_softmax(hidden @ head / 0.7)
        logp = jnp.take_along_axis(law, target[..., None], axis=-1)[..., 0]
        weight = jnp.sin(jnp.arange(logp.size, dtype=jnp.float32)).reshape(logp.shape)
        return jnp.sum(weight * logp), (logp, -jnp.sum(jnp.exp(law) * law, axis=-1))

    found = loss_of(chunk_tokens)(hidden, head, target)
    expected = jax.value_and_grad(plain, argnums=(0, 1), has_aux=True)(hidden, head)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=3e-5), found, expected)


def test_memory_does_not_grow_with_tokens_times_vocabulary() -> None:
    vocab, tokens = 4096, 512
    inputs = training_inputs(tokens=tokens, vocab=vocab)
    whole = 2 * tokens * vocab * 4  # bytes of all logits in float32
    compiled = {chunk: loss_of(chunk).lower(*inputs).compile() for chunk in (32, 2 * tokens)}
    temporary = {chunk: each.memory_analysis().temp_size_in_bytes for chunk, each in compiled.items()}
    assert temporary[2 * tokens] >= whole  # the measure sees the logits where they do exist
    assert temporary[32] < whole / 4
    assert f"{vocab}]" in compiled[32].as_text()
    for shape in (f"[2,{tokens},{vocab}]", f"[{2 * tokens},{vocab}]"):
        assert shape not in compiled[32].as_text()
    assert f"[{2 * tokens},{vocab}]" in compiled[2 * tokens].as_text()


def test_completions_of_one_token() -> None:
    """Nothing of such a completion is fed: its token is predicted from the prompt's last."""
    policy, prompts = make_policy(), make_prompts(5, 2)
    one, two = jnp.full((2, 3, 1), 7, jnp.int32), jnp.full((2, 3, 2), 7, jnp.int32)
    run = jax.jit(policy.model.completion_hidden)
    found, expected = (run(policy.params, prompts.prompt, prompts.prompt_mask, x) for x in (one, two))
    np.testing.assert_allclose(found, expected[:, :, :1], rtol=0, atol=1e-5)
