"""Times the forward pass and the train step at the shapes of real models, random weights, and gives MFU. Prints one JSON line.

    python benchmarks/train_step.py --shape qwen2.5-1.5b --rows 16 --tokens 1024
    python benchmarks/train_step.py --shape qwen2.5-1.5b --rows 4 --tokens 8192
    python benchmarks/train_step.py --shape tiny --rows 4 --tokens 128 --param-dtype float32 --matmul float32   # on a CPU

The step is the trainer's own: a policy gradient's loss, gradient, clipping, AdamW with float32 master weights. Model FLOPs a
token are 6 N + 6 L H C T forward and backward (2 N + 2 L H C T forward alone): N counts the weights of products, the head
included and the embedding table not, and attention is causal, so half of PaLM's 12 L H C T (arXiv:2204.02311, appendix B). What
remat computes again does not count. MFU is model FLOPs a second over the chip's dense bfloat16 rate, given with --peak-tflops or
known by the chip's name.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import flax
import jax
import numpy as np
import optax

import jaxreason
from jaxreason import objectives, sharding
from jaxreason.batch import RolloutBatch
from jaxreason.compiling import compiled
from jaxreason.models import decoder, spec
from jaxreason.models.config import ATTENTION, REMAT, Architecture, Numerics, check_numerics
from jaxreason.training import state as states
from jaxreason.training.optimizer import OptimizerConfig, make_optimizer
from jaxreason.training.step import Split, make_update, score

SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {"vocab_size": 2048, "hidden_size": 128, "layers": 4, "heads": 4, "kv_heads": 2, "head_size": 32, "mlp_size": 512},
    "qwen2.5-0.5b": {
        "vocab_size": 151_936, "hidden_size": 896, "layers": 24, "heads": 14, "kv_heads": 2, "head_size": 64, "mlp_size": 4864,
    },
    "qwen2.5-1.5b": {
        "vocab_size": 151_936, "hidden_size": 1536, "layers": 28, "heads": 12, "kv_heads": 2, "head_size": 128, "mlp_size": 8960,
    },
}  # fmt: skip
# dense bfloat16, TFLOP/s, from the makers' data sheets; of names as jax gives them
PEAK = {
    "H200": 989,
    "H100": 989,
    "A100": 312,
    "v4": 275,
    "v5 lite": 197,
    "v5e": 197,
    "v5p": 459,
    "v5": 459,
    "v6 lite": 918,
    "v6e": 918,
}


def arguments() -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--shape", choices=SHAPES, default="qwen2.5-0.5b")
    p.add_argument("--rows", type=int, default=16)
    p.add_argument("--tokens", type=int, default=1024, help="of each row")
    p.add_argument("--microbatch", type=int, default=0, help="rows whose gradient is computed at once; 0: all")
    p.add_argument("--param-dtype", default="bfloat16")
    p.add_argument("--matmul", default="bfloat16")
    p.add_argument("--activation", default="")
    p.add_argument("--head", default="", help="operands of the product with the vocabulary")
    p.add_argument("--remat", choices=REMAT, default="layer")
    p.add_argument("--attention", choices=ATTENTION, default="auto")
    p.add_argument("--chunk", type=int, default=1024)
    p.add_argument("--fsdp", type=int, default=1)
    p.add_argument("--tensor", type=int, default=1)
    p.add_argument("--steps", type=int, default=5)
    p.add_argument("--peak-tflops", type=float, default=0.0)
    return p.parse_args()


def batch(rows: int, tokens: int, vocab: int, mesh: Any) -> RolloutBatch:
    """Rows of exactly so many fed tokens: a prompt of 16, and a completion whose last token is fed to nobody."""
    rng = np.random.default_rng(0)
    shape = (rows, 1, tokens - 16 + 1)
    host: Any = RolloutBatch(
        prompt=rng.integers(0, vocab, (rows, 16)).astype(np.int32),  # pyright: ignore[reportArgumentType]
        prompt_mask=np.ones((rows, 16), bool),  # pyright: ignore[reportArgumentType]
        completion=rng.integers(0, vocab, shape).astype(np.int32),  # pyright: ignore[reportArgumentType]
        mask=np.ones(shape, bool),  # pyright: ignore[reportArgumentType]
        truncated=np.zeros(shape[:2], bool),  # pyright: ignore[reportArgumentType]
        logp_behaviour=np.zeros(shape, np.float32),  # pyright: ignore[reportArgumentType]
        reward=rng.normal(size=shape[:2]).astype(np.float32),  # pyright: ignore[reportArgumentType]
    )
    return sharding.place(mesh, host, ("problems",))


def flops_per_token(specs: Any, a: Architecture, tokens: int) -> float:
    """Of a forward pass: 2 N + 2 L H C T."""
    table = 0 if a.tied else a.vocab_size * a.hidden_size  # tied: the table is the head, which counts once
    products = spec.count(specs) - table
    return 2 * products + 2 * a.layers * a.heads * a.head_size * tokens


def timed(function: Callable[[], Any], *, steps: int) -> tuple[float, float]:
    """Median wall and CPU seconds of a call, after one that does not count."""
    wall, cpu = [], []
    for _ in range(steps + 1):
        w, c = time.perf_counter(), time.process_time()
        jax.block_until_ready(function())
        wall.append(time.perf_counter() - w)
        cpu.append(time.process_time() - c)
    return statistics.median(wall[1:]), statistics.median(cpu[1:])


def main() -> None:
    a = arguments()
    architecture = Architecture(**SHAPES[a.shape], max_positions=a.tokens + 16)
    numerics = Numerics(
        param_dtype=a.param_dtype, matmul_dtype=a.matmul, activation_dtype=a.activation, head_dtype=a.head, attention=a.attention,
        remat=a.remat, logits_chunk_tokens=a.chunk,
    )  # fmt: skip
    check_numerics(numerics)
    mesh = sharding.make_mesh(sharding.MeshConfig(fsdp=a.fsdp, tensor=a.tensor))
    model = decoder.make_decoder(architecture, numerics, mesh)
    params = spec.init(model.specs, jax.random.key(0), dtype=a.param_dtype, mesh=mesh)
    rows = batch(a.rows, a.tokens, architecture.vocab_size, mesh)
    optimizer = make_optimizer(OptimizerConfig(), steps=100)

    forward = partial(compiled(jax.jit(lambda p, b: score(model, p, b, temperature=1.0).logp), params, rows), params, rows)
    forward_s, forward_cpu = timed(forward, steps=a.steps)
    state = states.create(model, optimizer, mesh, params)
    update = make_update(model, objectives.reinforce(), optimizer, temperature=1.0, split=Split(a.rows, a.microbatch or a.rows))
    step = compiled(jax.jit(lambda s, b: update(s, None, b)[:2], donate_argnums=0), state, rows)

    def one() -> Any:
        nonlocal state
        state, metrics = step(state, rows)
        return metrics

    del params, forward  # room for the step
    step_s, step_cpu = timed(one, steps=a.steps)
    each, tokens = flops_per_token(model.specs, architecture, a.tokens), a.rows * a.tokens
    device = jax.devices()[0].device_kind
    known = next((tflops for name, tflops in PEAK.items() if name.lower() in device.lower()), 0)
    peak = (a.peak_tflops or known) * 1e12 * mesh.size
    memory = step.memory_analysis()
    line = {
        "bench": "train_step",
        "parameters": spec.count(model.specs),
        "forward_s": forward_s,
        "forward_cpu_s": forward_cpu,
        "forward_mfu": round(each * tokens / forward_s / peak, 4) if peak else None,
        "step_s": step_s,
        "step_cpu_s": step_cpu,
        "step_mfu": round(3 * each * tokens / step_s / peak, 4) if peak else None,
        "tokens_per_s": tokens / step_s,
        "model_tflops_per_step": 3 * each * tokens / 1e12,
        "temporaries_mb": memory.temp_size_in_bytes / 1e6,
        "arguments_mb": memory.argument_size_in_bytes / 1e6,
        "peak_tflops": peak / 1e12 or None,
        "device": f"{mesh.size} x {device}",
        "versions": {
            "jaxreason": jaxreason.__version__,
            "jax": jax.__version__,
            "flax": flax.__version__,
            "optax": optax.__version__,
            "numpy": np.__version__,
            "python": platform.python_version(),
        },
        "arguments": vars(a),
    }
    print(json.dumps(line))


if __name__ == "__main__":
    main()
