"""What the devices of a mesh send each other in a compiled program: every collective, the loop that it is in, and its bytes.

Read from the text of the optimised program. A loop's rounds are in its condition where they are fixed; the loop that decodes goes
on until every completion has ended, and its rounds are the caller's to say. The compiler's own cost analysis is of no use here: it
counts a loop's body once.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from jax.sharding import Mesh

KINDS = "all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute|ragged-all-to-all|collective-broadcast"
BYTES = {"pred": 1, "bf16": 2, **{f"{sign}{bits}": max(1, bits // 8) for sign in "sfu" for bits in (4, 8, 16, 32, 64)}}
UNKNOWN, BRANCH = "?", "if"  # a loop whose rounds the program decides; a branch that it may not take
DECODING = "decoding"  # the outermost loop of unknown rounds
_IOTA = r"\[[\d,]+\](?:T\([\d,]+\))?"  # 0, 1, 2, ... in a shape, and its axes' new order
_WAYS = (r"\{\{.*?\}\}", rf"\[[\d,]+\]<={_IOTA}", rf"mesh\[.*?\](?:, device_ids=\({_IOTA}\))? \{{.*?\}}")
_GROUPS = re.compile(rf"(replica_groups|source_target_pairs)=({'|'.join(_WAYS)})")
_OPERATION = re.compile(rf"= (.*?) ({KINDS})(-start)?\(")
_CALLED = re.compile(r"\b(body|calls|to_apply|branch_computations|true_computation|false_computation)=\{?((?:%[\w.\-]+(?:, )?)+)")
_ARRAY = re.compile(r"\b([a-z]+\d*)(?:e\w+)?\[([\d,]*)\]")

Loops = tuple[str, ...]  # the rounds of each loop around an operation, outermost first


class Sent(NamedTuple):
    """Collectives of one kind over the same axes in the same loop."""

    kind: str
    over: str  # the mesh axes whose devices take part
    loops: Loops
    count: int  # of them in one round
    bytes: float  # that a device sends in one round

    def total(self, *, decoding: int) -> float | None:
        """Bytes in all rounds; None where the program itself decides how many there are."""
        rounds = rounds_of(self.loops, decoding=decoding)
        return None if rounds is None else rounds * self.bytes


def rounds_of(loops: Loops, *, decoding: int) -> int | None:
    """How often what is in these loops is done, if `decoding` is the rounds of the loop that decodes."""
    if UNKNOWN in loops or BRANCH in loops:
        return None
    return math.prod(decoding if each == DECODING else int(each) for each in loops)


def collectives(text: str, mesh: Mesh) -> list[Sent]:
    """What a device sends in a program, the most bytes first."""
    program = _Program(text)
    count: Counter[tuple[str, str, Loops]] = Counter()
    sent: Counter[tuple[str, str, Loops]] = Counter()
    seen = set()
    for line, computation, loops in program.operations():
        found = _OPERATION.search(line)
        groups = _GROUPS.search(line)
        if found is None or groups is None:
            continue
        channel = re.search(r"channel_id=(\d+)", line)
        # one that runs beside other work is told several times: where it starts, with what it runs beside, and where it ends
        if channel and any((loops[:depth], channel[1]) in seen for depth in range(len(loops) + 1)):
            continue
        seen.add((loops, channel[1] if channel else line))
        over, size = _group(groups[2], mesh, pairs=groups[1] == "source_target_pairs")
        kind, result = found[2], _size(found[1], started=bool(found[3]))
        if kind == "all-reduce" and computation.startswith("all-reduce-scatter"):  # of the sum each device keeps its part
            kind, result = "reduce-scatter", result / size
        if size > 1:
            count[kind, over, loops] += 1
            sent[kind, over, loops] += _sends(kind, result, size)  # pyright: ignore[reportArgumentType]
    return [Sent(*key, count[key], float(total)) for key, total in sorted(sent.items(), key=lambda each: -each[1])]


def _sends(kind: str, result: float, size: int) -> float:
    """Bytes that a device sends at least, for a result of so many bytes on each of a group's devices."""
    if kind == "all-reduce":
        return 2 * result * (size - 1) / size
    if kind == "reduce-scatter":
        return result * (size - 1)
    return result if kind in ("collective-permute", "collective-broadcast") else result * (size - 1) / size


