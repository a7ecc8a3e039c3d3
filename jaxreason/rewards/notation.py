r"""What an answer says: LaTeX and plain text brought to one spelling, then parted into numbers, tuples, sets and intervals.

`plain` removes what changes nothing (spacing, `\left`, fonts, currency signs) and spells the rest one way; `read` parts the
result at its outermost commas and brackets. What the parts mean is for `jaxreason.rewards.math`, and symbols are for
math-verify: nothing here knows algebra, executes anything, or imports sympy.
"""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass
from typing import Literal

_UNICODE = {
    "−": "-", "–": "-", "—": "-", "×": r"\times ", "·": r"\cdot ", "⋅": r"\cdot ", "÷": r"\div ", "π": r"\pi ", "∞": r"\infty ",
    "≤": r"\le ", "≥": r"\ge ", "⩽": r"\le ", "⩾": r"\ge ", "≠": r"\ne ", "≈": r"\approx ", "±": r"\pm ", "∓": r"\mp ",
    "∪": r"\cup ", "∩": r"\cap ", "∅": r"\emptyset ", "∈": r"\in ", "°": r"^{\circ}", "√": r"\sqrt ", "…": r"\ldots ",
    "α": r"\alpha ", "β": r"\beta ", "γ": r"\gamma ", "θ": r"\theta ", "λ": r"\lambda ", "φ": r"\phi ", "ω": r"\omega ",
    "¢": " cents",
    "½": r"\frac{1}{2}", "¼": r"\frac{1}{4}", "¾": r"\frac{3}{4}", "⅓": r"\frac{1}{3}", "⅔": r"\frac{2}{3}", "⅛": r"\frac{1}{8}",
    "ℝ": r"\mathbb{R}", "ℤ": r"\mathbb{Z}", "ℕ": r"\mathbb{N}", "⟨": r"\langle ", "⟩": r"\rangle ",
    "，": ",", "。": ".", "；": ";", "：": ":", "（": "(", "）": ")", "’": "'", "\u00a0": " ", "\u2009": " ", "\u202f": " ",
}  # fmt: skip
_POWERS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁻", "0123456789-")
_SUPERSCRIPT = re.compile("[⁰¹²³⁴⁵⁶⁷⁸⁹⁻]{1,20}")

