"""What a decoder is (`Architecture`) and how it is computed (`Numerics`)."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import NamedTuple

from jaxreason.naming import nearest


class Traits(NamedTuple):
    """What the decoders of a family have in common, whatever their sizes."""

    pre_norm: bool = True  # a norm before each of attention and MLP
    post_norm: bool = False  # a norm of what each adds to the residual stream
    offset_norm: bool = False  # a norm's scale is stored as its difference from 1
    head_norm: str = ""  # of queries and keys: '' | 'head' (each head alone) | 'width' (all heads together)
    activation: str = "silu"  # 'silu' | 'gelu_tanh'
    scaled_embedding: bool = False  # embeddings times sqrt(hidden_size)
    bias: str = ""  # projections that always have one, of 'qkvo'; config's attention_bias adds all four
    fused: bool = False  # q, k and v, and gate and up, are one tensor each in a checkpoint
    windows: str = ""  # layers that may be windowed: '' none | 'all' all or none | 'any'
    experts: str = ""  # '' none | 'any' layer | 'last' layers, all after the first sparse one


GEMMA = Traits(post_norm=True, offset_norm=True, activation="gelu_tanh", scaled_embedding=True, windows="any")
FAMILIES: dict[str, Traits] = {
    "qwen2": Traits(bias="qkv", windows="any"),
    "qwen3": Traits(head_norm="head", windows="any"),
    "qwen3_moe": Traits(head_norm="head", windows="all", experts="any"),
    "llama": Traits(),
    "mistral": Traits(windows="all"),
    "gemma2": GEMMA,
    "gemma3_text": GEMMA._replace(head_norm="head"),
    "phi3": Traits(fused=True, windows="all"),
    "olmo2": Traits(pre_norm=False, post_norm=True, head_norm="width"),
    "deepseek_v3": Traits(experts="last"),
}
ROPES = ("default", "linear", "llama3", "yarn")


@dataclass(frozen=True)
class Rope:
    """Rotary positions: the base, and how it is stretched for contexts longer than the trained ones (see rope.py)."""

    theta: float = 10_000.0
    kind: str = "default"  # 'default' | 'linear' | 'llama3' | 'yarn'
    factor: float = 1.0  # stretched by this; not in 'default'
    original_positions: int = 0  # the context before it was stretched; 'llama3' and 'yarn'
    low_factor: float = 1.0  # 'llama3'
    high_factor: float = 4.0  # 'llama3'
    beta_fast: float = 32.0  # 'yarn'
    beta_slow: float = 1.0  # 'yarn'
    attention_factor: float = 0.0  # 'yarn'; 0: derived from the factor
    mscale: float = 0.0  # 'yarn'
    mscale_all_dim: float = 0.0  # 'yarn'
    truncate: bool = True  # 'yarn': whole dimensions at the ends of its ramp
    fraction: float = 1.0  # of each head that is rotated, its first part; less than 1 in phi3 alone
    interleaved: bool = False  # pairs are neighbours, not half a head apart


@dataclass(frozen=True)
class Experts:
    """A sparse MLP: each token chooses a few of many experts (see experts.py). `layers` says which layers have one."""

    count: int = 0  # routed experts; 0: a dense decoder
    chosen: int = 0  # of them by each token
    mlp_size: int = 0  # of one routed expert
    shared_mlp_size: int = 0  # of the expert that every token has; 0: none
    scoring: str = "softmax"  # 'softmax' (Qwen3-MoE) | 'sigmoid' (DeepSeek-V3)
    normalised: bool = True  # the chosen experts' weights sum to `scale`
    groups: int = 1  # of experts, of which a token first chooses some
    chosen_groups: int = 1
    scale: float = 1.0  # of the routed experts' sum
    layers: str = "s"  # a letter a layer, repeated: 's' sparse, 'd' dense


@dataclass(frozen=True)
class Latent:
    """Multi-head latent attention (arXiv:2405.04434, section 2.1): keys and values are read from one small vector a token."""

    kv_rank: int = 0  # width of that vector; 0: ordinary attention
    q_rank: int = 0  # of the queries' bottleneck; 0: none
    rotated: int = 0  # entries of each head's key that carry the position, shared by all heads
    value_size: int = 0  # of each head; its key has head_size, `rotated` included


@dataclass(frozen=True)
class Sizes:
    """Family and sizes of a decoder with random weights; all else is as the family's config.json has it by default."""

    family: str = "qwen2"
    vocab_size: int = 64
    hidden_size: int = 128
    layers: int = 2
    heads: int = 4
    kv_heads: int = 2
    head_size: int = 32
    mlp_size: int = 384
    max_positions: int = 512  # context length, tokens
    rope_theta: float = 10_000.0
    norm_epsilon: float = 1e-6
    tied: bool = True  # the head is the embedding, transposed
    initializer_range: float = 0.02


