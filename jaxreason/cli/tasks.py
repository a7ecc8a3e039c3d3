"""`jaxreason tasks`: the tasks that can be named, with their settings."""

from __future__ import annotations

import argparse

from jaxreason import naming, tasks
from jaxreason.cli.main import DONE
from jaxreason.cli.named import listed
from jaxreason.rewards.table import first_line, settings


def run(given: argparse.Namespace) -> int:
    for name, function in naming.wholly_named(tasks, "Task").items():
        listed(name, first_line(function).removesuffix(" Settings: see docs/tasks.md."), settings(function))
    return DONE
