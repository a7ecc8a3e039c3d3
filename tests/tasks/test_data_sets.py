"""Every data set: real copies are read whole, as many as their READMEs say, with golds that parse; each form by rows of its own."""

from __future__ import annotations

import gzip
import json
import re
import subprocess
import sys
import warnings
from collections import Counter
from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path

import pytest

from jaxreason import tasks
from jaxreason.tasks import choice, code, mathematics, preferences, process_labels, short_answers
from jaxreason.tasks.rows import BadRow
from jaxreason.tasks.source import DataSet
from jaxreason.tasks.task import Task
from jaxreason.types import Problem

DATA_SETS: dict[str, DataSet] = {
    each.name: each
    for module in (mathematics, choice, short_answers, code, preferences, process_labels)
    for each in module.DATA_SETS
}
FOLDERS = {  # task -> folder, train split, held-out split, where they are not those of the hub
    "gsm8k": ("gsm8k", "train", "test"),
    "math": ("math_train", "train", "train"),
    "math500": ("math500", "", "test"),
    "olympiadbench": ("olympiadbench", "", "test"),
    "svamp": ("svamp", "", "test"),
    "aqua_rat": ("aqua_rat", "validation", "test"),
    "arc_easy": ("arc_easy", "train", "test"),
    "arc_challenge": ("arc_challenge", "train", "test"),
    "openbookqa": ("openbookqa", "train", "test"),
    "commonsense_qa": ("commonsense_qa", "train", "validation"),
    "strategy_qa": ("strategy_qa", "train", "train"),
    "hotpot_qa": ("hotpot_qa", "", "validation"),
    "prontoqa": ("prontoqa", "", "test"),
    "prosqa": ("prosqa", "", "test"),
    "humaneval": ("openai_humaneval", "", "test"),
    "mbpp": ("mbpp", "train", "test"),
    "hh_rlhf": ("hh_rlhf", "train", "test"),
    "prm800k": ("process_labels", "", "prm800k_sample"),
    "math_shepherd": ("process_labels", "", "math_shepherd_sample"),
    "math_aps": ("process_labels", "", "math_aps_prefixes"),
    "judged_chains": ("chain_labels", "", "test"),
}


def load(name: str, shared: Path, **settings) -> Task:
    folder, train, heldout = FOLDERS[name]
    given = {"train_split": train, "heldout_split": heldout, "heldout_size": 100 if train == heldout else None}
    return getattr(tasks, name)(**({"data_dir": str(shared / "data" / folder)} | given | settings))


