"""The law that samples against NumPy, written another way, and against transformers; draws against the law."""

from __future__ import annotations

import dataclasses
import math
import re
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxreason.numerics import logprob_and_entropy
from jaxreason.sampling import law as laws
from jaxreason.sampling.law import FORBIDDEN, Law
from jaxreason.sampling.logits import _at, draw

VOCAB = 48
ROWS = 60
LARGE = 151_936  # Qwen2's
LAST = np.float32(1) - np.float32(2**-24)  # the largest float below 1

shape = jax.jit(laws.shape, static_argnums=1)
jit_draw = jax.jit(draw)

LAWS = {
    "plain": Law(),
    "temperature": Law(temperature=0.7),
    "top_k": Law(top_k=7),
    "top_1": Law(top_k=1, temperature=1.3),
    "top_k_of_more": Law(top_k=1000),
    "top_p": Law(top_p=0.9),
    "little_top_p": Law(top_p=0.01),
    "top_p_near_1": Law(top_p=0.9999, temperature=0.6),
    "min_p": Law(min_p=0.1, temperature=1.5),
    "all_three": Law(temperature=0.8, top_k=12, top_p=0.8, min_p=0.05),
    "penalty": Law(repetition_penalty=1.3, temperature=0.9),
    "reward": Law(repetition_penalty=0.7, top_k=5),
    "banned": Law(banned=(0, 5, VOCAB - 1)),
    "bias": Law(bias=((3, 4.0), (4, -2.5))),
    "forced": Law(forced=((0, 9), (3, 2))),
    "everything": Law(0.8, 15, 0.85, 0.02, 1.2, (1, 7), ((1, 11), (2, 0)), ((4, 2.0), (9, -3.0), (7, 5.0))),
}


def case(seed: int) -> dict[str, np.ndarray]:
    """Scores from nearly flat to nearly certain, what was seen, what is allowed, and the places of the tokens to come."""
    rng = np.random.default_rng(seed)
    scores = rng.normal(size=(ROWS, VOCAB)) * rng.choice([0.01, 1, 3, 30], size=(ROWS, 1))
    return {
        "scores": scores.astype(np.float32),
        "seen": rng.random((ROWS, VOCAB)) < 0.3,
        "allowed": rng.random((ROWS, VOCAB)) < rng.choice([0.0, 0.05, 0.5, 1.0], size=(ROWS, 1)),
        "position": rng.integers(0, 5, ROWS).astype(np.int32),
    }


def by_hand(law: Law, scores: Any, seen: Any, allowed: Any, position: Any) -> tuple[np.ndarray, np.ndarray]:
    """One row in float64, token by token down the list of the likeliest: (log-probabilities, which tokens are possible)."""
    value = scores.astype(np.float64)
    for token, amount in law.bias:
        value[token] += amount
    for token in np.flatnonzero(seen):
        value[token] *= law.repetition_penalty if value[token] < 0 else 1 / law.repetition_penalty
    value /= law.temperature
    possible = [token for token in range(len(value)) if token not in law.banned]
    possible = [token for token in possible if allowed[token]] or possible
    for setting, off in (("top_k", 0), ("top_p", 1)):
        if getattr(law, setting) != off:
            ranked = sorted(possible, key=lambda token: -value[token])
            weight = np.exp(value[ranked] - value[ranked].max())
            before = np.arange(len(ranked)) if setting == "top_k" else np.cumsum(weight / weight.sum()) - weight / weight.sum()
            edge = value[[token for token, b in zip(ranked, before, strict=True) if b < getattr(law, setting)]].min()
            possible = [token for token in ranked if value[token] >= edge]
    most = value[possible].max()
    possible = [token for token in possible if np.exp(value[token] - most) >= law.min_p]
    possible = [dict(law.forced)[position]] if position in dict(law.forced) else possible
    kept = np.isin(np.arange(len(value)), possible)
    with np.errstate(divide="ignore"):
        return value - np.logaddexp.reduce(value[kept]) + np.log(kept), kept


