"""Sampling and scoring: from prompts to completions with their reward's parts.

Traced rules are part of the program that samples; host rules are Python on text, between the program that samples and the
one that updates. Which a run has follows from its rules' names, and both end in the same `RolloutBatch`.
"""

from __future__ import annotations

import dataclasses
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxreason import naming, sharding
from jaxreason.batch import PromptBatch, RolloutBatch
from jaxreason.models.decoder import Model
from jaxreason.models.tokenizer import Tokenizer
from jaxreason.objectives import shaping
from jaxreason.rewards import mixture, traced
from jaxreason.rewards.finding import GROUP_NOUNS, found_rules
from jaxreason.rewards.pool import Pool, score_here
from jaxreason.rewards.pool_messages import FAILURES, Outcome
from jaxreason.rewards.traced import TracedRule, weighted_total
from jaxreason.sampling import stops
from jaxreason.sampling.rollout import Sampled, SamplingConfig, sample
from jaxreason.sampling.stops import StopStrings
from jaxreason.training import partial as partial_rollouts
from jaxreason.types import Completion, GroupRewardFn, Problem, Reward, RewardFn, StopReason

Parts = Mapping[str, jax.Array]  # name -> [P, G]


@dataclass(frozen=True)
class RulePart:
    """One part of the reward: a rule named `module.function` under jaxreason.rewards, and what it counts."""

    rule: str = ""  # 'task': the rule that the problem's task names
    weight: float = 1.0
    gate: str = ""  # another part, which must be positive for this one to count
    normalise: bool = False  # what counts is its z-score in the group (GDPO, arXiv:2601.05242), before the sum
    shuffle: bool = False  # a control: its values are dealt out anew among the batch's completions before they count
    kwargs: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class ScoringConfig:
    """Where host rules run, and what each may take on one completion; beyond it the part is 0, and counted as failed."""

    workers: int = 2  # processes; 0: in the run's own, where no limit holds
    limit_seconds: float = 3.0
    memory_mb: int = 2048  # address space in MiB that a worker may add; 0: no limit


class Scoring(NamedTuple):
    """A run's reward: the rules by part, split into traced ones, host ones and those of a whole group, and how they add up."""

    traced: Mapping[str, TracedRule]
    host: Mapping[str, RewardFn]
    weights: Mapping[str, float]
    shuffled: frozenset[str]
    pool: Pool | None = None  # where the host rules run; without it in this process
    group: Mapping[str, GroupRewardFn] = MappingProxyType({})
    gates: Mapping[str, str] = mixture.NO_GATES
    normalised: frozenset[str] = frozenset()
    group_pool: Pool | None = None  # where the rules of a group run, likewise

    def close(self) -> None:
        """Ends the pools' processes; the next scoring would start them anew."""
        for pool in (self.pool, self.group_pool):
            if pool is not None:
                pool.close()


def rules() -> dict[str, Callable[..., Any]]:
    """Every rule under jaxreason.rewards by the name `module.function`."""
    by_tokens = {f"traced.{name}": function for name, function in naming.returning(traced, "TracedRule").items()}
    return found_rules("Reward", *GROUP_NOUNS) | by_tokens


def make_scoring(
    parts: Mapping[str, RulePart],
    *,
    vocabulary: Sequence[bytes | None],
    eos_ids: Sequence[int],
    config: ScoringConfig | None = None,
    task_rules: Mapping[str, str] = MappingProxyType({}),
) -> Scoring:
    """Resolves the rules' names; a ValueError names the part whose rule does not exist or does not take its kwargs.

    Host rules run in worker processes as `config` says, and in this process without one. `task_rules` says which rule
    scores the problems of a task, for a part whose rule is 'task'.
    """
    traced: dict[str, TracedRule] = {}
    host: dict[str, RewardFn] = {}
    group: dict[str, GroupRewardFn] = {}
    known = rules()
    for name, part in parts.items():
        key = f"reward.{name}.kwargs"
        if part.rule == "task":
            host[name] = _by_task(known, part.kwargs, task_rules, key=key)
            continue
        function = naming.find(part.rule, known, key=f"reward.{name}.rule")
        if part.rule.startswith("reflection.") and part.weight:
            raise ValueError(
                f"config.reward.{name}.weight is {part.weight}, and '{part.rule}' is a metric, which as a reward teaches to write "
                "the words that it counts: set it to 0"
            )
        if part.rule.startswith("traced."):
            traced[name] = naming.call(function, vocabulary, eos_ids, kwargs=part.kwargs, key=key)
            continue
        whole = inspect.signature(function).return_annotation in GROUP_NOUNS
        (group if whole else host)[name] = partial(function, **naming.arguments(function, part.kwargs, key=key))
    weights = {name: part.weight for name, part in parts.items()}
    gates = {name: part.gate for name, part in parts.items() if part.gate}
    for name, gate in gates.items():
        if gate == name or gate not in parts:
            others = [each for each in parts if each != name]
            raise ValueError(f"config.reward.{name}.gate is '{gate}', which is no other part: {naming.nearest(gate, others)}")

    def pool(rules: Mapping[str, Any]) -> Pool | None:
        return Pool(rules, **dataclasses.asdict(config)) if rules and config is not None and config.workers else None

    return Scoring(
        traced,
        host,
        weights,
        frozenset(name for name, part in parts.items() if part.shuffle),
        pool(host),
        group,
        gates,
        frozenset(name for name, part in parts.items() if part.normalise),
        pool({name: mixture.OfGroup(rule) for name, rule in group.items()}),
    )


