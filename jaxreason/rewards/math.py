r"""Rules on a mathematical answer in text: find the answer the completion commits to, and compare it with the reference.

`math_answer` is for answers of any form: `answers` finds them and `equality` compares them. `gsm8k_answer` is for numbers
alone. No completion makes them raise.
"""

from __future__ import annotations

import contextlib
import re
from collections import deque
from decimal import Decimal

from jaxreason.rewards.answers import NOT, OR, after_thinking, boxed_answer, boxes, find_answer, find_reference, tagged_answer
from jaxreason.rewards.choice import chosen
from jaxreason.rewards.equality import equal
from jaxreason.types import Completion, Problem, Reward

# A number with its sign, currency and thousands' commas. What follows a slash belongs to it (1/2 is no 1 and no 2), a
# minus after a digit is a subtraction or a range, and digits after a letter are a name (x2).
_NUMBER = (
    r"(?<![A-Za-z0-9])(?P<sign>(?:(?<![0-9A-Za-z)\]}])[-+])?)\$?(?P<sign2>-?)"
    r"(?P<digits>[0-9]+(?:,[0-9]{3}(?![0-9]))*(?:\.[0-9]+)?|\.[0-9]+)(?P<fraction>(?: ?/ ?\$?[0-9][0-9.,]*)*)"
)
_ANY_NUMBER = re.compile(_NUMBER)
_HASHES = re.compile(rf"####\s*{_NUMBER}")
_ANSWER_IS = re.compile(rf"\banswer(?: is|:)[^0-9\n]{{0,32}}?{_NUMBER}", re.IGNORECASE)
_LISTED = re.compile(r"[\s,;&|]{0,20}(?:and)?[\s,;&|]{0,20}")
_LATEX_TEXT = re.compile(r"\\(?:text|textbf|mathrm|mathbf)\{([^{}]*)\}")
_LATEX_NOISE = re.compile(r"\\[!,;:$% ]|\{,\}|[$~]")
# a choice's letter, as a reference of its own
_LETTER = re.compile(r"\$?(?:\\(?:text|textbf|mathrm|mathbf)\{\s*)?\(?([A-J])\)?\.?\s*\}?\$?")

# and one with its text: (B) 12
_CHOICE = re.compile(
    r"\$?(?:\\(?:text|textbf|mathrm|mathbf)\{\s*)?\(([A-J])\)\s*\}?(?:\\[ ,;:]|\\q?quad|[\s~:])*([^\s=+*/^_(].*?)\$?", re.DOTALL
)


def math_answer(problem: Problem, completion: Completion, *, limit_seconds: float = 2.7) -> Reward:
    r"""1 if the completion's final answer is mathematically `problem.answer`; else 0.

    The reference may be bare LaTeX or text, `$...$`, a box, a whole solution, or GSM8K's with `####`. Numbers are compared
    exactly, tuples in order, lists of solutions in any; a letter from A to J is a choice; units, currency and degree signs
    may be left out, and 50% is 50 and 1/2. Symbols need math-verify (the extra `math`). What takes longer than
    `limit_seconds` is wrong: in the main thread a timer sees to it; elsewhere only the bounds on what is evaluated do, so
    run the rule in worker processes, whose 3 seconds leave it time to say so.
    Raises ValueError if math-verify is needed and absent. The part is None where the reference holds no answer.
    """
    reference = find_reference(problem.answer)
    if not reference:
        return Reward(0.0, {"accuracy": None})
    letter, choice = _LETTER.fullmatch(reference), _CHOICE.fullmatch(reference)
    answer = chosen(completion.text, choices={}) if letter else find_answer(completion.text)
    if letter:
        reference = letter[1]
    elif choice and answer is not None:
        given = _CHOICE.fullmatch(answer) or _LETTER.fullmatch(answer)
        reference, answer = (choice[2], answer) if given is None else _parted(choice, given)
    correct = float(answer is not None and equal(reference, answer, limit_seconds=limit_seconds))
    return Reward(correct, {"accuracy": correct})


