"""Times host rules, by themselves and in a pool of workers. Prints one JSON line a workload; jax is not needed but for `traced`.

    python benchmarks/rewards.py

overhead: what a pool adds to a sample, with a rule that does nothing: completions of 256 and of 8,192 tokens, about 4 bytes of text
    each; wall-clock milliseconds a sample of the whole, and CPU milliseconds of the calling process, with 1 worker and with 2.
growth: samples a second of a rule that takes 2 ms of a core, with 1 worker and with 2, and their ratio.
restart: milliseconds from one crash to the next where every sample crashes: a new worker is forked for each, from a server
    with nothing but the rule in it, and from one with sympy; beside the seconds until a new pool's first answer.
math_easy, math_symbolic, math_adversarial: microseconds a sample of a rule for mathematical answers, called directly, and samples a
    second in a pool of 2. Easy are numbers, symbolic are expressions in other forms than the reference, and adversarial are what
    explodes in a symbolic library, long digits, deep braces and repeated text. `--rule` names the rule.
code: programs a second that are run against three tests in the sandbox (`code.code_tests`), every fourth of them wrong, called
    directly and in a pool of 2.
traced: `traced_rules.py`, a line for each traced rule: its share of the quickstart's step.

Ratios and times are medians of `--runs` rounds.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import reward_rules

import jaxreason
from jaxreason.rewards.pool import Pool, Sample
from jaxreason.types import Completion, Problem, StopReason


def sample(text: str, *, answer: str = "5", tokens: int = 16) -> Sample:
    return Problem("0", "What is 2 + 3?", answer), Completion(text, list(range(tokens)), StopReason.EOS, mask=(True,) * tokens)


def seconds(function: Callable[[], Any], runs: int) -> tuple[float, float]:
    """Medians of wall-clock seconds, and of this process's CPU seconds; once before, not counted."""
    function()
    wall, cpu = [], []
    for _ in range(runs):
        begun, begun_cpu = time.perf_counter(), time.process_time()
        function()
        wall.append(time.perf_counter() - begun)
        cpu.append(time.process_time() - begun_cpu)
    return statistics.median(wall), statistics.median(cpu)


def overhead(runs: int) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for tokens, count in ((256, 4000), (8192, 400)):
        samples = [sample("a b " * tokens, tokens=tokens)] * count
        for workers in (1, 2):
            with Pool({"nothing": reward_rules.nothing}, workers=workers) as pool:
                wall, cpu = seconds(partial(pool.score, samples), runs)
            out |= {
                f"ms_{tokens}_tokens_{workers}": 1e3 * wall / count,
                f"caller_cpu_ms_{tokens}_tokens_{workers}": 1e3 * cpu / count,
            }
    return out


def growth(runs: int) -> dict[str, Any]:
    samples, rate = [sample("x")] * 500, {}
    for workers in (1, 2):
        with Pool({"compute": reward_rules.compute}, workers=workers) as pool:
            rate[workers] = len(samples) / seconds(partial(pool.score, samples), runs)[0]
    return {"samples_per_s_1": rate[1], "samples_per_s_2": rate[2], "growth": rate[2] / rate[1], "cores": os.cpu_count()}


def restart(runs: int) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for name, rule in (("bare", reward_rules.crash), ("sympy", reward_rules.crash_with_sympy)):
        begun = time.perf_counter()
        with Pool({name: rule}, workers=1) as pool:
            pool.score([sample("x")])
            out[f"first_answer_s_{name}"] = time.perf_counter() - begun
            out[f"ms_{name}"] = 1e3 * seconds(partial(pool.score, [sample("crash")] * 50), runs)[0] / 50
    return out


def boxed(answer: str) -> str:
    return f"<think>{'We add the two and look again. ' * 20}</think> The answer is $\\boxed{{{answer}}}$."


def easy(rng: random.Random) -> list[Sample]:
    numbers = [rng.choice([rng.randint(-9999, 9999), round(rng.uniform(0, 100), 2)]) for _ in range(500)]
    return [sample(boxed(str(rng.choice([n, n, n + 1]))), answer=str(n)) for n in numbers]


def symbolic(rng: random.Random) -> list[Sample]:
    forms = [
        (r"\frac{{\sqrt{{{a}}}}}{{{b}}}", r"\frac{{1}}{{{b}}}\sqrt{{{a}}}"),
        (r"x^2 + {a}x + {b}", r"{b} + x(x + {a})"),
        (r"\left[{a}, \infty\right)", r"[{a},\infty)"),
        (r"({a}, {b})", r"\left({a},{b}\right)"),
        (r"{a} + {b}\pi", r"{b}\pi+{a}"),
        (r"\begin{{pmatrix}} {a} \\ {b} \end{{pmatrix}}", r"\begin{{bmatrix}}{a}\\{b}\end{{bmatrix}}"),
    ]
    pairs = [(rng.choice(forms), rng.randint(2, 99), rng.randint(2, 99)) for _ in range(200)]
    return [sample(boxed(form[1].format(a=a, b=b)), answer=form[0].format(a=a, b=b)) for form, a, b in pairs]


