"""A verifier beside the policy: scores of what slots hold, by a reward model or process reward model that reads each token once.

The verifier is a decoder with a head that scores (heads.py), of the same vocabulary. It has prompts, keys and values of its own,
and remembers how much of each slot it has read, so that a beam search which extends, scores and forks never reads a prefix
again. What is forked among slots must be forked here too. Deliberately absent: a verifier with another tokenizer, which reads text.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from jaxreason.models.decoder import Model
from jaxreason.sampling.engine import FREE, Leaf, Roots, Slots

PIECE = 32  # tokens that are read at once


@struct.dataclass
class Readings:
    """How far a verifier has read S slots."""

    own: Any  # its keys and values of the slots' own tokens
    hidden: Leaf  # [S, D], after the last token read
    length: Leaf  # [S] int32, own tokens read


def open(model: Model, params: Any, prompt: Int[Array, "P Tp"], mask: Bool[Array, "P Tp"]) -> Roots:
    """Reads prompts, padded on the left. `params` are those that the verifier's `prepare_sampling` gave."""
    hidden, prompts = model.prefill(params, prompt, mask)
    return Roots(prompts, hidden)


def begin(model: Model, roots: Roots, root: Int[Array, " S"], *, tokens: int) -> Readings:
    """Readings of slots that have no token yet, with room for `tokens` of each; `root` is their prompt, as in `engine.seat`."""
    return Readings(
        own=model.empty(roots.prompts, slots=root.shape[0], tokens=tokens),
        hidden=jnp.take(roots.hidden, root, axis=0, mode="clip"),
        length=jnp.zeros(root.shape[0], jnp.int32),
    )


def fork(model: Model, readings: Readings, parent: Int[Array, " S"]) -> Readings:
    """What was read of slots `parent`; for `engine.fork` and with the same parents."""
    return Readings(model.select(readings.own, parent), readings.hidden[parent], readings.length[parent])


def score(
    model: Model, params: Any, roots: Roots, readings: Readings, slots: Slots, *, width: int = 8
) -> tuple[Float[Array, "S labels"], Readings]:
    """The head's scores at every slot's last token, or at its prompt's if it has none; slots' new tokens are read, and only they.

    A reward model scores a completion so, a process reward model the step that has just ended. `width`: see `Model.decode`.
    Scores of free slots mean nothing.
    """
    record, places = slots.record, jnp.arange(PIECE, dtype=jnp.int32)

    def left(readings: Readings) -> jax.Array:
        return jnp.where(record.status == FREE, 0, jnp.maximum(record.length - readings.length, 0))

    def read(readings: Readings) -> Readings:
        count = jnp.minimum(left(readings), PIECE)
        at = jnp.minimum(readings.length[:, None] + places[None], record.tokens.shape[1] - 1)
        token = jnp.take_along_axis(record.tokens, at, axis=1)
        given = (roots.prompts, readings.own, slots.root, readings.length, count > 0)
        hidden, own = model.decode(params, token, *given, width=width)
        last = jnp.take_along_axis(hidden, jnp.maximum(count - 1, 0)[:, None, None], axis=1)[:, 0]
        return Readings(own, jnp.where(count[:, None] > 0, last, readings.hidden), readings.length + count)

    readings = jax.lax.while_loop(lambda readings: jnp.any(left(readings) > 0), read, readings)
    return model.project(params, readings.hidden), readings
