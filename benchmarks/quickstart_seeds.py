"""Runs the quickstart for several seeds with one config, and two controls that must not learn; prints a table and one JSON line.

    python benchmarks/quickstart_seeds.py --out runs/seeds

Each row is a whole `jaxreason train --config quickstart` in a process of its own, compile time included (`--cold-cache` gives
each an empty compilation cache). The controls are the same run with the accuracy reward left out (format only), and with the
accuracy reward dealt out at random among the step's completions (shuffled).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import jax

import jaxreason

VARIANTS = {
    "quickstart": [],
    "format only": ["--config.reward.accuracy.weight=0.0"],
    "shuffled": ["--config.reward.accuracy.shuffle=True"],
}


def run(variant: str, seed: int, out: Path, *, overrides: list[str], cold_cache: bool) -> dict[str, Any]:
    """One run to its end; returns its row."""
    workdir = out / f"{variant.replace(' ', '_')}-{seed}"
    if (workdir / "summary.json").exists():
        raise SystemExit(f"{workdir} holds a finished run: give another --out")
    command = [sys.executable, "-m", "jaxreason", "train", "--config", "quickstart", "--workdir", str(workdir), "--quiet"]
    command += [f"--config.seed={seed}", *VARIANTS[variant], *overrides]
    with tempfile.TemporaryDirectory() as cache:
        environment = {**os.environ, **({"JAX_COMPILATION_CACHE_DIR": cache} if cold_cache else {})}
        before, begun = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=environment)
        seconds = time.perf_counter() - begun
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    summary = json.loads((workdir / "summary.json").read_text())
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    last = [line for line in lines if line["stage"] == "reinforce" and "policy/kl_ref" in line][-1]

    def held_out(when: dict[str, float], what: str) -> float:
        return next(value for name, value in when.items() if name.endswith(what))

    return {
        "variant": variant,
        "seed": seed,
        "base": held_out(summary["phases"]["base"], "/pass@1"),
        "before": held_out(summary["before"], "/pass@1"),
        "after": held_out(summary["after"], "/pass@1"),
        "length_before": held_out(summary["before"], "/length"),
        "length_after": held_out(summary["after"], "/length"),
        "kl": last["policy/kl_ref"],
        "sampler_gap": max(line["policy/sampler_gap"] for line in lines if "policy/sampler_gap" in line),
        "seconds": seconds,
        "cpu_seconds": after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime,
    }


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    p.add_argument("--variants", nargs="+", choices=list(VARIANTS), default=list(VARIANTS))
    p.add_argument("--out", type=Path, required=True, help="a new folder for the runs")
    p.add_argument("--cold-cache", action="store_true", help="compile everything anew in each run")
    arguments, overrides = p.parse_known_args()
    rows = []
    print("| run | seed | base | cold start | after RL | length | KL to ref. | sampler gap | wall s | CPU s |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |", flush=True)
    for variant in arguments.variants:
        for seed in arguments.seeds:
            r = run(variant, seed, arguments.out, overrides=overrides, cold_cache=arguments.cold_cache)
            rows.append(r)
            print(
                f"| {variant} | {seed} | {r['base']:.3f} | {r['before']:.3f} | {r['after']:.3f} | "
                f"{r['length_before']:.1f} -> {r['length_after']:.1f} | {r['kl']:.3f} | {r['sampler_gap']:.1e} | "
                f"{r['seconds']:.0f} | {r['cpu_seconds']:.0f} |",
                flush=True,
            )
    versions = {"jaxreason": jaxreason.__version__, "jax": jax.__version__, "python": platform.python_version()}
    print(json.dumps({"bench": "quickstart_seeds", "rows": rows, "versions": versions, "overrides": overrides}))


if __name__ == "__main__":
    main()
