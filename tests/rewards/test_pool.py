"""Rules that hang, crash and eat memory, in real processes with real signals: each costs its own sample and nothing else."""

from __future__ import annotations

import gc
import importlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import ModuleType

import pytest

from jaxreason.rewards import format, math
from jaxreason.rewards.mixture import ByTask
from jaxreason.rewards.pool import Pool, Sample, score_here
from jaxreason.rewards.pool_messages import Inbox, Message, Outcome, decode, encode
from jaxreason.types import Completion, Problem, Reward, StopReason

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="looks into the processes through /proc")


@pytest.fixture(autouse=True)
def nothing_hangs() -> Iterator[None]:
    """What is tested is that waiting ends."""

    def late(number: int, frame: object) -> None:
        raise AssertionError("not done within two minutes")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(120)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.fixture
def rules(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(HERE))
    return importlib.import_module("pool_rules")


def sample(text: str, number: int = 0) -> Sample:
    return Problem(str(number), "What is 2 + 3?", "5"), Completion(text, (1, 2, 3), StopReason.EOS)


def until(condition: Callable[[], object]) -> None:
    while not condition():
        time.sleep(0.01)


def children(pid: int) -> set[int]:
    """Of all threads, zombies among them."""
    found = set()
    for each in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = each.read_text().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(fields[1]) == pid:
            found.add(int(each.parent.name))
    return found


