"""Mixtures by hand, and the arrays' version of them: weights, gates, None, and both orders of summing and normalising."""

from __future__ import annotations

import pickle
import subprocess
import sys
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxreason.objectives.advantages import group_zscore, zero_variance
from jaxreason.rewards.format import think_answer_format
from jaxreason.rewards.language import language_consistency
from jaxreason.rewards.math import gsm8k_answer
from jaxreason.rewards.mixture import ByTask, Mixture, total, totals, value
from jaxreason.rewards.pool import Pool
from jaxreason.training.collect import RulePart, Scoring, make_scoring, score_on_host, total_reward
from jaxreason.types import Completion, Problem, Reward, StopReason

PROBLEM = Problem("0", "1 + 1?", "2", task="sums")
RIGHT, WRONG = "<think></think><answer>2</answer>", "<think></think><answer>3</answer>"
KEY = jax.random.key(0)


def done(text: str, tokens: int = 0) -> Completion:
    return Completion(text, (0,) * tokens, StopReason.EOS)


def test_a_reward_is_one_part():
    assert value(Reward(0.5)) == 0.5 and value(Reward(0.5, {"a": None, "b": 0.5})) == 0.5
    assert value(Reward(0.0, {"a": None})) is None


def test_sums_by_hand():
    weights = {"accuracy": 1.0, "format": 0.5, "language": 0.2}
    assert total({"accuracy": 1.0, "format": 1.0, "language": 0.5}, weights) == pytest.approx(1.6)
    assert total({"accuracy": 1.0, "format": 1.0, "language": None}, weights) == 1.5  # the other weights stay as they are
    assert total({"accuracy": None, "format": None, "language": None}, weights) == 0
    gate = {"accuracy": "format"}
    assert total({"accuracy": 1.0, "format": 0.0, "language": 0.5}, weights, gates=gate) == pytest.approx(0.1)
    assert total({"accuracy": 1.0, "format": None, "language": 0.5}, weights, gates=gate) == pytest.approx(0.1)
    assert total({"accuracy": 1.0, "format": 0.1, "language": 0.5}, weights, gates=gate) == pytest.approx(1.15)
    both = {"accuracy": "format", "format": "accuracy"}  # each sees the other as its rule gave it
    assert total({"accuracy": 1.0, "format": 1.0}, weights, gates=both) == 1.5
    assert total({"accuracy": 1.0, "format": 0.0}, weights, gates=both) == 0


def test_normalising_before_the_sum_by_hand():
    group = [{"a": 1.0, "b": 10.0}, {"a": 0.0, "b": None}, {"a": 1.0, "b": 30.0}, {"a": 0.0, "b": None}]
    found = totals(group, {"a": 1.0, "b": 2.0}, normalised=frozenset("ab"), epsilon=0.0)
    assert found == [1 - 2, -1, 1 + 2, -1]  # b is compared among the two that have it
    assert totals(group, {"a": 1.0, "b": 2.0}, normalised=frozenset("a"), epsilon=0.0) == [1 + 20, -1, 1 + 60, -1]
    assert totals(group, {"a": 1.0, "b": 2.0}) == [21, 0, 61, 0]
    equal = [{"a": 0.1, "b": None}] * 3
    assert totals(equal, {"a": 1.0, "b": 2.0}, normalised=frozenset("ab"), epsilon=0.0) == [0, 0, 0]


def arrays(group: list[dict[str, float | None]]) -> dict[str, jax.Array]:
    return {name: jnp.asarray([[np.nan if row[name] is None else row[name] for row in group]], jnp.float32) for name in group[0]}


PART = st.sampled_from([None, 0.0, 1.0, -1.0, 0.25])
ROW = st.fixed_dictionaries({"a": PART, "b": PART, "c": PART})
ROWS = st.lists(ROW, min_size=2, max_size=2) | st.lists(ROW, min_size=4, max_size=4)  # few shapes: each is compiled
GATES = st.dictionaries(st.sampled_from("abc"), st.sampled_from("abc"), max_size=3).map(
    lambda gates: {name: gate for name, gate in gates.items() if gate != name}
)


@settings(max_examples=40, deadline=None)
@given(ROWS, GATES, st.frozensets(st.sampled_from("abc")))
def test_arrays_say_the_same(group: list[dict[str, float | None]], gates: dict[str, str], normalised: frozenset[str]):
    weights = {"a": 1.0, "b": -0.5, "c": 2.0}
    scoring = Scoring({}, {}, weights, frozenset(), gates=gates, normalised=normalised)
    found = total_reward(scoring, arrays(group), KEY)
    np.testing.assert_allclose(np.asarray(found)[0], totals(group, weights, gates=gates, normalised=normalised), atol=1e-5)


