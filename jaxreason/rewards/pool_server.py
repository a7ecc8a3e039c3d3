"""The processes of a `Pool`: a server that has the rules loaded, and the workers that it forks, watches and kills.

The server is one single-threaded loop that never waits for anyone: it passes samples, as the bytes they came in, on to its
workers, and their answers back. It forks, because a fork of a process with sympy in it takes milliseconds and a new
interpreter a second. It never imports jax, whose threads a fork would break.

A worker answers each rule of each sample by itself, so what the server kills is one rule on one sample. Whoever was queued
behind it is asked again. A crash, or memory that ran out, counts only in a worker that had done nothing before: what earlier
samples left behind in a process is nobody else's fault.

Absent on purpose: protection against the rule itself, which is trusted; a program that a completion holds belongs into a sandbox.
"""

from __future__ import annotations

import ctypes
import functools
import gc
import importlib
import math
import os
import pickle
import resource
import select
import signal
import socket
import sys
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from jaxreason.rewards.pool_messages import SETTING_UP, Inbox, Message, Outcome, Setup, encode, outcome_of
from jaxreason.types import RewardFn

_DEPTH = 8  # samples that a worker is given at once, at most: it does not wait for the server between two
_STALLED = 0.1  # seconds by which the server wakes too late where nothing ran for a while: a machine or a job that was paused
_GRACE = 0.5  # seconds for a process to be gone whose connection is closed, or that was killed
_OUT_OF_MEMORY = 77  # a worker's exit code
_LONGEST_ANSWER = 1 << 20
_PR_SET_PDEATHSIG = 1


class _Channel:
    """Messages over a socket that nobody waits for: what does not go out now goes out later."""

    def __init__(self, end: socket.socket) -> None:
        end.setblocking(False)
        self.end, self.inbox, self.outbox = end, Inbox(), bytearray()

    def put(self, message: Message) -> None:
        self.outbox += message.framed()
        self.flush()

    def flush(self) -> None:
        with suppress(BlockingIOError, BrokenPipeError, ConnectionResetError):  # that the other is gone shows when reading
            while self.outbox:
                del self.outbox[: self.end.send(self.outbox)]

    def take(self, *, longest: int = 2**32) -> tuple[list[Message], bool]:
        """What has come, and whether more can come."""
        try:
            more = self.end.recv(1 << 20)
        except BlockingIOError:
            return [], True
        except ConnectionResetError:
            return [], False
        return self.inbox.messages(more, longest=longest), bool(more)


def serve(descriptor: int) -> None:
    """The server's whole life, on one end of a socket pair; it ends when the other end is closed."""
    for number in (signal.SIGINT, signal.SIGTERM):  # those who send them to everybody let the run finish its step
        signal.signal(number, signal.SIG_IGN)
    with socket.socket(fileno=descriptor) as end:
        inbox, messages = Inbox(), []
        while not messages:
            more = end.recv(1 << 20)
            if not more:
                return
            messages = inbox.messages(more)
        setup: Setup = pickle.loads(messages[0].body)
        try:
            rules = [_load(name, pickled) for name, pickled in setup.rules]
        except ValueError as error:
            end.sendall(Message(SETTING_UP, 0, str(error).encode()).framed())
            return
        parent = _Channel(end)
        parent.inbox = inbox
        gc.collect()
        gc.freeze()  # a worker's collector need not touch, and so copy, what it shares with the server
        server = _Server(parent, rules, setup)
        server.enqueue(messages[1:])
        try:
            server.run()
        finally:
            server.close()


def _load(name: str, pickled: bytes) -> RewardFn:
    """The rule, with what it needs at its first use; a ValueError says why that is not possible."""
    try:
        rule = pickle.loads(pickled)
        functions = [(each, importlib.import_module(each.__module__)) for each in _functions(rule)]
    except Exception as error:
        raise ValueError(
            f"rule '{name}' cannot be loaded in a worker process ({type(error).__name__}: {error}): define it in a module that can "
            "be imported, not in the program's main file, or set workers to 0"
        ) from error
    for function, module in functions:
        before_fork = getattr(module, "BEFORE_FORK", {}).get(getattr(function, "__name__", ""))
        if before_fork is not None:
            try:
                before_fork()
            except Exception as error:
                raise ValueError(f"rule '{name}': {error}") from error
    if "jax" in sys.modules:
        raise ValueError(
            f"rule '{name}' imports jax, whose threads do not survive in a forked worker: import it in another module, or set "
            "workers to 0"
        )
    return rule


