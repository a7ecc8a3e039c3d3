"""What a cell must hold against: each attack runs in each kind of isolation that works here."""

from __future__ import annotations

import functools
import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from jaxreason.rewards import code, sandbox
from jaxreason.rewards.pool import Pool
from jaxreason.rewards.sandbox import Isolation, Limits, Verdict
from jaxreason.types import Completion, Problem, StopReason

ROOT = Path(__file__).parents[2]
DOC = (ROOT / "docs" / "code_sandbox.md").read_text(encoding="utf-8")
LIMITS = Limits(seconds=1.0, memory_mb=256, output_bytes=1 << 16)
MARK = "import ctypes; ctypes.CDLL(None).prctl(15, b'{mark}')\n"  # names the process, and what it forks

IGNORE = """
import signal
for number in range(1, 65):
    try:
        signal.signal(number, signal.SIG_IGN)
    except (OSError, ValueError):
        pass
"""
DAEMON = """
import os, time
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        for number in range(3):
            os.close(number)
        time.sleep(1000)
    os._exit(0)
os.wait()
print("left", flush=True)
"""

# name -> program, processes it may have, verdict (None: it ends well), what it has printed (None: anything)
ATTACKS = {
    "fork bomb": ("import os\nwhile True:\n  os.fork()", 1, Verdict.RUNTIME_ERROR, b""),
    "fork bomb of several": (
        "import os\nwhile True:\n  try: os.fork()\n  except OSError: pass",
        4, Verdict.TIME_LIMIT, b""
    ),
    "thread bomb": (
        "import threading, time\nwhile True: threading.Thread(target=time.sleep, args=(100,)).start()",
        1,
        Verdict.TIME_LIMIT,  # it cannot start more, and waits for those it has
        b"",
    ),
    "10 GB at once": ("x = bytearray(10 << 30)", 1, Verdict.MEMORY_LIMIT, b""),
    "10 GB bit by bit": ("x = []\nwhile True: x.append(bytearray(1 << 24))", 1, Verdict.MEMORY_LIMIT, b""),
    "10 GB mapped": ("import mmap\nmmap.mmap(-1, 10 << 30)", 1, Verdict.RUNTIME_ERROR, b""),
    "10 GB in files": (
        "for i in range(1000): open(f'/tmp/{i}', 'wb').write(bytes(10 << 20))", 1, Verdict.RUNTIME_ERROR, b""
    ),
    "files without end": (
        "n = 0\nwhile True:\n  open(f'/tmp/{n}', 'w').close()\n  n += 1", 1, Verdict.RUNTIME_ERROR, b""
    ),
    "infinite output": ("while True: print('x' * 1000)", 1, Verdict.RUNTIME_ERROR, None),
    "infinite errors": ("import sys\nwhile True: sys.stderr.write('x' * 1000)", 1, Verdict.RUNTIME_ERROR, b""),
    "infinite loop, no signals": (IGNORE + "while True: pass", 1, Verdict.TIME_LIMIT, b""),
    "infinite sleep, no signals": (IGNORE + "import time\ntime.sleep(1000)", 1, Verdict.TIME_LIMIT, b""),
    "daemon": (DAEMON, 1, Verdict.RUNTIME_ERROR, b""),
    "daemon of several": (DAEMON, 4, None, b"left\n"),
    "killing everything": (
        "import os\nfor n in range(1, 65):\n  for p in (1, os.getppid()):\n    try: os.kill(p, n)\n    except OSError: pass\n"
        "print('still here')",
        1,
        None,
        b"still here\n",
    ),
    "stopping process 1": (
        "import os, signal, time\nos.kill(1, signal.SIGSTOP)\nos.kill(1, signal.SIGKILL)\nos.kill(1, signal.SIGINT)\n"
        "time.sleep(0.05)\nprint('still here')",
        1,
        None,
        b"still here\n",
    ),
    "internet socket": ("import socket\nsocket.socket()", 1, Verdict.RUNTIME_ERROR, b""),
    "local socket": ("import socket\nsocket.socket(socket.AF_UNIX)", 1, Verdict.RUNTIME_ERROR, b""),
    "crash": ("import ctypes\nctypes.string_at(0)", 1, Verdict.RUNTIME_ERROR, b""),
    "source that breaks a parser": ("(" * 100_000 + ")" * 100_000, 1, Verdict.COMPILE_ERROR, b""),
    "another program": ("import subprocess\nsubprocess.run(['/bin/sh', '-c', 'echo hi'])", 1, Verdict.RUNTIME_ERROR, b""),
    "becoming root": (
        "import os\nfor f in (os.setuid, os.seteuid, os.setgid):\n  try: f(0); print('root')\n  except OSError: pass", 1, None, b""
    ),
    "new namespaces": (
        "import ctypes\nlibc = ctypes.CDLL(None)\nprint([libc.unshare(1 << bit) for bit in (17, 28, 29, 30)],"
        " libc.mount(b'none', b'/tmp', b'tmpfs', 0, b''), libc.ptrace(0, 0, 0, 0), libc.syscall(435, 0, 0),"
        " libc.syscall(444, 0, 0, 1))",
        4,
        None,
        b"[-1, -1, -1, -1] -1 -1 -1 -1\n",
    ),
    "higher limits": (
        "import resource as r\nfor k in (r.RLIMIT_AS, r.RLIMIT_NPROC, r.RLIMIT_FSIZE, r.RLIMIT_CPU):\n"
        "  try: r.setrlimit(k, (r.RLIM_INFINITY, r.RLIM_INFINITY)); print('raised', k)\n  except (ValueError, OSError): pass",
        1,
        None,
        b"",
    ),
    "descriptors": (
        "import os\nfor n in range(3, 4096):\n  try: os.fstat(n); print(n)\n  except OSError: pass", 1, None, b""
    ),
}  # fmt: skip


