"""The report of a run: what the page holds, that it is safe and complete in itself, and what a real browser shows."""

from __future__ import annotations

import json
import math
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jaxreason.training.curves import MEAN_FROM, PAGE_POINTS, Series, read_curves, running_mean, thinned
from jaxreason.training.report import MAX_CHARACTERS, MAX_ROLLOUTS, embed, write_report

NASTY = "<think>\n  3 + 4 = 7\n</think></script><script>document.title='broken'</script><!-- <b>&amp; \u2028 \ud800 思考 __DATA__"


def rollout(number: int, **other: Any) -> dict[str, Any]:
    right = float(number % 3 == 0)
    return {
        "stage": "reinforce",
        "step": 1 + number // 8,
        "problem_id": f"p-{number // 4}",
        "question": f"What is {number} + 1?",
        "answer": str(number + 1),
        "completion": NASTY if number % 10 == 0 else f"<answer>{number + 1}</answer>",
        "reward": {"total": right + 0.1, "accuracy": right, "format": None if number % 5 == 0 else 1.0},
        "advantage": math.sin(number),
        "length": 5 + number * 7 % 23,
        "stop": "length" if number % 7 == 0 else "eos",
    } | other


def write_lines(path: Path, objects: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(line) + "\n" for line in objects), encoding="utf-8")


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A finished run with a supervised and a reinforcement stage."""
    folder = tmp_path / "first run"
    folder.mkdir()
    config = {"name": "quick </title> & co", "algorithm": {"name": "grpo", "group": 4}, "seed": 0}
    (folder / "config.json").write_text(json.dumps(config))
    lines: list[dict[str, Any]] = [{"stage": "supervised", "step": s, "loss/sft": 3.0 / s} for s in range(1, 11)]
    for s in range(1, 21):
        line = {
            "stage": "reinforce",
            "step": s,
            "reward/total": s / 20,
            "reward/accuracy": s / 25,
            "reward/zero_variance": 0.5,
            "rollout/length": 20 + s,
            "policy/sampler_gap": 0.0 if s == 3 else 1e-6 * s,
        }
        lines.append(line | ({"eval/sum/pass@1": s / 40, "eval/sum/length": 9.0} if s % 5 == 0 else {}))
    write_lines(folder / "metrics.jsonl", lines)
    write_lines(folder / "rollouts.jsonl", [rollout(n) for n in range(120)])
    examples = {
        side: [{"question": f"q{n}", "answer": "1", "completion": f"{side} {n} {NASTY}"} for n in order]
        for side, order in (("before", (0, 1, 2)), ("after", (2, 0, 1)))
    }
    (folder / "examples.json").write_text(json.dumps(examples))
    summary = {
        "before": {"eval/sum/pass@1": 0.25},
        "after": {"eval/sum/pass@1": 0.75},
        "seconds": 107.2,
        "parameters": 402560,
    }
    (folder / "summary.json").write_text(json.dumps(summary))
    return folder


class Page(HTMLParser):
    """The elements of a page, and the text inside each script."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag == "script":
            self.scripts.append("")

    def handle_data(self, data: str) -> None:
        if self.cdata_elem == "script":
            self.scripts[-1] += data

    @property
    def data(self) -> dict[str, Any]:
        return json.loads(self.scripts[0])


def page_of(run: Path) -> Page:
    path = write_report(run)
    assert path == run / "report.html"
    return Page(path.read_text(encoding="utf-8"))


def test_the_page_asks_for_nothing_outside_itself(run: Path) -> None:
    page = page_of(run)
    assert not {tag for tag, _ in page.tags} & {"link", "img", "iframe", "object", "embed", "base", "form"}
    assert not [(tag, attrs) for tag, attrs in page.tags if {"src", "href", "action", "srcset"} & set(attrs)]
    policy = next(attrs["content"] for _, attrs in page.tags if attrs.get("http-equiv") == "Content-Security-Policy")
    assert policy and policy.startswith("default-src 'none'") and "http" not in policy
    written = (run / "report.html").read_text(encoding="utf-8").replace(page.scripts[0], "")
    assert not re.search(r"https?:|url\(|@import|fetch\(|XMLHttp|[\"']//", written)


