"""The rule on programs: right programs are accepted, wrong ones and cheats are not. Real data sets are the independent source."""

from __future__ import annotations

import ast
import gzip
import json
import math
import random
import secrets
import struct
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from jaxreason.rewards import code, exchange, sandbox
from jaxreason.rewards.sandbox import Isolation, Limits, Verdict
from jaxreason.training import collect
from jaxreason.types import Completion, Problem, StopReason

LIMITS = Limits(seconds=20.0)
DOC = (Path(__file__).parents[2] / "docs" / "code_sandbox.md").read_text(encoding="utf-8")
DOUBLE = {"style": "assert", "tests": ["assert double(2) == 4", "assert double(-3) == -6"]}


@pytest.fixture(scope="module")
def isolation() -> Isolation:
    found = sandbox.find_isolation()
    if found.kind == "refused":
        pytest.skip(found.reason)
    return found


def rows(shared: Path, name: str) -> list[dict]:
    with gzip.open(shared / "data" / name, "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def humaneval(shared: Path) -> list[tuple[str, str, dict]]:
    """(row, program, tests) of each."""
    found = []
    for row in rows(shared, "openai_humaneval/test.jsonl.gz"):
        call = f"check({row['entry_point']})"
        tests = {"style": "assert", "setup": row["test"].removesuffix(call), "tests": [call]}
        tests |= {"prompt": row["prompt"], "entry_point": row["entry_point"]}
        found.append((row["task_id"], row["prompt"] + row["canonical_solution"], tests))
    return found


def mbpp(shared: Path) -> list[tuple[str, str, dict]]:
    found = []
    for part in ("prompt", "test", "validation", "train"):
        for row in rows(shared, f"mbpp/{part}.jsonl.gz"):
            tests = {"style": "assert", "tests": row["test_list"], "setup": row["test_setup_code"]}
            found.append((f"MBPP/{row['task_id']}", row["code"], tests))
    return found


def some(problems: list, count: int) -> list:
    return random.Random(0).sample(problems, count)


def check_references(problems: list, isolation: Isolation) -> None:
    bad = []
    for name, program, tests in problems:
        judged = code.judge(program, tests, isolation=isolation, limits=LIMITS)
        if judged.verdict is not Verdict.ACCEPTED or judged.passed != 1.0:
            bad.append((name, judged))
    assert not bad


def test_reference_solutions_are_accepted(shared, isolation):
    check_references(some(humaneval(shared), 12) + some(mbpp(shared), 12), isolation)


@pytest.mark.slow
def test_every_reference_solution_is_accepted(shared, isolation):
    """The two rows of MBPP that plain runs find broken among them: their set-up needs a class of the program, and has it here."""
    check_references(humaneval(shared) + mbpp(shared), isolation)


def parsed(program: str) -> ast.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # some references have strings like '\\w'
        return ast.parse(program)


def mutants(program: str, rng: random.Random) -> list[str]:
    """Programs with one operator, comparison, constant or returned value changed, in random order."""
    program = ast.unparse(parsed(program))
    swaps = {
        ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Add, ast.Mod: ast.Mult, ast.FloorDiv: ast.Mult, ast.Div: ast.Mult,
        ast.Lt: ast.GtE, ast.GtE: ast.Lt, ast.Gt: ast.LtE, ast.LtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
        ast.And: ast.Or, ast.Or: ast.And, ast.In: ast.NotIn, ast.NotIn: ast.In,
    }  # fmt: skip
    made = []
    count = len(list(ast.walk(ast.parse(program))))
    for place in range(count):
        tree = ast.parse(program)
        node = list(ast.walk(tree))[place]
        if isinstance(node, ast.BinOp | ast.BoolOp | ast.AugAssign) and type(node.op) in swaps:
            node.op = swaps[type(node.op)]()
        elif isinstance(node, ast.Compare) and type(node.ops[0]) in swaps:
            node.ops[0] = swaps[type(node.ops[0])]()
        elif isinstance(node, ast.Constant) and type(node.value) is int:
            node.value += 1
        elif isinstance(node, ast.Return) and node.value is not None:
            node.value = ast.Constant(None)
        else:
            continue
        made.append(ast.unparse(ast.fix_missing_locations(tree)))
    rng.shuffle(made)
    return made


# what a program and its tests do when they are simply run together, one process for all: the brute force
PLAIN = """
import json, resource, signal, sys
def late(*_): raise TimeoutError
signal.signal(signal.SIGALRM, late)
resource.setrlimit(resource.RLIMIT_AS, (1 << 31, 1 << 31))
passed, out = [], sys.stdout
sys.stdout = None
for program, setup, tests in json.load(sys.stdin):
    space = {"__name__": "program"}
    signal.setitimer(signal.ITIMER_REAL, 2.0)
    try:
        exec(program, space)
        exec(setup, space)
        for test in tests:
            exec(test, space)
        passed.append(True)
    except BaseException:
        passed.append(False)
    signal.setitimer(signal.ITIMER_REAL, 0)
json.dump(passed, out)
"""


def plainly(cases: list[tuple[str, str, list[str]]]) -> list[bool]:
    done = subprocess.run([sys.executable, "-S", "-c", PLAIN], input=json.dumps(cases), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-500:]
    return json.loads(done.stdout)


def check_mutants(problems: list, isolation: Isolation, *, each: int) -> None:
    """A mutant is accepted where it passes when simply run, and not where it does not."""
    rng = random.Random(0)
    cases = [(name, mutant, tests) for name, program, tests in problems for mutant in mutants(program, rng)[:each]]
    passes = plainly([(mutant, tests.get("setup", ""), tests["tests"]) for _, mutant, tests in cases])
    assert passes.count(False) > 0.6 * len(cases)
    bad = []
    for (name, mutant, tests), wanted in zip(cases, passes, strict=True):
        judged = code.judge(mutant, tests, isolation=isolation, limits=Limits(seconds=3.0))
        if (judged.verdict is Verdict.ACCEPTED) != wanted:
            bad.append((name, wanted, judged, mutant))
    assert not bad


@pytest.mark.slow
def test_mutated_solutions_are_not_accepted(shared, isolation):
    check_mutants(some(humaneval(shared), 8) + some(mbpp(shared), 12), isolation, each=1)


@pytest.mark.slow
def test_no_mutated_solution_is_accepted(shared, isolation):
    without = {"MBPP/367", "MBPP/927"}  # simply run, these fail: their set-up needs a class that is the program's
    check_mutants([problem for problem in humaneval(shared) + mbpp(shared) if problem[0] not in without], isolation, each=1)


# Each tries to pass without computing anything. Some raise, some leave, some look for the tests; all have to fail.
CHEATS = {
    "leaves with success": "import sys\nsys.exit(0)",
    "leaves at once": "import os\nos._exit(0)",
    "leaves when called": "import os\ndef double(x): os._exit(0)",
    "exits when called": "import sys\ndef double(x): sys.exit(0)",
    "stops a loop": "def double(x): raise StopIteration",
    "claims an assertion": "def double(x): raise AssertionError",
    "equal to everything": "class E(int):\n  __eq__ = lambda s, o: True\n  __hash__ = int.__hash__\ndef double(x): return E(0)",
    "an object equal to everything": (
        "class E:\n  __eq__ = lambda s, o: True\n  __ne__ = lambda s, o: False\ndef double(x): return E()"
    ),
    "everything is equal": (
        "import builtins, operator\nfor n in ('abs', 'len', 'set', 'sorted', 'all', 'any', 'isinstance', 'eval', 'exec'):\n"
        "  setattr(builtins, n, lambda *a, **k: True)\noperator.eq = lambda a, b: True\nAssertionError = None\n"
        "def double(x): return 1"
    ),
    "no assertions": "import builtins\nbuiltins.AssertionError = type('A', (Exception,), {})\ndef double(x): return 1",
    "patched memory": (
        "import ctypes, gc, sys\nfor o in gc.get_objects():\n"
        "  if isinstance(o, list) and o and isinstance(o[0], str):\n    o.clear()\n"
        "frame = sys._getframe()\nwhile frame:\n  frame.f_globals.update(encode=lambda *a: b'T', _send=lambda *a: None)\n"
        "  frame = frame.f_back\ndef double(x): return 1"
    ),
    "the source of a test": (
        "import gc, re, sys\ndef double(x):\n"
        "  text = repr([o for o in gc.get_objects() if isinstance(o, (str, list, dict, tuple))])\n"
        "  found = re.search(r'assert dou' + r'ble\\(%s\\) == (-?\\d+)' % x, text)\n  return int(found[1]) if found else 0"
    ),
    "frames of the tests": (
        "import sys\ndef double(x):\n  f = sys._getframe()\n  while f:\n    for v in list(f.f_locals.values()):\n"
        "      if isinstance(v, (list, tuple)) and 'assert' in str(v): return 4\n    f = f.f_back\n  return 0"
    ),
    "a pipe full of True": (
        "import os\nvalue = b't' + (2).to_bytes(8, 'big') + b's' + (2).to_bytes(8, 'big') + b'ok' + b'T'\n"
        "for n in range(3, 10):\n  try: [os.write(n, len(value).to_bytes(8, 'big') + value) for _ in range(9)]\n"
        "  except OSError: pass\ndef double(x): return 1"
    ),
    "a pipe full of noise": "import os\nfor n in range(3, 10):\n  try: os.write(n, b'accepted\\t\\n' * 99)\n  except OSError: pass",
    "prints a verdict": "import os\nfor n in (1, 2): os.write(n, b'accepted\\t\\naccepted\\t\\n')\nos._exit(0)",
    "a closed pipe": "import os\nos.closerange(3, 99)",
    "never answers": "def double(x):\n  while True: pass",
    "answers without end": "import os\nwhile True: os.write(4, bytes(1 << 16))",
    "a very deep value": "def double(x):\n  v = []\n  for _ in range(10 ** 5): v = [v]\n  return v",
    "a value without end": "def double(x):\n  v = []\n  v.append(v)\n  return v",
    "a very long value": "def double(x): return [None] * (1 << 26)",
    "visible tests by heart": "def double(x): return {2: 4}[x]",
    "kills the tests": (
        "import os, signal\ndef double(x):\n  for p in range(2, 300):\n    if p != os.getpid():\n"
        "      try: os.kill(p, signal.SIGKILL)\n      except OSError: pass\n  return 1"
    ),
    "nothing": "pass",
    "a stub": "def double(x): ...",
}  # fmt: skip


@pytest.mark.parametrize("name", CHEATS)
def test_cheats_fail(isolation, name):
    hangs = name in ("never answers", "patched memory")  # the latter breaks its own side, and says nothing any more
    judged = code.judge(CHEATS[name], DOUBLE, isolation=isolation, limits=Limits(seconds=1.0 if hangs else 20.0, memory_mb=300))
    assert judged.verdict is not Verdict.ACCEPTED
    assert judged.passed == (0.5 if name == "visible tests by heart" else 0.0), judged
    assert judged.reason
    assert f"| {name} | {judged.verdict.value} |" in DOC


@pytest.mark.parametrize(
    ("tests", "program"),
    [
        # a test's builtins, modules and helpers are its own
        (["assert abs(f(1) - 2.5) < 1e-6"], "def abs(x): return 0\ndef f(x): return 9"),
        (["assert set(f(1)) == set([1, 2])"], "set = lambda x: 0\ndef f(x): return [9]"),
        (["assert math.isclose(f(1), 2.5)"], "class math:\n  isclose = staticmethod(lambda *a: True)\ndef f(x): return 9"),
        (["def same(a, b): return a == b\nassert same(f(1), 2)"], "def same(a, b): return True\ndef f(x): return 9"),
        (["assert all(map(f, [1, 2]))"], "def f(x): raise StopIteration"),
        (["for x in map(f, [1]):\n  assert x == 5"], "def f(x): raise StopIteration"),
        (
            ["try:\n  assert f(1) == 5\nexcept BaseException as e:\n  assert type(e).__name__ != 'AssertionError'"],
            "import os\ndef f(x): os._exit(0)",
        ),
        (["assert f(1) == C(1)"], "class C:\n  def __init__(s, x): pass\n  __eq__ = lambda s, o: True\ndef f(x): return C(2)"),
        (["x = 1"], "def f(x): return 1"),  # asks for nothing
        (["assert not f(1)"], "class N:\n  __bool__ = lambda s: False\ndef f(x): return N()"),
        (["assert len(f(1)) == 3"], "class N:\n  __len__ = lambda s: 3\ndef f(x): return N()"),
        (["assert f(1) in [1, 2]"], "class E:\n  __eq__ = lambda s, o: True\ndef f(x): return E()"),
        (["assert isinstance(f(1), list)"], "class L:\n  __class__ = list\ndef f(x): return L()"),
    ],
)
def test_a_program_defines_nothing_of_the_tests(isolation, tests, program):
    judged = code.judge(program, {"style": "assert", "tests": tests}, isolation=isolation, limits=LIMITS)
    assert judged.verdict is not Verdict.ACCEPTED
    assert judged.passed == 0.0


def test_helpers_of_the_prompt_are_the_tests_own(isolation):
    """HumanEval/32's tests call a function of the prompt on what the program found; a program cannot define it anew."""
    prompt = 'def poly(x):\n    return x * x - 4\n\n\ndef root():\n    """ A zero of poly """\n'
    tests = {"style": "assert", "tests": ["assert abs(poly(root())) < 1e-6"], "prompt": prompt, "entry_point": "root"}
    for program, wanted in (
        ("    return 2.0\n", Verdict.ACCEPTED),  # it continues the prompt
        ("def root():\n    return -2.0\n", Verdict.ACCEPTED),
        ("def root():\n    return max([x for x in range(9) if poly(x) == 0])\n", Verdict.ACCEPTED),
        ("def poly(x):\n    return 0\ndef root():\n    return 7\n", Verdict.WRONG_ANSWER),
        ("pass", Verdict.WRONG_ANSWER),
        ("    return 2.0 +\n", Verdict.COMPILE_ERROR),
    ):
        assert code.judge(program, tests, isolation=isolation, limits=LIMITS).verdict is wanted, program


@pytest.mark.parametrize(
    ("program", "tests"),
    [
        ("def sum(a, b): return a + b", ["assert sum(1, 2) == 3"]),
        ("def f(n): yield from range(n)", ["assert list(f(3)) == [0, 1, 2]", "assert next(f(1)) == 0", "assert sum(f(4)) == 6"]),
        ("import itertools\ndef f(): return itertools.count()", ["g = f()\nassert [next(g), next(g)] == [0, 1]"]),
        ("def f(x): return {'a': {x}, (1, 2): [None, 1j, b'x']}", ["assert f(1) == {'a': {1}, (1, 2): [None, 1j, b'x']}"]),
        ("from collections import Counter\ndef f(x): return Counter(x)", ["assert f('aab') == {'a': 2, 'b': 1}"]),
        ("def f(x): return x ** 500", ["assert f(-3) == (-3) ** 500"]),
        ("def f(x): raise KeyError(x)", ["try:\n  f(1)\n  assert False\nexcept KeyError as e:\n  assert '1' in str(e)"]),
        (
            "class Odd(Exception): pass\ndef f(x): raise Odd('no')",
            ["try:\n  f(1)\nexcept Exception as e:\n  assert type(e).__name__ == 'Odd'\nelse:\n  assert False"],
        ),
        (
            "class Stack:\n  def __init__(s): s.x = []\n  def push(s, v): s.x.append(v)\n  def pop(s): return s.x.pop()",
            ["s = Stack()\ns.push(3)\ns.push(4)\nassert (s.pop(), s.x) == (4, [3])"],
        ),
        ("def f(x, *, y=1): return [x, y]", ["assert f(1, y=2) == [1, 2]", "assert f(x=3) == [3, 1]"]),
        ("def f(x): return isinstance(x[0], x[1])", ["assert f((1, int)) is True", "assert f((1, str)) is False"]),
        ("def f(x): return 'é\\ud800' + x", ["assert f('日') == 'é\\ud800日'"]),
        ("def f(x): print('noise'); import sys; sys.stderr.write('noise'); return input() if x else 1", ["assert f(0) == 1"]),
        ("import dataclasses\n@dataclasses.dataclass\nclass P: x: int\ndef f(x): return P(x)", ["assert f(3).x == 3"]),
        ("def f(x): return range(x)", ["assert f(3) == range(3)"]),
        ("def f(x): return math.pi * x\nimport math", ["assert math.isclose(f(1), math.pi)"]),
    ],
)  # fmt: skip
def test_right_programs_pass(isolation, program, tests):
    judged = code.judge(program, {"style": "assert", "tests": tests}, isolation=isolation, limits=LIMITS)
    assert judged == code.Judged(Verdict.ACCEPTED, 1.0)


SUM = {"style": "stdin", "cases": [["1 2\n", "3\n"], ["5 5\n", "10"], ["-1 1", "0\n\n"], ["7 0", "7"]]}


@pytest.mark.parametrize(
    ("program", "verdict", "passed"),
    [
        ("print(sum(map(int, input().split())))", Verdict.ACCEPTED, 1.0),
        ("if __name__ == '__main__':\n  print(str(sum(map(int, input().split()))) + '  \\n')", Verdict.ACCEPTED, 1.0),
        ("print(3)", Verdict.WRONG_ANSWER, 0.25),
        ("print(' ', sum(map(int, input().split())))", Verdict.WRONG_ANSWER, 0.0),
        ("print(sum(map(int, input().split())), end='\\x0b\\x0b0')", Verdict.WRONG_ANSWER, 0.0),
        ("print({'1 2': 3, '5 5': 10}[input()])", Verdict.RUNTIME_ERROR, 0.5),
        ("", Verdict.COMPILE_ERROR, 0.0),
        ("print(", Verdict.COMPILE_ERROR, 0.0),
        ("import sys\nsys.exit(0)", Verdict.WRONG_ANSWER, 0.0),
        ("print(3, flush=True)\nimport os\nos._exit(1)", Verdict.RUNTIME_ERROR, 0.0),
        ("x = [0] * 10 ** 10", Verdict.MEMORY_LIMIT, 0.0),
        ("print(3 if input() == '1 2' else [0] * 10 ** 10)", Verdict.MEMORY_LIMIT, 0.25),
        ("import gc\nprint([o for o in gc.get_objects() if isinstance(o, (list, tuple))])", Verdict.WRONG_ANSWER, 0.0),
    ],
)
def test_stdin(isolation, program, verdict, passed):
    judged = code.judge(program, SUM, isolation=isolation, limits=LIMITS)
    assert (judged.verdict, judged.passed) == (verdict, passed), judged


def test_a_hang_costs_what_comes_after_it(isolation):
    judged = code.judge(
        "x = input()\nwhile x[0] == '-': pass\nprint(eval(x.replace(' ', '+')))",
        SUM,
        isolation=isolation,
        limits=Limits(seconds=1.0),
    )
    assert (judged.verdict, judged.passed) == (Verdict.TIME_LIMIT, 0.5)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("x = 1", "x = 1"),
        ("Here:\n```python\nx = 1\n```\nDone.", "x = 1\n"),
        ("```py\nx = 1\n```\nor better\n```Python3\nx = 2\n```\n", "x = 2\n"),
        ("```\nx = 1\n```", "x = 1\n"),
        ("```python\nx = 1\n```\nIt prints\n```\n1\n```", "x = 1\n"),
        ("```bash\nls\n```\n```python\nx = 1\n```\n```text\n1\n```", "x = 1\n"),
        ("```bash\nls\n```", ""),
        ("<think>```python\nx = 1\n```</think>```python\nx = 2\n", "x = 2\n"),
        ("<think>```python\nx = 1\n```</think> I do not know", " I do not know"),
        ("<think>a</think>\n<answer>\n```python\nx = 2\n```\n</answer> ```python\nx = 3\n```", "x = 2\n"),
        ("<answer>x = 2</answer>", "x = 2"),
        ("  ```python\n  x = 1\n  ```", "  x = 1\n"),
        ("```python\r\nx = 1\r\n```", "x = 1\r\n"),
    ],
)
def test_the_program_in_a_completion(text, found):
    assert code.program(text) == found