def _parted(gold: re.Match[str], given: re.Match[str]) -> tuple[str, str]:
    """What is to be equal of a choice and an answer that names one: the letters, and where those are, the texts."""
    text = given[2] if given.re is _CHOICE else ""
    return (gold[2], text) if text and gold[1] == given[1] else (gold[1], given[1])


def gsm8k_answer(problem: Problem, completion: Completion) -> Reward:
    r"""1 if the completion's final answer equals `problem.answer`, the number after GSM8K's `####`; else 0.

    The answer is looked for after the last `</think>` where there is one, in this order, and the first form present
    decides: the last `\boxed{}`, the last `<answer>` block, the last `####`, the last 'the answer is', the last number.
    Commas, `$`, `%`, a final full stop and `.0` make no difference; the comparison is exact, in decimals. A fraction or
    an expression is not a number, '3 or 4' and 'not 4' are no answer, nor is '3, 4' after a mark. The part is None where the
    reference is not a number.
    """
    reference = _ANY_NUMBER.fullmatch(problem.answer.strip().rstrip("%. "))
    expected = None if reference is None else _value(reference)
    if expected is None:
        return Reward(0.0, {"accuracy": None})
    correct = float(final_number(completion.text) == expected)
    return Reward(correct, {"accuracy": correct})


def final_number(text: str) -> Decimal | None:
    """The number a completion commits to, by the order that `gsm8k_answer` documents; None where there is none."""
    text = after_thinking(text).replace("\N{MINUS SIGN}", "-")
    if boxes(text):
        return _boxed_value(boxed_answer(text) or "")
    tagged = tagged_answer(text)
    if tagged is not None:
        return _last_value(_ANY_NUMBER, tagged.replace("\\$", "$"), listed=_LISTED)
    text = text.replace("\\$", "$")
    for form in (_HASHES, _ANSWER_IS):
        if form.search(text):
            return _last_value(form, text, listed=_LISTED)
    return _last_value(_ANY_NUMBER, text, listed=OR)


def _last_value(form: re.Pattern[str], text: str, *, listed: re.Pattern[str]) -> Decimal | None:
    """The last number of a form; None where it is denied, or an 'or' or what is `listed` parts it from another number."""
    found = deque(form.finditer(text), maxlen=2)
    if not found:
        return None
    last = found[-1]
    pairs = [(found[0], last)] if form is _ANY_NUMBER and len(found) > 1 else []
    after = _ANY_NUMBER.search(text, last.end(), last.end() + 200)
    pairs += [(last, after)] if after else []
    gaps = [text[one.end() : other.start()] for one, other in pairs]
    denied = NOT.search(text, 0, last.start("sign"))
    return None if denied or any(listed.fullmatch(gap) or OR.fullmatch(gap) for gap in gaps) else _value(last)


def _value(match: re.Match[str]) -> Decimal | None:
    if match["fraction"] or (match["sign"] and match["sign2"]):
        return None
    return Decimal(match["sign"] + match["sign2"] + match["digits"].replace(",", ""))


def _boxed_value(latex: str) -> Decimal | None:
    r"""The number in a box: what follows its last '=', LaTeX's spacing and units aside, must be one number."""
    if re.search(r"\b(?:or|not)\b", latex):
        return None
    plain = _LATEX_TEXT.sub(r" \1 ", latex.rpartition("=")[2])
    plain = _LATEX_NOISE.sub(lambda noise: "," if noise[0] == "{,}" else "", plain)
    numbers = list(_ANY_NUMBER.finditer(plain))
    if len(numbers) != 1 or re.search(r"[\\^_{}]", plain):
        return None
    return _value(numbers[0])


def _load() -> None:
    """Reads one pair of expressions, so that sympy and the parser's tables are in memory."""
    with contextlib.suppress(ValueError):  # without math-verify; the rule says so itself, where it needs it
        equal("x+1", "1+x", limit_seconds=60.0)


BEFORE_FORK = {"math_answer": _load}  # see `jaxreason.rewards.pool`
