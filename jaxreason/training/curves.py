"""The curves of a run, from its metric lines: what is drawn, in which unit, and as PNG files.

A curve is data first (`Curve`), so that the page of `report.py` and the PNG files show the same numbers. A stage counts
its own steps; where a curve has values of several stages, their steps are laid end to end and the borders are kept.
Where a step was logged twice the later line wins. Deliberately absent: smoothing that hides the raw values.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

MEAN_FROM = 60  # points from which a running mean is drawn over the raw line
PAGE_POINTS = 1500  # points a line keeps in the page; the PNG has them all

Scale = Literal["linear", "fraction", "log"]

# file name, title, unit, scale, and for each line a metric's pattern and its label (\1: what the group matched)
SPECS: tuple[tuple[str, str, str, Scale, tuple[tuple[str, str], ...]], ...] = (
    ("reward", "Reward and its parts", "mean reward of a completion", "linear",
     ((r"reward/(total)", r"\1"), (r"reward/(?!zero_variance$|failed/)(.+)", r"\1"))),
    ("accuracy", "Held-out accuracy", "pass@1 (fraction of problems)", "fraction", ((r"eval/(.+)/pass@1", r"\1"),)),
    ("length", "Completion length", "tokens", "linear",
     ((r"rollout/length", "training"), (r"eval/(.+)/length", r"held-out \1"))),
    ("entropy", "Policy entropy", "nats per token", "linear", ((r"policy/entropy", "entropy"),)),
    ("kl_ref", "KL to the reference", "nats per token", "linear", ((r"policy/kl_ref", "KL"),)),
    ("sampler_gap", "Sampler gap (sampler against trainer)", "log-prob difference (nats)", "log",
     ((r"policy/sampler_gap", "gap"),)),
    ("supervised_loss", "Supervised loss", "nats per token", "linear", ((r"loss/sft", "loss"),)),
    ("shares", "Truncated, without signal, failed, clipped", "fraction", "fraction",
     ((r"rollout/truncated", "truncated completions"), (r"reward/zero_variance", "groups with equal rewards"),
      (r"reward/failed/(.+)", r"rules that failed: \1"), (r"policy/clip_fraction", "clipped tokens"))),
    ("gradient_norm", "Gradient norm", "norm before clipping", "log",
     ((r"optimizer/gradient_norm", "norm"), (r"value/gradient_norm", "the critic's"))),
    ("explained_variance", "What the critic explains", "fraction of the returns' variance", "linear",
     ((r"value/explained_variance", "explained variance"),)),
)  # fmt: skip


@dataclass(frozen=True)
class Series:
    """One line: `value[i]` at `step[i]`, and its running mean where the line is long enough to need one."""

    label: str
    step: Sequence[int]
    value: Sequence[float]
    mean: Sequence[float] | None


@dataclass(frozen=True)
class Curve:
    """One figure; `borders` are (step, stage) where a later stage begins, `missing` counts values not to be drawn."""

    name: str
    title: str
    unit: str
    step_unit: str
    scale: Scale
    series: Sequence[Series]
    borders: Sequence[tuple[int, str]]
    missing: int


def last_steps(metrics: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    """The last step of each stage, stages in the order in which they ran."""
    last: dict[str, int] = {}
    for line in metrics:
        stage = str(line.get("stage", ""))
        last[stage] = max(last.get(stage, 0), int(line.get("step", 0)))
    return last


def read_curves(metrics: Sequence[Mapping[str, Any]]) -> tuple[list[Curve], list[str]]:
    """The curves that have data, and the titles of those that have none.

    A value of None stands for one that was not finite.
    """
    last = last_steps(metrics)
    offsets = dict(zip(last, np.cumsum([0, *last.values()]).tolist(), strict=False))
    logged: dict[str, dict[tuple[str, int], float | None]] = {}
    for line in metrics:
        where = str(line.get("stage", "")), int(line.get("step", 0))
        for name, value in line.items():
            if name not in ("stage", "step") and (value is None or isinstance(value, (int, float))):
                logged.setdefault(name, {})[where] = value

    curves, without = [], []
    for name, title, unit, scale, patterns in SPECS:
        matched: dict[str, str] = {}
        for pattern, label in patterns:
            for metric in logged:
                match = re.fullmatch(pattern, metric)
                if match and metric not in matched:
                    matched[metric] = match.expand(label)
        stages = [stage for stage in last if any(stage == at[0] for metric in matched for at in logged[metric])]
        start = offsets if len(stages) > 1 else dict.fromkeys(stages, 0)
        series, missing = [], 0
        for metric, label in matched.items():
            points = sorted((list(last).index(at), start[at] + step, v) for (at, step), v in logged[metric].items())
            drawn = [point for point in points if point[2] is not None and (scale != "log" or point[2] > 0)]
            missing += len(points) - len(drawn)
            if drawn:
                stage_of, steps, values = map(list, zip(*drawn, strict=True))
                series.append(Series(label, steps, [float(v) for v in values], running_mean(values, stage_of)))
        if not series:
            without.append(title)
            continue
        step_unit = f"updates ({', then '.join(stages)})" if any(stages) else "updates"
        borders = [(start[stage], stage) for stage in stages[1:]]
        curves.append(Curve(name, title, unit, step_unit, scale, series, borders, missing))
    return curves, without


def running_mean(values: Sequence[float], stage_of: Sequence[int]) -> list[float] | None:
    """The mean over a centred window of a twentieth of the line, cut at a stage's ends; None for a short line.

    `stage_of` numbers the stage of each value, ascending.
    """
    if len(values) < MEAN_FROM:
        return None
    half, at = max(2, len(values) // 40), np.arange(len(values))
    low = np.maximum(at - half, np.searchsorted(stage_of, stage_of, side="left"))
    high = np.minimum(at + half + 1, np.searchsorted(stage_of, stage_of, side="right"))
    total = np.cumsum([0.0, *values])
    return ((total[high] - total[low]) / (high - low)).tolist()


def thinned(series: Series) -> Series:
    """Every k-th point and the last one, so that a long run's page stays small."""
    every = -(-len(series.step) // PAGE_POINTS)
    keep = sorted({*range(0, len(series.step), every), len(series.step) - 1})
    mean = None if series.mean is None else [series.mean[i] for i in keep]
    return Series(series.label, [series.step[i] for i in keep], [series.value[i] for i in keep], mean)


def write_pngs(curves: Sequence[Curve], folder: Path) -> str | None:
    """One PNG file a curve in `folder`; returns what to tell the reader where matplotlib is missing."""
    try:
        from matplotlib.figure import Figure  # the object API: no global state, Agg for a PNG
    except ImportError:
        return "The curves were not written as PNG files because matplotlib is missing: pip install 'jaxreason[plot]'."
    folder.mkdir(exist_ok=True)
    colours = ("#1f5fa8", "#c4570f", "#2a8a5c", "#8a4bb3", "#a07800", "#b03060")
    for curve in curves:
        figure = Figure(figsize=(7, 4), dpi=130, layout="constrained")
        axes = figure.add_subplot()
        for number, series in enumerate(curve.series):
            colour = colours[number % len(colours)]
            marker = "o" if len(series.step) <= 40 else None
            label = series.label.replace("$", r"\$")
            if series.mean is None:
                axes.plot(series.step, series.value, color=colour, marker=marker, markersize=3, linewidth=1.6, label=label)
            else:
                axes.plot(series.step, series.value, color=colour, alpha=0.25, linewidth=0.9)
                axes.plot(series.step, series.mean, color=colour, linewidth=1.8, label=label)
        for step, stage in curve.borders:
            axes.axvline(step, color="#888888", linewidth=0.8, linestyle="--")
            axes.annotate(f" {stage}", (step, 1), xycoords=("data", "axes fraction"), va="top", fontsize=8, color="#666666")
        if curve.scale == "log":
            axes.set_yscale("log")
        if curve.scale == "fraction":
            axes.set_ylim(0, min(1.02, 1.08 * max(max(s.value) for s in curve.series)) or 1.02)
        axes.set_title(curve.title, loc="left", fontsize=11, fontweight="bold")
        axes.locator_params(axis="x", integer=True)
        axes.set_xlabel(curve.step_unit)
        axes.set_ylabel(curve.unit)
        axes.grid(alpha=0.25, linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
        if len(curve.series) > 1:
            axes.legend(frameon=False, fontsize=9)
        figure.savefig(folder / f"{curve.name}.png")
    return None