def _size(shapes: str, *, started: bool) -> float:
    """Bytes of an operation's result; one that starts also names its operands, which come first, and flags."""
    arrays = [(kind, dims) for kind, dims in _ARRAY.findall(shapes) if kind in BYTES]
    if started:
        arrays = [(kind, dims) for kind, dims in arrays if dims or kind != "u32"]
        arrays = arrays[len(arrays) // 2 :]
    return sum(BYTES[kind] * math.prod(_numbers(dims)) for kind, dims in arrays)


def _numbers(text: str) -> list[int]:
    return [int(each) for each in re.findall(r"\d+", text)]


def _iota(text: str) -> np.ndarray:
    sizes, *order = (_numbers(each) for each in text.split("T"))
    ids = np.arange(math.prod(sizes)).reshape(sizes)
    return ids.transpose(order[0]) if order else ids


def _group(text: str, mesh: Mesh, *, pairs: bool) -> tuple[str, int]:
    """The mesh axes along which the devices of a group differ, and how many devices it has."""
    if text.startswith("{"):
        groups = [_numbers(each) for each in text.split("}") if _numbers(each)]
        group = np.asarray(groups if pairs else groups[:1])
    elif text.startswith("["):
        sizes, ids = text.split("<=")
        group = _iota(ids).reshape(_numbers(sizes))[:1]
    else:
        told = re.fullmatch(r"mesh\[(.*?)\](?:, device_ids=\((.*)\))? \{(.*)\}", text)
        assert told is not None, text
        names, sizes = zip(*re.findall(r"'(\w+)'=(\d+)", told[1]), strict=True)
        whole = (_iota(told[2]) if told[2] else np.arange(mesh.size)).reshape([int(size) for size in sizes])
        group = whole[tuple(slice(None) if f"'{name}'" in told[3] else 0 for name in names)].reshape(1, -1)
    places = np.stack(np.unravel_index(group, mesh.devices.shape))  # [axes, groups, devices]
    differs = (places != places[:, :, :1]).any(axis=(1, 2))
    over = " ".join(name for name, each in zip(mesh.axis_names, differs, strict=True) if each)
    return over, (2 if over else 1) if pairs else group.shape[1]


class _Program:
    """The computations of a program's text by name, and who calls them."""

    def __init__(self, text: str) -> None:
        self.lines: dict[str, list[str]] = {}
        self.entry = name = ""
        for line in text.splitlines():
            begins = re.match(r"(ENTRY )?%?([\w.\-]+) .*\{\s*$", line)
            if begins and not line.startswith(" "):
                name = begins[2]
                self.lines[name], self.entry = [], name if begins[1] else self.entry
            elif line.startswith("  ") and name:
                self.lines[name].append(line)

    def operations(self) -> Iterator[tuple[str, str, Loops]]:
        """Each line of the program with its computation and the loops around it."""
        yield from self._of(self.entry, ())

    def _of(self, name: str, loops: Loops) -> Iterator[tuple[str, str, Loops]]:
        for line in self.lines.get(name, ()):
            yield line, name, loops
            for role, called in _CALLED.findall(line):
                if role == "to_apply":  # how two numbers are added
                    continue
                inside = loops
                if role == "body":
                    inside = (*loops, self.rounds(line, outermost=not loops))
                elif "computation" in role:
                    inside = (*loops, BRANCH)
                for each in re.findall(r"%([\w.\-]+)", called):
                    yield from self._of(each, inside)

    def rounds(self, line: str, *, outermost: bool) -> str:
        """Of a loop: what the compiler says, or the constant that its count is compared with."""
        known = re.search(r"known_trip_count[^\d]*(\d+)", line)
        if known:
            return known[1]
        condition = re.search(r"condition=%([\w.\-]+)", line)
        there = self.lines.get(condition[1], []) if condition else []
        root = next((each for each in there if each.lstrip().startswith("ROOT")), "")
        if " compare(" in root and "direction=LT" in root:
            operand = root.split(" compare(")[1].split(")")[0].split(", ")[-1].strip().lstrip("%")
            for each in there:
                constant = re.match(rf"\s*%?{re.escape(operand)} = \S+ constant\((\d+)\)", each)
                if constant:
                    return constant[1]
        return DECODING if outermost else UNKNOWN
