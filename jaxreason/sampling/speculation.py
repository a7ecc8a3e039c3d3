"""Drafts without a draft model: text that repeats what came before is read several tokens at a time.

Where a text's last tokens have stood before, what followed them then is drafted (prompt lookup decoding, Saxena 2023,
github.com/apoorvumang/prompt-lookup-decoding), and one forward pass reads the newest token and all of the draft. Leviathan et al.
(arXiv:2211.17192, section 2.3) accept a draft d with probability min(1, p(d) / q(d)), which for a draft without chance is p(d), and
draw anew from the rest. Here a token's uniform is a function of its slot's key and its place alone, so the token that would have
stood there is drawn as always, and the draft is accepted if it is that one: which has probability p(d), and gives not only
the same distribution but the very same tokens, to rounding. The states that choose and stop (stop strings, grammar, tokens seen)
go along token by token. Deliberately absent: a second model, trees of drafts, drafts of uneven lengths.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxreason.models.decoder import Model

NGRAM = 3  # most tokens that are looked for; then fewer
AUTO = 4  # tokens drafted where it is told from measurements whether to draft at all
LONGEST_WAIT = 16  # segments until the other way is tried again


def drafted(slots: Any, *, count: int) -> jax.Array:
    """`lookup` in the texts of slots (of engine.py), [S, count]."""
    if slots.prompt is None:
        raise ValueError(f"rules.draft is {count}, and these prompts were opened without: open and seat with rules that draft too")
    return lookup(slots.prompt, slots.record.tokens, slots.record.length, count=count)


def lookup(
    prompt: Int[Array, "S Tp"], tokens: Int[Array, "S T"], length: Int[Array, " S"], *, count: int
) -> Int[Array, "S {count}"]:
    """What followed when each slot's last tokens stood in its text before: the longest match up to NGRAM, of these the latest.

    A slot's text is its prompt, -1 before the first token, and `length` own tokens. A draft that comes to the end of the text
    goes on as if that repeated itself. Where nothing is found it is any tokens.
    """
    text = jnp.concatenate([prompt, tokens], axis=1)
    width, end = text.shape[1], prompt.shape[1] + length
    place = jnp.arange(width, dtype=jnp.int32)[None]
    same = place < end[:, None] - 1
    matched = jnp.zeros_like(text)  # how many tokens up to each place are the text's last ones
    for back in range(NGRAM):
        last = jnp.take_along_axis(text, jnp.maximum(end - 1 - back, 0)[:, None], axis=1)
        shifted = jnp.pad(text, ((0, 0), (back, 0)), constant_values=-1)[:, :width]
        same = same & (shifted == last) & (last >= 0)
        matched = matched + same.astype(jnp.int32)
    best = jnp.max(jnp.where(matched > 0, matched * width + place, 0), axis=1)
    begin = best % width + 1
    period = jnp.maximum(end - begin, 1)
    at = begin[:, None] + jnp.arange(count, dtype=jnp.int32)[None] % period[:, None]
    return jnp.maximum(jnp.take_along_axis(text, at, axis=1), 0)


class Ahead(NamedTuple):
    """The states in which each token of a draft is chosen, if those before it are."""

    key: Any  # [S, k]
    position: Int[Array, "S k"]
    grammar: Int[Array, "S k"]
    seen: Bool[Array, "S k V"] | None


def ahead(slots: Any, draft: Int[Array, "S k"], *, advance: Callable[..., Any] | None) -> Ahead:
    """`advance(grammar state, token)` is the grammar's next state, where there is one."""
    position = slots.record.length[:, None] + jnp.arange(draft.shape[1], dtype=jnp.int32)[None]
    key = jnp.broadcast_to(slots.key[:, None], draft.shape)
    grammar, seen = [slots.grammar], [slots.seen]
    for token in draft.T[:-1]:
        grammar.append(grammar[-1] if advance is None else advance(grammar[-1], token))
        if slots.seen is not None:
            seen.append(seen[-1] | (jnp.arange(slots.seen.shape[1], dtype=jnp.int32)[None] == token[:, None]))
    return Ahead(key, position, jnp.stack(grammar, axis=1), None if slots.seen is None else jnp.stack(seen, axis=1))


