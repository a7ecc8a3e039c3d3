r"""Rules on answers that are no formulas: the letter of a choice, and a few words.

Where the answer stands is `jaxreason.rewards.answers`' to say. Part credit (the F1 of words) is deliberately absent: an answer
is right or wrong. Nothing here raises, whatever the completion.
"""

from __future__ import annotations

import re
import string
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

from jaxreason.rewards.answers import after_thinking, marked_answer
from jaxreason.types import Completion, Problem, Reward

_TAIL = 4000  # characters of a completion without marks that are looked at
_FONT = re.compile(
    r"\\(?:text|textbf|mathrm|mathbf|textit|mathit|mbox|emph|f?box(?:ed)?)\s?\{|\\(?:displaystyle|left|right)(?![a-z])|[{}$*_`\\]"
)
_LABEL = re.compile(r"\s{0,8}[\[(]?([A-J])\s?[).:\]]\s{0,8}")
_LETTER = r"(?:[\[(]\s?(?P<a>[A-J])\s?[\])]|(?P<b>[A-J])(?![A-Za-z0-9'+*/^=-]))"
# 'A' and 'I' before a word are words themselves
_BEGINS = re.compile(rf"\W{{0,4}}(?:(?i:option|choice|answer)\W{{1,4}})?{_LETTER}(?!(?<=[AI])\s+[a-z])")
_NAMED = re.compile(
    rf"\b(?:option|choice|answer|choose|pick|select)s?(?:\s+(?:is|be)|:)?\s*:?\s*{_LETTER}(?!(?<=[AI])\s+[a-z])", re.IGNORECASE
)
_PRAISED = re.compile(rf"{_LETTER}[^A-Za-z\n]{{0,4}}\bis\s+(?:the\s+)?(?:correct|right|best|true)\b")
_BRACKETED = re.compile(r"\(([A-J])\)")
_JOINING = r"(?:(?:or|and|but|also|maybe|perhaps|possibly|either|both|option|choice|answer)\b)"
_ONLY_JOINS = re.compile(rf"(?:[\W_]|{_JOINING})*")
# a second letter: right after the first, or after an 'or'
_ANOTHER = re.compile(rf"(?:^|\b{_JOINING})(?:[\W_]|{_JOINING})*[A-J](?![A-Za-z0-9'])(?!(?<=[AI])\s+[a-z])")
_ARTICLES = re.compile(r"\b(?:a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)
_YES_NO = {"yes": "yes", "no": "no", "true": "yes", "false": "no"}
_SENTENCES = re.compile(r"[.!?\n]+")
_BOTH = re.compile(rf"(yes|no|true|false)(?: {_JOINING})* (yes|no|true|false)(?= (?:yes|no|true|false|{_JOINING})\b|$)")
_DENIED = re.compile(r"\bnot (yes|no|true|false)\b")


def choice_answer(problem: Problem, completion: Completion) -> Reward:
    """1 if the completion chooses `problem.answer`, a choice's letter (or its text); else 0.

    `problem.metadata["choices"]`, where there is one, holds the choices: pairs of a label and a text, a mapping from labels, or
    the texts alone in the letters' order. Then a choice may be named by its whole text too. Letters are A to J: B, (B),
    'B. text', a box with \\text{B}, 'the answer is (B)', 'option B is correct'; two letters are no answer. The part is None
    where the reference is no choice.
    """
    choices = _choices(problem.metadata.get("choices"))
    gold = _reference(problem.answer, choices)
    if gold is None:
        return Reward(0.0, {"accuracy": None})
    correct = float(chosen(completion.text, choices=choices) == gold)
    return Reward(correct, {"accuracy": correct})


def short_answer(problem: Problem, completion: Completion) -> Reward:
    """1 if the completion's answer is `problem.answer` or one of `problem.metadata["aliases"]`, word for word; else 0.

    As SQuAD does (arXiv:1606.05250, section 6.1): capitals, punctuation, articles and white space make no difference. Where
    the reference is yes or no (or true, false), the answer's first word decides. Without a mark the last sentence is the
    answer. The part is None where the reference has no words.
    """
    aliases = problem.metadata.get("aliases", ())
    golds = {words(gold) for gold in (problem.answer, *(aliases if isinstance(aliases, Sequence) else ())) if isinstance(gold, str)}
    golds.discard("")
    if not golds:
        return Reward(0.0, {"accuracy": None})
    marked = marked_answer(completion.text)
    if words(problem.answer) in _YES_NO:
        found = _yes_or_no(completion.text if marked is None else marked, marked=marked is not None)
        correct = float(found == _YES_NO[words(problem.answer)])
    else:
        found = _last_sentence(completion.text) if marked is None else marked
        correct = float(words(found) in golds)
    return Reward(correct, {"accuracy": correct})


def words(text: str) -> str:
    """A text's words as SQuAD compares them: small letters, without punctuation, articles and spare white space.

    None of a text of more than 4,000 characters: what a reader does not see to its end says nothing.
    """
    if len(text) > _TAIL:
        return ""
    text = _FONT.sub(" ", text).lower().replace("\N{RIGHT SINGLE QUOTATION MARK}", "'").translate(_PUNCTUATION)
    return " ".join(_ARTICLES.sub(" ", text).split())


def chosen(text: str, *, choices: Mapping[str, str]) -> str | None:
    """The label of the choice that a completion commits to; None where it commits to none, or to several."""
    marked = marked_answer(text)
    if marked is not None:
        return _label_of(marked, choices)
    tail = _FONT.sub(" ", after_thinking(text)[-_TAIL:]).strip()
    whole = _label_of(tail, choices) if len(tail) < 200 and "\n" not in tail else None
    if whole is not None:
        return whole
    for pattern in (_NAMED, _PRAISED, _BRACKETED):
        found = deque(pattern.finditer(tail), maxlen=2)
        if found:
            if len(found) > 1 and _ONLY_JOINS.fullmatch(tail, found[0].end(), found[1].start()):
                return None
            letter = next(group for group in found[-1].groups() if group).upper()
            return _alone(letter, tail[found[-1].end() :], choices)
    return _label_of(tail.splitlines()[-1], choices) if tail else None


def _label_of(said: str, choices: Mapping[str, str]) -> str | None:
    """The label that an answer names: by a choice's whole text, or by its letter."""
    if len(said) > _TAIL:
        return None
    said = _FONT.sub(" ", said).strip()
    for read in (_letters, words) if re.search("[A-Za-z]", said) else (_letters,):  # -15 and 15 have the same words
        by_text = [label for label, text in choices.items() if read(text) and read(text) == read(said)]
        if len(by_text) == 1:
            return by_text[0]
    if said.strip(" ().:") in choices:
        return said.strip(" ().:")
    begins = _BEGINS.match(said)
    if begins is None:
        return None
    return _alone(begins["a"] or begins["b"], said[begins.end() :], choices)


def _alone(letter: str, rest: str, choices: Mapping[str, str]) -> str | None:
    """The letter, where it is a choice's and what follows it, its own text aside, names no other one."""
    if choices and letter not in choices:
        return None
    if letter in choices:
        rest = rest.replace(_FONT.sub(" ", choices[letter]).strip(), "", 1)
    return None if _ANOTHER.search(rest) else letter


def _letters(text: str) -> str:
    return "".join(_FONT.sub(" ", text).lower().split()).strip("().")


def _choices(given: Any) -> dict[str, str]:
    """Choices by label, from a mapping, pairs, or texts in order; a text's own label, as in 'B) two', is taken off."""
    if isinstance(given, Mapping):
        return {str(label): str(text) for label, text in given.items()}
    if not isinstance(given, Sequence) or isinstance(given, str) or len(given) > 10:
        return {}
    if given and all(isinstance(pair, (tuple, list)) and len(pair) == 2 for pair in given):
        return {str(label): str(text) for label, text in given}
    labelled = [_LABEL.match(str(text)) for text in given]
    if given and all(match is not None and match[1] == letter for match, letter in zip(labelled, "ABCDEFGHIJ", strict=False)):
        return {match[1]: str(text)[match.end() :] for match, text in zip(labelled, given, strict=True) if match}
    return {letter: str(text) for letter, text in zip("ABCDEFGHIJ", given, strict=False)}


def _reference(answer: str, choices: Mapping[str, str]) -> str | None:
    if answer.strip() in choices:
        return answer.strip()
    if re.fullmatch(r"\s*\(?[A-J]\)?\.?\s*", answer):
        return answer.strip(" ().\n\t")
    return _label_of(answer, choices)


def _last_sentence(text: str) -> str:
    lines = _FONT.sub(" ", after_thinking(text)[-_TAIL:]).strip().splitlines()
    return lines[-1] if lines else ""


def _yes_or_no(text: str, *, marked: bool) -> str | None:
    """The yes or no of a text: its first word; without a mark, else the only one that its last sentence has."""
    said = words(text[:_TAIL] if marked else after_thinking(text)[-_TAIL:])
    both, first = _BOTH.match(said), said.split()
    if both and _YES_NO[both[1]] != _YES_NO[both[2]]:
        return None
    if first and first[0] in _YES_NO and (marked or len(first) < 60):
        return _YES_NO[first[0]]
    if marked:
        return None
    sentences = [sentence for sentence in _SENTENCES.split(after_thinking(text)[-_TAIL:]) if sentence.strip()]
    last = _DENIED.sub(lambda denied: "no" if _YES_NO[denied[1]] == "yes" else "yes", words(sentences[-1])) if sentences else ""
    named = {_YES_NO[word] for word in last.split() if word in _YES_NO}
    return named.pop() if len(named) == 1 else None