@dataclass(frozen=True)
class Architecture:
    """All that defines a decoder's function: what a config.json says."""

    family: str = "qwen2"
    vocab_size: int = 64
    hidden_size: int = 128
    layers: int = 2
    heads: int = 4
    kv_heads: int = 2
    head_size: int = 32
    mlp_size: int = 384
    max_positions: int = 512  # context length, tokens
    norm_epsilon: float = 1e-6
    tied: bool = True  # the head is the embedding, transposed
    initializer_range: float = 0.02
    attention_bias: bool = False  # on q, k, v and o; qwen2 always has those of q, k and v
    attention_scale: float = 0.0  # of queries; 0: 1 / sqrt(head_size)
    attention_softcap: float = 0.0  # scores become c tanh(score / c); 0: they do not
    final_softcap: float = 0.0  # the same of logits
    window: int = 0  # tokens that a windowed layer looks back on, itself included; 0: no such layers
    attention_layers: str = "w"  # a letter a layer, repeated: 'w' windowed (where there is a window), 'f' full
    rope: Rope = field(default_factory=Rope)
    window_rope: Rope = field(default_factory=Rope)  # of windowed layers; read in gemma3_text alone
    experts: Experts = field(default_factory=Experts)
    latent: Latent = field(default_factory=Latent)

    @property
    def traits(self) -> Traits:
        return FAMILIES[self.family]

    @property
    def bias(self) -> str:
        """Which of the projections q, k, v, o have a bias."""
        return "qkvo" if self.attention_bias else self.traits.bias

    @property
    def value_size(self) -> int:
        """Of each head."""
        return self.latent.value_size or self.head_size

    def windowed(self, layer: int) -> bool:
        return self.window > 0 and self.attention_layers[layer % len(self.attention_layers)] == "w"

    def sparse(self, layer: int) -> bool:
        return self.experts.count > 0 and self.experts.layers[layer % len(self.experts.layers)] == "s"


class Stack(NamedTuple):
    """Consecutive layers with the same parameters' shapes, stored with a leading axis and scanned."""

    name: str
    first: int
    count: int
    sparse: bool


def stacks(architecture: Architecture) -> tuple[Stack, ...]:
    """The runs of equal layers: one in most decoders, `layers`; `layers0`, `layers1`, ... where dense and sparse ones mix."""
    a = architecture
    starts = [i for i in range(a.layers) if i == 0 or a.sparse(i) != a.sparse(i - 1)]
    ends = [*starts[1:], a.layers]
    single = len(starts) == 1
    return tuple(
        Stack("layers" if single else f"layers{number}", start, end - start, a.sparse(start))
        for number, (start, end) in enumerate(zip(starts, ends, strict=True))
    )


REMAT = ("none", "layer", "products", "attention")
ATTENTION = ("auto", "xla", "cudnn", "splash")


@dataclass(frozen=True)
class Numerics:
    """How the decoder is computed: the same function, other costs."""

    param_dtype: str = (
        "float32"  # float32 | bfloat16 (with float32 master weights in the optimiser) | float64 (with jax_enable_x64)
    )
    matmul_dtype: str = "float32"  # operands of the large products; their results are float32, or float64 with it
    activation_dtype: str = ""  # of the residual stream: '' is float32, or float64 with it
    head_dtype: str = ""  # operands of the product with the vocabulary: '' is float32, or float64 with it
    attention: str = "auto"  # 'xla' | 'cudnn' (GPU) | 'splash' (TPU) | 'auto': the platform's, in training
    remat: str = "layer"  # what the backward pass recomputes: 'none' | 'layer' | 'products' (all but them) | 'attention' (it alone)
    logits_chunk_tokens: int = 1024  # tokens whose logits exist at once in training, on each device
    sampling_weights: str = ""  # 'int8': a copy of the weights, rounded channel by channel, samples; '': the weights themselves
    sampling_cache: str = (
        ""  # keys and values: 'int8', each rounded by itself | 'bfloat16' | matmul_dtype; '' is that, on GPUs and TPUs bfloat16
    )
    sampling_attention: str = ""  # over what is kept: 'xla' | 'pallas' (TPU; GPU, never run yet); '': 'pallas' on TPUs, else 'xla'

    @property
    def activation(self) -> str:
        return self.activation_dtype or ("float64" if self.param_dtype == "float64" else "float32")

    @property
    def head(self) -> str:
        return self.head_dtype or ("float64" if self.param_dtype == "float64" else "float32")


