"""What must not be lost: a run that was stopped, killed or damaged ends as the undisturbed one, bit for bit.

The first half runs the pipeline in this process and stops it at chosen moments; the second half kills real processes.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from jaxreason import config as configs
from jaxreason.pipelines import experiment as experiments
from jaxreason.pipelines import folder as folders
from jaxreason.pipelines import run as runs
from jaxreason.training.metrics import read_jsonl
from jaxreason.training.profiling import ProfileConfig

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.usefixtures("compiled_once")

CONFIG = Path(__file__).with_name("short_run.py")
SEVERAL_UPDATES = (
    "--config.supervised.phases.base.steps=0",
    "--config.supervised.phases.cold_start.steps=0",
    "--config.online.problems_per_update=2",
    "--config.online.problems_per_microbatch=2",
    "--config.online.epochs=2",
    "--config.checkpoint.every_steps=3",
)


class Recorder:
    """A progress that keeps what it is told."""

    def __init__(self) -> None:
        self.messages: list[str] = []
        self.begun: list[tuple[str, int]] = []

    def stage(self, name: str, total_steps: int, done_steps: int) -> None:
        self.begun.append((name, done_steps))

    def update(self, step: int, metrics: Any) -> None: ...

    def message(self, text: str) -> None:
        self.messages.append(text)

    def close(self) -> None: ...


def train(config: configs.Config, workdir: Path, *, checks: int | None = None) -> tuple[folders.Result, Recorder]:
    """Trains on one device until the run has asked `checks` times whether to stop."""
    asked, progress = 0, Recorder()

    def stop() -> bool:
        nonlocal asked
        asked += 1
        return checks is not None and asked >= checks

    return runs.train(config, workdir, progress=progress, stop=stop, devices=jax.devices()[:1]), progress


def logged(workdir: Path) -> list[dict[str, Any]]:
    """metrics.jsonl without its clocks."""
    lines = read_jsonl(workdir / "metrics.jsonl")
    return [{k: v for k, v in line.items() if not k.startswith(("time/", "throughput/"))} for line in lines]


def newest_checkpoint(folder: Path) -> tuple[int, dict[str, bytes]]:
    """The newest checkpoint's step and every array of it, read by orbax alone."""
    step = max(int(path.name) for path in folder.iterdir() if path.name.isdigit())
    reader, item = ocp.PyTreeCheckpointer(), folder / str(step) / "state"
    wanted = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), dict(reader.metadata(item).item_metadata.tree))
    tree = reader.restore(item, args=ocp.args.PyTreeRestore(restore_args=wanted))
    return step, {jax.tree_util.keystr(path): np.asarray(x).tobytes() for path, x in jax.tree_util.tree_leaves_with_path(tree)}


def assert_same_run(workdir: Path, undisturbed: Path) -> None:
    """Everything that a run leaves behind is the same, but for seconds."""
    assert logged(workdir) == logged(undisturbed)
    for name in ("rollouts.jsonl", "examples.json", "config.json"):
        assert (workdir / name).read_bytes() == (undisturbed / name).read_bytes(), name
    ours, theirs = (json.loads((each / "summary.json").read_text()) for each in (workdir, undisturbed))
    assert ours | {"seconds": 0} == theirs | {"seconds": 0}
    assert ours["before"] and ours["after"]
    names = sorted(path.name for path in (undisturbed / "policy").iterdir())
    assert sorted(path.name for path in (workdir / "policy").iterdir()) == names
    for name in names:
        assert (workdir / "policy" / name).read_bytes() == (undisturbed / "policy" / name).read_bytes(), name
    for stage in (undisturbed / "checkpoints").iterdir():
        assert newest_checkpoint(workdir / "checkpoints" / stage.name) == newest_checkpoint(stage), stage.name
    left = [path.name for path in workdir.iterdir() if path.name.startswith(".") or path.name.endswith(".tmp")]
    assert not left


@pytest.fixture(scope="module")
def short() -> configs.Config:
    return configs.load(str(CONFIG))


