"""Automata against Python's own `re`, on listed and generated patterns; lifted tables against random cuts of bytes."""

from __future__ import annotations

import random
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxreason.automata import accepts, compile_regex, lift, merge_columns, text_without

PATTERNS = [
    "",
    "a",
    "abc|",
    "(a|b)*abb",
    "(?:ab)+?c??",
    r"-?\d+(\.\d{1,2})?",
    r"[a-c]{2,3}[^a\n]",
    r"[]a^-]+",
    r"[^]-]*",
    r"a{,2}b{2}c{1,}",
    r"a{x}|{|b{",
    r"\w+\s\W\S\D",
    r"\.\*\\\[\x41-",
    r".*\n.",
    r"[\d\-.]+",
    r"((a?){3}b){0,2}",
    r"(a*)*b|(b*a)*",
    r"a{0}b",
    r"\t\r\f\v\0?",
    r"<think>[^<]*</think>",
]
ALPHABET = b"abc01.-{}<\n\t\\[]*A x\x00\xff\xc3"


def sample(rng: random.Random, alphabet: bytes) -> bytes:
    return bytes(rng.choices(alphabet, k=rng.randrange(7)))


@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_listed_pattern_matches_what_re_matches(pattern: str):
    rng = random.Random(pattern)
    automaton, expected = compile_regex(pattern), re.compile(pattern.encode())
    narrow = bytes(set(pattern.encode()) & set(b"ab01c-.\n")) or b"a"  # few characters, so that some strings match
    for alphabet in (ALPHABET, narrow):
        for _ in range(150):
            data = sample(rng, alphabet)
            assert accepts(automaton, data) == bool(expected.fullmatch(data)), data


def generated_patterns() -> st.SearchStrategy[str]:
    atoms = st.sampled_from(["a", "b", "0", ".", r"\d", r"\w", r"\s", r"\n", "[ab]", "[^a]", "[a-c0]", r"[^\d]", r"\-"])
    repeats = st.sampled_from(["*", "+", "?", "*?", "{2}", "{0,2}", "{1,}", "{,1}"])
    return st.recursive(
        atoms,
        lambda inner: st.one_of(
            st.builds("({}|{})".format, inner, inner),
            st.builds("{}{}".format, inner, inner),
            st.builds("(?:{}){}".format, inner, repeats),
        ),
        max_leaves=6,
    )


@settings(max_examples=400, deadline=None)
@given(
    generated_patterns(),
    st.lists(st.lists(st.sampled_from(b"ab0 \nc-"), max_size=6).map(bytes), min_size=5, max_size=8),
)
def test_a_generated_pattern_matches_what_re_matches(pattern: str, strings: list[bytes]):
    automaton = compile_regex(pattern)
    for data in strings:
        assert accepts(automaton, data) == bool(re.fullmatch(pattern.encode(), data))


@pytest.mark.parametrize("pattern", ["é+", "(é|日)*x?", "日{2}", "ab|日本"])
def test_a_character_beyond_ascii_is_its_utf8_bytes_as_one_unit(pattern: str):
    rng = random.Random(0)
    automaton = compile_regex(pattern)
    for text in ["", "é", "éé", "日日", "日本", "é日x", *("".join(rng.choices("é日本xab", k=3)) for _ in range(50))]:
        assert accepts(automaton, text.encode()) == bool(re.fullmatch(pattern, text))
    assert not accepts(automaton, "é".encode()[:1])


@pytest.mark.parametrize(
    "pattern",
    ["^a", "a$", r"a\b", r"(a)\1", "(?=a)", "(?!a)", "(?<=a)", "(?i)a", "(?P<n>a)", "a**", "a{2}{3}", "a*+", "*a"]
    + ["(a", "a)", "[a", "[b-a]", r"[\d-z]", "[é]", "\\", r"\x4", r"\q", r"\012", "a{3,2}", "(|+)"],
)
def test_what_is_not_supported_is_refused_in_one_sentence(pattern: str):
    with pytest.raises(ValueError, match="cannot compile the pattern"):
        compile_regex(pattern)


@pytest.mark.parametrize("pattern", ["(((a{99}){99}){99}){99}", "(a|b)*a(a|b){14}"])
def test_a_pattern_that_explodes_is_refused(pattern: str):
    with pytest.raises(ValueError, match="lower"):
        compile_regex(pattern)