@pytest.mark.parametrize("name", LAWS)
def test_the_law_is_the_one_written_by_hand(name: str) -> None:
    law, counts = LAWS[name], set()
    for seed in range(3):
        arrays = case(seed)
        logits = np.asarray(shape(arrays["scores"], law, **{k: v for k, v in arrays.items() if k != "scores"}))
        logp = np.asarray(jax.nn.log_softmax(logits))
        for row in range(ROWS):
            expected, kept = by_hand(law, *(arrays[key][row] for key in ("scores", "seen", "allowed", "position")))
            np.testing.assert_array_equal(logits[row] > FORBIDDEN, kept)
            np.testing.assert_allclose(logp[row][kept], expected[kept], rtol=2e-6, atol=2e-6)
            counts.add(kept.sum())
        assert (np.exp(logp)[logits == FORBIDDEN] == 0).all()
    assert len(counts) > 1 or name in ("top_1", "little_top_p")  # the cases differ


def test_what_is_off_leaves_the_scores_alone() -> None:
    scores = jnp.asarray(case(0)["scores"])
    np.testing.assert_array_equal(shape(scores, Law()), scores)
    np.testing.assert_array_equal(shape(scores, Law(temperature=0.7)), scores / 0.7)
    assert laws.shape(scores.astype(jnp.bfloat16), Law(temperature=0.7, top_p=0.5)).dtype == jnp.float32
    text = str(jax.make_jaxpr(partial(laws.shape, law=Law(temperature=0.7)))(scores))
    assert "div" in text and not re.search("while|scan|sort|top_k|select_n|exp", text)


def test_equal_tokens_at_the_edge_all_stay() -> None:
    scores = np.asarray([[5, 4, 4, 4, 1, 0, -0.0, 0], [2] * 8, [1, 0, 0, -0.0, -1, -1, -1, -1]], np.float32)

    def kept(law: Law) -> list[list[int]]:
        return [np.flatnonzero(row > FORBIDDEN).tolist() for row in np.asarray(shape(jnp.asarray(scores), law))]

    assert kept(Law(top_k=2)) == [[0, 1, 2, 3], [*range(8)], [0, 1, 2, 3]]
    assert kept(Law(top_k=5)) == [[0, 1, 2, 3, 4], [*range(8)], [*range(8)]]
    assert kept(Law(top_k=6))[0] == [*range(8)]  # minus zero is zero
    assert kept(Law(top_p=0.6)) == [[0, 1, 2, 3], [*range(8)], [0, 1, 2, 3]]
    assert kept(Law(min_p=math.exp(-1.0001))) == [[0, 1, 2, 3], [*range(8)], [0, 1, 2, 3]]


def test_a_large_vocabulary_is_cut_where_a_sort_cuts_it() -> None:
    scores = (np.random.default_rng(0).normal(size=(4, LARGE)) * [[0.01], [1], [4], [40]]).astype(np.float32)
    ordered = -np.sort(-scores)
    found = np.asarray(shape(jnp.asarray(scores), Law(top_k=50)))
    np.testing.assert_array_equal(found > FORBIDDEN, scores >= ordered[:, 49:50])
    found = np.asarray(shape(jnp.asarray(scores), Law(top_p=0.95)))
    law = np.exp(ordered.astype(np.float64) - ordered[:, :1])
    before = np.cumsum(law, axis=-1) / law.sum(-1, keepdims=True) - law / law.sum(-1, keepdims=True)
    count, expected = (found > FORBIDDEN).sum(-1), (before < 0.95).sum(-1)
    np.testing.assert_allclose(count, expected, rtol=1e-4)  # float32 sums of many small numbers
    np.testing.assert_array_equal(found > FORBIDDEN, scores >= ordered[np.arange(4), count - 1][:, None])


def test_float64_is_kept_and_cut_exactly() -> None:
    with jax.enable_x64(True):
        scores = np.random.default_rng(0).normal(size=(20, 300)) * 1e-9  # equal in float32 after a shift by 1
        logits = np.asarray(laws.shape(jnp.asarray(scores + 1), Law(top_k=11, forced=((4, 1),)), position=jnp.arange(20) + 9))
        assert logits.dtype == np.float64
        np.testing.assert_array_equal((logits > FORBIDDEN).sum(-1), 11)
        token, logp = jit_draw(jnp.asarray(logits), jnp.linspace(0, 1 - 1e-16, 20))
        assert (logits[np.arange(20), token] > FORBIDDEN).all() and logp.dtype == np.float64


