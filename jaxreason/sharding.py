"""Where arrays live: a mesh from config, and one table from logical axes to mesh axes.

Every array names its axes logically (`embed`, `heads`, `problems`, ...); the rules say on which mesh axis each lies. Mesh axes
are explicitly Auto: the compiler places what lies between the constraints. One device is a mesh of one, by the same code.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

MESH_AXES = ("data", "fsdp", "expert", "sequence", "tensor")

RULES: Mapping[str, tuple[str, ...]] = {
    "problems": ("data", "fsdp", "expert"),
    "tokens": ("sequence",),
    "pieces": ("data", "fsdp", "expert", "sequence"),  # problems' rows, each cut along its tokens: see `cut`
    "embed": ("fsdp",),
    "rank": ("fsdp",),  # the bottlenecks of latent attention
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "mlp": ("tensor",),
    "vocab": ("tensor",),
    "expert": ("expert",),
}

Axes = tuple[str | None, ...]
Constrain = Callable[[jax.Array, Axes], jax.Array]


@dataclass(frozen=True)
class MeshConfig:
    """Devices along each mesh axis. -1 in one place stands for all devices that the others leave."""

    data: int = -1  # copies of the model, each with its own problems
    fsdp: int = 1  # problems and parameters both split
    tensor: int = 1  # heads, mlp and vocabulary split
    sequence: int = 1  # the tokens of each row split, for long completions
    expert: int = 1  # experts split; problems too, so that what is not experts is computed once


def mesh_shape(config: MeshConfig, *, devices: int) -> tuple[int, ...]:
    """The mesh's shape, in the order of MESH_AXES, for a number of devices; a ValueError says which sizes would do."""
    sizes = [config.data, config.fsdp, config.expert, config.sequence, config.tensor]
    # data, fsdp and tensor are always told, the others where they are used
    told = ", ".join(
        f"{name}={size}" for name, size in zip(MESH_AXES, sizes, strict=True) if name in ("data", "fsdp", "tensor") or size != 1
    )
    if any(size == 0 or size < -1 for size in sizes) or sizes.count(-1) > 1:
        raise ValueError(
            f"config.mesh sizes {told}: expected positive numbers, with -1 in at most one place for the rest of the devices"
        )
    fixed = math.prod(size for size in sizes if size != -1)
    if -1 in sizes:
        if devices % fixed:
            raise ValueError(
                f"config.mesh sizes {told} need a multiple of {fixed} devices, and there are {devices}: "
                f"change them so that their product divides {devices}"
            )
        sizes[sizes.index(-1)] = devices // fixed
    elif fixed != devices:
        raise ValueError(
            f"config.mesh sizes {told} make {fixed} devices, and there are {devices}: set one of them to -1 to take the rest"
        )
    return tuple(sizes)


def fits(config: MeshConfig, *, devices: int) -> bool:
    """Whether a mesh of this shape can be made of so many devices."""
    try:
        mesh_shape(config, devices=devices)
    except ValueError:
        return False
    return True


def make_mesh(config: MeshConfig, *, devices: Sequence[Any] | None = None) -> Mesh:
    """The device mesh with the axes MESH_AXES, of which the last are nearest neighbours."""
    devices = jax.devices() if devices is None else devices
    shape = mesh_shape(config, devices=len(devices))
    return jax.make_mesh(shape, MESH_AXES, (AxisType.Auto,) * len(MESH_AXES), devices=devices)


def partition(axes: Axes) -> PartitionSpec:
    """The PartitionSpec of an array's logical axes under the rules."""
    names: list[str | tuple[str, ...] | None] = []
    for axis in axes:
        on = RULES.get(axis, ()) if axis else ()
        names.append(on[0] if len(on) == 1 else (on or None))
    return PartitionSpec(*names)


def named(mesh: Mesh, axes: Axes = ()) -> NamedSharding:
    """The sharding of an array with these logical axes; no axes at all: replicated."""
    return NamedSharding(mesh, partition(axes))


def constrainer(mesh: Mesh) -> Constrain:
    """A function that pins an intermediate array's logical axes to the mesh."""

    def constrain(x: jax.Array, axes: Axes) -> jax.Array:
        return jax.lax.with_sharding_constraint(x, named(mesh, axes))

    return constrain


def problem_shards(mesh: Mesh) -> int:
    """Into how many parts the `problems` axis is split."""
    return math.prod(mesh.shape[axis] for axis in RULES["problems"])


def cut(x: jax.Array, mesh: Mesh, *, axis: int) -> jax.Array:
    """Problems' rows [P, ..., N, ...] with a device's share of their tokens as a row of its own: [P S, ..., N / S, ...].

    S is the size of the mesh axis `sequence`, which divides N. No number moves between devices that hold x split along `axis`: the
    same shards are read as another array, whose tokens can be flattened and taken chunk by chunk like any.
    """
    return _read_as(x, mesh, _tokens_split(axis), partition(("pieces",)))