KEY = "config.model.architecture"


def check(architecture: Architecture, *, key: str = KEY) -> None:
    """A ValueError where the sizes contradict each other; it says under which key they are."""
    a = architecture
    if a.family not in FAMILIES:
        raise ValueError(f"{key}.family is '{a.family}', which does not exist: {nearest(a.family, [*FAMILIES])}")
    for name in ("vocab_size", "hidden_size", "layers", "heads", "kv_heads", "head_size", "mlp_size", "max_positions"):
        if getattr(a, name) < 1:
            raise ValueError(f"{key}.{name} is {getattr(a, name)}: expected a positive number")
    for name in ("norm_epsilon", "initializer_range"):
        if not getattr(a, name) > 0:
            raise ValueError(f"{key}.{name} is {getattr(a, name)}: expected more than 0")
    for name in ("attention_scale", "attention_softcap", "final_softcap", "window"):
        if getattr(a, name) < 0:
            raise ValueError(f"{key}.{name} is {getattr(a, name)}: expected 0 or more")
    if a.heads % a.kv_heads:
        raise ValueError(f"{key}.kv_heads is {a.kv_heads}, which does not divide heads = {a.heads}: choose a divisor of {a.heads}")
    for name, letters, value in (("attention_layers", "wf", a.attention_layers), ("experts.layers", "sd", a.experts.layers)):
        if not value or set(value) - set(letters):
            raise ValueError(f"{key}.{name} is '{value}': expected a word of the letters {letters[0]} and {letters[1]}")
    _check_family(a, key=key)
    _check_rope(a.rope, a, key=f"{key}.rope")
    _check_rope(a.window_rope, a, key=f"{key}.window_rope")
    _check_experts(a.experts, key=key)
    _check_latent(a, key=key)


def _check_family(a: Architecture, *, key: str) -> None:
    """What the family's checkpoints cannot say is refused: the trained model could not be exported."""
    windowed = {a.windowed(layer) for layer in range(a.layers)}
    if a.window and (not a.traits.windows or (a.traits.windows == "all" and windowed != {True})):
        expected = "'w', all layers" if a.traits.windows else "window = 0"
        raise ValueError(
            f"{key}.window is {a.window} with attention_layers '{a.attention_layers}' in family '{a.family}': expected {expected}"
        )
    letters = "".join("s" if a.sparse(layer) else "d" for layer in range(a.layers))
    if a.experts.count and (not a.traits.experts or (a.traits.experts == "last" and "sd" in letters)):
        expected = "dense layers before sparse ones only" if a.traits.experts else "count = 0"
        raise ValueError(
            f"{key}.experts has count = {a.experts.count} and layers '{a.experts.layers}' in family '{a.family}': "
            f"expected {expected}"
        )


def _check_rope(rope: Rope, a: Architecture, *, key: str) -> None:
    if rope.kind not in ROPES:
        raise ValueError(f"{key}.kind is '{rope.kind}', which does not exist: {nearest(rope.kind, ROPES)}")
    if not rope.theta > 0:
        raise ValueError(f"{key}_theta is {rope.theta}: expected more than 0")
    for name in ("factor", "low_factor", "high_factor", "beta_fast", "beta_slow"):
        if not getattr(rope, name) > 0:
            raise ValueError(f"{key}.{name} is {getattr(rope, name)}: expected more than 0")
    if not 0 < rope.fraction <= 1:
        raise ValueError(f"{key}.fraction is {rope.fraction}: expected more than 0, and at most 1")
    if rope.fraction != 1 and a.family != "phi3":  # transformers leaves partial_rotary_factor unread elsewhere, or fails
        raise ValueError(
            f"{key}.fraction (partial_rotary_factor) is {rope.fraction} in family '{a.family}': expected 1, as only phi3 rotates a "
            "part of each head"
        )
    if rope.kind in ("llama3", "yarn") and rope.original_positions < 1:
        raise ValueError(
            f"{key}.original_positions is {rope.original_positions}: '{rope.kind}' needs the context before it was stretched"
        )
    if rope.kind == "yarn" and not rope.theta > 1:
        raise ValueError(f"{key}_theta is {rope.theta}: expected more than 1, as 'yarn' takes its logarithm")
    if rope.kind == "llama3" and not rope.high_factor > rope.low_factor:
        raise ValueError(f"{key}.high_factor is {rope.high_factor}: expected more than low_factor = {rope.low_factor}")
    size = a.latent.rotated if a.latent.kv_rank else math.floor(a.head_size * rope.fraction)
    if size < 2 or size % 2:
        which = "latent.rotated" if a.latent.kv_rank else "head_size" if rope.fraction == 1 else "rope.fraction x head_size"
        raise ValueError(f"{key.rpartition('.')[0]}.{which} is {size}: expected an even number, which rotary positions need")


