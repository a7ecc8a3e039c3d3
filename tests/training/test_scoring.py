"""Host rules in a run: the same rewards from workers as from the run's own process, and what fails is counted, not lost."""

from __future__ import annotations

import importlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import numpy as np
import pytest

from jaxreason import config as configs
from jaxreason.pipelines import experiment as experiments
from jaxreason.pipelines import run as runs
from jaxreason.rewards import mixture
from jaxreason.rewards.pool import Pool
from jaxreason.training.collect import RulePart, Scoring, make_scoring, score_on_host
from jaxreason.training.metrics import RunLog, read_jsonl
from jaxreason.types import Completion, Problem, Reward, StopReason

ROOT = Path(__file__).parents[2]
CONFIG = str(ROOT / "tests" / "short_run.py")
HOST = [
    "reward.accuracy.rule=math.gsm8k_answer",
    "reward.ended.rule=format.think_answer_format",
    "reward.ended.kwargs={}",
    "supervised.phases.base.steps=0",
    "supervised.phases.cold_start.steps=0",
    "evaluation.every_steps=0",
]
OPTIONS = [f"--config.{each}" for each in HOST]
REASONS = ("timeout", "crash", "memory", "error")


class Silent:
    """A progress that shows nothing."""

    def stage(self, name: str, total_steps: int, done_steps: int) -> None: ...
    def update(self, step: int, metrics: Any) -> None: ...
    def message(self, text: str) -> None: ...
    def close(self) -> None: ...


@pytest.fixture
def bad_rules(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "tests" / "rewards"))
    return importlib.import_module("pool_rules")


