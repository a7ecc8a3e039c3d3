"""The bytes of an answer between two tags, read off the tokens; and the rule that they are a number, exactly.

Where the last opening tag and the closing tag after it lie is found by an automaton lifted to the vocabulary, wherever the
tokenizer cut them. Then the bytes between are gathered into a short array [P, G, B], and a rule on them is plain array code:
`numeric_answer` here, `countdown` in game.py, and one of your own (docs/rewards.md has one).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int32

from jaxreason.automata import byte_columns, compile_regex, merge_columns, numbered
from jaxreason.batch import PromptBatch
from jaxreason.rewards.arithmetic import DECIMALS, INTEGER_DIGITS
from jaxreason.rewards.traced.lifted import TracedRule, before_eos, checked_eos, look_up, reachable, time_first, without

_NO_TEXT = b"\xff"  # stands for a token without text: a byte that is in no UTF-8 text
_SPACE = r"[ \t\n\r\f\v]*"
_NUMBER = rf"{_SPACE}[-+]?(?:[0-9]{{1,3}}(?:,[0-9]{{3}})+(?:\.[0-9]*)?|[0-9]+(?:\.[0-9]*)?|\.[0-9]+){_SPACE}"


class AnswerBytes(NamedTuple):
    """What stands between the tags: bytes, 0 beyond `length`; `length` is -1 where there is no answer, or it is too long."""

    bytes: Int32[Array, "P G B"]
    length: Int32[Array, "P G"]


def numeric_answer(
    vocabulary: Sequence[bytes | None],
    eos_ids: Sequence[int],
    *,
    open: str = "<answer>",
    close: str = "</answer>",
    max_bytes: int = 64,
) -> TracedRule:
    """1 if the text between the last `open` and the next `close` is a number equal to the reference; else 0.

    What a number is, and that 3.50 is 3.5, is said at its host twin, `arithmetic.numeric_answer`. Digits are compared place by
    place with `prompts.digits`, so nothing can overflow. EOS is not required. Raises ValueError as `answer_reader` does, and,
    when traced, if the prompts come without digits.
    """
    read = answer_reader(vocabulary, eos_ids, open=open, close=close, max_bytes=max_bytes)
    automaton = compile_regex(_NUMBER)
    class_of, table = merge_columns(automaton.transitions)
    places = INTEGER_DIGITS + DECIMALS

    def rule(prompts: PromptBatch, completion: Array, mask: Array) -> Array:
        if prompts.digits is None:
            raise ValueError("numeric_answer needs prompts.digits [P, 32], which data.batching.prompt_batch fills")
        text, length = read(completion, mask)
        at = jnp.arange(text.shape[-1], dtype=jnp.int32).reshape(1, 1, -1)
        inside = at < length[..., None]

        def advance(state, byte):
            symbol, within = byte
            return jnp.where(within, jnp.asarray(table)[state, symbol], state), None

        start = jnp.full(length.shape, automaton.start, jnp.int32)
        state, _ = jax.lax.scan(advance, start, (time_first(jnp.asarray(class_of)[text]), time_first(inside)))
        is_number = jnp.asarray(automaton.accepting)[state] & (length > 0)

        digit = (text >= ord("0")) & (text <= ord("9"))
        value = jnp.where(digit, text - ord("0"), 0)
        before = jnp.cumsum((text == ord(".")).astype(jnp.int32), axis=-1) == 0
        whole = jnp.sum(digit & before, axis=-1, keepdims=True, dtype=jnp.int32)
        place = INTEGER_DIGITS - whole + jnp.cumsum(digit.astype(jnp.int32), axis=-1) - 1
        fits = jnp.all((value == 0) | ((place >= 0) & (place < places)), axis=-1)
        sign = 1 - 2 * jnp.any(text == ord("-"), axis=-1, keepdims=True).astype(jnp.int32)
        digits = sign * gathered(value, place, places)
        same = jnp.all(digits == prompts.digits.astype(jnp.int32)[:, None], axis=-1)
        return (is_number & fits & same).astype(jnp.float32)

    return rule


def answer_reader(
    vocabulary: Sequence[bytes | None], eos_ids: Sequence[int], *, open: str, close: str, max_bytes: int
) -> Callable[[Array, Array], AnswerBytes]:
    """`(completion, mask) -> AnswerBytes`: the text from the last `open` to the first `close` after it, before the first EOS.

    Raises ValueError if a tag is empty, if `max_bytes` is below 1, or if no sequence of the vocabulary's tokens spells the tags.
    """
    if not open or not close or max_bytes < 1:
        raise ValueError(
            f"open is {open!r}, close {close!r} and max_bytes {max_bytes}: expected two tags with text, and 1 or more bytes"
        )
    eos = checked_eos(vocabulary, eos_ids)
    texts = [_NO_TEXT if text is None else text for text in without(eos, vocabulary)]
    machine = _TagMachine(open.encode(), close.encode())
    table, opened, closed = machine.lift(texts)
    states = len(table)
    class_of, merged = merge_columns(np.concatenate([table, opened, closed]))
    table, opened, closed = merged[:states], merged[states : 2 * states], merged[2 * states :]
    if not reachable(table, 0)[machine.is_closed].any():
        raise ValueError(
            f"no sequence of the vocabulary's {len(vocabulary)} tokens spells {open!r} and then {close!r}; "
            "give tags that the tokenizer can write"
        )
    size = np.array([len(text) for text in texts], np.int32)
    first = (np.cumsum(size) - size).astype(np.int32)
    data = np.frombuffer(b"".join(texts), np.uint8)
    closing = len(close.encode())

    def read(completion: Int32[Array, "P G T"], mask: Bool[Array, "P G T"]) -> AnswerBytes:
        symbol = look_up(class_of, completion)
        chosen = mask & before_eos(completion, mask, eos_ids=eos)

        def advance(state, token):
            symbol, chosen = token
            return jnp.where(chosen, jnp.asarray(table)[state, symbol], state), state

        begin = jnp.zeros(completion.shape[:2], jnp.int32)
        state, before = jax.lax.scan(advance, begin, (time_first(symbol), time_first(chosen)))
        before = jnp.moveaxis(before, 0, -1)
        sizes = jnp.where(chosen, look_up(size, completion), 0)
        ends = jnp.cumsum(sizes, axis=-1)

        def last(event: np.ndarray) -> Array:  # behind which byte the tag ended that was read last
            byte = jnp.asarray(event)[before, symbol]
            return jnp.max(jnp.where(chosen & (byte > 0), ends - sizes + byte, 0), axis=-1, initial=0)

        start = last(opened)
        length = last(closed) - closing - start
        length = jnp.where(jnp.asarray(machine.is_closed)[state] & (length <= max_bytes), length, -1)
        at = jnp.arange(max_bytes, dtype=jnp.int32).reshape(1, 1, -1)
        byte = start[..., None] + at
        token = jnp.minimum(_rank(ends, byte), completion.shape[-1] - 1)
        within = byte - jnp.take_along_axis(ends - sizes, token, axis=-1)
        place = look_up(first, jnp.take_along_axis(completion, token, axis=-1)) + within
        text = jnp.asarray(data)[jnp.clip(place, 0, len(data) - 1)].astype(jnp.int32)
        return AnswerBytes(jnp.where(at < length[..., None], text, 0), length)

    return read


def gathered(value: Int32[Array, "P G B"], place: Int32[Array, "P G B"], places: int) -> Int32[Array, "P G K"]:
    """The sum of the values at each place 0..K-1; those elsewhere are left out."""
    wanted = jnp.arange(places, dtype=jnp.int32).reshape(1, 1, 1, -1)
    return jnp.sum(jnp.where(place[..., None] == wanted, value[..., None], 0), axis=2)


def _rank(ends: Int32[Array, "P G T"], byte: Int32[Array, "P G B"]) -> Int32[Array, "P G B"]:
    """How many tokens end at or before each byte: the place of the token that holds it."""
    one = lambda row, wanted: jnp.searchsorted(row, wanted, side="right")  # noqa: E731
    return jax.vmap(jax.vmap(one))(ends, byte).astype(jnp.int32)


_OUTSIDE, _CLOSED, _INSIDE = range(3)  # _INSIDE + j: j bytes of the closing tag read


class _TagMachine:
    """The byte automaton that finds the last opening tag and the first closing tag after it.

    A state is (bytes of `opening` matched so far, place); state 0 is the start. `transitions` [S, 256], `is_closed` [S] bool.
    """

    def __init__(self, opening: bytes, closing: bytes):
        self.opening, self.closing = opening, closing
        order, self.transitions = numbered((0, _OUTSIDE), self.follow, symbols=256)
        self.is_closed = np.array([place == _CLOSED for _, place in order])
        self.is_opened = np.array([matched == len(opening) for matched, _ in order])

    def follow(self, state: tuple[int, int], byte: int) -> tuple[int, int]:
        matched, place = state
        matched = _longest(self.opening, self.opening[:matched] + bytes([byte]))
        if matched == len(self.opening):
            return matched, _INSIDE
        if place >= _INSIDE:
            done = _longest(self.closing, self.closing[: place - _INSIDE] + bytes([byte]))
            place = _CLOSED if done == len(self.closing) else _INSIDE + done
        return matched, place

    def lift(self, texts: Sequence[bytes]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Next state of each token from each state, `[S, V]`; behind which of its bytes a tag last opened, and closed (0: none)."""
        shape = len(self.transitions), len(texts)
        table = np.repeat(np.arange(shape[0], dtype=np.int32)[:, None], shape[1], axis=1)
        opened, closed = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
        for position, (ids, column) in enumerate(byte_columns(texts)):
            before = table[:, ids]
            after = self.transitions[before, column[None, :]]
            opened[:, ids] = np.where(self.is_opened[after], position + 1, opened[:, ids])
            closed[:, ids] = np.where(self.is_closed[after] & ~self.is_closed[before], position + 1, closed[:, ids])
            table[:, ids] = after
        return table, opened, closed


def _longest(tag: bytes, read: bytes) -> int:
    """The length of the longest beginning of `tag` that `read` ends with (Knuth, Morris and Pratt)."""
    return max(k for k in range(min(len(tag), len(read)) + 1) if read.endswith(tag[:k]))
