"""The command line: parses arguments, turns a caller's mistake into one sentence, and chooses the exit code.

Exit codes: 0 done; 1 a rehearsed run does not fit; 2 a mistake in what was given, in one sentence; 3 a metric became NaN or
infinite; 75 interrupted and saved, so that running the same command again goes on; 130 Ctrl-C where there was nothing to save;
141 whoever read the output has left.
"""

from __future__ import annotations

import argparse
import importlib
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import jaxreason

DONE, TOO_LARGE, MISTAKE, NON_FINITE, INTERRUPTED, ABORTED, BROKEN_PIPE = 0, 1, 2, 3, 75, 130, 141


class Help(argparse.RawDescriptionHelpFormatter):
    """Keeps the examples' lines as they are written."""


def parser() -> argparse.ArgumentParser:
    """All commands with their options; each `--help` is enough to use the command."""
    top = argparse.ArgumentParser(
        prog="jaxreason",
        description="Teach a language model to reason with RL, in JAX.",
        epilog="to begin:\n  jaxreason train --config quickstart --workdir runs/mine\n  jaxreason COMMAND --help",
        formatter_class=Help,
    )
    top.add_argument("--version", action="version", version=jaxreason.__version__)
    commands = top.add_subparsers(dest="command", required=True, metavar="command")

    def command(name: str, summary: str, example: str, *, more: str = "") -> argparse.ArgumentParser:
        epilog = f"example:\n  {example}"
        return commands.add_parser(name, help=summary, description=summary + more, epilog=epilog, formatter_class=Help)

    def run_folder(command: argparse.ArgumentParser) -> None:
        command.add_argument("run", type=Path, metavar="D", help="a run's folder: the --workdir of jaxreason train")

    train = command(
        "train",
        "Train as a config says: supervised phases, then reinforcement.",
        "jaxreason train --config quickstart --workdir runs/mine --config.online.steps=60",
        more="\n\nThe same command on a folder that holds a part of the run goes on from its newest checkpoint. Ctrl-C saves one.\n"
        "Exit code: 0 done, 2 a mistake in what was given, 3 a metric became NaN, 75 interrupted and saved.",
    )
    train.add_argument(
        "--config",
        required=True,
        metavar="F",
        help="a file, or the name of a shipped config (see `jaxreason configs`); ':tiny' after it shrinks it",
    )
    train.add_argument("--workdir", required=True, type=Path, metavar="D", help="the run's folder: a new one, or one to go on with")
    train.add_argument(
        "--config.KEY=VALUE",
        dest="_",
        metavar="",
        help="set a key of the config otherwise than its file does, for example --config.seed=1; may be repeated; "
        "all keys stand in the config.json of a run's folder",
    )
    train.add_argument("--quiet", action="store_true", help="show no progress, only the comparison at the end")
    _distributed(train)

    _rehearse(command)
    _evaluate(command)

    sample = command(
        "sample",
        "Give a problem to a run's newest weights, and see completions with their rewards.",
        "jaxreason sample runs/mine --n 4 --problem 'Tom has 7 pens. Triples them. Loses 8. How many?' --answer 13",
    )
    run_folder(sample)
    sample.add_argument("--problem", metavar="TEXT", help="the problem; without it one is read a line, until an empty line")
    sample.add_argument("--answer", metavar="TEXT", default="", help="the answer to --problem, so that accuracy can be scored")
    sample.add_argument("--n", type=int, metavar="N", default=4, help="how many completions to sample (default 4)")
    sample.add_argument("--seed", type=int, metavar="N", default=0, help="another one samples other completions (default 0)")
    sample.add_argument("--greedy", action="store_true", help="one completion, of the likeliest token at each place")

    report = command(
        "report", "Write report.html and curves/*.png of a run's folder, finished or not.", "jaxreason report runs/mine"
    )
    run_folder(report)

    export = command(
        "export",
        "Write a run's newest weights and its tokenizer as a Hugging Face folder.",
        "jaxreason export runs/mine exported",
    )
    run_folder(export)
    export.add_argument("out", type=Path, metavar="OUT", help="the folder to write: a new one, or an earlier export to replace")

    _rewards(command)
    command("configs", "List the shipped configs with their first line.", "jaxreason configs")
    command("tasks", "List the tasks that a config or a command can name, with their settings.", "jaxreason tasks")
    command("rules", "List the rules on text that a config or a command can name, with their settings.", "jaxreason rules")
    return top


