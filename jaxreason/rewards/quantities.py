"""Whether two quantities are equal: numbers and percentages, ratios, measures in units that are known, numbers in a base.

All values are exact, and nothing here looks at more than one number, ratio or measure: what an answer is made of is for
`jaxreason.rewards.equality`. Units that are not known are deliberately not compared: a data set names them or leaves them out.
"""

from __future__ import annotations

import re
from fractions import Fraction

from jaxreason.rewards import exact

_BASE = re.compile(r"(-?[0-9A-Za-z]{0,100}[0-9][0-9A-Za-z]{0,100}?|[A-Z]{2,100})(?:_(?:base)?|(?:in)?base)([0-9]{1,2}|[a-z]+)")
_BASE_NOISE = re.compile(r"\\text|[{}()\s]")
_BASE_NAMES = {"binary": "base2", "octal": "base8", "hexadecimal": "base16"}
_BASE_NAME = re.compile("|".join(_BASE_NAMES))
_BASES = {name: base for base, name in enumerate("two three four five six seven eight nine ten eleven twelve".split(), 2)}

# words that are no unit: functions, and those which say something about the number before them
_NO_UNIT = frozenset(
    "sin cos tan cot sec csc log ln exp sqrt abs arcsin arccos arctan sinh cosh tanh pi infinity inf oo or and mod if for max "
    "is are was were be not no nor never wrong incorrect false vs versus but than either neither maybe perhaps possibly half out "
    "squared cubed factorial plus minus times else except hundred thousand million billion trillion dozen".split()
)
_NUMBERED = re.compile(r"(?<![A-Za-z^{-])[0-9]|,")  # cm2 is a unit, and 35 is none
_UNIT_TAIL = re.compile(
    r"(?P<unit>(?:(?<=[0-9A-Za-z)}%!\s])\s*\\text\{[^{}]*\}|(?<=[0-9)}%!\s])\s+[A-Za-z][A-Za-z.]*)(?:\s*(?:/|(?:\^\s*\{?-?[0-9]\}?\s*)?(?:\\cdot\s*)?\\text\{[^{}]*\}|\s+[A-Za-z][A-Za-z.]*))*)"
    r"(?:\s*\^\s*\{?(?P<power>[-0-9]{1,2})\}?)?$"
)
_GLUED_UNIT = re.compile(
    r"(?<=[0-9])(?P<unit>cm|mm|km|kg|mg|ml|mL|mph|ft|hrs?|mins?|secs?|kmph|lbs?|gal|yd)(?:\^\{?(?P<power>[23])\}?)?$"
)
_UNITS = {  # what a unit measures, how much of it, and to which power
    "km": ("m", 1000), "kilometer": ("m", 1000), "m": ("m", 1), "meter": ("m", 1), "metre": ("m", 1), "cm": ("m", "0.01"),
    "centimeter": ("m", "0.01"), "mm": ("m", "0.001"), "millimeter": ("m", "0.001"), "kg": ("g", 1000), "kilogram": ("g", 1000),
    "g": ("g", 1), "gram": ("g", 1), "mg": ("g", "0.001"), "hour": ("s", 3600), "hr": ("s", 3600), "h": ("s", 3600),
    "minute": ("s", 60), "min": ("s", 60), "second": ("s", 1), "sec": ("s", 1), "s": ("s", 1), "day": ("s", 86400),
    "week": ("s", 604800), "month": ("month", 1), "year": ("month", 12),
    "l": ("m", "0.001", 3), "liter": ("m", "0.001", 3), "litre": ("m", "0.001", 3), "ml": ("m", "0.000001", 3),
    "milliliter": ("m", "0.000001", 3), "inch": ("m", "0.0254"), "inche": ("m", "0.0254"), "in": ("m", "0.0254"),
    "ft": ("m", "0.3048"), "foot": ("m", "0.3048"), "feet": ("m", "0.3048"), "yard": ("m", "0.9144"), "yd": ("m", "0.9144"),
    "mile": ("m", "1609.344"), "mi": ("m", "1609.344"), "dollar": ("dollar", 1), "cent": ("dollar", "0.01"),
}  # fmt: skip
_RATES = {"mph": "mile/hour", "kmph": "km/hour", "kph": "km/hour", "kmh": "km/hour"}
_POWERS = {"square": 2, "sq": 2, "cubic": 3, "cu": 3}
_UNIT = re.compile(r"(?:(square|sq|cubic|cu)\.? )?([a-z]+)\.?(?: ?\^ ?\{?(-?[1-3])\}?)?")
_MEASURES = re.compile(r"([0-9.]+) ?([A-Za-z]+)\.?(?:,? (?:and )?[0-9.]+ ?[A-Za-z]+\.?){1,3}")
_MEASURE = re.compile(r"([0-9]+(?:\.[0-9]+)?) ?([A-Za-z]+)")


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
    a, b = _measure(gold), _measure(prediction)
    if a is None or b is None or gold == prediction:
        return Fraction(1)
    return b[1] / a[1] if a[0] == b[0] else None