@pytest.mark.parametrize(
    "text", ["```" + "a" * 10**6 + "`", " " * 10**6 + "`", "```\n" * 10**5, "```python\n" * 10**5, "`" * 10**6]
)
def test_degenerate_text_is_read_in_one_pass(text):
    code.program(text)


def test_the_rule(isolation):
    rules = collect.rules()
    assert {name for name in rules if name.startswith(("code.", "sandbox.", "cell.", "exchange.", "script."))} == {
        "code.code_tests",
        "code.code_share",
    }
    problem = Problem("1", "", "", metadata=DOUBLE)
    parts = {"code": collect.RulePart("code.code_tests", kwargs={"limit_seconds": 5}), "share": collect.RulePart("code.code_share")}
    scoring = collect.make_scoring(parts, vocabulary=[], eos_ids=[])
    for program, total, share, verdict in (
        ("def double(x): return 2 * x", 1.0, 1.0, "accepted"),
        ("def double(x): return 4", 0.0, 0.5, "wrong_answer"),
        ("def double(x): return x / 0", 0.0, 0.0, "runtime_error"),
        ("def double(x) return x", 0.0, 0.0, "compile_error"),
        ("def double(x): return [0] * 10 ** 10", 0.0, 0.0, "memory_limit"),
    ):
        completion = Completion(f"<think>hm</think>\n```python\n{program}\n```", (), StopReason.EOS)
        reward = scoring.host["code"](problem, completion)
        assert reward.total == total
        verdicts = {each.name.lower(): 0.0 for each in Verdict} | {verdict: 1.0}
        assert reward.parts == {"accuracy": total, "tests_passed": share, **verdicts}
        assert scoring.host["share"](problem, completion).total == share


