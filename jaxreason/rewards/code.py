"""Rules on a program: it is taken from the completion, run in a sandbox, and judged by tests that it cannot touch.

A problem's `metadata` says how it is tested:

    {"style": "stdin", "cases": [[input, expected output], ...]}
    {"style": "assert", "tests": [Python, ...], "setup": Python, "prompt": Python, "entry_point": name}

A case is passed where the output equals the expected one, white space at the end of lines and of the text aside. An assert
test is Python that calls what the program defines, and passes where it raises nothing (MBPP's lists of asserts, HumanEval's
`check`); it runs in a second sandbox, which gets plain values from the program and nothing else
(`jaxreason.rewards.exchange`). `setup` is run there before the tests; `prompt` is what the program continues (HumanEval's),
and its other functions are the tests' own. `entry_point` is the one name that is the program's; without it these are the names that
the tests use and nobody else defines.

Deliberately absent: checkers for problems with several right outputs, interaction, and tolerance in floats.
"""

from __future__ import annotations

import ast
import builtins
import functools
import os
import re
import sys
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jaxreason.rewards import sandbox
from jaxreason.rewards.format import answered
from jaxreason.rewards.sandbox import Isolation, Job, Limits, Verdict
from jaxreason.types import Completion, Problem, Reward

_FENCE = re.compile(r"^[ \t]*+```([^\n`]*+)$", re.MULTILINE)
_VERDICTS = {verdict.value: verdict for verdict in Verdict}


@dataclass(frozen=True)
class Judged:
    """The verdict on a program: that of the first test it did not pass, and the share of tests passed."""

    verdict: Verdict
    passed: float
    reason: str = ""


def code_tests(
    problem: Problem, completion: Completion, *, limit_seconds: float = 10.0, memory_mb: int = 512, allow_unsafe: bool = False
) -> Reward:
    """1 if the completion's program passes all tests of the problem, else 0.

    Its parts are `accuracy`, the share of `tests_passed`, and each verdict as 0 or 1. All tests together may take
    `limit_seconds`. A ValueError says why where programs cannot be isolated here, or where the problem has no tests.
    """
    isolation = _isolation(allow_unsafe)
    limits = Limits(seconds=limit_seconds, memory_mb=memory_mb)
    judged = judge(program(completion.text), problem.metadata, isolation=isolation, limits=limits)
    accuracy = float(judged.verdict is Verdict.ACCEPTED)
    parts: dict[str, float | None] = {"accuracy": accuracy, "tests_passed": judged.passed}
    parts |= {each.name.lower(): float(each is judged.verdict) for each in Verdict}
    return Reward(accuracy, parts)


def code_share(
    problem: Problem, completion: Completion, *, limit_seconds: float = 10.0, memory_mb: int = 512, allow_unsafe: bool = False
) -> Reward:
    """The share of the problem's tests that the completion's program passes; the rest as in `code_tests`."""
    kwargs = {"limit_seconds": limit_seconds, "memory_mb": memory_mb, "allow_unsafe": allow_unsafe}
    reward = code_tests(problem, completion, **kwargs)
    return Reward(reward.parts["tests_passed"] or 0.0, reward.parts)


@functools.cache  # what a refusal raises is not kept: the next call tries again
def _isolation(allow_unsafe: bool) -> Isolation:
    isolation = sandbox.find_isolation(allow_unsafe=allow_unsafe)
    if isolation.kind == "refused":
        raise ValueError(isolation.reason)
    return isolation


def program(text: str) -> str:
    """The program in a completion, after its last `</think>`, and in its last `<answer>` where there is one.

    It is the last fenced block that says it is Python, or else the last that does not say what it is; a text without any
    fence is a program as it is.
    """
    text = answered(text)
    fences = list(_FENCE.finditer(text))
    found: dict[bool, str] = {}  # the last block that says it is Python, and the last that does not say what it is
    place = 0
    while place < len(fences):
        closing = place + 1
        while closing < len(fences) and fences[closing][1].strip():  # only a bare fence closes
            closing += 1
        end = fences[closing].start() if closing < len(fences) else len(text)
        language = fences[place][1].strip().lower()
        if not language or re.match(r"(python|python3|py)\b", language):
            found[bool(language)] = text[fences[place].end() + 1 : end]
        place = closing + 1
    return found.get(True, found.get(False, "" if fences else text))


def judge(source: str, tests: Mapping[str, Any], *, isolation: Isolation, limits: Limits) -> Judged:
    """The verdict on a program by a problem's tests (the module says how they are written)."""
    style = tests.get("style")
    if style not in ("stdin", "assert") or not tests.get("cases" if style == "stdin" else "tests"):
        raise ValueError(
            f"the problem's metadata has the keys {sorted(tests)} and the style {style!r}: expected style 'stdin' with a list "
            "of cases, or style 'assert' with a list of tests"
        )
    if isolation.kind == "refused":
        return Judged(Verdict.REFUSED, 0.0, isolation.reason)
    if not source.strip():
        return Judged(Verdict.COMPILE_ERROR, 0.0, "the completion has no program")
    if style == "stdin":
        return _by_cases(source, tests["cases"], isolation=isolation, limits=limits)
    names, before = _names(tests)
    return _by_asserts(source, tests, names, before, isolation=isolation, limits=limits)


