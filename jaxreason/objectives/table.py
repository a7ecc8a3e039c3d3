"""The table of methods: DeepSeekMath's Table 10 (arXiv:2402.03300) with a weight column, extended to every algorithm here.

Its rows are the cards of the algorithms, and the tests evaluate their coefficients: what the table says is what the code
computes.
"""

from __future__ import annotations

from jaxreason.objectives import algorithms, critics, likelihoods
from jaxreason.objectives.surrogate import Algorithm

HEAD = ("method", "data source", "reward", "gradient coefficient", "A", "weight", "paper")
INTRODUCTION = """# Algorithms

Every method is one gradient, `sum weight * coefficient * grad log pi(token)`; here is what each puts into it, with its
default settings. The table is written by `jaxreason.objectives.table()` from the code, and a test evaluates each
coefficient. [objectives.md](objectives.md) tells the story.
"""
SYMBOLS = {
    "A": "the advantage, a constant; `r` is a completion's reward, `R` the rewards of all steps of a group, `r_greedy` the "
    "reward of the greedy completion; `mean` and `std` are over the group, `std_batch` and `whiten` over the batch",
    "rho": "pi/pi_old of the token, pi_old being the policy at the start of the update",
    "m": "0 where the clip drops the token: A > 0 and rho > 1 + clip_high, or A < 0 and rho < 1 - clip_low; else 1",
    "s": "exp(mean of log rho over the completion)",
    "m_seq": "as m, with s for rho",
    "geo": "as s, of log-ratios clipped to [-clip_low, clip_high] on the side that m_log drops",
    "m_log": "as m, with log rho for rho and 0 for 1",
    "rho_clipped": "rho within [1 - clip_low, 1 + clip_high]",
    "gate": "sigmoid(tau (rho - 1)), tau being tau_positive where A > 0, else tau_negative",
    "L": "log(pi/pi_old) of the whole completion",
    "tau": "kimi_k15's weight of it",
    "l": "log(pi/pi_ref) of the token",
    "u": "pi_ref/pi of the token",
    "beta": "the weight of the divergence from the reference; the scale of the margin in dpo",
    "M": "beta times the chosen completion's sum of l, less the rejected one's",
    "old_over_behaviour": "pi_old/pi_behaviour of the token, the behaviour policy being the one that sampled",
    "log_pi": "log pi of the token",
    "log_teacher": "log-probability of the token under the teacher",
    "mu": "vapo's weight of the likelihood of correct completions",
    "correct": "1 on the tokens of completions whose reward is above correct_above, else 0",
    "tokens": "the number of chosen tokens in the batch; correct_tokens: of correct completions",
}
WEIGHTS = {
    "token_mean": "1 / all chosen tokens of the batch",
    "sequence_mean": "1 / (completions * tokens of this completion)",
    "sequence_sum": "1 / completions",
    "constant_length": "1 / (completions * token budget)",
    "group_sum": "1 / groups",
    "group_mean": "1 / (groups * tokens of this completion)",
}


def every_algorithm() -> list[Algorithm]:
    """Each algorithm with its defaults, in the table's order."""
    return [getattr(module, name)() for module in (likelihoods, algorithms, critics) for name in module.__all__]


def table() -> str:
    """The table in Markdown, a row for each algorithm with its defaults, and what the symbols stand for."""
    lines = [INTRODUCTION, _row(HEAD), _row(["---"] * len(HEAD))]
    for algorithm in every_algorithm():
        card = algorithm.card
        assert card is not None
        paper = f"[{card.paper}](https://arxiv.org/abs/{card.paper})" if card.paper[0].isdigit() else card.paper
        formulas = [f"`{text}`" for text in (card.coefficient, card.advantage)]
        lines.append(_row([f"`{algorithm.name}`", card.data, card.reward, *formulas, card.weight, paper]))
    for title, meanings in (("Symbols", SYMBOLS), ("Weights", WEIGHTS)):
        lines += [f"\n## {title}\n", *(f"- `{name}`: {meaning}" for name, meaning in meanings.items())]
    return "\n".join(lines) + "\n"


def _row(cells: tuple[str, ...] | list[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
