"""Rewards by a model: an outcome reward model, a process reward model, or a generative judge.

The model is a function that is given: text in, a number or a reply out. Whether it is a head on a decoder, a server or a program
is not known here; in a config it is named as 'package.module:function' and imported where the rule runs. The verdict is the last
line of a judge's reply, for lines before it may quote the response; a reply without one makes the part None, which a run counts.
Absent on purpose: loading weights, batching of calls, and retries; they belong to the function.
"""

from __future__ import annotations

import functools
import importlib
import itertools
import math
import re
from collections.abc import Callable, Mapping, Sequence
from importlib import resources
from typing import Any

from jaxreason.rewards.format import summary, thinking
from jaxreason.types import Completion, Problem, Reward

Score = Callable[[Problem, str], float]
ScoreSteps = Callable[[Problem, Sequence[str]], Sequence[float]]
Ask = Callable[[str], str]

READS = {"all": lambda text: text, "thinking": thinking, "summary": summary}  # what of a completion a model is shown
AGGREGATES: dict[str, Callable[[Sequence[float]], float]] = {
    "min": min,
    "product": math.prod,
    "last": lambda scores: scores[-1],
    "mean": lambda scores: math.fsum(scores) / len(scores),
}
VERDICTS = {"correct": 1.0, "wrong": 0.0}
PAIR_VERDICTS = {"first": 1.0, "second": 0.0, "tie": 0.5}
_VERDICT = re.compile(r"[ \t*_#]*verdict[ \t*_]*:[ \t*_]*([a-z]+)", re.IGNORECASE)
_NAMES = "problem|reference|response|first|second"
_PLACE = re.compile(rf"\{{({_NAMES})\}}")
_TAG = re.compile(rf"<(?=\s*/?\s*(?:{_NAMES})\b)", re.IGNORECASE)


def outcome_score(problem: Problem, completion: Completion, *, score: str | Score, reads: str = "all") -> Reward:
    """score(problem, text), an outcome reward model's number for 'all' of a completion, its 'thinking' or its 'summary'."""
    found = float(_resolved(score)(problem, _read(completion, reads)))
    return Reward(found, {"score": found})


def process_score(
    problem: Problem,
    completion: Completion,
    *,
    score_steps: str | ScoreSteps,
    aggregate: str = "min",
    delimiter: str = "\n\n",
    reads: str = "all",
) -> Reward:
    """A process reward model's numbers for the steps as one: their 'min', 'product', 'last' or 'mean'.

    Steps are what `delimiter` separates, empty ones left out; the part is None without any. The minimum is Math-Shepherd's
    (arXiv:2312.08935), the product PRM800K's (arXiv:2305.20050), for probabilities. Raises ValueError if the model
    gives another number of scores than it was given steps.
    """
    if aggregate not in AGGREGATES:
        raise ValueError(f"aggregate is '{aggregate}': expected one of {', '.join(AGGREGATES)}")
    if not delimiter:
        raise ValueError("delimiter is empty: expected the text that separates two steps")
    steps = [step for step in _read(completion, reads).split(delimiter) if step.strip()]
    if not steps:
        return Reward(0.0, {"score": None})
    scores = [float(each) for each in _resolved(score_steps)(problem, steps)]
    if len(scores) != len(steps):
        raise ValueError(f"score_steps gave {len(scores)} numbers for {len(steps)} steps: expected one for each")
    found = float(AGGREGATES[aggregate](scores))
    return Reward(found, {"score": found})


def helpful_and_harmless(
    problem: Problem,
    completion: Completion,
    *,
    helpful: str | Score,
    harmless: str | Score,
    harmless_weight: float = 1.0,
) -> Reward:
    """helpful(the summary) + harmless_weight * harmless(all of the text): the preferences of R1's last stage.

    DeepSeek-R1, arXiv:2501.12948, section 2.3.4: what follows the thinking alone is helpful or not, so that the thinking is
    not bent; harm can be anywhere. A completion whose thinking never ended has an empty summary, and that is judged.
    """
    parts: dict[str, float | None] = {
        "helpful": float(_resolved(helpful)(problem, summary(completion.text))),
        "harmless": float(_resolved(harmless)(problem, completion.text)),
    }
    return Reward((parts["helpful"] or 0.0) + harmless_weight * (parts["harmless"] or 0.0), parts)