def _measure(unit: str) -> tuple[dict[str, int], Fraction] | None:
    """What a unit measures, with powers, and how much of it: km/h, square feet, cm^3; None where a part of it is unknown."""
    measured: dict[str, int] = {}
    factor, sign = Fraction(1), 1
    for piece in re.split("/| per ", _RATES.get(unit, unit)):
        match = _UNIT.fullmatch(piece.strip())
        known = match and (_UNITS.get(match[2]) or _UNITS.get(match[2].removesuffix("s")))
        if not match or not known:
            return None
        power = sign * int(match[3] or _POWERS.get(match[1], 1))
        measured[known[0]] = measured.get(known[0], 0) + power * (known[2] if len(known) > 2 else 1)
        factor *= Fraction(known[1]) ** power
        sign = -1
    return measured, factor


def in_one_unit(text: str) -> str:
    """A measure in several units of one kind in the last of them: 1 hour 20 minutes as 80 minutes; any other text as it is."""
    words = " ".join(re.sub(r"\\(?:text|mathrm)|\\[ ,;]|[{}~$]", " ", text).split())
    if len(words) > 80 or not _MEASURES.fullmatch(words):
        return text
    found = [(Fraction(number), unit, _measure(unit.lower())) for number, unit in _MEASURE.findall(words)]
    if any(measure is None or measure[0] != found[0][2][0] for _, _, measure in found):  # type: ignore[index]
        return text
    sizes = [measure[1] for _, _, measure in found if measure]
    if any(size <= after for size, after in zip(sizes, sizes[1:], strict=False)):
        return text
    total = sum(number * size for (number, _, _), size in zip(found, sizes, strict=True)) / sizes[-1]
    return f"{total} {found[-1][1]}"


def same_in_base(gold: str, prediction: str) -> bool | None:
    """Whether two numbers, of which one at least names its base, as 204_5 does, are equal; None where none does.

    The base of the reference may be left out, as the question names it.
    """
    a, b = (
        _BASE.fullmatch(_BASE_NAME.sub(lambda name: _BASE_NAMES[name[0]], _BASE_NOISE.sub("", text))) for text in (gold, prediction)
    )
    if a is None and b is None:
        return None
    if a is not None and b is None and a[1] == prediction.strip():
        return True
    values = [exact.value(text) if match is None else _in_base(match) for text, match in ((gold, a), (prediction, b))]
    return None not in values and values[0] == values[1]


def _in_base(match: re.Match[str]) -> Fraction | None:
    base = int(match[2]) if match[2].isdigit() else _BASES.get(match[2], 0)
    number = exact.in_base(match[1], base)
    return None if number is None else Fraction(number)


def without_unit(text: str) -> tuple[str, str]:
    """A quantity as (what stands before its unit, the unit in small letters without a plural s); the unit may be ''."""
    modulus = re.search(r"\s*\(?\\pmod\s*\{?([0-9A-Za-z]{1,9})\}?\)?$", text)
    if modulus is not None:
        return text[: modulus.start()], f"mod {modulus[1]}"
    match = _UNIT_TAIL.search(text) or _GLUED_UNIT.search(text)
    if match is None or not re.search("[0-9A-Za-z)}]", text[: match.start()]):
        return text, ""
    unit = " ".join(re.sub(r"\\text\s*\{([^{}]*)\}", r" \1 ", match["unit"]).split())
    words = re.findall("[A-Za-z]+", unit)
    bare = "\\text" not in match["unit"]
    if (
        unit in {"x", "y", "z"}
        or any(word.lower() in _NO_UNIT for word in words)
        or _NUMBERED.search(match["unit"])
        or (bare and _is_letters(words, before=text[: match.start()]))
    ):
        return text, ""
    unit = unit.lower().strip(" .")
    unit = re.sub("(?<=[a-z]{2})s$", "", unit)
    return text[: match.start()].strip(), unit + (f"^{match['power']}" if match["power"] else "")


def _is_letters(words: list[str], *, before: str) -> bool:
    """Whether words after a number are variables rather than a unit: single letters, or anything after no number."""
    return all(len(word) == 1 for word in words) or not re.search(r"[0-9)}%!]\s*$", before)