@pytest.fixture(scope="session", params=["bubblewrap", "namespaces"])
def isolation(request: pytest.FixtureRequest) -> Isolation:
    reason = sandbox.why_not(request.param)
    if reason:
        pytest.skip(f"{request.param} does not isolate here: {reason}")
    return Isolation(request.param)


def living(mark: str) -> list[str]:
    """The processes of this machine that bear a name."""
    found = []
    for path in Path("/proc").glob("[0-9]*/comm"):
        try:
            if path.read_text().strip() == mark:
                found.append(path.parent.name)
        except OSError:  # it ended meanwhile
            pass
    return found


def gone(mark: str) -> bool:
    for _ in range(200):
        if not living(mark):
            return True
        time.sleep(0.05)
    return False


@pytest.mark.parametrize("name", ATTACKS)
def test_attacks(isolation, name):
    source, processes, verdict, printed = ATTACKS[name]
    mark = f"m-{secrets.token_hex(6)}"
    # one that is to reach another limit is given time for it, however busy the machine is
    seconds = 1.0 if verdict is Verdict.TIME_LIMIT else 20.0
    limits = Limits(seconds=seconds, memory_mb=256, output_bytes=1 << 16, processes=processes)
    (ended,) = sandbox.run(MARK.format(mark=mark) + source, isolation=isolation, limits=limits)
    assert ended.verdict is verdict, ended
    assert printed in (None, ended.stdout), ended
    assert len(ended.stdout) + len(ended.stderr) <= 2 * limits.output_bytes
    assert gone(mark)
    assert f"| {name} | {verdict.value if verdict else 'ends by itself'} |" in DOC


def test_a_marked_process_is_found():
    """What the attacks' tests rest on."""
    mark = f"m-{secrets.token_hex(6)}"
    script = MARK.format(mark=mark) + "print(flush=True); import time; time.sleep(100)"
    process = subprocess.Popen([sys.executable, "-S", "-c", script], stdout=subprocess.PIPE)
    assert process.stdout
    process.stdout.readline()
    assert living(mark) == [str(process.pid)]
    process.kill()
    process.communicate()
    assert gone(mark)


