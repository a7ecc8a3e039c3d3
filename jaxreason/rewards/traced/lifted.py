"""Rules that an automaton decides: it runs over the bytes of every token once, on the host, and then over token ids.

Such a rule is a scan of one gather a token over small tables that it closes over (`jaxreason.automata` lifts them). It is exact
however the tokenizer cuts the text. What they share with the other traced rules is here too: what a rule is, what a token id
outside the vocabulary means, and how parts add up.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int32

from jaxreason.automata import DEAD, byte_columns, compile_regex, lift, merge_columns, numbered, think_answer_pattern
from jaxreason.batch import PromptBatch

_TOO_LARGE = 2**31 + 1  # a magnitude that no int32 has: where the value saturates


class TracedRule(Protocol):
    """A pure, jittable rule on token ids: the traced counterpart of `jaxreason.types.RewardFn`."""

    def __call__(
        self, prompts: PromptBatch, completion: Int32[Array, "P G T"], mask: Bool[Array, "P G T"]
    ) -> Float[Array, "P G"]: ...


def think_answer_format(vocabulary: Sequence[bytes | None], eos_ids: Sequence[int], *, pattern: str | None = None) -> TracedRule:
    r"""1 if the text matches `pattern` in full and the completion then ended by EOS; else 0.

    The default pattern is DeepSeek-R1's format (arXiv:2501.12948, Table 1): one think block and then one answer block,
    nothing outside but white space between them; thinking may be empty, the answer may not, and neither holds a tag.
    EOS must be the last token that the mask keeps, so a truncated completion gets 0. Raises ValueError if no sequence
    of the vocabulary's tokens can match.
    """
    pattern = think_answer_pattern() if pattern is None else pattern
    eos = checked_eos(vocabulary, eos_ids)
    if not eos:
        raise ValueError("eos_ids is empty, but only a completion that ends by EOS is well formed; give its EOS ids")

    automaton = lift(compile_regex(pattern), [*vocabulary, None])
    ended = len(automaton.accepting)  # one more state, from which every token is dead
    table = np.pad(automaton.transitions, ((0, 1), (0, 0)), constant_values=DEAD)
    table[:, eos] = DEAD
    table[np.flatnonzero(automaton.accepting)[:, None], np.array(eos)[None, :]] = ended
    class_of, table = merge_columns(table)
    if not reachable(table, automaton.start)[ended]:
        raise ValueError(f"no sequence of the vocabulary's {len(vocabulary)} tokens matches {pattern[:80]!r}")

    def rule(prompts: PromptBatch, completion: Array, mask: Array) -> Array:
        transitions = jnp.asarray(table)

        def advance(state, token):
            symbol, chosen = token
            return jnp.where(chosen, transitions[state, symbol], state), None

        start = jnp.full(completion.shape[:2], automaton.start, jnp.int32)
        state, _ = jax.lax.scan(advance, start, (time_first(look_up(class_of, completion)), time_first(mask)))
        return (state == ended).astype(jnp.float32)

    return rule


def matches(vocabulary: Sequence[bytes | None], eos_ids: Sequence[int], *, pattern: str) -> TracedRule:
    r"""1 if `pattern` matches the whole text, which ends at the first EOS; else 0. Host twin: `pattern.matches`.

    `[\s\S]*wait[\s\S]*` asks whether it occurs. How the completion ended does not count; `think_answer_format(pattern=...)`
    also asks for an end by EOS. `jaxreason.automata.compile_regex` says what a pattern may hold. Raises ValueError if no
    sequence of the vocabulary's tokens can match.
    """
    eos = checked_eos(vocabulary, eos_ids)
    automaton = lift(compile_regex(pattern), without(eos, vocabulary))
    class_of, table = merge_columns(automaton.transitions)
    if not (reachable(table, automaton.start) & automaton.accepting).any():
        raise ValueError(f"no sequence of the vocabulary's {len(vocabulary)} tokens matches {pattern[:80]!r}")

    def rule(prompts: PromptBatch, completion: Array, mask: Array) -> Array:
        transitions = jnp.asarray(table)

        def advance(state, token):
            symbol, chosen = token
            return jnp.where(chosen, transitions[state, symbol], state), None

        start = jnp.full(completion.shape[:2], automaton.start, jnp.int32)
        read = mask & before_eos(completion, mask, eos_ids=eos)
        state, _ = jax.lax.scan(advance, start, (time_first(look_up(class_of, completion)), time_first(read)))
        return jnp.asarray(automaton.accepting)[state].astype(jnp.float32)

    return rule


def integer_answer(
    vocabulary: Sequence[bytes | None], eos_ids: Sequence[int], *, open: str = "<answer>", close: str = "</answer>"
) -> TracedRule:
    """1 if the text from the last `open` tag to the first `close` tag after it is an integer equal to `prompts.answer`.

    An integer is decimal digits with an optional minus, white space around it allowed; its value is Horner's rule over
    the tokens, v <- v 10^k + c for a token that adds k digits, saturating: an overflow is wrong and never wraps. The
    text ends at the first EOS. EOS itself is not required: a truncated completion that closed its answer has answered,
    and the format rule is the one that asks for an end. `prompts.answer` is -2^31 where the reference is no
    integer, so that no answer but that very number is right there. Raises ValueError if a tag is empty, if `close`
    starts as an integer could go on, or if no sequence of the vocabulary's tokens spells an integer between the tags.
    """
    machine = _IntegerMachine(open.encode(), close.encode())
    eos = checked_eos(vocabulary, eos_ids)
    table, scale, add = machine.lift(without(eos, vocabulary))
    states = len(table)
    class_of, merged = merge_columns(np.concatenate([table, scale, add]))
    table, scale, add = merged[:states].astype(np.int32), merged[states : 2 * states], merged[2 * states :]
    if not reachable(table, 0)[machine.closed].any():
        raise ValueError(
            f"no sequence of the vocabulary's {len(vocabulary)} tokens spells {open!r}, an integer and {close!r}; "
            "give tags that the tokenizer can write"
        )
    # Up to this value, value * scale + add is at most _TOO_LARGE, hence exact in uint32.
    limit = np.where(scale == 0, _TOO_LARGE, (_TOO_LARGE - add) // np.maximum(scale, 1)).astype(np.uint32)

    def rule(prompts: PromptBatch, completion: Array, mask: Array) -> Array:
        moves, scales, adds, limits = (jnp.asarray(one) for one in (table, scale, add, limit))
        read = mask & before_eos(completion, mask, eos_ids=eos)

        def advance(carry, token):
            (state, value), (symbol, chosen) = carry, token
            exact = value * scales[state, symbol] + adds[state, symbol]
            grown = jnp.where(value > limits[state, symbol], jnp.uint32(_TOO_LARGE), exact)
            return (jnp.where(chosen, moves[state, symbol], state), jnp.where(chosen, grown, value)), None

        carry = jnp.zeros(completion.shape[:2], jnp.int32), jnp.zeros(completion.shape[:2], jnp.uint32)
        tokens = time_first(look_up(class_of, completion)), time_first(read)
        (state, value), _ = jax.lax.scan(advance, carry, tokens)
        answer = prompts.answer[:, None]
        magnitude = jax.lax.bitcast_convert_type(jnp.abs(answer), jnp.uint32)  # |-2^31| wraps to the bits of 2^31
        same_sign = (jnp.asarray(machine.negative)[state] == (answer < 0)) | (magnitude == 0)
        return (jnp.asarray(machine.closed)[state] & (value == magnitude) & same_sign).astype(jnp.float32)

    return rule


def weighted_total(parts: Mapping[str, Float[Array, "P G"]], weights: Mapping[str, float]) -> Float[Array, "P G"]:
    """sum_k weights[k] parts[k], over parts `[P, G]`; raises ValueError unless both name the same rules."""
    if not parts or set(parts) != set(weights):
        raise ValueError(f"parts {sorted(parts)} and weights {sorted(weights)} must name the same rules, at least one")
    terms = [parts[name] * weights[name] for name in sorted(parts)]
    return sum(terms[1:], start=terms[0])


# Where the answer's text stands; _CLOSE + j is 'j bytes of the close tag read'.
_OUTSIDE, _OPENED, _MINUS, _DIGITS, _SPACE, _CLOSED, _CLOSE = range(7)
_NO_TEXT = 256  # the byte of a token without text: it matches nothing


class _IntegerMachine:
    """The byte automaton of `open integer close`, with what each byte does to the value: value * scale + add.

    A state is (bytes of `open` matched so far, place, minus seen); state 0 is the start. `transitions`, `scale`, `add`
    are [S, 257], `closed` and `negative` [S] bool: an answer was closed since the last `open`, and its sign.
    """

    def __init__(self, opening: bytes, closing: bytes):
        if not opening or not closing or closing[0] in b"0123456789- \t\n\r\f\v":
            raise ValueError(
                f"the tags {opening.decode()!r} and {closing.decode()!r} cannot delimit an integer; neither may be "
                "empty, and the closing one may not begin with a digit, a minus or white space"
            )
        self.opening, self.closing = opening, closing
        order, self.transitions = numbered((0, _OUTSIDE, False), self.follow, symbols=257)
        self.closed = np.array([place == _CLOSED for _, place, _ in order])
        self.negative = np.array([minus for *_, minus in order])
        # The value is written on a digit inside the answer, wiped when a tag opens, and else kept.
        place = np.array([place for _, place, _ in order])[self.transitions]
        opened = np.array([matched == len(opening) for matched, *_ in order])[self.transitions]
        self.scale = np.where(opened, 0, np.where(place == _DIGITS, 10, 1))
        self.add = np.where(place == _DIGITS, np.arange(257) - ord("0"), 0)

    def follow(self, state: tuple[int, int, bool], byte: int) -> tuple[int, int, bool]:
        matched, place, minus = state
        read = self.opening[:matched] + bytes([byte]) if byte != _NO_TEXT else b""
        longest = min(matched + 1, len(self.opening))
        matched = max(k for k in range(longest + 1) if read.endswith(self.opening[:k]))  # as Knuth, Morris and Pratt
        if matched == len(self.opening):
            return matched, _OPENED, False
        place = self.place_after(place, byte)
        return matched, place, (minus or place == _MINUS) and place != _OUTSIDE

    def place_after(self, place: int, byte: int) -> int:
        if place == _CLOSED:
            return _CLOSED
        if byte == _NO_TEXT:
            return _OUTSIDE
        if place in (_OPENED, _MINUS, _DIGITS) and byte in b"0123456789":
            return _DIGITS
        if place == _OPENED and byte == ord("-"):
            return _MINUS
        if byte in b" \t\n\r\f\v" and place in (_OPENED, _DIGITS, _SPACE):
            return _OPENED if place == _OPENED else _SPACE
        done = 0 if place in (_DIGITS, _SPACE) else place - _CLOSE
        if done >= 0 and byte == self.closing[done]:
            return _CLOSED if done + 1 == len(self.closing) else _CLOSE + done + 1
        return _OUTSIDE

    def lift(self, vocabulary: Sequence[bytes | None]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Next state, scale and add of each token from each state, `[S, V]` uint32, scale and add saturated."""
        shape = len(self.transitions), len(vocabulary)
        table = np.repeat(np.arange(shape[0], dtype=np.uint32)[:, None], shape[1], axis=1)
        scale, add = np.ones(shape, np.uint32), np.zeros(shape, np.uint32)
        for ids, column in byte_columns(vocabulary):
            before = table[:, ids], column[None, :]
            factor = self.scale[before]
            scale[:, ids] = np.minimum(scale[:, ids] * factor, _TOO_LARGE)
            add[:, ids] = np.minimum(add[:, ids] * factor + self.add[before], _TOO_LARGE)
            table[:, ids] = self.transitions[before]
        table[:, [token for token, text in enumerate(vocabulary) if text is None]] = self.transitions[:, [_NO_TEXT]]
        return table, scale, add


