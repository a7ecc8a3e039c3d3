"""Traced rules against a reader of decoded text with Python's `re`, on random and mutated completions."""

from __future__ import annotations

import random
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxreason.automata import merge_columns
from jaxreason.batch import PromptBatch
from jaxreason.rewards import format as host_format
from jaxreason.rewards.traced import integer_answer, think_answer_format, weighted_total
from jaxreason.types import Completion, Problem, StopReason

TAGS = [b"<think>", b"</think>", b"<answer>", b"</answer>"]
DIGITS = [b"%d" % d for d in range(10)]
VOCABULARIES = {  # the last three: pad, and two ends of sequence
    "digits": [*DIGITS, *TAGS, b"-", b" ", b"=", None, b"<eos>", None],
    "merged": b"0|1|7|12|-1|-|000|2147483647|99999999999| |\n|x||\xc3".split(b"|")
    + b"<|</|>|><|/|thi|nk|think|answer|answer>|</answer>".split(b"|")
    + [b"5</", b">3", b"1 ", b"answer>-", b"an", b"swer", b"> 4 <", None, b"<eos>", None],
}
TAG = rb"</?(?:think|answer)>"
FORMAT = re.compile(rb"<think>(?:(?!%b)[\s\S])*</think>\s*<answer>(?:(?!%b)[\s\S])+</answer>" % (TAG, TAG))
T = 36


def batch(answer: np.ndarray) -> PromptBatch:
    prompt = jnp.zeros((len(answer), 1), jnp.int32)
    return PromptBatch(
        prompt=prompt,
        prompt_mask=prompt == 0,
        problem=jnp.zeros(len(answer), jnp.uint32),
        answer=jnp.asarray(answer, jnp.int32),
    )


def score(rule, completion, mask, answer=None) -> np.ndarray:
    answer = np.zeros(len(completion), np.int32) if answer is None else answer
    reward = jax.jit(rule)(batch(answer), jnp.asarray(completion, jnp.int32), jnp.asarray(mask))
    assert reward.dtype == jnp.float32 and reward.shape == completion.shape[:2]
    return np.asarray(reward)


def write(text: bytes, vocabulary: list[bytes | None], rng: random.Random) -> list[int]:
    """A random way to write the text in the vocabulary."""

    def tails(rest: bytes) -> list[int] | None:
        if not rest:
            return []
        fits = [v for v, token in enumerate(vocabulary[:-3]) if token and rest.startswith(token)]
        rng.shuffle(fits)
        for v in fits:
            if (tail := tails(rest[len(vocabulary[v] or b"") :])) is not None:
                return [v, *tail]
        return None

    ids = tails(text)
    assert ids is not None, text
    return ids


def well_formed(rng: random.Random) -> str:
    """An answer in or near R1's format."""
    number = rng.choice(["1", "-1", "12", "0", "-0", "007", "2147483647", "-1 ", " 7", "- 7", "", "1 2", "--1", "17"])
    if rng.random() < 0.15:
        number = rng.choice("17") + rng.choice(["0" * 10, "1" * 9, "7" * 9])  # beyond int32
    inside = rng.choice(["", "1", "1-2", " "])
    return rng.choice(
        [f"<think>{inside}</think>{space}<answer>{number}</answer>" for space in ("", "", "", "", " ")]
        + [f"<answer>{number}<answer>{inside}</answer>", f"{inside}<answer>{number}</answer>7"]
    )


