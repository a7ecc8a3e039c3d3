"""The inside of a sandbox: what a fresh interpreter does before, around and after the code that nobody trusts.

`jaxreason.rewards.sandbox` sends this file, as code, to an interpreter that it starts. The interpreter leaves the host's
namespaces (unless bubblewrap already did that for it) and forks process 1 of its own; process 1 builds a root of a few read-only
folders and an empty /tmp, and runs the jobs one after the other in children that have no privileges, no descriptors and no
system calls to get any. When process 1 ends, the kernel kills whatever is left inside.

Only small modules are imported, for a cell is started for every sample. Deliberately absent: users other than the caller
and nobody, cgroups, and any other architecture than x86_64 and aarch64, where system calls have other numbers.
"""

from __future__ import annotations

import builtins
import ctypes
import fcntl
import marshal
import os
import resource
import select
import sys
import time

TYPE_CHECKING = False
if TYPE_CHECKING:  # not imported when it runs: typing alone would take as long as all of the above
    from collections.abc import Mapping
    from typing import Any

COMPILE_ERROR, OUT_OF_MEMORY = 121, 122  # exit codes by which a child tells what became of the program
NOBODY = 65534
THREADS = 16  # which count as processes for the kernel
FILES = 4096  # in /tmp

_NAMESPACES = 0x20000 | 0x20000000 | 0x40000000 | 0x8000000 | 0x4000000  # mount, process, network, IPC, host name
_USER_NAMESPACE = 0x10000000
_RDONLY, _NOSUID, _NODEV, _REMOUNT, _BIND, _REC, _PRIVATE = 1, 2, 4, 32, 4096, 16384, 1 << 18
_DETACH = 2
_PDEATHSIG, _DUMPABLE, _SECCOMP, _CAPBSET_DROP, _NO_NEW_PRIVS = 1, 4, 22, 24, 38
_KILL, _INTERRUPT = 9, 2

# system call -> its number on x86_64 and on aarch64 (None: it does not exist there)
_FORKS = {"fork": (57, None), "vfork": (58, None)}
_CLONE = {"clone": (56, 220), "clone3": (435, 435)}
_DENIED = {
    "socket": (41, 198), "connect": (42, 203), "accept": (43, 202), "bind": (49, 200), "listen": (50, 201),
    "ptrace": (101, 117), "process_vm_readv": (310, 270), "process_vm_writev": (311, 271), "pidfd_getfd": (438, 438),
    "kcmp": (312, 272), "perf_event_open": (298, 241), "bpf": (321, 280), "userfaultfd": (323, 282),
    "io_uring_setup": (425, 425), "io_uring_enter": (426, 426), "io_uring_register": (427, 427),
    "unshare": (272, 97), "setns": (308, 268), "chroot": (161, 51), "pivot_root": (155, 41), "mount": (165, 40),
    "umount2": (166, 39), "open_tree": (428, 428), "move_mount": (429, 429), "fsopen": (430, 430), "fsconfig": (431, 431),
    "fsmount": (432, 432), "fspick": (433, 433), "mount_setattr": (442, 442), "name_to_handle_at": (303, 264),
    "open_by_handle_at": (304, 265), "add_key": (248, 217), "request_key": (249, 218), "keyctl": (250, 219),
    # memory that no limit on a process counts
    "memfd_create": (319, 279), "memfd_secret": (447, 447), "shmget": (29, 194), "msgget": (68, 186), "semget": (64, 190),
    "mq_open": (240, 180), "landlock_create_ruleset": (444, 444),  # its own, entered before this filter, stays
    # the machine itself
    "syslog": (103, 116), "personality": (135, 92), "modify_ldt": (154, None), "acct": (163, 89), "swapon": (167, 224),
    "swapoff": (168, 225), "reboot": (169, 142), "sethostname": (170, 161), "setdomainname": (171, 162), "iopl": (172, None),
    "ioperm": (173, None), "init_module": (175, 105), "finit_module": (313, 273), "delete_module": (176, 106),
    "kexec_load": (246, 104), "kexec_file_load": (320, 294), "quotactl": (179, 60), "settimeofday": (164, 170),
    "adjtimex": (159, 171), "clock_settime": (227, 112), "clock_adjtime": (305, 266), "mbind": (237, 235),
    "set_mempolicy": (238, 237), "migrate_pages": (256, 238), "move_pages": (279, 239),
}  # fmt: skip
_AUDIT = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
_CALLS = {"pivot_root": (155, 41), "capset": (126, 91), "mount_setattr": (442, 442), "landlock": (444, 444)}


