r"""Whether two expressions with symbols are equal: math-verify, behind guards that refuse what it could not finish.

math-verify reads LaTeX into sympy expressions without evaluating them, and its comparison then evaluates and simplifies:
10^{10^{10}} fills the memory, and numbers that are both tiny pass for equal. So a text is first bounded in length and depth,
then the expression is walked and refused where a value in it would be large; two expressions are then compared by their values
at a few fixed points, to 30 digits, and math-verify decides only where values cannot (sets, words, matrices).
A refused pair is not equal. Nothing of a text is executed: the reader is a grammar, and the few of its rules
that evaluate while reading (determinants, gcd, substitution) are refused before it sees them.
"""

from __future__ import annotations

import contextlib
import re
import signal
import sys
import threading
import time
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

_LENGTH = 300  # characters of one expression
_DEPTH = 7  # of its brackets: the grammar's time grows by half with each
_NODES = 400  # of a parsed expression
_BITS = 40_000  # of a value in it
# What the grammar evaluates while it reads, or what stands for a computation rather than for a result.
_REFUSED = re.compile(
    r"\\(?:o?i+nt|lim|limsup|liminf|det|gcd|lcm|Gamma|operatorname|begin\{vmatrix|rank|trace|tr|Vert|partial|nabla)(?![a-z])"
    r"|\|\s*_|\|\s*\^|\\\||d\}?\s*\{?d[a-z]|[0-9][eE][-+]?[0-9]{4}|(?<![A-Za-z0-9_{])[0-9]+_|\\xcancel|\\cancel|'"
)
_IMAGINARY = re.compile(r"(?<![A-Za-z\\])([A-Za-z]?)i(?![A-Za-z])(\s*\^)?")
# a whole number and a proper fraction, which the grammar reads as a product
_MIXED = re.compile(r"(?<![0-9A-Za-z.^_}\\])([0-9]{1,9})(?:\s*\\frac\{([0-9]{1,9})\}\{([0-9]{1,9})\}|\s+([0-9]{1,9})/([0-9]{1,9}))")
_BINOMIAL = re.compile(r"\\[dt]?binom|\\choose")


class OutOfTime(BaseException):
    """Not an Exception: sympy and math-verify swallow those."""


class NotLoaded(BaseException):
    """A comparison needs math-verify, and nobody has called `load` yet."""


@contextlib.contextmanager
def limited(seconds: float) -> Iterator[None]:
    """Raise `OutOfTime` in the block after `seconds` of wall-clock time; what timer and handler were there are put back.

    Only the main thread can be interrupted: in another one this does nothing, and the guards on size are all there is.
    A single long call into C is not interrupted either, which is why the guards refuse large numbers.
    """
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "setitimer"):
        yield
        return

    def stop(number: int, frame: object) -> None:
        raise OutOfTime

    started = time.monotonic()
    left, interval = signal.getitimer(signal.ITIMER_REAL)
    handler = signal.getsignal(signal.SIGALRM)
    try:  # from the first moment on, since the alarm may ring at once
        signal.signal(signal.SIGALRM, stop)
        signal.setitimer(signal.ITIMER_REAL, max(seconds, 1e-6), 0.05)  # again and again: a callback may swallow one
        yield
    finally:
        for _ in range(100):  # the alarm may ring here too
            try:
                signal.setitimer(signal.ITIMER_REAL, 0)
                signal.signal(signal.SIGALRM, signal.SIG_DFL if handler is None else handler)
                break
            except OutOfTime:
                continue
        if left:
            signal.setitimer(signal.ITIMER_REAL, max(left - (time.monotonic() - started), 1e-3), interval)


def load() -> None:
    """Import math-verify, once and outside any limit; a ValueError names the extra where it is not installed."""
    try:
        import math_verify.grader  # noqa: F401
    except ImportError as error:
        raise ValueError("comparing expressions with symbols needs math-verify: pip install 'jaxreason[math]'") from error


def equal(gold: str, prediction: str) -> bool:
    """Whether two LaTeX expressions, sets or matrices are equal; False where either cannot be read or is refused."""
    a, b = _parsed(gold), _parsed(prediction)
    if a is None or b is None:
        return False
    if a == b:
        return True
    if _is_infinite(a) or _is_infinite(b):
        value = a.doit()
        return value.is_infinite is True and value.is_extended_real is True and value == b.doit()
    by_value = _equal_values(a, b)
    return _verified(a, b) if by_value is None else by_value


