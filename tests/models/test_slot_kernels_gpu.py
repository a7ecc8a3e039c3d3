"""The GPU's decoding kernel: split and cut, in a model, lowered for a GPU, and refused where it cannot run.

It runs in Pallas's interpreter here, against the loop of test_slot_attention.py, which takes it through every case. Nothing here
has run on a GPU. Lowering makes Pallas's checks of shapes and types; Triton's own compiler, which is the GPU's, is not asked.
"""

from __future__ import annotations

import contextlib
import sys
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxreason.models import slot_kernels, slot_kernels_gpu
from jaxreason.models.rounded import Rounded
from jaxreason.models.slot_kernels import Reads

from .test_cache import mesh_of
from .test_slot_attention import CASES, LIVE, LOWERED, attended, decoding, expected, given


@pytest.mark.parametrize(("name", "programs", "fetch"), [("int8", 1, 2048), ("window", 64, 4096)], ids=["whole", "split"])
def test_however_the_work_is_cut(name: str, programs: int, fetch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Several turns a block, and a program for a whole row or for a share of its blocks; widths of several pieces."""
    monkeypatch.setattr(slot_kernels_gpu, "PROGRAMS", programs)
    monkeypatch.setattr(slot_kernels_gpu, "FETCH", fetch)
    monkeypatch.setattr(slot_kernels_gpu, "PIECE", 8)
    live = LIVE[: len(given(name).q)]
    np.testing.assert_allclose(attended(name, "interpreted triton")[live], expected(name)[live], rtol=1e-5, atol=1e-5)
    assert CASES[name].newest == 2


def test_tiles_of_many_queries() -> None:
    """More queries than a program takes, of keys as prompts have them: the softmax's parts, against NumPy; no blocks, no part."""
    rng = np.random.default_rng(0)
    rows, queries, size, places = 3, 70, 48, 256
    q, k, v = (rng.normal(size=(rows, 1, n, size)).astype(np.float32) for n in (queries, places, places))
    at, first = rng.integers(140, places, (rows, queries)).astype(np.int32), np.asarray([0, 131, 5], np.int32)
    counts = np.asarray([2, 1, 0], np.int32)
    reads = Reads(*map(jnp.asarray, (at, np.asarray([2, 0, 1], np.int32), first, first // 128, counts)))
    fixed: Any = {"axis": -1, "window": 0, "cap": 0.0, "number": None, "interpret": True}
    run = jax.jit(partial(slot_kernels_gpu.read_blocks, **fixed))
    top, total, out = map(np.asarray, run(jnp.asarray(q), jnp.asarray(np.swapaxes(k, 2, 3)), jnp.asarray(v), reads))
    assert (total[2] == 0).all() and (out[2] == 0).all()
    for r, row in ((0, 2), (1, 0)):
        key = np.arange(places)
        scores = np.where((key >= first[r]) & (key <= at[r][:, None]), q[r, 0] @ k[row, 0].T, -np.inf)
        w = np.exp(scores - scores.max(axis=1, keepdims=True))
        np.testing.assert_allclose(top[r, 0], scores.max(axis=1), rtol=1e-5)
        np.testing.assert_allclose(total[r, 0], w.sum(axis=1), rtol=1e-4)
        np.testing.assert_allclose(out[r, 0], w @ v[row, 0], rtol=1e-4, atol=1e-4)


def test_widths_are_cut_into_powers_of_two() -> None:
    cut = [[size for _, size in slot_kernels_gpu._pieces(width)] for width in (16, 80, 96, 128, 192, 576)]
    assert cut == [[16], [64, 16], [64, 32], [128], [128, 64], [128] * 4 + [64]]
    assert slot_kernels_gpu._pieces(208) == [(0, 128), (128, 64), (192, 16)]


# later versions of jax ask which GPU, and say that this backend of theirs will go
@pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated:DeprecationWarning")
@pytest.mark.parametrize("how", LOWERED, ids=["scanned", "int8", "latent"])
def test_decoding_lowers_for_a_gpu(how: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel for the prompts and one for the own rows of each layer, or of all that are scanned."""
    choose, mesh = slot_kernels.choose, mesh_of()
    monkeypatch.setattr(slot_kernels, "choose", lambda name, **given: choose("pallas", **{**given, "platform": "gpu"}))
    with as_if_on(mesh, "NVIDIA A100"):
        text = decoding(mesh, platform="cuda", **how).as_text()
    assert text.count("@__gpu$xla.gpu.triton") == (2 if "layers" in how else 4)


def as_if_on(mesh: Any, kind: str) -> Any:
    if tuple(int(x) for x in jax.__version__.split(".")[:2]) < (0, 11):
        return contextlib.nullcontext()  # it takes the GPU for one of compute capability 9.0
    like, device = mesh.abstract_mesh, jax.sharding.AbstractDevice(kind, None, "gpu")
    mesh = jax.sharding.AbstractMesh(like.axis_sizes, like.axis_names, like.axis_types, abstract_device=device)
    return jax.sharding.use_abstract_mesh(mesh)


def test_the_kernel_runs_where_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    named = partial(slot_kernels.choose, "pallas", platform="gpu", dtype="bfloat16", size=64)
    assert named() == named(capability="8.0") == named(capability="12.0") == "triton"
    assert slot_kernels.choose("", platform="gpu", dtype="bfloat16", size=64, capability="9.0") == "xla"
    with pytest.raises(ValueError, match="it takes keys of a multiple of 16 numbers and these have 72: choose 'xla', or ''"):
        named(size=72)
    with pytest.raises(ValueError, match="works in float32 and was given float64"):
        named(dtype="float64")
    for old in ("7.5", "gfx942"):
        with pytest.raises(ValueError, match=f"of compute capability 8.0 or more and this one's is {old}: choose 'xla'"):
            named(capability=old)
    monkeypatch.setitem(sys.modules, "jax.experimental.pallas.triton", None)
    with pytest.raises(ValueError, match="needs jax.experimental.pallas.triton, which jax .* has not: choose 'xla'"):
        named()


def test_bytes_that_pallas_cannot_address_are_refused() -> None:
    """Of its offsets, that are counted in 32 bits with a sign until an array has more than 4 GiB."""
    slots, shape = 64, partial(jax.ShapeDtypeStruct, dtype=jnp.int32)
    reads = Reads(shape((slots, 2)), *(shape((slots,)) for _ in range(4)))
    run = partial(slot_kernels_gpu.read_blocks, axis=-2, window=0, cap=0.0, number=None, interpret=False)

    def parts(blocks: int, dtype: str) -> Any:
        kept = jax.ShapeDtypeStruct((slots, 8, blocks, 128, 128), dtype)
        if dtype == "int8":
            kept = Rounded(kept, jax.ShapeDtypeStruct((slots, 8, blocks, 1, 128), jnp.float32))
        return jax.eval_shape(run, jax.ShapeDtypeStruct((slots, 8, 2, 128), jnp.bfloat16), kept, kept, reads)

    assert parts(256, "int8")[2].shape == parts(520, "int8")[2].shape == parts(384, "bfloat16")[2].shape == (slots, 8, 2, 128)
    with pytest.raises(ValueError, match="cannot address 3221225472 bytes .* in eight bits, between 2 and 4 GiB on a device"):
        parts(384, "int8")
