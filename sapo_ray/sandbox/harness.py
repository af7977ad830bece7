"""What runs inside a sandbox: a judge, and a child of it that holds the solution.

`pass` cannot be forged because the solution does not say it. The tests run in the judge, another process, which the
solution can neither read nor trace (it is not dumpable, and forked the child before the tests arrived) nor, as pid 1 of
its namespace, signal. What a test asks of the solution goes to the child through a socket and comes back as plain data,
of exactly these types: None, bool, int, float, complex, str, bytes, list, tuple, set, frozenset, dict (of a subclass,
such as Counter, the plain part). Any other value stays with the child and the tests get a `Remote` in its place. So an
object that equals everything passes no comparison; patched builtins, exit hooks and faked output lie in a process that
no one believes. What the solution answers, it may choose: tests that a table of answers passes are passed by one.

This file is given to a bare interpreter as its program (`python -c`): it imports the standard library only, and little
of that.
"""

from __future__ import annotations

import builtins
import ctypes
import errno
import json
import os
import resource
import signal
import socket
import struct
import sys
import time
import types
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any, NoReturn

_MESSAGE_BYTES = 16 * 2**20
_REASON_CHARACTERS = 300
_FORBIDDEN = {errno.EPERM, errno.EACCES, errno.EROFS, errno.EFBIG, errno.ENOSPC, errno.EAGAIN, errno.ENETUNREACH}
"""Errors by which a sandbox refuses."""

_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE, _PR_SET_SECCOMP, _PR_SET_NO_NEW_PRIVS = 1, 4, 22, 38
_SECCOMP_MODE_FILTER = 2
_LINUX_CAPABILITY_VERSION_3 = 0x20080522
_AUDIT_ARCH = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
_DENIED = {
    "shmget": (29, 194),
    "msgget": (68, 186),
    "ptrace": (101, 117),
    "add_key": (248, 217),
    "keyctl": (250, 219),
    "perf_event_open": (298, 241),
    "process_vm_writev": (311, 271),
    "memfd_create": (319, 279),
    "bpf": (321, 280),
    "userfaultfd": (323, 282),
    "io_uring_setup": (425, 425),
    "memfd_secret": (447, 447),
}
"""System calls that get memory which no limit counts, reach into other processes, or need a kernel without a flaw, with
their numbers on these machines (Linux: arch/x86/entry/syscalls/syscall_64.tbl, include/uapi/asm-generic/unistd.h)."""

_TYPES: dict[str, type] = {kind.__name__: kind for kind in (bool, int, float, complex, str, bytes)}
_TYPES |= {kind.__name__: kind for kind in (list, tuple, set, frozenset, dict)}
"""Types that are plain data themselves: there are tests that pass one."""
_KINDS: dict[str, tuple[type, Callable[[Any], Any], Callable[[list[Any]], Any]]] = {
    "list": (list, list, list),
    "tuple": (tuple, list, tuple),
    "set": (set, list, set),
    "frozenset": (frozenset, list, frozenset),
    "dict": (dict, lambda value: list(value.items()), dict),
    "complex": (complex, lambda value: [value.real, value.imag], lambda parts: complex(*parts)),
    "bytes": (bytes, list, bytes),
}
"""By name: a type, what a value of it is sent as, and how it is made of that."""


class SolutionError(BaseException):
    """The solution's process has ended, or is no longer to be believed; `verdict` is what comes of it. No test that
    expects an exception catches it."""

    def __init__(self, verdict: str, reason: str) -> None:
        super().__init__(reason)
        self.verdict = verdict


class Channel:
    """Messages of JSON over a socket, each behind its length. Waits until `deadline` (monotonic), then TimeoutError."""

    def __init__(self, connection: socket.socket, deadline: float | None = None) -> None:
        self._connection, self._deadline = connection, deadline

    def send(self, message: object) -> None:
        data = json.dumps(message).encode()
        self._wait()
        self._connection.sendall(len(data).to_bytes(8, "big") + data)

    def receive(self) -> Any:
        """The next message. Raises EOFError where the other side is gone, ValueError where it is none."""
        size = int.from_bytes(self._read(8), "big")
        if size > _MESSAGE_BYTES:
            raise ValueError(f"a message of {size} bytes")
        return json.loads(self._read(size))

    def _read(self, size: int) -> bytes:
        data = bytearray()
        while len(data) < size:
            self._wait()
            chunk = self._connection.recv(min(size - len(data), 2**16))
            if not chunk:
                raise EOFError
            data += chunk
        return bytes(data)

    def _wait(self) -> None:
        """Gives the next call on the connection what is left of the time."""
        if self._deadline is not None:
            left = self._deadline - time.monotonic()
            if left <= 0:
                raise TimeoutError
            self._connection.settimeout(left)