def main(spec: Mapping[str, Any]) -> None:
    """Runs spec["jobs"] under spec["limits"], and writes what became of each to descriptor 1, marshalled; does not return.

    A cell that cannot be built ends with exit code 1, and says why on its standard error.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    sys.dont_write_bytecode = True
    if spec["isolation"] == "namespaces":
        _die_with_parent(libc, spec["parent"])
        _leave_namespaces(libc)
        alive, mine = os.pipe()
        first = os.fork()
        if first:
            for number in (0, 1, alive, *spec["keep"]):
                os.close(number)
            os._exit(os.waitstatus_to_exitcode(os.waitpid(first, 0)[1]) and 1)
        os.close(mine)
        _die_with_parent(libc, None)
        if select.select([alive], [], [], 0)[0]:  # the parent ended before this process asked to end with it
            os._exit(1)
        os.close(alive)
        _build_root(libc, spec["readable"], spec["limits"]["disk"])
    elif spec["isolation"] == "bubblewrap":  # which does not limit how many files there are, and each is the kernel's memory
        _mount(libc, "tmp", "/tmp", None, _REMOUNT | _NOSUID | _NODEV, _tmp_options(spec["limits"]["disk"]))
    elif spec["isolation"] == "none":
        _die_with_parent(libc, spec["parent"])
    if spec["isolation"] != "none" and os.getpid() != 1:  # what it kills later on is all that it can see
        raise OSError("the cell has no process namespace of its own")
    libc.signal(_INTERRUPT, 0)  # process 1 ignores every signal from inside that it has no handler for
    if os.geteuid() == 0 and spec["isolation"] != "none":
        _become_nobody(libc)
        libc.unshare(_USER_NAMESPACE)  # where that is allowed, its processes are counted apart from all others
        _die_with_parent(libc, None)  # which a process forgets when its user or its rights change
    os.chdir(spec["folder"])
    for name, content in spec["files"].items():
        with open(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644), "wb") as file:
            file.write(content)
    deadline = time.monotonic() + spec["limits"]["seconds"]
    for job in spec["jobs"]:
        _write(marshal.dumps(_run(libc, job, spec, deadline)))
    os._exit(0)


def _write(data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(1, view) :]


def _run(libc: Any, job: Mapping[str, Any], spec: Mapping[str, Any], deadline: float) -> dict[str, Any]:
    """Runs one job in a child until it ends, the deadline passes or it has written too much; nothing of it is left."""
    read_in, write_in = os.pipe()
    read_out, write_out = os.pipe()
    read_error, write_error = os.pipe()
    began = time.monotonic()
    child = os.fork()
    if child == 0:
        try:
            _become(libc, (read_in, write_out, write_error, *spec["keep"]), spec)
            _streams()
            room: dict[str, Any] = {"__name__": "job"}
            exec(marshal.loads(job["code"]), room)
            room[job["call"]](**job["values"])
        except BaseException as error:
            os.write(2, repr(error).encode(errors="replace"))
        finally:
            os._exit(1)
    for number in (read_in, write_out, write_error, *spec["keep"]):
        os.close(number)
    done = os.pidfd_open(child)
    texts = {read_out: bytearray(), read_error: bytearray()}
    why = _attend(done, write_in, job["stdin"], texts, deadline, spec["limits"]["output"])
    if why:
        os.kill(child, _KILL)
    _, status, usage = os.wait4(child, 0)
    for number in (done, read_out, read_error):
        os.close(number)
    try:  # what it left behind: process 1 of a namespace means by -1 all that live in it
        os.killpg(child, _KILL) if spec["isolation"] == "none" else os.kill(-1, _KILL)
        while True:
            os.waitpid(-1, 0)
    except (ProcessLookupError, ChildProcessError):
        pass
    return {
        "stdout": bytes(texts[read_out]),
        "stderr": bytes(texts[read_error]),
        "code": os.waitstatus_to_exitcode(status),
        "why": why,
        "cpu": usage.ru_utime + usage.ru_stime,
        "seconds": time.monotonic() - began,
    }


def _attend(done: int, write_in: int, stdin: bytes, texts: Mapping[int, bytearray], deadline: float, most: int) -> str:
    """Feeds and reads a child until it has ended ('') or must be ended ('time' or 'output')."""
    poll = select.poll()
    for number in (done, *texts):
        poll.register(number, select.POLLIN)
    poll.register(1, 0)  # an error there: nobody is left to be told
    rest = memoryview(stdin)
    if rest:
        os.set_blocking(write_in, False)
        poll.register(write_in, select.POLLOUT)
    else:
        os.close(write_in)
    why = ended = None
    while why is None and ended is None:
        events = dict(poll.poll(max(0.0, deadline - time.monotonic()) * 1000))
        ended = events.pop(done, None)
        if 1 in events:
            return "abandoned"
        if write_in in events:
            try:
                rest = rest[os.write(write_in, rest[:65536]) :]
            except BlockingIOError:
                pass
            except BrokenPipeError:  # it does not read its input
                rest = rest[:0]
            if not rest:
                poll.unregister(write_in)
                os.close(write_in)
        for number in texts:
            if number in events or ended:
                why = why or _read(poll, number, texts, most, to_the_end=ended is not None)
        if not ended and time.monotonic() >= deadline:
            why = "time"
    if rest:
        os.close(write_in)
    return why or ""


def _read(poll: Any, number: int, texts: Mapping[int, bytearray], most: int, *, to_the_end: bool) -> str | None:
    """Reads what there is; to the end of what an ended child has written, though something it left may hold the pipe open."""
    os.set_blocking(number, False)
    while True:
        try:
            more = os.read(number, 65536)
        except BlockingIOError:
            return None
        texts[number].extend(more)
        if sum(map(len, texts.values())) > most:
            del texts[number][most:]
            return "output"
        if not more:
            if not to_the_end:
                poll.unregister(number)
            return None
        if not to_the_end:
            return None


def _become(libc: Any, numbers: tuple[int, ...], spec: Mapping[str, Any]) -> None:
    """Makes this process the child: its own session, the given descriptors as 0, 1, 2, ..., limits, and no privileges."""
    limits = spec["limits"]
    _die_with_parent(libc, None)
    os.setsid()
    for place, number in enumerate([fcntl.fcntl(number, fcntl.F_DUPFD, 100) for number in numbers]):
        os.dup2(number, place, inheritable=True)
    os.closerange(len(numbers), 1 << 20)
    most = {
        resource.RLIMIT_CPU: limits["cpu"],
        resource.RLIMIT_AS: limits["memory"],
        resource.RLIMIT_FSIZE: limits["disk"],
        resource.RLIMIT_NOFILE: 64,
        resource.RLIMIT_NPROC: limits["processes"] + THREADS,
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_MEMLOCK: 0,
    }
    for which, value in most.items():
        hard = resource.getrlimit(which)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(which, (value, value))
    for capability in range(64):
        libc.prctl(_CAPBSET_DROP, capability, 0, 0, 0)
    header, nothing = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
    _check(libc.syscall(_number(_CALLS["capset"]), header, nothing), "give up capabilities")
    _check(libc.prctl(_NO_NEW_PRIVS, 1, 0, 0, 0), "refuse new privileges")
    if spec["isolation"] != "none":
        _landlock(libc)
    _filter_calls(libc, forks=limits["processes"] > 1)


def _streams() -> None:
    """What a program expects of its interpreter: this one's standard input has been read, and it was started in a hurry."""
    sys.stdin = sys.__stdin__ = open(0, encoding="utf-8", closefd=False)
    sys.stdout = sys.__stdout__ = open(1, "w", encoding="utf-8", closefd=False)
    sys.stderr = sys.__stderr__ = open(2, "w", encoding="utf-8", errors="backslashreplace", closefd=False)
    sys.argv = ["program.py"]
    for name in ("exit", "quit"):
        setattr(builtins, name, sys.exit)


