"""Problems and demonstrations as arrays: left padding, masks, the stop token."""

from __future__ import annotations

import numpy as np
import pytest

from jaxreason.data.batching import NO_DIGIT, NO_INTEGER, demonstration_batch, integer_answer, prompt_batch, references
from jaxreason.models.tokenizer import Tokenizer, load_tokenizer, save_word_tokenizer
from jaxreason.tasks import Task, word_problems
from jaxreason.types import Demonstration, Problem


@pytest.fixture(scope="module")
def task() -> Task:
    return word_problems(heldout_size=4)


@pytest.fixture(scope="module")
def tokenizer(task, tmp_path_factory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    save_word_tokenizer(task.words, folder)
    return load_tokenizer(folder)


def test_prompts_are_padded_on_the_left(task, tokenizer):
    numbered = [(number, task.train(number)) for number in (0, 3, 2**32 + 5)]
    batch = prompt_batch(numbered, task=task, tokenizer=tokenizer, max_prompt_tokens=30)
    assert batch.prompt.shape == batch.prompt_mask.shape == (3, 30) and batch.prompt.dtype == np.int32
    lengths = batch.prompt_mask.sum(axis=1)
    assert len(set(lengths.tolist())) > 1
    for row, mask, length, (_, problem) in zip(batch.prompt, batch.prompt_mask, lengths, numbered, strict=True):
        assert mask.tolist() == [False] * (30 - length) + [True] * length
        assert (row[~mask] == tokenizer.pad_id).all()
        assert tokenizer.hf.decode(row[mask]) == problem.question
    assert batch.problem.dtype == np.uint32 and batch.problem.tolist() == [0, 3, 5]
    assert batch.answer.dtype == np.int32 and batch.answer.tolist() == [int(p.answer) for _, p in numbered]


@pytest.mark.parametrize(
    ("answer", "integer"),
    [
        ("12", 12),
        ("-7", -7),
        ("0", 0),
        (str(2**31 - 1), 2**31 - 1),
        (str(2**31), NO_INTEGER),
        ("3.5", NO_INTEGER),
        ("", NO_INTEGER),
    ],
)
def test_a_reference_that_is_no_integer_is_not_zero(answer, integer):
    assert integer_answer(Problem("p", "q", answer)) == integer
    assert np.int32(integer) == integer


def test_what_traced_rules_know_of_a_problem_has_the_same_shapes_whatever_it_is():
    game = Problem("a", "q", "-12.5", metadata={"numbers": (3, 8, 3), "target": -7, "use_all": True})
    other = Problem("b", "q", "blue", metadata={"numbers": "three", "target": 2})
    for problems in ([game, other], [other, other], [game, game]):
        told = references(problems)
        shapes = {name: (array.shape, array.dtype) for name, array in told.items()}
        assert shapes == {
            "answer": ((2,), np.int32), "digits": ((2, 32), np.int8), "numbers": ((2, 8), np.int32), "target": ((2,), np.int32),
            "use_all": ((2,), np.bool_),
        }  # fmt: skip
    told = references([game, other])
    assert told["digits"][0].tolist() == [0] * 18 + [-1, -2, -5] + [0] * 11 and (told["digits"][1] == NO_DIGIT).all()
    assert told["numbers"].tolist() == [[3, 8, 3, -1, -1, -1, -1, -1], [-1] * 8] and told["target"].tolist() == [-7, 0]
    assert told["use_all"].tolist() == [True, False]


def test_a_completion_that_answers_zero_is_wrong_where_the_reference_is_no_integer(task, tokenizer):
    from jaxreason.rewards.traced import integer_answer as rule

    vocabulary = tokenizer.vocabulary(64)
    problems = [Problem("a", task.train(0).question, answer) for answer in ("0", "3.5", "")]
    batch = prompt_batch(list(enumerate(problems)), task=task, tokenizer=tokenizer, max_prompt_tokens=30)
    (ids,) = tokenizer.encode_completions(["<answer>0</answer>"])
    completion = np.tile(np.asarray(ids, np.int32), (3, 1, 1))
    reward = rule(vocabulary, tokenizer.eos_ids)(batch, completion, np.ones(completion.shape, bool))
    assert np.asarray(reward)[:, 0].tolist() == [1.0, 0.0, 0.0]


def test_a_demonstration_ends_with_its_stop_token_inside_the_mask(task, tokenizer):
    demonstrations = [task.demonstrations[kind](number) for kind in ("worked", "flawed") for number in range(4)]
    where = {"task": task, "tokenizer": tokenizer, "max_prompt_tokens": 30, "max_completion_tokens": 40}
    batch = demonstration_batch(demonstrations, **where)
    assert batch.completion.shape == batch.mask.shape == batch.logp_behaviour.shape == (8, 1, 40)
    assert batch.truncated.shape == (8, 1) and not batch.truncated.any()
    for row, mask, demonstration in zip(batch.completion[:, 0], batch.mask[:, 0], demonstrations, strict=True):
        length = int(mask.sum())
        assert mask.tolist() == [True] * length + [False] * (40 - length)
        assert row[length - 1] == tokenizer.eos_ids[0] and tokenizer.eos_ids[0] not in row[: length - 1]
        assert tokenizer.hf.decode(row[: length - 1]) == demonstration.completion
        assert (row[length:] == tokenizer.pad_id).all()


def test_what_does_not_fit_is_named(task, tokenizer):
    problem = task.train(0)
    with pytest.raises(ValueError, match=r"problem train/0 has \d+ tokens: expected 1 to 5; raise config.sampling.max_prompt"):
        prompt_batch([(0, problem)], task=task, tokenizer=tokenizer, max_prompt_tokens=5)
    with pytest.raises(ValueError, match="has 0 tokens"):
        prompt_batch([(0, Problem("empty", "", "1"))], task=task, tokenizer=tokenizer, max_prompt_tokens=5)
    long = Demonstration(problem, "1" * 41)
    with pytest.raises(ValueError, match=r"train/0 has 42 tokens: expected at most 40; raise config.sampling.max_completion"):
        demonstration_batch([long], task=task, tokenizer=tokenizer, max_prompt_tokens=30, max_completion_tokens=40)
