r"""Whether two answers are mathematically equal: part by part, numbers exactly, and symbols by math-verify.

`notation` says what the parts of an answer are; this file says when they are the same. Most answers are numbers, tuples of
them, or words, and are decided here without sympy; what has symbols goes to `symbolic`. Tolerance is deliberately absent
(33.3 is not 100/3), and so is any second chance: one reading of each answer decides.
"""

from __future__ import annotations

import re

from jaxreason.rewards import exact, quantities, symbolic
from jaxreason.rewards.notation import Form, key, plain, read, split
from jaxreason.rewards.quantities import without_unit
from jaxreason.rewards.relations import FLIPPED, as_set, is_name, letters, same_function, sides_of, unnamed

_LONGEST = 4000  # characters of an answer that are read; a longer one is right only where it is the reference itself
_PAIRS = 400  # of parts that one comparison looks at
_PLUS_MINUS = re.compile(r"\\pm(?![A-Za-z])")
_DEGREE = re.compile(r"\\circ(?![A-Za-z])|\\degree|°|[0-9]\s*degrees?\b")
_POINT = re.compile(r"[A-Z](?:_[0-9A-Z])?'*\s*(?P<point>\(.*\))|\\binom\{(?P<top>[^{}]*)\}\{(?P<bottom>[^{}]*)\}")
_DOLLARS, _CENTS = re.compile(r"\\\$\s*[0-9.]"), re.compile(r"[0-9.}\s{]cents?\b|¢|\u00a2")
_ARTICLE = re.compile(r"\s*(?:\\text\{\s*)?(?:an?|the)\s+(?=\S)", re.IGNORECASE)
_BUILDER = re.compile(
    r"\\\{\s*([A-Za-z])\s*(?:\\in\s*\\mathbb\{R\}\s*)?(?:\||:)((?:(?!\\in)[^{}:|])*(?:[<>]|\\(?:[lgn]e))(?:(?!\\in)[^:|])*)\\\}",
    re.DOTALL,
)
_PARTED = re.compile(r":.*:|:0+$")  # a ratio of three, or a time of day


def equal(gold: str, prediction: str, *, limit_seconds: float = 3.0) -> bool:
    """Whether an answer, as it is written, is the reference's; what takes longer than `limit_seconds` is not.

    Not symmetric in one point: the reference says whether the order of a list matters.
    """
    gold, prediction = gold.strip(), prediction.strip()
    if not gold or not prediction:
        return False
    if gold == prediction:
        return True
    if max(len(gold), len(prediction)) > _LONGEST:
        return False
    for _ in range(2):
        try:
            with symbolic.limited(limit_seconds):
                return _equal(gold, prediction)
        except symbolic.NotLoaded:
            symbolic.load()  # once in a process, and at nobody's expense: its second or two is outside the limit
        except (symbolic.OutOfTime, RecursionError):
            break
    return False


def _equal(gold: str, prediction: str) -> bool:
    gold, prediction = quantities.in_one_unit(gold), quantities.in_one_unit(prediction)
    if _DOLLARS.search(gold) and _CENTS.search(prediction):  # elsewhere the sign may be left out
        gold += r" \text{ dollars}"
    # an angle in degrees is one in radians where the other answer is
    radians = "\\pi" in gold + prediction and (_DEGREE.search(gold) is None) != (_DEGREE.search(prediction) is None)
    gold, prediction = plain(gold, radians=radians), plain(prediction, radians=radians)
    if not prediction:
        return False
    if key(gold) == key(prediction):
        return True
    if re.fullmatch("(?!.*(.).*\\1)[A-J]{2,6}", gold) and re.fullmatch(r"[A-J](?:[\s,()]*[A-J])*\)?", prediction.lstrip("(")):
        return sorted(gold) == sorted(re.findall("[A-J]", prediction))
    return _same(_form(gold), _form(prediction), _Budget(_PAIRS))


class _Budget:
    """How many pairs of parts may still be compared."""

    def __init__(self, pairs: int):
        self.left = pairs

    def spent(self) -> bool:
        self.left -= 1
        return self.left < 0


