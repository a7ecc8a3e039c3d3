"""A profiler trace of chosen steps: where their time goes, operation by operation.

What is written is jax's own: an xplane file, which xprof reads, and trace.json.gz, for Perfetto, in a run's `profile` folder. Only
process 0 writes: it sees its own devices, and all run the same program. Deliberately absent: a port to connect to during a run.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

Trace = Callable[[int, Any], None]


@dataclass(frozen=True)
class ProfileConfig:
    """Which steps are traced by the profiler."""

    steps: str = ""  # of reinforcement, counted as in metrics.jsonl: one such as '3', or the first and the last, '3-5'; '': none


def steps_of(config: ProfileConfig, *, last: int) -> range:
    """The steps to trace, of a stage that ends with step `last`; a ValueError where they are none of it."""
    if not config.steps:
        return range(0)
    found = re.fullmatch(r"(\d+)(?:-(\d+))?", config.steps)
    if not found:
        raise ValueError(
            f"config.profile.steps is '{config.steps}': expected a step such as '3', the first and the last, '3-5', or ''"
        )
    first, end = int(found[1]), int(found[2] or found[1])
    if not 1 <= first <= end <= last:
        raise ValueError(
            f"config.profile.steps is '{config.steps}', and config.online.steps is {last}: expected the first and the last of some "
            "of these steps, or '' for none"
        )
    return range(first, end + 1)


def no_trace(step: int, before: Any) -> None:
    """Where nothing is traced."""


@contextmanager
def tracing(steps: range, folder: Path) -> Iterator[Trace]:
    """Yields what is to be called before each step with its number and what the step before it computes, which is waited for."""
    on = False

    def trace(step: int, before: Any) -> None:
        nonlocal on
        if (step in steps) == on:
            return
        jax.block_until_ready(before)
        if on:
            jax.profiler.stop_trace()
        else:
            options = jax.profiler.ProfileOptions()
            options.python_tracer_level = 0  # every call in Python would fill the file, and slow the steps down
            jax.profiler.start_trace(folder, profiler_options=options)
        on = not on

    try:
        yield trace if jax.process_index() == 0 else no_trace
    finally:
        if on:
            jax.profiler.stop_trace()
