r"""The exact value of a constant written as text: 1,234.5, 3/4, 1\frac12, 2^{10}, 5!, 1+2+3, 6.02 \times 10^{23}.

Rational numbers only, in `fractions.Fraction`, and only as large as is cheap: what would be larger, what has a variable or
an irrational, and what is no arithmetic at all is None. Nothing is executed and nothing here imports sympy.
"""

from __future__ import annotations

import math
import re
from fractions import Fraction

_TOKEN = re.compile(
    r"\s*(?:(?P<number>0,[0-9]{3,}|[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])(?:\.[0-9]+)?|[0-9]{1,3}(?: [0-9]{3})+(?![0-9])|"
    r"[0-9]+\.?[0-9]*|\.[0-9]+)"
    r"(?:\\overline\{(?P<repeat>[0-9]{1,20})\}|[eE](?P<power>[-+]?[0-9]{1,5})(?![0-9A-Za-z]))?"
    r"|(?P<op>\\frac|\\sqrt|\\cdot|\\times|\\div|\\pm|\*\*|[-+*/^(){}\[\]!%]))"
)
_DIGITS = 4000  # of one number: Python itself refuses to read longer ones
_BITS = 40_000  # of a value, and fifty times that of all values of one text together
_TOKENS = 2000
_DEPTH = 40


class _NoValue(Exception):
    """The text has no value here."""


def value(text: str) -> Fraction | None:
    """The rational number that a text is, exactly; None where it is none, or too large to be worth it."""
    if not text or len(text) > 2 * _DIGITS or not re.search("[0-9]", text):
        return None
    try:
        reader = _Reader(_tokens(text))
        found = reader.sum(0)
        return found if reader.place == len(reader.tokens) else None
    except (_NoValue, ZeroDivisionError, OverflowError):
        return None


def decimal_places(text: str) -> int | None:
    """How many places follow the point of a decimal; None where the text is no plain decimal."""
    match = re.fullmatch(r"[-+]?[0-9,]*\.([0-9]+)", text.replace(" ", ""))
    return None if match is None else len(match[1])


def in_base(digits: str, base: int) -> int | None:
    """The number that `digits` write in `base`; None where they do not."""
    if not 2 <= base <= 36 or len(digits) > 200:
        return None
    try:
        return int(digits, base)
    except ValueError:
        return None


def _tokens(text: str) -> list[tuple[str, Fraction | None]]:
    tokens: list[tuple[str, Fraction | None]] = []
    place = 0
    text = text.rstrip()
    while place < len(text):
        match = _TOKEN.match(text, place)
        if match is None or len(tokens) >= _TOKENS:
            raise _NoValue
        place = match.end()
        if match["op"]:
            tokens.append((match["op"], None))
            continue
        digits = match["number"]
        digits = digits.replace(",", "." if digits.startswith("0,") else "").replace(" ", "")
        if len(digits) > _DIGITS:
            raise _NoValue
        number = Fraction(digits.rstrip(".") or "0")
        if match["repeat"]:
            if "." not in digits:
                raise _NoValue
            places = len(digits.partition(".")[2])
            number += Fraction(int(match["repeat"]), (10 ** len(match["repeat"]) - 1) * 10**places)
        if match["power"]:
            number = _power(Fraction(10), Fraction(match["power"])) * number
        whole = "number" if "." in digits or match["power"] else "integer"
        tokens.append((whole, number))
    return tokens