@pytest.mark.parametrize(
    ("metadata", "complaint"),
    [
        ({}, "expected style"),
        ({"style": "stdin"}, "expected style"),
        ({"style": "assert", "tests": []}, "expected style"),
        ({"style": "unit", "tests": ["x"]}, "expected style"),
        ({"style": "assert", "tests": ["assert f(1) =="]}, "no Python"),
    ],
)
def test_a_problem_without_tests_is_the_callers_mistake(isolation, metadata, complaint):
    with pytest.raises(ValueError, match=complaint):
        code.judge("x = 1", metadata, isolation=isolation, limits=LIMITS)


def a_value(rng: random.Random, depth: int = 3):
    plain = [
        lambda: None, lambda: rng.random() < 0.5, lambda: rng.randint(-9, 9), lambda: rng.randint(-(10**40), 10**40),
        lambda: rng.choice([0.0, -0.0, math.inf, -math.inf, rng.gauss(0, 1), 1e-320]), lambda: complex(rng.random(), -0.0),
        lambda: "".join(chr(rng.choice([0, 65, 233, 0xD800, 0x1F600])) for _ in range(rng.randint(0, 4))),
        lambda: rng.randbytes(rng.randint(0, 4)), lambda: range(rng.randint(0, 3), 9, rng.randint(1, 3)),
        lambda: rng.choice([int, dict, ValueError]),
    ]  # fmt: skip
    if depth == 0 or rng.random() < 0.5:
        return rng.choice(plain)()
    inner = [a_value(rng, depth - 1) for _ in range(rng.randint(0, 3))]
    flat = [rng.choice(plain)() for _ in range(3)]
    return rng.choice([list(inner), tuple(inner), set(flat), frozenset(flat), dict(zip(flat, inner, strict=False))])