_GROUPING_COMMA = re.compile(
    r",(?:\\[!,]|\{\})\s*(?=[0-9])|\{,\}\s*|(?<=[0-9])\\[,:]?,\s*(?=[0-9]{3})|(?<=[0-9])\\[, ](?=[0-9]{3})"
)
_SPACING = re.compile(
    r"\\[!,;:> ]|\\(?:q?quad|hspace\{[^{}]*\}|displaystyle|textstyle|limits|nonumber|thinspace|enspace|smallskip|"
    r"large|Large|small|normalsize)(?![A-Za-z])"
    r"|[~\s]"
)
_SIZE = re.compile(r"\\(?:left|right|[bB]igg?[lrm]?|m?left|m?right)(?![A-Za-z])\.?")
_SYNONYMS = {
    "dbinom": "binom", "tbinom": "binom",
    "dfrac": "frac", "tfrac": "frac", "cfrac": "frac", "leq": "le", "leqslant": "le", "geq": "ge", "geqslant": "ge", "neq": "ne",
    "lt": "<", "gt": ">", "lbrace": r"\{", "rbrace": r"\}", "lbrack": "[", "rbrack": "]", "langle": "(", "rangle": ")",
    "lparen": "(", "rparen": ")", "varnothing": "emptyset", "dots": "ldots", "cdots": "ldots", "dotsc": "ldots", "dotsb": "ldots",
    "lvert": "|", "rvert": "|", "vert": "|", "mid": "|", "colon": ":", "bmatrix": "pmatrix", "degree": r"^{\circ}", "ast": "*",
    "textdegree": r"^{\circ}",
    "simeq": "approx", "infin": "infty", "land": ",", "lor": ",", "vee": ",", "wedge": ",", "to": "rightarrow", "exponentialE": "e",
    "mathrm": "text", "mathbf": "text", "textbf": "text", "textit": "text", "textrm": "text", "mbox": "text", "texttt": "text",
    "bold": "text", "textsc": "text", "underline": "text", "bigcup": "cup",
    "textsf": "text", "mathit": "text", "mathsf": "text", "emph": "text", "bf": "", "rm": "", "boldsymbol": "text", "bm": "text",
    "hbox": "text", "textnormal": "text", "mathcal": "text", "operatorname": "text", "euro": "", "pounds": "", "textdollar": "",
    "ensuremath": "", "mathtt": "text",
}  # fmt: skip
_COMMAND = re.compile(r"\\([A-Za-z]+)\*?\s*(?=(.?))", re.DOTALL)
_TEXT = re.compile(r"\\text\s*\{([^{}]*)\}")
_AND = re.compile(r"(?:^|(?<=[\s,;0-9)}\]]))\s*,?\s*(?<![A-Za-z])(?:and|or)(?![A-Za-z])\s*(?=\S)", re.IGNORECASE)
_DEGREES = re.compile(r"\s*\^\s*(?:\\circ(?![A-Za-z])|\{(?:\s|\\[,;:! ])*\\circ\s*\}\s*)(?:\s*[CF](?![A-Za-z]))?|\s*\\circ$")
_PERCENT = re.compile(r"\s*(?:\\%|%|\bper ?cent(?:age)?(?: points?)?\b|\bpct\b)", re.IGNORECASE)
_CURRENCY = re.compile(
    r"\\?\$|[€£¥₹]|(?<![A-Za-z])(?:Rs\.?|USD|EUR|GBP|US)(?=\s{0,3}[0-9$])|\\text\{\s*(?:USD|EUR|GBP|Rs\.?)\s*\}|(?<=[0-9])\s{0,3}(?:USD|EUR|GBP)\b"
)
_FRAC = re.compile(r"\\frac\s*(?:([0-9A-Za-z])|(?=\{))")
_SQRT = re.compile(r"\\sqrt\s*(?:(\\[A-Za-z]+|[0-9]+|[A-Za-z])(?![0-9])|(?=[\[{(]))")
_POWER = re.compile(r"\^\s*([0-9A-Za-z])")
_LEAD = re.compile(
    r"(?:(?:so|thus|hence|therefore|approximately|about|exactly|just|roughly|around|only|a total of|"
    r"(?:the )?(?:final )?answer (?:is|:)|answer:|it(?: is|'s))[\s,]*)+(?=\S)",
    re.IGNORECASE,
)
_UNIT_FRACTION = re.compile(
    r"\\frac\s*\{\s*\\text\{([^{}0-9]*)\}(\^\{?[0-9]\}?)?\s*\}\s*\{\s*\\text\{([^{}0-9]*)\}(\^\{?[0-9]\}?)?\s*\}"
)
_UNIT_POWER = re.compile(r"\\text\{((?:[A-Za-z/ .~]|\\[,; ]){1,30})\^(?:\{(-?[0-9])\}|(-?[0-9]))\s*\}")
_HALF_OF_DAY = re.compile(r"(?<=:[0-9]{2})\s*(?:\\text\{\s*([ap])\.?\s?m\b\.?\s*\}|([ap])\.?\s?m\b\.?)", re.IGNORECASE)
_SYSTEM = re.compile(
    r"(?:\\\{\s*)?\\begin\{array\}\s*\{[^{}]*\}(?P<array>(?:(?!\\begin|\\end).)*)\\end\{array\}(?!\s*\\\})"
    r"|(?:\\\{\s*)?\\begin\{(?:d?cases|align(?:ed|at)?|gather(?:ed)?|split|multline|eqnarray|equation|displaymath|math)\*?\}"
    r"(?P<rows>(?:(?!\\begin|\\end).)*)\\end\{[a-z]{1,20}\*?\}",
    re.DOTALL,
)
# 22° 30', in degrees
_MINUTES = re.compile(r"([0-9]+)\s*\^\s*\{?\s*\\circ\s*\}?\s*([0-9]{1,2})\s*'(?:\s*([0-9]{1,2})\s*'')?")
# 2k\\pi, k \\in \\mathbb{Z}: that a letter is any whole number goes without saying
_ANY_WHOLE = re.compile(
    r"^((?:(?!\\[lg]e|\\in)[^<>]){1,200}?)[\s,;]*\(?\s*[kmnt]\s*\\in\s*(?:\\mathbb\{[ZN]\}|\\text\{[ZN]\}|[ZN])\s*\)?$"
)
_REPEATS = re.compile(r"([0-9]{0,20}\.[0-9]{0,6}?)([0-9]{1,9}?)\2{1,20}(?<=[0-9]{3})\s*(?:\\ldots|\.\.\.)")  # 0.1666...
_OUTWARD = re.compile(r"([\[\]])([^\[\]()]{1,60}[,;][^\[\]()]{1,60})([\[\]])")  # ]0,1[ is (0,1)
_MULTIPLES = {"hundred": 2, "thousand": 3, "million": 6, "billion": 9, "trillion": 12}
_MULTIPLE = re.compile(rf"(?<=[0-9])\s*(\\text\{{\s*)?({'|'.join(_MULTIPLES)})s?\b\s*(\}}?)", re.IGNORECASE)
_PARTS = {"half": 2, "third": 3, "quarter": 4}
_AND_PART = re.compile(r"(?<=[0-9])\s+and\s+(?:a|one)\s+(half|third|quarter)\b", re.IGNORECASE)  # 2 and a half
_PHRASES = [
    (re.compile(said, re.IGNORECASE), phrase)
    for said, phrase in (
        (r"(?:there (?:is|are) )?no (?:such )?(?:solutions?|roots?)(?: exists?)?", r"\emptyset"),
        (r"(?:the set of )?(?:all )?(?:the )?real(?:s| numbers)", r"\mathbb{R}"),
        (r"d\.?n\.?e\.?|(?:it |the limit )?does not exist", "does not exist"),
        (r"\+?(?:positive )?infinity", r"\infty"),
    )
]
_SIGN = r"(?:=|<|>|\\(?:le|ge|ne|approx|in)(?![A-Za-z]))"
_GIVEN = re.compile(r"\\?[A-Za-z]+(?:_\{?[0-9A-Za-z]\}?)?\s*=")
_ALIGNMENT = re.compile(rf"&\s*(?={_SIGN})|(?<==)\s*&|(?:^|(?<=\\cr))\s*&")
_OPEN, _CLOSE = "([{", ")]}"


