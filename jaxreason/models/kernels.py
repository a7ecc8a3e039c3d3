"""Attention over whole rows, by the name of its implementation: `xla`, `cudnn` (GPU) or `splash` (TPU, Pallas).

A row is `[prompt | completion 1 | ... | completion G]`, or N causal places when there are no completions. What a place may see
is a static mask, from the row's layout and the window, and'ed with equal segments; segment 0 is padding, and its output is zero.
The kernels are other people's: here are the mask, the padding to what a kernel takes, and the split over a mesh, whose
compiler cannot divide a kernel by itself. Deliberately absent: decoding with a cache, and splitting a row over devices.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from jaxreason import sharding
from jaxreason.models import attention

PLATFORM = {"xla": None, "cudnn": "gpu", "splash": "tpu"}  # where each implementation runs; None: anywhere
TILE = 128  # lanes of a TPU register: splash's blocks are multiples of it
BLOCKS = (128, 256, 384, 512)  # blocks of 1024 overflow TPU v4's VMEM when heads are 256 wide
STEP = 50_000  # a grid step's fixed time counted in scores: about 0.35 us of 1.5e11 scores a second; a guess, not measured


class Layout(NamedTuple):
    """The places of a row: a prompt, padded on the left, then `group` completions of `tokens` places each."""

    prompt_tokens: int
    group: int = 0
    tokens: int = 0

    @property
    def places(self) -> int:
        return self.prompt_tokens + self.group * self.tokens


def widest_of_cudnn(device: Any) -> int:
    """The widest heads that cuDNN takes there: 256 from Hopper on, 128 on older GPUs."""
    return 256 if float(getattr(device, "compute_capability", 0) or 0) >= 9 else 128


def choose(implementation: str, *, platform: str, softcap: float = 0.0, dtype: str = "bfloat16", fits: bool = True) -> str:
    """The implementation's name, with `auto` resolved: splash on TPU, cudnn on GPU, xla elsewhere and where those cannot.

    cuDNN has no soft-cap and takes 16-bit operands (called by name it casts to bfloat16), of heads that `fits` says are no wider
    than it takes; splash has no float64.
    """
    if implementation == "auto":
        if platform == "tpu" and dtype != "float64":
            return "splash"
        return "cudnn" if platform == "gpu" and fits and softcap == 0 and dtype in ("bfloat16", "float16") else "xla"
    given = f"config.model.numerics.attention is {implementation!r}"
    if implementation not in PLATFORM:
        raise ValueError(f"{given}, which is not known: expected auto, {', '.join(PLATFORM)}")
    needed = PLATFORM[implementation]
    if needed not in (None, platform):
        raise ValueError(f"{given}, which runs on {needed}, and this is {platform}: choose xla, or auto for the best there is")
    return implementation


def row_attention(
    q: Float[Array, "P N H C"],
    k: Float[Array, "P N K C"],
    v: Float[Array, "P N K Cv"],
    segments: Int[Array, "P N"],
    *,
    layout: Layout,
    scale: float,
    softcap: float = 0.0,
    window: int = 0,
    implementation: str,
    mesh: Mesh | None = None,
    interpret: bool = False,
) -> Float[Array, "P N H Cv"]:
    """softmax over allowed keys of cap(scale q k) times v, in q's type; cap(s) = softcap tanh(s / softcap) (arXiv:2408.00118, §2).

    softcap = 0 and window = 0 mean none. A query sees keys of its own segment only; places of segment 0 give zero and take no
    gradient. In rows with completions segments are 0 or 1, and 0 only before the prompt. Scores are at least float32. Query head h
    reads kv head h // (H/K). `interpret` runs splash anywhere, slowly.
    """
    _check(q.shape[1], layout, softcap=softcap, window=window)
    bind = partial(partial, layout=layout, scale=scale, window=window)
    if implementation == "xla":
        out = bind(_xla, softcap=softcap)(q, k, v, segments)
    elif implementation == "cudnn":
        if softcap:
            raise ValueError(f"cudnn attention has no softcap and {softcap} was given: choose xla, or splash on a TPU")
        out = _on_each_device(bind(_cudnn), mesh, q, k, v, segments)
    elif implementation == "splash":
        if q.dtype == jnp.float64:
            raise ValueError("splash attention works in float32 and was given float64: choose xla")
        block = _block(layout, window)
        out = _on_each_device(bind(_splash, softcap=softcap, block=block, interpret=interpret), mesh, q, k, v, segments)
    else:
        raise ValueError(f"attention {implementation!r} is not known: expected one of {', '.join(PLATFORM)} (see choose for auto)")
    # a place of padding sees padding, so that its softmax has a key; what it saw ends here, forward and backward
    return jnp.where((segments > 0)[..., None, None], out, jnp.zeros_like(out))


def _check(places: int, layout: Layout, *, softcap: float, window: int) -> None:
    if min(layout) < 0 or (layout.group > 0) != (layout.tokens > 0) or layout.places != places:
        raise ValueError(
            f"a row of {places} places does not fit prompt_tokens={layout.prompt_tokens} + group={layout.group} x "
            f"tokens={layout.tokens}: pass the layout that the row was built with"
        )
    if window < 0 or softcap < 0:
        raise ValueError(f"window={window}, softcap={softcap}: expected positive numbers, or 0 for none")


def allowed(layout: Layout, *, window: int) -> Bool[np.ndarray, "N N"]:
    """The static mask: which key (column) a query (row) may see. Within a window their distance in tokens is below it."""
    place = np.arange(layout.places)
    return _sees(place, *_reach(place, layout, window), place, layout.prompt_tokens)


def blocks(layout: Layout, *, window: int, block: int) -> Bool[np.ndarray, "n n"]:
    """Which blocks of queries x keys hold an allowed pair: splash skips the others. `block` is a multiple of 128."""
    return _coarsen(_tiles(layout, window), block // TILE)


def _reach(place: np.ndarray, layout: Layout, window: int) -> tuple[np.ndarray, np.ndarray]:
    """The first place that each may see of its own completion, and the first of the prompt. Places past the row continue it."""
    if layout.group:
        time = np.maximum(place - layout.prompt_tokens, 0) % layout.tokens
        later = place >= layout.prompt_tokens
        start, position = np.where(later, place - time, 0), np.where(later, layout.prompt_tokens + time, place)
    else:
        start, position = np.zeros_like(place), place
    if not window:
        return start, np.zeros_like(place)
    return np.maximum(start, place - window + 1), np.maximum(0, position - window + 1)


def _sees(place: Any, own: Any, prompt: Any, key: Any, prompt_tokens: int) -> Any:
    # in NumPy and in jax alike
    place, own, prompt, key = place[:, None], own[:, None], prompt[:, None], key[None]
    return (key <= place) & ((key >= own) | ((key < prompt_tokens) & (key >= prompt)))


def _visible(segments: jax.Array, layout: Layout, window: int) -> jax.Array:
    """The whole mask [P, N, N], made on the device. Every place sees itself, so no softmax is empty."""
    place = np.arange(segments.shape[1], dtype=np.int32)
    place, own, prompt = (jnp.asarray(x, jnp.int32) for x in (place, *_reach(place, layout, window)))
    return _sees(place, own, prompt, place, layout.prompt_tokens)[None] & (segments[:, :, None] == segments[:, None, :])


def _xla(
    q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array, *, layout: Layout, scale: float, softcap: float, window: int
) -> jax.Array:
    law = attention.Law(scale, softcap, window)
    prompt = segments[:, : layout.prompt_tokens]
    out = attention.part_attention(q, k[:, None], v[:, None], prompt, 0, group=layout.group, law=law)
    return out.astype(q.dtype)


def _pad(x: jax.Array, places: int, width: int) -> jax.Array:
    return jnp.pad(x, ((0, 0), (0, places - x.shape[1]), (0, 0), (0, width - x.shape[3])))


def _up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


def _cudnn(
    q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array, *, layout: Layout, scale: float, window: int
) -> jax.Array:
    """cuDNN's flash attention, which takes 16-bit operands: others are cast to bfloat16."""
    kind = q.dtype if q.dtype in (jnp.bfloat16, jnp.float16) else jnp.bfloat16
    attend = partial(_fused, layout=layout, scale=scale, window=window, backend="cudnn")
    return attend(q.astype(kind), k.astype(kind), v.astype(kind), segments).astype(q.dtype)


