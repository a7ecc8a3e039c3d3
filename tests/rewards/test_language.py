"""Language consistency on sentences counted by hand, in many scripts; formulas and code belong to no language."""

from __future__ import annotations

import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxreason.rewards import format as forms
from jaxreason.rewards.language import SCRIPTS, WRITTEN_IN, language_consistency, prose, script_words, words
from jaxreason.types import Completion, Problem, StopReason

PROBLEM = Problem("0", "1 + 1?", "2")
ENGLISH = "First we add both of the numbers, and then we divide the sum by three because there are three children."
GERMAN = "Zuerst addieren wir die beiden Zahlen und teilen dann die Summe durch drei, weil es drei Kinder gibt."
FRENCH = "Nous ajoutons les deux nombres, puis nous divisons la somme par trois car il y a trois enfants dans la maison."


def share(text: str, language: str, others: str = "") -> float | None:
    completion = Completion(text, (), StopReason.EOS)
    reward = language_consistency(PROBLEM, completion, language=language, others=others)
    part = reward.parts["language"]
    assert reward.total == (0.0 if part is None else part)
    return part


@pytest.mark.parametrize(
    ("text", "language", "expected"),
    [
        ("我们先把两个数相加。", "zh", 1),
        ("我们先把两个数相加。", "en", 0),
        ("我们把 both 相加", "zh", 5 / 6),  # five characters, one word
        ("So 二 is the sum", "en", 4 / 5),
        ("我们设 $x = 3$,那么 \\(x + y\\) 等于 `total` 五", "zh", 1),
        ("设 x 为苹果数, x = 3, y2 = 4", "zh", 1),  # letters that are variables
        ("It's fine", "en", 1),
        ("это three", "ru", 0.5),
        ("كم عدد التفاح", "ar", 1),
        ("दोनों संख्याओं का योग sum", "hi", 4 / 5),  # vowel signs do not cut words
        ("두 수를 더하면 five", "ko", 3 / 4),
        ("りんごを足す", "ja", 1),
        ("りんごを足す", "zh", 1 / 6),
        ("ผล sum", "th", 2 / 3),
        ("ተጨማሪ word", "en", 0.5),  # a script that has no name here is still another one
        ("1 + 2 = 3", "en", None),
        ("", "en", None),
        ("```python\ntotal = a + b\n```\n$$\\frac{sum}{two}$$ 12!", "en", None),
        ("\\begin{align} sum \\end{align} \\boxed{7}", "zh", 0),  # the environment's name closes it: one word is left
    ],
)
def test_by_hand(text: str, language: str, expected: float | None):
    assert share(text, language) == (expected if expected is None else pytest.approx(expected))


def test_only_the_chain_of_thought_counts():
    assert share("<think>我们相加</think> The answer is five.", "zh") == 1
    assert share("我们相加</think> The answer is five.", "zh") == 1  # the prompt opened it
    assert share("<think>我们相加 and then", "zh") == 4 / 6  # truncated
    assert share("<think>\n</think>The answer", "en") is None


def test_what_is_thinking_and_what_is_summary():
    assert forms.thinking("a<think>b</think>c") == "b" and forms.summary("a<think>b</think>c") == "c"
    assert forms.thinking("b</think>c</think>d") == "b</think>c" and forms.summary("b</think>c</think>d") == "d"
    assert forms.thinking("plain") == forms.summary("plain") == "plain"
    assert forms.thinking("<think>never ended") == "never ended" and forms.summary("<think>never ended") == ""


def test_formulas_and_code_are_cut_out_and_prices_are_not():
    assert prose("a $x$ b").split() == ["a", "b"]
    assert prose("costs $5 and $6 more") == "costs $5 and $6 more"
    assert prose("open $x\nnever closed$ here").split()[:2] == ["open", "$x"]
    assert prose("a ``` b") == "a ``` b" and prose("a \\[ b") == "a \\[ b"
    assert prose("``` a $ b ``` c $d$ e").split() == ["c", "e"]
    assert prose("$$a$$b\\[c\\]d\\(e\\)f") == " b d f"


