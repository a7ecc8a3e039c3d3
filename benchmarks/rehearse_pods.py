"""Rehearses the runs that are shipped for TPU slices, and writes their tables into docs/pods.md. Needs libtpu, no TPU.

    python benchmarks/rehearse_pods.py

Each rehearsal compiles for minutes; its numbers are kept in a folder, and what is there is not compiled again. Prints one JSON line
for each.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
BEGIN = "<!-- what follows is written by benchmarks/rehearse_pods.py -->\n"
RUNS: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    ("r1_zero_7b", "v5e:8x8", ()),
    ("r1_zero_7b", "v6e:4x4", ("--config.online.problems_per_microbatch=4",)),
    ("r1_zero_30b_a3b", "v5:4x4x4", ()),
    ("ppo_deepseekmath_7b", "v5:2x4x4", ()),
    ("r1_zero_671b", "v5:8x16x16", ()),
)
MOST = 8  # kinds of collectives shown of a program


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--folder", type=Path, default=ROOT / "runs" / "rehearsals", help="where the numbers are kept")
    p.add_argument("--kept", action="store_true", help="compile nothing: write the tables of what is there")
    given = p.parse_args()
    folder: Path = given.folder
    folder.mkdir(parents=True, exist_ok=True)
    found = []
    for config, topology, overrides in RUNS:
        file = folder / f"{config}-{topology.replace(':', '-')}.json"
        if not file.is_file():
            if given.kept:
                continue
            command = [sys.executable, "-m", "jaxreason", "rehearse", "--config", config, "--topology", topology, *overrides]
            subprocess.run([*command, "--json", str(file)], check=False, cwd=ROOT, stdout=subprocess.DEVNULL)
        each = json.loads(file.read_text(encoding="utf-8"))
        found.append((each, overrides))
        print(json.dumps({"bench": "rehearse", "config": config, "topology": topology, "fits": each["fits"]}))
    docs = ROOT / "docs" / "pods.md"
    prose = docs.read_text(encoding="utf-8").split(BEGIN)[0]
    docs.write_text(prose + BEGIN + "".join(section(*each) for each in found), encoding="utf-8")


def section(found: dict[str, Any], overrides: tuple[str, ...]) -> str:
    """A run's tables in Markdown."""
    chip, programs = found["chip"], found["programs"]
    mesh = " x ".join(f"{name} {size}" for name, size in found["mesh"].items())
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    within = ", ".join(f"{name} {gib(size)}" for name, size in found["memory"].items() if size)
    command = " ".join(("jaxreason rehearse --config", found["config"], "--topology", found["topology"], *overrides))
    lines = [
        f"\n## {found['config']} on {found['topology']}\n",
        f"{found['chips']} chips of {chip['name']}, mesh {mesh}; {found['parameters']:,} parameters. {versions}.\n",
        f"    {command}\n",
        *table(["of one chip, GiB", *(each["name"] for each in programs)], memory_rows(found)),
        f"Of these {within}, a temporary of sampling.\n",
        *table(["program", "collective", "over", "in loops of", "a round", "MiB a round", "GiB in all"], sent_rows(found)),
        *table(["part of a step, a chip", "TFLOP", "GB of HBM", "GB sent", "seconds", "bound by"], time_rows(found)),
        f"With completions of {found['completion_tokens']:,} tokens a step takes at least {found['step_seconds']:,.1f} s, at most "
        f"{100 * found['utilization']:.0f} % MFU; {found['steps']} steps are at least {found['chip_hours']:,.0f} chip-hours.\n",
    ]
    return "\n".join(lines)


def memory_rows(found: dict[str, Any]) -> list[list[str]]:
    programs, limit = found["programs"], found["chip"]["hbm"]
    names = {"arguments": "weights, state, batch", "temporaries": "temporaries and results", "beside": "held beside it"}
    rows = [[told, *(gib(each[name]) for each in programs)] for name, told in names.items()]
    total = [
        f"{gib(each['total'])}, {'fits' if each['compiled'] and each['total'] <= limit else 'does not fit'}" for each in programs
    ]
    return [*rows, [f"total, of {gib(limit)}", *total]]


def sent_rows(found: dict[str, Any]) -> list[list[str]]:
    rows = []
    for program in found["programs"]:
        for one in program["sent"][:MOST]:
            total = "as often as it decides" if one["total"] is None else f"{one['total'] / 2**30:,.2f}"
            size = f"{one['bytes'] / 2**20:,.2f}"
            rows.append(
                [program["name"], one["kind"], one["over"], " > ".join(one["loops"]) or "-", str(one["count"]), size, total]
            )
    return rows


def time_rows(found: dict[str, Any]) -> list[list[str]]:
    scales = (("flops", 1e12), ("hbm_bytes", 1e9), ("sent_bytes", 1e9), ("seconds", 1))
    return [[part["name"], *(f"{part[name] / scale:,.2f}" for name, scale in scales), part["bound"]] for part in found["parts"]]


def table(head: list[str], rows: list[list[str]]) -> list[str]:
    return ["\n".join(f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows)) + "\n"]


def gib(size: float) -> str:
    return f"{size / 2**30:,.2f}"


if __name__ == "__main__":
    main()