def fuzz(vocabulary: list[bytes | None], rows: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Completions [rows / 4, 4, T] and masks: near the format, mutated or noise; ended, truncated; with fed tokens."""
    rng, size = random.Random(seed), len(vocabulary)
    completion, mask = np.full((rows, T), size - 3), np.zeros((rows, T), bool)
    for row in range(rows):
        text = well_formed(rng)
        if b"2" not in vocabulary:
            text = re.sub("[2-689]", "1", text)
        ids = rng.choices(range(size), k=rng.randrange(T))
        if rng.random() < 0.85:
            ids = write(text.encode(), vocabulary, rng)
        while rng.random() < 0.35:  # mutate: replace, insert or drop a few tokens
            at = rng.randrange(len(ids) + 1)
            ids[at : at + rng.randrange(2)] = [rng.randrange(size)] * rng.randrange(2)
        if rng.random() < 0.8:
            ids.append(rng.choice([size - 2, size - 1]))
        keep = [True] * len(ids)
        while rng.random() < 0.2:  # tokens that the policy did not choose say nothing
            at = rng.randrange(len(ids) + 1)
            ids.insert(at, rng.randrange(size))
            keep.insert(at, False)
        ids, keep = ids[:T], keep[:T]
        completion[row, : len(ids)], mask[row, : len(ids)] = ids, keep
    return completion.reshape(-1, 4, T), mask.reshape(-1, 4, T)


def chosen(ids: np.ndarray, mask: np.ndarray) -> list[int]:
    return [int(v) for v, keep in zip(ids, mask, strict=True) if keep]


def expected_format(ids: list[int], vocabulary: list[bytes | None]) -> bool:
    eos = (len(vocabulary) - 2, len(vocabulary) - 1)
    if not ids or ids[-1] not in eos or any(v in eos or vocabulary[v] is None for v in ids[:-1]):
        return False
    return FORMAT.fullmatch(b"".join(vocabulary[v] or b"" for v in ids[:-1])) is not None


def expected_integer(ids: list[int], vocabulary: list[bytes | None], tags=(b"<answer>", b"</answer>")) -> int | None:
    ends = [at for at, v in enumerate(ids) if v >= len(vocabulary) - 2]
    pieces = [vocabulary[v] for v in ids[: ends[0] if ends else None]]
    text = b"".join(b"\x00" if piece is None else piece for piece in pieces)
    opened = text.rfind(tags[0])
    closed = text.find(tags[1], opened + len(tags[0]))
    if opened < 0 or closed < 0:
        return None
    between = text[opened + len(tags[0]) : closed]
    return int(between) if re.fullmatch(rb"\s*-?[0-9]+\s*", between) else None


@pytest.mark.parametrize("name", VOCABULARIES)
def test_format_is_what_re_says_of_the_decoded_text(name: str):
    vocabulary = VOCABULARIES[name]
    completion, mask = fuzz(vocabulary, 3000, seed=1)
    rule = think_answer_format(vocabulary, [len(vocabulary) - 2, len(vocabulary) - 1])
    reward = score(rule, completion, mask)
    expected = [
        [expected_format(chosen(i, m), vocabulary) for i, m in zip(ids, keep, strict=True)]
        for ids, keep in zip(completion, mask, strict=True)
    ]
    np.testing.assert_array_equal(reward, np.array(expected, np.float32))
    assert 0.1 < reward.mean() < 0.9


@pytest.mark.parametrize("name", VOCABULARIES)
def test_integer_answer_is_what_re_and_int_say_of_the_decoded_text(name: str):
    vocabulary, rng = VOCABULARIES[name], random.Random(2)
    completion, mask = fuzz(vocabulary, 3000, seed=3)
    rule = integer_answer(vocabulary, [len(vocabulary) - 2, len(vocabulary) - 1])
    values = [
        [expected_integer(chosen(i, m), vocabulary) for i, m in zip(ids, keep, strict=True)]
        for ids, keep in zip(completion, mask, strict=True)
    ]
    answer = np.zeros(len(values), np.int32)
    for p, row in enumerate(values):  # mostly a value of the group, wrapped as int32 would wrap it if it is too large
        value = rng.choice([v for v in row if v is not None] or [0]) + (rng.random() < 0.1)
        answer[p] = (value + 2**31) % 2**32 - 2**31
    reward = score(rule, completion, mask, answer)
    expected = [[value == int(answer[p]) for value in row] for p, row in enumerate(values)]
    np.testing.assert_array_equal(reward, np.array(expected, np.float32))
    assert 0.1 < reward.mean() < 0.9
    assert any(value is not None and abs(value) > 2**31 for row in values for value in row)


BYTES: list[bytes | None] = [bytes([b]) for b in range(128)]


def group(texts: list[str], vocabulary: list[bytes | None]) -> tuple[np.ndarray, np.ndarray]:
    """The texts as one group, [1, G, T] tokens and mask."""
    rows = [write(text.encode(), [*vocabulary, None, None, None], random.Random(0)) for text in texts]
    ids, mask = np.zeros((2, 1, len(rows), max(map(len, rows))), int)
    for g, row in enumerate(rows):
        ids[0, g, : len(row)], mask[0, g, : len(row)] = row, 1
    return ids, mask.astype(bool)


@pytest.mark.parametrize("answer", [0, 7, -7, 2**31 - 1, -(2**31), -(2**31) + 1, 10**9])
def test_the_value_is_exact_to_the_ends_of_int32_and_never_wraps(answer: int):
    written = [answer, answer + 2**32, answer - 2**32, answer + 10 * 2**32, -answer, answer + 1, answer * 10**30]
    texts = [form.format(n) for n in written for form in ("{}", " {}\n", "x{}", "{}.0", "+{}", "- {}", "0{}")]
    right = [re.fullmatch(r"\s*-?[0-9]+\s*", text) is not None and int(text) == answer for text in texts]
    assert any(right)
    for vocabulary in (BYTES, [*BYTES, *(b"%03d" % n for n in range(1000)), *(b"%d" % n for n in range(10, 100))]):
        ids, mask = group([f"<answer>{text}</answer>" for text in texts], vocabulary)
        np.testing.assert_array_equal(score(integer_answer(vocabulary, []), ids, mask, np.array([answer]))[0], right)


def test_the_last_open_tag_counts_and_an_unclosed_one_is_no_answer():
    cases = [
        ("<answer>1</answer> <answer>5</answer> and so on", True),
        ("<answer>5</answer><answer>1</answer>", False),
        ("<answer>5</answer><answer>", False),
        ("<answer>5</answer><answer", True),
        ("<answer><answer>5</answer>", True),
        ("<answer>1<answer>5</answer>", True),
        ("<answer>5</answer></answer>", True),
        ("<answer>5<</answer>", False),
        ("<answer>5</</answer>", False),
        ("<<answer>5</answer>", True),
        ("<answer>5", False),
        ("", False),
    ]
    ids, mask = group([text for text, _ in cases], BYTES)
    reward = score(integer_answer(BYTES, []), ids, mask, np.array([5]))
    assert {text: bool(r) for (text, _), r in zip(cases, reward[0], strict=True)} == dict(cases)


@pytest.mark.parametrize(
    ("tags", "number"),
    [(("aab", ">"), 17), (("aa", "a>"), 17), (("#### ", "#"), -17), (("=", "!"), 17), (("1", "."), 7)],
)
def test_tags_of_ones_own_that_overlap_themselves_or_each_other(tags: tuple[str, str], number: int):
    rng = random.Random(4)
    vocabulary: list[bytes | None] = [*b"a|aa|b|>|a>|#|## | |!|=|1|7|.|-".split(b"|")]
    ids = np.array([[rng.choices(range(len(vocabulary)), k=10) for _ in range(4)] for _ in range(1000)])
    for row in ids[:500].reshape(-1, 10):
        written = write(f"{tags[0]}{number}{tags[1]}".encode(), [*vocabulary, None, None, None], rng)
        row[: len(written)] = written
    values = [
        expected_integer(list(row), [*vocabulary, None, None], tuple(t.encode() for t in tags)) for row in ids.reshape(-1, 10)
    ]
    reward = score(integer_answer(vocabulary, [], open=tags[0], close=tags[1]), ids, ids >= 0, np.full(1000, number))
    np.testing.assert_array_equal(reward.ravel(), [value == number for value in values])
    assert 0 < reward.mean() < 1


@pytest.mark.parametrize("name", VOCABULARIES)
def test_what_the_mask_drops_is_invisible(name: str):
    vocabulary, rng = VOCABULARIES[name], np.random.default_rng(5)
    completion, mask = fuzz(vocabulary, 400, seed=6)
    other = np.where(mask, completion, rng.choice([-100, *range(len(vocabulary)), 10**6], size=completion.shape))
    eos = [len(vocabulary) - 2, len(vocabulary) - 1]
    for rule in (think_answer_format(vocabulary, eos), integer_answer(vocabulary, eos)):
        np.testing.assert_array_equal(score(rule, completion, mask), score(rule, other, mask))


@pytest.mark.parametrize("stray", [-1, 128, 10**6])
def test_an_id_outside_the_vocabulary_has_no_text(stray: int):
    ids, mask = group(["<think>1</think><answer>5</answer>\0"], BYTES)
    format_rule, integer_rule = think_answer_format(BYTES, [0]), integer_answer(BYTES, [0])
    assert score(format_rule, ids, mask) == 1 and score(integer_rule, ids, mask, np.array([5])) == 1
    ids[..., 7] = stray
    assert score(format_rule, ids, mask) == 0 and score(integer_rule, ids, mask, np.array([5])) == 1
    ids[..., 24] = stray  # the 5
    assert score(integer_rule, ids, mask, np.array([5])) == 0


def test_the_traced_and_the_host_format_rules_agree():
    vocabulary = VOCABULARIES["digits"]
    eos = len(vocabulary) - 2
    completion, mask = fuzz(vocabulary, 1000, seed=7)
    reward = score(think_answer_format(vocabulary, [eos]), completion, mask)
    for row, (ids, keep) in enumerate(zip(completion.reshape(-1, T), mask.reshape(-1, T), strict=True)):
        tokens = chosen(ids, keep)
        if any(vocabulary[v] is None for v in tokens) or eos in tokens[:-1]:
            continue  # has no text
        ended = tokens[-1:] == [eos]
        text = b"".join(vocabulary[v] or b"" for v in (tokens[:-1] if ended else tokens)).decode()
        stop = StopReason.EOS if ended else StopReason.LENGTH
        host = host_format.think_answer_format(Problem("0", "", ""), Completion(text, tokens, stop))
        assert host.total == reward.reshape(-1)[row], text


def test_a_pattern_of_ones_own():
    rule = think_answer_format(BYTES, [0], pattern=r"answer: \d+")
    ids, mask = group(["answer: 12\0", "answer: \0", "answer: 12", "answer: 12\0\0", "\0", "answer: 1\x001"], BYTES)
    assert score(rule, ids, mask).tolist() == [[1, 0, 0, 0, 0, 0]]


def test_a_vocabulary_that_cannot_spell_the_tags_is_refused():
    no_slash = [token for token in BYTES if token != b"/"]
    with pytest.raises(ValueError, match="no sequence of the vocabulary's 127 tokens matches"):
        think_answer_format(no_slash, [0])
    with pytest.raises(ValueError, match="no sequence of the vocabulary's 127 tokens spells '<answer>'"):
        integer_answer(no_slash, [0])
    with pytest.raises(ValueError, match="spells"):  # every closing tag opens again
        integer_answer(BYTES, [], open="=", close="!=")
    with pytest.raises(ValueError, match="spells"):  # the tag is there, but as the EOS token, which ends the text
        integer_answer([*DIGITS, b"<answer>", b"</answer>"], [11])
    with pytest.raises(ValueError, match="eos_ids is empty"):
        think_answer_format(BYTES, [])
    for factory in (think_answer_format, integer_answer):
        with pytest.raises(ValueError, match=r"eos_ids \[128\] must be ids of the vocabulary"):
            factory(BYTES, [128])
    for tags in (("", "x"), ("x", ""), ("x", "0"), ("x", "-x"), ("x", "\n")):
        with pytest.raises(ValueError, match="cannot delimit an integer"):
            integer_answer(BYTES, [], open=tags[0], close=tags[1])


def test_a_large_vocabulary_closes_over_small_tables():
    rng = random.Random(8)
    words = ["".join(rng.choices("abcdeinkrstw <>/", k=rng.randrange(1, 9))).encode() for _ in range(20000)]
    rule = think_answer_format([*BYTES, *words], [0])
    constants = jax.make_jaxpr(rule)(batch(np.zeros(1)), jnp.zeros((1, 1, 1), jnp.int32), jnp.ones((1, 1, 1), bool)).consts
    assert 0 < sum(np.size(one) for one in constants) < 2 * len(words)
    assert merge_columns(np.zeros((3, 7)))[1].shape == (3, 1)


def test_the_weighted_total_is_the_sum_of_weighted_parts():
    parts = {"accuracy": jnp.array([[1.0, 0.0]]), "format": jnp.array([[1.0, 1.0]])}
    np.testing.assert_allclose(weighted_total(parts, {"format": 0.25, "accuracy": 2.0}), [[2.25, 0.25]])
    for weights in ({"accuracy": 1.0}, {"accuracy": 1.0, "format": 1.0, "length": 1.0}, {}):
        with pytest.raises(ValueError, match="must name the same rules"):
            weighted_total(parts, weights)
    with pytest.raises(ValueError, match="at least one"):
        weighted_total({}, {})
