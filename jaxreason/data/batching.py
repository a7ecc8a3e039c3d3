"""From problems to the arrays of a step, on the host."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypedDict

import numpy as np

from jaxreason.batch import PromptBatch, RolloutBatch
from jaxreason.models.tokenizer import Tokenizer
from jaxreason.rewards import arithmetic
from jaxreason.sampling.rollout import SamplingConfig
from jaxreason.tasks.task import Task
from jaxreason.types import Demonstration, Problem

NO_DIGIT = 127  # stands for a digit of a reference that is no number
NO_INTEGER = -(2**31)  # stands for a reference that is none; 0 would reward a completion that answers 0


class Limits(TypedDict):
    max_prompt_tokens: int
    cut: bool


def prompt_batch(
    numbered: Sequence[tuple[int, Problem]], *, task: Task, tokenizer: Tokenizer, max_prompt_tokens: int, cut: bool = False
) -> PromptBatch:
    """Prompts of numbered problems as NumPy arrays, padded on the left.

    Where a prompt is longer than `max_prompt_tokens`, its beginning is cut off, or else a ValueError raised.
    """
    rows = tokenizer.encode_prompts([task.messages(problem) for _, problem in numbered])
    prompt = np.full((len(rows), max_prompt_tokens), tokenizer.pad_id, np.int32)
    mask = np.zeros(prompt.shape, bool)
    for i, (row, (_, problem)) in enumerate(zip(rows, numbered, strict=True)):
        row = row[-max_prompt_tokens:] if cut else row
        if not 0 < len(row) <= max_prompt_tokens:
            raise ValueError(
                f"the prompt of problem {problem.id} has {len(row)} tokens: expected 1 to {max_prompt_tokens}; "
                "raise config.sampling.max_prompt_tokens"
            )
        prompt[i, -len(row) :] = row
        mask[i, -len(row) :] = True
    number = np.asarray([number % 2**32 for number, _ in numbered], np.uint32)
    return PromptBatch(prompt, mask, number, **references([problem for _, problem in numbered]))


class References(TypedDict):
    answer: np.ndarray
    digits: np.ndarray
    numbers: np.ndarray
    target: np.ndarray
    use_all: np.ndarray


def references(problems: Sequence[Problem]) -> References:
    """What traced rules know of the problems, always of the same shapes: a batch without a game compiles to the same program."""
    digits = np.full((len(problems), arithmetic.INTEGER_DIGITS + arithmetic.DECIMALS), NO_DIGIT, np.int8)
    numbers = np.full((len(problems), arithmetic.MOST_NUMBERS), -1, np.int32)
    target, use_all = np.zeros(len(problems), np.int32), np.zeros(len(problems), bool)
    for i, problem in enumerate(problems):
        if (places := arithmetic.reference_digits(problem.answer)) is not None:
            digits[i] = places
        if (game := arithmetic.game(problem)) is not None:
            numbers[i, : len(game.numbers)], target[i], use_all[i] = game
    answer = np.asarray([integer_answer(problem) for problem in problems], np.int32)
    return {"answer": answer, "digits": digits, "numbers": numbers, "target": target, "use_all": use_all}


def prompt_limits(sampling: SamplingConfig) -> Limits:
    """What a run's config says of long prompts, as `prompt_batch` takes it."""
    return {"max_prompt_tokens": sampling.max_prompt_tokens, "cut": sampling.overlong == "cut"}


def integer_answer(problem: Problem) -> int:
    """The reference as an integer for traced rules, NO_INTEGER where it is none or too large for them."""
    value = arithmetic.reference_integer(problem.answer)
    return NO_INTEGER if value is None else value


def demonstration_batch(
    demonstrations: Sequence[Demonstration],
    *,
    task: Task,
    tokenizer: Tokenizer,
    max_prompt_tokens: int,
    max_completion_tokens: int,
    cut: bool = False,
) -> RolloutBatch:
    """Demonstrations as groups of one, in NumPy arrays; the stop token is in the mask, so that stopping is learnt too."""
    numbered = [(0, demonstration.problem) for demonstration in demonstrations]
    prompts = prompt_batch(numbered, task=task, tokenizer=tokenizer, max_prompt_tokens=max_prompt_tokens, cut=cut)
    rows = tokenizer.encode_completions([demonstration.completion for demonstration in demonstrations])
    completion = np.full((len(rows), 1, max_completion_tokens), tokenizer.pad_id, np.int32)
    mask = np.zeros(completion.shape, bool)
    for i, row in enumerate(rows):
        if len(row) > max_completion_tokens:
            raise ValueError(
                f"the demonstration of problem {demonstrations[i].problem.id} has {len(row)} tokens: expected at most "
                f"{max_completion_tokens}; raise config.sampling.max_completion_tokens"
            )
        completion[i, 0, : len(row)] = row
        mask[i, 0, : len(row)] = True
    return RolloutBatch(
        prompt=prompts.prompt,
        prompt_mask=prompts.prompt_mask,
        completion=completion,
        mask=mask,
        truncated=np.zeros(mask.shape[:2], bool),
        logp_behaviour=np.zeros(mask.shape, np.float32),
    )
