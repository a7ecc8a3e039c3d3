"""Times google-tunix (installed package, public API) on a small random model.

Two measurements, one JSON line on stdout:
  * plain sampling: tunix.Sampler on batch*group prompts, fixed length output;
  * GRPO: tunix.GRPOLearner.train over `warmup + steps` batches, one optimizer
    update per batch, rule reward, policy and reference on one mesh.

Nothing is downloaded: the model is randomly initialised and the tokenizer is a
whitespace-integer toy.  Output length is fixed by giving an end-of-sequence id
that the model cannot emit, so every run does the same amount of work.

  python bench_tunix.py                       # CPU default (about 4M parameters)
  python bench_tunix.py --hidden 1024 --layers 16 --heads 16 --kv-heads 8 \
      --mlp 4096 --vocab 32768 --batch 32 --group 8 --prompt-len 128 \
      --new-tokens 512 --dtype bfloat16       # accelerator
"""

import argparse
import importlib.metadata
import json
import os
import platform
import resource
import statistics
import sys
import time


def parse_args():
    p = argparse.ArgumentParser()
    p.add_argument("--family", choices=("qwen2", "qwen3", "llama3"), default="qwen2")
    p.add_argument("--hidden", type=int, default=256)
    p.add_argument("--layers", type=int, default=4)
    p.add_argument("--heads", type=int, default=4)
    p.add_argument("--kv-heads", type=int, default=2)
    p.add_argument("--head-dim", type=int, default=0, help="0: hidden // heads")
    p.add_argument("--mlp", type=int, default=1024)
    p.add_argument("--vocab", type=int, default=1024)
    p.add_argument("--untied", action="store_true")
    p.add_argument("--batch", type=int, default=8, help="prompts per step")
    p.add_argument("--group", type=int, default=8)
    p.add_argument("--prompt-len", type=int, default=32)
    p.add_argument("--new-tokens", type=int, default=64)
    p.add_argument("--cache-slack", type=int, default=0)
    p.add_argument("--iterations", type=int, default=1, help="mu: updates per batch")
    p.add_argument("--micro-batch", type=int, default=0, help="prompts; 0: whole batch")
    p.add_argument("--beta", type=float, default=0.04)
    p.add_argument("--temperature", type=float, default=1.0)
    p.add_argument("--learning-rate", type=float, default=1e-5)
    p.add_argument("--return-logprobs", action="store_true", help="ask the sampler for log-probabilities (old policy)")
    p.add_argument("--dtype", default="float32", help="compute dtype")
    p.add_argument("--param-dtype", default="float32")
    p.add_argument("--flash", action="store_true")
    p.add_argument("--remat", choices=("none", "block", "decoder"), default="none")
    p.add_argument("--fsdp", type=int, default=1)
    p.add_argument("--tp", type=int, default=1)
    p.add_argument("--warmup", type=int, default=2)
    p.add_argument("--steps", type=int, default=5)
    p.add_argument("--sample-reps", type=int, default=5)
    p.add_argument("--no-block", action="store_true", help="do not block after the update (no rollout/train split)")
    p.add_argument("--skip-sampling", action="store_true")
    p.add_argument("--skip-grpo", action="store_true")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--tag", default="")
    return p.parse_args()


class IntTokenizer:
    """'12 7 900' <-> [12, 7, 900]; 0 pad, 1 bos, 2 eos."""

    def encode(self, text, **kw):
        return [int(t) for t in text.split()]

    def decode(self, ids, **kw):
        return " ".join(str(int(i)) for i in ids)

    def bos_id(self):
        return 1

    def eos_id(self):
        return 2

    def pad_id(self):
        return 0


def make_model(args, jnp, nnx):
    import importlib

    lib = importlib.import_module(f"tunix.models.{args.family}.model")
    kw = dict(
        num_layers=args.layers,
        vocab_size=args.vocab,
        embed_dim=args.hidden,
        hidden_dim=args.mlp,
        num_heads=args.heads,
        head_dim=args.head_dim or args.hidden // args.heads,
        num_kv_heads=args.kv_heads,
        norm_eps=1e-6,
        rope_theta=1_000_000,
        dtype=jnp.dtype(args.dtype),
        param_dtype=jnp.dtype(args.param_dtype),
        use_flash_attention=args.flash,
        remat_config=lib.RematConfig[args.remat.upper()],
    )
    import dataclasses

    names = {f.name for f in dataclasses.fields(lib.ModelConfig)}
    for tie in ("use_tied_embedding", "weight_tying"):
        if tie in names:
            kw[tie] = not args.untied
    dropped = sorted(k for k in kw if k not in names)
    cfg = lib.ModelConfig(**{k: v for k, v in kw.items() if k in names})
    cls = {"qwen2": "Qwen2", "qwen3": "Qwen3", "llama3": "Llama3"}[args.family]

    def build():
        return getattr(lib, cls)(cfg, rngs=nnx.Rngs(params=args.seed))

    return build, cfg, dropped


