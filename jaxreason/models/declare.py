"""Which parameters a decoder has: one declaration each, with its Hugging Face name, for every family.

Initial values, shardings, import and export all follow from it (spec.py). Layers of one kind are stacked.
"""

from __future__ import annotations

from jaxreason import sharding
from jaxreason.models.config import Architecture, Stack, stacks
from jaxreason.models.families import Head
from jaxreason.models.spec import ParamSpec, Specs, Transform, linear, table, vector

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
LANGUAGE = Head()


def declare(architecture: Architecture, head: Head = LANGUAGE) -> Specs:
    """The parameters of a decoder and its head: a matrix for logits where it is not the embedding's own, or for scores."""
    a, std = architecture, architecture.initializer_range
    specs = _body(a)
    if head.kind == "lm":
        if not a.tied:
            specs["head"] = ParamSpec((a.hidden_size, a.vocab_size), ("embed", "vocab"), "normal", std, HEAD, linear())
        return specs
    specs["head"] = ParamSpec((a.hidden_size, head.labels), ("embed", None), "normal", std, "score.weight", linear())
    if head.kind == "token":
        specs["head_bias"] = ParamSpec((head.labels,), (None,), "zeros", std, "score.bias", vector())
    return specs


def _body(architecture: Architecture) -> Specs:
    a = architecture
    std, neutral = a.initializer_range, "zeros" if a.traits.offset_norm else "ones"
    return {
        "embed": ParamSpec((a.vocab_size, a.hidden_size), ("vocab", "embed"), "normal", std, EMBEDDING, table()),
        **{stack.name: _stack(a, stack) for stack in stacks(a)},
        "final_norm": ParamSpec((a.hidden_size,), (None,), neutral, std, "model.norm.weight", vector()),
    }


class _Layers:
    """Declares parameters of a stack of layers."""

    def __init__(self, architecture: Architecture, stack: Stack) -> None:
        self.a, self.stack = architecture, stack

    def __call__(
        self, shape: tuple[int, ...], axes: sharding.Axes, name: str, *, init: str = "normal", hf: Transform | None = None
    ) -> ParamSpec:
        full = (self.stack.count, *shape), ("layers", *axes)
        return ParamSpec(*full, init, self.a.initializer_range, f"model.layers.{{layer}}.{name}", hf or linear(), self.stack.first)

    def norm(self, name: str, size: int = 0) -> ParamSpec:
        neutral = "zeros" if self.a.traits.offset_norm else "ones"
        return self((size or self.a.hidden_size,), (None,), name, init=neutral, hf=vector())


def _stack(a: Architecture, stack: Stack) -> Specs:
    layer = _Layers(a, stack)
    attention = _latent_attention(a, layer) if a.latent.kv_rank else _attention(a, layer)
    return {**_norms(a, layer), **attention, **(_sparse(a, layer) if stack.sparse else _dense(a, layer))}


def _norms(a: Architecture, layer: _Layers) -> Specs:
    both = a.traits.pre_norm and a.traits.post_norm
    specs: Specs = {}
    if a.traits.pre_norm:
        specs["attention_norm"] = layer.norm("input_layernorm.weight")
        specs["mlp_norm"] = layer.norm("pre_feedforward_layernorm.weight" if both else "post_attention_layernorm.weight")
    if a.traits.post_norm:
        specs["attention_post_norm"] = layer.norm("post_attention_layernorm.weight")
        specs["mlp_post_norm"] = layer.norm("post_feedforward_layernorm.weight")
    return specs