def _by_task(
    known: Mapping[str, Callable[..., Any]], kwargs: Mapping[str, Any], task_rules: Mapping[str, str], *, key: str
) -> mixture.ByTask:
    """The rule of each task, and those that `kwargs` name, task by task, in their place."""
    found: dict[str, RewardFn] = {}
    for task, rule in {**task_rules, **kwargs}.items():
        where = f"{key}.{task}"
        if not rule:
            raise ValueError(f"task '{task}' names no rule that scores its answers: name one with --config.{where}=module.function")
        function = naming.find(rule, known, key=where)
        if inspect.signature(function).return_annotation != "Reward":
            raise ValueError(f"config.{where} is '{rule}', which is no rule on the text of one completion: name one that is")
        needed = [each.name for each in inspect.signature(function).parameters.values() if _is_needed(each)]
        if needed:
            raise ValueError(
                f"config.{where} is '{rule}', which needs {', '.join(needed)}, and a task's rule is given no settings: name one "
                "that needs none"
            )
        found[task] = partial(function)
    if not found:
        raise ValueError(f"config.{key.removesuffix('.kwargs')}.rule is 'task', and the task names no rule: name one instead")
    return mixture.ByTask(found)


def _is_needed(parameter: inspect.Parameter) -> bool:
    return parameter.kind is parameter.KEYWORD_ONLY and parameter.default is parameter.empty


def sample_and_score(
    model: Model,
    scoring: Scoring,
    params: Any,
    prompts: PromptBatch,
    key: jax.Array | None,
    *,
    config: SamplingConfig,
    group: int,
    eos_ids: tuple[int, ...],
    pad_id: int,
    stop: StopStrings | None = None,
) -> tuple[Sampled, dict[str, jax.Array]]:
    """Completions and the traced parts of their reward; greedy without a key. To be traced.

    Traced rules see whole tokens: what a stop string is, and what follows it in its last token, is part of the text for them.
    """
    sampled = sample(
        model,
        params,
        prompts,
        key,
        group=group,
        max_completion_tokens=config.max_completion_tokens,
        eos_ids=eos_ids,
        pad_id=pad_id,
        law=config.law,
        search=None if stop is None else jax.tree.map(jnp.asarray, stop.machine),
        slots=config.slots,
        draft=config.draft,
    )
    return sampled, score_traced(scoring, prompts, sampled, config=config)


def score_traced(scoring: Scoring, prompts: PromptBatch, sampled: Sampled, *, config: SamplingConfig) -> dict[str, jax.Array]:
    """The traced parts of the reward, [P, G] each."""
    place = jnp.arange(config.max_completion_tokens, dtype=jnp.int32)
    written = place[None, None] < sampled.length[..., None] if config.forced else sampled.mask
    return {name: rule(prompts, sampled.completion, written) for name, rule in scoring.traced.items()}


def total_reward(scoring: Scoring, parts: Parts, key: jax.Array, done: jax.Array | None = None) -> jax.Array:
    """The weighted sum of the parts [P, G], those of a control dealt out anew first, among the groups that are `done` [P].

    What `mixture.totals` says: NaN is a part that does not apply, a closed gate makes a part 0, and gates see what a
    control was dealt, for otherwise they would tell what it hides.
    """
    counted = dict(parts)
    for number, name in enumerate(sorted(scoring.shuffled)):
        counted[name] = partial_rollouts.shuffled(parts[name], jax.random.fold_in(key, number), done)
    values = {name: jnp.where(jnp.isnan(value), 0.0, value) for name, value in counted.items()}
    values |= {name: jnp.where(values[gate] > 0, values[name], 0.0) for name, gate in scoring.gates.items()}
    for name in scoring.normalised:
        applies = ~jnp.isnan(counted[name])[..., None]
        values[name] = shaping.normalise_then_sum(values[name][..., None], jnp.ones(1, jnp.float32), applies=applies)
    return weighted_total(values, scoring.weights)


