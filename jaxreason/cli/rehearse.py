"""`jaxreason rehearse`: what a run will need of TPU chips that are not here, from its compiled programs."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator
from typing import Any

from rich.console import Console
from rich.table import Table

from jaxreason.cli.main import DONE, TOO_LARGE

SENT_SHOWN = 8  # kinds of collectives of each program, those of the most bytes
MIB = 2**20
LIBTPU = {
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # it does not mind another process
    "TPU_SKIP_MDS_QUERY": "1",  # asks no network
    "TPU_MIN_LOG_LEVEL": "3",
    # and does not complain that it knows nothing of the machine; what it compiles for is said by the topology
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
}


def run(given: argparse.Namespace) -> int:
    # before jax starts: no TPU of this machine is taken
    os.environ["JAX_PLATFORMS"] = "cpu"
    for name, value in LIBTPU.items():
        os.environ.setdefault(name, value)
    from jaxreason import config as schema
    from jaxreason.cli.commands import choose_precision
    from jaxreason.pipelines import chips, rehearsal

    if given.price is not None and not given.price > 0:
        raise ValueError(f"--price is {given.price}: expected more than 0, of one chip for an hour")
    config = schema.load(given.config, given.overrides)
    choose_precision(config)
    found = rehearsal.rehearse(
        config,
        chips.read(given.topology),
        completion_tokens=given.completion_tokens,
        told=lambda name: print(f"compiling '{name}'; this takes minutes", file=sys.stderr, flush=True),
    )
    if given.json:
        given.json.write_text(json.dumps(as_json(found, config=given.config, price=given.price), indent=1) + "\n", encoding="utf-8")
    console = Console(soft_wrap=not sys.stdout.isatty(), highlight=False, width=None if sys.stdout.isatty() else 132)
    for each in shown(found, price=given.price):
        console.print(each, markup=False) if isinstance(each, str) else console.print(each)
    return DONE if found.fits else TOO_LARGE


def as_json(found: Any, *, config: str, price: float | None) -> dict[str, Any]:
    """All numbers, with those that are derived."""
    chip = found.slice.chip
    return {
        "config": config,
        "topology": found.slice.name,
        "chip": chip._asdict(),
        "chips": found.slice.chips,
        "mesh": found.mesh,
        "versions": found.versions,
        "parameters": found.parameters,
        "fits": found.fits,
        "memory": found.memory,
        "programs": [
            {**each._asdict(), "total": each.total, "sent": [_sent(found, one) for one in each.sent]} for each in found.programs
        ],
        "changes": [each._asdict() for each in found.changes],
        "completion_tokens": found.completion_tokens,
        "parts": [each._asdict() for each in found.parts],
        "model_flops": found.model_flops,
        "step_seconds": found.step_seconds,
        "utilization": found.utilization,
        "steps": found.steps,
        "chip_hours": found.chip_hours,
        "price": None if price is None else price * found.chip_hours,
    }


def _sent(found: Any, one: Any) -> dict[str, Any]:
    return {**one._asdict(), "total": one.total(decoding=found.decode_rounds)}


def shown(found: Any, *, price: float | None) -> Iterator[str | Table]:
    """The report, in paragraphs and tables."""
    chip, slice = found.slice.chip, found.slice
    mesh = " x ".join(f"{name} {size}" for name, size in found.mesh.items()) or "one chip"
    versions = ", ".join(f"{name} {version}" for name, version in found.versions.items())
    yield f"{found.parameters:,} parameters on {slice.name}, {slice.chips} chips of {chip.name}: {mesh} ({versions})"

    memory = Table("of one chip, in GiB", *(each.name for each in found.programs), title="Memory", title_justify="left")
    rows = {
        "arguments: weights, state, batch": [each.arguments for each in found.programs],
        "temporaries and results": [each.temporaries for each in found.programs],
        "held beside it": [each.beside for each in found.programs],
        "total": [each.total for each in found.programs],
    }
    for name, values in rows.items():
        memory.add_row(name, *(_gib(value) for value in values))
    memory.add_row(f"of {_gib(chip.hbm)}", *(_verdict(each, chip.hbm) for each in found.programs))
    yield memory
    parts = ", ".join(f"{name} {_gib(size)}" for name, size in found.memory.items() if size)
    yield f"Within these, in GiB: {parts}. The cache is a temporary of sampling."
    if not found.fits:
        yield from _remedies(found)

    for program in found.programs:
        if not program.sent:
            continue
        table = Table(
            "collective", "over", "in loops of", "a round", "MiB a round", "GiB in all",
            title=f"Sent by one chip in '{program.name}'", title_justify="left",
        )  # fmt: skip
        for one in program.sent[:SENT_SHOWN]:
            total = one.total(decoding=found.decode_rounds)
            loops = " > ".join(one.loops) or "-"
            where = "as often as it decides" if total is None else f"{total / 2**30:.2f}"
            table.add_row(one.kind, one.over, loops, str(one.count), f"{one.bytes / MIB:.2f}", where)
        yield table

    times = Table("part of a step, on one chip", "TFLOP", "GB of HBM", "GB sent", "seconds", "bound by", title="Time, at least",
                  title_justify="left")  # fmt: skip
    for part in found.parts:
        numbers = (part.flops / 1e12, part.hbm_bytes / 1e9, part.sent_bytes / 1e9, part.seconds)
        times.add_row(part.name, *(f"{number:,.2f}" for number in numbers), part.bound)
    yield times
    yield (
        f"With completions of {found.completion_tokens} tokens a step takes {found.step_seconds:,.1f} s at least, at most "
        f"{100 * found.utilization:.0f}% MFU; {found.steps} steps take {found.chip_hours / slice.chips:,.1f} h, "
        f"{found.chip_hours:,.0f} chip-hours" + ("" if price is None else f", which cost {price * found.chip_hours:,.0f}") + "."
    )


def _remedies(found: Any) -> Iterator[str | Table]:
    over = max(found.programs, key=lambda each: each.total)
    yield f"It does not fit: '{over.name}' needs {_gib(over.total - found.slice.chip.hbm)} GiB more than there are."
    table = Table("set", "to", "saves GiB", "of", title="What would change that", title_justify="left")
    for change in found.changes:
        table.add_row(f"config.{change.key}", str(change.value), _gib(change.saves), change.of)
    yield table


def _verdict(program: Any, hbm: int) -> str:
    return "fits" if program.fits(hbm) else "does not fit"


def _gib(size: float) -> str:
    return f"{size / 2**30:.2f}"