@dataclass(frozen=True)
class Form:
    """An answer parted at its outermost level. `brackets` are those of a tuple or interval, as '(]'."""

    kind: Literal["one", "list", "set", "tuple", "matrix", "union"]
    text: str
    parts: tuple[Form, ...] = ()
    brackets: str = ""


def plain(text: str, *, radians: bool = False) -> str:
    """One spelling of an answer: of LaTeX, of plain text, of Unicode; without degree signs, or with its degrees in radians."""
    text = re.sub(r"\\+\s*$", "", _ascii(text))
    text = re.sub(r"\\\\(?=[A-Za-z]{2})", r"\\", text) if "begin" not in text else text  # a command with its backslash doubled
    if "begin" in text:  # a matrix's end of row, which is no space
        text = re.sub(r"\\\\(?:\[-?[0-9.]{1,5} ?[a-z]{2}\])?", r"\\cr ", text)
    text = text.replace("\\$", "$")
    text = re.sub(r"(?<![<>=!])([<>])=(?![=>])", lambda match: {"<": "\\le ", ">": "\\ge "}[match[1]], text)
    text = re.sub(r"\\not\s*=|(?<=\s)!=", r"\\ne ", text)
    text = re.sub(r"(?<=[0-9])(?:\{,\}|,\\!)\s*(?=[0-9]{3}(?![0-9]))", "", text)  # within one number, whatever stands around it
    text = _GROUPING_COMMA.sub(",", text)
    text = _SIZE.sub("", text).replace("\\right.", "").replace("\\left.", "")
    text = re.sub(r"\{\s*\\(?:rm|bf|it|sf|tt)\s+([^{}]*)\}", r"\\text{\1}", text)
    text = _COMMAND.sub(lambda match: _spelling(match[1], following=match[2]), text)
    text = re.sub(r"\\(begin|end)\{(?:b|p|B|small)?matrix\}", r"\\\1{matrix}", text)
    if "\\begin" in text:
        text = _SYSTEM.sub(_written_in_line, text)
        text = re.sub(r"\\begin\{array\}\s*\{[^{}]*\}", r"\\begin{matrix}", text).replace("\\end{array}", "\\end{matrix}")
        text = re.sub(r"[(\[]\s*\\begin\{matrix\}", r"\\begin{matrix}", text)
        text = re.sub(r"\\end\{matrix\}\s*[)\]]", r"\\end{matrix}", text)
    text = re.sub(r"(?:\\text\s*)?\{\s*:\s*\}", ":", text)
    text = re.sub(r"\\text\{\s*([ie])\s*\}", r"\1", text)
    text = re.sub(r"(?<=[0-9])\s*\\text\{\s*to\s*\}\s*(?=[0-9])", ":", text)
    text = _HALF_OF_DAY.sub(lambda match: f" {(match[1] or match[2]).lower()}m", text)
    text = re.sub(r"\(\s*(\\text\{[^{}]*\})\s*\)$", r"\1", _UNIT_POWER.sub(r"\\text{\1}^{\2\3}", text))
    text = re.sub(r"\s*,?\s*\\text\{\s*(?:for (?:all|any|every)|where)\b[^{}]*\}.*$", "", text, flags=re.DOTALL)
    text = re.sub(r"(?<=[)\]])\s*U\s*(?=[(\[])", r"\\cup ", re.sub(r"\\(?:text)?color\s*\{[A-Za-z]{1,20}\}", "", text))
    text = re.sub(r"\\mathbb\s*([A-Z])", r"\\mathbb{\1}", text)
    text = re.sub(r"(\\mathbb\{R\})\s*(?:-|\\backslash|/)\s*(?=\\\{)", r"\1\\setminus ", text)
    text = _ANY_WHOLE.sub(r"\1", text)
    text = re.sub(r"(?<![A-Za-z])C_\{?([0-9]{1,3})\}?\^\{?([0-9]{1,3})\}?", r"\\binom{\1}{\2}", text)
    text = _UNIT_FRACTION.sub(lambda unit: f"\\text{{{unit[1]}{unit[2] or ''}/{unit[3]}}}{unit[4] or ''}".replace("{{", "{"), text)
    text = _TEXT.sub(lambda match: _AND.sub(" , ", match[1]) if _AND.fullmatch(match[1] + "x") else match[0], text)
    text = _TEXT.sub(lambda match: ", " if match[1].strip(" ,").lower() in {"and", "or"} else match[0], text)
    text = _MULTIPLE.sub(_as_power, text)
    text = _AND_PART.sub(lambda match: f" 1/{_PARTS[match[1].lower()]}", text)
    text = _PERCENT.sub("%", _TEXT.sub(lambda match: "%" if _PERCENT.fullmatch(match[1]) else match[0], text))
    text = re.sub(r"\\text\{\s*\}", "", _CURRENCY.sub("", text))
    text = re.sub(r"(?<=[0-9])\s*\^\s*(?:\{\s*)?(?:\\text\{\s*o\s*\}|o(?![A-Za-z]))(?:\s*\})?", r"^{\\circ}", text)
    text = _MINUTES.sub(lambda match: f"({match[1]}+{match[2]}/60+{match[3] or 0}/3600)^{{\\circ}}", text)
    if not (radians or re.search(r"\\(?:sin|cos|tan|cot|sec|csc)(?![A-Za-z])", text)):
        text = re.sub(
            r"(?<=[0-9}])\s*(?:\\text\{\s*degrees?\s*\}|degrees?\b)(?:\s*(?:Celsius|Fahrenheit))?", "", _DEGREES.sub("", text)
        )
    else:
        text = re.sub(r"([0-9.]+)\s*\^\s*(?:\\circ(?![A-Za-z])|\{\s*\\circ\s*\})", r"{(\\frac{\1\\pi}{180})}", text)
    text = re.sub(
        r"\^\s*\{?\s*\\text\{(?:st|nd|rd|th)\}\s*\}?|(?<=[0-9])(?:st|nd|rd|th)\b|(?<=[0-9])\s*\\text\{(?:st|nd|rd|th)\}", "", text
    )
    text = _REPEATS.sub(r"\1\\overline{\2}", _SPACING.sub(" ", text))
    text = _OUTWARD.sub(lambda match: "(["[match[1] == "["] + match[2] + ")]"[match[3] == "]"], text)
    text = _unwrapped(re.sub(r" {2,}", " ", text).strip())
    text = re.sub(r"^\\text\{[^{}]*(?:\b(?:is|are|[Pp]oints?)\b|:)\s*\}", "", text)
    leading = re.match(r"\\text\{([^{}]*)\}", text)
    if leading and _LEAD.sub("", f"{leading[1].strip()} x", count=1) == "x":
        text = text[leading.end() :].lstrip()
    text = re.sub(r"^[A-Z][a-z][A-Za-z ]{1,40}:\s+(?=\S)", "", re.sub(r"\(\s*or\s+([^()]*)\)", r", \1", text))
    text = _LEAD.sub("", text, count=1) if _LEAD.match(text) else text
    text = re.sub(r"^(?:=>|\\(?:Rightarrow|implies|therefore|rightarrow)(?![a-z]))\s*", "", text)
    text = next((phrase for said, phrase in _PHRASES if said.fullmatch(text)), text).removeprefix("\\approx").lstrip()
    text = _arguments_braced(text)
    text = re.sub(r"(?<=[\s0-9)}\],])(?<![A-Za-z]),?\s*(?:and|or)(?![A-Za-z])\s*", ", ", text)
    text = re.sub(r",(?:\s*,)+", ",", text)
    return text.strip().rstrip(".").rstrip(",;").strip() if not re.fullmatch(r".*[0-9]\.", text) else text[:-1].strip()