def test_secrets_and_files_outside_are_out_of_reach(isolation, tmp_path, monkeypatch):
    secret = secrets.token_hex()
    (tmp_path / "secret").write_text(secret)
    monkeypatch.setenv("SECRET", secret)
    inherited = os.open(tmp_path / "secret", os.O_RDONLY)
    os.set_inheritable(inherited, True)
    source = f"""
import os, sys
places = [{str(tmp_path / "secret")!r}, {str(ROOT / "pyproject.toml")!r}, {str(Path.home())!r} + "/.bashrc"]
places += ["/etc/passwd", "/etc/shadow", "/usr/src", "/usr/local/src", "/usr/share/doc"]
places += [f"/proc/{{pid}}/environ" for pid in ("self", 1, {os.getpid()})] + ["/dev/mem", "/sys/kernel", "/dev/shm", "/dev/tty"]
for place in places:
    if os.path.exists(place):
        print("there is", place)
for folder, below, _ in os.walk("/"):
    try:
        open(folder + "/new", "w").close()
        print("can write to", folder)
    except OSError:
        pass
    if folder.count("/") > 2:
        below.clear()
print(*(os.environ.values()), *sys.argv)
for root, _, files in os.walk("/tmp"):
    print(root, files)
"""
    (ended,) = sandbox.run(source, isolation=isolation, limits=Limits(seconds=20.0), files={"given.txt": b"x"})
    os.close(inherited)
    text = ended.stdout.decode()
    assert ended.verdict is None, ended
    assert secret not in text
    assert "there is" not in text
    assert re.findall("can write to (.*)", text) == ["/tmp"]
    assert text.endswith("/tmp ['given.txt', 'new']\n") or text.endswith("/tmp ['new', 'given.txt']\n")
    assert not Path("/tmp/new").exists()


def test_programs_run_as_they_would_alone(isolation):
    source = """
import sys, threading, atexit, os
print(__name__, sys.argv, len(sys.stdin.read()), open("data").read(), os.getcwd(), os.listdir("/tmp"))
os.makedirs("a/b")
os.rename("data", "a/b/data")
os.rename("a/b/data", "data")
os.removedirs("a/b")
atexit.register(lambda: print("at the end"))
threading.Thread(target=lambda: print("in a thread")).start()
@(lambda c: c)
class C: pass
exit(0)
"""
    given = [b"x" * 500_000, b""]
    for ended, text in zip(sandbox.run(source, stdin=given, isolation=isolation, files={"data": b"!"}), given, strict=True):
        assert ended.verdict is None, ended
        assert ended.stdout.decode().splitlines() == [
            f"__main__ ['program.py'] {len(text)} ! /tmp ['data']",
            "in a thread",
            "at the end",
        ]
    again = sandbox.run("print(len({'a', 'b'}), hash('text'))", stdin=[b"", b""], isolation=isolation)
    assert again[0].stdout == again[1].stdout  # the same program does the same, sets of texts included


@pytest.mark.parametrize(
    ("source", "verdict", "code"),
    [
        ("raise SystemExit(3)", Verdict.RUNTIME_ERROR, 3),
        ("raise SystemExit('no')", Verdict.RUNTIME_ERROR, 1),
        ("1 / 0", Verdict.RUNTIME_ERROR, 1),
        ("x =", Verdict.COMPILE_ERROR, None),
        ("\x00", Verdict.COMPILE_ERROR, None),
        ("x = '\ud800'", Verdict.COMPILE_ERROR, None),
        ("import os; os.kill(os.getpid(), 15)", Verdict.RUNTIME_ERROR, -15),
        ("import sys; sys.exit()", None, 0),
        ("", None, 0),
    ],
)
def test_endings(isolation, source, verdict, code):
    (ended,) = sandbox.run(source, isolation=isolation, limits=LIMITS)
    assert ended.verdict is verdict, ended
    assert code is None or ended.code == code


def test_runs_share_one_limit(isolation):
    ended = sandbox.run(
        "import time; print(input(), flush=True); time.sleep(0.4)", stdin=[b"a\n"] * 5, isolation=isolation, limits=LIMITS
    )
    assert ended[0].verdict is None
    assert ended[-1].verdict is Verdict.TIME_LIMIT
    assert sum(each.verdict is None for each in ended) <= 2


