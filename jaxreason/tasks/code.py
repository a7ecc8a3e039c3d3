"""Programs to write, with the tests that judge them: nothing here runs one.

The tests are plain data in the problem's metadata: `{"style": "assert", "setup", "tests", "entry_point"}`, where `setup` runs
before the tests and beside the program, and HumanEval's have `prompt` too, what the program continues; or `{"style": "stdin",
"cases": [[stdin, stdout], ...]}`. The problem's answer is the reference solution, '' where the row has none.
"""

from __future__ import annotations

import ast
import warnings
from dataclasses import replace
from functools import partial

from jaxreason.tasks import columns
from jaxreason.tasks.rows import BadRow, Values
from jaxreason.tasks.source import DataSet, Question, load, reader, task_of
from jaxreason.tasks.task import Task


def _humaneval(row: Values) -> Question:
    """A signature with its docstring, and a function `check` that takes what was written."""
    prompt = columns.checked_text(columns.value(row, "prompt"), "prompt")
    if not prompt.strip():
        raise BadRow("empty", "column 'prompt' is empty")
    prompt = _python(prompt, "prompt")
    entry, check = columns.text(row, "entry_point"), columns.text(row, "test")
    call = f"check({entry})"
    # some copies end with the call, the hub's does not
    setup = _python(check.removesuffix(call).strip(), "test")
    if not entry.isidentifier() or "def check(" not in setup:
        raise BadRow("no test", f"column 'test' defines no check(...) or {columns.shown(entry)} is no function's name")
    tests = {"style": "assert", "setup": setup, "tests": [call], "entry_point": entry, "prompt": prompt}
    return Question(prompt, prompt + columns.optional_text(row, "canonical_solution"), {**tests, "row_id": row.get("task_id")})


def _mbpp(row: Values, *, visible_tests: int) -> Question:
    """A sentence that asks for a function, and asserts, of which some are shown: they say the function's name."""
    tests = [_python(test, "test_list") for test in columns.texts(row, "test_list")]
    wanted = columns.text(row, "text" if "text" in row else "prompt")  # the sanitised part calls it prompt
    if "test_imports" in row:  # of the sanitised part
        setup = "\n".join(columns.texts(row, "test_imports", least=0))
    else:
        setup = columns.optional_text(row, "test_setup_code")
    shown = "\n".join(tests[:visible_tests])
    metadata = {"style": "assert", "setup": _python(setup, "test_setup_code"), "tests": tests, "entry_point": None}
    question = f"{wanted}\nYour code should pass these tests:\n\n{shown}" if shown else wanted
    return Question(question, columns.optional_text(row, "code"), {**metadata, "row_id": row.get("task_id")})


def cases(row: Values, *, inputs: str, outputs: str) -> dict[str, object]:
    """The tests of a program that reads and writes: two columns hold lists of texts, of equal length."""
    given, expected = columns.texts(row, inputs), columns.texts(row, outputs)
    if len(given) != len(expected):
        raise BadRow("wrong type", f"column '{inputs}' holds {len(given)} texts and '{outputs}' {len(expected)}: expected as many")
    return {"style": "stdin", "cases": [list(case) for case in zip(given, expected, strict=True)]}


def _python(source: str, column: str) -> str:
    try:
        with warnings.catch_warnings(action="ignore"):  # such as of '\\d' in a test, which is Python all the same
            ast.parse(source)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        raise BadRow("not Python", f"column '{column}' is not Python: {columns.shown(source)}") from None
    return source


HUMANEVAL = DataSet(
    name="humaneval",
    what="HumanEval, functions to complete from their docstrings (Chen et al., arXiv:2107.03374).",
    hub="openai/openai_humaneval",
    columns=("prompt", "test", "entry_point"),
    question=_humaneval,
    train="",
    heldout_size=None,
    prompt="complete_code",
    rule="code.code_tests",
)
MBPP = DataSet(
    name="mbpp",
    what="MBPP, small functions asked for in a sentence (Austin et al., arXiv:2108.07732).",
    hub="google-research-datasets/mbpp",
    hub_config="full",
    columns=("text", "test_list"),
    question=partial(_mbpp, visible_tests=3),
    heldout_size=None,
    prompt="code",
    rule="code.code_tests",
)
DATA_SETS = (HUMANEVAL, MBPP)

humaneval = task_of(HUMANEVAL)


def mbpp(
    *,
    data_dir: str = "",
    hub_name: str = MBPP.hub,
    train_split: str = MBPP.train,
    heldout_split: str = MBPP.heldout,
    heldout_size: int | None = MBPP.heldout_size,
    prompt: str = MBPP.prompt,
    bad_rows: str = "fatal",
    visible_tests: int = 3,
) -> Task:
    """MBPP. The paper shows all three tests of a problem; with fewer, a program that only knows those by heart fails the rest."""
    if visible_tests < 0:
        raise ValueError(f"visible_tests is {visible_tests}: expected 0 or more")
    return load(
        replace(MBPP, question=partial(_mbpp, visible_tests=visible_tests)),
        reader(MBPP, data_dir=data_dir, hub_name=hub_name),
        train_split=train_split,
        heldout_split=heldout_split,
        heldout_size=heldout_size,
        prompt=prompt,
        bad_rows=bad_rows,
    )
