"""Where a completion ends before its length, and what it may say: byte automata as tables of token ids.

Stop strings and step delimiters are searched for in one pass, and a regular expression can bound what is sampled. On
the host each token's bytes are run from every state once; in the jitted loop a token then costs a few gathers of one
row, and the answer is the one of a search in the decoded text, however the tokenizer cuts it. Tables are arguments of
the loop, with sizes rounded up, so that another set of strings or another pattern seldom compiles again.

A token without text (None in the vocabulary: an EOS, padding) changes no search, as it is not seen in the text. A
search reads what it is given from state 0 on: start there with the completion, and the prompt's bytes do not count.
Absent on purpose: end-of-sequence ids as stops, which are a comparison of ids and belong to the loop.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int8, Int32, UInt32

from jaxreason.automata import (
    DEAD,
    NONE,
    STEP,
    STOP,
    SearchAutomaton,
    byte_columns,
    compile_regex,
    compile_search,
    lift,
    merge_columns,
)

_CHUNK = 8192  # tokens whose table is made at a time, before equal columns are merged
_SIZES = 32, 64  # fewest rows and columns of a table that is not empty: most sets of strings have this one shape


class Machine(NamedTuple):
    """A search for stop strings and step delimiters over token ids; its state is an int32 that begins with 0."""

    column_of: Int32[Array, " V"]
    next: Int32[Array, "Q C"]
    event: Int8[Array, "Q C"]
    after: Int32[Array, "Q C"]
    steps: Int32[Array, "Q C"]


class Found(NamedTuple):
    """What one token brought."""

    state: Int32[Array, "*N"]  # the next one; 0 after a stop
    event: Int8[Array, "*N"]  # STOP if a stop string ended in it, else STEP if a delimiter did, else NONE
    after: Int32[Array, "*N"]  # its bytes that follow the first stop string, or else the last delimiter; 0 without either
    steps: Int32[Array, "*N"]  # delimiters that ended in it, before the end of the stop string if there is one


class Cut(NamedTuple):
    """A completion's text up to its stop string."""

    text: str
    stop: str | None  # the stop string that ended it
    after: int  # bytes left out because they follow the stop string: they are in the tokens and not in the text


class StopStrings(NamedTuple):
    """The strings that end a run's completions, as the device looks for them and as the host cuts at them."""

    strings: tuple[str, ...]
    vocabulary: Sequence[bytes | None]
    machine: Any  # a Machine of NumPy arrays, which belong to no device


class Grammar(NamedTuple):
    """A regular expression over token ids. State 0 is 'over', by an EOS or beyond repair: EOS alone is allowed there."""

    column_of: Int32[Array, " V"]
    next: Int32[Array, "Q C"]
    legal: UInt32[Array, "W V"]  # bit q % 32 of legal[q // 32, v]: token v is allowed in state q
    start: Int32[Array, ""]


def stop_machine(vocabulary: Sequence[bytes | None], *, stops: Sequence[str] = (), steps: Sequence[str] = ()) -> Machine:
    """The search for `stops` and `steps` in the text of a vocabulary's tokens.

    The stop string that ends first counts, and beats a delimiter that ends at the same byte; delimiters count without
    overlap, from left to right (`jaxreason.automata.compile_search`). A stop anywhere in a token beats a delimiter in
    it, as the completion is over with that token. Without any string the tables have one state and one column.
    Raises ValueError for an empty string.
    """
    wanted = _encoded("stops", stops), _encoded("steps", steps)
    if not any(wanted):
        column_of, tables = np.zeros(len(vocabulary), np.int32), [np.zeros((1, 1), np.int32)] * 4
    else:
        search = compile_search(*wanted)
        by_byte = np.concatenate([search.transitions, search.event])
        texts = [text or b"" for text in vocabulary]
        column_of, table = _merged(texts, by_byte, lambda some: _lift_search(search, some))
        tables = [_padded(part) for part in np.split(table, 4)]
    following, event, *counts = tables
    return Machine(*(jnp.asarray(table) for table in (column_of, following, event.astype(np.int8), *counts)))


def stop_strings(strings: tuple[str, ...], vocabulary: Sequence[bytes | None]) -> StopStrings | None:
    """Where there are any, ready for a training run's programs, of which their tables are constants."""
    machine = stop_machine(vocabulary, stops=strings) if strings else None
    return None if machine is None else StopStrings(strings, vocabulary, jax.tree.map(np.asarray, machine))


def step(machine: Machine, state: Int32[Array, "*N"], token: Int32[Array, "*N"]) -> Found:
    """Read one token in each row: the next state, and what ended in the token."""
    at = state, machine.column_of[token]
    return Found(machine.next[at], machine.event[at], machine.after[at], machine.steps[at])


def cut(tokens: Iterable[int], vocabulary: Sequence[bytes | None], *, stops: Sequence[str] = (), include_stop: bool = False) -> Cut:
    """The text of `tokens`, which a machine of the same `stops` read from state 0, up to the first stop string.

    Of stop strings that end at the same byte the longest is the one that counts, and is left out unless `include_stop`.
    What is not UTF-8, as the half of a character that was sampled last, becomes U+FFFD.
    """
    data = b"".join(vocabulary[int(token)] or b"" for token in tokens)
    found = [(data.find(stop) + len(stop), -len(stop), stop) for stop in _encoded("stops", stops) if stop in data]
    if not found:
        return Cut(data.decode(errors="replace"), None, 0)
    end, _, stop = min(found)
    kept = data[: end if include_stop else end - len(stop)]
    return Cut(kept.decode(errors="replace"), stop.decode(), len(data) - end)


