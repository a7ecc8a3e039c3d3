"""What a row's columns hold, checked: each function returns a value of one kind or raises `BadRow` and says what is there."""

from __future__ import annotations

import re
from collections.abc import Sequence
from decimal import Decimal, InvalidOperation
from typing import Any

from jaxreason.naming import nearest
from jaxreason.tasks.rows import BadRow, Values

MOST_DIGITS = 100  # of a number that is an answer
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
_LETTERED = re.compile(r"\s*\(?([A-Za-z])\s*[).:]\s*(.*)", re.DOTALL)


def value(row: Values, column: str) -> Any:
    if column not in row:
        there = ", ".join(list(row)[:20]) or "none at all"
        near = nearest(column, list(row))
        remedy = near if near.startswith("did") else "name the column that holds it, or use another file"
        raise BadRow("missing column", f"there is no column '{column}' among {there}: {remedy}")
    return row[column]


def text(row: Values, column: str) -> str:
    """A text that is not empty, without the space around it."""
    found = checked_text(value(row, column), column).strip()
    if not found:
        raise BadRow("empty", f"column '{column}' is empty")
    return found


def optional_text(row: Values, column: str) -> str:
    """A text, or '' where the row has none."""
    return "" if row.get(column) is None else checked_text(row[column], column)


def checked_text(found: Any, column: str) -> str:
    if not isinstance(found, str):
        raise wrong_type(found, column, "a text")
    try:
        found.encode()
    except UnicodeEncodeError:
        raise BadRow(
            "not text", f"column '{column}' holds half of a character (a lone surrogate), which no tokenizer takes"
        ) from None
    return found


def texts(row: Values, column: str, *, least: int = 1) -> list[str]:
    """A list of texts, at least so many."""
    found = value(row, column)
    if not isinstance(found, list) or len(found) < least:
        raise wrong_type(found, column, "a list of texts")
    return [checked_text(each, column) for each in found]


def number(row: Values, column: str) -> str:
    """A number as digits: 18, '18', '1,018' and 18.0 are '18' and '1018'."""
    found = value(row, column)
    if isinstance(found, bool) or not isinstance(found, int | float | str):
        raise wrong_type(found, column, "a number")
    return plain_number(str(found), column)


def plain_number(found: str, column: str) -> str:
    """A number without thousands separators, an exponent, leading zeros, or a fraction that is zero."""
    try:
        exact = Decimal(found.strip().replace(",", ""))
    except InvalidOperation:
        exact = Decimal("nan")
    if not exact.is_finite() or abs(exact.adjusted()) > MOST_DIGITS:
        raise BadRow("unparsable answer", f"column '{column}' gives the answer {shown(found)}, which is no number")
    plain = f"{exact:f}"
    plain = plain.rstrip("0").rstrip(".") if "." in plain else plain
    return "0" if plain == "-0" else plain


def answer(row: Values, column: str) -> str:
    """A reference answer: a text with balanced braces and without the dollars around it, or a number."""
    found = value(row, column)
    if isinstance(found, int | float) and not isinstance(found, bool):
        return number(row, column)
    return latex(text(row, column), column)


def latex(found: str, column: str) -> str:
    r"""A mathematical answer without $, \( or \[ around it."""
    plain = found.strip()
    plain = plain[:-1] if plain.endswith("$.") else plain
    for opening, closing in (("$$", "$$"), ("$", "$"), (r"\(", r"\)"), (r"\[", r"\]")):
        inner = plain[len(opening) : len(plain) - len(closing)]
        if plain.startswith(opening) and plain.endswith(closing) and inner.strip() and opening not in inner:
            plain = inner.strip()
            break
    bare = re.sub(r"\\[{}\\]", "", plain)
    depth = 0
    for brace in re.findall(r"[{}]", bare):
        depth += 1 if brace == "{" else -1
        if depth < 0:
            break
    if depth or not re.search(r"\w", plain.replace("_", "")) and plain not in (r"\emptyset", "{}"):
        raise BadRow("unparsable answer", f"column '{column}' gives the answer {shown(found)}, which is no mathematical value")
    return plain


def boxed(solution: str, column: str) -> str:
    r"""What the last \boxed{} of a solution holds."""
    start = max(solution.rfind(r"\boxed"), solution.rfind(r"\fbox"))
    rest = re.sub(r"^\\f?box(ed)?\s*", "", solution[start:]) if start >= 0 else ""
    if start >= 0 and not rest.startswith("{"):  # \boxed 3, as a few solutions of MATH have it
        return latex(re.match(r"[^\s$.,]*", rest)[0], column)  # type: ignore[index]
    depth = 0
    for brace in re.finditer(r"\\.|[{}]", rest, re.DOTALL):
        depth += {"{": 1, "}": -1}.get(brace[0], 0)
        if depth == 0 and brace[0] == "}":
            return latex(rest[1 : brace.start()], column)
    raise BadRow("unparsable answer", rf"column '{column}' has no whole \boxed{{}}, which would hold the answer")


def lettered(options: Sequence[str], column: str) -> list[tuple[str, str]]:
    """Choices as (letter, text); options that bring their letters, as 'A)5' does, keep them."""
    matches = [_LETTERED.fullmatch(each) for each in options]
    if all(match and match[1].upper() == letter for match, letter in zip(matches, LETTERS, strict=False)):
        options = [match[2] for match in matches if match]
    if not 2 <= len(options) <= len(LETTERS):
        raise BadRow("wrong choices", f"column '{column}' holds {len(options)} choices: expected 2 to {len(LETTERS)}")
    return list(zip(LETTERS, (each.strip() for each in options), strict=False))


def labelled(row: Values, column: str, key: str) -> tuple[list[tuple[str, str]], str]:
    """Choices in the form {"label": [...], "text": [...]} and the letter of the right one, by the label that `key` holds.

    Labels that are not letters (a few of ARC's are 1 to 4) become letters in their order.
    """
    found = value(row, column)
    if not isinstance(found, dict) or not all(isinstance(found.get(part), list) for part in ("label", "text")):
        raise wrong_type(found, column, '{"label": [...], "text": [...]}')
    labels = [str(each).strip() for each in found["label"]]
    if len(labels) != len(found["text"]) or len(set(labels)) != len(labels):
        raise BadRow("wrong choices", f"column '{column}' has {len(found['text'])} texts for the labels {', '.join(labels)}")
    choices = lettered([checked_text(each, column) for each in found["text"]], column)
    right = text(row, key)
    if right not in labels:
        raise BadRow("unparsable answer", f"column '{key}' is {shown(right)}, which is none of {', '.join(labels)}")
    return choices, choices[labels.index(right)][0]


def picked(choices: Sequence[tuple[str, str]], right: Any, column: str) -> str:
    """The letter of the right choice, given as its place from 0 where it is a whole number, else as its letter or its text."""
    letters, wordings = [letter for letter, _ in choices], [wording for _, wording in choices]
    if isinstance(right, int) and not isinstance(right, bool) and 0 <= right < len(choices):
        return letters[right]
    given = right.strip() if isinstance(right, str) else ""
    if given.upper() in letters:
        return given.upper()
    if wordings.count(given) == 1:
        return letters[wordings.index(given)]
    raise BadRow("unparsable answer", f"column '{column}' is {shown(right)}, which is none of {len(choices)} choices")


def wrong_type(found: Any, column: str, expected: str) -> BadRow:
    return BadRow("wrong type", f"column '{column}' holds {shown(found)}: expected {expected}")


def shown(found: Any) -> str:
    """A value as a sentence shows it: in one line, and not all of a long one."""
    return repr(found.strip() if isinstance(found, str) else found)[:80]
