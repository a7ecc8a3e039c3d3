"""Writes the table of docs/procedural_tasks.md: problem 0 of every procedural task, made by the task itself."""

from __future__ import annotations

from pathlib import Path

from jaxreason import tasks

MADE = (
    tasks.arithmetic_chains,
    tasks.modular_arithmetic,
    tasks.base_arithmetic,
    tasks.linear_equations,
    tasks.countdown,
    tasks.game24,
    tasks.truth_tellers,
    tasks.graph_reachability,
    tasks.string_manipulation,
    tasks.word_problems,
)
BEGIN, END = "<!-- examples -->", "<!-- /examples -->"


def table() -> str:
    """A row a task: its name, a problem, its answer, and the rule."""
    rows = ["| task | problem | answer | rule |", "|---|---|---|---|"]
    for make in MADE:
        task = make(heldout_size=1)
        problem = task.train(0)
        cells = (f"`{task.name}`", problem.question.replace("*", "\\*"), problem.answer, f"`{task.rule}`")
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


def written(text: str) -> str:
    """The page with its table made anew."""
    before, rest = text.split(BEGIN)
    return f"{before}{BEGIN}\n{table()}\n{END}{rest.split(END)[1]}"


if __name__ == "__main__":
    page = Path(__file__).parents[1] / "procedural_tasks.md"
    page.write_text(written(page.read_text(encoding="utf-8")), encoding="utf-8")
