"""Stop strings, delimiters and grammars over tokens, against searches in decoded text and Python's `re`."""

from __future__ import annotations

import itertools
import random
import re
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tokenizers import Regex, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as Fast
from transformers import PreTrainedTokenizerFast

from jaxreason.automata import INTEGER, NONE, STEP, STOP, compile_search, think_answer_pattern
from jaxreason.models.tokenizer import Tokenizer, load_tokenizer
from jaxreason.sampling.stops import Found, Grammar, Machine, advance, allowed, constrain, cut, step, stop_machine

Vocabulary = list[bytes | None]


class Text(NamedTuple):
    """What a reader of the whole text finds: ends as byte positions."""

    stop: int | None
    steps: list[int]


def read(data: bytes, stops: list[str], steps: list[str]) -> Text:
    """The first stop string's end, and the ends of the delimiters before it, by trying every end in turn."""
    found, begin = [], 0
    for end in range(1, len(data) + 1):
        if any(data[:end].endswith(each.encode()) for each in stops):
            return Text(end, found)
        if any(data[begin:end].endswith(each.encode()) for each in steps):
            found.append(end)
            begin = end
    return Text(None, found)


def expected(ids: list[int], vocabulary: Vocabulary, text: Text) -> list[tuple[int, int, int]]:
    """Event, after and steps of each token, up to the one with the stop."""
    rows, begin = [], 0
    for token in ids:
        end = begin + len(vocabulary[token] or b"")
        inside = [position for position in text.steps if begin < position <= end]
        if text.stop is not None and begin < text.stop <= end:
            return [*rows, (STOP, end - text.stop, len(inside))]
        rows.append((STEP, end - inside[-1], len(inside)) if inside else (NONE, 0, 0))
        begin = end
    return rows


@jax.jit
def run(machine: Machine, tokens: jax.Array) -> Found:
    """A scan over `tokens [N, T]` from state 0."""

    def one(state, token):
        found = step(machine, state, token)
        return found.state, found

    _, found = jax.lax.scan(one, jnp.zeros(tokens.shape[:1], jnp.int32), tokens.T)
    return jax.tree.map(jnp.transpose, found)


def check(machine: Machine, rows: list[list[int]], vocabulary: Vocabulary, stops: list[str], steps: list[str]) -> list[Text]:
    """The jitted machine and `cut` on rows of token ids against the reader of text."""
    width = max(map(len, rows))
    padding = next(token for token, text in enumerate(vocabulary) if text is None)
    found = run(machine, jnp.array([[*row, *[padding] * (width - len(row))] for row in rows], jnp.int32))
    event, after, count = (np.asarray(each).tolist() for each in (found.event, found.after, found.steps))
    texts = []
    for n, row in enumerate(rows):
        data = b"".join(vocabulary[token] or b"" for token in row)
        text = read(data, stops, steps)
        wanted = expected(row, vocabulary, text)
        case = row, [vocabulary[token] for token in row], stops, steps
        assert list(zip(event[n], after[n], count[n], strict=True))[: len(wanted)] == wanted, case
        if text.stop is None:
            assert not any(event[n][len(row) :]), case  # what has no text brings nothing
            assert cut(row, vocabulary, stops=stops) == (data.decode(errors="replace"), None, 0), case
        else:
            shown = row[: len(wanted)]
            longest = max((each for each in stops if data[: text.stop].endswith(each.encode())), key=lambda s: len(s.encode()))
            before = data[: text.stop - len(longest.encode())].decode(errors="replace")
            assert cut(shown, vocabulary, stops=stops) == (before, longest, wanted[-1][1]), case
            assert cut(shown, vocabulary, stops=stops, include_stop=True) == (before + longest, longest, wanted[-1][1]), case
            assert np.asarray(found.state)[n, len(wanted) - 1] == 0
        texts.append(text)
    return texts


# ---- the search


