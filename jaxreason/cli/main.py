"""The command line: parses arguments, turns a caller's mistake into one sentence, and chooses the exit code.

Exit codes: 0 done; 2 a mistake in what was given, in one sentence; 3 a metric became NaN or infinite; 75 interrupted and
saved, so that running the same command again goes on; 130 Ctrl-C where there was nothing to save; 141
whoever read the output has left.
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import jaxreason

DONE, MISTAKE, NON_FINITE, INTERRUPTED, ABORTED, BROKEN_PIPE = 0, 2, 3, 75, 130, 141


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

    evaluate = command(
        "evaluate",
        "Answer a run's held-out problems greedily with its newest weights, and print the accuracy.",
        "jaxreason evaluate runs/mine",
    )
    run_folder(evaluate)

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

    command("configs", "List the shipped configs with their first line.", "jaxreason configs")
    return top


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
    bare = [each for each in rest if each.startswith("--config.") and "=" not in each]
    unknown = [each for each in rest if not each.startswith("--config.")]
    if given.command == "train" and bare:
        print(f"jaxreason: {bare[0]} has no value: write {bare[0]}=VALUE", file=sys.stderr)
        return MISTAKE
    if unknown or (rest and given.command != "train"):
        print(
            f"jaxreason: {(unknown or rest)[0]} is not an option of '{given.command}': see jaxreason {given.command} --help",
            file=sys.stderr,
        )
        return MISTAKE
    given.words, given.overrides = words, rest
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    logging.getLogger("transformers").setLevel(logging.ERROR)
    try:
        with _ended_by_ctrl_c():
            # jax is first imported here, so that --help and mistyped options answer at once
            from jaxreason.cli import commands

        code = getattr(commands, given.command)(given)
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
