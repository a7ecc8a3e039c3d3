r"""Mathematics with a reference answer: grade school, competitions, olympiads. Each data set is a declaration.

Answers are kept as the data set writes them, without the dollars around LaTeX; those that are numbers throughout (GSM8K, SVAMP)
also without the separators of thousands. Where a row has
a worked solution it is a demonstration; GSM8K's loses its calculator marks and ends in \boxed{}.
"""

from __future__ import annotations

import re

from jaxreason.tasks import columns
from jaxreason.tasks.rows import BadRow, Values
from jaxreason.tasks.source import DataSet, Question, task_of


def _gsm8k(row: Values) -> Question:
    solution, mark, answer = columns.text(row, "answer").rpartition("####")
    if not mark:
        raise BadRow("unparsable answer", "column 'answer' has no '####' before its answer: is this file GSM8K?")
    answer = columns.plain_number(answer, "answer")
    worked = re.sub(r"<<[^<>]*>>", "", solution).strip()
    return Question(
        columns.text(row, "question"), answer, {"solution": solution.strip()}, f"{worked}\nThe answer is \\boxed{{{answer}}}."
    )


def _math(row: Values) -> Question:
    r"""MATH and its like: the answer in a column, or in the solution's last \boxed{}."""
    solution = columns.optional_text(row, "solution").strip()
    stated = "answer" in row or not solution
    answer = columns.answer(row, "answer") if stated else columns.boxed(solution, "solution")
    subject = row.get("subject") or row.get("type")  # MATH-500's name for it, and MATH's
    metadata = {"subject": subject, "level": row.get("level"), "row_id": row.get("unique_id"), "solution": solution}
    imitable = solution if r"\boxed" in solution else ""
    return Question(columns.text(row, "problem"), answer, {k: v for k, v in metadata.items() if v not in (None, "")}, imitable)


def _contest(row: Values) -> Question:
    """AIME and AMC: an integer, written 33, '033' or 33.0; other answers are kept."""
    answer = columns.answer(row, "answer")
    metadata = {name: row[name] for name in ("url", "year") if row.get(name)}
    return Question(columns.text(row, "problem"), str(int(answer)) if answer.isdecimal() else answer, metadata)


def _olympiadbench(row: Values) -> Question:
    answers = [columns.latex(each, "final_answer") for each in columns.texts(row, "final_answer")]
    context = columns.optional_text(row, "context").strip()
    question = columns.text(row, "question")
    metadata = {name: row.get(name) for name in ("unit", "answer_type", "error", "is_multiple_answer")}
    metadata |= {"subject": row.get("subfield"), "row_id": row.get("id")}
    kept = {name: value for name, value in metadata.items() if value is not None}
    return Question(f"{context}\n\n{question}" if context else question, ", ".join(answers), kept)


def _svamp(row: Values) -> Question:
    story = columns.text(row, "Body")
    story += "" if story[-1] in ".,!?" else "."  # a third of the stories lack it
    metadata = {"type": row.get("Type"), "row_id": row.get("ID"), "equation": row.get("Equation")}
    kept = {name: value for name, value in metadata.items() if value is not None}
    return Question(f"{story} {columns.text(row, 'Question')}", columns.number(row, "Answer"), kept)


def _limo(row: Values) -> Question:
    solution = columns.text(row, "solution")
    return Question(columns.text(row, "question"), columns.answer(row, "answer"), {"solution": solution}, solution)


GSM8K = DataSet(
    name="gsm8k",
    what="Grade-school word problems by people (Cobbe et al., arXiv:2110.14168).",
    hub="openai/gsm8k",
    hub_config="main",
    columns=("question", "answer"),
    question=_gsm8k,
    rule="math.gsm8k_answer",
)
MATH = DataSet(
    name="math",
    what="MATH, competition problems of seven subjects and five levels (Hendrycks et al., arXiv:2103.03874).",
    hub="DigitalLearningGmbH/MATH-lighteval",
    columns=("problem", "answer or solution"),
    question=_math,
)
MATH500 = DataSet(
    name="math500",
    what="MATH-500, the test problems of MATH that PRM800K keeps apart (Lightman et al., arXiv:2305.20050).",
    hub="HuggingFaceH4/MATH-500",
    columns=("problem", "answer or solution"),
    question=_math,
    train="",
    heldout_size=None,
)
AIME = DataSet(
    name="aime",
    what="AIME 2024, 30 problems with integer answers; other years by hub_name or data_dir.",
    hub="HuggingFaceH4/aime_2024",
    columns=("problem", "answer"),
    question=_contest,
    train="",
    heldout="train",  # as the hub names its one split
    heldout_size=None,
)
AMC = DataSet(
    name="amc",
    what="AMC 12 of 2022 and 2023 with integer answers.",
    hub="AI-MO/aimo-validation-amc",
    columns=("problem", "answer"),
    question=_contest,
    train="",
    heldout="train",
    heldout_size=None,
)
OLYMPIADBENCH = DataSet(
    name="olympiadbench",
    what="OlympiadBench, open-ended mathematics in English without figures (He et al., arXiv:2402.14008).",
    hub="Hothan/OlympiadBench",
    hub_config="OE_TO_maths_en_COMP",
    columns=("question", "final_answer"),
    question=_olympiadbench,
    train="",
    heldout="train",
    heldout_size=None,
)
SVAMP = DataSet(
    name="svamp",
    what="SVAMP, short word problems with a twist (Patel et al., arXiv:2103.07191).",
    hub="ChilleD/SVAMP",
    columns=("Body", "Question", "Answer"),
    question=_svamp,
)
LIMO = DataSet(
    name="limo",
    what="LIMO, few problems with long solutions to imitate (Ye et al., arXiv:2502.03387).",
    hub="GAIR/LIMO",
    columns=("question", "solution", "answer"),
    question=_limo,
    heldout="train",
    heldout_size=64,
)
DATA_SETS = (GSM8K, MATH, MATH500, AIME, AMC, OLYMPIADBENCH, SVAMP, LIMO)

gsm8k = task_of(GSM8K)
math = task_of(MATH)
math500 = task_of(MATH500)
aime = task_of(AIME)
amc = task_of(AMC)
olympiadbench = task_of(OLYMPIADBENCH)
svamp = task_of(SVAMP)
limo = task_of(LIMO)
