"""`jaxreason rules`: the rules on text that can be named, with their settings."""

from __future__ import annotations

import argparse

from jaxreason.cli.main import DONE
from jaxreason.cli.named import listed
from jaxreason.rewards.table import rows


def run(given: argparse.Namespace) -> int:
    for row in rows():
        group = " (of a group: in a config alone)" if row.noun == "group" else ""
        listed(row.name + group, row.line, row.settings)
    return DONE
