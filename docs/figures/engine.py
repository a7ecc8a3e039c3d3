"""Draws what the engine's slots hold, token by token, from a run of `jaxreason.sampling.engine` itself.

    python docs/figures/engine.py [--out FOLDER]

`engine.png`: completions of uneven lengths in 8 slots, without refill (batches that wait for their longest) and with it, where the
last ones are moved to fewer slots. Each bar is a completion; grey is a slot that computes and chooses nothing.
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

from jaxreason import sharding
from jaxreason.models import decoder, spec
from jaxreason.models.config import Architecture, Numerics
from jaxreason.sampling import engine
from jaxreason.sampling.engine import Rules
from jaxreason.sampling.law import Law
from jaxreason.sampling.queue import Queue, buckets, compact, drain

SLOTS, GROUP, PROBLEMS = 8, 4, 8
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#5B4FA2", "#7A5C2E")  # a prompt's; told apart
GREY, INK = "#E4E4E4", "#333333"


def refilled(lengths: np.ndarray) -> list[list[tuple[int, bool]]]:
    """For every step, (completion, whether it grows) of each slot."""
    mesh = sharding.make_mesh(sharding.MeshConfig(), devices=jax.devices()[:1])
    sizes: Any = {"vocab_size": 16, "hidden_size": 8, "layers": 1, "heads": 1, "kv_heads": 1, "head_size": 8, "mlp_size": 8}
    model = decoder.make_decoder(Architecture(max_positions=128, **sizes), Numerics(), mesh)
    params = model.prepare_sampling(spec.init(model.specs, jax.random.key(0), dtype="float32", mesh=mesh))
    rules, tokens = Rules(Law(), (), 0), int(lengths.max())
    prompt = jnp.ones((PROBLEMS, 4), jnp.int32)
    roots = engine.open(model, params, prompt, prompt > 0, rules=rules)
    keys = jax.random.split(jax.random.key(1), lengths.size)
    slots = engine.seat(model, roots, jnp.zeros(SLOTS, jnp.int32), keys[:SLOTS], tokens=tokens, rules=rules)
    slots = engine.close(slots, jnp.ones(SLOTS, bool))
    none = jnp.zeros(1, jnp.int32)
    queue = Queue(keys, jnp.asarray(lengths, jnp.int32), none, none + lengths.size)
    record = engine.blank(lengths.size, tokens, rules=rules, dtype=jnp.float32)
    one = jax.jit(partial(drain, model, rules=rules, group=GROUP, steps=1))
    steps = []
    for following in (*buckets(SLOTS, least=2)[1:], 0):
        while True:
            before = np.asarray(record.length) > 0  # what had ended by then
            slots, record, queue = one(params, roots, slots, record, queue)
            if not steps:
                now = list(range(SLOTS))  # the first step fills them in order
            steps.append([(number, not before[number]) for number in now])
            now = np.asarray(slots.number).tolist()
            waiting = int(queue.count[0] - queue.taken[0])
            if not waiting and int(jnp.sum(slots.record.status == engine.LIVE)) <= following:
                break
        if following:
            slots = compact(model, slots, slots_left=following)
            now = np.asarray(slots.number).tolist()
    assert (np.asarray(record.length) == lengths).all()
    return steps


def batches(lengths: np.ndarray) -> list[list[tuple[int, bool]]]:
    """The same where a batch waits for its longest."""
    steps = []
    for start in range(0, lengths.size, SLOTS):
        some = range(start, start + SLOTS)
        steps += [[(number, t < lengths[number]) for number in some] for t in range(int(lengths[start : start + SLOTS].max()))]
    return steps


def draw(axes: Any, steps: list[list[tuple[int, bool]]], title: str) -> None:
    for slot in range(SLOTS):
        held = [step[slot] if slot < len(step) else None for step in steps]
        start = 0
        while start < len(held):
            end = start
            while end < len(held) and held[end] == held[start]:
                end += 1
            if (what := held[start]) is not None:
                colour = COLOURS[what[0] // GROUP] if what[1] else GREY
                axes.barh(slot, end - start, left=start, height=0.82, color=colour, edgecolor="white", linewidth=0.8)
            start = end
    grown = sum(growing for step in steps for _, growing in step)
    computed = sum(map(len, steps))
    axes.set_title(f"{title}: {len(steps)} steps, {grown} tokens in {computed} slot steps", loc="left", fontsize=10, color=INK)
    axes.set_ylim(SLOTS - 0.4, -0.6)
    axes.set_yticks(range(SLOTS), [str(slot) for slot in range(SLOTS)])
    axes.set_ylabel("slot", color=INK)
    axes.tick_params(length=0, colors=INK, labelsize=8)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--out", type=Path, default=Path(__file__).parents[1])
    folder = p.parse_args().out
    lengths = np.clip(np.random.default_rng(4).geometric(1 / 16, PROBLEMS * GROUP), 2, 60)
    figure, (above, below) = plt.subplots(2, 1, figsize=(9, 5.2), sharex=True, layout="constrained")
    draw(above, batches(lengths), "Batches that wait for their longest")
    draw(below, refilled(lengths), "A slot takes the next completion, and the last ones move to fewer slots")
    below.set_xlabel("step of the decoding loop; a colour is a prompt, whose keys and values are held once", color=INK)
    figure.savefig(folder / "engine.png", dpi=130)


if __name__ == "__main__":
    main()