def runs(pid: int) -> bool:
    """Whether it is there and no zombie: an orphan's reaper is not ours to wait for."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


# ------------------------------------------------------------------------------------------------------------------ outcomes


def test_two_thousand_of_which_some_hang_crash_or_eat_memory(rules: ModuleType) -> None:
    bad = {7: "hang", 3: "exit", 13: "segfault", 17: "eat", 19: "gulp"}  # one of each in every hundred
    expected = {"hang": "timeout", "exit": "crash", "segfault": "crash", "eat": "memory", "gulp": "memory"}
    texts = [bad.get(number % 100, "x" * (number % 50)) for number in range(2000)]
    with Pool({"told": rules.does_as_told}, workers=2, limit_seconds=0.2, memory_mb=256) as pool:
        outcomes = [parts["told"] for parts in pool.score([sample(text, i) for i, text in enumerate(texts)])]
    for text, outcome in zip(texts, outcomes, strict=True):
        if text in expected:
            assert (outcome.reward, outcome.failure) == (None, expected[text]), (text, outcome)
        else:
            assert outcome == Outcome(Reward(float(len(text))))
    assert sum(bool(outcome.failure) for outcome in outcomes) == 100


@pytest.mark.parametrize("workers", [1, 3])
def test_the_same_as_in_this_process(rules: ModuleType, workers: int) -> None:
    rules_by_name = {"length": rules.length, "format": format.think_answer_format, "math": math.gsm8k_answer}
    texts = [f"<think>\ud800{'é' * i}</think><answer>{i % 7}</answer>" for i in range(100)] + ["y" * 1_000_000, "", "\0"]
    samples = [sample(text, i) for i, text in enumerate(texts)]
    expected = score_here(rules_by_name, samples)
    assert {parts["math"].total for parts in expected} == {0.0, 1.0}
    with Pool(rules_by_name, workers=workers) as pool:
        assert pool.score(samples) == expected
        assert pool.score(samples[::-1]) == expected[::-1]
        assert pool.score([]) == []
    with Pool(rules_by_name, workers=0) as pool:
        assert pool.score(samples) == expected


def test_one_rule_that_fails_leaves_the_others_of_its_sample(rules: ModuleType) -> None:
    with Pool({"a": rules.length, "b": rules.does_as_told, "c": rules.length}, workers=1, limit_seconds=0.2) as pool:
        samples = [sample(text) for text in ("fine", "hang", "exit", "raise", "sys.exit", "nothing", "fine")]
        found = pool.score(samples)
    assert [parts["b"].failure for parts in found] == ["", "timeout", "crash", "error", "error", "error", ""]
    for (_, completion), parts in zip(samples, found, strict=True):
        assert parts["a"] == parts["c"] == Outcome(Reward(float(len(completion.text)), {"tokens": 1.5, "absent": None}))
    details = [parts["b"].detail for parts in found]
    assert details[1:6] == [
        "no answer within 0.2 s",
        "exit code 0",
        "LookupError: no such thing",
        "SystemExit: 0",
        "TypeError: the rule returned NoneType, expected a Reward",
    ]


def test_what_ends_a_process_is_told(rules: ModuleType) -> None:
    with Pool({"told": rules.does_as_told}, workers=1, memory_mb=256) as pool:
        found = pool.score([sample(text) for text in ("segfault", "abort", "eat", "gulp")])
    assert [(parts["told"].failure, parts["told"].detail) for parts in found] == [
        ("crash", "SIGSEGV"),
        ("crash", "SIGABRT"),
        ("memory", "MemoryError"),
        ("memory", "MemoryError"),
    ]


def test_nobody_pays_for_what_others_left_behind(rules: ModuleType) -> None:
    """Sixteen MiB a sample stay, and a worker has a hundred: whoever meets the end is asked again in a new worker."""
    with Pool({"told": rules.does_as_told}, workers=2, memory_mb=100) as pool:
        found = pool.score([sample("leak") for _ in range(40)])
    assert [parts["told"].failure for parts in found] == [""] * 40


def test_killed_by_the_system_is_out_of_memory(rules: ModuleType, tmp_path: Path) -> None:
    with Pool({"told": rules.does_as_told}, workers=1, limit_seconds=60) as pool:
        file = tmp_path / "pid"
        started = pool.start([sample(f"told:{file}"), sample("fine")])
        until(lambda: file.exists() and file.read_text())
        assert int(Path(f"/proc/{file.read_text()}/oom_score_adj").read_text()) == 1000  # so that it is a worker who goes
        os.kill(int(file.read_text()), signal.SIGKILL)
        found = pool.wait(started)
    assert [parts["told"].failure for parts in found] == ["memory", ""]


def test_a_process_that_the_rule_started_ends_with_it(rules: ModuleType, tmp_path: Path) -> None:
    file = tmp_path / "pid"
    with Pool({"told": rules.does_as_told}, workers=1, limit_seconds=0.5) as pool:
        assert pool.score([sample(f"child:{file}")])[0]["told"].failure == "timeout"
        until(lambda: not runs(int(file.read_text())))


def test_a_machine_that_pauses_makes_no_time_outs(rules: ModuleType) -> None:
    with Pool({"told": rules.does_as_told, "where": rules.where}, workers=1, limit_seconds=0.5) as pool:
        worker = pool.score([sample("fine")])[0]["where"].reward
        assert worker is not None
        pids = [int(worker.parts[name] or 0) for name in ("parent", "pid")]
        started = pool.start([sample("sleep:0.4")])
        time.sleep(0.1)
        for pid in pids:
            os.kill(pid, signal.SIGSTOP)
        time.sleep(1.0)
        for pid in pids:
            os.kill(pid, signal.SIGCONT)
        assert pool.wait(started)[0]["told"].failure == ""


# ----------------------------------------------------------------------------------------------------------------- processes


def test_workers_hold_neither_jax_nor_numpy_nor_anyones_files(rules: ModuleType, tmp_path: Path) -> None:
    assert "jax" in sys.modules
    with open(tmp_path / "ours", "w") as ours, Pool({"m": rules.modules, "f": rules.open_files}, workers=2) as pool:
        os.set_inheritable(ours.fileno(), True)
        for found in pool.score([sample("x")] * 20):
            modules, files = found["m"].reward, found["f"].reward
            assert modules is not None and files is not None
            assert not modules.parts.keys() & {"jax", "jaxlib", "numpy", "multiprocessing"} and "pool_rules" in modules.parts
            assert [name.partition(":")[0] for name in files.parts] == ["socket"]


def test_what_rules_need_is_loaded_once_before_the_fork(rules: ModuleType) -> None:
    with Pool({"where": rules.where}, workers=2, limit_seconds=0.3) as pool:
        found = [parts["where"] for parts in pool.score([sample("hang" if i % 10 == 0 else "x") for i in range(40)])]
    rewards = [outcome.reward for outcome in found if outcome.reward is not None]
    assert len(rewards) == 36
    assert {(reward.parts["times"], reward.parts["loaded"]) for reward in rewards} == {(1.0, rewards[0].parts["parent"])}
    assert len({reward.parts["pid"] for reward in rewards}) > 2
    assert rewards[0].parts["parent"] != os.getpid()
    with Pool({"first": rules.First({"a": partial(rules.where), "b": rules.length})}, workers=1) as pool:
        (parts,) = pool.score([sample("x")])
    assert parts["first"].reward is not None and parts["first"].reward.parts["times"] == 1.0


def test_batches_may_be_awaited_in_any_order(rules: ModuleType) -> None:
    with Pool({"length": rules.length}, workers=2) as pool:
        first, second, third = (pool.start([sample("x" * n, n) for n in range(start, start + 20)]) for start in (0, 20, 40))
        for begin, started in ((40, third), (0, first), (20, second)):
            assert [parts["length"].total for parts in pool.wait(started)] == list(range(begin, begin + 20))


def test_a_server_that_is_killed_is_replaced(rules: ModuleType) -> None:
    before = children(os.getpid())
    with Pool({"length": rules.length, "told": rules.does_as_told}, workers=2) as pool:
        started = pool.start([sample("sleep:0.02") for _ in range(30)])
        (server,) = children(os.getpid()) - before
        until(lambda: len(children(server)) == 2)
        workers = children(server)
        time.sleep(0.1)
        os.kill(server, signal.SIGKILL)
        assert [parts["told"].total for parts in pool.wait(started)] == [10.0] * 30
        until(lambda: not any(map(runs, workers)))
        assert server not in children(os.getpid())


def test_closing_ends_all_and_leaves_nothing_open(rules: ModuleType) -> None:
    before, files = children(os.getpid()), os.listdir("/proc/self/fd")
    pool = Pool({"told": rules.does_as_told}, workers=3, limit_seconds=1000)
    for _ in range(2):  # it can be used again
        pool.start([sample("hang")] * 10)
        (server,) = children(os.getpid()) - before
        until(lambda server=server: len(children(server)) == 3)
        workers = children(server)
        pool.close()
        assert children(os.getpid()) == before and os.listdir("/proc/self/fd") == files
        until(lambda workers=workers: not any(map(runs, workers)))
    pool.close()


def test_a_pool_that_nobody_closes_ends_with_its_last_reference(rules: ModuleType) -> None:
    before, files = children(os.getpid()), os.listdir("/proc/self/fd")
    pool = Pool({"told": rules.does_as_told}, workers=1)
    pool.score([sample("x")])
    assert children(os.getpid()) != before
    del pool
    gc.collect()
    assert children(os.getpid()) == before and os.listdir("/proc/self/fd") == files


# ------------------------------------------------------------------------------------------------------------------- signals

PROGRAM = """
import sys
sys.path.insert(0, sys.argv[1])
import pool_rules
from jaxreason.rewards.pool import Pool
from jaxreason.types import Completion, Problem, StopReason
if __name__ == "__main__":
    sample = lambda text: (Problem("0", "", ""), Completion(text, (), StopReason.EOS))
    with Pool({"told": pool_rules.does_as_told}, workers=2, limit_seconds=float(sys.argv[3])) as pool:
        for parts in pool.score([sample(text) for text in sys.argv[4:]]):
            print(parts["told"].failure or parts["told"].total, flush=True)
