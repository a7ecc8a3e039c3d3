"""What a config.json says, as an `Architecture`; for every family, in today's form and in the older one.

Today `rope_parameters` holds the rotary base and its scaling, and `layer_types` each layer's attention; folders written
before have `rope_theta`, `rope_scaling` and a rule for the windows. Defaults of absent keys are those of transformers.
A setting that we do not compute is a ValueError: nothing is read and then ignored.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, NamedTuple

from jaxreason.models.config import FAMILIES, ROPES, Architecture, Experts, Latent, Rope, Sizes, check
from jaxreason.naming import nearest

Json = dict[str, Any]

GEMMA = ("gemma2", "gemma3_text")
KV_HEADS = {"qwen2": 32, "qwen3": 32, "mistral": 8, "gemma2": 4, "gemma3_text": 4, "qwen3_moe": 4}  # where the key is absent
HEAD_SIZE = {"qwen3": 128, "gemma2": 256, "gemma3_text": 256}
EPSILON = {"phi3": 1e-5, "olmo2": 1e-5}
WINDOW = {"mistral": 4096, "gemma2": 4096, "gemma3_text": 4096, "qwen2": 4096, "qwen3": 4096, "qwen3_moe": 4096}
BIASED = ("llama", "qwen3", "qwen3_moe", "olmo2", "gemma2", "gemma3_text")  # that have the key attention_bias
LETTERS = {"sliding_attention": "w", "full_attention": "f"}
# how the file calls what an Architecture has
KEYS = {
    "layers": "num_hidden_layers",
    "heads": "num_attention_heads",
    "kv_heads": "num_key_value_heads",
    "head_size": "head_dim",
    "mlp_size": "intermediate_size",
    "max_positions": "max_position_embeddings",
    "norm_epsilon": "rms_norm_eps",
    "experts.chosen": "num_experts_per_tok",
    "experts.groups": "n_group",
    "experts.mlp_size": "moe_intermediate_size",
    "latent.rotated": "qk_rope_head_dim",
}
SUFFIX = {"lm": "ForCausalLM", "sequence": "ForSequenceClassification", "token": "ForTokenClassification"}


class Head(NamedTuple):
    """What a model ends in."""

    kind: str = "lm"  # 'lm': logits | 'sequence': scores at a row's last token | 'token': scores at every token
    labels: int = 1  # scores of each; not of 'lm'


class Config(NamedTuple):
    """A config.json, and the file that an error names."""

    content: Json
    file: Path

    def number(self, key: str, default: Any, kind: type, *, where: Json | None = None) -> Any:
        """The value of a key; without a default it must be there."""
        there = self.content if where is None else where
        value = there.get(key)
        value = default if value is None else value
        whole = isinstance(value, int) and not isinstance(value, bool)
        if kind is float and (whole or isinstance(value, float)):
            return kind(value)
        if type(value) is not kind:
            expected = {int: "an integer", float: "a number", bool: "true or false"}[kind]
            found = f"no {key}" if value is None else f"{key} {value!r}"
            raise ValueError(f"{self.file} has {found}: expected {expected}")
        return value

    def several(self, key: str, kind: type, *, where: Json | None = None) -> Any:
        """A list or an object; an absent one is empty."""
        value = (self.content if where is None else where).get(key)
        if not isinstance(value, kind | None):
            raise ValueError(f"{self.file} has {key} {value!r}: expected {'a list' if kind is list else 'an object'}")
        return value or kind()

    def positive(self, key: str, default: Any, kind: type) -> Any:
        """A number above 0."""
        value = self.number(key, default, kind)
        if not value > 0:
            raise ValueError(f"{self.file} has {key} {value!r}: expected more than 0")
        return value

    def only(self, key: str, expected: Any, *, default: Any = None) -> None:
        """A ValueError where a setting is other than the one that is computed."""
        found = self.content.get(key)
        found = (expected if default is None else default) if found is None else found
        if found != expected:
            supported = "none" if expected is None else repr(expected)
            raise ValueError(f"{self.file} has {key} {found!r}, and supported is {supported}: give another checkpoint")


def read(content: Json, file: Path) -> Architecture:
    """The architecture that a config.json states."""
    config, family = Config(content, file), content.get("model_type")
    if not isinstance(family, str) or family not in FAMILIES:
        raise ValueError(
            f"{file} has model_type {family!r}, and supported are {', '.join(sorted(FAMILIES))}: give one of their checkpoints"
        )
    config.only("quantization_config", None)
    gelu = "gelu_pytorch_tanh"
    config.only("hidden_activation" if family in GEMMA else "hidden_act", gelu if family in GEMMA else "silu")
    config.only("mlp_bias", False)
    config.only("use_bidirectional_attention", False)
    config.only("is_causal", True)
    heads, width = config.number("num_attention_heads", None, int), config.number("hidden_size", None, int)
    layers = config.number("num_hidden_layers", None, int)
    kv_heads = heads if "num_key_value_heads" in content else KV_HEADS.get(family, heads)
    rope, window_rope = _ropes(config, family)
    window, attention_layers = _windows(config, family, layers)
    latent, head_size = Latent(), config.number("head_dim", HEAD_SIZE.get(family, width // max(1, heads)), int)
    if family == "deepseek_v3":
        latent, head_size = _latent(config)
    architecture = Architecture(
        family=family,
        vocab_size=config.number("vocab_size", None, int),
        hidden_size=width,
        layers=layers,
        heads=heads,
        kv_heads=config.number("num_key_value_heads", kv_heads, int),
        head_size=head_size,
        mlp_size=config.number("intermediate_size", None, int),
        max_positions=config.number("max_position_embeddings", None, int),
        norm_epsilon=config.number("rms_norm_eps", EPSILON.get(family, 1e-6), float),
        tied=config.number("tie_word_embeddings", family in GEMMA, bool),
        initializer_range=config.number("initializer_range", 0.02, float),
        attention_bias=family in BIASED and config.number("attention_bias", False, bool),
        attention_scale=config.positive("query_pre_attn_scalar", 256.0, float) ** -0.5 if family in GEMMA else 0.0,
        attention_softcap=_softcap(config, "attn_logit_softcapping", 50.0) if family == "gemma2" else 0.0,
        final_softcap=_softcap(config, "final_logit_softcapping", 30.0) if family in GEMMA else 0.0,
        window=window,
        attention_layers=attention_layers,
        rope=rope,
        window_rope=window_rope,
        experts=_experts(config, family, layers),
        latent=latent,
    )
    _check(architecture, file)
    return architecture


def _check(architecture: Architecture, file: Path) -> None:
    """A ValueError where the sizes contradict each other, under the file's own keys."""
    if file.suffix != ".json":
        return check(architecture, key=str(file))
    try:
        check(architecture, key="architecture")
    except ValueError as error:
        text = re.sub(r"\barchitecture\.([a-z_]+(\.[a-z_]+)?)", lambda key: KEYS.get(key[1], key[0]), str(error))
        raise ValueError(f"{file}: {text}") from None


