"""The Countdown game on tokens: an arithmetic expression, evaluated exactly, without a stack and without overflow.

An infix expression is its numbers in order with an operator between each two of them; parentheses only say which comes first.
Each operator's priority is twice its depth, plus one for * and /, and taking the highest first, of equals the leftmost, is
evaluation: every step replaces two neighbours by one number, so K numbers need K - 1 steps.

A value is a fraction num/den that is never reduced, held modulo nine primes below 2^16, so that products fit 32 bits. That is
exact: |num| + den of a sum, difference, product or quotient is at most the product of the two operands' (with |den|), and a
number x is x/1, hence |num| + |den| <= prod (x + 1) <= 10^(4 K) for numbers up to 9,999 each used once. With K = 8 and a target
below 2^31, num and num - target den stay below 2^138, less than the product of the primes: they are 0 if all remainders are.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int32, UInt32

from jaxreason.batch import PromptBatch
from jaxreason.rewards.arithmetic import LARGEST_NUMBER, MOST_NUMBERS
from jaxreason.rewards.traced.answers import AnswerBytes, answer_reader, gathered
from jaxreason.rewards.traced.lifted import TracedRule

PRIMES = (65521, 65519, 65497, 65479, 65449, 65447, 65437, 65423, 65419)
_WEIGHTS = np.array([10**k for k in range(len(str(LARGEST_NUMBER)))], np.int32)

_SPACE, _DIGIT, _OPERATOR, _OPEN, _CLOSE, _OTHER = range(6)
_KINDS = np.array(
    [
        _DIGIT if chr(byte) in "0123456789" else
        _OPERATOR if chr(byte) in "+-*/" else
        _OPEN if chr(byte) == "(" else
        _CLOSE if chr(byte) == ")" else
        _SPACE if chr(byte) in " \t\n\r\f\v" else _OTHER
        for byte in range(256)
    ],
    np.int32,
)  # fmt: skip


def countdown(
    vocabulary: Sequence[bytes | None],
    eos_ids: Sequence[int],
    *,
    open: str = "<answer>",
    close: str = "</answer>",
    use_all: bool = False,
    max_bytes: int = 128,
) -> TracedRule:
    """1 if the expression between the tags makes `prompts.target` of `prompts.numbers`, each used at most once; else 0.

    What an expression is is said at its host twin, `arithmetic.countdown`. With `use_all`, or `prompts.use_all`, every number
    is to be used. EOS is not required. Raises ValueError as `answer_reader` does, and, when traced, if the prompts come without
    numbers.
    """
    read = answer_reader(vocabulary, eos_ids, open=open, close=close, max_bytes=max_bytes)

    def rule(prompts: PromptBatch, completion: Array, mask: Array) -> Array:
        given, target = prompts.numbers, prompts.target
        if given is None or target is None:
            raise ValueError(
                "countdown needs prompts.numbers [P, K] and prompts.target [P], which data.batching.prompt_batch fills"
            )
        if given.shape[-1] > MOST_NUMBERS:
            raise ValueError(
                f"prompts.numbers are {given.shape[-1]} a problem: expected at most {MOST_NUMBERS}, -1 where there is none"
            )
        answer = read(completion, mask)
        fine, numbers, operator, priority = parsed(answer, count=given.shape[-1])
        given = given[:, None]
        fine &= used_once(numbers, given)
        used_all = jnp.sum(numbers >= 0, axis=-1) == jnp.sum(given >= 0, axis=-1)
        if use_all:
            fine &= used_all
        elif prompts.use_all is not None:
            fine &= used_all | ~prompts.use_all[:, None]
        return (fine & is_value(numbers, operator, priority, target[:, None])).astype(jnp.float32)

    return rule


def parsed(
    answer: AnswerBytes, *, count: int
) -> tuple[Bool[Array, "P G"], Int32[Array, "P G K"], Int32[Array, "P G O"], Int32[Array, "P G O"]]:
    """Whether it is an expression of at most K numbers; the numbers, -1 where there are no more; operators' bytes and priorities.

    Operator j stands between numbers j and j + 1; its priority is -1 where there is none.
    """
    text, length = answer
    at = jnp.arange(text.shape[-1], dtype=jnp.int32).reshape(1, 1, -1)
    kind = jnp.where(at < length[..., None], jnp.asarray(_KINDS)[text], _SPACE)
    solid = kind != _SPACE
    latest = jax.lax.cummax(jnp.where(solid, at, -1), axis=2)  # the last byte up to here that is no space
    before = _shifted(latest, -1)
    previous = jnp.where(before < 0, _OPEN, jnp.take_along_axis(kind, jnp.maximum(before, 0), axis=-1))
    digit, operator = kind == _DIGIT, kind == _OPERATOR
    behind_value = (previous == _DIGIT) | (previous == _CLOSE)
    goes_on = digit & (previous == _DIGIT) & (before == at - 1)
    follows = jnp.where(digit | (kind == _OPEN), ~behind_value | goes_on, behind_value) & (kind != _OTHER)
    depth = jnp.cumsum((kind == _OPEN).astype(jnp.int32) - (kind == _CLOSE).astype(jnp.int32), axis=-1)
    end = jnp.where(latest[..., -1:] < 0, _OPEN, jnp.take_along_axis(kind, jnp.maximum(latest[..., -1:], 0), axis=-1))[..., 0]

    ahead, places = digit, []  # how many digits of the same number follow
    for _ in range(len(_WEIGHTS)):
        ahead = digit & _shifted_back(ahead, False)
        places.append(ahead)
    too_large = places.pop()
    weight = jnp.asarray(_WEIGHTS)[jnp.sum(jnp.stack(places), axis=0, dtype=jnp.int32)]
    value = jnp.where(digit, text - ord("0"), 0)
    which = jnp.cumsum((digit & ~goes_on).astype(jnp.int32), axis=-1) - 1
    total = which[..., -1] + 1

    fine = jnp.all(~solid | follows, axis=-1) & ((end == _DIGIT) | (end == _CLOSE))
    fine &= jnp.all(depth >= 0, axis=-1) & (depth[..., -1] == 0)
    fine &= jnp.all(~too_large | (value == 0), axis=-1) & (total <= count)
    numbers = gathered(value * weight, jnp.where(digit, which, -1), count)
    numbers = jnp.where(jnp.arange(count, dtype=jnp.int32).reshape(1, 1, -1) < total[..., None], numbers, -1)
    slot = jnp.where(operator, jnp.cumsum(operator.astype(jnp.int32), axis=-1) - 1, -1)
    tight = ((text == ord("*")) | (text == ord("/"))).astype(jnp.int32)
    priority = gathered(2 * depth + tight + 1, slot, count - 1) - 1
    return fine, numbers, gathered(text, slot, count - 1), priority


def used_once(numbers: Int32[Array, "P G K"], given: Int32[Array, "P 1 J"]) -> Bool[Array, "P G"]:
    """Whether each number occurs at most as often as it is given; -1 is no number."""
    uses = jnp.sum(numbers[..., None] == numbers[..., None, :], axis=-1)
    there = jnp.sum(numbers[..., None] == given[..., None, :], axis=-1)
    return jnp.all((uses <= there) | (numbers < 0), axis=-1)


def is_value(
    numbers: Int32[Array, "P G K"], operator: Int32[Array, "P G O"], priority: Int32[Array, "P G O"], target: Int32[Array, "P 1"]
) -> Bool[Array, "P G"]:
    """Whether the expression is the target, and divides by nothing that is 0. See this module's text for how, and why exactly."""
    primes = jnp.asarray(PRIMES, jnp.uint32).reshape(1, 1, -1)
    num = jnp.maximum(numbers, 0).astype(jnp.uint32)[..., None] % primes[:, :, None]
    den = jnp.ones_like(num)
    spot = jnp.arange(numbers.shape[-1], dtype=jnp.int32).reshape(1, 1, -1)

    def pair(array: UInt32[Array, "P G K R"], at: Int32[Array, "P G"]) -> tuple[Array, Array]:
        return tuple(jnp.take_along_axis(array, (at + k)[..., None, None], axis=2)[..., 0, :] for k in (0, 1))  # pyright: ignore

    def reduce(_, carry):
        num, den, operator, priority, fine = carry
        at = jnp.argmax(priority, axis=-1).astype(jnp.int32)
        active = jnp.max(priority, axis=-1) >= 0
        sign = jnp.take_along_axis(operator, at[..., None], axis=-1)
        (a, c), (b, d) = pair(num, at), pair(den, at)  # a/b and c/d
        fine &= ~(active & (sign[..., 0] == ord("/")) & jnp.all(c == 0, axis=-1))
        times, over = sign == ord("*"), sign == ord("/")
        first, second = a * jnp.where(times, c, d) % primes, c * b % primes
        second = jnp.where(times | over, jnp.uint32(0), jnp.where(sign == ord("-"), primes - second, second))
        new_num, new_den = (first + second) % primes, b * jnp.where(over, c, d) % primes

        def joined(array: Array, new: Array) -> Array:
            left, here = (x[..., None] for x in (spot < at[..., None], spot == at[..., None]))
            after = jnp.where(left, array, jnp.where(here, new[:, :, None], jnp.roll(array, -1, axis=2)))
            return jnp.where(active[..., None, None], after, array)

        kept = spot[..., :-1] < at[..., None]
        operator, rest = (jnp.where(kept, one, _shifted_back(one, -1)) for one in (operator, priority))
        return joined(num, new_num), joined(den, new_den), operator, jnp.where(active[..., None], rest, priority), fine

    fine = jnp.ones(numbers.shape[:2], bool)
    if numbers.shape[-1] > 1:
        num, den, _, _, fine = jax.lax.fori_loop(0, numbers.shape[-1] - 1, reduce, (num, den, operator, priority, fine))
    wanted = jnp.mod(target[..., None], primes.astype(jnp.int32)).astype(jnp.uint32)
    return fine & jnp.all(num[..., 0, :] == wanted * den[..., 0, :] % primes, axis=-1)


def _shifted(array: Int32[Array, "P G B"], fill: int) -> Array:
    """The array one place later, `fill` at the start."""
    return jnp.concatenate([jnp.full_like(array[..., :1], fill), array[..., :-1]], axis=-1)


def _shifted_back(array: Array, fill: int | bool) -> Array:
    """The array one place earlier, `fill` at the end."""
    return jnp.concatenate([array[..., 1:], jnp.full_like(array[..., :1], fill)], axis=-1)
