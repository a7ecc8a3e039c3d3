"""Times the engine on a random model of 4.2 million parameters (that of `grpo_step.py`). Prints one JSON line a workload.

    XLA_FLAGS=--xla_cpu_multi_thread_eigen=false OMP_NUM_THREADS=1 taskset -c 0 python benchmarks/sampling.py

uniform: 8 prompts of 32 tokens, 8 completions of 64 each; beside transformers' generate where `--hf-python` is a Python with torch
    and transformers (its script: peers/hf_generate.py), and with 64 different prompts.
long_prompts: 8 prompts of 512 tokens, 8 completions of 32 each; beside the same with every prompt read 8 times.
uneven: 256 completions (32 prompts, 8 each) whose lengths are geometric with mean 64, at most 512, in 32 slots that take the next
    completion as they end and are compacted at the end; beside 8 batches of 32 that each wait for their longest. `ideal` is the
    number of tokens over the most tokens a second that 32 slots reach when all completions are 64 long; `over_ideal_least` is of
    the least seconds that each piece of 16 steps took in any round, which a busy machine moves less. Lengths are drawn `--draws`
    times: ratios are of the seconds of all draws together, `.._of_each` are those of each draw, and `.._by_slots` adds up to the
    ratio: the steps that were made in so many slots.
decode: one step of 64 slots that are 64 tokens long: floating-point operations and bytes, beside what one thread of this machine
    does of either in a large product and in reading a large array.
speculative: completions of 128 tokens through `Engine.generate`, in 4 slots and in 32, without drafts, with 4 tokens drafted a
    step, and with 'auto'. `copy`: weights made so that greedy text goes round in the prompt's circle of 48 tokens; `random`: the
    random model, sampled, where hardly a draft is right.

Ratios are of CPU seconds, medians of `--runs` rounds.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jaxreason
from jaxreason import sharding
from jaxreason.batch import PromptBatch
from jaxreason.compiling import compiled
from jaxreason.models import decoder, spec
from jaxreason.models.config import Architecture, Numerics
from jaxreason.models.tokenizer import load_tokenizer, save_word_tokenizer
from jaxreason.sampling import engine
from jaxreason.sampling.engine import Rules
from jaxreason.sampling.generate import Engine
from jaxreason.sampling.law import Law
from jaxreason.sampling.queue import Queue, buckets, compact, drain
from jaxreason.sampling.rollout import sample

VOCAB, WIDTH, LAYERS, HEADS, KV_HEADS, MLP = 512, 256, 4, 4, 2, 1024
RULES = Rules(Law(), (), 0)
PIECE = 16  # steps that are timed together


class Bench:
    """The model, its parameters, and programs by name."""

    def __init__(self, *, seed: int, runs: int, matmul: str, cache: str) -> None:
        sizes: Any = {"hidden_size": WIDTH, "layers": LAYERS, "heads": HEADS, "kv_heads": KV_HEADS, "mlp_size": MLP}
        architecture = Architecture(vocab_size=VOCAB, head_size=WIDTH // HEADS, max_positions=1024, tied=False, **sizes)
        self.mesh = sharding.make_mesh(sharding.MeshConfig())
        self.model = decoder.make_decoder(architecture, Numerics(matmul_dtype=matmul, sampling_cache=cache), self.mesh)
        self.params = spec.init(self.model.specs, jax.random.key(seed), dtype="float32", mesh=self.mesh)
        self.runs, self.rng, self.programs = runs, np.random.default_rng(seed), {}

    def run(self, name: Any, function: Callable[..., Any], *args: Any, donate: tuple[int, ...] = ()) -> Any:
        if name not in self.programs:
            self.programs[name] = compiled(jax.jit(function, donate_argnums=donate), *args)
        return self.programs[name](*args)

    def rounds(self, **functions: Callable[[], Any]) -> dict[str, list[float]]:
        """CPU seconds of each, compiled before; one after the other in every round, so that a busy machine is so for all."""
        for function in functions.values():
            jax.block_until_ready(function())
        seconds: dict[str, list[float]] = {name: [] for name in functions}
        for _ in range(self.runs):
            for name, function in functions.items():
                begun = time.process_time()
                jax.block_until_ready(function())
                seconds[name].append(time.process_time() - begun)
        return seconds

    def pieces(self, **functions: Callable[[], Iterator[Any]]) -> dict[str, list[list[float]]]:
        """CPU seconds of every piece of each in every round, compiled before; one after the other in every round."""
        for function in functions.values():
            for _ in function():
                pass
        seconds: dict[str, list[list[float]]] = {name: [] for name in functions}
        for _ in range(self.runs):
            for name, function in functions.items():
                ends = [time.process_time()]
                for _ in function():
                    ends.append(time.process_time())
                seconds[name].append([b - a for a, b in itertools.pairwise(ends)])
        return seconds

    def cpu_seconds(self, function: Callable[[], Any]) -> float:
        """The median of the runs, compiled before."""
        return statistics.median(self.rounds(it=function)["it"])

    def prompts(self, count: int, tokens: int, *, copies: int = 1) -> PromptBatch:
        ids = np.repeat(self.rng.integers(0, VOCAB, (count, tokens)).astype(np.int32), copies, axis=0)
        number = np.arange(count * copies)
        parts = (ids, np.ones(ids.shape, bool), number.astype(np.uint32), number.astype(np.int32))
        return PromptBatch(*(jnp.asarray(part) for part in parts))

    def rollout(self, name: str, prompts: PromptBatch, *, group: int, tokens: int) -> Callable[[], Any]:
        """Completions of one length, all in slots of their own."""
        fixed: Any = {"group": group, "max_completion_tokens": tokens, "eos_ids": (), "pad_id": 0}
        run = partial(sample, self.model, **fixed)
        return lambda: self.run(name, run, self.params, prompts, jax.random.key(1))


def ratio(above: list[float], below: list[float]) -> float:
    """The median of the rounds' ratios."""
    return statistics.median(a / b for a, b in zip(above, below, strict=True))


