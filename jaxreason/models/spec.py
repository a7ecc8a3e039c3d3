"""One declaration per parameter, many derivations.

A `ParamSpec` says a parameter's shape, the logical name of each axis, how it is initialised, and what Hugging Face calls it.
Initial values, abstract shapes, shardings, import and export are maps over the declaration, so they cannot disagree.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxreason import sharding
from jaxreason.compiling import compiled

Index = tuple[slice, ...]


class Transform(NamedTuple):
    """How a tensor of a Hugging Face file becomes ours and back; all act on one layer's tensor or a block of it.

    `hf_index` says which block of the file's tensor holds a block of ours, so that a process reads its own shards only.
    """

    to_ours: Callable[[np.ndarray, tuple[int, ...]], np.ndarray]
    to_hf: Callable[[np.ndarray], np.ndarray]
    hf_shape: Callable[[tuple[int, ...]], tuple[int, ...]]
    hf_index: Callable[[Index, tuple[int, ...]], Index]
    start: int = 0  # the first of our rows in a tensor that several parameters share


def _run(index: Index, shape: tuple[int, ...]) -> slice:
    """Where a block of several axes lies in their flattening, of which only the first may be cut."""
    if any(part.indices(size) != (0, size, 1) for part, size in zip(index[1:], shape[1:], strict=True)):
        raise ValueError(f"block {index} of axes {shape} is no single run: let sharding.RULES cut only the first of them")
    start, stop, _ = index[0].indices(shape[0])
    inner = math.prod(shape[1:])
    return slice(start * inner, stop * inner)


def linear(*, inputs: int = 1, start: int = 0, total: int = 0) -> Transform:
    """A `nn.Linear` weight (out, in), ours (in..., out...) with the first `inputs` axes being the input's.

    With a `total`, ours are the outputs from `start` on of a tensor of so many, which several parameters share.
    """

    def sizes(shape: tuple[int, ...]) -> tuple[int, int]:
        return math.prod(shape[:inputs]), math.prod(shape[inputs:])

    def hf_index(index: Index, shape: tuple[int, ...]) -> Index:
        rows = _run(index[inputs:], shape[inputs:])
        return slice(start + rows.start, start + rows.stop), _run(index[:inputs], shape[:inputs])

    return Transform(
        to_ours=lambda x, shape: x.T.reshape(shape),
        to_hf=lambda x: x.reshape(sizes(x.shape)).T,
        hf_shape=lambda shape: (total or sizes(shape)[1], sizes(shape)[0]),
        hf_index=hf_index,
        start=start,
    )


def vector() -> Transform:
    """A bias or a norm's scale: the same numbers, perhaps split into heads."""
    return Transform(
        to_ours=lambda x, shape: x.reshape(shape),
        to_hf=lambda x: x.reshape(-1),
        hf_shape=lambda shape: (math.prod(shape),),
        hf_index=lambda index, shape: (_run(index, shape),),
    )


def table() -> Transform:
    """A table [rows, width], stored as it is."""
    return Transform(
        to_ours=lambda x, shape: x.reshape(shape),
        to_hf=lambda x: x,
        hf_shape=lambda shape: shape,
        hf_index=lambda index, shape: index,
    )


class ParamSpec(NamedTuple):
    """A parameter. Its leading axes `layers` and `expert` are many tensors of a checkpoint, named by `{layer}` and `{expert}`."""

    shape: tuple[int, ...]
    axes: sharding.Axes
    init: str  # 'normal' | 'zeros' | 'ones'
    scale: float  # standard deviation of 'normal'
    hf_name: str
    hf: Transform
    first: int = 0  # number of the first layer

    @property
    def lead(self) -> int:
        """How many leading axes are tensors of their own."""
        return ("{layer}" in self.hf_name) + ("{expert}" in self.hf_name)

    @property
    def own(self) -> tuple[int, ...]:
        """The shape of what one tensor holds."""
        return self.shape[self.lead :]

    def names(self) -> list[tuple[tuple[int, ...], str]]:
        """(index in the leading axes, name) of every tensor, in our order."""
        return [(index, self._name(index)) for index in np.ndindex(*self.shape[: self.lead])]

    def _name(self, index: tuple[int, ...]) -> str:
        layer, expert = (*index, 0, 0)[:2]
        return self.hf_name.format(layer=self.first + layer, expert=expert)


Specs = dict[str, Any]  # a nested dict with ParamSpec leaves


def is_spec(x: Any) -> bool:
    return isinstance(x, ParamSpec)


def tree_map(function: Callable[[ParamSpec], Any], specs: Specs) -> Any:
    return jax.tree.map(function, specs, is_leaf=is_spec)


def leaves(specs: Specs) -> list[tuple[str, ParamSpec]]:
    """The declarations with their paths, `layers/q` for example."""
    flat = jax.tree.leaves_with_path(specs, is_leaf=is_spec)
    return [(jax.tree_util.keystr(path, simple=True, separator="/"), spec) for path, spec in flat]


def count(specs: Specs) -> int:
    """How many parameters are declared."""
    return sum(math.prod(spec.shape) for _, spec in leaves(specs))


def shardings(specs: Specs, mesh: Mesh) -> Any:
    return tree_map(lambda spec: sharding.named(mesh, spec.axes), specs)


def check_divisible(specs: Specs, mesh: Mesh) -> None:
    """A ValueError where a parameter's axis does not divide over its mesh axes."""
    for path, spec in leaves(specs):
        for size, axis in zip(spec.shape, spec.axes, strict=True):
            on = sharding.RULES.get(axis, ()) if axis else ()
            parts = math.prod(mesh.shape[name] for name in on)
            if size % parts:
                raise ValueError(
                    f"parameter {path} has {size} {axis}, which mesh axis {'*'.join(on)} = {parts} does not divide: "
                    f"choose config.mesh.{'*'.join(on)} among the divisors of {size}"
                )


def init(specs: Specs, key: jax.Array, *, dtype: str, mesh: Mesh) -> Any:
    """Random parameters, made on the mesh shard by shard.

    A parameter's key is folded from its path, so adding a parameter changes no other one's values.
    """

    def make(key: jax.Array) -> Any:
        values = {}
        for path, spec in leaves(specs):
            if spec.init == "normal":
                # the same numbers in float32 and in float64, so that runs in either can be compared
                own = jax.random.fold_in(key, zlib.crc32(path.encode()))
                values[path] = (spec.scale * jax.random.normal(own, spec.shape, jnp.float32)).astype(dtype)
            else:
                values[path] = jnp.full(spec.shape, 1 if spec.init == "ones" else 0, dtype)
        tree = jax.tree.structure(specs, is_leaf=is_spec)
        return jax.tree.unflatten(tree, list(values.values()))

    return compiled(jax.jit(make, out_shardings=shardings(specs, mesh)), key)(key)


def abstract(specs: Specs, *, dtype: str, mesh: Mesh) -> Any:
    """Shapes, types and shardings without values."""
    return tree_map(
        lambda spec: jax.ShapeDtypeStruct(spec.shape, jnp.dtype(dtype), sharding=sharding.named(mesh, spec.axes)), specs
    )
