"""Programs that mean harm. Each is asked for a number that it does not know; none may have the verdict `pass`."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from sapo_ray.sandbox import Program, Sandbox, SandboxConfig

NUMBER = 48151623
SECRET = "the-canary-that-no-program-may-sing"
GOOD = Program("def f(x):\n    return x + 1", ("f",), ("assert f(1) == 2", "assert f(-1) == 0"))

HELD = {
    # name: (its source, the verdicts that it may have). They hold for both kinds of sandbox.
    "endless output": ("import os\ndef f(x):\n    while True: os.write(1, b'y' * 999)", "violation"),
    "endless errors": ("import sys\ndef f(x):\n    while True: print('y' * 999, file=sys.stderr)", "violation"),
    "a list that doubles": ("def f(x):\n    x = [0]\n    while True: x += x", "memory"),
    "all memory at once": ("def f(x): return bytes(1 << 40)", "memory"),
    "memory that it catches": (
        "kept = []\ndef f(x):\n    try:\n        while True: kept.append(bytes(2**20))\n"
        "    except MemoryError: return len(kept)",
        "fail error memory",
    ),
    "a mapping": ("import mmap\ndef f(x): return len(mmap.mmap(-1, 2**31))", "memory"),
    "a big file": (
        "def f(x):\n    with open('big', 'wb') as big:\n        while True: big.write(bytes(2**20))",
        "violation",
    ),
    "a busy loop": ("def f(x):\n    while True: pass", "timeout"),
    "a busy loop in C": ("def f(x): return sum(iter(int, 1))", "timeout"),
    "a regular expression": ("import re\ndef f(x): return re.match(r'(a+)+$', 'a' * 64 + 'b')", "timeout"),
    "swallowed exceptions": (
        "def f(x):\n    while True:\n        try:\n            while True: x += 1\n        except BaseException: pass",
        "timeout",
    ),
    "a signal handler that stays": (
        "import signal\nfor s in range(1, 65):\n    try: signal.signal(s, signal.SIG_IGN)\n"
        "    except (OSError, ValueError): pass\ndef f(x):\n    while True: pass",
        "timeout",
    ),
    "huge integers": ("def f(x): return 9 ** 9 ** 9", "timeout memory"),
    "a huge integer to print": ("def f(x): return 1 << 2**28", "timeout memory violation"),
    "a huge answer": ("def f(x): return ['y' * 999] * 50_000", "violation memory"),
    "deep recursion": ("def f(x): return f(x) + 1", "error"),
    "deeper recursion": ("import sys\nsys.setrecursionlimit(10**9)\ndef f(x): return f(x) + 1", "error memory timeout"),
    "a deep answer": ("def f(x):\n    for _ in range(10**5): x = [x]\n    return x", "error"),
    "an answer that holds itself": ("def f(x):\n    x = []\n    x.append(x)\n    return x", "error"),
    "os._exit(0) at its start": ("import os\nos._exit(0)", "error"),
    "os._exit(0) in a call": ("import os\ndef f(x): os._exit(0)", "error"),
    "sys.exit(0)": ("import sys\ndef f(x): sys.exit(0)", "error"),
    "exit hooks": (
        'import atexit, os, sys\natexit.register(print, \'["pass", "", 0.0]\')\natexit.register(os._exit, 0)\n'
        "def f(x): sys.exit(0)",
        "error",
    ),
    "a crash": ("import ctypes\ndef f(x): return ctypes.string_at(0)", "error"),
    "its own end by SIGKILL": ("import os\ndef f(x): os.kill(os.getpid(), 9)", "error"),
    "a verdict in print": ('print(\'["pass", "", 0.0]\')\ndef f(x): return print(\'["pass", "", 0.0]\')', "fail"),
    "a verdict in every descriptor": (
        'import os\ndef f(x):\n    for d in range(64):\n        try: os.write(d, b\'["pass", "", 0.0]\')\n'
        "        except OSError: pass",
        "violation error",
    ),
    "garbage in the channel": (
        "import os\ndef f(x):\n    for d in range(3, 64):\n        try: os.write(d, bytes(7) + b'\\x02[}')\n"
        "        except OSError: pass",
        "violation",
    ),
    "a faked answer": (
        "import os\ndef f(x):\n    text = b'[\"value\", true]'\n    for d in range(3, 64):\n"
        "        try: os.write(d, len(text).to_bytes(8, 'big') + text)\n        except OSError: pass",
        "fail",
    ),
    "an answer of no kind": (
        "import __main__\n__main__.encode = lambda value, refer: ['code', [1]]\ndef f(x): return 1",
        "violation",
    ),
    "a message without an end": (
        "import os\ndef f(x):\n    for d in range(3, 64):\n        try: os.write(d, b'\\xff' * 8)\n"
        "        except OSError: pass",
        "violation",
    ),
    "closed descriptors": ("import os\ndef f(x): os.closerange(0, 256)", "error violation"),
    "a huge reason": ("def f(x): raise ValueError('xy ' * 5_000_000)", "error"),
    "a huge reason of its own making": (
        "import __main__\n"
        "def f(x):\n    class Long(Exception):\n        def __str__(self): return 'xy ' * 5_000_000\n    raise Long",
        "error",
    ),
    "an exception of a type that is none": (
        'import os\ndef f(x):\n    text = b\'["raised", "A", "print", "", null]\'\n    for d in range(3, 64):\n'
        "        try: os.write(d, len(text).to_bytes(8, 'big') + text)\n        except OSError: pass",
        "violation",
    ),
    "patched assert": (
        "import builtins\nclass Never(Exception): pass\nbuiltins.AssertionError = Never\n"
        "AssertionError.__init__ = lambda self: 1\ndef f(x): return 1",
        "fail error",
    ),
    "replaced builtins": (
        "import builtins\nfor name in ('len', 'abs', 'int', 'isinstance', 'compile', 'exec', 'open'):\n"
        "    setattr(builtins, name, lambda *a, **k: 1)\ndef f(x): return 1",
        "fail error violation",
    ),
    "a patched harness": (
        "import __main__, os\nfor name in list(vars(__main__)):\n    if callable(vars(__main__)[name]):\n"
        "        setattr(__main__, name, lambda *a, **k: ('pass', ''))\ndef f(x): return 1",
        "fail error violation",
    ),
    "a patched json": (
        'import json\njson.dumps = lambda *a, **k: \'["pass", "", 0.0]\'\ndef f(x): return 1',
        "violation",
    ),
    "an object that equals everything": (
        "class Yes:\n    __eq__ = __ne__ = __lt__ = __gt__ = __bool__ = lambda *a: True\ndef f(x): return Yes()",
        "fail",
    ),
    "a number that equals everything": (
        "class Yes(int):\n    __eq__ = __ne__ = lambda *a: True\n    __hash__ = int.__hash__\ndef f(x): return Yes(1)",
        "fail",
    ),
    "a list that equals everything": ("class Yes(list):\n    __eq__ = lambda *a: True\ndef f(x): return Yes()", "fail"),
    "an object that lies about its class": (
        "class Yes:\n    __class__ = property(lambda self: int)\n    __eq__ = lambda *a: True\ndef f(x): return Yes()",
        "fail error",
    ),
    "an exception that cannot be printed": (
        "class E(Exception):\n    def __str__(self): raise E\ndef f(x): raise E",
        "error",
    ),
    "an exception that lies": (
        "class AssertionError(BaseException): errno = 'pass'\ndef f(x): raise AssertionError",
        "error",
    ),
    "a search of frames": (
        "import sys\ndef f(x):\n    found, frame = [], sys._getframe()\n    while frame:\n"
        "        found.append({**frame.f_globals, **frame.f_locals})\n        frame = frame.f_back\n    print(found)",
        "fail",
    ),
    "a search of the heap": (
        "import gc\ndef f(x):\n    for o in gc.get_objects():\n        for r in gc.get_referents(o):\n"
        "            if isinstance(r, str) and 'assert' in r and len(r) < 99: print(r)",
        "fail",
    ),
    "its parent's memory": (
        "import os\ndef f(x):\n    with open(f'/proc/{os.getppid()}/mem', 'rb') as memory: return memory.read(1)",
        "error violation",
    ),
    "its parent's descriptors": (
        "import os\ndef f(x):\n    for d in os.listdir(f'/proc/{os.getppid()}/fd'):\n"
        "        with open(f'/proc/{os.getppid()}/fd/{d}', 'wb') as file: file.write(b'[\"pass\", \"\", 0.0]')",
        "error violation",
    ),
    "ptrace": (
        "import ctypes, os\nlibc = ctypes.CDLL(None, use_errno=True)\n"
        "def f(x):\n    print('ptrace', libc.ptrace(16, os.getppid(), None, None), ctypes.get_errno())",
        "fail",
    ),
    "memory that no limit counts": (
        "import ctypes\nlibc = ctypes.CDLL(None)\n"
        "def f(x): print('memory', libc.shmget(0, 4096, 0o1600), libc.memfd_create(b'm', 0))",
        "fail",
    ),
    "the environment": ("import os\ndef f(x): print(dict(os.environ), os.popen('env').read())", "fail error"),
    "a generator without an end": ("def f(x):\n    while True: yield x", "fail"),
}

CONTAINED = {
    # By bubblewrap alone.
    "fork bomb": ("import os\ndef f(x):\n    while True: os.fork()", "violation timeout"),
    "threads that never end": (
        "import threading, time\ndef f(x):\n    while True: threading.Thread(target=time.sleep, args=(99,)).start()",
        "error",
    ),
    "memory of many processes": (
        "import os, time\ndef f(x):\n    for _ in range(3): os.fork()\n    kept = [bytes(2**20) for _ in range(999)]",
        "memory violation",
    ),
    "many files": (
        "def f(x):\n    for n in range(99):\n        with open(str(n), 'wb') as file: file.write(bytes(2**20))",
        "violation",
    ),
    "SIGKILL to its parent": ("import os\ndef f(x): os.kill(os.getppid(), 9)", "fail"),
    "SIGSTOP to its parent": ("import os\ndef f(x): os.kill(os.getppid(), 19)", "fail"),
    "every signal to its parent": (
        "import os\ndef f(x):\n    for s in range(1, 65): os.kill(os.getppid(), s)",
        "fail",
    ),
    "SIGKILL to all": ("import os\ndef f(x):\n    try: os.kill(-1, 9)\n    except OSError: pass", "fail"),
    "SIGKILL to its group": ("import os\ndef f(x): os.killpg(0, 9)", "error"),
    "a daemon": (
        "import os, time\ndef f(x):\n    if os.fork() == 0:\n        os.setsid()\n        if os.fork() == 0:\n"
        "            while True: time.sleep(1)\n        os._exit(0)",
        "fail",
    ),
    "a grandchild in its place": (
        "import os, time\ndef f(x):\n    if os.fork() == 0: time.sleep(0.1)\n    else: os._exit(0)",
        "fail",
    ),
    "a process that escapes its session": (
        "import os\ndef f(x):\n    if os.fork() == 0:\n        os.setsid()",
        "fail violation",
    ),
    "/etc/shadow": ("def f(x): return open('/etc/shadow').read()", "error"),
    "/etc/passwd": ("def f(x): return open('/etc/passwd').read()", "error"),
    "a file of the machine": ("def f(x):\n    with open('@canary@') as file: print(file.read())", "error"),
    "a symbolic link": (
        "import os\ndef f(x):\n    os.symlink('@canary@', 'link')\n    with open('link') as file: print(file.read())",
        "error",
    ),
    "a link of folders": (
        "import os\ndef f(x):\n    os.symlink('/', 'root')\n    with open('root@canary@') as file: print(file.read())",
        "error",
    ),
    "a hard link": ("import os\ndef f(x): os.link('/usr/bin/env', 'link')", "violation error"),
    "a path upwards": ("def f(x):\n    with open('../../..@canary@') as file: print(file.read())", "error"),
    "/proc": ("import os\ndef f(x): return os.listdir('/proc')", "error"),
    "the environment of others": ("def f(x):\n    with open('/proc/1/environ') as file: print(file.read())", "error"),
    "a file in /usr": ("def f(x): open('/usr/written', 'w')", "violation"),
    "a file in /": ("def f(x): open('/written', 'w')", "violation"),
    "a file in /dev": ("def f(x): open('/dev/written', 'w')", "violation"),
    "a file of the interpreter": ("import os\ndef f(x): open(os.__file__, 'a')", "violation"),
    "a file beside the canary": ("def f(x): open('@canary@.written', 'w')", "error violation"),
    "a connection": (
        "import socket\ndef f(x): return socket.create_connection(('127.0.0.1', @port@), 5).recv(99)",
        "violation error",
    ),
    "a connection to a name": (
        "import socket\ndef f(x): return socket.create_connection(('localhost', @port@), 5)",
        "error",
    ),
    "an abstract socket": (
        "import socket\ndef f(x):\n    s = socket.socket(socket.AF_UNIX)\n    s.connect(chr(0) + '@abstract@')",
        "error",
    ),
    "a raw socket": ("import socket\ndef f(x): socket.socket(socket.AF_PACKET, socket.SOCK_RAW)", "violation"),
    "a subprocess": (
        "import subprocess\ndef f(x): print(subprocess.run(['/usr/bin/cat', '@canary@'], capture_output=True))",
        "fail error",
    ),
    "another root": ("import os\ndef f(x): os.chroot('/tmp')", "violation"),
    "another user": ("import os\ndef f(x): os.setuid(0)", "violation error"),
    "higher priority": ("import os\ndef f(x): os.nice(-5)", "violation"),
    "higher limits": (
        "import resource\ndef f(x): resource.setrlimit(resource.RLIMIT_NPROC, (999, 999))",
        "error",
    ),
    "namespaces of its own": (
        "import ctypes\nlibc = ctypes.CDLL(None)\n"
        "def f(x): print('unshare', [libc.unshare(flag) for flag in (0x10000000, 0x20000, 0x40000000)])",
        "fail",
    ),
    "a mount": (
        "import ctypes\nlibc = ctypes.CDLL(None)\n"
        "def f(x): print('mount', libc.mount(b'm', b'/tmp', b'tmpfs', 0, None), libc.umount2(b'/tmp', 2))",
        "fail",
    ),
    "a device": ("import os, stat\ndef f(x): os.mknod('disk', stat.S_IFBLK | 0o600, os.makedev(8, 0))", "violation"),
    "set-user-id": ("import os\ndef f(x):\n    os.execv('/usr/bin/su', ['su', '-c', 'id'])", "error violation timeout"),
}

IDLE = {
    # Only time ends them: (source, whether both kinds are asked).
    "sleep": ("import time\ndef f(x): time.sleep(99)", True),
    "sleep at its start": ("import time\ntime.sleep(99)", True),
    "a lock that is never free": (
        "import threading\nlock = threading.Lock()\nlock.acquire()\ndef f(x): lock.acquire()",
        True,
    ),
    "an answer in drips": (
        "import os, time\ndef f(x):\n    os.write(5, bytes(7) + b'\\x63')\n    while True:\n"
        "        os.write(5, b' ')\n        time.sleep(0.05)",
        True,
    ),
    "fork bomb that does not mind": (
        "import os\ndef f(x):\n    while True:\n        try: os.fork()\n        except OSError: pass",
        False,
    ),
    "children that hold the channel": (
        "import os, time\ndef f(x):\n    os.fork() or time.sleep(99)\n    os._exit(0)",
        False,
    ),
}


def hostile(source: str, places: dict[str, str]) -> Program:
    for name, value in places.items():
        source = source.replace(f"@{name}@", value)
    return Program(source, ("f",), (f"assert f(1) == {NUMBER}",))


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """What programs reach for: a file, a TCP port and an abstract socket, all of which give away the secret."""
    canary = tmp_path_factory.mktemp("run") / "canary"
    canary.write_text(SECRET)
    with socket.create_server(("127.0.0.1", 0)) as server, socket.socket(socket.AF_UNIX) as abstract:
        name = f"sapo-{os.getpid()}"
        abstract.bind(f"\0{name}")
        abstract.listen()
        yield {"canary": str(canary), "port": str(server.getsockname()[1]), "abstract": name}
    assert canary.read_text() == SECRET
    assert os.listdir(canary.parent) == ["canary"]


@pytest.fixture(scope="module", autouse=True)
def secret() -> Iterator[None]:
    os.environ["SAPO_SECRET"] = SECRET
    yield
    del os.environ["SAPO_SECRET"]


def check(box: Sandbox, program: Program, allowed: str) -> str:
    """That a program's verdict is an allowed one, that it learnt nothing, and that it does the next one no harm."""
    verdict = box.run(program)
    assert verdict.verdict in allowed.split(), verdict
    assert SECRET not in verdict.output
    assert str(NUMBER) not in verdict.output
    assert "\n" not in verdict.reason
    assert box.run(GOOD).verdict == "pass"
    return verdict.output