def accept(
    slots: Any,
    draft: Int[Array, "S k"],
    hidden: Float[Array, "S n D"],
    *,
    live: int,
    choose: Callable[..., Any],
    note: Callable[..., Any],
    advance: Callable[..., Any] | None,
) -> tuple[Any, Float[Array, "S 1 D"]]:
    """Slots (of engine.py) with the drafts that are what is drawn at their places; and what then predicts the next token.

    `hidden` are the states after each slot's newest token and after each of its draft, n = k + 1. `choose(hidden, **states)` draws
    the tokens of rows; `note(slots, drawn, which)` writes a token down, after which a slot may have ended and not be `live`.
    """

    def rows(x: jax.Array) -> jax.Array:
        return x.reshape(-1, *x.shape[2:])

    states = jax.tree.map(rows, ahead(slots, draft, advance=advance)._asdict())
    drawn = jax.tree.map(lambda x: x.reshape(draft.shape), choose(rows(hidden[:, :-1]), **states))
    before = slots.record
    for j in range(draft.shape[1]):
        follows = slots.record.length == before.length + j  # every draft until here is in
        which = follows & (slots.record.status == live) & (drawn[0][:, j] == draft[:, j])
        slots = note(slots, jax.tree.map(lambda x, j=j: x[:, j], drawn), which)
    more = slots.record.length - before.length
    tried = jnp.where(before.status == live, draft.shape[1], 0).astype(jnp.int32)
    slots = replace(slots, record=replace(slots.record, drafts=before.drafts + jnp.stack([tried, more], axis=1)))
    return slots, jnp.take_along_axis(hidden, more[:, None, None], axis=1)


# ---- the host's side


def check(model: Model, params: Any, *, draft: Any, lanes: int = 1, key: str = "draft") -> None:
    """Raises ValueError where this is no number of tokens to draft, or the model's `decode` does not take so many at once."""
    if isinstance(draft, bool) or not isinstance(draft, int) or draft < 0:
        raise ValueError(f"{key} is {draft!r}: expected a whole number of tokens to draft a step, 0 for none")
    if draft == 0:
        return

    def run(params: Any) -> Any:
        zero = jnp.zeros(lanes, jnp.int32)
        hidden, prompts = model.prefill(params, zero[:, None], jnp.ones((lanes, 1), bool))
        own = model.empty(prompts, slots=lanes, tokens=1 + draft)
        fed = jnp.zeros((lanes, 1 + draft), jnp.int32)
        return hidden, model.decode(params, fed, prompts, own, zero, zero, jnp.ones(lanes, bool), width=0)[0]

    advice = f"the model's decode does not take the {1 + draft} tokens a slot that {key} = {draft} asks for: set {key} to 0"
    try:
        hidden, after = jax.eval_shape(run, params)
    except (TypeError, ValueError, IndexError) as error:
        raise ValueError(f"{advice} ({error})") from error
    if after.shape != (lanes, 1 + draft, hidden.shape[1]):
        raise ValueError(advice)


@dataclass
class Pace:
    """Tells from what steps have cost and brought whether to draft: it pays if tokens a step grow by more than seconds do.

    A way whose cost is not known is tried for a short while, and so are both, more and more seldom. Only trials are timed,
    which are equally long: what a segment costs beside its steps is then in both.
    """

    segment: int  # steps until the host looks again
    seconds: dict[Any, float] = field(default_factory=dict)  # of a step, by (size, with drafts)
    tokens: float = 0.0  # that a step with drafts brings a slot; 0: not known
    pays: bool = False
    wait: int = 2
    waited: int = 0
    tried: bool = True  # the way that is taken was timed after the other one

    @property
    def trial(self) -> int:
        return max(1, self.segment // 8)

    def next(self, size: Any) -> tuple[bool, int]:
        """Whether to draft now, in programs of this size, and for how many steps."""
        trial = self.trial
        if (size, False) not in self.seconds:
            return False, trial
        if (size, True) not in self.seconds or not self.tokens:
            return True, trial
        pays = self.tokens * self.seconds[size, False] > self.seconds[size, True]
        if pays != self.pays:
            self.pays, self.wait, self.waited = pays, 2, 0
        if not self.tried:
            self.tried = True
            return pays, trial
        if self.waited >= self.wait:
            self.tried, self.waited, self.wait = False, 0, min(2 * self.wait, LONGEST_WAIT)
            return not pays, trial
        self.waited += 1
        return pays, self.segment

    def told(self, size: Any, drafting: bool, *, steps: int, seconds: float, drafts: tuple[int, int]) -> None:
        """What so many steps have cost together, and how many tokens were drafted in them and accepted."""
        if steps == 0:
            return
        if steps == self.trial:
            new = seconds / steps
            known = self.seconds.get((size, drafting), new)
            self.seconds[size, drafting] = min(new, (known + new) / 2)  # another program's turn only makes a step look slower
        if drafts[0]:
            tokens = 1 + AUTO * drafts[1] / drafts[0]
            self.tokens = (self.tokens + tokens) / 2 if self.tokens else tokens
