"""The table of methods: DeepSeekMath's Table 10 (arXiv:2402.03300) with a weight column, extended to every algorithm here.

Its rows are the cards of the algorithms, and the tests evaluate their coefficients: what the table says is what the code
computes.
"""

from __future__ import annotations

from jaxreason.objectives import algorithms, critics, likelihoods
from jaxreason.objectives.surrogate import Algorithm

HEAD = ("method", "data source", "reward", "gradient coefficient", "A", "weight", "paper")


def every_algorithm() -> list[Algorithm]:
    """Each algorithm with its defaults, in the table's order."""
    return [getattr(module, name)() for module in (likelihoods, algorithms, critics) for name in module.__all__]


def table() -> str:
    """The table in Markdown, a row for each algorithm with its defaults."""
    lines = [_row(HEAD), _row(["---"] * len(HEAD))]
    for algorithm in every_algorithm():
        card = algorithm.card
        assert card is not None
        paper = f"[{card.paper}](https://arxiv.org/abs/{card.paper})" if card.paper[0].isdigit() else card.paper
        formulas = [f"`{text}`" for text in (card.coefficient, card.advantage)]
        lines.append(_row([f"`{algorithm.name}`", card.data, card.reward, *formulas, card.weight, paper]))
    return "\n".join(lines) + "\n"


def _row(cells: tuple[str, ...] | list[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
