"""Traced rules against their host twins, on random completions near the rules' language, in two vocabularies.

The text of a completion is made here by joining the bytes of its tokens, up to the first end of sequence that the mask keeps;
a test compares that with what the tokenizer decodes.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxreason.batch import PromptBatch
from jaxreason.data.batching import references
from jaxreason.models.tokenizer import Tokenizer, load_tokenizer, save_word_tokenizer
from jaxreason.rewards import arithmetic, length, pattern, repetition, traced
from jaxreason.rewards.traced.game import PRIMES
from jaxreason.tasks import word_problems
from jaxreason.types import Completion, Problem, Reward, StopReason

T, G = 72, 4
ROWS = [pytest.param(1000), pytest.param(10_000, marks=pytest.mark.slow)]
PATTERN = r"[\s\S]*<answer>(?:[0-9 ]|1[+*-])+</answer>[^<]{0,9}"

Vocabulary = list[bytes | None]


class Words(NamedTuple):
    vocabulary: Vocabulary
    eos_ids: tuple[int, ...]
    tokenizer: Tokenizer | None


# tokens that hold the end of one thing and the start of the next
MERGED = (
    rb"12|000|+3|)*(|)/|((|))|+(|)-|>(|>-|)</|</|answer|><|</answer>|1,|,2|.0|0.|5</| 7|> |\boxed{|}}|an|swer>|<answer>4</answer>"
)


@pytest.fixture(scope="session", params=["words", "tiny_qwen2", "merged"])
def words(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Words:
    if request.param == "merged":
        tokens = [bytes([byte]) for byte in range(32, 127)] + [b"\n", b"\xc3"] + MERGED.split(b"|")
        return Words([*tokens, None, b"<eos>", None], (len(tokens) + 1, len(tokens) + 2), None)
    if request.param == "words":
        folder: Path = tmp_path_factory.mktemp("words")
        save_word_tokenizer(word_problems().words, folder)
    else:
        folder = request.getfixturevalue("shared") / "data" / "models" / request.param
    tokenizer = load_tokenizer(folder)
    # a model's head is often larger than its tokenizer
    return Words(tokenizer.vocabulary(len(tokenizer.hf) + 3), tokenizer.eos_ids, tokenizer)


def problem(rng: random.Random) -> tuple[Problem, str]:
    """A game with a number for an answer, and an expression of some of its numbers that is often the target."""
    numbers = [
        rng.choice((rng.randrange(2), rng.randrange(10), rng.randrange(100), rng.randrange(10_000)))
        for _ in range(rng.randrange(1, 9))
    ]
    chosen = rng.sample(numbers, rng.randint(1, len(numbers)))
    text, value = expression(rng, chosen)
    if rng.random() < 0.4:  # what binds tighter then decides, and of equals what comes first
        text = re.sub("[()]", "", text)
        value = by_python(text)
    integral = value is not None and value.denominator == 1 and abs(value) < 2**31
    target = int(value or 0) if integral and rng.random() < 0.9 else rng.choice((0, 24, -1, 2**31 - 1, rng.randrange(10_000)))
    answer = rng.choice(
        [str(target)] * 5 + [f"{target}.50", f"{target / 8:.3f}", f"{target:,}", "0", "-0.0", "x", str(target * 10**9), "1/2"]
    )
    metadata: dict[str, Any] = {"numbers": tuple(numbers), "target": target}
    metadata |= {"use_all": True} if rng.random() < 0.2 else {}
    return Problem("0", "", answer, metadata={} if rng.random() < 0.03 else metadata), text


def by_python(text: str) -> Fraction | None:
    try:
        return eval(re.sub(r"\d+", r"Fraction('\g<0>')", text.replace("\n", " ")), {"Fraction": Fraction})
    except ZeroDivisionError:
        return None


def expression(rng: random.Random, numbers: list[int]) -> tuple[str, Fraction | None]:
    """A random tree over the numbers, with superfluous parentheses and spaces; None where it divides by zero."""
    if len(numbers) == 1:
        return f"{'0' * rng.choice((0, 0, 0, 0, 2))}{numbers[0]}", Fraction(numbers[0])
    cut = rng.randrange(1, len(numbers))
    (left, a), (right, b) = expression(rng, numbers[:cut]), expression(rng, numbers[cut:])
    sign, space = rng.choice("+-*/" if rng.random() < 0.7 else "+-*"), rng.choice(("", "", "", " ", "\n"))
    left = left if left.isdigit() else f"({left})"  # superfluous or not
    right = right if right.isdigit() else f"({right})"
    if a is None or b is None or (sign == "/" and b == 0):
        return f"{left}{space}{sign}{space}{right}", None
    value = a + b if sign == "+" else a - b if sign == "-" else a * b if sign == "*" else a / b
    return f"{left}{space}{sign}{space}{right}", value


# The answer that is asked for, {}, and near misses of it; of a whole expression likewise; and what may stand around them.
NUMBERS = [*"{}|{}0|{}.0|{}.|{}.00|-{}|+{}|0{}| {} |{}{}|-0|.0|1,23|".split("|"), "9" * 30, "{}" + "0" * 60]
EXPRESSIONS = ["{}", "{}", "{}", "{}+0", "({})", "-{}", "{}=24", "(" * 20 + "{}" + ")" * 20]
MISSES = ["", "(", ")", "+", "-", "/0", "*", " ", "0", "7", ".", ",", "x", "é", "</", "<"]
FRAMES = [
    *["<think>7</think><answer>{}</answer>"] * 5,
    *["<answer>{}</answer>", "<answer>{}", "{}</answer>", "{}", "<answer>{}</answer> 7", "<<answer>{}</</answer>"],
    *["<answer>1</answer><answer>{}</answer>", "<answer>{}</answer><answer>", "<answer><answer>{}</answer></answer>"],
    *["<answer>{}<answer>1</answer>", r"\boxed{{{}}}}}", r"<answer>\boxed{{{}}}</answer>"],
    *[r"\boxed{{1}} \boxed{{{}}}"] * 3,
]


def answer(rng: random.Random, of: Problem, made: str) -> str:
    """Something in or near what a rule accepts."""
    if rng.random() < 0.5:
        text = rng.choice(EXPRESSIONS).replace("{}", made)
        text = re.sub("[ ()]", "", text) if rng.random() < 0.2 else text
    else:
        reference = of.answer if rng.random() < 0.7 else str(of.metadata.get("target", 7))
        reference = reference.replace(rng.choice(",-"), "") if rng.random() < 0.3 else reference
        text = rng.choice(NUMBERS).replace("{}", reference[:-1] if rng.random() < 0.1 else reference)
    while rng.random() < 0.15:
        at = rng.randrange(len(text) + 1)
        text = text[:at] + rng.choice(MISSES) + text[at + rng.randrange(2) :]
    return text


def written(rng: random.Random, text: bytes, ids: dict[bytes, int], longest: int) -> list[int]:
    """A random way to write the text in the vocabulary; bytes that no token begins with are left out."""
    tokens, at = [], 0
    while at < len(text):
        fits = [size for size in range(1, longest + 1) if text[at : at + size] in ids and at + size <= len(text)]
        if fits:
            size = rng.choice(fits) if rng.random() < 0.5 else fits[-1]
            tokens.append(ids[text[at : at + size]])
        at += size if fits else 1
    return tokens


def completions(rng: random.Random, rows: int, vocabulary: Vocabulary, eos: int) -> tuple[list[Problem], np.ndarray, np.ndarray]:
    """Problems, and G completions of each [rows / G, G, T] with masks."""
    ids = {text: token for token, text in enumerate(vocabulary) if text}
    longest = min(12, max(map(len, ids)))
    noise = [token for token, text in enumerate(vocabulary) if b"\xff" not in (text or b"")]  # that byte stands for no text here
    problems: list[Problem] = []
    tokens, mask = np.zeros((rows // G, G, T), np.int64), np.zeros((rows // G, G, T), bool)
    for p in range(rows // G):
        of, made = problem(rng)
        problems.append(of)
        for g in range(G):
            row = written(rng, rng.choice(FRAMES).format(answer(rng, of, made)).encode(), ids, longest)
            while rng.random() < 0.1:  # noise: a token without text, an id outside, an end in the middle
                at = rng.randrange(len(row) + 1)
                row[at : at + rng.randrange(2)] = [rng.choice([rng.choice(noise), eos, -1, 10**6, len(vocabulary) - 1])]
            row += [eos] * (rng.random() < 0.8) + [rng.choice(noise)] * (rng.random() < 0.05)
            keep = [True] * len(row)
            while rng.random() < 0.1:  # tokens that the policy did not choose say nothing
                at = rng.randrange(len(row) + 1)
                row.insert(at, rng.randrange(len(vocabulary)))
                keep.insert(at, False)
            row, keep = row[:T], keep[:T]
            if rng.random() < 0.02:
                row, keep = [], []
            tokens[p, g] = rng.randrange(len(vocabulary))
            tokens[p, g, : len(row)], mask[p, g, : len(row)] = row, keep
    return problems, tokens, mask


def host_completion(tokens: np.ndarray, mask: np.ndarray, vocabulary: Vocabulary, eos_ids: tuple[int, ...]) -> Completion:
    kept = [int(token) for token, chosen in zip(tokens, mask, strict=True) if chosen]
    ends = [at for at, token in enumerate(kept) if token in eos_ids]
    pieces = [vocabulary[v] if 0 <= v < len(vocabulary) else None for v in kept[: ends[0] if ends else None]]
    # a token without text matches nothing: a byte that is in no text stands for it
    text = b"".join(b"\xff" if piece is None else piece for piece in pieces).decode(errors="surrogateescape")
    return Completion(text, kept, StopReason.EOS if ends else StopReason.LENGTH)


def batch(problems: list[Problem]) -> PromptBatch:
    prompt = np.zeros((len(problems), 1), np.int32)
    return PromptBatch(prompt, prompt == 0, np.zeros(len(problems), np.uint32), **references(problems))


def compare(rows: int, words: Words, rule: Callable, host: Callable[..., Reward], seed: int, **kwargs):
    """Both rules on the same completions; how many are right."""
    vocabulary, eos_ids, _ = words
    problems, tokens, mask = completions(random.Random(seed), rows, vocabulary, eos_ids[0])
    ours = np.asarray(
        jax.jit(rule(vocabulary, eos_ids, **kwargs))(batch(problems), jnp.asarray(tokens, jnp.int32), jnp.asarray(mask))
    )
    assert ours.dtype == np.float32 and ours.shape == (rows // G, G)
    for p, g in np.ndindex(ours.shape):
        completion = host_completion(tokens[p, g], mask[p, g], vocabulary, eos_ids)
        assert host(problems[p], completion, **kwargs).total == pytest.approx(ours[p, g], abs=1e-6), (completion, problems[p])
    return ours


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("kwargs", [{}, {"use_all": True, "max_bytes": 40}])
def test_countdown(rows: int, kwargs: dict, words: Words):
    right = compare(rows, words, traced.countdown, arithmetic.countdown, 1, **kwargs)
    assert 0.01 < right.mean() < 0.9


@pytest.mark.parametrize("rows", ROWS)
def test_integer_answer(rows: int, words: Words):
    right = compare(rows, words, traced.integer_answer, arithmetic.integer_answer, 8)
    assert 0.01 < right.mean() < 0.9


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("kwargs", [{}, {"open": "\\boxed{", "close": "}", "max_bytes": 20}])
def test_numeric_answer(rows: int, kwargs: dict, words: Words):
    if kwargs and b"\\" not in words.vocabulary:
        with pytest.raises(ValueError, match=r"spells .*boxed.* and then '}'; give tags"):
            traced.numeric_answer(words.vocabulary, words.eos_ids, **kwargs)
        return
    right = compare(rows, words, traced.numeric_answer, arithmetic.numeric_answer, 2, **kwargs)
    assert 0.01 < right.mean() < 0.9


@pytest.mark.parametrize("rows", ROWS)
def test_matches(rows: int, words: Words):
    def by_re(problem: Problem, completion: Completion, *, pattern: str) -> Reward:
        text = completion.text.encode(errors="surrogateescape")
        found = re.fullmatch(pattern.encode(), text) is not None and b"\xff" not in text
        if completion.text.isprintable():
            assert pattern_rule(problem, completion, pattern=pattern).total == found
        return Reward(float(found))

    pattern_rule = pattern.matches
    right = compare(rows, words, traced.matches, by_re, 3, pattern=PATTERN)
    assert 0.01 < right.mean() < 0.9


@pytest.mark.parametrize("words", ["merged"], indirect=True)
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize(("longest", "last"), [(T, T), (40, 17), (30, 1)])
def test_soft_overlong(rows: int, longest: int, last: int, words: Words):
    kwargs = {"max_completion_tokens": longest, "cache_tokens": last}
    reward = compare(rows, words, traced.soft_overlong, length.soft_overlong, 4, **kwargs)
    assert reward.max() == 0 and reward.min() < -0.9


@pytest.mark.parametrize("words", ["merged"], indirect=True)
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("correct", ["numeric_answer", "countdown"])
def test_cosine_length(rows: int, correct: str, words: Words):
    settings = {"max_completion_tokens": 40, "r_0_wrong": -9.0}

    def host(problem: Problem, completion: Completion, *, correct: str, **settings: Any) -> Reward:
        reward = getattr(arithmetic, correct)(problem, completion)
        (value,) = length.cosine_length(problem, [completion], [reward], **settings)
        return value

    reward = compare(rows, words, traced.cosine_length, host, 6, correct=correct, **settings)
    assert reward.max() > 1 and reward.min() == -10


@pytest.mark.parametrize("words", ["merged"], indirect=True)
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("n", [1, 2, 3, 100])
def test_repeated_ngrams(rows: int, n: int, words: Words):
    reward = compare(rows, words, traced.repeated_ngrams, repetition.repeated_ngrams, 7, n=n)
    assert (reward.max() > 0.3) == (n < 100)


EXACT = (
    "8/(3-8/3)|3-8-8|8/8/3*3|3+8*3-3|1024|10024|10 24|\t01024 |8*1 2|8*3/1|0/0|1/0*0|8*3+0/0|8*3+(0-0)/(8-8)|8/(8-8)|0/8|0|24"
    "|8)*(3|8*3)+(0|)1024(|8*8*3*3*1|8*8*3*3|8*8*8*3*3|8-8-1024|8-(8+1024)|((8-(3+1))*(8-(3-1)))|8*3+0+0|3*(8)|(8)3|8(3)|8 3|83"
    "|8-|()|-1024|+1024|8*-3|(8*3|8*3)"
).split("|")


@pytest.mark.parametrize("words", ["merged"], indirect=True)
@pytest.mark.parametrize("target", [24, 0, 1024, -1024, 576])
def test_expressions_one_by_one(target: int, words: Words):
    """Nothing divided by nothing is no number, though its numerator is whatever is asked times its denominator."""
    of = Problem("0", "", "", metadata={"numbers": (0, 0, 1, 3, 3, 8, 8, 1024), "target": target})
    ids = {text: token for token, text in enumerate(words.vocabulary) if text}
    tokens, mask = np.zeros((1, len(EXACT), T), np.int64), np.zeros((1, len(EXACT), T), bool)
    for g, text in enumerate(EXACT):
        row = written(random.Random(g), f"<answer>{text}</answer>".encode(), ids, 12)
        tokens[0, g, : len(row)], mask[0, g, : len(row)] = row, True
    rule = jax.jit(traced.countdown(words.vocabulary, words.eos_ids))
    ours = rule(batch([of]), jnp.asarray(tokens, jnp.int32), jnp.asarray(mask))[0].tolist()
    host = [arithmetic.countdown(of, Completion(f"<answer>{text}</answer>", [], StopReason.EOS)).total for text in EXACT]
    assert dict(zip(EXACT, ours, strict=True)) == dict(zip(EXACT, host, strict=True)) and sum(host) >= 1


@pytest.mark.parametrize("words", ["merged"], indirect=True)
def test_what_a_rule_cannot_do_is_said_at_once(words: Words):
    vocabulary, eos, _ = words
    for factory in (traced.numeric_answer, traced.countdown):
        with pytest.raises(ValueError, match="open is '', close '</answer>' and max_bytes 9: expected two tags"):
            factory(vocabulary, eos, open="", max_bytes=9)
        with pytest.raises(ValueError, match="max_bytes 0"):
            factory(vocabulary, eos, max_bytes=0)
        with pytest.raises(ValueError, match=r"eos_ids \[-1\] must be ids"):
            factory(vocabulary, [-1])
    with pytest.raises(ValueError, match="no sequence of the vocabulary's"):
        traced.matches([b"a"], [], pattern="b")
    with pytest.raises(ValueError, match="correct is 'format'"):
        traced.cosine_length(vocabulary, eos, max_completion_tokens=9, correct="format")
    with pytest.raises(ValueError, match="cache_tokens is 10"):
        traced.soft_overlong(vocabulary, eos, max_completion_tokens=9, cache_tokens=10)
    with pytest.raises(ValueError, match="n is 0"):
        traced.repeated_ngrams(vocabulary, eos, n=0)
    tokens = jnp.zeros((1, 1, 3), jnp.int32)
    bare = PromptBatch(tokens[0], tokens[0] == 0, tokens[0, :, 0], tokens[0, :, 0])
    for factory, field in ((traced.numeric_answer, "digits"), (traced.countdown, "numbers")):
        with pytest.raises(ValueError, match=rf"needs prompts.{field} .* which data.batching.prompt_batch fills"):
            factory(vocabulary, eos)(bare, tokens, tokens == 0)
    wide = PromptBatch(*[tokens[0]] * 4, numbers=jnp.zeros((1, 9), jnp.int32), target=tokens[0, :, 0])
    with pytest.raises(ValueError, match="prompts.numbers are 9 a problem: expected at most 8"):
        traced.countdown(vocabulary, eos)(wide, tokens, tokens == 0)


@pytest.mark.parametrize("words", ["words", "tiny_qwen2"], indirect=True)
def test_the_text_here_is_what_the_tokenizer_decodes(words: Words):
    vocabulary, eos_ids, tokenizer = words
    assert tokenizer is not None
    _, tokens, mask = completions(random.Random(5), 400, vocabulary, eos_ids[0])
    seen = 0
    for row, keep in zip(tokens.reshape(-1, T), mask.reshape(-1, T), strict=True):
        completion = host_completion(row, keep, vocabulary, eos_ids)
        if "\udcff" not in completion.text and not set(completion.tokens[:-1]) & set(eos_ids):
            seen += 1
            assert tokenizer.decode(completion.tokens) == completion.text.encode(errors="surrogateescape").decode(errors="replace")
    assert seen > 200


def test_the_primes_are_primes_and_their_product_is_large_enough():
    assert len(set(PRIMES)) == len(PRIMES) and all(p < 2**16 and all(p % d for d in range(2, 257)) for p in PRIMES)
    largest = (arithmetic.LARGEST_NUMBER + 1) ** arithmetic.MOST_NUMBERS * (arithmetic.LARGEST_INTEGER + 1)
    assert largest < np.prod(np.array(PRIMES, dtype=object))
