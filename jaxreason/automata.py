"""Regular expressions and the search for strings as byte automata, and byte automata lifted to a vocabulary.

A tokenizer cuts text wherever it likes: `</answer>` may be one token, five tokens, or the end of one and the start of
the next. An automaton over *bytes* does not care. Lifting runs every token's bytes from every state once, on the host,
so that on the device one gather a token, `state = transitions[state, token]`, is exact for merged, split and straddling
tokens.

Conventions: state 0 is dead (nothing accepts from it, and no other state is so), matching is full-match, and bytes are
read with ASCII meaning. NumPy and the standard library only: the tables are made on the host and used anywhere.
Absent on purpose: anchors, back-references and lookaround, which are either pointless in a full match or not regular.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import NamedTuple, TypeVar

import numpy as np

State = TypeVar("State")
DEAD = 0
NONE, STEP, STOP = 0, 1, 2  # what a search finds, the stronger the larger
INTEGER = r"-?[0-9]+"
MAX_STATES = 4096  # beyond this a pattern is a mistake: counted repeats multiply, and subsets can double at each byte

_DIGIT = frozenset(b"0123456789")
_SPACE = frozenset(b" \t\n\r\f\v")
_WORD = frozenset(b"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_")
_ALL = frozenset(range(256))
_CLASSES = {"d": _DIGIT, "s": _SPACE, "w": _WORD, "D": _ALL - _DIGIT, "S": _ALL - _SPACE, "W": _ALL - _WORD}
_CONTROL = {"n": 10, "t": 9, "r": 13, "f": 12, "v": 11, "a": 7, "0": 0}


class ByteAutomaton(NamedTuple):
    """A deterministic automaton over bytes: `transitions [S, 256]` int32, `start`, `accepting [S]` bool; 0 is dead."""

    transitions: np.ndarray
    start: int
    accepting: np.ndarray


class TokenAutomaton(NamedTuple):
    """The same over token ids: `transitions [S, V]` int32, `start`, `accepting [S]` bool; 0 is dead."""

    transitions: np.ndarray
    start: int
    accepting: np.ndarray


class SearchAutomaton(NamedTuple):
    """Where strings end in a text: `transitions [S, 256]` int32, `event [S, 256]` int8; it starts in 0, none is dead."""

    transitions: np.ndarray
    event: np.ndarray


def compile_regex(pattern: str) -> ByteAutomaton:
    r"""The smallest automaton that accepts the byte strings which `pattern` matches in full.

    Known: literals (as UTF-8), `\d \s \w` and their negations, `\n \t \r \f \v \xHH`, escaped punctuation, `.` (every
    byte but a newline), `[a-z]` and `[^a-z]` over bytes, `( )`, `(?: )`, `|`, `* + ? {m} {m,} {,n} {m,n}`, each also in
    its lazy form, which means the same here. Raises ValueError on anything else, and beyond MAX_STATES states.
    """
    node = _Parser(pattern).parse()
    nfa = _Nfa(pattern)
    start, end = nfa.new(), nfa.new()
    nfa.connect(node, start, end)
    return _determinise(nfa, start, end)


def compile_search(stops: Collection[bytes], steps: Collection[bytes]) -> SearchAutomaton:
    """Stop strings and step delimiters in one pass over a text (Aho and Corasick, Commun. ACM 18(6), 1975).

    `event[s, b]` is STOP if byte b ends a stop string, else STEP if it ends a delimiter that counts, else NONE. Of
    delimiters that overlap the one that ends first counts, and its bytes are part of no other: `aa` is once in `aaa`
    and twice in `aaaa`. Stop strings may overlap anything. After a stop the search begins anew. Raises ValueError for
    an empty string, and beyond MAX_STATES / 8 states (a string of n bytes brings up to n).
    """
    if b"" in [*stops, *steps]:
        raise ValueError("a stop string or step delimiter is empty, which every text holds; give at least one character")
    heads = [{string[:size] for string in strings for size in range(len(string))} for strings in (stops, steps)]

    def tail(read: bytes, heads: set[bytes]) -> bytes:  # all that a later match can still make use of
        return next((read[i:] for i in range(len(read)) if read[i:] in heads), b"")

    order = [(b"", b"")]  # the tail for stop strings; for delimiters, since the last that counted
    index = {order[0]: 0}
    used = sorted(set(b"".join([*stops, *steps])))  # any other byte leads to state 0
    rows, events = [], []
    for state in order:  # grows while we read it
        row, event = np.zeros(256, np.int32), np.zeros(256, np.int8)
        for byte in used:
            stop, step = (read + bytes([byte]) for read in state)
            if stop.endswith(tuple(stops)):
                event[byte] = STOP
                continue
            if step.endswith(tuple(steps)):
                event[byte], step = STEP, b""
            target = tail(stop, heads[0]), tail(step, heads[1])
            if target not in index:
                if len(order) >= MAX_STATES // 8:
                    raise ValueError(f"stop strings and delimiters need over {MAX_STATES // 8} states; give fewer or shorter ones")
                index[target] = len(order)
                order.append(target)
            row[byte] = index[target]
        rows.append(row)
        events.append(event)
    return SearchAutomaton(np.array(rows), np.array(events))


def lift(automaton: ByteAutomaton, vocabulary: Sequence[bytes | None], *, transparent: Collection[int] = ()) -> TokenAutomaton:
    """Run each token's bytes from each state: `transitions[s, v]` is where token v's bytes lead from s.

    None is a token without text: it leads to the dead state. Ids in `transparent` leave the state as it is, whatever
    their bytes. Raises ValueError for a transparent id outside the vocabulary.
    """
    states, size = len(automaton.accepting), len(vocabulary)
    table = np.repeat(np.arange(states, dtype=np.int32)[:, None], size, axis=1)
    for ids, column in byte_columns(vocabulary):
        table[:, ids] = automaton.transitions[table[:, ids], column[None, :]]
    table[:, [token for token, text in enumerate(vocabulary) if text is None]] = DEAD
    for token in transparent:
        if not 0 <= token < size:
            raise ValueError(f"transparent id {token} is outside the vocabulary; give ids from 0 to {size - 1}")
        table[:, token] = np.arange(states)
    return TokenAutomaton(table, automaton.start, automaton.accepting)


def accepts(automaton: ByteAutomaton | TokenAutomaton, symbols: Iterable[int]) -> bool:
    """Whether the automaton accepts these bytes, or these token ids."""
    state = automaton.start
    for symbol in symbols:
        state = automaton.transitions[state, symbol]
    return bool(automaton.accepting[state])


def byte_columns(vocabulary: Sequence[bytes | None]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """For each byte position, the ids of the tokens that reach it and their bytes there: `(ids [n], bytes [n])`."""
    length = np.array([len(text or b"") for text in vocabulary], dtype=np.int64)
    first = np.cumsum(length) - length  # where each token starts in the concatenation
    data = np.frombuffer(b"".join(text or b"" for text in vocabulary), dtype=np.uint8)
    for position in range(int(length.max(initial=0))):
        ids = np.flatnonzero(length > position)
        yield ids, data[first[ids] + position]


def numbered(start: State, follow: Callable[[State, int], State], *, symbols: int) -> tuple[list[State], np.ndarray]:
    """The states that are met from `start`, by number from 0, and their transitions [S, symbols] int32."""
    order, index, rows = [start], {start: 0}, []
    for state in order:  # grows while we read it
        row = [follow(state, symbol) for symbol in range(symbols)]
        for after in row:
            if after not in index:
                index[after] = len(order)
                order.append(after)
        rows.append([index[after] for after in row])
    return order, np.array(rows, dtype=np.int32)


def merge_columns(table: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Store equal columns once: `(column_of [V] int32, small [S, C])` with `small[:, column_of] == table`.

    Most tokens of a large vocabulary act alike (no digit, no piece of a tag), so C is tiny and the device holds
    `[S, C]` and `[V]` instead of `[S, V]`.
    """
    known: dict[bytes, int] = {}
    rows = np.ascontiguousarray(table.T)
    column_of = np.array([known.setdefault(row.tobytes(), len(known)) for row in rows], dtype=np.int32)
    _, first = np.unique(column_of, return_index=True)
    return column_of, np.ascontiguousarray(table[:, first])


