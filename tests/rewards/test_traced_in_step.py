"""Traced rules in the one program of a training step: its rewards are what the host twins say of the text it sampled."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from jaxreason import naming, objectives, sharding
from jaxreason.data.batching import prompt_batch, prompt_limits
from jaxreason.models import decoder, spec
from jaxreason.models.config import Architecture, Numerics
from jaxreason.models.tokenizer import load_tokenizer, save_word_tokenizer
from jaxreason.sampling.rollout import SamplingConfig
from jaxreason.tasks import Task
from jaxreason.training import online
from jaxreason.training import state as states
from jaxreason.training.collect import RulePart, completions, make_scoring, rules
from jaxreason.training.optimizer import OptimizerConfig, make_optimizer
from jaxreason.types import Problem

P, G, T = 8, 16, 24
TAGS = {"open": "=", "close": ";"}  # so few and so short that a policy of random weights writes answers
LENGTH = {"max_completion_tokens": T}
PARTS: dict[str, tuple[str, str | None, Mapping[str, Any]]] = {
    "game": ("traced.countdown", "arithmetic.countdown", TAGS),
    "number": ("traced.numeric_answer", "arithmetic.numeric_answer", TAGS),
    "pattern": ("traced.matches", "pattern.matches", {"pattern": r"[^=]*=[1-3+*/()]*;?.*"}),
    "overlong": ("traced.soft_overlong", "length.soft_overlong", {**LENGTH, "cache_tokens": 8}),
    "repeats": ("traced.repeated_ngrams", "repetition.repeated_ngrams", {"n": 2}),
    "cosine": ("traced.cosine_length", None, {**LENGTH, **TAGS, "correct": "numeric_answer"}),
}


def game(number: int) -> Problem:
    target = number % 3 + 1
    return Problem(f"{number}", "1+2", str(target), metadata={"numbers": (1, 2, 3), "target": target})


def test_a_step_with_every_traced_rule_is_one_program_and_agrees_with_the_text(tmp_path: Path) -> None:
    task = Task(
        name="game", train=game, train_size=None, heldout=[game(0)], words=("1", "2", "3", "+", "=", ";"),
        messages=lambda problem: [{"role": "user", "content": problem.question}],
    )  # fmt: skip
    save_word_tokenizer(task.words, tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    size = len(tokenizer.hf)
    # padding has no text: a tokenizer leaves it out, and to a traced rule it is something that matches nothing. No tags, few ends.
    sampling = SamplingConfig(
        max_prompt_tokens=4, max_completion_tokens=T, banned=(tokenizer.pad_id, *range(2, 7)), bias=((1, -2.0),)
    )
    config = online.OnlineConfig(
        steps=2, problems_per_step=P, problems_per_update=P, problems_per_microbatch=4, completions_per_problem=G,
        logged_problems=P, optimizer=OptimizerConfig(learning_rate=1e-3),
    )  # fmt: skip
    parts = {name: RulePart(rule, kwargs=kwargs) for name, (rule, _, kwargs) in PARTS.items()}
    scoring = make_scoring(parts, vocabulary=tokenizer.vocabulary(size), eos_ids=tokenizer.eos_ids)
    assert set(scoring.traced) == set(PARTS) and not scoring.host

    mesh = sharding.make_mesh(sharding.MeshConfig(), devices=jax.devices()[:2])
    architecture = Architecture(vocab_size=size, hidden_size=16, layers=1, heads=2, kv_heads=1, head_size=8, mlp_size=32)
    model = decoder.make_decoder(architecture, Numerics(), mesh)
    params = spec.init(model.specs, jax.random.key(0), dtype=model.numerics.param_dtype, mesh=mesh)
    optimizer = make_optimizer(config.optimizer, steps=2)
    step = online.make_step(
        model, objectives.grpo(beta=0.0), optimizer, scoring, mesh,
        config=config, sampling=sampling, eos_ids=tokenizer.eos_ids, pad_id=tokenizer.pad_id, seed=0,
    )  # fmt: skip
    assert step.fused is not None
    numbered = [(number, game(number)) for number in range(P)]
    batch = prompt_batch(numbered, task=task, tokenizer=tokenizer, **prompt_limits(sampling))
    state = states.create(model, optimizer, mesh, params)
    before = jax.device_get(state.params)
    place = sharding.place(mesh, batch, ("problems",))
    state, metrics, shown = step.fused(state, None, place, sharding.place(mesh, np.asarray(0, np.int32), ()))

    shown, after = jax.device_get((shown, state.params))
    assert any((a != b).any() for a, b in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True))
    groups = completions(shown, tokenizer)
    for name, (_, twin, kwargs) in PARTS.items():
        values = np.asarray(shown.parts[name])
        assert len(set(values.ravel().tolist())) > 1, f"{name} is the same for every completion"
        assert float(metrics[f"reward/{name}"]) == pytest.approx(values.mean(), abs=1e-6)
        if twin is not None:
            rule = naming.find(twin, rules(), key="rule")
            host = [
                [rule(problem, one, **kwargs).total for one in group] for (_, problem), group in zip(numbered, groups, strict=True)
            ]
            np.testing.assert_allclose(values, host, atol=1e-6)