def _rehearse(command: Callable[..., argparse.ArgumentParser]) -> None:
    rehearse = command(
        "rehearse",
        "Compile a run for TPU chips that are not here: whether it fits, what it sends, how long it takes at least.",
        "jaxreason rehearse --config r1_zero_7b --topology v5e:8x8 --price 1.2",
        more="\n\nNothing is loaded: no weights, no data. Needs libtpu (pip install 'jaxreason[tpu]'), no TPU. Bytes are the\n"
        "compiler's, times are bounds from below. Exit code: 0 it fits, 1 it does not, 2 a mistake in what was given.",
    )
    rehearse.add_argument("--config", required=True, metavar="F", help="a file, or the name of a shipped config")
    rehearse.add_argument(
        "--topology",
        required=True,
        metavar="CHIP:SHAPE",
        help="the slice, in chips: v5e:8x8, v6e:4x4 or v5:4x4x4 (v5p; v5p-128 counts cores and is 64 chips)",
    )
    rehearse.add_argument(
        "--completion-tokens", type=int, metavar="N", default=0, help="how long completions are (default: as long as they may be)"
    )
    rehearse.add_argument("--price", type=float, metavar="P", help="of one chip for an hour")
    rehearse.add_argument("--json", type=Path, metavar="FILE", help="write all numbers to this file")
    _settings(rehearse, "config")


def _evaluate(command: Callable[..., argparse.ArgumentParser]) -> None:
    evaluate = command(
        "evaluate",
        "Answer held-out problems with a run's newest weights or a Hugging Face folder's model, and estimate how good it is.",
        "jaxreason evaluate runs/mine --samples 16 --temperature 0.6\n"
        "  jaxreason evaluate models/Qwen2.5-0.5B-Instruct --task gsm8k --task.heldout_size=1319",
        more="\n\nWithout --samples the likeliest token is taken at each place. Each finished batch is kept: the same command\n"
        "goes on where it stopped, and Ctrl-C keeps what is finished (exit code 75). Results: completions.jsonl, results.json.",
    )
    evaluate.add_argument("model", type=Path, metavar="D", help="a run's folder, or a Hugging Face folder")
    evaluate.add_argument("--config", metavar="F", help="a config that says how a Hugging Face folder's model is asked and scored")
    evaluate.add_argument("--task", metavar="NAME", help="the task whose held-out problems are answered, one of `jaxreason tasks`")
    evaluate.add_argument(
        "--rule", metavar="NAME", default="", help="the rule of its accuracy, one of `jaxreason rules` (by default the task's own)"
    )
    evaluate.add_argument("--samples", type=int, metavar="N", help="sample N completions of each problem")
    evaluate.add_argument("--greedy", action="store_true", help="with --samples: one greedy completion of each as well")
    evaluate.add_argument("--temperature", type=float, metavar="T", help="of the samples (by default the config's)")
    evaluate.add_argument("--k", metavar="K,K", default="", help="for pass@k and majority@k (by default 1, 2, 4, ... and N)")
    evaluate.add_argument("--problems", type=int, metavar="N", help="only the first N held-out problems")
    evaluate.add_argument("--category", action="append", default=[], metavar="KEY", help="report by this key too; may be repeated")
    evaluate.add_argument("--resamples", type=int, metavar="N", default=1000, help="of the bootstrap intervals (default 1000)")
    evaluate.add_argument("--seed", type=int, metavar="N", default=0, help="another one samples other completions (default 0)")
    evaluate.add_argument("--out", type=Path, metavar="D", help="the evaluation's folder: a new one, or one to go on with")
    evaluate.add_argument("--quiet", action="store_true", help="show no progress, only the table at the end")
    _settings(evaluate, "config", "task", "rule")


def _rewards(command: Callable[..., argparse.ArgumentParser]) -> None:
    """What one debugs a reward with, and looks at data with."""
    play = command(
        "play",
        "Answer a task's problems yourself, and see the reward of what you type and its parts.",
        "jaxreason play word_problems --task.max_changes=2\n  jaxreason play mbpp --task.data_dir=FOLDER",
    )
    play.add_argument("task", metavar="TASK", help="a task's name (see `jaxreason tasks`)")
    play.add_argument(
        "--rule", metavar="NAME", default="", help="the rule that scores, one of `jaxreason rules` (by default the task's own)"
    )
    play.add_argument("--split", choices=("heldout", "train"), default="heldout", help="which problems (default heldout)")
    play.add_argument("--start", type=int, metavar="N", default=0, help="the number of the first problem (default 0)")
    _limits(play, workers=1)
    _settings(play, "task", "rule")

    grade = command(
        "grade",
        "Score a file of completions by a rule: a JSON object a line, such as a run's rollouts.jsonl.",
        "jaxreason grade completions.jsonl --rule math.gsm8k_answer",
    )
    grade.add_argument("file", type=Path, metavar="FILE", help="a .jsonl, .jsonl.gz or .parquet file")
    grade.add_argument("--rule", metavar="NAME", required=True, help="a rule on text (see `jaxreason rules`)")
    for column in ("question", "answer", "completion"):
        grade.add_argument(f"--{column}", metavar="COLUMN", default=column, help=f"the column of the {column} (default {column})")
    grade.add_argument("--out", type=Path, metavar="F", help="the results' file (by default FILE's name with .graded.jsonl)")
    _limits(grade, workers=2)
    _settings(grade, "rule")

    overlap = command(
        "contamination",
        "Find the evaluation problems that share words in a row with training problems.",
        "jaxreason contamination --train train.jsonl --evaluation gsm8k --evaluation.heldout_size=1319 --out overlaps.json",
    )
    overlap.add_argument(
        "--train", required=True, metavar="FILE|TASK", help="a .jsonl, .jsonl.gz or .parquet file, or a task's name"
    )
    overlap.add_argument("--evaluation", required=True, metavar="FILE|TASK", help="likewise; of a task its held-out problems")
    overlap.add_argument("--n", type=int, metavar="N", default=13, help="how many words in a row (default 13)")
    overlap.add_argument("--threshold", type=float, metavar="S", default=0.0, help="list shares above this one (default 0)")
    overlap.add_argument("--column", action="append", default=[], metavar="NAME", help="of the files; may be repeated")
    overlap.add_argument("--draws", type=int, metavar="N", default=100_000, help="problems of a task without end (default 100000)")
    overlap.add_argument("--out", type=Path, metavar="F", help="write all overlaps to this JSON file")
    _settings(overlap, "train", "evaluation")


