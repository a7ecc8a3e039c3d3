"""Compiling ahead of the first call, and giving back what the compiler used.

XLA's CPU compiler leaves several hundred megabytes in the allocator's free lists; returned to the system before the program
runs, they do not add to its peak.
"""

from __future__ import annotations

import ctypes
import sys
from typing import Any


def compiled(function: Any, *args: Any) -> Any:
    """A jitted function compiled for arguments like these (the persistent cache is used), to be called with such only."""
    program = function.lower(*args).compile()
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc only
        if trim is not None:
            trim(0)
    return program
