"""Rules for `rewards.py`, in a module of their own: workers cannot import a program's main file."""

import os
import time

from jaxreason.types import Completion, Problem, Reward


def nothing(problem: Problem, completion: Completion) -> Reward:
    return Reward(1.0)


def compute(problem: Problem, completion: Completion) -> Reward:
    """Two milliseconds of a core."""
    until = time.thread_time() + 0.002
    while time.thread_time() < until:
        pass
    return Reward(1.0)


def crash(problem: Problem, completion: Completion) -> Reward:
    if completion.text == "crash":
        os._exit(1)
    return Reward(1.0)


def crash_with_sympy(problem: Problem, completion: Completion) -> Reward:
    return crash(problem, completion)


def _load_sympy() -> None:
    import sympy  # noqa: F401


BEFORE_FORK = {"crash_with_sympy": _load_sympy}
