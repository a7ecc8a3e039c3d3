"""From records to numbers: what is counted, and on how many problems each number stands."""

from __future__ import annotations

import json

import pytest

from jaxreason.pipelines.run import headline
from jaxreason.training import evaluate
from jaxreason.training.results import default_k, problem_numbers, summarise
from jaxreason.types import Problem


def row(accuracy: float | None, voted: str | None = None, **more) -> dict:
    row = {"voted": voted, "length": 10, "stop": "eos", "failed": [], **more}
    return {**row, "reward": {"total": accuracy or 0.0, "accuracy": accuracy, **more.get("parts", {})}}


def problem(name: str, **metadata) -> Problem:
    return Problem(name, "?", "1", task=metadata.pop("task", "t"), metadata=metadata)


def test_default_k():
    assert [default_k(n) for n in (1, 2, 3, 6, 16)] == [(1,), (1, 2), (1, 2, 3), (1, 2, 4, 6), (1, 2, 4, 8, 16)]


def test_one_problem_by_hand():
    rows = [
        row(1.0, "5", length=4),
        row(0.0, "6", stop="length"),
        row(0.0, "6", failed=["timeout"]),
        row(0.5, None, parts={"format": None}),
    ]
    rows[0]["reward"]["format"] = 1.0
    found = problem_numbers(rows[:1] + rows[3:], accuracy="accuracy", k=(1, 2))
    assert found["format"] == 1.0  # over those to which it applies
    for each in rows:
        each["reward"].pop("format", None)
    found = problem_numbers(rows, accuracy="accuracy", k=(1, 2, 4))
    assert found["avg@4"] == 0.25 and found["pass@1"] == pytest.approx(0.25)  # half a point is not right
    assert found["pass@2"] == pytest.approx(0.5) and found["pass@4"] == 1
    assert found["majority@1"] == pytest.approx(0.25) and found["majority@4"] == 0
    # pairs: 56 56 5- 66 6- 6-: half, half, one, none, none, none
    assert found["majority@2"] == pytest.approx((0.5 + 0.5 + 1) / 6)
    assert (found["answered"], found["length"], found["truncated"], found["failed"]) == (0.75, 8.5, 0.25, 0.25)
    assert found["reward"] == pytest.approx(1.5 / 4)


def test_an_answer_that_the_rule_judged_both_ways_is_right_in_part():
    """Its spellings vote alike, and the rule took only some of them."""
    rows = [row(1.0, "5"), row(0.0, "5"), row(0.0, "7")]
    assert problem_numbers(rows, accuracy="accuracy", k=(3,))["majority@3"] == pytest.approx(0.5)


def test_greedy_rows_have_pass_at_1_alone():
    found = problem_numbers([row(1.0, "5")], accuracy="accuracy", k=())
    assert [name for name in found if "@" in name] == ["pass@1"] and found["pass@1"] == 1


def test_problems_that_no_rule_can_score_are_no_part_of_accuracy():
    groups = [[row(1.0, "5"), row(0.0, "6")], [row(None, "5"), row(None, "5")]]
    results = summarise(groups, [problem("a"), problem("b")], accuracy="accuracy", k=(1, 2), resamples=20)
    found = results["all"]["all"]
    assert found["avg@2"]["value"] == 0.5 and found["avg@2"]["problems"] == 1
    assert found["pass@2"]["value"] == 1 and found["majority@2"]["problems"] == 1
    assert found["length"]["problems"] == 2
    none = summarise(groups[1:], [problem("b")], accuracy="accuracy", k=(1,), resamples=20)["all"]["all"]
    assert none["avg@2"] == {"problems": 0}
    json.dumps(none, allow_nan=False)


def test_categories():
    problems = [problem("a", level=2, subject="algebra"), problem("b", level=10), problem("c", level=2, subject="sets")]
    groups = [[row(1.0)], [row(0.0)], [row(0.0)]]
    results = summarise(groups, problems, accuracy="accuracy", k=(), resamples=20)
    assert list(results) == ["all", "subject", "level"]
    assert list(results["level"]) == ["2", "10"]  # by size
    assert results["level"]["2"]["pass@1"]["value"] == 0.5 and results["level"]["10"]["pass@1"]["problems"] == 1
    assert set(results["subject"]) == {"algebra", "sets", "none"}
    mixed = [problem("a", task="one"), problem("b", task="two"), problem("c", task="one")]
    results = summarise(groups, mixed, accuracy="accuracy", k=(), resamples=20)
    assert results["task"]["one"]["pass@1"]["value"] == 0.5 and list(results) == ["all", "task"]
    with pytest.raises(ValueError, match="--category is 'leve', which no problem has: did you mean 'level'"):
        summarise(groups, problems, accuracy="accuracy", k=(), categories=("leve",))


def test_a_part_that_applies_to_no_problem_is_left_out_and_not_0():
    rows = [{"reward": {"total": 0.5, "accuracy": None, "format": 0.5}, "length": 3, "stop": "length"}] * 2
    metrics = evaluate.summarise("t", rows, accuracy="accuracy")
    assert metrics == {"eval/t/length": 3, "eval/t/truncated": 1, "eval/t/format": 0.5}
    assert "n/a (its rule applies to no held-out problem)" in headline(metrics)
    known = [{**rows[0], "reward": {"total": 1.5, "accuracy": 1.0, "format": None}}, *rows]
    known.append({**rows[0], "reward": {"total": 0.5, "accuracy": 0.5, "format": None}})  # half a point is not right
    metrics = evaluate.summarise("t", known, accuracy="accuracy")
    assert metrics["eval/t/pass@1"] == 0.5 and metrics["eval/t/format"] == 0.5 and "50.0%" in headline(metrics)