def _functions(rule: Any) -> Iterator[Any]:
    """The functions of a rule that is a partial call, or made of other `rules`."""
    inner = getattr(rule, "rules", None)
    if isinstance(rule, functools.partial):
        yield from _functions(rule.func)
    elif isinstance(inner, Mapping):
        for each in inner.values():
            yield from _functions(each)
    else:
        yield rule


class _Task(NamedTuple):
    number: int
    rule: int  # the first that is not answered
    payload: bytes


@dataclass
class _Worker:
    pid: int
    channel: _Channel
    tasks: deque[_Task] = field(default_factory=deque)  # it works at the first
    since: float = 0.0  # when it began that
    pardoned: bool = False  # and was given the time once more, after a stall
    answered: int = 0


class _Server:
    def __init__(self, parent: _Channel, rules: Sequence[RewardFn], setup: Setup) -> None:
        self.parent, self.rules, self.setup = parent, rules, setup
        self.queue: deque[_Task] = deque()
        self.dying: set[int] = set()
        self.workers: list[_Worker] = []
        self.libc = ctypes.CDLL(None)
        for _ in range(setup.workers):
            self.workers.append(self._fork())

    def run(self) -> None:
        while True:
            self._assign()
            ends = [worker.since + self._limit(worker) for worker in self.workers if worker.tasks]
            asleep = time.monotonic()
            patience = max(0.0, min(ends) - asleep) if ends else None
            ready = self._ready(patience)
            woken = time.monotonic()
            late = 0.0 if patience is None else woken - asleep - patience
            if self.parent.end.fileno() in ready:
                messages, more_can_come = self.parent.take()
                self.enqueue(messages)
                if not more_can_come:
                    return
            for worker in list(self.workers):
                if worker.channel.end.fileno() in ready and not self._read(worker):
                    self._replace(worker, timed_out=False)
                elif worker.tasks and woken - worker.since >= self._limit(worker):
                    if late > _STALLED and not worker.pardoned:
                        worker.since, worker.pardoned = woken, True
                    else:
                        self._replace(worker, timed_out=True)
            for pid in list(self.dying):
                self._reaped(pid, seconds=0.0)

    def _limit(self, worker: _Worker) -> float:
        return self.setup.limits[worker.tasks[0].rule]

    def close(self) -> None:
        for worker in self.workers:
            _kill(worker.pid)
        for worker in self.workers:
            self._reaped(worker.pid, seconds=_GRACE)

    def enqueue(self, messages: Sequence[Message]) -> None:
        self.queue += [_Task(*message) for message in messages]

    def _ready(self, patience: float | None) -> set[int]:
        """The descriptors with something to read; on the way, what can be written is."""
        poll = select.poll()
        channels = [self.parent, *(worker.channel for worker in self.workers)]
        for channel in channels:
            poll.register(channel.end, select.POLLIN | (select.POLLOUT if channel.outbox else 0))
        events = dict(poll.poll(None if patience is None else math.ceil(patience * 1000)))
        for channel in channels:
            if events.get(channel.end.fileno(), 0) & select.POLLOUT:
                channel.flush()
        return {descriptor for descriptor, event in events.items() if event & ~select.POLLOUT}

    def _assign(self) -> None:
        """Few samples at once near the end of the queue, so that no worker idles while another has some waiting."""
        depth = min(_DEPTH, 1 + len(self.queue) // (2 * len(self.workers)))
        for worker in self.workers:
            while self.queue and len(worker.tasks) < depth:
                self._give(worker, self.queue.popleft())

    def _give(self, worker: _Worker, task: _Task) -> None:
        if not worker.tasks:
            worker.since, worker.pardoned = time.monotonic(), False
        worker.tasks.append(task)
        worker.channel.put(Message(*task))

    def _read(self, worker: _Worker) -> bool:
        """Passes on what a worker has answered; False where it can answer no more."""
        try:
            messages, more_can_come = worker.channel.take(longest=_LONGEST_ANSWER)
        except ValueError:
            return False
        for message in messages:
            task = worker.tasks[0] if worker.tasks else None
            if task is None or (message.number, message.rule) != (task.number, task.rule):
                return False  # a rule wrote to what is not its own
            self._answer(worker.tasks, message.body)
            worker.answered += 1
            worker.since, worker.pardoned = time.monotonic(), False
        return more_can_come

    def _answer(self, tasks: deque[_Task], body: bytes) -> None:
        """Answers the first rule of the first task."""
        task = tasks.popleft()
        self.parent.put(Message(task.number, task.rule, body))
        if task.rule + 1 < len(self.rules):
            tasks.appendleft(task._replace(rule=task.rule + 1))

    def _replace(self, worker: _Worker, *, timed_out: bool) -> None:
        """Ends a worker with all that it started, and puts another in its place."""
        status = self._reaped(worker.pid, seconds=0.0 if timed_out else _GRACE)
        _kill(worker.pid)
        timed_out = timed_out and status is None
        if status is None:
            self._reaped(worker.pid, seconds=_GRACE)
        answered = worker.answered
        self._read(worker)  # its last words
        worker.channel.end.close()
        fresh = self._fork()
        self.workers[self.workers.index(worker)] = fresh
        tasks, again = worker.tasks, False
        if tasks and timed_out and worker.answered == answered:
            self._answer(tasks, encode(Outcome(None, "timeout", f"no answer within {self._limit(worker):g} s")))
        elif tasks and not timed_out:
            again = worker.answered > 0
            if not again:
                self._answer(tasks, encode(_post_mortem(status)))
        if again:
            self._give(fresh, tasks.popleft())
        self.queue.extendleft(reversed(tasks))

    def _reaped(self, pid: int, *, seconds: float) -> int | None:
        """The exit code of a worker that ends within that time, negative for a signal; None where it does not."""
        until = time.monotonic() + seconds
        while True:
            gone, status = os.waitpid(pid, os.WNOHANG)
            if gone:
                self.dying.discard(pid)
                return os.waitstatus_to_exitcode(status)
            if time.monotonic() >= until:
                if seconds:
                    self.dying.add(pid)  # killed, and inside the kernel still: looked for again later
                return None
            time.sleep(0.0005)

    def _fork(self) -> _Worker:
        ours, theirs = socket.socketpair()
        parent = os.getpid()
        pid = os.fork()
        if pid == 0:
            try:
                self.libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL) if sys.platform == "linux" else None
                if os.getppid() != parent:
                    os._exit(0)
                os.setpgid(0, 0)
                for each in (ours, self.parent.end, *(worker.channel.end for worker in self.workers)):
                    each.close()
                _limit(self.setup.memory_mb)
                _work(theirs, self.rules)
            finally:
                os._exit(1)
        with suppress(OSError):  # both set it, for whoever comes first; too late once the worker is gone
            os.setpgid(pid, pid)
        theirs.close()
        return _Worker(pid, _Channel(ours))