def _form(text: str) -> Form:
    """The form of an answer, its plus-minus written out and the names of its unknowns left where they are."""
    builder = _BUILDER.fullmatch(text)
    form = read(builder[2] if builder else text)
    if form.kind in {"list", "set"}:
        parts = tuple(part for piece in form.parts for part in _both_signs(piece))
        return Form(form.kind, form.text, parts)
    if form.kind in {"one", "tuple"}:
        signs = _both_signs(form)
        return Form("list", form.text, signs) if len(signs) > 1 else form
    return form


def _both_signs(form: Form) -> tuple[Form, ...]:
    if form.kind not in {"one", "tuple"} or len(_PLUS_MINUS.findall(form.text)) != 1:
        return (form,)
    return tuple(read(_PLUS_MINUS.sub(sign, form.text).strip().removeprefix("+").strip()) for sign in "+-")


def _same(gold: Form, prediction: Form, budget: _Budget) -> bool:
    """Whether two forms are equal, part by part."""
    if budget.spent():
        return False
    if key(gold.text) == key(prediction.text):
        return True
    gold, prediction = as_set(gold, prediction), as_set(prediction, gold)
    kinds = gold.kind, prediction.kind
    named = _assignments(gold), _assignments(prediction)
    if named[0] and named[1]:
        same_names = named[0].keys() == named[1].keys()
        return same_names and all(_same(value, named[1][name], budget) for name, value in named[0].items())
    if kinds == ("one", "one"):
        return _same_one(gold.text, prediction.text)
    if "one" in kinds and not {"tuple", "matrix"}.isdisjoint(kinds):
        gold, prediction = _point(gold), _point(prediction)
        kinds = gold.kind, prediction.kind
    if kinds in {("tuple", "matrix"), ("matrix", "tuple")}:
        gold, prediction = _as_vector(gold), _as_vector(prediction)
        return {gold.brackets, prediction.brackets} <= {"", "()", "[]"} and _in_order(gold, prediction, budget)
    if kinds in {("tuple", "tuple"), ("matrix", "matrix")}:
        round_ones = {gold.brackets, prediction.brackets} <= {"()", "", "[]"} and len(gold.parts) > 2
        alike = gold.brackets == prediction.brackets or "" in (gold.brackets, prediction.brackets) or round_ones
        return alike and _in_order(gold, prediction, budget)
    if "tuple" in kinds and "list" in kinds:
        # x = 1, y = 2 is (1, 2), in the order of the names
        gold, prediction = (
            Form("list", form.text, tuple(value for _, value in sorted(by_name.items()))) if by_name else _values(form)
            for form, by_name in zip((gold, prediction), named, strict=True)
        )
        return {gold.brackets, prediction.brackets} <= {"", "()", "[]"} and _in_order(gold, prediction, budget)
    if set(kinds) == {"tuple", "set"}:
        one, many = (gold, prediction) if gold.kind == "tuple" else (prediction, gold)
        return len(many.parts) == 1 and _same(one, many.parts[0], budget)
    if kinds in {("list", "list"), ("set", "set"), ("list", "set"), ("set", "list"), ("union", "union")}:
        return _in_any_order(_values(gold), _values(prediction), budget) or _in_any_order(gold, prediction, budget)
    if "one" in kinds and ("list" in kinds or "set" in kinds):
        one, many = (gold, prediction) if gold.kind == "one" else (prediction, gold)
        right = unnamed(one.text, many.text)
        if right is not None and (form := _form(right)).kind != "one":  # x = 1, 2 or x \\in {1, 2}
            return _same(form, many, budget) if gold.kind == "one" else _same(many, form, budget)
        if prediction.kind == "list" and gold.kind == "one" and all(_same(gold, part, budget) for part in prediction.parts):
            return True  # 3/4, or 0.75
        if many.kind == "set" and len(many.parts) == 1 and gold.kind == "set":
            return _same(many.parts[0], one, budget)
        return False if right is None and not _needs_symbols(one.text, many) else symbolic.equal(gold.text, prediction.text)
    if "one" in kinds:
        one, many = (gold, prediction) if gold.kind == "one" else (prediction, gold)
        right = unnamed(one.text, many.text)
        if right is not None:
            form = _form(right)
            return _same(form, many, budget) if gold.kind == "one" else _same(many, form, budget)
    return symbolic.equal(gold.text, prediction.text)