def _by_cases(source: str, cases: Sequence[Sequence[str]], *, isolation: Isolation, limits: Limits) -> Judged:
    inputs = [given.encode("utf-8", "surrogatepass") for given, _ in cases]
    first, passed = None, 0
    for ended, (_, expected) in zip(sandbox.run(source, stdin=inputs, isolation=isolation, limits=limits), cases, strict=True):
        verdict, reason = ended.verdict, ended.reason
        if verdict is None:
            if _lines(ended.stdout.decode(errors="replace")) == _lines(expected):
                passed += 1
                continue
            verdict, reason = Verdict.WRONG_ANSWER, "the output is not the expected one"
        first = first or (verdict, reason)
    share = passed / len(cases)
    return Judged(Verdict.ACCEPTED, share) if first is None else Judged(first[0], share, first[1])


def _lines(text: str) -> list[str]:
    return [line.rstrip() for line in text.rstrip().split("\n")]


def _by_asserts(
    source: str,
    tests: Mapping[str, Any],
    names: Sequence[str],
    before: Sequence[str],
    *,
    isolation: Isolation,
    limits: Limits,
) -> Judged:
    """A cell for the program and a cell for the tests, with a pipe each way between them."""
    code = sandbox.module_code("exchange.py")
    served = Job(code, "serve", {"prompt": tests.get("prompt") or "", "source": source})
    testing = Job(code, "test", {"before": list(before), "names": list(names), "tests": list(tests["tests"])})
    read_requests, write_requests = os.pipe()
    read_replies, write_replies = os.pipe()
    settings = {"isolation": isolation, "limits": limits}
    server = None
    try:
        server = sandbox.start([served], keep=(read_requests, write_replies), **settings)
        tester = sandbox.start([testing], keep=(write_requests, read_replies), **settings)
    except BaseException:
        if server is not None:
            server.finish(seconds=0.0)
        raise
    finally:
        for number in (read_requests, write_requests, read_replies, write_replies):
            os.close(number)
    (tested,) = tester.finish()
    lines = [line.split("\t", 1) for line in tested.stdout.decode(errors="replace").splitlines()]
    first = next(((_VERDICTS[verdict], reason) for verdict, reason in lines if verdict != "accepted"), None)
    passed = sum(verdict == "accepted" for verdict, _ in lines)
    gone = first is not None and "the program ended" in first[1]
    (ended,) = server.finish(seconds=1.0 if gone else 0.2)  # it ends by itself once nobody asks
    if first is None and len(lines) < len(tests["tests"]):  # the tests were stopped: why is known from outside
        first = (tested.verdict or Verdict.RUNTIME_ERROR, tested.reason)
    elif gone and ended.verdict is not None and ended.code is not None:
        first = (ended.verdict, ended.reason)
    share = passed / len(tests["tests"])
    return Judged(Verdict.ACCEPTED, share) if first is None else Judged(first[0], share, first[1])


def _names(tests: Mapping[str, Any]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The names that are the program's, and what is to be run before the tests.

    Without an entry point a name of the standard library's is a module, which is imported for the tests; a builtin is the
    program's only where no other name is, and then the first that is called.
    """
    before = [text for text in (tests.get("prompt"), tests.get("setup")) if text]
    used, bound, called = _read("\n".join((tests.get("setup") or "", *tests["tests"])))
    entry = tests.get("entry_point")
    if tests.get("prompt"):
        bound |= _read(tests["prompt"])[1]
    free = [name for name in used if name not in bound and not hasattr(builtins, name)]
    modules = [name for name in free if name in sys.stdlib_module_names and name != entry]
    names = [name for name in free if name not in modules]
    if entry:
        names = [entry, *(name for name in names if name != entry)]
    if not names:
        names = [name for name in called if name not in bound][:1]
    return tuple(names), tuple([f"import {', '.join(modules)}"] * bool(modules) + before)


def _read(text: str) -> tuple[list[str], set[str], list[str]]:
    """The names that a Python text uses, in order; those it binds anywhere; and those it calls."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SyntaxWarning)  # of a test's '\\w'
            warnings.simplefilter("ignore", DeprecationWarning)
            nodes = list(ast.walk(ast.parse(text)))
    except (SyntaxError, ValueError) as error:
        raise ValueError(f"the problem's tests are no Python ({error}): {text[:200]!r}") from error
    names = sorted((node for node in nodes if isinstance(node, ast.Name)), key=lambda node: (node.lineno, node.col_offset))
    bound = {node.id for node in names if not isinstance(node.ctx, ast.Load)}
    for node in nodes:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            bound.add(node.name)
        elif isinstance(node, ast.arg):
            bound.add(node.arg)
        elif isinstance(node, ast.alias):
            bound.add((node.asname or node.name).partition(".")[0])
        elif isinstance(node, ast.ExceptHandler) and node.name:
            bound.add(node.name)
    callees = {id(node.func) for node in nodes if isinstance(node, ast.Call)}
    used = dict.fromkeys(node.id for node in names if isinstance(node.ctx, ast.Load))
    return list(used), bound, [node.id for node in names if id(node) in callees]