def text_without(tags: Sequence[str]) -> str:
    """A pattern for non-empty text in which none of `tags` occurs.

    The tags must share a first character that none of them repeats, as `<` in `<think>` and `</think>`. Then text is
    cut at each such character, and a piece is fine unless it goes on as a tag does: no lookahead is needed.
    """
    opener = tags[0][:1]
    if any(len(tag) < 2 or tag[0] != opener or opener in tag[1:] for tag in tags):
        raise ValueError(f"the tags {list(tags)} must begin with one character that none repeats, as '<' in '<a>'")
    other = f"[^{re.escape(opener)}]"

    def rest(words: list[str]) -> str:  # text without the opener that starts with none of the words
        heads = sorted({word[0] for word in words})
        branches = ["", f"[^{re.escape(opener)}{''.join(map(re.escape, heads))}]{other}*"]
        for head in heads:
            tails = [word[1:] for word in words if word[0] == head]
            if "" not in tails:
                branches.append(re.escape(head) + rest(tails))
        return f"(?:{'|'.join(branches)})"

    piece = re.escape(opener) + rest([tag[1:] for tag in tags])
    return f"(?:{other}+|{piece})(?:{piece})*"


def think_answer_pattern(*, answer: str | None = None) -> str:
    """The pattern of DeepSeek-R1's format (arXiv:2501.12948, Table 1): one think block and then one answer block.

    Nothing is outside but white space between them; thinking may be empty, and neither block holds a tag. `answer` is
    the pattern of what stands in the answer block, as INTEGER; by default any text that is not empty.
    """
    inside = text_without(("<think>", "</think>", "<answer>", "</answer>"))
    return rf"<think>(?:{inside})?</think>\s*<answer>(?:{inside if answer is None else answer})</answer>"


