"""Starting, watching and ending worker processes: what it asks of the operating system goes through `system`.

A worker leads a session of its own; ending it ends all that it started, also what has left the session (Linux).
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path

from iterative_sft_cli import system

POSIX = os.name == "posix"
LINUX = sys.platform.startswith("linux")
MARK = "ISFT_WORKER"
"""Environment variable with a worker's own number, by which its descendants are found."""

ALLOWED = (
    *("PATH", "HOME", "LANG", "LANGUAGE", "LC_ALL", "LC_CTYPE", "TZ", "TMPDIR", "TEMP", "TMP", "USER", "LOGNAME"),
    *("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH"),
    *("SYSTEMROOT", "SYSTEMDRIVE", "COMSPEC", "PATHEXT", "USERPROFILE", "APPDATA", "LOCALAPPDATA", "PROGRAMDATA"),
    *("HF_HOME", "HF_HUB_CACHE", "HF_HUB_OFFLINE", "HF_ENDPOINT", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE"),
    *("XDG_CACHE_HOME", "SSL_CERT_FILE", "SSL_CERT_DIR", "REQUESTS_CA_BUNDLE", "NO_PROXY", "no_proxy"),
)
"""Environment variables that every worker gets; none of them holds a secret. Others are listed in a filter's `env`."""

BOOT = """
import importlib.util, sys
place, memory = sys.argv[1:3]
spec = importlib.util.spec_from_file_location("iterative_sft_cli", place + "/__init__.py", submodule_search_locations=[place])
package = sys.modules["iterative_sft_cli"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(package)
from iterative_sft_cli.filters import processes
processes.limit(memory)
from iterative_sft_cli.filters.worker import main
main()
"""
"""What a worker runs: this very package, whichever other copy may be installed, and no folder of ours on the search path."""

_PAGE = os.sysconf("SC_PAGE_SIZE") if POSIX else 4096


def environment(passed: Sequence[str], *, device: str | None, threads: int | None, mark: str) -> dict[str, str]:
    """The environment of a worker: the allowed names, those the filter lists, fixed hashing, no GPU unless it has one."""
    # not in the workers, which import this module too
    from iterative_sft_cli.config.secrets import secrets_of

    env = {name: os.environ[name] for name in ALLOWED if name in os.environ}
    # an address such as HF_ENDPOINT may hold a password; one that is listed is passed on all the same
    env = {name: value for name, value in env.items() if not secrets_of({name: value})}
    env |= {name: os.environ[name] for name in passed if name in os.environ}
    env |= {"PYTHONHASHSEED": "0", "PYTHONDONTWRITEBYTECODE": "1", "TOKENIZERS_PARALLELISM": "false", MARK: mark}
    if threads is not None:
        env |= {name: str(threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")}
    if device is None or device == "cpu":
        env["CUDA_VISIBLE_DEVICES"] = ""
    elif "CUDA_VISIBLE_DEVICES" in os.environ:
        env["CUDA_VISIBLE_DEVICES"] = os.environ["CUDA_VISIBLE_DEVICES"]
    return env


def start(env: Mapping[str, str], folder: Path, *, data_bytes: int | None) -> subprocess.Popen[bytes]:
    """A fresh interpreter running `filters.worker` in `folder`, with pipes on stdin, stdout and stderr."""
    package = str(Path(__file__).resolve().parents[1])
    return subprocess.Popen(
        [sys.executable, "-P", "-X", "utf8", "-c", BOOT, package, str(data_bytes or "")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=dict(env),
        cwd=folder,
        start_new_session=POSIX,
        bufsize=0,
    )


def limit(data_bytes: str) -> None:
    """In the worker: no core files, bounded files and memory, and (Linux) end when the main process ends."""
    # the thread that starts a worker lives as long as the worker
    system.limit_process(file_bytes=16 << 30, data_bytes=int(data_bytes) if data_bytes else None)


def tell_stacks_when_asked() -> None:
    """In the worker: print every thread's stack when `ask_for_stacks` asks, also in the middle of a call into C."""
    if system.STACKS_SIGNAL is not None:
        faulthandler.register(system.STACKS_SIGNAL, file=2, all_threads=True)


def ask_for_stacks(process: subprocess.Popen[bytes]) -> bool:
    """Ask a worker where it stands; False where that cannot be asked."""
    if system.STACKS_SIGNAL is None or process.poll() is not None:
        return False
    with contextlib.suppress(OSError):
        process.send_signal(system.STACKS_SIGNAL)
    return True


def end(process: subprocess.Popen[bytes], mark: str) -> None:
    """Kill a worker, its session, its descendants, and every process that carries its mark. Returns within seconds."""
    # by parents too: a process has no environment for a moment while it starts another program
    below = descendants(process.pid) if process.poll() is None else []
    system.end_group(process.pid)
    with contextlib.suppress(ProcessLookupError, OSError):
        process.kill()
    _kill_all(below)
    if LINUX:
        # reading another process's environment can wait for that process
        sweep = threading.Thread(target=lambda: _kill_all(marked(mark)), daemon=True)
        sweep.start()
        sweep.join(2)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(5)


def _kill_all(pids: Sequence[int]) -> None:
    for pid in pids:
        system.end_process(pid)


def descendants(pid: int) -> list[int]:
    """Processes below `pid` that still have their parents (Linux; elsewhere none)."""
    children: dict[int, list[int]] = {}
    for entry in os.listdir("/proc") if LINUX else ():
        if entry.isdigit():
            with contextlib.suppress(OSError, ValueError, IndexError), open(f"/proc/{entry}/stat", "rb") as file:
                children.setdefault(int(file.read().rpartition(b")")[2].split()[1]), []).append(int(entry))
    found: list[int] = []
    waiting = [pid]
    while waiting:
        below = children.get(waiting.pop(), [])
        found += below
        waiting += below
    return found


def marked(mark: str) -> list[int]:
    """Processes that inherited a worker's mark (Linux; elsewhere none)."""
    if not LINUX:
        return []
    needle = f"{MARK}={mark}\0".encode()
    found = []
    for entry in os.listdir("/proc"):
        # a worker's mark is never older than this process
        if entry.isdigit() and int(entry) != os.getpid() and _started(entry) >= _STARTED:
            with contextlib.suppress(OSError), open(f"/proc/{entry}/environ", "rb") as file:
                if needle in file.read() + b"\0":
                    found.append(int(entry))
    return found


def _started(pid: str) -> int:
    """When a process started, in clock ticks since boot; -1 when it is gone or nobody can tell."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            return int(file.read().rpartition(b")")[2].split()[19])
    except (OSError, ValueError, IndexError):
        return -1


_STARTED = _started("self")


def usage(sessions: Sequence[int]) -> dict[int, tuple[int, int]]:
    """For each session: (number of processes, resident bytes). Empty where /proc does not exist."""
    totals: dict[int, tuple[int, int]] = {}
    if not LINUX:
        return totals
    wanted = set(sessions)
    for entry in os.listdir("/proc"):
        if not entry.isdigit():
            continue
        with contextlib.suppress(OSError, ValueError, IndexError), open(f"/proc/{entry}/stat", "rb") as file:
            fields = file.read().rpartition(b")")[2].split()
            session = int(fields[3])
            if session in wanted:
                count, resident = totals.get(session, (0, 0))
                totals[session] = (count + 1, resident + int(fields[21]) * _PAGE)
    return totals


def how_it_ended(code: int) -> str:
    """A process's return code in words."""
    if code < 0:
        try:
            name = signal.Signals(-code).name
        except ValueError:
            name = f"signal {-code}"
        meaning = {"SIGSEGV": " (a crash in native code)", "SIGABRT": " (a crash in native code)"}.get(name, "")
        return f"its process was ended by {name}{meaning}"
    return f"it ended its process with exit code {code}"


def cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