def proportional(gold: tuple[str, str], prediction: tuple[str, str]) -> int:
    """The sign of c where (left - right) of the one is c times that of the other, for a constant c; 0 where it is not.

    So x/2 = 1 is the relation x = 2 (c > 0), and x < 2 is -x > -2 (c < 0).
    """
    sides = [_parsed(side) for side in (*gold, *prediction)]
    if any(side is None or not _is_scalar(side) for side in sides):
        return 0
    return _factor(sides[0] - sides[1], sides[2] - sides[3])


def same_zeros(gold: tuple[str, str], prediction: tuple[str, str]) -> bool:
    """Whether two equations are one but for their denominators: y = 3/x is xy = 3."""
    import sympy

    sides = [_parsed(side) for side in (*gold, *prediction)]
    if any(side is None or not _is_scalar(side) for side in sides):
        return False
    with contextlib.suppress(Exception):  # sympy's many
        a, b = (sympy.fraction(sympy.together(left - right))[0] for left, right in (sides[:2], sides[2:]))
        return bool(_affordable(a) and _affordable(b) and _factor(a, b))
    return False


def _factor(a: Any, b: Any) -> int:
    ratios = []
    for point in _points(a, b):
        x, y = _at(a, point), _at(b, point)
        if x is None or y is None or _zero(x) or _zero(y):
            continue
        ratios.append(x / y)
    if len(ratios) < 2 or not all(_close(ratio, ratios[0]) for ratio in ratios):
        return 0
    return 1 if ratios[0].real > 0 else -1


def rounded_to(decimal: str, places: int, expression: str) -> bool:
    """Whether an irrational constant is the decimal when rounded to its places."""
    parsed = _parsed(expression)
    if parsed is None or not _is_scalar(parsed) or parsed.free_symbols:
        return False
    value = _at(parsed, {})
    import mpmath

    with mpmath.workdps(40):
        return value is not None and abs(value - mpmath.mpf(decimal)) <= mpmath.mpf(10) ** -places * mpmath.mpf("0.50000001")


def _parsed(text: str) -> Any:
    if "math_verify.grader" not in sys.modules:
        raise NotLoaded
    return parse(text)


@lru_cache(maxsize=512)
def parse(text: str) -> Any:
    """The sympy expression of a text, unevaluated; None where it cannot be read or would be too large."""
    if (
        not text
        or len(text) > _LENGTH
        or _depth(text) > _DEPTH
        or _REFUSED.search(text)
        or re.search("[0-9]{400}|[A-Za-z]{30}", text)
    ):
        return None
    if _BINOMIAL.search(text) and re.search("[0-9]{4}", text):  # evaluated while it is read
        return None
    if text.count("&") > 40 or text.count("\\cr") > 12 or text.count("|") > 4 or re.search(r"(?:[-+]\s*){4}", text):
        return None
    import sympy
    from latex2sympy2_extended.latex2sympy2 import ConversionConfig, NormalizationConfig, latex2sympy, normalize_latex

    try:
        normal = NormalizationConfig(basic_latex=True, malformed_operators=True, nits=True, boxed="none", units=False)
        text = re.sub(r"\\log_(?:e|\{e\})(?![a-z])", r"\\ln", text.replace("{matrix}", "{pmatrix}").replace("\\cr", "\\\\"))
        text = re.sub(r"\\sqrt\[([3579])\]\{-([0-9]{1,9})\}", r"(-\\sqrt[\1]{\2})", text)  # the real one
        text = _MIXED.sub(_as_fraction, text)
        if not re.search(r"\\(?:sum|prod)", text):  # else it is an index
            text = _IMAGINARY.sub(lambda match: match[1] + ("I" if not match[2] else r"\cdot (I)^" if match[1] else "(I)^"), text)
        config = ConversionConfig(lowercase_symbols=False)
        parsed: Any = latex2sympy(normalize_latex(text, normal), is_real=True, normalization_config=None, conversion_config=config)
        parsed = sympy.ImmutableMatrix(parsed) if isinstance(parsed, sympy.MatrixBase) else parsed
        return parsed if _affordable(parsed) else None
    except Exception:  # the grammar's and sympy's many kinds: to us they are one, a text that is no expression
        return None


def _as_fraction(mixed: re.Match[str]) -> str:
    whole, top, bottom = (int(number) for number in mixed.groups() if number)
    return rf"\frac{{{whole * bottom + top}}}{{{bottom}}}" if top < bottom else mixed[0]


