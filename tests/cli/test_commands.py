"""The commands as a person meets them: real processes, a tiny run, and every mistake a sentence."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from jaxreason import config as schema
from jaxreason.cli.main import main
from jaxreason.pipelines import folder as folders

TINY = ("--config", "quickstart:tiny")
NAMES = ("train", "evaluate", "sample", "report", "export", "play", "grade", "contamination", "configs")


@pytest.fixture(scope="session")
def environment(one_device, tmp_path_factory) -> dict[str, str]:
    """One device, one cache of compiled programs, and nobody's home folder."""
    kept = {name: value for name, value in os.environ.items() if name != "FORCE_COLOR"}
    return kept | one_device | {"COLUMNS": "100", "HOME": str(tmp_path_factory.mktemp("home"))}


@pytest.fixture(scope="session")
def jaxreason(environment):
    def run(*words: str | Path, stdin: str = "", code: int = 0) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "jaxreason", *map(str, words)]
        done = subprocess.run(command, env=environment, input=stdin, capture_output=True, text=True, timeout=300)
        assert done.returncode == code, f"{command}\n{done.stdout}\n{done.stderr}"
        assert "Traceback" not in done.stderr
        return done

    return run


SEVERAL = """
import contextlib, io, json, sys
from jaxreason.cli.main import main
ended = []
for words in json.loads(sys.argv[1]):
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        code = main(words)
    ended.append((words, code, out.getvalue(), err.getvalue()))
print(json.dumps(ended))
"""


@pytest.fixture(scope="session")
def several(environment):
    """Commands one after the other in one process, which takes a second to import what they need."""

    def run(*commands: tuple[str | Path, ...], code: int = 0) -> list[subprocess.CompletedProcess[str]]:
        words = json.dumps([list(map(str, command)) for command in commands])
        done = subprocess.run([sys.executable, "-c", SEVERAL, words], env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        ended = [subprocess.CompletedProcess(*each) for each in json.loads(done.stdout)]
        assert [each.returncode for each in ended] == [code] * len(commands), ended
        assert not any("Traceback" in each.stderr for each in ended)
        return ended

    return run


@pytest.fixture(scope="session")
def finished(jaxreason, tmp_path_factory) -> Path:
    """The folder of a tiny run that has ended; tests only read it."""
    folder = tmp_path_factory.mktemp("runs") / "finished"
    done = jaxreason("train", *TINY, "--workdir", folder, "--config.seed=5")
    assert "Report:" in done.stdout and "reinforce 2/2" in done.stdout
    return folder


def sentence(done: subprocess.CompletedProcess[str]) -> str:
    """What a mistake is answered with: one line on standard error."""
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith("jaxreason: "), line
    return line


# ----------------------------------------------------------------------------------------------------- help, mistyping


def loaded(*words: str) -> tuple[int, set[str], str]:
    """(exit code, top-level packages loaded, what was printed) of a command, in a fresh interpreter."""
    script = (
        "import sys\nfrom jaxreason.cli.main import main\n"
        "try:\n    code = main(sys.argv[1:])\nexcept SystemExit as left:\n    code = left.code\n"
        "print('\\x00', code, *{name.split('.')[0] for name in sys.modules})"
    )
    done = subprocess.run([sys.executable, "-c", script, *words], capture_output=True, text=True, timeout=60)
    printed, _, after = done.stdout.partition("\x00")
    code, *modules = after.split()
    return int(code), set(modules), printed + done.stderr


@pytest.mark.parametrize("name", NAMES)
def test_help_answers_at_once_and_is_enough(name):
    code, modules, printed = loaded(name, "--help")
    assert code == 0 and not modules & {"jax", "jaxlib", "numpy", "flax"}
    assert f"jaxreason {name}" in printed.split("example:")[1]  # a command to copy
    for option in re.findall(r"^  (--?[\w-]+|[A-Z]+)(?: [A-Z:]+)?(?:  +(.*))?$", printed, re.MULTILINE):
        assert option


def test_the_top_help_names_every_command():
    code, _, printed = loaded("--help")
    assert code == 0 and [name for name in NAMES if not re.search(rf"^    {name}( |$)", printed, re.MULTILINE)] == []
    assert "jaxreason train --config quickstart" in printed


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ([], "usage: jaxreason"),
        (["train"], "usage: jaxreason train"),
        (["train"], "--config, --workdir"),
        (["trian"], "invalid choice: 'trian'"),
        (["train", *TINY, "--workdir", "x", "--widget"], "--widget is not an option of 'train': see jaxreason train --help"),
        (["train", *TINY, "--workdir", "x", "--config.seed", "3"], "--config.seed has no value: write --config.seed=VALUE"),
        (["sample", "x", "--config.seed=3"], "--config.seed=3 is not an option of 'sample'"),
        (["sample", "x", "--n", "many"], "argument --n: invalid int value: 'many'"),
        (["export", "x"], "OUT"),
    ],
)
def test_mistyped_words_are_answered_at_once(words, says):
    code, modules, printed = loaded(*words)
    assert code == 2 and says in printed and "Traceback" not in printed
    assert not modules & {"jax", "jaxlib", "numpy"}


