"""Host rules in processes that can be killed: a rule that hangs, crashes or eats memory costs one sample, never the step.

    with Pool({"accuracy": math_answer}, workers=2, limit_seconds=3.0) as pool:
        for parts in pool.score([(problem, completion), ...]):
            parts["accuracy"].total, parts["accuracy"].failure

The limit is of wall-clock time and holds for each rule on each sample. `start` and `wait` are the two halves of `score`: between
them the caller is free to do something else, and the workers go on. What runs is in `jaxreason.rewards.pool_server`.

A rule may name, in its module's `BEFORE_FORK = {"rule_name": function}`, a function without arguments that loads what it needs at
its first use (a library, a model); it is called once, in the process that the workers are forked from.
"""

from __future__ import annotations

import inspect
import json
import math
import os
import pickle
import socket
import subprocess
import sys
import weakref
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

from jaxreason.rewards.mixture import ByTask, Mixture
from jaxreason.rewards.pool_messages import SETTING_UP, Inbox, Message, Outcome, Setup, decode, outcome_of
from jaxreason.types import Completion, Problem, RewardFn

Sample = tuple[Problem, Completion]

_MAIN = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1])\n"
    "from jaxreason.rewards.pool_server import serve; serve(int(sys.argv[2]))"
)
_ENVIRONMENT = {
    "PYTHONHASHSEED": "0",  # a rule that goes through a set says the same in every run
    **dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1"),  # there is a worker for each core
}
SPARE = 0.1  # of a rule's own limit, so much more: to keep it before its worker is killed
_STARTS = 3  # without one answer between them
_FEW = 8  # samples that are handed over at a time: workers begin while the others are still being pickled


class Pool:
    """Scores samples by named rules in worker processes, which start at the first use and end with `close`.

    Without workers (0) the rules run in this process, where no limit holds. A pool is used by one thread.
    """

    def __init__(
        self, rules: Mapping[str, RewardFn], *, workers: int = 2, limit_seconds: float = 3.0, memory_mb: int = 2048
    ) -> None:
        """A rule with a `limit_seconds` of its own, such as one that runs programs, has that time and a tenth more.

        `memory_mb` is the address space in MiB that samples may add to a worker; 0: no limit.
        """
        if not rules:
            raise ValueError("the pool has no rules: give at least one")
        check(workers=workers, limit_seconds=limit_seconds, memory_mb=memory_mb)
        self.rules = dict(rules)
        self._names = tuple(rules)
        pickled = [(name, _pickled(name, rule)) for name, rule in rules.items()] if workers else []
        own = map(own_limit, rules.values())
        limits = [max(limit_seconds, (1 + SPARE) * each) for each in own]
        self._setup = Setup(pickled, workers, limits, memory_mb)
        self._process: subprocess.Popen[bytes] | None = None
        self._end: socket.socket | None = None
        self._ending: weakref.finalize[..., Any] | None = None  # for a pool that is never closed, too
        self._inbox = Inbox()
        self._starts = 0  # since the last answer
        self._count = 0
        self._asked: dict[int, Message] = {}  # by sample: what is to be asked, beginning at the first rule without an answer
        self._outcomes: dict[int, dict[str, Outcome]] = {}

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def score(self, samples: Sequence[Sample]) -> list[dict[str, Outcome]]:
        """The outcome of every rule on every sample, in their order."""
        return self.wait(self.start(samples))

    def start(self, samples: Sequence[Sample]) -> range:
        """Hands samples over, and returns what `wait` is to be given, once."""
        numbers = range(self._count, self._count + len(samples))
        self._count = numbers.stop
        if not self._setup.workers:
            self._outcomes |= dict(zip(numbers, score_here(self.rules, samples), strict=True))
            return numbers
        if self._end is None:
            self._launch()
        for at in range(0, len(samples), _FEW):
            some = zip(numbers[at : at + _FEW], samples[at : at + _FEW], strict=True)
            messages = {number: Message(number, 0, _payload(sample)) for number, sample in some}
            self._outcomes |= {number: {} for number in messages}
            self._asked |= messages
            self._say(list(messages.values()))
        return numbers

    def wait(self, started: range) -> list[dict[str, Outcome]]:
        """The outcomes of what was started, when all are there; a ValueError where a rule cannot run in a worker."""
        for number in started:
            while number in self._asked:
                self._listen()
        return [self._outcomes.pop(number) for number in started]

    def close(self) -> None:
        """Ends all processes, whatever they are doing; the pool may be used again, what was started is forgotten."""
        if self._ending is not None:
            self._ending()
        self._process, self._end, self._ending, self._starts = None, None, None, 0
        self._asked, self._outcomes = {}, {}

    def _launch(self) -> None:
        """Starts a server and gives it all that is not answered."""
        self._starts += 1
        ours, theirs = socket.socketpair()
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-c", _MAIN, json.dumps(sys.path), str(theirs.fileno())],
                env=os.environ | _ENVIRONMENT,
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,  # a terminal's Ctrl-C is for this process, which then closes the pool
            )
        self._end, self._inbox = ours, Inbox()
        self._ending = weakref.finalize(self, _end, ours, self._process)
        self._say([Message(SETTING_UP, 0, pickle.dumps(self._setup)), *self._asked.values()])

    def _say(self, messages: Sequence[Message]) -> None:
        assert self._end is not None
        with suppress(BrokenPipeError, ConnectionResetError):  # `_listen` hears why
            self._end.sendall(b"".join(message.framed() for message in messages))

    def _listen(self) -> None:
        """Takes in some answers; where the server has ended, starts another one and asks again."""
        assert self._end is not None and self._process is not None
        try:
            more = self._end.recv(1 << 20)
        except ConnectionResetError:
            more = b""
        for number, rule, body in self._inbox.messages(more):
            if number == SETTING_UP:
                self.close()
                raise ValueError(body.decode())
            self._starts = 0
            self._outcomes[number][self._names[rule]] = decode(body)
            if rule + 1 < len(self._names):
                self._asked[number] = self._asked[number]._replace(rule=rule + 1)
            else:
                del self._asked[number]
        if not more:
            code = _end(self._end, self._process)
            if self._starts >= _STARTS:
                self.close()
                raise RuntimeError(
                    f"the server of the reward's workers ended {_STARTS} times without an answer, by exit code {code}: set workers "
                    "to 0 to see why"
                )
            self._launch()