def constrain(pattern: str, vocabulary: Sequence[bytes | None], *, eos_ids: Sequence[int]) -> Grammar:
    """The completions whose text `pattern` matches in full and which then end by an EOS.

    Patterns are those of `jaxreason.automata.compile_regex`; INTEGER and `think_answer_pattern` are ready-made there.
    A token is allowed if some sequence of the vocabulary's tokens leads from behind it to a full match. Tokens without
    text never are, and the EOS ids, whatever their text, exactly where the match is full. Raises ValueError if no
    sequence of tokens matches, and for EOS ids that are missing or outside the vocabulary.
    """
    size, eos = len(vocabulary), np.array(sorted({int(token) for token in eos_ids}), np.int32)
    if not len(eos) or eos[0] < 0 or eos[-1] >= size:
        raise ValueError(f"eos_ids {list(eos_ids)} must name at least one of the vocabulary's {size} tokens, to end a match")
    automaton = compile_regex(pattern)
    # an empty text would let a completion go on and say nothing, and an EOS does not go on
    texts = [None if token in eos_ids else text or None for token, text in enumerate(vocabulary)]
    column_of, table = _merged(texts, automaton.transitions, lambda some: lift(automaton, some).transitions)

    alive, before = automaton.accepting, None
    while before is None or (alive != before).any():
        alive, before = alive | alive[table].any(axis=1), alive
    if not alive[automaton.start]:
        raise ValueError(f"no sequence of the vocabulary's {size} tokens matches {pattern[:80]!r}; give another pattern")
    table = np.where(alive[table], table, DEAD)

    ends = automaton.accepting.copy()
    ends[DEAD] = True
    column_of[eos] = table.shape[1]
    legal = np.concatenate([table != DEAD, ends[:, None]], axis=1)
    table = np.pad(table, ((0, 0), (0, 1)), constant_values=DEAD)
    tables = column_of, _padded(table), _packed(_padded(legal))[:, column_of], np.int32(automaton.start)
    return Grammar(*(jnp.asarray(one) for one in tables))


def allowed(grammar: Grammar, state: Int32[Array, "*N"]) -> Bool[Array, "*N V"]:
    """Which tokens may come next in each row; at least one is."""
    bit = (state % 32).astype(jnp.uint32)[..., None]
    return (grammar.legal[state // 32] >> bit) & 1 == 1


def advance(grammar: Grammar, state: Int32[Array, "*N"], token: Int32[Array, "*N"]) -> Int32[Array, "*N"]:
    """The state after one token in each row; 0 after an EOS, and after a token that was not allowed."""
    return grammar.next[state, grammar.column_of[token]]


def _encoded(name: str, strings: Sequence[str]) -> list[bytes]:
    if isinstance(strings, str) or "" in strings:
        raise ValueError(f"{name} is {strings!r}, but must be a sequence of strings with at least one character each")
    return [string.encode() for string in strings]


def _lift_search(search: SearchAutomaton, texts: Sequence[bytes | None]) -> np.ndarray:
    """What each text does from each state: its next state, event, `after` and steps, one below the other, `[4 S, V]`."""
    shape = len(search.transitions), len(texts)
    state = np.repeat(np.arange(shape[0], dtype=np.int32)[:, None], shape[1], axis=1)
    event, steps, end = (np.zeros(shape, np.int32) for _ in range(3))
    for position, (ids, column) in enumerate(byte_columns(texts)):
        before = state[:, ids], column[None, :]
        found = search.event[before]
        row, place = np.nonzero((found != NONE) & (event[:, ids] != STOP))  # few, so what follows is cheap
        here, kind = (row, ids[place]), found[row, place]
        event[here] = kind
        steps[here] += kind == STEP
        end[here] = position + 1
        state[:, ids] = search.transitions[before]
    length = np.array([len(text or b"") for text in texts], np.int32)
    after = np.where(event != NONE, length[None, :] - end, 0)
    state[event == STOP] = 0
    return np.concatenate([state, event, after, steps])


def _merged(
    texts: Sequence[bytes | None], by_byte: np.ndarray, table_of: Callable[[Sequence[bytes | None]], np.ndarray]
) -> tuple[np.ndarray, np.ndarray]:
    """`merge_columns` of the table `[R, V]` of all texts, made for a chunk at a time and for different texts only.

    Texts are the same if their bytes' columns of `by_byte [R, 256]` are.
    """
    class_of, _ = merge_columns(by_byte)
    sample = bytes(np.unique(class_of, return_index=True)[1][class_of].tolist())  # for each byte, one that acts alike
    number: dict[bytes | None, int] = {}
    of_text = np.array([number.setdefault(text and text.translate(sample), len(number)) for text in texts])
    different = list(number)
    columns, parts, width = [], [], 0
    for first in range(0, len(different), _CHUNK):
        column_of, part = merge_columns(table_of(different[first : first + _CHUNK]))
        columns.append(column_of + width)
        parts.append(part)
        width += part.shape[1]
    column_of, table = merge_columns(np.concatenate(parts, axis=1))
    return column_of[np.concatenate(columns)[of_text]], table


def _padded(table: np.ndarray) -> np.ndarray:
    """With zeros to the next powers of two: rows and columns that nothing leads to."""
    sizes = [max(least, 1 << (size - 1).bit_length()) for size, least in zip(table.shape, _SIZES, strict=True)]
    return np.pad(table, [(0, size - old) for size, old in zip(sizes, table.shape, strict=True)])


def _packed(flags: np.ndarray) -> np.ndarray:
    """Flags `[Q, C]` as bits `[Q / 32, C]` uint32: a state's row is then read as it lies, not gathered token by token."""
    rows, columns = flags.shape
    bits = flags.reshape(rows // 32, 32, columns).astype(np.uint32) << np.arange(32, dtype=np.uint32)[None, :, None]
    return bits.sum(axis=1, dtype=np.uint32)