def encode(value: Any, refer: Callable[[Any], Any]) -> Any:
    """`value` as JSON holds it; what is not plain data is sent as what `refer` makes of it."""
    if value is None or isinstance(value, (int, float, str)):
        return value
    for name, (kind, parts, _) in _KINDS.items():
        if isinstance(value, kind):
            return [name, [encode(part, refer) for part in parts(value)]]
    if isinstance(value, type) and _TYPES.get(value.__name__) is value:
        return ["type", value.__name__]
    return ["ref", refer(value)]


def decode(message: Any, resolve: Callable[[Any], Any]) -> Any:
    """The value that `encode` sent, with what `refer` made turned back by `resolve`."""
    if not isinstance(message, list):
        return message
    name, parts = message
    if name == "ref":
        return resolve(parts)
    if name == "type":
        return _TYPES[parts]
    return _KINDS[name][2]([decode(part, resolve) for part in parts])


class Remote:
    """A value that stays with the solution: tests may iterate over it, read and set its attributes, and ask for its
    truth, hash and text; call it or ask for its length where it has either (`_METHODS`).

    Compared, it is itself and nothing else. A value with an == of its own could be anything, which the solution alone
    would have to say: then the tests fail, whether they ask for == or for !=. What they compare it with is not sent.
    """

    __slots__ = ("_ref", "_solution")

    def __init__(self, solution: Solution, ref: int) -> None:
        object.__setattr__(self, "_solution", solution)
        object.__setattr__(self, "_ref", ref)

    def __iter__(self) -> Iterator[Any]:
        return iter(self._solution.ask("list", self))

    def __getattr__(self, name: str) -> Any:
        return self._solution.ask("get", self, name)

    def __setattr__(self, name: str, value: Any) -> None:
        self._solution.ask("set", self, name, value)

    def __bool__(self) -> bool:
        return self._solution.ask("truth", self) is True

    def __eq__(self, other: object) -> bool:
        if self is other:
            return True
        for value in (self, other):
            if isinstance(value, Remote) and self._solution.ask("compares", value) is not False:
                raise SolutionError("fail", "a value of the solution that has an == of its own is compared")
        return False

    def __hash__(self) -> int:
        code: int = self._solution.ask("hash", self)
        return code

    def __repr__(self) -> str:
        text: str = self._solution.ask("repr", self)
        return text

    def __str__(self) -> str:
        text: str = self._solution.ask("str", self)
        return text


_METHODS: dict[str, Callable[..., Any]] = {
    "__call__": lambda self, *args, **kwargs: self._solution.ask("call", self, args, kwargs),
    "__len__": lambda self: self._solution.ask("len", self),
}
"""What a `Remote` has only if its value has it, too: `callable` and its like look for them."""


@cache
def _kind(*methods: str) -> type[Remote]:
    return type("Remote", (Remote,), {"__slots__": ()} | {name: _METHODS[name] for name in methods})