def _depth(text: str) -> int:
    level = deepest = 0
    for letter in text:
        level += (letter in "([{") - (letter in ")]}")
        deepest = max(deepest, level)
    return deepest + len(re.findall(r"\^\{?\(?-?[0-9a-z]{1,3}\^", text))


def _affordable(parsed: Any) -> bool:
    """Whether evaluating the expression is cheap: few nodes of known kinds, and no value above the bound on bits."""
    import sympy

    if not isinstance(parsed, (sympy.Basic, sympy.MatrixBase)):
        return False
    nodes = list(sympy.postorder_traversal(parsed))
    if len(nodes) > _NODES:
        return False
    bits: dict[Any, float] = {}
    for node in nodes:
        size = _size(node, [bits.get(argument, 1.0) for argument in getattr(node, "args", ())])
        if size > _BITS:
            return False
        bits[node] = size
    return True


def _size(node: Any, below: list[float]) -> float:
    """A bound b with 2^-b < |value| < 2^b, from those of the arguments; infinite where the kind of node is refused."""
    import sympy
    from sympy.functions.elementary.hyperbolic import HyperbolicFunction

    if isinstance(node, sympy.Rational):
        return max(node.p.bit_length(), node.q.bit_length())
    if isinstance(node, sympy.Float):
        return 64 + abs(node._mpf_[2] + node._mpf_[3])
    if isinstance(node, (sympy.Pow, sympy.MatPow)) and getattr(node.base, "is_Matrix", False):
        times: Any = node.exp
        return sum(below) * 20 if times.is_Integer and abs(times) <= 20 else float("inf")
    if isinstance(node, sympy.Pow):
        power: Any = node.exp
        exponent = abs(power) if power.is_Rational or power.is_Float else 2 ** min(below[1], 30)
        return float(below[0] * max(1, exponent))
    if isinstance(node, (sympy.exp, HyperbolicFunction)):
        exponent = _magnitude(node.args[0])
        return 2.0 * 2 ** min(below[0], 30) if exponent is None else 2 + 2 * exponent
    if isinstance(node, (sympy.factorial, sympy.binomial)):
        argument: Any = node.args[0]
        return 12.0 * (abs(int(argument)) if argument.is_Integer else 2 ** min(below[0], 30))
    if isinstance(node, (sympy.Sum, sympy.Product)):
        if len(node.limits) != 1 or len(node.limits[0]) != 3:
            return float("inf")
        _, start, end = node.limits[0]
        terms = end - start if start.is_Integer and end.is_Integer else None
        return float("inf") if terms is None or terms > 200 else sum(below) * (int(max(terms, 0)) + 1)
    refused = (sympy.Integral, sympy.Derivative, sympy.Limit, sympy.Subs, sympy.ConditionSet, sympy.MatrixSymbol, sympy.gamma)
    return float("inf") if isinstance(node, refused) else sum(below) + (0 if isinstance(node, sympy.Mul) else 2)


def _magnitude(constant: Any) -> float | None:
    """The absolute value of a constant, roughly; None where it has symbols or no value."""
    with contextlib.suppress(Exception):
        return abs(complex(constant.evalf(5))) if constant.is_number else None
    return None


def _is_infinite(parsed: Any) -> bool:
    import sympy

    return isinstance(parsed, sympy.Expr) and parsed.has(sympy.oo, sympy.zoo, sympy.nan)


def _is_scalar(parsed: Any) -> bool:
    import sympy
    from sympy.core.function import AppliedUndef

    return (
        isinstance(parsed, sympy.Expr)
        and not isinstance(parsed, sympy.MatrixExpr)
        and not parsed.has(sympy.MatrixBase, AppliedUndef, sympy.oo, sympy.nan, sympy.zoo)
    )


def _equal_values(a: Any, b: Any) -> bool | None:
    """Whether two scalars have the same values; None where they are no scalars, or have none that can be compared."""
    import sympy

    if not (_is_scalar(a) and _is_scalar(b)):
        return None
    constant = not (a.free_symbols or b.free_symbols)
    rounded = a.has(sympy.Float) or b.has(sympy.Float)
    compared = 0
    for point in _points(a, b):
        if any(value < 0 for value in point.values()) and (_leaves_reals(a, point) or _leaves_reals(b, point)):
            continue
        x, y = _at(a, point), _at(b, point)
        if x is None or y is None:
            continue
        # outside the reals a root or a logarithm has several values, and whoever wrote it meant a real one
        if not constant and _is_complex(x) != _is_complex(y):
            continue
        if not _close(x, y, rounded=rounded):
            return False
        compared += 1
    return True if compared >= (1 if constant else 2) else None