def fixed(value) -> str:
    """A text that two values share only where they are equal, to the sign of a zero; sets have no order in it."""
    if isinstance(value, list | tuple):
        return f"{type(value).__name__}({', '.join(map(fixed, value))})"
    if isinstance(value, set | frozenset):
        return f"{type(value).__name__}({', '.join(sorted(map(fixed, value)))})"
    if isinstance(value, dict):
        return f"dict({', '.join(f'{fixed(key)}: {fixed(each)}' for key, each in value.items())})"
    return repr(value)


def test_plain_values_cross_unchanged():
    rng = random.Random(0)
    for _ in range(3000):
        value = a_value(rng)
        back = exchange.decode(exchange.encode(value, None), lambda name: None)
        assert type(back) is type(value)
        assert fixed(back) == fixed(value)


def test_broken_messages_are_told_apart():
    """Cut, changed and random bytes make another value or one of the errors that the tests' side expects."""
    rng = random.Random(0)
    for _ in range(3000):
        data = bytearray(exchange.encode(a_value(rng), None))
        for _ in range(rng.randint(1, 3)):
            what = rng.random()
            if what < 0.3:
                del data[rng.randrange(len(data) + 1) :]
            elif what < 0.6:
                data += rng.randbytes(3)
            elif data:
                data[rng.randrange(len(data))] = rng.choice(b"NTFfcrgisbyltezd\x00\x01\xff")
        try:
            exchange.decode(bytes(data), lambda name: object())
        except (ValueError, TypeError, RecursionError, struct.error):
            pass
    deep = b"l" + (1).to_bytes(8, "big")
    with pytest.raises(ValueError, match="deep"):
        exchange.decode(deep * 100_000 + b"N", lambda name: None)
    with pytest.raises(ValueError, match="cut short"):
        exchange.decode(b"l" + b"\xff" * 8, lambda name: None)


def test_nothing_of_the_tests_is_in_the_programs_cell(isolation):
    """Looks through all that the program's process can read of itself for what only the tests hold."""
    secret = secrets.token_hex(8)
    tests = {"style": "assert", "tests": [f"assert f(1) == 1, {secret!r}"], "setup": f"hidden = {secret!r}"}
    program = """
import ctypes, gc, sys
def f(half):
    seen = repr([o for o in gc.get_objects()]) + repr(sys._current_frames())
    return 1 if HALF + half in seen else 2
"""
    # the program knows one half of the secret, so that its own text is no find
    tests["tests"] = [f"assert f({secret[8:]!r}) == 2, {secret!r}"]
    program = program.replace("HALF", repr(secret[:8]))
    judged = code.judge(program, tests, isolation=isolation, limits=LIMITS)
    assert judged.verdict is Verdict.ACCEPTED, judged
    # what it is given, it finds
    judged = code.judge(program, {**tests, "prompt": f"# {secret}"}, isolation=isolation, limits=LIMITS)
    assert judged.verdict is Verdict.WRONG_ANSWER, judged