def rollout_batch(prompts: PromptBatch, sampled: Sampled, reward: jax.Array) -> RolloutBatch:
    return RolloutBatch(
        prompt=prompts.prompt,
        prompt_mask=prompts.prompt_mask,
        completion=sampled.completion,
        mask=sampled.mask,
        truncated=sampled.truncated,
        logp_behaviour=sampled.logp,
        reward=reward,
    )


def completions(sampled: Sampled | Shown, tokenizer: Tokenizer, *, stop: StopStrings | None = None) -> list[list[Completion]]:
    """Sampled tokens (on the host) as text, [P][G]; what was ended by a stop string is cut where that begins."""

    def one(tokens: Any, mask: Any, truncated: Any, stopped: Any, length: Any) -> Completion:
        written = tokens[:length].tolist()
        reason = StopReason.LENGTH if truncated else StopReason.STOP_STRING if stopped else StopReason.EOS
        told = {"tokens": written, "stop": reason, "mask": mask[:length].tolist()}
        if stop is None or not stopped:
            return Completion(tokenizer.decode(written), **told)
        cut = stops.cut(written, stop.vocabulary, stops=stop.strings)
        return Completion(cut.text, **told, after_stop=cut.after)

    rows = (sampled.completion, sampled.mask, sampled.truncated, sampled.stopped, sampled.length)
    return [[one(*each) for each in zip(*group, strict=True)] for group in zip(*rows, strict=True)]


class HostScores(NamedTuple):
    """What the host rules said of a batch."""

    parts: dict[str, np.ndarray]  # name -> [P, G] float32; NaN where a part does not apply
    failed: dict[str, np.ndarray]  # reason -> [P, G] bool: a part has no reward for it, and counts 0
    asked: np.ndarray  # [P, G] bool

    def shares(self) -> dict[str, float]:
        """The share of the completions asked about that failed, by reason; nothing without host rules."""
        return {reason: float(each.sum() / max(1, self.asked.sum())) for reason, each in self.failed.items()}

    def none_shares(self) -> dict[str, float]:
        """The share of the completions asked about to which a part does not apply, where there are any."""
        none = {name: float(np.isnan(values[self.asked]).mean()) for name, values in self.parts.items() if self.asked.any()}
        return {name: share for name, share in none.items() if share}


def score_on_host(
    scoring: Scoring,
    problems: Sequence[Problem],
    groups: Sequence[Sequence[Completion]],
    done: Sequence[bool] | None = None,
    *,
    traced: Mapping[str, Any] = MappingProxyType({}),
    keeper: np.ndarray | None = None,
    size: int = 0,
) -> HostScores:
    """The host parts of the reward; 0 for groups that are not `done`, which no rule is asked about.

    Rules of a whole group come last: they are told the other parts, the `traced` ones among them. A ValueError says what a rule
    raised, where it did so on every one of several completions, or on every group: then it is the rule's mistake.

    Where several processes score, `keeper` [P] says which of them has each problem's group. What is given are then this process'
    own rows, maybe none, of groups of `size`; what comes back are those of all, the same everywhere.
    """
    asked = np.zeros((len(groups), len(groups[0]) if groups else size), bool)
    asked[:] = True if done is None else np.asarray(done, bool)[:, None]
    parts = {name: np.zeros(asked.shape, np.float32) for name in (*scoring.host, *scoring.group)}
    failed = {reason: np.zeros(asked.shape, bool) for reason in FAILURES if parts}
    if scoring.host:
        where = list(zip(*np.nonzero(asked), strict=True))
        samples = [(problems[p], groups[p][g]) for p, g in where]
        outcomes = score_here(scoring.host, samples) if scoring.pool is None else scoring.pool.score(samples)
        for place, by_part in zip(where, outcomes, strict=True):
            for name, outcome in by_part.items():
                parts[name][place] = 0.0 if outcome.reward is None else in_array(mixture.value(outcome.reward))
                if outcome.failure:
                    failed[outcome.failure][place] = True
        _check_useful(scoring.host, outcomes, "completion", least=2, shared=keeper is not None)
    if scoring.group:
        told = {**traced, **{name: parts[name] for name in scoring.host}}
        places = np.flatnonzero(asked.any(axis=1)).tolist()
        samples = [(problems[p], (groups[p], _told(scoring, told, p, len(groups[p])))) for p in places]
        rules: Any = {name: mixture.OfGroup(rule) for name, rule in scoring.group.items()}
        outcomes = score_here(rules, samples) if scoring.group_pool is None else scoring.group_pool.score(samples)  # pyright: ignore
        for p, by_part in zip(places, outcomes, strict=True):
            for name, outcome in by_part.items():
                if outcome.reward is not None:
                    parts[name][p] = [in_array(value) for value in outcome.reward.parts.values()]
                else:
                    failed[outcome.failure][p] = True
        _check_useful(scoring.group, outcomes, "group", least=1, shared=keeper is not None)
    scores = HostScores(parts, failed, asked)
    return scores if keeper is None else sharding.of_keepers(scores, keeper)


