"""Mixtures: how the parts of a reward add up, and which rule scores which problem.

A part may be None for a row, where its rule does not apply (no reference to compare with, no words to judge). It then drops
out: it adds nothing to the row's sum, the other weights stay as they are, and the row is in no mean over that part. A gate is
another part that must be positive for this one to count, so that a gated part counts 0 where its gate is 0, negative or None.

Two gates are worth knowing. Accuracy gated by the format teaches the format first. The format gated by accuracy keeps a group in
which every answer is wrong without a signal: a format reward of its own makes the wrong answers of such a group differ, and
what is then learnt there has nothing to do with being right.

`jaxreason.training.collect` does the same on arrays, where NaN stands for None. Absent on purpose: expressions over parts; a
mixture that is no weighted sum is a rule of its own, `(problem, completion) -> Reward`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType

from jaxreason.types import Completion, GroupRewardFn, Problem, Reward, RewardFn

Parts = Mapping[str, float | None]
NO_GATES: Mapping[str, str] = MappingProxyType({})


@dataclass(frozen=True)
class ByTask:
    """A rule for each task, by `problem.task`, which does not apply where there is none. It can be sent to other processes."""

    rules: Mapping[str, RewardFn] = field(default_factory=dict)

    def __call__(self, problem: Problem, completion: Completion) -> Reward:
        rule = self.rules.get(problem.task)
        return Reward(0.0, {problem.task: None}) if rule is None else rule(problem, completion)


@dataclass(frozen=True)
class Mixture:
    """Host rules that add up to one, each a part: a rule like any other, `(problem, completion) -> Reward`."""

    rules: Mapping[str, RewardFn]
    weights: Mapping[str, float]
    gates: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check(list(self.rules), self.weights, self.gates)

    def __call__(self, problem: Problem, completion: Completion) -> Reward:
        parts = {name: value(rule(problem, completion)) for name, rule in self.rules.items()}
        return Reward(total(parts, self.weights, gates=self.gates), parts)


@dataclass(frozen=True)
class OfGroup:
    """A rule of a whole group, as workers run it: completions and what they got in one's place, a part by each one's number."""

    rule: GroupRewardFn

    def __call__(self, problem: Problem, group: tuple[Sequence[Completion], Sequence[Reward]]) -> Reward:
        found = self.rule(problem, *group)
        if len(found) != len(group[0]):
            raise ValueError(f"it gave {len(found)} rewards for the {len(group[0])} completions of a group")
        return Reward(0.0, {str(number): value(reward) for number, reward in enumerate(found)})


def value(reward: Reward) -> float | None:
    """What a rule's reward counts as one part: its total, or None where all of its own parts are None."""
    applies = not reward.parts or any(each is not None for each in reward.parts.values())
    return reward.total if applies else None


def total(parts: Parts, weights: Mapping[str, float], *, gates: Mapping[str, str] = NO_GATES) -> float:
    """sum_k weight_k part_k over the parts that apply to the row, those behind a closed gate taken as 0."""
    return sum(weights[name] * (each or 0.0) for name, each in gated(parts, gates).items())


def gated(parts: Parts, gates: Mapping[str, str]) -> dict[str, float | None]:
    """The parts, 0 where the gate of one is closed: the part that it names is 0, negative or None. None stays None."""
    return {
        name: 0.0 if each is not None and name in gates and not (parts[gates[name]] or 0.0) > 0 else each
        for name, each in parts.items()
    }


def totals(
    group: Sequence[Parts],
    weights: Mapping[str, float],
    *,
    gates: Mapping[str, str] = NO_GATES,
    normalised: frozenset[str] = frozenset(),
    epsilon: float = 1e-6,
) -> list[float]:
    """The sums of a group's rows, parts in `normalised` by their z-scores in the group (GDPO, arXiv:2601.05242, Eq. 4, 5).

    A z-score is taken among the rows to which the part applies, with the population's standard deviation. With all parts
    normalised this is normalise-then-sum, with none sum-then-normalise, where the algorithm's advantage normalises the sum.
    """
    rows = [gated(parts, gates) for parts in group]
    for name in normalised:
        scores = _zscores([row[name] for row in rows], epsilon)
        rows = [row | {name: score} for row, score in zip(rows, scores, strict=True)]
    return [total(row, weights) for row in rows]


def check(parts: Sequence[str], weights: Mapping[str, float], gates: Mapping[str, str]) -> None:
    """Raises ValueError where weights and parts differ in their names, or a gate is no part, or a part's own."""
    if not parts or set(parts) != set(weights):
        raise ValueError(f"parts {sorted(parts)} and weights {sorted(weights)} must name the same rules, at least one")
    for name, gate in gates.items():
        if name not in parts or gate not in parts or gate == name:
            raise ValueError(f"the gate of part '{name}' is '{gate}': expected another of the parts {', '.join(sorted(parts))}")


def _zscores(values: Sequence[float | None], epsilon: float) -> list[float | None]:
    known = [each for each in values if each is not None]
    if not known or min(known) == max(known):
        return [None if each is None else 0.0 for each in values]
    mean = sum(known) / len(known)
    deviation = math.sqrt(sum((each - mean) ** 2 for each in known) / len(known))
    return [None if each is None else (each - mean) / (deviation + epsilon) for each in values]
