"""Language consistency: how much of a chain of thought is in the language it should be in.

DeepSeek-R1 (arXiv:2501.12948, section 2.3.2) rewards the share of words in the target language, against the mixing of languages
that reinforcement brings. A word's script decides first, which is exact and fast; only for languages that share a script is
py3langid asked (the extra `lang`), some words at a time. Code, formulas, numbers and punctuation belong to no language;
words of another script than Latin and Greek do, in code and formulas too, where a policy could hide them.
Absent on purpose: spelling and grammar, and a foreign word or two within a sentence of the same script.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import re
from typing import Any

from jaxreason.rewards.format import thinking
from jaxreason.types import Completion, Problem, Reward

# What a word of a script is made of, as the inside of a character class.
SCRIPTS = {
    "Han": "\u3005\u3007\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff",
    "Kana": "\u3041-\u3096\u309d-\u309f\u30a1-\u30fa\u30fc-\u30ff\u31f0-\u31ff\uff66-\uff9f",
    "Latin": "A-Za-z\u00aa\u00ba\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u02af\u0300-\u036f\u1e00-\u1eff\uff21-\uff3a\uff41-\uff5a",
    "Cyrillic": "\u0400-\u0481\u048a-\u052f\u1c80-\u1c8f\ua640-\ua69f",
    "Arabic": "\u0620-\u065f\u066e-\u06d3\u06d5-\u06dc\u06e5-\u06e8\u06ee\u06ef\u06fa-\u06ff\u0750-\u077f\u0870-\u08ff"
    "\ufb50-\ufd3d\ufd50-\ufdfb\ufe70-\ufefc",
    "Hangul": "\u1100-\u11ff\u3131-\u318e\uac00-\ud7a3",
    "Devanagari": "\u0900-\u0963\u0971-\u097f",
    "Greek": "\u0370-\u0377\u037a-\u037d\u037f\u0386\u0388-\u03e1\u03f0-\u03ff\u1f00-\u1fff",
    "Hebrew": "\u0591-\u05bd\u05d0-\u05f2",
    "Thai": "\u0e01-\u0e3a\u0e40-\u0e4e",
    "Bengali": "\u0980-\u09e3\u09f0\u09f1\u09fc",
    "Tamil": "\u0b82-\u0be3",
    "Telugu": "\u0c00-\u0c63",
    "Georgian": "\u10a0-\u10ff",
    "Armenian": "\u0531-\u0588",
}
UNSPACED = ("Han", "Kana", "Thai")  # written without spaces: counted by characters
_LATIN = (
    "af az bs ca cs cy da de en eo es et eu fi fr ga gl hr hu id is it la lt lv ms mt nb nl nn no oc pl pt ro sk sl sq sv sw tl "
    "tr vi xh zu"
)
WRITTEN_IN = {  # two letters of ISO 639-1 -> scripts
    **dict.fromkeys(_LATIN.split(), ("Latin",)),
    **dict.fromkeys(("ru", "uk", "be", "bg", "sr", "mk", "kk", "ky", "mn"), ("Cyrillic",)),
    **dict.fromkeys(("ar", "fa", "ur", "ps", "ug"), ("Arabic",)),
    **dict.fromkeys(("hi", "mr", "ne"), ("Devanagari",)),
    **dict.fromkeys(("bn", "as"), ("Bengali",)),
    **{"zh": ("Han",), "ja": ("Han", "Kana"), "ko": ("Hangul",), "el": ("Greek",), "he": ("Hebrew",), "th": ("Thai",)},
    **{"ta": ("Tamil",), "te": ("Telugu",), "ka": ("Georgian",), "hy": ("Armenian",)},
}
PASSAGE_WORDS = 12  # of one script, that py3langid is asked about at once: fewer are easily mistaken
PASSAGE_LETTERS = 400  # a passage's words are cut off here: a degenerate word is no reason to read on

_UNSPACED = "".join(SCRIPTS[script] for script in UNSPACED)
_SPACED = "".join(inside for script, inside in SCRIPTS.items() if script not in UNSPACED)  # vowel signs are in no \w
_PIECE = rf"(?:[^\W{_UNSPACED}]|[{_SPACED}])+"
_WORD = re.compile(rf"[{_UNSPACED}]|{_PIECE}")
_RUN = re.compile(rf"[{_UNSPACED}]|\\?{_PIECE}(?:['\u2019]{_PIECE})*")
_NAME = re.compile(r"[\d_\\]")  # what makes a run of letters a number, a name in a program or a command, and no word
_LETTERS = re.compile(
    "|".join(f"(?P<{script}>[{inside}'\u2019]+)" for script, inside in SCRIPTS.items())
    + rf"|(?P<another>[^\W\d_{_SPACED}{_UNSPACED}]+)"
)
_HIDDEN = re.compile("[" + "".join(inside for script, inside in SCRIPTS.items() if script not in ("Latin", "Greek")) + "]+")
# What opens code or a formula, and what closes it; a dollar sign as Pandoc has it, for prices are no formulas.
_OPENS = re.compile(r"```|`|\$\$|\$(?=\S)|\\\[|\\\(|\\begin\{")
_CLOSES = {
    "```": re.compile("```"),
    "`": re.compile(r"`|\n"),
    "$$": re.compile(r"\$\$"),
    "$": re.compile(r"(?<![\s\\])\$(?!\d)|\n"),
    "\\[": re.compile(r"\\\]"),
    "\\(": re.compile(r"\\\)"),
    "\\begin{": re.compile(r"\\end\{"),
}


def language_consistency(problem: Problem, completion: Completion, *, language: str, others: str = "") -> Reward:
    """The share of the words of the chain of thought that are in `language`; DeepSeek-R1, arXiv:2501.12948, section 2.3.2.

    `language` is two letters of ISO 639-1. Words in its script count as its own; with `others`, languages of the same script
    such as 'en,fr', py3langid decides among them and it, for each dozen of neighbouring words. Chinese,
    Japanese and Thai are counted by characters. Single Latin and Greek letters are variables and not counted. The part is
    None where there are no words. Raises ValueError for a language that is not in `WRITTEN_IN`, or without the extra `lang`.
    """
    for each in (language, *_listed(others)):
        if each not in WRITTEN_IN:
            raise ValueError(f"'{each}' is no language whose script is known: choose among {', '.join(sorted(WRITTEN_IN))}")
    found = script_words(prose(thinking(completion.text)))
    if not found:
        return Reward(0.0, {"language": None})
    rivals = tuple(each for each in _listed(others) if set(WRITTEN_IN[each]) & set(WRITTEN_IN[language]))
    own = _told_apart(found, language, rivals) if rivals else sum(script in WRITTEN_IN[language] for script, _ in found)
    value = own / len(found)
    return Reward(value, {"language": value})


def words(text: str) -> list[str]:
    """Runs of letters and digits, and every character of a script that is written without spaces."""
    return _WORD.findall(text)


def script_words(text: str) -> list[tuple[str, str]]:
    """The text's words with their scripts; names, numbers and single Latin or Greek letters left out."""
    found: list[tuple[str, str]] = []
    for run in _RUN.findall(text):
        if _NAME.search(run):
            continue
        for piece in _LETTERS.finditer(run):
            script = str(piece.lastgroup)
            if len(piece[0]) > 1 or script not in ("Latin", "Greek"):
                found.append((script, piece[0]))
    return found


