"""Which problems a step trains on, by how often they have been solved: measured pass rates, kept from step to step.

A problem's pass rate is the mean over its groups, within 0 and 1, of the reward's part that `evaluation.accuracy` names.
Three orders over a pool of N problems: as they come, epoch by epoch; easy first, each epoch after the first sorted by the pass
rates measured so far; and prioritised (Kimi k1.5, arXiv:2501.12599, section 2.3.4), where problem i is drawn with probability in
proportion to 1 - s_i. Problems whose measured pass rate is outside [lowest, highest] are left out, and counted.

All of it is a pure function of the seed, the step and the counts, which are in the checkpoint. Pass rates are over a run's whole
past, also of weaker policies: a problem that is left out is never tried again, and stays out. Absent on purpose: labels of
difficulty that a data set brings, which a mixture of tasks can weigh.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

ORDERS = ("", "easy_first", "prioritised")
EPOCHS, DRAWS = 5, 6  # what the seed is joined with


@dataclass(frozen=True)
class CurriculumConfig:
    """Problems by measured difficulty; as it stands here: none of it."""

    order: str = ""  # '': as they come | 'easy_first' | 'prioritised'
    lowest: float = 0.0  # measured pass rates below are left out: 0.01 leaves out what was never solved
    highest: float = 1.0  # and above: 0.99 what was always solved
    tries: int = 8  # completions of a problem after which its pass rate counts as measured for leaving it out
    pool: int = 0  # the first so many problems alone; 0: all, of a task that ends

    @property
    def on(self) -> bool:
        return bool(self.order) or self.lowest > 0 or self.highest < 1


class Counts(NamedTuple):
    """What is known of N problems, and what the epoch still has to go through."""

    solved: np.ndarray  # [N] float64, sums of pass rates times completions
    tried: np.ndarray  # [N] int64, completions
    queue: np.ndarray  # [M] int64: the epoch's problems in their order
    place: int  # how many of them have been taken
    epoch: int  # of the queue; -1 before the first


def fresh(problems: int) -> Counts:
    return Counts(np.zeros(problems), np.zeros(problems, np.int64), np.zeros(0, np.int64), 0, -1)


def pass_rates(counts: Counts) -> np.ndarray:
    """s_i [N]; NaN where a problem has not been tried."""
    return np.divide(counts.solved, counts.tried, out=np.full(len(counts.tried), np.nan), where=counts.tried > 0)


def too_hard(counts: Counts, config: CurriculumConfig) -> np.ndarray:
    """[N] bool: measured, and solved too seldom."""
    return (counts.tried >= config.tries) & (counts.solved < config.lowest * counts.tried)


def too_easy(counts: Counts, config: CurriculumConfig) -> np.ndarray:
    """[N] bool: measured, and solved too often."""
    return (counts.tried >= config.tries) & (counts.solved > config.highest * counts.tried)


def probabilities(rates: np.ndarray, kept: np.ndarray) -> np.ndarray:
    """(1 - s_i) / sum_j (1 - s_j) over the problems that are kept, s_i = 0 where it is not known; all alike where all are 1."""
    weight = np.where(kept, 1 - np.nan_to_num(rates), 0.0)
    if not weight.any():
        weight = kept.astype(np.float64)
    return weight / weight.sum()


def easiest_first(rates: np.ndarray, order: np.ndarray) -> np.ndarray:
    """The problems of `order` by falling pass rate, unknown ones last; alike ones stay in their order."""
    return order[np.argsort(-np.nan_to_num(rates[order], nan=-1.0), kind="stable")]


def choose(counts: Counts, *, step: int, count: int, config: CurriculumConfig, seed: int) -> tuple[Counts, np.ndarray]:
    """The problems of a step [count], numbers below N; a ValueError where every problem has been left out."""
    if config.order == "prioritised":
        chance = probabilities(pass_rates(counts), _kept(counts, config))
        return counts, np.random.default_rng([seed, DRAWS, step]).choice(len(chance), size=count, p=chance)
    taken: list[np.ndarray] = []
    while count:
        if counts.place == len(counts.queue):
            epoch = counts.epoch + 1
            order = np.random.default_rng([seed, EPOCHS, epoch]).permutation(np.flatnonzero(_kept(counts, config)))
            queue = easiest_first(pass_rates(counts), order) if config.order == "easy_first" else order
            counts = counts._replace(queue=queue, place=0, epoch=epoch)
        part = counts.queue[counts.place : counts.place + count]
        counts, count = counts._replace(place=counts.place + len(part)), count - len(part)
        taken.append(part)
    return counts, np.concatenate(taken)


def _kept(counts: Counts, config: CurriculumConfig) -> np.ndarray:
    hard, easy = too_hard(counts, config), too_easy(counts, config)
    kept = ~hard & ~easy
    if not kept.any():
        raise ValueError(
            f"config.online.curriculum leaves out every problem: of {len(kept)}, {hard.sum()} are solved less often than "
            f"lowest = {config.lowest} and {easy.sum()} more often than highest = {config.highest}: widen them, or end here"
        )
    return kept


def record(counts: Counts, chosen: np.ndarray, rates: np.ndarray, *, group: int) -> Counts:
    """The counts after problems `chosen` [P] had `group` completions each, a share `rates` [P] of which was right.

    A rate that is NaN says nothing of its problem, as where the reward's part does not apply to it.
    """
    known = np.isfinite(rates)
    solved, tried = counts.solved.copy(), counts.tried.copy()
    np.add.at(solved, chosen[known], rates[known].astype(np.float64) * group)
    np.add.at(tried, chosen[known], group)
    return counts._replace(solved=solved, tried=tried)


def metrics(counts: Counts, config: CurriculumConfig) -> dict[str, float]:
    """How many problems have been tried, how often those are solved, and how many are left out for which reason."""
    tried = counts.tried > 0
    return {
        "curriculum/tried": float(tried.sum()),
        "curriculum/pass_rate": float(pass_rates(counts)[tried].mean()) if tried.any() else 0.0,
        "curriculum/too_hard": float(too_hard(counts, config).sum()),
        "curriculum/too_easy": float(too_easy(counts, config).sum()),
    }


def to_json(counts: Counts) -> dict[str, Any]:
    """What a checkpoint says of them; Python's JSON gives every float back bit for bit."""
    lists = {name: getattr(counts, name).tolist() for name in ("solved", "tried", "queue")}
    return {**lists, "place": counts.place, "epoch": counts.epoch}


def from_json(told: Mapping[str, Any]) -> Counts:
    kinds = {"solved": np.float64, "tried": np.int64, "queue": np.int64}
    arrays = {name: np.asarray(told[name], kind) for name, kind in kinds.items()}
    return Counts(**arrays, place=int(told["place"]), epoch=int(told["epoch"]))
