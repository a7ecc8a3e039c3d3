"""Mixtures: weights hold exactly, finite tasks go through epochs, prompts and rules are each task's own."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import jax
import pytest
from ml_collections import ConfigDict

from jaxreason import config as configs
from jaxreason import tasks
from jaxreason.pipelines.experiment import build, training_stream

THREE = {
    "countdown": {"weight": 0.5, "heldout_size": 3},
    "hard": {"task": "countdown", "min_numbers": 5, "max_numbers": 6, "weight": 1.5, "heldout_size": 2, "seed": 7},
    "word_problems": {"weight": 1, "heldout_size": 4, "rule": "math.math_answer"},
}


def small_gsm8k(folder: Path, *, rows: int, long: int = 0) -> dict[str, object]:
    """GSM8K's form, with `long` questions of many words at the end."""
    for split in ("train", "test"):
        lines = [{"question": f"Which number is {n}?", "answer": f"#### {n}"} for n in range(rows)]
        lines += [{"question": "Tom " * 500, "answer": "#### 1"} for _ in range(long)]
        (folder / f"{split}.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return {"data_dir": str(folder), "heldout_size": 2, "prompt": "boxed"}


def test_weights_hold_exactly_in_every_block() -> None:
    task = tasks.mixture(tasks=THREE)
    labels = [task.train(number).task for number in range(600)]
    for begin in range(0, 600, 6):
        assert Counter(labels[begin : begin + 6]) == {"countdown": 1, "hard": 3, "word_problems": 2}
    assert len({tuple(labels[begin : begin + 6]) for begin in range(0, 600, 6)}) > 20  # not always the same order
    assert tasks.mixture(tasks=dict(reversed(THREE.items()))).train(77) == task.train(77)
    assert [tasks.mixture(tasks=THREE, seed=1).train(n).task for n in range(60)] != labels[:60]


def test_problems_are_each_tasks_own_in_their_order() -> None:
    task = tasks.mixture(tasks=THREE)
    alone = {
        "countdown": tasks.countdown(heldout_size=3),
        "hard": tasks.countdown(min_numbers=5, max_numbers=6, heldout_size=2, seed=7),
        "word_problems": tasks.word_problems(heldout_size=4),
    }
    seen: Counter[str] = Counter()
    for number in range(120):
        problem = task.train(number)
        original = alone[problem.task].train(seen[problem.task])
        assert (problem.question, problem.answer, problem.metadata) == (original.question, original.answer, original.metadata)
        assert problem.id == f"{problem.task}/train/{seen[problem.task]}"
        assert task.messages(problem) == alone[problem.task].messages(original)
        seen[problem.task] += 1
    assert [p.question for p in task.heldout] == [p.question for part in alone.values() for p in part.heldout]
    assert task.rule == "task"
    assert task.rules == {"countdown": "arithmetic.countdown", "hard": "arithmetic.countdown", "word_problems": "math.math_answer"}
    assert set(task.words) == {word for part in alone.values() for word in part.words}


def test_demonstrations_are_mixed_of_the_tasks_that_offer_them() -> None:
    task = tasks.mixture(tasks=THREE)
    assert set(task.demonstrations) == {"worked", "flawed"}
    worked = [task.demonstrations["worked"](number) for number in range(60)]
    assert Counter(shown.problem.task for shown in worked) == {"countdown": 10, "hard": 30, "word_problems": 20}
    assert {task.demonstrations["flawed"](number).problem.task for number in range(60)} == {"word_problems"}
    assert task.demonstrations["flawed"](5).completion == tasks.word_problems().demonstrations["flawed"](5).completion


def test_a_finite_task_goes_through_shuffled_epochs(tmp_path: Path) -> None:
    entry = small_gsm8k(tmp_path, rows=10)
    task = tasks.mixture(tasks={"gsm8k": entry, "word_problems": {"heldout_size": 1}})
    problems = [task.train(number) for number in range(60)]
    drawn = [problem.answer for problem in problems if problem.task == "gsm8k"]
    epochs = [drawn[begin : begin + 10] for begin in range(0, 30, 10)]
    assert all(sorted(epoch, key=int) == [str(n) for n in range(10)] for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert "boxed" in task.messages(next(p for p in problems if p.task == "gsm8k"))[0]["content"]
    assert task.words == ()  # gsm8k's own words are not closed


def test_a_prompt_that_a_closed_vocabulary_does_not_hold_is_refused(tmp_path: Path) -> None:
    config: Any = configs.default()
    config.task.name = "countdown"
    config.task.kwargs = ConfigDict({"prompt": "think_expression", "heldout_size": 2})
    config.sampling.max_prompt_tokens = 200
    config.reward.accuracy = configs.part("traced.countdown")
    with pytest.raises(ValueError, match="the prompts of task 'countdown' hold 'First', .* set prompt to 'as_it_is'"):
        build(configs.from_config_dict(config), tmp_path, devices=jax.devices()[:1])


def test_too_long_prompts_of_a_finite_task_are_left_out_of_a_run(tmp_path: Path) -> None:
    config: Any = configs.default()
    config.task.name = "mixture"
    entry = small_gsm8k(tmp_path, rows=10, long=5) | {"weight": 2}
    config.task.kwargs = ConfigDict({"tasks": {"gsm8k": entry, "word_problems": {"heldout_size": 1}}})
    config.sampling.max_prompt_tokens = 200
    config.reward.accuracy = configs.part("math.gsm8k_answer")
    with pytest.raises(ValueError, match="brings no vocabulary of its own"):  # gsm8k has none
        build(configs.from_config_dict(config), tmp_path, devices=jax.devices()[:1])
    config.model.path = str(_checkpoint(tmp_path / "model"))
    config.model.weights = "random"
    experiment = build(configs.from_config_dict(config), tmp_path, devices=jax.devices()[:1])
    stream, overlong = training_stream(experiment)
    assert overlong.count == 5  # rows 11 to 15
    assert [place.rpartition("/")[2] for place in overlong.first] == ["train.jsonl:11", "train.jsonl:12", "train.jsonl:13"]
    answers = Counter(p.answer for _, p in stream(0, 30) if p.task == "gsm8k")
    assert answers == {str(n): 2 for n in range(10)}


def _checkpoint(folder: Path) -> Path:
    """A policy's folder with a tokenizer that knows single characters."""
    from jaxreason.models.tokenizer import save_word_tokenizer

    letters = [chr(code) for code in range(32, 127)]
    save_word_tokenizer([*letters, *(f" {word}" for word in ("number", "is"))], folder)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}
    told = {"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "vocab_size": 128, "intermediate_size": 16}
    rest = {"max_position_embeddings": 2048, "rms_norm_eps": 1e-6, "rope_theta": 1e4, "tie_word_embeddings": True}
    (folder / "config.json").write_text(json.dumps({**told, **sizes, **rest, "hidden_act": "silu", "attention_bias": False}))
    return folder


MISTAKES = [
    ({}, "config.task.kwargs: tasks is {}: expected at least one name"),
    ({"countdwn": {}}, "config.task.kwargs.tasks.countdwn is a task named 'countdwn', .*did you mean 'countdown'?"),
    ({"a": {"task": "mixture"}}, "config.task.kwargs.tasks.a is a task named 'mixture', which a mixture cannot have"),
    ({"countdown": {"wieght": 2}}, "config.task.kwargs.tasks.countdown has no key 'wieght'"),
    ({"countdown": {"weight": 0}}, "config.task.kwargs.tasks.countdown.weight is 0: expected a number above 0"),
    ({"countdown": {"weight": "2"}}, "config.task.kwargs.tasks.countdown.weight is '2': expected a number above 0"),
    ({"countdown": {"rule": 3}}, "config.task.kwargs.tasks.countdown.rule is 3: expected a rule's name"),
    ({"countdown": {"max_numbers": 77}}, "config.task.kwargs.tasks.countdown: min_numbers is 3 and max_numbers is 77"),
    ({"countdown": {"seed": "x"}}, "config.task.kwargs.tasks.countdown.seed is 'x': expected a whole number"),
    ({"countdown": 2}, "config.task.kwargs.tasks.countdown is 2: expected its settings"),
    ({"countdown": {"weight": 0.12345}, "game24": {}}, ".* hold exactly only over 22469 problems: write them with fewer digits"),
]


@pytest.mark.parametrize(("entries", "said"), MISTAKES)
def test_a_mistake_in_a_config_is_one_sentence(entries: dict[str, object], said: str) -> None:
    named = configs.Named("mixture", {"tasks": entries})
    with pytest.raises(ValueError, match=f"^{said}") as error:
        configs.make(tasks, named, key="task", returns="Task")
    assert "\n" not in str(error.value) and str(error.value).count("config.") == 1


def test_overrides_reach_a_mixtures_tasks(tmp_path: Path) -> None:
    file = tmp_path / "mixed.py"
    file.write_text(
        "from ml_collections import ConfigDict\n"
        "from jaxreason import config as schema\n"
        "def get_config(arg=None):\n"
        "    config = schema.default()\n"
        "    config.task.name = 'mixture'\n"
        "    config.task.kwargs = ConfigDict({'tasks': {'game24': {'weight': 2, 'heldout_size': 50}, 'countdown': {}}})\n"
        "    return schema.finish(config, arg)\n"
    )
    told = configs.load(f"{file}:tiny", ["--config.task.kwargs.tasks.game24.weight=3"]).task.kwargs["tasks"]
    assert told == {"game24": {"weight": 3, "heldout_size": 8}, "countdown": {}}