def key(text: str) -> str:
    """What two spellings of one text share: no white space but between words or numbers, no fonts, words in small letters."""
    text = re.sub(r"\s+", " ", _TEXT.sub(r" \1 ", text))
    text = re.sub(r"(?<![0-9A-Za-z])\s+|\s+(?![0-9A-Za-z])", "", text)
    return re.sub(r"(?<!\\)\b(?:[A-Za-z]{3,}|[Nn][Oo])\b", lambda word: word[0].lower(), text).strip(" ,;").rstrip(".")


def read(text: str, *, depth: int = 0) -> Form:
    """The parts of a text in `plain` spelling; a text that is one thing, or nested too deep, is itself."""
    text = text.strip()
    if depth > 6 or len(text) > 20_000:
        return Form("one", text)
    cups = split(text, ("\\cup",))
    if len(cups) > 1:
        return Form("union", text, tuple(read(part, depth=depth + 1) for part in cups))
    matrix = re.fullmatch(r"\\begin\{matrix\}((?:(?!\\begin|\\end).)*)\\end\{matrix\}", text, re.DOTALL)
    if matrix:
        rows = [row.strip() for row in matrix[1].split("\\cr")]
        rows = [row for row in rows if row]
        cells = tuple(Form("tuple", row, tuple(read(cell, depth=depth + 1) for cell in row.split("&"))) for row in rows)
        return Form("matrix", text, cells)
    semicolons = split(text, (";",))
    if len(semicolons) > 1:
        groups = [split(part, (",",)) for part in semicolons]
        kind = "tuple" if all(len(group) > 1 for group in groups) else "one"
        return Form("list", text, tuple(_group(part, kind, depth=depth) for part in semicolons))
    commas = _split_commas(text)
    if len(commas) > 1:
        return Form("list", text, tuple(read(part, depth=depth + 1) for part in commas))
    inside = enclosed(text, "\\{", "\\}") or (enclosed(text, "{", "}") if _split_commas(text[1:-1])[1:] else None)
    if inside is not None:
        return Form("set", text, tuple(read(part, depth=depth + 1) for part in _elements(inside) if part.strip()))
    if text in {"\\emptyset", "\\emptyset{}"}:
        return Form("set", text)
    brackets = _enclosing(text)
    if brackets:
        parts = _elements(text[1:-1])
        if len(parts) > 1:
            return Form("tuple", text, tuple(read(part, depth=depth + 1) for part in parts), brackets)
        if brackets == "()" and text[1:-1].strip():
            return read(text[1:-1], depth=depth + 1)
    if enclosed(text, "{", "}"):
        return read(text[1:-1], depth=depth + 1)
    return Form("one", text)


