"""What runs in a cell alone: a program with its standard input, and the probe of whether the cell isolates."""

from __future__ import annotations

import os
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:  # not imported when it runs: typing takes as long as the interpreter
    from collections.abc import Callable
    from typing import Any

COMPILE_ERROR, OUT_OF_MEMORY = 121, 122  # as in jaxreason.rewards.cell


def play(source: str) -> None:
    """Runs a program as `python program.py` would; does not return."""
    module = type(sys)("__main__")
    sys.modules["__main__"] = module
    code = 1
    try:
        compiled = compile(source, "program.py", "exec", dont_inherit=True)
    except (SyntaxError, ValueError, RecursionError, MemoryError, OverflowError) as error:
        os.write(2, f"{type(error).__name__}: {str(error)[:500]}".encode(errors="backslashreplace"))
        os._exit(COMPILE_ERROR)
    try:
        exec(compiled, module.__dict__)
        code = 0
    except SystemExit as wanted:
        code = 0 if wanted.code is None else wanted.code if isinstance(wanted.code, int) else 1
    except MemoryError:
        code = OUT_OF_MEMORY
    except BaseException as error:
        _tell(error)
    try:
        if "threading" in sys.modules:
            sys.modules["threading"]._shutdown()
        if "atexit" in sys.modules:
            sys.modules["atexit"]._run_exitfuncs()
        sys.stdout.flush()
    except BaseException:
        code = code or 1
    os._exit(code & 255)


def _tell(error: BaseException) -> None:
    try:
        sys.__excepthook__(type(error), error, error.__traceback__)
        sys.stderr.flush()
    except BaseException:
        pass


def probe(secret: str) -> None:
    """Tries what a cell must not allow, and writes 'isolated' if none of it works, or what does."""
    wrong = []

    def possible(what: str, attempt: Callable[[], Any]) -> None:
        try:
            attempt()
        except (OSError, ImportError):
            return
        wrong.append(what)

    def connect() -> None:
        import _socket

        _socket.socket(_socket.AF_INET, _socket.SOCK_STREAM, 0)

    def fork() -> None:
        if os.fork() == 0:
            os._exit(0)

    if os.getppid() != 1:
        wrong.append("it is no child of process 1")
    possible("it can make a socket", connect)
    possible("it can start a process", fork)
    possible("it can read the caller's files", lambda: os.stat(secret))

    def write(folder: str) -> None:
        path = f"{folder}/probe-{os.urandom(8).hex()}"
        os.mkdir(path)
        os.rmdir(path)

    for folder in ("/", "/usr", "/dev", "/home", "/root"):
        possible(f"it can write to {folder}", lambda folder=folder: write(folder))
    possible("it can become root", lambda: os.setuid(0))
    if os.listdir("/tmp"):
        wrong.append("/tmp is not empty")
    os.write(1, "; ".join(wrong).encode() or b"isolated")
    os._exit(0)