def _attention(a: Architecture, layer: _Layers) -> Specs:
    width, heads, kv, size = a.hidden_size, a.heads, a.kv_heads, a.head_size
    total, specs, start = (heads + 2 * kv) * size, {}, 0
    for name, count, axis in (("q", heads, "heads"), ("k", kv, "kv_heads"), ("v", kv, "kv_heads")):
        hf_name, hf = f"self_attn.{name}_proj", linear()
        if a.traits.fused:
            hf_name, hf = "self_attn.qkv_proj", linear(start=start, total=total)
        specs[name] = layer((width, count, size), ("embed", axis, None), f"{hf_name}.weight", hf=hf)
        if name in a.bias:
            specs[f"{name}_bias"] = layer((count, size), (axis, None), f"{hf_name}.bias", init="zeros", hf=vector())
        start += count * size
    specs["o"] = layer((heads, size, width), ("heads", None, "embed"), "self_attn.o_proj.weight", hf=linear(inputs=2))
    if "o" in a.bias:
        specs["o_bias"] = layer((width,), (None,), "self_attn.o_proj.bias", init="zeros", hf=vector())
    if a.traits.head_norm:
        wide = a.traits.head_norm == "width"
        specs["q_norm"] = layer.norm("self_attn.q_norm.weight", size * heads if wide else size)
        specs["k_norm"] = layer.norm("self_attn.k_norm.weight", size * kv if wide else size)
    return specs


def _latent_attention(a: Architecture, layer: _Layers) -> Specs:
    width, heads, size, latent = a.hidden_size, a.heads, a.head_size, a.latent
    specs: Specs = {}
    if latent.q_rank:
        specs["q_a"] = layer((width, latent.q_rank), ("embed", None), "self_attn.q_a_proj.weight")
        specs["q_a_norm"] = layer.norm("self_attn.q_a_layernorm.weight", latent.q_rank)
        specs["q_b"] = layer((latent.q_rank, heads, size), ("rank", "heads", None), "self_attn.q_b_proj.weight")
    else:
        specs["q"] = layer((width, heads, size), ("embed", "heads", None), "self_attn.q_proj.weight")
    kv, both = latent.kv_rank, size - latent.rotated + latent.value_size
    specs["kv_a"] = layer((width, kv + latent.rotated), ("embed", None), "self_attn.kv_a_proj_with_mqa.weight")
    specs["kv_a_norm"] = layer.norm("self_attn.kv_a_layernorm.weight", kv)
    specs["kv_b"] = layer((kv, heads, both), ("rank", "heads", None), "self_attn.kv_b_proj.weight")
    out = (heads, latent.value_size, width)
    specs["o"] = layer(out, ("heads", None, "embed"), "self_attn.o_proj.weight", hf=linear(inputs=2))
    return specs


def _dense(a: Architecture, layer: _Layers, size: int = 0, *, name: str = "mlp", prefix: str = "") -> Specs:
    width, size = a.hidden_size, size or a.mlp_size
    gate, up = linear(), linear()
    gate_name, up_name = f"{name}.gate_proj.weight", f"{name}.up_proj.weight"
    if a.traits.fused:
        gate_name = up_name = f"{name}.gate_up_proj.weight"
        gate, up = linear(total=2 * size), linear(start=size, total=2 * size)
    return {
        f"{prefix}gate": layer((width, size), ("embed", "mlp"), gate_name, hf=gate),
        f"{prefix}up": layer((width, size), ("embed", "mlp"), up_name, hf=up),
        f"{prefix}down": layer((size, width), ("mlp", "embed"), f"{name}.down_proj.weight"),
    }


def _sparse(a: Architecture, layer: _Layers) -> Specs:
    e, width = a.experts, a.hidden_size
    specs: Specs = {"router": layer((width, e.count), ("embed", None), "mlp.gate.weight")}
    if e.scoring == "sigmoid":
        # moved by a rule of its own in pre-training (arXiv:2412.19437, section 2.1.2): no gradient reaches it
        specs["router_bias"] = layer((e.count,), (None,), "mlp.gate.e_score_correction_bias", init="zeros", hf=vector())
    for name, shape, axes in (
        ("gate", (width, e.mlp_size), ("embed", "mlp")),
        ("up", (width, e.mlp_size), ("embed", "mlp")),
        ("down", (e.mlp_size, width), ("mlp", "embed")),
    ):
        hf_name = f"mlp.experts.{{expert}}.{name}_proj.weight"
        specs[f"expert_{name}"] = layer((e.count, *shape), ("expert", *axes), hf_name)
    if e.shared_mlp_size:
        specs |= _dense(a, layer, e.shared_mlp_size, name="mlp.shared_experts", prefix="shared_")
    return specs