# A parsed pattern is a tree of tuples: ("bytes", set), ("cat", nodes), ("alt", nodes), ("repeat", node, least, most).


class _Parser:
    """Recursive descent over the pattern's characters; `at` is the next one to read."""

    def __init__(self, pattern: str):
        self.pattern, self.at = pattern, 0

    def fail(self, what: str) -> ValueError:
        return ValueError(f"cannot compile the pattern {self.pattern!r}: {what} at position {self.at}")

    def take(self, text: str) -> bool:
        found = self.pattern.startswith(text, self.at)
        self.at += len(text) * found
        return found

    def next(self, expected: str) -> str:
        if self.at == len(self.pattern):
            raise self.fail(f"it ends where {expected} was expected,")
        self.at += 1
        return self.pattern[self.at - 1]

    def parse(self) -> tuple:
        node = self.alternation()
        if self.at < len(self.pattern):
            raise self.fail("')' without its '('")
        return node

    def alternation(self) -> tuple:
        branches = [self.sequence()]
        while self.take("|"):
            branches.append(self.sequence())
        return ("alt", branches)

    def sequence(self) -> tuple:
        parts = []
        while self.at < len(self.pattern) and self.pattern[self.at] not in "|)":
            parts.append(self.repeated(self.atom()))
        return ("cat", parts)

    def repeated(self, node: tuple) -> tuple:
        bounds = self.bounds()
        if bounds is None:
            return node
        self.take("?")  # lazy: the same language
        if self.pattern[self.at : self.at + 1] in ("*", "+", "?") or self.bounds() is not None:
            raise self.fail("a repeat of a repeat (put the inner one in a group; possessive repeats are not supported)")
        return ("repeat", node, *bounds)

    def bounds(self) -> tuple[int, int | None] | None:
        for sign, bounds in (("*", (0, None)), ("+", (1, None)), ("?", (0, 1))):
            if self.take(sign):
                return bounds
        counted = re.compile(r"\{([0-9]*)(,?)([0-9]*)\}").match(self.pattern, self.at)
        if counted is None or not (counted[1] or counted[2]):
            return None  # as in Python, a brace that is no count is a literal
        self.at = counted.end()
        least = int(counted[1] or 0)
        most = (int(counted[3]) if counted[3] else None) if counted[2] else least
        if most is not None and most < least:
            raise self.fail(f"a repeat of at least {least} and at most {most} times")
        return least, most

    def atom(self) -> tuple:
        if self.bounds() is not None:
            raise self.fail("nothing to repeat")
        char = self.next("a character")
        if char == "(":
            if self.take("?") and not self.take(":"):
                raise self.fail("lookaround, flags and named groups are not supported: only ( ) and (?: ) are,")
            node = self.alternation()
            if not self.take(")"):
                raise self.fail("a '(' is not closed")
            return node
        if char in "^$":
            raise self.fail(f"the anchor {char!r} is not supported (matching is full-match, so leave it out),")
        if char == ".":
            return ("bytes", _ALL - {10})
        if char == "[":
            return ("bytes", self.byte_class())
        if char == "\\":
            return ("bytes", self.escape())
        return ("cat", [("bytes", frozenset((byte,))) for byte in char.encode()])

    def escape(self) -> frozenset[int]:
        char = self.next("an escaped character")
        if char in _CLASSES:
            return _CLASSES[char]
        if char == "x":
            digits = self.pattern[self.at : self.at + 2]
            if not re.fullmatch("[0-9a-fA-F]{2}", digits):
                raise self.fail(r"\x without two hexadecimal digits")
            self.at += 2
            return frozenset((int(digits, 16),))
        if char in _CONTROL and not (char == "0" and self.pattern[self.at : self.at + 1].isdigit()):
            return frozenset((_CONTROL[char],))
        if char.isalnum() or not char.isascii():
            raise self.fail(f"the escape \\{char} is not supported (nor are back-references and \\b),")
        return frozenset((ord(char),))

    def byte_class(self) -> frozenset[int]:
        negated, chosen, first = self.take("^"), set(), True
        while first or not self.take("]"):
            first = False
            low = self.class_member()
            if self.pattern[self.at : self.at + 1] == "-" and self.pattern[self.at + 1 : self.at + 2] not in ("]", ""):
                self.at += 1
                high = self.class_member()
                if len(low) > 1 or len(high) > 1 or min(high) < min(low):
                    raise self.fail("a bad range in a character class")
                chosen.update(range(min(low), min(high) + 1))
            else:
                chosen.update(low)
        return _ALL - chosen if negated else frozenset(chosen)

    def class_member(self) -> frozenset[int]:
        char = self.next("']'")
        if char == "\\":
            return self.escape()
        if not char.isascii():
            raise self.fail(f"{char!r} in a character class, which is over bytes (use an alternation for it),")
        return frozenset((ord(char),))


