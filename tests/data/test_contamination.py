"""Overlaps against brute force on random texts, and real data sets."""

from __future__ import annotations

import gzip
import json

import numpy as np
import pytest

from jaxreason.data.contamination import contamination, words


def brute(training: list[list[str]], evaluation: list[list[str]], n: int) -> dict[int, float]:
    """The share of each evaluation text's different n-grams that stand somewhere in training, as lists of words."""
    shares = {}
    for place, text in enumerate(evaluation):
        pieces = [text[i : i + n] for i in range(len(text) - n + 1)] or ([text] if text else [])
        different = [piece for i, piece in enumerate(pieces) if piece not in pieces[:i]]

        def there(piece: list[str]) -> bool:
            if len(piece) < n:
                return piece in training
            return any(piece == other[i : i + n] for other in training for i in range(len(other) - n + 1))

        found = sum(there(piece) for piece in different)
        if found:
            shares[place] = found / len(different)
    return shares


@pytest.mark.parametrize("seed", range(20))
def test_shares_are_those_of_brute_force(seed):
    rng = np.random.default_rng(seed)

    def text() -> list[str]:
        return [str(rng.choice(["a", "b", "c", "d"])) for _ in range(rng.integers(0, 12))]

    training, evaluation = [text() for _ in range(12)], [text() for _ in range(12)]
    n = int(rng.integers(1, 6))
    told = contamination(
        ((str(i), " ".join(each)) for i, each in enumerate(training)),
        {str(i): " ".join(each) for i, each in enumerate(evaluation)},
        n=n,
    )
    expected = brute(training, evaluation, n)
    assert {int(each.id): each.share for each in told.overlaps} == pytest.approx(expected)
    assert (told.training, told.evaluation) == (12, 12)
    assert [each.share for each in told.overlaps] == sorted(expected.values(), reverse=True)
    for each in told.overlaps:
        assert each.text in " ".join(training[int(each.trained[0])])


def test_words_do_not_depend_on_case_punctuation_or_encoding():
    assert words("Tom's 1,000 CATS — naïve!") == ["tom", "s", "1", "000", "cats", "naïve"]
    assert words("ｔｏｍ nai\u0308ve ﬁne") == words("TOM naïve fine")
    assert words("小明有3个苹果。x_1") == ["小", "明", "有", "3", "个", "苹", "果", "x", "1"]
    assert words("") == words("...") == []


def test_the_training_problem_with_most_words_comes_first():
    training = [("a", "one two three"), ("b", "one two three four five"), ("c", "nine")]
    (found,) = contamination(training, {"e": "one two three four five six"}, n=3).overlaps
    assert found.trained == ("b", "a") and found.share == 3 / 4 and found.text == "one two three"


def test_equal_shares_stand_in_the_evaluations_order():
    evaluation = {name: f"{name} and its own words" for name in "qwertyuiopasdfgh"}
    report = contamination([("t", " . ".join(reversed(evaluation.values())))], evaluation, n=5)
    assert [each.id for each in report.overlaps] == list(evaluation)


def test_a_text_of_a_million_words_takes_one_pass():
    long = "spam " * 1_000_000
    report = contamination([("t", long)], {"e": long, "f": "eggs " * 13}, n=13)
    assert [(each.id, each.share) for each in report.overlaps] == [("e", 1.0)]


def test_n_must_be_positive():
    with pytest.raises(ValueError, match="n is 0"):
        contamination([], {}, n=0)


def test_a_data_set_against_itself_and_another(shared):
    def questions(name: str, split: str, column: str) -> list[str]:
        with gzip.open(shared / "data" / name / f"{split}.jsonl.gz", "rt", encoding="utf-8") as file:
            return [json.loads(line)[column] for line in file]

    test = {str(i): text for i, text in enumerate(questions("gsm8k", "test", "question"))}
    itself = contamination(test.items(), test)
    assert len(itself.overlaps) == len(test) and all(each.share == 1 for each in itself.overlaps)
    train = [(str(i), text) for i, text in enumerate(questions("gsm8k", "train", "question"))]
    across = contamination(train, test)
    assert 0 < len(across.overlaps) < 10  # a template or two is told again with other numbers
    for each in across.overlaps:
        phrase = each.text.split()
        assert len(phrase) == 13
        assert any(phrase == words(text)[i : i + 13] for _, text in train for i in range(len(words(text)) - 12))