def test_nan_is_not_hidden_by_a_truncation() -> None:
    scores = jnp.asarray(case(0)["scores"]).at[3, 5].set(jnp.nan)
    for law in (Law(), Law(min_p=0.1), LAWS["all_three"]):
        logits = shape(scores, law)
        for uniform in (jnp.full(ROWS, 0.5), None):
            token, logp = jit_draw(logits, uniform)
            assert jnp.isnan(logp[3]) and not jnp.isnan(logp[4]) and (0 <= token).all() and (token < VOCAB).all()


def test_scores_of_minus_infinity_stay_impossible() -> None:
    scores = jnp.asarray(case(0)["scores"]).at[:, 2:].set(-jnp.inf)
    for law in (Law(), Law(top_k=5), Law(top_p=0.99999, min_p=1e-30)):
        for uniform in (0.0, 0.7, LAST):
            token, logp = jit_draw(shape(scores, law), jnp.full(ROWS, uniform, jnp.float32))
            assert (token < 2).all() and jnp.isfinite(logp).all()


# ---- transformers


@pytest.mark.torch
@pytest.mark.filterwarnings("default")  # torch's and transformers' own
@pytest.mark.parametrize("name", LAWS)
def test_the_law_is_that_of_transformers_generate(name: str) -> None:
    torch = pytest.importorskip("torch", reason="compares with PyTorch, which is not installed")
    from transformers import GenerationConfig, GenerationMixin, PretrainedConfig

    class Nothing(GenerationMixin):
        config = PretrainedConfig()

    law = LAWS[name]
    for seed in range(3):
        arrays = case(seed)
        arrays["allowed"] = arrays["allowed"] | ~np.any(arrays["allowed"], -1, keepdims=True)
        off_bans = np.isin(np.arange(VOCAB), law.banned, invert=True)
        arrays["allowed"] |= ~np.any(arrays["allowed"] & off_bans, -1, keepdims=True)  # theirs lets the grammar win over the bans
        ours = np.asarray(shape(arrays["scores"], law, **{k: v for k, v in arrays.items() if k != "scores"}))
        logp = np.asarray(jax.nn.log_softmax(ours))
        for row in range(ROWS):
            seen = torch.tensor(np.flatnonzero(arrays["seen"][row]))[None]
            allow = np.flatnonzero(arrays["allowed"][row]).tolist()
            place = int(arrays["position"][row])
            if place in dict(law.forced):
                allow = [dict(law.forced)[place]]  # they force the first and the last only
            settings = GenerationConfig(
                do_sample=True,
                num_beams=1,
                temperature=law.temperature,
                top_k=law.top_k,
                top_p=law.top_p,
                min_p=law.min_p or None,
                repetition_penalty=float(law.repetition_penalty),
                sequence_bias=[[[token], amount] for token, amount in law.bias] or None,
                bad_words_ids=[[token] for token in law.banned] or None,
            )
            settings._eos_token_tensor = None
            process = Nothing()._get_logits_processor(
                settings, seen.shape[1], prefix_allowed_tokens_fn=lambda batch, ids, allow=allow: allow
            )
            theirs = process(seen, torch.tensor(arrays["scores"][row][None])).numpy()[0]
            np.testing.assert_array_equal(ours[row] > FORBIDDEN, theirs > -np.inf)
            kept = theirs > -np.inf
            expected = torch.tensor(theirs).log_softmax(-1).numpy()
            np.testing.assert_allclose(logp[row][kept], expected[kept], rtol=2e-6, atol=2e-5)  # scores of 40 have steps of 4e-6


# ---- the token that was drawn, for a trainer


def kept_by(law: Law, scores: np.ndarray, chosen: int) -> tuple[list[int], float]:
    logits = shape(jnp.asarray(scores[None], jnp.float32), law, chosen=jnp.asarray([chosen]))
    return np.flatnonzero(logits[0] > FORBIDDEN).tolist(), float(jax.nn.log_softmax(logits)[0, chosen])


def test_the_chosen_token_is_always_kept() -> None:
    for law in (LAWS[name] for name in ("min_p", "all_three", "forced", "everything")):
        arrays = case(1)
        chosen = np.random.default_rng(0).integers(0, VOCAB, ROWS).astype(np.int32)
        rest = {k: v for k, v in arrays.items() if k != "scores"}
        logits, without = (np.asarray(shape(arrays["scores"], law, **rest, **more)) for more in ({"chosen": chosen}, {}))
        logp = np.asarray(logprob_and_entropy(jnp.asarray(logits), jnp.asarray(chosen))[0])
        assert np.isfinite(logp).all()
        inside = without[np.arange(ROWS), chosen] > FORBIDDEN
        np.testing.assert_array_equal(logits[inside], without[inside])  # where it was kept anyway, nothing changes