def test_a_thousand_random_cases_are_a_search_in_the_text():
    """Random vocabularies of merged pieces, overlapping strings and random tokens; few letters, so that much matches."""
    rng, outcomes = random.Random(0), {"stop": 0, "several steps": 0, "one step": 0, "nothing": 0, "after": 0}
    for _ in range(250):
        letters = rng.choice(["ab", "abc", "a\n", "aé\n日"])

        def word(most: int, letters: str = letters) -> str:
            return "".join(rng.choices(letters, k=rng.randint(1, most)))

        stops = [word(5) + rng.choice(["", "x"]) for _ in range(rng.randrange(3))]
        steps = [word(3) for _ in range(rng.randrange(3))]
        pieces = [letter.encode() for letter in letters] + [b"x", b"", b"\xc3", None, None]
        pieces += [(word(6) + rng.choice(["", "x"])).encode() for _ in range(12)]
        pieces += [rng.choice([*stops, *steps, "xx"]).encode() + word(3).encode() for _ in range(4)]
        vocabulary: Vocabulary = [*pieces, *[None] * (32 - len(pieces))]
        rng.shuffle(vocabulary)
        machine = stop_machine(vocabulary, stops=stops, steps=steps)
        rows = [rng.choices(range(32), k=rng.randint(1, 12)) for _ in range(4)]
        rows[0] += [0] * (12 - len(rows[0]))  # one width, so that little is compiled
        for row, text in zip(rows, check(machine, rows, vocabulary, stops, steps), strict=True):
            outcomes["stop"] += text.stop is not None
            outcomes["several steps"] += len(text.steps) > 1
            outcomes["one step"] += len(text.steps) == 1
            outcomes["nothing"] += text == (None, [])
            outcomes["after"] += cut(row, vocabulary, stops=stops).after > 0
    assert min(outcomes.values()) > 100, outcomes


PIECES: Vocabulary = [
    None,
    b"a",
    b"b",
    b"aa",
    b"aaa",
    b"ab",
    b"\n",
    b"\n\n",
    b".\n\n\nSo",
    b"</",
    b"answer",
    b">",
    b"r> No",
    b"answe",
]


@pytest.mark.parametrize(
    ("stops", "steps", "tokens", "events"),
    [
        # merged, split, and straddling into the next sentence
        ([], ["\n\n"], [b"a", b"\n\n", b"a"], [(NONE, 0, 0), (STEP, 0, 1), (NONE, 0, 0)]),
        ([], ["\n\n"], [b"a", b"\n", b"\n", b"\n", b"\n"], [(NONE, 0, 0), (NONE, 0, 0), (STEP, 0, 1), (NONE, 0, 0), (STEP, 0, 1)]),
        ([], ["\n\n"], [b"\n", b".\n\n\nSo", b"\n"], [(NONE, 0, 0), (STEP, 3, 1), (NONE, 0, 0)]),
        (["</answer>"], [], [b"</", b"answe", b"r> No"], [(NONE, 0, 0), (NONE, 0, 0), (STOP, 3, 0)]),
        # a delimiter that overlaps itself: its bytes are part of one match only
        ([], ["aa"], [b"aaa", b"a"], [(STEP, 1, 1), (STEP, 0, 1)]),
        ([], ["aa"], [b"aa", b"a", b"a"], [(STEP, 0, 1), (NONE, 0, 0), (STEP, 0, 1)]),
        ([], ["a"], [b"aaa"], [(STEP, 0, 3)]),
        # one string inside another, and at the same end: the earliest end, then the stop
        ([], ["ab", "b", "a"], [b"ab"], [(STEP, 0, 2)]),
        (["b"], ["ab"], [b"a", b"b"], [(NONE, 0, 0), (STOP, 0, 0)]),
        (["aab", "ab"], ["b"], [b"aa", b"b"], [(NONE, 0, 0), (STOP, 0, 0)]),
        # a stop string that begins inside a delimiter, and one after delimiters in the same token
        (["\n\n\nS"], ["\n\n"], [b".\n\n\nSo"], [(STOP, 1, 1)]),
        (["aaa"], ["aa"], [b"aa", b"a"], [(STEP, 0, 1), (STOP, 0, 0)]),
        # a token without text changes nothing, as nothing of it is in the text
        (["ab"], [], [b"a", None, b"b"], [(NONE, 0, 0), (NONE, 0, 0), (STOP, 0, 0)]),
        ([], [], [b"a", b"\n\n"], [(NONE, 0, 0), (NONE, 0, 0)]),
    ],
)
def test_a_listed_case(stops, steps, tokens, events):
    ids = [PIECES.index(token) for token in tokens]
    found = run(stop_machine(PIECES, stops=stops, steps=steps), jnp.array([ids], jnp.int32))
    assert list(zip(*(np.asarray(each)[0].tolist() for each in found[1:]), strict=True)) == events