def test_a_normalised_part_that_always_applies_is_the_groups_zscore():
    values = jnp.asarray(np.random.default_rng(0).normal(size=(3, 8)), jnp.float32)
    found = total_reward(Scoring({}, {}, {"a": 2.0}, frozenset(), normalised=frozenset("a")), {"a": values}, KEY)
    np.testing.assert_allclose(found, 2 * group_zscore(values), rtol=1e-5, atol=1e-6)


def test_sum_then_normalise_and_normalise_then_sum_differ_where_spreads_do():
    """A part of wide spread hides the other in the sum, and not in the z-scores."""
    group = [{"a": 1.0, "b": 100.0}, {"a": 0.0, "b": 101.0}, {"a": 1.0, "b": 0.0}, {"a": 0.0, "b": 0.0}]
    weights = {"a": 1.0, "b": 1.0}
    summed = totals(group, weights)
    apart = totals(group, weights, normalised=frozenset("ab"))
    assert summed[1] == summed[0] and apart[0] > apart[1] + 1


def test_what_a_format_reward_teaches_a_group_without_a_right_answer():
    """All wrong, half of them well formed: format alone makes a signal, behind the gate of accuracy it makes none."""
    group = [{"accuracy": 0.0, "format": 1.0}, {"accuracy": 0.0, "format": 0.0}]
    for gates, silent in (({}, False), ({"format": "accuracy"}, True), ({"accuracy": "format"}, False)):
        scoring = Scoring({}, {}, {"accuracy": 1.0, "format": 0.5}, frozenset(), gates=gates)
        assert bool(zero_variance(total_reward(scoring, arrays(group), KEY))[0]) == silent
    mixed = [{"accuracy": 1.0, "format": 1.0}, {"accuracy": 1.0, "format": 0.0}, {"accuracy": 0.0, "format": 1.0}]
    assert totals(mixed, {"accuracy": 1.0, "format": 0.5}, gates={"format": "accuracy"}) == [1.5, 1, 0]


def test_gates_see_what_a_control_was_dealt():
    """A gate that saw the true values would tell the policy what the control hides from it."""
    rng = np.random.default_rng(0)
    accuracy = jnp.asarray(rng.integers(0, 2, (8, 8)), jnp.float32)
    scoring = Scoring({}, {}, {"accuracy": 0.0, "format": 1.0}, frozenset({"accuracy"}), gates={"format": "accuracy"})
    found = np.asarray(total_reward(scoring, {"accuracy": accuracy, "format": jnp.ones((8, 8))}, KEY))
    assert found.sum() == accuracy.sum() and np.any(found != np.asarray(accuracy))


def test_a_mixture_is_a_rule():
    rules = {"accuracy": gsm8k_answer, "format": think_answer_format}
    rule = pickle.loads(pickle.dumps(Mixture(rules, {"accuracy": 1.0, "format": 0.5}, {"accuracy": "format"})))
    assert rule(PROBLEM, done(RIGHT)) == Reward(1.5, {"accuracy": 1.0, "format": 1.0})
    assert rule(PROBLEM, done("the answer is 2")) == Reward(0.0, {"accuracy": 1.0, "format": 0.0})
    assert rule(Problem("0", "?", "no number"), done(RIGHT)) == Reward(0.5, {"accuracy": None, "format": 1.0})
    with pytest.raises(ValueError, match="must name the same rules"):
        Mixture(rules, {"accuracy": 1.0})
    for gates in ({"accuracy": "accuracy"}, {"accuracy": "fromat"}, {"other": "format"}):
        with pytest.raises(ValueError, match="expected another of the parts accuracy, format"):
            Mixture(rules, {"accuracy": 1.0, "format": 0.5}, gates)


def test_a_rule_for_each_task():
    rule = pickle.loads(pickle.dumps(ByTask({"sums": gsm8k_answer, "forms": think_answer_format})))
    assert rule(PROBLEM, done(WRONG)) == Reward(0.0, {"accuracy": 0.0})
    assert rule(Problem("0", "", "2", task="forms"), done(WRONG)) == Reward(1.0, {"format": 1.0})
    assert value(rule(Problem("0", "", "2", task="chat"), done(WRONG))) is None


# ------------------------------------------------------------------------------------------------------------------ in a run


def test_workers_run_a_mixture_and_load_what_its_rules_need():
    rule = ByTask({"sums": gsm8k_answer, "words": partial(language_consistency, language="zh")})
    samples = [(PROBLEM, done(RIGHT)), (Problem("0", "", "", task="words"), done("我们 add")), (Problem("0", "", ""), done(""))]
    with Pool({"part": rule}, workers=1, limit_seconds=10.0) as pool:
        outcomes = [parts["part"] for parts in pool.score(samples)]
    assert [outcome.failure for outcome in outcomes] == ["", "", ""]
    assert [value(outcome.reward) for outcome in outcomes if outcome.reward] == [1, 2 / 3, None]


make = partial(make_scoring, vocabulary=[b"a", None], eos_ids=[1])


