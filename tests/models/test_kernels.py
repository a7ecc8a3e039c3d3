"""Row attention by every implementation against a loop over queries: outputs, gradients, and who is invisible to whom.

cuDNN's kernel itself is compared where there is a GPU (JAX_PLATFORMS=cuda); elsewhere its arrangement of rows is, with jax.nn's
own arithmetic in the kernel's place. The TPU's kernel runs here in Pallas's interpreter, and is lowered for a real one.
"""

from __future__ import annotations

import functools
from functools import partial
from types import SimpleNamespace
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

from jaxreason import sharding
from jaxreason.models import kernels
from jaxreason.models.kernels import Layout, row_attention


class Case(NamedTuple):
    layout: Layout
    prompt_lengths: tuple[int, ...] = ()  # per problem, of a layout with completions
    packed: tuple[tuple[int, ...], ...] = ()  # per problem, the segments' lengths; padding before, between and after is 0
    heads: int = 4
    kv_heads: int = 2
    size: int = 16
    v_size: int = 16
    softcap: float = 0.0
    window: int = 0
    block: int = 0  # splash's, where it shall not choose


CASES = {
    "grouped": Case(Layout(24, 3, 17), (24, 9, 0)),
    "windowed": Case(Layout(24, 3, 17), (24, 9), window=12),
    "capped": Case(Layout(24, 2, 20), (20, 13), heads=4, kv_heads=1, softcap=1.5, window=30),
    "packed": Case(Layout(75), packed=((-5, 30, 20, -3, 17), (75,)), v_size=8, window=25),  # v narrower, as in latent attention
    "several blocks": Case(Layout(128, 2, 100), (100,), heads=2, kv_heads=1, size=8, v_size=8, block=128),
}


def segments_of(case: Case) -> np.ndarray:
    rows = []
    for length in case.prompt_lengths:
        rows.append([0] * (case.layout.prompt_tokens - length) + [1] * (length + case.layout.group * case.layout.tokens))
    for lengths in case.packed:
        ids = [[i + 1 if length > 0 else 0] * abs(length) for i, length in enumerate(lengths)]
        rows.append(sum(ids, []))
    return np.asarray(rows, np.int32)


def sees(layout: Layout, window: int, query: int, key: int) -> bool:
    """By the definition: completion and time of each place, then their distance in tokens."""

    def where(place: int) -> tuple[int, int]:
        if layout.group == 0 or place < layout.prompt_tokens:
            return -1, place
        completion, time = divmod(place - layout.prompt_tokens, layout.tokens)
        return completion, layout.prompt_tokens + time

    (mine, now), (theirs, then) = where(query), where(key)
    return theirs in (-1, mine) and then <= now and (window == 0 or now - then < window)


@functools.cache
def inputs(name: str) -> tuple[np.ndarray, ...]:
    """q, k, v, the output's cotangent, segments."""
    case = CASES[name]
    rng = np.random.default_rng(0)
    segments = segments_of(case)
    shape = (*segments.shape, case.heads)
    q, cotangent = rng.normal(size=(*shape, case.size)), rng.normal(size=(*shape, case.v_size))
    k = rng.normal(size=(*segments.shape, case.kv_heads, case.size))
    v = rng.normal(size=(*segments.shape, case.kv_heads, case.v_size))
    return *(x.astype(np.float32) for x in (q, k, v, cotangent)), segments


@functools.cache
def expected(name: str) -> tuple[np.ndarray, ...]:
    """Output and gradients of q, k and v, one query at a time in float64."""
    case = CASES[name]
    q, k, v, cotangent, segments = (x.astype(np.float64) for x in inputs(name))
    out, dq, dk, dv = (np.zeros_like(x) for x in (cotangent, q, k, v))
    scale, repeat = case.size**-0.5, case.heads // case.kv_heads
    for n in range(segments.shape[1]):
        visible = np.asarray([sees(case.layout, case.window, n, m) for m in range(segments.shape[1])])
        for p in range(segments.shape[0]):
            keys = np.flatnonzero(visible & (segments[p] == segments[p, n]) & (segments[p] > 0))
            for h in range(case.heads if len(keys) else 0):
                kv = h // repeat
                s = scale * k[p, keys, kv] @ q[p, n, h]
                slope = np.ones_like(s)
                if case.softcap:
                    t = np.tanh(s / case.softcap)
                    s, slope = case.softcap * t, 1 - t**2
                w = np.exp(s - s.max())
                w /= w.sum()
                out[p, n, h] = w @ v[p, keys, kv]
                dw = v[p, keys, kv] @ cotangent[p, n, h]
                ds = w * (dw - w @ dw) * slope * scale
                dq[p, n, h] = ds @ k[p, keys, kv]
                dk[p, keys, kv] += ds[:, None] * q[p, n, h]
                dv[p, keys, kv] += w[:, None] * cotangent[p, n, h]
    return out, dq, dk, dv