def test_languages_of_one_script_are_told_apart():
    pytest.importorskip("py3langid", reason="needs the extra lang")
    for language, text in (("en", ENGLISH), ("de", GERMAN), ("fr", FRENCH)):
        assert [share(text, each, "en, de, fr") for each in ("en", "de", "fr")] == [
            float(language == e) for e in ("en", "de", "fr")
        ]
        assert share(text, "de") == 1  # by its script alone
    mixed = f"{GERMAN} {GERMAN} {ENGLISH}"
    found = share(mixed, "de", "en")
    german, english = (len(script_words(each)) for each in (GERMAN, ENGLISH))
    assert found == pytest.approx(2 * german / (2 * german + english), abs=12 / (2 * german + english))
    assert found + share(mixed, "en", "de") == pytest.approx(1)
    assert share(f"{ENGLISH} 我们", "en", "de,zh") == pytest.approx(english / (english + 2))
    japanese, chinese = (
        "まず二つの数を足して、次に合計を三で割ります。子供が三人いるからです。",
        "首先把两个数相加,然后把总和除以三,因为有三个孩子。",
    )
    assert share(japanese, "ja", "zh") == share(chinese, "zh", "ja") == 1
    assert share(japanese, "zh", "ja") == share(chinese, "ja", "zh") == 0


def test_a_language_without_a_known_script_is_refused():
    for language, others in (("xx", ""), ("en", "de,klingon"), ("english", "")):
        with pytest.raises(ValueError, match="is no language whose script is known"):
            share("word", language, others)
    assert all(script in SCRIPTS for scripts in WRITTEN_IN.values() for script in scripts)


def test_scripts_are_unicodes():
    """Against the names that Unicode gives its letters."""
    names = {"Han": "CJK", "Kana": ("HIRAGANA", "KATAKANA"), "Hangul": "HANGUL", "Latin": ("LATIN", "FULLWIDTH LATIN")}
    for code in [
        *range(0x2B0),
        *range(0x370, 0x1100),
        *range(0x1E00, 0x2000),
        *range(0x3041, 0x3130),
        0x4E2D,
        0x9FA5,
        0xAC00,
        0x20000,
    ]:
        letter = chr(code)
        if not letter.isalpha() or letter in "\u00aa\u00ba\u10fc":  # letters by other names
            continue
        known = [script for script in SCRIPTS if unicodedata.name(letter).startswith(names.get(script, script.upper()))]
        assert sorted({script for script, _ in script_words(letter + letter)}) == (known or ["another"]), (
            hex(code),
            unicodedata.name(letter),
        )


@given(st.lists(st.sampled_from(["我", "们", "sum", "two", " ", "$", "`", "\n", "5", "\\(", "\\)", "x", "é", "'"]), max_size=40))
def test_shares_of_all_scripts_add_up_to_one(pieces: list[str]):
    text = "".join(pieces)
    shares = [share(text, language) for language in ("zh", "en")]
    assert shares == [None, None] or sum(each or 0 for each in shares) == pytest.approx(1)


def test_words():
    assert words("It is 我们 x2!") == ["It", "is", "我", "们", "x2"]


DEGENERATE = {
    "a": 10**6, "\n": 10**5, "\ud800": 10**5, "\0": 10**5, "$": 10**6, "$a ": 10**5, "\\[ ": 10**5, "`\n": 10**5, "a\u0431": 10**5,
    "a1": 10**5, "a'": 10**5, "```a": 10**5, "\\begin{": 10**5, "\u4e2d": 10**5, "'": 10**5, "<think>": 10**5, "</think>": 10**5,
    "\\(a\\]": 10**5, "\u0301": 10**5, "$a\n": 10**5, "$$a$": 10**5,
}  # fmt: skip


@pytest.mark.parametrize("piece", DEGENERATE, ids=ascii)
def test_degenerate_text_takes_linear_time(piece: str):
    """Not timed: with a quadratic step, 10^10 or more of them, it would not end."""
    found = share(piece * DEGENERATE[piece], "zh")
    assert found is None or 0 <= found <= 1


def test_nothing_is_hidden_in_code_or_formulas():
    hidden = "\u4f60\u597d\u4f60\u597d"
    for text in (
        f"`{hidden}` yes ok",
        f"${hidden}$ yes ok",
        f"\\text{{a}} \\[ x = {hidden} \\] yes ok",
        f"```\nx = 1  # {hidden}\n```\nyes ok",
    ):
        completion = Completion(f"<think>{text}</think>", (), StopReason.EOS)
        assert language_consistency(Problem("1", "", ""), completion, language="en").total <= 0.5, text
    formulas = Completion("<think>so $\\alpha x = 3$ and `print(x)` hold</think>", (), StopReason.EOS)
    assert language_consistency(Problem("1", "", ""), formulas, language="en").total == 1
