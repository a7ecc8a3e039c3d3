"""TPU chips by what they can hold and do, and slices of them that can be compiled for without being there.

A slice is named as libtpu names it, by generation and shape in chips: `v5e:8x8`, `v6e:4x4`, `v5:4x4x4`. Products are named by other
numbers: v5p-128 counts cores, and is 64 chips, `v5:4x4x4`. Deliberately absent: generations whose chips are two devices (v4 and
older), several slices joined by a data-center network.
"""

from __future__ import annotations

import itertools
import math
from typing import Any, NamedTuple

from jax.sharding import Mesh

from jaxreason import sharding
from jaxreason.naming import nearest
from jaxreason.sharding import MeshConfig

GIB = 2**30
Shape = tuple[int, ...]


class Chip(NamedTuple):
    """One chip. Rates are the vendor's peaks."""

    name: str  # as the product is named
    hbm: int  # bytes that a program may use
    flops: float  # a second, of products of bfloat16
    hbm_bandwidth: float  # bytes a second
    links: float  # bytes a second that it sends to its neighbours over all its links


# docs.cloud.google.com/tpu/docs/{v5e,v6e,v5p} (read in November 2026): 16, 32 and 95 GB of HBM; 1600, 3200 and 4800 Gbit/s of
# interconnect, in each direction. `hbm` is what the compiler (libtpu 0.0.42) says that it has where a program does not fit.
CHIPS = {
    "v5e": Chip("TPU v5e", int(15.75 * GIB), 197e12, 819e9, 200e9),
    "v6e": Chip("TPU v6e", int(31.25 * GIB), 918e12, 1600e9, 400e9),
    "v5": Chip("TPU v5p", int(95.74 * GIB), 459e12, 2765e9, 600e9),
}
FLAT = ((2, 2), (2, 4), (4, 4), (4, 8), (8, 8), (8, 16), (16, 16))  # slices of v5e and v6e
SMALL = ((2, 2, 1), (2, 2, 2), (2, 2, 4), (2, 4, 4))  # of v5p, below a cube of 4 x 4 x 4
LARGEST = (16, 16, 24)  # of v5p; whole cubes


class Slice(NamedTuple):
    """Chips joined in a torus."""

    kind: str  # a key of CHIPS
    shape: Shape

    @property
    def name(self) -> str:
        return f"{self.kind}:{'x'.join(map(str, self.shape))}"

    @property
    def chip(self) -> Chip:
        return CHIPS[self.kind]

    @property
    def chips(self) -> int:
        return math.prod(self.shape)


def read(name: str) -> Slice:
    """The slice of this name; a ValueError names the nearest ones that exist."""
    kind, _, size = name.partition(":")
    kind = "v5" if kind == "v5p" else kind
    if kind not in CHIPS:
        raise ValueError(
            f"--topology is '{name}', whose chip is not known: {nearest(kind, [*CHIPS])} "
            "(v5 is v5p; as in v5e:8x8, v6e:4x4, v5:4x4x4)"
        )
    sizes = size.split("x")
    if not all(each.isdecimal() and int(each) for each in sizes):
        example = slices(kind)[4].name
        raise ValueError(f"--topology is '{name}', which has no shape in chips: write it as in {example}")
    found = Slice(kind, tuple(map(int, sizes)))
    there = slices(kind)
    if found not in there:
        near = sorted(there, key=lambda each: _distance(each.shape, found.shape))[:3]
        raise ValueError(
            f"--topology is '{name}', and there is no such slice: the nearest are {', '.join(each.name for each in near)} "
            "(sizes in chips, the smallest first)"
        )
    return found


def slices(kind: str) -> list[Slice]:
    """All slices of a chip."""
    if kind != "v5":
        return [Slice(kind, shape) for shape in FLAT]
    cubes = itertools.product(*(range(4, most + 1, 4) for most in LARGEST))
    return [Slice(kind, shape) for shape in (*SMALL, *(cube for cube in cubes if sorted(cube) == list(cube)))]


def _distance(one: Shape, other: Shape) -> float:
    """How unlike two shapes are: first in their product, then in their sides."""
    length = max(len(one), len(other))
    a, b = (sorted((*shape, *(1 for _ in range(length - len(shape))))) for shape in (one, other))
    sides = sum(abs(math.log(x / y)) for x, y in zip(a, b, strict=True))
    return 10 * abs(math.log(math.prod(one) / math.prod(other))) + sides


def devices(slice: Slice) -> Any:
    """The slice's chips, described by libtpu: to compile for, not to run on. A ValueError where libtpu is not installed.

    libtpu reads the environment once: TPU_SKIP_MDS_QUERY must be set by then, or it asks a network that is not there.
    """
    from jax.experimental import topologies

    try:
        return topologies.get_topology_desc(topology_name=slice.name, platform="tpu").devices
    except RuntimeError as error:
        if "not installed" not in str(error):
            raise
        raise ValueError(
            "a rehearsal needs libtpu, the TPUs' compiler, which is not installed: pip install 'jaxreason[tpu]'"
        ) from error


def make_mesh(config: MeshConfig, slice: Slice) -> Mesh:
    """The mesh that training makes on such a slice; a ValueError names the nearest meshes that it has."""
    try:
        return sharding.make_mesh(config, devices=devices(slice))
    except (ValueError, NotImplementedError) as error:  # the latter is jax's word for a mesh that a torus cannot be cut into
        if isinstance(error, ValueError) and "libtpu" in str(error):
            raise
        sizes = [getattr(config, name) for name in sharding.MESH_AXES]
        if any(size == 0 or size < -1 for size in sizes) or sizes.count(-1) > 1:
            raise
        near = "; ".join(_told(each) for each in nearest_meshes(config, slice))
        raise ValueError(
            f"config.mesh is {_told(dict(zip(sharding.MESH_AXES, sizes, strict=True)))}, which the torus of {slice.name}, "
            f"{slice.chips} chips, cannot be cut into: the nearest that it can are {near}"
        ) from error


def nearest_meshes(config: MeshConfig, slice: Slice, *, count: int = 3) -> list[dict[str, int]]:
    """The meshes of a slice whose sizes differ least from these, axes of one device staying so."""
    asked = {name: getattr(config, name) for name in sharding.MESH_AXES}
    used = [name for name in sharding.MESH_AXES if asked[name] != 1] or ["data"]
    # JAX gives a mesh axis whole sides of the torus; only those of v5e are cut
    sides = [2] * round(math.log2(slice.chips)) if slice.kind == "v5e" else [side for side in slice.shape if side > 1]
    found = []
    for owners in itertools.product(used, repeat=len(sides)) if slice.kind != "v5e" else _splits(len(sides), used):
        mesh: dict[str, int] = {name: 1 for name in sharding.MESH_AXES}
        for side, owner in zip(sides, owners, strict=True):
            mesh[owner] *= side
        if mesh not in found:
            found.append(mesh)
    known = [name for name in used if asked[name] != -1]
    return sorted(found, key=lambda mesh: sum(abs(math.log(mesh[name] / asked[name])) for name in known))[:count]


def _splits(twos: int, used: list[str]) -> Any:
    """Each way to deal out so many twos, whose order does not matter."""
    return itertools.combinations_with_replacement(used, twos)


def _told(mesh: dict[str, int]) -> str:
    return " ".join(f"{name}={size}" for name, size in mesh.items() if size != 1) or "data=1"
