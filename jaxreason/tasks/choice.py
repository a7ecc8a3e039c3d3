"""Multiple choice: the choices as (letter, text) pairs in the problem's metadata, the right letter as its answer."""

from __future__ import annotations

from jaxreason.tasks import columns
from jaxreason.tasks.rows import Values
from jaxreason.tasks.source import DataSet, Question, task_of


def _labelled(row: Values) -> Question:
    """ARC and CommonsenseQA: {"label", "text"} beside the key of the right one."""
    return _of_labels(row, "question")


def _openbookqa(row: Values) -> Question:
    return _of_labels(row, "question_stem")


def _of_labels(row: Values, column: str) -> Question:
    choices, right = columns.labelled(row, "choices", "answerKey")
    metadata = {"choices": choices} | ({"row_id": row["id"]} if "id" in row else {})
    return Question(columns.text(row, column), right, metadata)


def _aqua_rat(row: Values) -> Question:
    choices = columns.lettered(columns.texts(row, "options"), "options")
    right = columns.picked(choices, columns.text(row, "correct"), "correct")
    rationale = columns.optional_text(row, "rationale").strip()
    return Question(columns.text(row, "question"), right, {"choices": choices, "solution": rationale})


def _logiqa(row: Values) -> Question:
    """A context, a question on it, and the place of the right option counted from 0."""
    choices = columns.lettered(columns.texts(row, "options"), "options")
    place = columns.value(row, "correct_option")  # some copies have it as a text
    place = int(place) if isinstance(place, str) and place.isdecimal() else place
    right = columns.picked(choices, place, "correct_option")
    return Question(f"{columns.text(row, 'context')}\n\n{columns.text(row, 'query')}", right, {"choices": choices})


LABELLED = ("choices", "answerKey")
ARC_EASY = DataSet(
    name="arc_easy",
    what="ARC, grade-school science, the easy part (Clark et al., arXiv:1803.05457).",
    hub="allenai/ai2_arc",
    hub_config="ARC-Easy",
    columns=("question", *LABELLED),
    question=_labelled,
    prompt="choice",
    rule="choice.choice_answer",
)
ARC_CHALLENGE = DataSet(
    name="arc_challenge",
    what="ARC, grade-school science, the part that retrieval gets wrong (Clark et al., arXiv:1803.05457).",
    hub="allenai/ai2_arc",
    hub_config="ARC-Challenge",
    columns=("question", *LABELLED),
    question=_labelled,
    prompt="choice",
    rule="choice.choice_answer",
)
OPENBOOKQA = DataSet(
    name="openbookqa",
    what="OpenBookQA, elementary science and common knowledge (Mihaylov et al., arXiv:1809.02789).",
    hub="allenai/openbookqa",
    hub_config="main",
    columns=("question_stem", *LABELLED),
    question=_openbookqa,
    prompt="choice",
    rule="choice.choice_answer",
)
COMMONSENSE_QA = DataSet(
    name="commonsense_qa",
    what="CommonsenseQA, five choices (Talmor et al., arXiv:1811.00937).",
    hub="tau/commonsense_qa",
    columns=("question", *LABELLED),
    question=_labelled,
    heldout="validation",  # the test split's keys are not published
    prompt="choice",
    rule="choice.choice_answer",
)
AQUA_RAT = DataSet(
    name="aqua_rat",
    what="AQuA-RAT, algebra with five choices (Ling et al., arXiv:1705.04146).",
    hub="deepmind/aqua_rat",
    hub_config="raw",
    columns=("question", "options", "correct"),
    question=_aqua_rat,
    prompt="choice",
    rule="choice.choice_answer",
)
LOGIQA = DataSet(
    name="logiqa",
    what="LogiQA, reading with logic (Liu et al., arXiv:2007.08124).",
    hub="lucasmccabe/logiqa",
    hub_revision="refs/convert/parquet",  # its main branch is a program, which is not run
    columns=("context", "query", "options", "correct_option"),
    question=_logiqa,
    prompt="choice",
    rule="choice.choice_answer",
)
DATA_SETS = (ARC_EASY, ARC_CHALLENGE, OPENBOOKQA, COMMONSENSE_QA, AQUA_RAT, LOGIQA)

arc_easy = task_of(ARC_EASY)
arc_challenge = task_of(ARC_CHALLENGE)
openbookqa = task_of(OPENBOOKQA)
commonsense_qa = task_of(COMMONSENSE_QA)
aqua_rat = task_of(AQUA_RAT)
logiqa = task_of(LOGIQA)