def _landlock(libc: Any) -> None:
    """Where the kernel has Landlock, says once more what may be written (/tmp and the null device) and read (the root)."""
    call = _number(_CALLS["landlock"])
    version = libc.syscall(call, None, 0, 1)
    if version < 1:
        return
    everything = (1 << 13) - 1 if version == 1 else (1 << 14) - 1  # moving between folders is denied unless it is known
    read = (1 << 0) | (1 << 2) | (1 << 3)  # execute, read a file, read a folder
    rules = libc.syscall(call, ctypes.byref(ctypes.c_uint64(everything)), 8, 0)
    _check(rules, "make a Landlock rule set")
    for path, rights in (("/", read), ("/tmp", everything), ("/dev/null", read & ~8 | (1 << 1))):
        number = os.open(path, os.O_PATH)
        rule = rights.to_bytes(8, sys.byteorder) + number.to_bytes(4, sys.byteorder)
        _check(libc.syscall(call + 1, rules, 1, rule, 0), f"allow {path} in Landlock")
        os.close(number)
    _check(libc.syscall(call + 2, rules, 0), "enter Landlock")
    os.close(rules)


def _filter_calls(libc: Any, *, forks: bool) -> None:
    """Denies the system calls of the tables above: classic BPF over (number, architecture, ..., arguments)."""
    load, equal, above, some_bits, give = 0x20, 0x15, 0x35, 0x45, 0x06
    allow, deny, absent = 0x7FFF0000, 0x00050001, 0x00050026  # errors: EPERM; ENOSYS, after which libc tries the older call
    kill = 0x80000000
    denied = {_number(pair) for pair in (*_DENIED.values(), *(() if forks else _FORKS.values()))} - {-1}
    clone, clone3 = (_number(pair) for pair in _CLONE.values())
    lines: list[tuple[int, int, int, int]] = [(load, 0, 0, 4), (equal, 1, 0, _AUDIT[os.uname().machine]), (give, 0, 0, kill)]
    lines += [(load, 0, 0, 0), (above, 0, 1, 0x40000000), (give, 0, 0, deny)]  # the x32 numbers of x86_64
    for number in sorted(denied):
        lines += [(equal, 0, 1, number), (give, 0, 0, deny)]
    lines += [(equal, 0, 1, clone3), (give, 0, 0, absent), (equal, 1, 0, clone), (give, 0, 0, allow), (load, 0, 0, 16)]
    lines += [(some_bits, 0, 1, 0x7E020000), (give, 0, 0, deny)]  # a clone in new namespaces
    if not forks:
        lines += [(some_bits, 1, 0, 0x10000), (give, 0, 0, deny)]  # a clone that is no thread
    lines += [(give, 0, 0, allow)]
    code = b"".join(
        op.to_bytes(2, sys.byteorder) + bytes((yes, no)) + value.to_bytes(4, sys.byteorder) for op, yes, no, value in lines
    )

    class Program(ctypes.Structure):
        _fields_ = [("length", ctypes.c_ushort), ("lines", ctypes.c_char_p)]

    _check(libc.prctl(_SECCOMP, 2, ctypes.byref(Program(len(lines), code)), 0, 0), "filter system calls")