def checked_eos(vocabulary: Sequence[bytes | None], eos_ids: Sequence[int]) -> list[int]:
    """The EOS ids in order, each once; raises ValueError for one outside the vocabulary."""
    eos = sorted({int(token) for token in eos_ids})
    if any(not 0 <= token < len(vocabulary) for token in eos):
        raise ValueError(f"eos_ids {eos} must be ids of the vocabulary, which has {len(vocabulary)} tokens")
    return eos


def without(eos: Sequence[int], vocabulary: Sequence[bytes | None]) -> list[bytes | None]:
    """The vocabulary with EOS having no text, and one more entry without text, for ids outside it."""
    ends = set(eos)
    return [None if token in ends else text for token, text in enumerate([*vocabulary, None])]


def before_eos(completion: Int32[Array, "P G T"], mask: Bool[Array, "P G T"], *, eos_ids: Sequence[int]) -> Bool[Array, "P G T"]:
    """True up to the first EOS that the mask keeps, and not at it."""
    is_eos = jnp.any(completion[..., None] == jnp.asarray(eos_ids, jnp.int32).reshape(1, 1, 1, -1), axis=-1) & mask
    return jnp.cumsum(is_eos.astype(jnp.int32), axis=-1) == 0


def reachable(table: np.ndarray, start: int) -> np.ndarray:
    """Which states some sequence of symbols leads to, `[S]` bool."""
    seen = np.zeros(len(table), dtype=bool)
    todo = [int(start)]
    while todo:
        state = todo.pop()
        if not seen[state]:
            seen[state] = True
            todo.extend(np.unique(table[state]).tolist())
    return seen


def look_up(per_token: np.ndarray, completion: Int32[Array, "P G T"]) -> Array:
    """`per_token[completion]`, ids outside the vocabulary taken as its last entry, which stands for 'no text'."""
    last = len(per_token) - 1
    return jnp.asarray(per_token)[jnp.where((completion >= 0) & (completion < last), completion, last)]


def time_first(array: Array) -> Array:
    """[P, G, T] as [T, P, G], which is what a scan over tokens reads."""
    return jnp.moveaxis(array, -1, 0)
