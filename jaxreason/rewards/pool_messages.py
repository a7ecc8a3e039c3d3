"""What a `Pool`, its server and its workers tell each other, and how it is written as bytes.

A message is a head, of fixed size, and a body. What goes to a worker is pickled by the process that the run is in; what comes back
is JSON. Deliberately absent: who sends what when, which is in `pool_server`.
"""

from __future__ import annotations

import errno
import json
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from jaxreason.types import Completion, Problem, Reward, RewardFn

FAILURES = ("timeout", "crash", "memory", "error")
SETTING_UP = 2**64 - 1  # the sample number of what is said before the first sample
_HEAD = struct.Struct("<IQI")  # bytes of the body, number of the sample, number of the rule


@dataclass(frozen=True)
class Outcome:
    """What became of one rule on one sample: a reward, or None and why: 'timeout', 'crash', 'memory' or 'error'."""

    reward: Reward | None
    failure: str = ""
    detail: str = ""  # the exception or the signal, in words

    @property
    def total(self) -> float:
        """The reward's total, 0 where there is none."""
        return 0.0 if self.reward is None else self.reward.total


def outcome_of(rule: RewardFn, problem: Problem, completion: Completion) -> Outcome:
    """The rule's reward, or the exception that it raised; MemoryError, and what is no Exception, is the caller's."""
    try:
        reward = rule(problem, completion)
        if not isinstance(reward, Reward):
            raise TypeError(f"the rule returned {type(reward).__name__}, expected a Reward")
        parts = {str(name): None if value is None else float(value) for name, value in reward.parts.items()}
        return Outcome(Reward(float(reward.total), parts))  # NaN too: it stops the run, which says so
    except MemoryError:
        raise
    except Exception as error:
        if isinstance(error, OSError) and error.errno == errno.ENOMEM:
            raise MemoryError from error
        return Outcome(None, "error", f"{type(error).__name__}: {error}"[:300])


class Message(NamedTuple):
    number: int
    rule: int
    body: bytes

    def framed(self) -> bytes:
        return _HEAD.pack(len(self.body), self.number, self.rule) + self.body


def encode(outcome: Outcome) -> bytes:
    """As JSON: no process has to trust what another unpickles."""
    reward = None if outcome.reward is None else [outcome.reward.total, dict(outcome.reward.parts)]
    return json.dumps([reward, outcome.failure, outcome.detail]).encode()


def decode(body: bytes) -> Outcome:
    reward, failure, detail = json.loads(body)
    return Outcome(None if reward is None else Reward(*reward), failure, detail)


class Inbox:
    """Bytes as they come in, cut into messages."""

    def __init__(self) -> None:
        self._bytes = bytearray()

    def messages(self, more: bytes, *, longest: int = 2**32) -> list[Message]:
        """The messages that `more` completes; a ValueError where one is longer than `longest` bytes."""
        self._bytes += more
        found, at = [], 0
        with memoryview(self._bytes) as view:
            while len(view) - at >= _HEAD.size:
                length, number, rule = _HEAD.unpack_from(view, at)
                if length > longest:
                    raise ValueError(f"a message of {length} bytes, expected {longest} at most")
                if len(view) - at < _HEAD.size + length:
                    break
                at += _HEAD.size + length
                found.append(Message(number, rule, bytes(view[at - length : at])))
        del self._bytes[:at]
        return found


class Setup(NamedTuple):
    """What a server is told first."""

    rules: Sequence[tuple[str, bytes]]  # name and pickled function
    workers: int
    limits: Sequence[float]  # seconds of each rule
    memory_mb: int  # 0: no limit