@pytest.mark.parametrize("name", HELD)
def test_held_by_both_kinds(box: Sandbox, places: dict[str, str], name: str) -> None:
    source, allowed = HELD[name]
    check(box, hostile(source, places), allowed)


@pytest.mark.parametrize(
    ("setup", "test"),
    [
        ("def check(g): assert g(1) == 7", "check(f)"),
        ("", "assert abs(f(1) - 7) < 1"),
        ("import math", "assert math.isclose(f(1), 7)"),
    ],
)
@pytest.mark.parametrize("name", ["check", "abs", "math", "__builtins__"])
def test_a_solution_cannot_stand_in_for_what_its_tests_call(box: Sandbox, setup: str, test: str, name: str) -> None:
    source = (
        f"import sys\nsys._getframe(1).f_locals['names'].append({name!r})\n"
        "class Yes:\n    def __call__(self, *a): return 0\n    isclose = lambda *a: 1\n"
        f"{name} = Yes()\ndef f(x): return 1"
    )
    assert box.run(Program(source, ("f",), (test,), setup)).verdict == "violation"


@pytest.mark.parametrize("name", CONTAINED)
@pytest.mark.parametrize("kind", ["bubblewrap"], indirect=True, scope="module")
def test_contained_by_bubblewrap(box: Sandbox, places: dict[str, str], name: str) -> None:
    source, allowed = CONTAINED[name]
    check(box, hostile(source, places), allowed)


