"""Every task names a rule that there is, which finds the task's own worked answers right; or none, where nothing has an answer."""

from __future__ import annotations

import pytest

from jaxreason import naming, tasks
from jaxreason.rewards.finding import host_rules
from jaxreason.tasks import choice, code, mathematics, preferences, process_labels, short_answers
from jaxreason.tasks.table import KINDS
from jaxreason.types import Completion, StopReason

MODULES = (mathematics, choice, short_answers, code, preferences, process_labels)
DATA_SETS = {each.name: each for module in MODULES for each in module.DATA_SETS}
WITHOUT = {"hh_rlhf", "judged_chains", "math_aps", "math_shepherd", "prm800k"}  # preferences, and steps of chains
WRITTEN = sorted(naming.returning(tasks, "Task").keys() - DATA_SETS.keys() - {"table", "mixture", "reasoning_gym"})


def test_the_rules_of_data_sets_and_tables_exist():
    rules = host_rules()
    assert {name for name, each in DATA_SETS.items() if not each.rule} <= WITHOUT
    named = [each.rule for each in DATA_SETS.values() if each.rule] + [rule for rule, _ in KINDS.values()]
    assert set(named) <= rules.keys() and len(named) > 15


@pytest.mark.parametrize("name", WRITTEN)
def test_a_tasks_rule_scores_its_worked_answers(name):
    task = getattr(tasks, name)(heldout_size=2)
    rule = host_rules()[task.rule]
    assert {problem.task for problem in (*task.heldout, task.train(0))} == {task.name}  # by which its rule is found
    for number in range(20):
        worked = task.demonstrations["worked"](number)
        assert rule(worked.problem, Completion(worked.completion, (), StopReason.EOS)).total == 1
        wrong = Completion("<answer>1000003</answer>", (), StopReason.EOS)
        assert rule(worked.problem, wrong).total == 0
