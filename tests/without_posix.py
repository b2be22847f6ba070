"""Runs `isft` where the calls and modules that only POSIX has are missing: `python without_posix.py WORDS...` is `isft WORDS...`.

The standard library's own modules are imported before; what they and the plug-ins' workers do is theirs.
"""

import asyncio  # noqa: F401
import concurrent.futures  # noqa: F401
import faulthandler
import importlib.abc
import logging.handlers  # noqa: F401
import multiprocessing  # noqa: F401
import os
import random  # noqa: F401
import shutil  # noqa: F401
import signal
import socket  # noqa: F401
import subprocess
import sys
import tempfile  # noqa: F401
import types
import zoneinfo  # noqa: F401

import numpy  # noqa: F401
import pydantic  # noqa: F401
import rich.progress  # noqa: F401
import typer.testing  # noqa: F401
import yaml  # noqa: F401

MODULES = ("fcntl", "resource", "pwd", "grp", "termios", "pty", "posix")
CALLS = (
    *("fork", "forkpty", "killpg", "getuid", "geteuid", "getgid", "getpgid", "getpgrp", "setpgid", "setsid", "nice"),
    *("register_at_fork", "statvfs", "sched_getaffinity", "mkfifo", "O_NOFOLLOW", "O_CLOEXEC", "O_DIRECTORY"),
)
SIGNALS = (
    *("SIGKILL", "SIGUSR1", "SIGUSR2", "SIGALRM", "SIGHUP", "SIGSTOP", "SIGCONT", "SIGCHLD"),
    *("alarm", "setitimer", "pthread_kill", "pthread_sigmask"),
)


class Refuse(importlib.abc.MetaPathFinder):
    """No module that only POSIX has."""

    def find_spec(self, name, path=None, target=None):
        if name in MODULES:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


class Msvcrt(types.ModuleType):
    """Byte-range locks as Windows has them."""

    LK_NBLCK = 2

    def __init__(self):
        super().__init__("msvcrt")
        self.held = {}

    def locking(self, fd, mode, count):
        place = (os.fstat(fd).st_ino, os.lseek(fd, 0, os.SEEK_CUR))
        if self.held.setdefault(place, fd) != fd:
            raise PermissionError(13, "Permission denied")


def main() -> int:
    for name in MODULES:
        sys.modules.pop(name, None)
    sys.meta_path.insert(0, Refuse())
    sys.modules["msvcrt"] = Msvcrt()
    subprocess.Popen.kill = subprocess.Popen.terminate  # as it is there
    for owner, names in ((os, CALLS), (signal, SIGNALS), (faulthandler, ("register",))):
        for name in names:
            if hasattr(owner, name):
                delattr(owner, name)
    sys.platform = "win32"
    from iterative_sft_cli.filters import processes

    processes.POSIX = processes.LINUX = False  # `os.name` itself decides what a Path is
    del os.sysconf
    from iterative_sft_cli import system
    from iterative_sft_cli.cli import run

    assert system.try_lock.__module__ == "iterative_sft_cli.system.windows"
    return run(sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