def of_sizes(sizes: Sizes) -> Architecture:
    """The architecture of these sizes, with the family's defaults for the rest."""
    if sizes.family not in FAMILIES:
        hint = nearest(sizes.family, [*FAMILIES])
        raise ValueError(f"config.model.architecture.family is '{sizes.family}', which does not exist: {hint}")
    content: Json = {
        "model_type": sizes.family,
        "vocab_size": sizes.vocab_size,
        "hidden_size": sizes.hidden_size,
        "num_hidden_layers": sizes.layers,
        "num_attention_heads": sizes.heads,
        "num_key_value_heads": sizes.kv_heads,
        "head_dim": sizes.head_size,
        "intermediate_size": sizes.mlp_size,
        "max_position_embeddings": sizes.max_positions,
        "rope_theta": sizes.rope_theta,
        "rms_norm_eps": sizes.norm_epsilon,
        "tie_word_embeddings": sizes.tied,
        "initializer_range": sizes.initializer_range,
    }
    return read(content, Path("config.model.architecture"))


def _softcap(config: Config, key: str, default: float) -> float:
    """Null is none; an absent key is Gemma 2's default, and none in Gemma 3."""
    if config.content.get("model_type") == "gemma3_text" or key in config.content:
        default = 0.0
    return config.number(key, default, float)