def test_the_embedded_data_is_the_runs_and_no_text_breaks_out_of_it(run: Path) -> None:
    page = page_of(run)
    assert [attrs.get("type") for tag, attrs in page.tags if tag == "script"] == ["application/json", None]
    data = page.data
    assert data["rollouts"]["rows"] == [rollout(n) for n in range(120)] and data["rollouts"]["left_out"] == 0
    assert data["title"] == "quick </title> & co" and data["finished"] and data["notices"] == []
    assert ["algorithm", "grpo"] in data["facts"] and ["parameters", 402560] in data["facts"]
    assert data["config"] == [["name", data["title"]], ["algorithm.name", "grpo"], ["algorithm.group", 4], ["seed", 0]]
    assert data["table"]["rows"] == [["eval/sum/pass@1", 0.25, 0.75]]
    assert [(e["question"], e["before"]["completion"], e["after"]["completion"]) for e in data["examples"]] == [
        (f"q{n}", f"before {n} {NASTY}", f"after {n} {NASTY}") for n in range(3)
    ]


def test_embed_has_no_character_that_html_reads() -> None:
    text = embed({"<a>": NASTY, "&": ["]]>", "<!--"]})
    assert not set("<>&") & set(text) and text.isascii()
    assert json.loads(text) == {"<a>": NASTY, "&": ["]]>", "<!--"]}
    with pytest.raises(ValueError):
        embed(float("nan"))


def test_curves_hold_the_logged_values(run: Path) -> None:
    curves = {curve["name"]: curve for curve in page_of(run).data["curves"]}
    assert set(curves) == {"reward", "accuracy", "length", "sampler_gap", "supervised_loss", "shares"}
    assert [s["label"] for s in curves["reward"]["series"]] == ["total", "accuracy"]
    assert curves["reward"]["series"][1]["value"] == [s / 25 for s in range(1, 21)]
    assert curves["accuracy"]["series"] == [
        {"label": "sum", "step": [5, 10, 15, 20], "value": [0.125, 0.25, 0.375, 0.5], "mean": None}
    ]
    assert curves["supervised_loss"]["step_unit"] == "updates (supervised)" and not curves["supervised_loss"]["borders"]
    gap = curves["sampler_gap"]
    assert gap["scale"] == "log" and gap["missing"] == 1 and gap["series"][0]["step"] == [1, 2, *range(4, 21)]
    assert "Policy entropy" in page_of(run).data["without"]


def test_the_png_files_show_something(run: Path) -> None:
    image = pytest.importorskip("matplotlib.image")
    names = {curve["name"] for curve in page_of(run).data["curves"]}
    files = {path.stem: path for path in (run / "curves").iterdir()}
    assert set(files) == names
    for name, path in files.items():
        assert path.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
        pixels = image.imread(path)[..., :3]
        assert pixels.shape[0] > 400 and pixels.shape[1] > 700
        saturated = np.ptp(pixels, axis=-1) > 0.3  # the drawn lines: everything else is grey
        assert saturated.sum() > 500, name
        assert np.count_nonzero(saturated.any(axis=0)) > 0.5 * pixels.shape[1], name


def test_stages_lie_end_to_end_and_a_repeated_step_counts_once() -> None:
    metrics = [{"stage": "a", "step": s, "eval/x/pass@1": 0.1 * s} for s in (1, 2, 2)]
    metrics += [{"stage": "b", "step": s, "eval/x/pass@1": v} for s, v in ((1, 0.5), (2, 0.6), (1, 0.7), (2, None))]
    (curve,), _ = read_curves(metrics)
    assert curve.series == [Series("x", [1, 2, 3], [0.1, 0.2, 0.7], None)]
    assert list(curve.borders) == [(2, "b")] and curve.missing == 1 and curve.step_unit == "updates (a, then b)"