def judge(problem: Problem, completion: Completion, *, ask: str | Ask, prompt: str = "judge", reads: str = "summary") -> Reward:
    """1 if a generative judge's reply ends in the verdict 'correct', 0 if in 'wrong', None if in neither.

    `ask` gets the prompt and gives the reply. `prompt` names a file in rewards/prompts, or is a template itself, with
    {problem}, {reference} and {response} in it.
    """
    text = filled(prompt, problem=problem.question, reference=problem.answer, response=_read(completion, reads))
    found = verdict(_resolved(ask)(text), VERDICTS)
    return Reward(found or 0.0, {"verdict": found})


def pairwise(
    problem: Problem,
    completions: Sequence[Completion],
    rewards: Sequence[Reward],
    *,
    ask: str | Ask,
    prompt: str = "judge_pair",
    reads: str = "summary",
) -> list[Reward]:
    """The share of its comparisons with each other completion of the group that a completion wins, a tie being half of one.

    Every pair is judged in both orders, so G (G - 1) times in all, and a judge who only prefers a place gives both a
    half. None where no comparison had a verdict.
    """
    texts = [_read(completion, reads) for completion in completions]
    won: list[list[float]] = [[] for _ in texts]
    for first, second in itertools.combinations(range(len(texts)), 2):
        found = preference(problem, texts[first], texts[second], ask=ask, prompt=prompt)
        if found is not None:
            won[first].append(found)
            won[second].append(1.0 - found)
    shares = [sum(each) / len(each) if each else None for each in won]
    return [Reward(share or 0.0, {"preference": share}) for share in shares]


def preference(problem: Problem, first: str, second: str, *, ask: str | Ask, prompt: str = "judge_pair") -> float | None:
    """How far the judge prefers `first`: the mean of 1, 1/2 and 0 over both orders, one of them where the other is unreadable."""
    answer = _resolved(ask)
    there = verdict(answer(filled(prompt, problem=problem.question, first=first, second=second)), PAIR_VERDICTS)
    back = verdict(answer(filled(prompt, problem=problem.question, first=second, second=first)), PAIR_VERDICTS)
    found = [each for each in (there, None if back is None else 1.0 - back) if each is not None]
    return sum(found) / len(found) if found else None


def verdict(reply: str, verdicts: Mapping[str, float]) -> float | None:
    """The number of the reply's last line, 'Verdict: <word>' after its thinking; None where it is another line or word."""
    found = _VERDICT.fullmatch(summary(reply).rstrip().rpartition("\n")[2].rstrip(" \t*_."))
    return verdicts.get(found[1].lower()) if found else None


def filled(prompt: str, **texts: str) -> str:
    """A prompt file's text, or a template, with its places filled once: a brace in a text is that text's own.

    In the texts the '<' of the tags that surround them is written &lt;, so that no response ends before its end.

    Raises ValueError if a template has no place at all, or is the name of no file.
    """
    template = prompt
    if not _PLACE.search(prompt):
        files = {
            file.name.removesuffix(".txt"): file for file in resources.files("jaxreason.rewards").joinpath("prompts").iterdir()
        }
        if prompt not in files:
            raise ValueError(
                f"prompt is {prompt[:60]!r}: expected a template with {{response}} in it, or {', '.join(sorted(files))}"
            )
        template = files[prompt].read_text(encoding="utf-8")
    return _PLACE.sub(lambda place: _TAG.sub("&lt;", texts[place[1]]) if place[1] in texts else place[0], template)


def _read(completion: Completion, reads: str) -> str:
    if reads not in READS:
        raise ValueError(f"reads is '{reads}': expected one of {', '.join(READS)}")
    return READS[reads](completion.text)


def _resolved(function: Any) -> Any:
    return _imported(function) if isinstance(function, str) else function


@functools.cache
def _imported(name: str) -> Callable[..., Any]:
    """The function 'package.module:function'."""
    module, _, attribute = name.partition(":")
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"the model is '{name}', which cannot be imported ({error}): expected 'package.module:function'") from None
