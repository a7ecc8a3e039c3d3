"""docs/rewards.md: its example runs, and its table has every traced rule with its settings and an existing twin."""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import Any

import jax
import pytest

from jaxreason import naming
from jaxreason.rewards import traced
from jaxreason.training.collect import rules

DOCS = (Path(__file__).parents[2] / "docs" / "rewards.md").read_text(encoding="utf-8")


def test_the_example_runs():
    blocks = re.findall(r"```python\n(.*?)```", DOCS, flags=re.DOTALL)
    assert len(blocks) == 2 and "assert rule(" in blocks[1]
    scope: dict[str, Any] = {}
    for block in blocks:
        exec(block, scope)
    assert jax.jit(scope["rule"]) is not None
    with pytest.raises(AssertionError):  # the document's assertion can fail
        exec(blocks[1].replace("[[1, 0, 0, 1]]", "[[1, 0, 0, 0]]"), scope)


def test_the_table_has_every_traced_rule():
    rows = re.findall(r"^\| `traced\.(\w+)` \|[^|]*\|([^|]*)\|([^|]*)\|$", DOCS, flags=re.MULTILINE)
    known, there = naming.returning(traced, "TracedRule"), rules()
    assert sorted(name for name, *_ in rows) == sorted(known)
    for name, settings, twin in rows:
        named = re.findall(r"`(\w+)`", settings)
        takes = [n for n, p in inspect.signature(known[name]).parameters.items() if p.kind is p.KEYWORD_ONLY]
        assert named == [one for one in takes if not one.startswith("r_")]
        assert f"traced.{name}" in there
        for function in re.findall(r"`([\w.]+)`", twin):
            module, _, attribute = function.partition(".")
            assert hasattr(__import__(f"jaxreason.rewards.{module}", fromlist=[attribute]), attribute)
