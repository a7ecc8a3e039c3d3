"""String manipulation: letters reversed, sorted, counted, shifted, and palindromes told.

    Reverse c-a-r-t.
    <think>t,r,a,c</think><answer>t-r-a-c</answer>

Letters are joined by hyphens, so that every one is a token of its own, whatever the tokenizer.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from jaxreason.naming import nearest
from jaxreason.tasks.procedural import DIGITS, Written, check_span, endless, pieces
from jaxreason.tasks.task import Task

LETTERS = "abcdefghijklmnopqrstuvwxyz"
QUESTIONS = {
    "reverse": "Reverse {}.",
    "sort": "Sort the letters of {}.",
    "count": "How many times is {} in {}?",
    "caesar": "Shift each letter of {} by {} places in the alphabet.",
    "palindrome": "Is {} the same when read backwards?",
}
# Graders of short answers leave articles out and take yes for true: none of these may be an answer.
RESERVED = ("the", "yes", "true", "false")

Content = tuple[str, str, str, int]  # kind, letters, the letter to count, places to shift


def string_manipulation(
    *,
    seed: int = 0,
    heldout_size: int = 256,
    prompt: str = "as_it_is",
    kinds: Sequence[str] = tuple(QUESTIONS),
    min_length: int = 3,
    max_length: int = 7,
    letters: int = 26,
) -> Task:
    """Strings of the alphabet's first `letters` letters; `kinds` are some of reverse, sort, count, caesar and palindrome."""
    check_span(min_length, max_length, smallest=3, names=("min_length", "max_length"))
    if not 2 <= letters <= 26:
        raise ValueError(f"letters is {letters}: expected 2 to 26")
    if isinstance(kinds, str) or not kinds:
        raise ValueError(f"kinds is {kinds!r}: expected a list of some of {', '.join(QUESTIONS)}")
    for kind in kinds:
        if kind not in QUESTIONS:
            raise ValueError(f"kinds has '{kind}', which does not exist: {nearest(str(kind), list(QUESTIONS))}")
    alphabet = LETTERS[:letters]

    def draw(rng: random.Random) -> tuple[str, Content]:
        kind = rng.choice(list(kinds))
        length = rng.randint(min_length, max_length)
        # few letters where they are counted, so that there is something to count
        some = rng.sample(alphabet, min(letters, 3)) if kind == "count" else alphabet
        drawn = "".join(rng.choice(some) for _ in range(length))
        if kind == "palindrome":
            drawn = drawn[: (length + 1) // 2] + drawn[: length // 2][::-1]
            if rng.random() < 0.5:
                at = rng.randrange(length)
                drawn = drawn[:at] + rng.choice(alphabet) + drawn[at + 1 :]
        letter = rng.choice(some) if kind == "count" else ""
        content = kind, drawn, letter, rng.randint(2, 9) if kind == "caesar" else 0
        return repr(content), content

    words = pieces(*QUESTIONS.values(), DIGITS, "-,=", "yes", "no", *(f"{letter} {letter}" for letter in LETTERS))
    told = {"prompt": prompt, "name": "string_manipulation", "rule": "choice.short_answer", "words": words}
    return endless(draw, _write, seed=seed, heldout_size=heldout_size, **told)


def _write(rng: random.Random, content: Content) -> Written | None:
    kind, drawn, letter, shift = content
    shown = "-".join(drawn)
    if kind == "count":
        marks = [f"{at}" for at, each in enumerate(drawn, start=1) if each == letter]
        return Written(QUESTIONS[kind].format(letter, shown), str(len(marks)), ",".join(marks))
    if kind == "palindrome":
        pairs = [f"{a}{'=' if a == b else '-'}{b}" for a, b in zip(drawn, drawn[::-1], strict=True)][: len(drawn) // 2]
        return Written(QUESTIONS[kind].format(shown), "yes" if drawn == drawn[::-1] else "no", ",".join(pairs))
    if kind == "caesar":
        result = "".join(LETTERS[(LETTERS.index(each) + shift) % 26] for each in drawn)
        thought = ",".join(f"{a}={b}" for a, b in zip(drawn, result, strict=True))
        question = QUESTIONS[kind].format(shown, shift)
    elif kind == "sort":
        result, question = "".join(sorted(drawn)), QUESTIONS[kind].format(shown)
        thought = ",".join(f"{each}={drawn.count(each)}" for each in sorted(set(drawn)))
    else:
        result, question = drawn[::-1], QUESTIONS[kind].format(shown)
        thought = ",".join(result)
    return None if result in RESERVED else Written(question, "-".join(result), thought)