def read_head(content: Json, file: Path) -> Head:
    """The head that `architectures` names; where it names none, the language model's."""
    config = Config(content, file)
    name = next(iter(config.several("architectures", list) or [SUFFIX["lm"]]))
    kinds = [kind for kind, suffix in SUFFIX.items() if str(name).endswith(suffix)]
    if not kinds:
        raise ValueError(f"{file} has architectures [{name!r}], and supported are those that end in {', '.join(SUFFIX.values())}")
    labels = config.several("id2label", dict)  # transformers leaves two labels out
    return Head(kinds[0], 1) if kinds[0] == "lm" else Head(kinds[0], len(labels) or config.number("num_labels", 2, int))


# ---- rotary positions


def _ropes(config: Config, family: str) -> tuple[Rope, Rope]:
    """Of full and of windowed layers: they differ in Gemma 3 alone."""
    old, today = config.several("rope_scaling", dict), config.several("rope_parameters", dict)
    if family != "gemma3_text":
        return _rope(config, family, old or today, theta=10_000.0), Rope()
    full = config.several("full_attention", dict, where=today) | old
    local = config.several("sliding_attention", dict, where=today)
    return (
        _rope(config, family, full, theta=1_000_000.0),
        _rope(config, family, local, theta=10_000.0, key="rope_local_base_freq"),
    )


def _rope(config: Config, family: str, given: Json, *, theta: float, key: str = "rope_theta") -> Rope:
    kind = given.get("rope_type", given.get("type", "default"))
    there = [each for each in ROPES if family != "phi3" or each == "default"]
    if kind not in there:
        raise ValueError(f"{config.file} has rope_type {kind!r}, and supported are {', '.join(there)}: give another checkpoint")
    nested = [name for name, value in given.items() if isinstance(value, dict)]
    if nested:
        raise ValueError(
            f"{config.file} has rope_parameters of {nested[0]!r} alone, and layers of {family} are rotated alike: "
            "give one set of them"
        )
    base = config.number("rope_theta", config.number(key, theta, float), float, where=given)
    fraction = config.number("partial_rotary_factor", config.number("partial_rotary_factor", 1.0, float), float, where=given)
    rope: Json = {"theta": base, "kind": kind, "fraction": fraction}
    if family == "deepseek_v3":
        rope["interleaved"] = config.number("rope_interleave", "rope_interleave" not in config.content, bool)
        if kind in ("linear", "llama3") and config.number("mscale_all_dim", 0.0, float, where=given):
            raise ValueError(f"{config.file} has mscale_all_dim with rope_type {kind!r}, and supported is 'yarn': give another one")
    if kind == "default":
        return Rope(**rope)
    if kind == "linear":
        return Rope(**rope, factor=config.number("factor", None, float, where=given))
    longest = config.number("max_position_embeddings", None, int)
    original = config.number("original_max_position_embeddings", longest, int, where=given)
    if family != "gemma3_text":  # the one outside goes first
        original = config.number("original_max_position_embeddings", original, int)
    if kind == "llama3":
        names = {"factor": "factor", "low_factor": "low_freq_factor", "high_factor": "high_freq_factor"}
        return Rope(
            **rope, original_positions=original, **{k: config.number(v, None, float, where=given) for k, v in names.items()}
        )
    defaults = {"factor": longest / max(1, original), "beta_fast": 32.0, "beta_slow": 1.0}
    defaults |= {"attention_factor": 0.0, "mscale": 0.0, "mscale_all_dim": 0.0}
    yarn = {name: config.number(name, default, float, where=given) for name, default in defaults.items()}
    return Rope(**rope, original_positions=original, **yarn, truncate=config.number("truncate", True, bool, where=given))


# ---- windows