def _leave_namespaces(libc: Any) -> None:
    """As root directly; otherwise, or where root may not, through a user namespace in which the user is itself and no other."""
    if os.geteuid() == 0:
        if libc.unshare(_NAMESPACES) == 0:
            return
        _become_nobody(libc)
    user, group = os.geteuid(), os.getegid()
    _unshare(libc, _USER_NAMESPACE | _NAMESPACES)
    for name, text in (("setgroups", "deny"), ("uid_map", f"{user} {user} 1"), ("gid_map", f"{group} {group} 1")):
        with open(f"/proc/self/{name}", "w") as file:
            file.write(text)


def _become_nobody(libc: Any) -> None:
    """The kernel does not limit root's processes; and what nobody may do, the program may not do either."""
    os.setgroups([])
    os.setresgid(NOBODY, NOBODY, NOBODY)
    os.setresuid(NOBODY, NOBODY, NOBODY)
    libc.prctl(_DUMPABLE, 1, 0, 0, 0)  # else its own files under /proc are root's


def _build_root(libc: Any, readable: list[str], disk: int) -> None:
    """A new root: the readable paths, read-only, a few devices and an empty /tmp; everything else of the host is gone."""
    _mount(libc, "none", "/", None, _REC | _PRIVATE)
    _mount(libc, "root", "/tmp", "tmpfs", _NOSUID | _NODEV, "size=1m,mode=755")
    os.mkdir("/tmp/old")
    _check(libc.syscall(_number(_CALLS["pivot_root"]), b"/tmp", b"/tmp/old"), "change the root")
    os.chdir("/")
    for path in (*readable, "/dev/null", "/dev/zero", "/dev/urandom", "/dev/random"):
        old = "/old" + path
        if not os.path.lexists(old):
            continue
        os.makedirs(os.path.dirname(path), exist_ok=True)
        if os.path.islink(old):
            os.symlink(os.readlink(old), path)
            continue
        os.mkdir(path) if os.path.isdir(old) else os.close(os.open(path, os.O_CREAT | os.O_WRONLY))
        _mount(libc, old, path, None, _BIND | _REC)
        if not path.startswith("/dev/"):
            # read-only and no set-user-ID, for what is mounted below as well
            attributes = (ctypes.c_uint64 * 4)(_RDONLY | _NOSUID, 0, 0, 0)
            call = _number(_CALLS["mount_setattr"])
            _check(libc.syscall(call, -100, path.encode(), 0x8000, attributes, 32), f"make {path} read-only (Linux 5.12 can)")
    os.mkdir("/tmp")
    _mount(libc, "tmp", "/tmp", "tmpfs", _NOSUID | _NODEV, _tmp_options(disk) + ",mode=1777")
    _check(libc.umount2(b"/old", _DETACH), "let go of the old root")
    os.rmdir("/old")
    _mount(libc, "none", "/", None, _REMOUNT | _BIND | _RDONLY | _NOSUID | _NODEV)


def _mount(libc: Any, source: str, target: str, kind: str | None, flags: int, options: str = "") -> None:
    given = [text and text.encode() for text in (source, target, kind)]
    _check(libc.mount(*given, ctypes.c_ulong(flags), options.encode()), f"mount {target}")


def _tmp_options(disk: int) -> str:
    return f"size={disk},nr_inodes={FILES}"


def _die_with_parent(libc: Any, parent: int | None) -> None:
    _check(libc.prctl(_PDEATHSIG, _KILL, 0, 0, 0), "end with its parent")
    if parent is not None and os.getppid() != parent:
        os._exit(1)


def _unshare(libc: Any, flags: int) -> None:
    _check(libc.unshare(flags), "leave the host's namespaces")


def _number(pair: tuple[int | None, int | None]) -> int:
    """Of a system call, on this machine; -1 where it does not have it."""
    number = pair[list(_AUDIT).index(os.uname().machine)]
    return -1 if number is None else number


def _check(result: int, what: str) -> None:
    if result < 0:
        raise OSError(ctypes.get_errno(), f"cannot {what}: {os.strerror(ctypes.get_errno())}")
