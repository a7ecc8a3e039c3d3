r"""Where in a text its answer stands: the one place that says what a completion commits to.

What follows the last `</think>` decides where there is one. Then, and the first form present decides: the last `\boxed{}`,
the last `<answer>` block, the last `####`, the last 'the answer is', and only then the last formula or number. There is
never more than one candidate, so listing many answers gains nothing. Every function reads text in time linear in its length
and raises nothing. What an answer means is absent here: see `jaxreason.rewards.notation`.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Iterable, Sequence

_BOX = re.compile(r"\\{1,2}(?:boxed|fbox)[ \t]{0,8}\{|\\[\\{}]|[{}]")
_BARE_BOX = re.compile(r"\\boxed[ \t]{1,8}([0-9A-Za-z.]{1,40})")
# a heading in Markdown may begin with four too: then words follow
_AFTER_HASHES = re.compile(
    r"####[ \t]{0,8}(?=[-+−€£$\\(\[{|0-9.*]|[A-Za-z] ?=|(?:[A-J]|yes|no|true|false)\b\W{0,3}$)([^\n]*)",
    re.IGNORECASE | re.MULTILINE,
)
_CALCULATOR = re.compile(r"<<[^<>\n]{0,200}>>")  # GSM8K's <<2+3=5>>
_ANSWER = re.compile(r"\banswers?\b", re.IGNORECASE)
_IS = re.compile(
    r"^(?!\W{1,4}(?:because|since|as)\b)[*_ ]{0,4}(?:[a-z ,']{0,40}?\b(?:is|are|be|equals)\b|:|=)[*_:} ]{0,8}", re.IGNORECASE
)
_SENTENCE_END = re.compile(
    r"(?<!\bDr)(?<!\bMr)(?<!\bMrs)(?<!\bMs)(?<!\bSt)(?<!\bJr)(?<!\bRs)(?:[.?]|(?<![0-9])!)(?=\s|$|\*)|\n|<\|"
)
_REASON = re.compile(r"[ ,]\(?(?:since|because|as required|as desired|not|rather than|instead of)\b", re.IGNORECASE)
_BOLD = re.compile(r"\*\*([^*\n]{1,200})\*\*")
_STARS = re.compile(r"\*\*(?![0-9A-Za-z(\\$])|(?<![0-9A-Za-z)])\*\*")  # those of bold print, not of a power
_INITIAL = re.compile(r"(?:^|[A-Z]\w{0,30}\.?\s)[A-Z]\.$")  # of a name, as in Henry J. Kaiser
_SPECIAL = re.compile(r"<\|[^|<>]{0,40}\|>")
_FORMULA = re.compile(
    r"\$\$((?:[^$\\]|\\.){1,2000}?)\$\$|(?<![\\$])\$((?:[^$\\]|\\.){1,2000}?)\$|\\\[((?:[^\\]|\\[^\]]){1,2000}?)\\\]"
    r"|\\\(((?:[^\\]|\\[^)]){1,2000}?)\\\)"
    r"|(\\begin\{(?:equation|displaymath|math|align|gather|multline|eqnarray)\*?\}(?:[^\\]|\\(?!end\{|begin\{)){1,2000}\\end\{[a-z]{1,20}\*?\})",
    re.DOTALL,
)
_NAME_OF_BOX = re.compile(r"(?<![A-Za-z0-9\\])([A-Za-z](?:_\{?[0-9A-Za-z]\}?)?)\s{0,4}=\s{0,4}$")
_BETWEEN = re.compile(r"[\s$]|\\[()\[\]]|\\text|\\quad|\\ |[{}]|\b(?:maybe|perhaps|possibly)\b")
# what stands between two numbers of which a sentence gives one or the other
OR = re.compile(r"[^.!?\n]{0,60}\b(?:or|maybe|perhaps|possibly)\b[^.!?\n]{0,60}", re.IGNORECASE)
NOT = re.compile(r"(?:\bnot|n't|\bcannot|\bnever)\s(?:be\s|equal\s){0,2}[\s$]{0,4}$", re.IGNORECASE)
_WORD = re.compile(r"(?<![A-Za-z\\])[A-Za-z]{3,}")
_NUMBER_SPAN = re.compile(
    r"(?<![A-Za-z0-9_.^])[-+]?(?:\\?\$|[€£¥])?(?:[0-9]{1,9} (?=[0-9]{1,9}/[0-9]))?√?"
    r"(?:[0-9]{1,3}(?: [0-9]{3})+(?![0-9])|[0-9]+(?:,[0-9]{3}(?![0-9]))*(?:\.[0-9]+)?|\.[0-9]+)"
    r"(?: ?/ ?[0-9]+)?(?: ?%| cents?\b| and (?:a|one) (?:half|third|quarter)\b"
    r"|(?:[π√^*!]|[xyzn](?![A-Za-z]))[^\s,;]{0,40}(?<![.?!])!?)?"
)
_LEADING_NUMBER = re.compile(
    _NUMBER_SPAN.pattern
    + r"(?! and (?:a|one)\b)(?=\s{1,4}[A-Za-z]{2,})"
    + r"(?:\s{1,4}(?!(?:and|or|is|are|was|were|of|in|for|from|to|that|which|if|than|but|at|on)\b)[A-Za-z]{1,20}){0,3}"
)
_VALUE = re.compile(
    r"(?:\b(?:is|are|was|be|equals?|gets?|obtain|have|has|gives?)\b(?: at\b)?|=)[\s:*]{0,8}(?=[^=]{1,100}$)", re.IGNORECASE
)
# what a sentence adds to its answer
_ASIDE = re.compile(
    r"(?<=[0-9)}$])(?: when divided by \S{1,20}|,? (?:attained|achieved|reached) (?:at|when|for|if)\b[^\n]{1,200})[.\s]{0,4}$"
)
# before a number and after it, what makes it not the answer
_BOUND = re.compile(
    r"^\W{0,4}(?:at (?:most|least)|(?:greater|less|more|fewer|larger|smaller) than|between|almost|nearly|close to|not)\b",
    re.IGNORECASE,
)
_UNTRUE = re.compile(
    r"\s(?:(?:is|are|was|would be)\s)?(?:too |also )?"
    r"(?:wrong|incorrect|impossible|invalid|false|not|(?:is|does|wo|would|ca)n't|cannot)\b"
)
_TAIL = 8000  # characters of a text without marks that are looked at
_NOT_PROSE = frozenset(
    "sin cos tan cot sec csc log exp sqrt abs arcsin arccos arctan sinh cosh tanh inf infinity pmod mod and".split()
)
_COMMAND = re.compile(r"\\[A-Za-z]{1,40}(?:\{[A-Za-z]{1,20}\*?\})?")


def after_thinking(text: str) -> str:
    """What follows the last `</think>`, which is the whole text where there is none."""
    return _CALCULATOR.sub("", text.rpartition("</think>")[2])


def boxes(text: str) -> list[tuple[int, int, str]]:
    r"""Every `\boxed{...}` and `\fbox{...}` with balanced braces as (start, end, content), those inside another left out.

    An escaped brace is a character of the answer and counts for nothing; a box that never closes is none.
    """
    open_braces: list[tuple[int, int]] = []  # where a box starts and its content begins; -1, -1 for any other brace
    closed: list[tuple[int, int, int]] = []
    for mark in _BOX.finditer(text):
        token = mark[0]
        if token[-1] == "{" and "box" in token:
            open_braces.append((mark.start(), mark.end()))
        elif token == "{":
            open_braces.append((-1, -1))
        elif token == "}" and open_braces:
            start, inside = open_braces.pop()
            if start >= 0:
                while closed and closed[-1][0] > start:  # boxes within this one
                    closed.pop()
                closed.append((start, mark.end(), inside))
    return [(start, end, text[inside : end - 1].strip()) for start, end, inside in closed]


def boxed_answer(text: str) -> str | None:
    r"""What the last box holds; boxes before it that only a comma, 'and' or 'or' parts from it belong to it. None without."""
    found = boxes(text)
    if not found:
        bare = _last(_BARE_BOX.finditer(text))
        return None if bare is None else bare[1]
    kept = deque([found[-1]])
    for before in reversed(found[max(0, len(found) - 50) : -1]):
        gap = _NAME_OF_BOX.sub("", text[before[1] : kept[0][0]])
        if len(gap) > 40 or _BETWEEN.sub("", gap) not in {",", ";", "and", "or", ",and", ",or", "&"}:
            break
        kept.appendleft(before)
    names = [_NAME_OF_BOX.search(text[max(0, start - 40) : start]) for start, _, _ in kept] if len(kept) > 1 else [None]
    if all(names):  # x = \boxed{1} and y = \boxed{2}
        return ", ".join(f"{name[1]}={content}" for name, (_, _, content) in zip(names, kept, strict=True) if name)
    return ", ".join(dict.fromkeys(content for _, _, content in kept))


def tagged_answer(text: str) -> str | None:
    """What the last `<answer>...</answer>` holds; None where there is none, or it is not closed."""
    opened = text.rfind("<answer>")
    closed = text.find("</answer>", opened)
    return text[opened + len("<answer>") : closed].strip() if 0 <= opened < closed else None


def stated_answer(text: str) -> str | None:
    """The rest of the sentence after the last 'the answer is', 'Answer:' or the like; None where nothing says so."""
    for mark in reversed(deque(_ANSWER.finditer(text), maxlen=20)):
        rest = text[mark.end() : mark.end() + 2000]
        verb = _IS.match(rest)
        formula = re.match(r"[ \t]{0,4}(?=\$|\\[(\[])", rest)
        if verb is None and formula is None:
            continue
        rest = rest[(verb or formula).end() :].lstrip(" *_\t")  # type: ignore[union-attr]
        if _BOUND.match(rest) or (verb is not None and re.search(r"\bnot\b|n't\b|cannot\b", verb[0])):
            return ""
        if rest.startswith("\n"):
            rest = rest.lstrip("\n *_")
        plain = _without_formulas(rest)
        most = len(plain) - (len(text) - mark.end() > 2000)  # what stands at a cut ends nothing
        ends = (end for end in _SENTENCE_END.finditer(plain) if not _INITIAL.search(plain[: end.end()][-40:]))
        end = next((end.start() for end in ends if end.end() <= most), None)
        if end is None and most < len(plain):
            return ""  # a sentence that long commits to nothing
        said = _STARS.sub("", rest[:end])
        reasons = (reason.start() for reason in _REASON.finditer(_without_formulas(said)))
        said = said[: next((place for place in reasons if said[:place].strip(" *_,")), len(said))]
        if said.strip(" *_`\"'"):
            return said.strip(" *_`\"'")
    return None


def marked_answer(text: str) -> str | None:
    """What a mark says is the answer, as it is written: box, tag, hashes or 'the answer is'; None where there is no mark."""
    text = _SPECIAL.sub(" ", after_thinking(text))
    boxed = boxed_answer(text)
    if boxed is not None:
        return boxed
    tagged = tagged_answer(text)
    if tagged is not None:
        inner = stated_answer(tagged)
        return tagged if inner is None else inner
    hashes = _last(_AFTER_HASHES.finditer(text))
    return stated_answer(text) if hashes is None else hashes[1].strip()


def find_answer(text: str) -> str | None:
    """The mathematical answer that a completion commits to, as it is written there; None where it gives none."""
    marked = marked_answer(text)
    if marked is None:
        return _in_sentence(_SPECIAL.sub(" ", after_thinking(text)), marked=False)
    return (marked or None) if boxes(after_thinking(text)) else _in_sentence(marked, marked=True)


def find_reference(text: str) -> str | None:
    r"""The answer of a data set's row: bare LaTeX or text, `$...$`, a box, a whole solution, or GSM8K's with `####`."""
    marked = boxes(text) or "####" in text or "<answer>" in text or _ANSWER.search(text) or "\n" in text.strip()
    if marked or len(text) > 300:
        return find_answer(text)
    formulas = list(_FORMULA.finditer(text))
    outside = _BETWEEN.sub("", _FORMULA.sub("", text)).strip(" .")
    if formulas and outside in {"", "%"} | {sep * i for sep in (",", ";", "and", "or") for i in range(1, 12)} | {",and", ",or"}:
        return ", ".join(next(filter(None, formula.groups())).strip() for formula in formulas) + ("%" if outside == "%" else "")
    return text.strip() or None


def _in_sentence(text: str, *, marked: bool) -> str | None:
    """The answer in a text: the text itself where it is one, else what it says last, a formula or a number.

    A number that begins what a mark says is the answer (18 eggs in 2 days); without a mark, only where it is the only one.
    """
    text = text[-_TAIL:].strip(" \t\n")
    aside = _ASIDE.search(text)
    text = text[: aside.start()] if aside else text
    line = text[text.rfind("\n") + 1 :]
    bold = [span[1] for span in _BOLD.finditer(line) if _is_value(span[1])]
    text = (
        (bold[0] if len(bold) == 1 and not (OR.search(line) or NOT.search(line[: line.find("**")])) else text)
        .strip(" \t\n*_")
        .rstrip(".!")
        .strip(" \t\n*_")
    )
    if not text:
        return None
    formulas = _formulas(text)
    if not formulas and (_is_bare(text) or not re.search("[0-9]", text)):
        return text
    said = deque(_VALUE.finditer(line), maxlen=1) if not (marked or formulas) else ()
    value = line[said[0].end() :].strip(" *_").rstrip(".! ") if said else ""
    if re.search(r"[0-9π]", value) and not re.search(r"(?<!\\)[A-Za-z]{2,}", re.sub("sqrt|pi|log|ln|(?<=[0-9] )and", "", value)):
        return value
    numbers = [(at.start(), at.end(), at[0]) for at in deque(_NUMBER_SPAN.finditer(_without_formulas(text)), maxlen=50)]
    leading = _LEADING_NUMBER.match(text) if marked or (len(numbers) == 1 and not formulas) else None
    if leading is not None and re.match(r"\s(?:(?:and|&)\s\$?[0-9]|(?:than|times)\b)", text[leading.end() :]):
        return None  # 5 apples and 2 pears; 37 more than 5
    if (
        leading is not None and not OR.match(text, leading.end()) and not _UNTRUE.match(text, leading.end())
    ):  # what words follow is for the reader of notation, as units
        return leading[0]
    if formulas and (not numbers or numbers[-1][0] < formulas[-1][1]):
        if NOT.search(text[: formulas[-1][0]]):
            return None
        percent = re.match(r"\s{0,4}(?:\\?%|percent)", text[formulas[-1][1] :])
        return _joined(text, formulas, (",", ";", "and", "or", ", and", ", or")) + ("%" if percent else "")
    if not numbers or _is_bare(text.replace("$", "")):
        return text
    denied = NOT.search(text[: numbers[-1][0]]) or _UNTRUE.match(text, numbers[-1][1])
    return None if denied else _joined(text, numbers, ())


def _is_value(text: str) -> bool:
    """Whether a text is one formula or one number, with a unit perhaps."""
    text = text.strip(" .!")
    return bool(_FORMULA.fullmatch(text) or _NUMBER_SPAN.fullmatch(text) or _LEADING_NUMBER.fullmatch(text))


def _is_bare(text: str) -> bool:
    """Whether a text is an expression and no sentence."""
    words = _WORD.findall(_COMMAND.sub(" ", text))
    return len(text) <= 2000 and all(word.lower() in _NOT_PROSE for word in words)


def _formulas(text: str) -> list[tuple[int, int, str]]:
    """The formulas of a text as (start, end, content); what stands between two prices is no formula."""
    found = []
    for formula in _FORMULA.finditer(text):
        content = next(filter(None, formula.groups()), "").strip()
        prose = [word for word in _WORD.findall(_COMMAND.sub(" ", content)) if word.lower() not in _NOT_PROSE]
        if content and content[0] not in "^_" and not (formula[2] and " " in content and prose and "\\" not in content):
            found.append((formula.start(), formula.end(), content))
    return found


def _joined(text: str, found: Sequence[tuple[int, int, str]], joins: tuple[str, ...]) -> str:
    """The last formula or number with those before it that one of `joins`, or an 'or', parts from it."""
    kept = deque([found[-1]])
    for before in reversed(found[max(0, len(found) - 50) : -1]):
        gap = text[before[1] : kept[0][0]]
        if gap.strip() not in joins and not OR.fullmatch(gap):
            break
        kept.appendleft(before)
    return ", ".join(content for _, _, content in kept)


def _without_formulas(text: str) -> str:
    """The text with blanks in place of its formulas, so that places in it stay."""
    pieces, done = [], 0
    for start, end, _ in _formulas(text):
        pieces += [text[done:start], " " * (end - start)]
        done = end
    return "".join([*pieces, text[done:]])


def _last(matches: Iterable[re.Match[str]]) -> re.Match[str] | None:
    last = deque(matches, maxlen=1)
    return last[0] if last else None