class _Nfa:
    """Thompson's construction: a state has empty moves, and at most one move on a set of bytes."""

    def __init__(self, pattern: str):
        self.pattern = pattern
        self.empty: list[list[int]] = []
        self.move: list[tuple[frozenset[int], int] | None] = []

    def new(self) -> int:
        if len(self.move) >= 16 * MAX_STATES:
            raise ValueError(f"the pattern {self.pattern[:80]!r} is too large; lower the counts of its repeats")
        self.empty.append([])
        self.move.append(None)
        return len(self.move) - 1

    def connect(self, node: tuple, start: int, end: int) -> None:
        """Build `node` between two states; `start` may have empty moves already, but no byte move."""
        kind = node[0]
        if kind == "bytes":
            before = self.new()
            self.empty[start].append(before)
            self.move[before] = (node[1], end)
        elif kind == "alt":
            for branch in node[1]:
                self.connect(branch, start, end)
        elif kind == "cat":
            for part in node[1]:
                after = self.new()
                self.connect(part, start, after)
                start = after
            self.empty[start].append(end)
        else:
            _, inner, least, most = node
            if most is None:  # least copies, then a loop
                loop = self.new()
                self.connect(("cat", [inner] * least), start, loop)
                after = self.new()
                self.connect(inner, loop, after)
                self.empty[after].append(loop)
                self.empty[loop].append(end)
                return
            for copy in range(most):
                if copy >= least:
                    self.empty[start].append(end)
                after = self.new()
                self.connect(inner, start, after)
                start = after
            self.empty[start].append(end)

    def closure(self, states: Iterable[int]) -> frozenset[int]:
        """The states with a byte move, and the ends, that empty moves reach."""
        seen, todo = set(), list(states)
        while todo:
            state = todo.pop()
            if state not in seen:
                seen.add(state)
                todo.extend(self.empty[state])
        return frozenset(state for state in seen if self.move[state] is not None or not self.empty[state])


def _determinise(nfa: _Nfa, start: int, end: int) -> ByteAutomaton:
    """Subset construction over classes of bytes that no set tells apart, then minimisation."""
    sets = sorted({move[0] for move in nfa.move if move is not None}, key=sorted)
    class_of_key: dict[tuple[bool, ...], int] = {}
    class_of = [class_of_key.setdefault(tuple(b in one for one in sets), len(class_of_key)) for b in range(256)]
    sample = [class_of.index(c) for c in range(len(class_of_key))]  # one byte of each class

    first = nfa.closure((start,))
    order: list[frozenset[int]] = [frozenset(), first]
    index = {subset: position for position, subset in enumerate(order)}
    rows: list[list[int]] = []
    for subset in order:  # grows while we read it
        moves = [move for state in subset if (move := nfa.move[state]) is not None]
        row = []
        for byte in sample:
            target = nfa.closure(to for one, to in moves if byte in one)
            if target not in index:
                if len(order) >= MAX_STATES:
                    raise ValueError(
                        f"the pattern {nfa.pattern[:80]!r} needs more than {MAX_STATES} states; lower its repeat counts"
                    )
                index[target] = len(order)
                order.append(target)
            row.append(index[target])
        rows.append(row)
    accepting = np.array([end in subset for subset in order])
    block, first_of = _equivalence(np.array(rows, dtype=np.int32), accepting)
    small = block[np.array(rows, dtype=np.int32)[first_of]]
    return ByteAutomaton(small[:, class_of].astype(np.int32), int(block[index[first]]), accepting[first_of])


def _equivalence(transitions: np.ndarray, accepting: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Moore's refinement: each state's block, and each block's first state; blocks are numbered in that order."""
    block, count = accepting.astype(np.int32), 0
    while True:
        signature = np.concatenate([block[:, None], block[transitions]], axis=1)
        known: dict[bytes, int] = {}
        block = np.array([known.setdefault(row.tobytes(), len(known)) for row in signature], dtype=np.int32)
        if len(known) == count:
            return block, np.unique(block, return_index=True)[1]
        count = len(known)