def uniform(b: Bench, hf_python: str) -> dict[str, Any]:
    shared = b.cpu_seconds(b.rollout("shared", b.prompts(8, 32), group=8, tokens=64))
    alone = b.cpu_seconds(b.rollout("alone", b.prompts(64, 32), group=1, tokens=64))
    out = {"cpu_s": shared, "tokens_per_cpu_s": 4096 / shared, "cpu_s_64_prompts": alone}
    if hf_python:
        script = Path(__file__).parent / "peers" / "hf_generate.py"
        done = subprocess.run([hf_python, script, "--threads", "1"], capture_output=True, text=True, env=dict(os.environ))
        if done.returncode:
            raise SystemExit(f"{script} failed:\n{done.stderr[-2000:]}")
        peer = json.loads(done.stdout.strip().splitlines()[-1])
        out |= {"transformers_cpu_s": peer["cpu_s_median"], "ratio": shared / peer["cpu_s_median"]}
        out |= {"ratio_64_prompts": alone / peer["cpu_s_median"], "transformers": peer["transformers"], "torch": peer["torch"]}
    return out


def long_prompts(b: Bench) -> dict[str, Any]:
    seconds = b.rounds(
        shared=b.rollout("long shared", b.prompts(8, 512), group=8, tokens=32),
        copies=b.rollout("long copies", b.prompts(8, 512, copies=8), group=1, tokens=32),
    )
    shared, copies = (statistics.median(each) for each in seconds.values())
    return {"cpu_s": shared, "cpu_s_each_copy": copies, "faster": ratio(seconds["copies"], seconds["shared"])}