def split(text: str, separators: tuple[str, ...]) -> list[str]:
    """The pieces of a text between separators that stand in no bracket."""
    pieces, level, start, place = [], 0, 0, 0
    while place < len(text):
        if text[place] in _OPEN:
            level += 1
        elif text[place] in _CLOSE:
            level -= 1
        elif level == 0:
            found = next((sep for sep in separators if text.startswith(sep, place)), None)
            if found is not None:
                pieces.append(text[start:place])
                place += len(found)
                start = place
                continue
        place += 2 if text[place] == "\\" and place + 1 < len(text) and text[place + 1] not in "{}[]()" else 1
    return [*pieces, text[start:]]


def enclosed(text: str, opening: str, closing: str) -> str | None:
    """What stands between `opening` at a text's start and its own `closing` at its end; None where that is not its form."""
    if not (text.startswith(opening) and text.endswith(closing) and len(text) >= len(opening) + len(closing)):
        return None
    level = 0
    for place, letter in enumerate(text):
        if letter in _OPEN:
            level += 1
        elif letter in _CLOSE:
            level -= 1
            if level == 0 and place < len(text) - 1:
                return None
    return text[len(opening) : -len(closing)] if level == 0 else None


def _enclosing(text: str) -> str:
    if len(text) < 2 or text[0] not in "([" or text[-1] not in ")]":
        return ""
    level = 0
    for place, letter in enumerate(text):
        level += (letter in _OPEN) - (letter in _CLOSE)
        if level == 0 and place < len(text) - 1:
            return ""
    return text[0] + text[-1] if level == 0 else ""