def test_running_mean_is_the_windows_mean_and_stays_in_its_stage() -> None:
    values = np.random.default_rng(0).normal(size=160)
    stage_of = [0] * 70 + [1] * 90
    half = 4  # a fortieth of 160
    windows = [[j for j in range(160) if abs(i - j) <= half and stage_of[i] == stage_of[j]] for i in range(160)]
    mean = running_mean(values.tolist(), stage_of)
    assert mean is not None
    np.testing.assert_allclose(mean, [values[window].mean() for window in windows], atol=1e-12)
    assert running_mean([1.0] * (MEAN_FROM - 1), [0] * (MEAN_FROM - 1)) is None


def test_a_long_line_is_thinned_for_the_page_and_keeps_its_ends() -> None:
    steps = list(range(5 * PAGE_POINTS + 3))
    line = thinned(Series("x", steps, [2.0 * s for s in steps], [3.0 * s for s in steps]))
    assert PAGE_POINTS / 2 < len(line.step) <= PAGE_POINTS + 1 and (line.step[0], line.step[-1]) == (0, steps[-1])
    assert line.mean is not None
    assert all(v == 2 * s and m == 3 * s for s, v, m in zip(line.step, line.value, line.mean, strict=True))


def test_a_run_that_was_killed(run: Path) -> None:
    (run / "summary.json").unlink()
    (run / "examples.json").write_text(json.dumps({"before": [{"question": "q", "completion": "x"}]}))
    for name in ("metrics.jsonl", "rollouts.jsonl"):
        with (run / name).open("a") as file:
            file.write('{"stage": "reinforce", "step": 21, "rew')
    data = page_of(run).data
    assert not data["finished"] and len(data["rollouts"]["rows"]) == 120
    assert data["notices"] == [
        "This run has not finished: it has no summary.json; last steps seen: supervised 10, reinforce 20.",
        "The last line of metrics.jsonl is half-written and is left out.",
        "The last line of rollouts.jsonl is half-written and is left out.",
    ]
    assert data["table"]["columns"] == ["first evaluation", "latest evaluation"]
    assert ["eval/sum/pass@1", 0.125, 0.5] in data["table"]["rows"]
    assert data["examples"][0]["after"] is None


def test_values_that_are_not_finite_are_counted_and_not_drawn(tmp_path: Path) -> None:
    lines = [{"stage": "reinforce", "step": s, "reward/total": math.nan if s == 2 else 1.0} for s in (1, 2, 3)]
    write_lines(tmp_path / "metrics.jsonl", lines)
    (curve,) = page_of(tmp_path).data["curves"]
    assert curve["missing"] == 1 and curve["series"][0]["step"] == [1, 3]


def test_a_run_that_has_only_begun(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "metrics.jsonl").write_text("")
    data = page_of(tmp_path).data
    assert data["notices"] == ["Nothing has been logged yet: this run has only begun."]
    assert not data["curves"] and not data["without"] and not (tmp_path / "curves").exists()