def _kill(pid: int) -> None:
    """Kills a worker's whole process group."""
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)


def _post_mortem(status: int | None) -> Outcome:
    """Why a worker ended by itself."""
    if status == _OUT_OF_MEMORY:
        return Outcome(None, "memory", "MemoryError")
    if status == -signal.SIGKILL:
        return Outcome(None, "memory", "killed by the system, as it does where memory runs out")
    if status is None:
        return Outcome(None, "crash", "the worker closed its connection")
    return Outcome(None, "crash", f"exit code {status}" if status >= 0 else signal.Signals(-status).name)


def _limit(memory_mb: int) -> None:
    """No core files; the first to go where the machine's memory runs out; that much more address space than now."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000")
    if memory_mb and sys.platform == "linux":
        now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        hard = resource.getrlimit(resource.RLIMIT_AS)[1]
        soft = now + memory_mb * 2**20
        # the soft limit alone: a rule may give a program that it starts another one
        resource.setrlimit(resource.RLIMIT_AS, (soft if hard == resource.RLIM_INFINITY else min(soft, hard), hard))


def _work(end: socket.socket, rules: Sequence[RewardFn]) -> None:
    """A worker's whole life: samples in, one answer for each rule out."""
    inbox = Inbox()
    while more := end.recv(1 << 16):
        for number, first, body in inbox.messages(more):
            for rule in range(first, len(rules)):
                end.sendall(Message(number, rule, encode(_attempt(rules[rule], body))).framed())
    os._exit(0)


def _attempt(rule: RewardFn, payload: bytes) -> Outcome:
    sample: Any = None
    try:
        sample = pickle.loads(payload)  # anew for each rule: none sees what another did to it
        return outcome_of(rule, *sample)
    except MemoryError:
        os._exit(_OUT_OF_MEMORY)
    except BaseException as error:  # sys.exit among them
        return Outcome(None, "error", f"{type(error).__name__}: {error}"[:300])
