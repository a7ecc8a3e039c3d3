"""Procedural tasks: every answer by brute force from the question's text alone, held-out contents never trained on."""

from __future__ import annotations

import hashlib
import itertools
import os
import re
import runpy
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jaxreason import tasks
from jaxreason.models.tokenizer import load_tokenizer, save_word_tokenizer
from jaxreason.rewards.format import think_answer_format
from jaxreason.rewards.math import gsm8k_answer
from jaxreason.tasks.countdown import solve
from jaxreason.training.collect import rules
from jaxreason.types import Completion, Problem, StopReason

ROOT = Path(__file__).parents[2]


def exactly(text: str, **unknowns: int) -> Fraction:
    """An arithmetic expression's value in Python's own arithmetic, 3x being 3*x."""
    text = re.sub(r"(?<=\d)(?=[xy])", "*", text)
    return eval(re.sub(r"\d+", r"Fraction(\g<0>)", text), {"Fraction": Fraction, **unknowns})


# ------------------------------------------------------------------------------------------- answers by brute force


def chain(problem: Problem) -> str:
    return str(exactly(match(r"What is (.+)\?", problem)[0]))


def modular(problem: Problem) -> str:
    expression, modulus = match(r"What is \((.+)\) mod (\d+)\?", problem)
    return str(eval(expression.replace("^", "**")) % int(modulus))


def based(problem: Problem) -> str:
    if problem.question.startswith("Write"):
        digits, base, other = match(r"Write (\d+) from base (\d+) in base (\d+)\.", problem)
        return np.base_repr(int(digits, int(base)), int(other))
    a, sign, b, base, again = match(r"What is (\d+)([-+*])(\d+) in base (\d+)\? All numbers are in base (\d+)\.", problem)
    assert base == again
    return np.base_repr(eval(f"{int(a, int(base))}{sign}{int(b, int(base))}"), int(base))


def one_unknown(problem: Problem) -> str:
    left, right = match(r"Solve (.+)=(.+)\. What is x\?", problem)
    x = np.arange(-60, 61)
    first, second = (eval(re.sub(r"(?<=\d)(?=x)", "*", side), {"x": x}) for side in (left, right))
    (zero,) = x[(first - second) == 0]
    return str(zero)


def two_unknowns(problem: Problem) -> str:
    first, second, asked = match(r"Solve (.+) and (.+)\. What is ([xy])\?", problem)
    rows = [[*(coefficient(side, name) for name in "xy"), int(value)] for side, value in (e.split("=") for e in (first, second))]
    x, y = np.meshgrid(np.arange(-20, 21), np.arange(-20, 21), indexing="ij")
    here = np.logical_and.reduce([a * x + b * y == c for a, b, c in rows])
    (where,) = np.argwhere(here)
    return str(where["xy".index(asked)] - 20)


def coefficient(text: str, unknown: str) -> int:
    found = re.search(rf"([-+]?)(\d*){unknown}", text)
    return 0 if found is None else int(f"{found[1]}{found[2] or 1}")


