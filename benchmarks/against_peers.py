"""The same GRPO step through jaxreason, TRL and Tunix in one run: CPU seconds on one thread, and their ratios.

    python benchmarks/against_peers.py --trl-python ENV/bin/python --tunix-python ENV/bin/python

The peers need environments of their own: for TRL `pip install torch==2.13.0`, then `pip install trl`; for Tunix
`pip install google-tunix`. Their scripts are in `peers/`; the workload is that of `grpo_step.py`. First-step seconds are taken
apart, on two threads. Prints a table and one JSON line.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
ONE_THREAD = {"XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false", "OMP_NUM_THREADS": "1"}


def measure(python: str, script: str, *options: str, threads: int) -> dict[str, Any]:
    """The JSON line that a benchmark prints, run on one core (`taskset -c 0`) or on two."""
    cores = ",".join(str(core) for core in range(threads))
    environment = {**os.environ, **(ONE_THREAD if threads == 1 else {}), "PYTHONPATH": str(HERE.parent)}
    command = ["taskset", "-c", cores, python, str(HERE / script), *options]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--trl-python", required=True)
    p.add_argument("--tunix-python", required=True)
    a = p.parse_args()
    rows: dict[str, dict[str, float]] = {}

    def ours(*options: str) -> dict[str, float]:
        r = measure(sys.executable, "grpo_step.py", *options, threads=1)
        two = measure(sys.executable, "grpo_step.py", *options, threads=2)
        names = ("step_cpu_s", "rollout_cpu_s", "peak_rss_mb")
        return {**{name: r[name] for name in names}, "first_step_s": two["first_step_s"], "step_s_two_threads": two["step_s"]}

    rows["jaxreason"] = ours()
    trl = measure(a.trl_python, "peers/trl_grpo.py", "--threads", "1", threads=1)
    trl2 = measure(a.trl_python, "peers/trl_grpo.py", "--threads", "2", threads=2)
    rows[f"TRL {trl['trl']}"] = {
        "step_cpu_s": trl["cpu_s_per_step_median"],
        "rollout_cpu_s": trl["cpu_s"]["generate"],
        "peak_rss_mb": trl["peak_rss_mb"],
        "first_step_s": trl2["first_step_s"],
        "step_s_two_threads": trl2["step_s_median"],
    }
    tunix = measure(a.tunix_python, "peers/tunix_grpo.py", "--vocab", "512", threads=1)
    tunix2 = measure(a.tunix_python, "peers/tunix_grpo.py", "--vocab", "512", threads=2)
    rows["Tunix"] = {
        "step_cpu_s": tunix["grpo"]["median_step_cpu_s"],
        "rollout_cpu_s": tunix["grpo"]["median_cpu_s"]["rollout"],
        "peak_rss_mb": tunix["max_rss_mb"],
        "first_step_s": tunix2["grpo"]["first_step_s"],
        "step_s_two_threads": tunix2["grpo"]["median_step_s"],
    }
    rows["jaxreason, bf16 operands"] = ours("--matmul", "bf16")
    base = rows["jaxreason"]
    print(
        "| | CPU s a step | CPU s a rollout, alone | ratio of the step to ours | wall s a step, two threads "
        "| first step s | peak MB |"
    )
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for name, r in rows.items():
        print(
            f"| {name} | {r['step_cpu_s']:.2f} | {r['rollout_cpu_s']:.2f} | {r['step_cpu_s'] / base['step_cpu_s']:.2f} | "
            f"{r['step_s_two_threads']:.2f} | {r['first_step_s']:.1f} | {r['peak_rss_mb']:.0f} |"
        )
    print(json.dumps({"bench": "against_peers", "rows": rows}))


if __name__ == "__main__":
    main()
