"""Functions that a config names: found by name, called with its keyword arguments, and mistakes told in one sentence.

A function can be named where it is annotated to return the noun that is wanted; there is no registry to enter it in. What a
config may set of it are its keyword-only parameters. A `key` is where it is named: a config's key, or a command's '--option'.
"""

from __future__ import annotations

import ast
import difflib
import inspect
import typing
from collections.abc import Callable, Mapping, Sequence
from types import ModuleType, UnionType
from typing import Any

KINDS = {int: "a whole number", float: "a number", str: "a text", bool: "True or False", type(None): "None"}


def nearest(name: str, there: Sequence[str]) -> str:
    """What to tell someone who wrote `name`, where `there` is what exists."""
    near = difflib.get_close_matches(name, there, n=1, cutoff=0.5)
    return f"did you mean '{near[0]}'?" if near else f"choose one of {', '.join(there)}" if there else "there are none"


def returning(module: ModuleType, noun: str) -> dict[str, Callable[..., Any]]:
    """The public functions of a module that are annotated to return `noun`."""
    found = inspect.getmembers(module, inspect.isfunction)
    return {name: f for name, f in found if not name.startswith("_") and inspect.signature(f).return_annotation == noun}


def find(name: str, functions: Mapping[str, Callable[..., Any]], *, key: str) -> Callable[..., Any]:
    """functions[name]; a ValueError says what `key` could be instead."""
    if name not in functions:
        raise ValueError(f"{_shown(key)} is '{name}', which does not exist: {nearest(name, list(functions))}")
    return functions[name]


def wholly_named(module: ModuleType, noun: str) -> dict[str, Callable[..., Any]]:
    """The functions of a module that return `noun` and take keyword arguments alone: all that a config has to give."""

    def keywords(function: Callable[..., Any]) -> bool:
        return all(p.kind is p.KEYWORD_ONLY for p in inspect.signature(function).parameters.values())

    return {name: f for name, f in returning(module, noun).items() if keywords(f)}


def literal(value: str) -> Any:
    """A value as it is written in an override: Python's own spelling, and any other text as itself."""
    try:
        return ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return value


def typed(function: Callable[..., Any], words: Mapping[str, str]) -> dict[str, Any]:
    """Keyword arguments as a command line has them; what the function takes as text stays as it was written."""
    hints = typing.get_type_hints(function)
    return {name: value if hints.get(name) is str else literal(value) for name, value in words.items()}


def _shown(key: str) -> str:
    """A key of a config, or an option of a command, as it is written."""
    return key if key.startswith("--") else f"config.{key}"


def arguments(function: Callable[..., Any], kwargs: Mapping[str, Any], *, key: str, **offered: Any) -> dict[str, Any]:
    """The keyword arguments of a call: `kwargs`, and what is offered where the function takes it and they do not say.

    A ValueError names an argument under `key` that the function does not take, lacks, or takes in another type.
    """
    takes = {n: p for n, p in inspect.signature(function).parameters.items() if p.kind is p.KEYWORD_ONLY}
    hints = typing.get_type_hints(function)
    given = {name: value for name, value in offered.items() if name in takes} | dict(kwargs)
    for name, value in kwargs.items():
        if name not in takes:
            anew = f" (if the config's file sets it, --config.{key}={{}} drops what it sets)" if key.endswith(".kwargs") else ""
            raise ValueError(f"{_shown(key)} has no key '{name}': {nearest(name, list(takes))}{anew}")
        kinds = typing.get_args(hints[name]) if isinstance(hints[name], UnionType) else (hints[name],)
        kinds = tuple(kind for kind in kinds if not hasattr(kind, "array_type"))  # a jaxtyping array cannot stand in a config
        if float in kinds and type(value) is int:
            given[name] = float(value)
        elif set(kinds) <= KINDS.keys() and type(value) not in kinds:
            raise ValueError(f"{_shown(key)}.{name} is {value!r}: expected {' or '.join(KINDS[kind] for kind in kinds)}")
    for name, parameter in takes.items():
        if parameter.default is parameter.empty and name not in given:
            option = f"--{_shown(key).removeprefix('--')}"
            raise ValueError(f"{_shown(key)} has no '{name}', which {function.__name__} needs: set {option}.{name}=...")
    return given


def call(function: Callable[..., Any], *args: Any, kwargs: Mapping[str, Any], key: str, **offered: Any) -> Any:
    """function(*args, **kwargs); a ValueError, the function's own among them, names `key`."""
    given = arguments(function, kwargs, key=key, **offered)
    try:
        return function(*args, **given)
    except ValueError as error:
        if str(error).startswith(f"{_shown(key)}."):  # of a function that calls others by the names in its arguments
            raise
        raise ValueError(f"{_shown(key)}: {error}") from error
