"""What a person sees in the terminal: progress while training, and the comparison at the end.

The loops know four verbs (`stage`, `update`, `message`, `close`), not this file. A terminal gets a live display, a file
or a pipe gets plain lines; neither ever reads a model's text as markup. Deliberately absent: any number that the loops
did not log.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TextIO

from rich.columns import Columns
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

LINE_SECONDS = 2.0  # plain lines come no faster than this
MAX_CHARACTERS = 1200  # of a completion that `side_by_side` shows


class _Stage:
    """One stage's counts, clock and latest metrics."""

    def __init__(self, name: str, total: int, done: int, now: float) -> None:
        self.name, self.total, self.step = name, total, done
        self.started = now
        self.ended: float | None = None
        self.first: tuple[float, int] | None = None
        self.latest: tuple[float, int] = (now, done)
        self.metrics: dict[str, float] = {}
        self.evaluated_at: int | None = None

    def update(self, step: int, metrics: Mapping[str, float], now: float) -> None:
        self.step, self.latest = step, (now, step)
        self.first = self.first or self.latest
        self.metrics = {**self.metrics, **metrics}  # replaced, not changed: the display reads it in another thread
        if any(name.startswith("eval/") for name in metrics):
            self.evaluated_at = step

    def left(self, now: float) -> float | None:
        """Seconds left, from the pace after this stage's first update: that one also waited for compilation."""
        (then, step), (begin, first) = self.latest, self.first or self.latest
        if step <= first:
            return 0.0 if step >= self.total else None
        return max(0.0, (then - begin) / (step - first) * (self.total - step) - (now - then))

    def columns(self, metrics: Mapping[str, float]) -> list[tuple[str, str]]:
        """The (label, value) pairs of `metrics` that a person watches, in a fixed order."""
        found = []
        for name, label in (
            ("loss/sft", "loss"), ("reward/total", "reward"), ("rollout/length", "length"), ("policy/kl_ref", "KL"),
            ("throughput/tokens_per_second", "tokens/s"),
        ):  # fmt: skip
            if metrics.get(name) is not None:
                found.append((label, _number(metrics[name])))
        held_out = [(match[1], v) for name, v in metrics.items() if (match := re.fullmatch(r"eval/(.+)/pass@1", name))]
        at = f" at {self.evaluated_at}" if self.evaluated_at not in (None, self.step) else ""
        for task, value in held_out:
            label = "held-out" if len(held_out) == 1 else f"held-out {task}"
            found.insert(min(1, len(found)), (label, f"{100 * value:.1f}%{at}"))
        return found


class LiveProgress:
    """A live display in a terminal: a bar a stage, and under it the numbers of the running one."""

    def __init__(self, console: Console, *, clock: Callable[[], float] = time.monotonic) -> None:
        self.console, self.clock = console, clock
        self.stages: list[_Stage] = []
        self.live = Live(console=console, get_renderable=self._render, refresh_per_second=4)
        self.closed = False

    def stage(self, name: str, total_steps: int, done_steps: int) -> None:
        now = self.clock()
        if self.stages:
            self.stages[-1].ended = now
        self.stages.append(_Stage(name, total_steps, done_steps, now))
        self.live.start()

    def update(self, step: int, metrics: Mapping[str, float]) -> None:
        if not self.stages:
            raise ValueError(f"step {step} was reported before a stage: call stage(name, total_steps, done_steps) first")
        self.stages[-1].update(step, metrics, self.clock())

    def message(self, text: str) -> None:
        self.console.print(Text(visible(text)))

    def close(self) -> None:
        """Stop the display and leave its last state on the screen; closing twice is the same as once."""
        if self.closed:
            return
        self.closed = True
        if self.stages:
            self.stages[-1].ended = self.clock()
            self.live.stop()

    def _render(self) -> RenderableType:
        now = self.clock()
        bars = Table.grid(padding=(0, 2))
        for justify in ("left", "left", "right", "left", "left"):
            bars.add_column(justify=justify, no_wrap=True)
        for stage in self.stages:
            left = stage.left(now)
            if stage.step >= stage.total:
                ending = "done"
            elif stage.ended is not None:
                ending = "stopped"
            else:
                ending = "first step" if stage.first is None else f"left {_clock(left)}"
            bars.add_row(
                Text(stage.name, style="bold"),
                ProgressBar(total=max(stage.total, 1), completed=stage.step if stage.total else 1, width=24),
                Text(f"{stage.step}/{stage.total}"),
                Text(_clock((stage.ended or now) - stage.started), style="dim"),
                Text(ending, style="green" if ending == "done" else "cyan"),
            )
        numbers = self.stages[-1].columns(self.stages[-1].metrics) if self.stages else []
        pairs = [Text.assemble((f"{label} ", "dim"), (value, "bold"), no_wrap=True) for label, value in numbers]
        return Group(bars, Columns(pairs, padding=(0, 3)))


