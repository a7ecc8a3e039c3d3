"""Whether two quantities are equal: numbers and percentages, ratios, measures in units that are known, numbers in a base.

All values are exact, and nothing here looks at more than one number, ratio or measure: what an answer is made of is for
`jaxreason.rewards.equality`. Units that are not known are deliberately not compared: a data set names them or leaves them out.
"""

from __future__ import annotations

import re
from fractions import Fraction

from jaxreason.rewards import exact
from jaxreason.rewards.notation import UNITS

_BASE = re.compile(r"(-?[0-9A-Za-z]*[0-9][0-9A-Za-z]*?)(?:_(?:base)?|(?:in)?base)([0-9]{1,2}|[a-z]+)")
_BASE_NOISE = re.compile(r"\\text|[{}()\s]")
_BASES = {name: base for base, name in enumerate("two three four five six seven eight nine ten eleven twelve".split(), 2)}


def number(text: str) -> Fraction | None:
    """The value of a number or of a ratio of two, without its percent sign."""
    sides = text.split(":")
    if len(sides) == 2:
        a, b = (exact.value(side) for side in sides)
        return a / b if a is not None and b else None
    return exact.value(text.removesuffix("%").strip())


def same_number(a: Fraction, b: Fraction, gold: str, prediction: str) -> bool:
    """Whether two values are equal exactly; 50% is 50 and 1/2, and 0.333333, with six places or more, is 1/3."""
    if a == b:
        return True
    percents = gold.endswith("%"), prediction.endswith("%")
    if percents == (True, False) and a == 100 * b or percents == (False, True) and 100 * a == b:
        return True
    for decimal, whole, text, other in ((a, b, gold, prediction), (b, a, prediction, gold)):
        places = exact.decimal_places(text)
        if places is not None and places >= 6 and re.search(r"/|\\frac|overline", other):
            return abs(decimal - whole) <= Fraction(1, 2 * 10**places)
    return False


def same_ratio(gold: list[str], prediction: list[str]) -> bool:
    """Whether two ratios of three numbers or more are the same; where a part is 0, as in the time 5:00, only part by part."""
    a, b = [exact.value(part) for part in gold], [exact.value(part) for part in prediction]
    first, other = a[0], b[0]
    if len(a) != len(b) or not (first and other and all(a) and all(b)):
        return None not in a and a == b
    return all(x and y and x * other == y * first for x, y in zip(a, b, strict=True))


def scale(gold: str, prediction: str) -> Fraction | None:
    """What a quantity in the one unit is multiplied by to be in the other: 1 unless both are known; None if they measure
    different things."""
    a, b = UNITS.get(gold), UNITS.get(prediction)
    if a is None or b is None or gold == prediction:
        return Fraction(1)
    return Fraction(b[1]) / Fraction(a[1]) if a[0] == b[0] else None


def in_base(text: str) -> Fraction | None:
    """The value of 204_5; None where the text is no such number."""
    match = _BASE.fullmatch(_BASE_NOISE.sub("", text))
    if match is None:
        return None
    base = int(match[2]) if match[2].isdigit() else _BASES.get(match[2], 0)
    number = exact.in_base(match[1], base)
    return None if number is None else Fraction(number)