def children(pid: int) -> list[int]:
    """Of the main thread, which starts them."""
    return [int(each) for each in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.mark.slow
@pytest.mark.usefixtures("compiled_once")
def test_a_run_is_the_same_with_workers_and_without(tmp_path: Path) -> None:
    before = children(os.getpid())
    lines, rollouts = [], []
    for workers in (0, 2):
        more = [f"--config.scoring.workers={workers}", "--config.online.steps=2", "--config.evaluation.every_steps=1"]
        config, workdir = configs.load(CONFIG, OPTIONS + more), tmp_path / str(workers)
        assert runs.train(config, workdir, progress=Silent(), stop=lambda: False, devices=jax.devices()[:1]).finished
        assert children(os.getpid()) == before
        logged = read_jsonl(workdir / "metrics.jsonl")
        lines.append([{k: v for k, v in line.items() if not k.startswith(("time/", "throughput/"))} for line in logged])
        rollouts.append((workdir / "rollouts.jsonl").read_bytes())
    assert lines[0] == lines[1] and rollouts[0] == rollouts[1]
    for line in lines[0]:
        area = "reward" if "reward/total" in line else "eval/word_problems"
        assert [line[f"{area}/failed/{reason}"] for reason in REASONS] == [0.0] * 4


@pytest.mark.usefixtures("compiled_once")
def test_what_fails_is_counted_and_no_step_is_lost(bad_rules: ModuleType, tmp_path: Path) -> None:
    more = ["--config.online.steps=2", "--config.online.logged_problems=4", "--config.task.kwargs.heldout_size=6"]
    experiment = experiments.build(configs.load(CONFIG, OPTIONS + more), tmp_path / "model", devices=jax.devices()[:1])
    rules = {"accuracy": bad_rules.by_length}

    def shares(rows: list[dict[str, Any]]) -> list[float]:
        """By what is written down of the completions."""
        failed = Counter({0: "timeout", 1: "crash", 2: "error"}[row["length"] % 3] for row in rows if row["length"] < 32)
        assert all(row["reward"]["accuracy"] == float(row["length"] == 32) for row in rows)
        return [failed[reason] / len(rows) for reason in REASONS]

    with Pool(rules, workers=2, limit_seconds=0.2) as pool:
        experiment = experiment._replace(scoring=Scoring({}, rules, {"accuracy": 1.0}, frozenset(), pool))
        params = experiments.initial_params(experiment)
        metrics, rows = experiments.evaluator(experiment)(params)
        assert len(rows) == 6
        assert [metrics[f"eval/word_problems/failed/{reason}"] for reason in REASONS] == pytest.approx(shares(rows))
        told = {"evaluate": lambda params: ({}, []), "log": RunLog(tmp_path), "progress": Silent(), "stop": lambda: False}
        stream, overlong = experiments.training_stream(experiment)
        runs._online(experiment, params, tmp_path, stream=stream, overlong=overlong, **told)
    steps, rollouts = read_jsonl(tmp_path / "metrics.jsonl"), read_jsonl(tmp_path / "rollouts.jsonl")
    assert [line["step"] for line in steps] == [1, 2]
    for line in steps:
        expected = shares([row for row in rollouts if row["step"] == line["step"]])
        assert [line[f"reward/failed/{reason}"] for reason in REASONS] == pytest.approx(expected)
        assert sum(expected) > 0
    assert {reason for line in steps for reason in REASONS if line[f"reward/failed/{reason}"]} >= {"timeout", "crash"}


def test_which_completions_a_rule_is_asked_about(bad_rules: ModuleType) -> None:
    problems = [Problem(str(i), "", "5") for i in range(3)]
    groups = [[Completion("x", (0,) * n, StopReason.EOS) for n in (32, 31)] for _ in problems]
    with Pool({"a": bad_rules.by_length}, workers=1) as pool:
        scores = score_on_host(Scoring({}, pool.rules, {"a": 1.0}, frozenset(), pool), problems, groups, [True, False, True])
    np.testing.assert_array_equal(scores.parts["a"], [[1, 0], [0, 0], [1, 0]])
    np.testing.assert_array_equal(scores.failed["crash"], [[False, True], [False, False], [False, True]])
    assert scores.shares() == {"timeout": 0.0, "crash": 0.5, "memory": 0.0, "error": 0.0}
    none = score_on_host(Scoring({}, pool.rules, {"a": 1.0}, frozenset()), problems, groups, [False] * 3)
    assert set(none.shares().values()) == {0.0}
    assert score_on_host(Scoring({}, {}, {}, frozenset()), problems, groups) == ({}, {}, pytest.approx(np.ones((3, 2), bool)))


def test_a_rule_that_fails_on_every_completion_ends_the_run() -> None:
    def rule(problem: Problem, completion: Completion) -> Reward:
        raise ValueError("the library is missing: install it")

    problems, group = [Problem("0", "", "5")], [Completion("x", (), StopReason.EOS)] * 2
    scoring = Scoring({}, {"accuracy": rule}, {"accuracy": 1.0}, frozenset())
    sentence = "the rule of config.reward.accuracy fails on every completion: ValueError: the library is missing"
    with pytest.raises(ValueError, match=sentence):
        score_on_host(scoring, problems, [group])
    assert score_on_host(scoring, problems, [group[:1]]).shares()["error"] == 1.0  # of one nobody can tell


def test_a_task_whose_rule_needs_settings_is_told() -> None:
    part = RulePart("task", kwargs={"gsm8k": "language.language_consistency"})
    sentence = (
        "config.reward.a.kwargs.gsm8k is 'language.language_consistency', which needs language, and a task's rule is given no"
    )
    with pytest.raises(ValueError, match=sentence):
        make_scoring({"a": part}, vocabulary=[b"a"], eos_ids=[0])


def test_a_group_rule_that_hangs_ends_or_raises_costs_its_group_alone(bad_rules: ModuleType) -> None:
    names = ["fine", "hangs", "ends", "raises", "fine too"]
    groups = [[Completion("x", (0,), StopReason.EOS)] * 2 for _ in names]
    traced = {"a": np.asarray([[1.0, np.nan]] * 5, np.float32)}
    rules = {"g": bad_rules.of_a_group}
    with Pool({"g": mixture.OfGroup(rules["g"])}, workers=1, limit_seconds=0.3) as pool:
        scoring = Scoring({}, {}, {"a": 1.0, "g": 1.0}, frozenset(), group=rules, group_pool=pool)
        scores = score_on_host(scoring, [Problem(name, "", "") for name in names], groups, traced=traced)
        np.testing.assert_array_equal(scores.parts["g"], [[1, np.nan], [0, 0], [0, 0], [0, 0], [1, np.nan]])
        assert scores.shares() == {"timeout": 0.2, "crash": 0.2, "memory": 0.0, "error": 0.2}
        with pytest.raises(ValueError, match="the rule of config.reward.g fails on every group: ValueError: not this one"):
            score_on_host(scoring, [Problem("raises", "", "")] * 5, groups, traced=traced)


TWO = """
import sys
import jax
jax.distributed.initialize(f"localhost:{sys.argv[2]}", 2, int(sys.argv[1]))
import numpy as np
from jaxreason.training.collect import Scoring, score_on_host
from jaxreason.types import Completion, Problem, Reward, StopReason

asked = []

def rule(problem, completion):
    asked.append(problem.id)
    if problem.id in sys.argv[3]:
        raise ValueError("not this one")
    return Reward(float(problem.id))

keeper = np.asarray([0, 1, 1, 0, 1])
own = [str(i) for i in np.flatnonzero(keeper == jax.process_index())]
group = [Completion("x", (), StopReason.EOS)] * 2
score = lambda ids, by: score_on_host(
    Scoring({}, {"a": rule}, {"a": 1.0}, frozenset()), [Problem(i, "", "") for i in ids], [group] * len(ids), keeper=by, size=2
)
try:
    scores = score(own, keeper)
    print(asked, scores.parts["a"][:, 0].tolist(), scores.failed["error"][:, 1].tolist(), scores.shares()["error"])
    print(score(own if jax.process_index() else [], np.ones(3, int)).parts["a"].shape)
except ValueError as error:
    print(error)
"""


@pytest.mark.slow
@pytest.mark.parametrize("failing", ["23", "01234"])
def test_each_process_scores_its_own_rows_and_all_see_the_same(one_device: dict[str, str], failing: str) -> None:
    """Also where one of them has no row, and a rule is useless only where it fails in all of them."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    environment = os.environ | one_device | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    commands = [[sys.executable, "-c", TWO, str(process), port, failing] for process in range(2)]
    processes = [subprocess.Popen(each, env=environment, stdout=subprocess.PIPE, text=True) for each in commands]
    said = [[line for line in each.communicate(timeout=120)[0].splitlines() if "Gloo" not in line] for each in processes]
    if failing == "01234":
        assert said == [["the rule of config.reward.a fails on every completion: ValueError: not this one"]] * 2
        return
    all_see = "[0.0, 1.0, 0.0, 0.0, 4.0] [False, False, True, True, False] 0.4"
    assert said == [["['0', '0', '3', '3'] " + all_see, "(3, 2)"], ["['1', '1', '2', '2', '4', '4'] " + all_see, "(3, 2)"]]


# ------------------------------------------------------------------------------------------------------- the command's signals


@pytest.fixture
def command(one_device: dict[str, str], tmp_path: Path) -> Iterator[tuple[subprocess.Popen[str], set[int]]]:
    """A run of many steps in a process group of its own, and its pool's processes, which are at work."""
    words = ["train", "--config", CONFIG, "--workdir", str(tmp_path / "run"), *OPTIONS, "--config.online.steps=100000"]
    environment = os.environ | one_device | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        [sys.executable, "-m", "jaxreason", *words],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        process_group=0,
    )
    try:
        deadline, metrics = time.monotonic() + 120, tmp_path / "run" / "metrics.jsonl"
        while not metrics.exists() or len(metrics.read_text().splitlines()) < 3:
            assert process.poll() is None and time.monotonic() < deadline, process.communicate()[0]
            time.sleep(0.02)
        servers = [pid for pid in children(process.pid) if children(pid)]
        yield process, {*servers, *(worker for server in servers for worker in children(server))}
    finally:
        process.kill()
        process.wait()


def gone(pids: set[int]) -> bool:
    deadline = time.monotonic() + 20
    while any(Path(f"/proc/{pid}/cmdline").exists() and Path(f"/proc/{pid}/cmdline").read_bytes() for pid in pids):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


@pytest.mark.skipif(sys.platform != "linux", reason="looks into the processes through /proc")
@pytest.mark.parametrize(
    "number",
    [signal.SIGTERM, *(pytest.param(each, marks=pytest.mark.slow) for each in (signal.SIGINT, signal.SIGKILL))],
)
def test_a_run_that_is_interrupted_leaves_no_worker(command: Any, number: signal.Signals) -> None:
    """To all of the run, as a terminal or a batch system sends it: the step is finished and saved, and nobody stays."""
    process, pids = command
    assert len(pids) == 3
    os.killpg(process.pid, number)
    if number != signal.SIGKILL:
        for pid in pids:  # as a batch system does, which knows of no groups
            os.kill(pid, number)
    said, _ = process.communicate()
    assert process.returncode == (-number if number == signal.SIGKILL else 75), said
    assert "Traceback" not in said
    assert gone(pids)