def prose(text: str) -> str:
    """The text without code (in backquotes) and formulas (LaTeX's delimiters and environments); one left open is text.

    What they hold in other scripts than Latin and Greek stays: it is no code, and would be hidden there.
    """
    kept, at = [], 0
    ahead: dict[str, re.Match[str] | None] = {}  # the next closing mark of each kind: no stretch is searched twice
    for opened in _OPENS.finditer(text):
        if opened.start() < at:
            continue
        kind = opened[0]
        closed = ahead[kind] if kind in ahead else _CLOSES[kind].search(text, opened.end())
        if closed is not None and closed.start() < opened.end():
            closed = _CLOSES[kind].search(text, opened.end())
        ahead[kind] = closed
        if closed is not None and closed[0] != "\n":
            kept += [text[at : opened.start()], *_HIDDEN.findall(text, opened.end(), closed.start())]
            at = closed.end()
    return " ".join([*kept, text[at:]])


def _listed(others: str) -> list[str]:
    return [each for each in re.split(r"[\s,]+", others) if each]


def _told_apart(found: list[tuple[str, str]], language: str, others: tuple[str, ...]) -> int:
    """How many words of its script stand in passages that py3langid takes for `language` rather than one of the others."""
    identify = _identifier(tuple(sorted({language, *others})))
    scripts = {script for each in (language, *others) for script in WRITTEN_IN[each]}  # Kana tell what Han are
    found = [(script, word) for script, word in found if script in scripts]
    passages = max(1, len(found) // PASSAGE_WORDS)  # the last is longer, not shorter
    count = 0
    for number in range(passages):
        end = (number + 1) * PASSAGE_WORDS if number + 1 < passages else len(found)
        passage = found[number * PASSAGE_WORDS : end]
        text = "".join(word if script in UNSPACED else f" {word}" for script, word in passage)
        ranked = dict(identify.rank(text[:PASSAGE_LETTERS].lower()))
        if ranked[language] == max(ranked.values()):  # where nothing tells them apart, it is not held against the words
            count += sum(script in WRITTEN_IN[language] for script, _ in passage)
    return count


@functools.cache
def _identifier(languages: tuple[str, ...]) -> Any:
    """py3langid's model for these languages alone."""
    identifier = copy.copy(_model())
    identifier.set_languages(languages)
    return identifier


@functools.cache
def _model() -> Any:
    """py3langid's model, which takes a second to read, once in a process."""
    try:
        from py3langid.langid import MODEL_FILE, LanguageIdentifier
    except ImportError:
        raise ValueError("to tell languages of one script apart takes py3langid: install jaxreason[lang]") from None
    return LanguageIdentifier.from_model_file(MODEL_FILE)


def _read_model() -> None:
    with contextlib.suppress(ValueError):  # the rule says so itself, where it needs it
        _model()


BEFORE_FORK = {"language_consistency": _read_model}  # see `jaxreason.rewards.pool`
