"""The command line: parses arguments, turns a caller's mistake into one sentence, and chooses the exit code.

Exit codes: 0 done; 2 a mistake in what was given, in one sentence; 3 a metric became NaN or infinite; 75 interrupted and
saved, so that running the same command again goes on.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import jaxreason

DONE, MISTAKE, NON_FINITE, INTERRUPTED = 0, 2, 3, 75


class Help(argparse.RawDescriptionHelpFormatter):
    """Keeps the examples' lines as they are written."""


def parser() -> argparse.ArgumentParser:
    """All commands with their options; each `--help` is enough to use the command."""
    top = argparse.ArgumentParser(
        prog="jaxreason", description="Teach a language model to reason with RL, in JAX.", formatter_class=Help
    )
    top.add_argument("--version", action="version", version=jaxreason.__version__)
    commands = top.add_subparsers(dest="command", required=True, metavar="command")

    def command(name: str, summary: str, example: str) -> argparse.ArgumentParser:
        made = commands.add_parser(
            name, help=summary, description=summary, epilog=f"example:\n  {example}", formatter_class=Help
        )
        made.add_argument("--quiet", action="store_true", help="no live progress")
        return made

    train = command(
        "train",
        "Train: supervised phases, then reinforcement. A folder that holds part of the same run is continued.",
        "jaxreason train --config quickstart --workdir runs/mine --config.online.steps=60",
    )
    train.add_argument(
        "--config",
        required=True,
        metavar="F",
        help="a file, or the name of a shipped config (see `jaxreason configs`); ':tiny' after it shrinks it",
    )
    train.add_argument("--workdir", required=True, type=Path, metavar="D", help="the run's folder")
    train.add_argument(
        "--config.KEY=VALUE", dest="_", metavar="", help="override any key of the config, for example --config.seed=1"
    )
    _distributed(train)

    evaluate = command(
        "evaluate", "Answer a run's held-out problems greedily with its newest weights.", "jaxreason evaluate runs/mine"
    )
    evaluate.add_argument("run", type=Path, metavar="D", help="a run's folder")

    sample = command(
        "sample",
        "Type a problem, see completions with their rewards.",
        "jaxreason sample runs/mine --n 4 --problem 'Tom has 7 pens. Triples them. Loses 8. How many?' --answer 13",
    )
    sample.add_argument("run", type=Path, metavar="D", help="a run's folder")
    sample.add_argument(
        "--problem", help="the problem; without it, lines are read from the terminal until an empty one"
    )
    sample.add_argument("--answer", default="", help="its answer, so that accuracy can be scored")
    sample.add_argument("--n", type=int, default=4, help="completions (default 4)")
    sample.add_argument("--seed", type=int, default=0, help="of the sampling (default 0)")
    sample.add_argument("--greedy", action="store_true", help="the one likeliest completion")

    report = command(
        "report", "Write report.html and curves/*.png of a run's folder, finished or not.", "jaxreason report runs/mine"
    )
    report.add_argument("run", type=Path, metavar="D", help="a run's folder")

    export = command(
        "export", "Write a run's newest weights as a Hugging Face folder.", "jaxreason export runs/mine exported"
    )
    export.add_argument("run", type=Path, metavar="D", help="a run's folder")
    export.add_argument("out", type=Path, metavar="OUT", help="the folder to write")

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


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit code."""
    given, rest = parser().parse_known_args(argv)
    unknown = [each for each in rest if not each.startswith("--config.")]
    if unknown or (rest and given.command != "train"):
        print(
            f"jaxreason: {(unknown or rest)[0]} is not an option of '{given.command}': see jaxreason {given.command} --help",
            file=sys.stderr,
        )
        return MISTAKE
    given.overrides = rest
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    logging.getLogger("transformers").setLevel(logging.ERROR)
    # jax is first imported below, so that --help and mistyped options answer at once
    from jaxreason.cli import commands
    from jaxreason.training.metrics import NonFiniteError

    try:
        return getattr(commands, given.command)(given)
    except ValueError as error:
        if os.environ.get("JAXREASON_TRACEBACK"):
            raise
        print(f"jaxreason: {error}", file=sys.stderr)
        return MISTAKE
    except NonFiniteError as error:
        print(f"jaxreason: {error}", file=sys.stderr)
        return NON_FINITE
