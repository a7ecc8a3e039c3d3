"""The scorers of reasoning-gym (extra `envs`) as host rules: each of its data sets brings its own.

A problem carries what its scorer needs in `metadata`: the data set's name under `gym`, its `settings`, and the whole `entry`.
Some of those scorers hand the answer to Python's `eval` or to sympy's parser, which is the same: text is looked at before, and
what is no literal or no plain formula gets 0 without being run. Others pay for answers that are wrong, or for one number of
several; `_overpaid` knows them. Absent on purpose: a time limit, which the pool of workers has.
"""

from __future__ import annotations

import ast
import dataclasses
import json
import re
import warnings
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from jaxreason.naming import nearest
from jaxreason.rewards import exact
from jaxreason.rewards.format import answered
from jaxreason.types import Completion, Problem, Reward

LONGEST = 20_000  # characters of an answer; a longer one gets 0
SIZE = 4000  # entries of a data set; each is a function of the data set's seed and the entry's number
EVALUATED = {"string_insertion", "spiral_matrix", "binary_matrix", "n_queens"}  # by eval, where they differ from the reference
NUMERIC = {"countdown", "puzzle24"}  # by sympy, as numbers
ONE_NUMBER = {"gsm_symbolic", "fraction_simplification"}  # of several they take the first
SYMBOLIC = {"polynomial_multiplication", "simple_integration", "intermediate_integration"}  # by sympy, as formulas
_FORMULA = re.compile(r"[0-9A-Za-z+\-*/^().]*")
_HUGE = re.compile(r"[0-9.][eE][+-]?[0-9]{4}")  # 1e99999999 is short to write, and long to compute with
_DECIMAL = re.compile(r"[0-9]+(?:\.[0-9]+)?")
_NAME = re.compile(r"[A-Za-z]+")
_FUNCTIONS = {"sin", "cos", "tan", "exp", "log", "ln", "sqrt", "asin", "acos", "atan", "sinh", "cosh", "tanh", "pi"}


def gym_score(problem: Problem, completion: Completion) -> Reward:
    """The score from 0 to 1 that reasoning-gym gives the completion's answer; data sets differ in what they give a part for.

    The answer is the last `<answer>` block after the last `</think>`, or all the text there where it has none. The part is None
    where the problem is none of reasoning-gym's.
    """
    return _reward(problem, completion, solved=False)


def gym_solved(problem: Problem, completion: Completion) -> Reward:
    """1 where reasoning-gym's score is 1, else 0: nothing for an answer that only holds the right one."""
    return _reward(problem, completion, solved=True)


def _reward(problem: Problem, completion: Completion, *, solved: bool) -> Reward:
    if "gym" not in problem.metadata:
        return Reward(0.0, {"accuracy": None})
    text = answered(completion.text).strip()
    name, entry = problem.metadata["gym"], problem.metadata["entry"]
    names = {name, *(str(value) for key, value in entry["metadata"].items() if "source_dataset" in key)}
    if not 0 < len(text) <= LONGEST or not _harmless(text, entry, names) or _overpaid(text, entry, names):
        return Reward(0.0, {"accuracy": 0.0})
    settings = json.dumps(dict(problem.metadata["settings"]), sort_keys=True)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of Python about the answer's text
            score = float(dataset(name, settings, 0).score_answer(text, entry))
    except Exception:  # whatever a scorer makes of an answer that it did not expect: it is not right
        score = 0.0
    score = min(1.0, max(0.0, score)) if score == score else 0.0
    score = float(score >= 1.0) if solved else score
    return Reward(score, {"accuracy": score})


def _harmless(text: str, entry: Mapping[str, Any], names: set[str]) -> bool:
    """Whether the data set's scorer may be given this text."""
    if text == entry["answer"]:
        return True
    if _HUGE.search(text):
        return False
    if names & EVALUATED:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                parsed = ast.parse(text, mode="eval")
        except (SyntaxError, ValueError, MemoryError, RecursionError):
            return True  # eval does not get further either
        try:
            ast.literal_eval(parsed)
        except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
            return False
    if names & NUMERIC and (len(text) > 500 or not re.fullmatch(r"[0-9+\-*/() ]*", text) or re.search(r"[*/] *[*/]", text)):
        return False
    return not names & SYMBOLIC or _plain_formula(text)