def reach(numbers: tuple[int, ...], *, whole: bool) -> set[Fraction]:
    """Everything that can be made of some of the numbers; or, not `whole`, of all of them with fractions on the way."""
    made: dict[int, set[Any]] = {1 << i: {number if whole else Fraction(number)} for i, number in enumerate(numbers)}
    for mask in range(1, 1 << len(numbers)):
        values = made.setdefault(mask, set())
        part = (mask - 1) & mask
        while part:
            for a, b in itertools.product(made[part], made[mask ^ part]):
                values |= {a + b, a * b}
                if not whole or a >= b:
                    values.add(a - b)
                if b and (not whole or a % b == 0):
                    values.add(a // b if whole else a / b)
            part = (part - 1) & mask
    return set().union(*made.values()) if whole else made[(1 << len(numbers)) - 1]


def target(problem: Problem) -> str:
    numbers, last, aim = match(r"Use (.+) and (\d+) at most once each to make (\d+)\.", problem)
    hand = tuple(map(int, [*numbers.split(", "), last]))
    assert problem.metadata == {"numbers": hand, "target": int(aim)} and int(aim) not in hand
    assert int(aim) in reach(hand, whole=True)
    return aim


def twenty_four(problem: Problem) -> str:
    numbers, last = match(r"Use (.+) and (\d+) exactly once each to make 24\.", problem)
    hand = tuple(map(int, [*numbers.split(", "), last]))
    assert problem.metadata == {"numbers": hand, "target": 24, "use_all": True} and len(hand) == 4
    assert solve(tuple(sorted(hand)), 24) is not None  # which is compared with brute force below
    return "24"


def people(problem: Problem) -> str:
    """The text as a Python expression of names, tried with every assignment."""
    listed, last, said = match(r"(.+) and (\w+) each always tell the truth or always lie\. (.+) Write T for .+", problem)
    names = [*listed.split(", "), last]
    rules = []
    for speaker, claim in re.findall(r"(\w+) says: ([^.]+)\.", said):
        claim = re.sub(r"(\w+) and (\w+) are alike", r"(\1 == \2)", claim)
        claim = re.sub(r"(\w+) and (\w+) are different", r"(\1 != \2)", claim)
        claim = re.sub(r"(\w+) lies", r"(not \1)", claim.replace(" tells the truth", ""))
        rules.append(f"({speaker} == ({claim}))")
    assert len(rules) == len(names)
    assignments = [dict(zip(names, each, strict=True)) for each in itertools.product((True, False), repeat=len(names))]
    (solution,) = [each for each in assignments if eval(" and ".join(rules), {}, each)]
    return "-".join("T" if solution[name] else "L" for name in names)


def roads(problem: Problem) -> str:
    listed, a, b = match(r"Roads lead one way: (.+)\. Can one get from (\w) to (\w)\?", problem)
    steps = np.eye(26, dtype=bool)
    for begin, end in re.findall(r"from (\w) to (\w)", listed):
        steps[ord(begin) - 65, ord(end) - 65] = True
    everywhere = np.linalg.matrix_power(steps.astype(np.int64), 12) > 0
    return "yes" if everywhere[ord(a) - 65, ord(b) - 65] else "no"


def manipulated(problem: Problem) -> str:
    text = problem.question
    letters = "".join(re.findall(r"[a-z](?=-[a-z])|(?<=-)[a-z]", text))
    if text.startswith("Reverse"):
        return "-".join(reversed(letters))
    if text.startswith("Sort"):
        return "-".join(sorted(letters))
    if text.startswith("How many"):
        return str(Counter(letters)[match(r"How many times is (\w) in .+\?", problem)[0]])
    if text.startswith("Shift"):
        places = int(match(r".+ by (\d+) places in the alphabet\.", problem)[0])
        alphabet = bytes(range(97, 123))
        return "-".join(letters.translate(str.maketrans(alphabet.decode(), (alphabet[places:] + alphabet[:places]).decode())))
    return "yes" if [*letters] == [*reversed(letters)] else "no"


def match(pattern: str, problem: Problem) -> tuple[str, ...]:
    found = re.fullmatch(pattern, problem.question)
    assert found, problem.question
    return found.groups()


# ------------------------------------------------------------------------------- what two problems must not have in common


def same(problem: Problem) -> str:
    return problem.question


def same_numbers(problem: Problem) -> str:
    return repr((sorted(problem.metadata["numbers"]), problem.metadata["target"]))


def same_claims(problem: Problem) -> str:
    return repr(problem.metadata["claims"])


def same_roads(problem: Problem) -> str:
    return repr((sorted(re.findall(r"from (\w) to (\w)[,.]", problem.question)), problem.question[-12:]))


def same_equations(problem: Problem) -> str:
    sides = match(r"Solve (.+)\. What is ([xy])\?", problem)
    return repr((sorted(re.split(r"=| and " if " and " not in sides[0] else " and ", sides[0])), sides[1]))


FAMILIES: dict[str, tuple[Callable[..., tasks.Task], dict[str, Any], Callable[..., str], Callable[..., str]]] = {
    "chains": (tasks.arithmetic_chains, {}, chain, same),
    "division": (tasks.arithmetic_chains, {"operators": "+-*/", "brackets": False, "max_terms": 6}, chain, same),
    "divided brackets": (tasks.arithmetic_chains, {"operators": "-*/", "max_terms": 5}, chain, same),
    "modular": (tasks.modular_arithmetic, {}, modular, same),
    "bases": (tasks.base_arithmetic, {}, based, same),
    "one unknown": (tasks.linear_equations, {}, one_unknown, same_equations),
    "small": (tasks.linear_equations, {"max_coefficient": 1, "max_solution": 60, "heldout_size": 20}, one_unknown, same_equations),
    "two unknowns": (tasks.linear_equations, {"unknowns": 2}, two_unknowns, same_equations),
    "countdown": (tasks.countdown, {}, target, same_numbers),
    "game24": (tasks.game24, {}, twenty_four, same_numbers),
    "people": (tasks.truth_tellers, {}, people, same_claims),
    "roads": (tasks.graph_reachability, {}, roads, same_roads),
    "strings": (tasks.string_manipulation, {}, manipulated, same),
    "short strings": (tasks.string_manipulation, {"letters": 20, "max_length": 4}, manipulated, same),
}


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest) -> tuple[tasks.Task, Callable[..., str], Callable[..., str]]:
    make, settings, answer, content = FAMILIES[request.param]
    return make(**settings), answer, content


