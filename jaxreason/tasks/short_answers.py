"""Questions that a word or a sentence answers: yes or no, true or false, a name."""

from __future__ import annotations

from jaxreason.tasks import columns
from jaxreason.tasks.rows import BadRow, Values
from jaxreason.tasks.source import DataSet, Question, task_of


def _strategy_qa(row: Values) -> Question:
    right = columns.value(row, "answer")
    if not isinstance(right, bool):
        raise columns.wrong_type(right, "answer", "true or false")
    metadata = {name: row[name] for name in ("term", "description", "facts") if row.get(name)}
    return Question(columns.text(row, "question"), "yes" if right else "no", metadata)


def _hotpot_qa(row: Values) -> Question:
    """The question alone: the paragraphs that the hub's rows bring are not shown."""
    metadata = {name: row[name] for name in ("type", "level") if row.get(name)}
    return Question(columns.text(row, "question"), columns.text(row, "answer"), metadata)


def _prontoqa(row: Values) -> Question:
    right = columns.text(row, "answer")
    if right not in ("True", "False"):
        raise BadRow("unparsable answer", f"column 'answer' is {columns.shown(right)}: expected True or False")
    steps = columns.texts(row, "chain_of_thought") if "chain_of_thought" in row else []
    question = f"{columns.text(row, 'question')}\n{columns.text(row, 'query')}"
    return Question(question, right, {"solution": "\n".join(steps)}, _worked(steps, right))


def _prosqa(row: Values) -> Question:
    right = columns.text(row, "answer")
    steps = columns.texts(row, "steps") if "steps" in row else []
    return Question(columns.text(row, "question"), right, {"solution": "\n".join(steps)}, _worked(steps, right))


def _worked(steps: list[str], right: str) -> str:
    return "\n".join([*steps, f"The answer is \\boxed{{{right}}}."]) if steps else ""


STRATEGY_QA = DataSet(
    name="strategy_qa",
    what="StrategyQA, yes or no with implicit steps (Geva et al., arXiv:2101.02235).",
    hub="ChilleD/StrategyQA",
    columns=("question", "answer"),
    question=_strategy_qa,
    prompt="yes_no",
    rule="choice.short_answer",
)
HOTPOT_QA = DataSet(
    name="hotpot_qa",
    what="HotpotQA without its paragraphs, as one asks a model that must know or search (Yang et al., arXiv:1809.09600).",
    hub="hotpotqa/hotpot_qa",
    hub_config="distractor",
    columns=("question", "answer"),
    question=_hotpot_qa,
    heldout="validation",
    prompt="short_answer",
    rule="choice.short_answer",
)
PRONTOQA = DataSet(
    name="prontoqa",
    what="ProntoQA, deductions in an invented or true ontology (Saparov and He, arXiv:2210.01240).",
    hub="",
    columns=("question", "query", "answer"),
    question=_prontoqa,
    prompt="true_false",
    rule="choice.short_answer",
)
PROSQA = DataSet(
    name="prosqa",
    what="ProsQA, which of two classes is reached in a graph of invented ones (Hao et al., arXiv:2412.06769).",
    hub="",
    columns=("question", "answer"),
    question=_prosqa,
    prompt="sentence",
    rule="choice.short_answer",
)
DATA_SETS = (STRATEGY_QA, HOTPOT_QA, PRONTOQA, PROSQA)

strategy_qa = task_of(STRATEGY_QA)
hotpot_qa = task_of(HOTPOT_QA)
prontoqa = task_of(PRONTOQA)
prosqa = task_of(PROSQA)