def test_the_sandbox_dies_with_its_caller(isolation):
    mark = f"m-{secrets.token_hex(6)}"
    program = MARK.format(mark=mark) + "import os, time\nos.fork()\nos.setsid() if os.getpid() != 2 else None\ntime.sleep(1000)"
    script = f"""
from jaxreason.rewards import sandbox
limits = sandbox.Limits(seconds=500.0, processes=4)
sandbox.run({program!r}, isolation=sandbox.Isolation({isolation.kind!r}), limits=limits)
"""
    caller = subprocess.Popen([sys.executable, "-c", script], cwd=ROOT, start_new_session=True)
    for _ in range(400):
        if len(living(mark)) == 2:
            break
        time.sleep(0.05)
    assert len(living(mark)) == 2
    os.killpg(caller.pid, signal.SIGKILL)
    caller.wait()
    assert gone(mark)


def test_a_cell_can_be_killed(isolation):
    """Also one whose program is well under way, and from outside, by `finish`."""
    mark = f"m-{secrets.token_hex(6)}"
    source = MARK.format(mark=mark) + "import time; time.sleep(1000)"
    job = sandbox.Job(sandbox.module_code("script.py"), "play", {"source": source})
    cell = sandbox.start([job], isolation=isolation, limits=Limits(seconds=500.0))
    for _ in range(400):
        if living(mark):
            break
        time.sleep(0.05)
    assert living(mark)
    (ended,) = cell.finish(seconds=0.1)
    assert ended.verdict is Verdict.TIME_LIMIT
    assert gone(mark)


def test_closing_a_pool_ends_the_programs_of_its_rules():
    isolation = sandbox.find_isolation()
    if isolation.kind == "refused":
        pytest.skip(isolation.reason)
    mark = f"m-{secrets.token_hex(6)}"
    source = MARK.format(mark=mark) + "import time\ntime.sleep(1000)"
    problem = Problem("1", "", "", metadata={"style": "assert", "tests": ["assert f() == 1"]})
    pool = Pool({"code": functools.partial(code.code_tests, limit_seconds=500.0)}, workers=1)
    pool.start([(problem, Completion(source, (), StopReason.EOS))])
    for _ in range(400):
        if living(mark):
            break
        time.sleep(0.05)
    assert living(mark)
    pool.close()
    assert gone(mark)


def test_a_cell_that_dies_says_so(isolation):
    job = sandbox.Job(sandbox.module_code("script.py"), "play", {"source": "import time; time.sleep(1000)"})
    cell = sandbox.start([job], isolation=isolation, limits=Limits(seconds=1.0))
    os.kill(cell.process.pid, signal.SIGKILL)
    (ended,) = cell.finish()
    assert ended.verdict in (Verdict.RUNTIME_ERROR, Verdict.TIME_LIMIT) and ended.reason


def test_landlock_denies_writing_by_itself():
    """In a cell the folders are read-only already; this is the second lock."""
    script = """
import ctypes, os
from jaxreason.rewards import cell
libc = ctypes.CDLL(None, use_errno=True)
if libc.syscall(444, None, 0, 1) < 1:
    print("absent")
    raise SystemExit
libc.prctl(38, 1, 0, 0, 0)
cell._landlock(libc)
for folder in ("/var/tmp", "/dev/shm", "/tmp"):
    path = f"{folder}/landlock-{os.getpid()}"
    try:
        open(path, "w").close()
        os.unlink(path)
        print("wrote to", folder)
    except PermissionError:
        pass
open("/dev/null", "w").close()
print(len(open("/proc/self/maps").read()) > 0)
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    if done.stdout == "absent\n":
        pytest.skip("this kernel has no Landlock")
    assert done.stdout == "wrote to /tmp\nTrue\n"


# a process that may make no namespaces: a filter denies it, as that of a container does
UNABLE = """
import ctypes
from jaxreason.rewards import cell, code, sandbox
from jaxreason.types import Completion, Problem, StopReason
libc = ctypes.CDLL(None, use_errno=True)
libc.prctl(38, 1, 0, 0, 0)
cell._filter_calls(libc, forks=True)
"""


def unable(script: str) -> str:
    done = subprocess.run([sys.executable, "-c", UNABLE + script], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_refuses_to_run_where_nothing_isolates():
    said = unable("""
