"""What runs in two cells that belong together: a program that serves calls, and the tests that make these calls.

Between them is a pipe each way. What crosses are plain values (None, bool, int, float, complex, str, bytes, list, tuple, dict,
set, frozenset, range, and the types of builtins), rebuilt on the other side, so that nothing a program defines takes part in a
comparison: not its `__eq__`, not its builtins, not its exit code. Whatever the program writes to the pipe is a value that it
claims to have computed, which it could have returned as well: so nothing is gained by forging a reply. Anything else that it
makes stays with it, and the tests hold a `Remote`: to call, to iterate, to get plain values out of.

Deliberately absent: pickle, comparisons between two remote objects, functions of the tests as arguments, and arguments
changed in place (a call gets copies).
"""

from __future__ import annotations

import builtins
import os
import struct
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:  # not imported when it runs: typing takes as long as the interpreter
    from collections.abc import Callable, Iterator, Sequence
    from typing import Any

COMPILE_ERROR = 121  # as in jaxreason.rewards.cell
REQUESTS, REPLIES = 3, 4  # the descriptors that a cell with calls is given
DEEPEST = 100
LONGEST = 1 << 26
_COLLECTIONS: dict[bytes, Any] = {b"l": list, b"t": tuple, b"e": set, b"z": frozenset}


# the program's side


def serve(prompt: str, source: str) -> None:
    """Loads a program and answers calls of what it defines until nobody asks any more.

    The program continues `prompt` where it does not stand alone; otherwise it comes after it, for its imports.
    """
    module = type(sys)("program")
    sys.modules["program"] = module
    objects: list[Any] = []
    try:
        parts = _compiled(prompt, source)
    except (SyntaxError, ValueError, RecursionError, MemoryError, OverflowError) as error:
        _send(REPLIES, encode(("compile error", f"{type(error).__name__}: {error}"), None))
        os._exit(COMPILE_ERROR)
    reply: Any = ("ok", None)
    try:
        for part in parts:
            exec(part, module.__dict__)
    except BaseException as error:
        reply = ("raise", type(error).__name__, _message(error))
    while True:
        try:
            data = encode(reply, objects)
        except BaseException as error:
            data = encode(("raise", type(error).__name__, _message(error)), None)
        _send(REPLIES, data)
        request = _receive(REQUESTS)
        if request is None:
            os._exit(0)
        try:
            reply = _answer(decode(request, lambda name: _find(name, module.__dict__, objects)), objects)
        except BaseException as error:
            reply = ("raise", type(error).__name__, _message(error))


def _compiled(prompt: str, source: str) -> list[Any]:
    try:
        code = compile(source, "program.py", "exec", dont_inherit=True)
    except SyntaxError:
        if not prompt:
            raise
        return [compile(prompt + source, "program.py", "exec", dont_inherit=True)]
    return [compile(prompt, "prompt.py", "exec", dont_inherit=True), code]


def _find(name: Any, defined: dict[str, Any], objects: Sequence[Any]) -> Any:
    if isinstance(name, int):
        return objects[name]
    if name not in defined:
        raise NameError(f"name {name!r} is not defined")
    return defined[name]


def _answer(request: Any, objects: list[Any]) -> Any:
    what, target, *more = request
    if what == "call":
        return ("ok", target(*more[0], **more[1]))
    if what == "get":
        return ("ok", getattr(target, more[0]))
    if what == "set":
        return ("ok", setattr(target, more[0], more[1]))
    if what == "next":
        try:
            return ("ok", next(target))
        except StopIteration:
            return ("stop",)
    objects.append(iter(target))
    return ("iterator", len(objects) - 1)


def _message(error: BaseException) -> str:
    try:
        return str(error)[:500]
    except BaseException:
        return ""


# the tests' side


class Raised(Exception):
    """The program raised; the class that is raised here has the name of its exception, and is one where builtins have it."""


class Gone(BaseException):
    """The program no longer answers."""


