"""What a decoder is (`Architecture`) and how it is computed (`Numerics`)."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Architecture:
    """Sizes and constants of a decoder; with a checkpoint they come from its `config.json`."""

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
class Numerics:
    """How the decoder is computed: the same function, other costs."""

    param_dtype: str = "float32"  # float32 | float64 (with jax_enable_x64)
    matmul_dtype: str = "float32"  # operands of the large products; results are float32, or float64 with it
    remat: bool = True  # recompute each layer in the backward pass; on a CPU this is faster too
    logits_chunk_tokens: int = 1024  # tokens whose logits exist at once in training


def check(architecture: Architecture) -> None:
    """A ValueError where the sizes contradict each other."""
    a = architecture
    for name in ("vocab_size", "hidden_size", "layers", "heads", "kv_heads", "head_size", "mlp_size", "max_positions"):
        if getattr(a, name) < 1:
            raise ValueError(f"config.model.architecture.{name} is {getattr(a, name)}: expected a positive number")
    for name, value in (("rope_theta", a.rope_theta), ("norm_epsilon", a.norm_epsilon), ("initializer_range", a.initializer_range)):
        if not value > 0:
            raise ValueError(f"config.model.architecture.{name} is {value}: expected more than 0")
    if a.heads % a.kv_heads:
        raise ValueError(
            f"config.model.architecture.kv_heads is {a.kv_heads}, which does not divide heads = {a.heads}: "
            f"choose a divisor of {a.heads}"
        )
    if a.head_size % 2:
        raise ValueError(
            f"config.model.architecture.head_size is {a.head_size}: expected an even number, which rotary positions need"
        )


PAIRS = {("float32", "float32"), ("float32", "bfloat16"), ("float64", "float64")}


def check_numerics(numerics: Numerics) -> None:
    """A ValueError where the types are unknown or do not go together."""
    pair = (numerics.param_dtype, numerics.matmul_dtype)
    if pair not in PAIRS:
        allowed = ", ".join(f"{param} and {matmul}" for param, matmul in sorted(PAIRS))
        raise ValueError(
            f"config.model.numerics.param_dtype is '{pair[0]}' and matmul_dtype '{pair[1]}': expected one of {allowed}"
        )
