"""Runs programs that nobody trusts, and says what became of them.

A program runs in a cell (`jaxreason.rewards.cell`): its own processes, session, network, folders and user, a few read-only
folders of the system and an empty /tmp, limits on everything, and no inherited descriptor or variable. The cell is built by
bubblewrap where it is installed and works, and otherwise from the kernel's namespaces directly; where neither isolates,
nothing runs. Which of them works is found by trying (`find_isolation`), and the caller keeps the answer.

Deliberately absent: other languages than Python, packages (the program has the standard library), and defence against holes
in the kernel: for programs written by an adversary instead of a policy, put a virtual machine around all of this.
"""

from __future__ import annotations

import enum
import functools
import io
import marshal
import math
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jaxreason.rewards import cell

GRACE = 2.0  # seconds that a cell may take on top of its limit, to be built and to end, before it is killed from outside
_ENVIRONMENT = {"PATH": "/usr/bin:/bin", "HOME": "/tmp", "LANG": "C.UTF-8", "PYTHONHASHSEED": "0"}
_BOOT = (
    "import sys, marshal; room = {'__name__': 'cell'}; code, spec = marshal.loads(sys.stdin.buffer.read()); "
    "exec(code, room); room['main'](spec)"
)
# not all of /usr: an image's own files are often in /usr/src
_SYSTEM = ["/bin", "/lib", "/lib32", "/lib64", "/nix/store", "/etc/ld.so.cache"]
_SYSTEM += ["/usr/bin", "/usr/lib", "/usr/lib32", "/usr/lib64", "/usr/local/lib", "/usr/share/zoneinfo"]


class Verdict(enum.Enum):
    """What became of a program."""

    ACCEPTED = "accepted"
    WRONG_ANSWER = "wrong answer"
    RUNTIME_ERROR = "runtime error"  # also a program that wrote too much
    TIME_LIMIT = "time limit"
    MEMORY_LIMIT = "memory limit"
    COMPILE_ERROR = "compile error"
    REFUSED = "refused"  # it did not run, for nothing here isolates it


@dataclass(frozen=True)
class Limits:
    """What one call may take, all its programs together; `memory_mb` is of each process, `output_bytes` of each program."""

    seconds: float = 10.0
    memory_mb: int = 512
    disk_mb: int = 16
    output_bytes: int = 1 << 20
    processes: int = 1  # at 1 it cannot start another (it can start threads)


@dataclass(frozen=True)
class Isolation:
    """What isolates here: 'bubblewrap', 'namespaces', 'none' (at the caller's own risk), or 'refused' for the given reason."""

    kind: str
    reason: str = ""


@dataclass(frozen=True)
class Job:
    """A function of a compiled module, called with plain values in a process of its own."""

    code: bytes  # marshalled
    call: str
    values: Mapping[str, Any]
    stdin: bytes = b""


@dataclass(frozen=True)
class Finished:
    """How a program ended; the verdict is None where it ended by itself, with exit code 0."""

    verdict: Verdict | None
    reason: str = ""
    stdout: bytes = b""
    stderr: bytes = b""
    code: int | None = None  # its exit code, or minus the signal that ended it
    cpu_seconds: float = 0.0
    seconds: float = 0.0