class PlainProgress:
    """Lines for a log file: one about every two seconds, and always for an evaluation and for a stage's last step."""

    def __init__(self, file: TextIO, *, clock: Callable[[], float] = time.monotonic) -> None:
        self.file, self.clock = file, clock
        self.current: _Stage | None = None
        self.printed: float | None = None

    def stage(self, name: str, total_steps: int, done_steps: int) -> None:
        self.current, self.printed = _Stage(name, total_steps, done_steps, self.clock()), None
        resumed = f", {done_steps} of them done before" if done_steps else ""
        self.message(f"{name}: {total_steps} steps{resumed}")

    def update(self, step: int, metrics: Mapping[str, float]) -> None:
        stage, now = self.current, self.clock()
        if stage is None:
            raise ValueError(f"step {step} was reported before a stage: call stage(name, total_steps, done_steps) first")
        stage.update(step, metrics, now)
        asked_for = step >= stage.total or any(name.startswith("eval/") for name in metrics)
        if not asked_for and self.printed is not None and now - self.printed < LINE_SECONDS:
            return
        self.printed = now
        numbers = "  ".join(f"{label} {value}" for label, value in stage.columns(metrics))
        times = f"elapsed {_clock(now - stage.started)}" + (f"  left {_clock(stage.left(now))}" if step < stage.total else "")
        self.message(f"{stage.name} {step:>{len(str(stage.total))}}/{stage.total}  {numbers}  {times}")

    def message(self, text: str) -> None:
        self.file.write(visible(text) + "\n")
        self.file.flush()

    def close(self) -> None:
        self.file.flush()


class QuietProgress:
    """Shows nothing."""

    def stage(self, name: str, total_steps: int, done_steps: int) -> None: ...
    def update(self, step: int, metrics: Mapping[str, float]) -> None: ...
    def message(self, text: str) -> None: ...
    def close(self) -> None: ...


def make_progress(console_file: TextIO, *, quiet: bool = False) -> LiveProgress | PlainProgress | QuietProgress:
    """The progress that suits where it is shown: live in a terminal, plain lines elsewhere, nothing when quiet."""
    if quiet:
        return QuietProgress()
    console = Console(file=console_file, highlight=False)
    if console_file.isatty() and not console.is_dumb_terminal:
        return LiveProgress(console)
    return PlainProgress(console_file)


def before_after_table(summary: Mapping[str, Any]) -> Table:
    """The held-out numbers of `summary.json`: after each earlier phase, before reinforcement, and after it."""
    phases = summary.get("phases") or {}
    before, after = summary.get("before") or {}, summary.get("after") or {}
    table = Table(title_justify="left")
    for heading in ("held-out", *phases, "before RL", "after RL", "change"):
        table.add_column(heading, justify="left" if heading == "held-out" else "right", no_wrap=heading != "held-out")
    for name in dict.fromkeys([*before, *after]):
        share = "@" in name or "truncated" in name
        first, last = before.get(name), after.get(name)
        values = [*(phase.get(name) for phase in phases.values()), first, last]
        cells = ["-" if v is None else f"{100 * v:.1f}%" if share else _number(v) for v in values]
        change = Text()
        if first is not None and last is not None:
            by = last - first
            text = f"{100 * by:+.1f} points" if share else ("+" if by > 0 else "") + _number(by)
            change = Text(text, style=("green" if by > 0 else "red") if "@" in name and by else "")
        table.add_row(Text(name.removeprefix("eval/")), *cells[:-1], Text(cells[-1], style="bold"), change)
    return table


def side_by_side(examples: Mapping[str, Sequence[Mapping[str, Any]]], *, limit: int = 4) -> RenderableType:
    """The same questions before and after reinforcement, each completion as it was written."""
    after = {example.get("question"): example for example in examples.get("after") or []}
    parts: list[RenderableType] = []
    for example in list(examples.get("before") or [])[:limit]:
        question = example.get("question", "")
        table, texts = Table(expand=True), []
        for heading, found in (("before RL", example), ("after RL", after.get(question))):
            title = Text(heading)
            if found is not None:
                rewards = found.get("reward") or {}
                known = {k: "-" if v is None else _number(v) for k, v in rewards.items()}
                title.append("".join(f"  {'reward' if k == 'total' else k} {v}" for k, v in known.items()))
            table.add_column(title, ratio=1, overflow="fold")
            texts.append(Text("(not there yet)" if found is None else visible(shortened(found.get("completion", "")))))
        table.add_row(*texts)
        parts += [Text(visible(f"{question}\nreference answer: {example.get('answer', '')}")), table, Text("")]
    return Group(*parts) if parts else Text("There are no examples.")


def shortened(text: str) -> str:
    """The first and last halves of a text that is too long to show, with how much is missing between them."""
    if len(text) <= MAX_CHARACTERS:
        return text
    half = MAX_CHARACTERS // 2
    return f"{text[:half]}\n... {len(text) - 2 * half} characters ...\n{text[-half:]}"


def visible(text: str) -> str:
    """`text` with control characters spelt out: a model's output must not move the cursor or change colours."""
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]", lambda match: f"\\x{ord(match.group()):02x}", text)


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    if abs(value) >= 10_000:
        return f"{value / 1000:.3g}k" if abs(value) < 1e6 else f"{value / 1e6:.3g}M"
    if abs(value) >= 1000:
        return f"{value:.0f}"
    return f"{value:.3g}"


def _clock(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}" if minutes >= 60 else f"{minutes}:{rest:02}"