@pytest.fixture(scope="module")
def undisturbed(short: configs.Config, tmp_path_factory: pytest.TempPathFactory) -> Path:
    workdir = tmp_path_factory.mktemp("undisturbed")
    result, _ = train(short, workdir)
    assert result.finished
    moved = [line["optimizer/gradient_norm"] for line in logged(workdir) if "optimizer/gradient_norm" in line]
    assert len(moved) == 4 + 6 and min(moved) > 1e-4  # else this file would prove nothing
    return workdir


@pytest.mark.slow
def test_a_run_stopped_again_and_again_is_the_undisturbed_one(short: configs.Config, undisturbed: Path, tmp_path: Path) -> None:
    """Stopped in each phase, at the phases' boundary, after the last supervised step, before and in reinforcement."""
    stops = [  # (checks until the stop, the newest checkpoint of each stage afterwards)
        (3, {"supervised": 3}),  # 6 = 3 + ...
        (1, {"supervised": 4}),  # the first phase's end, after its evaluation
        (2, {"supervised": 6}),  # the stage's end
        (2, {"supervised": 6}),  # held-out completions before reinforcement are written, and no step is done
        (2 + 3, {"supervised": 6, "reinforce": 3}),  # ... 6 = 3 + 3
        (2 + 1, {"supervised": 6, "reinforce": 4}),
    ]
    for checks, reached in stops:
        result, _ = train(short, tmp_path, checks=checks)
        assert not result.finished and not (tmp_path / "summary.json").exists()
        for stage, step in reached.items():
            assert newest_checkpoint(tmp_path / "checkpoints" / stage)[0] == step
        assert reached.keys() == {path.name for path in (tmp_path / "checkpoints").iterdir()}
    result, progress = train(short, tmp_path)
    assert result.finished and progress.begun == [("reinforce", 4)]
    assert_same_run(tmp_path, undisturbed)


@pytest.mark.slow
def test_several_updates_a_step_without_a_supervised_stage(tmp_path: Path) -> None:
    config = configs.load(str(CONFIG), SEVERAL_UPDATES)
    assert config.online.updates_per_step == 4
    assert train(config, tmp_path / "undisturbed")[0].finished

    # killed in the first line that it wrote
    stopped = tmp_path / "stopped"
    assert not train(config, stopped, checks=1)[0].finished
    shutil.rmtree(stopped / "checkpoints", ignore_errors=True)
    (stopped / "examples.json").unlink(missing_ok=True)
    (stopped / "metrics.jsonl").write_text('{"stage": "reinforce", "st')

    assert not train(config, stopped, checks=1 + 3)[0].finished
    assert newest_checkpoint(stopped / "checkpoints" / "reinforce")[0] == 3
    assert train(config, stopped)[0].finished
    assert_same_run(stopped, tmp_path / "undisturbed")