class Solution:
    """The judge's end of the channel to the child. Nothing that comes out of it is trusted."""

    def __init__(self, child: int, channel: Channel, cpu_seconds: int) -> None:
        self._child, self._channel, self._cpu_seconds = child, channel, cpu_seconds
        self._remotes: dict[int, Remote] = {}

    def ask(self, operation: str, *arguments: Any) -> Any:
        """What the child answers. Raises what it raised, and SolutionError with how it ended."""
        request = [operation, encode(arguments, _ref)]
        try:
            self._channel.send(request)
            answer = self._channel.receive()
            if answer[0] == "value":
                return decode(answer[1], lambda value: self._remote(*value))
            raised = _raised(*answer[1:])
        except TimeoutError:
            raise SolutionError("timeout", "no answer within wall_seconds") from None
        except (EOFError, ConnectionError):
            raise SolutionError(*self._end()) from None
        except (ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
            raise SolutionError("violation", f"what the solution's process sent is no answer: {error}") from None
        raise raised

    def _remote(self, ref: int, methods: list[str]) -> Remote:
        """One for each value, so that `is` tells values apart."""
        if ref not in self._remotes:
            self._remotes[ref] = _kind(*methods)(self, ref)
        return self._remotes[ref]

    def _end(self) -> tuple[str, str]:
        """How the child ended; one that only closed its channel is ended here."""
        os.kill(self._child, signal.SIGKILL)
        _, status, used = os.wait4(self._child, 0)
        code = os.waitstatus_to_exitcode(status)
        if code == -signal.SIGXCPU or used.ru_utime + used.ru_stime >= self._cpu_seconds:
            return "timeout", "more than cpu_seconds"
        end = f"signal {-code}" if code < 0 else f"exit status {code}"
        return "error", f"the solution's process ended with {end} before its tests did"


def _ref(value: Any) -> int:
    if not isinstance(value, Remote):
        raise TypeError(f"the tests pass a {type(value).__name__}, which is not plain data")
    return int(value._ref)


def _raised(name: str, builtin: str, text: str, number: int | None) -> BaseException:
    """What the solution raised, of the builtin type that its own type is or derives from, for tests that expect it.

    `of_solution` is its verdict and reason, for those that do not.
    """
    reason = f"{name:.100}: {text:.{_REASON_CHARACTERS}}"
    kind = getattr(builtins, builtin)
    if not issubclass(kind, Exception):
        return SolutionError("error", reason)
    error: Exception = _made(kind, text)
    error.of_solution = (_verdict(builtin, number), reason)  # type: ignore[attr-defined]
    return error


def _made(kind: type[Exception], text: str) -> Exception:
    try:
        return kind(text)
    except TypeError:  # one that takes more than a text, such as UnicodeDecodeError
        return _made(kind.__base__, text)  # type: ignore[arg-type]


def _verdict(error: str, number: int | None) -> str:
    """What comes of an exception of the solution: its type's name and, of an OSError, its errno."""
    if error == "MemoryError" or number == errno.ENOMEM:
        return "memory"
    return "violation" if number in _FORBIDDEN else "error"


def judge(program: dict[str, Any], solution: Solution) -> tuple[str, str]:
    """Runs all of a program's tests: the verdict and, on all but `pass`, the reason."""
    test = ""
    try:
        names = solution.ask("load", program["solution"], program["names"])
        if not isinstance(names, dict) or names.keys() != set(program["names"]):
            return "violation", "the solution's process hands over other names than it was asked for"
        namespace = {"__name__": "tests", **names}
        for test in (program["setup"], *program["tests"]):
            exec(compile(test, "test", "exec", dont_inherit=True), namespace)
            namespace |= names  # which a prompt in the setup defines, too
    except BaseException as error:
        return _outcome(error, test)
    return "pass", ""


def _outcome(error: BaseException, test: str) -> tuple[str, str]:
    """The verdict and the reason where `test` raised `error`."""
    if isinstance(error, SolutionError):
        return error.verdict, str(error)
    if hasattr(error, "of_solution"):
        verdict, reason = error.of_solution
        return verdict, reason
    if isinstance(error, AssertionError):
        return "fail", _told(test, error)
    if isinstance(error, MemoryError):
        return "memory", "the tests need more than memory_mib with what the solution returned"
    return "error", _told(f"a test raised {type(error).__name__}", error)


def _told(what: str, error: BaseException) -> str:
    """`what`, and the error's text where it has one: a value of the solution in it need not tell its own."""
    try:
        text = str(error)
    except BaseException:
        text = ""
    return f"{what}: {text}" if text else what


def serve(channel: Channel) -> NoReturn:
    """The child: loads the solution, then does what the judge asks of it."""
    kept: list[Any] = []
    refs: dict[int, int] = {}

    def refer(value: Any) -> list[Any]:
        ref = refs.setdefault(id(value), len(kept))
        if ref == len(kept):
            kept.append(value)
        return [ref, [name for name in _METHODS if has(value, name)]]

    def has(value: Any, method: str) -> bool:
        """Whether its class, or one that it derives from but `object`, has the method."""
        return any(method in vars(base) for base in type(value).__mro__[:-1])

    operations: dict[str, Callable[..., Any]] = {
        "load": load,
        "call": lambda function, args, kwargs: function(*args, **kwargs),
        "list": list,
        "len": len,
        "truth": bool,
        "hash": hash,
        "str": str,
        "repr": repr,
        "compares": lambda value: has(value, "__eq__") or has(value, "__ne__"),
        "get": getattr,
        "set": setattr,
    }
    while True:
        operation, arguments = channel.receive()
        try:
            answer = ["value", encode(operations[operation](*decode(arguments, kept.__getitem__)), refer)]
        except BaseException as error:
            builtin = next(base.__name__ for base in type(error).__mro__ if base.__module__ == "builtins")
            text = str(error)[:_REASON_CHARACTERS]
            answer = ["raised", type(error).__name__, builtin, text, getattr(error, "errno", None)]
        channel.send(answer)


def load(source: str, names: list[str]) -> dict[str, Any]:
    """Runs the solution as a module of its own; what it calls `names`."""
    module = sys.modules["solution"] = types.ModuleType("solution")
    exec(compile(source, "solution", "exec", dont_inherit=True), module.__dict__)
    return {name: getattr(module, name) for name in names}


def limit(limits: dict[str, Any]) -> None:
    """Limits this process and those that it forks. A limit of None is not set."""
    mib = 2**20
    for kind, amount in (
        (resource.RLIMIT_AS, limits["memory_mib"] * mib),
        (resource.RLIMIT_FSIZE, limits["file_mib"] * mib),
        (resource.RLIMIT_NPROC, limits["processes"] and limits["processes"] + 1),  # and the judge
        (resource.RLIMIT_NOFILE, 64),
        (resource.RLIMIT_CORE, 0),
    ):
        if amount is not None:
            resource.setrlimit(kind, (amount, amount))


def close_ways_out() -> None:
    """Keeps this process from being traced, and it and all that it forks from any privilege and from `_DENIED`."""
    machine = os.uname().machine
    if machine not in _AUDIT_ARCH:
        sys.exit(f"no numbers of system calls are known for {machine}; a sandbox needs one of {', '.join(_AUDIT_ARCH)}")
    numbers = [pair[machine != "x86_64"] for pair in _DENIED.values()]
    load, equal, at_least, give_back = 0x20, 0x15, 0x35, 0x06
    # Each step: code, steps to skip where the condition holds, and where it does not, operand (struct sock_filter). The
    # number lies at 0 of what a filter is shown, the machine at 4; numbers from 2^30 are those of x32.
    steps = [(load, 0, 0, 4), (equal, 0, len(numbers) + 3, _AUDIT_ARCH[machine])]
    steps += [(load, 0, 0, 0), (at_least, len(numbers) + 1, 0, 2**30)]
    steps += [(equal, len(numbers) - i, 0, number) for i, number in enumerate(numbers)]
    steps += [(give_back, 0, 0, 0x7FFF0000), (give_back, 0, 0, 0x00050000 | errno.EPERM)]  # allow; fail with EPERM
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *step) for step in steps))
    program = ctypes.create_string_buffer(struct.pack("HxxxxxxQ", len(steps), ctypes.addressof(code)))
    libc = ctypes.CDLL(None, use_errno=True)
    for option, *arguments in (
        (_PR_SET_PDEATHSIG, signal.SIGKILL, None, 0, 0),
        (_PR_SET_DUMPABLE, 0, None, 0, 0),
        (_PR_SET_NO_NEW_PRIVS, 1, None, 0, 0),
        (_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, program, 0, 0),
    ):
        if libc.prctl(option, *arguments):
            sys.exit(f"the judge cannot protect itself: prctl {option}: {os.strerror(ctypes.get_errno())}")
    if libc.capset(struct.pack("Ii", _LINUX_CAPABILITY_VERSION_3, 0), bytes(24)):
        sys.exit(f"the judge cannot give up its capabilities: {os.strerror(ctypes.get_errno())}")