def main():
    args = parse_args()
    t_import = time.perf_counter()
    import jax
    import jax.numpy as jnp
    import numpy as np
    import optax
    import tunix
    from flax import nnx
    from tunix.rl import rl_cluster as rlc

    t_import = time.perf_counter() - t_import

    Engine = getattr(rlc, "RLCluster", None) or rlc.RLEngine
    rng = np.random.default_rng(args.seed)
    n_seq = args.batch * args.group
    mesh = jax.sharding.Mesh(np.array(jax.devices()[: args.fsdp * args.tp]).reshape(args.fsdp, args.tp), ("fsdp", "tp"))
    build, cfg, dropped = make_model(args, jnp, nnx)
    tok = IntTokenizer()
    never = args.vocab + 7  # an end-of-sequence id that cannot be emitted

    def prompts(n):  # bos is added by the sampler
        ids = rng.integers(3, args.vocab, size=(n, args.prompt_len - 1))
        return [" ".join(map(str, row)) for row in ids]

    def place(model):
        graph, state = nnx.split(model)
        specs = nnx.get_partition_spec(state)
        shard = jax.tree.map(
            lambda s: jax.sharding.NamedSharding(mesh, s if s is not None else jax.sharding.PartitionSpec()), specs
        )
        return nnx.merge(graph, jax.device_put(state, shard))

    out = {
        "peer": "tunix",
        "tag": args.tag,
        "versions": {k: importlib.metadata.version(k) for k in ("google-tunix", "jax", "flax", "optax", "transformers")},
        "python": platform.python_version(),
        "device": f"{jax.devices()[0].platform}:{jax.devices()[0].device_kind}",
        "n_devices": args.fsdp * args.tp,
        "host_cpus": os.cpu_count(),
        "load_before": round(os.getloadavg()[0], 2),
        "args": vars(args),
        "config_fields_not_in_family": dropped,
        "import_s": round(t_import, 3),
    }

    with mesh:
        actor = place(build())
        reference = place(build())
        out["n_params"] = int(sum(np.prod(v.shape) for v in jax.tree.leaves(nnx.state(actor, nnx.Param))))

        if not args.skip_sampling:
            sampler = tunix.Sampler(
                actor,
                tok,
                tunix.CacheConfig(
                    cache_size=args.prompt_len + args.new_tokens + args.cache_slack,
                    num_layers=args.layers,
                    num_kv_heads=args.kv_heads,
                    head_dim=cfg.head_dim,
                ),
            )

            def sample(text, seed):
                t, c = time.perf_counter(), time.process_time()
                r = sampler(
                    text,
                    max_generation_steps=args.new_tokens,
                    max_prompt_length=args.prompt_len,
                    temperature=args.temperature,
                    top_p=1.0,
                    seed=seed,
                    eos_tokens=[never],
                    return_logprobs=args.return_logprobs,
                )
                dt = time.perf_counter() - t
                sample_cpu.append(time.process_time() - c)
                assert all(len(x) == args.new_tokens for x in r.tokens), "short output"
                return dt

            sample_cpu = []
            text = prompts(n_seq)
            first = sample(text, 0)
            times = [sample(text, i + 1) for i in range(args.sample_reps)]
            med = statistics.median(times)
            out["sampling"] = {
                "first_call_s": round(first, 4),
                "median_s": round(med, 4),
                "min_s": round(min(times), 4),
                "all_s": [round(x, 4) for x in times],
                "median_cpu_s": round(statistics.median(sample_cpu[1:]), 4),
                "new_tokens_per_s": round(n_seq * args.new_tokens / med, 1),
            }
            del sampler

        if not args.skip_grpo:
            n_steps = args.warmup + args.steps
            marks, cpu_marks = [], []
            spans = {"rollout": [], "ref_logps": [], "train": []}
            cpu_spans = {k: [] for k in spans}
            tokens_seen = []

            def data():
                for _ in range(n_steps):
                    marks.append(time.perf_counter())
                    cpu_marks.append(time.process_time())
                    yield {"prompts": np.array(prompts(args.batch))}
                marks.append(time.perf_counter())
                cpu_marks.append(time.process_time())

            def reward(prompts, completions, **kw):  # share of even token ids
                tokens_seen.append(sum(len(c.split()) for c in completions))
                return [sum(int(t) % 2 == 0 for t in c.split()) / args.new_tokens for c in completions]

            micro = args.micro_batch or args.batch
            training = rlc.RLTrainingConfig(
                actor_optimizer=optax.adamw(args.learning_rate),
                eval_every_n_steps=10**9,
                max_steps=n_steps * args.iterations,
                mini_batch_size=args.batch,
                train_micro_batch_size=micro,
                rollout_micro_batch_size=args.batch,
                compute_logps_micro_batch_size=args.batch,
            )
            rollout = tunix.RolloutConfig(
                max_tokens_to_generate=args.new_tokens,
                max_prompt_length=args.prompt_len,
                kv_cache_size=args.prompt_len + args.new_tokens + args.cache_slack,
                temperature=args.temperature,
                top_p=1.0,
                eos_tokens=[never],
                return_logprobs=args.return_logprobs,
            )
            engine = Engine(
                actor=actor,
                reference=reference,
                tokenizer=tok,
                cluster_config=rlc.ClusterConfig(
                    role_to_mesh={tunix.Role.ACTOR: mesh, tunix.Role.REFERENCE: mesh, tunix.Role.ROLLOUT: mesh},
                    rollout_engine="vanilla",
                    training_config=training,
                    rollout_config=rollout,
                ),
            )

            def timed(name, fn, wait=None):
                def inner(*a, **k):
                    t, c = time.perf_counter(), time.process_time()
                    r = fn(*a, **k)
                    if not args.no_block:
                        jax.block_until_ready(wait() if wait else r)
                    spans[name].append(time.perf_counter() - t)
                    cpu_spans[name].append(time.process_time() - c)
                    return r

                return inner

            engine.generate = timed("rollout", engine.generate, lambda: ())
            engine.get_ref_per_token_logps = timed("ref_logps", engine.get_ref_per_token_logps)
            engine.update_actor = timed("train", engine.update_actor, lambda: nnx.state(engine.actor_trainer.model))

            learner = tunix.GRPOLearner(
                engine,
                reward_fns=reward,
                algo_config=tunix.GRPOConfig(
                    num_generations=args.group, num_iterations=args.iterations, beta=args.beta, epsilon=0.2
                ),
            )
            t0 = time.perf_counter()
            learner.train(data())
            jax.block_until_ready(nnx.state(engine.actor_trainer.model))
            total = time.perf_counter() - t0
            if len(marks) == n_steps:  # the loop stopped on max_steps
                marks.append(t0 + total)
                cpu_marks.append(time.process_time())
            steps = [b - a for a, b in zip(marks, marks[1:], strict=False)]
            hot = steps[args.warmup :]
            med = statistics.median(hot)
            cpu = [b - a for a, b in zip(cpu_marks, cpu_marks[1:], strict=False)][args.warmup :]

            def per(name):
                return spans[name][len(spans[name]) * args.warmup // n_steps :]

            out["grpo"] = {
                "optimizer_updates": int(engine.actor_trainer.train_steps),
                "first_step_s": round(steps[0], 3),
                "median_step_s": round(med, 4),
                "min_step_s": round(min(hot), 4),
                "all_steps_s": [round(x, 4) for x in steps],
                "median_step_cpu_s": round(statistics.median(cpu), 4),
                "all_s": {k: [round(x, 4) for x in v] for k, v in spans.items()},
                "median_cpu_s": {
                    k: round(statistics.median(v[len(v) * args.warmup // n_steps :]), 4) for k, v in cpu_spans.items() if v
                },
                "rollout_median_s": round(statistics.median(per("rollout")), 4),
                "ref_logps_median_s": (round(statistics.median(per("ref_logps")), 4) if per("ref_logps") else None),
                "train_median_s": round(statistics.median(per("train")), 4),
                "new_tokens_per_step": tokens_seen[-1],
                "new_tokens_per_s": round(tokens_seen[-1] / med, 1),
                "total_s": round(total, 2),
            }
            acc = out["grpo"]
            acc["unaccounted_s"] = round(
                med
                - acc["rollout_median_s"]
                - (acc["ref_logps_median_s"] or 0)
                - acc["train_median_s"] * args.iterations * (args.batch // micro),
                4,
            )

    out["load_after"] = round(os.getloadavg()[0], 2)
    out["max_rss_mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    stats = jax.devices()[0].memory_stats() or {}
    if stats.get("peak_bytes_in_use"):
        out["peak_device_mb"] = stats["peak_bytes_in_use"] // 2**20
    print(json.dumps(out))


if __name__ == "__main__":
    sys.exit(main())