def raw(shared: Path, folder: str, split: str) -> list[dict]:
    with gzip.open(shared / "data" / folder / f"{split}.jsonl.gz", "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def said(shared: Path, folder: str, split: str) -> int:
    """How many rows the README says a file has."""
    found = re.search(rf"\| {split}\.jsonl\.gz \| (\d+) ", (shared / "data" / folder / "README.md").read_text(encoding="utf-8"))
    assert found
    return int(found[1])


def all_of(task: Task) -> list[Problem]:
    assert task.train_size is not None
    return [task.train(number) for number in range(task.train_size)] + list(task.heldout)


@pytest.mark.parametrize("name", FOLDERS)
def test_a_copy_is_read_whole(name, shared):
    task = load(name, shared)
    folder, *splits = FOLDERS[name]
    expected = sum(said(shared, folder, split) for split in {*splits} - {""})
    problems = all_of(task)
    rows = len(problems)
    if name in ("prm800k", "math_shepherd", "math_aps", "judged_chains"):  # many rows have one problem
        assert len({problem.question for problem in problems}) == rows
        rows = expected if name == "prm800k" else sum(len(each) for each in task.step_labels.values())
    assert rows + sum(task.skipped.counts.values()) == expected
    assert name == "hh_rlhf" or not task.skipped.counts
    assert len({problem.id for problem in problems}) == len(problems)
    assert task.rule == DATA_SETS[name].rule and {problem.task for problem in problems} == {name}
    asked = [str(task.messages(problem)) for problem in problems]
    assert not {*asked[: task.train_size]} & {*asked[task.train_size :]}  # nothing held out is trained on
    for problem in problems[:: max(1, len(problems) // 50)]:
        assert problem.question.strip() and (problem.answer or not task.rule or name in ("prm800k", "mbpp"))
        assert problem.question in task.messages(problem)[-1]["content"]
        json.dumps(problem.metadata)  # plain values: they cross to other processes


@pytest.mark.parametrize("name", ["math", "strategy_qa"])
def test_one_split_is_cut_in_two_without_a_shared_question(name, shared):
    task = load(name, shared)
    train, heldout = all_of(task)[: task.train_size], task.heldout
    assert not {problem.question for problem in train} & {problem.question for problem in heldout}
    assert len({problem.question for problem in heldout}) == 100
    assert [each.id for each in load(name, shared).heldout] == [each.id for each in heldout]
    fewer = load(name, shared, heldout_size=50).heldout
    assert {each.id for each in fewer} < {each.id for each in heldout}


def test_copies_of_a_question_are_on_one_side(tmp_path):
    rows = [{"question": f"{n % 40}?", "answer": str(n)} for n in range(200)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = tasks.table(train=str(tmp_path / "a.jsonl"), heldout_size=10)
    assert (task.train_size, len(task.heldout)) == (150, 50)
    assert not {task.train(n).question for n in range(150)} & {each.question for each in task.heldout}


# ---- answers, each against the raw row


@pytest.mark.parametrize("name", ["arc_easy", "arc_challenge", "openbookqa", "commonsense_qa"])
def test_labelled_choices(name, shared):
    folder, train, heldout = FOLDERS[name]
    rows = raw(shared, folder, train) + raw(shared, folder, heldout)
    for row, problem in zip(rows, all_of(load(name, shared)), strict=True):
        texts = dict(problem.metadata["choices"])
        assert list(texts.values()) == [text.strip() for text in row["choices"]["text"]]
        assert texts[problem.answer] == row["choices"]["text"][row["choices"]["label"].index(row["answerKey"])].strip()


def test_labels_that_are_no_letters_become_letters(tmp_path):
    """A few rows of ARC are so, on the hub; the copies have been relettered."""
    row = {"question": "Which?", "choices": {"text": ["p", "q", "r"], "label": ["1", "2", "3"]}, "answerKey": "3"}
    (tmp_path / "test.jsonl").write_text(json.dumps(row))
    [problem] = tasks.arc_easy(data_dir=str(tmp_path), train_split="").heldout
    assert problem.metadata["choices"] == [("A", "p"), ("B", "q"), ("C", "r")] and problem.answer == "C"


def test_aqua_rat_keeps_its_letters(shared):
    rows = raw(shared, "aqua_rat", "validation") + raw(shared, "aqua_rat", "test")
    for row, problem in zip(rows, all_of(load("aqua_rat", shared)), strict=True):
        assert problem.answer == row["correct"]
        assert [f"{letter}){text}" for letter, text in problem.metadata["choices"]] == [
            f"{each[0]}){each[2:].strip()}" for each in row["options"]
        ]


def test_logiqa(tmp_path):
    row = {
        "context": "All A are B.",
        "query": "What follows?",
        "options": ["B. is A", "Some B are A", "x", "y"],
        "correct_option": 1,
    }
    rows = [
        row,
        row | {"correct_option": "3"},
        row | {"options": list("3210")},
        row | {"correct_option": 4},
        row | {"options": ["a"]},
    ]
    (tmp_path / "test.jsonl").write_text("\n".join(map(json.dumps, rows)))
    task = tasks.logiqa(data_dir=str(tmp_path), train_split="", bad_rows="skip")
    assert [problem.answer for problem in task.heldout] == ["B", "D", "B"]
    assert task.heldout[0].metadata["choices"][0] == ("A", "B. is A")
    assert task.messages(task.heldout[0])[0]["content"].startswith("All A are B.\n\nWhat follows?\n\nA. B. is A\nB. Some B are A\n")
    assert dict(task.skipped.counts) == {"unparsable answer": 1, "wrong choices": 1}
    assert "which is none of 4 choices" in task.skipped.first[0]


def test_mathematics(shared):
    olympiad = raw(shared, "olympiadbench", "test")
    for row, problem in zip(olympiad, load("olympiadbench", shared).heldout, strict=True):
        inside = ", ".join(row["final_answer"]).removesuffix(".")
        assert problem.answer in (inside, inside[1:-1]) and problem.metadata["subject"] == row["subfield"]
        assert not problem.answer.startswith("$") or problem.answer.count("$") > 2
    for row, problem in zip(raw(shared, "svamp", "test"), load("svamp", shared).heldout, strict=True):
        assert float(problem.answer) == row["Answer"] and problem.answer.isdecimal()
        assert problem.question.startswith(row["Body"].strip()) and problem.question.endswith(row["Question"].strip())
        assert re.search(r"[.,!?] " + re.escape(row["Question"].strip()), problem.question)
    levels = Counter(problem.metadata["level"] for problem in load("math500", shared).heldout)
    assert levels == Counter(row["level"] for row in raw(shared, "math500", "test"))


def test_math_without_an_answer_column_takes_the_box(shared, tmp_path):
    """MATH on the hub has no answer column; MATH-500 has both, so its rows tell what the box must give."""
    rows = raw(shared, "math500", "test")
    bare = [{name: value for name, value in row.items() if name not in ("answer", "subject")} | {"type": "Algebra"} for row in rows]
    (tmp_path / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in bare))
    task = tasks.math(data_dir=str(tmp_path), train_split="", heldout_size=None)
    stated = load("math500", shared).heldout
    assert [problem.answer for problem in task.heldout] == [problem.answer for problem in stated]
    assert {problem.metadata["subject"] for problem in task.heldout} == {"Algebra"}
    for solution in (r"so \boxed{1", "so 1", ""):
        (tmp_path / "test.jsonl").write_text(json.dumps({"problem": "1?", "solution": solution}))
        with pytest.raises(ValueError, match=r"test\.jsonl:1: .*(no whole \\boxed|no column 'answer')"):
            tasks.math(data_dir=str(tmp_path), train_split="")
    (tmp_path / "test.jsonl").write_text(json.dumps({"problem": "1?", "solution": r"first \boxed{2} then $\boxed 3$."}))
    assert tasks.math(data_dir=str(tmp_path), train_split="").heldout[0].answer == "3"


def test_contests(tmp_path):
    rows = [{"problem": "p", "answer": answer} for answer in (33, "033", 142.0, "000", r"\frac{1}{2}", "$27$", "1,018")]
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    for task in (tasks.aime(data_dir=str(tmp_path)), tasks.amc(data_dir=str(tmp_path))):
        assert [each.answer for each in task.heldout] == ["33", "33", "142", "0", r"\frac{1}{2}", "27", "1,018"]
        assert task.train_size == 0


def golds(shared: Path, name: str) -> list[str]:
    return [problem.answer for problem in all_of(load(name, shared)) if problem.answer]


@pytest.mark.parametrize("name, every", [("math500", 10), ("olympiadbench", 20), ("math", 200), ("svamp", 20), ("gsm8k", 200)])
def test_golds_parse(name, every, shared):
    """By math-verify, which knows nothing of how we read them; `every` th one, all in the slow twin."""
    check_golds(golds(shared, name)[::every])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["math500", "olympiadbench", "math"])
def test_all_golds_parse(name, shared):
    check_golds(golds(shared, name))


@pytest.mark.parametrize("name", ["gsm8k", "svamp"])
def test_golds_are_numbers(name, shared):
    assert all(Decimal(each).is_finite() for each in golds(shared, name))


def check_golds(answers: list[str]) -> None:
    math_verify = pytest.importorskip("math_verify", reason="needs jaxreason[math]")
    assert len(answers) > 20
    assert not [each for each in answers if not math_verify.parse(rf"\boxed{{{each}}}", parsing_timeout=None)]


# ---- demonstrations


def test_solutions_are_demonstrations_that_end_in_the_answer(shared, tmp_path):
    task = load("gsm8k", shared)
    assert task.train_size
    seen = {task.demonstrations["worked"](number).problem.id for number in range(task.train_size)}
    assert len(seen) == task.train_size  # a round shows each once
    again = [task.demonstrations["worked"](number) for number in (0, task.train_size)]
    assert again[0].problem.id != again[1].problem.id  # the next round has another order
    for number in range(50):
        shown = task.demonstrations["worked"](number)
        assert "<<" not in shown.completion and shown.completion.endswith(rf"The answer is \boxed{{{shown.problem.answer}}}.")
    rows = [{"question": f"{n}?", "solution": rf"Hm. \boxed{{{n}}}", "answer": str(n)} for n in range(9)]
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    limo = tasks.limo(data_dir=str(tmp_path), heldout_size=2)
    trained = {limo.train(number).question for number in range(7)}
    for number in range(20):
        shown = limo.demonstrations["worked"](number)
        assert shown.completion == rf"Hm. \boxed{{{shown.problem.answer}}}" and shown.problem.question in trained


# ---- programs


def run(*parts: str) -> None:
    with warnings.catch_warnings(action="ignore"):  # of '\\w' in a program
        exec("\n".join(parts), {"__name__": "checked"})


def test_reference_solutions_pass_the_tests_as_they_are_given(shared):
    for name, many in (("humaneval", 30), ("mbpp", 60)):
        for problem in load(name, shared).heldout[:many]:
            tests = problem.metadata
            assert tests["style"] == "assert" and tests["tests"]
            run(problem.answer, tests["setup"], *tests["tests"])
            with pytest.raises((AssertionError, NameError, TypeError)):
                name_of = tests["entry_point"] or re.search(r"\b(\w+)\(", tests["tests"][0].partition("assert")[2])[1]  # type: ignore
                run(problem.answer, f"def {name_of}(*args): return 'wrong'", tests["setup"], *tests["tests"])


def test_humaneval_with_and_without_the_final_call(shared, tmp_path):
    """The hub's rows define `check` and do not call it; the copy's call it."""
    rows = raw(shared, "openai_humaneval", "test")
    bare = [row | {"test": row["test"].removesuffix(f"check({row['entry_point']})")} for row in rows]
    (tmp_path / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in bare))
    task = tasks.humaneval(data_dir=str(tmp_path))
    assert [each.metadata for each in task.heldout] == [each.metadata for each in load("humaneval", shared).heldout]
    shown = task.messages(task.heldout[0])[0]["content"]
    assert f"```python\n{rows[0]['prompt']}\n```" in shown


@pytest.mark.parametrize("visible", [0, 1, 3])
def test_mbpp_shows_as_many_tests_as_asked(visible, shared):
    problem = load("mbpp", shared, visible_tests=visible).heldout[0]
    assert [test in problem.question for test in problem.metadata["tests"]] == [place < visible for place in range(3)]
    with pytest.raises(ValueError, match="visible_tests is -1"):
        load("mbpp", shared, visible_tests=-1)


def test_programs_that_read_and_write(tmp_path):
    rows = [{"task": f"Add {n}.", "in": ["1 2\n", "3 4\n"], "out": ["3\n", "7\n"]} for n in range(3)]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, [*rows, {"task": "x", "in": ["1"], "out": []}])))
    columns = {"question_column": "task", "inputs_column": "in", "outputs_column": "out"}
    task = tasks.table(train=str(tmp_path / "a.jsonl"), heldout_size=1, bad_rows="skip", **columns)
    assert task.rule == "code.code_tests" and task.train_size == 2
    assert task.heldout[0].metadata == {"style": "stdin", "cases": [["1 2\n", "3\n"], ["3 4\n", "7\n"]]}
    assert "standard input" in task.messages(task.heldout[0])[0]["content"] and dict(task.skipped.counts) == {"wrong type": 1}
    with pytest.raises(ValueError, match="inputs_column and outputs_column belong together"):
        tasks.table(train=str(tmp_path / "a.jsonl"), inputs_column="in")