class Remote:
    """A name that the program defines, or an object that stays with it: compared by identity, like any object without `__eq__`."""

    def __init__(self, ask: Callable[..., Any], name: Any) -> None:
        object.__setattr__(self, "_ask", ask)
        object.__setattr__(self, "_name", name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._ask("call", self, args, kwargs)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self._ask("get", self, name)

    def __setattr__(self, name: str, value: Any) -> None:
        self._ask("set", self, name, value)

    def __iter__(self) -> Iterator[Any]:
        return self._ask("iter", self)

    def __next__(self) -> Any:
        return self._ask("next", self)


def test(before: Sequence[str], names: Sequence[str], tests: Sequence[str]) -> None:
    """Runs tests on a program that serves calls, and writes a line for each: a verdict, a tab, and the reason.

    `names` are what the program defines; `before` is run first, once with these names and not able to change them.
    A test that has not asked the program for anything proves nothing, and fails.
    """
    lines = os.dup(1)
    sys.stdout = sys.stderr = open(os.devnull, "w")
    asked = [0, 0]  # requests so far; 1 once the program no longer answers

    def hear() -> Any:
        data = None if asked[1] else _receive(REPLIES)
        if data is None:
            asked[1] = 1
            raise Gone("the program ended")
        try:
            return decode(data, lambda name: Remote(ask, name))
        except (ValueError, TypeError, RecursionError, struct.error) as error:
            raise Raised(f"what it returned cannot be read: {error}") from None

    def ask(*request: Any) -> Any:
        asked[0] += 1
        _send(REQUESTS, encode(request, None))
        what, *more = hear()
        if what == "ok":
            return more[0]
        if what == "iterator" and request[0] == "iter":
            return Remote(ask, more[0])
        if what == "stop" and request[0] == "next":  # from a call it would end the loop of a test over several calls
            raise StopIteration
        raise _as_raised(*more[:2])

    def line(verdict: str, reason: str) -> None:
        os.write(lines, f"{verdict}\t{reason[:500]!r}\n".encode(errors="backslashreplace"))

    try:
        what, *more = hear()
    except (Gone, Raised) as error:
        line("runtime error", str(error))
        os._exit(0)
    if what != "ok":
        line(*(("compile error", str(more[0])) if what == "compile error" else _verdict(_as_raised(*more))))
        os._exit(0)
    space: dict[str, Any] = {"__name__": "tests"}
    given = {name: Remote(ask, name) for name in names}
    space.update(given)
    try:
        for text in before:
            exec(compile(text, "setup.py", "exec", dont_inherit=True), space)
            space.update(given)
    except BaseException as error:
        line(*_verdict(error))
        os._exit(0)
    for text in tests:
        asked[0] = 0
        verdict = ("accepted", "")
        try:
            exec(compile(text, "tests.py", "exec", dont_inherit=True), space)
        except BaseException as error:
            verdict = _verdict(error)
        if asked[1]:
            verdict = ("runtime error", "the program ended")
        elif verdict[0] == "accepted" and not asked[0]:
            verdict = ("wrong answer", "the test asked the program for nothing")
        line(*verdict)
    os._exit(0)


def _verdict(error: BaseException) -> tuple[str, str]:
    said = f"{type(error).__name__}: {_message(error)}"
    if isinstance(error, Raised):
        return ("memory limit" if type(error).__name__ == "MemoryError" else "runtime error"), said
    return ("runtime error" if isinstance(error, Gone) else "wrong answer"), said


def _as_raised(name: Any = "", message: Any = "") -> Raised:
    """An exception of the program's name that is also the builtin of that name, if it is an ordinary one."""
    name = name if isinstance(name, str) and name.isidentifier() else "Exception"
    builtin = getattr(builtins, name, None)
    ordinary = isinstance(builtin, type) and issubclass(builtin, Exception) and builtin is not StopIteration
    kinds: Any = (Raised, builtin) if ordinary else (Raised,)
    try:
        return type(name, kinds, {})(str(message))
    except TypeError:  # some builtins want more than a message
        return type(name, (Raised,), {})(str(message))


# between them


def _send(number: int, data: bytes) -> None:
    view = memoryview(len(data).to_bytes(8, "big") + data)
    while view:
        try:
            view = view[os.write(number, view) :]
        except BrokenPipeError:
            return  # the next thing it hears is that nobody is there


def _receive(number: int) -> bytes | None:
    """The next message; None where there is none and will be none."""
    head = _exactly(number, 8)
    size = int.from_bytes(head, "big")
    if len(head) < 8 or size > LONGEST:
        return None
    data = _exactly(number, size)
    return data if len(data) == size else None


def _exactly(number: int, size: int) -> bytes:
    data = bytearray()
    while len(data) < size:
        more = os.read(number, min(size - len(data), 1 << 16))
        if not more:
            break
        data += more
    return bytes(data)


def encode(value: Any, objects: list[Any] | None, depth: int = 0) -> bytes:
    """A plain value as bytes: a letter, and what it needs.

    What is not plain is kept in `objects` and sent as its place there; where that is None it is a TypeError.
    """
    if depth > DEEPEST:
        raise ValueError(f"a value of more than {DEEPEST} levels cannot be sent")
    if value is None:
        return b"N"
    if isinstance(value, bool):
        return b"T" if value else b"F"
    if isinstance(value, int):
        value = int(value)
        return b"i" + _sized(value.to_bytes(value.bit_length() // 8 + 1, "big", signed=True))
    if isinstance(value, float):
        return b"f" + struct.pack(">d", value)
    if isinstance(value, complex):
        return b"c" + struct.pack(">dd", value.real, value.imag)
    if isinstance(value, str):
        return b"s" + _sized(value.encode("utf-8", "surrogatepass"))
    if isinstance(value, bytes):
        return b"b" + _sized(value)
    if isinstance(value, range):
        return b"g" + b"".join(encode(each, objects, depth + 1) for each in (value.start, value.stop, value.step))
    for letter in _COLLECTIONS:
        if isinstance(value, _COLLECTIONS[letter]):
            return letter + _items(list(value), objects, depth)
    if isinstance(value, dict):
        return b"d" + _items([side for pair in dict.items(value) for side in pair], objects, depth)
    if isinstance(value, type) and getattr(builtins, value.__name__, None) is value:
        return b"y" + _sized(value.__name__.encode())
    if type(value) is Remote:
        return b"r" + encode(value.__dict__["_name"], None)
    if objects is None:
        raise TypeError(f"a {type(value).__name__} cannot be sent to the program: tests may give it plain values")
    objects.append(value)
    return b"r" + encode(len(objects) - 1, None)


def _sized(data: bytes) -> bytes:
    return len(data).to_bytes(8, "big") + data


def _items(values: list[Any], objects: list[Any] | None, depth: int) -> bytes:
    return len(values).to_bytes(8, "big") + b"".join(encode(each, objects, depth + 1) for each in values)


def decode(data: bytes, remote: Callable[[Any], Any]) -> Any:
    """The value of `encode`; a ValueError where the bytes are not one. `remote` makes what a place in `objects` stands for."""
    value, end = _decode(data, 0, remote, 0)
    if end != len(data):
        raise ValueError("a message has something after its value")
    return value


def _decode(data: bytes, place: int, remote: Callable[[Any], Any], depth: int) -> tuple[Any, int]:
    letter, place = data[place : place + 1], place + 1
    if depth > DEEPEST + 2 or not letter:
        raise ValueError("a message is too deep" if letter else "a message is cut short")
    if letter in b"NTF":
        return {b"N": None, b"T": True, b"F": False}[letter], place
    if letter in b"fc":
        end = place + (8 if letter == b"f" else 16)
        numbers = struct.unpack(">d" if letter == b"f" else ">dd", data[place:end])
        return numbers[0] if letter == b"f" else complex(*numbers), end
    if letter == b"r":
        name, place = _decode(data, place, remote, depth + 1)
        if type(name) not in (int, str):
            raise ValueError("a message has an object without a name")
        return remote(name), place
    count = 3 if letter == b"g" else int.from_bytes(data[place : place + 8], "big")
    place += 0 if letter == b"g" else 8
    if count > len(data) - place:
        raise ValueError("a message is cut short")
    if letter in b"isby":
        text, end = data[place : place + count], place + count
        if letter == b"y":
            return _builtin_type(text.decode()), end
        if letter == b"i":
            return int.from_bytes(text, "big", signed=True), end
        return text.decode("utf-8", "surrogatepass") if letter == b"s" else text, end
    if letter not in (*_COLLECTIONS, b"d", b"g"):
        raise ValueError(f"a message has no value of the kind {letter!r}")
    values = []
    for _ in range(count):
        value, place = _decode(data, place, remote, depth + 1)
        values.append(value)
    if letter == b"d":
        return dict(zip(values[::2], values[1::2], strict=True)), place
    return range(*values) if letter == b"g" else _COLLECTIONS[letter](values), place


def _builtin_type(name: str) -> type:
    found = getattr(builtins, name, None)
    if not isinstance(found, type):
        raise ValueError(f"a message has no type {name!r}")
    return found