def test_the_longest_of_the_stop_strings_that_end_together_is_cut_out():
    ids = [PIECES.index(token) for token in (b"b", b"aa", b"b", b"ab")]
    assert cut(ids, PIECES, stops=["b"]) == ("", "b", 5)
    assert cut(ids, PIECES, stops=["ab", "aab", "ba"]) == ("", "ba", 4)  # it ends first
    assert cut(ids, PIECES, stops=["ab", "aab", "b\n"]) == ("b", "aab", 2)
    assert cut(ids, PIECES, stops=["ab", "aab"], include_stop=True) == ("baab", "aab", 2)
    assert cut(iter(np.array(ids[:2])), PIECES) == ("baa", None, 0)


def test_the_search_begins_with_the_completion_and_goes_on_where_it_paused():
    machine, newline = stop_machine(PIECES, stops=["\n\na"], steps=["\n\n"]), PIECES.index(b"\n")
    tokens = jnp.array([newline, newline, PIECES.index(b"a")], jnp.int32)
    state = jnp.zeros((), jnp.int32)
    assert step(machine, state, tokens[1]).event == NONE  # whatever stood in the prompt
    events = []
    for token in tokens:
        found = step(machine, state, token)
        state = found.state
        events.append(int(found.event))
    assert events == [NONE, STEP, STOP]  # the stop string straddles the pause


def test_other_strings_of_like_size_have_the_same_shapes_and_compile_nothing():
    vocabulary: Vocabulary = [None, *[bytes([byte]) for byte in range(256)], b"</answer", b"\n\n", b".\n\n", b"Question"]
    sets = [(["</answer>", "Question:"], ["\n\n"]), (["Q:"], []), ([], ["Step ", "\n"]), (["</s>", "Human:"], [])]
    machines = [stop_machine(vocabulary, stops=stops, steps=steps) for stops, steps in sets]
    traced = []
    compiled = jax.jit(lambda *args: (traced.append(1), step(*args))[1])
    for machine in machines:
        compiled(machine, jnp.zeros((4,), jnp.int32), jnp.arange(4))
    assert len({tuple(table.shape for table in machine) for machine in machines}) == 1
    assert len(traced) == 1
    assert all(size & (size - 1) == 0 for size in machines[0].next.shape)
    assert stop_machine(vocabulary).next.shape == (1, 1)  # without strings there is nothing to pay


def test_a_large_vocabulary_takes_little_memory_and_is_as_exact():
    words: Vocabulary = [f" {number:x}\n".encode() * (1 + number % 3) for number in range(30_000)]
    stops, steps, rng = ["0123456789abcdef", "ca", "7\n 75"], ["\n e"], random.Random(4)
    machine = stop_machine([*words, None], stops=stops, steps=steps)
    assert sum(table.nbytes for table in machine[1:]) < 500_000 and machine.column_of.shape == (30_001,)
    rows = [rng.choices(range(30_000), k=60) for _ in range(20)]
    texts = check(machine, rows, [*words, None], stops, steps)
    assert sum(text.stop is not None for text in texts) > 5 and sum(len(text.steps) for text in texts) > 5

    grammar = constrain(r"( [0-9a-f]{1,40}\n){2}", [*words, None], eos_ids=[30_000])
    assert grammar.next.nbytes < 100_000 and grammar.legal.shape == (4, 30_001)  # 83 states are four words of bits
    legal = np.asarray(look(grammar, grammar.start))
    assert legal.tolist() == [number % 3 < 2 for number in range(30_000)] + [False]


def test_a_string_that_cannot_be_searched_for_is_refused():
    for strings in ([""], ["a", ""], "</answer>"):
        with pytest.raises(ValueError, match="stops is .* at least one character"):
            stop_machine(PIECES, stops=strings)
        with pytest.raises(ValueError, match="steps is"):
            stop_machine(PIECES, steps=strings)
        with pytest.raises(ValueError, match="stops is"):
            cut([1], PIECES, stops=strings)
    with pytest.raises(ValueError, match="empty"):
        compile_search([b""], [])
    with pytest.raises(ValueError, match="fewer or shorter"):
        stop_machine(PIECES, stops=["ab" * 257])


# ---- real tokenizers


