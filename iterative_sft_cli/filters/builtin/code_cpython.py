"""Model-written code in a CPython process with limits: NOT a sandbox, used only behind `sandbox: cpython`.

The process has no network where the system allows that, a time and memory limit, an empty environment and a scratch
folder; it can still read what the user can read.
"""

from __future__ import annotations

import ast
import contextlib
import os
import subprocess
import sys
import threading
from typing import Any

from iterative_sft_cli.filters import processes
from iterative_sft_cli.filters.builtin.code_program import MAX_OUTPUT_CHARS, CodeFailed, plain, raised
from iterative_sft_cli.temporary import TemporaryFolder

_LIMITS = """
import os, sys
seconds, memory = float(sys.argv[1]), int(sys.argv[2])
try:
    import resource
    for what, value in ((resource.RLIMIT_CORE, 0), (resource.RLIMIT_FSIZE, 1 << 20), (resource.RLIMIT_DATA, memory),
                        (resource.RLIMIT_CPU, int(seconds) + 2), (resource.RLIMIT_NOFILE, 64)):
        resource.setrlimit(what, (value, value))
    import ctypes
    libc = ctypes.CDLL(None)
    # namespaces of its own where allowed: users, processes and network, or at least none of these in common
    libc.unshare(0x10000000 | 0x20000000 | 0x40000000)
except Exception:
    pass
if hasattr(os, "fork"):
    # so that the parent it can name is this process, not the one that judges
    child = os.fork()
    if child:
        for descriptor in (0, 1, 2):
            os.close(descriptor)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        os._exit(code if code >= 0 else 128 - code)
    try:
        libc.prctl(1, 9, 0, 0, 0)  # end with the launcher
    except Exception:
        pass
"""

_SERVE = """
import ast
requests, replies = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
null = os.open(os.devnull, os.O_RDWR)
os.dup2(null, 0); os.dup2(null, 1); os.dup2(null, 2)
def read():
    head = requests.read(4)
    return ast.literal_eval(requests.read(int.from_bytes(head, "big")).decode()) if head else None
def write(value, dumps=repr):
    body = dumps(value).encode("utf-8", "backslashreplace")
    replies.write(len(body).to_bytes(4, "big") + body); replies.flush()
space = {"__name__": "solution"}
try:
    exec(compile(read(), "solution.py", "exec"), space)
    write(("ok", None))
except BaseException as error:
    write(("raised", f"{type(error).__name__}: {error}"))
while (request := read()) is not None:
    name, args, kwargs = request
    try:
        result = space[name](*args, **kwargs)
        if type(result) in (range, map, filter, zip) or hasattr(result, "__next__"):
            result = list(result)
        write(("ok", result))
    except BaseException as error:
        write(("raised", f"{type(error).__name__}: {error}"))
"""
MAX_REPLY_BYTES = 16 * 1024 * 1024


def _start(
    code: str, seconds: float, memory_mb: int, folder: str, mark: str, source: str = ""
) -> subprocess.Popen[bytes]:
    env = {"PATH": "/usr/bin:/bin", "PYTHONHASHSEED": "0", processes.MARK: mark}
    if not processes.POSIX:
        env["SYSTEMROOT"] = os.environ.get("SYSTEMROOT", "")
    return subprocess.Popen(
        [sys.executable, "-I", "-S", "-X", "utf8", "-c", _LIMITS + code, str(seconds), str(memory_mb << 20), source],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        cwd=folder,
        env=env,
        start_new_session=processes.POSIX,
    )


class CPythonProgram:
    """Code in a process of its own. `call` has the time limit of a test."""

    def __init__(self, source: str, seconds: float, memory_mb: int) -> None:
        self._source = source
        self._seconds = seconds
        self._memory_mb = memory_mb
        self._mark = f"code-{os.getpid()}-{id(self)}"
        self._timed_out = False

    def __enter__(self) -> CPythonProgram:
        self._folder = TemporaryFolder("code")
        self._process = _start(_SERVE, self._seconds, self._memory_mb, self._folder.name, self._mark)
        try:
            kind, text = self._exchange(self._source)
            if kind != "ok":
                raise CodeFailed("code_error", str(text))
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *exc: object) -> None:
        processes.end(self._process, self._mark)
        for stream in (self._process.stdin, self._process.stdout):
            with contextlib.suppress(OSError):
                if stream is not None:
                    stream.close()
        self._folder.cleanup()

    def call(self, name: str, args: list[Any], kwargs: dict[str, Any]) -> Any:
        """The result as plain data. Raises CodeFailed or what the code raised."""
        if not plain(args) or not plain(kwargs):
            raise CodeFailed("not_plain_data", f"{name}() is given an object")
        kind, value = self._exchange((name, args, kwargs))
        if kind == "ok":
            return value
        if str(value).startswith("MemoryError"):
            raise CodeFailed("memory", str(value))
        raise raised(str(value))

    def _exchange(self, message: Any) -> tuple[str, Any]:
        timer = threading.Timer(self._seconds, self._time_out)
        timer.start()
        try:
            body = repr(message).encode("utf-8", "backslashreplace")
            assert self._process.stdin is not None and self._process.stdout is not None
            with contextlib.suppress(OSError):
                self._process.stdin.write(len(body).to_bytes(4, "big") + body)
                self._process.stdin.flush()
            head = self._process.stdout.read(4)
            size = int.from_bytes(head, "big")
            reply = self._process.stdout.read(size) if len(head) == 4 and size <= MAX_REPLY_BYTES else b""
        finally:
            timer.cancel()
        if self._timed_out:
            raise CodeFailed("timeout", f"it ran longer than {self._seconds:g} s")
        if not reply or len(reply) < size:
            raise CodeFailed("code_error", "its process ended")
        try:
            kind, value = ast.literal_eval(reply.decode("utf-8", "replace"))
        except (ValueError, SyntaxError, MemoryError, RecursionError, TypeError):
            raise CodeFailed("not_plain_data", "it gave an object that is no plain data") from None
        return str(kind), value

    def _time_out(self) -> None:
        self._timed_out = True
        processes.end(self._process, self._mark)


def run_script(source: str, stdin: str, seconds: float, memory_mb: int) -> str:
    """What a whole program prints. Raises CodeFailed."""
    mark = f"script-{os.getpid()}-{threading.get_ident()}"
    runner = "exec(compile(sys.argv[3], 'solution.py', 'exec'), {'__name__': '__main__'})"
    with TemporaryFolder("code") as folder:
        process = _start(runner, seconds, memory_mb, folder, mark, source)
        timed_out = threading.Event()

        def time_out() -> None:
            timed_out.set()
            processes.end(process, mark)

        timer = threading.Timer(seconds, time_out)
        timer.start()
        assert process.stdin is not None and process.stdout is not None
        try:
            with contextlib.suppress(OSError):
                process.stdin.write(stdin.encode("utf-8", "replace"))
                process.stdin.close()
            said = process.stdout.read(MAX_OUTPUT_CHARS)
            if len(said) == MAX_OUTPUT_CHARS:
                processes.end(process, mark)
            code = process.wait()
        finally:
            timer.cancel()
            processes.end(process, mark)
            process.stdout.close()
    if timed_out.is_set():
        raise CodeFailed("timeout", f"it ran longer than {seconds:g} s")
    if code:
        raise CodeFailed("code_error", processes.how_it_ended(code))
    return said.decode("utf-8", "replace")
