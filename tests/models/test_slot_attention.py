"""Decoding's attention, by XLA and by each kernel, against a loop over queries; the TPU's compiled where libtpu is.

Here a kernel runs in Pallas's interpreter, which makes none of the checks that its compiler makes.
"""

from __future__ import annotations

import functools
import importlib.util
import re
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxreason import config as configs
from jaxreason import sharding
from jaxreason.models import cache as caches
from jaxreason.models import config as model_configs
from jaxreason.models import decoder, slot_attention, slot_kernels, spec
from jaxreason.models.attention import Law
from jaxreason.models.config import Architecture, Latent, Numerics
from jaxreason.models.kept import BLOCK, Read, Written, places
from jaxreason.models.rounded import Rounded, rounded
from jaxreason.models.slot_attention import Seats
from jaxreason.pipelines import experiment as experiments

from .test_cache import QUICK, architecture, mesh_of

SHORT = Path(__file__).parents[1] / "short_run.py"

P, S, K, R, C = 3, 7, 2, 2, 16
ROOT = np.asarray([0, 0, 1, 2, 2, 2, 0], np.int32)
LENGTHS = np.asarray([0, 5, 127, 128, 250, 300, 60], np.int32)
LIVE = np.asarray([1, 1, 1, 1, 1, 0, 1], bool)
BEFORE = 256  # prompts' places
FIRST = np.asarray([BEFORE - 9, 130, 3], np.int32)


class Case(NamedTuple):
    newest: int = 1
    window: int = 0
    softcap: float = 0.0
    latent: bool = False  # keys are values
    tokens: int = 384  # an own row's
    shared: bool = True  # prompts are read for slots in rows; else slots lie [P, G] in order
    layered: bool = False  # arrays of three layers, of which one is read
    rounded: bool = False
    dtype: str = "float32"


CASES = {
    "plain": Case(),
    "four": Case(newest=4),
    "window": Case(newest=2, window=100),
    "capped": Case(softcap=1.5, layered=True),
    "short": Case(tokens=64, newest=2),
    "latent": Case(latent=True, newest=2),
    "ordered": Case(shared=False, layered=True, window=70),
    "int8": Case(rounded=True, newest=2, layered=True),
    "int8 latent": Case(rounded=True, latent=True, window=90),
    "bfloat16": Case(dtype="bfloat16"),
}


class Given(NamedTuple):
    """Keys and values as they were drawn, [S, K, N, C]; of prompts [P, K, N, C]; and queries [S, M, H, C]."""

    q: np.ndarray
    own: tuple[np.ndarray, np.ndarray]
    prompts: tuple[np.ndarray, np.ndarray]


def root_of(case: Case) -> np.ndarray:
    return ROOT if case.shared else np.arange(6, dtype=np.int32) // 2


def lengths_of(case: Case) -> np.ndarray:
    slots = len(root_of(case))
    return np.minimum(LENGTHS[:slots], case.tokens - case.newest)


@functools.cache
def given(name: str) -> Given:
    case, rng = CASES[name], np.random.default_rng(0)
    slots = len(root_of(case))

    def drawn(rows: int, places: int) -> tuple[np.ndarray, np.ndarray]:
        k, v = (rng.normal(size=(rows, K, places, C)).astype(case.dtype).astype(np.float32) for _ in range(2))
        if case.rounded:
            k, v = (np.asarray(x.numbers, np.float32) * np.asarray(x.scale) for x in (rounded(jnp.asarray(y)) for y in (k, v)))
        return k, k if case.latent else v

    q = rng.normal(size=(slots, case.newest, K * R, C)).astype(case.dtype).astype(np.float32)
    return Given(q, drawn(slots, case.tokens), drawn(P, BEFORE))


