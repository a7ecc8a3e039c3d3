"""What XLA would allocate for one update at a real vocabulary, with and without chunked logits and remat. Prints one JSON line.

Nothing is run: the update (a policy gradient's loss, its gradient, AdamW) is compiled, and the compiler's own memory analysis is
read. By default 8 rows of 1,024 tokens at width 256, and the 151,936 tokens of Qwen2.5's vocabulary:

    python benchmarks/memory.py

`temporaries` are bytes beside arguments and results: activations, logits, gradients. `ratio` is that of the plain form (all
logits at once, nothing recomputed) to the default (chunks of 1,024 tokens, layers recomputed).
"""

from __future__ import annotations

import argparse
import json
import platform
from typing import Any

import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxreason
from jaxreason import objectives, sharding
from jaxreason.batch import RolloutBatch
from jaxreason.compiling import compiled
from jaxreason.models import decoder
from jaxreason.models.config import REMAT, Architecture, Numerics
from jaxreason.training import state as states
from jaxreason.training.optimizer import OptimizerConfig, make_optimizer
from jaxreason.training.step import Split, make_update


def arguments() -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--rows", type=int, default=8)
    p.add_argument("--prompt", type=int, default=24)
    p.add_argument("--tokens", type=int, default=1000, help="of a completion")
    p.add_argument("--hidden", type=int, default=256)
    p.add_argument("--layers", type=int, default=4)
    p.add_argument("--vocab", type=int, default=151_936)
    p.add_argument("--chunk", type=int, default=1024, help="tokens whose logits exist at once")
    return p.parse_args()


def abstract_batch(rows: int, prompt: int, tokens: int, mesh: Any) -> RolloutBatch:
    """Shapes of demonstrations: one completion a problem."""

    def shape(dims: tuple[int, ...], kind: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(dims, kind, sharding=sharding.named(mesh, ("problems",)))

    completion = (rows, 1, tokens)
    return RolloutBatch(
        prompt=shape((rows, prompt), jnp.int32),
        prompt_mask=shape((rows, prompt), bool),
        completion=shape(completion, jnp.int32),
        mask=shape(completion, bool),
        truncated=shape(completion[:2], bool),
        logp_behaviour=shape(completion, jnp.float32),
        reward=shape(completion[:2], jnp.float32),
    )


def temporaries(a: argparse.Namespace, *, chunk: int, remat: str) -> int:
    """Bytes that the compiled update needs beside its arguments and results."""
    architecture = Architecture(
        vocab_size=a.vocab, hidden_size=a.hidden, layers=a.layers, heads=a.hidden // 64, kv_heads=max(1, a.hidden // 128),
        head_size=64, mlp_size=4 * a.hidden, max_positions=a.prompt + a.tokens,
    )  # fmt: skip
    mesh = sharding.make_mesh(sharding.MeshConfig(), devices=jax.devices()[:1])
    model = decoder.make_decoder(architecture, Numerics(logits_chunk_tokens=chunk, remat=remat), mesh)
    optimizer = make_optimizer(OptimizerConfig(), steps=1)
    update = make_update(model, objectives.reinforce(), optimizer, temperature=1.0, split=Split(a.rows, a.rows))
    state = states.abstract(model, optimizer, mesh)
    batch = abstract_batch(a.rows, a.prompt, a.tokens, mesh)
    function = jax.jit(lambda state, batch: update(state, None, batch)[:2], donate_argnums=0)
    analysis = compiled(function, state, batch).memory_analysis()
    return int(analysis.temp_size_in_bytes)


def main() -> None:
    a = arguments()
    everything = a.rows * a.tokens
    found = {f"chunks_{remat}": temporaries(a, chunk=a.chunk, remat=remat) for remat in REMAT}
    found |= {f"all_logits_{remat}": temporaries(a, chunk=everything, remat=remat) for remat in ("none", "layer")}
    versions = {
        "jaxreason": jaxreason.__version__,
        "jax": jax.__version__,
        "flax": flax.__version__,
        "optax": optax.__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
    }
    line = {
        "bench": "memory",
        "temporaries": found,
        "ratio": round(found["all_logits_none"] / found["chunks_layer"], 2),
        "versions": versions,
        "device": jax.default_backend(),
        "arguments": vars(a),
    }
    print(json.dumps(line))


if __name__ == "__main__":
    main()