def _elements(inside: str) -> list[str]:
    """What stands between brackets, part by part: in (3,331) there are two, and in (1,234, 5) there are two."""
    semicolons = split(inside, (";",))
    if len(semicolons) > 1:
        return semicolons
    return _split_commas(inside) if re.search(r",\s", inside) else split(inside, (",",))


def _group(part: str, kind: str, *, depth: int) -> Form:
    if kind == "one":
        return read(part, depth=depth + 1)
    return Form("tuple", part, tuple(read(piece, depth=depth + 1) for piece in split(part, (",",))), "()")


def _split_commas(text: str) -> list[str]:
    """The pieces between commas, those of thousands left in their number: 1,234 is one and 1, 234 is two."""
    pieces = split(text, (",",))
    if len(pieces) == 1 or re.fullmatch(r"[-+]?\s*0,[0-9]{3,}", text.strip()):
        return [text]
    kept = [pieces[0]]
    for piece in pieces[1:]:
        before = re.search(r"(?:^|[^0-9.,])[0-9]{1,3}(?:,[0-9]{3})*$", kept[-1])
        if before and re.match(r"[0-9]{3}(?![0-9])", piece) and not re.search(r"(?:^|[^0-9,])0[0-9,]*$", kept[-1]):
            kept[-1] += "," + piece
        else:
            kept.append(piece)
    return kept


def _written_in_line(match: re.Match[str]) -> str:
    r"""The rows of a system, or of a calculation over several lines, as one line; what has columns of its own is left."""
    body = _ALIGNMENT.sub("", match["array"] or match["rows"] or "")
    if "&" in body:
        return match[0]
    rows = [row for row in (row.strip().rstrip(",;. ") for row in body.split("\\cr")) if row]
    if match["array"] and len(rows) > 1 and not all(re.search(_SIGN, row) for row in rows):
        return match[0]  # a matrix
    while len(rows) > 1 and _GIVEN.match(rows[-1]) and not _GIVEN.match(rows[0]):
        rows.pop(0)  # 2x = 16 and then x = 8
    line = ""
    for row in rows:
        line += row if not line else f" {row}" if re.match(_SIGN, row) else f", {row}"
    return line


