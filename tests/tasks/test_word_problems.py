"""Word problems: held-out computations are never trained on, answers are right, flawed demonstrations are as flawed as said."""

from __future__ import annotations

import math
import re
from itertools import islice

import pytest

from jaxreason.models.tokenizer import load_tokenizer, save_word_tokenizer
from jaxreason.tasks import Task, word_problems
from jaxreason.types import Problem

MANY = 20_000
COMPLETION = re.compile(r"<think>(.*)</think><answer>(\d+)</answer>")


def read(question: str) -> tuple[tuple[str, int], ...]:
    """The computation in a question's English, read independently of how it was made."""
    first, *changes, last = re.findall(r"[^.?]+[.?]", question)
    assert last.strip() == "How many?"
    numbers = {"Doubles": ("*", 2), "Triples": ("*", 3)}
    signs = {"Gets": "+", "Finds": "+", "Buys": "+", "Loses": "-", "Sells": "-", "Gives": "-"}
    match = re.fullmatch(r"[A-Z][a-z]+ has (\d+) [a-z]+\.", first)
    assert match, first
    steps = [("start", int(match[1]))]
    for change in changes:
        verb, what = change.strip(" .").split()
        steps.append(numbers[verb] if what == "them" else (signs[verb], int(what)))
    return tuple(steps)


def value(steps: tuple[tuple[str, int], ...]) -> int:
    total = steps[0][1]
    for sign, number in steps[1:]:
        total = {"+": total + number, "-": total - number, "*": total * number}[sign]
        assert 0 <= total <= 99
    return total


@pytest.fixture(scope="module")
def task() -> Task:
    return word_problems(heldout_size=2000)


@pytest.fixture(scope="module")
def sides(task) -> dict[str, list[Problem]]:
    kinds = {kind: [make(number).problem for number in range(MANY // 4)] for kind, make in task.demonstrations.items()}
    return {"train": [task.train(number) for number in range(MANY)], "heldout": list(task.heldout), **kinds}


def test_no_heldout_computation_is_ever_trained_on(sides):
    assert set(sides) == {"train", "heldout", "worked", "flawed"}
    computations = {side: {read(problem.question) for problem in problems} for side, problems in sides.items()}
    heldout = computations.pop("heldout")
    assert len(heldout) > 1000
    for seen in computations.values():
        assert len(seen) > 3000 and not seen & heldout


def test_sides_are_disjoint_for_every_seed():
    """The side is a property of the numbers: one seed's held-out computations are not trained on by another."""
    heldout = {read(problem.question) for seed in range(5) for problem in word_problems(seed=seed, heldout_size=400).heldout}
    for seed in range(5):
        train = word_problems(seed=seed, heldout_size=1).train
        assert not {read(train(number).question) for number in range(2000)} & heldout


def test_answers_are_right(sides):
    for problems in sides.values():
        assert [p.id for p in problems if int(p.answer) != value(read(p.question))] == []


def test_worked_demonstrations_reason_step_by_step(task):
    for number in range(2000):
        demonstration = task.demonstrations["worked"](number)
        thought, answer = COMPLETION.fullmatch(demonstration.completion).groups()
        steps = read(demonstration.problem.question)
        assert answer == demonstration.problem.answer and len(thought.split(";")) == len(steps) - 1
        total = steps[0][1]
        for equation, (sign, given) in zip(thought.split(";"), steps[1:], strict=True):
            left, right = equation.split("=")
            assert left == f"{total}{sign}{given}"
            total = value((("start", total), (sign, given)))
            assert int(right) == total
        assert total == int(answer)


def test_three_quarters_of_the_flawed_ones_answer_without_thinking(task):
    completions = [task.demonstrations["flawed"](number) for number in range(5000)]
    parsed = [(COMPLETION.fullmatch(each.completion).groups(), each.problem.answer) for each in completions]
    short = [(answer, truth) for (thought, answer), truth in parsed if not thought]
    deviation = math.sqrt(5000 * 0.75 * 0.25)
    assert abs(len(short) - 3750) < 4 * deviation
    assert all(abs(int(answer) - int(truth)) <= 4 for answer, truth in short)
    # of the nine offsets from -4 to 4 one is none; answers near 0 are cut off there, so a few more are right
    assert 1 / 9 - 0.02 < sum(answer == truth for answer, truth in short) / len(short) < 1 / 9 + 0.06
    assert all(answer == truth for (thought, answer), truth in parsed if thought)


def test_a_problem_is_a_function_of_its_number(task):
    again = word_problems(heldout_size=2000)
    assert [task.train(n) for n in (5, 3, 99_999)] == [again.train(n) for n in (5, 3, 99_999)]
    assert list(task.heldout[:50]) == list(again.heldout[:50]) == list(word_problems(heldout_size=50).heldout)
    for kind in task.demonstrations:
        assert task.demonstrations[kind](7) == again.demonstrations[kind](7)
    assert task.train(5) != word_problems(seed=1).train(5)


def test_every_problem_and_demonstration_fits_the_quickstart(task, sides, tmp_path):
    save_word_tokenizer(task.words, tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    prompts = [task.messages(problem) for problems in sides.values() for problem in islice(problems, 2000)]
    encoded = tokenizer.encode_prompts(prompts)
    assert max(map(len, encoded)) <= 24
    assert not any(tokenizer.hf.unk_token_id in row for row in encoded)
    for make in task.demonstrations.values():
        rows = tokenizer.encode_completions([make(number).completion for number in range(3000)])
        assert max(map(len, rows)) <= 32
        assert not any(tokenizer.hf.unk_token_id in row for row in rows)


def test_the_number_of_changes_is_asked_for():
    only = word_problems(min_changes=1, max_changes=1, heldout_size=20)
    assert {len(read(only.train(number).question)) for number in range(100)} == {2}
    with pytest.raises(ValueError, match="min_changes=3 and max_changes=2"):
        word_problems(min_changes=3, max_changes=2)
