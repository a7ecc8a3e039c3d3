"""The page on host rules is the code's: its table, and its example."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from jaxreason import config as schema
from jaxreason.checking import RESERVED
from jaxreason.rewards import table
from jaxreason.training.collect import RulePart, make_scoring, rules

PAGE = Path(__file__).parents[2] / "docs" / "host_rules.md"


def test_the_table_is_the_codes():
    assert PAGE.read_text() == table.rewritten(PAGE.read_text()), "docs/host_rules.md is old: write it anew with `make docs`"
    with pytest.raises(ValueError, match="'## The rules'"):
        table.rewritten("# Another page\n")


def test_every_host_rule_is_a_row():
    rows = [line.split("`")[1] for line in table.written().splitlines() if line.startswith("| `")]
    assert sorted(rows) == sorted(name for name in rules() if not name.startswith("traced."))
    assert {"math.gsm8k_answer", "length.kimi_length", "model.pairwise"} <= set(rows)


def test_the_example_is_a_reward():
    example = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)[0]
    config = schema.default()
    exec(example, {"config": config, "schema": schema})
    parts = {name: RulePart(**part.to_dict()) for name, part in config.reward.items()}
    scoring = make_scoring(parts, vocabulary=[b"a", None], eos_ids=[1])
    assert scoring.gates == {"format": "accuracy"} and set(scoring.group) == {"brevity"} and len(scoring.weights) == 5
    assert not RESERVED & set(parts)