@dataclass(frozen=True)
class Cell:
    """A running cell; `finish` or `kill` ends it."""

    process: subprocess.Popen[bytes]
    jobs: int
    limits: Limits
    folder: str | None = field(default=None)  # to be removed

    def finish(self, *, seconds: float | None = None) -> list[Finished]:
        """Waits until all of its jobs have ended, at most for the limit or `seconds`, and says how each did."""
        try:
            told, errors = self.process.communicate(timeout=self.limits.seconds + GRACE if seconds is None else seconds)
            reason = errors.decode(errors="replace").strip().rpartition("\n")[2] or "the cell was killed"
            verdict = Verdict.RUNTIME_ERROR
        except subprocess.TimeoutExpired as late:
            self.kill()
            told, verdict, reason = late.output or b"", Verdict.TIME_LIMIT, _too_long(self.limits)
        if self.folder:
            shutil.rmtree(self.folder, ignore_errors=True)
        stream, ended = io.BytesIO(told), []
        while len(ended) < self.jobs:
            try:
                ended.append(_finished(marshal.load(stream), self.limits))
            except (EOFError, ValueError, TypeError):  # it was killed before it said so
                ended.append(Finished(verdict, reason))
        return ended

    def kill(self) -> None:
        """Kills the cell and all that lives in it: process 1 ends with its parent or its listener, and the rest with it."""
        try:
            os.killpg(self.process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        for pipe in (self.process.stdout, self.process.stderr):
            if pipe:
                pipe.close()
        self.process.wait()


def run(
    source: str,
    *,
    isolation: Isolation,
    stdin: Sequence[bytes] = (b"",),
    files: Mapping[str, bytes] | None = None,
    limits: Limits = Limits(),  # noqa: B008 (frozen)
) -> list[Finished]:
    """Runs a Python program once for each standard input, one after the other, and says how each run ended.

    `files` lie beside it in its folder, which the runs share and nobody else sees. Where `isolation` is 'refused' nothing
    runs, and every verdict is REFUSED.
    """
    if isolation.kind == "refused":
        return [Finished(Verdict.REFUSED, isolation.reason) for _ in stdin]
    code = module_code("script.py")
    jobs = [Job(code, "play", {"source": source}, each) for each in stdin]
    return start(jobs, isolation=isolation, limits=limits, files=files).finish()


def find_isolation(*, allow_unsafe: bool = False) -> Isolation:
    """What isolates here, found by trying; with `allow_unsafe` 'none' instead of 'refused'. Takes some tens of milliseconds."""
    reasons = []
    for kind in ("bubblewrap", "namespaces"):
        reason = why_not(kind)
        if not reason:
            return Isolation(kind)
        reasons.append(f"{kind}: {reason}")
    reason = (
        f"programs cannot be isolated here ({'; '.join(reasons)}): install bubblewrap or allow user namespaces on a Linux "
        "kernel of at least 5.12, or set allow_unsafe=True to run them with limits alone, where all of this user's files are "
        "within their reach"
    )
    return Isolation("none" if allow_unsafe else "refused", reason)


def why_not(kind: str) -> str:
    """Why a kind of isolation does not isolate here; '' where it does. A probe tries what a cell must not allow."""
    if kind == "bubblewrap" and shutil.which("bwrap") is None:
        return "it is not installed"
    job = Job(module_code("script.py"), "probe", {"secret": str(Path(__file__).resolve())})
    (ended,) = start([job], isolation=Isolation(kind), limits=Limits(seconds=5.0)).finish()
    if ended.verdict is None and ended.stdout == b"isolated":
        return ""
    return ended.stdout.decode(errors="replace").strip() or ended.reason or "it says nothing"


@functools.cache
def module_code(name: str) -> bytes:
    """A module of this folder, compiled and marshalled for a cell's interpreter, which is of the same version."""
    path = Path(__file__).with_name(name)
    return marshal.dumps(compile(path.read_text(encoding="utf-8"), name, "exec"))


def start(
    jobs: Sequence[Job],
    *,
    isolation: Isolation,
    limits: Limits,
    files: Mapping[str, bytes] | None = None,
    keep: Sequence[int] = (),
) -> Cell:
    """Starts a cell that runs the jobs in turn. The descriptors `keep` are theirs (there is one job then) from number 3 on."""
    if isolation.kind not in ("bubblewrap", "namespaces", "none"):
        raise ValueError(f"the isolation is '{isolation.kind}', which runs nothing: {isolation.reason}")
    if keep and len(jobs) != 1:
        raise ValueError(f"{len(jobs)} jobs were given with descriptors to keep: these go to one job")
    readable, folder = _readable(), None
    python = os.path.realpath(getattr(sys, "_base_executable", sys.executable))
    command = [python, "-s", "-P", "-S", "-B", "-c", _BOOT]
    if isolation.kind == "bubblewrap":
        command = _bubblewrap(readable, limits) + command
    elif isolation.kind == "none":
        folder = tempfile.mkdtemp(prefix="program-")
        os.chmod(folder, 0o777 if os.geteuid() == 0 else 0o700)
    spec = {
        "isolation": isolation.kind,
        "parent": os.getpid(),
        "readable": readable,
        "folder": folder or "/tmp",
        "files": dict(files or {}),
        "keep": list(keep),
        "jobs": [{"code": job.code, "call": job.call, "values": dict(job.values), "stdin": job.stdin} for job in jobs],
        "limits": {
            "seconds": limits.seconds,
            "cpu": math.ceil(limits.seconds) + 1,
            "memory": limits.memory_mb << 20,
            "disk": limits.disk_mb << 20,
            "output": limits.output_bytes,
            "processes": limits.processes,
        },
    }
    process = subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=_ENVIRONMENT,
        cwd="/",
        pass_fds=keep,
        start_new_session=True,
    )
    assert process.stdin is not None
    try:
        process.stdin.write(marshal.dumps((marshal.loads(module_code("cell.py")), spec)))
        process.stdin.close()
    except BrokenPipeError:  # it has ended already, and its standard error says why
        pass
    process.stdin = None
    return Cell(process, len(jobs), limits, folder)