# ---- preferences and labels


def test_pairs_put_together_again_are_the_rows(shared):
    task = load("hh_rlhf", shared)
    rows = raw(shared, "hh_rlhf", "train") + raw(shared, "hh_rlhf", "test")
    pairs = [*task.preferences["train"], *task.preferences["heldout"]]
    names = {"user": "Human", "assistant": "Assistant"}

    def spaceless(text: str) -> str:
        return re.sub(r"\s+", "", text)

    def dialogue(pair, ending: str) -> str:
        turns = [*pair.messages, {"role": "assistant", "content": ending}]
        return spaceless("".join(f"{names[turn['role']]}: {turn['content']}" for turn in turns))

    there = {(spaceless(row["chosen"]), spaceless(row["rejected"])) for row in rows}
    assert len(pairs) > 0.99 * len(rows)
    assert all((dialogue(pair, pair.chosen), dialogue(pair, pair.rejected)) in there for pair in pairs)
    for pair, problem in zip(pairs, all_of(task), strict=True):
        assert task.messages(problem) == pair.messages and pair.messages[-1]["role"] == "user"
        assert pair.chosen != pair.rejected and problem.answer == ""
    with pytest.raises(ValueError, match=r"train\.jsonl\.gz:101: column 'chosen' has an empty turn"):
        load("hh_rlhf", shared, bad_rows="fatal")