def damage(checkpoint: Path, *, how: str) -> None:
    """Damages a checkpoint's largest file, or leaves it without what is written last."""
    file = max((path for path in checkpoint.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    content = file.read_bytes()
    if how == "truncated":
        file.write_bytes(content[: len(content) // 2])
    elif how == "flipped":
        middle = len(content) // 2
        file.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])
    else:
        checkpoint.with_name(f"{checkpoint.name}.manifest.json").unlink()


def cut_after(file: Path, stage: str, step: int) -> None:
    """Leaves the lines up to this step, and half of the next."""
    stages, lines = ["supervised", "reinforce"], file.read_text().splitlines(keepends=True)
    places = [(stages.index(line["stage"]), line["step"]) for line in map(json.loads, lines)]
    kept = [line for line, place in zip(lines, places, strict=True) if place <= (stages.index(stage), step)]
    file.write_text("".join(kept) + lines[len(kept)][:40])


def killed_while_ending(workdir: Path) -> None:
    """Its last evaluation is written, the old export is aside and the new one half done."""
    (workdir / "summary.json").unlink()
    (workdir / "policy").rename(workdir / ".policy.old")
    (workdir / ".policy.partial").mkdir()
    (workdir / ".policy.partial" / "model.safetensors").write_bytes(b"half")
    (workdir / "summary.json.tmp").write_text('{"phas')


def killed_before_the_last_evaluation_was_kept(workdir: Path) -> None:
    killed_while_ending(workdir)
    examples = json.loads((workdir / "examples.json").read_text())
    (workdir / "examples.json").write_text(json.dumps({"before": examples["before"]}))
    with open(workdir / "rollouts.jsonl", "a") as file:
        file.write('{"stage": "reinfor')


def killed_before_the_first_evaluation_was_kept(workdir: Path) -> None:
    for name in ("summary.json", "examples.json"):
        (workdir / name).unlink()
    shutil.rmtree(workdir / "checkpoints" / "reinforce")
    (workdir / "rollouts.jsonl").unlink()
    cut_after(workdir / "metrics.jsonl", "reinforce", 0)


def killed_in_the_first_save_of_each_stage(workdir: Path) -> None:
    """What orbax wrote is complete, and nothing vouches for it."""
    cut_after(workdir / "metrics.jsonl", "supervised", 4)
    for name in ("summary.json", "examples.json", "rollouts.jsonl"):
        (workdir / name).unlink()
    for old in (workdir / "checkpoints" / "supervised").glob("4*"):
        shutil.rmtree(old) if old.is_dir() else old.unlink()
    damage(workdir / "checkpoints" / "supervised" / "6", how="half-written")
    for old in (workdir / "checkpoints" / "reinforce").glob("4*"):
        shutil.rmtree(old) if old.is_dir() else old.unlink()
    damage(workdir / "checkpoints" / "reinforce" / "6", how="half-written")


def newest_of_both_stages_damaged(workdir: Path) -> None:
    (workdir / "summary.json").unlink()
    damage(workdir / "checkpoints" / "supervised" / "6", how="truncated")
    damage(workdir / "checkpoints" / "reinforce" / "6", how="flipped")


WOUNDS: list[tuple[Callable[[Path], None], list[tuple[str, int]], list[tuple[str, str]]]] = [
    (killed_while_ending, [("reinforce", 6)], []),
    (killed_before_the_last_evaluation_was_kept, [("reinforce", 6)], []),
    (killed_before_the_first_evaluation_was_kept, [("reinforce", 0)], []),
    (killed_in_the_first_save_of_each_stage, [("supervised", 0), ("reinforce", 0)], []),
    (
        newest_of_both_stages_damaged,
        [("supervised", 4), ("reinforce", 4)],
        [
            ("its manifest says", "resuming stage 'supervised' from step 4"),
            ("was altered", "resuming stage 'reinforce' from step 4"),
        ],
    ),
]


@pytest.mark.parametrize(("wound", "begun", "said"), WOUNDS, ids=[wound.__name__ for wound, _, _ in WOUNDS])
def test_what_a_kill_leaves_behind_is_taken_up(
    short: configs.Config,
    undisturbed: Path,
    tmp_path: Path,
    wound: Callable[[Path], None],
    begun: list[tuple[str, int]],
    said: list[tuple[str, str]],
) -> None:
    workdir = tmp_path / "run"
    shutil.copytree(undisturbed, workdir)
    wound(workdir)
    result, progress = train(short, workdir)
    assert result.finished and progress.begun == begun
    refusals = [text for text in progress.messages if " was refused: " in text]
    assert len(refusals) == len(said)
    for refusal, (reason, resumed) in zip(refusals, said, strict=True):
        assert refusal.startswith("Checkpoint 6 was refused: ") and reason in refusal and resumed in progress.messages
    assert_same_run(workdir, undisturbed)


def test_what_a_run_that_was_killed_at_once_leaves_is_no_obstacle(short: configs.Config, tmp_path: Path) -> None:
    """The tokenizer half made and the config half written: the folder is still this run's."""
    (tmp_path / ".tokenizer.partial").mkdir()
    (tmp_path / ".tokenizer.partial" / "tokenizer.json").write_text("{")
    (tmp_path / "config.json.tmp").write_text('{"seed')
    folders.open_folder(short, tmp_path)
    experiment = experiments.build(short, tmp_path, devices=jax.devices()[:1])
    assert experiment.tokenizer.eos_ids and not (tmp_path / ".tokenizer.partial").exists()


def test_a_run_that_failed_before_it_saved_begins_anew_with_a_corrected_config(
    short: configs.Config, undisturbed: Path, tmp_path: Path
) -> None:
    """No checkpoint can be lost, so another config is no mistake; what the failed run wrote down does not stay."""
    failed = dataclasses.replace(short, seed=short.seed + 1)
    tmp_path.joinpath("config.json").write_text(json.dumps(configs.to_dict(failed)))
    tmp_path.joinpath("examples.json").write_text('{"before": []}')
    tmp_path.joinpath("metrics.jsonl").write_text('{"stage": "reinforce", "step": 0, "eval/word_problems/pass@1": 0.5}\n')
    result, _ = train(short, tmp_path)
    assert result.finished
    assert_same_run(tmp_path, undisturbed)


# ------------------------------------------------------------------------------------------------------- real processes


@pytest.fixture(scope="module")
def environment(one_device: dict[str, str]) -> dict[str, str]:
    """One device, and one folder of compiled programs for all processes."""
    return os.environ | one_device | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT), "COLUMNS": "120"}