def test_a_run_scores_each_task_by_its_rule_and_each_group_as_a_whole():
    parts = {
        "accuracy": RulePart("task", kwargs={"forms": "format.think_answer_format"}),
        "format": RulePart("format.think_answer_format", weight=0.5, gate="accuracy"),
        "length": RulePart("length.kimi_length", normalise=True),
    }
    scoring = make(parts, task_rules={"sums": "math.gsm8k_answer"})
    assert scoring.gates == {"format": "accuracy"} and scoring.normalised == {"length"} and set(scoring.group) == {"length"}
    problems = [PROBLEM, Problem("1", "", "", task="forms"), Problem("2", "", "", task="chat")]
    groups = [[done(RIGHT, 10), done(WRONG, 10), done(RIGHT, 30)]] * 3
    host = score_on_host(scoring, problems, groups)
    np.testing.assert_array_equal(host.parts["accuracy"], [[1, 0, 1], [1, 1, 1], [np.nan] * 3])
    np.testing.assert_array_equal(host.parts["length"], [[0.5, 0, -0.5], [0.5, 0.5, -0.5], [0, 0, -0.5]])
    assert host.none_shares() == {"accuracy": 1 / 3}
    some = score_on_host(scoring, problems, groups, [False, True, False])
    np.testing.assert_array_equal(some.parts["length"], [[0, 0, 0], [0.5, 0.5, -0.5], [0, 0, 0]])
    assert some.none_shares() == {}


def test_a_group_rule_is_told_the_gated_total():
    told: list[Reward] = []

    def rule(problem: Problem, completions: Any, rewards: Any) -> list[Reward]:
        told.extend(rewards)
        return [Reward(0.0)] * len(completions)

    scoring = Scoring({}, {}, {"a": 1.0, "b": 2.0, "g": 1.0}, frozenset(), group={"g": rule}, gates={"a": "b", "b": "g"})
    traced = {"a": np.asarray([[1.0, 1.0]]), "b": np.asarray([[np.nan, 3.0]])}
    score_on_host(scoring, [PROBLEM], [[done(""), done("")]], traced=traced)
    assert told == [Reward(0.0, {"a": 1.0, "b": None}), Reward(7.0, {"a": 1.0, "b": 3.0})]  # no gate by what comes later
    with pytest.raises(ValueError, match="config.reward.g fails on every group: ValueError: it gave 1 rewards for the 2"):
        few = scoring._replace(group={"g": lambda *given: [Reward(0.0)]})
        score_on_host(few, [PROBLEM], [[done(""), done("")]], traced=traced)


def test_a_number_that_is_none_is_not_taken_for_a_part_that_does_not_apply():
    def broken(problem: Problem, completion: Completion) -> Reward:
        return Reward(float("nan"), {"accuracy": float("nan")})

    found = score_on_host(Scoring({}, {"a": broken}, {"a": 1.0}, frozenset()), [PROBLEM], [[done("")]])
    assert np.isinf(found.parts["a"]).all()


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"a": RulePart("math.gsm8k_answer", gate="b")}, "config.reward.a.gate is 'b', which is no other part"),
        ({"a": RulePart("math.gsm8k_answer", gate="a")}, "config.reward.a.gate is 'a', which is no other part"),
        ({"a": RulePart("task")}, "config.reward.a.rule is 'task', and the task names no rule"),
        (
            {"a": RulePart("task", kwargs={"sums": "math.gsm8k"})},
            "config.reward.a.kwargs.sums is 'math.gsm8k', which does not exist",
        ),
        ({"a": RulePart("task", kwargs={"sums": "length.kimi_length"})}, "is no rule on the text of one completion"),
        (
            {"a": RulePart("reflection.reflection_words")},
            "config.reward.a.weight is 1.0, and 'reflection.reflection_words' is a metric",
        ),
        ({"a": RulePart("length.kimi_length", kwargs={"wrong": 1})}, "config.reward.a.kwargs has no key 'wrong'"),
    ],
)
def test_what_a_config_says_wrong_is_told(parts: dict[str, RulePart], message: str):
    with pytest.raises(ValueError) as error:
        make(parts)
    assert message in str(error.value)
    make({"a": RulePart("reflection.reflection_words", weight=0.0)})


def test_a_task_that_names_no_rule_says_so():
    with pytest.raises(ValueError, match="task 'chat' names no rule that scores its answers"):
        make({"a": RulePart("task")}, task_rules={"chat": ""})


def test_rules_on_text_do_not_import_jax_or_their_extras():
    names = ("format", "language", "length", "math", "mixture", "model", "reflection", "repetition")
    ours = ", ".join(f"jaxreason.rewards.{name}" for name in names)
    code = f"import sys, {ours}; found = {{'jax', 'numpy', 'py3langid'}} & sys.modules.keys(); assert not found, found"
    subprocess.run([sys.executable, "-c", code], check=True)