def _fused(
    q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array, *, layout: Layout, scale: float, window: int, backend: Any
) -> jax.Array:
    """jax.nn's attention, given rows in the form that its kernel skips work for: causal, with no mask.

    So every completion gets a row of its own, with a copy of its prompt, and padding goes to the end, where causal hides it.
    Rows without completions may be packed, and take a mask [P, 1, N, N] besides.
    """
    causal = partial(_causal, scale=scale, window=window, backend=backend)
    if not layout.group:
        return causal(q, k, v, segments)
    padding = jnp.sum(segments[:, : layout.prompt_tokens] == 0, axis=1, dtype=jnp.int32)
    padding = jnp.repeat(padding, layout.group)
    roll = jax.vmap(partial(jnp.roll, axis=0))
    q, k, v = (roll(_unshare(x, layout), -padding) for x in (q, k, v))
    return _share(roll(causal(q, k, v, None), padding), layout)


def _causal(
    q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array | None, *, scale: float, window: int, backend: Any
) -> jax.Array:
    """Causal rows, all real or of segments. cuDNN wants one width, a multiple of 8, and an even row where there is a mask."""
    places, width = _up(q.shape[1], 8), _up(max(q.shape[3], v.shape[3]), 8)
    mask, reach = None, (window - 1, 0) if window else None
    if segments is not None:  # the mask has the window: cuDNN does not take both
        segments = jnp.pad(segments, ((0, 0), (0, places - q.shape[1])))
        mask, reach = _visible(segments, Layout(places), window)[:, None], None
    q, k, wide = (_pad(x, places, width) for x in (q, k, v))
    attend = partial(jax.nn.dot_product_attention, scale=scale, is_causal=True, implementation=backend)
    out = attend(q, k, wide, mask=mask, local_window_size=reach)
    return out[:, : v.shape[1], :, : v.shape[3]]