def adversarial(rng: random.Random) -> list[Sample]:
    texts = [
        "10^{10^{10}}", "9^{9^{9^9}}", r"\frac{1}{2004!}", "99999999!", "9" * 100_000, "{" * 10_000 + "}" * 10_000,
        r"\sqrt{" * 200 + "2" + "}" * 200, "(" * 500 + "1" + ")" * 500, "+".join(["x"] * 5000), r"\sum_{n=1}^{10^9} n^{n}",
        "-" * 5000 + "1", r"\binom{10^9}{5*10^8}", "1," * 20_000,
    ]  # fmt: skip
    answers = ["7", r"\frac{1}{2006!}", r"\sqrt{2}", "10^{10^{9}}"]
    found = [sample(boxed(text), answer=answer) for text in texts for answer in answers]
    found += [sample(r"\boxed{" * 20_000), sample("the answer is " * 20_000), sample("#### " * 20_000)]
    return rng.sample(found, len(found))


def mathematics(samples: Sequence[Sample], runs: int, *, rule: Any) -> dict[str, Any]:
    load = getattr(importlib.import_module(rule.__module__), "BEFORE_FORK", {}).get(rule.__name__)
    if load is not None:
        load()
    each = []
    for one in samples:
        begun = time.perf_counter()
        rule(*one)
        each.append(1e6 * (time.perf_counter() - begun))
    with Pool({"math": rule}, workers=2) as pool:
        wall, _ = seconds(partial(pool.score, samples), runs)
        outcomes = [found["math"] for found in pool.score(samples)]
    return {
        "us_median": statistics.median(each),
        "us_95": sorted(each)[int(0.95 * len(each))],
        "us_max": max(each),
        "samples_per_s_pool_of_2": len(samples) / wall,
        "right": sum(outcome.total for outcome in outcomes) / len(outcomes),
        "failed": sum(bool(outcome.failure) for outcome in outcomes),
        "samples": len(samples),
    }


def code(runs: int) -> dict[str, Any]:
    from jaxreason.rewards.code import code_tests

    tests = ["assert add(2, 3) == 5", "assert add(-1, 1) == 0", "assert add('a', 'b') == 'ab'"]
    problem = Problem("0", "Add.", "", metadata={"style": "assert", "setup": "", "tests": tests, "entry_point": "add"})
    texts = [f"```python\ndef add(a, b):\n    return {'a' if i % 4 == 0 else 'a + b'}\n```" for i in range(20)]
    samples = [(problem, Completion(text, (), StopReason.EOS)) for text in texts]
    alone, _ = seconds(lambda: [code_tests(*each) for each in samples], runs)
    with Pool({"code": code_tests}, workers=2, limit_seconds=30.0) as pool:
        wall, _ = seconds(partial(pool.score, samples), runs)
        right = sum(found["code"].total for found in pool.score(samples))
    return {"samples_per_s": 20 / alone, "samples_per_s_pool_of_2": 20 / wall, "right": right / 20}


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    mixes = {"easy": easy, "symbolic": symbolic, "adversarial": adversarial}
    p.add_argument(
        "--only",
        choices=("overhead", "growth", "restart", *(f"math_{name}" for name in mixes), "code", "traced"),
        help="one workload",
    )
    p.add_argument("--rule", default="", help="for mathematical answers: math.math_answer where it exists, else math.gsm8k_answer")
    p.add_argument("--runs", type=int, default=3)
    p.add_argument("--seed", type=int, default=0)
    a = p.parse_args()
    math = importlib.import_module("jaxreason.rewards.math")
    name = a.rule or ("math.math_answer" if hasattr(math, "math_answer") else "math.gsm8k_answer")
    module, _, function = name.partition(".")
    rule = getattr(importlib.import_module(f"jaxreason.rewards.{module}"), function)
    workloads: dict[str, Callable[[], dict[str, Any]]] = {
        "overhead": partial(overhead, a.runs),
        "growth": partial(growth, a.runs),
        "restart": partial(restart, a.runs),
    }
    for mix, make in mixes.items():
        workloads[f"math_{mix}"] = partial(mathematics, make(random.Random(a.seed)), a.runs, rule=rule)
    workloads["code"] = partial(code, a.runs)
    versions = {"jaxreason": jaxreason.__version__, "python": platform.python_version()}
    versions |= {each.metadata["Name"]: each.version for each in metadata.distributions(name="math-verify")}
    for workload, run in workloads.items():
        if a.only in (None, workload):
            out = {key: round(value, 4) if isinstance(value, float) else value for key, value in run().items()}
            told = {"rule": name} if workload.startswith("math") else {}
            print(json.dumps({"bench": f"rewards/{workload}", **out, **told, "versions": versions}), flush=True)
    if a.only in (None, "traced"):
        subprocess.run([sys.executable, Path(__file__).with_name("traced_rules.py")], check=True)


if __name__ == "__main__":
    main()
