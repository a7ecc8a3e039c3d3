"""Texts in, completions out, with real tokenizers and checkpoints."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from jaxreason import sharding
from jaxreason.models import decoder, huggingface
from jaxreason.models.config import Numerics
from jaxreason.models.tokenizer import load_tokenizer
from jaxreason.sampling.generate import Engine
from jaxreason.sampling.law import Law
from jaxreason.types import StopReason

TEXTS = ["What is 2 + 3?", "Ann has 6 coins. Buys 9. Doubles them. How many?", "x"]


@cache
def parts(folder: Path) -> tuple[Any, Any, Any, Any]:
    mesh = sharding.make_mesh(sharding.MeshConfig(), devices=jax.devices()[:1])
    model = decoder.make_decoder(huggingface.read_architecture(folder), Numerics(), mesh)
    params = huggingface.load_params(model.specs, folder, dtype="float32", mesh=mesh)
    return model, load_tokenizer(folder), mesh, params


@pytest.fixture(scope="module")
def folder(shared: Path) -> Path:
    return shared / "data" / "models" / "tiny_qwen2"


@pytest.fixture(scope="module")
def ready(folder: Path) -> tuple[Engine, Any]:
    model, tokenizer, mesh, params = parts(folder)
    engine = Engine(model, tokenizer, mesh, slots=8, max_prompt_tokens=64, segment=8)
    return engine, engine.prepare(params)


def rows(out: Any) -> list[list[list[int]]]:
    return [[list(each.tokens) for each in group] for group in out.completions]


def test_varied_calls_run_the_same_programs(ready: tuple[Engine, Any]) -> None:
    engine, params = ready
    rng = np.random.default_rng(0)

    def call(number: int) -> None:
        prompts = [rng.integers(10, 300, rng.integers(1, 33)).tolist() for _ in range(rng.integers(3, 5))]
        stop = [["the"], ["a", "\n"], ["Answer:"]][number % 3]
        out = engine.generate(params, prompts, 4, max_tokens=int(rng.integers(2, 30)), seed=number, stop=stop)
        assert [len(group) for group in out.completions] == [4] * len(prompts)

    for number in range(3):
        call(number)
    known = engine.compilations
    assert known > 0
    for number in range(20):
        call(number)
    assert engine.compilations == known


def test_completions_are_a_function_of_seed_and_place(ready: tuple[Engine, Any], folder: Path) -> None:
    engine, params = ready
    one = engine.generate(params, TEXTS, 4, max_tokens=24, seed=3)
    assert rows(engine.generate(params, TEXTS, 4, max_tokens=24, seed=3)) == rows(one)
    assert rows(engine.generate(params, TEXTS, 4, max_tokens=24, seed=4)) != rows(one)
    fewer = engine.generate(params, TEXTS[:2], 4, max_tokens=24, seed=3)
    assert rows(fewer) == rows(one)[:2]
    model, tokenizer, mesh, _ = parts(folder)
    wide = Engine(model, tokenizer, mesh, slots=16, max_prompt_tokens=64, segment=100)
    assert rows(wide.generate(params, TEXTS, 4, max_tokens=24, seed=3)) == rows(one)
    assert one.prompt_tokens == sum(len(tokenizer.hf(text)["input_ids"]) for text in TEXTS) and one.finished
    assert one.new_tokens == sum(len(each.tokens) for group in one.completions for each in group)


def test_lengths_texts_and_reasons(ready: tuple[Engine, Any]) -> None:
    engine, params = ready
    limits = [1 + i for i in range(12)]
    out = engine.generate(params, TEXTS, 4, max_tokens=limits, law=Law(banned=engine.tokenizer.eos_ids[1:]))
    for each, limit in zip([each for group in out.completions for each in group], limits, strict=True):
        assert len(each.tokens) <= limit and len(each.logp) == len(each.mask) == len(each.tokens)
        ended = each.tokens[-1] in engine.tokenizer.eos_ids
        assert each.stop is (StopReason.EOS if ended else StopReason.LENGTH) and (ended or len(each.tokens) == limit)
        assert each.text == engine.tokenizer.decode(each.tokens)


def test_stop_strings_are_left_out_of_the_text(ready: tuple[Engine, Any]) -> None:
    engine, params = ready
    out = engine.generate(params, TEXTS, 8, max_tokens=30, stop=["e", "1"], step=["o"])
    stopped = [each for group in out.completions for each in group if each.stop is StopReason.STOP_STRING]
    assert len(stopped) > 6
    for each in stopped:
        assert "e" not in each.text and "1" not in each.text
        whole = engine.tokenizer.decode(each.tokens)
        assert whole[len(each.text)] in "e1" or "\ufffd" in whole
    assert any(each.step_ends for group in out.completions for each in group)


def test_a_pattern_bounds_the_text(ready: tuple[Engine, Any]) -> None:
    engine, params = ready
    out = engine.generate(params, TEXTS, 4, max_tokens=16, pattern="[1-9][0-9]{0,3}")
    assert all(each.text.isdigit() and 1 <= int(each.text) <= 9999 for group in out.completions for each in group)


def test_told_to_stop_it_returns_what_is_finished(ready: tuple[Engine, Any]) -> None:
    engine, params = ready
    asked: Any = {"n": 8, "max_tokens": [5, 30] * 12, "seed": 1}
    whole = engine.generate(params, TEXTS, **asked)
    seen: list[tuple[int, int, int]] = []
    out = engine.generate(params, TEXTS, **asked, progress=lambda *now: seen.append(now), stopping=lambda: len(seen) == 3)
    assert len(seen) == 3 and seen == sorted(seen) and not out.finished
    kinds = {each.stop for group in out.completions for each in group}
    assert StopReason.PARKED in kinds and kinds != {StopReason.PARKED}
    for ours, theirs in zip(sum(out.completions, []), sum(whole.completions, []), strict=True):
        if ours.stop is StopReason.PARKED:
            assert list(ours.tokens) == list(theirs.tokens[: len(ours.tokens)])
        else:
            assert list(ours.tokens) == list(theirs.tokens) and ours.stop is theirs.stop
    assert seen[-1][0] == sum(each.stop is not StopReason.PARKED for group in out.completions for each in group)
    assert seen[-1][1] == 24 and seen[-1][2] == out.new_tokens


def test_prompts_that_are_too_long(ready: tuple[Engine, Any], folder: Path) -> None:
    engine, params = ready
    with pytest.raises(ValueError, match="prompt 1 has 65 tokens, and max_prompt_tokens is 64: shorten it"):
        engine.generate(params, [[5] * 64, [5] * 65])
    model, tokenizer, mesh, _ = parts(folder)
    cutting = Engine(model, tokenizer, mesh, slots=8, max_prompt_tokens=64, overlong="cut")
    long, short = [*range(10, 110)], [*range(46, 110)]
    cut = cutting.generate(params, [long], 2, max_tokens=8)
    assert cut.cut_prompts == 1 and cut.prompt_tokens == 64
    assert rows(cut) == rows(cutting.generate(params, [short], 2, max_tokens=8))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"prompts": []}, "given 0 prompts and n = 1: expected at least one of each"),
        ({"n": 0}, "given 3 prompts and n = 0"),
        ({"prompts": ["a", ""]}, "prompt 1 is empty"),
        ({"max_tokens": 0}, "max_tokens is 0 in one place"),
        ({"law": Law(top_p=0.0)}, r"law\.top_p is 0\.0: expected"),
        ({"stop": [""]}, "expected|at least one character"),
        ({"pattern": "(a"}, "a"),
    ],
)
def test_what_cannot_be_asked_is_said_before_compiling(ready: tuple[Engine, Any], given: dict[str, Any], message: str) -> None:
    engine, params = ready
    known = engine.compilations
    with pytest.raises(ValueError, match=message):
        engine.generate(params, **{"prompts": TEXTS, **given})
    assert engine.compilations == known


def test_an_engine_of_impossible_sizes(folder: Path) -> None:
    model, tokenizer, mesh, _ = parts(folder)
    for wrong, message in (
        ({"slots": 12}, "slots is 12"),
        ({"overlong": "no"}, "overlong is 'no'"),
        ({"segment": 0}, "segment is 0"),
    ):
        with pytest.raises(ValueError, match=message):
            Engine(model, tokenizer, mesh, **wrong)