def _check_experts(e: Experts, *, key: str) -> None:
    if not e.count:
        return
    if e.scoring not in ("softmax", "sigmoid"):
        raise ValueError(
            f"{key}.experts.scoring is '{e.scoring}', which does not exist: {nearest(e.scoring, ('softmax', 'sigmoid'))}"
        )
    if not 1 <= e.chosen <= e.count:
        raise ValueError(f"{key}.experts.chosen is {e.chosen}: expected 1 to experts.count = {e.count}")
    if e.mlp_size < 1 or e.shared_mlp_size < 0:
        raise ValueError(
            f"{key}.experts.mlp_size is {e.mlp_size} and shared_mlp_size {e.shared_mlp_size}: expected 1 or more and 0 or more"
        )
    if e.groups < 1 or e.count % e.groups or not 1 <= e.chosen_groups <= e.groups:
        raise ValueError(
            f"{key}.experts has count = {e.count}, groups = {e.groups} and chosen_groups = {e.chosen_groups}: "
            "expected a number of groups that divides count, and at most all of them chosen"
        )
    if e.groups > 1 and e.count == e.groups:
        raise ValueError(
            f"{key}.experts.groups is {e.groups}: a group's score is that of its two best experts, so give each two or more"
        )
    if e.chosen > e.count // e.groups * e.chosen_groups:
        raise ValueError(
            f"{key}.experts.chosen is {e.chosen}, and {e.chosen_groups} of {e.groups} groups hold "
            f"{e.count // e.groups * e.chosen_groups} of {e.count} experts: choose fewer experts or more groups"
        )


def _check_latent(a: Architecture, *, key: str) -> None:
    if (a.latent.kv_rank > 0) != (a.family == "deepseek_v3"):
        raise ValueError(
            f"{key}.latent.kv_rank is {a.latent.kv_rank} in family '{a.family}': expected more than 0 in deepseek_v3 alone"
        )
    if not a.latent.kv_rank:
        return
    if a.latent.value_size < 1 or a.latent.rotated >= a.head_size:
        raise ValueError(
            f"{key}.latent has value_size = {a.latent.value_size} and rotated = {a.latent.rotated}: expected a positive size, and "
            f"fewer rotated entries than head_size = {a.head_size}"
        )
    if a.attention_bias or a.kv_heads != a.heads:
        raise ValueError(
            f"{key} has latent attention with attention_bias or kv_heads other than heads: neither is computed, remove it"
        )


PAIRS = {("float32", "float32"), ("float32", "bfloat16"), ("bfloat16", "bfloat16"), ("float64", "float64")}


def check_numerics(numerics: Numerics) -> None:
    """A ValueError where the types or names are unknown or do not go together."""
    key = "config.model.numerics"
    pair = (numerics.param_dtype, numerics.matmul_dtype)
    if pair not in PAIRS:
        allowed = ", ".join(f"{param} and {matmul}" for param, matmul in sorted(PAIRS))
        raise ValueError(f"{key}.param_dtype is '{pair[0]}' and matmul_dtype '{pair[1]}': expected one of {allowed}")
    narrow = ("", "bfloat16", "float32") if numerics.matmul_dtype == "bfloat16" else ("", pair[0])
    for name, value, there in (
        ("activation_dtype", numerics.activation_dtype, narrow),
        ("head_dtype", numerics.head_dtype, narrow),
        ("attention", numerics.attention, ATTENTION),
        ("remat", numerics.remat, REMAT),
        ("sampling_weights", numerics.sampling_weights, ("", "int8")),
        ("sampling_cache", numerics.sampling_cache, tuple(dict.fromkeys(("", "int8", "bfloat16", pair[1])))),
        ("sampling_attention", numerics.sampling_attention, ("", "xla", "pallas")),
    ):
        if value not in there:
            with_types = f" with matmul_dtype '{pair[1]}'" if name.endswith(("dtype", "cache")) else ""
            raise ValueError(f"{key}.{name} is '{value}'{with_types}: expected one of {', '.join(repr(each) for each in there)}")