@pytest.fixture(scope="module")
def merged() -> Tokenizer:
    """A byte-level BPE in which line breaks are merged with each other and with what stands before, as in large ones."""
    fast = Fast(models.BPE())
    cuts = pre_tokenizers.Split(Regex(r" ?[A-Za-z]+|[0-9]|[^\sA-Za-z0-9]+\n*|\s+"), "isolated")
    fast.pre_tokenizer = pre_tokenizers.Sequence([cuts, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    fast.decoder = decoders.ByteLevel()
    lines = ["Step 1: so it is.\n\nHence 2.\n\n\n", "<answer>12</answer>\nQuestion: (a)\n\n", "é 日本。\n\nAnswer:\n"] * 20
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    fast.train_from_iterator(
        lines, trainers.BpeTrainer(vocab_size=340, initial_alphabet=alphabet, special_tokens=["<eos>"], show_progress=False)
    )
    hf = PreTrainedTokenizerFast(tokenizer_object=fast, eos_token="<eos>", pad_token="<eos>")
    return Tokenizer(hf=hf, eos_ids=(hf.eos_token_id,), pad_id=hf.eos_token_id)


@pytest.fixture(scope="module", params=["merged", "tiny_qwen2", "tiny_llama3"])
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    if request.param == "merged":
        return request.getfixturevalue("merged")
    shared: Path = request.getfixturevalue("shared")
    return load_tokenizer(shared / "data" / "models" / request.param)


def test_both_kinds_of_tokenizers_are_here(merged: Tokenizer, shared: Path):
    assert {b"\n\n", b".\n\n"} <= set(merged.vocabulary(340))
    assert b"\n\n" not in load_tokenizer(shared / "data" / "models" / "tiny_qwen2").vocabulary(512)


def test_a_real_tokenizers_tokens_are_searched_as_the_text_it_decodes(tokenizer: Tokenizer):
    """The text is transformers' own decoding of each prefix, both of texts it cut and of random tokens."""
    vocabulary, stops, rng = tokenizer.vocabulary(512), ["</answer>", "Question:"], random.Random(3)
    machine = stop_machine(vocabulary, stops=stops, steps=["\n\n"])
    texts = [
        "One.\n\nTwo\n\n\n\nThree: 3.\n\n\n<answer>12</answer>\nQuestion: no more",
        "So 12 é 日本。\n\n\n(a)\n\nQuestion:\n\n",
        "</answer",
        "\n \n\n",
    ]
    rows = [tokenizer.hf(text, add_special_tokens=False)["input_ids"] for text in texts]
    likely = [token for token, text in enumerate(vocabulary) if text and (b"\n" in text or text in b"</answer>Question:")]
    breaks = [token for token in likely if b"\n" in (vocabulary[token] or b"")]
    rows += [[rng.choice(rng.choice([likely, breaks])) for _ in range(40)] for _ in range(10)]
    ids = range(len(tokenizer.hf))
    rows += [[token for token in rng.choices(ids, k=12) if vocabulary[token] is not None] for _ in range(10)]
    width = max(map(len, rows))
    found = run(machine, jnp.array([[*row, *[tokenizer.pad_id] * (width - len(row))] for row in rows], jnp.int32))
    events = 0
    for n, row in enumerate(rows):
        count = 0
        for t in range(len(row)):
            text = tokenizer.hf.decode(row[: t + 1], clean_up_tokenization_spaces=False)
            event = int(found.event[n, t])
            if any(stop in text for stop in stops):
                assert event == STOP
                stop = min(stops, key=lambda each: (text + each).index(each))
                shown, tail = text.split(stop, 1)
                assert cut(row[: t + 1], vocabulary, stops=stops) == (shown, stop, len(tail.encode()))
                assert int(found.after[n, t]) == len(tail.encode())
                break
            assert event == (STEP if text.count("\n\n") > count else NONE)
            assert int(found.steps[n, t]) == text.count("\n\n") - count
            events += event == STEP
            count = text.count("\n\n")
        else:
            assert cut(row, vocabulary, stops=stops) == (tokenizer.decode(row), None, 0)
    assert events > 30
    assert [cut(row, vocabulary, stops=stops).stop for row in rows[:4]] == ["</answer>", "Question:", None, None]


# ---- grammars


@jax.jit
def look(grammar: Grammar, state: jax.Array) -> jax.Array:
    return allowed(grammar, state)


move = jax.jit(advance)


def prefixes(pattern: str, vocabulary: Vocabulary, eos: list[int], longest: int) -> dict[tuple[int, ...], set[int]]:
    """For each sequence of tokens that can become a full match of at most `longest` bytes: what may come next."""
    written: Vocabulary = [None if token in eos else text for token, text in enumerate(vocabulary)]
    usable = [(token, text) for token, text in enumerate(written) if text]
    follow: dict[tuple[int, ...], set[int]] = {}

    def visit(ids: tuple[int, ...], data: bytes) -> bool:
        full = bool(re.fullmatch(pattern.encode(), data))
        after = {token for token, text in usable if len(data + text) <= longest and visit((*ids, token), data + text)}
        if full or after:
            follow[ids] = after | (set(eos) if full else set())
        return full or bool(after)

    visit((), b"")
    return follow


@pytest.mark.parametrize(
    ("pattern", "longest", "vocabulary", "eos"),
    [
        ("(ab|c){1,2}d?", 5, [b"a", b"b", b"c", b"d", b"ab", b"bc", b"cd", None, b"", b"abc", b"dd"], [7]),
        ("(ab|c){1,2}d?", 5, [b"a", b"bd", b"c", b"ca", b"bab", None], [5]),  # `a` `b` cannot be written, nor a lone `ab`
        ("-?(0|[1-3][0-3]?)", 3, [b"-", b"0", b"1", b"-1", b"23", b"00", b"3", None, b"b"], [7, 8]),
        ("(a|ab)?", 2, [b"b", b"a", b"ba", None], [3]),
        ("ab", 2, [b"a", b"b", b"ab"], [1]),  # the EOS is not to be written as text
        ("a{3}|a{6}", 6, [b"aa", b"aaa", b"aaaaa", None, b"\n"], [3]),
    ],
)
def test_allowed_is_what_can_become_a_match_and_nothing_else(pattern, longest, vocabulary, eos):
    grammar = constrain(pattern, vocabulary, eos_ids=eos)
    follow = prefixes(pattern, vocabulary, eos, longest)
    assert () in follow
    for ids, wanted in follow.items():
        state = grammar.start
        for token in ids:
            state = move(grammar, state, jnp.int32(token))
        assert set(np.flatnonzero(look(grammar, state)).tolist()) == wanted, ids
        for token in set(range(len(vocabulary))) - wanted | set(eos):  # nothing but an end follows what is over
            over = move(grammar, state, jnp.int32(token))
            assert over == 0 and np.flatnonzero(look(grammar, over)).tolist() == eos


R1 = re.compile(rb"<think>(?:(?!%b)[\s\S])*</think>\s*<answer>(?:(?!%b)[\s\S])+</answer>" % ((rb"</?(?:think|answer)>",) * 2))
TAGS: Vocabulary = [b"<think>", b"</think>", b"<answer>", b"</answer>", b"<", b"/", b"think>", b"</", b"ans", b"wer>", None]
TAGS += [b"1", b"23", b"-", b" ", b"\n", b"r></", b"4</answer>", b"><", b"</think><", b"abc ", b"<eos>", None]


@pytest.mark.parametrize(
    ("pattern", "reference"),
    [
        (think_answer_pattern(), R1),
        (think_answer_pattern(answer=INTEGER), re.compile(rb"<think>[\s\S]*</think>\s*<answer>-?\d+</answer>")),
        (INTEGER, re.compile(rb"-?\d+")),
        (r"(<(abc )*/?|[ \n]+>){2,}1", re.compile(rb"(<(abc )*/?|[ \n]+>){2,}1")),
    ],
)
def test_a_random_walk_ends_in_a_full_match(pattern, reference):
    grammar, eos, rows = constrain(pattern, TAGS, eos_ids=[21, 22]), {21, 22}, 64
    rng, written = np.random.default_rng(0), [[] for _ in range(rows)]
    state, live = jnp.broadcast_to(grammar.start, (rows,)), set(range(rows))
    for _ in range(600):
        legal = np.asarray(look(grammar, state))
        assert legal.any(axis=1).all()
        chosen = np.argmax(rng.random(legal.shape) * legal, axis=1)
        for row in sorted(live):
            written[row].append(int(chosen[row]))
        live -= set(np.flatnonzero(np.isin(chosen, list(eos))).tolist())
        state = move(grammar, state, jnp.asarray(chosen, jnp.int32))
        if not live:
            break
    assert not live
    texts = [b"".join(TAGS[token] or b"" for token in ids[:-1]) for ids in written]
    assert all(reference.fullmatch(text) for text in texts), texts
    assert len(set(texts)) > rows / 4


def test_a_real_tokenizer_can_be_held_to_the_format(tokenizer: Tokenizer):
    """All the cuts of a right completion are allowed, and what breaks the format is not."""
    vocabulary, eos = tokenizer.vocabulary(512), tokenizer.eos_ids
    grammar = constrain(think_answer_pattern(answer=INTEGER), vocabulary, eos_ids=eos)

    def follow(text: str) -> tuple[bool, set[int]]:
        state, fine = grammar.start, True
        for token in tokenizer.hf(text, add_special_tokens=False)["input_ids"]:
            fine &= bool(look(grammar, state)[token])
            state = move(grammar, state, jnp.int32(token))
        return fine, set(np.flatnonzero(look(grammar, state)).tolist())

    fine, then = follow("<think>4 * 3 is 12.\n\nSo é.</think>\n<answer>-12</answer>")
    assert fine and then == set(eos)
    fine, then = follow("<think>x</think><answer>-")
    assert fine and then and all(re.match(rb"\d+(<|$)", vocabulary[token] or b"") for token in then)
    for text in ("12", "<think><think>", "<think>x</think> so", "<think>x</think><answer>twelve"):
        fine, then = follow(text)
        assert not fine and then == set(eos)


def test_one_shape_serves_many_patterns():
    traced = []
    compiled = jax.jit(lambda *args: (traced.append(1), allowed(*args))[1])
    for pattern in (INTEGER, r"[ab]*\d{3}", "<think>abc </think>"):
        assert compiled(constrain(pattern, TAGS, eos_ids=[22]), jnp.zeros((3,), jnp.int32)).shape == (3, len(TAGS))
    assert len(traced) == 1


def test_a_grammar_that_cannot_be_held_is_refused():
    for pattern in ("x", "(1x)+", r"a[^\x00-\xff]"):
        with pytest.raises(ValueError, match="no sequence of the vocabulary's 23 tokens matches"):
            constrain(pattern, TAGS, eos_ids=[22])
    for eos in ([], [23], [-1]):
        with pytest.raises(ValueError, match="must name at least one of the vocabulary's 23 tokens"):
            constrain("1", TAGS, eos_ids=eos)
    with pytest.raises(ValueError, match="cannot compile the pattern"):
        constrain("(1", TAGS, eos_ids=[22])


def test_stops_and_a_grammar_run_in_one_loop_on_the_device():
    """As an engine holds them: tables as arguments of a while loop, a state of each in the carry."""

    @jax.jit
    def sample(machine: Machine, grammar: Grammar, scores: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        rows, most = scores.shape[0], 12

        def running(carry):
            return (carry[0] < most) & ~carry[3].all()

        def body(carry):
            time, search, rule, over, tokens = carry
            legal = allowed(grammar, rule)
            token = jnp.argmax(jnp.where(legal, scores, -jnp.inf), axis=-1).astype(jnp.int32)
            tokens = tokens.at[:, time].set(jnp.where(over, -1, token))
            found = step(machine, search, token)
            ended = over | (found.event == STOP) | (token == len(TAGS) - 1)
            return time + 1, found.state, advance(grammar, rule, token), ended, tokens

        start = jnp.zeros((rows,), jnp.int32), jnp.broadcast_to(grammar.start, (rows,))
        carry = (jnp.int32(0), *start, jnp.zeros((rows,), bool), jnp.full((rows, most), -1, jnp.int32))
        return jax.lax.while_loop(running, body, carry)[2:]

    wish = jnp.zeros((2, len(TAGS))).at[0, TAGS.index(b"23")].set(1.0).at[:, len(TAGS) - 1].set(0.5)
    machine = stop_machine(TAGS, stops=["3232"])
    _, over, tokens = sample(machine, constrain("-?(23){2,}", TAGS, eos_ids=[22]), wish)
    assert over.all()
    written = [[token for token in row if token >= 0] for row in np.asarray(tokens).tolist()]
    assert written[0] == [TAGS.index(b"23")] * 3 and cut(written[0], TAGS, stops=["3232"]) == ("2", "3232", 1)
    assert written[1] == [TAGS.index(b"23")] * 2 + [22]


def test_every_way_to_cut_a_text_finds_the_same():
    data, stops, steps = b"ab\n\n\nb</s>\n", ["</s>"], ["\n\n", "b\n"]
    places = range(1, len(data))
    text = read(data, stops, steps)
    assert text == (10, [3, 5])
    for some in itertools.chain(itertools.combinations(places, 2), itertools.combinations(places, 3)):
        edges = [0, *some, len(data)]
        vocabulary: Vocabulary = [data[i:j] for i, j in itertools.pairwise(edges)]
        ids = list(range(len(vocabulary)))
        state, found = np.int32(0), []
        machine = [np.asarray(table) for table in stop_machine(vocabulary, stops=stops, steps=steps)]
        for token in ids:
            at = state, machine[0][token]
            found.append(tuple(int(table[at]) for table in machine[2:]))
            state = machine[1][at]
        wanted = expected(ids, vocabulary, text)
        assert found[: len(wanted)] == wanted, vocabulary
