"""Sampling and scoring: from prompts to completions with their reward's parts.

Traced rules are part of the program that samples; host rules are Python on text, between the program that samples and the
one that updates. Which a run has follows from its rules' names, and both end in the same `RolloutBatch`.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxreason import naming, rewards, sharding
from jaxreason.batch import PromptBatch, RolloutBatch
from jaxreason.models.decoder import Model
from jaxreason.models.tokenizer import Tokenizer
from jaxreason.rewards.traced import TracedRule, weighted_total
from jaxreason.sampling import stops
from jaxreason.sampling.rollout import Sampled, SamplingConfig, sample
from jaxreason.sampling.stops import StopStrings
from jaxreason.training import partial as partial_rollouts
from jaxreason.types import Completion, Problem, Reward, RewardFn, StopReason

Parts = Mapping[str, jax.Array]  # name -> [P, G]


@dataclass(frozen=True)
class RulePart:
    """One part of the reward: a rule named `module.function` under jaxreason.rewards, and what it counts."""

    rule: str = ""
    weight: float = 1.0
    shuffle: bool = False  # a control: its values are dealt out anew among the batch's completions before they count
    kwargs: Mapping[str, Any] = field(default_factory=dict)


class Scoring(NamedTuple):
    """A run's reward: the rules by part, split into traced ones and host ones, and how they add up."""

    traced: Mapping[str, TracedRule]
    host: Mapping[str, RewardFn]
    weights: Mapping[str, float]
    shuffled: frozenset[str]


def rules() -> dict[str, Callable[..., Any]]:
    """Every rule under jaxreason.rewards by the name `module.function`."""
    found: dict[str, Callable[..., Any]] = {}
    for info in pkgutil.iter_modules(rewards.__path__):
        module = importlib.import_module(f"{rewards.__name__}.{info.name}")
        for noun in ("Reward", "TracedRule"):
            found |= {f"{info.name}.{name}": function for name, function in naming.returning(module, noun).items()}
    return found


def make_scoring(parts: Mapping[str, RulePart], *, vocabulary: Sequence[bytes | None], eos_ids: Sequence[int]) -> Scoring:
    """Resolves the rules' names; a ValueError names the part whose rule does not exist or does not take its kwargs."""
    traced: dict[str, TracedRule] = {}
    host: dict[str, RewardFn] = {}
    known = rules()
    for name, part in parts.items():
        function = naming.find(part.rule, known, key=f"reward.{name}.rule")
        key = f"reward.{name}.kwargs"
        if part.rule.startswith("traced."):
            traced[name] = naming.call(function, vocabulary, eos_ids, kwargs=part.kwargs, key=key)
        else:
            host[name] = partial(function, **naming.arguments(function, part.kwargs, key=key))
    return Scoring(
        traced,
        host,
        {name: part.weight for name, part in parts.items()},
        frozenset(name for name, part in parts.items() if part.shuffle),
    )


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
    """The weighted sum of the parts [P, G], those of a control dealt out anew first, among the groups that are `done` [P]."""
    counted = dict(parts)
    for number, name in enumerate(sorted(scoring.shuffled)):
        counted[name] = partial_rollouts.shuffled(parts[name], jax.random.fold_in(key, number), done)
    return weighted_total(counted, scoring.weights)


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


def score_on_host(
    scoring: Scoring, problems: Sequence[Problem], groups: Sequence[Sequence[Completion]], done: Sequence[bool] | None = None
) -> dict[str, np.ndarray]:
    """The host parts of the reward, [P, G] each; 0 for groups that are not `done`, which no rule is asked about."""
    done = [True] * len(groups) if done is None else done

    def part(rule: RewardFn) -> np.ndarray:
        rows = [
            [rule(problem, each).total if asked else 0.0 for each in group]
            for problem, group, asked in zip(problems, groups, done, strict=True)
        ]
        return np.asarray(rows, np.float32)

    return {name: part(rule) for name, rule in scoring.host.items()}


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


def rows_of(
    shown: Shown, problems: Sequence[Problem], tokenizer: Tokenizer, *, stop: StopStrings | None = None
) -> list[dict[str, Any]]:
    """Shown rollouts as records for `rollouts.jsonl`."""
    rows = []
    for p, group in enumerate(completions(shown, tokenizer, stop=stop)):
        seat = p if shown.seat is None else int(shown.seat[p])
        if shown.done is not None and not shown.done[seat]:
            continue
        for g, completion in enumerate(group):
            parts = {name: float(values[p, g]) for name, values in shown.parts.items()}
            reward = Reward(float(shown.reward[p, g]), parts)
            rows.append(record(problems[seat], completion, reward, advantage=float(shown.advantage[p, g])))
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
