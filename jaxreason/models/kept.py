"""Keys and values as decoding keeps them: prompts', and of slots' own tokens the first places and far blocks; read and written.

Each lies as its product reads it fastest. How a slot's queries meet them is slot_attention.py's matter.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxreason.models import slot_kernels
from jaxreason.models.rounded import Rounded, per_array, rounded, swapped

Cells = jax.Array | Rounded

BLOCK = 32  # keys in a block; rows that are read in blocks are multiples of it
IN_TURN = 8  # up to so many new tokens of a slot are written one after the other, on CPUs


class Read(NamedTuple):
    """Keys and values of prompts: [P, K, C, Tp] and [P, K, Tp, C]; or of all layers, [L, P, ...], and one's number.

    Each lies as its product reads it fastest. Without values the keys are those too.
    """

    k: Cells
    v: Cells | None
    number: jax.Array | None = None

    def whole(self) -> tuple[Cells, Cells]:
        """The layer's keys and values."""
        return _both(self.k, self.v, lambda x, _: x if self.number is None else x[self.number])

    def blocks(self, row: jax.Array, block: jax.Array) -> tuple[Cells, Cells]:
        """Keys [N, K, C, B] and values [N, K, B, C] of each of N (row, block)."""

        def read(x: jax.Array, axis: int) -> jax.Array:
            cut = x.ndim + axis
            x = x.reshape(*x.shape[:cut], -1, BLOCK, *x.shape[cut + 1 :])
            at = (row, slice(None), *([slice(None)] if axis == -1 else []), block)
            return x[at] if self.number is None else x[(jnp.broadcast_to(self.number, row.shape), *at)]

        return _both(self.k, self.v, read)


class Places(NamedTuple):
    """Where the newest N = S M tokens of S slots go in rows of n blocks of B places; found once for all layers."""

    slot: Int[Array, " N"]
    block: Int[Array, " N"]  # n for those that go elsewhere
    within: Int[Array, " N"]
    first: Int[Array, " N"]  # the order in which they are written, one after the other
    count: Int[Array, " 1"]  # how many are


def places(start: Int[Array, " S"], *, newest: int, blocks: int, size: int) -> Places:
    """Of each slot's `newest` tokens from its place `start` on, which may lie before or beyond the row."""
    place = (start[:, None] + jnp.arange(newest, dtype=jnp.int32)[None]).reshape(-1)
    slot = jnp.arange(place.shape[0], dtype=jnp.int32) // newest
    inside = (place >= 0) & (place < blocks * size)
    first = jnp.argsort(~inside, stable=True).astype(jnp.int32)
    return Places(slot, jnp.where(inside, place // size, blocks), place % size, first, jnp.sum(inside, dtype=jnp.int32)[None])


class Written(NamedTuple):
    """Keys and values of slots' own tokens, n blocks of B places: [S, K, n, C, B] and [S, K, n, B, C].

    Or, with `apart`, [S, n, K, C, B] and [S, n, K, B, C]: a block then lies in one piece, so that it is fetched fast.
    """

    k: Cells
    v: Cells | None
    number: jax.Array | None = None
    axis: int = -1  # of the keys' places; -2 where a kernel reads them
    apart: bool = False

    @property
    def blocks(self) -> int:
        """How many a slot has."""
        return self.k.shape[-4 if self.apart else -3]

    def whole(self) -> tuple[Cells, Cells]:
        """The layer's first keys and values."""
        return _both(self.k, self.v, lambda x, _: x[:, :, 0] if self.number is None else x[self.number, :, :, 0])

    def fetch(self, slot: Int[Array, " N"], block: Int[Array, " N"]) -> tuple[Cells, Cells]:
        """Keys [N, K, C, B] and values [N, K, B, C] of N blocks that lie apart."""

        def read(x: jax.Array, _: int) -> jax.Array:
            before = 0 if self.number is None else self.number * x.shape[-5]
            return jnp.take(x.reshape(-1, *x.shape[-3:]), (before + slot) * x.shape[-4] + block, axis=0, mode="clip")

        return _both(self.k, self.v, read)

    def write(self, k: Float[Array, "S M K C"], v: Float[Array, "S M K Cv"] | None, at: Places) -> Written:
        """With the newest tokens'; what goes elsewhere is dropped."""
        axes = [axis for _, axis in slot_kernels.arrays_of(self.k, self.axis) + slot_kernels.arrays_of(self.v, -2)]
        new = [None if x is None else rounded(x) if isinstance(self.k, Rounded) else x for x in (k, None if self.v is None else v)]
        leaves, tree = jax.tree.flatten((self.k, self.v))
        given = [y.astype(x.dtype).reshape(-1, *y.shape[2:]) for x, y in zip(leaves, jax.tree.leaves(new), strict=True)]

        def where(slot: Any, heads: Any, block: Any, numbers: Any, within: Any, axis: int) -> tuple[Any, ...]:
            outer = (slot, block, heads) if self.apart else (slot, heads, block)
            return (*outer, *((numbers, within) if axis == -1 else (within, numbers)))

        def scattered(there: list[jax.Array], new: list[jax.Array]) -> list[jax.Array]:
            lead, every = () if self.number is None else (jnp.broadcast_to(self.number, at.slot.shape),), slice(None)
            here = [(*lead, *where(at.slot, every, at.block, every, at.within, axis)) for axis in axes]
            return [x.at[each].set(y, mode="drop") for x, y, each in zip(there, new, here, strict=True)]

        def one_by_one(there: list[jax.Array], new: list[jax.Array]) -> list[jax.Array]:
            lead = () if self.number is None else (self.number,)

            def one(i: jax.Array, there: list[jax.Array]) -> list[jax.Array]:
                i, zero, made = at.first[i], jnp.int32(0), []
                for x, y, axis in zip(there, new, axes, strict=True):
                    own = jax.lax.dynamic_index_in_dim(y, i, keepdims=False)  # [K, C]
                    own = own.reshape(*(1 for _ in lead), *where(1, own.shape[0], 1, own.shape[1], 1, axis))
                    here = (*lead, *where(at.slot[i], zero, at.block[i], zero, at.within[i], axis))
                    made.append(jax.lax.dynamic_update_slice(x, own, here))
                return made

            return jax.lax.fori_loop(jnp.int32(0), at.count[0], one, there)

        # XLA's CPU backend takes three times as long for a scatter
        few = k.shape[1] <= IN_TURN
        made = jax.lax.platform_dependent(leaves, given, cpu=one_by_one, default=scattered) if few else scattered(leaves, given)
        return self._replace(**dict(zip("kv", jax.tree.unflatten(tree, made), strict=True)))


def _both(k: Cells, v: Cells | None, read: Callable[[jax.Array, int], jax.Array]) -> tuple[Cells, Cells]:
    """`read(x, axis)` of keys and of values, which have their places on this axis."""
    keys = per_array(read, -1, k)
    return keys, swapped(keys) if v is None else per_array(read, -2, v)