class Uneven:
    """256 completions of 32 prompts in 32 slots."""

    problems, group, slots, tokens = 32, 8, 32, 512

    def __init__(self, b: Bench) -> None:
        self.b, self.batch = b, b.prompts(self.problems, 32)
        self.total = self.problems * self.group
        self.keys = jax.random.split(jax.random.key(1), self.total)
        self.sizes: list[int] = []  # slots there were in each piece of what was refilled last

    def roots(self, problems: slice) -> Any:
        b, m = self.b, self.b.model

        def run(params: Any, prompt: Any, mask: Any) -> Any:
            params = m.prepare_sampling(params)
            return params, engine.open(m, params, prompt, mask, rules=RULES)

        prompt, mask = self.batch.prompt[problems], self.batch.prompt_mask[problems]
        return b.run(("roots", len(prompt)), run, b.params, prompt, mask)

    def refilled(self, lengths: jax.Array, tokens: int) -> Iterator[jax.Array]:
        """All completions through the slots, a piece at a time; the tokens that are there after each."""
        b, m, self.sizes = self.b, self.b.model, []
        params, roots = self.roots(slice(None))

        def begin(roots: Any, keys: Any, lengths: Any) -> Any:
            first = jnp.arange(self.slots, dtype=jnp.int32)
            slots = engine.seat(m, roots, first // self.group, keys[: self.slots], tokens=tokens, rules=RULES)
            lane = jnp.zeros(1, jnp.int32)
            queue = Queue(keys, lengths, lane, lane + self.total, jnp.zeros((), jnp.int32))
            record = engine.blank(self.total, tokens, rules=RULES, dtype=jnp.float32)
            return engine.close(slots, jnp.ones(self.slots, bool)), record, queue

        def grow(params: Any, roots: Any, slots: Any, record: Any, queue: Any, least: Any) -> Any:
            fixed: Any = {"rules": RULES, "group": self.group, "least": least, "width": self.group, "steps": PIECE}
            return drain(m, params, roots, slots, record, queue, **fixed)

        state = b.run(("begin", tokens), begin, roots, self.keys, lengths)
        sizes = buckets(self.slots)
        for size, following in zip(sizes, (*sizes[1:], 0), strict=True):
            least = np.int32(following)
            while True:
                state = b.run(("grow", size, tokens), grow, params, roots, *state, least, donate=(2, 3, 4))
                steps = int(state[2].steps)  # waits
                self.sizes.append(size)
                yield state[1].tokens
                if steps < PIECE:
                    break
            if following:
                moved = partial(compact, m, slots_left=following)
                state = (b.run(("compact", following, tokens), moved, state[0]), *state[1:])

    def batches(self, lengths: jax.Array) -> Iterator[jax.Array]:
        """The same completions in batches that wait for their longest; each batch's tokens."""
        b, m = self.b, self.b.model

        def run(params: Any, roots: Any, keys: Any, lengths: Any) -> Any:
            number = jnp.arange(self.slots, dtype=jnp.int32)
            slots = engine.seat(m, roots, number // self.group, keys, tokens=self.tokens, rules=RULES)
            return engine.extend(m, params, roots, slots, rules=RULES, limit=lengths, width=0).record.tokens

        for start in range(0, self.total, self.slots):
            params, roots = self.roots(slice(start // self.group, (start + self.slots) // self.group))
            some = slice(start, start + self.slots)
            yield jax.block_until_ready(b.run("batch", run, params, roots, self.keys[some], lengths[some]))


def uneven(b: Bench, draws: int) -> dict[str, Any]:
    work = Uneven(b)
    drawn = np.minimum(b.rng.geometric(1 / 64, size=(draws, work.total)), work.tokens).astype(np.int32)
    lengths, even = [jnp.asarray(each) for each in drawn], jnp.full(work.total, 64, jnp.int32)
    same, sizes = True, []
    for each in lengths:
        *_, made = work.refilled(each, work.tokens)
        sizes.append(work.sizes)
        same &= bool(jnp.all(made == jnp.concatenate(list(work.batches(each)))))
    pieces = b.pieces(
        **{f"ours_{i}": partial(work.refilled, each, work.tokens) for i, each in enumerate(lengths)},
        **{f"waiting_{i}": partial(work.batches, each) for i, each in enumerate(lengths)},
        even=partial(work.refilled, even, 64),
        even_in_long=partial(work.refilled, even, work.tokens),
    )
    seconds = {name: np.array([sum(each) for each in rounds]) for name, rounds in pieces.items()}  # [rounds]
    least_of = {name: [min(each) for each in zip(*rounds, strict=True)] for name, rounds in pieces.items()}
    least = {name: sum(each) for name, each in least_of.items()}
    # one of the two for all rounds: the lesser of each round's pair would be low by this machine's noise, and `ours` is no minimum
    best = min((seconds["even"], seconds["even_in_long"]), key=lambda each: float(np.median(each)))
    best_least = min(least["even"], least["even_in_long"])
    part = drawn.sum(axis=1) / (work.total * 64)  # [draws]
    ours, waiting = (np.stack([seconds[f"{name}_{i}"] for i in range(draws)]) for name in ("ours", "waiting"))  # [draws, rounds]
    ideal = part[:, None] * best[None]
    out = {"draws": draws, "tokens": drawn.sum(axis=1).tolist(), "longest": drawn.max(axis=1).tolist(), "same": same}
    out |= {name: float(np.median(each.sum(axis=0))) for name, each in (("cpu_s", ours), ("cpu_s_without_refill", waiting))}
    out |= {"ideal_cpu_s": float(np.median(ideal.sum(axis=0)))}
    for name, above, below in (("faster", waiting, ours), ("over_ideal", ours, ideal)):
        out[name] = float(np.median(above.sum(axis=0) / below.sum(axis=0)))
        out[f"{name}_of_each"] = np.median(above / below, axis=1).round(3).tolist()
    whole = float(part.sum()) * best_least
    out["over_ideal_least"] = sum(least[f"ours_{i}"] for i in range(draws)) / whole
    out["over_ideal_least_of_each"] = [round(least[f"ours_{i}"] / (part[i] * best_least), 3) for i in range(draws)]
    by_size = dict.fromkeys(buckets(work.slots), 0.0)
    for i, each in enumerate(sizes):
        for size, took in zip(each, least_of[f"ours_{i}"], strict=True):
            by_size[size] += took
    return out | {"over_ideal_least_by_slots": {size: round(took / whole, 3) for size, took in by_size.items()}}


def decode(b: Bench) -> dict[str, Any]:
    slots, length, steps = 64, 64, 32
    m, prompts = b.model, b.prompts(8, 32)

    def begin(params: Any) -> Any:
        params = m.prepare_sampling(params)
        roots = engine.open(m, params, prompts.prompt, prompts.prompt_mask, rules=RULES)
        return params, roots.prompts, m.empty(roots.prompts, slots=slots, tokens=128)

    def run(params: Any, prompts: Any, own: Any) -> Any:
        number = jnp.arange(slots, dtype=jnp.int32)

        def one(i: Any, carry: Any) -> Any:
            token, own = carry
            args = (params, token, prompts, own, number // 8, jnp.full(slots, length, jnp.int32), jnp.ones(slots, bool))
            hidden, own = m.decode(*args, width=0)
            return jnp.argmax(m.project(params, hidden[:, 0]), axis=-1).astype(jnp.int32)[:, None], own

        return jax.lax.fori_loop(0, steps, one, (jnp.zeros((slots, 1), jnp.int32), own))[0]

    given = b.run("decode begin", begin, b.params)
    seconds = b.cpu_seconds(lambda: b.run("decode", run, *given)) / steps
    matrices = sum(x.size for x in jax.tree.leaves(b.params) if x.ndim > 1) - VOCAB * WIDTH  # the embedding is looked up
    keys = slots * (length + 1) + 8 * 32  # own ones, and the prompts' once
    flops = 2 * slots * matrices + 4 * slots * (length + 1 + 32) * HEADS * (WIDTH // HEADS) * LAYERS
    read = 4 * (matrices + keys * 2 * KV_HEADS * (WIDTH // HEADS) * LAYERS)
    size = 2048
    big = jnp.ones((size, size))
    multiply = b.cpu_seconds(lambda: b.run("multiply", lambda x: x @ x, big))
    long = jnp.ones(2**26)
    summed = b.cpu_seconds(lambda: b.run("sum", jnp.sum, long))
    rate, bandwidth = 2 * size**3 / multiply, long.nbytes / summed
    least = max(flops / rate, read / bandwidth)
    return {
        "cpu_s_a_step": seconds, "gflop": flops / 1e9, "megabytes": read / 1e6, "gflop_per_s_of_a_product": rate / 1e9,
        "gigabytes_per_s_of_reading": bandwidth / 1e9, "s_if_only_products": flops / rate, "s_if_only_reading": read / bandwidth,
        "fraction_reached": least / seconds,
    }  # fmt: skip


CIRCLE = 48  # tokens after which text that is copied comes back


def circling(params: Any, strength: float) -> Any:
    """Weights under which a token's likeliest successor is the next of its circle, the likelier the greater the strength."""
    following = np.arange(VOCAB)
    for start in range(16, VOCAB - CIRCLE, CIRCLE):
        following[start : start + CIRCLE] = np.roll(np.arange(start, start + CIRCLE), -1)
    embed = np.random.default_rng(5).normal(size=(VOCAB, WIDTH))
    embed /= np.linalg.norm(embed, axis=1, keepdims=True)
    head = np.zeros((WIDTH, VOCAB))
    head[:, following] = embed.T
    return {**params, "embed": jnp.asarray(32 * embed, jnp.float32), "head": jnp.asarray(strength * head, jnp.float32)}


def speculative(b: Bench) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        save_word_tokenizer([f"w{'x' * i}" for i in range(VOCAB - 7)], Path(folder))
        tokenizer = load_tokenizer(folder)
    drawn: Any = {"bias": tuple((token, -1e3) for token in tokenizer.eos_ids)}  # nothing ends early
    kinds = {"copy": (circling(b.params, 2.0), Law(greedy=True, **drawn)), "random": (b.params, Law(**drawn))}
    out: dict[str, Any] = {}
    for kind, (weights, law) in kinds.items():
        for slots in (4, 32):
            generator = Engine(b.model, tokenizer, b.mesh, slots=slots)
            params = generator.prepare(weights)
            starts = 16 + CIRCLE * b.rng.integers(0, 8, 8)
            prompts = [[int(start + i % CIRCLE) for i in range(200)] for start in starts[: max(1, slots // 4)]]

            def run(draft: Any, generator: Any = generator, params: Any = params, prompts: Any = prompts, law: Law = law) -> Any:
                return generator.generate(params, prompts, 4, max_tokens=128, law=law, draft=draft)

            ways = (0, 4, "auto")
            made = {way: run(way) for way in ways}
            for _ in range(3):  # until all programs are there that its choices may ask for
                run("auto")
            seconds: dict[Any, list[float]] = {way: [] for way in ways}
            for _ in range(b.runs):
                for way in ways:
                    begun = time.process_time()
                    run(way)
                    seconds[way].append(time.process_time() - begun)
            without, with_drafts, auto = (statistics.median(seconds[way]) for way in ways)
            tokens = [[each.tokens for group in made[way].completions for each in group] for way in ways]
            steps = made[4].drafted / 4
            out |= {
                f"{kind}_{slots}_cpu_s": without,
                f"{kind}_{slots}_faster": without / with_drafts,
                f"{kind}_{slots}_faster_auto": without / auto,
                f"{kind}_{slots}_accepted_a_step": made[4].accepted / steps if steps else 0.0,
                f"{kind}_{slots}_same": tokens[0] == tokens[1] == tokens[2],
            }
    return out


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--only", choices=("uniform", "long_prompts", "uneven", "decode", "speculative"), help="one workload")
    p.add_argument("--hf-python", default="", help="a Python with torch and transformers")
    p.add_argument("--matmul", choices=("float32", "bfloat16"), default="float32", help="operands of products")
    p.add_argument("--cache", choices=("", "float32", "bfloat16", "int8"), default="", help="keys and values that are kept")
    p.add_argument("--draws", type=int, default=5, help="how many times uneven draws its lengths")
    p.add_argument("--runs", type=int, default=5)
    p.add_argument("--seed", type=int, default=0)
    a = p.parse_args()
    if a.draws < 1 or a.runs < 1:
        p.error(f"--draws and --runs must be 1 at least, not {a.draws} and {a.runs}")
    workloads = {
        "uniform": partial(uniform, hf_python=a.hf_python), "long_prompts": long_prompts,
        "uneven": partial(uneven, draws=a.draws), "decode": decode, "speculative": speculative,
    }  # fmt: skip
    device = jax.devices()[0]
    versions = {"jaxreason": jaxreason.__version__, "jax": jax.__version__, "python": platform.python_version()}
    for name, workload in workloads.items():
        if a.only in (None, name):
            out = workload(Bench(seed=a.seed, runs=a.runs, matmul=a.matmul, cache=a.cache))
            out = {key: round(value, 4) if isinstance(value, float) else value for key, value in out.items()}
            kind = device.device_kind if device.platform != "cpu" else "cpu"
            how = {"matmul": a.matmul, "cache": a.cache, "device": kind, "versions": versions}
            print(json.dumps({"bench": f"sampling/{name}", **out, **how}))
            sys.stdout.flush()


if __name__ == "__main__":
    main()
