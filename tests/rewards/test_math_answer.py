"""Answers of every form: what a mathematician would call equal is, what is near is not, and nothing hangs or is run."""

from __future__ import annotations

import gzip
import importlib.util
import json
import random
import signal
import subprocess
import sys
import threading
from fractions import Fraction
from pathlib import Path
from types import ModuleType

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxreason.rewards.answers import find_answer, find_reference
from jaxreason.rewards.equality import equal
from jaxreason.rewards.math import math_answer
from jaxreason.types import Completion, Problem, StopReason

pytest.importorskip("math_verify", reason="needs math-verify: pip install 'jaxreason[math]'")
HERE = Path(__file__).parent


def _cases(name: str) -> ModuleType:
    specification = importlib.util.spec_from_file_location(name, HERE / f"{name}.py")
    assert specification is not None and specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


CASES = [_cases(name) for name in ("math_cases", "math_cases_of_models", "math_cases_of_grammar")]
RIGHT = [(kind, pairs) for module in CASES for kind, pairs in module.RIGHT.items()]
WRONG = [(kind, pairs) for module in CASES for kind, pairs in module.WRONG.items()]


def score(gold: str, text: str, **settings: float) -> float:
    reward = math_answer(Problem("0", "", gold), Completion(text, (), StopReason.EOS), **settings)
    assert reward.parts == {"accuracy": reward.total}
    return reward.total


@pytest.mark.parametrize(("kind", "pairs"), RIGHT)
def test_right_answers_are_right(kind: str, pairs: list[tuple[str, str]]):
    wrong = [(gold, text) for gold, text in pairs if score(gold, text) != 1]
    assert not wrong, kind


@pytest.mark.parametrize(("kind", "pairs"), WRONG)
def test_wrong_answers_are_wrong(kind: str, pairs: list[tuple[str, str]]):
    right = [(gold, text) for gold, text in pairs if score(gold, text) != 0]
    assert not right, kind


def test_a_reference_without_an_answer_is_not_judged():
    reward = math_answer(Problem("0", "", "  "), Completion("5", (), StopReason.EOS))
    assert reward.total == 0 and reward.parts == {"accuracy": None}


def test_the_shared_cases_on_which_graders_agree(shared: Path):
    path = shared / "data" / "grader_cases" / "cases.jsonl.gz"
    if not path.exists():
        pytest.skip("needs the grader cases, which are not in this copy of the shared folder")
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        cases = [json.loads(line) for line in lines]
    must = [case for case in cases if case["level"] == "must"]
    wrong = [case["id"] for case in must if score(case["gold"], case["prediction"]) != case["expected"]]
    assert len(must) > 200 and len(wrong) <= 0.005 * len(must), wrong


