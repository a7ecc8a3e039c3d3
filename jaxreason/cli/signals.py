"""Ctrl-C and SIGTERM while something works that can be gone on with later."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import jax

SHOW_CURSOR = b"\x1b[?25h\n"  # the live display hides it


@contextmanager
def stop_on_signals(say: Callable[[str], None], *, unit: str = "step") -> Iterator[Callable[[], bool]]:
    """Ctrl-C and SIGTERM let the step, or other unit of work, finish and be saved; a second one ends the process at once.

    Python runs a handler only between two instructions of the main thread, which a compilation puts minutes away. So the
    signals are read in a thread, from the pipe that Python's own C handler writes their numbers to.
    """
    asked = threading.Event()
    reading, writing = os.pipe()
    os.set_blocking(writing, False)

    def watch() -> None:
        told = False
        while byte := os.read(reading, 1):
            if byte[0] not in (signal.SIGINT, signal.SIGTERM):
                continue
            if told:
                _end_by(byte[0])
            told = True
            asked.set()
            with suppress(OSError, ValueError):  # nobody is there to read it
                say(f"{signal.Signals(byte[0]).name}: finishing this {unit} and saving; once more to stop at once")

    def stop() -> bool:
        if jax.process_count() == 1:
            return asked.is_set()
        import numpy as np
        from jax.experimental import multihost_utils

        # all processes must leave after the same step, whichever was signalled
        return bool(np.any(multihost_utils.process_allgather(np.asarray(asked.is_set()))))

    def ask(number: int, frame: Any) -> None:
        asked.set()  # an event loop that saves a checkpoint lends itself the pipe: then only this is called

    watcher = threading.Thread(target=watch, name="signals", daemon=True)
    watcher.start()
    pipe_before = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(pipe_before)
        os.close(writing)  # ends the watcher
        watcher.join()
        os.close(reading)


def _end_by(number: int) -> None:
    """Ends the process as the signal does by default; may be called in any thread."""
    if sys.stdout.isatty():
        os.write(sys.stdout.fileno(), SHOW_CURSOR)
    ctypes.CDLL(None).signal(number, 0)  # SIG_DFL; Python's own signal.signal works in the main thread only
    os.kill(os.getpid(), number)