def _as_power(multiple: re.Match[str]) -> str:
    r"""The power of ten that a word such as million is; what else its \text{} holds stays there."""
    return f"\\times 10^{{{_MULTIPLES[multiple[2].lower()]}}}" + (" \\text{" if multiple[1] and not multiple[3] else " ")


def _ascii(text: str) -> str:
    if text.isascii():
        return text
    text = _SUPERSCRIPT.sub(lambda match: "^{" + match[0].translate(_POWERS) + "}", text)
    text = re.sub(
        "[−–—×·⋅÷π∞≤≥⩽⩾≠≈±∓∪∩∅∈°√…αβγθλφω¢½¼¾⅓⅔⅛ℝℤℕ⟨⟩，。；：（）’\u00a0\u2009\u202f]", lambda match: _UNICODE[match[0]], text
    )
    return text if text.isascii() else unicodedata.normalize("NFKC", text)


def _spelling(command: str, *, following: str) -> str:
    new = _SYNONYMS.get(command, command)
    return f"\\{new}" + (" " if following.isalnum() else "") if new.isalpha() else new


def _unwrapped(text: str) -> str:
    """The text without a font, a box or braces around the whole of it."""
    for _ in range(8):
        match = re.fullmatch(r"\\(?:text|[fb]?box(?:ed)?)\s*(\{.*\})", text, re.DOTALL)
        inside = enclosed(match[1], "{", "}") if match else None
        if inside is None:
            break
        text = inside.strip()
    return text


def _arguments_braced(text: str) -> str:
    r"""\frac43, \frac{1}2, \sqrt3, x^2 and sqrt(2) with the braces that they leave out."""
    text = re.sub(r"\{\s*([^{}]*?)\s*\\choose\s*([^{}]*?)\s*\}", r"\\binom{\1}{\2}", text)
    text = re.sub(r"(?<![A-Za-z\\])[dtc]?frac(?=\s*\{)", r"\\frac", text)
    text = re.sub(r"(?<=[0-9.])\\(?:bar|dot)(?=\s*\{)", r"\\overline", text)
    text = re.sub(r"(\\sqrt\s*\[[0-9A-Za-z]{1,2}\])\s*([0-9A-Za-z])", r"\1{\2}", text)
    text = re.sub(r"(?<![A-Za-z\\])(sqrt|pi|exp|sin|cos|tan|ln|log|infinity|inf|oo)(?![a-z])", _plain_function, text)
    text = re.sub(r"\\(frac|binom)\s*([0-9A-Za-z])\s*([0-9A-Za-z])", r"\\\1{\2}{\3}", text)
    text = re.sub(r"\\(frac|binom)\s*([0-9A-Za-z])\s*\{", r"\\\1{\2}{", text)
    text = re.sub(r"(\\(?:frac|binom)\s*\{[^{}]*\})\s*([0-9A-Za-z])", r"\1{\2}", text)
    text = re.sub(r"\\frac\s*(?=\{)", r"\\frac", text)
    text = _SQRT.sub(lambda match: f"\\sqrt{{{match[1]}}}" if match[1] else "\\sqrt", text)
    text = text.replace("**", "^")
    for opening in ("\\sqrt(", "^("):
        text = _parentheses_to_braces(text, opening)
    return re.sub(r"_\{([0-9A-Za-z])\}", r"_\1", _POWER.sub(r"^{\1}", text))


def _plain_function(match: re.Match[str]) -> str:
    return {"infinity": "\\infty ", "inf": "\\infty ", "oo": "\\infty ", "pi": "\\pi "}.get(match[1], "\\" + match[1])


def _parentheses_to_braces(text: str, opening: str) -> str:
    for _ in range(20):
        start = text.find(opening)
        if start < 0:
            break
        level, first = 0, start + len(opening) - 1
        for place in range(first, len(text)):
            level += (text[place] == "(") - (text[place] == ")")
            if level == 0:
                text = text[:first] + "{" + text[first + 1 : place] + "}" + text[place + 1 :]
                break
        else:
            break
    return text