def test_what_is_not_a_run(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is not a run: it has none of config.json"):
        write_report(tmp_path)
    with pytest.raises(ValueError, match="is not a folder"):
        write_report(tmp_path / "nowhere")
    assert not list(tmp_path.iterdir())


def test_the_page_holds_the_newest_rollouts(tmp_path: Path) -> None:
    write_lines(tmp_path / "rollouts.jsonl", [rollout(n) for n in range(MAX_ROLLOUTS + 5)])
    rollouts = page_of(tmp_path).data["rollouts"]
    assert len(rollouts["rows"]) == MAX_ROLLOUTS and rollouts["left_out"] == 5
    assert rollouts["rows"][0] == rollout(5)

    size = MAX_CHARACTERS // 4
    write_lines(tmp_path / "rollouts.jsonl", [rollout(n, completion="x" * size) for n in range(6)])
    rollouts = page_of(tmp_path).data["rollouts"]
    assert [row["question"][8] for row in rollouts["rows"]] == ["3", "4", "5"] and rollouts["left_out"] == 3


def test_without_matplotlib_the_page_is_written_and_names_the_extra(run: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from jaxreason.training.report import write_report\n"
        "assert 'matplotlib' not in sys.modules\n"
        "sys.modules['matplotlib'] = sys.modules['matplotlib.figure'] = None\n"
        "write_report(Path(sys.argv[1]))"
    )
    subprocess.run([sys.executable, "-c", code, str(run)], check=True, timeout=60)
    data = Page((run / "report.html").read_text(encoding="utf-8")).data
    assert len(data["notices"]) == 1 and "jaxreason[plot]" in data["notices"][0] and data["curves"]
    assert not (run / "curves").exists()


# ---- what a browser makes of it

BROWSER = next(filter(None, map(shutil.which, ("google-chrome", "chromium", "chromium-browser"))), None)
needs_browser = pytest.mark.skipif(BROWSER is None, reason="needs Chromium or Chrome on the PATH")


class Shown(HTMLParser):
    """The rollout rows (id and cells) and all visible text of a page as the browser left it."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.rows: list[tuple[int, list[str]]] = []
        self.texts: list[str] = []
        self.tags: list[str] = []
        self.in_cell = False
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag == "tr":
            number = dict(attrs).get("data-row")
            self.in_cell = number is not None
            if number is not None:
                self.rows.append((int(number), []))
        elif tag == "td" and self.in_cell:
            self.rows[-1][1].append("")

    def handle_endtag(self, tag: str) -> None:
        if tag == "tr":
            self.in_cell = False

    def handle_data(self, data: str) -> None:
        if self.cdata_elem is None:
            self.texts.append(data)
            if self.in_cell and self.rows[-1][1]:
                self.rows[-1][1][-1] += data


def shown(run: Path, profile: Path, view: str = "") -> Shown:
    assert BROWSER is not None
    flags = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-quic",
        "--no-first-run",
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-sync",
        f"--user-data-dir={profile}",
        "--dump-dom",
    ]
    command = [BROWSER, *flags, (run / "report.html").as_uri() + "#" + view]
    found = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    return Shown(found.stdout)


@needs_browser
def test_a_browser_shows_the_rows_that_were_asked_for(run: Path, tmp_path: Path) -> None:
    write_report(run)
    page = shown(run, tmp_path / "profile", "part=accuracy&is=%3D&value=0&step=2-9&sort=length&open=10")
    expected = [n for n in range(120) if n % 3 and 2 <= 1 + n // 8 <= 9]
    expected.sort(key=lambda n: rollout(n)["length"])
    assert [number for number, _ in page.rows] == expected[:50]
    assert [cells[-2] for _, cells in page.rows] == [str(rollout(n)["length"]) for n in expected[:50]]
    everything = "".join(page.texts)
    assert f"1\u2013{min(50, len(expected))} of {len(expected)}" in everything
    assert NASTY.replace("\ud800", "\ufffd") in everything  # the opened row: tags, line breaks and spaces as they were written
    assert "broken" not in page.texts and page.tags.count("script") == 2
    assert page.tags.count("svg") == 1 + 6 and "+50.0 points" in everything
    assert "This file is complete in itself." in everything  # the script's last words: nothing failed before them


@needs_browser
def test_a_browser_shows_text_matches_newest_first_and_the_second_page(run: Path, tmp_path: Path) -> None:
    write_report(run)
    page = shown(run, tmp_path / "profile", "text=%3Canswer%3E&page=2")
    matching = [n for n in range(120) if n % 10]
    matching.sort(key=lambda n: -(1 + n // 8))
    assert [number for number, _ in page.rows] == matching[50:100]


@needs_browser
def test_a_browser_shows_the_group_of_a_row(run: Path, tmp_path: Path) -> None:
    write_report(run)
    page_file = run / "report.html"
    click = "<script>document.querySelector('.detail button').click()</script></body>"
    page_file.write_text(page_file.read_text(encoding="utf-8").replace("</body>", click), encoding="utf-8")
    page = shown(run, tmp_path / "profile", "text=31&stop=eos&open=30")
    assert [number for number, _ in page.rows] == [28, 29, 30, 31]
    assert all(cells[2] == "p-7" for _, cells in page.rows) and "only problem p-7 \u00d7" in page.texts


@needs_browser
def test_a_browser_shows_a_run_that_has_only_begun(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    write_report(tmp_path)
    everything = "".join(shown(tmp_path, tmp_path / "profile").texts)
    assert "Nothing has been logged yet" in everything and "This file is complete in itself." in everything