def test_prm800ks_records(tmp_path):
    def completion(text, rating):
        return {"text": text, "rating": rating, "flagged": False}

    steps = [
        {"completions": [completion("a", 1)], "chosen_completion": 0, "human_completion": None},
        {"completions": [completion("b", -1), completion("c", None)], "chosen_completion": None, "human_completion": {"text": "h"}},
        {"completions": [completion("d", -1), completion("e", 0)], "chosen_completion": 1, "human_completion": None},
        {"completions": [completion("f", 1), completion("g", -1)], "chosen_completion": None, "human_completion": None},
        {"completions": None, "chosen_completion": None, "human_completion": None},
    ]
    row = {"question": {"problem": "p", "ground_truth_answer": None}, "label": {"steps": steps}}
    (tmp_path / "test.jsonl").write_text(json.dumps(row))
    chains = tasks.prm800k(data_dir=str(tmp_path), train_split="").step_labels["heldout"]
    assert [(tuple(chain.steps), tuple(chain.labels)) for chain in chains] == [
        (("a", "h", "e"), (1.0, 1.0, 0.5)),
        (("a", "b"), (1.0, 0.0)),
        (("a", "c"), (1.0, None)),
        (("a", "h", "d"), (1.0, 1.0, 0.0)),
        (("a", "h", "e", "f"), (1.0, 1.0, 0.5, 1.0)),
        (("a", "h", "e", "g"), (1.0, 1.0, 0.5, 0.0)),
    ]
    (tmp_path / "test.jsonl").write_text(json.dumps({"question": "p", "label": {"steps": steps}}))
    with pytest.raises(ValueError, match=r"test\.jsonl:1: column .* expected PRM800K's records"):
        tasks.prm800k(data_dir=str(tmp_path), train_split="")