class _Reader:
    """Recursive descent: sum -> product -> signed power -> postfix -> atom."""

    def __init__(self, tokens: list[tuple[str, Fraction | None]]):
        self.tokens, self.place, self.spent = tokens, 0, 0

    def keep(self, number: Fraction) -> Fraction:
        """The number itself, as long as it and all before it are cheap."""
        bits = number.numerator.bit_length() + number.denominator.bit_length()
        self.spent += bits
        if bits > 2 * _BITS or self.spent > 50 * _BITS:
            raise _NoValue
        return number

    def next(self) -> str:
        return self.tokens[self.place][0] if self.place < len(self.tokens) else ""

    def take(self, *kinds: str) -> str:
        kind = self.next()
        if kind not in kinds or not kind:
            return ""
        self.place += 1
        return kind

    def need(self, kind: str) -> None:
        if not self.take(kind):
            raise _NoValue

    def sum(self, depth: int) -> Fraction:
        if depth > _DEPTH:
            raise _NoValue
        total = self.product(depth)
        while sign := self.take("+", "-"):
            term = self.product(depth)
            total = self.keep(total + term if sign == "+" else total - term)
        return total

    def product(self, depth: int) -> Fraction:
        total = self.signed(depth)
        while True:
            if self.take("*", "\\cdot", "\\times"):
                total = self.keep(total * self.signed(depth))
            elif self.take("/", "\\div"):
                total = self.keep(total / self.signed(depth))
            elif self.next() in {"(", "{", "\\frac", "\\sqrt"}:  # 2(3), without a sign between
                total = self.keep(total * self.powered(depth))
            else:
                return total

    def signed(self, depth: int) -> Fraction:
        signs = 0
        negative = False
        while sign := self.take("+", "-"):
            negative ^= sign == "-"
            signs += 1
            if signs > 2:
                raise _NoValue
        found = self.powered(depth)
        return -found if negative else found

    def powered(self, depth: int) -> Fraction:
        found = self.postfix(depth)
        if self.take("^", "**"):
            if self.next() in {"-", "+"}:
                found = self.keep(_power(found, self.signed(depth + 1)))
            else:
                if depth > _DEPTH:
                    raise _NoValue
                found = self.keep(_power(found, self.powered(depth + 1)))
        return found

    def postfix(self, depth: int) -> Fraction:
        found = self.atom(depth)
        while kind := self.take("!", "%"):
            if kind == "%":
                found /= 100
            elif found.denominator == 1 and 0 <= found <= 3000:
                found = self.keep(Fraction(math.factorial(int(found))))
            else:
                raise _NoValue
        return found

    def atom(self, depth: int) -> Fraction:
        kind = self.next()
        if kind in {"number", "integer"}:
            number = self.tokens[self.place][1]
            assert number is not None
            self.place += 1
            return number + self.mixed(depth) if kind == "integer" else number
        if self.take("("):
            found = self.sum(depth + 1)
            self.need(")")
            return found
        if self.take("{"):
            found = self.sum(depth + 1)
            self.need("}")
            return found
        if self.take("\\frac"):
            return self.keep(self.group(depth) / self.group(depth))
        if self.take("\\sqrt"):
            return self.root(depth)
        raise _NoValue

    def mixed(self, depth: int) -> Fraction:
        r"""What a fraction right after a whole number adds: 1\frac12 and 1 1/2 are one and a half."""
        ahead = [kind for kind, _ in self.tokens[self.place : self.place + 7]]
        if ahead == ["\\frac", "{", "integer", "}", "{", "integer", "}"] or ahead[:3] == ["integer", "/", "integer"]:
            if ahead[0] == "\\frac":
                self.place += 1
                part = self.group(depth) / self.group(depth)
            else:
                top, bottom = self.tokens[self.place][1], self.tokens[self.place + 2][1]
                assert top is not None and bottom is not None
                self.place += 3
                part = top / bottom
            if part < 1:
                return part
            raise _NoValue  # 2\frac{3}{2}: nobody can tell
        return Fraction(0)

    def group(self, depth: int) -> Fraction:
        self.need("{")
        found = self.sum(depth + 1)
        self.need("}")
        return found

    def root(self, depth: int) -> Fraction:
        r"""\sqrt{} and \sqrt[n]{} of what has a rational root."""
        degree = 2
        if self.take("["):
            given = self.sum(depth + 1)
            self.need("]")
            if given.denominator != 1 or not 2 <= given <= 20:
                raise _NoValue
            degree = int(given)
        inside = self.group(depth)
        if inside < 0 and degree % 2:
            return -self.rooted(-inside, degree)
        return self.rooted(inside, degree)

    def rooted(self, inside: Fraction, degree: int) -> Fraction:
        if inside < 0 or inside.numerator.bit_length() > 2000 or inside.denominator.bit_length() > 2000:
            raise _NoValue
        return Fraction(_whole_root(inside.numerator, degree), _whole_root(inside.denominator, degree))


def _whole_root(number: int, degree: int) -> int:
    root = math.isqrt(number)
    if degree != 2:
        low, high = 0, 1 << (number.bit_length() // degree + 1)
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if middle**degree <= number else (low, middle - 1)
        root = low
    if root**degree != number:
        raise _NoValue
    return root


def _power(base: Fraction, exponent: Fraction) -> Fraction:
    if exponent.denominator != 1:
        raise _NoValue
    bits = max(base.numerator.bit_length(), base.denominator.bit_length())
    if abs(exponent) > _BITS or bits * abs(exponent) > _BITS or (base == 0 and exponent <= 0):
        raise _NoValue
    return base ** int(exponent)