def become_solution(connection: socket.socket, limits: dict[str, Any], judge: int) -> NoReturn:
    """What the fork does: it keeps the channel and the output, and nothing else, and ends with its judge."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)  # which a fork does not take along
    if os.getppid() != judge:
        os._exit(1)
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.closerange(3, connection.fileno())
    os.closerange(connection.fileno() + 1, 64)
    resource.setrlimit(resource.RLIMIT_CPU, (limits["cpu_seconds"], limits["cpu_seconds"] + 1))
    try:
        serve(Channel(connection))
    finally:
        os._exit(1)


def main() -> None:
    """Forks the child, says "ready", reads a program from stdin and writes the verdict to stdout, as JSON both."""
    limits = json.loads(sys.argv[1])
    os.environ.clear()
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    close_ways_out()
    verdicts = os.dup(1)
    os.dup2(2, 1)  # what the tests print is output, too
    limit(limits)
    sys.set_int_max_str_digits(0)
    ours, theirs = socket.socketpair()
    judge_id, child = os.getpid(), os.fork()
    if not child:
        become_solution(theirs, limits, judge_id)
    theirs.close()
    os.write(verdicts, b"ready\n")
    program = json.loads(sys.stdin.buffer.read())
    started = time.monotonic()
    solution = Solution(child, Channel(ours, started + limits["wall_seconds"]), limits["cpu_seconds"])
    verdict, reason = judge(program, solution)
    reason = " ".join(reason[: 2 * _REASON_CHARACTERS].split())[:_REASON_CHARACTERS]
    os.write(verdicts, json.dumps([verdict, reason, time.monotonic() - started]).encode())
    os._exit(0)


if __name__ == "__main__":
    main()