@pytest.mark.parametrize("name", IDLE)
def test_time_ends_what_waits(kind: str, places: dict[str, str], wall_seconds: float, name: str) -> None:
    source, both = IDLE[name]
    if kind == "process" and not both:
        pytest.skip("sandbox.kind process does not limit processes")
    config = SandboxConfig(kind=kind, cpu_seconds=1, wall_seconds=wall_seconds % 1 + 1.5)  # type: ignore[arg-type]
    with Sandbox(config) as box:
        verdict = box.run(hostile(source, places))
    assert verdict.verdict == "timeout"
    assert "wall_seconds" in verdict.reason


def test_nothing_of_a_program_stays(needs_bubblewrap: None, wall_seconds: float) -> None:
    """Files are gone for the next one, and so are processes, whichever way the program ended."""
    leave = "import os\nfor n in range(2):\n    if os.fork() == 0:\n        os.setsid()\n        while True: pass\n"
    keep = "open('/tmp/kept', 'w').close()\n"
    long, brief = wall_seconds + 1, wall_seconds % 1 + 1  # unlike those of the other tests' sandboxes
    with Sandbox(SandboxConfig(cpu_seconds=1, wall_seconds=long)) as box:
        for end in ("def f(x): return 2", "import os\nos._exit(0)", "def f(x): return 'y' * 2**25"):
            box.run(Program(leave + keep + end, ("f",), ("assert f(1) == 2",)))
            look = Program("import os\ndef f(x): return os.listdir('/tmp')", ("f",), ("assert f(1) == []",))
            assert box.run(look).verdict == "pass"
    with Sandbox(SandboxConfig(cpu_seconds=5, wall_seconds=brief)) as box:
        box.run(GOOD)
        assert processes(brief)
        verdict = box.run(Program(leave + "def f(x):\n    while True: pass", ("f",), ("assert f(1) == 2",)))
        assert verdict.verdict == "timeout"
    wait_for_the_end(long)
    wait_for_the_end(brief)


