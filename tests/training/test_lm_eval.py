"""lm-evaluation-harness, a real client, runs task files on our policy: the numbers are those of its own transformers backend."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("lm_eval", reason="the extra 'eval' is not installed")

TESTS = Path(__file__).parents[1]
GOLDENS = json.loads((TESTS / "goldens" / "lm_eval.json").read_text())
TASKS = ["ours_choice", "ours_generate", "ours_rolling"]


@pytest.fixture(scope="module")
def folder(shared: Path) -> Path:
    return shared / "data" / "models" / "tiny_qwen2"


@pytest.fixture(autouse=True)
def _their_warnings() -> Any:
    with warnings.catch_warnings():  # of the harness and what it imports; ours are errors elsewhere
        warnings.simplefilter("ignore")
        yield


def policy(folder: Path, **settings: Any) -> Any:
    from jaxreason.training.lm_eval import Policy

    return Policy(folder, **settings)


@pytest.mark.parametrize(("name", "length"), [("whole", 2048), pytest.param("short", 48, marks=pytest.mark.slow)])
def test_the_harness_finds_what_it_finds_with_transformers(
    folder: Path, name: str, length: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Log-likelihood, generation and rolling log-likelihood, in whole rows and in rows so short that texts are cut."""
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    monkeypatch.chdir(TESTS / "fixtures" / "lm_eval")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path))
    manager = TaskManager(include_path=".", include_defaults=False)
    model = policy(folder, max_length=length, batch_size=4)
    found = simple_evaluate(model=model, tasks=TASKS, task_manager=manager, bootstrap_iters=0)
    assert found is not None
    for task, golden in GOLDENS[name].items():
        for metric, value in golden["results"].items():
            assert found["results"][task][metric] == pytest.approx(value, rel=1e-4), (task, metric)
        answers = [sample["filtered_resps"] for sample in found["samples"][task]]
        assert len(answers) == len(golden["answers"]) >= 2
        for ours, theirs in zip(answers, golden["answers"], strict=True):
            if task == "ours_choice":
                assert [bool(greedy) for _, greedy in ours] == [bool(greedy) for _, greedy in theirs]
                np.testing.assert_allclose([logp for logp, _ in ours], [logp for logp, _ in theirs], rtol=1e-4, atol=1e-3)
            elif task == "ours_rolling":
                np.testing.assert_allclose(ours, theirs, rtol=1e-4)
            else:
                assert ours == theirs


@pytest.mark.slow
def test_what_greedy_decoding_writes_is_greedy_and_nothing_else_is(folder: Path) -> None:
    from lm_eval.api.instance import Instance

    model = policy(folder, batch_size=2)
    contexts = [model.tok_encode("The sky is"), model.tok_encode("Count: one, two,"), model.tok_encode("x")]
    model.prepared = model.engine.prepare(model.params)
    from jaxreason.sampling.law import Law

    made = model.engine.generate(model.prepared, contexts, max_tokens=7, law=Law(greedy=True)).completions
    asked, wanted = [], []
    for context, (completion,) in zip(contexts, made, strict=True):
        other = [*completion.tokens[:-1], (completion.tokens[-1] + 1) % 100]
        asked += [(None, context, list(completion.tokens)), (None, context, other)]
        wanted.append(sum(completion.logp))
    got = model._loglikelihood_tokens(asked)
    assert [greedy for _, greedy in got] == [True, False] * 3
    np.testing.assert_allclose([logp for logp, _ in got[::2]], wanted, atol=1e-4)
    # sampled: from the seed, and another one from another
    kwargs = {"until": [], "max_gen_toks": 12, "do_sample": True, "temperature": 1.0, "top_k": 50}
    requests = [Instance("generate_until", {}, ("The sky is", dict(kwargs)), number) for number in range(3)]
    first, again = model.generate_until(requests), model.generate_until(requests)
    model.seed = 1
    assert first == again != model.generate_until(requests) and len(set(first)) > 1


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"max_length": 1}, "max_length 1: expected"),
        ({"batch_size": 0}, "batch_size is 0"),
    ],
)
def test_settings_that_cannot_be_are_refused(folder: Path, settings: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        policy(folder, **settings)


def test_requests_that_cannot_be_answered_are_refused(folder: Path, tmp_path: Path) -> None:
    from lm_eval.api.instance import Instance

    with pytest.raises(ValueError, match="holds no config.json: give the folder of a model"):
        policy(tmp_path)
    model = policy(folder, max_length=64, max_gen_toks=80)
    for kwargs, says in (
        ({}, "asks for 80 new tokens"),
        ({"max_gen_toks": 64}, "asks for 64 new tokens, and max_length is 64"),
        ({"max_gen_toks": 8, "num_beams": 4}, "set 'num_beams', which is not understood"),
    ):
        with pytest.raises(ValueError, match=says):
            model.generate_until([Instance("generate_until", {}, ("x", kwargs), 0)])
    with pytest.raises(ValueError, match="request 0 has 0 tokens of context and 1 of continuation"):
        model._loglikelihood_tokens([(None, [], [5])])