def _check_useful(
    rules: Mapping[str, Any], outcomes: Sequence[Mapping[str, Outcome]], what: str, *, least: int, shared: bool
) -> None:
    """A ValueError where a rule raised on all that it was asked about, which were `least` or more, on all processes together."""
    counts = np.asarray([[len(outcomes), sum(each[name].failure == "error" for each in outcomes)] for name in rules], np.int32)
    totals = sharding.sum_of_processes(counts) if shared else counts
    for name, (asked, errors) in zip(rules, totals.tolist(), strict=True):
        if asked >= least and errors == asked:
            detail = outcomes[0][name].detail if outcomes else "another process says how"
            raise ValueError(f"the rule of config.reward.{name} fails on every {what}: {detail}")


def _told(scoring: Scoring, parts: Mapping[str, Any], p: int, size: int) -> list[Reward]:
    """What the rules of a group are told of each of its completions: the parts that are known, and their sum."""
    rows = [applying(parts, p, g) for g in range(size)]
    gates = {name: gate for name, gate in scoring.gates.items() if gate in parts}  # none by what is not known yet
    return [Reward(mixture.total(row, scoring.weights, gates=gates), row) for row in rows]


def in_array(value: float | None) -> float:
    """What a part is in an array: NaN where it does not apply; a NaN of its own becomes inf, which ends the run."""
    return math.nan if value is None else math.inf if math.isnan(value) else value


def applying(parts: Mapping[str, Any], p: int, g: int) -> dict[str, float | None]:
    """One row of arrays [P, G] as parts by name, None where one does not apply."""
    row = {name: float(values[p, g]) for name, values in parts.items()}
    return {name: None if math.isnan(value) else value for name, value in row.items()}


class Shown(NamedTuple):
    """The rows of a step that people are shown, whole groups, on every process."""

    completion: Any  # [P', G, T]
    mask: Any
    truncated: Any  # [P', G]
    stopped: Any
    length: Any
    reward: Any
    advantage: Any
    parts: Mapping[str, Any]
    done: Any = None  # [P], with partial rollouts: groups that are done, the only ones shown
    seat: Any = None  # [P'], likewise: which group a row is
    pass_rate: Any = None  # [P], with a curriculum: the mean over a group of the part that it looks at; NaN where none applies


def rows_of(
    shown: Shown, problem: Callable[[int], Problem], tokenizer: Tokenizer, *, stop: StopStrings | None = None
) -> list[dict[str, Any]]:
    """Shown rollouts as records for `rollouts.jsonl`; `problem` gives that of a row of the step."""
    rows = []
    for p, group in enumerate(completions(shown, tokenizer, stop=stop)):
        seat = p if shown.seat is None else int(shown.seat[p])
        if shown.done is not None and not shown.done[seat]:
            continue
        for g, completion in enumerate(group):
            reward = Reward(float(shown.reward[p, g]), applying(shown.parts, p, g))
            rows.append(record(problem(seat), completion, reward, advantage=float(shown.advantage[p, g])))
    return rows


def record(problem: Problem, completion: Completion, reward: Reward, **more: Any) -> dict[str, Any]:
    """One rollout as it is written to a file."""
    return {
        "problem_id": problem.id,
        "question": problem.question,
        "answer": problem.answer,
        "completion": completion.text,
        "reward": {"total": reward.total, **reward.parts},
        "length": len(completion.tokens),
        "stop": completion.stop.value,
        **more,
    }


Place = Callable[[Any], Any]


def placer(mesh: jax.sharding.Mesh) -> Place:
    """Puts host arrays whose first axis is `problems` on the mesh."""
    return partial(sharding.place, mesh, axes=("problems",))
