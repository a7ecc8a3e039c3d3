"""An `Architecture` as a config.json in today's form, from which transformers and families.py make the same model."""

from __future__ import annotations

from jaxreason.models.config import Architecture, Rope
from jaxreason.models.families import BIASED, GEMMA, SUFFIX, WINDOW, Head, Json

CLASSES = {
    "qwen2": "Qwen2",
    "qwen3": "Qwen3",
    "qwen3_moe": "Qwen3Moe",
    "llama": "Llama",
    "mistral": "Mistral",
    "gemma2": "Gemma2",
    "gemma3_text": "Gemma3",
    "phi3": "Phi3",
    "olmo2": "Olmo2",
    "deepseek_v3": "DeepseekV3",
}
# keys that say in another form what `write` says, and that would go before it
OLDER = (
    "rope_scaling",
    "rope_theta",
    "rope_local_base_freq",
    "partial_rotary_factor",
    "original_max_position_embeddings",
    "sliding_window_pattern",
    "max_window_layers",
    "layer_types",
    "num_local_experts",
)


def write(architecture: Architecture) -> Json:
    """The config.json of an architecture, in today's form, without the tokenizer's ids, the head and the type."""
    a, family = architecture, architecture.family
    content: Json = {
        "model_type": family,
        "vocab_size": a.vocab_size,
        "hidden_size": a.hidden_size,
        "num_hidden_layers": a.layers,
        "num_attention_heads": a.heads,
        "num_key_value_heads": a.kv_heads,
        "head_dim": a.head_size,
        "intermediate_size": a.mlp_size,
        "max_position_embeddings": a.max_positions,
        "rms_norm_eps": a.norm_epsilon,
        "tie_word_embeddings": a.tied,
        "initializer_range": a.initializer_range,
        "attention_dropout": 0.0,
        "use_cache": True,
        "rope_parameters": _write_rope(a.rope),
    }
    content |= {"hidden_activation": "gelu_pytorch_tanh"} if family in GEMMA else {"hidden_act": "silu"}
    if family in BIASED:
        content["attention_bias"] = a.attention_bias
    if family in GEMMA:
        content["query_pre_attn_scalar"] = _whole(a.attention_scale**-2 if a.attention_scale else a.head_size)
        content["final_logit_softcapping"] = a.final_softcap or None
        content["attn_logit_softcapping"] = a.attention_softcap or None
    if family == "gemma3_text":
        content["rope_parameters"] = {"full_attention": _write_rope(a.rope), "sliding_attention": _write_rope(a.window_rope)}
    if family in WINDOW or family == "phi3":
        content["sliding_window"] = a.window or None
        if family.startswith("qwen"):
            content["use_sliding_window"] = a.window > 0
        if a.traits.windows == "any":
            content["layer_types"] = ["sliding_attention" if a.windowed(layer) else "full_attention" for layer in range(a.layers)]
    if family == "qwen3_moe":
        content |= _write_sparse(a)
    if family == "deepseek_v3":
        content |= _write_deepseek(a)
    return content


def _whole(x: float) -> int | float:
    return round(x) if abs(x - round(x)) < 1e-6 * max(1.0, x) else x


def _write_sparse(a: Architecture) -> Json:
    e = a.experts
    return {
        "num_experts": e.count,
        "num_experts_per_tok": e.chosen,
        "moe_intermediate_size": e.mlp_size,
        "norm_topk_prob": e.normalised,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [layer for layer in range(a.layers) if not a.sparse(layer)],
    }


def _write_deepseek(a: Architecture) -> Json:
    e, latent = a.experts, a.latent
    size = e.mlp_size or 1
    return {
        "n_routed_experts": e.count,
        "num_experts_per_tok": e.chosen,
        "moe_intermediate_size": e.mlp_size,
        "n_shared_experts": e.shared_mlp_size // size,
        "norm_topk_prob": e.normalised,
        "n_group": e.groups,
        "topk_group": e.chosen_groups,
        "routed_scaling_factor": e.scale,
        "first_k_dense_replace": sum(not a.sparse(layer) for layer in range(a.layers)),
        "kv_lora_rank": latent.kv_rank,
        "q_lora_rank": latent.q_rank or None,
        "qk_rope_head_dim": latent.rotated,
        "qk_nope_head_dim": a.head_size - latent.rotated,
        "v_head_dim": latent.value_size,
        "head_dim": latent.rotated,
        "rope_interleave": a.rope.interleaved,
        "attention_bias": False,
    }


def _write_rope(rope: Rope) -> Json:
    content: Json = {"rope_theta": rope.theta, "rope_type": rope.kind}
    if rope.fraction != 1:
        content["partial_rotary_factor"] = rope.fraction
    if rope.kind != "default":
        content["factor"] = rope.factor
    if rope.kind in ("llama3", "yarn"):
        content["original_max_position_embeddings"] = rope.original_positions
    if rope.kind == "llama3":
        content |= {"low_freq_factor": rope.low_factor, "high_freq_factor": rope.high_factor}
    if rope.kind == "yarn":
        content |= {"beta_fast": rope.beta_fast, "beta_slow": rope.beta_slow, "truncate": rope.truncate}
        given = {name: getattr(rope, name) for name in ("attention_factor", "mscale", "mscale_all_dim")}
        content |= {name: value for name, value in given.items() if value}
    return content


def write_head(family: str, head: Head) -> Json:
    """The class in transformers, and the labels, of which it keeps no number."""
    name = "Gemma3Text" if family == "gemma3_text" and head.kind != "lm" else CLASSES[family]
    content: Json = {"architectures": [name + SUFFIX[head.kind]]}
    if head.kind != "lm":
        labels = [f"LABEL_{i}" for i in range(head.labels)]
        content |= {"id2label": {str(i): x for i, x in enumerate(labels)}, "label2id": {x: i for i, x in enumerate(labels)}}
    return content