def test_a_near_tie_gives_the_log_probability_of_the_sampler() -> None:
    sampler = np.asarray([3, 2, 1.000001, 1, 0])  # the sampler drew token 2, the last of its three
    trainer = np.asarray([3, 2, 1, 1.000001, 0])
    expected = kept_by(Law(top_k=3), sampler, 2)
    kept, logp = kept_by(Law(top_k=3), trainer, 2)
    assert (kept, expected[0]) == ([0, 1, 2], [0, 1, 2]) and logp == pytest.approx(expected[1], abs=1e-5)
    kept, logp = kept_by(Law(top_k=1), np.asarray([1.0, 1.000001]), 0)
    assert (kept, logp) == ([0], 0.0)
    mass = np.exp(sampler)[:2].sum() / np.exp(sampler).sum()
    assert kept_by(Law(top_p=mass - 1e-5), sampler, 0)[0] == [0, 1]
    assert kept_by(Law(top_p=mass - 1e-5), sampler, 2)[0] == kept_by(Law(top_p=mass + 1e-5), sampler, 2)[0] == [0, 1, 2]
    assert kept_by(Law(min_p=math.exp(-1) + 1e-5), sampler, 1)[0] == [0, 1]
    assert kept_by(Law(top_k=1, min_p=0.5), sampler, 3) == ([3], 0.0)


def test_gradients_flow_through_the_kept_logits_only() -> None:
    law = Law(temperature=0.8, top_k=6, top_p=0.9, repetition_penalty=1.2, banned=(3,), bias=((1, 0.5),), forced=((2, 0),))
    arrays = {key: jnp.asarray(x) for key, x in case(3).items()}
    rest = {k: v for k, v in arrays.items() if k != "scores"}
    chosen = jnp.argmax(arrays["scores"], axis=-1).astype(jnp.int32)

    def loss(scores: jax.Array, law: Law) -> tuple[jax.Array, jax.Array]:
        logits = laws.shape(scores, law, **rest, chosen=chosen)
        logp, entropy = logprob_and_entropy(logits, chosen)
        return jnp.sum(logp), (logits, entropy)

    scores = np.asarray(arrays["scores"])
    gradient, (logits, entropy) = jax.jit(jax.grad(loss, has_aux=True), static_argnums=1)(scores, law)
    kept = np.asarray(logits > FORBIDDEN)
    assert jnp.isfinite(gradient).all() and jnp.isfinite(entropy).all()
    assert (np.asarray(gradient)[~kept] == 0).all() and (~kept).any(-1).all()
    # d logp[c] / d score[v] = (1[v = c] - p[v]) times the slope of the kept logit
    slope = np.where(np.asarray(rest["seen"]), np.where(scores + 0.5 * (np.arange(VOCAB) == 1) < 0, 1.2, 1 / 1.2), 1) / 0.8
    p = np.asarray(jax.nn.softmax(logits))
    expected = ((np.arange(VOCAB) == np.asarray(chosen)[:, None]) - p) * slope * kept
    np.testing.assert_allclose(gradient, expected, rtol=1e-5, atol=1e-6)
    forced = np.asarray(rest["position"]) == 2
    only = forced & (np.asarray(chosen) == 0)
    np.testing.assert_array_equal(np.asarray(gradient)[only], 0)


# ---- devices


def test_a_vocabulary_split_over_devices_stays_split() -> None:
    mesh = Mesh(np.asarray(jax.devices()).reshape(2, 4), ("data", "tensor"))
    law = Law(temperature=0.8, top_k=9, top_p=0.9, min_p=0.01)
    scores = jnp.asarray(case(0)["scores"])
    split = NamedSharding(mesh, PartitionSpec("data", "tensor"))
    compiled = jax.jit(partial(laws.shape, law=law), in_shardings=split, out_shardings=split).lower(scores).compile()
    assert "all-gather" not in compiled.as_text() and "all-to-all" not in compiled.as_text()
    np.testing.assert_array_equal(compiled(jax.device_put(scores, split)) > FORBIDDEN, shape(scores, law) > FORBIDDEN)