@pytest.mark.parametrize(("pattern", "states"), [("(a|b)*abb", 4), ("a{3}", 4), ("(a|b)*a(a|b){4}", 32), ("ab|cb|db", 3)])
def test_the_automaton_is_the_smallest_with_one_dead_state(pattern: str, states: int):
    automaton = compile_regex(pattern)
    assert automaton.transitions.dtype == np.int32 and automaton.transitions.shape == (states + 1, 256)
    assert (automaton.transitions[0] == 0).all() and not automaton.accepting[0]
    alive = automaton.accepting.copy()
    for _ in range(states):
        alive |= alive[automaton.transitions].any(axis=1)
    assert alive[1:].all() and not alive[0]


def test_a_pattern_without_any_match_is_the_dead_state():
    automaton = compile_regex(r"a[^\x00-\xff]")
    assert automaton.start == 0 and automaton.transitions.shape == (1, 256)


VOCABULARY = [bytes([b]) for b in b"ab0<>/ \n"] + [b"ab", b"</", b"0b>", b"a" * 40, b"", None, b"<pad>", "é".encode()]


@pytest.mark.parametrize("pattern", [r"<[^/]*</a+>", "(ab|0b>)*", r"(.|\n)*0", r"a{40,80}b", "(a|é)*"])
def test_a_lifted_automaton_reads_tokens_as_their_bytes(pattern: str):
    automaton, rng = compile_regex(pattern), random.Random(1)
    tokens = lift(automaton, VOCABULARY)
    assert tokens.transitions.shape == (len(automaton.accepting), len(VOCABULARY))
    assert tokens.transitions.dtype == np.int32
    with_text = [v for v, text in enumerate(VOCABULARY) if text is not None]
    for _ in range(300):
        ids = rng.choices(with_text, k=rng.randrange(8))
        data = b"".join(VOCABULARY[v] or b"" for v in ids)
        assert accepts(tokens, ids) == bool(re.fullmatch(pattern.encode().replace("é".encode(), b"(?:\xc3\xa9)"), data))
        assert not accepts(tokens, [*ids, 13])  # None: no text, no match


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.sampled_from(b"ab<>/"), max_size=12).map(bytes),
    st.sets(st.integers(1, 11)),
    st.sets(st.integers(1, 11)),
)
def test_how_the_bytes_are_cut_makes_no_difference(data: bytes, first: set[int], second: set[int]):
    automaton = compile_regex(r"(a|<b?>|</a>)*b?")
    verdicts = []
    for cuts in (first, second):
        edges = [0, *sorted(c for c in cuts if c < len(data)), len(data)]
        pieces = [data[i:j] for i, j in zip(edges, edges[1:], strict=False)]
        verdicts.append(accepts(lift(automaton, pieces), range(len(pieces))))
    assert verdicts == [accepts(automaton, data)] * 2


def test_a_transparent_token_leaves_the_state():
    automaton = compile_regex("a0")
    tokens = lift(automaton, [b"a", b"0", None, None, b"<pad>"], transparent=[2, 4])
    assert accepts(tokens, [0, 2, 4, 1]) and not accepts(tokens, [0, 3, 1])
    assert accepts(lift(automaton, []), []) is False
    with pytest.raises(ValueError, match="transparent id 5 is outside"):
        lift(automaton, VOCABULARY[:5], transparent=[5])


def test_merged_columns_rebuild_the_table():
    table = np.random.default_rng(0).integers(0, 2, size=(3, 50))
    column_of, small = merge_columns(table)
    assert small.shape[1] == len({tuple(column) for column in table.T}) < 50
    np.testing.assert_array_equal(small[:, column_of], table)


def test_text_without_tags_is_any_text_in_which_no_tag_occurs():
    tags, rng = ["<a>", "</a>", "<ab-", "<c"], random.Random(2)
    automaton, seen = compile_regex(text_without(tags)), {True: 0, False: 0}
    for _ in range(2000):
        text = "".join(rng.choices(["<", "/", "a", "b", ">", "-", "c", "é", "\n", "<a", "</a"], k=rng.randrange(7)))
        verdict = text != "" and not any(tag in text for tag in tags)
        seen[verdict] += 1
        assert accepts(automaton, text.encode()) == verdict, text
    assert min(seen.values()) > 300
    for bad in (["<a>", "[b]"], ["<a<"], ["<"], [""]):
        with pytest.raises(ValueError, match="must begin with one character"):
            text_without(bad)