def test_a_sandbox_ends_with_the_process_that_started_it(needs_bubblewrap: None, wall_seconds: float) -> None:
    """Even where that is killed while a program runs that has children in other sessions."""
    solution = "import os\nif os.fork() == 0:\n    os.setsid()\n    while True: pass\nprint('begun')\nwhile True: pass"
    mark = wall_seconds + 2
    script = (
        "from sapo_ray.sandbox import *\n"
        f"with Sandbox(SandboxConfig(cpu_seconds=60, wall_seconds={mark})) as box:\n"
        f"    box.run(Program({solution!r}, ('f',), ('assert f(1) == 2',)))"
    )
    executor = subprocess.Popen([sys.executable, "-c", script], cwd=Path(__file__).parents[3])
    try:
        deadline = time.monotonic() + 60
        # Two bubblewraps (or, not as root, one), judge, solution and its child; and the next sandbox, without the last.
        while len(processes(mark)) < 7:
            assert time.monotonic() < deadline
            time.sleep(0.05)
    finally:
        executor.kill()
        executor.wait()
    wait_for_the_end(mark)


def wait_for_the_end(wall_seconds: float) -> None:
    """Fails where a process of a sandbox with that limit does not end."""
    deadline = time.monotonic() + 10
    while left := processes(wall_seconds):
        assert time.monotonic() < deadline, left
        time.sleep(0.05)


