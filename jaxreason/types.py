"""Host nouns: what a problem, a completion and a reward are, in the standard library alone.

They cross process borders (reward workers) and live in other people's code, so nothing here knows of arrays.
The device's side of the same story is `jaxreason.batch`.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol


class StopReason(enum.Enum):
    """Why a completion ended."""

    EOS = "eos"  # the policy chose an end-of-sequence token
    STOP_STRING = "stop_string"  # the text ran into a stop string
    STEP = "step"  # a reasoning step's delimiter, in search
    LENGTH = "length"  # the token budget ran out: a truncated completion
    PARKED = "parked"  # set aside, to be continued in a later step


@dataclass(frozen=True)
class Problem:
    """A question with its hidden reference answer."""

    id: str
    question: str
    answer: str
    task: str = ""
    metadata: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Completion:
    """What the policy produced for one prompt."""

    text: str
    tokens: Sequence[int]
    stop: StopReason
    logp: Sequence[float] = ()  # of each token, under the law that sampled it
    mask: Sequence[bool] = ()  # whether the policy chose it
    step_ends: Sequence[int] = ()  # places of the tokens within which a reasoning step ended
    after_stop: int = 0  # bytes of the last token that follow the stop string, and are not in the text
    parent: int | None = None  # where it was forked: the completion that it continues


@dataclass(frozen=True)
class Reward:
    """A scalar and the named parts it was made of; a part is None where its rule does not apply to the row."""

    total: float
    parts: Mapping[str, float | None] = field(default_factory=dict)


@dataclass(frozen=True)
class Demonstration:
    """A problem with a completion to imitate."""

    problem: Problem
    completion: str


@dataclass(frozen=True)
class Preference:
    """Two continuations of one dialogue, of which people preferred the first."""

    messages: Sequence[Mapping[str, str]]  # the dialogue up to the turn that is judged: {"role": ..., "content": ...}
    chosen: str
    rejected: str


@dataclass(frozen=True)
class StepLabels:
    """A chain of reasoning with judgements: 1 right, 0 wrong, a share between them, None where nobody judged."""

    problem: Problem
    steps: Sequence[str]
    labels: Sequence[float | None]  # one of each step
    outcome: float | None = None  # of the chain as a whole; of a prefix, the share of right answers reached from its end


@dataclass(frozen=True)
class Rollout:
    """One row: a completion with its reward and the advantage it was given."""

    problem: Problem
    completion: Completion
    reward: Reward
    advantage: float = 0.0


class RewardFn(Protocol):
    """A host rule: text in, reward out. It may be called in another process."""

    def __call__(self, problem: Problem, completion: Completion) -> Reward: ...


class GroupRewardFn(Protocol):
    """A host rule that needs a whole group: its completions, and what each got by the rules that look at one alone.

    One reward for each completion, in their order; the parts of `rewards` have the names of the run's parts.
    """

    def __call__(self, problem: Problem, completions: Sequence[Completion], rewards: Sequence[Reward]) -> Sequence[Reward]: ...