LONGER = ("--config.supervised.phases.base.steps=8", "--config.online.steps=20", "--config.checkpoint.every_steps=1")


@pytest.fixture(scope="module")
def start(environment: dict[str, str]) -> Callable[..., subprocess.Popen[str]]:
    def start(workdir: Path, *options: str) -> subprocess.Popen[str]:
        words = ["train", "--config", str(CONFIG), "--workdir", str(workdir), *(options or LONGER)]
        return subprocess.Popen(
            [sys.executable, "-m", "jaxreason", *words],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    return start


PARKED = ("--config.sampling.parking.step_tokens=8", "--config.sampling.parking.cache=kept")


@pytest.fixture(scope="module")
def undisturbed_process(start: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, float]:
    """The finished run, and the seconds of such a run between its first and its last line, once its programs are compiled."""
    return undisturbed_run(start, tmp_path_factory.mktemp("undisturbed_process"))


def undisturbed_run(start: Any, workdir: Path, *options: str) -> tuple[Path, float]:
    with start(workdir / "compiling", *options, "--config.online.steps=1") as process:
        said = process.stdout.read()
    assert process.returncode == 0, said
    with start(workdir / "run", *options and (*LONGER, *options)) as process:
        process.stdout.readline()
        begun = time.monotonic()
        said = process.stdout.read()
        seconds = time.monotonic() - begun
    assert process.returncode == 0, said
    return workdir / "run", seconds


@pytest.mark.parametrize(("kills", "seed"), [(2, 0), (5, 1)])
@pytest.mark.slow
def test_kill_9_at_random_moments(start: Any, undisturbed_process: Any, tmp_path: Path, kills: int, seed: int) -> None:
    killed_and_compared(start, *undisturbed_process, tmp_path, kills=kills, seed=seed)


@pytest.mark.slow
def test_kill_9_while_completions_are_parked(start: Any, tmp_path: Path) -> None:
    expected, seconds = undisturbed_run(start, tmp_path / "undisturbed", *PARKED)
    lines = [json.loads(line) for line in (expected / "metrics.jsonl").read_text().splitlines()]
    assert max(line.get("rollout/parked", 0) for line in lines) > 0
    killed_and_compared(start, expected, seconds, tmp_path, *LONGER, *PARKED, kills=4, seed=2)


def killed_and_compared(start: Any, expected: Path, seconds: float, tmp_path: Path, *options: str, kills: int, seed: int) -> None:
    moments = np.random.default_rng(seed)
    story, killed, finished, ended = f"seed {seed}:", 0, 0, False
    while killed < kills or not ended:  # a run that came to its end too early is compared, and another one begun
        workdir = tmp_path / f"run-{finished}"
        with start(workdir, *options) as process:
            said, moment = process.stdout.readline(), moments.uniform(0, 0.6 * seconds)
            if killed < kills:
                time.sleep(moment)
                process.send_signal(signal.SIGKILL)
            said += process.stdout.read()
        story += f"\nended with {process.returncode} (killed {moment:.3f} s after its first line or never), having said:\n{said}"
        ended = process.returncode != -signal.SIGKILL
        if not ended:
            killed += 1
            continue
        assert process.returncode == 0, story
        try:
            assert_same_run(workdir, expected)
        except AssertionError as error:
            raise AssertionError(f"{error}\n{story}") from None
        assert (workdir / "report.html").is_file()
        finished += 1


@pytest.mark.slow
@pytest.mark.parametrize("how", ["truncated", "flipped", "half-written"])
def test_a_damaged_newest_checkpoint_is_reported_and_the_one_before_is_used(
    start: Any, undisturbed_process: Any, tmp_path: Path, how: str
) -> None:
    expected, _ = undisturbed_process
    workdir = tmp_path / "run"
    shutil.copytree(expected, workdir)  # as interrupted right after the last step
    (workdir / "summary.json").unlink()
    damage(workdir / "checkpoints" / "reinforce" / "20", how=how)
    with start(workdir) as process:
        said = process.stdout.read()
    assert process.returncode == 0, said
    reason = {"truncated": "its manifest says", "flipped": "was altered", "half-written": "it is half-written"}[how]
    (sentence,) = [line for line in said.splitlines() if line.startswith("Checkpoint 20 was refused: ")]
    assert reason in sentence
    assert "resuming stage 'reinforce' from step 19" in said
    assert_same_run(workdir, expected)


def test_a_finished_run_says_so_and_does_not_train_again(start: Any, undisturbed_process: Any, tmp_path: Path) -> None:
    """Also where it was killed while it wrote its report, which comes last."""
    workdir = tmp_path / "run"
    shutil.copytree(undisturbed_process[0], workdir)
    (workdir / "report.html").unlink()
    before = {path: path.stat().st_mtime_ns for path in workdir.rglob("*") if path.is_file() and "curves" not in path.parts}
    with start(workdir) as process:
        said = process.stdout.read()
    assert process.returncode == 0 and "This run has ended" in said, said
    assert (workdir / "report.html").stat().st_size > 10_000
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert_same_run(workdir, undisturbed_process[0])


def test_a_workdir_that_cannot_be_used_is_a_sentence(short: configs.Config, undisturbed: Path, tmp_path: Path) -> None:
    changed = configs.from_dict(configs.to_dict(short) | {"seed": 7})
    with pytest.raises(ValueError, match=r"holds a run with config\.seed = 0, and this one has 7: give another --workdir"):
        folders.open_folder(changed, undisturbed)
    mesh = dataclasses.replace(short.mesh, fsdp=4, data=2)
    folders.open_folder(dataclasses.replace(short, mesh=mesh), undisturbed)  # a run goes on on other devices
    folders.open_folder(dataclasses.replace(short, profile=ProfileConfig("3-5")), undisturbed)  # ... and under the profiler
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"not a run's folder and holds 'notes\.txt'"):
        folders.open_folder(short, tmp_path)
    with pytest.raises(ValueError, match="which is a file: give a folder"):
        folders.open_folder(short, tmp_path / "notes.txt")
    with pytest.raises(ValueError, match="which cannot be made"):
        folders.open_folder(short, tmp_path / "notes.txt" / "run")
    with pytest.raises(ValueError, match="'gs:/bucket/run', which is a bucket"):
        folders.open_folder(short, Path("gs://bucket/run"))


def test_a_mistake_in_the_workdir_ends_the_command_with_2(start: Any, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with start(tmp_path / "notes.txt" / "run") as process:
        said = process.stdout.read()
    assert process.returncode == 2 and "Traceback" not in said and len(said.splitlines()) == 1, said
    assert said.startswith("jaxreason: --workdir is '")