def attention_of(case: Case, implementation: str, **options):
    bind = partial(partial, layout=case.layout, scale=case.size**-0.5, window=case.window)
    inner = bind(kernels._fused, backend="xla") if implementation == "arranged" else None  # as for cuDNN
    if implementation == "splash" and case.block:
        inner = bind(kernels._splash, softcap=case.softcap, block=case.block, interpret=True)
    if inner is not None:
        return lambda q, k, v, segments: jnp.where((segments > 0)[..., None, None], inner(q, k, v, segments), 0.0)
    return bind(row_attention, softcap=case.softcap, implementation=implementation, interpret=True, **options)


@functools.cache
def compiled(name: str, implementation: str):
    """One compilation a case, for all tests: q, k, v, cotangent, segments -> output, dq, dk, dv."""
    attend = attention_of(CASES[name], implementation)

    @jax.jit
    def run(q, k, v, cotangent, segments):
        out, back = jax.vjp(lambda q, k, v: attend(q, k, v, segments), q, k, v)
        return out, *back(cotangent)

    return lambda *args: [np.asarray(x) for x in run(*args)]


def each(cases: list[str]) -> pytest.MarkDecorator:
    skipped = [name for name, case in CASES.items() if case.softcap or case.block]
    pairs = [(c, i) for c in cases for i in ("xla", "arranged", "splash") if not (i == "arranged" and c in skipped)]
    return pytest.mark.parametrize(("name", "implementation"), pairs)


