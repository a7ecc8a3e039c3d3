"""A run's folder: whether it may be used, and what a reader finds in it.

config.json      the resolved config        metrics.jsonl    a line a logged step
checkpoints/     both stages' states        rollouts.jsonl   a line a shown completion
tokenizer/       where the task made one    examples.json    held-out completions before and after
policy/          the Hugging Face folder    summary.json     before, after, seconds; written last
profile/         traces of chosen steps     skipped_rows.json   where rows of the data set were left out
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from jaxreason import config as configs
from jaxreason.config import Config

PARTIAL_TOKENIZER = ".tokenizer.partial"
BEFORE_CONFIG = {"tokenizer", PARTIAL_TOKENIZER, "config.json.tmp"}  # what a run that has just begun may hold


class Result(NamedTuple):
    """How a run ended."""

    finished: bool
    summary: Mapping[str, Any]
    examples: Mapping[str, Any]


def open_folder(config: Config, workdir: Path) -> None:
    """Makes the folder; raises ValueError where that fails, or where it holds something else than this run."""
    if re.match(r"[a-z][a-z0-9]+:/", str(workdir)):  # Path has made one slash of two
        raise ValueError(f"--workdir is '{workdir}', which is a bucket: give a folder on a file system that every host has mounted")
    if workdir.exists() and not workdir.is_dir():
        raise ValueError(f"--workdir is '{workdir}', which is a file: give a folder")
    try:
        workdir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"--workdir is '{workdir}', which cannot be made ({error.strerror}): give another folder") from None
    if not os.access(workdir, os.W_OK):
        raise ValueError(f"--workdir is '{workdir}', which cannot be written to: give another folder")
    known = read_json(workdir / "config.json")
    if not known:
        others = sorted(entry.name for entry in workdir.iterdir() if entry.name not in BEFORE_CONFIG)
        if others:
            raise ValueError(
                f"--workdir is '{workdir}', which is not a run's folder and holds '{others[0]}': give an empty or a new folder"
            )
        return
    changed = _changed(config, known)
    if changed and any((workdir / "checkpoints").glob("*/*")):
        key, old, new = changed[0]
        more = f" (and {len(changed) - 1} more keys)" if len(changed) > 1 else ""
        raise ValueError(
            f"'{workdir}' holds a run with config.{key} = {old!r}, and this one has {new!r}{more}: "
            "give another --workdir, or the same config to resume it"
        )


def begin(config: Config, workdir: Path) -> None:
    """Empties a folder whose run failed before it saved anything, where the config has been corrected since. Process 0 calls it."""
    known = read_json(workdir / "config.json")
    if known and _changed(config, known):
        for name in ("config.json", "metrics.jsonl", "rollouts.jsonl", "examples.json", "skipped_rows.json"):
            (workdir / name).unlink(missing_ok=True)
        shutil.rmtree(workdir / "tokenizer", ignore_errors=True)


def _changed(config: Config, known: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    """The keys in which a run differs from this one, but for the mesh and the profiler: with others of these it goes on."""
    # through JSON, as the stored one went: tuples are lists there
    new, free = json.loads(json.dumps(configs.to_dict(config))), {"mesh": None, "profile": None}
    return differences({**known, **free}, {**new, **free})


def differences(a: Any, b: Any, path: str = "") -> list[tuple[str, Any, Any]]:
    """(key, value in a, value in b) of every leaf in which two nested dicts differ."""
    if isinstance(a, dict) and isinstance(b, dict):
        return [each for key in {**a, **b} for each in differences(a.get(key), b.get(key), f"{path}.{key}" if path else key)]
    return [] if a == b else [(path, a, b)]


def finished(workdir: Path) -> Result | None:
    """The result of a run that has ended, from its folder."""
    summary = read_json(workdir / "summary.json")
    return Result(True, summary, read_json(workdir / "examples.json")) if summary else None


def read_config(workdir: Path) -> Config:
    """The config of a run's folder."""
    known = read_json(workdir / "config.json")
    if not known:
        raise ValueError(f"'{workdir}' is not a run's folder: it holds no config.json; give the --workdir of jaxreason train")
    try:
        return configs.from_dict(known)
    except ValueError as error:
        raise ValueError(f"{workdir / 'config.json'} is no run's config: {error}") from error


def read_json(file: Path) -> dict[str, Any]:
    try:
        return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    except ValueError as error:
        raise ValueError(f"{file} is not valid JSON ({error}): it was changed by hand or damaged") from error
