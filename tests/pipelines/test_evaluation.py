"""An evaluation's numbers against brute force over its own completions, and its files after every kind of interruption."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxreason import config as schema
from jaxreason.cli.progress import QuietProgress
from jaxreason.pipelines import evaluation
from jaxreason.pipelines import experiment as experiments
from jaxreason.pipelines.evaluation import Asked, Shown
from jaxreason.rewards.votes import voted
from jaxreason.tasks import word_problems
from jaxreason.training.collect import RulePart

SHORT = str(Path(__file__).parents[1] / "short_run.py")
ASKED = Asked(samples=5, greedy=True, seed=3)
# whether the text holds an e: a random policy is right now and then
LUCKY = RulePart("traced.think_answer_format", kwargs={"pattern": r"[\s\S]*e[\s\S]*"})


@pytest.fixture(scope="module")
def experiment(tmp_path_factory, compiled_once):
    # every id that is drawn is a piece of text, for the rules take no other: no padding, no unknown word
    size = 7 + len(word_problems().words)
    settings = {
        "task.kwargs.heldout_size": 5,
        "evaluation.problems_per_batch": 2,
        "model.architecture.vocab_size": size,
        "sampling.banned": (0, 2),
    }
    config = schema.load(SHORT, [f"--config.{key}={value}" for key, value in settings.items()])
    config = replace(config, reward={**config.reward, "accuracy": LUCKY, "number": RulePart("math.gsm8k_answer")})
    config = replace(config, scoring=replace(config.scoring, workers=0))
    return experiments.build(config, tmp_path_factory.mktemp("run"), devices=jax.devices()[:1])


@pytest.fixture(scope="module")
def params(experiment):
    return experiments.initial_params(experiment)


def run(experiment, params, folder, *, asked=ASKED, shown=Shown(resamples=50), stop=lambda: False):  # noqa: B008
    told = {"source": "here", "asked": asked, "shown": shown, "folder": folder}
    return evaluation.evaluate(experiment, params, **told, progress=QuietProgress(), stop=stop)


@pytest.fixture(scope="module")
def whole(experiment, params, tmp_path_factory):
    """The folder of an evaluation that nothing interrupted, and its results."""
    folder = tmp_path_factory.mktemp("evaluations") / "whole"
    return folder, run(experiment, params, folder)


def rows_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "completions.jsonl").read_text().splitlines()]


def after(times: int):
    """A stop() that says yes when it has been asked so often."""
    count = itertools.count()
    return lambda: next(count) >= times


def test_every_completion_is_there_in_order(whole, experiment):
    folder, results = whole
    rows = rows_of(folder)
    expected = [("greedy", p, 0) for p in range(5)] + [("sampled", p, c) for p in range(5) for c in range(5)]
    assert [(row["kind"], row["number"], row["child"]) for row in rows] == expected
    for row in rows:
        problem = experiment.task.heldout[row["number"]]
        assert (row["problem_id"], row["question"], row["answer"]) == (problem.id, problem.question, problem.answer)
        assert row["voted"] == voted(row["completion"]) and row["failed"] == []
        assert row["reward"]["accuracy"] == ("e" in row["completion"] and row["stop"] == "eos")
        assert row["reward"]["total"] == pytest.approx(sum(v for k, v in row["reward"].items() if k != "total"))
    assert 0 < sum(row["reward"]["accuracy"] for row in rows) < len(rows)
    assert json.loads((folder / "results.json").read_text()) == results
    counts = results["counts"]
    assert (counts["problems"], counts["completions"], counts["unscored_completions"], counts["failed"]) == (5, 30, 0, {})
    assert set(results["versions"]) == {"jaxreason", "jax"} and results["config"]["sampling"]["max_completion_tokens"] == 32


def majority(rows: list[dict], k: int) -> float:
    """Over every subset of k samples: the mean correctness of the answers with most votes."""
    shares = []
    for subset in itertools.combinations(rows, k):
        votes = Counter(row["voted"] for row in subset if row["voted"] is not None)
        if not votes:
            shares.append(0.0)
            continue
        first = [answer for answer, count in votes.items() if count == max(votes.values())]
        right = {a: np.mean([row["reward"]["accuracy"] for row in rows if row["voted"] == a]) for a in first}
        shares.append(np.mean([right[answer] for answer in first]))
    return float(np.mean(shares))


def test_the_numbers_are_those_of_brute_force(whole):
    folder, results = whole
    numbers = results["sampled"]["all"]["all"]
    groups = [[row for row in rows_of(folder) if row["kind"] == "sampled" and row["number"] == p] for p in range(5)]
    assert [name for name in numbers if name.startswith("pass@")] == ["pass@1", "pass@2", "pass@4", "pass@5"]
    for k in (1, 2, 4, 5):
        passed = [
            np.mean([any(row["reward"]["accuracy"] for row in subset) for subset in itertools.combinations(rows, k)])
            for rows in groups
        ]
        assert numbers[f"pass@{k}"]["value"] == pytest.approx(np.mean(passed), abs=1e-9)
        assert numbers[f"majority@{k}"]["value"] == pytest.approx(np.mean([majority(rows, k) for rows in groups]), abs=1e-9)
    every = [row for rows in groups for row in rows]
    assert numbers["avg@5"]["value"] == pytest.approx(np.mean([row["reward"]["accuracy"] for row in every]))
    assert numbers["ended"]["value"] == pytest.approx(np.mean([row["stop"] == "eos" for row in every]))
    assert numbers["truncated"]["value"] == pytest.approx(np.mean([row["stop"] == "length" for row in every]))
    assert numbers["length"]["value"] == pytest.approx(np.mean([row["length"] for row in every]))
    for name, found in numbers.items():
        assert found["low"] <= found["value"] <= found["high"] and found["problems"] == 5, name
    greedy = [row for row in rows_of(folder) if row["kind"] == "greedy"]
    assert results["greedy"]["all"]["all"]["pass@1"]["value"] == pytest.approx(
        np.mean([row["reward"]["accuracy"] for row in greedy])
    )


def test_the_greedy_part_is_the_evaluation_of_training(whole, experiment, params):
    metrics, rows = experiments.evaluator(experiment)(params)
    folder, results = whole
    assert [row["completion"] for row in rows] == [row["completion"] for row in rows_of(folder) if row["kind"] == "greedy"]
    assert results["greedy"]["all"]["all"]["pass@1"]["value"] == metrics["eval/word_problems/pass@1"]


@pytest.mark.parametrize("stops", [pytest.param(0, marks=pytest.mark.slow), 2, pytest.param(4, marks=pytest.mark.slow)])
def test_it_goes_on_where_it_stopped(whole, experiment, params, tmp_path, stops):
    """Batches: three greedy ones, three sampled ones."""
    folder, _ = whole
    assert run(experiment, params, tmp_path, stop=after(stops)) is None
    begun = (tmp_path / "completions.jsonl").read_bytes() if stops else b""
    assert len(begun.splitlines()) == {0: 0, 2: 4, 4: 15}[stops] and not (tmp_path / "results.json").exists()
    assert run(experiment, params, tmp_path) is not None
    for name in ("completions.jsonl", "results.json", "settings.json"):
        assert (tmp_path / name).read_bytes() == (folder / name).read_bytes()


@pytest.mark.parametrize("cut", [pytest.param(-1, marks=pytest.mark.slow), -40, pytest.param(-2000, marks=pytest.mark.slow)])
def test_a_batch_that_was_torn_is_made_again(whole, experiment, params, tmp_path, cut):
    """As a kill leaves it: the last line without its end, without its tail, or a part of the batch."""
    folder, _ = whole
    run(experiment, params, tmp_path, stop=after(5))
    file = tmp_path / "completions.jsonl"
    file.write_bytes(file.read_bytes()[:cut])
    run(experiment, params, tmp_path)
    assert file.read_bytes() == (folder / "completions.jsonl").read_bytes()


def test_a_finished_one_is_read_again_with_other_k_and_nothing_is_sampled(whole, experiment, params, tmp_path):
    folder, _ = whole
    for name in ("completions.jsonl", "settings.json"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    shown = Shown(k=(3,), categories=("start",), resamples=10)
    results = run(experiment, params, tmp_path, shown=shown, stop=lambda: True)
    assert [name for name in results["sampled"]["all"]["all"] if "@" in name] == ["avg@5", "pass@3", "majority@3"]
    starts = Counter(str(problem.metadata["start"]) for problem in experiment.task.heldout)
    assert {value: found["length"]["problems"] for value, found in results["greedy"]["start"].items()} == starts


def test_a_completion_depends_on_seed_number_and_child_alone(whole, experiment, params, tmp_path):
    """Fewer problems, other batches, all completions at once, fewer samples: the same completions."""
    sampled = {(r["number"], r["child"]): r["completion"] for r in rows_of(whole[0]) if r["kind"] == "sampled"}
    config = experiment.config
    at_once = replace(config, evaluation=replace(config.evaluation, problems_per_batch=4))
    at_once = replace(at_once, sampling=replace(config.sampling, slots=16))
    asked = Asked(samples=3, greedy=False, seed=3, problems=4)
    run(experiment._replace(config=at_once), params, tmp_path / "other", asked=asked)
    rows = rows_of(tmp_path / "other")
    assert len(rows) == 12 and all(row["completion"] == sampled[row["number"], row["child"]] for row in rows)
    run(experiment, params, tmp_path / "seed", asked=replace(asked, seed=4))
    assert [row["completion"] for row in rows_of(tmp_path / "seed")] != [row["completion"] for row in rows]


def test_another_evaluation_is_refused_the_folder(whole, experiment, params, tmp_path):
    folder, _ = whole
    before = {file.name: file.read_bytes() for file in folder.iterdir()}

    def refused(says: str, *, e=experiment, p=params, asked=ASKED) -> None:
        with pytest.raises(ValueError, match=says):
            run(e, p, folder, asked=asked)

    refused(r"asked.samples = 5, and this one has 4", asked=replace(ASKED, samples=4))
    refused(r"asked.seed = 3, and this one has 0", asked=replace(ASKED, seed=0))
    refused("weights = .*give another --out", p=jax.tree.map(lambda x: x * 2, params))
    sampling = replace(experiment.config.sampling, temperature=0.5)
    refused(
        r"sampling.temperature = 1.0, and this one has 0.5",
        e=experiment._replace(config=replace(experiment.config, sampling=sampling)),
    )
    task = replace(experiment.task, heldout=experiment.task.heldout[::-1])
    refused("problems = ", e=experiment._replace(task=task))
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(ValueError, match="no evaluation's folder and holds 'thesis.tex'"):
        run(experiment, params, tmp_path)


def test_a_damaged_file_is_named(whole, experiment, params, tmp_path):
    folder, _ = whole
    lines = (folder / "completions.jsonl").read_bytes().splitlines(keepends=True)
    (tmp_path / "settings.json").write_bytes((folder / "settings.json").read_bytes())
    for changed in ([lines[0], b"{}\n", *lines[2:]], [lines[1], lines[0]], [*lines, lines[-1]], [b"\xff\n"]):
        (tmp_path / "completions.jsonl").write_bytes(b"".join(changed))
        with pytest.raises(ValueError, match=r"line \d+ of .*completions.jsonl is not the completion that is due"):
            run(experiment, params, tmp_path)


@pytest.mark.parametrize(
    ("asked", "shown", "says"),
    [
        (Asked(samples=4), Shown(k=(1, 5)), "--k holds 5, and there are 4 samples"),
        (Asked(), Shown(k=(1,)), "--k holds 1, and there are 0 samples"),
        (Asked(samples=-1), Shown(), "--samples is -1"),
        (Asked(seed=-1), Shown(), "--seed is -1"),
        (Asked(), Shown(resamples=0), "--resamples is 0"),
        (Asked(), Shown(categories=("strat",)), "--category is 'strat', which no problem has: did you mean 'start'"),
    ],
)
def test_what_cannot_be_asked_is_refused_before_anything_is_written(experiment, params, tmp_path, asked, shown, says):
    with pytest.raises(ValueError, match=says):
        run(experiment, params, tmp_path / "new", asked=asked, shown=shown)
    assert not (tmp_path / "new").exists()