def _points(a: Any, b: Any) -> list[dict[Any, Any]]:
    """Values for the symbols of two expressions, all below four: four points of positive numbers, and one with a minus."""
    import sympy

    symbols = sorted(a.free_symbols | b.free_symbols, key=lambda symbol: symbol.name)
    if not symbols:
        return [{}]
    points = []
    for number in range(5):
        # no two alike, and no whole numbers, for which more expressions agree than are equal
        values = [
            sympy.Rational(307 + 190 * ((i + 3) * (number + 2) ** 2 % 17) + 7 * i % 97, 1000 + 7 * number)
            for i in range(len(symbols))
        ]
        sign, scale = (-1, 1) if number == 3 else (1, 4 if number == 4 else 1)
        points.append({symbol: sign * value / scale for symbol, value in zip(symbols, values, strict=True)})
    if a.has(sympy.floor, sympy.ceiling) or b.has(sympy.floor, sympy.ceiling):  # which are alike for all small values
        points += [{symbol: value * 41 for symbol, value in point.items()} for point in points[:3]]
    return points


def _leaves_reals(expression: Any, point: dict[Any, Any]) -> bool:
    """Whether an even root of a negative number is taken at a point: there the product of two roots is no root of the product."""
    import sympy

    bases = [power.base for power in expression.atoms(sympy.Pow) if power.exp.is_number and not power.exp.is_integer]
    return any(value is not None and value.real < 0 for value in (_at(base, point) for base in bases))


def _at(expression: Any, point: dict[Any, Any]) -> Any:
    """The value at a point as an mpmath number of 30 digits; None where it has none."""
    import mpmath
    import sympy

    try:
        at = expression.subs(point) if point and expression.has(sympy.Sum, sympy.Product) else expression
        at = at.doit() if at.has(sympy.Sum, sympy.Product) else at
        parts = _real_and_imaginary(at.evalf(30, subs=point or None, maxn=400))
        if parts is None:
            return None
        with mpmath.workdps(40):  # a part without one correct digit is zero
            return mpmath.mpc(*(0 if getattr(part, "_prec", 100) == 1 else part._to_mpmath(120) for part in parts))
    except Exception:  # sympy raises many kinds where a function has no value
        return None


def _real_and_imaginary(value: Any) -> tuple[Any, Any] | None:
    """The parts of a + b I; None where that is not a value's form, since sympy would expand any other to find them."""
    import sympy

    parts: list[Any] = [sympy.Integer(0), sympy.Integer(0)]
    for term in sympy.Add.make_args(value):
        imaginary = term == sympy.I or (isinstance(term, sympy.Mul) and sympy.I in term.args)
        number = term / sympy.I if imaginary and len(term.args) <= 2 else term
        if not (number.is_Float or number.is_Rational):
            return None
        parts[imaginary] += number
    return parts[0], parts[1]


def _is_complex(value: Any) -> bool:
    return abs(value.imag) > abs(value.real) * 1e-15


def _zero(value: Any) -> bool:
    return value == 0


def _close(a: Any, b: Any, *, rounded: bool = True) -> bool:
    """Whether two values agree in 24 digits, however small they are; in 13, where a decimal was rounded to a float."""
    import mpmath

    with mpmath.workdps(40):
        return a == b or abs(a - b) <= (1e-13 if rounded else 1e-24) * max(abs(a), abs(b))


def _verified(a: Any, b: Any) -> bool:
    """math-verify's own comparison, without its timer, which needs the main thread; it may expand, so only small ones."""
    import logging

    import sympy
    from math_verify.grader import sympy_expr_eq

    for side in (a, b):
        powers = [power.exp for power in side.atoms(sympy.Pow) if not power.is_number]
        if (
            any(exponent.is_Integer and abs(exponent) > 20 for exponent in powers)
            or sum(1 for _ in sympy.preorder_traversal(side)) > 150
        ):
            return False
    logging.getLogger("math_verify").setLevel(logging.ERROR)
    try:
        return bool(sympy_expr_eq(a, b, 6, 15))
    except Exception:
        return False
