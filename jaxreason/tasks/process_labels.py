"""Chains of reasoning with judgements of their steps or of the whole: what process reward models learn from.

Four forms: PRM800K's own records, Math-Shepherd's tagged texts, prefixes with the share of right answers reached from them
(MATH-APS), and chains that people called right or wrong as a whole. The task's problems are those of the chains, each once.
"""

from __future__ import annotations

import re

from jaxreason.tasks import columns
from jaxreason.tasks.rows import BadRow, Values
from jaxreason.tasks.source import Chain, DataSet, Question, task_of

TAG = "ки"  # ends every step of Math-Shepherd's inputs; '+' or '-' stands there in its labels
RATINGS = {-1: 0.0, 0: 0.5, 1: 1.0, None: None}


def _prm800k(row: Values) -> Question:
    """The path that the labellers took, and each other proposal for a step after the path before it.

    Ratings -1, 0 and 1 become 0, 1/2 and 1 (the paper counts the neutral 0 as right); a step that a labeller wrote is right.
    """
    asked, label = columns.value(row, "question"), columns.value(row, "label")
    form = "PRM800K's records, question.problem and label.steps[].completions[].text and .rating"
    if not isinstance(asked, dict):
        raise columns.wrong_type(asked, "question", form)
    question = columns.text(asked, "problem")
    answer = columns.optional_text(asked, "ground_truth_answer").strip()
    chains: list[Chain] = []
    steps: list[str] = []
    labels: list[float | None] = []
    try:
        for step in label["steps"]:
            made = [(columns.checked_text(each["text"], "label"), RATINGS[each["rating"]]) for each in step["completions"] or ()]
            human, chosen = step["human_completion"], step["chosen_completion"]
            chains += [Chain([*steps, said], [*labels, mark]) for place, (said, mark) in enumerate(made) if place != chosen]
            if chosen is None and not human:
                break
            said, mark = made[chosen] if chosen is not None else (columns.checked_text(human["text"], "label"), 1.0)
            steps.append(said)
            labels.append(mark)
    except (KeyError, IndexError, TypeError):
        raise columns.wrong_type(label, "label", form) from None
    path = [Chain(steps, labels)] if steps else []
    return Question(question, answer, chains=[*path, *chains])


def _math_shepherd(row: Values) -> Question:
    """A question and steps in one text, each step ended by the tag; the labels are in the tags' places in a copy of it."""
    given, judged = columns.text(row, "input"), columns.text(row, "label")
    *pieces, rest = given.split(TAG)
    place = 0
    labels: list[float | None] = []
    for piece in pieces:
        mark = judged[place + len(piece) : place + len(piece) + 1]
        if judged[place : place + len(piece)] != piece or mark not in ("+", "-"):
            raise BadRow("unparsable labels", f"column 'label' is not column 'input' with + or - in place of each '{TAG}'")
        labels.append(float(mark == "+"))
        place += len(piece) + 1
    begin = re.search(r"Step 1\s*:", pieces[0]) if pieces else None
    if begin is None or rest.strip():
        raise BadRow("unparsable labels", f"column 'input' has no 'Step 1:' or does not end in '{TAG}'")
    steps = [pieces[0][begin.start() :].strip(), *(piece.strip() for piece in pieces[1:])]
    question = pieces[0][: begin.start()].strip()
    if not question:
        raise BadRow("empty", "column 'input' has no question before 'Step 1:'")
    return Question(question, "", chains=[Chain(steps, labels)])


def _math_aps(row: Values) -> Question:
    """A prefix, which begins with the question, and the share of right answers that continue it."""
    question, prefix = columns.text(row, "question"), columns.text(row, "solution_prefix")
    share = columns.value(row, "mc_value")
    if isinstance(share, bool) or not isinstance(share, int | float) or not 0 <= share <= 1:
        raise columns.wrong_type(share, "mc_value", "a share from 0 to 1")
    steps = _paragraphs(prefix.removeprefix(question), r"\n\s*\n")
    chain = Chain(steps, [None] * len(steps), float(share))
    return Question(question, columns.answer(row, "final_answer"), chains=[chain])


def _judged_chains(row: Values) -> Question:
    """A chain, a step a line, that somebody called right (1) or wrong (0)."""
    steps = _paragraphs(columns.text(row, "reasoning_chain"), r"\n+")
    verdict = columns.value(row, "human_label")
    if not isinstance(verdict, int) or verdict not in (0, 1):
        raise columns.wrong_type(verdict, "human_label", "0 or 1")
    # the answer beside it is the chain's own, not a reference
    metadata = {name: row[name] for name in ("source", "answer") if name in row}
    chain = Chain(steps, [None] * len(steps), float(verdict))
    return Question(columns.text(row, "question"), "", metadata, chains=[chain])


def _paragraphs(text: str, cut: str) -> list[str]:
    return [step.strip() for step in re.split(cut, text) if step.strip()]


PRM800K = DataSet(
    name="prm800k",
    what="PRM800K, steps rated by people, in its own records (Lightman et al., arXiv:2305.20050).",
    hub="tasksource/PRM800K",
    columns=("question", "label"),
    question=_prm800k,
    rule="",  # some of its problems have no reference answer
)
MATH_SHEPHERD = DataSet(
    name="math_shepherd",
    what="Math-Shepherd, steps labelled by what their continuations reached (Wang et al., arXiv:2312.08935).",
    hub="peiyi9979/Math-Shepherd",
    columns=("input", "label"),
    question=_math_shepherd,
    heldout="train",
    rule="",  # no reference answer
)
MATH_APS = DataSet(
    name="math_aps",
    what="MATH-APS, prefixes of solutions with the share of right continuations (OpenR, arXiv:2410.09671).",
    hub="openreasoner/MATH-APS",
    columns=("question", "final_answer", "solution_prefix", "mc_value"),
    question=_math_aps,
    heldout="train",
)
JUDGED_CHAINS = DataSet(
    name="judged_chains",
    what="Chains that people called right or wrong as a whole, for testing verifiers (AutoRace, arXiv:2404.05221).",
    hub="",
    columns=("question", "reasoning_chain", "human_label"),
    question=_judged_chains,
    train="",
    heldout_size=None,
    rule="",
)
DATA_SETS = (PRM800K, MATH_SHEPHERD, MATH_APS, JUDGED_CHAINS)

prm800k = task_of(PRM800K)
math_shepherd = task_of(MATH_SHEPHERD)
math_aps = task_of(MATH_APS)
judged_chains = task_of(JUDGED_CHAINS)