def _unshare(x: jax.Array, layout: Layout) -> jax.Array:
    """[P, N, ...] -> [P G, Tp + T, ...]: a row for every completion."""
    prompt, rest = jnp.split(x, [layout.prompt_tokens], axis=1)
    prompt = jnp.broadcast_to(prompt[:, None], (len(x), layout.group, *prompt.shape[1:]))
    rest = rest.reshape(len(x), layout.group, layout.tokens, *x.shape[2:])
    return jnp.concatenate([prompt, rest], axis=2).reshape(len(x) * layout.group, -1, *x.shape[2:])


def _share(x: jax.Array, layout: Layout) -> jax.Array:
    """[P G, Tp + T, ...] -> [P, N, ...], the prompt's places from the first completion's row."""
    x = x.reshape(-1, layout.group, *x.shape[1:])
    rest = x[:, :, layout.prompt_tokens :]
    return jnp.concatenate([x[:, 0, : layout.prompt_tokens], rest.reshape(len(x), -1, *x.shape[3:])], axis=1)


def _splash(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    segments: jax.Array,
    *,
    layout: Layout,
    scale: float,
    softcap: float,
    window: int,
    block: int,
    interpret: bool,
) -> jax.Array:
    """The TPU's block-sparse flash attention, of heads of any width; v's may differ."""
    from jax.experimental.pallas.ops.tpu import splash_attention as splash  # here, as only a TPU needs it: 0.2 s of import

    places = _up(q.shape[1], block)
    names = ("q", "kv", "kv_compute", "q_dkv", "kv_dkv", "kv_dkv_compute", "q_dq", "kv_dq")
    sizes: dict[str, Any] = {f"block_{name}": block for name in names}
    kernel: Any = splash.make_splash_mha(
        splash.MultiHeadMask([_lazy_mask(places, layout, window)] * q.shape[2]),
        block_sizes=splash.BlockSizes(**sizes),
        head_shards=1,
        q_seq_shards=1,
        attn_logits_soft_cap=softcap or None,
        interpret=interpret,
    )
    segments = jnp.pad(segments.astype(jnp.int32), ((0, 0), (0, places - q.shape[1])))
    q = (q.astype(jnp.float32) * scale).astype(q.dtype)  # the kernel takes no scale; q is rounded once
    q, k, v = (jnp.swapaxes(_pad(x, places, x.shape[3]), 1, 2) for x in (q, k, v))
    out = jax.vmap(kernel)(q, k, v, splash.SegmentIds(segments, segments))
    return jnp.swapaxes(out, 1, 2)[:, : layout.places]