SETTINGS = {
    "train": ("config",),
    "rehearse": ("config",),
    "evaluate": ("config", "task", "rule"),
    "play": ("task", "rule"),
    "grade": ("rule",),
    "contamination": ("train", "evaluation"),
}
OWN_FILES = (
    "rehearse",
    "evaluate",
    "play",
    "grade",
    "contamination",
    "tasks",
    "rules",
)  # the other commands are in cli/commands.py


def _limits(command: argparse.ArgumentParser, *, workers: int) -> None:
    command.add_argument(
        "--workers",
        type=int,
        metavar="N",
        default=workers,
        help=f"processes in which the rule runs (default {workers}); 0: this one, where it may print and no limit holds",
    )
    command.add_argument("--limit-seconds", type=float, metavar="S", default=3.0, help="that a completion may take (default 3)")
    command.add_argument("--memory-mb", type=int, metavar="M", default=2048, help="that it may take (default 2048; 0: no limit)")


def _settings(command: argparse.ArgumentParser, *names: str) -> None:
    for name in names:
        what = "a key of the config" if name == "config" else f"what the {name} takes" if name == "rule" else "what the task takes"
        command.add_argument(f"--{name}.KEY=VALUE", dest="_", metavar="", help=f"set {what}; may be repeated")


def _distributed(command: argparse.ArgumentParser) -> None:
    group = command.add_argument_group("several processes", "one program on every host, all with the same command")
    group.add_argument(
        "--distributed",
        action="store_true",
        help="find the other processes as the cluster says (Cloud TPU, SLURM, ...)",
    )
    group.add_argument("--coordinator", metavar="HOST:PORT", help="process 0's address, where no cluster says it")
    group.add_argument("--processes", type=int, metavar="N", help="how many processes")
    group.add_argument("--process", type=int, metavar="I", help="which one this is, from 0")


@contextmanager
def _ended_by_ctrl_c() -> Iterator[None]:
    """Ctrl-C ends the process here: a KeyboardInterrupt in the midst of importing jaxlib crashes it."""
    ours = threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if ours:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    yield
    if ours:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    given, rest = parser().parse_known_args(words)
    prefixes = tuple(f"--{name}." for name in SETTINGS.get(given.command, ()))
    bare = [each for each in rest if each.startswith(prefixes) and "=" not in each]
    unknown = [each for each in rest if not each.startswith(prefixes)]
    if bare:
        print(f"jaxreason: {bare[0]} has no value: write {bare[0]}=VALUE", file=sys.stderr)
        return MISTAKE
    if unknown:
        print(
            f"jaxreason: {unknown[0]} is not an option of '{given.command}': see jaxreason {given.command} --help",
            file=sys.stderr,
        )
        return MISTAKE
    given.words, given.settings = words, rest
    given.overrides = [each for each in rest if each.startswith("--config.")]
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    logging.getLogger("transformers").setLevel(logging.ERROR)
    try:
        with _ended_by_ctrl_c():
            # jax is first imported here, by the commands that need it, so that --help and mistyped options answer at once
            own = given.command in OWN_FILES
            module = importlib.import_module(f"jaxreason.cli.{given.command if own else 'commands'}")

        code = getattr(module, "run" if own else given.command)(given)
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        # whoever read our output has left, as `head` does; Python would complain when it closes the stream
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE
    except KeyboardInterrupt:
        print("jaxreason: interrupted", file=sys.stderr)
        return ABORTED
    except ValueError as error:
        if os.environ.get("JAXREASON_TRACEBACK"):
            raise
        print(f"jaxreason: {error}", file=sys.stderr)
        return MISTAKE
    except ArithmeticError as error:
        from jaxreason.training.metrics import NonFiniteError

        if not isinstance(error, NonFiniteError):
            raise
        print(f"jaxreason: {error}", file=sys.stderr)
        return NON_FINITE