def test_math_shepherd_and_the_others(shared, tmp_path):
    for row, chain in zip(raw(shared, "process_labels", "math_shepherd_sample"), labels(shared, "math_shepherd"), strict=True):
        marks = re.findall(r"([+-])(?=\n|$)", row["label"])
        assert chain.labels == [float(mark == "+") for mark in marks] and len(chain.steps) == len(marks) == row["input"].count("ки")
        assert all(step.startswith(f"Step {place}:") for place, step in enumerate(chain.steps, 1))
        assert row["input"].startswith(chain.problem.question)
    for row, chain in zip(raw(shared, "process_labels", "math_aps_prefixes"), labels(shared, "math_aps"), strict=True):
        assert chain.outcome == row["mc_value"] and chain.problem.answer == row["final_answer"].strip("$")
        rest = row["solution_prefix"].removeprefix(row["question"])
        assert re.sub(r"\s", "", "".join(chain.steps)) == re.sub(r"\s", "", rest)
    for row, chain in zip(raw(shared, "chain_labels", "test"), labels(shared, "judged_chains"), strict=True):
        assert chain.outcome == row["human_label"] and len(chain.steps) == len(chain.labels) > 0
        assert chain.problem.answer == "" and set(chain.labels) == {None}
    (tmp_path / "train.jsonl").write_text(json.dumps({"input": "p Step 1: a ки", "label": "p Step 1: b +"}))
    with pytest.raises(ValueError, match=r"train\.jsonl:1: column 'label' is not column 'input'"):
        tasks.math_shepherd(data_dir=str(tmp_path), train_split="")


def labels(shared: Path, name: str):
    return load(name, shared).step_labels["heldout"]