def test_rows_may_be_mapped_over_devices() -> None:
    mesh = Mesh(np.asarray(jax.devices()[:4]), ("data",))
    law, scores = LAWS["all_three"], jnp.asarray(case(0)["scores"])
    chosen = jnp.arange(ROWS, dtype=jnp.int32) % VOCAB
    rows = PartitionSpec("data")

    def run(scores: jax.Array, chosen: jax.Array) -> jax.Array:
        return laws.shape(scores, law, chosen=chosen)

    mapped = jax.jit(jax.shard_map(run, mesh=mesh, in_specs=(rows, rows), out_specs=rows))
    np.testing.assert_array_equal(mapped(scores, chosen), shape(scores, law, chosen=chosen))


# ---- draws


@pytest.mark.parametrize("name", ["plain", "top_k", "all_three", "everything"])
def test_drawn_tokens_have_the_laws_frequencies_and_log_probabilities(name: str) -> None:
    law, draws = LAWS[name], 20_000
    arrays = {key: x[20:23] for key, x in case(0).items()}
    arrays["scores"] = np.random.default_rng(1).normal(size=(3, VOCAB)).astype(np.float32)
    arrays["allowed"] = np.random.default_rng(2).random((3, VOCAB)) < 0.6
    arrays["position"] = np.asarray([0, 3, 4], np.int32)
    logits = shape(**{k: v for k, v in arrays.items() if k != "scores"}, scores=arrays["scores"], law=law)
    p = np.exp(np.asarray(jax.nn.log_softmax(logits), np.float64))
    for row in range(3):
        uniform = jax.random.uniform(jax.random.key(row), (draws,))
        token, logp = (np.asarray(x) for x in jit_draw(jnp.broadcast_to(logits[row], (draws, VOCAB)), uniform))
        np.testing.assert_allclose(logp, np.log(p[row][token]), rtol=0, atol=1e-6)
        counts, expected = np.bincount(token, minlength=VOCAB), p[row] * draws
        assert (counts[expected == 0] == 0).all()
        enough = expected > 5
        statistic, freedom = ((counts - expected)[enough] ** 2 / expected[enough]).sum(), enough.sum() - 1
        assert freedom > 3 and statistic <= freedom + 5 * np.sqrt(2 * freedom)  # mean and five standard deviations


@pytest.mark.parametrize("name", LAWS)
def test_the_log_probability_is_that_of_log_softmax(name: str) -> None:
    arrays = case(4)
    logits = shape(arrays["scores"], LAWS[name], **{k: v for k, v in arrays.items() if k != "scores"})
    expected = np.asarray(jax.nn.log_softmax(logits))
    for uniform in (None, *np.random.default_rng(0).random((4, ROWS)).astype(np.float32)):
        token, logp = jit_draw(logits, uniform)
        np.testing.assert_allclose(logp, expected[np.arange(ROWS), token], rtol=1e-6, atol=1e-6)
        if uniform is None:
            np.testing.assert_array_equal(token, np.argmax(logits, axis=-1))