def _lazy_mask(places: int, layout: Layout, window: int) -> Any:
    """The static mask, a block at a time: the library would hash a dense one once for every head."""
    from jax.experimental.pallas.ops.tpu.splash_attention import Mask

    place = np.arange(places)
    own, prompt = _reach(place, layout, window)

    class RowMask(Mask):
        @property
        def shape(self) -> tuple[int, ...]:
            return places, places

        def __getitem__(self, idx: Any) -> np.ndarray:
            row, key = place[idx[0]], place[idx[1]]
            # `own` never falls along a row, so that most blocks of a long one are known to be empty by their corners
            if key[0] > row[-1] or (key[0] >= layout.prompt_tokens and key[-1] < own[row[0]]):
                return np.zeros((len(row), len(key)), bool)
            return _sees(row, own[row], prompt[row], key, layout.prompt_tokens)

    return RowMask()


def _tiles(layout: Layout, window: int) -> Any:
    """Which 128 x 128 tiles hold an allowed pair."""
    count = _up(layout.places, TILE) // TILE
    place, first = np.arange(count * TILE), np.arange(count) * TILE
    own, prompt = _reach(place, layout, window)

    def meets(low: np.ndarray, high: np.ndarray) -> np.ndarray:
        return np.maximum(low[:, None], first[None]) <= np.minimum(high[:, None], first[None] + TILE - 1)

    some = meets(own, place) | meets(prompt, np.minimum(place, layout.prompt_tokens - 1))
    return np.any(some.reshape(count, TILE, count), axis=1)


def _coarsen(tiles: np.ndarray, by: int) -> Any:
    count = -(-len(tiles) // by)
    tiles = np.pad(tiles, (0, count * by - len(tiles)))
    return np.any(tiles.reshape(count, by, count, by), axis=(1, 3))


def _block(layout: Layout, window: int) -> int:
    """The block size with the least work: small blocks skip more of the mask, large ones take fewer grid steps.

    Of the three passes (out, dq, and dk with dv) two have as many steps a row as the fullest row has blocks; the last, a column.
    """
    tiles = _tiles(layout, window)

    def work(block: int) -> int:
        some = _coarsen(tiles, block // TILE)
        steps = len(some) * (2 * some.sum(axis=1).max() + some.sum(axis=0).max())
        return 3 * int(some.sum()) * block**2 + STEP * int(steps)

    return min(BLOCKS, key=work)


def _on_each_device(kernel: Any, mesh: Mesh | None, q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array) -> jax.Array:
    """Runs a kernel on every device's own problems and heads; a row stays whole, also where the mesh splits its tokens."""
    if mesh is None or mesh.size == 1:
        return kernel(q, k, v, segments)
    problems, heads = sharding.RULES["problems"], sharding.RULES["heads"]
    shards, splits = (math.prod(mesh.shape[axis] for axis in axes) for axes in (problems, heads))
    if q.shape[0] % shards or q.shape[2] % splits:
        raise ValueError(
            f"{q.shape[0]} problems of {q.shape[2]} heads cannot be split over {shards} x {splits} devices: "
            "choose numbers that these divide, or a smaller mesh.tensor"
        )
    # fewer kv heads than devices: each device gets a copy of the one that its queries read
    copies = math.lcm(k.shape[2], splits) // k.shape[2]
    k, v = (jnp.repeat(x, copies, axis=2) if copies > 1 else x for x in (k, v))
    # an axis that no spec names costs an all-reduce of the gradients, even where it is one device long
    single = tuple(axis for axis in mesh.axis_names if mesh.shape[axis] == 1 and axis not in problems + heads)
    row = PartitionSpec(problems + single, None)
    whole = PartitionSpec(problems + single, None, heads, None)
    # check_vma: Pallas does not say over which axes its results vary
    split = jax.shard_map(kernel, mesh=mesh, in_specs=(whole, whole, whole, row), out_specs=whole, check_vma=False)
    return split(q, k, v, segments)
