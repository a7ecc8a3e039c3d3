"""Rules that workers can import: what a completion's text says is done, and most of it is no good."""

from __future__ import annotations

import ctypes
import mmap
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from jaxreason.types import Completion, Problem, Reward

PAGES = 2**24
kept: list[mmap.mmap] = []
loaded: list[int] = []


def length(problem: Problem, completion: Completion) -> Reward:
    """What is right: the text's length, half a point for each token."""
    return Reward(float(len(completion.text)), {"tokens": len(completion.tokens) / 2, "absent": None})


def does_as_told(problem: Problem, completion: Completion) -> Reward:
    match completion.text.split(":"):
        case ["hang"]:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            while True:
                pass
        case ["exit"]:
            os._exit(0)
        case ["segfault"]:
            ctypes.string_at(0)
        case ["abort"]:
            os.abort()
        case ["sys.exit"]:
            sys.exit(0)
        case ["eat"]:  # address space without touching it, in many pieces
            while True:
                kept.append(mmap.mmap(-1, PAGES))
        case ["gulp"]:
            bytearray(2**50)
        case ["leak"]:
            kept.append(mmap.mmap(-1, PAGES))
        case ["raise"]:
            raise LookupError("no such thing")
        case ["nothing"]:
            return None  # pyright: ignore[reportReturnType]
        case ["child", file]:  # who would outlive it
            child = subprocess.Popen(["sleep", "1000"])
            Path(file).write_text(str(child.pid))
            while True:
                pass
        case ["told", file]:
            Path(file).write_text(str(os.getpid()))
            while True:
                pass
        case ["sleep", seconds]:
            time.sleep(float(seconds))
    return Reward(float(len(completion.text)))


def modules(problem: Problem, completion: Completion) -> Reward:
    return Reward(1.0, dict.fromkeys(sys.modules, 1.0))


def open_files(problem: Problem, completion: Completion) -> Reward:
    """Descriptors by what they are."""
    files = [Path(f"/proc/self/fd/{name}") for name in os.listdir("/proc/self/fd") if int(name) > 2]
    return Reward(1.0, {str(file.readlink()): 1.0 for file in files if file.is_symlink()})  # that of the listing is gone


def where(problem: Problem, completion: Completion) -> Reward:
    """The process it runs in, and the one it was loaded in."""
    if completion.text == "hang":
        time.sleep(1000)
    return Reward(1.0, {"pid": os.getpid(), "parent": os.getppid(), "times": len(loaded), "loaded": loaded[0]})


def needs_an_extra(problem: Problem, completion: Completion) -> Reward:
    return Reward(1.0)


@dataclass(frozen=True)
class First:
    """A rule made of others."""

    rules: Mapping[str, Callable[..., Reward]]

    def __call__(self, problem: Problem, completion: Completion) -> Reward:
        return next(iter(self.rules.values()))(problem, completion)


def _extra() -> None:
    raise ValueError("math needs math-verify: install jaxreason[math]")


BEFORE_FORK = {"where": lambda: loaded.append(os.getpid()), "needs_an_extra": _extra}


def by_length(problem: Problem, completion: Completion) -> Reward:
    """1 for 32 tokens; of shorter completions some hang, some crash, some raise."""
    length = len(completion.tokens)
    if length < 32 and length % 3 == 0:
        time.sleep(1000)
    if length < 32 and length % 3 == 1:
        os._exit(1)
    if length < 32:
        raise ValueError("too short")
    return Reward(1.0)


def sleeps(problem: Problem, completion: Completion, *, limit_seconds: float = 1.0) -> Reward:
    """For as long as the text says, whatever its limit."""
    time.sleep(float(completion.text))
    return Reward(1.0)


def of_a_group(problem, completions, rewards):
    """By the problem: hangs, ends its process, raises, or says what each was told."""
    if problem.id == "hangs":
        time.sleep(60)
    if problem.id == "ends":
        os._exit(3)
    if problem.id == "raises":
        raise ValueError("not this one")
    return [Reward(each.total, {"told": each.parts["a"]}) for each in rewards]
