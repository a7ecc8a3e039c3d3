r"""What an equation or an inequality says: its sides, the value that it names, the interval that it stands for.

Nothing here compares two answers: that is for `jaxreason.rewards.equality`.
"""

from __future__ import annotations

import re
from fractions import Fraction

from jaxreason.rewards import exact
from jaxreason.rewards.notation import Form, key, read, split

_RELATION = re.compile(r"\\(?:le|ge|ne|approx|equiv)(?![A-Za-z])|[=<>]|\\in(?![A-Za-z])")
_IN = re.compile(r"\\in(?![A-Za-z])")
FLIPPED = {"<": ">", ">": "<", "\\le": "\\ge", "\\ge": "\\le", "=": "=", "\\ne": "\\ne"}
_NAME = re.compile(
    r"\\?[A-Za-z]+(?:_\{?[^{}=]{1,20}\}?)?(?:\^\{-1\})?'*(?:\((?:[^()]|\([^()]*\)){1,40}\))?|\|[A-Za-z\\ {}]{1,20}\||\[[A-Z]{2,8}\]"
    r"|\\text\{[^{}]*\}|\\(?:angle|triangle|overline|widehat|vec|mathbb)\s*\{?[A-Za-z]+\}?|\\(?:sin|cos|tan)\s*\\?[A-Za-z]+"
)
_FUNCTION = re.compile(r"([A-Za-z]+)\(([A-Za-z])\)")


def sides_of(text: str) -> tuple[list[str], list[str]]:
    """A chain of relations as what it relates and the signs between, outside all brackets."""
    found = _RELATION.findall(text)
    if not 0 < len(found) <= 20:
        return [text], []
    sides, signs = [], []
    rest = text
    for sign in found:
        pieces = split(rest, (sign,))
        if len(pieces) == 1:
            continue
        sides.append(pieces[0].strip())
        signs.append(sign)
        rest = sign.join(pieces[1:])
    return [*sides, rest.strip()], signs


def is_name(text: str) -> bool:
    """Whether a text names a quantity: x, x_1, f(x), AB, |AB|, a tuple of names."""
    text = text.strip()
    inside = text[1:-1] if text.startswith("(") and text.endswith(")") else text
    return bool(_NAME.fullmatch(text)) or ("," in inside and all(_NAME.fullmatch(name.strip()) for name in inside.split(",")))


def _is_unknown(text: str) -> bool:
    return is_name(text) and text.strip() not in {"e", "\\pi"}


def _names_a_value(left: str) -> bool:
    """Whether what stands left of '=' only names the answer, as in m + n = 109: not where it is yet to be solved, as in 2x = 10."""
    return is_name(left) or len(letters(left)) != 1


def letters(text: str) -> set[str]:
    return set(re.findall(r"(?<![A-Za-z\\])[A-Za-z]", re.sub(r"\\[A-Za-z]+", "", text)))


def unnamed(text: str, other: str) -> str | None:
    """The value in an equation that names one, the last of a chain; None where there is no such equation."""
    sides, signs = sides_of(text)
    if "\\approx" in signs and len(signs) > 0:
        end = signs.index("\\approx")
        if end > 0 or not is_name(sides[0]):
            sides, signs = sides[: end + 1], signs[:end]
    if not signs:
        return sides[0] if len(sides) == 1 and sides[0] != text else None
    if not set(signs) <= {"=", "\\approx", "\\in", "\\equiv"} or not _names_a_value(sides[0]):
        return sides[0] if set(signs) == {"="} and len(sides) == 2 and is_name(sides[1]) and not is_name(sides[0]) else None
    if "\\in" in signs and exact.value(sides[0]) is not None:
        return None  # a number is in no number
    if len(sides) == 2:
        if is_name(sides[1]) and not is_name(sides[0]):
            return sides[0]
        a, b = exact.value(sides[0]), exact.value(sides[1])
        places = exact.decimal_places(sides[1])
        if a is not None and b is not None and places and abs(a - b) <= Fraction(1, 2 * 10**places):  # 1/3 = 0.333
            return sides[exact.decimal_places(other) is not None]
    return sides[-1]