def _needs_symbols(one: str, many: Form) -> bool:
    return many.kind == "set" and "\\" in one and exact.value(one) is None


def _in_order(gold: Form, prediction: Form, budget: _Budget) -> bool:
    if len(gold.parts) != len(prediction.parts):
        return False
    return all(_same(a, b, budget) for a, b in zip(gold.parts, prediction.parts, strict=True))


def _in_any_order(gold: Form, prediction: Form, budget: _Budget) -> bool:
    """Whether the parts of the one are those of the other; where one has more, a part named twice counts once."""
    if not gold.parts or not prediction.parts:
        return gold.kind == prediction.kind == "set" and not gold.parts and not prediction.parts
    left, unmatched = list(prediction.parts), 0
    for a in gold.parts:
        found = next((b for b in left if _same(a, b, budget)), None)
        if found is not None:
            left.remove(found)
        elif any(_same(a, b, budget) for b in prediction.parts):
            unmatched += 1
        else:
            return False
    if len(gold.parts) == len(prediction.parts):
        return not unmatched
    return all(any(_same(a, b, budget) for a in gold.parts) for b in left)


def _assignments(form: Form) -> dict[str, Form]:
    """What each name stands for in x = 1, y = 2; empty where it is no such list, or a name has two values."""
    found = {}
    for part in form.parts if form.kind == "list" else ():
        sides = split(part.text, ("=",))
        if part.kind != "one" or len(sides) != 2 or not is_name(sides[0]):
            return {}
        found[key(sides[0])] = read(sides[1])
    return found if len(found) == len(form.parts) else {}


def _values(form: Form) -> Form:
    """A list of x = 1, x = 2 as 1, 2, where every part names the value that it gives; p=5,q=2 as a tuple's parts likewise."""
    if form.kind not in {"list", "tuple", "set"}:
        return form
    parts = []
    for part in form.parts:
        if part.kind == "tuple":
            parts.append(_values(part))
            continue
        sides = split(part.text, ("=",))
        if part.kind == "one" and len(sides) == 2 and is_name(sides[0]):
            parts.append(read(sides[1]))
        else:
            parts.append(part)
    return Form(form.kind, form.text, tuple(parts), form.brackets)


def _point(form: Form) -> Form:
    r"""A(2, -3) and \binom{2}{-3} as the tuple that they are, beside one."""
    match = _POINT.fullmatch(form.text) if form.kind == "one" else None
    if match is None:
        return form
    return read(match["point"] or f"({match['top']},{match['bottom']})")


def _as_vector(form: Form) -> Form:
    """A matrix of one row or one column as the tuple that it is."""
    if form.kind == "matrix" and len(form.parts) == 1:
        return Form("tuple", form.text, form.parts[0].parts)
    if form.kind == "matrix" and all(len(row.parts) == 1 for row in form.parts):
        return Form("tuple", form.text, tuple(row.parts[0] for row in form.parts))
    return form


def _same_one(gold: str, prediction: str) -> bool:
    """Whether two single answers are equal: numbers, quantities, words, relations, expressions."""
    gold_sides, gold_signs = sides_of(gold)
    sides, signs = sides_of(prediction)
    if gold_signs or signs:
        return _same_relation((gold, gold_sides, gold_signs), (prediction, sides, signs))
    in_base = quantities.same_in_base(gold, prediction)
    if in_base is not None:
        return in_base
    gold, gold_unit = without_unit(gold)
    prediction, unit = without_unit(prediction)
    scale = quantities.scale(gold_unit, unit)
    if (
        scale is None
        or {gold_unit, unit} == {"am", "pm"}
        or (gold_unit != unit and gold_unit.startswith("mod ") and unit.startswith("mod "))
    ):
        return False
    if _PARTED.search(gold) or _PARTED.search(prediction):
        return quantities.same_ratio(gold.split(":"), prediction.split(":"))
    a, b = quantities.number(gold), quantities.number(prediction)
    if a is not None and b is not None:
        cents = not gold_unit and unit == "cent" and a == b / 100
        return cents or quantities.same_number(a, b * scale, gold, prediction)
    if key(gold) == key(prediction):
        return scale == 1
    if scale != 1 or _is_word(gold) or _is_word(prediction):
        return scale == 1 and _words(gold) == _words(prediction)
    if (a is None) != (b is None):
        number, other = (gold, prediction) if a is not None else (prediction, gold)
        places = exact.decimal_places(number)
        if places is not None and places >= 6 and symbolic.rounded_to(number, places, other):
            return True
    percents = gold.endswith("%"), prediction.endswith("%")
    return symbolic.equal(gold.rstrip("%"), prediction.rstrip("%")) if any(percents) else symbolic.equal(gold, prediction)


