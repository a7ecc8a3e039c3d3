"""The work of a step, counted from the model: floating-point operations, and bytes of memory that must be read or written.

Operations are those of matrix products, 2 a weight and token, and of attention's two products over the keys that a query may see.
Bytes are what no implementation can avoid: weights once a pass, keys and values, gradients and the optimiser's state; activations
are left out, so they are a bound from below. Neither depends on how a loop is compiled.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from jaxreason import sharding
from jaxreason.models import spec
from jaxreason.models.config import Architecture
from jaxreason.models.spec import ParamSpec, Specs
from jaxreason.pipelines.chips import Chip

NARROW = ("norm", "bias")
WHOLE = ("layers", "expert")  # axes that fsdp's gathering leaves split


class Weights(NamedTuple):
    """How many weights a token is multiplied with."""

    layers: float  # of the experts those that are chosen
    head: float


class Rows(NamedTuple):
    """Problems' rows: a prompt and `group` completions of `tokens` places each."""

    problems: int
    prompt: int
    group: int
    tokens: int

    @property
    def completion_tokens(self) -> int:
        return self.problems * self.group * self.tokens


def weights(specs: Specs, architecture: Architecture) -> Weights:
    """The matrices that a token meets; a tied head is the embedding once more, and looking up is no product."""
    a, layers, head = architecture, 0.0, 0.0
    for path, each in spec.leaves(specs):
        if path.startswith("layers") and not path.endswith(NARROW):
            layers += math.prod(each.shape) * (a.experts.chosen / a.experts.count if "/expert_" in path else 1.0)
        if path == "head" or (path == "embed" and a.tied and "head" not in specs):
            head += math.prod(each.shape)
    return Weights(layers, head)


def seen(before: int, tokens: int, *, window: int) -> int:
    """How many keys `tokens` queries see in all, each itself, those between and the `before` ones; of a window its last."""
    keys = before + 1 + np.arange(tokens, dtype=np.int64)
    return int(np.sum(np.minimum(keys, window) if window else keys))


def pair_flops(a: Architecture, before: int, tokens: int, *, folded: bool = False) -> float:
    """Attention's products of one row's queries, in all layers; `folded` is latent attention over the latents themselves."""
    wide = 2 * (a.latent.kv_rank + a.latent.rotated) if folded and a.latent.kv_rank else a.head_size + a.value_size
    pairs = sum(seen(before, tokens, window=a.window if a.windowed(layer) else 0) for layer in range(a.layers))
    return 2.0 * a.heads * wide * pairs


def forward(specs: Specs, a: Architecture, rows: Rows) -> float:
    """Operations of the log-probabilities of all completions: the prompt is computed once, the last tokens are fed to nobody."""
    w = weights(specs, a)
    fed = rows.problems * (rows.prompt + rows.group * (rows.tokens - 1))
    attention = pair_flops(a, 0, rows.prompt) + rows.group * pair_flops(a, rows.prompt, rows.tokens - 1)
    return 2 * w.layers * fed + 2 * w.head * rows.completion_tokens + rows.problems * attention


def backward(specs: Specs, a: Architecture, rows: Rows) -> float:
    """Two products for each of the forward pass."""
    return 2 * forward(specs, a, rows)


def repeated(specs: Specs, a: Architecture, rows: Rows, remat: str) -> float:
    """What the backward pass computes again: the layers as `remat` says, and the logits always."""
    head = 2 * weights(specs, a).head * rows.completion_tokens
    every = forward(specs, a, rows) - head
    attention = every - 2 * weights(specs, a).layers * rows.problems * (rows.prompt + rows.group * (rows.tokens - 1))
    return head + {"none": 0.0, "layer": every}.get(remat, attention)


def sampling(specs: Specs, a: Architecture, rows: Rows) -> tuple[float, float]:
    """Operations of reading the prompts, and of writing completions of rows.tokens tokens each."""
    w = weights(specs, a)
    read = rows.problems * (2 * w.layers * rows.prompt + pair_flops(a, 0, rows.prompt, folded=True))
    group = rows.problems * rows.group
    return read, 2 * (w.layers + w.head) * rows.completion_tokens + group * pair_flops(a, rows.prompt, rows.tokens, folded=True)


# ---- bytes, of one device


def weight_bytes(specs: Specs, mesh: Mapping[str, int], *, itemsize: float, touched: float = 1.0) -> float:
    """A device's weights as they are used, gathered over fsdp; of experts the share that is `touched`. Embeddings are not read."""

    def own(path: str, each: ParamSpec) -> float:
        axes = (sharding.RULES.get(axis, ()) if axis else () for axis in each.axes)
        parts = math.prod(mesh[name] for on in axes for name in on if name != "fsdp")
        return math.prod(each.shape) / parts * (touched if "/expert_" in path else 1.0)

    return itemsize * sum(own(path, each) for path, each in spec.leaves(specs) if path != "embed" or "head" not in specs)


def touched(a: Architecture, tokens: float) -> float:
    """The share of the experts that so many tokens choose, to be expected where each is as likely as another."""
    return 1 - (1 - a.experts.chosen / a.experts.count) ** tokens if a.experts.count else 1.0


def cache_bytes_a_token(a: Architecture, mesh: Mapping[str, int], *, kind: str) -> float:
    """Keys and values of one token in all layers, on a device that has a part of its heads."""
    if a.latent.kv_rank:
        numbers, heads = a.latent.kv_rank + a.latent.rotated, 1.0
    else:
        numbers, heads = 2 * a.head_size, a.kv_heads / min(mesh["tensor"], a.kv_heads)
    scales = 4 * (1 if a.latent.kv_rank else 2) if kind == "int8" else 0
    return a.layers * heads * (numbers * jnp.dtype(kind).itemsize + scales)


class Part(NamedTuple):
    """A part of a step, on one chip: what it computes, moves and sends, and the time that each takes at the chip's peak."""

    name: str
    flops: float
    hbm_bytes: float
    sent_bytes: float
    seconds: float
    bound: str  # what takes that time


def part(name: str, flops: float, hbm_bytes: float, sent_bytes: float, *, chip: Chip) -> Part:
    times = {
        "compute": flops / chip.flops,
        "memory": hbm_bytes / chip.hbm_bandwidth,
        "interconnect": sent_bytes / chip.links,
    }
    bound = max(times, key=lambda each: times[each])
    return Part(name, flops, hbm_bytes, sent_bytes, times[bound], bound)