def answers_of(shared: Path, name: str) -> list[str]:
    with gzip.open(shared / "data" / name, "rt", encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    return [", ".join(row["final_answer"]) if "final_answer" in row else row["answer"] for row in rows]


@pytest.mark.parametrize(
    ("name", "count"), [("math500/test.jsonl.gz", 150), ("math_train/train.jsonl.gz", 300), ("olympiadbench/test.jsonl.gz", 150)]
)
def test_real_references_equal_themselves_and_no_other(shared: Path, name: str, count: int):
    golds = random.Random(0).sample(answers_of(shared, name), count)
    strangers = []
    for gold, other in zip(golds, golds[1:] + golds[:1], strict=True):
        assert score(gold, rf"Since $x = 2$, we get $\boxed{{{gold.strip('$')}}}$.") == 1, gold
        if gold != other and score(gold, rf"\boxed{{{other.strip('$')}}}") == 1:
            strangers.append((gold, other))
    assert len(strangers) <= 2, strangers  # 25 and 25 degrees are equal


FRACTIONS = st.fractions(min_value=-1000, max_value=1000, max_denominator=60)


def spellings(number: Fraction) -> list[str]:
    """Ways to write a rational number, all exact."""
    top, bottom = number.numerator, number.denominator
    whole, rest = divmod(abs(number), 1)
    sign = "-" if number < 0 else ""
    found = [
        f"{top}/{bottom}",
        rf"\frac{{{top}}}{{{bottom}}}",
        rf"{sign}\dfrac{{{abs(top)}}}{{{bottom}}}",
        rf"\frac{{{3 * top}}}{{{3 * bottom}}}",
    ]
    found += [rf"{top} \div {bottom}", rf"{top} \cdot {bottom}^{{-1}}", f"({top})/({bottom})", f"{top - bottom}/{bottom} + 1"]
    if whole and rest:
        found += [rf"{sign}{whole}\frac{{{rest.numerator}}}{{{rest.denominator}}}", f"{sign}{whole} {rest}"]
    if 10**6 % bottom == 0:
        decimal = f"{sign}{abs(top) * 10**6 // bottom // 10**6}.{abs(top) * 10**6 // bottom % 10**6:06d}"
        found += [decimal, decimal.rstrip("0").rstrip(".") or "0", rf"{decimal}\%".replace(decimal, str(percent(number)))]
        found += [rf"{decimal} \times 10^0", rf"\text{{{decimal}}}", rf"{decimal} \text{{ cm}}", rf"\${decimal}"]
    if bottom == 1 and abs(top) >= 1000:
        found += [f"{top:,}", f"{top:,}".replace(",", "{,}"), f"{top:,}".replace(",", r",\!"), f"{top:,}".replace(",", " ")]
    return found


def percent(number: Fraction) -> str:
    hundred = 100 * number
    return (
        f"{'-' if number < 0 else ''}{abs(hundred.numerator) * 10**6 // hundred.denominator / 10**6:.6f}".rstrip("0").rstrip(".")
        or "0"
    )


@settings(max_examples=150, deadline=None)
@given(FRACTIONS, st.data())
def test_a_rational_number_is_equal_in_all_its_spellings(number: Fraction, data: st.DataObject):
    ways = spellings(number)
    one, other = data.draw(st.sampled_from(ways)), data.draw(st.sampled_from(ways))
    assert score(one, rf"\boxed{{{other}}}") == 1
    assert equal(one, other) and equal(other, one) and equal(one, one)


@settings(max_examples=150, deadline=None)
@given(FRACTIONS, FRACTIONS, st.data())
def test_two_rational_numbers_are_equal_where_their_values_are(number: Fraction, other: Fraction, data: st.DataObject):
    ways = [way for way in spellings(number) if "%" not in way]
    near = [
        number + 1,
        -number,
        2 * number,
        number + Fraction(1, 60),
        number * 10,
        Fraction(number.numerator, number.denominator + 1),
        other,
    ]
    second = data.draw(st.sampled_from(near))
    way = data.draw(st.sampled_from([way for way in spellings(second) if "%" not in way]))
    assert score(data.draw(st.sampled_from(ways)), rf"\boxed{{{way}}}") == (number == second)


@settings(max_examples=60, deadline=None)
@given(st.lists(FRACTIONS, min_size=2, max_size=4, unique=True), st.randoms(use_true_random=False))
def test_the_order_of_tuples_matters_and_of_sets_does_not(numbers: list[Fraction], dice: random.Random):
    shuffled = numbers.copy()
    dice.shuffle(shuffled)
    one, other = (", ".join(str(number) for number in listed) for listed in (numbers, shuffled))
    assert equal(rf"\{{{one}\}}", rf"\{{{other}\}}")
    assert equal(f"({one})", f"({other})") == (numbers == shuffled)
    assert not equal(rf"\{{{one}\}}", rf"\{{{', '.join(str(number) for number in numbers[1:])}\}}")


@settings(max_examples=200, deadline=None)
@given(
    st.one_of(
        st.text(max_size=40),
        st.lists(st.sampled_from(list(r"\{}()[]^_$&%,.;:=<>+-*/!|0123xabi ") + [r"\frac", r"\text{"]), max_size=14).map("".join),
    )
)
def test_nothing_raises_and_every_text_is_itself(text: str):
    score("5", text)
    score(r"x^2+\sqrt{2}", rf"\boxed{{{text}}}")
    answer = find_answer(rf"\boxed{{{text}}}")
    if answer is not None:
        assert equal(answer, answer)
    find_reference(text)


TOWERS = [
    "10^{10^{10}}", "9^{9^{9^{9}}}", "((9^{9})^{9999})^{9999}", "1000000!", "((9!)!)!", r"\binom{1000000000}{500000000}",
    r"\sum_{k=1}^{10^9} k^k", r"\prod_{k=1}^{99999999} k", r"\sum_{k=1}^{200} k^{k^k}", r"\int_0^1 e^{x^{x^x}} dx", "9" * 100_000,
    "1e999999999", r"\sqrt{" * 60 + "2" + "}" * 60, r"\frac{1}{1+" * 100 + "x" + "}" * 100, "{" * 100_000 + "}" * 100_000,
    "(" * 30 + "x" + ")" * 30,
    r"\exp(\exp(\exp(x)))", "e^{e^{e^{e^9}}}", r"\Gamma(1000000000)", r"\gcd(10^{99999}, 6)",
    r"\operatorname{zeros}(99999,99999)", "|x|" * 100,
    r"\begin{pmatrix}1&1\\1&0\end{pmatrix}^{1000000000}", r"\begin{vmatrix}" + r"a&b&c&d&e&f\\" * 6 + r"\end{vmatrix}",
    "x_1," * 900, "x " * 140,
    r"\boxed{" * 20_000, "$" * 50_000, r"\left(" * 90 + "x" + r"\right)" * 90, "7^{9999}+" * 300 + "1",
    r"x^{9^9} |_{x=9^{9^9}}", "\\" * 100_001,
    "x" * 3000 + "1", "=" * 3000, r"\begin{pmatrix}x&1\\1&y\end{pmatrix}^{500}", "(x+y+z)^{200}", "<" * 300 + "x", "a,b;" * 300,
]  # fmt: skip
RUN_ALL = """
import json, sys, threading
from jaxreason.rewards import symbolic
from jaxreason.rewards.math import math_answer
from jaxreason.types import Completion, Problem, StopReason
symbolic.load()
def run():
    for gold in ("x^2+1", "(1,2)"):
        for text in json.load(open(sys.argv[1])):
            for form in (text, "\\\\boxed{" + text + "}", "\\\\boxed{1+" + text + "}"):
                if math_answer(Problem("0", "", gold), Completion(form, (), StopReason.EOS)).total != 0:
                    print(gold, form[:80])
    print("done")
worker = threading.Thread(target=run) if sys.argv[2] == "thread" else None
if worker:
    worker.start()
    worker.join()
else:
    run()
"""


@pytest.mark.parametrize("where", ["main", pytest.param("thread", marks=pytest.mark.slow)])
def test_nothing_hangs(tmp_path: Path, where: str):
    """In the main thread a timer ends what the bounds let through; in another only the bounds do."""
    (tmp_path / "texts.json").write_text(json.dumps(TOWERS))
    command = [sys.executable, "-c", RUN_ALL, str(tmp_path / "texts.json"), where]
    done = subprocess.run(command, cwd=HERE.parents[1], capture_output=True, text=True, timeout=280)  # killed, not waited for
    assert done.stdout == "done\n", done.stdout + done.stderr


def test_a_power_too_large_to_compute_is_still_itself():
    assert score("10^{10^{10}}", r"\boxed{10^{10^{10}}}") == 1
    assert score("10^{10^{10}}", r"\boxed{10^{10^{9}}}") == 0


def test_the_timer_ends_a_comparison_and_leaves_the_callers_timer_as_it_was():
    rang = []
    before = signal.signal(signal.SIGALRM, lambda *_: rang.append(True))
    signal.setitimer(signal.ITIMER_REAL, 100.0)
    try:
        assert score("(x+1)^2", r"\boxed{x^2+2x+1}") == 1  # read once, so that the next line is about the timer alone
        assert not equal(r"\frac{x^3-y^3}{x-y}", "x^2+xy+y^2", limit_seconds=1e-5)
        assert equal(r"\frac{x^3-y^3}{x-y}", "x^2+xy+y^2")
        assert 90 < signal.getitimer(signal.ITIMER_REAL)[0] <= 100
        signal.setitimer(signal.ITIMER_REAL, 0.01)
        while not rang:
            signal.pause()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def test_it_works_in_a_thread():
    found = []
    worker = threading.Thread(target=lambda: found.append(score("x^2-1", r"\boxed{(x-1)(x+1)}")))
    worker.start()
    worker.join()
    assert found == [1.0]


def test_numbers_tuples_and_words_need_no_sympy():
    script = """
import sys
from jaxreason.rewards.math import math_answer
from jaxreason.types import Completion, Problem, StopReason
pairs = [("12,000", "12000"), ("3/4", "0.75"), ("(1,2)", "(1.0, 2)"), ("5", "6"), ("10^3", "1000"), ("yes", "no"), ("B", "(B)"),
         ("{1,2}", "2,1"), ("[0,1)", "[0,1)"), ("30", "30^{\\\\circ}"), ("x=4", "4"), ("2.5 cm", "25 mm"), ("3", "10^{10^{10}}")]
for gold, answer in pairs[:-1]:
    math_answer(Problem("0", "", gold), Completion(f"\\\\boxed{{{answer}}}", (), StopReason.EOS))
print(sorted({"jax", "sympy", "math_verify", "numpy"} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=HERE.parents[1], capture_output=True, text=True, timeout=60)
    assert done.stdout == "[]\n", done.stderr


def test_a_missing_math_verify_is_told_with_its_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "math_verify", None)
    monkeypatch.delitem(sys.modules, "math_verify.grader", raising=False)
    with pytest.raises(ValueError, match=r"jaxreason\[math\]"):
        score(r"\sqrt{2}", r"\boxed{\sqrt{8}/2}")