def processes(wall_seconds: float) -> list[str]:
    """The processes of all sandboxes with that limit, which each of them bears in its command line."""
    mark = json.dumps({"wall_seconds": wall_seconds})[1:-1].encode()
    found = []
    for process in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            command = process.read_bytes()
        except OSError:
            continue
        if mark in command:
            found.append(process.parent.name)
    return found


@pytest.mark.parametrize("name", ["fork bomb", "memory of many processes", "endless output", "many files"])
def test_neighbours_go_on(needs_bubblewrap: None, places: dict[str, str], wall_seconds: float, name: str) -> None:
    """While a program does its worst, and after it, another sandbox's programs have the verdicts that they deserve."""
    config = SandboxConfig(cpu_seconds=1, wall_seconds=wall_seconds)
    verdicts = []

    def misbehave() -> None:
        with Sandbox(config) as box:
            verdicts.append(box.run(hostile((HELD | CONTAINED)[name][0], places)).verdict)

    with Sandbox(config) as box:
        thread = threading.Thread(target=misbehave)
        thread.start()
        neighbours = [box.run(GOOD).verdict]
        while thread.is_alive():
            neighbours.append(box.run(GOOD).verdict)
    assert verdicts
    assert "pass" not in verdicts
    assert set(neighbours) == {"pass"}


def test_what_process_does_not_protect_from(places: dict[str, str]) -> None:
    """As docs/sandbox.md says: it sees the machine's files. (Were it otherwise, the canary would prove nothing.)"""
    with Sandbox(SandboxConfig(kind="process")) as box:
        verdict = box.run(hostile(CONTAINED["a file of the machine"][0], places))
    assert SECRET in verdict.output
