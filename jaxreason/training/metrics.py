"""What a run writes down as it goes: `metrics.jsonl` always, rollouts beside it; and who is told of it live.

Lines are in the order of the run. Resuming a stage from a checkpoint first cuts what the stage wrote after it, so that the
files of a resumed run are those of an undisturbed one (seconds excepted).
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

import jax

STAGES = ("supervised", "reinforce")


class Progress(Protocol):
    """Whoever shows a run to a person."""

    def stage(self, name: str, total_steps: int, done_steps: int) -> None: ...
    def update(self, step: int, metrics: Mapping[str, float]) -> None: ...
    def message(self, text: str) -> None: ...
    def close(self) -> None: ...


class NonFiniteError(ArithmeticError):
    """A metric became NaN or infinite; the run stops with its last good checkpoint untouched."""


def check_finite(stage: str, step: int, metrics: Mapping[str, float]) -> None:
    """Raises NonFiniteError that names the step and the metric that is not a number: a cause before its consequences."""

    def order(name: str) -> tuple[bool | str, ...]:
        causes = ("reward/",), ("value/mean",), ("policy/loss", "loss/")  # the critic's values, before what is made of them
        return *(not name.startswith(cause) for cause in causes), name

    for name, value in sorted(metrics.items(), key=lambda item: order(item[0])):
        if not math.isfinite(value):
            raise NonFiniteError(
                f"{name} is {value} at step {step} of stage '{stage}': nothing of this step was saved, and the last good "
                "checkpoint is untouched; look at the last rollouts, or lower the learning rate in another --workdir"
            )


class RunLog:
    """Appends to `metrics.jsonl` and `rollouts.jsonl` of a run folder. Only process 0 writes."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._writes = jax.process_index() == 0
        if self._writes:
            folder.mkdir(parents=True, exist_ok=True)

    def metrics(self, stage: str, step: int, values: Mapping[str, float]) -> None:
        self._append("metrics.jsonl", [{"stage": stage, "step": step, **values}])

    def evaluation(self, stage: str, step: int, values: Mapping[str, float]) -> None:
        """Writes an evaluation made outside of a stage's loop, in place of the same one where a killed run left it."""
        if not self._writes:
            return
        line = {"stage": stage, "step": step, **values}
        file = self.folder / "metrics.jsonl"
        others = [each for each in read_jsonl(file) if (_place(each), each.keys()) != (_place(line), line.keys())]
        self._rewrite(file, [*others, line])

    def rollouts(self, stage: str, step: int, rows: Iterable[Mapping[str, Any]]) -> None:
        self._append("rollouts.jsonl", [{"stage": stage, "step": step, **row} for row in rows])

    def rewind(self, stage: str, step: int) -> None:
        """Drops this stage's lines later than the step, and a half-written last one. A later stage is its own to rewind."""
        if not self._writes:
            return
        for name in ("metrics.jsonl", "rollouts.jsonl"):
            file = self.folder / name
            if file.exists():
                self._rewrite(file, [line for line in read_jsonl(file) if line["stage"] != stage or line["step"] <= step])

    def write_json(self, name: str, content: Any) -> None:
        if self._writes:
            write_atomically(self.folder / name, json.dumps(content, indent=2, ensure_ascii=False) + "\n")

    def _rewrite(self, file: Path, lines: list[dict[str, Any]]) -> None:
        # sorted: an early stage that repeats its last steps, because their checkpoint was refused, writes after a later one
        write_atomically(file, "".join(json.dumps(line) + "\n" for line in sorted(lines, key=_place)))

    def _append(self, name: str, lines: list[dict[str, Any]]) -> None:
        if self._writes and lines:
            with open(self.folder / name, "a", encoding="utf-8") as file:
                file.write("".join(json.dumps(line) + "\n" for line in lines))


def _place(line: Mapping[str, Any]) -> tuple[int, int]:
    return STAGES.index(line["stage"]), line["step"]


def read_jsonl(file: Path) -> list[dict[str, Any]]:
    """The objects of a JSON-lines file, none where it is absent; a last line cut short by a kill is left out."""
    if not file.exists():
        return []
    lines = file.read_text(encoding="utf-8").splitlines()
    rows = []
    for number, line in enumerate(lines):
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            if number + 1 < len(lines):
                raise ValueError(f"line {number + 1} of {file} is not JSON: the file was changed by hand or damaged") from None
    return rows


def write_atomically(file: Path, text: str) -> None:
    """Replaces a file's content so that a reader, or a kill, meets the old or the new one, never a half."""
    temporary = file.with_name(file.name + ".tmp")
    with open(temporary, "w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(temporary, file)