@functools.cache
def expected(name: str) -> np.ndarray:
    """One query at a time in float64; zero where a slot is not live."""
    case, (q, own, prompts) = CASES[name], given(name)
    out, root, lengths = np.zeros(q.shape), root_of(case), lengths_of(case)
    for s, m, h in np.ndindex(*q.shape[:3]):
        now = lengths[s] + m
        reach = case.window or 10**6
        mine = [t for t in range(now + 1) if now - t < reach]
        before = [t for t in range(FIRST[root[s]], BEFORE) if now + BEFORE - t < reach]
        pairs = ((prompts, root[s], before), (own, s, mine))
        k, v = (np.concatenate([of[i][row, h // R, places] for of, row, places in pairs]).astype(np.float64) for i in range(2))
        score = k @ q[s, m, h].astype(np.float64) * 0.3
        if case.softcap:
            score = case.softcap * np.tanh(score / case.softcap)
        w = np.exp(score - score.max())
        out[s, m, h] = LIVE[s] * (w @ v / w.sum())
    return out


def arrays(case: Case, k: np.ndarray, v: np.ndarray, block: int, axis: int, far: bool = False) -> tuple[Any, Any]:
    """As decoding keeps them: keys with their places on this axis, in blocks where these are given; rounded again, exactly."""

    def one(x: np.ndarray, axis: int, lie: Any) -> jax.Array:
        x = x if axis == -2 else np.swapaxes(x, -2, -1)
        if block:
            cut = x.ndim + axis
            x = x.reshape(*x.shape[:cut], -1, block, *x.shape[cut + 1 :])
            x = np.moveaxis(x, cut, 1 if far else 2)
        if case.layered:  # what is not to be read is not a number
            other = np.full_like(x, np.nan) if x.dtype == np.float32 else np.full_like(x, 99)
            x = np.stack([other, x, other])
        return jnp.asarray(x, lie)

    def kept(x: np.ndarray, axis: int) -> Any:
        if not case.rounded:
            return one(x, axis, case.dtype)
        scale = np.abs(x).max(axis=-1, keepdims=True) / np.float32(127)
        return Rounded(one(np.rint(x / scale).astype(np.int8), axis, np.int8), one(scale, -1, np.float32))

    return kept(k, axis), None if case.latent else kept(v, -2)


def attended(name: str, implementation: str) -> np.ndarray:
    case, (q, own, prompts) = CASES[name], given(name)
    number, axis = jnp.int32(1) if case.layered else None, -1 if implementation == "xla" else -2
    root, live, lengths = root_of(case), jnp.asarray(LIVE[: len(q)]), lengths_of(case)
    # the newest are written; what lies there and beyond means nothing
    slot, place = np.arange(len(q))[:, None], lengths[:, None] + np.arange(case.newest)
    new = [jnp.asarray(x[slot, :, place], case.dtype) for x in own]
    old = [np.where((np.arange(case.tokens) < lengths[:, None])[:, None, :, None], x, 1.0).astype(np.float32) for x in own]
    old = [np.pad(x, ((0, 0), (0, 0), (0, -case.tokens % slot_kernels.BLOCK), (0, 0)), constant_values=1.0) for x in old]
    if implementation != "xla":
        cuts = [(0, old[0].shape[2], slot_kernels.BLOCK)]
    elif case.tokens <= slot_attention.SHORT:
        cuts = [(0, case.tokens, case.tokens)]
    else:
        cuts = [(0, slot_attention.NEAR, slot_attention.NEAR), (slot_attention.NEAR, case.tokens, BLOCK)]
    parts = [arrays(case, old[0][:, :, a:b], old[1][:, :, a:b], block, axis, a > 0) for a, b, block in cuts]

    @jax.jit
    def run(q: Any, new: Any, parts: Any, prompts: Any, lengths: Any, window: Any) -> jax.Array:
        rows = slot_attention.rows_of(jnp.asarray(root), live, width=2) if case.shared else None
        new = new[0], None if case.latent else new[1]
        at: list[Any] = [None, None]
        kept: list[Any] = [None, None]
        for i, (k, v) in enumerate(parts):
            one = Written(k, v, number, axis, i > 0)
            at[i] = places(lengths - cuts[i][0], newest=case.newest, blocks=one.blocks, size=k.shape[axis])
            kept[i] = one.write(*new, at[i])
        seats = Seats(lengths, live, jnp.asarray(root) if case.shared else None, rows, at[0], at[1])
        read = Read(prompts[0], prompts[1], number)
        law = Law(0.3, case.softcap, window if case.layered and case.window else case.window)  # layers of both kinds are scanned
        return slot_attention.attend(q, kept[0], kept[1], read, jnp.asarray(FIRST), seats, law=law, implementation=implementation)

    fed = new, parts, arrays(case, prompts[0], prompts[1], 0, -1), jnp.asarray(lengths), jnp.int32(case.window)
    return np.asarray(run(jnp.asarray(q, case.dtype), *fed), np.float32)


SLOW = ("plain", "short", "bfloat16")  # others ask most of it too


@pytest.mark.parametrize("implementation", ["xla", "interpreted", "interpreted triton"])
@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in CASES])
def test_attention_is_the_loops(name: str, implementation: str) -> None:
    want, live = expected(name), LIVE[: len(given(name).q)]
    tolerance = 1e-5 if CASES[name].dtype == "float32" else 0.02  # q times its scale, and probabilities, in 8 bits
    got = attended(name, implementation)
    assert np.isfinite(got).all()
    np.testing.assert_allclose(got[live], want[live], rtol=tolerance, atol=tolerance)


# ---- in a model


SCANNED = pytest.param({}, marks=pytest.mark.slow)


@pytest.mark.parametrize("sizes", [SCANNED, {"data": 2, "tensor": 2}], ids=["scanned", "mesh"])
def test_a_model_decodes_the_same(sizes: dict[str, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Through each kernel and through XLA: two tokens a slot, then two more; prompts in rows, own tokens in blocks."""
    if not sizes:
        monkeypatch.setattr(caches, "UNROLLED_LAYERS", 0)
    mesh, rng = mesh_of(**sizes), np.random.default_rng(0)
    prompt = rng.integers(2, 96, (4, 20)).astype(np.int32)
    mask = np.arange(20) >= np.asarray([0, 7, 19, 3])[:, None]
    token, length = rng.integers(2, 96, (2, 8, 2)).astype(np.int32), np.asarray([0, 3, 126, 127, 128, 5, 9, 130], np.int32)

    def made(implementation: str) -> np.ndarray:
        model = decoder.make_decoder(architecture(2), Numerics(sampling_attention=implementation), mesh)

        def run(params: Any) -> jax.Array:
            params = model.prepare_sampling(params)
            _, prompts = model.prefill(params, jnp.asarray(prompt), jnp.asarray(mask))
            root, live, out = jnp.arange(8, dtype=jnp.int32) // 2, np.arange(8) != 5, []
            own = jax.tree.map(lambda x: x + 0.5, model.empty(prompts, slots=8, tokens=140))  # as if there had been tokens
            for i in range(2):
                now = jnp.asarray(length + 2 * i)
                hidden, own = model.decode(params, jnp.asarray(token[i]), prompts, own, root, now, jnp.asarray(live), width=2)
                out.append(hidden)
            return jnp.stack(out)[:, live]

        params = spec.init(model.specs, jax.random.key(0), dtype="float32", mesh=mesh)
        return np.asarray(jax.jit(run, compiler_options=QUICK)(params))

    want = made("xla")
    for kernel in slot_kernels.INTERPRETED:
        np.testing.assert_allclose(made(kernel), want, rtol=0, atol=1e-5)


def decoding(mesh: Any, *, latent: bool = False, layers: int = 2, platform: str = "tpu", **numerics: Any) -> Any:
    """16 steps of 16 slots, each of two tokens, lowered for a mesh's devices or such as those of this platform."""
    sizes: Any = {"hidden_size": 256, "layers": layers, "heads": 4, "kv_heads": 4 if latent else 2, "mlp_size": 512}
    if latent:
        sizes |= {"family": "deepseek_v3", "latent": Latent(512, 0, 64, 128)}
    a = Architecture(vocab_size=512, head_size=192 if latent else 64, max_positions=2048, **sizes)
    model = decoder.make_decoder(a, Numerics(matmul_dtype="bfloat16", **numerics), mesh)

    def run(params: Any, prompt: jax.Array, token: jax.Array, root: jax.Array) -> jax.Array:
        params = model.prepare_sampling(params)
        _, prompts = model.prefill(params, prompt, prompt > 0)
        own = model.empty(prompts, slots=16, tokens=300)

        def step(i: jax.Array, carry: Any) -> Any:
            token, own = carry
            args = (params, token, prompts, own, root, jnp.full(16, 2 * i), jnp.ones(16, bool))
            hidden, own = model.decode(*args, width=4)
            logits = model.project(params, hidden.reshape(-1, hidden.shape[-1]))
            return jnp.argmax(logits, axis=-1).astype(jnp.int32).reshape(16, 2), own

        return jax.lax.fori_loop(jnp.int32(0), jnp.int32(16), step, (token, own))[0]

    def given(*shape: int) -> Any:
        return jax.ShapeDtypeStruct(shape, jnp.int32, sharding=sharding.named(mesh, ("problems",)))

    args = (spec.abstract(model.specs, dtype="float32", mesh=mesh), given(8, 200), given(16, 2), given(16))
    return jax.jit(run).trace(*args).lower(lowering_platforms=(platform,))


LOWERED = [{"sampling_cache": "bfloat16", "layers": 9}, {"sampling_cache": "int8"}, {"sampling_cache": "int8", "latent": True}]


@pytest.mark.parametrize("how", LOWERED, ids=["scanned", "int8", "latent"])
def test_decoding_lowers_for_a_tpu(how: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel's own checks of shapes and types, which the interpreter does not make: for prompts and own rows of each layer."""
    choose = slot_kernels.choose
    monkeypatch.setattr(slot_kernels, "choose", lambda name, **given: choose(name, **{**given, "platform": "tpu"}))
    calls = 2 if how.get("layers", 2) > caches.UNROLLED_LAYERS else 4
    assert decoding(mesh_of(), **how).as_text().count("@tpu_custom_call") == calls


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu, TPUs' compiler: pip install jaxreason[tpu]")
@pytest.mark.parametrize("how", LOWERED, ids=["scanned", "int8", "latent"])
def test_decoding_compiles_for_a_tpu(how: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """By the TPU's own compiler, for four chips that are not here; in the loop nothing of a layer's size is copied."""
    monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")
    from jax.experimental import topologies

    chips = topologies.get_topology_desc(topology_name="v5e:2x2", platform="tpu").devices
    mesh = sharding.make_mesh(sharding.MeshConfig(tensor=2), devices=chips)
    text = decoding(mesh, **how).compile().as_text()
    assert text.count('custom_call_target="tpu_custom_call"') == (2 if "layers" in how else 4)
    kept = r"= (?:bf16|s8)\[(?:9,)?8,(?:1,)?3,128,\d+\]\S* "
    assert re.search(kept + r"(scatter|fusion)\(", text) and not re.search(kept + r"(copy|transpose)\(", text)


def test_the_kernel_is_chosen_where_it_can_run() -> None:
    best = partial(slot_kernels.choose, "", dtype="bfloat16", size=64)
    assert [best(platform=each) for each in ("cpu", "gpu", "tpu")] == ["xla", "xla", "pallas"]
    assert best(platform="tpu", size=20) == best(platform="tpu", dtype="float64") == "xla"
    named = partial(slot_kernels.choose, "pallas", dtype="float32", size=64)
    assert named(platform="tpu") == "pallas"
    with pytest.raises(ValueError, match="is 'pallas', which runs on gpu and tpu, and this is cpu: choose 'xla', or ''"):
        named(platform="cpu")
    with pytest.raises(ValueError, match="it takes keys of a multiple of 8 numbers and these have 20: choose 'xla'"):
        named(platform="tpu", size=20)
    with pytest.raises(ValueError, match="works in float32 and was given float64"):
        named(platform="tpu", dtype="float64")
    with pytest.raises(ValueError, match="'paged', which is not known: expected '' for the best there is, 'xla' or 'pallas'"):
        slot_kernels.choose("paged", platform="tpu", dtype="float32", size=64)
    with pytest.raises(ValueError, match="sampling_attention is 'interpreted': expected one of '', 'xla', 'pallas'"):
        model_configs.check_numerics(Numerics(sampling_attention="interpreted"))


def test_a_run_is_refused_before_anything_is_computed(tmp_path: Path) -> None:
    config = configs.load(str(SHORT), ["--config.model.numerics.sampling_attention=pallas"])
    e = experiments.build(config, tmp_path, devices=jax.devices()[:1])
    with pytest.raises(ValueError, match="which runs on gpu and tpu, and this is cpu"):
        experiments.check_attention(e)
    assert experiments.exact_model(e).numerics.sampling_attention == ""  # what was trained on a TPU is evaluated anywhere
