"""reasoning-gym's data sets as tasks, their own scorers as a rule, and answers that those scorers would have run as programs."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("reasoning_gym", reason="needs the extra envs: install jaxreason[envs]")

from jaxreason import tasks
from jaxreason.rewards.gym import gym_score, gym_solved, known
from jaxreason.tasks.gym import UNORDERED
from jaxreason.types import Completion, Problem, StopReason

ROOT = Path(__file__).parents[2]
FEW = ("chain_sum", "spiral_matrix", "countdown", "knights_knaves", "rubiks_cube", "pool_matrix", "simple_integration")
SETTINGS = {
    "composite": {"datasets": [{"name": "chain_sum"}, {"name": "n_queens", "weight": 2.0, "config": {"n": 6, "max_remove": 6}}]}
}
TEXTS = ("0", "[1, 2", "((((", "{}", "[[]]", "None", "\x00", "-1", "1,2", "a" * 3000, "exit()", "1/0", "9" * 5000, "\ud800")


def said(text: str) -> Completion:
    return Completion(f"<think>hm</think><answer>{text}</answer>", [], StopReason.EOS)


def made(name: str, **settings: Any) -> tasks.Task:
    return tasks.reasoning_gym(name=name, heldout_size=4, settings=settings or SETTINGS.get(name))


# reasoning-gym leaves some of its data files to the garbage collector to close
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning", "ignore::ResourceWarning")
@pytest.mark.parametrize("names", [FEW, pytest.param(None, marks=pytest.mark.slow)])
def test_its_own_answers_are_right_and_no_text_raises(names: tuple[str, ...] | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONHASHSEED", "0")  # only that it is said: one process
    unanswered = set()
    for name in names or sorted(known()):
        task = made(name)
        assert task.rule == "gym.gym_solved" and task.name == f"gym_{name}"
        for problem in [*task.heldout, *(task.train(number) for number in range(3))]:
            assert pickle.loads(pickle.dumps(problem)) == problem
            if problem.answer:
                assert gym_score(problem, said(problem.answer)).total == 1, (name, problem.answer)
                assert gym_solved(problem, said(problem.answer)).parts == {"accuracy": 1.0}
            else:
                unanswered.add(name)  # several answers are right, and reasoning-gym shows none
            for text in TEXTS:
                assert 0 <= gym_score(problem, said(text)).total <= 1
    assert unanswered <= {"boxnet", "graph_color", "propositional_logic", "rubiks_cube", "rush_hour"}


def test_heldout_questions_differ_and_are_never_trained_on() -> None:
    """Of few different questions, so that they would meet."""
    task = made("chain_sum", min_terms=2, max_terms=2, min_digits=1, max_digits=1)
    heldout = {problem.question for problem in task.heldout}
    assert len(heldout) == 4
    trained = {task.train(number).question for number in range(10_000)}
    assert not trained & heldout and len(trained) > 100
    assert task.train(600) == task.train(600) != task.train(100)
    with pytest.raises(ValueError, match=r"heldout_size is 400, and chain_sum made [0-9]+ different questions in 4000"):
        tasks.reasoning_gym(name="chain_sum", heldout_size=400, settings=dict(max_terms=2, min_digits=1, max_digits=1))


def test_numpys_global_generator_is_left_alone() -> None:
    np.random.seed(3)
    expected = np.random.random(3)
    np.random.seed(3)
    made("pool_matrix").train(5)
    assert (np.random.random(3) == expected).all()


def test_the_same_in_every_process() -> None:
    names = [*FEW[:4], *sorted(UNORDERED)[:1]]
    program = f"""if True:
        import hashlib, sys
        from jaxreason import tasks
        for name in {names}:
            t = tasks.reasoning_gym(name=name, heldout_size=2)
            print(name, hashlib.sha256(repr([t.heldout, t.train(0), t.train(777)]).encode()).hexdigest())
        assert "jax" not in sys.modules
    """
    told = []
    for seed in ("1", "2"):
        env = os.environ | {"PYTHONHASHSEED": seed, "PYTHONPATH": str(ROOT)}
        done = subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, text=True, check=True)
        told.append(done.stdout.splitlines())
    assert told[0][:-1] == told[1][:-1]
    assert told[0][-1] != told[1][-1]  # why it is asked for


def test_data_sets_that_walk_through_sets_ask_for_fixed_hashes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PYTHONHASHSEED", raising=False)
    with pytest.raises(ValueError, match="ransom_note makes other problems in every process.*set PYTHONHASHSEED=0"):
        made("ransom_note")
    with pytest.raises(ValueError, match="word_ladder makes other problems in every process"):
        made("composite", datasets=[{"name": "word_ladder"}])


class Witness:
    """Whether a program that an answer holds was run."""

    def __init__(self, folder: Path) -> None:
        self.file = folder / "run"
        self.program = f"open({str(self.file)!r}, 'w')"


PROGRAMS = ("{}", "[{}]", "({}).name", "[x for x in [{}]]", "__import__('os').system('touch {file}')", "(lambda: {})()", "1 + {}")


@pytest.mark.parametrize("name", ["string_insertion", "spiral_matrix", "binary_matrix", "n_queens", "countdown", "puzzle24"])
def test_an_answer_is_never_run(name: str, tmp_path: Path) -> None:
    _never_run(made(name).train(0), tmp_path)


@pytest.mark.parametrize("name", ["polynomial_multiplication", "simple_integration", "intermediate_integration"])
def test_a_formula_is_never_run(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONHASHSEED", "0")
    problem = made(name).train(1)
    _never_run(problem, tmp_path)
    for text in ("x.diff()", "().__class__", "9**9**9", "9**(9**9)", "((9**99)**99)**99**9", "x" * 2500, "x**999999999", "S('x')"):
        assert gym_score(problem, said(text)).total == 0
    for text in ("1e999999", "x**" + " " * 1900 + "2", "x" + " **" * 600, "2e5"):
        assert gym_score(problem, said(text)).total == 0
    assert gym_score(problem, said(f" ( {problem.answer} ) ")).total == 1
    unknown = problem.metadata["entry"]["metadata"].get("variable", "x")
    assert gym_score(problem, said(f"{problem.answer} + {unknown}")).total == 0


def _never_run(problem: Problem, folder: Path) -> None:
    witness = Witness(folder)
    for form in PROGRAMS:
        program = form.replace("{file}", str(witness.file)).replace("{}", witness.program)
        assert gym_score(problem, said(program)).total == 0
        assert not witness.file.exists(), program
    eval(witness.program).close()  # what the scorers would have done
    assert witness.file.exists()


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("game_of_life_halting", ["yes", "", "0", "maybe", "True or False", "not {}"]),
        ("coin_flip", ["0", "1", "1e308", "0.", "{} or 0"]),
        ("complex_arithmetic", ["nan", "nanj", "nan+nani", "inf", "-inf"]),
        ("gsm_symbolic", ["{} or 0", "{}, 1, 2, 3", "not {}"]),
        ("fraction_simplification", ["{} or 0", "{} {}"]),
    ],
)
def test_scorers_that_pay_for_too_much_are_corrected(name: str, wrong: list[str]) -> None:
    for number in range(4):
        problem = made(name).train(number)
        assert gym_solved(problem, said(problem.answer)).total == gym_score(problem, said(problem.answer)).total == 1
        for text in wrong:
            text = text.replace("{}", problem.answer)
            if text != problem.answer:
                assert gym_score(problem, said(text)).total < 1, (problem.answer, text)


def test_nearly_24_is_not_24() -> None:
    problem = made("puzzle24").train(0)
    entry = dict(problem.metadata["entry"], metadata=problem.metadata["entry"]["metadata"] | {"numbers": [2, 7, 7, 2]})
    problem = Problem("1", "", problem.answer, metadata=dict(problem.metadata, entry=entry))
    assert gym_score(problem, said("7 * 7 / 2 + 2 - 2")).total == 0  # five numbers
    assert gym_score(problem, said("7 * 7 / 2 * 2")).total == 0
    assert gym_score(problem, said("(7 * 7 - 2) / 2")).total == 0  # 23.5
    entry["metadata"]["numbers"] = [7, 7, 2, 1]
    assert gym_score(problem, said("7 * 7 / 2 * 1")).total == 0  # 24.5, which is cut off to 24


def test_numbers_that_were_not_given_make_no_24() -> None:
    problem = made("puzzle24").train(0)
    numbers = problem.metadata["entry"]["metadata"]["numbers"]
    assert sorted(numbers) != [1, 1, 4, 6]
    assert gym_score(problem, said("6*4*1*1")).total == 0  # reasoning-gym itself gives 1
    assert gym_score(problem, said(problem.answer)).total == 1


def test_a_list_of_the_right_form_still_gets_its_part() -> None:
    problem = made("spiral_matrix").train(0)
    listed = str([int(number) for number in problem.answer.split()])
    assert gym_score(problem, said(listed)).total == 0.1
    assert gym_solved(problem, said(listed)).total == 0


def test_a_problem_of_another_task_has_no_score() -> None:
    plain = Problem("1", "?", "2")
    assert gym_score(plain, said("2")).parts == {"accuracy": None}


MISTAKES: list[tuple[dict[str, Any], str]] = [
    ({"name": "chain_sums"}, "did you mean 'chain_sum'. All of them: ab, acre, .*zebra_puzzles"),
    ({"name": "chain_sum", "settings": {"terms": 3}}, "settings has 'terms', which chain_sum does not take"),
    ({"name": "chain_sum", "settings": {"min_terms": 9, "max_terms": 2}}, "settings are .*which chain_sum refuses: .*correct them"),
    ({"name": "chain_sum", "settings": {"min_terms": "x"}}, "settings are .*which chain_sum refuses"),
    ({"name": "chain_sum", "settings": {"seed": 2}}, "settings has 'seed'"),
    ({"name": "chain_sum", "settings": {"min_terms": object()}}, "settings is .*expected names with numbers"),
    ({"name": "chain_sum", "heldout_size": 0}, "heldout_size is 0"),
    ({"name": "composite"}, "composite refuses"),
    ({"name": "composite", "settings": {"datasets": [{"name": "sums"}]}}, "'sums' is no data set of reasoning-gym"),
]


@pytest.mark.parametrize(("arguments", "told"), MISTAKES)
def test_a_mistake_is_one_sentence(arguments: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told) as error:
        tasks.reasoning_gym(**arguments)
    assert "\n" not in str(error.value)


def test_without_the_extra_its_name_is_said() -> None:
    program = """if True:
        import sys
        sys.modules["reasoning_gym"] = None
        from jaxreason import tasks
        try:
            tasks.reasoning_gym(name="chain_sum")
        except ValueError as error:
            print(error)
    """
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "reasoning-gym is not installed: install jaxreason[envs]"


def test_settings_cross_a_config_as_json() -> None:
    problem = made("chain_sum", min_terms=2).train(0)
    assert json.loads(json.dumps(problem.metadata["settings"])) == {"min_terms": 2}
