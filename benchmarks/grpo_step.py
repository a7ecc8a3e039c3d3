"""Times one GRPO step of the real trainer on a random model: sample, score, reference, update. Prints one JSON line.

Every completion has its full length (no stop token exists), one update a step, a reference model, float32. `--microbatch` is
the trainer's `problems_per_microbatch`: whole groups whose gradient is computed at once. For CPU seconds on one thread, so that
a busy machine does not matter much:

    XLA_FLAGS=--xla_cpu_multi_thread_eigen=false OMP_NUM_THREADS=1 taskset -c 0 python benchmarks/grpo_step.py

`step_*` is the fused program that the trainer runs with traced rewards; `rollout_s` and `update_s` are its two halves run as
programs of their own (the staged form); `--sampling-only` times the first half alone.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import statistics
import time
from collections.abc import Callable
from typing import Any

import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxreason
from jaxreason import objectives, sharding
from jaxreason.batch import PromptBatch
from jaxreason.compiling import compiled
from jaxreason.models import decoder, spec
from jaxreason.models.config import Architecture, Numerics
from jaxreason.sampling.rollout import SamplingConfig
from jaxreason.training import online
from jaxreason.training import state as states
from jaxreason.training.collect import Scoring
from jaxreason.training.optimizer import OptimizerConfig, make_optimizer

NO_EOS = -1  # an id that is never sampled


def arguments() -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in {
        "hidden": 256, "layers": 4, "heads": 4, "kv-heads": 2, "mlp": 1024, "vocab": 512, "batch": 8, "group": 8,
        "prompt-len": 32, "new-tokens": 64, "warmup": 2, "steps": 6, "seed": 0, "microbatch": 2,
    }.items():  # fmt: skip
        p.add_argument(f"--{name}", type=int, default=default)
    p.add_argument("--beta", type=float, default=0.04)
    p.add_argument("--tied", action="store_true")
    p.add_argument("--no-remat", action="store_true")
    p.add_argument("--matmul", choices=("f32", "bf16"), default="f32", help="operands of the products; results are float32")
    p.add_argument("--sampling-only", action="store_true")
    return p.parse_args()


def even_share(prompts: PromptBatch, completion: jax.Array, mask: jax.Array) -> jax.Array:
    """A traced reward that differs between completions: the share of even tokens."""
    return jnp.mean((completion % 2 == 0) & mask, axis=-1, dtype=jnp.float32)


def timed(function: Callable[[], Any], *, warmup: int, steps: int) -> tuple[list[float], list[float]]:
    """Wall and CPU seconds of each call after the warm-up; every call is waited for."""
    wall, cpu = [], []
    for _ in range(warmup + steps):
        w, c = time.perf_counter(), time.process_time()
        jax.block_until_ready(function())
        wall.append(time.perf_counter() - w)
        cpu.append(time.process_time() - c)
    return wall[warmup:], cpu[warmup:]


def main() -> None:
    a = arguments()
    architecture = Architecture(
        vocab_size=a.vocab, hidden_size=a.hidden, layers=a.layers, heads=a.heads, kv_heads=a.kv_heads,
        head_size=a.hidden // a.heads, mlp_size=a.mlp, max_positions=a.prompt_len + a.new_tokens, tied=a.tied,
    )  # fmt: skip
    numerics = Numerics(matmul_dtype={"f32": "float32", "bf16": "bfloat16"}[a.matmul], remat="none" if a.no_remat else "layer")
    mesh = sharding.make_mesh(sharding.MeshConfig())
    model = decoder.make_decoder(architecture, numerics, mesh)
    params = spec.init(model.specs, jax.random.key(a.seed), dtype=numerics.param_dtype, mesh=mesh)
    config = online.OnlineConfig(
        steps=a.steps, problems_per_step=a.batch, problems_per_update=a.batch, problems_per_microbatch=a.microbatch,
        completions_per_problem=a.group, optimizer=OptimizerConfig(learning_rate=1e-6),
    )  # fmt: skip
    optimizer = make_optimizer(config.optimizer, steps=a.warmup + a.steps)
    scoring = Scoring({"even": even_share}, {}, {"even": 1.0}, frozenset())
    sampling = SamplingConfig(max_prompt_tokens=a.prompt_len, max_completion_tokens=a.new_tokens)
    step = online.make_step(
        model, objectives.grpo(beta=a.beta), optimizer, scoring, mesh,
        config=config, sampling=sampling, eos_ids=(NO_EOS,), pad_id=0, seed=a.seed,
    )  # fmt: skip
    assert step.fused is not None
    state = states.create(model, optimizer, mesh, params)
    rng = np.random.default_rng(a.seed)
    place = lambda tree: sharding.place(mesh, tree, ("problems",))  # noqa: E731
    shape = (a.batch, a.prompt_len)
    number = iter(range(10**6))

    def prompts() -> PromptBatch:
        ids = rng.integers(0, a.vocab, shape).astype(np.int32)
        return place(PromptBatch(ids, np.ones(shape, bool), np.arange(a.batch, dtype=np.uint32), np.zeros(a.batch, np.int32)))

    def count() -> jax.Array:
        return jax.device_put(np.asarray(next(number), np.int32), sharding.named(mesh))

    program = None

    def fused() -> Any:
        nonlocal state, program
        args = (state, params, prompts(), count())
        program = program or compiled(step.fused, *args)
        state, metrics, shown = program(*args)
        return state, metrics, shown

    sampled = parts = batch = None

    def collect() -> Any:
        nonlocal sampled, parts, batch
        batch = prompts()
        sampled, parts = step.collect(state.params, batch, count())
        return sampled

    def learn() -> Any:
        nonlocal state
        state, metrics, _ = step.learn(state, params, batch, sampled, parts, count())
        return state, metrics

    tokens = a.batch * a.group * a.new_tokens
    out: dict[str, Any] = {"bench": "grpo_step", "parameters": spec.count(model.specs)}
    begun = time.perf_counter()
    jax.block_until_ready((collect if a.sampling_only else fused)())
    out["first_step_s"] = time.perf_counter() - begun
    if not a.sampling_only:
        wall, cpu = timed(fused, warmup=a.warmup, steps=a.steps)
        out |= {"step_s": statistics.median(wall), "step_cpu_s": statistics.median(cpu)}
        out["peak_rss_mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    wall, cpu = timed(collect, warmup=a.warmup, steps=a.steps)
    assert sampled is not None
    assert bool(jnp.all(sampled.mask)), "every completion must have its full length"
    out |= {"rollout_s": statistics.median(wall), "rollout_cpu_s": statistics.median(cpu)}
    out["sampled_tokens_per_s"] = tokens / out["rollout_s"]
    if not a.sampling_only:
        wall, cpu = timed(learn, warmup=a.warmup, steps=a.steps)
        out |= {"update_s": statistics.median(wall), "update_cpu_s": statistics.median(cpu)}
    else:
        out["peak_rss_mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    out = {name: round(value, 4) if isinstance(value, float) else value for name, value in out.items()}
    device = jax.devices()[0]
    out["versions"] = {
        "jaxreason": jaxreason.__version__, "jax": jax.__version__, "flax": flax.__version__, "optax": optax.__version__,
        "numpy": np.__version__, "python": platform.python_version(),
    }  # fmt: skip
    out |= {"device": device.device_kind if device.platform != "cpu" else "cpu", "arguments": vars(a)}
    print(json.dumps(out))


if __name__ == "__main__":
    main()