def same_function(gold: str, name: str, value: str) -> str | None:
    """The value of f(t) in the letter of the reference's f(x), or of y where that is f(x); None where they are unlike."""
    a, b = _FUNCTION.fullmatch(gold.replace(" ", "")), _FUNCTION.fullmatch(name.replace(" ", ""))
    if a is None or b is None:
        function = a or b
        return value if function is not None and {"y", function[1]} & {gold, name} else None
    if a[1] != b[1] or re.search(rf"(?<![A-Za-z\\]){a[2]}(?![A-Za-z])", value):
        return None
    return re.sub(rf"(?<![A-Za-z\\]){b[2]}(?![A-Za-z])", a[2], value)


def as_set(form: Form, other: Form) -> Form:
    """An inequality in one unknown as the interval that it is, where the other answer is an interval or a union."""
    interval = (other.kind == "tuple" and len(other.parts) == 2) or other.kind == "union" or _IN.search(form.text + other.text)
    interval = interval or _two_rays(other) is not None or re.search(r"\||\\infty", form.text + other.text)
    if form.kind == "list" and (both := _two_rays(form)) is not None:
        return both
    if form.kind == "list" and other.kind == "union":
        parts = tuple(as_set(part, Form("union", "")) for part in form.parts)
        return Form("union", form.text, parts) if all(part.kind == "tuple" for part in parts) else form
    if form.kind != "one" or not interval:
        return form
    sides, signs = sides_of(form.text)
    if len(sides) == 2 and signs[0] == "\\in" and _is_unknown(sides[0]):
        return read(sides[1])
    if len(sides) == 2 and signs[0] == "\\ne" and _is_unknown(sides[0]):
        rays = (
            Form("tuple", "", (read("-\\infty"), read(sides[1])), "()"),
            Form("tuple", "", (read(sides[1]), read("\\infty")), "()"),
        )
        return Form("union", form.text, rays)
    if not signs or not set(signs) <= {"<", ">", "\\le", "\\ge"}:
        return form
    distance = re.fullmatch(r"\|\s*([A-Za-z])\s*\|", sides[0]) if len(sides) == 2 else None
    if distance is not None and exact.value(sides[1]) is not None:  # |x| < 2
        name, end = distance[1], sides[1]
        if signs[0] in {"<", "\\le"}:
            return as_set(Form("one", f"-({end}){signs[0]} {name}{signs[0]} {end}"), Form("union", ""))
        ends = (f"{name}{FLIPPED[signs[0]]} -({end})", f"{name}{signs[0]} {end}")
        return Form("union", form.text, tuple(as_set(Form("one", ray), Form("union", "")) for ray in ends))
    if signs[0] in {">", "\\ge"}:
        sides, signs = sides[::-1], [FLIPPED[sign] for sign in signs[::-1]]
    if any(sign in {">", "\\ge"} for sign in signs):
        return form
    if len(sides) == 3 and _is_unknown(sides[1]):
        low, high, brackets = sides[0], sides[2], ("([")[signs[0] == "\\le"] + (")]")[signs[1] == "\\le"]
    elif len(sides) == 2 and _is_unknown(sides[0]):
        low, high, brackets = "-\\infty", sides[1], "(" + (")]")[signs[0] == "\\le"]
    elif len(sides) == 2 and _is_unknown(sides[1]):
        low, high, brackets = sides[0], "\\infty", ("([")[signs[0] == "\\le"] + ")"
    else:
        return form
    return Form("tuple", form.text, (read(low), read(high)), brackets)


def _two_rays(form: Form) -> Form | None:
    """x > a and x < b as an interval where a < b, and as a union of two where they have nothing in common; None for all else."""
    if form.kind != "list" or len(form.parts) != 2:
        return None
    sides = [sides_of(part.text) for part in form.parts]
    rays = [as_set(part, Form("union", "")) for part in form.parts]
    names = {key(side) for (pair, signs) in sides if len(signs) == 1 for side in pair if is_name(side)}
    if len(names) != 1 or any(ray.kind != "tuple" or len(ray.parts) != 2 for ray in rays):
        return None
    rays.sort(key=lambda ray: ray.parts[1].text == "\\infty")
    below, above = rays
    low, high = exact.value(above.parts[0].text), exact.value(below.parts[1].text)
    if below.parts[0].text != "-\\infty" or above.parts[1].text != "\\infty" or low is None or high is None:
        return None
    if low < high:
        return Form("tuple", form.text, (above.parts[0], below.parts[1]), above.brackets[0] + below.brackets[1])
    return Form("union", form.text, (below, above))