# ---- a table of one's own


def test_a_table_by_its_columns(tmp_path):
    rows = [
        {
            "ask": f"{n} + 1?",
            "right": str(n + 1),
            "place": 1,
            "opts": [str(n), str(n + 1), "none"],
            "why": f"count \\boxed{{{n + 1}}}",
            "kind": n % 2,
        }
        for n in range(6)
    ]
    file = tmp_path / "a.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    named = {"question_column": "ask", "answer_column": "right", "solution_column": "why", "category_column": "kind"}
    task = tasks.table(train=str(file), heldout=str(file), heldout_size=2, name="mine", **named)
    assert (task.name, task.rule, task.train_size, len(task.heldout)) == ("mine", "math.math_answer", 4, 2)
    for problem in all_of(task):
        row = rows[int(problem.id.rpartition("/")[2])]
        assert (problem.question, problem.answer, problem.metadata["kind"]) == (row["ask"], row["right"], row["kind"])
    assert task.demonstrations["worked"](0).completion.startswith("count ")
    chosen = tasks.table(train="", heldout=str(file), heldout_size=None, choices_column="opts", **named)
    assert chosen.rule == "choice.choice_answer" and chosen.train_size == 0
    assert [problem.answer for problem in chosen.heldout] == ["B"] * 6
    # a whole number is a place, even where it is a choice's text too
    placed = tasks.table(train="", heldout=str(file), choices_column="opts", **(named | {"answer_column": "place"}))
    assert [problem.answer for problem in placed.heldout] == ["B"] * 6
    words = tasks.table(
        train=str(file), heldout_size=1, rule="choice.short_answer", prompt="short_answer", **(named | {"answer_column": "why"})
    )
    assert words.heldout[0].answer.startswith("count ")
    with pytest.raises(ValueError, match="data_dir and hub_name are both given"):
        tasks.table(train="a", data_dir="b", hub_name="c")
    with pytest.raises(ValueError, match="train and heldout are both ''"):
        tasks.table(train="")


def test_tasks_do_without_jax_datasets_and_pyarrow():
    loaded = "import jaxreason.tasks, sys; print([name for name in ('jax', 'datasets', 'pyarrow', 'torch') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", loaded], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# ---- whatever stands in a row


JUNK = (
    None,
    True,
    0,
    7,
    -1.5,
    float("nan"),
    10**400,
    "",
    " \n",
    "x",
    "}{",
    "\ud800",
    [],
    [None],
    ["a"],
    {},
    {"a": 1},
    {"label": ["A"], "text": []},
)


def damaged(values: dict) -> Iterator[dict]:
    """The row without one of its values, and with something else in its place, at every depth."""
    for name, held in values.items():
        yield {other: values[other] for other in values if other != name}
        yield from ({**values, name: junk} for junk in JUNK)
        if isinstance(held, dict):
            yield from ({**values, name: inner} for inner in damaged(held))
        if isinstance(held, list) and held:
            yield from ({**values, name: [junk, *held[1:]]} for junk in JUNK)
            if isinstance(held[0], dict):
                yield from ({**values, name: [inner, *held[1:]]} for inner in damaged(held[0]))


@pytest.mark.parametrize("name", [*FOLDERS, "logiqa", "aime", "limo"])
def test_a_damaged_row_is_a_bad_row_or_a_whole_problem(name, shared):
    """Nothing else happens: no other exception, and no problem without a question or with something that is no text."""
    if name in FOLDERS:
        row = raw(shared, FOLDERS[name][0], FOLDERS[name][2])[0]
    else:
        row = {"problem": "p", "question": "p", "solution": "s", "answer": "1", "context": "c", "query": "q"}
        row |= {"options": ["a", "b", "c"], "correct_option": 1}
    declared = DATA_SETS[name]
    declared.question(row)
    bad = Counter()
    for values in damaged(row):
        try:
            made = declared.question(values)
        except BadRow as error:
            bad[error.reason] += 1
            assert str(error) and "\n" not in str(error)
            continue
        assert isinstance(made.question, str) and made.question.strip() and isinstance(made.answer, str)
        made.question.encode(), made.answer.encode()
    assert bad["missing column"] >= 1 and bad["wrong type"] >= 10