def _end(end: socket.socket, process: subprocess.Popen[bytes]) -> int:
    """Ends a server, and its workers with it; its exit code."""
    end.close()  # which the server takes for the end
    try:
        return process.wait(timeout=10)
    except subprocess.TimeoutExpired:
        process.kill()
        return process.wait()


def own_limit(rule: Any) -> float:
    """The seconds that a rule allows itself, by its keyword `limit_seconds`; 0 where it has none."""
    if isinstance(rule, ByTask):
        return max(map(own_limit, rule.rules.values()), default=0.0)
    if isinstance(rule, Mixture):
        return sum(map(own_limit, rule.rules.values()))
    try:
        parameter = inspect.signature(rule).parameters.get("limit_seconds")
    except (TypeError, ValueError):
        return 0.0
    default = None if parameter is None else parameter.default
    return float(default) if isinstance(default, int | float) else 0.0


def score_here(rules: Mapping[str, RewardFn], samples: Sequence[Sample]) -> list[dict[str, Outcome]]:
    """What a pool does, in this process: no limit holds, and an exception is an outcome still."""

    def one(rule: RewardFn, problem: Problem, completion: Completion) -> Outcome:
        try:
            return outcome_of(rule, problem, completion)
        except MemoryError:
            return Outcome(None, "memory", "MemoryError")

    return [{name: one(rule, *sample) for name, rule in rules.items()} for sample in samples]


def check(*, workers: int, limit_seconds: float, memory_mb: int, key: str = "") -> None:
    """A ValueError names what is out of its range, under `key`."""
    if workers < 0:
        raise ValueError(f"{key}workers is {workers}: expected 1 or more, or 0 to run the rules in this process")
    if not 0 < limit_seconds < math.inf:
        raise ValueError(f"{key}limit_seconds is {limit_seconds}: expected more than 0")
    if memory_mb < 0:
        raise ValueError(f"{key}memory_mb is {memory_mb}: expected 1 or more MiB, or 0 for no limit")


def _pickled(name: str, rule: Any) -> bytes:
    try:
        return pickle.dumps(rule)
    except Exception as error:
        raise ValueError(
            f"rule '{name}' cannot be sent to a worker process ({error}): give a function of a module, or set workers to 0"
        ) from error


def _payload(sample: Sample) -> bytes:
    try:
        return pickle.dumps(sample, protocol=pickle.HIGHEST_PROTOCOL)
    except Exception as error:
        raise ValueError(
            f"problem '{sample[0].id}' or its completion cannot be sent to a worker process ({error}): plain values can"
        ) from error