@each(list(CASES))
def test_outputs_and_gradients_are_the_loops(name: str, implementation: str) -> None:
    """1e-3 is asked of the kernels; in float32 they keep 1e-5 of values of order one to ten."""
    for got, want in zip(compiled(name, implementation)(*inputs(name)), expected(name), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


@each(["grouped", "windowed", "capped"])
def test_no_completion_sees_another(name: str, implementation: str) -> None:
    case, run = CASES[name], compiled(name, implementation)
    q, k, v, cotangent, segments = inputs(name)
    first = case.layout.prompt_tokens + case.layout.tokens
    second = np.zeros(case.layout.places, bool)
    second[first : first + case.layout.tokens] = True
    before, *_ = run(q, k, v, cotangent, segments)
    moved = [np.where(second[None, :, None, None], 3 * x + 1, x) for x in (q, k, v)]
    after, *_ = run(*moved, cotangent, segments)
    np.testing.assert_array_equal(after[:, ~second], before[:, ~second])
    assert np.abs(after[:, second] - before[:, second]).min() > 0
    _, *gradients = run(q, k, v, np.where(second[None, :, None, None], cotangent, 0), segments)
    for gradient in gradients:
        assert not gradient[:, ~second & (np.arange(case.layout.places) >= case.layout.prompt_tokens)].any()
        assert gradient[:, second].any()


@each(["grouped", "windowed", "capped", "packed"])
def test_padding_is_invisible(name: str, implementation: str) -> None:
    run = compiled(name, implementation)
    q, k, v, cotangent, segments = inputs(name)
    padding = segments == 0
    assert padding.any()
    before = run(q, k, v, cotangent, segments)
    moved = [np.where(padding[..., None, None], 3 * x + 1, x) for x in (q, k, v, cotangent)]
    for was, now in zip(before, run(*moved, segments), strict=True):
        np.testing.assert_array_equal(now, was)
        assert not now[padding].any()


@pytest.mark.parametrize("implementation", ["xla", "splash"])
def test_bfloat16_in_bfloat16_out(implementation: str) -> None:
    q, k, v, _, segments = inputs("grouped")
    attend = jax.jit(attention_of(CASES["grouped"], implementation))
    out = attend(*(jnp.asarray(x, jnp.bfloat16) for x in (q, k, v)), segments)
    assert out.dtype == jnp.bfloat16
    # operands, probabilities and the output are each rounded to 8 bits
    np.testing.assert_allclose(np.asarray(out, np.float32), expected("grouped")[0], atol=0.05)


def test_a_row_of_padding_alone_is_zero_and_so_are_its_gradients() -> None:
    q, k, v, cotangent, segments = inputs("grouped")
    for implementation in ("xla", "arranged", "splash"):
        for x in compiled("grouped", implementation)(q, k, v, cotangent, 0 * segments):
            np.testing.assert_array_equal(x, 0.0)


LAYOUTS = [Layout(20), Layout(9, 1, 4), Layout(7, 3, 5), Layout(0, 2, 6), Layout(128, 2, 128)]


@pytest.mark.parametrize("window", [0, 1, 5, 100])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_static_mask(layout: Layout, window: int) -> None:
    n = layout.places
    want = [[sees(layout, window, i, j) for j in range(n)] for i in range(n)]
    got = kernels.allowed(layout, window=window)
    np.testing.assert_array_equal(got, want)
    lazy, cuts = kernels._lazy_mask(n, layout, window), [slice(i, min(i + 4, n)) for i in range(0, n, 4)]
    np.testing.assert_array_equal(np.block([[lazy[rows, keys] for keys in cuts] for rows in cuts]), want)


@pytest.mark.parametrize("window", [0, 200])
@pytest.mark.parametrize("layout", [Layout(1024), Layout(256, 2, 384), Layout(200, 3, 184)])
def test_blocks_are_those_with_an_allowed_pair(layout: Layout, window: int) -> None:
    mask = kernels.allowed(layout, window=window)
    for block in (128, 256):
        cuts = range(0, layout.places, block)
        want = [[mask[i : i + block, j : j + block].any() for j in cuts] for i in cuts]
        np.testing.assert_array_equal(kernels.blocks(layout, window=window, block=block), want)


def test_splash_skips_what_no_completion_sees() -> None:
    """Eight completions of 256 tokens after a prompt of 256: the prompt's column and the diagonal, 17 blocks of 81."""
    some = kernels.blocks(Layout(256, 8, 256), window=0, block=256)
    assert (some.sum(), some.size) == (17, 81)
    assert kernels.blocks(Layout(256, 8, 256), window=0, block=128).sum() == 59  # of 324
    assert kernels._block(Layout(256, 8, 256), 0) == 256
    assert kernels._block(Layout(100), 0) == 128
    assert kernels._block(Layout(8192), 0) == 512


def mesh_of(**sizes: int) -> Mesh:
    return sharding.make_mesh(sharding.MeshConfig(**sizes))


def test_splash_under_a_mesh_keeps_to_each_devices_problems_and_heads() -> None:
    case = Case(Layout(24, 3, 17), (24, 9, 0, 5), window=12)
    rng = np.random.default_rng(1)
    shape = (4, case.layout.places)
    q, k, v, cotangent = (rng.normal(size=(*shape, n, 16)).astype(np.float32) for n in (4, 2, 2, 4))
    mesh = mesh_of(data=2, fsdp=2, tensor=2)

    def vjp(implementation: str, mesh: Mesh | None):
        attend = attention_of(case, implementation, mesh=mesh)
        return jax.jit(lambda q, k, v, c, s: jax.vjp(lambda *a: attend(*a, s), q, k, v)[1](c))

    heads, rows = sharding.named(mesh, ("problems", None, "heads", None)), sharding.named(mesh, ("problems", None))
    args = [jax.device_put(x, heads) for x in (q, k, v, cotangent)] + [jax.device_put(segments_of(case), rows)]
    run = vjp("splash", mesh).lower(*args).compile()
    for got, want in zip(run(*args), vjp("xla", None)(q, k, v, cotangent, segments_of(case)), strict=True):
        assert got.sharding.is_equivalent_to(heads, 4)
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
    assert not [word for word in ("all-gather", "all-reduce", "all-to-all", "permute") if word in run.as_text()]


@pytest.mark.parametrize(
    ("kv_heads", "sizes"), [(1, {"fsdp": 2, "tensor": 2, "sequence": 2}), (2, {"data": 1, "expert": 2, "tensor": 4})]
)
def test_the_split_over_a_mesh_is_the_whole(sizes: dict[str, int], kv_heads: int) -> None:
    """Any kernel, here the dense one: kv heads fewer than the devices are copied, and a split row is gathered."""
    case = Case(Layout(5, 2, 4), (5, 3, 1, 0), heads=8)
    rng = np.random.default_rng(2)
    q, k, v, cotangent = (jnp.asarray(rng.normal(size=(4, 13, n, 8)), jnp.float32) for n in (8, kv_heads, kv_heads, 8))
    segments = jnp.asarray(segments_of(case))
    kernel = partial(kernels._xla, layout=case.layout, scale=0.3, softcap=0.0, window=0)
    mesh = mesh_of(**sizes)

    @jax.jit
    def both(q, k, v):
        whole, whole_back = jax.vjp(lambda *a: kernel(*a, segments), q, k, v)
        split, split_back = jax.vjp(lambda *a: kernels._on_each_device(kernel, mesh, *a, segments), q, k, v)
        return (split, *split_back(cotangent)), (whole, *whole_back(cotangent))

    for got, want in zip(*both(q, k, v), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("size", "v_size"), [(64, 64), (192, 128)])
def test_splash_lowers_for_a_tpu(size: int, v_size: int) -> None:
    """The kernel's own checks of shapes and types, which the interpreter does not make: forward, dq, dk with dv."""
    layout = Layout(100, 3, 70)
    attend = partial(row_attention, layout=layout, scale=0.1, softcap=30.0, window=90, implementation="splash")
    struct = partial(jax.ShapeDtypeStruct, dtype=jnp.bfloat16)
    args = struct((2, 310, 4, size)), struct((2, 310, 2, size)), struct((2, 310, 2, v_size)), jnp.ones((2, 310), jnp.int32)
    gradient = jax.grad(lambda q, k, v, s: jnp.sum(attend(q, k, v, s).astype(jnp.float32)), (0, 1, 2))
    text = jax.jit(gradient).trace(*args).lower(lowering_platforms=("tpu",)).as_text()
    assert text.count("@tpu_custom_call") == 3


@pytest.mark.skipif(jax.default_backend() != "gpu", reason="cuDNN needs a GPU; run with JAX_PLATFORMS=cuda")
@pytest.mark.parametrize("name", [name for name, case in CASES.items() if not case.softcap])
def test_cudnn_on_a_gpu(name: str) -> None:
    """To bfloat16's rounding of operands and probabilities: 2^-9 of values of order one, a few times over."""
    for got, want in zip(compiled(name, "cudnn")(*inputs(name)), expected(name), strict=True):
        assert np.isfinite(got).all()
        np.testing.assert_allclose(got, want, rtol=0.03, atol=0.06)


def test_auto_takes_the_best_that_can() -> None:
    auto = partial(kernels.choose, "auto")
    assert [auto(platform=p) for p in ("cpu", "gpu", "tpu", "METAL")] == ["xla", "cudnn", "splash", "xla"]
    assert [auto(platform=p, softcap=50.0) for p in ("cpu", "gpu", "tpu")] == ["xla", "xla", "splash"]
    assert [auto(platform=p, dtype="float32") for p in ("gpu", "tpu")] == ["xla", "splash"]
    assert [auto(platform=p, fits=False) for p in ("gpu", "tpu")] == ["xla", "splash"]
    devices = [SimpleNamespace(compute_capability=c) for c in ("8.0", "9.0", "10.0")]
    assert [kernels.widest_of_cudnn(d) for d in (*devices, jax.devices()[0])] == [128, 256, 256, 128]
    assert [auto(platform=p, dtype="float64") for p in ("gpu", "tpu")] == ["xla", "xla"]
    assert [kernels.choose("xla", platform=p) for p in ("cpu", "gpu", "tpu")] == ["xla"] * 3
    assert kernels.choose("cudnn", platform="gpu") == "cudnn" and kernels.choose("splash", platform="tpu") == "splash"


def test_what_cannot_be_done_is_said() -> None:
    with pytest.raises(ValueError, match="'flash', which is not known: expected auto, xla, cudnn, splash"):
        kernels.choose("flash", platform="gpu")
    with pytest.raises(ValueError, match="'cudnn', which runs on gpu, and this is cpu: choose xla"):
        kernels.choose("cudnn", platform="cpu")
    with pytest.raises(ValueError, match="'splash', which runs on tpu, and this is gpu"):
        kernels.choose("splash", platform="gpu")
    x, segments = jnp.zeros((2, 10, 3, 8)), jnp.ones((2, 10), jnp.int32)
    attend = partial(row_attention, x, x, x, segments, scale=1.0)
    with pytest.raises(ValueError, match="no softcap and 50.0 was given: choose xla, or splash"):
        attend(layout=Layout(10), softcap=50.0, implementation="cudnn")
    with pytest.raises(ValueError, match="'auto' is not known: expected one of xla, cudnn, splash"):
        attend(layout=Layout(10), implementation="auto")
    for layout in (Layout(11), Layout(10, 1, 0), Layout(4, 2, 2), Layout(-2, 2, 6)):
        with pytest.raises(ValueError, match="a row of 10 places does not fit prompt_tokens="):
            attend(layout=layout, implementation="xla")
    with pytest.raises(ValueError, match="window=-1, softcap=0.0: expected positive"):
        attend(layout=Layout(10), window=-1, implementation="xla")
    with pytest.raises(ValueError, match=r"2 problems of 3 heads cannot be split over 4 x 2 devices"):
        attend(layout=Layout(10), implementation="splash", interpret=True, mesh=mesh_of(data=4, tensor=2))
    with jax.enable_x64(True), pytest.raises(ValueError, match="float32 and was given float64: choose xla"):
        x = jnp.zeros((2, 10, 3, 8), jnp.float64)
        row_attention(x, x, x, segments, layout=Layout(10), scale=1.0, implementation="splash")