def _overpaid(text: str, entry: Mapping[str, Any], names: set[str]) -> bool:
    """Whether the text is wrong although the data set's scorer may take it for right."""
    metadata, reference = entry["metadata"], str(entry["answer"])
    if names & NUMERIC:  # rounded, and puzzle24 does not look which numbers were used
        used = sorted(int(n) for n in re.findall(r"[0-9]{1,20}", text))
        return used != sorted(metadata["numbers"]) or exact.value(text) != metadata.get("target", 24)
    if "game_of_life_halting" in names:  # every text is as true as 'False'
        return text.lower() != reference.lower()
    if "coin_flip" in names:  # 0 begins like 0.5
        found, expected = exact.value(text), exact.value(reference)
        return found is None or expected is None or abs(found - expected) > 1e-4
    if names & ONE_NUMBER:
        return len(re.findall(_DECIMAL, text.replace(",", ""))) != len(re.findall(_DECIMAL, reference)) or " not " in f" {text}"
    return "complex_arithmetic" in names and re.search("nan|inf", text, re.IGNORECASE) is not None


def _plain_formula(text: str) -> bool:
    """Letters, known functions and small exponents: nothing that Python could call, and nothing that grows without end."""
    text = "".join(text.split())
    if len(text) > 2000 or not _FORMULA.fullmatch(text) or re.search(r"[A-Za-z)]\.|\.[A-Za-z(]|[0-9.][eE]|[0-9]{19}", text):
        return False
    if any(len(name) > 1 and name not in _FUNCTIONS for name in _NAME.findall(text)):
        return False
    exponents = re.findall(r"(?:\*\*|\^)\(?-?([0-9A-Za-z]*)", text)
    if any(not exponent or (exponent.isdigit() and len(exponent) > 2) for exponent in exponents):
        return False
    towers = re.findall(r"(?:\*\*|\^)\(?-?[0-9A-Za-z]+(?:/[0-9]+)?\)*(?:\*\*|\^)", text)
    nested = len(re.findall(r"\)(?:\*\*|\^)", text))
    return not towers and nested <= 8


# -------------------------------------------------------------------------------------------------------------- data sets


def known() -> Mapping[str, tuple[type, type]]:
    """The class and the settings' class of every data set, by name; a ValueError where reasoning-gym is not installed."""
    try:
        import reasoning_gym.data  # noqa: F401  # pyright: ignore[reportMissingImports]
        from reasoning_gym.factory import DATASETS  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise ValueError("reasoning-gym is not installed: install jaxreason[envs]") from None
    return DATASETS


@lru_cache(maxsize=16)  # some take a second to make
def dataset(name: str, settings: str, seed: int) -> Any:
    """A data set of reasoning-gym with SIZE entries; `settings` is JSON. A ValueError names what it does not take."""
    there = known()
    if name not in there:
        raise ValueError(
            f"name is '{name}', which is no data set of reasoning-gym: {nearest(name, sorted(there))} All of them: "
            f"{', '.join(sorted(there))}"
        )
    given = json.loads(settings)
    takes = {field.name for field in dataclasses.fields(there[name][1])} - {"seed", "size"}
    for key in given:
        if key not in takes:
            raise ValueError(f"settings has '{key}', which {name} does not take: {nearest(key, sorted(takes))}")
    try:
        if name == "composite":
            given = {"datasets": [_specification(**each) for each in given.get("datasets", [])]}
        made = there[name][1](seed=seed, size=SIZE, **given)
        if hasattr(made, "validate"):
            made.validate()
        return there[name][0](config=made)
    except (AssertionError, TypeError, ValueError, KeyError) as error:
        why = next(iter(str(error).splitlines()), "") or type(error).__name__
        raise ValueError(f"settings are {settings}, which {name} refuses: {why.rstrip('.')}: correct them") from error


def _specification(*, name: str, weight: float = 1.0, config: Mapping[str, Any] | None = None) -> Any:
    from reasoning_gym.composite import DatasetSpec  # pyright: ignore[reportMissingImports]

    if name not in known():
        raise ValueError(f"'{name}' is no data set of reasoning-gym: {nearest(name, sorted(known()))}")
    return DatasetSpec(name=name, weight=weight, config=dict(config or {}))
