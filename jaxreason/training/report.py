"""The report of a run: one HTML file that a person opens, and the curves as PNG files.

It reads only what the run wrote (`config.json`, `metrics.jsonl`, `rollouts.jsonl`, `examples.json`, `summary.json`), so
it works on a run that is going on, was killed, or has just begun, and says what is not there. The page is `report.html`
beside this file with the data put into it as JSON; it asks for nothing outside itself. Deliberately absent: a server,
and a template language: what the numbers are is decided here, and what they look like in the page.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections import deque
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from jaxreason import __version__
from jaxreason.training.curves import last_steps, read_curves, thinned, write_pngs
from jaxreason.training.metrics import write_atomically

RUN_FILES = ("config.json", "metrics.jsonl", "rollouts.jsonl", "examples.json", "summary.json")
MAX_ROLLOUTS = 4000  # rows that the page holds
MAX_CHARACTERS = 12_000_000  # characters of rollouts that the page holds: a browser must still open it
PLACE = "__DATA__"


def write_report(run: Path) -> Path:
    """Write `run/curves/*.png` and `run/report.html`, and return the latter's path.

    Raises ValueError where `run` is not a run's folder.
    """
    run = Path(run)
    if not run.is_dir():
        raise ValueError(f"{str(run)!r} is not a folder; give the folder that a training run wrote")
    if not any((run / name).is_file() for name in RUN_FILES):
        raise ValueError(f"{str(run)!r} is not a run: it has none of {', '.join(RUN_FILES)}; give a training run's folder")

    notices: list[str] = []
    config = _read_object(run / "config.json", notices)
    summary = _read_object(run / "summary.json", notices)
    examples = _read_object(run / "examples.json", notices)
    metrics, _ = _read_lines(run / "metrics.jsonl", notices)
    rollouts, left_out = _read_lines(run / "rollouts.jsonl", notices, max_lines=MAX_ROLLOUTS, max_characters=MAX_CHARACTERS)
    curves, without = read_curves(metrics)
    last = last_steps(metrics)

    if not metrics and not rollouts and not summary:
        notices.insert(0, "Nothing has been logged yet: this run has only begun.")
    elif not summary:
        seen = ", ".join(f"{stage} {step}" for stage, step in last.items())
        ending = f"; last steps seen: {seen}." if seen else "."
        notices.insert(0, f"This run has not finished: it has no summary.json{ending}")
    missing_library = write_pngs(curves, run / "curves") if curves else None
    if missing_library:
        notices.append(missing_library)

    data = {
        "title": str(config.get("name") or run.resolve().name),
        "version": __version__,
        "finished": bool(summary),
        "notices": notices,
        "facts": _facts(config, summary, last),
        "config": _flatten(config),
        "table": _table(summary, metrics),
        "curves": [
            {**dataclasses.asdict(curve), "series": [dataclasses.asdict(thinned(series)) for series in curve.series]}
            for curve in curves
        ],
        "without": without if metrics else [],
        "examples": _pairs(examples),
        "rollouts": {"rows": rollouts, "left_out": left_out},
    }
    page = resources.files("jaxreason.training").joinpath("report.html").read_text(encoding="utf-8")
    before, _, after = page.partition(PLACE)
    path = run / "report.html"
    write_atomically(path, before + embed(data) + after)
    return path


def embed(data: Any) -> str:
    """`data` as JSON that is safe inside a `<script>` element: ASCII, with no `<`, `>` or `&` in it."""
    text = json.dumps(data, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _parse(text: str) -> Any:
    """JSON with None for the NaN and Infinity that Python writes and a browser does not read."""
    return json.loads(text, parse_constant=lambda _: None)


def _read_object(path: Path, notices: list[str]) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        value = _parse(path.read_text(encoding="utf-8"))
    except ValueError:
        notices.append(f"{path.name} cannot be read as JSON and is left out.")
        return {}
    return value if isinstance(value, dict) else {}


def _read_lines(
    path: Path, notices: list[str], *, max_lines: float = math.inf, max_characters: float = math.inf
) -> tuple[list[dict[str, Any]], int]:
    """The newest objects of a JSON-lines file within the limits, oldest first, and how many older ones were left out.

    A run that was killed leaves a half-written line at the end, or in the middle of files put together: it is skipped.
    """
    if not path.is_file():
        return [], 0
    lines: deque[str] = deque()
    total = held = 0
    with path.open(encoding="utf-8", errors="replace") as file:
        for line in file:
            if not line.strip():
                continue
            lines.append(line)
            total, held = total + 1, held + len(line)
            while len(lines) > 1 and (len(lines) > max_lines or held > max_characters):
                held -= len(lines.popleft())
    objects, last_is_broken, broken = [], False, 0
    for line in lines:
        try:
            value = _parse(line)
        except ValueError:
            value = None
        last_is_broken = not isinstance(value, dict)
        broken += last_is_broken
        if isinstance(value, dict):
            objects.append(value)
    if broken == 1 and last_is_broken:
        notices.append(f"The last line of {path.name} is half-written and is left out.")
    elif broken:
        notices.append(f"{broken} damaged lines of {path.name} are left out.")
    return objects, total - len(lines)


def _facts(config: Mapping[str, Any], summary: Mapping[str, Any], last: Mapping[str, int]) -> list[tuple[str, Any]]:
    """What stands under the title: the run's named parts, its steps, and the scalars of its summary."""
    facts: list[tuple[str, Any]] = []
    for key in ("model", "algorithm", "task", "tasks", "reward", "rewards"):
        values = config.get(key)
        values = values if isinstance(values, list) else [values]
        named = [value.get("name") if isinstance(value, Mapping) else value for value in values]
        if any(named):
            facts.append((key, ", ".join(str(name) for name in named if name)))
    facts += [(f"{stage} steps".strip(), step) for stage, step in last.items()]
    facts += [(key, value) for key, value in summary.items() if isinstance(value, (int, float, str))]
    return facts


def _flatten(config: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """A nested config as (dotted key, value), in its own order."""
    leaves: list[tuple[str, Any]] = []
    for key, value in config.items():
        if isinstance(value, Mapping) and value:
            leaves += _flatten(value, f"{prefix}{key}.")
        else:
            leaves.append((f"{prefix}{key}", value if isinstance(value, (str, int, float)) else json.dumps(value)))
    return leaves


def _table(summary: Mapping[str, Any], metrics: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Held-out numbers of each phase, before and after reinforcement; in an unfinished run the first and the latest logged."""
    phases = summary.get("phases") or {}
    before, after = summary.get("before") or {}, summary.get("after") or {}
    columns = [*(f"after {name}" for name in phases), "before RL", "after RL"]
    if not before and not after:
        for line in metrics:
            found = {name: value for name, value in line.items() if name.startswith("eval/")}
            before, after = {**found, **before}, {**after, **found}
        columns = ["first evaluation", "latest evaluation"]
    sides = [*phases.values(), before, after]
    rows = [(name, *(side.get(name) for side in sides)) for name in dict.fromkeys([*before, *after])]
    return {"columns": columns, "rows": rows}


def _pairs(examples: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The same question before and after training, side by side; the side that is not there is None."""
    pairs: list[dict[str, Any]] = [
        {"question": e.get("question"), "answer": e.get("answer"), "before": e, "after": None} for e in examples.get("before") or []
    ]
    for example in examples.get("after") or []:
        question = example.get("question")
        pair = next((p for p in pairs if p["after"] is None and p["question"] == question), None)
        if pair is None:
            pair = {"question": question, "answer": example.get("answer"), "before": None}
            pairs.append(pair)
        pair["after"] = example
    return pairs
