"""Compiling ahead of the first call, and giving back what the compiler used.

XLA's CPU compiler leaves several hundred megabytes in the allocator's free lists; returned to the system before the program
runs, they do not add to its peak. On a CPU, LLVM's first optimisation level compiles a training step a quarter faster than its
highest one, and the step, whose time goes to matrix products in libraries, runs as fast; other backends take no notice of it.
"""

from __future__ import annotations

import ctypes
import sys
from typing import Any

import jax


def compiled(function: Any, *args: Any) -> Any:
    """A jitted function compiled for arguments like these (the persistent cache is used), to be called with such only."""
    options = {"xla_backend_optimization_level": 1} if jax.default_backend() == "cpu" else None
    program = function.lower(*args).compile(options)
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc only
        if trim is not None:
            trim(0)
    return program
