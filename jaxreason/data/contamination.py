"""Which evaluation problems a model may have seen in training: problems that share n words in a row with a training problem.

Brown et al., arXiv:2005.14165, appendix C, call a problem contaminated where 13 words in a row occur in the training data; many
reports of reasoning models do the same. Only the evaluation's n-grams are held in memory, and the training rows stream past
them. Deliberately absent: paraphrases, which no n-gram finds.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

# Letters and digits in a row; where a script writes no spaces (Chinese, Japanese), each character is a word.
_UNSPACED = r"\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
_WORD = re.compile(rf"[{_UNSPACED}]|[^\W_{_UNSPACED}]+")

Gram = tuple[str, ...]


class Overlap(NamedTuple):
    """An evaluation problem and what of it occurs in training."""

    id: str
    share: float  # of its different n-grams
    trained: tuple[str, ...]  # ids of the training problems that hold most of them, the most first
    text: str  # the first n-gram that occurs in the first of these, normalised


class Report(NamedTuple):
    """What was compared, and every evaluation problem with an overlap, the largest share first."""

    n: int
    training: int  # problems
    evaluation: int
    overlaps: list[Overlap]


def words(text: str) -> list[str]:
    """The words of a text without case, accents' encoding or punctuation."""
    return _WORD.findall(unicodedata.normalize("NFKC", text).casefold())


def grams(text: str, n: int) -> Iterator[Gram]:
    """Every n words in a row; a text of fewer words is one gram, which only the same text equals."""
    found = words(text)
    if 0 < len(found) < n:
        yield tuple(found)
    for start in range(len(found) - n + 1):
        yield tuple(found[start : start + n])


def contamination(training: Iterable[tuple[str, str]], evaluation: Mapping[str, str], *, n: int = 13, shown: int = 3) -> Report:
    """Compares (id, text) of training problems with the texts of evaluation problems by id."""
    if n < 1:
        raise ValueError(f"n is {n}: expected 1 or more words in a row")
    own = {name: list(dict.fromkeys(grams(text, n))) for name, text in evaluation.items()}
    holders: dict[Gram, list[str]] = {}
    for name, there in own.items():
        for gram in there:
            holders.setdefault(gram, []).append(name)
    shared: dict[str, dict[str, set[Gram]]] = {}  # evaluation problem -> training problem -> n-grams
    count = 0
    for source, text in training:
        count += 1
        for gram in grams(text, n):
            for name in holders.get(gram, ()):
                shared.setdefault(name, {}).setdefault(source, set()).add(gram)
    overlaps = []
    for name in filter(shared.get, evaluation):  # in their order, where shares are equal
        sources = shared[name]
        most = sorted(sources, key=lambda source: -len(sources[source]))[:shown]
        first = next(gram for gram in own[name] if gram in sources[most[0]])
        share = len(set().union(*sources.values())) / len(own[name])
        overlaps.append(Overlap(name, share, tuple(most), " ".join(first)))
    return Report(n, count, len(own), sorted(overlaps, key=lambda each: -each.share))