"""


def program(limit: float, *texts: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", PROGRAM, str(HERE), "", str(limit), *texts]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )


def family(process: subprocess.Popen[str]) -> set[int]:
    """The server of a program and its two workers, when they are there."""
    until(lambda: (found := children(process.pid)) and len(children(next(iter(found)))) == 2)
    (server,) = children(process.pid)
    return {server} | children(server)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_whatever_ends_the_program_ends_its_workers(rules: ModuleType, tmp_path: Path, number: signal.Signals) -> None:
    """While both hang, and whether it can clean up (SIGINT) or not."""
    files = [tmp_path / "one", tmp_path / "two"]
    process = program(1000, *(f"told:{file}" for file in files))
    until(lambda: all(file.exists() for file in files))
    pids = family(process)
    process.send_signal(number)
    assert process.wait() != 0
    until(lambda: not any(map(runs, pids)))
    process.communicate()


def test_signals_to_everybody_leave_the_workers_at_work(rules: ModuleType, tmp_path: Path) -> None:
    """As a batch system sends them: the program decides when to end, and its step's rewards are to be right."""
    file = tmp_path / "one"
    process = program(1.5, "sleep:0.5", "sleep:0.5", f"told:{file}", "fine")
    until(file.exists)
    for pid in family(process):
        os.kill(pid, signal.SIGINT)
        os.kill(pid, signal.SIGTERM)
    said, errors = process.communicate()
    assert (said.split(), errors, process.returncode) == (["9.0", "9.0", "timeout", "4.0"], "", 0)


