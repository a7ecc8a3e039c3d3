"""The table of methods says what the code is: its coefficients are evaluated in `test_identity`, the rest is held here."""

from __future__ import annotations

import ast
import inspect
from pathlib import Path

from jaxreason import objectives
from jaxreason.objectives import Algorithm, table, weights
from jaxreason.objectives.table import SYMBOLS, WEIGHTS, every_algorithm

DOCS = Path(__file__).parents[2] / "docs" / "algorithms.md"
TABLE_10 = {"sft", "rft", "online_rft", "dpo", "ppo", "grpo", "grpo_process"}
NAMES = """sft rft online_rft star reinforce rloo remax reinforce_plus_plus reinforce_plus_plus_baseline ppo grpo grpo_process
    dr_grpo lite_ppo dapo gspo gspo_token gmpo cispo sapo kimi_k15 vapo maxrl decoupled_ppo dpo on_policy_distillation
    sequence_distillation""".split()


def test_the_page_in_docs_is_the_tables_output():
    assert DOCS.read_text() == table(), "docs/algorithms.md is old: write it anew with `make docs`"


def test_every_algorithm_is_a_row_and_is_found_by_its_name():
    rows = [line.split("`")[1] for line in table().splitlines() if line.startswith("| `")]
    assert len(rows) == len(set(rows)) and set(rows) == set(NAMES) and TABLE_10 <= set(rows)
    for name in NAMES:
        algorithm = getattr(objectives, name)()
        assert isinstance(algorithm, Algorithm) and algorithm.name == name
        assert name in objectives.__all__


def test_every_symbol_of_a_formula_is_explained():
    functions = {"sigmoid"}
    explained = set(SYMBOLS) | {"correct_tokens"} | functions
    for algorithm in every_algorithm():
        assert algorithm.card is not None
        names = {node.id for node in ast.walk(ast.parse(algorithm.card.coefficient)) if isinstance(node, ast.Name)}
        assert names <= explained, (algorithm.name, names - explained)
        assert algorithm.card.weight.split()[0] in WEIGHTS


def test_every_weight_is_explained():
    functions = inspect.getmembers(weights, lambda f: inspect.isfunction(f) and f.__module__ == weights.__name__)
    assert set(WEIGHTS) == {name for name, _ in functions if not name.startswith("_")}


def test_the_docstring_names_the_paper():
    for name in NAMES:
        card = getattr(objectives, name)().card
        assert card.paper in (getattr(objectives, name).__doc__ or "").replace("Williams, 1992", "Williams 1992"), name