def _windows(config: Config, family: str, layers: int) -> tuple[int, str]:
    """The window, and a letter for each layer; (0, 'w') where no layer has one."""
    content = config.content
    none = (0, "w")
    if family not in WINDOW and family != "phi3":
        return none
    if family.startswith("qwen") and not config.number("use_sliding_window", False, bool):
        return none
    absent = "sliding_window" not in content and family != "phi3"
    window = WINDOW[family] if absent else content["sliding_window"] if "sliding_window" in content else None
    if window is None:
        return none
    window = config.positive("sliding_window", window, int)
    types = [] if family in ("qwen3_moe", "phi3") else config.several("layer_types", list)  # these two have no use for them
    if types:
        unknown = [each for each in types if each not in LETTERS]
        if unknown or len(types) != layers:
            what = f"has layer_types with {unknown[0]!r}" if unknown else f"has {len(types)} layer_types for {layers} layers"
            raise ValueError(f"{config.file} {what}: expected {' or '.join(LETTERS)} for each layer")
        letters = "".join(LETTERS[each] for each in types)
    elif family in ("qwen2", "qwen3"):
        first = config.number("max_window_layers", 28, int)
        letters = "".join("w" if i >= first else "f" for i in range(layers))
    elif family in GEMMA:
        every = 2 if family == "gemma2" else config.positive("sliding_window_pattern", 6, int)
        letters = "".join("w" if (i + 1) % every else "f" for i in range(layers))
    else:
        letters = "w"
    return (window, _period(letters)) if "w" in letters else none


def _period(letters: str) -> str:
    """The shortest word whose repetition is this one."""
    sizes = (n for n in range(1, len(letters) + 1) if all(c == letters[i % n] for i, c in enumerate(letters)))
    return letters[: next(sizes, 0)]


# ---- experts and latent attention


def _experts(config: Config, family: str, layers: int) -> Experts:
    if family == "qwen3_moe":
        count = config.number("num_experts", config.number("num_local_experts", 128, int), int)
        every, dense = config.positive("decoder_sparse_step", 1, int), config.several("mlp_only_layers", list)
        sparse = "".join("d" if i in dense or (i + 1) % every else "s" for i in range(layers))
        return Experts(
            count=count if "s" in sparse else 0,
            chosen=config.number("num_experts_per_tok", 8, int),
            mlp_size=config.number("moe_intermediate_size", 768, int),
            normalised=config.number("norm_topk_prob", False, bool),
            layers=_period(sparse) if "s" in sparse else "s",
        )
    if family == "deepseek_v3":
        config.only("scoring_func", "sigmoid")
        config.only("topk_method", "noaux_tc")
        config.only("moe_layer_freq", 1)
        dense = min(layers, config.number("first_k_dense_replace", 3, int))
        size = config.number("moe_intermediate_size", 2048, int)
        sparse = "d" * dense + "s" * (layers - dense)
        return Experts(
            count=config.number("n_routed_experts", 256, int) if dense < layers else 0,
            chosen=config.number("num_experts_per_tok", 8, int),
            mlp_size=size,
            shared_mlp_size=size * config.number("n_shared_experts", 1, int),
            scoring="sigmoid",
            normalised=config.number("norm_topk_prob", True, bool),
            groups=config.number("n_group", 8, int),
            chosen_groups=config.number("topk_group", 4, int),
            scale=config.number("routed_scaling_factor", 2.5, float),
            layers=_period(sparse) if dense < layers else "s",
        )
    return Experts()


def _latent(config: Config) -> tuple[Latent, int]:
    """Latent attention, and the size of a head's key."""
    config.only("attention_bias", False)
    rotated = config.number("qk_rope_head_dim", 64, int)
    null = "q_lora_rank" in config.content and config.content["q_lora_rank"] is None
    latent = Latent(
        kv_rank=config.number("kv_lora_rank", 512, int),
        q_rank=0 if null else config.number("q_lora_rank", 1536, int),
        rotated=rotated,
        value_size=config.number("v_head_dim", 128, int),
    )
    return latent, config.number("qk_nope_head_dim", 128, int) + rotated