def _readable() -> list[str]:
    """The folders that an interpreter needs: those of the system, and its own without the packages of an environment."""
    prefixes = dict.fromkeys(map(os.path.realpath, (sys.base_prefix, sys.base_exec_prefix)))
    own = [f"{prefix}/{folder}" for prefix in prefixes if prefix != "/" for folder in ("bin", "lib", "lib64")]
    paths = [*_SYSTEM]
    for path in own:
        if os.path.isdir(path) and not any(path == there or path.startswith(there + "/") for there in paths):
            paths.append(path)
    return paths


def _bubblewrap(readable: Sequence[str], limits: Limits) -> list[str]:
    command = ["bwrap", "--unshare-pid", "--unshare-net", "--unshare-ipc", "--unshare-uts", "--die-with-parent", "--as-pid-1"]
    capabilities = ["CAP_SYS_ADMIN"]  # to limit the number of files; a program has none
    if os.geteuid() == 0:  # it becomes nobody inside
        capabilities += ["CAP_SETUID", "CAP_SETGID", "CAP_SETPCAP"]
    else:
        command += ["--unshare-user"]
    command += ["--cap-drop", "ALL", *(word for name in capabilities for word in ("--cap-add", name))]
    above = {str(parent): None for path in ("/dev/null", *readable) for parent in reversed(Path(path).parents)}
    for folder in above:  # bubblewrap makes them too, but not for nobody to look into
        command += ["--perms", "0755", "--dir", folder]
    for path in readable:
        if os.path.islink(path):
            command += ["--symlink", os.readlink(path), path]
        else:
            command += ["--ro-bind-try", path, path]
    for device in ("/dev/null", "/dev/zero", "/dev/urandom", "/dev/random"):
        command += ["--dev-bind", device, device]
    command += ["--perms", "1777", "--size", str(limits.disk_mb << 20), "--tmpfs", "/tmp", "--remount-ro", "/"]
    return [shutil.which("bwrap") or "bwrap", *command[1:], "--"]


def _finished(told: Mapping[str, Any], limits: Limits) -> Finished:
    """The verdict on what a cell told about one job."""
    code, why, cpu = told["code"], told["why"], told["cpu"]
    verdict, reason = None, ""
    if why == "time" or code == -signal.SIGXCPU or (code == -signal.SIGKILL and cpu >= limits.seconds):
        verdict, reason = Verdict.TIME_LIMIT, _too_long(limits)
    elif why == "output":
        verdict, reason = Verdict.RUNTIME_ERROR, f"it wrote more than {limits.output_bytes} bytes"
    elif code == cell.COMPILE_ERROR:
        verdict = Verdict.COMPILE_ERROR
    elif code in (cell.OUT_OF_MEMORY, -signal.SIGKILL):
        verdict, reason = Verdict.MEMORY_LIMIT, f"it needed more than {limits.memory_mb} MB"
    elif code:
        verdict = Verdict.RUNTIME_ERROR
    reason = reason or told["stderr"].decode(errors="replace").strip()[-500:] if verdict else ""
    return Finished(verdict, reason, told["stdout"], told["stderr"], code, cpu, told["seconds"])


def _too_long(limits: Limits) -> str:
    return f"it took longer than {limits.seconds:g} seconds"