# ------------------------------------------------------------------------------------------------------------------ mistakes


def test_mistakes_are_one_sentence(rules: ModuleType) -> None:
    for settings, sentence in (
        ({"workers": -1}, "workers is -1: expected 1 or more, or 0"),
        ({"limit_seconds": 0.0}, "limit_seconds is 0.0: expected more than 0"),
        ({"limit_seconds": float("nan")}, "limit_seconds is nan: expected more than 0"),
        ({"memory_mb": -1}, "memory_mb is -1: expected 1 or more MiB, or 0"),
    ):
        with pytest.raises(ValueError, match=f"^{sentence}"):
            Pool({"length": rules.length}, **settings)
    with pytest.raises(ValueError, match="the pool has no rules"):
        Pool({})
    with pytest.raises(ValueError, match="rule 'mine' cannot be sent to a worker process .*workers to 0"):
        Pool({"mine": lambda problem, completion: Reward(1.0)})
    problem = Problem("train/7", "", "", metadata={"function": lambda: 0})
    with Pool({"length": rules.length}) as pool, pytest.raises(ValueError, match="problem 'train/7' or its completion cannot"):
        pool.score([(problem, sample("")[1])])


def test_a_rule_that_no_worker_can_have_is_told(rules: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    before, files = children(os.getpid()), os.listdir("/proc/self/fd")
    with_jax = importlib.import_module("pool_rules_with_jax").rule
    for rule, sentence in (
        (with_jax, "rule 'mine' imports jax, .*set workers to 0"),
        (rules.needs_an_extra, r"rule 'mine': math needs math-verify: install jaxreason\[math\]"),
        (partial(rules.needs_an_extra, settings=1), r"rule 'mine': math needs math-verify"),
    ):
        with Pool({"fine": rules.length, "mine": rule}) as pool:
            with pytest.raises(ValueError, match=sentence):
                pool.score([sample("x")] * 1000)
    monkeypatch.setattr(rules.length, "__module__", "__main__")
    monkeypatch.setattr(sys.modules["__main__"], "length", rules.length, raising=False)
    with Pool({"mine": rules.length}) as pool, pytest.raises(ValueError, match="rule 'mine' cannot be loaded .*main file"):
        pool.score([sample("x")])
    assert children(os.getpid()) == before and os.listdir("/proc/self/fd") == files


def test_messages_survive_any_cut() -> None:
    outcomes = [Outcome(Reward(0.1 + 0.2, {"é\ud800": None, "b": -0.0})), Outcome(None, "error", "\n"), Outcome(Reward(1e308))]
    messages = [Message(2**40 + i, i, encode(outcome)) for i, outcome in enumerate(outcomes)]
    sent = b"".join(message.framed() for message in messages)
    for step in (1, 2, 5, 17, len(sent)):
        inbox = Inbox()
        found = [message for at in range(0, len(sent), step) for message in inbox.messages(sent[at : at + step])]
        assert found == messages
        assert [decode(message.body) for message in found] == outcomes
    with pytest.raises(ValueError, match="expected 4 at most"):
        Inbox().messages(sent, longest=4)


def test_a_rule_with_a_limit_of_its_own_has_time_to_keep_it(rules: ModuleType) -> None:
    """Alone, with another limit given, and as one of several tasks' rules."""
    given = {"late": rules.sleeps, "later": partial(rules.sleeps, limit_seconds=60.0), "of_tasks": ByTask({"": rules.sleeps})}
    problem, completion = sample("0.7")
    with Pool(given, workers=1, limit_seconds=0.2) as pool:
        (parts,) = pool.score([(problem, completion)])
        assert [each.failure for each in parts.values()] == [""] * 3
        (parts,) = pool.score([sample("1.5")])
    assert [each.failure for each in parts.values()] == ["timeout", "", "timeout"]