def hard_rows(vocab: int) -> np.ndarray:
    """Rows whose sums are rounded in every way: flat, one token above all, wide ranges, and dead stretches anywhere."""
    rng = np.random.default_rng(vocab)
    normal = rng.normal(size=vocab)
    place = np.arange(vocab)
    one = np.where(place == vocab // 3, 30.0, normal)
    rows = [
        normal,
        one,
        np.where(place == 0, 200.0, normal),
        np.where(place == vocab - 1, 16.0, normal),
        normal * 300,
        np.linspace(-200, 0, vocab),
        np.linspace(0, -200, vocab),
        np.where(place < vocab // 2, -np.inf, normal),
        np.where(place > vocab // 2, -np.inf, normal),
        np.where((place > vocab // 4) & (place < vocab // 2), -np.inf, one),
        np.where(rng.random(vocab) < 0.999, FORBIDDEN, normal),
        np.where(rng.random(vocab) < 0.5, FORBIDDEN, normal * 40),
        np.where(place % max(1, vocab // 7) == 0, normal, -np.inf),
        np.where(place % 2 == 0, 0.0, -95.0),  # exp(-95) is smaller than the smallest normal float
        np.where(place == vocab // 2, 0.0, -100.0),
        np.where(place == vocab // 2, 0.0, -np.inf),
    ]
    return np.asarray(rows, np.float32)


@pytest.mark.parametrize("vocab", [1, 2, 5, 64, 127, 1000, 2048, LARGE])
def test_a_token_without_probability_is_never_drawn(vocab: int) -> None:
    rows = hard_rows(vocab)
    rows[np.all(rows <= FORBIDDEN, axis=-1), 0] = 0
    exact = rows.astype(np.float64)
    with np.errstate(over="ignore"):
        edges = np.cumsum(np.exp(exact - exact.max(-1, keepdims=True)), axis=-1)
    edges /= edges[:, -1:]
    some = [0.0, np.float32(2**-149), np.float32(2**-24), 0.5, 1 - 2**-23, LAST]
    lots = np.random.default_rng(0).random(10 if vocab == LARGE else 60)
    uniforms = np.concatenate(
        [np.broadcast_to(some, (len(rows), len(some))), np.broadcast_to(lots, (len(rows), len(lots)))], axis=1
    )
    near = edges[:, np.linspace(0, vocab - 1, 4 if vocab == LARGE else 20, dtype=int)].astype(np.float32)
    near = np.concatenate([near, np.nextafter(near, np.float32(0)), np.nextafter(near, np.float32(2))], axis=1)
    uniforms = np.clip(np.concatenate([uniforms, near], axis=1), 0, LAST).astype(np.float32)
    logits = jnp.asarray(rows)
    for uniform in uniforms.T:
        token, logp = (np.asarray(x) for x in jit_draw(logits, uniform))
        difference = np.take_along_axis(exact, token[:, None], axis=-1)[:, 0] - exact.max(-1)
        assert (difference > -88).all(), (vocab, uniform, token)
        assert np.isfinite(logp).all() and (logp <= 1e-6).all()


def test_a_running_sum_may_be_rounded_in_any_way() -> None:
    rng = np.random.default_rng(0)
    mass = (rng.random((3000, 9)) * (rng.random((3000, 9)) < 0.4)).astype(np.float32)
    mass[~(mass > 0.1).any(-1), 4] = 0.2
    upto = (np.cumsum(mass, axis=-1) + rng.choice([-0.1, 0, 0, 0.1], mass.shape)).astype(np.float32)
    point = rng.uniform(-0.1, 1.1, 3000).astype(np.float32) * upto[:, -1]
    found = np.asarray(jax.jit(partial(_at, least=0.1))(point, mass, upto))
    after = (mass > 0.1) & (upto > point[:, None])
    last = 8 - np.argmax(mass[:, ::-1] > 0.1, axis=-1)
    np.testing.assert_array_equal(found, np.where(after.any(-1), after.argmax(-1), last))
    assert 100 < after.any(-1).sum() < 2900  # both happen


def test_no_uniform_finds_a_stretch_without_probability() -> None:
    """Float32 running sums over many blocks rise here and there where a block is empty: at just those places."""
    rng, width, rises = np.random.default_rng(0), 128, 0
    for _ in range(4):
        dead = np.repeat(rng.random(LARGE // width) < 0.5, width)
        logits = np.where(dead, -np.inf, rng.normal(size=LARGE)).astype(np.float32)
        upto = np.asarray(jnp.cumsum(jnp.sum(jnp.exp(jnp.asarray(logits - logits.max())).reshape(-1, width), axis=-1)))
        there = np.flatnonzero((np.diff(upto) > 0) & dead[width::width])
        rises += len(there)
        steps = np.arange(-2, 3, dtype=np.float32) * np.float32(2**-24)
        uniform = np.resize(((upto[there] / upto[-1])[:, None] + steps).ravel(), 20)  # one shape, so one compilation
        token, logp = jit_draw(jnp.broadcast_to(jnp.asarray(logits), (20, LARGE)), jnp.asarray(uniform))
        assert not dead[np.asarray(token)].any() and jnp.isfinite(logp).all()
    assert rises > 3


def test_every_place_of_a_large_vocabulary_can_be_the_only_one() -> None:
    places = np.unique(np.concatenate([np.arange(0, LARGE, 7001), [1, 127, 128, 388, 389, LARGE - 2, LARGE - 1]]))
    for uniform in (0.0, 0.37, LAST):
        rows = jnp.full((len(places), LARGE), -jnp.inf).at[jnp.arange(len(places)), places].set(3.0)
        token, logp = jit_draw(rows, jnp.full(len(places), uniform, jnp.float32))
        np.testing.assert_array_equal(token, places)
        np.testing.assert_array_equal(logp, 0)
        np.testing.assert_array_equal(jit_draw(rows, None)[0], places)


@pytest.mark.parametrize("vocab", [1, 7, 48, 1000])
def test_greedy_takes_the_first_of_equals(vocab: int) -> None:
    rows = np.random.default_rng(vocab).integers(0, 4, (200, vocab)).astype(np.float32)
    rows[0] = -np.inf
    rows[0, -1] = -1e4
    token, logp = jit_draw(jnp.asarray(rows), None)
    np.testing.assert_array_equal(token, rows.argmax(-1))
    np.testing.assert_allclose(logp, jax.nn.log_softmax(rows)[np.arange(200), token], rtol=0, atol=1e-6)


# ---- settings

WRONG = {
    "temperature": [0.0, -1.0, math.nan, math.inf, 1e-9, "1", True],
    "top_k": [-1, 2.0, True],
    "top_p": [0.0, 1.5, -0.1, math.nan],
    "min_p": [1.0, -0.1, math.nan],
    "repetition_penalty": [0.0, -1.0, math.inf, math.nan],
    "banned": [(VOCAB,), (-1,), (1.0,), [1], tuple(range(VOCAB)), (2, 3)],
    "forced": [((0, VOCAB),), ((0, -1),), ((-1, 0),), ((0, 1), (0, 2)), ((0.5, 1),), (3,), ((1, 2, 3),)],
    "bias": [((VOCAB, 1.0),), ((0, math.nan),), ((0, -math.inf),), ((0, 1.0), (0, 2.0)), ((0, 1e6),), {0: 1.0}, ((0, None),)],
}


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(("setting", "given"), [(setting, given) for setting, values in WRONG.items() for given in values])
def test_a_wrong_setting_is_named_with_what_was_given(setting: str, given: Any) -> None:
    with pytest.raises(ValueError, match=re.escape(f"config.sampling.{setting} is {given!r}: expected ")):
        laws.check(dataclasses.replace(Law(), **{setting: given}), vocab_size=VOCAB, eos_ids=(2, 3))


def test_contradictions_are_named() -> None:
    check = partial(laws.check, vocab_size=VOCAB, eos_ids=(2,), key="task.law")
    for law in (Law(greedy=True, top_k=3), Law(greedy=True, top_p=0.9), Law(greedy=True, min_p=0.1)):
        with pytest.raises(ValueError, match=r"task\.law\.(top_k|top_p|min_p) is .* with task\.law\.greedy"):
            check(law)
    with pytest.raises(ValueError, match=r"task\.law\.forced is \(\(0, 4\),\): expected no token of task\.law\.banned.*\[4\]"):
        check(Law(banned=(4,), forced=((0, 4),)))
    with pytest.raises(ValueError, match=r"task\.law\.banned is \(2,\): expected one of the stop tokens \[2\] to be left"):
        check(Law(banned=(2,)))
    with pytest.raises(ValueError, match="for the likeliest token set greedy"):
        check(Law(temperature=0.0))


def test_right_settings_pass() -> None:
    for law in (*LAWS.values(), Law(greedy=True, temperature=0.5, repetition_penalty=1.1, banned=(2,)), Law(top_p=1, min_p=0)):
        laws.check(law, vocab_size=VOCAB, eos_ids=(2, 3))
        assert hash(law) == hash(dataclasses.replace(law))
    laws.check(Law(banned=(2,)), vocab_size=VOCAB)


def test_what_a_law_needs_to_know_is_asked_for() -> None:
    scores = jnp.zeros((1, 4))
    with pytest.raises(ValueError, match="repetition_penalty 1.1, and shape.. was not told the tokens seen"):
        laws.shape(scores, Law(repetition_penalty=1.1))
    with pytest.raises(ValueError, match="forced tokens .*, and shape.. was not told the position"):
        laws.shape(scores, Law(forced=((0, 1),)))
