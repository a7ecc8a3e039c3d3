"""What every task offers: training problems, held-out problems, a prompt, and perhaps what people wrote about them.

Problems are addressed by number, so a run's data position is one integer and any batch can be made again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from jaxreason.types import Demonstration, Preference, Problem, StepLabels

Message = dict[str, str]  # {"role": ..., "content": ...}


@dataclass(frozen=True)
class Skipped:
    """Rows of a data set that were left out because they are bad: how many of each kind, and the first few."""

    counts: Mapping[str, int] = field(default_factory=dict)  # reason -> rows
    first: tuple[str, ...] = ()  # 'file:line: what is wrong with it'

    def told(self, task: str) -> list[str]:
        """What a person is told of them, in lines; nothing where there are none."""
        if not self.counts:
            return []
        reasons = ", ".join(f"{count} {reason}" for reason, count in self.counts.items())
        return [f"{sum(self.counts.values())} bad rows of task '{task}' are left out: {reasons}", *self.first]


@dataclass(frozen=True)
class Task:
    """Problems of one kind."""

    name: str
    train: Callable[[int], Problem]  # number -> problem, for numbers below train_size
    train_size: int | None  # None: the task generates without end
    heldout: Sequence[Problem]  # never among the training problems
    messages: Callable[[Problem], list[Message]]  # the conversation that the chat template turns into a prompt
    demonstrations: Mapping[str, Callable[[int], Demonstration]] = field(default_factory=dict)  # kind -> number -> one
    words: tuple[str, ...] = ()  # a closed vocabulary, where no checkpoint brings a tokenizer
    rule: str = ""  # the host rule that scores its answers
    preferences: Mapping[str, Sequence[Preference]] = field(default_factory=dict)  # 'train' and 'heldout' -> pairs
    step_labels: Mapping[str, Sequence[StepLabels]] = field(default_factory=dict)  # 'train' and 'heldout' -> chains
    skipped: Skipped = field(default_factory=Skipped)
    places: Mapping[str, str] = field(default_factory=dict)  # a problem's id -> the file and line, or the row, that it is from
    rules: Mapping[str, str] = field(default_factory=dict)  # of a mixture: a problem's `task` -> the rule that scores it
    parts: Mapping[str, Task] = field(default_factory=dict)  # of a mixture: a problem's `task` -> that task
    # of a mixture: its `train` with only these problems of each finite task, such as those whose prompts fit
    restrict: Callable[[Mapping[str, Sequence[int]]], Callable[[int], Problem]] | None = None