def uncut(x: jax.Array, mesh: Mesh, *, axis: int) -> jax.Array:
    """The inverse of `cut`."""
    return _read_as(x, mesh, partition(("pieces",)), _tokens_split(axis))


def _tokens_split(axis: int) -> PartitionSpec:
    return partition(("problems", *(None for _ in range(1, axis)), "tokens"))


def _read_as(x: jax.Array, mesh: Mesh, given: PartitionSpec, wanted: PartitionSpec) -> jax.Array:
    if mesh.shape["sequence"] == 1:
        return x
    return jax.shard_map(lambda own: own, mesh=mesh, in_specs=given, out_specs=wanted)(x)


def place(mesh: Mesh, tree: Any, axes: Axes) -> Any:
    """Puts host arrays, held whole by every process, on the mesh; each process keeps only its own shards."""
    sharding = named(mesh, axes)

    def put(x: Any) -> jax.Array:
        x = np.asarray(x)
        return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])

    return jax.tree.map(put, tree)


def held_rows(mesh: Mesh, count: int) -> np.ndarray:
    """Which of `count` problems' rows lie on this process' devices."""
    indices = named(mesh, ("problems",)).addressable_devices_indices_map((count,)).values()
    return np.unique(np.concatenate([np.arange(count)[index] for index in indices if index is not None]))


def keepers(mesh: Mesh, count: int) -> np.ndarray:
    """The process that works on each of `count` problems on the host: one of those that hold its row, which take turns."""
    held: list[set[int]] = [set() for _ in range(count)]
    for device, index in named(mesh, ("problems",)).devices_indices_map((count,)).items():
        for row in range(count)[index[0]] if index else ():
            held[row].add(device.process_index)
    return np.asarray([sorted(each)[row % len(each)] for row, each in enumerate(held)], np.int32)


def place_held(mesh: Mesh, tree: Any, count: int) -> Any:
    """Puts host arrays that hold the rows of `held_rows` alone on the mesh, as rows of arrays of `count` problems."""
    sharding, at = named(mesh, ("problems",)), np.zeros(count, np.int64)
    held = held_rows(mesh, count)
    at[held] = np.arange(len(held))

    def put(x: Any) -> jax.Array:
        x = np.asarray(x)

        def block(index: Any) -> np.ndarray:
            return x[at[index[0]]]

        return jax.make_array_from_callback((count, *x.shape[1:]), sharding, block)

    return jax.tree.map(put, tree)


def fetch_held(tree: Any, rows: np.ndarray) -> Any:
    """Copies these rows of arrays that lie along `problems`, all of them on this process' devices, to the host."""

    def get(x: jax.Array) -> np.ndarray:
        blocks = {shard.index[0].start or 0: np.asarray(shard.data) for shard in x.addressable_shards}
        held = np.concatenate([start + np.arange(len(block)) for start, block in sorted(blocks.items())])
        return np.concatenate([block for _, block in sorted(blocks.items())])[np.searchsorted(held, rows)]

    return jax.tree.map(get, tree)


def of_keepers(tree: Any, keeper: np.ndarray) -> Any:
    """The rows of all problems on every process: `tree` has, as host arrays, those that this process keeps."""
    if jax.process_count() == 1:
        return tree
    from jax.experimental import multihost_utils

    def spread(x: np.ndarray) -> np.ndarray:
        rows = np.zeros((len(keeper), *x.shape[1:]), x.dtype)
        rows[keeper == jax.process_index()] = x
        return rows

    gathered = multihost_utils.process_allgather(jax.tree.map(spread, tree))
    return jax.tree.map(lambda x: np.asarray(x)[keeper, np.arange(len(keeper))], gathered)


def sum_of_processes(x: np.ndarray) -> np.ndarray:
    """The sum of the processes' host arrays, on all of them."""
    if jax.process_count() == 1:
        return x
    from jax.experimental import multihost_utils

    return np.asarray(multihost_utils.process_allgather(x)).sum(axis=0)


def fetch(tree: Any) -> Any:
    """Copies device arrays to the host as NumPy, gathering over processes where an array is spread over several."""

    def get(x: Any) -> np.ndarray:
        if isinstance(x, jax.Array) and not x.is_fully_addressable:
            if x.is_fully_replicated:
                return np.asarray(x.addressable_data(0))
            from jax.experimental import multihost_utils

            return np.asarray(multihost_utils.process_allgather(x, tiled=True))
        return np.asarray(x)

    return jax.tree.map(get, tree)


def barrier(name: str) -> None:
    """Waits until every process has come here."""
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices(name)