def test_module_and_console_script_are_the_same():
    script = Path(sys.executable).with_name("jaxreason")
    if not script.is_file():
        pytest.skip("needs an installed jaxreason; the environment runs it from the checkout")
    for words in (["--version"], ["train"], ["--help"]):
        one, other = (
            subprocess.run([*program, *words], capture_output=True, text=True, timeout=60)
            for program in ([script], [sys.executable, "-m", "jaxreason"])
        )
        assert (one.returncode, one.stdout, one.stderr) == (other.returncode, other.stdout, other.stderr)


def test_configs_and_a_reader_who_leaves(jaxreason, environment):
    listed = jaxreason("configs").stdout.splitlines()
    assert [line.split()[0] for line in listed] == sorted(line.split()[0] for line in listed)
    assert any(line.startswith("quickstart ") and len(line) > 40 for line in listed)
    with subprocess.Popen(
        [sys.executable, "-m", "jaxreason", "configs"], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        process.stdout.close()  # as `head` does, before anything was written
        assert process.stderr.read() == ""
    assert process.returncode != 0


# ---------------------------------------------------------------------------------------------------------------- train


MISTAKES = [
    (["--config", "quikstart"], "--config is 'quikstart'"),
    ([*TINY, "--config.online.stps=3"], "config.online has no key 'stps': did you mean 'steps'?"),
    ([*TINY, "--config.online.steps=x"], "config.online.steps is 'x': expected a whole number"),
    ([*TINY, "--config.mesh.tensor=2"], "config.mesh"),
    ([*TINY, "--config.model.architecture.heads=3"], "config.model.architecture.kv_heads is 2"),
    ([*TINY, "--processes", "2"], "--coordinator, --processes and --process go together"),
]


@pytest.fixture(scope="session")
def mistaken(several, tmp_path_factory):
    folders = [tmp_path_factory.mktemp("mistaken") / "run" for _ in MISTAKES]
    commands = [("train", *words, "--workdir", folder) for (words, _), folder in zip(MISTAKES, folders, strict=True)]
    return list(zip(several(*commands, code=2), folders, strict=True))


@pytest.mark.parametrize("number", range(len(MISTAKES)), ids=[says for _, says in MISTAKES])
def test_a_mistake_is_a_sentence_and_leaves_nothing_behind(mistaken, number):
    done, folder = mistaken[number]
    assert MISTAKES[number][1] in sentence(done)
    assert not (folder / "config.json").exists()


def test_folders_that_are_not_this_run(jaxreason, finished, tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").write_bytes(b"")
    assert "holds 'cat.jpg'" in sentence(jaxreason("train", *TINY, "--workdir", tmp_path / "photos", code=2))
    assert [entry.name for entry in (tmp_path / "photos").iterdir()] == ["cat.jpg"]
    told = sentence(jaxreason("train", *TINY, "--workdir", finished, code=2))
    assert "config.seed = 5, and this one has 0" in told and "another --workdir" in told


def test_a_run_leaves_finite_numbers_of_every_step_and_a_policy(finished):
    logged = [json.loads(line) for line in (finished / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    assert all(math.isfinite(value) for line in logged for value in line.values() if not isinstance(value, str))
    assert [line["step"] for line in logged if line["stage"] == "reinforce" and "time/step" in line] == [1, 2]
    summary = json.loads((finished / "summary.json").read_text(encoding="utf-8"))
    assert set(summary) >= {"before", "after", "seconds"} and (finished / "policy" / "model.safetensors").is_file()
    assert folders.read_config(finished) == schema.load("quickstart:tiny", ["--config.seed=5"])


def test_a_run_that_has_ended_is_shown_again(jaxreason, finished):
    before = {file: file.stat().st_mtime_ns for file in finished.rglob("*") if file.is_file()}
    done = jaxreason("train", *TINY, "--workdir", finished, "--config.seed=5")
    assert "This run has ended" in done.stdout and "word_problems/pass@1" in done.stdout
    assert {file: file.stat().st_mtime_ns for file in finished.rglob("*") if file.is_file()} == before


# -------------------------------------------------------------------------------------------------- what reads a folder


@pytest.mark.parametrize("name", ["evaluate", "sample", "report", "export"])
def test_a_folder_that_is_no_run(tmp_path, capsys, name):
    def told(folder: Path) -> str:
        assert main([name, str(folder), *(["out"] if name == "export" else [])]) == 2  # in this process: nothing is computed
        return capsys.readouterr().err

    (tmp_path / "empty").mkdir()
    for folder in ("nothing", "empty"):
        assert re.fullmatch(rf"jaxreason: '.*{folder}'.*give.*\n", told(tmp_path / folder))
    assert [entry.name for entry in tmp_path.rglob("*")] == ["empty"]


def test_a_run_without_a_checkpoint_and_a_damaged_config(several, finished, tmp_path):
    begun, damaged = tmp_path / "begun", tmp_path / "damaged"
    begun.mkdir()
    shutil.copy(finished / "config.json", begun)
    shutil.copytree(finished / "tokenizer", begun / "tokenizer")
    shutil.copytree(begun, damaged)
    (damaged / "config.json").write_text('{"seed": 1')
    told = several(*(("evaluate", folder) for folder in (begun, damaged, finished / "policy")), code=2)
    assert f"'{begun}' has no checkpoint yet" in sentence(told[0])
    assert "config.json is not valid JSON" in sentence(told[1])
    assert "is a model's folder, which names no problems" in sentence(told[2])


def test_evaluate_says_what_the_summary_says(several, finished, tmp_path):
    command = ("evaluate", finished, "--out", tmp_path / "out")
    told, again = (done.stdout for done in several(command, command))
    summary = json.loads((finished / "summary.json").read_text(encoding="utf-8"))
    assert "stage 'reinforce', step 2; 8 held-out problems, greedy" in told and "pass@1" in told
    results = json.loads((tmp_path / "out" / "results.json").read_text(encoding="utf-8"))
    numbers = results["greedy"]["all"]["all"]
    for name, value in summary["after"].items():
        metric = name.removeprefix("eval/word_problems/")
        if not metric.startswith("failed/"):
            assert numbers[metric]["value"] == pytest.approx(value, abs=1e-9)
    assert [line for line in again.splitlines() if "│" in line] == [line for line in told.splitlines() if "│" in line]


PROBLEM = "Tom has 7 pens. Triples them. Loses 8. How many?"


def test_sample_one_problem(jaxreason, several, finished):
    words = ["sample", finished, "--n", "3", "--problem", PROBLEM]
    told = jaxreason(*words, "--answer", "13").stdout
    assert len(re.findall(r"accuracy [01]  format [01]  tokens \d+  ended by (?:eos|length)", told)) == 3
    unscored, other = (done.stdout for done in several(tuple(words), (*words, "--seed", "1")))
    assert unscored.count("format") == 3 and "accuracy" not in unscored
    assert re.sub(r"accuracy [01]  ", "", told) == unscored  # the same seed, the same completions
    assert other.count("format") == 3 and other != unscored


@pytest.mark.slow
def test_sample_problems_that_are_typed(jaxreason, finished):
    lines = [PROBLEM, "Bob has 3 apples. Gets 2. How many?", f"{PROBLEM} {PROBLEM}", PROBLEM, "", "never read"]
    done = jaxreason("sample", finished, "--greedy", stdin="\n".join(lines) + "\n")
    first, *_ = done.stdout.splitlines()
    assert "stage 'reinforce', step 2" in first and "empty line to leave" in first
    assert done.stdout.count("ended by") == 3
    assert "no token for: Bob, apples." in done.stdout  # the policy reads neither, and the person is told
    assert re.search(r"jaxreason: the prompt .* tokens: expected 1 to 24", done.stdout)  # and may go on
    assert jaxreason("sample", finished, stdin="").stdout.count("\n") == 1


def test_sample_mistakes(jaxreason, finished, capsys):
    assert main(["sample", str(finished), "--n", "0", "--problem", PROBLEM]) == 2
    assert "--n is 0: expected 1 or more" in capsys.readouterr().err
    assert main(["sample", str(finished), "--answer", "13"]) == 2
    assert "no --problem that it answers: give both" in capsys.readouterr().err
    long = sentence(jaxreason("sample", finished, "--problem", PROBLEM * 3, code=2))
    assert "expected 1 to 24" in long and "max_prompt_tokens" in long


def test_report_on_a_finished_and_an_unfinished_run(several, finished, tmp_path):
    ended, unfinished = tmp_path / "ended", tmp_path / "unfinished"
    shutil.copytree(finished, ended)
    (ended / "report.html").unlink()
    shutil.copytree(finished, unfinished)  # with the finished run's report, which is written anew
    (unfinished / "summary.json").unlink()
    told, _ = several(("report", ended), ("report", unfinished))
    assert str(ended / "report.html") in told.stdout
    assert "has not finished" not in (ended / "report.html").read_text(encoding="utf-8")
    assert "has not finished" in (unfinished / "report.html").read_text(encoding="utf-8")


@pytest.mark.slow
def test_export_does_not_replace_what_is_no_export(jaxreason, several, finished, tmp_path):
    out = tmp_path / "out"
    for done in several(("export", finished, out), ("export", finished, out)):  # an earlier export is replaced
        assert f"stage 'reinforce', step 2 -> {out}" in done.stdout
    assert (out / "model.safetensors").read_bytes() == (finished / "policy" / "model.safetensors").read_bytes()
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "thesis.tex").write_text("...")
    told = sentence(jaxreason("export", finished, precious, code=2))
    assert "not replaced" in told and "new folder" in told
    assert [entry.name for entry in precious.iterdir()] == ["thesis.tex"]