def _words(text: str) -> str:
    return _ARTICLE.sub("", key(text).lower(), count=1) if _ARTICLE.match(key(text)) else key(text).lower()


def _is_word(text: str) -> bool:
    """Whether a text is words and no formula: two letters or more that are no product of variables."""
    if re.fullmatch("[abcd]{1,4}|[pqrs]{1,4}|[wxyz]{1,4}", text):
        return False  # a product
    return "\\text" in text or bool(re.fullmatch(r"[A-Za-z .,'-]+", text) and re.search("[A-Za-z]{3}", text))


def _same_relation(gold: tuple[str, list[str], list[str]], prediction: tuple[str, list[str], list[str]]) -> bool:
    """Whether two answers, of which one at least is a relation, are equal: names aside, both ways round, and to a factor."""
    (gold_text, gold_sides, gold_signs), (text, sides, signs) = gold, prediction
    gold_value, value = unnamed(gold_text, text), unnamed(text, gold_text)
    if (
        not signs
        and letters(gold_sides[0])
        and re.search("[-+^]", gold_sides[0])
        and not (is_name(gold_sides[0]) or is_name(gold_sides[-1]))
    ):
        return False  # the reference is an equation, and not the name of a value
    if not gold_signs or not signs:
        one, other = (gold_text, value) if not gold_signs else (gold_value, text)
        if one is None or other is None or (one, other) == (gold_text, text):
            return False
        a, b = _form(plain(one)), _form(plain(other))
        return _same(a, b, _Budget(50))
    if gold_value is not None and value is not None and is_name(gold_sides[0]) and is_name(sides[0]):
        if key(gold_sides[0]) == key(sides[0]):
            return _same(_form(gold_value), _form(value), _Budget(50))
        value_there = same_function(gold_sides[0], sides[0], value)
        if value_there is not None:
            return _same(_form(gold_value), _form(value_there), _Budget(50))
        if gold_value in gold_sides[1:] and value in sides[1:] and len(gold_sides) == len(sides) == 2:
            swapped = key(gold_sides[0]) == key(sides[1]) and key(gold_sides[1]) == key(sides[0])
            return swapped or _proportional(gold_sides, gold_signs, sides, signs)
    if len(sides) > 2 and len(gold_sides) == 2 and value is not None and gold_value is not None:
        return key(gold_sides[0]) == key(sides[0]) and _same(_form(gold_value), _form(value), _Budget(50))
    if len(sides) != len(gold_sides):
        return False
    if signs == gold_signs and all(_same_side(a, b) for a, b in zip(gold_sides, sides, strict=True)):
        return True
    flipped = [FLIPPED.get(sign) for sign in signs[::-1]]
    if flipped == gold_signs and all(_same_side(a, b) for a, b in zip(gold_sides, sides[::-1], strict=True)):
        return True
    return len(sides) == 2 and _proportional(gold_sides, gold_signs, sides, signs)


def _same_side(a: str, b: str) -> bool:
    return bool(a and b) and (key(a) == key(b) or _same_one(a, b))


def _proportional(gold_sides: list[str], gold_signs: list[str], sides: list[str], signs: list[str]) -> bool:
    if gold_signs[0] not in FLIPPED or signs[0] not in FLIPPED:
        return False
    factor = symbolic.proportional((gold_sides[0], gold_sides[1]), (sides[0], sides[1]))
    wanted = signs[0] if factor > 0 else FLIPPED[signs[0]]
    if factor == 0 and gold_signs == signs == ["="] and re.search(r"/|\\frac", "".join((*gold_sides, *sides))):
        return symbolic.same_zeros((gold_sides[0], gold_sides[1]), (sides[0], sides[1]))
    return factor != 0 and wanted == gold_signs[0]