@pytest.mark.parametrize("count", [200, pytest.param(1000, marks=pytest.mark.slow)])
def test_every_answer_is_what_brute_force_finds(family: Any, count: int) -> None:
    task, answer, _ = family
    for problem in [*(task.train(number) for number in range(count)), *task.heldout]:
        assert problem.answer == answer(problem), problem.question
        assert problem.task == task.name


@pytest.mark.parametrize("count", [1500, pytest.param(10_000, marks=pytest.mark.slow)])
def test_heldout_problems_differ_and_are_never_trained_on(family: Any, count: int) -> None:
    task, _, content = family
    heldout = {content(problem) for problem in task.heldout}
    assert len(heldout) == len(task.heldout)
    trained = {content(task.train(number)) for number in range(count)}
    trained |= {content(task.demonstrations["worked"](number).problem) for number in range(count // 10)}
    assert not trained & heldout
    assert len(trained) > 100


@pytest.mark.parametrize("name", [name for name in FAMILIES if name != "short strings"])
def test_a_template_is_put_around_the_question(name: str) -> None:
    make, settings, _, _ = FAMILIES[name]
    task = make(**(settings | {"prompt": "think_expression", "heldout_size": 1}))
    (message,) = task.messages(task.heldout[0])
    assert message["content"].startswith(task.heldout[0].question) and "an arithmetic expression alone" in message["content"]
    with pytest.raises(ValueError, match="prompt is 'boxd', which is no template: did you mean 'boxed'"):
        make(**(settings | {"prompt": "boxd"}))


def test_another_seed_trains_on_no_heldout_problem_of_this_one() -> None:
    ours, theirs = (tasks.game24(seed=seed) for seed in (0, 1))
    heldout = {same_numbers(problem) for problem in ours.heldout}
    assert not heldout & {same_numbers(theirs.train(number)) for number in range(2000)}
    assert [p.question for p in ours.heldout] != [p.question for p in theirs.heldout]


def test_demonstrations_are_well_formed_and_right(family: Any) -> None:
    """Their equations hold one by one, and the answer is the one that brute force finds."""
    task, answer, _ = family
    for number in range(100):
        shown = task.demonstrations["worked"](number)
        completion = Completion(shown.completion, [], StopReason.EOS)
        assert think_answer_format(shown.problem, completion).total == 1, shown.completion
        found = re.fullmatch(r"<think>(.*)</think><answer>(.*)</answer>", shown.completion)
        assert found
        thought, given = found.groups()
        if "numbers" in shown.problem.metadata:
            assert exactly(given) == shown.problem.metadata["target"]
            assert Counter(re.findall(r"\d+", given)) == Counter(map(str, shown.problem.metadata["numbers"]))
        else:
            assert given == shown.problem.answer == answer(shown.problem)
        if task.rule == "math.gsm8k_answer":
            assert gsm8k_answer(shown.problem, completion).total == 1
        if task.rule in ("math.gsm8k_answer", "arithmetic.countdown"):
            unknowns = {asked: int(given) for asked in re.findall(r"What is ([xy])\?", shown.problem.question)}
            for equation in thought.split(";"):
                left, right = equation.split("=")
                assert exactly(left, **unknowns) == exactly(right, **unknowns), (shown.problem.question, equation)


def test_the_thought_about_people_tries_every_case_until_one_fits() -> None:
    task = tasks.truth_tellers()
    for number in range(200):
        shown = task.demonstrations["worked"](number)
        cases = re.findall(r"([TL](?:-[TL])*):(\w+)", shown.completion)
        tried = ["-".join(each) for each in itertools.product("TL", repeat=len(cases[0][0].split("-")))]
        assert [letters for letters, _ in cases] == tried[: len(cases)]
        assert [verdict == "yes" for _, verdict in cases] == [False] * (len(cases) - 1) + [True]
        assert cases[-1][0] == shown.problem.answer


def test_the_vocabulary_is_closed(family: Any, tmp_path: Path) -> None:
    task, _, _ = family
    save_word_tokenizer(task.words, tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    assert len(set(task.words)) == len(task.words)
    for number in range(100):
        shown = task.demonstrations["worked"](number)
        for text in (shown.problem.question, shown.completion):
            assert not tokenizer.unknown(text), tokenizer.unknown(text)
            assert tokenizer.decode(tokenizer.hf(text, add_special_tokens=False)["input_ids"]) == text


def test_yes_and_no_are_as_frequent() -> None:
    task = tasks.graph_reachability()
    yes = np.mean([task.train(number).answer == "yes" for number in range(4000)])
    assert abs(yes - 0.5) < 4 * 0.5 / np.sqrt(4000)


def test_solve_finds_a_solution_exactly_where_there_is_one() -> None:
    rng = np.random.default_rng(0)
    hands = {tuple(sorted(map(int, rng.integers(1, 14, 4)))) for _ in range(60)} | {(3, 3, 8, 8), (1, 5, 5, 5), (1, 1, 1, 1)}
    unsolved = 0
    for hand in sorted(hands):
        found = solve(hand, 24)
        assert (found is not None) == (24 in reach(hand, whole=False)), hand
        unsolved += found is None
        if found is not None:
            assert exactly(found[0]) == 24 and Counter(re.findall(r"\d+", found[0])) == Counter(map(str, hand))
            for equation in found[1].split(";"):
                left, right = equation.split("=")
                assert exactly(left) == exactly(right), (hand, equation)
    assert 3 < unsolved < 50


def test_puzzles_that_people_played(shared: Path, tmp_path: Path) -> None:
    task = tasks.game24(data_dir=str(shared / "data" / "game24"))
    assert task.train_size == 1162 and len(task.heldout) == 100
    problems = [*(task.train(number) for number in range(1162)), *task.heldout]
    assert len({problem.id for problem in problems}) == 1262
    assert task.heldout[0].id == "rank/901"
    for problem in problems[::20]:
        twenty_four(problem)
    with pytest.raises(ValueError, match="has 1262 puzzles, held out from rank 901 on: expected 1 to 362"):
        tasks.game24(data_dir=str(shared / "data" / "game24"), heldout_size=363)
    with pytest.raises(ValueError, match=r"holds no all\.jsonl\.gz"):
        tasks.game24(data_dir=str(tmp_path))
    rows = ['{"puzzle": "1 3 4 6"}'] * 450 + ['{"puzzle": "1 3 4"}', "{"] + ['{"puzzle": "2 3 4 5"}'] * 460
    (tmp_path / "all.jsonl").write_text("\n".join(rows))
    with pytest.raises(ValueError, match=r"all\.jsonl:451: its 'puzzle' is '1 3 4', expected four numbers"):
        tasks.game24(data_dir=str(tmp_path))
    task = tasks.game24(data_dir=str(tmp_path), bad_rows="skip", heldout_size=3)
    assert dict(task.skipped.counts) == {"no puzzle": 1, "not JSON": 1} and "all.jsonl:452" in task.skipped.first[1]
    assert task.heldout[0].id == "rank/903" and task.train_size == 450
    mixed = tasks.mixture(tasks={"game24": {"data_dir": str(tmp_path), "bad_rows": "skip", "heldout_size": 3}})
    assert mixed.skipped == task.skipped


def test_the_same_in_every_process_and_without_jax() -> None:
    program = """if True:
        import hashlib, sys
        from jaxreason import tasks
        made = []
        for name in "arithmetic_chains base_arithmetic modular_arithmetic linear_equations countdown game24".split():
            made.append(getattr(tasks, name)(heldout_size=20))
        for name in ("truth_tellers", "graph_reachability", "string_manipulation"):
            made.append(getattr(tasks, name)(heldout_size=20))
        everything = [(t.heldout, t.words, [t.train(i) for i in range(50)], t.demonstrations["worked"](7)) for t in made]
        assert not {"jax", "numpy", "reasoning_gym"} & set(sys.modules) - {"numpy"}
        print(hashlib.sha256(repr(everything).encode()).hexdigest())
    """
    told = []
    for seed in ("1", "2"):
        env = os.environ | {"PYTHONHASHSEED": seed, "PYTHONPATH": str(ROOT)}
        told.append(subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, text=True, check=True).stdout)
    assert told[0] == told[1] and len(told[0].strip()) == hashlib.sha256().digest_size * 2


MISTAKES: list[tuple[Callable[..., Any], dict[str, Any], str]] = [
    (tasks.arithmetic_chains, {"heldout_size": 0}, "heldout_size is 0: expected 1 or more"),
    (tasks.arithmetic_chains, {"min_terms": 1}, "min_terms is 1 and max_terms is 4: expected 2 <= min_terms <= max_terms <= 12"),
    (tasks.arithmetic_chains, {"operators": "+%"}, r"operators is '\+%': expected some of"),
    (tasks.arithmetic_chains, {"max_number": 1}, "max_number is 1: expected 2 or more"),
    (tasks.arithmetic_chains, {"max_terms": 2, "max_number": 4}, r"heldout_size is 256, and arithmetic_chains has no more than"),
    (tasks.modular_arithmetic, {"max_modulus": 1}, "min_modulus is 2 and max_modulus is 1"),
    (tasks.modular_arithmetic, {"max_exponent": 0}, "max_exponent is 0: expected 1 or more"),
    (tasks.base_arithmetic, {"max_base": 16}, "expected 2 <= min_base <= max_base <= 10"),
    (tasks.linear_equations, {"unknowns": 3}, "unknowns is 3: expected 1 or 2"),
    (tasks.linear_equations, {"max_solution": 0}, "max_solution is 0: expected 1 or more"),
    (tasks.countdown, {"max_numbers": 9}, "max_numbers <= 6"),
    (tasks.countdown, {"max_target": 2, "max_number": 10**9}, "max_target is 2, which numbers up to 1000000000 hardly ever make"),
    (tasks.game24, {"max_number": 3}, "max_number is 3: expected 6 or more"),
    (tasks.game24, {"heldout_size": 2000}, "heldout_size is 2000, and game24 has no more than about 1[0-9][0-9] held-out"),
    (tasks.truth_tellers, {"max_people": 9}, "max_people <= 5"),
    (tasks.graph_reachability, {"roads_per_place": 9.0}, "roads_per_place is 9.0: expected 0.5 to 2"),
    (tasks.string_manipulation, {"kinds": ("revers",)}, "kinds has 'revers', which does not exist: did you mean 'reverse'"),
    (tasks.string_manipulation, {"kinds": "reverse"}, "kinds is 'reverse': expected a list"),
    (tasks.string_manipulation, {"letters": 1}, "letters is 1: expected 2 to 26"),
    (tasks.string_manipulation, {"min_length": 9}, "min_length is 9 and max_length is 7"),
]


@pytest.mark.parametrize(("make", "settings", "said"), MISTAKES)
def test_a_mistake_is_one_sentence(make: Callable[..., Any], settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said) as error:
        make(**settings)
    assert "\n" not in str(error.value)


def test_the_pages_examples_are_what_the_tasks_make() -> None:
    made = runpy.run_path(str(ROOT / "docs" / "figures" / "procedural_tasks.py"))["written"]
    page = (ROOT / "docs" / "procedural_tasks.md").read_text(encoding="utf-8")
    assert made(page) == page and page.count("\n| `") == 10


def test_the_rule_that_a_task_names_scores_it(family: Any) -> None:
    """Right demonstrations get 1, and those of other problems 0."""
    task, _, content = family
    known = rules()
    if task.rule not in known:
        pytest.skip(f"there is no rule {task.rule}")
    shown = [task.demonstrations["worked"](number) for number in range(60)]
    for ours, other in itertools.pairwise(shown):
        assert known[task.rule](ours.problem, Completion(ours.completion, [], StopReason.EOS)).total == 1
        theirs = Completion(other.completion, [], StopReason.EOS)
        if (
            ours.problem.answer != other.problem.answer
            or content(ours.problem) != content(other.problem)
            and "numbers" in ours.problem.metadata
        ):
            assert known[task.rule](ours.problem, theirs).total == 0, (ours.problem, other.completion)