isolation = sandbox.find_isolation()
print(isolation.kind, isolation.reason)
print(*(each.verdict.value for each in sandbox.run("print(1)", isolation=isolation, stdin=[b"", b""])))
problem = Problem("1", "", "", metadata={"style": "stdin", "cases": [["", "1"]]})
completion = Completion("print(1)", (), StopReason.EOS)
judged = code.judge("print(1)", problem.metadata, isolation=isolation, limits=sandbox.Limits())
print(judged.verdict.value, judged.passed)
try:
    code.code_tests(problem, completion)
except ValueError as error:
    print(error)
print(code.code_tests(problem, completion, allow_unsafe=True).total)
try:
    sandbox.start([], isolation=isolation, limits=sandbox.Limits())
except ValueError as error:
    print(error)
""")
    lines = said.splitlines()
    assert re.match(r"refused programs cannot be isolated here \(bubblewrap: .*; namespaces: .*\).*allow_unsafe=True", lines[0])
    assert lines[1:3] == ["refused refused", "refused 0.0"]
    assert lines[3].startswith("programs cannot be isolated here") and lines[4] == "1.0"
    assert "runs nothing" in lines[5]


def test_limits_hold_without_isolation():
    said = unable("""
from jaxreason.rewards.sandbox import Limits, run
isolation = sandbox.find_isolation(allow_unsafe=True)
limits = Limits(seconds=0.5, memory_mb=256, output_bytes=1000)
for program in ("print(input())", "x = bytearray(1 << 30)", "import time; time.sleep(9)", "print('x' * 10000)",
                "import os; os.fork()", "import socket; socket.socket()"):
    (ended,) = run(program, stdin=[b"hi"], isolation=isolation, limits=limits)
    print(ended.verdict and ended.verdict.value)
""")
    assert said.splitlines() == [
        "None",
        "memory limit",
        "time limit",
        "runtime error",
        "runtime error",
        "runtime error",
    ]
    assert not list(Path(tempfile.gettempdir()).glob("program-*"))


@pytest.mark.skipif(os.geteuid() != 0, reason="the other tests run as an ordinary user already")
def test_works_for_an_ordinary_user(isolation):
    interpreters = [
        os.path.realpath(getattr(sys, "_base_executable", sys.executable)),
        "/usr/bin/python3",
        "/usr/local/bin/python3",
    ]
    folder = tempfile.mkdtemp()
    try:
        os.chmod(folder, 0o755)
        shutil.copytree(ROOT / "jaxreason" / "rewards", f"{folder}/jaxreason/rewards", ignore=shutil.ignore_patterns("__pycache__"))
        for name in ("__init__.py", "types.py"):
            shutil.copy(ROOT / "jaxreason" / name, f"{folder}/jaxreason/{name}")
        as_nobody = {"user": 65534, "group": 65534, "extra_groups": [], "cwd": folder, "capture_output": True, "text": True}
        for python in interpreters:
            try:
                subprocess.run(
                    [python, "-c", "import sys; assert sys.version_info >= (3, 11)"], check=True, timeout=60, **as_nobody
                )
                break
            except (OSError, subprocess.CalledProcessError):
                continue
        else:
            pytest.skip("no Python of at least 3.11 is within reach of an ordinary user")
        script = f"""
from jaxreason.rewards import sandbox
isolation = sandbox.Isolation({isolation.kind!r})
print(repr(sandbox.why_not(isolation.kind)))
for source, processes in {[ATTACKS[name][:2] for name in ("fork bomb of several", "10 GB at once", "daemon of several")]!r}:
    limits = sandbox.Limits(seconds=0.5, memory_mb=256, processes=processes)
    print(sandbox.run(source, isolation=isolation, limits=limits)[0].verdict)
"""
        done = subprocess.run([python, "-c", script], timeout=60, **as_nobody)
        assert done.stdout.splitlines() == ["''", "Verdict.TIME_LIMIT", "Verdict.MEMORY_LIMIT", "None"], done.stderr
    finally:
        shutil.rmtree(folder)
