r"""Rules on a mathematical answer in text: find the answer the completion commits to, and compare it exactly.

Nothing here raises, whatever the completion, and every pattern reads text in one linear pass: none has two neighbouring
repeats that could share characters. Symbolic comparison is deliberately absent: GSM8K's answers are numbers.
"""

from __future__ import annotations

import re
from collections import deque
from decimal import Decimal

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
_BRACE = re.compile(r"[{}]")
_LATEX_TEXT = re.compile(r"\\(?:text|textbf|mathrm|mathbf)\{([^{}]*)\}")
_LATEX_NOISE = re.compile(r"\\[!,;:$% ]|\{,\}|[$~]")


def gsm8k_answer(problem: Problem, completion: Completion) -> Reward:
    r"""1 if the completion's final answer equals `problem.answer`, the number after GSM8K's `####`; else 0.

    The answer is looked for after the last `</think>` where there is one, in this order, and the first form present
    decides: the last `\boxed{}`, the last `<answer>` block, the last `####`, the last 'the answer is', the last number.
    Commas, `$`, `%`, a final full stop and `.0` make no difference; the comparison is exact, in decimals. A fraction or
    an expression is not a number. The part is None where the reference is not a number.
    """
    reference = _ANY_NUMBER.fullmatch(problem.answer.strip().rstrip("%. "))
    expected = None if reference is None else _value(reference)
    if expected is None:
        return Reward(0.0, {"accuracy": None})
    correct = float(final_number(completion.text) == expected)
    return Reward(correct, {"accuracy": correct})


def final_number(text: str) -> Decimal | None:
    """The number a completion commits to, by the order that `gsm8k_answer` documents; None where there is none."""
    text = text.rpartition("</think>")[2].replace("\N{MINUS SIGN}", "-")
    boxed = _last_boxed(text)
    if boxed is not None:
        return _boxed_value(boxed)
    opened = text.rfind("<answer>")
    closed = text.find("</answer>", opened)
    if 0 <= opened < closed:
        return _last_value(_ANY_NUMBER, text[opened + len("<answer>") : closed].replace("\\$", "$"))
    text = text.replace("\\$", "$")
    for form in (_HASHES, _ANSWER_IS):
        if form.search(text):
            return _last_value(form, text)
    return _last_value(_ANY_NUMBER, text)


def _last_value(form: re.Pattern[str], text: str) -> Decimal | None:
    last = deque(form.finditer(text), maxlen=1)
    return _value(last[0]) if last else None


def _value(match: re.Match[str]) -> Decimal | None:
    if match["fraction"] or (match["sign"] and match["sign2"]):
        return None
    return Decimal(match["sign"] + match["sign2"] + match["digits"].replace(",", ""))


def _last_boxed(text: str) -> str | None:
    r"""What the last `\boxed{...}` holds, its braces balanced; None where it is absent or not closed."""
    start = text.rfind("\\boxed{")
    if start < 0:
        return None
    start += len("\\boxed{")
    depth = 1
    for brace in _BRACE.finditer(text, start):
        depth += 1 if brace[0] == "{" else -1
        if depth == 0:
            return text[start : brace.start()]
    return None


def _boxed_value(latex: str) -> Decimal | None:
    r"""The number in a box: what follows its last '=', LaTeX's spacing and units aside, must be one number."""
    plain = _LATEX_TEXT.sub(r" \1 ", latex.rpartition("=")[2])
    plain = _LATEX_NOISE.sub(lambda noise: "," if noise[0] == "{,}" else "", plain)
    numbers = list(_ANY_NUMBER.finditer(plain))
    if len(numbers) != 1 or re.search(r"[\\^_{}]", plain):
        return None
    return _value(numbers[0])
